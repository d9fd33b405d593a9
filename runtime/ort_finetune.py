"""Fine-tune a training artifact on local images, from a checkout or where lorac-runtime is installed::

    python runtime/ort_finetune.py artifact/ --data local.npz --epochs 5 --seed 0 --out adapted/

Needs numpy, safetensors and one engine; ``--help`` lists the options. The same as ``lorac-finetune``.
"""

from __future__ import annotations

import sys

from lorac_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
