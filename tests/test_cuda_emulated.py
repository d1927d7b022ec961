"""CUDA kernels on the CPU (tests/emulator), all but wgmma: ops against the oracle, training steps, faults and races."""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
from rank_threads import on_ranks

from handgrad import Execution, Precision, Trainer, data
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import Case, Op
from handgrad.launch import Kernel, Launches
from handgrad.models import GPT2, Lora
from handgrad.ops import OPS
from handgrad.ops.adamw.reference import join_weight
from handgrad.optim import Adafactor, AdamW, Muon, ScheduleFree
from handgrad.optim.record import COLLECTIVES as USED
from handgrad.testing import case_arrays, case_program, check_case, run_case
from tests.emulator import (
    H100,
    INCLUDE,
    SMALL,
    EmulatedBackend,
    KernelFault,
    Variant,
    is_emulated,
    launched,
    library,
    source,
    variants,
)

COLLECTIVES = [getattr(USED, f.name) for f in fields(USED)]

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++"), reason="the emulator needs g++ on x86-64"
)

CASES = [
    pytest.param(
        op,
        case,
        dtype,
        variant,
        id=f"{op.name}-{'-'.join(f'{k}{v}' for k, v in case.sizes.items())}-{dtype}{'-' * bool(name)}{name}",
    )
    for op in OPS.values()
    if type(op).cuda is not Op.cuda
    for case in op.cases
    if not case.real
    for dtype in (F32, BF16)
    for name, variant in variants(op, case, dtype).items()
]


def sources(op, case, dtype, variant):
    call = case_program(op, case, dtype)[1]
    return {source(step, call) for step in launched(call, variant).steps if is_emulated(step, call)}


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Compiles the kernels of all selected tests in parallel."""
    asked = [
        item.callspec.params
        for item in request.session.items
        if getattr(item, "callspec", None) and "case" in item.callspec.params and item.module is request.module
    ]
    wanted = {s for p in asked for s in sources(p["op"], p["case"], p["dtype"], p["variant"])}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(library, wanted))


@pytest.mark.parametrize("op, case, dtype, variant", CASES)
def test_case(op, case, dtype, variant):
    """Right within the derived tolerance, and the same bits in both thread orders."""
    for e in check_case(op, case, EmulatedBackend(variant), dtype):
        assert e.ratio <= 1, e
    p, c = case_program(op, case, dtype)
    arrays = case_arrays(op, c)
    one, other = (run_case(p, c, arrays, EmulatedBackend(variant, reverse)) for reverse in (False, True))
    for name in one:
        assert np.array_equal(one[name], other[name]), f"{name} depends on the order of the threads"


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("bounds", (False, True), ids=("window", "first_key"))
def test_attention_does_not_read_keys_that_no_query_of_a_block_sees(bounds, dtype):
    """NaN in the first 64 keys and values changes nothing from query 256 on, whose blocks see from key 192 on."""
    op, T = OPS["attention"], 384
    sizes = dict(N=T, Q=24, T=T, H=1, K=1, causal=True, window=0 if bounds else 64, scale=0.3, p=0.0, stream=1)
    without = ("kv", "rel", "last_key") if bounds else ("kv", "rel", "first_key", "last_key")
    p, c = case_program(op, Case(sizes, without=without), dtype)
    arrays = case_arrays(op, c)
    if bounds:
        arrays["first_key"] = np.maximum(np.arange(T) - 63, 0)
    backend = EmulatedBackend(Variant(replace(H100, has_library_attention=False)))
    y = run_case(p, c, arrays, backend)["y"]
    arrays["qkv"][:64, 8:] = np.nan
    got = run_case(p, c, arrays, backend)["y"]
    assert np.array_equal(got[256:], y[256:]) and np.isnan(got[:64]).all()


def test_every_op_has_a_cuda_form():
    assert all(type(op).cuda is not Op.cuda for op in [*OPS.values(), *COLLECTIVES])


def steps(shards, backend, *, dtype="f32", hidden_size=36, micro_batch=2, zero=1, count=3, **tune):
    """(losses, gradient norms) of a few steps of four sequences, a validation loss, and the trainer."""
    tokens = data.tokens(shards, seq_len=33, batch_tokens=132)
    model = GPT2(vocab_size=97, max_seq_len=40, num_layers=2, num_heads=3, hidden_size=hidden_size, dropout=0.1)
    execution, kinds = Execution(micro_batch, zero=zero, **tune), Precision(dtype)
    run = Trainer(model, AdamW(), tokens, execution=execution, precision=kinds, backend=backend)
    done = [run.step(step, lr=1e-2) for step in range(1, count + 1)]
    return np.array([s.loss for s in done]), np.array([s.grad_norm for s in done]), run.evaluate(tokens, 264), run


TRAINING = {
    "f32": dict(),
    "f32 wide": dict(hidden_size=48),
    "f32 small": dict(variant=Variant(SMALL)),
    "bf16": dict(dtype="bf16"),
    "bf16 wide": dict(dtype="bf16", hidden_size=48),
    "bf16 wide gelu separate": dict(dtype="bf16", hidden_size=48, variant=Variant(alternative=-1)),
    "bf16 wide own attention": dict(
        dtype="bf16", hidden_size=48, variant=Variant(replace(H100, has_library_attention=False))
    ),
    "f32 a part": dict(train_only=("h.1.attn.*.weight", "*.bias")),
    "bf16 wide lora": dict(dtype="bf16", hidden_size=48, lora=Lora(rank=4, dropout=0.1)),
    "bf16 wide deterministic": dict(dtype="bf16", hidden_size=48, variant=Variant(replace(H100, deterministic=True))),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training(shards, name):
    """A few whole steps, evaluation and sampling: the program as the cuda backend binds it."""
    options = dict(TRAINING[name])
    loss, norm, val, run = steps(shards, EmulatedBackend(options.pop("variant", Variant())), **options)
    exact = steps(shards, RefBackend(), **{k: v for k, v in options.items() if k != "dtype"})
    rtol = 2e-5 if options.get("dtype", "f32") == "f32" else 5e-3  # a bf16 logit is off by about 2^-8, a loss is a mean
    np.testing.assert_allclose(loss, exact[0], rtol=rtol)
    np.testing.assert_allclose(norm, exact[1], rtol=10 * rtol)
    np.testing.assert_allclose(val, exact[2], rtol=rtol)


WHOLE = [Muon(second_beta=0.9, row_scale=True, rescale=True, cautious=True), Adafactor()]


@pytest.mark.parametrize("optim", WHOLE, ids=lambda o: type(o).__name__)
def test_muon_and_adafactor_on_two_ranks(shards, optim):
    """Every call of the optimizer as the cuda backend binds it, in bf16, batched GEMMs among them; each rank holds half
    of the parameters, and the means of rows and columns of all."""

    def work(comm):
        tokens = data.tokens(shards, seq_len=16, batch_tokens=64)
        model = GPT2(vocab_size=97, max_seq_len=16, num_layers=1, num_heads=2, hidden_size=24)
        backend = EmulatedBackend(comm=comm) if comm.world > 1 else RefBackend()
        run = Trainer(
            model, optim, tokens, execution=Execution(4 // comm.world), precision=Precision("bf16"), backend=backend
        )
        return [run.step(step, lr=2e-2).loss for step in (1, 2, 3)]

    [exact], (mine, other) = on_ranks(1, work), on_ranks(2, work)
    assert mine == other
    np.testing.assert_allclose(mine, exact, rtol=5e-3)  # as above


def test_schedule_free_on_two_ranks(shards):
    """As the cuda backend binds it, in bf16, each rank with its share of z and v; the average, rounded to bf16, is that
    of the whole state, and the weights come back."""
    name = "wpe.weight"

    def work(comm):
        tokens = data.tokens(shards, seq_len=16, batch_tokens=64)
        model = GPT2(vocab_size=97, max_seq_len=16, num_layers=1, num_heads=2, hidden_size=24)
        backend = EmulatedBackend(comm=comm) if comm.world > 1 else RefBackend()
        execution = Execution(4 // comm.world)
        run = Trainer(model, ScheduleFree(), tokens, execution=execution, precision=Precision("bf16"), backend=backend)
        losses = [run.step(step, lr=2e-2).loss for step in (1, 2)]
        y, state = run.params()[name].astype(np.float32), run._state()
        run.use_average()
        x = run.arena.read_part("param", run.program.params[name].tensor).astype(np.float32)
        return [*losses, run.step(3, lr=2e-2).loss], x, y, state

    [exact], (mine, other) = on_ranks(1, work), on_ranks(2, work)
    assert mine[0] == other[0] and np.array_equal(mine[1], other[1])
    np.testing.assert_allclose(mine[0], exact[0], rtol=5e-3)  # as above
    _, x, y, state = mine
    whole, z = join_weight(y, state[f"low.{name}"]), state[f"z.{name}"]
    np.testing.assert_allclose(x, whole + (1 - 1 / 0.9) * (z - whole), rtol=2**-8, atol=2**-24)
    assert np.abs(x - y).max() > 1e-3


@pytest.mark.parametrize("zero, micro_batch, dtype", [(0, 2, "f32"), (1, 1, "bf16"), (2, 1, "f32"), (3, 1, "f32")])
def test_ranks(shards, zero, micro_batch, dtype):
    """Two ranks, each with the launches of the cuda backend, train as one; the sums are in NCCL's places."""
    sizes = dict(micro_batch=micro_batch, count=2)

    def work(comm):
        return steps(shards, EmulatedBackend(comm=comm), zero=zero, dtype=dtype, **sizes)

    exact, rtol = steps(shards, RefBackend(), **sizes), 2e-5 if dtype == "f32" else 5e-3  # as above
    for loss, norm, val, _ in on_ranks(2, work):
        np.testing.assert_allclose(loss, exact[0], rtol=rtol)
        np.testing.assert_allclose(norm, exact[1], rtol=10 * rtol)
        np.testing.assert_allclose(val, exact[2], rtol=rtol)


# what must be caught ------------------------------------------------------------------------------------------------


class Probe(Op):
    """y = x in a kernel of the test's."""

    name, ins, outs = "probe", "x:N", "y:N"

    def __init__(self, folder, body, shared):
        self.text = (
            '#include "ptx.cuh"\nKERNEL probe_kernel(float *y, const float *x, i64 N) {\n  int t = threadIdx.x;\n'
            + body
            + "\n}\n"
        )
        self.path, self.shared = folder, shared
        folder.mkdir(exist_ok=True)
        (folder / "cuda.cu").write_text(self.text)

    @property
    def folder(self):
        return self.path

    def cuda(self, c, gpu):
        return Launches((Kernel("probe_kernel", "y x | N", 1, 64, self.shared),))

    def ref(self, v):
        return (v.x,)


def probe(folder, body, shared=0, reverse=False):
    """Runs the body with 64 threads on x = 0 .. 63 and returns y."""
    op = Probe(folder, body, shared)
    p, c = case_program(op, Case({"N": 64}), F32)
    return run_case(p, c, {"x": np.arange(64.0)}, EmulatedBackend(reverse=reverse))["y"]


GOOD = {
    "copy": "y[t] = x[t];",
    "shared": "__shared__ float s[64]; s[63 - t] = x[t]; __syncthreads(); y[t] = s[63 - t];",
    "dynamic": "HG_SHARED(float, s); s[63 - t] = x[t]; __syncthreads(); y[63 - t] = s[t];",
    "early return": "if (t < 32) { y[t] = x[t]; return; } __syncthreads(); y[t] = __shfl_sync(0xffffffffu, x[t], t % 32);",
    "shuffles": (
        "float v = __shfl_down_sync(0xffffffffu, x[t], 1); v = t % 32 == 31 ? x[t] + 1 : v; "
        "y[t] = __shfl_up_sync(0xffffffffu, v, 1); if (t % 32 == 0) y[t] = x[t];"
    ),
    "sub-warp": "float v = __shfl_xor_sync(0xffffffffu, x[t], 3, 4); y[t] = __shfl_sync(0xffffffffu, v, 3 - t % 4, 4);",
    "votes": (
        "unsigned b = __ballot_sync(0xffffffffu, t & 1); "
        "y[t] = x[t] + (b != 0xaaaaaaaau) + __all_sync(0xffffffffu, t & 1) + !__any_sync(0xffffffffu, t & 1);"
    ),
    "half a warp": "if (t % 32 < 16) y[t] = __shfl_xor_sync(0x0000ffffu, __shfl_xor_sync(0x0000ffffu, x[t], 8), 8); else y[t] = x[t];",
    "reduce": "__shared__ float room[32]; y[t] = x[t] + block_reduce<64>(t < 32 ? 1.0f : -1.0f, Sum(), 0.0f, room);",
    "async": (
        "__shared__ __align__(16) float s[64]; if (t % 4 == 0) copy_async(s + t, x + t); "
        "copy_async_commit(); copy_async_wait<0>(); __syncthreads(); y[t] = s[t];"
    ),
    "two groups": (
        "__shared__ __align__(16) float s[64]; if (t < 16) { copy_async(s + 4 * t, x + 4 * t, false); "
        "copy_async_commit(); copy_async_wait<0>(); copy_async(s + 4 * t, x + 4 * t); copy_async_commit(); "
        "copy_async_commit(); copy_async_wait<1>(); } __syncthreads(); y[t] = s[t];"
    ),
}


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("name", GOOD)
def test_a_right_kernel(tmp_path, name, reverse):
    assert np.array_equal(probe(tmp_path, GOOD[name], 256 * (name == "dynamic"), reverse), np.arange(64))


def test_an_mma_on_tensor_cores(tmp_path):
    """d = a b by load_matrix and mma_bf16 with the fragments of PTX; a (16, 16) and b (16, 8) hold small whole numbers."""
    body = """
  __shared__ __align__(16) bf16 a[16][16], b[16][8];
  if (t >= 32) { y[t] = 0; return; }
  for (int i = t; i < 256; i += 32) a[i / 16][i % 16] = from_float<bf16>((float)(i * 7 % 5));
  for (int i = t; i < 128; i += 32) b[i / 8][i % 8] = from_float<bf16>((float)(i * 3 % 7));
  __syncwarp();
  u32 r[4], c[4];
  float d[4] = {1, 1, 1, 1};
  load_matrix(r, &a[t % 8 + t / 8 % 2 * 8][t / 16 * 8]);
  load_matrix_transposed(c, &b[t % 16][0]);
  mma_bf16(d, r, c[0], c[1]);
  y[t] = d[0] + 64 * d[1]; y[t + 32] = d[2] + 64 * d[3];"""
    body = body.replace("if (t >= 32) { y[t] = 0; return; }", "if (t >= 32) return;")
    a, b = (np.arange(256) * 7 % 5).reshape(16, 16), (np.arange(128) * 3 % 7).reshape(16, 8)
    d = a @ b + 1
    got = probe(tmp_path, body)
    for lane in range(32):
        g, t = lane // 4, lane % 4 * 2
        assert got[lane] == d[g, t] + 64 * d[g, t + 1] and got[lane + 32] == d[g + 8, t] + 64 * d[g + 8, t + 1]


FAULTS = {
    "a barrier that some threads never reach": (
        "if (t < 40) __syncthreads(); else __syncwarp(); y[t] = x[t];",
        "stuck, 0 of 64 threads have returned; thread 0 at __syncthreads, cuda.cu:4; "
        "thread 40 in a warp collective of lanes ffffffff at cuda.cu:4",
    ),
    "two barriers": (
        "if (t < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}\ny[t] = x[t];",
        "different __syncthreads: cuda.cu:5 and cuda.cu:7",
    ),
    "a shuffle without half the warp": (
        "if (t % 32 < 16) y[t] = __shfl_xor_sync(0xffffffffu, x[t], 1); else y[t] = x[t];",
        "lanes ffff0000 have returned|stuck",
    ),
    "a shuffle from outside the mask": (
        "if (t % 32 < 16) y[t] = __shfl_xor_sync(0xffffu, x[t], 16); else y[t] = x[t];",
        "from lane 16, outside of the mask 0000ffff",
    ),
    "two shuffles": (
        "if (t % 2)\ny[t] = __shfl_xor_sync(~0u, x[t], 2);\nelse\ny[t] = __shfl_xor_sync(~0u, x[t], 4);",
        "different collectives: cuda.cu:7 .* and cuda.cu:5",
    ),
    "an index outside of an array": (
        "__shared__ float s[64]; s[t + (int)N - 63] = x[t]; __syncthreads(); y[t] = s[t];",
        "outside of its array.* at cuda.cu:4",
    ),
    "a write beyond dynamic shared memory": (
        "HG_SHARED(float, s); s[t + 4] = x[t]; __syncthreads(); y[t] = x[t];",
        "after the end of dynamic shared memory|outside of dynamic",
    ),
    "a write far beyond it": (
        "HG_SHARED(float, s); s[t + 64] = x[t]; __syncthreads(); y[t] = x[t];",
        "outside of dynamic shared memory.* at cuda.cu:4",
    ),
    "a misaligned access": ("*(float4 *)(y + t % 2) = *(const float4 *)(x + t % 2);", "misaligned.* at cuda.cu:4"),
    "a null pointer": (
        "const float *p = N == 64 ? nullptr : x; y[t] = p[t];",
        "memory that is not there.* at cuda.cu:4",
    ),
    "a copy to a place that is not shared": ("copy_async(y + 4 * t, x);", "target of a copy at cuda.cu:4"),
    "rows that are not shared": ("u32 r[4]; load_matrix(r, x); y[t] = r[0];", "lane 0's row at cuda.cu:4"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_launch(tmp_path, name):
    body, message = FAULTS[name]
    with pytest.raises(KernelFault, match=message):
        probe(tmp_path, body, shared=256)
    assert np.array_equal(probe(tmp_path / "next", GOOD["shared"]), np.arange(64))  # and the next one runs


RACES = {
    "no barrier": "__shared__ float s[64]; s[t] = x[t]; y[63 - t] = s[63 - t];",
    "no barrier between a warp's writes": "__shared__ float s[64]; s[t] = x[t]; y[t ^ 1] = s[t ^ 1];",
    "no wait for a copy": (
        "__shared__ __align__(16) float s[64]; if (t < 16) copy_async(s + 4 * t, x + 4 * t); "
        "copy_async_commit(); __syncthreads(); y[t] = s[t];"
    ),
    "a wait that leaves its own group out": (
        "__shared__ __align__(16) float s[64]; if (t < 16) copy_async(s + 4 * t, x + 4 * t); "
        "copy_async_commit(); copy_async_wait<1>(); __syncthreads(); y[t] = s[t];"
    ),
    "a buffer reused too early": (
        "__shared__ float s[1]; if (t == 0) s[0] = 5; __syncthreads(); float v = s[0]; "
        "if (t == 63) s[0] = 7; y[t] = v - 5 + x[t];"
    ),
    "uninitialised shared memory": "HG_SHARED(float, s); y[t] = x[t] + s[t] * 0;",
}


@pytest.mark.parametrize("name", RACES)
def test_a_race_shows_in_one_of_the_orders(tmp_path, name):
    results = [probe(tmp_path, RACES[name], 256, reverse) for reverse in (False, True)]
    assert not all(np.array_equal(y, np.arange(64)) for y in results)


@pytest.mark.parametrize("barrier", range(2))
def test_removing_a_barrier_from_a_reduction_is_caught(tmp_path, monkeypatch, barrier):
    """The op's own kernel with a barrier less in block_reduce gives wrong values or faults."""
    op, case = OPS["norm"], Case({"N": 5, "C": 2072, "eps": 1e-5})
    for file in (*INCLUDE.glob("*.cuh"), *op.folder.glob("*.cu*")):
        shutil.copy(file, tmp_path)  # the headers beside a file come first
    header = (tmp_path / "kernel.cuh").read_text()
    before, reduction = header.split("float block_reduce", 1)
    parts = reduction.split("__syncthreads();")
    assert len(parts) == 3
    parts[barrier : barrier + 2] = [parts[barrier] + parts[barrier + 1]]
    monkeypatch.setattr(Op, "folder", property(lambda self: tmp_path))
    judge = lambda reverse: max(e.ratio for e in check_case(op, case, EmulatedBackend(reverse=reverse), F32))  # noqa: E731
    assert judge(False) <= 1 and judge(True) <= 1
    (tmp_path / "kernel.cuh").write_text(before + "float block_reduce" + "__syncthreads();".join(parts))
    library.cache_clear()
    try:
        assert max(judge(False), judge(True)) > 1
    except KernelFault:
        pass


def test_a_write_outside_of_the_output_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="probe wrote outside its outputs"):
        probe(tmp_path, "y[t] = x[t]; if (t == 0) y[64] = 1;")


def test_a_launch_that_does_not_fit_the_kernel_is_refused(tmp_path):
    op = Probe(tmp_path, GOOD["copy"], 0)
    p, c = case_program(op, Case({"N": 64}), F32)
    op.cuda = lambda c, gpu: Launches((Kernel("probe_kernel", "y x | N N", 1, 64),))
    with pytest.raises(AssertionError, match="takes ppi .* passes ppii"):
        run_case(p, c, {"x": np.arange(64.0)}, EmulatedBackend())
