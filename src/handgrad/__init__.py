"""handgrad: trains language models with hand-written gradients. The public names, nothing else."""

from handgrad import data, models, optim
from handgrad.core.errors import HandgradError
from handgrad.infer import Engine, Sampling
from handgrad.optim import schedules
from handgrad.train.explain import explain
from handgrad.train.trainer import Trainer

__all__ = ["Engine", "HandgradError", "Sampling", "Trainer", "data", "explain", "models", "optim", "schedules"]
