"""handgrad: trains language models with hand-written gradients. The public names, nothing else."""

from handgrad import data, models, optim
from handgrad.core.errors import HandgradError
from handgrad.core.precision import Precision
from handgrad.infer import Engine, Sampling, load
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
    "models",
    "optim",
    "schedules",
]
