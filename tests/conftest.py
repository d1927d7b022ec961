"""What several tests share: small token shards, small models, and one forward and backward pass of a model."""

import numpy as np
import pytest

from handgrad.backends import open_backend, why_no_cuda
from handgrad.backends.ref import RefBackend
from handgrad.core.backward import POLICIES, backward
from handgrad.core.dtypes import DTYPES
from handgrad.core.op import MicroBatch
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.data import id_dtype, write_shard
from handgrad.models import GPT2, forward_loss
from handgrad.ops import add
from handgrad.train.start import Start, initialize


def pytest_collection_modifyitems(items):
    reason = why_no_cuda()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A glob of token shards: 20,000 random ids below 97."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train_0.bin", [np.random.default_rng(0).integers(0, 97, 20_000)], id_dtype(97))
    return str(folder / "*.bin")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A shard of ids below 97 with frequencies as uneven as in text, so that ten steps change the loss."""
    folder = tmp_path_factory.mktemp("text")
    write_shard(folder / "a.bin", [np.random.default_rng(0).zipf(1.3, 20_000) % 97], id_dtype(97))
    return str(folder / "a.bin")


@pytest.fixture(scope="session")
def tiny():
    """A GPT-2 of two layers with sizes that divide nothing evenly; changes as keywords."""

    def make(**changes):
        sizes = dict(vocab_size=97, max_seq_len=20, num_layers=2, num_heads=3, hidden_size=36)
        return GPT2(**sizes | changes)

    return make


@pytest.fixture(scope="session")
def one_pass():
    """A function that runs forward and backward of a model on random tokens; returns (losses, gradients by name).

    backend: "cpu", "cuda", "steady" (cuda, deterministic), "ref" (float64), "rounded" (numpy in the working dtype) or
    "poisoned" (the same, outputs NaN first)
    """
    backends = {
        "cpu": lambda threads: open_backend("cpu", threads),
        "cuda": lambda threads: open_backend("cuda"),
        "steady": lambda threads: open_backend("cuda", precision=Precision(deterministic=True)),
        "ref": lambda threads: RefBackend(),
        "rounded": lambda threads: RefBackend(exact=False),
        "poisoned": lambda threads: RefBackend(exact=False, poison=True),
    }

    def run(
        model,
        backend="cpu",
        *,
        dtype="f32",
        policy="none",
        micro_batch=3,
        seq_len=17,
        chunks=2,
        threads=0,
        micro_steps=1,
        accumulates=True,
    ):
        backend = backends[backend](threads)
        p = Program(DTYPES[dtype], trains=True, accumulates=accumulates)
        forward_loss(p, model, micro_batch, seq_len, chunks)
        backward(p, add, drop=POLICIES[policy])
        arena = backend.alloc(backend.plan(p))
        initialize(p, arena, Start(seed=3))
        rng = np.random.default_rng(4)
        for info in p.params.values():  # away from the start: biases other than 0, norms' weights other than 1
            w = np.array(arena.read_part("param", info.tensor))
            w[: info.init.rows] += rng.normal(0, 0.1, w[: info.init.rows].shape).astype(w.dtype)
            arena.write_part("param", info.tensor, w)
        for t in p.inputs.values():
            arena.write(t, rng.integers(0, model.vocab_size, t.shape))
        arena.write_scalars(p, seed=11, step=2, loss_scale=1 / (micro_batch * seq_len))
        bound = backend.bind(p, arena)
        for k in range(micro_steps):
            arena.write_scalars(p, micro_step=k)
            bound.run(micro_batch=MicroBatch(first=k == 0, last=k + 1 == micro_steps))
        losses = arena.read(p.outputs["losses"])
        return losses, {name: np.array(arena.read_part("grad", info.tensor)) for name, info in p.params.items()}

    return run
