"""``python -m lorac_deploy`` and ``accelerate launch -m lorac_deploy``: the command `lorac-deploy`."""

import sys

from lorac_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
