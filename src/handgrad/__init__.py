"""handgrad: trains language models with hand-written gradients. The public names, nothing else.

A name is imported when it is first used: the command line answers Ctrl-C before it has imported anything large.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handgrad import data, models, optim
    from handgrad.core.errors import HandgradError
    from handgrad.core.precision import Precision
    from handgrad.infer import Engine, Sampling
    from handgrad.infer.load import load
    from handgrad.infer.texts import load_encoder
    from handgrad.optim import schedules
    from handgrad.train.execution import Execution
    from handgrad.train.explain import explain
    from handgrad.train.outliers import Guard
    from handgrad.train.start import Start
    from handgrad.train.trainer import Trainer


__all__ = [
    "Engine",
    "Execution",
    "Guard",
    "HandgradError",
    "Precision",
    "Sampling",
    "Start",
    "Trainer",
    "data",
    "explain",
    "load",
    "load_encoder",
    "models",
    "optim",
    "schedules",
]

_MODULES = {  # of the names that are no module of the same name here
    "Engine": "infer",
    "Execution": "train.execution",
    "Guard": "train.outliers",
    "HandgradError": "core.errors",
    "Precision": "core.precision",
    "Sampling": "infer",
    "Start": "train.start",
    "Trainer": "train.trainer",
    "explain": "train.explain",
    "load": "infer.load",
    "load_encoder": "infer.texts",
    "schedules": "optim",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from handgrad.core.install import own_version

        return own_version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MODULES:
        return import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
