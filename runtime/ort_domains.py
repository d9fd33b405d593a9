"""Keep several adapters for one base and switch between them, from a checkout or where lorac-runtime is installed::

    python runtime/ort_domains.py store/ create --artifact artifact/
    python runtime/ort_domains.py store/ add night --adapter adapted/adapter.safetensors
    python runtime/ort_domains.py store/ switch night --out app/

Needs numpy and safetensors; ``--help`` lists the actions. The same as ``lorac-domains``.
"""

from __future__ import annotations

import sys

from lorac_runtime.domains_cli import main

if __name__ == "__main__":
    sys.exit(main())
