"""Collectives: what ranks exchange inside a step. A Comm runs them on the host (backends/ranks/comm.py), NCCL on GPUs;
see README.md."""

from typing import Any

from handgrad.core.op import Call, Op
from handgrad.core.scalars import INPUT_BYTES, OUTPUTS, STEP_SCALARS_BYTES
from handgrad.launch import Collective, Gpu, Kernel, Launches

THREADS = 256  # of a CUDA block
FREELY = 1 << 30  # calls that may run while a collective does: all, until one uses what it writes


class AllReduce(Op):
    """x = the sum of all ranks' x."""

    name = "all_reduce"
    outs = "+x:n:grad"
    communicates = True
    overlap = FREELY

    def exchange(self, comm: Any, v: Any) -> None:
        comm.all_reduce(v.x)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return Launches((Collective("all_reduce", "x", "x", c.x.size, c.x.dtype.name),))


class ReduceScatter(Op):
    """share = part `rank` of the sum of all ranks' full; += if share holds a value of this step.

    `share` may be that part of `full` itself. Where it is not, a GPU leaves the sum in `full`, too.
    """

    name = "reduce_scatter"
    ins = "full:n:grad"
    outs = "+share:m:grad"
    attrs = {"rank": int}
    communicates = True
    overlap = FREELY

    def exchange(self, comm: Any, v: Any) -> None:
        comm.reduce_scatter(v.full, v.share, v.accumulates("share"))

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        m, dtype = c.share.size, c.share.dtype
        if "share" in c.overwrites:
            return Launches((Collective("reduce_scatter", "full", "share", m, dtype.name),))
        part, vec = f"full@{c.attrs['rank'] * c.share.nbytes}", 16 // dtype.size
        grid, defines = min(-(-m // (THREADS * vec)), 8 * gpu.sms), {"VEC": vec, "THREADS": THREADS}
        add = Kernel("add_share_kernel", f"share {part} | m accumulate.share", grid, THREADS, 0, defines)
        return Launches((Collective("reduce_scatter", "full", part, m, dtype.name), add))


class AllGather(Op):
    """full = the shares of all ranks, in their order. `share` may be the own part of `full`."""

    name = "all_gather"
    ins = "share:m"
    outs = "+full:n"
    communicates = True
    overlap = FREELY

    def exchange(self, comm: Any, v: Any) -> None:
        comm.all_gather(v.share, v.full)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _gather(c)


class AllGatherF32(Op):
    """The same for float32 values, whatever the working dtype."""

    name = "all_gather_f32"
    ins = "share:m:f32"
    outs = "+full:n:f32"
    communicates = True
    overlap = FREELY

    def exchange(self, comm: Any, v: Any) -> None:
        comm.all_gather(v.share, v.full)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _gather(c)


class SumLosses(Op):
    """scalars.loss_sum = the sum of all ranks' loss_sum."""

    name = "sum_losses"
    outs = f"+scalars:{STEP_SCALARS_BYTES}:byte"
    communicates = True

    def exchange(self, comm: Any, v: Any) -> None:
        v.scalars.loss_sum = comm.total(float(v.scalars.loss_sum))

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        assert OUTPUTS[0][:2] == ("loss_sum", "f64")
        at = f"scalars@{INPUT_BYTES}"
        return Launches((Collective("all_reduce", at, at, 1, "f64"),))


def _gather(c: Call) -> Launches:
    return Launches((Collective("all_gather", "share", "full", c.share.size, c.share.dtype.name),))


all_reduce, reduce_scatter, sum_losses = AllReduce(), ReduceScatter(), SumLosses()
all_gather, all_gather_f32 = AllGather(), AllGatherF32()
