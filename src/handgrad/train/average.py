"""Average: evaluates an optimizer's average of the weights, such as ScheduleFree's, in the place of the weights."""

import numpy as np

from handgrad.backends.base import Arena, Backend
from handgrad.core.communicate import publish
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.ops.collectives import all_gather
from handgrad.optim import Optimizer
from handgrad.optim.slices import slices


def record_average(primary: Program, optim: Optimizer) -> Program | None:
    """The list that puts the average in the place of the weights that learn; None if the optimizer keeps none.

    primary: the program of training, which lays them out
    """
    if not hasattr(optim, "average"):
        return None
    p = Program(primary.dtype, master=primary.master, ranks=primary.ranks)
    for bucket in primary.trained:
        with p.block(bucket.block, prefix=False):
            optim.average(p, slices(primary, bucket))
            publish(p, primary, bucket, all_gather)
        is_sharded = p.ranks.shares(3) > 1
        p.output(bucket.name, primary.slice("param", bucket) if is_sharded else primary.bucket("param", bucket))
    flats = {t for c in p.calls for t in (*c.ins, *c.outs) if t is not None and t.flat}
    p.starts |= {t: primary.element(t) for t in flats}
    return p


class Average:
    """Switches the parameters in an arena between weights and average. Without a program, weights are all there is.

    The weights wait in host memory, so that a run that is evaluated trains on with the same bits.
    """

    def __init__(self, program: Program | None, backend: Backend, arena: Arena):
        self._run = None if program is None else backend.bind(program, arena)
        self._backend, self._arena = backend, arena
        self._weights: dict[Tensor, np.ndarray] = {}  # while the average is in their place

    @property
    def is_kept(self) -> bool:
        """Whether there is an average, so that `show` writes."""
        return self._run is not None

    def show(self) -> None:
        """Puts the average in the place of the weights. All ranks call this."""
        if self._run is not None and not self._weights:
            held = self._run.program.outputs.values()
            self._weights = {t: np.array(self._arena.read(t)) for t in held}
            self._run.run()

    def hide(self) -> float:
        """Puts the weights back, if they are not there; returns the seconds that takes."""
        if not self._weights:
            return 0.0
        begin = self._backend.mark()
        for t, values in self._weights.items():
            self._arena.write(t, values)
        self._weights = {}
        return self._backend.seconds(begin, self._backend.mark())
