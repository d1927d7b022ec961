"""Optimizers record their update onto a program; schedules are functions of the step."""

from handgrad.optim.adamw import AdamW

__all__ = ["AdamW"]
