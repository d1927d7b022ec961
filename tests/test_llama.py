"""Llama and its kin: against transformers and PyTorch, and through every verb."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.core.backward import POLICIES
from handgrad.core.errors import HandgradError
from handgrad.infer import Sampling
from handgrad.infer.load import TOKENIZER, load_run, open_source
from handgrad.io import newest
from handgrad.models import GPT2, Llama, declare, forward_loss, from_dict, preset, to_dict
from handgrad.ops import attention_backward
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
OTHERS = transformers.GPTNeoXConfig, transformers.Gemma3TextConfig
parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")
CASES = [name for name, case in parity.CASES.items() if case.config not in OTHERS]

SMALL = Llama(vocab_size=23, max_seq_len=20, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=24, mlp_size=20)
KINDS = {
    "llama": SMALL,
    "untied, wide heads": replace(SMALL, tie_embeddings=False, head_size=10),
    "window": replace(SMALL, window=3),
    "rope of Llama 3": replace(SMALL, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen3": replace(SMALL, qk_norm=True),
}


# PyTorch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_steps_equal_transformers(name, text):
    found = parity.compare(parity.CASES[name], text)
    error, whose = found.worst_gradient
    print(f"{name}: logits {found.errors['logits']:.1e}, gradients {error:.1e} {whose}, losses {found.loss:.1e}")
    assert isinstance(found.model, Llama)
    assert found.errors["logits"] <= 1e-4 and error <= 1e-4 and found.loss <= 1e-4
    assert found.ours[-1] < found.ours[0] - 0.02


def check_bf16(found):
    """bf16 rounds with a relative error of 1.6e-3 in root mean square.

    A gradient passes about 24 rounded tensors a layer: forward and backward n, qkv, its rotation, y and the projection
    of the attention, n, gate_up, the gated columns and the projection of the MLP, and the stream twice. Independent
    errors add in squares: sqrt(2 x 24) x 1.6e-3 = 1.1e-2 for the median tensor. A score of 2, rounded, moves its
    probability by twice as much, so single tensors of q and k may have 2.2e-2. The root mean square of n independent
    errors has itself a relative deviation of 1 / sqrt(2 n): three of them for the n of a tensor, which counts for the
    norms of q and k, of 10 to 24 elements. Losses are means, in which most of it averages out.
    """
    sizes = {name: info.tensor.size for name, info in declare(found.model).params.items()}
    for name, error in found.errors.items():
        assert error <= 2.2e-2 * (1 + 3 / np.sqrt(2 * sizes.get(name, np.inf))), (name, error)
    assert np.median(list(found.errors.values())) <= 1.1e-2
    assert found.loss <= 1.1e-2 and found.ours[-1] < found.ours[0] - 0.02


@pytest.mark.parametrize("name", CASES)
def test_bf16_equals_transformers(name, text):
    check_bf16(parity.compare(parity.CASES[name], text, dtype="bf16"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_equals_transformers(name, text):
    found = parity.compare(parity.CASES[name], text, backend="cuda")
    error, whose = found.worst_gradient
    assert error <= 1e-4 and found.loss <= 1e-4, whose
    check_bf16(parity.compare(parity.CASES[name], text, backend="cuda", dtype="bf16"))


def test_a_wrong_model_is_caught(text, monkeypatch):
    """The comparison sees a rotation by the wrong base, and a window that is one token too long."""
    for name, change in (("llama", {"rope_theta": 9e3}), ("mistral, window", {"window": 10})):
        right = parity.tensors

        def wrong(inner, gradients=False, right=right, change=change):
            model, values = right(inner, gradients)
            return replace(model, **change), values

        monkeypatch.setattr(parity, "tensors", wrong)
        assert parity.compare(parity.CASES[name], text).errors["logits"] > 1e-3
        monkeypatch.undo()


# finite differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_finite_differences(name, policy):
    model = KINDS[name]

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

    assert gradcheck(lambda p: forward_loss(p, model, 2, 9, 3), fill, POLICIES[policy]) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_what_backward_recomputes_changes_no_bit(name, one_pass):
    losses, grads = one_pass(KINDS[name], policy="none")
    for policy in ("act", "act_norm", "block"):
        again, other = one_pass(KINDS[name], policy=policy)
        assert np.array_equal(losses, again)
        assert all(np.array_equal(grads[tensor], other[tensor]) for tensor in grads)


# the verbs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A folder to work in, with a folder of tokens."""
    monkeypatch.chdir(tmp_path)
    letters = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 6_000).tolist())
    Path("words.txt").write_text(letters)
    hg.data.prepare_text([Path("words.txt")], "text", hg.tokenizers.chars(letters))


SIZES = "--num-layers 2 --num-heads 4 --num-kv-heads 2 --hidden-size 32 --mlp-size 48 --max-seq-len 16"
SHORT = "--micro-batch 2 --sample-tokens 4 --val-every 2 --threads 1 --dtype f32 --train text"


def train(flags):
    return main(["train", *SHORT.split(), *flags.split()])


def test_train_resume_evaluate_generate_report_and_convert(words, capsys):
    assert train(f"--family llama {SIZES} --steps 4 --out whole") == 0
    assert train(f"--family llama {SIZES} --steps 2 --out run --schedule constant") == 0
    saved = json.loads(Path("whole/step_000004/run.json").read_text())
    assert saved["family"] == "llama" and saved["model"]["num_kv_heads"] == 2 and saved["model"]["head_size"] == 8
    assert main(["eval", "whole", "--threads", "1"]) == 0
    assert main(["report", "whole"]) == 0
    assert main(["convert", "whole", "hf", "--to", "hf"]) == 0
    assert json.loads(Path("hf/config.json").read_text())["model_type"] == "llama"
    capsys.readouterr()
    texts = []
    for source in ("whole", "hf"):
        assert main(["generate", source, "--prompt", "ab", "--max-tokens", "9", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_run_that_was_stopped_resumes_to_the_same_bits(words):
    for out, steps in (("whole", (6,)), ("run", (2, 4, 6))):
        for last in steps:
            assert train(f"--family llama {SIZES} --schedule constant --steps {last} --out {out} --resume auto") == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        whole, run = (Path(out, "step_000006", name).read_bytes() for out in ("whole", "run"))
        assert whole == run


def test_a_run_from_a_model_on_disk_keeps_the_fields_that_are_no_settings(words):
    """The base of the angles and the norms of q and k have no flags: a resumed run has them from its checkpoint."""
    tokens = hg.data.tokens("text", 16, 32)
    model = replace(SMALL, vocab_size=11, max_seq_len=16, rope_theta=123.0, qk_norm=True)
    execution = hg.Execution(2, backend="cpu", threads=1)
    hg.Trainer(model, hg.optim.AdamW(), tokens, execution=execution, precision=hg.Precision("f32"), out="first").save(0)
    for last in (2, 4):
        assert train(f"--init first --steps {last} --out run --resume auto") == 0
    assert open_source("run").model == model and newest(Path("run")).name == "step_000004"


def test_sizes_that_a_preset_would_have_are_kept_on_resume(words):
    """--num-kv-heads 4 is what the preset's 4 heads give, but not this run's 8."""
    flags = "--family llama --num-heads 8 --num-kv-heads 4 --num-layers 1 --hidden-size 32 --max-seq-len 16 --out run"
    assert train(f"{flags} --steps 1") == 0
    assert main(["train", "--resume", "run", "--steps", "2"]) == 0
    assert open_source("run").model.num_kv_heads == 4


def test_a_dropout_that_the_model_on_disk_lacks_is_refused(words, capsys):
    assert train(f"--family llama {SIZES} --steps 1 --out run") == 0
    assert train("--init run --dropout 0.3 --steps 1") == 2
    assert "a model of the family llama has" in capsys.readouterr().err


def test_presets_set_the_family(words, capsys):
    flags = "--vocab-size 64 --micro-batch 1 --seq-len 8 --threads 1 --backend cpu"
    assert main(["explain", "smollm2-135m", *flags.split()]) == 0
    assert "smollm2-135m, " in capsys.readouterr().out
    assert (
        train("--preset smollm2-135m --num-layers 1 --hidden-size 36 --mlp-size 8 --seq-len 8 --steps 1 --out s") == 0
    )
    model = open_source("s").model
    assert (model.family, model.num_heads, model.num_kv_heads, model.head_size) == ("llama", 9, 3, 64)
    assert model.rope_theta == 1e5 and model.max_seq_len == 8192
    assert train("--preset tiny --num-kv-heads 2 --steps 1") == 2
    assert "a model of the family gpt2 has" in capsys.readouterr().err


def test_sizes_of_a_depth():
    model = preset("d8", "llama")
    assert (model.num_layers, model.hidden_size, model.num_heads, model.mlp_size) == (8, 512, 8, 1408)
    assert preset("llama3.2-1b").rope_scaling == (32.0, 1.0, 4.0, 8192.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads divides the 4 heads"),
        ({"head_size": 5}, "head_size is even"),
        ({"hidden_size": 30, "head_size": 0}, "hidden_size is a multiple of num_heads"),
        ({"rope_scaling": (1.0,)}, "rope_scaling is None, or 4 positive numbers"),
        ({"rope_theta": -1.0}, "rope_theta is a positive number"),
        ({"rope_scaling": (8.0, 4.0, 4.0, 64)}, "rope_scaling has a low_freq_factor below"),
        ({"window": -1}, "window is at least 0"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(HandgradError, match=rf"\[model\] {message}"):
        replace(SMALL, **fields)


def test_numbers_of_a_file_are_floats():
    """llama.cpp reads a float where Python may have been given a whole number."""
    model = replace(SMALL, rope_theta=10000, norm_eps=1)
    assert type(model.rope_theta) is type(model.norm_eps) is float


def test_run_json_keeps_all_fields():
    model = replace(SMALL, rope_scaling=(8.0, 1.0, 4.0, 16.0), window=5)
    assert from_dict(json.loads(json.dumps(to_dict(model))), "generate", "run.json") == model
    assert from_dict(to_dict(GPT2()), "generate", "run.json") == GPT2()


def test_flops_of_a_token_are_those_of_the_calls():
    """The formula counts what the model needs: not the scores that attention's backward computes again, one of its five
    products. Parameters of norms and biases, which no product reads, are below 2 %."""
    for model in KINDS.values():
        wide = replace(model, vocab_size=128, max_seq_len=512, hidden_size=64, num_heads=8, head_size=16, mlp_size=96)
        page = hg.explain(wide, 512, execution=hg.Execution(1, recompute="none"), remedies=False)
        needed = sum(c.flops * (0.8 if c.op is attention_backward else 1) for c in page.program.calls) / 512
        assert needed == pytest.approx(wide.flops_per_token(page.program.num_params, 512), rel=0.02)


# generation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral, window"])
def test_greedy_tokens_equal_transformers(name, tmp_path):
    """64 of them, through the key/value cache, in float32; the prompt is longer than a prefill chunk."""
    case = parity.CASES[name]
    theirs = parity.WithLoss(replace(case, sizes=case.sizes | {"max_position_embeddings": 256})).inner.eval()
    theirs.save_pretrained(tmp_path)
    letters = "".join(map(chr, range(256, 256 + parity.VOCAB)))
    prompt = np.random.default_rng(1).integers(0, parity.VOCAB, 83).tolist()
    with torch.no_grad():
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, 83:].tolist()
    source = open_source(tmp_path)
    run = tmp_path / "run"
    hg.io.checkpoint.save(
        run,
        0,
        {n: source.weights.tensor(n, "f32", i.tensor.shape[0]) for n, i in declare(source.model).params.items()},
        {},
        to_dict(source.model) | {"dtype": "f32", "stored": "float32"},
    )
    (run / TOKENIZER).write_text(json.dumps(hg.tokenizers.chars(letters).save(run)))
    engine, _ = load_run(run, threads=1)
    assert list(engine.generate(prompt, 64, Sampling(temperature=0.0))) == want


def test_a_context_bounds_the_cache(words, capsys):
    assert train(f"--family llama {SIZES} --steps 1 --out run") == 0
    assert main(["generate", "run", "--context", "8", "--max-tokens", "12"]) == 0
    assert main(["generate", "run", "--context", "17"]) == 2
    assert "context lies in 1 .. 16, the tokens that the model reads, but got 17" in capsys.readouterr().err
