"""Records the norm and update segments of a step, which follow backward."""

from typing import Protocol

from handgrad.core.communicate import Collectives, communicate, publish, record_norm
from handgrad.core.op import Phase
from handgrad.core.params import Bucket, Groups
from handgrad.core.program import Program
from handgrad.ops import fill, global_norm, share_norm
from handgrad.ops.collectives import all_gather, all_gather_f32, all_reduce, reduce_scatter, sum_losses

COLLECTIVES = Collectives(all_reduce, reduce_scatter, all_gather, all_gather_f32, sum_losses, share_norm, fill)


class Optimizer(Protocol):
    """The interface of an optimizer.

    An optimizer whose momentum may be scheduled reads the step scalar `momentum` and has an attribute
    `scheduled_momentum`: its value where there is no schedule.

    An optimizer whose model is an average, not the weights that learn (schedule_free.py), has a method `average`, which
    appends the call that puts the average of a bucket in the place of its weights, and an attribute `interpolation`.

    clip    the largest global L2 norm of the gradients that is not scaled down, 0 for no clipping
    groups  which parameters share their settings
    """

    @property
    def clip(self) -> float: ...

    @property
    def groups(self) -> Groups: ...

    def declare(self, g: Program) -> None:
        """Declares the flat vectors and states that the update needs; appends what comes before the first bucket."""

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket."""


def record_step(g: Program, optim: Optimizer) -> None:
    """Appends the norm of all gradients, then one update per bucket, to a program that has its backward.

    Between the two segments the host can decide to skip the update. Among several ranks, `communicate` has inserted
    what they exchange.
    """
    g.group_by(optim.groups)
    g.phase = Phase.BACKWARD
    for info in g.params.values():
        if info.trainable and not g.is_written(g.grad(info.tensor)):  # no call uses it: its gradient is zero
            g.emit(fill, into={"x": g.grad(info.tensor)}, n=info.tensor.size, value=0.0)
    communicate(g, COLLECTIVES)
    g.phase = Phase.NORM
    if g.ranks.shares(1) > 1:
        record_norm(g, COLLECTIVES, global_norm, optim.clip)
    else:
        g.emit(global_norm, g.whole("grad"), into={"scalars": g.scalars}, clip=optim.clip)
    g.phase = Phase.UPDATE
    optim.declare(g)
    for bucket in g.trained:
        with g.block(bucket.block, prefix=False):
            optim.update(g, bucket)
            publish(g, g, bucket, all_gather)
    g.phase = Phase.FORWARD
