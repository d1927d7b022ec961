"""What windows of ids become: next tokens, masked tokens and spans, as pure functions of seed and sequence number."""

import doctest
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handgrad import data
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data import draws, objectives
from handgrad.data.draws import Draws, below, hashed, permutation

U16, U32 = np.dtype("<u2"), np.dtype("<u4")


@pytest.mark.parametrize("module", [draws, objectives])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# draws ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    numbers=st.lists(st.integers(0, 2**70), min_size=1, max_size=4),
    stream=st.integers(0, 9),
)
def test_draws_are_hashes_of_their_counters(seed, numbers, stream):
    columns = [0, 3, 2**20]
    expected = [[hashed(seed, number, stream, column) for column in columns] for number in numbers]
    assert Draws(seed, numbers)(stream, columns).tolist() == expected
    own = np.arange(2 * len(numbers)).reshape(-1, 2)
    expected = [[hashed(seed, n, stream, int(column)) for column in row] for n, row in zip(numbers, own, strict=True)]
    assert Draws(seed, numbers)(stream, own).tolist() == expected


def test_draws_are_uniform_and_independent():
    draw = Draws(1, range(500))
    found = [below(draw(stream, np.arange(200)), 10) for stream in (1, 2)]
    for a in found:
        assert chi2(np.bincount(a.ravel(), minlength=10)) < 45  # 9 degrees of freedom: p below 1e-6
    for a, b in [(found[0], found[1]), (found[0][:, 1:], found[0][:, :-1]), (found[0][1:], found[0][:-1])]:
        assert chi2(np.bincount((10 * a + b).ravel(), minlength=100)) < 190  # 99: p below 1e-6
    order = permutation(draw(3, np.arange(8)))
    assert (np.sort(order, axis=1) == np.arange(8)).all()
    assert below(np.array([0, 2**64 - 1], np.uint64), [7, 2**31]).tolist() == [0, 2**31 - 1]


def chi2(counts):
    """Pearson's statistic of counts that should be equal."""
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


# next token -----------------------------------------------------------------------------------------------------------


def test_order_of_next_token_batches_is_that_of_earlier_versions(tmp_path):
    """A resumed run reads on where it stopped, so the order of the windows must not change between versions."""
    begin = 0
    for index, count in enumerate([1000, 333, 41, 7]):
        ids = np.arange(begin, begin + count)
        data.write_shard(tmp_path / f"train_{index}.bin", [ids], [U16, U32][index % 2])
        begin += count
    found = hashlib.sha256()
    for shuffle in (True, False):
        for seq_len in (1, 7, 32):
            tokens = data.tokens(tmp_path, seq_len, 4 * seq_len, seed=11, shuffle=shuffle)
            batches = [tokens.batch(step) for step in (0, 1, 17, 10**9)]
            for batch in [*batches, *tokens.sweep(3)]:
                found.update(batch["ids"].tobytes() + batch["targets"].tobytes())
    assert found.hexdigest() == "a2e23829d524b7c0f105d1d680704ce6d9b07e06a019d74585e590cef8f3b487"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4))
def test_documents_are_kept_apart(rows):
    """By definition: two positions are in one document if no end-of-text id lies between them, or on the later."""
    raw, T = np.array(rows, np.int32), 5
    names = ("ids", "targets", "first", "positions")
    arrays = data.Causal(eot=0).fill(raw, None, Draws(0, range(len(raw))), names)
    plain = data.Causal().fill(raw, None, Draws(0, range(len(raw))), names[:2])
    assert all((arrays[name] == plain[name]).all() for name in plain)
    for b in range(len(raw)):
        for n in range(T):
            sees = [k for k in range(n + 1) if 0 not in rows[b][k + 1 : n + 1]]
            assert arrays["first"][b, n] == sees[0] and len(sees) == n + 1 - sees[0]
            assert arrays["positions"][b, n] == len(sees) - 1
    assert all(a.dtype == np.int32 and a.flags.c_contiguous and a.shape == (len(raw), T) for a in arrays.values())


def test_documents_in_the_last_batch_of_a_sweep(tmp_path):
    data.write_shard(tmp_path / "a.bin", [[9, 0, 1, 2, 0, 3, 4]], U16)
    tokens = data.tokens(tmp_path / "a.bin", 3, 3, objective=data.Causal(eot=0))
    first, second = tokens.sweep(2), tokens.sweep(3)
    batch = next(first)
    assert batch["first"].tolist() == [[0, 1, 1], [0, 1, 1]] and batch["positions"].tolist() == [[0, 0, 1]] * 2
    batch = next(second)
    assert batch["ids"].tolist() == [[9, 0, 1], [2, 0, 3], [0, 0, 0]] and (batch["targets"][2] == IGNORE_INDEX).all()
    assert batch["first"][2].tolist() == batch["positions"][2].tolist() == [0, 0, 0]
