"""cuBLASLt by ctypes: the calls that GEMMs need. The cache on disk keeps the algorithms that gemm_autotune.py chose.

The library is column-major; our row-major out (m, n) = a b is its (n, m) = b' a'. Values are those of cublasLt.h 13.
"""

import ctypes
import json
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from handgrad.backends.cuda import cache
from handgrad.backends.cuda.graph import Graphs
from handgrad.backends.cuda.libraries import load
from handgrad.backends.cuda.planner import GEMM_WORKSPACE
from handgrad.core.errors import HandgradError

TYPES = {"f32": 0, "bf16": 14}  # cudaDataType
COMPUTE_F32, COMPUTE_TF32 = 68, 77  # cublasComputeType_t
EPILOGUES = {"": 1, "bias": 4, "gelu": 164, "gelu without bias": 160, "dgelu": 192}  # cublasLtEpilogue_t
TRANS_A, TRANS_B, EPILOGUE, BIAS, AUX, AUX_LD = 3, 4, 7, 8, 11, 12  # cublasLtMatmulDescAttributes_t
BATCH_COUNT, BATCH_STRIDE = 5, 6  # cublasLtMatrixLayoutAttribute_t
MAX_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t
NOT_SUPPORTED = (7, 15)  # the library also returns INVALID_VALUE for unsupported combinations

CALLS = {  # name: argument types; all return a status
    "cublasLtCreate": [c_void_p],
    "cublasLtMatmulDescCreate": [c_void_p, c_int, c_int],
    "cublasLtMatmulDescDestroy": [c_void_p],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [c_void_p, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatrixLayoutSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceCreate": [c_void_p],
    "cublasLtMatmulPreferenceDestroy": [c_void_p],
    "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulAlgoGetHeuristic": [c_void_p] * 7 + [c_int, c_void_p, c_void_p],
    "cublasLtMatmulAlgoGetIds": [c_void_p] + [c_int] * 7 + [c_void_p, c_void_p],
    "cublasLtMatmulAlgoInit": [c_void_p] + [c_int] * 7 + [c_void_p],
    "cublasLtMatmulAlgoCheck": [c_void_p] * 8,
    "cublasLtMatmulAlgoCapGetAttribute": [c_void_p, c_int, c_void_p, c_size_t, c_void_p],
    "cublasLtMatmulAlgoConfigGetAttribute": [c_void_p, c_int, c_void_p, c_size_t, c_void_p],
    "cublasLtMatmulAlgoConfigSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmul": [c_void_p] * 14 + [c_size_t, c_void_p],
}


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, 96 bytes; the algorithm is its first 64."""

    _fields_ = [
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@dataclass(frozen=True)
class GemmProblem:
    """All that the choice of an algorithm depends on: row-major sizes, element types, epilogue."""

    m: int
    n: int
    k: int
    ta: bool
    tb: bool
    a: str
    b: str
    out: str
    epilogue: str
    accumulates: bool
    tf32: bool
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * self.batch


class CublasLt:
    """The library on one GPU. deterministic: binds the heuristic's first proposal, without autotuning."""

    def __init__(self, graphs: Graphs, deterministic: bool = False):
        self.dll = load("cublasLt", "nvidia-cublas")
        for name, types in CALLS.items():
            getattr(self.dll, name).argtypes = types
        self.dll.cublasLtGetVersion.restype = c_size_t
        self.version = self.dll.cublasLtGetVersion()
        self.graphs, self.device, self.deterministic = graphs, graphs.device, deterministic
        self.handle = c_void_p()
        self._call("cublasLtCreate", byref(self.handle))
        self._file = cache.key("chosen algorithms", self.version, self.device.name) + ".json"
        self._known: dict[str, str] = {} if deterministic else json.loads(cache.load(self._file) or b"{}")
        self._chosen: dict[GemmProblem, Heuristic] = {}

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.dll, name)(*args)
        if status:
            raise HandgradError("cublaslt", f"{name} failed with status {status}")

    def _set(self, call: str, target: c_void_p, attribute: int, value: Any) -> None:
        self._call(call, target, attribute, byref(value), sizeof(value))

    def _layout(self, dtype: str, rows: int, columns: int, batch: int) -> c_void_p:
        """The layout of a row-major (rows, columns) matrix, or of `batch` of them that follow one another."""
        layout = c_void_p()
        self._call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[dtype], columns, rows, columns)
        if batch > 1:
            self._set("cublasLtMatrixLayoutSetAttribute", layout, BATCH_COUNT, c_int32(batch))
            self._set("cublasLtMatrixLayoutSetAttribute", layout, BATCH_STRIDE, c_int64(rows * columns))
        return layout

    def describe(self, p: GemmProblem, bias: int, aux: int) -> tuple[c_void_p, tuple[c_void_p, c_void_p, c_void_p]]:
        """The matmul descriptor, and the layouts of the library's A (our b), B (our a) and out."""
        description = c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(description), *self.types(p)[:2])
        name = "gelu without bias" if p.epilogue == "gelu" and not bias else p.epilogue
        values: list[tuple[int, Any]] = [
            (TRANS_A, c_int32(p.tb)),
            (TRANS_B, c_int32(p.ta)),
            (EPILOGUE, c_uint32(EPILOGUES[name])),
        ]
        values += [(BIAS, c_void_p(bias))] * bool(bias)
        values += [(AUX, c_void_p(aux)), (AUX_LD, c_int64(p.n))] * bool(aux)
        for attribute, value in values:
            self._set("cublasLtMatmulDescSetAttribute", description, attribute, value)
        a = self._layout(p.a, *((p.k, p.m) if p.ta else (p.m, p.k)), p.batch)
        b = self._layout(p.b, *((p.n, p.k) if p.tb else (p.k, p.n)), p.batch)
        return description, (b, a, self._layout(p.out, p.m, p.n, p.batch))

    def types(self, p: GemmProblem) -> tuple[int, ...]:
        """The compute type, the scale type, and the types of the library's A, B, C and D."""
        compute = COMPUTE_TF32 if p.tf32 and p.a == "f32" else COMPUTE_F32
        return compute, TYPES["f32"], TYPES[p.b], TYPES[p.a], TYPES[p.out], TYPES[p.out]

    def proposals(self, description: c_void_p, layouts: tuple[c_void_p, ...], count: int) -> list[Heuristic]:
        """At most `count` algorithms that the heuristic proposes, best first; none if it does not support the GEMM."""
        preference = c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, MAX_WORKSPACE, c_uint64(GEMM_WORKSPACE))
        results, got = (Heuristic * count)(), c_int(0)
        b, a, out = layouts
        status = self.dll.cublasLtMatmulAlgoGetHeuristic(
            self.handle, description, b, a, out, out, preference, count, results, byref(got)
        )
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if status and status not in NOT_SUPPORTED:
            raise HandgradError("cublaslt", f"cublasLtMatmulAlgoGetHeuristic failed with status {status}")
        return [results[i] for i in range(got.value) if results[i].state == 0] if status == 0 else []

    def bind(
        self, p: GemmProblem, a: int, b: int, out: int, bias: int, aux: int, addend: int, workspace: int, stream: Any
    ) -> Callable[[bool], None]:
        """A function that starts the GEMM on these addresses; its argument says whether to add the addend, or out if
        that is 0."""
        description, layouts = self.describe(p, bias, aux)
        algorithm = self._algorithm(p, description, layouts)
        return self.starter(description, layouts, algorithm, a, b, out, workspace, stream, addend)

    def starter(
        self,
        description: c_void_p,
        layouts: tuple[c_void_p, ...],
        algorithm: Heuristic,
        a: int,
        b: int,
        out: int,
        workspace: int,
        stream: Any,
        addend: int = 0,
    ) -> Callable[[bool], None]:
        """`bind` with a given algorithm."""
        lb, la, lo = layouts
        scalars = (c_float * 2)(0.0, 1.0)
        zero, one = ctypes.addressof(scalars), ctypes.addressof(scalars) + 4
        call, handle, chosen, find = self.dll.cublasLtMatmul, self.handle, byref(algorithm), self.graphs.workspace
        on, size, addend = int(stream), algorithm.workspace, addend or out

        def start(accumulate: bool) -> None:
            beta = one if accumulate and scalars else zero  # `scalars` stays referenced here
            at = find(size, workspace)
            status = call(handle, description, one, b, lb, a, la, beta, addend, lo, out, lo, chosen, at, size, on)
            if status:
                raise HandgradError("cublaslt", f"cublasLtMatmul failed with status {status}")

        return start

    # the choice -----------------------------------------------------------------------------------------------------

    def _algorithm(self, p: GemmProblem, description: c_void_p, layouts: tuple[c_void_p, ...]) -> Heuristic:
        if p not in self._chosen:
            known = self._known.get(repr(astuple(p)))
            if known is not None:
                self._chosen[p] = Heuristic.from_buffer_copy(bytes.fromhex(known))
            else:
                found = self.proposals(description, layouts, 1)
                if not found:
                    raise HandgradError("cublaslt", f"cuBLASLt has no algorithm for {p}")
                self._chosen[p] = found[0]
        return self._chosen[p]

    def untimed(self, p: GemmProblem) -> bool:
        """Whether autotuning has not chosen an algorithm yet."""
        return not self.deterministic and repr(astuple(p)) not in self._known

    def keep_choices(self, chosen: dict[GemmProblem, Heuristic]) -> None:
        """Keeps chosen algorithms, in memory and on disk."""
        self._known |= {repr(astuple(p)): bytes(h).hex() for p, h in chosen.items()}
        cache.store(self._file, json.dumps(self._known).encode())

    def choices(self) -> dict[str, str]:
        """All chosen algorithms, as text."""
        return self._known

    def take(self, choices: dict[str, str]) -> None:
        """Adopts algorithms that were chosen on another GPU of the same model."""
        self._known = dict(choices)

    def peak(self, dtype: str, tf32: bool) -> float:
        """Measured FLOP/s of a large GEMM, in place of the peak of a GPU that is not in the table."""
        p, device = GemmProblem(8192, 8192, 8192, False, True, dtype, dtype, dtype, "", False, tf32), self.device
        nbytes = 8192 * 8192 * 4
        a, b, out, workspace = (device.alloc(size) for size in (nbytes, nbytes, nbytes, GEMM_WORKSPACE))
        for address in (a, b):
            device.randomise(address, nbytes)
        description, layouts = self.describe(p, 0, 0)
        found = self.proposals(description, layouts, 4)
        starts = [self.starter(description, layouts, h, a, b, out, workspace, device.stream) for h in found]
        best = min(self.graphs.measure([(partial(start, False), 1) for start in starts]))
        for address in (a, b, out, workspace):
            device.free(address)
        return p.flops / best
