"""Gemma 3: against transformers, by finite differences, and through every verb."""

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
from handgrad.models import Gemma, declare, forward_loss, from_dict, preset, to_dict
from handgrad.models.gemma_format import FULL, SLIDING, _every, _theta
from handgrad.ops import attention_backward
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")

CASES = [name for name, case in parity.CASES.items() if case.config is transformers.Gemma3TextConfig]
SMALL = Gemma(
    vocab_size=23, max_seq_len=20, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=24, head_size=6, mlp_size=20,
    window=3, global_every=2, query_size=9,
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_steps_equal_transformers(name, text):
    found = parity.compare(parity.CASES[name], text)
    error, whose = found.worst_gradient
    print(f"{name}: logits {found.errors['logits']:.1e}, gradients {error:.1e} {whose}, losses {found.loss:.1e}")
    assert isinstance(found.model, Gemma) and len(CASES) == 2
    assert found.errors["logits"] <= 1e-5 and error <= 1e-4 and found.loss <= 1e-4
    assert found.ours[-1] < found.ours[0] - 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_equals_transformers(name, text):
    found = parity.compare(parity.CASES[name], text, backend="cuda")
    error, whose = found.worst_gradient
    assert error <= 1e-4 and found.loss <= 1e-4, whose


def test_a_wrong_field_is_caught():
    """Every field of a Gemma that a Llama lacks changes the logits by more than rounding."""
    theirs = parity.WithLoss(parity.CASES[CASES[0]])
    model, params = parity.tensors(theirs.inner)
    ids = np.random.default_rng(0).integers(0, parity.VOCAB, (2, 41))
    with torch.no_grad():
        want = theirs.inner(torch.from_numpy(ids), use_cache=False).logits.flatten(0, 1).numpy()

    def error(**change):
        ids32 = ids.astype(np.int32)
        return parity.relative(parity.logits_of(replace(model, **change), params, ids32, "f32"), want)

    assert error() < 1e-5
    for change in (
        {"window": 10}, {"local_theta": 9e3}, {"rope_theta": 9e5}, {"global_every": 1}, {"query_size": 20},
    ):  # fmt: skip
        assert error(**change) > 1e-4, change


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_finite_differences(tied):
    model = replace(SMALL, tie_embeddings=tied)

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

    assert gradcheck(lambda p: forward_loss(p, model, 2, 9, 3), fill, POLICIES["block"]) < 1e-6


def test_what_backward_recomputes_changes_no_bit(one_pass):
    losses, grads = one_pass(SMALL, policy="none")
    for policy in ("act", "act_norm", "block"):
        again, other = one_pass(SMALL, policy=policy)
        assert np.array_equal(again, losses)
        for name in grads:
            assert np.array_equal(other[name], grads[name]), f"{policy} {name}"


def test_flops_of_a_token_are_those_of_the_calls():
    """As the same test of the Llamas: attention's backward computes one of its five products again."""
    wide = replace(SMALL, vocab_size=128, max_seq_len=512, hidden_size=96, head_size=32, mlp_size=384, window=40)
    page = hg.explain(wide, 512, execution=hg.Execution(1, recompute="none"), remedies=False)
    needed = sum(c.flops * (0.8 if c.op is attention_backward else 1) for c in page.program.calls) / 512
    assert needed == pytest.approx(wide.flops_per_token(page.program.num_params, 512), rel=0.02)


# folders of Hugging Face's library, generation --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_folder_in_and_out(tmp_path, dtype):
    """transformers finds its tensors with no key too many or missing. Norms are stored as 1 + weight here: float32
    keeps the weight to 2^-24 of 1, and bf16 to 2^-9 of it."""
    model = parity.WithLoss(parity.CASES[CASES[0]]).inner.eval().to(dtype)
    model.save_pretrained(tmp_path / "in")
    for source, target, to in (("in", "run", "handgrad"), ("run", "out", "hf")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", to]) == 0
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        least = 2**-24 if dtype is torch.float32 else 2**-8
        error = (ours[name] - want).abs().max()
        assert error <= least * (1 + want.abs().max()) if "norm" in name else error == 0, name
    read = [transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("in", "out")]
    differ = {key for key in read[0] if read[0][key] != read[1].get(key)}
    assert differ <= {"_name_or_path", "pad_token_id"}  # ours names none, and theirs has a default


@pytest.mark.parametrize(
    ("config", "every", "theta"),
    [
        ({"num_hidden_layers": 4}, 6, 1e6),
        ({"sliding_window_pattern": 3, "rope_theta": 5}, 3, 5.0),
        ({"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]}, 2, 1e6),
        ({"num_hidden_layers": 2, "layer_types": [SLIDING, SLIDING]}, 3, 1e6),
        ({"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 7.0}}}, 6, 7.0),
    ],
)
def test_spellings_of_configs(config, every, theta):
    assert (_every(config), _theta(config, FULL, "rope_theta", 1e6)) == (every, theta)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attn_logit_softcapping": 50.0}, "has attn_logit_softcapping None, but got 50.0."),
        ({"use_bidirectional_attention": True}, "has use_bidirectional_attention False or None, but got True."),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "a rope_type default, but got linear."),
        ({"rope_parameters": [1]}, "rope_parameters that are an object for each kind of layer, but got [1]."),
        ({"layer_types": [FULL, SLIDING]}, f"layer_types with {FULL} at equal distances"),
        ({"layer_types": [FULL]}, f"layer_types {SLIDING} or {FULL}, one for each layer"),
    ],
)
def test_configs_that_no_kernel_computes_are_refused(tmp_path, changes, part):
    parity.WithLoss(parity.CASES[CASES[0]]).inner.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(HandgradError) as error:
        open_source(tmp_path)
    assert str(error.value).startswith("[hf] ") and part in str(error.value)


@pytest.mark.parametrize("name", CASES)
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
    rows = {n: i.tensor.shape[0] for n, i in declare(source.model).params.items()}
    weights = {n: source.weights.tensor(n, "f32", count) for n, count in rows.items()}
    hg.io.checkpoint.save(run, 0, weights, {}, to_dict(source.model) | {"dtype": "f32", "stored": "float32"})
    (run / TOKENIZER).write_text(json.dumps(hg.tokenizers.chars(letters).save(run)))
    engine, _ = load_run(run, threads=1)
    assert list(engine.generate(prompt, 64, Sampling(temperature=0.0))) == want


def test_train_resume_generate_and_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    letters = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 6_000).tolist())
    Path("words.txt").write_text(letters)
    hg.data.prepare_text([Path("words.txt")], "text", hg.tokenizers.chars(letters))
    sizes = "--family gemma --num-layers 2 --num-heads 4 --num-kv-heads 1 --hidden-size 32 --max-seq-len 16"
    short = "--micro-batch 2 --sample-tokens 4 --threads 1 --dtype f32 --train text --schedule constant"
    for out, steps in (("whole", (4,)), ("run", (2, 4))):
        for last in steps:
            flags = [*sizes.split(), *short.split(), "--steps", str(last), "--out", out, "--resume", "auto"]
            assert main(["train", *flags]) == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        whole, run = (Path(out, "step_000004", name).read_bytes() for out in ("whole", "run"))
        assert whole == run
    assert main(["convert", "run", "hf", "--to", "hf"]) == 0
    capsys.readouterr()
    texts = []
    for source in ("run", "hf"):
        assert main(["generate", source, "--prompt", "ab", "--max-tokens", "9", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# sizes ------------------------------------------------------------------------------------------------------------------


def test_run_json_keeps_all_fields():
    assert from_dict(json.loads(json.dumps(to_dict(SMALL))), "generate", "run.json") == SMALL
    assert preset("d2", "gemma").query_size == 64 and preset("gemma3-270m").num_kv_heads == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads divides the 4 heads"),
        ({"head_size": 5}, "head_size is even"),
        ({"head_size": 0, "num_heads": 5, "num_kv_heads": 1}, "hidden_size is a multiple of num_heads"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(HandgradError, match=rf"\[model\] {message}"):
        replace(SMALL, **fields)
