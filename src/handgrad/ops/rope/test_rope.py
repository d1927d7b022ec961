import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.ops import OPS, rope, rope_backward
from handgrad.ops.rope.reference import rotary_table
from handgrad.testing import case_arrays, case_program, check_op, run_case

UNIT = 2.0**-24
LLAMA3 = (8.0, 1.0, 4.0, 64)  # wavelengths below 16 stay, those above 64 are divided: all three kinds occur


@pytest.mark.parametrize("op", [rope, rope_backward], ids=str)
def test_rope(op):
    check_op(op, [open_backend("cpu")])


def test_wrong_sign_in_the_gradient_is_caught(monkeypatch):
    kind = type(OPS["rope_backward"])
    right = kind.ref
    monkeypatch.setattr(kind, "ref", lambda self, v: right(self, type(v)(**vars(v) | {"table": -v.table})))
    monkeypatch.setattr(type(rope), "cases", rope.cases[:1])
    with pytest.raises(AssertionError, match="gradient rule of rope"):
        check_op(rope, [])


def rotated(qkv, table, heads, kv_heads, T, wq=None, wk=None, position=0, backend=None, **attrs):
    """y of an f32 call on a backend (float64 by default), in decode if a position is given; float32 on the cpu."""
    p, decode = Program(F32), position > 0
    attrs = {"eps": 0.0, "interleaved": False, "decode": decode} | attrs
    arrays = [("qkv", qkv), ("table", table), ("wq", wq), ("wk", wk)]
    ins = [None if a is None else p.input(name, a.shape, F32) for name, a in arrays]
    p.output("y", p.emit(rope, *ins, T=T, H=heads, K=kv_heads, **attrs))
    backend = backend or RefBackend()
    arena = backend.alloc(backend.plan(p))
    for t, (_, a) in zip(ins, arrays):
        if t is not None:
            arena.write(t, a)
    arena.write_scalars(p, position=position)
    backend.bind(p, arena).run()
    return arena.read(p.outputs["y"])


def random_case(N, heads, kv_heads, D):
    return np.random.default_rng(0).standard_normal((N, (heads + 2 * kv_heads) * D))


# transformers ---------------------------------------------------------------------------------------------------------


def llama(R, theta, scaling, S):
    """transformers' cosines and sines (S, R / 2) float64, from its float32 frequencies."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope_parameters = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        rope_parameters |= dict(zip(names, scaling)) | {"rope_type": "llama3"}
    config = transformers.LlamaConfig(
        hidden_size=4 * R, num_attention_heads=4, rope_parameters=rope_parameters, max_position_embeddings=S
    )
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), torch.arange(S)[None])
    return cosine[0, :, : R // 2].numpy(), sine[0, :, : R // 2].numpy()


@pytest.mark.parametrize(
    ("R", "theta", "scaling"),
    [
        (64, 10000.0, None),
        (128, 1e6, None),
        (64, 5e5, (32.0, 1.0, 4.0, 8192)),
        (128, 5e5, (8.0, 1.0, 4.0, 8192)),
        (16, 10000.0, LLAMA3),
    ],
)
def test_table_equals_transformers(R, theta, scaling):
    """Its angles are float32: at most 16 roundings of an angle (of a power up to 2 ln theta / 3, of the scaling, of the
    product), and a rounding of the cosine."""
    S = 2048
    table = rotary_table(S, R, theta, scaling)
    assert table.shape == (S, R) and table.dtype == np.float32
    limit = 16 * UNIT * np.arange(S)[:, None] * np.ones(R // 2) * rotary_frequency(R, theta) + 2 * UNIT
    for ours, theirs in zip(np.split(table, 2, axis=1), llama(R, theta, scaling, S)):
        assert (np.abs(ours - theirs) <= limit).all()


def rotary_frequency(R, theta):
    return theta ** (-2 * np.arange(R // 2) / R)


def test_scaling_divides_blends_and_keeps_frequencies():
    factor, low, high, original = LLAMA3
    plain = rotary_frequency(16, 10000.0)
    scaled = np.arctan2(*np.split(rotary_table(2, 16, 10000.0, LLAMA3)[1].astype(float), 2)[::-1])
    turns = original * plain / (2 * np.pi)  # of a pair over the original length
    assert np.allclose(scaled[turns > high], plain[turns > high], rtol=1e-6)
    assert np.allclose(scaled[turns < low], plain[turns < low] / factor, rtol=1e-6)
    between = (turns >= low) & (turns <= high)
    blend = (turns - low) / (high - low)
    assert between.any() and (turns > high).any() and (turns < low).any()
    assert np.allclose(scaled[between], (plain * (blend + (1 - blend) / factor))[between], rtol=1e-6)


@pytest.mark.parametrize(("R", "module"), [(16, "llama"), (4, "gpt_neox")])
def test_rotation_equals_transformers(R, module):
    """All of a head as Llama, and a quarter of it as GPT-NeoX (its columns past R pass through)."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    N, H, K, D = 7, 3, 2, 16
    qkv, table = random_case(N, H, K, D), rotary_table(N, R, 10000.0)
    q, k, v = (torch.from_numpy(x) for x in np.split(qkv.reshape(N, -1, D), [H, H + K], axis=1))
    c, s = (torch.from_numpy(np.tile(x, 2).astype(float))[None] for x in np.split(table, 2, axis=1))
    turned = module.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], c, s)
    wanted = np.concatenate([*(x[0].transpose(0, 1).numpy() for x in turned), v.numpy()], axis=1)
    assert np.allclose(rotated(qkv, table, H, K, N), wanted.reshape(N, -1), rtol=0, atol=1e-12)


def test_qk_norm_equals_qwen3():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    N, H, K, D = 7, 4, 2, 16
    qkv, table, rng = random_case(N, H, K, D).astype(np.float32), rotary_table(N, D, 1e6), np.random.default_rng(1)
    weights, parts = rng.standard_normal((2, D)).astype(np.float32), np.split(qkv.reshape(N, -1, D), [H, H + K], axis=1)
    normed = []
    for x, w in zip(parts, weights):
        theirs = module.Qwen3RMSNorm(D, eps=1e-6)
        theirs.weight.data = torch.from_numpy(w)
        normed.append(theirs(torch.from_numpy(x)).transpose(0, 1)[None])
    c, s = (torch.from_numpy(np.tile(x, 2))[None] for x in np.split(table, 2, axis=1))
    turned = module.apply_rotary_pos_emb(*normed, c, s)
    wanted = np.concatenate([*(x[0].transpose(0, 1).detach().numpy() for x in turned), parts[2]], axis=1)
    got = rotated(qkv, table, H, K, N, *weights, eps=1e-6)
    limit = (D + 8) * UNIT * np.abs(wanted).max()  # of a float32 sum of D squares, and 8 operations after it
    assert np.abs(got - wanted.reshape(N, -1)).max() <= limit


# other properties -----------------------------------------------------------------------------------------------------


def test_interleaved_pairs_are_complex_numbers_times_e_to_the_i_angle():
    N, D = 9, 10
    qkv, table = random_case(N, 2, 1, D), rotary_table(N, D, 100.0)
    turns = (table[:, : D // 2] + 1j * table[:, D // 2 :])[:, None]
    pairs = qkv.reshape(N, 4, D // 2, 2)[:, :3] @ [1, 1j] * turns
    wanted = np.stack([pairs.real, pairs.imag], axis=-1).reshape(N, -1)
    got = rotated(qkv, table, 2, 1, N, interleaved=True)
    assert np.allclose(got[:, : 3 * D], wanted, rtol=0, atol=1e-12) and (got[:, 3 * D :] == qkv[:, 3 * D :]).all()


@pytest.mark.parametrize("backend", [RefBackend(exact=False), open_backend("cpu")], ids=["rounded", "cpu"])
def test_decode_continues_at_the_position_of_the_step_scalars(backend):
    """Two sequences of 3 rows from position 4 are rows 4 to 6 of two sequences of 7, bit for bit."""
    D, H, K = 16, 2, 1
    table, qkv = rotary_table(7, D, 100.0), random_case(14, H, K, D)
    late = qkv.reshape(2, 7, -1)[:, 4:].reshape(6, -1)
    whole, part = (
        rotated(qkv, table, H, K, 7, backend=backend),
        rotated(late, table, H, K, 3, position=4, backend=backend),
    )
    assert (whole.reshape(2, 7, -1)[:, 4:].reshape(6, -1) == part).all()
    assert not np.allclose(part, rotated(late, table, H, K, 3, backend=backend))


def test_products_of_rotated_heads_depend_on_the_distance_alone():
    N, D = 12, 8
    x = np.tile(np.random.default_rng(2).standard_normal(3 * D), (N, 1))
    q, k, _ = np.split(rotated(x, rotary_table(N, D, 100.0), 1, 1, N), 3, axis=1)
    scores = q @ k.T
    for distance in range(N):
        assert np.ptp(np.diagonal(scores, -distance)) < 1e-5


def test_sums_do_not_depend_on_the_number_of_threads():
    p, c = case_program(rope_backward, rope_backward.cases[3], F32)
    runs = [run_case(p, c, case_arrays(rope_backward, c), open_backend("cpu", n)) for n in (1, 2, 3)]
    for other in runs[1:]:
        assert all(np.array_equal(runs[0][name], other[name]) for name in ("dqkv", "dwq", "dwk"))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (dict(R=3), "the rotary dimensions are even, and at most the 8 of a head, but got 3"),
        (dict(R=10), "the rotary dimensions are even, and at most the 8 of a head, but got 10"),
        (dict(S=5), "the table has at least 6 rows, one per position, but got 5"),
        (dict(T=5), "the number of rows is a multiple of T = 5, but got 12"),
        (dict(Q=30), "the width of qkv is a multiple of 2 [+] 2 x 1 heads, but got 30"),
        (dict(D=9), "the weights of the norms have 8 elements, as heads have, but got 9"),
    ],
)
def test_sizes_that_disagree_are_errors(change, rule):
    d = dict(N=12, Q=32, S=6, R=8, T=6, D=8) | change
    p = Program(F32)
    qkv, table = p.input("qkv", (d["N"], d["Q"]), F32), p.input("table", (d["S"], d["R"]), F32)
    w = p.input("w", (d["D"],), F32)
    with pytest.raises(HandgradError, match=rf"\[rope\] {rule}"):
        p.emit(rope, qkv, table, w, w, T=d["T"], H=2, K=1, eps=1e-6, decode=False, interleaved=False)
