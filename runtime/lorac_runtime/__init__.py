"""On-device LoRA-C fine-tuning and fusing of ONNX CNNs, without PyTorch.

>>> import lorac_runtime
>>> lorac_runtime.FinetuneConfig(epochs=5).epochs
5
"""

from lorac_runtime.adapter import AdapterFile, load_adapter, save_adapter
from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.manifest import Manifest
from lorac_runtime.manifest import load as load_manifest
from lorac_runtime.patch import FuseReport, fuse
from lorac_runtime.report import FinetuneReport
from lorac_runtime.session import finetune
from lorac_runtime.training import Progress
from lorac_runtime.version import __version__ as __version__

__all__ = [
    "AdapterFile",
    "Engine",
    "FinetuneConfig",
    "FinetuneReport",
    "FuseReport",
    "LoracDeployError",
    "Manifest",
    "Progress",
    "adapt",
    "finetune",
    "fuse",
    "load_adapter",
    "load_manifest",
    "open_engine",
    "save_adapter",
]
