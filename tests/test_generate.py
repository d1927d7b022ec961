"""Generation with a cache gives what a full forward pass over the whole window gives, token by token."""

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.infer import Engine, Sampling
from handgrad.infer.engine import PREFILL, record
from handgrad.models import GPT2, forward_logits

GREEDY = Sampling(temperature=0.0)
# Cache and full pass multiply the same numbers in other orders. In f32 logits differ by a few roundings. In bf16 each of
# the ~20 tensors on the way is rounded, off by u = 2^-9 of its value on average: sqrt(20) u of the largest logit,
# and twice that for the worst of thousands.
TOLERANCE = {"f32": 1e-5, "bf16": 2 * 20**0.5 * 2.0**-9}


class Judge:
    """The same weights in a program without a cache: one full pass over all positions."""

    def __init__(self, model, dtype, backend="cpu"):
        programs = record(model, DTYPES[dtype])
        full = Program(DTYPES[dtype])
        forward_logits(full, model, 1, model.max_seq_len)
        backend = open_backend(backend)
        arena = backend.alloc(backend.plan(programs[1], programs[0], full))
        rng = np.random.default_rng(3)
        for info in programs[1].params.values():  # loud enough that tokens depend on the context
            w = arena.part("param", info.tensor)[: info.init.rows]
            w[...] = (info.init.kind == "ones") + rng.normal(0, 0.15, w.shape)
        self.model = model
        self.engine = Engine(model, programs, arena, backend)
        self._ids, self._out = arena.view(full.inputs["ids"]), arena.view(full.outputs["logits"])
        self._run = backend.bind(full, arena)

    def logits(self, window):
        """Logits (V,) float32 after the last id of a window, computed from nothing."""
        self._ids[:] = 0
        self._ids[: len(window)] = window
        self._run.run()
        return self._out[len(window) - 1, : self.model.vocab_size].astype(np.float32)


@pytest.fixture(scope="module", params=["f32", "bf16"])
def judge(request):
    judge = Judge(GPT2(vocab_size=211, max_seq_len=150, num_layers=3, num_heads=3, hidden_size=48), request.param)
    judge.tolerance = TOLERANCE[request.param]
    return judge


def follow(judge, prompt, tokens):
    """Checks each token against a full pass; returns how many were certain (their lead exceeds the tolerance)."""
    window, certain = list(prompt)[-judge.model.max_seq_len :], 0
    for i, token in enumerate(tokens):
        logits = judge.logits(window)
        best, second = np.sort(logits)[-1:-3:-1]
        slack = 2 * judge.tolerance * np.abs(logits).max()
        if best - second > slack:
            certain += 1
            assert token == logits.argmax(), f"token {i} after a window of {len(window)}"
        else:  # two candidates within rounding: either
            assert logits[token] >= best - slack, f"token {i} after a window of {len(window)}"
        full = len(window) == judge.model.max_seq_len
        window.append(token)
        if full:  # the newer half is read again
            window = window[-max(judge.model.max_seq_len // 2, 1) :]
    return certain


@pytest.mark.parametrize("length", [1, 2, PREFILL - 1, PREFILL, PREFILL + 1, 2 * PREFILL + 2, 149, 150, 200])
def test_generation_equals_full_recomputation(judge, length):
    prompt = np.random.default_rng(length).integers(0, judge.model.vocab_size, length).tolist()
    tokens = list(judge.engine.generate(prompt, 24, GREEDY))
    assert len(tokens) == 24 and follow(judge, prompt, tokens) >= 12


def test_generation_past_max_seq_len(judge):
    """More tokens than the model can see: the window is refilled, more than once."""
    tokens = list(judge.engine.generate([7, 8], 260, GREEDY))
    assert len(tokens) == 260 and follow(judge, [7, 8], tokens) >= 130


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 66, 128, 130, 150])
def test_logits_after_a_prompt(judge, length):
    ids = np.random.default_rng(length).integers(0, judge.model.vocab_size, length).tolist()
    judge.engine.position = 0
    got, want = judge.engine.logits(ids), judge.logits(ids)
    assert judge.engine.position == length
    assert np.abs(got - want).max() <= judge.tolerance * np.abs(want).max()


def test_a_missing_token_in_the_cache_is_caught(judge):
    """The negative control: without its last but one token, the context gives other logits."""
    ids = list(range(40))
    judge.engine.position = 0
    got, want = judge.engine.logits(ids[:-2] + ids[-1:]), judge.logits(ids)
    assert np.abs(got - want).max() > 5 * judge.tolerance * np.abs(want).max()


@pytest.mark.parametrize("max_seq_len", [1, 2, 5])
def test_models_shorter_than_a_prefill_chunk(max_seq_len):
    judge = Judge(GPT2(vocab_size=50, max_seq_len=max_seq_len, num_layers=1, num_heads=1, hidden_size=16), "f32")
    judge.tolerance = TOLERANCE["f32"]
    tokens = list(judge.engine.generate([3, 4, 5], 20, GREEDY))
    assert len(tokens) == 20 and follow(judge, [3, 4, 5], tokens) >= 15


def test_the_ref_backend_generates_the_same():
    model = GPT2(vocab_size=50, max_seq_len=40, num_layers=2, num_heads=2, hidden_size=16)
    cpu, ref = (list(Judge(model, "f32", backend).engine.generate([1, 2, 3], 30, GREEDY)) for backend in ("cpu", "ref"))
    assert cpu == ref


def test_sampling_is_seeded(judge):
    def draw(seed):
        return list(judge.engine.generate([1, 2, 3], 30, Sampling(temperature=1.0, seed=seed)))

    assert draw(1) == draw(1) != draw(2)


def test_invalid_prompts_are_refused(judge):
    for prompt, text in (
        ([], "at least one token, but got none"),
        ([1, 211], "below the vocabulary of 211, but got 211"),
        ([-1], "but got -1"),
    ):
        with pytest.raises(HandgradError, match=rf"\[generate\] .*{text}"):
            list(judge.engine.generate(prompt, 1, GREEDY))
    judge.engine.position = 0
    with pytest.raises(HandgradError, match=r"\[generate\] the model reads 150 tokens, but got 151"):
        judge.engine.logits([1] * 151)
