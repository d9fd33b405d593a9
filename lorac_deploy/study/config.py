"""What a study compares: a TOML file as dataclasses, every mistake in it reported together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import tomllib

from lorac_deploy.corruptions import list_corruptions
from lorac_exporters.branches import FormChoice
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.config import size_in_bytes
from lorac_runtime.errors import LoracDeployError, listed
from lorac_runtime.manifest import BnPolicy, TrainingDefaults

_LORA = {f.name for f in dataclasses.fields(LoraConfig)} - {"seed"}
_TRAINING = {f.name for f in dataclasses.fields(TrainingDefaults)}
_PATHS = ("checkpoint", "data", "test")


class StudyError(LoracDeployError):
    """A study that cannot be run as its file says."""


@dataclasses.dataclass(frozen=True)
class StudyMethod:
    """A way of training under a name of its own; see `LoraConfig` and `TrainingDefaults` for what can be set.

    ``cache`` is the byte budget of the runtime's cache, None for none.
    """

    name: str
    method: str
    lora: LoraConfig
    training: TrainingDefaults
    bn: BnPolicy | None = None
    form: FormChoice = "auto"
    cache: int | None = None


@dataclasses.dataclass(frozen=True)
class StudyDrift:
    """What happens to the data: ``none``, ``flip`` (label y becomes classes - 1 - y), ``CORRUPTION:SEVERITY``, or
    under a name of its own the files ``data`` (to train with) and ``test``.
    """

    name: str
    data: Path | None = None
    test: Path | None = None


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A grid: every method with every drift, number of samples, share of wrong labels and seed.

    ``checkpoint`` is a folder of `lorac-deploy train`, ``data`` the .npz file that local data are drawn from, ``test``
    the one that accuracy is measured on. ``target_gain`` is the share of the best method's gain that counts as
    reached, for samples and seconds needed. Without ``curve`` accuracy is taken at the end only, not after each epoch,
    and there are no seconds to the target.
    """

    checkpoint: Path
    data: Path
    test: Path
    methods: tuple[StudyMethod, ...]
    drifts: tuple[StudyDrift, ...]
    sizes: tuple[int, ...] = (1000,)
    wrong_labels: tuple[float, ...] = (0.0,)
    seeds: tuple[int, ...] = (0,)
    target_gain: float = 0.9
    curve: bool = True


def read_config(path: Path) -> StudyConfig:
    """Read a study's TOML file; paths in it count from the file's own folder.

    Raises StudyError listing everything that is wrong with it.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StudyError(f"{path} not found: give the TOML file of a study") from err
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise StudyError(f"{path} is not a TOML file that can be read: {err}") from err
    problems: list[str] = []
    config = _study(raw, path.parent, problems)
    if config is None or problems:
        raise StudyError(listed(f"{path} does not describe a study:", problems))
    return config


def _study(raw: Mapping[str, Any], folder: Path, problems: list[str]) -> StudyConfig | None:
    known = {f.name for f in dataclasses.fields(StudyConfig)} | {"training"}
    problems += [f"{name}: unknown key; known are {', '.join(sorted(known))}" for name in raw if name not in known]
    problems += [f"{name}: missing" for name in (*_PATHS, "methods", "drifts") if name not in raw]
    if problems:
        return None
    paths = {name: _path(raw[name], folder, name, problems) for name in _PATHS}
    methods = [_method(m, raw.get("training", {}), f"methods[{i}]", problems) for i, m in enumerate(raw["methods"])]
    drifts = [_drift(d, folder, f"drifts[{i}]", problems) for i, d in enumerate(raw["drifts"])]
    lists = {n: _numbers(raw[n], n, problems) for n in ("sizes", "wrong_labels", "seeds") if n in raw}
    if problems:
        return None
    more = {"target_gain": float(raw["target_gain"])} if "target_gain" in raw else {}
    more |= {"curve": raw["curve"]} if "curve" in raw else {}
    found = StudyConfig(**paths, methods=_kept(methods), drifts=_kept(drifts), **lists, **more)  # type: ignore[arg-type]
    problems += _contradictions(found)
    return found


def _kept(found: list[Any]) -> tuple[Any, ...]:
    return tuple(one for one in found if one is not None)


def _path(value: Any, folder: Path, where: str, problems: list[str]) -> Path:
    path = folder / str(value)
    if not path.exists():
        problems.append(f"{where}: {path} does not exist")
    return path


def _numbers(value: Any, where: str, problems: list[str]) -> tuple[Any, ...]:
    kind = float if where == "wrong_labels" else int
    given = value if isinstance(value, list) else []
    if not given or not all(isinstance(v, int | kind) and not isinstance(v, bool) and v >= 0 for v in given):
        problems.append(f"{where}: expected a list of numbers, 0 or more, got {value!r}")
    return tuple(kind(v) for v in given)


def _method(raw: Any, training: Mapping[str, Any], where: str, problems: list[str]) -> StudyMethod | None:
    if not isinstance(raw, Mapping) or raw.get("method") not in METHODS:
        given = raw.get("method") if isinstance(raw, Mapping) else raw
        problems.append(f"{where}: method {given!r} is not one of {', '.join(METHODS)}")
        return None
    own = {"name", "method", "bn", "form", "cache"}
    unknown = [n for n in raw if n not in own | _LORA | _TRAINING]
    problems += [f"{where}.{n}: unknown key" for n in unknown]
    method = METHODS[raw["method"]]
    idle = [n for n in raw if n in _LORA and n not in method.options]
    problems += [f"{where}.{n}: changes nothing with method {method.name}" for n in idle]
    try:
        return _made(raw, training)
    except (TypeError, ValueError) as err:
        problems.append(f"{where}: {err}")
        return None


def _made(raw: Mapping[str, Any], training: Mapping[str, Any]) -> StudyMethod:
    method = METHODS[raw["method"]]
    lora = LoraConfig(**_tuples({n: raw[n] for n in raw if n in _LORA}))
    settings = {**training, **{n: raw[n] for n in raw if n in _TRAINING}}
    return StudyMethod(
        name=str(raw.get("name") or _label(raw)),
        method=method.name,
        lora=lora,
        training=method.training(**_tuples(settings)),
        bn=cast("BnPolicy | None", raw.get("bn")),
        form=raw.get("form", "auto"),
        cache=None if "cache" not in raw else size_in_bytes(str(raw["cache"])),
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _label(raw: Mapping[str, Any]) -> str:
    """A name for a method that was given none.

    >>> _label({"method": "lora-c", "rank": 2, "blocks": ["rear"]})
    'lora-c rank=2 blocks=rear'
    """
    told = (f"{n}={','.join(v) if isinstance(v, list) else v}" for n, v in raw.items() if n not in ("method", "name"))
    return " ".join([raw["method"], *told])


def _drift(raw: Any, folder: Path, where: str, problems: list[str]) -> StudyDrift | None:
    if isinstance(raw, Mapping):
        if raw.keys() != {"name", "data", "test"}:
            problems.append(f"{where}: a drift of its own has name, data and test, got {', '.join(raw) or 'nothing'}")
            return None
        data, test = (_path(raw[n], folder, f"{where}.{n}", problems) for n in ("data", "test"))
        return StudyDrift(str(raw["name"]), data, test)
    name, _, severity = str(raw).partition(":")
    if raw not in ("none", "flip") and not (name in list_corruptions() and re.fullmatch("[1-5]", severity)):
        problems.append(
            f"{where}: {raw!r} is neither none, flip, nor CORRUPTION:SEVERITY with a severity from 1 to 5 and one of "
            f"{', '.join(list_corruptions())}"
        )
        return None
    return StudyDrift(str(raw))


def _contradictions(config: StudyConfig) -> list[str]:
    problems = [f"{what}: {name!r} stands there twice" for what, name in _repeated(config)]
    for name in ("methods", "drifts", "sizes", "seeds", "wrong_labels"):
        problems += [] if getattr(config, name) else [f"{name}: is empty"]
    problems += [f"sizes: {size} is less than 2" for size in config.sizes if size < 2]
    problems += [f"wrong_labels: {share} is not below 1" for share in config.wrong_labels if share >= 1]
    if not isinstance(config.curve, bool):
        problems.append(f"curve: expected true or false, got {config.curve!r}")
    if not 0 < config.target_gain <= 1:
        problems.append(f"target_gain: must be above 0 and at most 1, got {config.target_gain}")
    return problems


def _repeated(config: StudyConfig) -> list[tuple[str, str]]:
    found = []
    for what in ("methods", "drifts"):
        names = [one.name for one in getattr(config, what)]
        found += [(what, name) for name in dict.fromkeys(names) if names.count(name) > 1]
    return found
