"""The sub-commands, one module each; `lorac_deploy.cli` has the table."""
