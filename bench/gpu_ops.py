"""Kernels alone on one GPU, at GPT-2 124M's sizes (B=64, T=1024): how close does each come to the memory bandwidth?

    python bench/gpu_ops.py                              all rows; about half a minute
    python bench/gpu_ops.py --ops add_norm norm_backward
    python bench/gpu_ops.py --smoke                      tiny sizes on the CPU, to test this script

A row is one CUDA graph of at least 16 calls, which cycle through buffers that together exceed L2. A sample replays the
graph for a tenth of a second; the time of a call is the median of nine samples and includes the gaps between kernels.
GB/s counts every byte that a call must move once. `copy` is a device-to-device cudaMemcpy, reads and writes counted.
Only a whole step (gpu_step.py) shows what a call gains from data that the previous call left in L2.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from handgrad.backends import open_backend
from handgrad.backends.arena import NUMPY
from handgrad.core.dtypes import DTYPES, DType
from handgrad.core.op import Call, Case, case
from handgrad.core.program import Program
from handgrad.core.tensor import Role, Tensor
from handgrad.ops import OPS
from handgrad.ops.act import Act
from handgrad.testing import set_scalars

CALLS = 16  # least calls of a graph: the gap between two graphs is some microseconds
CACHE_BYTES = 4 * 50_000_000  # moved by the calls of a row before they reuse a buffer: four times the L2 of an H100
ADAM = dict(start=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
HEADS = dict(T=1, H=12, K=12, window=0, scale=0.125)


def rows(smoke: bool) -> list[tuple[str, str, Case]]:
    """(op, remark, sizes) of every row."""
    N, C, S, block, table, all_ = (
        (64, 96, 32, 7680, 4096, 9216) if smoke else (65536, 768, 1024, 7_087_872, 39_419_904, 124_475_904)
    )
    sizes = dict(N=N, C=C)
    return [
        ("add_norm", "with the branch's bias", case(**sizes, eps=1e-5)),
        ("add_norm", "", case(**sizes, eps=1e-5, without="hb")),
        ("norm", "", case(**sizes, eps=1e-5)),
        ("norm_backward", "with the branch's bias", case(**sizes)),
        ("norm_backward", "", case(**sizes, without="dhb")),
        ("norm_backward", "of the head", case(**sizes, without="ds")),
        ("add_rms_norm", "", case(**sizes, eps=1e-5, without="hb")),
        ("rms_norm", "", case(**sizes, eps=1e-5)),
        ("rms_norm_backward", "", case(**sizes, without="dhb")),
        ("dropout", "", case(**sizes, p=0.1, stream=1)),
        ("add", "", case(**sizes)),
        ("linear_act", "", case(N=N, M=4 * C, act=Act.GELU_TANH)),
        ("linear_act_backward", "", case(N=N, M=4 * C, act=Act.GELU_TANH)),
        ("gated", "", case(N=N, G=8 * C, act=Act.SILU)),
        ("gated_backward", "", case(N=N, G=8 * C, act=Act.SILU)),
        ("fill", "one block", case(n=block, value=0.0)),
        ("adamw", "one block", case(n=block, **ADAM)),
        ("adamw", "embeddings", case(n=table, **ADAM)),
        ("global_norm", "", case(n=all_, clip=1.0)),
        ("attention_decode", "a full cache", case(N=1, Q=3 * C, S=S, without="rel", **HEADS)),
        ("attention_decode", "64 full caches", case(N=64, Q=3 * C, S=S, without="rel", **HEADS)),
    ]


def record(name: str, case: Case, dtype: DType, cache_bytes: int) -> Program:
    """A program of an op's calls, which rotate over sets of tensors that move `cache_bytes` together."""
    op, p = OPS[name], Program(dtype, trains=True)
    sizes = {k: v for k, v in case.sizes.items() if isinstance(v, int)}
    op.derive(sizes)

    def shape(arg: Any) -> tuple[int, ...]:
        return tuple(sizes[d] if d in sizes else int(d) for d in arg.dims)

    sets = 1
    while len(p.calls) < max(CALLS, sets):
        i = len(p.calls) % sets
        ins = [
            None if a.name in case.without else p.input(f"{a.name}.{i}", shape(a), a.dtype(dtype)) for a in op.in_args
        ]
        into: dict[str, Tensor | None] = {}
        for a in op.out_args:
            if a.inout and a.name == "scalars":
                into[a.name] = p.scalars
            elif a.inout and a.name not in case.without and (not a.optional or op.makes(a.name, case.sizes, dtype)):
                role = Role.GRAD if a.kind == "grad" else Role.STATE
                key = f"{a.name}.{len(p.calls) if role is Role.GRAD else i}"  # so that no call accumulates
                into[a.name] = p.states.setdefault(key, Tensor(key, shape(a), a.dtype(dtype), role))
        for t in p.emit_call(op, tuple(ins), {k: case.sizes[k] for k in op.attrs}, into):
            if t is not None and t.role is Role.ACT:
                p.output(t.name, t)  # an output lives to the end, so no two calls share memory
        sets = min(64, max(2, -(-cache_bytes // moved(p.calls[0]))))
    return p


def moved(c: Call) -> int:
    """Bytes that a call must move; a KV cache is read, and only a few of its rows are written."""
    return c.op.nbytes(c) - (c.cache.nbytes if c.op.name == "attention_decode" else 0)


def fill(p: Program, arena: Any) -> None:
    """Fills all tensors with random values; rstd and second moments are positive."""
    noise = np.random.default_rng(0).standard_normal(1 << 20)
    for t in (t for t in (*p.inputs.values(), *p.states.values()) if t.role is not Role.GRAD):
        name = t.name.split(".")[0]
        values = np.abs(noise) + 0.1 if name in ("rstd", "v") else 100 * noise if name == "low" else noise
        arena.write(t, np.resize(values.astype(NUMPY[t.dtype.name]), t.shape))
    set_scalars(p, arena)
    arena.write_scalars(p, position=p.calls[0].sizes.get("S", 1) - 1)


def seconds(run: Any, wait: Any, sample: float) -> float:
    """Seconds of one run: the median of nine samples of `sample` seconds."""
    for _ in range(3):  # the first runs eagerly, the second captures
        run()
    wait()

    def of(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - begin) / count

    count = max(1, int(sample / of(3)))
    return statistics.median(of(count) for _ in range(9))


def copy(backend: Any, nbytes: int, sample: float) -> float:
    """GB/s of a device-to-device copy between buffers larger than L2."""
    device = backend.device
    a, b = device.alloc(nbytes), device.alloc(nbytes)
    graph = backend.graphs.capture(lambda: [device.within(b, a, nbytes) for _ in range(CALLS)])
    taken = seconds(graph.replay, device.sync, sample) / CALLS
    device.free(a)
    device.free(b)
    return 2 * nbytes / taken / 1e9


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", help="only these ops")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    backend, sample = open_backend("cpu" if a.smoke else "cuda"), 0.001 if a.smoke else 0.1
    print(f"{backend.hardware}, {a.dtype}")
    if not a.smoke:
        print(f"{'copy':57} {copy(backend, 201_326_592, sample):8.0f} GB/s")
    for name, what, sizes in rows(a.smoke):
        if a.ops and name not in a.ops:
            continue
        p = record(name, sizes, DTYPES[a.dtype], 0 if a.smoke else CACHE_BYTES)
        arena = backend.alloc(backend.plan(p))
        fill(p, arena)
        run = backend.bind(p, arena)
        taken = seconds(run.run, lambda arena=arena, p=p: arena.fetch_scalars(p)(), sample) / len(p.calls)
        shape = " ".join(f"{k}={v}" for k, v in sizes.sizes.items() if k in "NCMQSn")
        rate = moved(p.calls[0]) / taken / 1e9
        print(f"{name:20} {shape:22} {1e6 * taken:10.1f} us {rate:8.0f} GB/s  {what}", flush=True)
        del run, arena


if __name__ == "__main__":
    main()
