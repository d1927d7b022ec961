"""Checks of hyperparameters: what several optimizers raise HandgradError for."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.number import F32_TINY, real


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


def check_eps(optim: Any) -> None:
    """Makes `eps` a normal float32 above 0: a parameter that never had a gradient would become 0 / 0."""
    check_reals(optim, "eps")
    if optim.eps < F32_TINY:
        raise HandgradError("optim", f"eps is at least {F32_TINY:.2g}, the smallest normal float32", optim.eps)
