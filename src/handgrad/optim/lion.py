"""Lion (Chen et al. 2023): records its update onto a program."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32
from handgrad.core.params import Bucket, Groups
from handgrad.core.program import Program
from handgrad.ops import lion
from handgrad.optim.adamw import DECAY, by_decay
from handgrad.optim.checks import check_betas, check_reals
from handgrad.optim.slices import declare_low, slices


@dataclass(frozen=True)
class Lion:
    """Lion's hyperparameters; the learning rate is a step scalar, 3 to 10 times smaller than AdamW's.

    betas         of the direction, and of the momentum
    weight_decay  of matrices and embeddings alone, 3 to 10 times larger than AdamW's
    clip          the largest global L2 norm of the gradients that is not scaled down, 0 for no clipping

    Raises HandgradError for a number that is not finite or out of range.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_betas(self)
        check_reals(self, "weight_decay", "clip")

    @property
    def groups(self) -> Groups:
        """The parameters that decay, and those that do not."""
        return by_decay(self.weight_decay)

    def declare(self, g: Program) -> None:
        """Declares m in float32 and the low halves."""
        g.flat("m", F32)
        declare_low(g)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket."""
        g.emit(
            lion,
            g.slice("grad", bucket),
            into=slices(g, bucket),
            start=g.share_start(bucket),
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay if bucket.group == DECAY else 0.0,
        )
