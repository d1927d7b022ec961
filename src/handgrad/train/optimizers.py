"""The optimizer that the settings name, and the settings that stand for an optimizer."""

from dataclasses import asdict, fields
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.optim import OPTIMIZERS, Ema, Optimizer
from handgrad.train.config import OptimConfig

BETAS = ("beta1", "beta2")  # two settings, one field of an optimizer: betas


def optimizer_of(o: OptimConfig) -> Optimizer:
    """The optimizer of these settings, with an average of the weights if they ask for one. A setting that is None is
    left to the optimizer's own default.

    Raises HandgradError for a number out of range, and for a setting of another optimizer.
    """
    kind = OPTIMIZERS[o.optimizer]
    known, others = _names(kind), own_settings()
    for name in sorted(others - known):
        if getattr(o, name) != getattr(OptimConfig, name):
            having = ", ".join(word for word, other in OPTIMIZERS.items() if name in _names(other))
            flag = f"--{name.replace('_', '-')}"
            raise HandgradError("optim", f"{flag} is a setting of {having}", f"--optimizer {o.optimizer}")
    values = {name: getattr(o, name) for name in known if getattr(o, name) is not None}
    if known.issuperset(BETAS):
        values["betas"] = tuple(values.pop(name) for name in BETAS)
    return Ema(kind(**values), o.ema) if o.ema else kind(**values)


def optimizer_settings(optim: Optimizer) -> dict[str, Any]:
    """The settings that stand for an optimizer; none for one that no settings name."""
    if isinstance(optim, Ema):
        return optimizer_settings(optim.optim) | {"ema": optim.decay}
    names = [name for name, kind in OPTIMIZERS.items() if type(optim) is kind]
    if not names:
        return {}
    values = asdict(optim)  # type: ignore[call-overload]  # every optimizer with a name is a dataclass
    if "betas" in values:
        values |= dict(zip(BETAS, values.pop("betas")))
    return {"optimizer": names[0]} | values


def optimizer_name(optim: Optimizer) -> str:
    """The name of an optimizer, as checkpoints keep it: its setting, or its type if no settings name it."""
    own = optim.optim if isinstance(optim, Ema) else optim
    return optimizer_settings(own).get("optimizer", type(own).__name__)


def own_settings() -> set[str]:
    """The names of all settings that belong to one optimizer or another."""
    return {name for kind in OPTIMIZERS.values() for name in _names(kind)}


def _names(kind: type) -> set[str]:
    """The settings of a kind of optimizer, by name."""
    names = {f.name for f in fields(kind)}
    return names - {"betas"} | set(BETAS) if "betas" in names else names
