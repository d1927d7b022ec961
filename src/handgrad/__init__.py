"""handgrad: trains language models with hand-written gradients. The public names, nothing else."""

from typing import Any

from handgrad import data, models, optim
from handgrad.core.errors import HandgradError
from handgrad.core.precision import Precision
from handgrad.infer import Engine, Sampling
from handgrad.optim import schedules
from handgrad.train.execution import Execution
from handgrad.train.explain import explain
from handgrad.train.outliers import Guard
from handgrad.train.start import Start
from handgrad.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    """`__version__`, read from the installed package when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module 'handgrad' has no attribute '{name}'")
    from importlib.metadata import version

    return version("handgrad")


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
    "models",
    "optim",
    "schedules",
]
