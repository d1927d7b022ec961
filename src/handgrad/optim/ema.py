"""Ema: an optimizer that also averages the weights that another one updates."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.number import real
from handgrad.core.params import Bucket, Groups
from handgrad.core.program import Program
from handgrad.ops import ema
from handgrad.optim.record import Optimizer

EMA = "ema"  # the flat vector
MOST = 0.999999  # float32 averages with a larger decay would not move


@dataclass(frozen=True)
class Ema:
    """The updates of `optim`, and an exponential moving average of the weights after them, in float32.

    The average is read by `--ema` of eval, generate and convert; the steps are those without it, to the bit. Raises
    HandgradError unless 0 < decay <= 0.999999.

    >>> import handgrad as hg
    >>> hg.optim.Ema(hg.optim.AdamW(), 0.999).decay
    0.999
    """

    optim: Optimizer
    decay: float = 0.999

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", real("optim", "the decay of ema", self.decay))
        if not 0.0 < self.decay <= MOST:
            raise HandgradError("optim", f"the decay of ema is above 0 and at most {MOST}", self.decay)
        if hasattr(self.optim, "average"):
            rule = "--ema is for optimizers that do not average the weights themselves"
            raise HandgradError("optim", rule, type(self.optim).__name__, hint="leave --ema out")

    @property
    def clip(self) -> float:
        """That of `optim`."""
        return self.optim.clip

    @property
    def groups(self) -> Groups:
        """Those of `optim`."""
        return self.optim.groups

    @property
    def scheduled_momentum(self) -> float | None:
        """That of `optim`, None if its momentum cannot be scheduled."""
        return getattr(self.optim, "scheduled_momentum", None)

    def declare(self, g: Program) -> None:
        """Declares what `optim` declares, and the average in float32."""
        self.optim.declare(g)
        g.flat(EMA, F32)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket, and that of its average."""
        self.optim.update(g, bucket)
        low = "low" in g.vectors and bucket in g.vectors["low"].buckets
        g.emit(
            ema,
            g.slice("param", bucket),
            g.slice("low", bucket) if low else None,
            into={"average": g.slice(EMA, bucket)},
            decay=self.decay,
        )
