"""Whole models: gradients against finite differences in float64; logits, gradients and losses against PyTorch at
GPT-2's real shape, and against transformers' GPT2LMHeadModel at odd shapes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from handgrad import Trainer, data
from handgrad.backends import open_backend
from handgrad.core.backward import POLICIES
from handgrad.core.dtypes import DTYPES, F32
from handgrad.core.errors import HandgradError
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.infer.engine import record
from handgrad.models import GPT2, declare, forward_logits, forward_loss, gpt2, names, preset
from handgrad.ops import OPS
from handgrad.optim import AdamW, schedules
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.execution import Execution
from handgrad.train.record import record_loss, record_train
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SPEC = importlib.util.spec_from_file_location("gpt2_torch", Path(__file__).parents[1] / "reference" / "gpt2_torch.py")
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


# finite differences ----------------------------------------------------------------------------------------------------


def difference(model, policy="none", samples=3):
    """The largest relative error of any gradient of the model against central differences, in float64."""

    def fill(p, arena):
        rng = np.random.default_rng(0)
        initialize(p, arena, Start(seed=1))
        for info in p.params.values():
            w = arena.part("param", info.tensor)[: info.init.rows]
            w += rng.normal(0, 0.2, w.shape)
        for t in p.inputs.values():
            arena.view(t)[...] = rng.integers(0, model.vocab_size, t.shape)
        arena.view(p.inputs["targets"])[3] = -1  # does not count
        set_scalars(p, arena)

    return gradcheck(lambda p: forward_loss(p, model, 2, 9, 3), fill, POLICIES[policy], samples)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("tie", [True, False])
def test_gradients_equal_finite_differences(tiny, policy, dropout, tie):
    error = difference(tiny(vocab_size=23, hidden_size=24, dropout=dropout, tie_embeddings=tie), policy)
    print(f"relative error {error:.1e}")
    assert error < 1e-6


@pytest.mark.parametrize(
    "name", ["norm_backward", "linear_backward_x", "attention_backward", "linear_backward_w", "embed_backward"]
)
def test_wrong_gradient_rule_is_caught(tiny, monkeypatch, name):
    kind = type(OPS[name])
    right = kind.ref
    monkeypatch.setattr(
        kind, "ref", lambda self, v: tuple(None if out is None else 1.01 * out for out in right(self, v))
    )
    assert difference(tiny(vocab_size=23, hidden_size=24)) > 1e-4


# PyTorch ---------------------------------------------------------------------------------------------------------------

B, T = 4, 64
STEPS = 10
OPTIM = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0)
LR = schedules.cosine(6e-4, warmup=3, steps=STEPS)


def run_logits(model, params, ids, dtype):
    """Logits (rows, V) float32 of handgrad for these weights."""
    p = Program(DTYPES[dtype])
    forward_logits(p, model, *ids.shape)
    backend = open_backend("cpu")
    arena = backend.alloc(backend.plan(p))
    for name, info in p.params.items():
        arena.part("param", info.tensor)[...] = params[name]
    arena.view(p.inputs["ids"])[...] = ids.reshape(-1)
    backend.bind(p, arena).run()
    return np.array(arena.view(p.outputs["logits"])[:, : model.vocab_size], np.float32)


def relative(got, want):
    """|got - want| / |want| of a whole tensor: the gradient of the key third of c_attn.bias is exactly 0."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def compare(model, torch_model, to_ours, pattern, dtype="f32", seq_len=T):
    """Relative errors of logits and of each gradient, and the losses of both over STEPS training steps.

    to_ours: converts PyTorch's named tensors to handgrad's
    """
    tokens = data.tokens(pattern, seq_len=seq_len, batch_tokens=B * seq_len, vocab_size=model.vocab_size)
    batches = [tokens.batch(step) for step in range(STEPS)]
    ids, targets = (torch.from_numpy(np.ascontiguousarray(batches[0][key], np.int64)) for key in ("ids", "targets"))
    params = to_ours({name: p.detach().numpy() for name, p in torch_model.named_parameters()})
    errors = {}
    logits, loss = torch_model(ids, targets)
    errors["logits"] = relative(
        run_logits(model, params, batches[0]["ids"], dtype), logits.detach().flatten(0, 1).float().numpy()
    )
    loss.backward()
    want = to_ours({name: p.grad.numpy() for name, p in torch_model.named_parameters()})
    execution = Execution(B, extra_programs=(), backend="cpu")
    run = Trainer(model, AdamW(**OPTIM), tokens, execution=execution, precision=Precision(dtype))
    run.load_params(params)
    first = run.step(1, LR(1))
    errors |= {name: relative(run.grads()[name], g) for name, g in want.items()}
    assert set(want) == set(run.grads())
    ours = [first.loss] + [run.step(step, LR(step)).loss for step in range(2, STEPS + 1)]
    del run, want, params, logits, loss
    theirs = reference.train_steps(torch_model, [(b["ids"], b["targets"]) for b in batches], LR, **OPTIM)
    return errors, ours, theirs


def report(title, errors, ours, theirs):
    worst = sorted((e, name) for name, e in errors.items() if name != "logits")[-3:]
    print(
        f"\n{title}: logits {errors['logits']:.1e}; worst gradients "
        + ", ".join(f"{n} {e:.1e}" for e, n in worst[::-1])
    )
    print("losses  handgrad " + " ".join(f"{x:.5f}" for x in ours))
    print("        PyTorch  " + " ".join(f"{x:.5f}" for x in theirs))


@pytest.fixture(scope="module")
def bpe_shards(tmp_path_factory):
    """Ids below 50257 with frequencies as uneven as in text, so that ten steps change the loss."""
    ids = np.random.default_rng(0).zipf(1.3, 20_000) % 50257
    folder = tmp_path_factory.mktemp("bpe")
    data.write_shard(folder / "a.bin", [ids], data.id_dtype(50257))
    return str(folder / "a.bin")


def reference_model(model):
    torch.manual_seed(0)
    sizes = model.vocab_size, model.max_seq_len, model.num_layers, model.num_heads, model.hidden_size
    return reference.GPT2(*sizes, vocab_padded=model.vocab_padded)


def test_gpt2_124m_equals_pytorch_in_float32(bpe_shards):
    model = gpt2("124m")
    errors, ours, theirs = compare(model, reference_model(model), dict, bpe_shards)
    report(f"gpt2-124m f32, B={B} T={T}", errors, ours, theirs)
    assert max(errors.values()) <= 1e-4
    assert np.abs(np.array(ours) - theirs).max() <= 1e-4
    assert ours[-1] < ours[0] - 1  # the loss falls


def test_gpt2_equals_pytorch_in_bf16(bpe_shards):
    """bf16 has 8 bits: rounding has a relative error of at most 2^-8, 1.6e-3 in root mean square.

    On its way through the branches a gradient passes about 8 rounded tensors in each of 12 blocks; independent errors
    add in squares. The residual stream, which carries most of the gradient, is rounded twice per block, forward and
    backward, and the weights once: sqrt(12 * (4 + 8)) * 1.6e-3 = 1.9e-2. This is an upper estimate, because branches are
    small compared to the stream. So the median must stay below 3/4 of it, single tensors below 1.5 times.
    """
    model = gpt2("124m", num_layers=12, hidden_size=192, num_heads=3)
    errors, ours, theirs = compare(model, reference_model(model), dict, bpe_shards, dtype="bf16")
    report(f"12 layers, 192 wide, bf16, B={B} T={T}", errors, ours, theirs)
    assert max(errors.values()) <= 2.8e-2
    assert np.median(list(errors.values())) <= 1.4e-2
    assert np.abs(np.array(ours) - theirs).max() <= 2e-2


# transformers ---------------------------------------------------------------------------------------------------------

ODD = [  # sizes that no vector width or tile divides
    GPT2(vocab_size=97, max_seq_len=37, num_layers=2, num_heads=3, hidden_size=60),
    GPT2(vocab_size=1009, max_seq_len=70, num_layers=3, num_heads=5, hidden_size=35),
]


class TransformersGPT2(torch.nn.Module):
    """GPT2LMHeadModel with the interface of reference/gpt2_torch.py: (ids, targets) -> (logits, mean loss)."""

    def __init__(self, model):
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_seq_len,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_embd=model.hidden_size,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        self.inner = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():  # biases of 0 and norms of 1 would hide mistakes
            for p in self.parameters():
                p += 0.05 * torch.randn_like(p)

    def forward(self, ids, targets):
        logits = self.inner(ids).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def to_ours(model, tensors):
    """transformers' names and layout to ours: Conv1D stores (in, out), and we pad the vocabulary with zero rows."""
    ours = {}
    for name, w in tensors.items():
        name = name.removeprefix("inner.transformer.")
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.T
        if name == "wte.weight":
            w = np.pad(w, ((0, model.vocab_padded - model.vocab_size), (0, 0)))
        ours[name] = np.array(w)
    return ours


@pytest.mark.parametrize("model", ODD, ids=lambda m: f"V{m.vocab_size}-H{m.num_heads}x{m.hidden_size // m.num_heads}")
def test_random_gpt2_equals_transformers(model, shards):
    errors, ours, theirs = compare(
        model, TransformersGPT2(model), lambda t: to_ours(model, t), shards, seq_len=model.max_seq_len
    )
    report(f"transformers {transformers.__version__}, {model}", errors, ours, theirs)
    assert max(errors.values()) <= 1e-4
    assert np.abs(np.array(ours) - theirs).max() <= 1e-4


# sizes -----------------------------------------------------------------------------------------------------------------

COUNTS = {  # with the vocabulary padded to 50304 rows; of d6 to gpt3:c768 also llm.c's own counts
    "gpt2-124m": 124_475_904,
    "gpt2-355m": 354_871_296,
    "gpt2-774m": 774_090_240,
    "gpt2-1558m": 1_557_686_400,
    "d6": 30_357_504,
    "d12": 124_475_904,
    "d24": 354_871_296,
    "d36": 774_090_240,
    "d48": 1_557_686_400,
    "d60": 2_754_259_200,
    "d72": 7_316_887_680,
    "d84": 12_220_657_920,
    "gpt3:c768": 125_262_336,
}


DESCRIPTORS = [  # llm.c's names
    *(name for name in COUNTS if not name.startswith("gpt2")),
    *(f"gpt2:d{layers}" for layers in (6, 12, 24, 36, 48, 60, 72, 84)),
    *(f"gpt3:c{c}" for c in (384, 1024, 1536, 2048, 2560, 4096, 5140, 12288)),
]


RELEASED = {  # as in their own files
    "llama3.2-1b": 1_235_814_400,
    "llama3.1-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "gemma3-270m": 268_098_176,
    "bert-base": 110_106_428 + 70 * 769,  # rows of padding
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_parameters(name):
    assert declare(preset(name)).num_params == RELEASED[name]


@pytest.mark.parametrize("name", sorted({*names(), *DESCRIPTORS} - {*RELEASED}))
def test_presets_have_their_parameters(name):
    model = gpt2(name)
    p, C = declare(model), model.hidden_size
    by_formula = (model.vocab_padded + model.max_seq_len + 2) * C + model.num_layers * (12 * C * C + 13 * C)
    assert p.num_params == by_formula == COUNTS.get(name, COUNTS.get(name.removeprefix("gpt2:"), by_formula))
    assert C % model.num_heads == 0 and model.max_seq_len == (
        2048 if name.startswith("gpt3") else 64 if name == "tiny" else 1024
    )


RECORDED = {
    "train": lambda model, dtype: record_train(model, AdamW(), 8, Precision(dtype.name), Execution(1), chunks=1),
    "loss": lambda model, dtype: record_loss(model, 8, Precision(dtype.name), Execution(1), chunks=1),
    "declare": declare,
    "prefill": lambda model, dtype: record(model, dtype)[0],  # without a head
    "decode": lambda model, dtype: record(model, dtype)[1],
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parameter_order(tiny, name, dropout):
    """Initial weights are drawn and flat vectors laid out in this order, whichever call adds a bias."""
    model = tiny(dropout=dropout, tie_embeddings=False)
    p = RECORDED[name](model, F32)
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    want = [("wte.weight", True, "embed"), ("wpe.weight", True, "embed")]
    for i in range(model.num_layers):
        want += [
            (f"h.{i}.{part}.{kind}", ".c_" in part and kind == "weight", f"h.{i}")
            for part in parts
            for kind in ("weight", "bias")
        ]
    want += [("ln_f.weight", False, "head"), ("ln_f.bias", False, "head"), ("lm_head.weight", True, "head")]
    want = want[:-1] if name == "prefill" else want
    group_of = AdamW().groups.group_of
    found = [(name, group_of(info) == "decay", info.block) for name, info in p.params.items()]
    assert found == want


def test_gpt3_sizes():
    """In billions, as in the paper and llm.c; 13B has 40 heads of 128, because 128 does not divide the paper's 5140."""
    sizes = {}
    for width in (384, 1024, 1536, 2048, 2560, 4096, 5140, 12288):
        sizes[width] = round(declare(gpt2(f"gpt3:c{width}")).num_params / 1e9, 3)
    assert sizes == {
        384: 0.031,
        1024: 0.356,
        1536: 0.760,
        2048: 1.316,
        2560: 2.652,
        4096: 6.659,
        5140: 12.854,
        12288: 174.605,
    }


def test_preset_by_depth():
    assert preset("d8") == GPT2(num_layers=8, num_heads=8, hidden_size=512, max_seq_len=1024)
    with pytest.raises(
        HandgradError, match=r"\[model\] a preset is tiny, gpt2, .* d6 .. d84 \(or any d<layers>\), .*, but got 'gpt5'"
    ):
        preset("gpt5")


@pytest.mark.parametrize(
    "bad", [dict(num_layers=0), dict(num_heads=5), dict(dropout=1.0), dict(vocab_size=0), dict(dropout=-0.1)]
)
def test_invalid_sizes_are_rejected(bad):
    with pytest.raises(HandgradError, match=r"\[model\]"):
        gpt2("124m", **bad)


def test_initial_weights_are_seeded_and_scaled(tiny, shards):
    tokens = data.tokens(shards, seq_len=16, batch_tokens=16)
    model = tiny(hidden_size=192, num_layers=3)
    a, b, other = (
        Trainer(
            model,
            AdamW(),
            tokens,
            precision=Precision("f32"),
            execution=Execution(1, extra_programs=(), backend="cpu"),
            start=Start(seed),
        ).params()
        for seed in (1, 1, 2)
    )
    for name, w in a.items():
        assert np.array_equal(w, b[name])
        if name.endswith("bias"):
            assert not w.any()
        elif ".ln_" in name or name.startswith("ln_"):
            assert (w == 1).all()
        else:
            std = 0.02 / 6**0.5 if name.endswith("c_proj.weight") else 0.02
            rows = w[: model.vocab_size] if name == "wte.weight" else w
            assert not np.array_equal(w, other[name])
            assert abs(rows.std() / std - 1) < 0.05 and abs(rows.mean()) < 0.05 * std * 5
    assert not a["wte.weight"][model.vocab_size :].any()  # padding
