"""Optimizers record their update onto a program; schedules are functions of the step."""

from handgrad.optim import schedules
from handgrad.optim.adafactor import Adafactor
from handgrad.optim.adamw import AdamW
from handgrad.optim.ema import Ema
from handgrad.optim.lion import Lion
from handgrad.optim.muon import Muon
from handgrad.optim.record import Optimizer, record_step
from handgrad.optim.schedule_free import ScheduleFree
from handgrad.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {  # by the name that settings give them: dataclasses
    "adamw": AdamW,
    "muon": Muon,
    "sgd": SGD,
    "lion": Lion,
    "adafactor": Adafactor,
    "schedule_free": ScheduleFree,
}

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Ema",
    "Lion",
    "Muon",
    "Optimizer",
    "ScheduleFree",
    "record_step",
    "schedules",
]
