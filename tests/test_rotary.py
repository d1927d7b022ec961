"""Rotary positions in a model: its tables, what backward keeps, training, checkpoints, a cache."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from handgrad import Execution, Precision, Trainer, data
from handgrad.backends import open_backend
from handgrad.core.backward import POLICIES, backward
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import Phase
from handgrad.core.program import Program
from handgrad.infer import Sampling
from handgrad.infer.engine import Engine
from handgrad.infer.engine import record as record_engine
from handgrad.models import GPT2, declare, forward_logits, forward_loss, register, registry
from handgrad.models.blocks import attend, dense, layer_norm, project, rotary, token_table
from handgrad.ops import add, embed
from handgrad.optim import AdamW
from handgrad.testing import gradcheck, set_scalars


@dataclass(frozen=True)
class Rotary(GPT2):
    """Attention alone, with shared key/value heads; qk_norm_eps 0: none."""

    vocab_size: int = 97
    max_seq_len: int = 40
    num_layers: int = 2
    num_heads: int = 4
    hidden_size: int = 32
    qk_norm_eps: float = 1e-5

    family: ClassVar[str] = "rotary"
    hugging_face: ClassVar = {}

    def __post_init__(self):
        pass

    def body(self, g, data):
        x, h, H, K = self._embed(g, data), None, self.num_heads, self.num_heads // 2
        D = self.hidden_size // H
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                x, n = layer_norm(g, x, h, "ln")
                qkv = dense(g, n, "qkv", (H + 2 * K) * D)
                rows = data.cache or data.seq_len
                qkv = rotary(
                    g, qkv, data, heads=H, kv_heads=K, table_rows=rows, theta=100.0 * (i + 1), rotary_dims=D // 2,
                    scaling=(8.0, 1.0, 4.0, 64), qk_norm_eps=self.qk_norm_eps or None,
                )  # fmt: skip
                y = attend(g, qkv, data, heads=H, kv_heads=K)
                h = project(g, y, "out", self.hidden_size, std=0.1, p=0.0)
        with g.block("head", prefix=False):
            return layer_norm(g, x, h, "ln_f")[1]

    def _embed(self, g, data):
        with g.block("embed", prefix=False):
            return g.emit(embed, data.ids, token_table(g, self), None, None, T=data.seq_len, decode=False, scale=1.0)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registered in these tests alone."""
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    register(Rotary)


def test_layers_of_one_theta_share_a_table():
    assert len(declare(Rotary(num_layers=3)).constants) == 3  # three thetas

    class Same(Rotary):
        def body(self, g, data):
            qkv = g.input("qkv", (data.seq_len, 32), F32)
            for _ in range(3):
                qkv = rotary(g, qkv, data, heads=2, kv_heads=1, table_rows=9, theta=1e4)
            return qkv

    g = Program(F32)
    Same().body(g, Same().inputs(g, 1, 5))
    assert [t.shape for t, _ in g.constants.values()] == [(9, 8)]


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_equal_finite_differences(eps, policy):
    model = Rotary(qk_norm_eps=eps)

    def fill(p, arena):
        rng = np.random.default_rng(0)
        for info in p.params.values():
            arena.part("param", info.tensor)[...] = rng.normal(0, 0.3, info.tensor.shape)
        for t in p.inputs.values():
            arena.view(t)[...] = rng.integers(0, model.vocab_size, t.shape)
        set_scalars(p, arena)

    assert gradcheck(lambda p: forward_loss(p, model, 2, 9, 2), fill, drop=POLICIES[policy]) < 1e-6


@pytest.mark.parametrize("backend", ["cpu", "poisoned"])
@pytest.mark.parametrize("policy", ["act", "act_norm", "block"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_recompute_policies_are_bit_exact(one_pass, backend, policy, eps):
    (losses, grads), (kept, others) = (
        one_pass(Rotary(qk_norm_eps=eps), backend, dtype="bf16", policy=name) for name in (policy, "none")
    )
    assert losses.tobytes() == kept.tobytes()
    assert [name for name in grads if grads[name].tobytes() != others[name].tobytes()] == []


@pytest.mark.parametrize("policy", ["none", "act"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_backward_keeps_qkv_or_what_rope_makes_of_it(eps, policy):
    """Without norms y alone, with norms and recomputation qkv alone; with norms and without recomputation both."""
    p = Program(F32, trains=True)
    forward_loss(p, Rotary(qk_norm_eps=eps), 2, 9)
    backward(p, add, drop=POLICIES[policy])
    for c in [c for c in p.calls if c.op.name == "rope" and c.phase is Phase.FORWARD]:
        read = [{t for t in later.ins if t in (c.qkv, c.y)} for later in p.calls if later.phase is not Phase.FORWARD]
        wanted = {c.y} if not eps else {c.qkv} if policy == "act" else {c.qkv, c.y}
        assert set().union(*read) == wanted


def test_a_run_asks_the_data_for_ids_and_saves_no_table(shards, tmp_path):
    tokens = data.tokens(shards, seq_len=33, batch_tokens=132)
    losses = []
    for backend in ("cpu", "ref"):
        execution = Execution(2, extra_programs=("val",), backend=backend)
        out = tmp_path / backend
        run = Trainer(Rotary(), AdamW(), tokens, out=out, execution=execution, precision=Precision("f32"))
        losses.append([*(run.step(step, lr=1e-2).loss for step in range(1, 4)), run.evaluate(tokens, 264)])
        assert list(run.program.inputs) == ["ids", "targets"] and len(run.program.constants) == 2
    assert np.allclose(*losses, rtol=1e-5)
    run.save(3)
    saved = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert b"q_norm.weight" in saved and b"rope" not in saved


def test_decode_continues_the_positions_of_the_cache():
    """Greedy tokens by prefill and decode are those of full passes without a cache."""
    model, ids = Rotary(), [5, 6, 7, 8, 9]
    prefill, decode = record_engine(model, F32)
    full = Program(F32)
    forward_logits(full, model, 1, model.max_seq_len)
    backend = open_backend("cpu", 1)
    arena = backend.alloc(backend.plan(prefill, decode, full))
    rng = np.random.default_rng(1)
    for info in full.params.values():
        arena.write_part("param", info.tensor, rng.normal(0, 0.3, info.tensor.shape))
    engine, run, made = Engine(model, (prefill, decode), arena, backend), backend.bind(full, arena), list(ids)
    for _ in range(20):
        arena.write(full.inputs["ids"], made + [0] * (model.max_seq_len - len(made)))
        run.run()
        logits = arena.read(full.outputs["logits"])[len(made) - 1, : model.vocab_size]
        made.append(int(logits.argmax()))
    assert list(engine.generate(ids, 20, Sampling(temperature=0.0))) == made[len(ids) :]


def test_table_shorter_than_a_sequence_is_an_error():
    g = Program(F32)
    qkv, batch = g.input("qkv", (12, 32), F32), Rotary().inputs(g, 2, 6)
    with pytest.raises(HandgradError, match=r"\[rope\] the table has at least 6 rows, one per position, but got 5"):
        rotary(g, qkv, batch, heads=2, kv_heads=1, table_rows=5, theta=1e4)
    with pytest.raises(HandgradError, match=r"\[rope\] the rotary dimensions are even, and at most the 8 of a head"):
        rotary(g, qkv, batch, heads=2, kv_heads=1, table_rows=6, theta=1e4, rotary_dims=10)
