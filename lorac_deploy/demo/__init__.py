"""The whole loop on handwritten digits: `python -m lorac_deploy.demo`, from a checkout."""
