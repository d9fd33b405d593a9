"""The errors that lorac-deploy raises by itself.

Caller mistakes (a wrong argument) are ``TypeError`` or ``ValueError``. Everything else is::

    LoracDeployError
    ├── ArtifactError      a manifest or a file of the artifact is missing, damaged or of another version
    ├── AdapterError       an adapter does not fit the model it is used with
    ├── DataError          local data cannot be used: shape, dtype, labels, values
    ├── EngineError        a training engine is missing or refuses its files
    ├── OutputError        the output folder cannot be written, or is full
    ├── DivergenceError    the loss became non-finite
    ├── ConversionError    a model holds something that cannot be converted or trained
    ├── CacheError         features cannot be kept: too little space, nothing frozen in front, the folder in use
    ├── CheckpointError    a checkpoint (cloud or device) cannot be read or does not belong here
    ├── StoreError         a store of domains is missing or damaged, or lacks the domain
    ├── StateError         a state folder is missing or damaged, or has no such generation
    ├── BusyError          another process works in the output folder
    ├── FleetError         a fleet cannot go on: too few clients, or too few answers that count
    ├── LimitError         a run does not fit into the memory that it may use
    └── StoppedError       a run stopped at a checkpoint, because its time was up
"""


class LoracDeployError(Exception):
    """Base of all errors of this project; its text is written for the user."""


class ArtifactError(LoracDeployError):
    """A manifest or a file of the artifact is missing, damaged or of another version."""


class AdapterError(LoracDeployError):
    """An adapter does not fit the model it is used with."""


class DataError(LoracDeployError):
    """Local data cannot be used."""


class EngineError(LoracDeployError):
    """A training engine is missing or refuses its files."""


class OutputError(LoracDeployError):
    """The output folder cannot be written, or is full."""


class DivergenceError(LoracDeployError):
    """The loss became non-finite."""


class ConversionError(LoracDeployError):
    """A model holds something that cannot be converted or trained."""


class CacheError(LoracDeployError):
    """The results of frozen layers cannot be kept as asked."""


class CheckpointError(LoracDeployError):
    """A checkpoint cannot be read or does not belong here."""


class StoreError(LoracDeployError):
    """A store of domains is missing or damaged, or has no such domain."""


class StateError(LoracDeployError):
    """A state folder is missing or damaged, or has no such generation."""


class BusyError(LoracDeployError):
    """Another process works in the output folder."""


class FleetError(LoracDeployError):
    """A fleet cannot go on: too few clients, or too few answers that count."""


class LimitError(LoracDeployError):
    """A run does not fit into the memory that it may use."""


class StoppedError(LoracDeployError):
    """A run stopped at a checkpoint, because its time was up; the same call goes on."""


def listed(headline: str, problems: list[str]) -> str:
    """Join a headline and the problems found into one message, a line each.

    >>> print(listed("adapter does not fit:", ["fc.weight is missing", "rank is 4, expected 8"]))
    adapter does not fit:
      - fc.weight is missing
      - rank is 4, expected 8
    """
    return "\n".join([headline, *(f"  - {problem}" for problem in problems)])
