"""rms: the root mean square of a parameter, by which an optimizer scales its step; rms_of_ranks: the same of parameters
of which each rank has a piece. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops import updates
from handgrad.ops.adamw.reference import whole_weight
from handgrad.ops.rms import reference

SUM_THREADS = 1024  # of the CUDA block that adds all partial sums


class Rms(Op):
    """y = max(least, RMS of the weights), one number. The weights are p, in bf16 with low. `count` of the n elements
    are real; the others are zero. n may be 0: of a parameter that a rank has nothing of."""

    name = "rms"
    ins = "p:n low:n:i16?"
    outs = "+y:1:f32"
    attrs = {"count": int, "least": float}
    cpu = CpuKernel("rms", "y p low scratch | n count least", "rms_scratch n")
    cases = (
        case(n=33, count=33, least=1e-3),
        case(n=1, count=1, least=10.0),
        case(n=0, count=33, least=0.0, without="low"),
        case(n=20_483, count=20_000, least=1e-3, without="low"),
        case(n=38_633_472, count=38_597_376, least=1e-3, real="gpt2-124m, token embedding", without="low"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.rms(whole_weight(v), v.count, v.least),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        blocks = max(1, min(-(-c.sizes["n"] // (4 * updates.THREADS)), 4 * gpu.sms))
        defines = {**updates.slice_defines(c), "BLOCKS": blocks}
        defines |= {"SUM_THREADS": SUM_THREADS, "THREADS": updates.THREADS}
        return Launches(
            (
                Kernel("rms_kernel", "scratch p low | n", blocks, updates.THREADS, 0, defines),
                Kernel("rms_sum_kernel", "y scratch | count least", 1, SUM_THREADS, 0, defines),
            ),
            scratch=8 * blocks,
        )

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return 0 * updates.sample(rng, arg, shape) if arg.name == "low" else None  # f32 has none; test_rms.py has some


class RmsOfRanks(Op):
    """y_j = max(least, |column j of x|): of W ranks' pieces of k parameters, each divided by the whole parameter's
    `count`."""

    name = "rms_of_ranks"
    ins = "x:W,k:f32"
    outs = "y:k:f32"
    attrs = {"least": float}
    cpu = CpuKernel("rms_of_ranks", "y x | W k least")
    cases = (
        case(W=2, k=1, least=1e-3),
        case(W=3, k=300, least=1.5),
        case(W=8, k=12, least=1e-3, real="gpt2-124m, a block on 8 ranks"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.rms_of_ranks(v.x, v.least),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        grid, defines = -(-c.sizes["k"] // updates.THREADS), {"THREADS": updates.THREADS}
        return Launches(
            (Kernel("rms_of_ranks_kernel", "y x | W k least", grid, updates.THREADS, 0, defines, "ranks.cu"),)
        )


rms, rms_of_ranks = Rms(), RmsOfRanks()
