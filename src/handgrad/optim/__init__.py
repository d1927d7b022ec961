"""Optimizers record their update onto a program; schedules are functions of the step."""

from handgrad.optim import schedules
from handgrad.optim.adamw import AdamW
from handgrad.optim.ema import Ema
from handgrad.optim.record import Optimizer, record_step

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW}  # by the name that settings give them: dataclasses

__all__ = ["OPTIMIZERS", "AdamW", "Ema", "Optimizer", "record_step", "schedules"]
