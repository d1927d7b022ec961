"""Checks of hyperparameters: what several optimizers raise HandgradError for."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.number import real


def check_reals(optim: Any, *names: str) -> None:
    """Makes these fields of a frozen dataclass floats, from 0 on."""
    for name in names:
        object.__setattr__(optim, name, real("optim", name, getattr(optim, name), 0.0))


def check_betas(optim: Any) -> None:
    """Makes `betas` two floats in [0, 1)."""
    if not isinstance(optim.betas, tuple | list) or len(optim.betas) != 2:
        raise HandgradError("optim", "betas are two numbers", repr(optim.betas))
    betas = tuple(real("optim", "beta", b) for b in optim.betas)
    if not all(0.0 <= b < 1.0 for b in betas):
        raise HandgradError("optim", "both betas lie in [0, 1)", betas)
    object.__setattr__(optim, "betas", betas)
