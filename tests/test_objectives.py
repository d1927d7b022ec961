"""What windows of ids become: next tokens, masked tokens and spans, as pure functions of seed and sequence number."""

import doctest
import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handgrad import data
from handgrad.core.errors import HandgradError
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data import draws, objectives, spans
from handgrad.data import masked as masking
from handgrad.data.draws import Draws, below, hashed, permutation
from handgrad.data.spans import _pieces, span_counts

U16, U32 = np.dtype("<u2"), np.dtype("<u4")


@pytest.mark.parametrize("module", [draws, objectives, masking, spans])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


GOLDEN = {  # of seed 7, sequence 3
    "rows": [3, 4, 7, 9, 11],
    "ids": [[1, 10, 11, 3, 3, 14, 15, 3, 17, 18, 19, 3, 21, 22, 23, 2]],
    "source": [[10, 11, 12, 13, 599, 15, 16, 17, 18, 598, 21, 22, 23, 24, 597, 26, 27, 28, 596, 1]],
    "targets": [[599, 14, 598, 19, 20, 597, 25, 596, 29, 30, 31, 1]],
}


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


# any objective --------------------------------------------------------------------------------------------------------

CLS, SEP, PAD, MASK, EOT = 1, 2, 0, 3, 4
IDS = {"cls_id": CLS, "sep_id": SEP, "pad_id": PAD, "mask_id": MASK}
V = 600  # ids of texts are 5 and above
SPANS = data.Spans(source_len=20, rate=0.3, mean=2.0, first_sentinel=V - 1, eos_id=1, pad_id=0, sentinels=5)
WORDS = np.arange(V) % 3 == 0  # continue a word


def masked(**settings):
    return data.Masked(**IDS, vocab_size=V, **settings)


OBJECTIVES = {  # name: (objective, seq_len)
    "causal": (data.Causal(eot=EOT), 12),
    "masked": (masked(), 16),
    "whole words": (masked(whole_word=WORDS, max_predictions=5, rate=0.4), 16),
    "static": (masked(static=True), 16),
    "pairs": (masked(next_sentence=True, eot=EOT), 16),
    "static pairs": (masked(next_sentence=True, eot=EOT, static=True, whole_word=WORDS), 16),
    "spans": (SPANS, SPANS.seq_len),
}


def write(folder, counts=(500, 9, 311), document=40):
    """Shards of ids 5 .. V - 10 in order, a document of `document` ids each."""
    begin = 0
    for index, count in enumerate(counts):
        at = np.arange(begin, begin + count)
        data.write_shard(folder / f"train_{index}.bin", [np.where(at % document, 5 + at % (V - 15), EOT)], U16)
        begin += count
    return folder


def per_sequence(batch, sequences):
    """The arrays of a batch with one row per sequence; "rows" as positions in their own sequence."""
    kinds = {"nsp_weights": np.float32}
    assert all(a.dtype == kinds.get(name, np.int32) and a.flags.c_contiguous for name, a in batch.items())
    arrays = {name: array.reshape(sequences, -1) for name, array in batch.items()}
    if "rows" in arrays:
        T = arrays["ids"].shape[1]
        own = arrays["rows"] - T * np.arange(sequences)[:, None]
        arrays["rows"] = np.where(arrays["rows"] < 0, -1, own)
        assert ((arrays["rows"] < T) & (arrays["rows"] >= -1)).all()
    return arrays


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_depend_on_neither_ranks_nor_micro_batches_nor_calls(tmp_path, name, shuffle):
    objective, T = OBJECTIVES[name]
    make = {"seq_len": T, "batch_tokens": 8 * T, "seed": 5, "shuffle": shuffle, "objective": objective}
    tokens = data.tokens(write(tmp_path), **make)
    steps = [0, 3, 10**12, 3]
    whole = [per_sequence(tokens.batch(step), 8) for step in steps]
    again = data.tokens(tmp_path, **make)
    for world, micro_batch in [(1, 2), (2, 1), (2, 4), (4, 2)]:
        for step, expected in reversed(list(zip(steps, whole, strict=True))):
            parts = [
                per_sequence(again.batch(step, rank, world, micro_batch=micro_batch, micro_step=k), micro_batch)
                for k in range(8 // (world * micro_batch))
                for rank in range(world)
            ]
            assert list(expected) == list(objective.inputs)
            for key, array in expected.items():
                assert (np.concatenate([part[key] for part in parts]) == array).all(), key
    other = data.tokens(tmp_path, **make | {"seed": 6})
    assert name == "causal" or any((other.batch(3)[key] != tokens.batch(3)[key]).any() for key in objective.inputs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sweep_depends_on_neither_ranks_nor_micro_batches(tmp_path, name):
    objective, T = OBJECTIVES[name]
    tokens = data.tokens(write(tmp_path), T, T, objective=objective)
    total = sum((shard.count - (name == "causal")) // objective.window(T)[1] for shard in tokens.shards)
    plain = data.tokens(tmp_path, T, T, objective=objective, shuffle=False)
    whole = [per_sequence(plain.batch(step), 1) for step in range(total)]
    for world, micro_batch, limit in [(1, 1, None), (1, 4, None), (2, 3, None), (3, 2, 5 * T)]:
        count = total if limit is None else 5
        batches = zip(*(tokens.sweep(micro_batch, limit, rank, world) for rank in range(world)), strict=True)
        found = [per_sequence(batch, micro_batch) for ranks in batches for batch in ranks]
        for key in objective.inputs:
            rows = np.concatenate([arrays[key] for arrays in found])
            assert (rows[:count] == np.concatenate([arrays[key] for arrays in whole[:count]])).all(), key
            empty = {"targets": IGNORE_INDEX, "nsp_targets": IGNORE_INDEX, "rows": -1, "last": -1}
            assert (rows[count:] == empty.get(key, 0)).all(), key


@pytest.mark.parametrize(
    "name, is_static", [("masked", False), ("static", True), ("pairs", False), ("static pairs", True)]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_static_masks_are_those_of_every_epoch(tmp_path, name, is_static, shuffle):
    objective, T = OBJECTIVES[name]
    tokens = data.tokens(write(tmp_path), T, T, objective=objective, shuffle=shuffle)
    epochs = []
    for epoch in range(2):
        batches = [tokens.batch(epoch * tokens.windows + step) for step in range(tokens.windows)]
        epochs.append([np.concatenate([batch[key].ravel() for key in objective.inputs]).tolist() for batch in batches])
    assert (epochs[0] == epochs[1]) == (is_static and not shuffle)
    assert (sorted(epochs[0]) == sorted(epochs[1])) == is_static


def test_what_trainers_ask_of_the_data(tmp_path):
    tokens = data.tokens(write(tmp_path), SPANS.seq_len, 4 * SPANS.seq_len, objective=SPANS)
    assert tokens.sequences == 4 and tokens.sequence_tokens == 20 + SPANS.seq_len
    assert tokens.vocab_size == V - 5 and tokens.windows == 500 // SPANS.raw_len - 1 + (311 // SPANS.raw_len - 1)
    tokens = data.tokens(tmp_path, 16, 32, objective=masked(), vocab_size=V - 1)
    assert (tokens.sequence_tokens, tokens.vocab_size) == (16, V - 1)
    assert data.tokens(tmp_path, 16, 32, objective=masked(), vocab_size=V + 1).vocab_size == V
    assert data.tokens(tmp_path, 16, 32).sequence_tokens == 16
    data.write_shard(tmp_path / "train_3.bin", [[V] * 40], U16)
    with pytest.raises(HandgradError, match=f"must hold ids below the vocabulary size {V}, but got {V}"):
        list(data.tokens(tmp_path, 16, 16, objective=masked()).sweep(4))


# masked tokens --------------------------------------------------------------------------------------------------------


def raw_ids(sequences, length, seed=0, low=5):
    return np.random.default_rng(seed).integers(low, V, (sequences, length)).astype(np.int32)


def test_counts_and_proportions_of_masks():
    raw, objective = raw_ids(4000, 126), masked()
    arrays = per_sequence(objective.fill(raw, None, Draws(0, range(4000)), objective.inputs), 4000)
    whole = np.pad(raw, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))
    whole[:, 0], whole[:, -1] = CLS, SEP
    rows, targets, ids = arrays["rows"], arrays["targets"], arrays["ids"]
    assert rows.shape == (4000, 19) and (rows > 0).all() and (rows < 127).all()  # round(128 * 0.15)
    assert (np.diff(rows, axis=1) > 0).all()
    assert (targets == np.take_along_axis(whole, rows, axis=1)).all()
    inside = np.zeros(ids.shape, bool)
    np.put_along_axis(inside, rows, True, axis=1)
    assert (ids[~inside] == whole[~inside]).all()
    assert chi2(np.bincount(rows.ravel(), minlength=127)[1:]) < 210  # 125 degrees of freedom: p below 1e-6
    became = np.take_along_axis(ids, rows, axis=1)
    masks, kept = (became == MASK).mean(), (became == targets).mean()
    # 76,000 draws: 5 standard deviations; a random id is [MASK] or the same once in V
    assert abs(masks - 0.8 - 0.1 / V) < 0.0073 and abs(kept - 0.1 - 0.1 / V) < 0.0055
    random = became[(became != MASK) & (became != targets)]
    counts = np.bincount(random, minlength=V)
    assert (counts[[CLS, SEP, PAD, EOT]] > 0).all()  # from the whole vocabulary
    assert chi2(np.delete(counts, MASK)) < 780  # 598 degrees of freedom: p below 1e-6
    assert (arrays["types"] == 0).all() and (arrays["first"] == 0).all() and (arrays["last"] == 127).all()


def bert_masks(ids, most, rate, special, continues, order):
    """Positions that BERT's script masks, with `order` of the words' first positions in place of its shuffle."""
    words = []
    for i, id in enumerate(ids):
        if id in special:
            continue
        if continues[id] and words and words[-1][-1] == i - 1:
            words[-1].append(i)
        else:
            words.append([i])
    length = len([id for id in ids if id != PAD])
    wanted, found = min(most, max(1, int(round(length * rate)))), []
    for word in sorted(words, key=lambda word: order(word[0])):
        if len(found) >= wanted:
            break
        if len(found) + len(word) <= wanted:
            found += word
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 40),
    st.integers(1, 6),
    st.sampled_from([0.05, 0.15, 0.3, 0.7]),
    st.sampled_from([0, 2, 5, 10]),
    st.integers(0, 2**32),
)
def test_whole_words_are_masked_as_in_berts_script(T, most, rate, continuations, seed):
    """Ids 20 and above are words and continuations, ids 5 to 9 are never predicted."""
    most, vocab = min(most, T), 32
    continues = np.arange(vocab) >= vocab - continuations
    objective = data.Masked(
        **IDS, vocab_size=vocab, special_ids=range(5, 10), rate=rate, max_predictions=most, whole_word=continues
    )
    raw = np.random.default_rng(seed).integers(5, vocab, (6, T - 2)).astype(np.int32)
    arrays = per_sequence(objective.fill(raw, None, Draws(seed, range(6)), objective.inputs), 6)
    for b in range(6):
        ids = [CLS, *raw[b].tolist(), SEP]

        def order(position, b=b):
            return hashed(seed, b, 1, position) >> 32

        expected = bert_masks(ids, most, rate, {CLS, SEP, PAD, *range(5, 10)}, continues, order)
        assert arrays["rows"][b].tolist() == expected + [-1] * (most - len(expected))
        assert arrays["targets"][b].tolist() == [ids[i] for i in expected] + [IGNORE_INDEX] * (most - len(expected))


def test_tokens_of_a_word_are_replaced_independently():
    objective = masked(whole_word=np.arange(V) >= 300, rate=0.2)
    raw = np.tile(np.array([10, 400], np.int32), (3000, 10))
    arrays = per_sequence(objective.fill(raw, None, Draws(0, range(3000)), objective.inputs), 3000)
    became = np.take_along_axis(arrays["ids"], arrays["rows"], axis=1).reshape(-1, 2) == MASK
    assert len(became) == 6000  # two words of two tokens in each sequence
    expected = 0.8 + 0.1 / V
    assert abs((became[:, 0] & became[:, 1]).mean() - expected**2) < 0.031  # 5 standard deviations
    assert abs((became[:, 0] & ~became[:, 1]).mean() - expected * (1 - expected)) < 0.024


def test_pattern_of_masks_is_that_of_earlier_versions():
    raw = np.arange(10, 24, dtype=np.int32)[None]
    arrays = masked(rate=0.3).fill(raw, None, Draws(7, [3]), ())
    assert arrays["rows"].tolist() == GOLDEN["rows"] and arrays["ids"].tolist() == GOLDEN["ids"]


@pytest.mark.parametrize("document", [40, 9, 1])
def test_pairs(tmp_path, document):
    """Ids count up inside a document, so whether B follows A can be read off them."""
    T, sequences = 20, 6000
    objective = masked(next_sentence=True, eot=EOT, rate=0.01, max_predictions=1)  # leaves most tokens as they are
    write(tmp_path, (5000,), document)
    tokens = data.tokens(tmp_path, T, sequences * T, objective=objective)
    arrays = per_sequence(tokens.batch(0), sequences)
    ids, types, rows = arrays["ids"].copy(), arrays["types"], arrays["rows"]
    found = rows[:, 0] >= 0
    assert found.all() or document == 1
    ids[found, rows[found, 0]] = arrays["targets"][found, 0]
    lengths, labels = np.zeros(sequences, int), arrays["nsp_targets"][:, 0]
    for n, row in enumerate(ids.tolist()):
        a = row.index(SEP)
        b = row.index(SEP, a + 1)
        one, two, lengths[n] = row[1:a], row[a + 1 : b], b + 1
        assert row[0] == CLS and row[b + 1 :] == [PAD] * (T - b - 1) and len(one) >= 1 and len(two) >= 1
        assert types[n].tolist() == [0] * (a + 1) + [1] * (b - a) + [0] * (T - b - 1)
        assert arrays["first"][n].tolist() == [0] * (b + 1) + [b + 1] * (T - b - 1)
        assert (arrays["last"][n] == b).all()
        if document > 1:
            assert EOT not in one + two
            assert all((y - x) % (V - 15) == 1 for text in (one, two) for x, y in zip(text, text[1:], strict=False))
            if labels[n] == 0:
                assert (two[0] - one[-1]) % (V - 15) == 1
    if document == 1:  # nothing but ends of text, which is never predicted
        assert not found.any() and (arrays["targets"] == IGNORE_INDEX).all()
    assert abs(labels.mean() - 0.5) < 0.033  # 5 standard deviations
    if document == 40:  # most windows have a text as long as they are, half of it before and half after an end of text
        assert (lengths == T).mean() > 0.5 and 0.03 < (lengths < 3 + 9).mean() < 0.1


def test_a_random_b_is_of_another_window(tmp_path):
    data.write_shard(tmp_path / "a.bin", [np.repeat([10, 20], 17)], U16)
    objective = masked(next_sentence=True, rate=0.01)
    arrays = data.tokens(tmp_path / "a.bin", 20, 20 * 500, shuffle=False, objective=objective).batch(0)
    texts = [set(row) & {10, 20} for row in arrays["ids"].tolist()]
    for text, target, label in zip(texts, arrays["targets"].tolist(), arrays["nsp_targets"].tolist(), strict=True):
        assert len(text | {target}) == 1 + label


def test_lengths_of_pairs():
    """Of long texts, one sequence in ten is shorter, by BERT's uniform length from 2 tokens."""
    raw, other = raw_ids(8000, 17), raw_ids(8000, 17, seed=1)
    objective = masked(next_sentence=True, eot=EOT)
    arrays = objective.fill(raw, other, Draws(0, range(8000)), objective.inputs)
    lengths = arrays["last"][:, 0] + 1 - 3
    is_short = lengths < 17
    assert abs(is_short.mean() - 0.1 * 15 / 16) < 0.0163  # 5 standard deviations
    assert chi2(np.bincount(lengths[is_short], minlength=17)[2:]) < 60  # 14 degrees of freedom
    a = np.argmax(arrays["types"] == 1, axis=1) - 2
    assert chi2(np.bincount(a[~is_short], minlength=17)[1:]) < 65  # 15: A has any length but all
    raw[:, np.arange(17) != 4] = EOT
    arrays = objective.fill(raw, other, Draws(0, range(8000)), objective.inputs)
    assert (arrays["nsp_targets"] == 1).all()  # what has one token has no continuation


def test_errors_of_masks(tmp_path):
    with pytest.raises(HandgradError, match="rate in 0..1"):
        masked(rate=1.0)
    with pytest.raises(HandgradError, match="max_predictions of at least 1"):
        masked(max_predictions=0)
    with pytest.raises(HandgradError, match=f"below its vocab_size {V}, but got {V}"):
        masked(special_ids=[V])
    with pytest.raises(HandgradError, match=r"whole_word of Masked is an array of 600 bool, but got \(5,\) bool"):
        masked(whole_word=np.zeros(5, bool))
    with pytest.raises(HandgradError, match="has 3 tokens or more, but got seq_len 2"):
        data.tokens(write(tmp_path), 2, 2, objective=masked())
    with pytest.raises(HandgradError, match="has 5 tokens or more"):
        data.tokens(tmp_path, 4, 4, objective=masked(next_sentence=True))
    with pytest.raises(HandgradError, match="has 20 tokens or more"):
        data.tokens(tmp_path, 16, 16, objective=masked(max_predictions=20))
    with pytest.raises(HandgradError, match="types, first, last, rows and targets, but got 'nsp_targets'"):
        data.tokens(tmp_path, 16, 16, objective=masked()).batch(0, names=["nsp_targets"])
    one = tmp_path / "one.bin"
    data.write_shard(one, [range(20)], U16)
    with pytest.raises(HandgradError, match="there must be two or more, but got 1"):
        data.tokens(one, 16, 16, objective=masked(next_sentence=True))


# spans ----------------------------------------------------------------------------------------------------------------


def test_counts_of_spans_are_those_of_t5():
    t5 = data.Spans(first_sentinel=32099, eos_id=1, pad_id=0)
    assert (t5.source_len, t5.raw_len, t5.seq_len, t5.tokens(t5.seq_len)) == (512, 568, 114, 626)
    assert span_counts(512, 0.15, 3.0) == (568, 85, 28)
    for source_len in [*range(3, 300), 512, 1024, 2048]:
        for rate, mean in [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 1.0), (0.25, 1.5)]:
            fitting = []
            for n in range(2, 3 * source_len):
                noise = max(1, int(round(n * rate)))
                spans = max(1, int(round(noise / mean)))
                if n - noise + spans + 1 <= source_len:
                    fitting.append((n, noise, spans))
            raw, noise, spans = fitting[-1]
            assert span_counts(source_len, rate, mean) == (raw, noise, spans)
            assert raw - noise + spans + 1 == source_len


def t5_spans(raw, noise, spans, seed, number, objective):
    """One sequence by T5's steps: shuffled marks, segment lengths, the mask of noise, sentinels for runs of a mask."""

    def lengths(items, stream):
        shuffled = sorted(range(items - 1), key=lambda i: (hashed(seed, number, stream, i) >> 32, i))
        marks = [i in shuffled[: spans - 1] for i in range(items - 1)]
        segment = np.cumsum([0, *marks])
        return np.bincount(segment).tolist()

    mask = []
    for kept, cut in zip(lengths(len(raw) - noise, 1), lengths(noise, 2), strict=True):
        mask += [False] * kept + [True] * cut

    def with_sentinels(mask):
        out, sentinel = [], objective.first_sentinel
        for i, (id, hide) in enumerate(zip(raw, mask, strict=True)):
            if not hide:
                out.append(id)
            elif i == 0 or not mask[i - 1]:
                out.append(sentinel)
                sentinel -= 1
        return [*out, objective.eos_id]

    return with_sentinels(mask), with_sentinels([not hide for hide in mask])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 80),
    st.sampled_from([0.15, 0.3, 0.45]),
    st.sampled_from([1.1, 2.0, 3.0]),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
def test_spans_are_those_of_t5s_steps_and_give_the_text_back(source_len, rate, mean, seed, number):
    objective = data.Spans(source_len=source_len, rate=rate, mean=mean, first_sentinel=999, eos_id=1, pad_id=0)
    length, noise, spans = span_counts(source_len, rate, mean)
    raw = raw_ids(2, length, seed)
    arrays = objective.fill(raw, None, Draws(seed, [number, number + 1]), ())
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays.values())
    for b in range(2):
        source, targets, ids = (arrays[name][b].tolist() for name in ("source", "targets", "ids"))
        assert (source, targets) == t5_spans(raw[b].tolist(), noise, spans, seed, number + b, objective)
        assert len(source) == source_len and len(targets) == objective.seq_len
        assert ids == [0, *targets[:-1]] and source[-1] == targets[-1] == 1
        assert source[0] < V and source[-2] == 999 - spans + 1  # begins with text, ends with a span
        texts = {}
        for id in targets[:-1]:
            texts.setdefault(id, []) if id > V else texts[min(texts)].append(id)
        assert list(texts) == list(range(999, 999 - spans, -1)) and all(texts.values())
        assert [word for id in source[:-1] for word in texts.get(id, [id])] == raw[b].tolist()


def test_all_ways_to_cut_are_equally_likely():
    found = _pieces(Draws(0, range(6000)), 1, 6, 3)
    assert found.sum(axis=1).tolist() == [6] * 6000 and found.min() == 1
    assert chi2(np.unique(found[:, 0] * 10 + found[:, 1], return_counts=True)[1]) < 45  # C(5, 2) = 10 ways
    assert len(np.unique(found, axis=0)) == 10
    assert _pieces(Draws(0, [0]), 1, 1, 1).tolist() == [[1]] and _pieces(Draws(0, [0]), 1, 3, 3).tolist() == [[1, 1, 1]]


def test_pattern_of_spans_is_that_of_earlier_versions():
    raw = np.arange(10, 10 + SPANS.raw_len, dtype=np.int32)[None]
    arrays = SPANS.fill(raw, None, Draws(7, [3]), ())
    assert arrays["source"].tolist() == GOLDEN["source"] and arrays["targets"].tolist() == GOLDEN["targets"]


def test_errors_of_spans(tmp_path):
    ids = {"eos_id": 1, "pad_id": 0}
    for wrong in ({"rate": 0}, {"rate": 1}, {"mean": 0.5}, {"source_len": 2}):
        with pytest.raises(HandgradError, match="Spans has a rate in 0..1, ends excluded, a mean of at least 1"):
            data.Spans(first_sentinel=999, **ids, **wrong)
    with pytest.raises(HandgradError, match="a sentinel for each of 114 spans, but got 100"):
        data.Spans(first_sentinel=32099, source_len=2048, **ids)
    with pytest.raises(
        HandgradError, match=r"a first_sentinel of 100\.\., as 100 sentinels descend from it, but got 99"
    ):
        data.Spans(first_sentinel=99, **ids)
    with pytest.raises(HandgradError, match="keeps a token before each of"):
        data.Spans(first_sentinel=999, rate=0.8, mean=1, **ids)
    with pytest.raises(HandgradError, match=f"sources of 20.* have targets of seq_len {SPANS.seq_len}, but got 20"):
        data.tokens(write(tmp_path), 20, 20, objective=SPANS)
    data.write_shard(tmp_path / "train_9.bin", [[V - 5] * 50], U16)
    with pytest.raises(HandgradError, match=f"train_9.bin must hold ids below the vocabulary size {V - 5}"):
        list(data.tokens(tmp_path, SPANS.seq_len, SPANS.seq_len, objective=SPANS).sweep(4))


# time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masked", "words", "pairs", "spans"])
def test_time_of_a_batch(name):
    """At most as long as 500,000 additions in Python; 50,000 to 120,000 were measured where nothing else ran."""
    words = {"whole_word": np.arange(30_000) >= 20_000}
    bert = {"mask_id": 3, "cls_id": 1, "sep_id": 2, "pad_id": 0, "vocab_size": 30_000}
    objective = {
        "masked": lambda: data.Masked(**bert),
        "words": lambda: data.Masked(**bert, **words),
        "pairs": lambda: data.Masked(**bert, next_sentence=True, eot=4),
        "spans": lambda: data.Spans(first_sentinel=32_099, eos_id=1, pad_id=0),
    }[name]()
    length, _ = objective.window(objective.seq_len if name == "spans" else 512)
    raw = np.random.default_rng(0).integers(5, 30_000, (64, length)).astype(np.int32)
    partner, fills, additions = raw[::-1].copy() if objective.partners else None, [], []
    for step in range(40):
        begin = time.perf_counter()
        objective.fill(raw, partner, Draws(0, range(64 * step, 64 * step + 64)), objective.inputs)
        between, total = time.perf_counter(), 0
        for i in range(50_000):
            total += i
        fills.append(between - begin)
        additions.append(time.perf_counter() - between)
    assert min(fills) < 10 * min(additions)
