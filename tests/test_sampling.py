import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handgrad.core.errors import HandgradError
from handgrad.infer.sampling import Sampler, Sampling, StopStrings, candidates, first_stop

# on a grid, so that only equal logits have equal probabilities; with ties, and with what cannot be
LOGIT = st.one_of(st.integers(-2000, 2000).map(lambda i: i / 64), st.sampled_from([0.0, 1.0, -math.inf]))
LOGITS = st.lists(LOGIT, min_size=1, max_size=40).filter(lambda values: max(values) > -math.inf)


BAD = [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1)]
BAD += [("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("seed", -1)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(HandgradError, match=rf"\[sample\] {name} must .*, but got {value}"):
        Sampling(**{name: value})


def plain(logits, temperature, top_k):
    """Ids from the most likely on, and their probabilities, after temperature and top-k."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    return order, [w / math.fsum(weights) for w in weights]


@given(LOGITS, st.floats(0.1, 5), st.integers(0, 50))
def test_top_k_is_the_plain_definition(logits, temperature, top_k):
    ids, p = candidates(np.array(logits, np.float32), Sampling(temperature, top_k))
    order, expected = plain(logits, temperature, top_k)
    assert ids.tolist() == sorted(order) and p.dtype == np.float64
    np.testing.assert_allclose(p, [expected[order.index(i)] for i in ids], rtol=1e-12)


@given(LOGITS, st.floats(0.1, 5), st.integers(0, 50), st.floats(1e-3, 1, exclude_max=True))
def test_top_p_is_the_shortest_prefix_that_holds_it(logits, temperature, top_k, top_p):
    ids, p = candidates(np.array(logits, np.float32), Sampling(temperature, top_k, top_p))
    order, expected = plain(logits, temperature, top_k)
    assert ids.tolist() == sorted(order[: len(ids)])
    assert math.fsum(expected[: len(ids)]) >= top_p - 1e-12
    assert math.fsum(expected[: len(ids) - 1]) <= top_p + 1e-12
    total = math.fsum(expected[: len(ids)])
    np.testing.assert_allclose(p, [expected[order.index(i)] / total for i in ids], rtol=1e-9)


def test_large_vocabulary_agrees_with_the_plain_definition():
    logits = np.random.default_rng(0).standard_normal(50_257).astype(np.float32) * 3
    ids, p = candidates(logits, Sampling(0.8, top_k=1000, top_p=0.9))
    order, expected = plain(logits.astype(float).tolist(), 0.8, 1000)
    assert ids.tolist() == sorted(order[: len(ids)]) and 10 < len(ids) < 1000
    assert p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.8), Sampling(1.3, 4, 0.9)]
)
def test_picks_follow_the_distribution(sampling):
    logits = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))
    ids, p = candidates(logits, sampling)
    sampler, draws = Sampler(sampling, 5), 10_000
    counts = np.bincount([sampler.pick(logits) for _ in range(draws)], minlength=5)
    expected = np.zeros(5)
    expected[ids] = p
    assert np.all(np.abs(counts / draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws))


@given(LOGITS, st.integers(0, 5))
def test_greedy_takes_the_first_of_the_largest(logits, padding):
    padded = np.array(logits + [100.0] * padding, np.float32)
    assert Sampler(Sampling(temperature=0.0), len(logits)).pick(padded) == logits.index(max(logits))


@given(LOGITS, st.floats(1e-300, 1e300), st.integers(0, 50), st.floats(1e-9, 1), st.integers(0, 2**64))
def test_a_pick_is_below_the_vocabulary_and_possible(logits, temperature, top_k, top_p, seed):
    padded = np.array(logits + [math.nan, 100.0], np.float32)
    pick = Sampler(Sampling(temperature, top_k, top_p, seed), len(logits)).pick(padded)
    assert type(pick) is int and logits[pick] > -math.inf


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_extreme_draws_pick_possible_tokens(draw):
    class Fixed:
        def random(self):
            return draw

    sampler = Sampler(Sampling(1.0), 7)
    sampler._rng = Fixed()
    logits = np.array([-math.inf, 0.1, -math.inf, 0.2, 0.3, -math.inf, -math.inf], np.float32)
    assert sampler.pick(logits) == (1 if draw == 0 else 4)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(), Sampling(5.0, 3), Sampling(5.0, 0, 0.9), Sampling(5, 2, 0.9)]
)
def test_ids_without_a_token_are_never_picked(sampling):
    """They have the largest logits, one of them NaN: past the tokenizer's end, and in gaps."""
    logits = np.array([9, 0, 1, np.nan, 2, 9, 0, 9, 9], np.float32)
    before, drawable = logits.copy(), np.array([False, True, True, False, True, False, True])
    sampler = Sampler(sampling, 8, drawable)
    picked = {sampler.pick(logits) for _ in range(300)}
    assert picked <= {1, 2, 4, 6} and 4 in picked and (len(picked) > 1 or sampling.temperature == 0)
    np.testing.assert_array_equal(logits, before)
    with pytest.raises(HandgradError, match="must have a row for a token of its tokenizer, but got none"):
        Sampler(sampling, 1, drawable)


def test_drawable_ids_have_the_probabilities_of_a_model_without_the_others():
    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    drawable = np.arange(40) % 3 == 0
    fewer, all_ids = logits[drawable], np.flatnonzero(drawable)
    ours, small = Sampler(Sampling(1.0), 40, drawable), Sampler(Sampling(1.0), fewer.size)
    assert [ours.pick(logits) for _ in range(50)] == [all_ids[small.pick(fewer)] for _ in range(50)]


def test_the_seed_decides_the_picks():
    logits = np.linspace(0, 3, 100).astype(np.float32)

    def picks(seed):
        sampler = Sampler(Sampling(1.0, seed=seed), 100)
        return [sampler.pick(logits) for _ in range(8)]

    assert picks(7) == picks(7) != picks(8)
    assert picks(7) == [85, 96, 92, 55, 63, 95, 3, 93], "a seed gives the same text in later versions"


@pytest.mark.parametrize("logits", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_refused(logits, temperature):
    with pytest.raises(HandgradError, match=r"\[sample\] the largest logit must be .* but got (nan|-?inf)\. hint: "):
        Sampler(Sampling(temperature), 2).pick(np.array(logits, np.float32))


# stop strings -------------------------------------------------------------------------------------------------------

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def plain_stop(text, stops):
    """Reads character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(st.text("abc", max_size=5), max_size=8), STOPS)
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    stop, text, shown = StopStrings(stops), "", ""
    for piece in pieces:
        text, shown = text + piece, shown + stop.feed(piece)
        kept, found = plain_stop(text, stops)
        assert stop.found == found
        if found is not None:
            assert shown == kept
            assert stop.feed("more") == stop.finish() == ""
            return
        held = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        assert shown == text[: len(text) - held], "what can no longer become a stop string is shown at once"
    assert shown + stop.finish() == text


def test_first_stop():
    assert first_stop("to be or not", ["not", "be"]) == (3, "be")
    assert first_stop("xabc", ["c", "abc"]) == (1, "abc")
    assert first_stop("xabcd", ["abcd", "bc"]) == (2, "bc"), "as a reader of the stream meets it"
    assert first_stop("to be", []) == (5, None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(HandgradError, match="at least one character"):
        StopStrings(["\n", ""])
