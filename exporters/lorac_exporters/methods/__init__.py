"""Every method of training by name; each is planned in a module of its own and registered here."""

from __future__ import annotations

from lorac_exporters.methods import attention, full, heads, lora_c, norms, paca, skip
from lorac_exporters.methods.method import Method

__all__ = ["METHODS", "Method"]

_MODULES = (lora_c, full, heads, norms, paca, skip, attention)
METHODS: dict[str, Method] = {method.name: method for module in _MODULES for method in module.METHODS}
