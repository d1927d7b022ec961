"""The same run gives the same bits for any number of threads; gradient accumulation changes only the rounding."""

import numpy as np
import pytest

from handgrad import Execution, Precision, Start, Trainer, data
from handgrad.optim import AdamW


def differences(a, b):
    """Names of the arrays that are not bit-identical."""
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


@pytest.fixture(scope="module")
def train(tiny, shards):
    """A function that trains three steps and returns the trainer and the losses."""

    def run(dtype="f32", threads=0, micro_batch=4, dropout=0.0, seed=5, sequences=4):
        tokens = data.tokens(shards, seq_len=64, batch_tokens=64 * sequences)
        model = tiny(max_seq_len=64, hidden_size=96, dropout=dropout)
        execution = Execution(micro_batch, extra_programs=(), backend="cpu", threads=threads)
        kind = dict(execution=execution, precision=Precision(dtype), start=Start(seed))
        trainer = Trainer(model, AdamW(), tokens, **kind)
        return trainer, [trainer.step(step, lr=1e-3).loss for step in (1, 2, 3)]

    return run


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_same_run_is_bit_exact(train, dtype):
    (a, first), (b, second) = train(dtype, dropout=0.1), train(dtype, dropout=0.1)
    assert first == second
    assert differences(a.params(), b.params()) == [] and differences(a.grads(), b.grads()) == []


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_one_and_two_threads_are_bit_exact(train, dtype):
    (a, first), (b, second) = train(dtype, threads=1, dropout=0.1), train(dtype, threads=2, dropout=0.1)
    assert (a.backend.threads, b.backend.threads) == (1, 2)
    assert first == second
    assert differences(a.params(), b.params()) == [] and differences(a.grads(), b.grads()) == []


def test_trainers_with_different_thread_counts_coexist(train):
    """Each trainer keeps the number of threads that its scratch was planned for."""
    a, first = train(threads=1)
    b, _ = train(threads=2)
    again, _ = train(threads=1)
    fourth = [run.step(4, lr=1e-3) for run in (a, b, again)]
    assert len({(step.loss, step.grad_norm) for step in fourth}) == 1


def test_different_seed_gives_different_run(train):
    """Negative control: the comparisons above can fail."""
    (a, first), (b, second) = train(seed=5), train(seed=6)
    assert first != second and len(differences(a.params(), b.params())) > 10


def test_gradient_accumulation_matches_one_batch(tiny, shards):
    """Micro-batches of 1, 2 and 4 sequences sum in another order, so they differ only by float32 rounding."""
    grads = []
    for micro_batch in (1, 2, 4):
        tokens = data.tokens(shards, seq_len=64, batch_tokens=256)
        execution = Execution(micro_batch, extra_programs=(), backend="cpu")
        trainer = Trainer(tiny(max_seq_len=64), AdamW(), tokens, execution=execution)
        step = trainer.step(1, lr=1e-3)
        grads.append((step.loss, step.grad_norm, {name: g.copy() for name, g in trainer.grads().items()}))
    for loss, norm, one in grads[:2]:
        assert abs(loss - grads[2][0]) < 1e-6 and abs(norm - grads[2][1]) < 1e-5 * norm
        for name, g in grads[2][2].items():
            assert np.linalg.norm(one[name] - g) <= 2e-6 * np.linalg.norm(g), name
