"""SGD with momentum (Sutskever et al. 2013): records its update onto a program."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.params import Bucket, Groups
from handgrad.core.program import Program
from handgrad.ops import sgd
from handgrad.optim.adamw import DECAY, by_decay
from handgrad.optim.checks import check_reals
from handgrad.optim.slices import declare_low, slices


@dataclass(frozen=True)
class SGD:
    """SGD's hyperparameters; the learning rate is a step scalar.

    momentum      factor of the sum of earlier gradients; 0: none, and no memory for it
    nesterov      Nesterov's step
    weight_decay  a gradient of this times the weight, which goes through the momentum; of matrices and embeddings alone
    clip          the largest global L2 norm of the gradients that is not scaled down, 0 for no clipping

    Raises HandgradError for a number that is not finite or out of range.
    """

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_reals(self, "momentum", "weight_decay", "clip")
        if self.momentum >= 1.0:
            raise HandgradError("optim", "momentum lies in [0, 1)", self.momentum)
        if self.nesterov and not self.momentum:
            raise HandgradError("optim", "Nesterov's step has a momentum above 0", self.momentum)

    @property
    def scheduled_momentum(self) -> float | None:
        """The momentum where no schedule changes it, None where there is none."""
        return self.momentum or None

    @property
    def groups(self) -> Groups:
        """The parameters that decay, and those that do not."""
        return by_decay(self.weight_decay)

    def declare(self, g: Program) -> None:
        """Declares m in float32, if there is momentum, and the low halves."""
        if self.momentum:
            g.flat("m", F32)
        declare_low(g)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket."""
        g.emit(
            sgd,
            g.slice("grad", bucket),
            into=slices(g, bucket),
            start=g.share_start(bucket),
            nesterov=self.nesterov,
            weight_decay=self.weight_decay if bucket.group == DECAY else 0.0,
        )
