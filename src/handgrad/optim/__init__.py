"""Optimizers record their update onto a program; schedules are functions of the step."""

from handgrad.optim import schedules
from handgrad.optim.adamw import AdamW
from handgrad.optim.muon import Muon
from handgrad.optim.record import Optimizer, record_step

OPTIMIZERS: dict[str, type[Optimizer]] = {  # by the name that settings give them: dataclasses
    "adamw": AdamW,
    "muon": Muon,
}

__all__ = ["OPTIMIZERS", "AdamW", "Muon", "Optimizer", "record_step", "schedules"]
