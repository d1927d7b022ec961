"""Schedule-free AdamW (Defazio et al. 2024): records its update onto a program, and the average that is evaluated."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.params import Bucket, Groups
from handgrad.core.program import Program
from handgrad.ops import schedule_free, schedule_free_average, schedule_free_count
from handgrad.optim.adamw import DECAY, by_decay
from handgrad.optim.checks import check_betas, check_eps, check_reals
from handgrad.optim.slices import Slices, declare_low, slices

ITERATE = "z"  # the flat vector
COUNT = "schedule_free_count"  # the state


@dataclass(frozen=True)
class ScheduleFree:
    """The hyperparameters of schedule-free AdamW; the learning rate is a step scalar, constant after warm-up.

    Gradients are taken at y = beta1 x + (1 - beta1) z, which the parameters hold. z moves as AdamW's weights do, and x
    is the average of all z: it is evaluated, sampled and exported.

    betas         the share of x in y, above 0; the decay of the second moment
    weight_decay  decoupled, of y; of matrices and embeddings alone
    clip          the largest global L2 norm of the gradients that is not scaled down, 0 for no clipping

    Raises HandgradError for a number that is not finite or out of range.

    >>> ScheduleFree().interpolation
    0.9
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_betas(self)
        check_eps(self)
        check_reals(self, "weight_decay", "clip")
        if not self.betas[0]:
            raise HandgradError("optim", "beta1 of schedule_free is above 0: y without x says nothing of x", 0.0)

    @property
    def interpolation(self) -> float:
        """The share of x in y."""
        return self.betas[0]

    @property
    def groups(self) -> Groups:
        """The parameters that decay, and those that do not."""
        return by_decay(self.weight_decay)

    def declare(self, g: Program) -> None:
        """Declares z and v in float32 and the low halves, and appends the call that counts the step."""
        g.flat(ITERATE, F32)
        g.flat("v", F32)
        declare_low(g)
        g.emit(schedule_free_count, into={"count": g.state(COUNT, (2,), F32)})

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket."""
        g.emit(
            schedule_free,
            g.slice("grad", bucket),
            g.states[COUNT],
            into=slices(g, bucket),
            start=g.share_start(bucket),
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay if bucket.group == DECAY else 0.0,
        )

    def average(self, g: Program, held: Slices) -> None:
        """Appends the call that puts x in the place of y, to another program than that of the updates.

        held: the slices of a bucket
        """
        g.emit(schedule_free_average, held[ITERATE], held.get("low"), into={"p": held["p"]}, beta1=self.betas[0])
