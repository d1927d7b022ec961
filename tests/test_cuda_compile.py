"""Compiles every CUDA kernel for four GPU generations, without a GPU: no spills, no local memory, launches that fit.

It compiles the kernels of GPT-2 124M's training, evaluation, prefill and decode for every generation, and those of all
op cases for Hopper, each as its op launches it. `pytest -rP tests/test_cuda_compile.py` prints the registers.
"""

import ctypes
import json
import multiprocessing
import os
import re
import struct
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import Op
from handgrad.core.precision import Precision
from handgrad.core.ranks import Ranks
from handgrad.infer import engine
from handgrad.launch import Kernel, tensor_map_shape
from handgrad.models import GPT2
from handgrad.ops import OPS, wgmma_gemm
from handgrad.ops.linear.op import WEIGHT_GRADIENT
from handgrad.optim import AdamW
from handgrad.testing import case_program
from handgrad.train.execution import Execution
from handgrad.train.record import record_loss, record_train
from tests.emulator import CACHE

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="the kernels' compiler comes with handgrad[cuda]")

from handgrad.backends.cuda.backend import source  # noqa: E402
from handgrad.backends.cuda.nvrtc import Source, compile_one  # noqa: E402
from handgrad.backends.cuda.planner import GPUS  # noqa: E402

NAMES = ("a100", "4090", "h100", "b200")  # sm_80, sm_89, sm_90a, sm_100a
REGISTERS = 65536  # of an SM; a warp takes 256 at a time, a thread no more than 255


def programs():
    """The programs of a GPT-2 124M run, at four sequences of 1024."""
    model, execution = GPT2(), Execution(micro_batch=4)
    for precision in (Precision("bf16"), Precision("bf16", grad_dtype="bf16"), Precision("f32")):
        yield record_train(model, AdamW(), 1024, precision, execution, chunks=1)
        if precision.gradients is F32:
            yield record_loss(model, 1024, precision, execution, chunks=1)
            yield from engine.record(model, precision.working)
        ranks = Ranks(1, 2, zero=2, overlaps=True)
        yield record_train(model, AdamW(), 1024, precision, execution, chunks=1, accumulates=True, ranks=ranks)


def launches(calls, name):
    """{(source, kernel's name): launches of it} with the libraries and without, in every alternative."""
    found, features = {}, GPUS[name]
    for gpu in (features, replace(features, has_library_attention=False), replace(features, deterministic=True)):
        for c in calls:
            for step in (step for launches in c.op.cuda(c, gpu).alternatives() for step in launches.steps):
                if isinstance(step, Kernel):
                    launch = step.block, step.shared, arguments(step, c)
                    found.setdefault((source(step, c, gpu), step.entry), {})[launch] = gpu.shared_bytes
    return found


def arguments(k: Kernel, c) -> tuple[int, ...]:
    """Bytes of each argument that a launch passes."""
    pointers, _, scalars = k.args.partition("|")
    return (
        *[128 if tensor_map_shape(word, c) else 8 for word in pointers.split()],
        *[4 if c.op.attrs.get(word) is float else 8 for word in scalars.split()],
    )


@pytest.fixture(scope="module")
def wanted():
    """By name of a test: what it compiles and launches."""
    recorded = list(programs())
    result = {name: launches([c for p in recorded for c in p.calls], name) for name in NAMES}
    result["cases"] = launches(
        [
            case_program(op, case, dtype)[1]
            for op in OPS.values()
            if type(op).cuda is not Op.cuda
            for case in op.cases
            if not case.real
            for dtype in (F32, BF16)
        ],
        "h100",
    )
    return result


@pytest.fixture(scope="module")
def compiled(wanted):
    """{source: {kernel's name: what the compiler reports}}, cached while neither text nor compiler changes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = sorted({s for found in wanted.values() for s, _ in found}, key=lambda s: (s.path, s.arch, s.defines))
    files = {s: CACHE / f"{s.key}.json" for s in sources}
    missing = [s for s in sources if not files[s].exists()]
    if missing:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
            for s, (cubin, report) in zip(missing, pool.map(compile_one, missing)):
                files[s].write_text(json.dumps(kernels(cubin, report)))
    return {s: json.loads(file.read_text()) for s, file in files.items()}


def kernels(cubin: bytes, report: str) -> dict[str, dict]:
    """Of each kernel: registers, bytes of stack, spilled and shared memory, most threads of a block, bytes of each argument."""
    result = {}
    for text in re.split(r"Compiling entry function ", report)[1:]:
        name = re.match(r"'(\w+)'", text)[1]
        numbers = {
            key: sum(int(n) for n in re.findall(pattern, text))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "stack": r"(\d+) bytes stack frame",
                "spilled": r"(\d+) bytes spill",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        result[name] = numbers | attributes(cubin, name)
    return result


def attributes(cubin: bytes, name: str) -> dict:
    """What a kernel's .nv.info section says: EIATTR_MAX_THREADS (0x05) and, last argument first, EIATTR_KPARAM_INFO (0x17)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    text = {cubin[at : cubin.index(b"\0", at)]: s for s in sections if (at := sections[names][4] + s[0])}
    *_, at, length = text[b".nv.info." + name.encode()]
    threads, arguments, end = 1024, [], at + length
    while at < end:
        kind, attribute, value = struct.unpack_from("<BBH", cubin, at)
        if kind == 4:  # `value` bytes follow
            if attribute == 0x05:
                x, y, z = struct.unpack_from("<3I", cubin, at + 4)
                threads = x * y * z
            if attribute == 0x17:
                arguments.insert(0, struct.unpack_from("<I", cubin, at + 12)[0] >> 18)
            at += value
        at += 4
    return {"threads": threads, "arguments": arguments}


@pytest.mark.parametrize("name, grad_bf16", [("lm_loss", 0), ("linear", 0), ("linear", 1)])
def test_our_gemms_fit(name, grad_bf16):
    """Accumulators, and in the exp GEMM a tile on its way out, fill the registers that a warpgroup can have."""
    file, entry, defines = {
        "lm_loss": ("exp_gemm.cu", "lm_loss_exp_gemm_kernel", {"A_MN": 0, "B_MN": 0}),
        "linear": ("weight_gradient.cu", "linear_weight_gradient_kernel", WEIGHT_GRADIENT),
    }[name]
    defines = {"HG_BF16": 1, "HG_GRAD_BF16": grad_bf16} | wgmma_gemm.DEFINES | defines
    s = Source(str(OPS[name].folder / file), "sm_90a", tuple(sorted(defines.items())))
    cubin, report = compile_one(s)
    k = kernels(cubin, report)[entry]
    assert k["stack"] == k["spilled"] == 0
    assert "serialized" not in report, "the tensor cores would wait for each matmul"
    assert k["threads"] == wgmma_gemm.THREADS
    assert wgmma_gemm.SHARED_BYTES + k["shared"] <= GPUS["h100"].shared_bytes


@pytest.mark.parametrize("name", [*NAMES, "cases"])
def test_kernels_fit_their_registers_and_their_launches(wanted, compiled, name):
    bad, lines = [], []
    for (s, entry), found in wanted[name].items():
        k = compiled[s].get(entry)
        where = f"{Path(s.path).parent.name} {entry} {s.arch} {' '.join(f'{n}={v}' for n, v in s.defines)}"
        if k is None:
            bad.append(f"{where}: the file has no such kernel under these definitions")
            continue
        if k["stack"] or k["spilled"]:
            bad.append(f"{where}: {k['stack']} bytes of stack, {k['spilled']} spilled, {k['registers']} registers")
        for (block, shared, passed), most in found.items():
            if list(passed) != k["arguments"]:
                bad.append(f"{where}: takes {k['arguments']} bytes, the launch passes {list(passed)}")
            warps, per_warp = -(-block // 32), -(-k["registers"] // 8) * 256
            if block > k["threads"] or warps * per_warp > REGISTERS or shared + k["shared"] > most:
                bad.append(
                    f"{where}: {block} threads of at most {k['threads']}, {k['registers']} registers, {shared} + {k['shared']} bytes of shared memory of {most}"
                )
            held = min(REGISTERS // (warps * per_warp), 2048 // (32 * warps))
            lines.append(
                f"{k['registers']:4} registers  {block:4} threads  {shared + k['shared']:6} B shared  {held:2} blocks by registers  {where}"
            )
    print("\n".join(sorted(lines, key=lambda line: line.split("shared")[-1])))
    assert not bad, "\n" + "\n".join(bad)


def test_an_empty_report_does_not_corrupt_python(monkeypatch, tmp_path):
    """A compiler without a report writes one zero byte: never into the b" " object that Python shares."""
    from handgrad.backends.cuda import nvrtc as module

    class Silent:
        def __getattr__(self, name):
            return getattr(nvrtc, name)

        def nvrtcGetProgramLogSize(self, program):
            return nvrtc.nvrtcResult.NVRTC_SUCCESS, 1

        def nvrtcGetProgramLog(self, program, log):
            ctypes.memset(id(log) + bytes.__basicsize__ - 1, 0, 1)  # where the bytes of `log` begin
            return (nvrtc.nvrtcResult.NVRTC_SUCCESS,)

    monkeypatch.setattr(module, "_nvrtc", Silent)
    (tmp_path / "cuda.cu").write_text('#include "kernel.cuh"\nKERNEL one_kernel(float *y) { *y = 1.0f; }\n')
    cubin, report = compile_one(Source(str(tmp_path / "cuda.cu"), "sm_90a", (("HG_BF16", 0), ("HG_GRAD_BF16", 0))))
    assert report == "" and cubin.startswith(b"\x7fELF") and bytes([32])[0] == 32


@pytest.mark.parametrize("name", ["cuda.cu", "part.cuh", "shared.h"])
def test_a_changed_file_has_another_key(tmp_path, name):
    """The kernel's own, and headers beside it, those that it shares with C among them."""
    for file in ("cuda.cu", "part.cuh", "shared.h"):
        (tmp_path / file).write_text("// one\n")
    before = Source(str(tmp_path / "cuda.cu"), "sm_90a", ()).key
    assert Source(str(tmp_path / "cuda.cu"), "sm_90a", ()).key == before
    (tmp_path / name).write_text("// another\n")
    assert Source(str(tmp_path / "cuda.cu"), "sm_90a", ()).key != before


def test_spills_are_detected(tmp_path):
    """For a kernel that must spill, and for one that indexes a local array."""
    sums = " ".join(f"float a{i} = x[{i} * n];" for i in range(80))
    uses = " ".join(f"y[{i} * n] = a{i} * f + a{(i + 1) % 80};" for i in range(80))
    (tmp_path / "cuda.cu").write_text(
        '#include "kernel.cuh"\n'
        f"KERNEL __launch_bounds__(1024) spill_kernel(float *y, const float *x, i64 n, float f) {{ {sums} __syncthreads(); {uses} }}\n"
        "KERNEL local_kernel(float *y, i64 n) { float a[40]; for (int i = 0; i < 40; i++) a[i * n % 40] = i; y[0] = a[n]; }\n"
    )
    seen = kernels(*compile_one(Source(str(tmp_path / "cuda.cu"), "sm_90a", (("HG_BF16", 0), ("HG_GRAD_BF16", 0)))))
    assert seen["spill_kernel"]["spilled"] > 0 and seen["spill_kernel"]["threads"] == 1024
    assert seen["spill_kernel"]["arguments"] == [8, 8, 8, 4] and seen["local_kernel"]["arguments"] == [8, 8]
    assert seen["local_kernel"]["stack"] >= 160


def test_all_four_generations_are_compiled(wanted):
    assert sorted({s.arch for name in NAMES for s, _ in wanted[name]}) == ["sm_100a", "sm_80", "sm_89", "sm_90a"]
    for name in NAMES:
        assert {dict(s.defines)["HG_BF16"] for s, _ in wanted[name]} == {0, 1}
    print({name: len({s for s, _ in found}) for name, found in wanted.items()})
