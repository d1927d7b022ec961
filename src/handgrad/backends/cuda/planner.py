"""GpuPlanner: plans scratch, workspaces and implementations for a GPU that need not be in this machine."""

from weakref import WeakKeyDictionary

from handgrad.backends.base import Planner
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, Op
from handgrad.core.plan import aligned
from handgrad.launch import Collective, Gemm, Gpu, Kernel, Launches, Sdpa

RESERVE = 512 << 20  # bytes of device memory for the libraries and the driver
GEMM_WORKSPACE = 32 << 20  # bytes: NVIDIA's recommendation for Hopper
WORTH_TUNING = 1e9  # FLOP: smaller calls run the library's first proposal and the first alternative


def describe(arch: str, sms: int, shared_bytes: int, l2_bytes: int, **choices: bool) -> Gpu:
    """A Gpu with the features that follow from its architecture."""
    features = {"has_wgmma": arch == "sm_90a", "has_tma": int(arch.removeprefix("sm_").rstrip("a")) >= 90}
    return Gpu(arch, sms, shared_bytes, l2_bytes, **features, **choices)


GPUS = {
    "a100": describe("sm_80", 108, 163 << 10, 40 << 20),
    "4090": describe("sm_89", 128, 99 << 10, 72 << 20),
    "h100": describe("sm_90a", 132, 227 << 10, 50 << 20),
    "h200": describe("sm_90a", 132, 227 << 10, 60 << 20),
    "b200": describe("sm_100a", 148, 227 << 10, 126 << 20),
}
PRODUCT_NAMES = {  # as the driver reports them
    "a100": "NVIDIA A100-SXM4-80GB",
    "4090": "NVIDIA GeForce RTX 4090",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
MEMORY_MIB = {"a100": 81920, "4090": 24564, "h100": 81559, "h200": 143771, "b200": 183359}  # as nvidia-smi shows them


class GpuPlanner(Planner):
    """The planning part of the cuda backend. gpu: a key of GPUS, or the features of any GPU."""

    name = "cuda"
    is_concurrent = True
    head_rows = 32768

    def __init__(self, gpu: Gpu | str):
        if isinstance(gpu, str) and gpu not in GPUS:
            raise HandgradError("cuda", f"a GPU to plan for is one of {', '.join(GPUS)}", f"'{gpu}'")
        self.gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
        self._launches: WeakKeyDictionary[Call, Launches] = WeakKeyDictionary()

    def has(self, op: Op) -> bool:
        return type(op).cuda is not Op.cuda

    def launches(self, call: Call) -> Launches:
        """The launches that the op declares for a call, computed once for planning, autotuning and binding."""
        if call not in self._launches:
            self._launches[call] = call.op.cuda(call, self.gpu)
        return self._launches[call]

    def scratch(self, call: Call) -> int:
        """Bytes of the op's scratch and the library workspace after it, enough for every alternative."""
        return max(_scratch(a) for a in self.launches(call).alternatives())

    def note(self, call: Call) -> str:
        """The bound implementation; if autotuning will choose, all that it may choose."""
        alternatives = self.launches(call).alternatives()
        timed = call.op.flops(call) >= WORTH_TUNING and not self.gpu.deterministic
        if len(alternatives) > 1 and timed:
            return ", or ".join(a.note or "separate" for a in alternatives)
        return alternatives[0].note


def _scratch(launches: Launches) -> int:
    library = [s for s in launches.steps if not isinstance(s, Kernel | Collective)]
    workspaces = [GEMM_WORKSPACE if isinstance(s, Gemm) else attention_workspace(s) for s in library]
    return aligned(launches.scratch) + max(workspaces, default=0)


def attention_workspace(s: Sdpa) -> int:
    """An upper bound of the bytes that cuDNN requests: dq and row sums in float32 (eight times dq if deterministic),
    and dk and dv of each query head if query heads share keys. Binding raises HandgradError if cuDNN requests more."""
    if s.direction == "forward":
        return 1 << 20
    rows = s.B * s.H * s.T
    shared = 2 * rows * s.D * 2 if s.H != s.K else 0
    return rows * s.D * 4 * (8 if s.deterministic else 1) + rows * 4 + shared + (1 << 20)
