"""GEMM autotuning: finds cuBLASLt's fastest algorithm for each GEMM by measurement.

We time the heuristic's proposals plus configurations it does not propose: other tiles and clusters of the same kernels,
and Hopper kernels that it leaves out. Finalists run for about 15 ms each: at the power limit, kernels that draw more
power lower the clock, which short runs do not show. Enum values are those of cublasLt.h 13.
"""

import math
from collections.abc import Callable, Sequence
from ctypes import byref, c_int, c_int32, c_size_t, c_uint16, c_uint32, sizeof
from functools import partial
from typing import Any

import numpy as np

from handgrad.backends.arena import NUMPY
from handgrad.backends.cuda.cublaslt import CublasLt, GemmProblem, Heuristic
from handgrad.backends.cuda.planner import GEMM_WORKSPACE, WORTH_TUNING
from handgrad.core.errors import HandgradError

CANDIDATES = 16  # proposals that we request; the heuristic returns at most 8
WORTH_SEARCHING = 5e10  # FLOP: 0.1 ms on an H100; smaller GEMMs try the proposals only
SAMPLE_FLOPS, LONG_SAMPLE_FLOPS = 5e11, 1e13  # of a timed sample: about 1 ms and 15 ms on an H100
VARIANTS = 64  # configurations that run twice: those with the least work, including padding of tiles and waves
FINALISTS, LONG_FINALISTS = 6, 3  # variants that get a timed sample; algorithms that get a long one
# fmt: off
TILES = {  # rows: {columns: cublasLtMatmulTile_t}
    64: {192: 116, 256: 19, 320: 117},
    96: {128: 28, 192: 151, 256: 152},
    112: {128: 165, 192: 166},
    128: {64: 18, 96: 33, 112: 403, 128: 20, 136: 405, 144: 406, 160: 29, 168: 408, 176: 409, 192: 32, 208: 412,
          216: 413, 224: 414, 240: 416, 256: 23, 272: 419, 288: 421, 304: 423, 320: 176},
    136: {128: 179},
    144: {128: 184, 192: 185},
    160: {64: 193, 128: 30, 192: 194, 256: 195},
    168: {128: 197},
    176: {128: 201, 192: 202},
    192: {64: 208, 96: 458, 112: 460, 128: 31, 144: 463, 160: 465, 176: 467, 192: 209, 208: 470, 224: 472, 240: 474,
          256: 210},
    208: {128: 215, 192: 216},
    216: {128: 218},
    224: {128: 221, 192: 222},
    240: {128: 227, 192: 228},
    256: {64: 21, 96: 495, 128: 24, 160: 502, 192: 232, 224: 509, 256: 513},
    272: {128: 236},
    288: {128: 240},
    304: {128: 244},
    320: {64: 247, 128: 248},
}
# fmt: on
CLUSTERS = (2, 3, 5)  # cublasLtClusterShape_t: 1x1, 2x1, 1x2
LARGER = (4, 6, 7, 8)  # clusters of 4 and 8 blocks
AUTOMATIC_64 = 35  # cublasLtMatmulStages_t: as many stages of k = 64 as fit, the only value of Hopper kernels
STAGES_IDS = 13  # cublasLtMatmulAlgoCapAttributes_t
CUSTOMS = 8  # custom options of Hopper kernels
CONFIG = {  # cublasLtMatmulAlgoConfigAttributes_t: number, type
    "id": (0, c_int32),
    "tile": (1, c_uint32),
    "custom": (5, c_uint32),
    "stages": (6, c_uint32),
    "inner": (7, c_uint16),
    "cluster": (8, c_uint16),
}
Launch = Callable[[], None]


def tune_gemms(blas: CublasLt, problems: Sequence[GemmProblem]) -> None:
    """Chooses algorithms for GEMMs that have none yet, in temporary device memory."""
    todo = [p for p in dict.fromkeys(problems) if p.flops >= WORTH_TUNING and blas.untimed(p)]
    if not todo:
        return
    device = blas.device
    widths = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()}
    sizes = {
        "a": max(p.batch * p.m * p.k * widths[p.a] for p in todo),
        "b": max(p.batch * p.k * p.n * widths[p.b] for p in todo),
        "out": max(p.batch * p.m * p.n * widths[p.out] for p in todo),
        "aux": max(p.m * p.n * widths[p.out] * bool(p.epilogue) for p in todo),
        "bias": max(p.n * widths[p.out] for p in todo),
    }
    at = {name: device.alloc(max(size, 256)) for name, size in sizes.items()}
    workspace = device.alloc(GEMM_WORKSPACE)
    candidates: list[tuple[GemmProblem, Heuristic, Launch]] = []
    try:
        for name in at:  # random values: a GEMM of zeros draws less power and runs faster
            device.randomise(at[name], sizes[name])
        for p in todo:
            bias = at["bias"] if p.epilogue in ("bias", "gelu") else 0
            aux = at["aux"] if p.epilogue in ("gelu", "dgelu") else 0
            description, layouts = blas.describe(p, bias, aux)

            def starter(
                h: Heuristic, p: GemmProblem = p, description: Any = description, layouts: Any = layouts
            ) -> Launch:
                addresses = at["a"], at["b"], at["out"], workspace
                return partial(blas.starter(description, layouts, h, *addresses, device.stream), p.accumulates)

            found = blas.proposals(description, layouts, CANDIDATES)
            if not found:
                raise HandgradError("cublaslt", f"cuBLASLt has no algorithm for {p}")
            if p.flops >= WORTH_SEARCHING:
                found += _fastest(blas, variants(blas, p, description, layouts, found), starter)
            candidates += [(p, h, starter(h)) for h in found]
        for long in (False, True):
            taken = blas.graphs.measure([(start, repeats(p.flops, long)) for p, _, start in candidates])
            ranked = {p: sorted((t, i) for i, t in enumerate(taken) if candidates[i][0] == p) for p in todo}
            kept = 1 if long else LONG_FINALISTS
            candidates = [candidates[i] for found in ranked.values() for _, i in found[:kept]]
        blas.keep_choices({p: h for p, h, _ in candidates})
    finally:
        device.sync()
        for address in (*at.values(), workspace):
            device.free(address)


def repeats(flops: float, long: bool = True) -> int:
    """Runs in a timed sample of work that takes `flops` FLOP; long: samples of about 15 ms for large GEMMs."""
    sample = LONG_SAMPLE_FLOPS if long and flops >= WORTH_SEARCHING else SAMPLE_FLOPS
    return 1 + int(sample / max(flops, WORTH_TUNING))


def _fastest(blas: CublasLt, found: Sequence[Heuristic], starter: Callable[[Heuristic], Launch]) -> list[Heuristic]:
    """The FINALISTS algorithms whose second run was fastest."""
    begin, end = blas.device.event(True), blas.device.event(True)
    times = []
    for i, h in enumerate(found):
        start = starter(h)
        try:
            start()
        except HandgradError:  # the library's check accepted it, the launch failed
            continue
        blas.device.record(begin)
        start()
        blas.device.record(end)
        times.append((blas.device.seconds(begin, end), i))
    return [found[i] for _, i in sorted(times)[:FINALISTS]]


def variants(
    blas: CublasLt, p: GemmProblem, description: Any, layouts: Sequence[Any], proposed: Sequence[Heuristic]
) -> list[Heuristic]:
    """At most VARIANTS configurations that support a GEMM and were not proposed for it.

    With a GELU epilogue small tiles in large clusters win, and the work does not predict which: all of them, a few
    hundred, are returned.
    """
    gelu, seen = p.epilogue == "gelu", {_config(blas, h) for h in proposed}
    found: list[tuple[float, int, Heuristic]] = []
    for base, settings in _families(blas, p, proposed):
        tiles = [(tile, rows * columns) for rows, widths in TILES.items() for columns, tile in widths.items()]
        if gelu:
            settings = {(stages, custom, inner) for stages, _, inner in settings for custom in range(CUSTOMS)}
        for tile, area in tiles:
            for cluster in CLUSTERS + LARGER * gelu:
                for stages, custom, inner in sorted(settings):
                    choice = {"tile": tile, "custom": custom, "stages": stages, "inner": inner, "cluster": cluster}
                    h = _checked(blas, base, choice, description, layouts)
                    if h is not None and _config(blas, h) not in seen:
                        seen.add(_config(blas, h))
                        found.append((math.ceil(h.waves) * area, len(found), h))
    return [h for *_, h in sorted(found)[: None if gelu else VARIANTS]]


def _families(blas: CublasLt, p: GemmProblem, proposed: Sequence[Heuristic]) -> list[tuple[Heuristic, set[tuple]]]:
    """An algorithm of each family worth trying, and the (stages, custom option, inner shape) to try with it."""
    known: dict[int, tuple[Heuristic, set[tuple]]] = {}
    for h in proposed:
        number, _, custom, stages, inner, _ = _config(blas, h)
        known.setdefault(number, (h, set()))[1].add((stages, custom, inner))
    ids, count, types = (c_int * 100)(), c_int(0), blas.types(p)
    if any(s == AUTOMATIC_64 for _, settings in known.values() for s, *_ in settings):
        return list(known.values())  # Hopper kernels were proposed; the best algorithms are of their family
    if blas.dll.cublasLtMatmulAlgoGetIds(blas.handle, *types, len(ids), ids, byref(count)):
        return list(known.values())
    for number in ids[: count.value]:
        h = Heuristic()
        if number in known or blas.dll.cublasLtMatmulAlgoInit(blas.handle, *types, number, byref(h)):
            continue
        if _stages(blas, h) == [AUTOMATIC_64]:
            known[number] = h, {(AUTOMATIC_64, 0, 0)}
    return list(known.values())


def _checked(
    blas: CublasLt, base: Heuristic, choice: dict[str, int], description: Any, layouts: Sequence[Any]
) -> Heuristic | None:
    """An algorithm with another configuration, or None if the library does not support it."""
    h, (b, a, out) = Heuristic.from_buffer_copy(base), layouts
    for name, value in choice.items():
        number, kind = CONFIG[name]
        if blas.dll.cublasLtMatmulAlgoConfigSetAttribute(byref(h), number, byref(kind(value)), sizeof(kind)):
            return None
    result = Heuristic()
    if blas.dll.cublasLtMatmulAlgoCheck(blas.handle, description, b, a, out, out, byref(h), byref(result)):
        return None
    result.algo[:] = h.algo[:]
    return result if result.workspace <= GEMM_WORKSPACE else None


def _config(blas: CublasLt, h: Heuristic) -> tuple[int, ...]:
    """The CONFIG values of an algorithm."""
    found, written = [], c_size_t()
    for number, kind in CONFIG.values():
        value = kind()
        get = blas.dll.cublasLtMatmulAlgoConfigGetAttribute
        get(byref(h), number, byref(value), sizeof(value), byref(written))
        found.append(value.value)
    return tuple(found)


def _stages(blas: CublasLt, h: Heuristic) -> list[int]:
    """The cublasLtMatmulStages_t values that an algorithm supports; empty if it has no choice."""
    values, written = (c_uint32 * 1024)(), c_size_t()
    if blas.dll.cublasLtMatmulAlgoCapGetAttribute(byref(h), STAGES_IDS, values, sizeof(values), byref(written)):
        return []
    return values[: written.value // 4]
