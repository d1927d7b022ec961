"""Layouts and arguments that kernels share with Python, and the errors of backends."""

import importlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.arena import STEP_SCALARS_DTYPE
from handgrad.backends.cpu import arguments
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.errors import HandgradError
from handgrad.core.limits import memory_limits
from handgrad.core.op import CpuKernel, Op
from handgrad.core.plan import plan
from handgrad.core.program import Program, Segment
from handgrad.core.scalars import STEP_SCALARS, STEP_SCALARS_BYTES
from handgrad.models import forward_loss
from handgrad.ops import OPS, add, linear
from handgrad.ops.act import Act
from handgrad.train.start import Start, initialize

library = importlib.import_module("handgrad.backends.cpu.library")  # the package has a function of that name
INCLUDE = Path(__file__).parents[1] / "src" / "handgrad" / "backends" / "cpu" / "include"


def test_step_scalars_have_the_same_layout_in_c(tmp_path):
    """A compiled probe prints the offset and size of each field in C."""
    compiler = next(
        (found for name in (os.environ.get("CC", "cc"), "gcc", "clang") if (found := shutil.which(name))), None
    )
    assert compiler, "installing handgrad needed a C compiler, and so does this test"
    fields = "".join(
        f'printf("{name} %zu %zu\\n", offsetof(StepScalars, {name}), sizeof(((StepScalars *)0)->{name}));'
        for name, *_ in STEP_SCALARS
    )
    probe = f'#include "scalars.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {fields} printf("all %zu 0\\n", sizeof(StepScalars)); }}\n'
    (tmp_path / "probe.c").write_text(probe)
    (tmp_path / "arguments.h").write_text(arguments.header(INCLUDE.parents[2]))
    subprocess.run(
        [
            compiler,
            "-std=gnu11",
            "-DHG_DTYPE=f32",
            "-DHG_ISA=portable",
            f"-I{INCLUDE}",
            "-I.",
            "-o",
            "probe",
            "probe.c",
            "-lm",
        ],
        cwd=tmp_path,
        check=True,
    )
    said = subprocess.run(["./probe"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    *in_c, (_, size, _) = (line.split() for line in said.splitlines())
    assert in_c == [
        [name, str(offset), str(kind.itemsize)] for name, (kind, offset) in STEP_SCALARS_DTYPE.fields.items()
    ]
    assert int(size) == STEP_SCALARS_DTYPE.itemsize == STEP_SCALARS_BYTES


def test_every_op_has_a_kernel_in_both_dtypes_and_declares_its_arguments():
    lib = library.library()
    for op in OPS.values():
        names = {arg.name for arg in (*op.in_args, *op.out_args)} | set(op.attrs)
        letters = {d for arg in (*op.in_args, *op.out_args) for d in arg.dims}
        for case in op.cases:
            sizes = {k: v for k, v in case.sizes.items() if isinstance(v, int)}
            op.derive(sizes)
            known = names | letters | set(sizes) | {"scalars", "scratch", "threads"}
            assert {word.removeprefix("accumulate.") for word in op.cpu.args.replace("|", " ").split()} <= known, op
        assert op.cases, op
        for dtype in ("f32", "bf16"):
            assert lib.entry(op.cpu.entry, dtype), (op, dtype)


@pytest.fixture(scope="module")
def program(tiny):
    p = Program(F32)
    forward_loss(p, tiny(), 2, 16)
    return p


@pytest.mark.parametrize(
    "backend", [open_backend("cpu"), open_backend("ref"), RefBackend(exact=False)], ids=["cpu", "ref", "rounded"]
)
def test_run_each_matches_run(program, backend):
    arena = backend.alloc(backend.plan(program))
    initialize(program, arena, Start(seed=1))
    run, losses, seen = backend.bind(program, arena), arena.view(program.outputs["losses"]), []
    run.run()
    at_once = np.array(losses)
    losses[...] = 0
    run.run_each(lambda c, seconds: seen.append((c, seconds)))
    assert np.array_equal(losses, at_once) and at_once.min() > 0
    assert [c for c, _ in seen] == program.calls and all(seconds >= 0 for _, seconds in seen)
    seen.clear()
    run.run_each(lambda c, seconds: seen.append(c), Segment(2, 5))
    assert seen == program.calls[2:5]


def test_poison_exposes_an_input_that_overlaps_the_output():
    """y = x + y with y also the output: an input at the same offset as the output reads NaN."""
    p = Program(F32)
    a, b = (p.input(name, (4, 4), F32) for name in "ab")
    first = p.emit(add, a, b)
    p.output("second", p.emit(add, first, a))
    layout = plan(p)
    layout.offset[p.outputs["second"]] = layout.offset[first]  # as a broken planner would
    results = []
    for poison in (False, True):
        backend = RefBackend(exact=False, poison=poison)
        arena = backend.alloc(layout)
        arena.view(a)[...], arena.view(b)[...] = 1, 2
        backend.bind(p, arena).run()
        results.append(arena.view(p.outputs["second"]).copy())
    assert (results[0] == 4).all() and np.isnan(results[1]).all()


@pytest.mark.parametrize("backend", [open_backend("cpu"), RefBackend(exact=False, poison=True), RefBackend()])
def test_an_output_in_a_state_is_written_anew_and_other_programs_read_it(backend):
    writer, reader = Program(F32), Program(F32)
    a = writer.input("a", (4, 3), F32)
    writer.emit(add, a, a, into={"y": writer.state("kept", (4, 3), F32)})
    kept = reader.state("kept", (4, 3), F32)
    reader.output("y", reader.emit(add, kept, kept))
    arena = backend.alloc(backend.plan(reader, writer))
    write, read = backend.bind(writer, arena), backend.bind(reader, arena)
    for value in (1, 2):
        arena.write(a, value)
        write.run()
        for _ in range(2):
            read.run()
            assert (arena.read(reader.outputs["y"]) == 4 * value).all()


def test_an_output_goes_into_a_state_of_its_shape_alone():
    p = Program(F32)
    a = p.input("a", (4, 3), F32)
    for target, got in ((a, "'a'"), (p.state("short", (3, 3), F32), r"'short' \(3, 3\) f32")):
        with pytest.raises(HandgradError, match=rf"\[add\] 'y' .* but got {got}"):
            p.emit(add, a, a, into={"y": target})


def test_arena_is_one_zeroed_allocation_of_the_planned_size(program):
    layout = plan(program)
    arena = open_backend("cpu").alloc(layout)
    assert arena.bytes.nbytes == layout.nbytes and not arena.bytes.any() and arena.address % 4096 == 0
    view = arena.view(program.params["wte.weight"].tensor)
    assert view.base is not None and np.shares_memory(view, arena.bytes)


def test_arena_larger_than_memory_is_rejected_with_its_regions():
    p = Program(F32)
    p.emit(add, *(p.input(name, (1 << 20, min(memory_limits())[0] >> 20), F32) for name in "ab"))
    with pytest.raises(
        HandgradError,
        match=r"\[memory\] the arena fits in memory, \d+ MiB are free, but got \d+ MiB \(params 0 \| .* io \d+\)",
    ):
        open_backend("cpu").alloc(plan(p))


def test_an_arena_that_the_system_does_not_grant_is_an_error():
    """As under `ulimit -v`: free memory is not what a process may have."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    p = Program(F32)
    p.emit(add, *(p.input(name, (1 << 20, 64), F32) for name in "ab"))
    backend, layout = open_backend("cpu"), plan(p)
    now = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, limit[1]))
    try:
        with pytest.raises(HandgradError, match=r"\[memory\] .* 256 MiB are free \(ulimit -v\), but got 768 MiB"):
            backend.alloc(layout)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


class Twice(Op):
    """y = 2 x, on the ref backend only."""

    name, ins, outs = "twice", "x:N,C", "y:N,C"


class Lost(Op):
    """An op whose kernel was never compiled."""

    name, ins, outs, cpu = "lost", "x:N,C", "y:N,C", CpuKernel("lost_forward", "y x | N C")


@pytest.mark.parametrize("op", [Twice(), Lost()], ids=repr)
def test_op_without_a_kernel_is_rejected_before_anything_runs(op):
    p = Program(BF16)
    p.emit(op, p.input("x", (2, 3), BF16))
    backend = open_backend("cpu")
    with pytest.raises(
        HandgradError,
        match=rf"\[bind\] op '{op}' has no cpu kernel for bf16.*test_backends.py:\d+",
    ):
        backend.bind(p, backend.alloc(plan(p)))


def test_mismatched_shapes_are_rejected_while_recording():
    p = Program(F32)
    x, w = p.input("x", (8, 768), F32), p.input("w", (3072, 1024), F32)
    with pytest.raises(
        HandgradError,
        match=r"\[linear\] K is 768 in 'x' \(8, 768\), but got 1024 in 'w' \(3072, 1024\).*test_backends.py:\d+",
    ):
        p.emit(linear, x, w, None, None, act=Act.NONE, keep_pre=False)


def test_unknown_backend_is_rejected():
    with pytest.raises(HandgradError, match=r"\[backend\] the backend is one of auto, ref, cpu, cuda, but got 'gpu'"):
        open_backend("gpu")


def opened_with(isa):
    """Runs a new process that opens the library with this HANDGRAD_ISA and prints the set it uses."""
    code = "from handgrad.backends import open_backend; print(open_backend('cpu').isa)"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HANDGRAD_ISA": isa}, capture_output=True, text=True
    )


def test_unknown_instruction_set_is_rejected():
    done = opened_with("sse9")
    assert (
        done.returncode
        and "[cpu] HANDGRAD_ISA is one of portable, avx2, avx512, avx512bf16, but got 'sse9'" in done.stderr
    )


def test_unsupported_instruction_set_is_rejected(monkeypatch):
    widest = library.ISAS[library.library()._dll.hg_isa()]
    if widest == library.ISAS[-1]:  # this processor supports all: simulate one that does not
        monkeypatch.setattr(
            library.ctypes,
            "CDLL",
            lambda path: type("Old", (), {"hg_isa": staticmethod(lambda: 1), "add_bf16_avx2": 1}),
        )
        monkeypatch.setenv("HANDGRAD_ISA", "avx512")
        with pytest.raises(HandgradError, match=r"\[cpu\] this processor runs up to avx2, but got HANDGRAD_ISA=avx512"):
            library.Library()
    else:
        assert f"this processor runs up to {widest}" in opened_with(library.ISAS[-1]).stderr


def test_missing_library_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PATH", tmp_path / "libhandgrad_cpu.so")
    with pytest.raises(
        HandgradError, match=r"\[cpu\] the compiled kernels are missing: .*libhandgrad_cpu.so.*needs a C compiler"
    ):
        library.Library()
