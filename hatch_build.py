"""What pyproject.toml cannot say: lorac-deploy needs lorac-runtime of the very same version."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Gives `dependencies`: lorac-runtime as new as this, and those listed in pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        metadata["dependencies"] = [f"lorac-runtime=={metadata['version']}", *self.config["dependencies"]]
