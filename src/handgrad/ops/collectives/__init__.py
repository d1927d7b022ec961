"""Collectives: what ranks exchange inside a step. A backend's engine runs them (backends/comm.py); see README.md."""

from typing import Any

from handgrad.core.op import Op
from handgrad.core.scalars import STEP_SCALARS_BYTES


class AllReduce(Op):
    """x = the sum of all ranks' x."""

    name = "all_reduce"
    outs = "+x:n:grad"
    communicates = True

    def exchange(self, comm: Any, v: Any) -> None:
        comm.all_reduce(v.x)


class ReduceScatter(Op):
    """share = this rank's part of the sum of all ranks' full; += if share holds a value of this step.

    `share` may be that part of `full` itself.
    """

    name = "reduce_scatter"
    ins = "full:n:grad"
    outs = "+share:m:grad"
    communicates = True

    def exchange(self, comm: Any, v: Any) -> None:
        comm.reduce_scatter(v.full, v.share, v.accumulates("share"))


class AllGather(Op):
    """full = the shares of all ranks, in their order. `share` may be the own part of `full`."""

    name = "all_gather"
    ins = "share:m"
    outs = "+full:n"
    communicates = True

    def exchange(self, comm: Any, v: Any) -> None:
        comm.all_gather(v.share, v.full)


class AllGatherF32(Op):
    """The same for float32 values, whatever the working dtype."""

    name = "all_gather_f32"
    ins = "share:m:f32"
    outs = "+full:n:f32"
    communicates = True

    def exchange(self, comm: Any, v: Any) -> None:
        comm.all_gather(v.share, v.full)


class SumLosses(Op):
    """scalars.loss_sum = the sum of all ranks' loss_sum."""

    name = "sum_losses"
    outs = f"+scalars:{STEP_SCALARS_BYTES}:byte"
    communicates = True

    def exchange(self, comm: Any, v: Any) -> None:
        v.scalars.loss_sum = comm.total(float(v.scalars.loss_sum))


all_reduce, reduce_scatter, sum_losses = AllReduce(), ReduceScatter(), SumLosses()
all_gather, all_gather_f32 = AllGather(), AllGatherF32()
