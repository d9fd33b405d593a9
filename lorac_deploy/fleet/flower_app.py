"""The fleet as a Flower app: a folder that `flwr run` takes, whose code is two imports.

Flower sends it to every device. What it imports is installed there already: lorac_runtime on a device, lorac_deploy on
the server.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import traceback
from pathlib import Path
from typing import Any, cast

from lorac_deploy.fleet.rounds import FleetConfig, run_rounds
from lorac_deploy.fleet.strategy import FleetRules
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.files import atomic_write, output_folder
from lorac_runtime.fleet.messages import require_flower
from lorac_runtime.version import __version__

require_flower()
from flwr.app import Context  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402

APP, SETTINGS, OUTCOME, HOME = "flower_app", "federation.json", "outcome.json", "flower_home"
PROJECT = """\
[project]
name = "lorac-fleet"
version = "{version}"
description = "Adapters of one artifact, trained on many devices"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lorac"

[tool.flwr.app.components]
serverapp = "lorac_fleet.server:app"
clientapp = "lorac_fleet.client:app"

[tool.flwr.app.config]
settings = ""
"""
MODULES = {
    "__init__.py": "",
    "server.py": "from lorac_deploy.fleet.flower_app import server_app\n\napp = server_app()\n",
    "client.py": "from lorac_runtime.fleet.client import client_app\n\napp = client_app()\n",
}
log = logging.getLogger(__name__)


def write_app(out: Path, rules: FleetRules, config: FleetConfig) -> Path:
    """The app's folder below ``out``, and the settings that its server reads. Raises OutputError."""
    app = output_folder(out / APP / "lorac_fleet").parent
    atomic_write(app / "pyproject.toml", PROJECT.format(version=__version__).encode())
    for name, text in MODULES.items():
        atomic_write(app / "lorac_fleet" / name, text.encode())
    rules = dataclasses.replace(rules, artifact=rules.artifact.resolve())
    settings = {"rules": dataclasses.asdict(rules), "config": dataclasses.asdict(config), "out": str(out.resolve())}
    atomic_write(out / SETTINGS, (json.dumps(settings, indent=1, default=str) + "\n").encode())
    return app


def server_app() -> ServerApp:
    """A ServerApp that runs the rounds that its run configuration's ``settings`` file describes, and says in
    outcome.json beside it how that ended.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        served(grid, Path(cast(str, context.run_config["settings"])))

    return app


def served(grid: Grid, settings: Path) -> None:
    """Run the rounds; whatever goes wrong is written down, and raised again for Flower's log."""
    raw = json.loads(settings.read_text(encoding="utf-8"))
    rules = FleetRules(**{**raw["rules"], "artifact": Path(raw["rules"]["artifact"])})
    out = Path(raw["out"])
    try:
        learned = run_rounds(grid, rules, out, FleetConfig(**raw["config"]))
    except LoracDeployError as err:
        _say(out, {"error": str(err)})
        raise
    except BaseException:
        _say(out, {"error": f"the server stopped unexpectedly:\n{traceback.format_exc()}"})
        raise
    _say(out, {"error": None, "clients": [dataclasses.asdict(client) for client in learned.clients]})


def _say(out: Path, outcome: dict[str, Any]) -> None:
    atomic_write(out / OUTCOME, (json.dumps(outcome, indent=1) + "\n").encode())
