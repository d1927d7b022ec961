"""BERT: against transformers and PyTorch, and through the verbs that are for it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.core.backward import POLICIES
from handgrad.core.errors import HandgradError
from handgrad.infer.load import open_source
from handgrad.io import gguf
from handgrad.io.format import Format
from handgrad.models import Bert, forward_loss, preset
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.datasets import objective_of
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")

SEQUENCES, STEPS = 6, 10
SMALL = Bert(vocab_size=97, max_seq_len=41, num_layers=2, num_heads=3, hidden_size=60, mlp_size=77)
KINDS = {
    "masked tokens": SMALL,
    "masked tokens and pairs": replace(SMALL, pooler=True, nsp=True),
    "other sizes": replace(SMALL, num_heads=5, hidden_size=35, mlp_size=50, pooler=True, nsp=True, max_seq_len=66),
}


class Theirs(torch.nn.Module):
    """A BERT of transformers, and the loss of a batch as the data give it."""

    def __init__(self, model):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            intermediate_size=model.mlp_size,
            max_position_embeddings=model.max_seq_len,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,  # with an id, PyTorch gives the row of padding no gradient
        )
        kind = transformers.BertForPreTraining if model.nsp else transformers.BertForMaskedLM
        self.inner = kind(config)
        with torch.no_grad():  # biases of 0 and norms of 1 would hide mistakes
            for p in self.parameters():
                p += 0.05 * torch.randn_like(p)

    def forward(self, b):
        """The mean loss of the predictions, and of the pairs, weighted as the data say."""
        t = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in b.items()}
        B, T = t["ids"].shape
        seen = torch.arange(T) <= t["last"] if "last" in t else torch.ones(B, T, dtype=torch.bool)
        out = self.inner(t["ids"].long(), attention_mask=seen.long(), token_type_ids=t["types"].long())
        logits = out.logits if "nsp_targets" not in t else out.prediction_logits
        counts = t["targets"] >= 0
        rows = logits.flatten(0, 1)[t["rows"][counts].long()]
        cross_entropy = torch.nn.functional.cross_entropy
        total = cross_entropy(rows, t["targets"][counts].long(), reduction="sum")
        if "nsp_targets" in t:
            each = cross_entropy(out.seq_relationship_logits, t["nsp_targets"].long(), reduction="none")
            total = total + (each * t["nsp_weights"]).sum()
        return total / counts.sum()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Ids below 93 with frequencies as uneven as in text, and documents that end with 7."""
    folder = tmp_path_factory.mktemp("text")
    ids = np.random.default_rng(0).zipf(1.3, 20_000) % 93
    hg.data.write_shard(folder / "a.bin", [ids], hg.data.id_dtype(93))
    return str(folder / "a.bin")


def compare(model, text, backend="cpu", dtype="f32"):
    """Relative errors of gradients, and the losses of both over the steps."""
    theirs = Theirs(model)
    read, params = parity.tensors(theirs.inner)
    assert read == replace(model, pooler=model.nsp)
    T = model.max_seq_len
    data = hg.data.tokens(text, T, SEQUENCES * T, objective=objective_of(model, 7))
    batches = [data.batch(step) for step in range(STEPS)]
    theirs(batches[0]).backward()
    _, want = parity.tensors(theirs.inner, gradients=True)
    execution = hg.Execution(SEQUENCES, backend=backend)
    run = hg.Trainer(model, hg.optim.AdamW(**parity.OPTIM), data, execution=execution, precision=hg.Precision(dtype))
    run.load_params(params)
    ours = [run.step(1, parity.LR(1)).loss]
    found = run.grads()
    errors = {name: parity.relative(found[name], g) for name, g in want.items()}
    ours += [run.step(step, parity.LR(step)).loss for step in range(2, STEPS + 1)]
    optimizer = parity.gpt2_torch.adamw(theirs, 0.0, *(parity.OPTIM[k] for k in ("betas", "eps", "weight_decay")))
    losses = []
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = parity.LR(step)
        optimizer.zero_grad()
        loss = theirs(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), parity.OPTIM["clip"])
        optimizer.step()
        losses.append(float(loss.detach()))
    return errors, np.array(ours), np.array(losses)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_and_steps_equal_transformers(name, text):
    errors, ours, theirs = compare(KINDS[name], text)
    worst = max((error, tensor) for tensor, error in errors.items())
    print(f"{name}: worst gradient {worst[0]:.1e} {worst[1]}, losses {np.abs(ours - theirs).max():.1e}")
    assert worst[0] <= 1e-4 and np.abs(ours - theirs).max() <= 1e-4
    assert ours[-1] < ours[0] - 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_a_gpu_equals_transformers(name, text):
    errors, ours, theirs = compare(KINDS[name], text, backend="cuda")
    assert max(errors.values()) <= 1e-4 and np.abs(ours - theirs).max() <= 1e-4


def test_padding_that_is_seen_is_caught(text, monkeypatch):
    """A mistake in the bounds shows in the comparison: here texts see their padding."""
    right = hg.data.Masked.fill

    def wrong(self, raw, partner, draw, names):
        arrays = right(self, raw, partner, draw, names)
        return arrays | {"last": np.full_like(arrays["last"], arrays["last"].shape[1] - 1)}

    model = KINDS["masked tokens and pairs"]
    monkeypatch.setattr(Theirs, "forward", lambda self, b, was=Theirs.forward: was(self, b | {"last": b["true"]}))
    batch = hg.data.Tokens.batch

    def both(self, *args, **kwargs):
        true = batch(self, *args, **(kwargs | {"names": ("last",)}))["last"]
        monkeypatch.setattr(hg.data.Masked, "fill", wrong)
        found = batch(self, *args, **kwargs)
        monkeypatch.setattr(hg.data.Masked, "fill", right)
        return found | {"true": true}

    monkeypatch.setattr(hg.data.Tokens, "batch", both)
    errors, _, _ = compare(model, text)
    assert max(errors.values()) > 1e-3


# finite differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["masked tokens", "masked tokens and pairs"])
def test_gradients_equal_finite_differences(name, policy, text):
    model = replace(KINDS[name], vocab_size=97, hidden_size=24, mlp_size=20, dropout=0.2)
    batch = hg.data.tokens(text, 17, 34, objective=objective_of(model, 7)).batch(0)

    def fill(p, arena):
        rng = np.random.default_rng(0)
        initialize(p, arena, Start(seed=1))
        for info in p.params.values():
            w = arena.part("param", info.tensor)[: info.init.rows]
            w += rng.normal(0, 0.2, w.shape)
        for name, t in p.inputs.items():
            arena.view(t)[...] = batch[name].reshape(-1)
        set_scalars(p, arena)

    assert gradcheck(lambda p: forward_loss(p, model, 2, 17, 2), fill, POLICIES[policy]) < 1e-6


# the verbs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A folder to work in, with a folder of tokens."""
    monkeypatch.chdir(tmp_path)
    letters = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 6_000).tolist())
    Path("words.txt").write_text(letters)
    hg.data.prepare_text([Path("words.txt")], "text", hg.tokenizers.chars(letters))


SIZES = "--family bert --num-layers 2 --num-heads 2 --hidden-size 32 --mlp-size 48 --max-seq-len 16"
SHORT = "--micro-batch 2 --batch-tokens 64 --val-every 2 --threads 1 --dtype f32 --schedule constant --train text"


def train(flags):
    return main(["train", *SHORT.split(), *SIZES.split(), *flags.split()])


def test_train_resume_and_convert(words, capsys):
    for out, steps in (("whole", (6,)), ("run", (2, 4, 6))):
        for last in steps:
            assert train(f"--dropout 0.1 --steps {last} --out {out} --resume auto") == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        whole, run = (Path(out, "step_000006", name).read_bytes() for out in ("whole", "run"))
        assert whole == run
    model = open_source("run").model
    assert model.vocab_size == 10 + 4 and model.family == "bert" and model.mlp_size == 48
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]
    assert main(["convert", "run", "hf", "--to", "hf"]) == 0
    loaded, info = transformers.BertForMaskedLM.from_pretrained("hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert np.array_equal(
        loaded.bert.embeddings.word_embeddings.weight.detach().numpy(), open_source("run").weights.tensor("wte.weight")
    )


def test_it_continues_no_texts(words, capsys):
    assert train("--steps 1 --out run") == 0
    for verb in (["generate", "run"], ["eval", "run", "--tasks", "lambada=x"]):
        assert main(verb) == 2
        assert "a bert continues no texts" in capsys.readouterr().err


def test_its_special_tokens_have_ids_of_their_own(words, capsys):
    assert train("--steps 1 --vocab-size 12") == 2
    assert "--vocab-size is at least 14: the data's 10 and 4 special tokens, but got 12" in capsys.readouterr().err
    released = Theirs(replace(SMALL, num_heads=2, hidden_size=32, max_seq_len=16)).inner
    released.save_pretrained("released")
    assert main(["train", *SHORT.split(), "--init", "released", "--steps", "1"]) == 2
    rule = (
        "[model] a BERT to start from has [MASK], [CLS], [SEP], [PAD] after the data's 10, but got a vocabulary of 97."
    )
    assert rule in capsys.readouterr().err


def test_ids_that_an_objective_inserts_are_checked(text):
    """The embedding has no row for them."""
    data = hg.data.tokens(text, 17, 34, objective=objective_of(replace(SMALL, vocab_size=111)))
    execution = hg.Execution(2, backend="cpu", threads=1)
    with pytest.raises(HandgradError, match="lie below the model's vocabulary of 97, but got 110"):
        hg.Trainer(SMALL, hg.optim.AdamW(), data, execution=execution)


def test_an_objective_with_other_counts_is_refused(text):
    data = hg.data.tokens(text, 17, 34, objective=replace(objective_of(SMALL), max_predictions=2))
    run = hg.Trainer(SMALL, hg.optim.AdamW(), data, execution=hg.Execution(2, backend="cpu", threads=1))
    with pytest.raises(HandgradError, match="fills the 6 of the model's input 'rows', but got 4"):
        run.step(1, 1e-3)


@pytest.mark.parametrize("architectures", [[["x"]], {"a": 1}, ["BertForQuestionAnswering"]])
def test_other_architectures_are_refused(tmp_path, architectures):
    Theirs(SMALL).inner.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HandgradError, match="has an architecture BertForPreTraining, BertForMaskedLM, BertModel"):
        open_source(tmp_path)


def test_a_gguf_of_it_is_refused():
    file = SimpleNamespace(path="x.gguf", architecture="bert", metadata={})
    with pytest.raises(HandgradError, match=r"\[gguf\] no .gguf of this family can be read, but got x.gguf"):
        gguf.read_fields(file, Format(**Bert.hugging_face))


def test_explain_and_profile(capsys):
    flags = "--micro-batch 1 --seq-len 32 --backend cpu --threads 1"
    assert main(["explain", "bert-base", *flags.split()]) == 0
    assert "bert-base, " in capsys.readouterr().out
    assert main(["profile", "d1", "--family", "bert", *flags.split(), "--vocab-size", "64", "--steps", "1"]) == 0
    assert "pick" in capsys.readouterr().out


def test_flops_of_a_token_are_those_of_the_calls():
    """Without the scores that attention's backward computes again; the head of pairs does not count."""
    model = replace(SMALL, vocab_size=128, max_seq_len=512, hidden_size=64, num_heads=4, mlp_size=128)
    page = hg.explain(model, 512, execution=hg.Execution(1, recompute="none"), remedies=False)
    needed = sum(c.flops * (0.8 if c.op.name == "attention_backward" else 1) for c in page.program.calls) / 512
    assert needed == pytest.approx(model.flops_per_token(page.program.num_params, 512), rel=0.01)


def test_sizes():
    assert (
        hg.explain(preset("bert-base"), 128, execution=hg.Execution(1)).program.num_params == 110_106_428 + 70 * 769
    )  # of padding
    with pytest.raises(HandgradError, match=r"\[model\] the heads of a BERT are none, mlm, pooler, or all three"):
        replace(SMALL, pooler=True, mlm=True)
    with pytest.raises(HandgradError, match=r"\[model\] a BERT with nsp has a type for each of the two texts"):
        replace(SMALL, pooler=True, nsp=True, num_types=1)
