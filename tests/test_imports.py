"""Who may import whom: lorac_deploy -> lorac_exporters -> lorac_runtime, and no framework by accident."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = {
    "lorac_runtime": "runtime",
    "lorac_exporters": "exporters",
    "lorac_deploy": ".",
    "benchmarks": ".",
}
ROOMS = tuple(PACKAGES)  # each may import itself and those before it
RUNTIME_NEEDS = {"numpy", "safetensors"}
RUNTIME_LAZY = {"PIL", "cryptography", "flwr", "onnxruntime"}  # only inside of functions
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorflow", "h5py", "sympy")
HEAVY += ("tflite", "flatbuffers", "ai_edge_litert", "tflite_runtime")
TORCH_MODULE = "lorac_exporters.torch_graph"
TORCHVISION_MODULE = "lorac_deploy._torchvision"
TFLITE_MODULES = "lorac_exporters.tflite.schema"  # the start of their names
OTHER_FLATBUFFERS = "lorac_deploy.interchange.onnx_adapter"


@dataclasses.dataclass(frozen=True)
class Import:
    """``importer`` imports ``target`` (a dotted name), when it is loaded or later (``lazy``)."""

    importer: str
    target: str
    lazy: bool

    @property
    def top(self) -> str:
        """The package that is imported."""
        return self.target.split(".")[0]


def imports(sources: dict[str, str]) -> list[Import]:
    """All imports of the modules given as name -> source text."""
    return [found for module, text in sources.items() for found in _walk(module, ast.parse(text), False, sources)]


def _walk(module: str, node: ast.AST, lazy: bool, known: dict[str, str]) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(module, target, lazy) for target in _targets(module, child, known))
        else:
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types(child)
            yield from _walk(module, child, inner, known)


def _for_types(node: ast.AST) -> bool:
    """Whether this is ``if TYPE_CHECKING:``, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _targets(module: str, node: ast.ImportFrom, known: dict[str, str]) -> list[str]:
    """The modules that ``from X import a, b`` names: X.a where that is a module, else X."""
    parents = module.split(".")
    package = parents if f"{module}.__init__" in known else parents[:-1]
    stem = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
    base = ".".join(stem) if node.level else str(node.module)
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in known else base for name in names]


def violations(sources: dict[str, str]) -> list[str]:
    """Every breach of the import rules, one line each."""
    found = imports(sources)
    rules = (
        _against_the_arrow,
        _runtime_needs_more,
        _misplaced_torch,
        _misplaced_torchvision,
        _misplaced_tflite,
        _imports_an_edge,
    )
    lines = [f"{i.importer} imports {i.target}: {reason}" for i in found for rule in rules if (reason := rule(i))]
    return [*lines, *_cycles(found)]


def _against_the_arrow(i: Import) -> str | None:
    room = i.importer.split(".")[0]
    if i.top not in ROOMS or ROOMS.index(i.top) <= ROOMS.index(room):
        return None
    return f"arrows run {' -> '.join(reversed(ROOMS))}"


def _runtime_needs_more(i: Import) -> str | None:
    outside = i.top not in {"lorac_runtime", *sys.stdlib_module_names, *RUNTIME_NEEDS}
    if not i.importer.startswith("lorac_runtime") or not outside or i.top in ROOMS:
        return None
    if i.top not in RUNTIME_LAZY:
        return "a device has only numpy, safetensors and one engine"
    return None if i.lazy else "engines and Pillow are imported inside of functions"


def _misplaced_torch(i: Import) -> str | None:
    outside = i.importer.startswith("lorac_exporters") and i.importer != TORCH_MODULE
    return f"only {TORCH_MODULE} may" if outside and i.top == "torch" else None


def _misplaced_torchvision(i: Import) -> str | None:
    guarded = i.importer == TORCHVISION_MODULE
    return f"only {TORCHVISION_MODULE} may" if i.top == "torchvision" and not guarded else None


def _misplaced_tflite(i: Import) -> str | None:
    if i.importer.startswith(("benchmarks", TFLITE_MODULES)) or i.top not in {"tflite", "flatbuffers"}:
        return None
    allowed = i.top == "flatbuffers" and i.importer == OTHER_FLATBUFFERS
    return None if allowed else f"only {TFLITE_MODULES}* may"


def _imports_an_edge(i: Import) -> str | None:
    if i.top == "benchmarks" and not i.importer.startswith("benchmarks"):
        return "nothing imports benchmarks"
    if i.top in ROOMS and i.target.endswith(".cli") and not i.importer.endswith(("__main__", ".bundled")):
        return "nothing imports a command line"
    return None


def _cycles(found: list[Import]) -> list[str]:
    edges: dict[str, set[str]] = {}
    for i in found:
        if i.target != i.importer:
            edges.setdefault(i.importer, set()).add(i.target)
    reach = {module: _reachable(module, edges) for module in edges}
    looped = sorted(module for module in edges if module in reach[module])
    return [f"import cycle through {', '.join(looped)}"] if looped else []


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [*edges.get(start, ())]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += edges.get(module, ())
    return seen


def project_sources(root: Path) -> dict[str, str]:
    """Module name -> source text of the four packages; a package also stands under ``name.__init__``."""
    sources = {}
    for package, folder in PACKAGES.items():
        base = root / folder
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            sources[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
            if path.stem == "__init__":
                sources[name] = ""  # marks a package, for relative imports
    return sources


def test_the_project_keeps_its_import_rules(root: Path) -> None:
    sources = project_sources(root)
    assert {name.split(".")[0] for name in sources} >= {"lorac_runtime", "lorac_exporters", "lorac_deploy"}
    assert violations(sources) == []


PLANTED = {
    "arrow back": ({"lorac_runtime.patch": "from lorac_exporters import plan"}, "arrows run"),
    "arrow back, lazily": ({"lorac_exporters.plan": "def f():\n    import lorac_deploy.lora"}, "arrows run"),
    "framework on the device": ({"lorac_runtime.patch": "import onnx"}, "a device has only"),
    "framework in a function": ({"lorac_runtime.patch": "def f():\n    import torch"}, "a device has only"),
    "engine at load": (
        {"lorac_runtime.engines.x": "if True:\n    import onnxruntime"},
        "inside of functions",
    ),
    "torch in an exporter": (
        {"lorac_exporters.plan": "from torch import nn"},
        "only lorac_exporters.torch_graph",
    ),
    "the schema of TFLite elsewhere": (
        {"lorac_exporters.tflite.export": "import tflite"},
        "only lorac_exporters.tflite.schema* may",
    ),
    "torchvision unguarded": (
        {"lorac_deploy.models": "import torchvision.models"},
        "only lorac_deploy._torchvision",
    ),
    "benchmarks": ({"lorac_deploy.train": "import benchmarks.speed"}, "nothing imports benchmarks"),
    "command line": (
        {"lorac_deploy.train": "from lorac_deploy import cli", "lorac_deploy.cli": ""},
        "nothing imports a command line",
    ),
    "cycle": (
        {
            "lorac_runtime.a": "from lorac_runtime import b",
            "lorac_runtime.b": "from lorac_runtime.a import x",
        },
        "import cycle through lorac_runtime.a, lorac_runtime.b",
    ),
    "cycle by relative imports": (
        {
            "lorac_runtime.a": "from . import b",
            "lorac_runtime.b": "from .a import x",
            "lorac_runtime.__init__": "",
        },
        "import cycle through lorac_runtime.a, lorac_runtime.b",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(case: str) -> None:
    sources, reason = PLANTED[case]
    assert any(reason in line for line in violations(sources))


def test_allowed_imports_raise_no_alarm() -> None:
    sources = {
        "lorac_runtime.patch": "import json, numpy as np\nfrom lorac_runtime.delta import delta",
        "lorac_runtime.data": "def f():\n    from PIL import Image",
        "lorac_runtime.fleet": "if TYPE_CHECKING:\n    from flwr.app import Message",
        "lorac_exporters.torch_graph": "import torch\nimport onnx_ir as ir",
        "lorac_deploy._torchvision": "import torchvision",
        "lorac_exporters.tflite.schema_read": "import flatbuffers, tflite",
        "lorac_deploy.__main__": "from lorac_deploy.cli import main",
        "lorac_deploy.train": "import torch\nfrom lorac_exporters import plan",
        "benchmarks.speed": "import lorac_deploy.train",
    }
    assert violations(sources) == []


LOAD_ALL = """
import importlib, pkgutil
for module in pkgutil.walk_packages(lorac_runtime.__path__, "lorac_runtime."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def loaded(code: str, watched: tuple[str, ...], root: Path) -> list[str]:
    """Which of the packages ``watched`` a new Python holds after running ``code``."""
    code += "\nimport sys\nprint(*set(sys.modules) & set(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *watched]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    return sorted(done.stdout.split())


@pytest.mark.parametrize("more", ["", LOAD_ALL], ids=["the package", "all of its modules"])
def test_importing_the_runtime_loads_no_framework(more: str, root: Path) -> None:
    assert loaded("import lorac_runtime" + more, HEAVY, root) == []


def test_the_check_of_loaded_packages_sees_what_is_loaded(root: Path) -> None:
    assert loaded("import lorac_runtime" + LOAD_ALL, ("numpy", *HEAVY), root) == ["numpy"]
