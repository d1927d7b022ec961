"""What can be said of a run on a card without having one: scratch, workspaces, which implementation is bound."""

from weakref import WeakKeyDictionary

from handgrad.backends.base import Planner
from handgrad.core.errors import HandgradError
from handgrad.core.launch import Gemm, Gpu, Kernel, Launches, Sdpa
from handgrad.core.op import Call, Op
from handgrad.core.plan import aligned

GEMM_WORKSPACE = 32 << 20  # bytes: what NVIDIA advises for Hopper
WORTH_TUNING = 1e9  # FLOP: smaller calls take what is proposed first
OWN_TILE = 256  # rows and columns that a cluster computes of our own product
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163 << 10),
    "4090": Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 99 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 227 << 10),
    "h200": Gpu("NVIDIA H200", "sm_90a", 132, 227 << 10),
    "b200": Gpu("NVIDIA B200", "sm_100a", 148, 227 << 10),
}


class Card(Planner):
    """The cuda backend as a plan sees it, for a card that may be elsewhere."""

    name, head_rows, head_bytes, runs_beside = "cuda", 32768, 32768 * 50304 * 4, True

    def __init__(self, gpu: Gpu | str):
        if isinstance(gpu, str) and gpu not in GPUS:
            raise HandgradError("cuda", f"a card that can be described is one of {', '.join(GPUS)}", f"'{gpu}'")
        self.gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
        self._launches: WeakKeyDictionary[Call, Launches] = WeakKeyDictionary()

    def has(self, op: Op) -> bool:
        return type(op).cuda is not Op.cuda

    def launches(self, call: Call) -> Launches:
        """What the op declares, asked once: planning, tuning and binding all want it."""
        if call not in self._launches:
            self._launches[call] = call.op.cuda(call, self.gpu)
        return self._launches[call]

    def scratch(self, call: Call) -> int:
        """The op's own bytes, and behind them the libraries' workspace."""
        return max(self._scratch(way) for way in self.launches(call).ways())

    def _scratch(self, way: Launches) -> int:
        library = [s for s in way.steps if not isinstance(s, Kernel)]
        rooms = [gemm_workspace(s, self.gpu) if isinstance(s, Gemm) else attention_workspace(s) for s in library]
        return aligned(way.scratch) + max(rooms, default=0)

    def note(self, call: Call) -> str:
        """What is bound; where a clock will choose, all that it may choose from."""
        ways = self.launches(call).ways()
        timed = call.op.flops(call) >= WORTH_TUNING and not self.gpu.deterministic
        return ", or ".join(way.note or "apart" for way in ways) if len(ways) > 1 and timed else ways[0].note


def own_tiles(g: Gemm, gpu: Gpu) -> tuple[int, int]:
    """Of our own product for Hopper: its tiles, 256 x 256 for a cluster of two blocks, and how many are cut along k."""
    tiles, clusters = -(-g.m // OWN_TILE) * -(-g.n // OWN_TILE), gpu.sms // 2
    rest = tiles % clusters
    return tiles, 0 if 20 * rest > 17 * clusters else rest  # nearly a round of all clusters is not cut


def gemm_workspace(g: Gemm, gpu: Gpu) -> int:
    """Bytes for cuBLASLt; for our own product's pieces of tiles, and row sums of whole tiles and pieces (work.cuh)."""
    if not g.own:
        return GEMM_WORKSPACE
    if g.epilogue:
        return 0
    tiles, rest = own_tiles(g, gpu)
    return 4 * OWN_TILE * ((gpu.sms // 2 + rest) * OWN_TILE + tiles + gpu.sms // 2)


def attention_workspace(s: Sdpa) -> int:
    """Bytes that cuDNN asks for, from above: dq and row sums in float32, eight times over where sums keep their order,
    and a copy of dk and dv a query head where heads share keys. Binding raises if it asks for more."""
    if s.direction == "forward":
        return 1 << 20
    rows = s.B * s.H * s.T
    shared = 2 * rows * s.D * 2 if s.H != s.K else 0
    return rows * s.D * 4 * (8 if s.deterministic else 1) + rows * 4 + shared + (1 << 20)
