"""Recomputation changes the memory of a step but no bit of its losses and gradients."""

import pytest

from handgrad.core.backward import POLICIES as ALL
from handgrad.core.backward import backward
from handgrad.core.op import Op
from handgrad.core.plan import plan
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.models import T5, Bert, forward_loss, gpt2
from handgrad.ops import OPS, add
from handgrad.optim import AdamW
from handgrad.train.execution import Execution
from handgrad.train.record import record_train

POLICIES = ("act", "act_norm", "block")


@pytest.fixture(scope="module")
def kept(one_pass, tiny):
    """Returns losses and gradients without recomputation for a setting, cached."""
    known = {}

    def get(backend, dtype, dropout, tie):
        key = backend, dtype, dropout, tie
        if key not in known:
            known[key] = one_pass(tiny(dropout=dropout, tie_embeddings=tie), backend, dtype=dtype, micro_steps=2)
        return known[key]

    return get


def differences(a, b):
    """Names of the arrays that are not bit-identical."""
    return [name for name in b[1] if a[1][name].tobytes() != b[1][name].tobytes()] + ["losses"] * (
        a[0].tobytes() != b[0].tobytes()
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("dropout", "tie"), [(0.0, True), (0.25, True), (0.25, False)])
@pytest.mark.parametrize("backend", ["cpu", "ref", "poisoned"])
def test_recompute_policies_are_bit_exact(one_pass, tiny, kept, backend, dtype, dropout, tie, policy):
    got = one_pass(tiny(dropout=dropout, tie_embeddings=tie), backend, dtype=dtype, policy=policy, micro_steps=2)
    assert differences(got, kept(backend, dtype, dropout, tie)) == []


def test_recompute_is_bit_exact_on_all_threads(one_pass, tiny):
    model = tiny(dropout=0.1, max_seq_len=128, hidden_size=192)
    base = one_pass(model, micro_batch=2, seq_len=128)
    for policy in POLICIES:
        assert differences(one_pass(model, policy=policy, micro_batch=2, seq_len=128), base) == []


def test_different_dropout_mask_in_recompute_is_caught(one_pass, tiny, kept, monkeypatch):
    """Negative control: dropout recomputes its mask with another `stream`."""
    again = Op.recompute
    dropout = type(OPS["dropout"])

    def wrong(self, g, c, want):
        c.attrs["stream"] += 1
        made = again(self, g, c, want)
        c.attrs["stream"] -= 1
        return made

    monkeypatch.setattr(dropout, "recompute", wrong)
    got = one_pass(tiny(dropout=0.25), "cpu", policy="block", micro_steps=2)
    assert differences(got, kept("cpu", "f32", 0.25, True)) != []


def test_each_policy_needs_less_memory_than_the_previous():
    sizes = []
    for policy in ("none", *POLICIES):
        p = record_train(gpt2("124m"), AdamW(), 1024, Precision("bf16"), Execution(16, recompute=policy), chunks=32)
        sizes.append(plan(p).region["activations"][1])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4, sizes


def test_policy_may_be_any_function(tiny):
    """Dropping only the output of attention recomputes attention, in its own block."""
    p = Program(trains=True)
    forward_loss(p, tiny(), 2, 16)
    backward(p, add, drop=lambda p, c: {"y"} if c.op.name == "attention" else set())
    again = [(c.op.name, c.block) for c in p.calls if c.phase == "recompute"]
    assert again == [("attention", "h.1"), ("attention", "h.0")]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", [Bert, T5])
def test_gradients_of_two_readers_join_in_a_gemm(family, dropout):
    """Of a post-norm's output, and of what cross-attentions read: no call adds them, whatever is recomputed."""
    model = family(vocab_size=200, max_seq_len=16, num_layers=3, num_heads=2, hidden_size=16, dropout=dropout)
    for policy in ALL.values():
        p = Program(trains=True)
        forward_loss(p, model, 1, model.usual_seq_len)
        backward(p, add, drop=policy)
        added = [c.dx0 is not None for c in p.calls if c.op.name == "linear_backward_x"]
        assert sum(added) == (2 * 3 if family is Bert else 2) and not any(c.op is add for c in p.calls)
