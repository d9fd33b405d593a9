"""What turns models into files: canonical graphs, training artifacts, the drop-in report."""
