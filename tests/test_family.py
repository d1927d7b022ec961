"""A new family is one dataclass: a GPT-2 without positions, through every part that must not know GPT-2 by name."""

import json
import shutil
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pytest

import handgrad as hg
from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.cli.__main__ import main
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.data import id_dtype, write_shard
from handgrad.evals import Scorer
from handgrad.evals import record as record_scorer
from handgrad.infer import Sampling
from handgrad.infer.load import TOKENIZER, load_run, open_source
from handgrad.io import checkpoint, llmc
from handgrad.io.weights import Weights
from handgrad.models import (
    GPT2,
    declare,
    family,
    forward_logits,
    forward_loss,
    from_dict,
    register,
    registry,
    shapes,
    to_dict,
)
from handgrad.models.blocks import token_table
from handgrad.ops import attention_decode, embed
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.llmc_init import draws


@dataclass(frozen=True)
class NoPositions(GPT2):
    family: ClassVar[str] = "gpt2_without_positions"
    hugging_face: ClassVar = GPT2.hugging_face | {"model_types": {"gpt2_without_positions": "GPT2LMHeadModel"}}

    def embedding(self, g, data):
        return g.emit(embed, data.ids, token_table(g, self), None, None, T=data.seq_len, decode=False, scale=1.0)


@dataclass(frozen=True)
class Remembering(NoPositions):
    """Has a state: parts of the embeddings of the last micro-batch, as an attention's keys and values."""

    family: ClassVar[str] = "gpt2_with_a_state"
    hugging_face: ClassVar = {}

    def embedding(self, g, data):
        x = super().embedding(g, data)
        if g.trains:
            B, T, D = data.batch_size, data.seq_len, self.hidden_size // 3
            into = {"cache": g.state("seen", (B, T, 2, 1, D), g.dtype)}
            g.emit(attention_decode, x, None, into=into, T=T, S=T, H=1, K=1, window=0, scale=D**-0.5)
        return x


@dataclass(frozen=True)
class Untied:
    """A family with fewer fields than GPT-2, of which it has the methods."""

    vocab_size: int = 97
    max_seq_len: int = 20
    num_layers: int = 2
    num_heads: int = 3
    hidden_size: int = 36

    family: ClassVar[str] = "untied"
    hugging_face: ClassVar = {}

    @property
    def _gpt2(self):
        return NoPositions(**asdict(self), tie_embeddings=False)

    def __getattr__(self, name):
        return getattr(self._gpt2, name)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registered in these tests alone."""
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    for cls in (NoPositions, Remembering, Untied):
        register(cls)


SIZES = dict(vocab_size=97, max_seq_len=20, num_layers=2, num_heads=3, hidden_size=36)
TEXT = "".join(map(chr, range(256, 256 + 97)))  # a letter for every token


def weights(model, seed=3):
    """Random weights by name, far enough from the start that tokens depend on the context."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, info in declare(model).params.items():
        made[name] = np.zeros(info.tensor.shape, np.float32)
        rows = made[name][: info.init.rows]
        rows[...] = (info.init.kind == "ones") + rng.normal(0, 0.15, rows.shape)
    return made


def save(model, folder, made):
    """A run folder of these weights."""
    meta = to_dict(model) | {"dtype": "f32", "stored": "float32"}
    checkpoint.save(folder, 5, made, {}, meta)
    (folder / TOKENIZER).write_text(json.dumps(tokenizers.chars(TEXT).save(folder)))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return NoPositions(**SIZES, tie_embeddings=request.param)


@pytest.fixture
def run(model, tmp_path):
    """A run folder of random weights, and the weights."""
    made = weights(model)
    save(model, tmp_path / "run", made)
    return tmp_path / "run", made


def test_families_are_found_by_name(model):
    assert family("gpt2_without_positions") is NoPositions and family("gpt2") is GPT2
    assert set(declare(GPT2(**SIZES)).params) - set(declare(model).params) == {"wpe.weight"}
    with pytest.raises(HandgradError, match=r"\[model\] every family has a name of its own, but got 'gpt2' twice"):
        register(type("Other", (), {"family": "gpt2"}))
    with pytest.raises(HandgradError, match=r"\[model\] a family is one of bert, gemma, gpt2, .*, but got 'gpt9'"):
        family("gpt9")


def test_gradients_equal_finite_differences(model):
    def fill(p, arena):
        rng = np.random.default_rng(0)
        for name, values in weights(model).items():
            arena.part("param", p.params[name].tensor)[...] = values
        for t in p.inputs.values():
            arena.view(t)[...] = rng.integers(0, model.vocab_size, t.shape)
        set_scalars(p, arena)

    assert gradcheck(lambda p: forward_loss(p, model, 2, 9, 3), fill) < 1e-6


def test_run_json_names_the_family(model):
    saved = json.loads(json.dumps(to_dict(model)))
    assert saved == {"family": "gpt2_without_positions", "model": asdict(model)}
    assert from_dict(saved, "generate", "run.json") == model
    older = {"model": asdict(GPT2(**SIZES))}  # a checkpoint that names no family
    assert from_dict(older, "generate", "run.json") == GPT2(**SIZES)


def full_pass(model, made):
    """A function from token ids to the logits (V,) after the last one, computed without a cache."""
    p = Program(F32)
    forward_logits(p, model, 1, model.max_seq_len)
    backend = open_backend("cpu", 1)
    arena = backend.alloc(backend.plan(p))
    for name, values in made.items():
        arena.write_part("param", p.params[name].tensor, values)
    bound = backend.bind(p, arena)

    def logits(ids):
        arena.write(p.inputs["ids"], ids + [0] * (model.max_seq_len - len(ids)))
        bound.run()
        return arena.read(p.outputs["logits"])[len(ids) - 1, : model.vocab_size]

    return logits


def test_generation_with_a_cache_equals_full_recomputation(model, run):
    engine, tokenizer = load_run(run[0], threads=1)
    assert tokenizer.characters == TEXT and engine.model == model
    logits, ids = full_pass(model, run[1]), [5, 6, 7]
    for token in engine.generate(ids, 12, Sampling(temperature=0.0)):
        want = logits(ids)
        assert token == want.argmax()
        ids.append(token)
    engine.position = 0
    assert np.abs(engine.logits(ids) - logits(ids)).max() <= 1e-5 * np.abs(logits(ids)).max()


def test_scores_equal_full_recomputation(model):
    made, backend = weights(model), open_backend("cpu", 1)
    programs, declared = record_scorer(model, F32, 64), declare(model)
    arena = backend.alloc(backend.plan(declared, *programs))
    for name, values in made.items():
        arena.write_part("param", declared.params[name].tensor, values)
    (score,) = Scorer(model, programs, arena, backend).score([([1, 2, 3, 4], [5, 6])], greedy=True)
    logits = full_pass(model, made)
    for loss, ids, target in zip(score.losses, ([1, 2, 3, 4], [1, 2, 3, 4, 5]), (5, 6)):
        z = logits(ids).astype(np.float64)
        assert loss == pytest.approx(np.log(np.exp(z - z.max()).sum()) + z.max() - z[target], abs=1e-4)


def test_export_to_hugging_face_and_back_is_bit_exact(model, run, tmp_path):
    assert main(["convert", str(run[0]), str(tmp_path / "hf"), "--to", "hf"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "gpt2_without_positions" and config["n_embd"] == 36
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "handgrad"]) == 0
    for name in ("hf", "again"):
        source = open_source(tmp_path / name)
        assert source.model == model and source.weights.shapes == shapes(declare(model))
        for tensor, values in run[1].items():
            assert np.array_equal(source.weights.tensor(tensor, rows=len(values)), values)
    for folder in ("run/step_000005", "again/step_000000"):
        assert json.loads((tmp_path / folder / "run.json").read_text())["family"] == "gpt2_without_positions"


def test_a_family_without_a_hugging_face_format_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(NoPositions, "hugging_face", {})
    assert main(["convert", str(run[0]), str(tmp_path / "hf"), "--to", "hf"]) == 2
    line = "[convert] Hugging Face's library has no model of the family 'gpt2_without_positions'."
    assert line in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_llmc_export_and_init_are_refused(model, run, tmp_path, capsys):
    assert main(["convert", str(run[0]), str(tmp_path / "a.bin")]) == 2
    line = "[convert] a model for llm.c is of the family gpt2, but got 'gpt2_without_positions'."
    assert line in capsys.readouterr().err and not (tmp_path / "a.bin").exists()
    tied = NoPositions(**SIZES)
    own = Weights(asdict(tied), "f32", shapes(declare(tied)), run[1].__getitem__)
    with pytest.raises(
        HandgradError, match=r"\[llmc\] a model for llm.c has the tensors of a GPT-2, but got none .*wpe"
    ):
        llmc.write_model(tmp_path / "a.bin", own)
    with pytest.raises(HandgradError, match=r"\[train\] llm.c's initial weights are those of a GPT-2 with a tied head"):
        draws(declare(model))


def test_a_checkpoint_of_another_family_is_refused(run):
    """Without its family in run.json, it would be a GPT-2 that lacks a tensor."""
    path = run[0] / "step_000005" / "run.json"
    saved = json.loads(path.read_text())
    del saved["family"]
    path.write_text(json.dumps(saved))
    with pytest.raises(HandgradError, match="must hold the tensor 'wpe.weight', but got no such"):
        open_source(run[0])


# training -------------------------------------------------------------------------------------------------------------


def trainer(model, shards, out=None, backend="cpu"):
    """A trainer with two micro-batches a step, planned for validation."""
    data = hg.data.tokens(shards, seq_len=10, batch_tokens=80, seed=5)
    execution = hg.Execution(micro_batch=4, extra_programs=("val",), backend=backend, threads=1)
    return hg.Trainer(
        model,
        hg.optim.AdamW(),
        data,
        precision=hg.Precision("f32"),
        execution=execution,
        start=hg.Start(seed=2),
        out=out,
    )


def arrays(trainer):
    """All that a checkpoint holds, as bytes."""
    return {name: values.tobytes() for name, values in (trainer.params() | trainer._state()).items()}


def test_resume_is_bit_exact(model, shards, tmp_path):
    whole, first = trainer(model, shards), trainer(model, shards, tmp_path)
    losses = [whole.step(step, 1e-2).loss for step in range(1, 7)]
    assert [first.step(step, 1e-2).loss for step in (1, 2, 3)] == losses[:3]
    first.save(3)
    again = trainer(model, shards, tmp_path)
    assert again.resume() == 3 and arrays(again) == arrays(first) != arrays(whole)
    assert [again.step(step, 1e-2).loss for step in (4, 5, 6)] == losses[3:]
    assert arrays(again) == arrays(whole)


def test_validation_equals_the_float64_oracle(model, shards):
    run, oracle = trainer(model, shards), trainer(model, shards, backend="ref")
    run.step(1, 1e-2)
    oracle.load_params({name: np.array(values) for name, values in run.params().items()})
    val = hg.data.tokens(shards, seq_len=10, batch_tokens=10, shuffle=False)
    assert run.evaluate(val, 200) == pytest.approx(oracle.evaluate(val, 200), rel=1e-6)


def test_resume_with_another_family_is_refused(model, shards, tmp_path):
    trainer(model, shards, tmp_path).save(0)
    gpt2 = GPT2(**SIZES, tie_embeddings=model.tie_embeddings)
    rule = r"\[resume\] the checkpoint's model has family gpt2_without_positions, but got gpt2"
    with pytest.raises(HandgradError, match=rule):
        trainer(gpt2, shards, tmp_path).resume()


def test_explain_plans_the_arena_of_the_trainer(model, shards, capsys):
    run = trainer(model, shards)
    page = hg.explain(model, 10, execution=run.execution, backend=run.backend, accumulation=2)
    assert page.plan.nbytes == run.plan.nbytes == run.arena.bytes.nbytes
    assert page.plan.region == run.plan.region
    text = {}
    for name in ("gpt2", "gpt2_without_positions"):
        assert main(["explain", "tiny", "--family", name, "--threads", "1", "--calls"]) == 0
        text[name] = capsys.readouterr().out
    assert "wpe.weight" in text["gpt2"] and "wpe.weight" not in text["gpt2_without_positions"]


def test_profile_of_a_family(capsys):
    flags = "d1 --family gpt2_without_positions --backend cpu --threads 1 --micro-batch 1 --seq-len 16 --steps 1"
    assert main(["profile", *flags.split()]) == 0
    assert "embed" in capsys.readouterr().out
    assert main(["profile", "d1", "--family", "gpt9"]) == 2
    assert "[model] a family is one of " in capsys.readouterr().err


def test_a_state_is_saved_and_restored(shards, tmp_path):
    model = Remembering(**SIZES)
    whole, first = trainer(model, shards), trainer(model, shards, tmp_path)
    for run in (whole, first):
        for step in (1, 2):
            before = run.params()["wte.weight"].copy()
            run.step(step, 1e-2)
    ids = first.data.batch(1, micro_batch=4, micro_step=1)["ids"]
    seen = first._state()["state.seen"]
    assert np.array_equal(seen[:, :, :, 0], before[ids][:, :, 12:].reshape(4, 10, 2, 12)) and seen.any()
    first.save(2)
    again = trainer(model, shards, tmp_path)
    assert not again._state()["state.seen"].any()
    assert again.resume() == 2 and arrays(again) == arrays(first)
    assert again.step(3, 1e-2).loss == whole.step(3, 1e-2).loss and arrays(again) == arrays(whole)


def test_a_checkpoint_without_the_state_is_refused(shards, tmp_path):
    run = trainer(Remembering(**SIZES), shards, tmp_path)
    state = {name: values for name, values in run._state().items() if name != "state.seen"}
    meta = to_dict(run.model) | {"dtype": "f32", "tokens": 0, "outliers": {}, "skips": 0}
    checkpoint.save(tmp_path, 0, run.params(), state, meta)
    with pytest.raises(HandgradError, match="must hold the tensor 'state.seen', but got no such"):
        run.resume()


# the command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    """A folder of shards with a tokenizer: a letter for each of 97 tokens."""
    folder, rng = tmp_path / "words", np.random.default_rng(0)
    folder.mkdir()
    write_shard(folder / "train_0.bin", [np.cumsum(rng.integers(0, 3, 5000)) % 97], id_dtype(97))
    write_shard(folder / "val_0.bin", [np.cumsum(rng.integers(0, 3, 300)) % 97], id_dtype(97))
    meta = {"tokenizer": {"kind": "chars", "characters": TEXT}, "vocab_size": 97, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": {}, "val": {}}))
    return str(folder)


def train(words, out, flags, sizes="--num-layers 2 --num-heads 3 --hidden-size 36"):
    """The exit code of a run of eight steps with a checkpoint after the fourth, and with these flags."""
    rest = "--batch-tokens 80 --seq-len 10 --micro-batch 4 --backend cpu --dtype f32"
    rest += " --steps 8 --save-every 4 --val-every 4 --sample-tokens 0 --threads 1"
    return main(["train", "--train", words, "--out", str(out), *sizes.split(), *rest.split(), *flags.split()])


FAMILY = "--family gpt2_without_positions --max-seq-len 20"


def test_train_resume_generate_and_export_by_command(words, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(words, whole, FAMILY) == 0
    assert json.loads((whole / "config.json").read_text())["model"]["family"] == "gpt2_without_positions"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "step_000008")
    capsys.readouterr()
    assert main(["train", "--resume", str(out)]) == 0
    assert "gpt2_without_positions, 2 layers" in capsys.readouterr().out
    for name in ("model.safetensors", "state.rank00.safetensors"):
        assert (out / "step_000008" / name).read_bytes() == (whole / "step_000008" / name).read_bytes()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))  # and no line about settings that have changed
    assert "val_loss" in lines[-1]

    capsys.readouterr()
    said = ["generate", str(out), "--prompt", TEXT[:5], "--max-tokens", "30", "--temperature", "0", "--threads", "1"]
    assert main(said) == 0
    text = capsys.readouterr().out
    engine, tokenizer = load_run(out, threads=1)
    ids = list(engine.generate(tokenizer.encode(TEXT[:5]).tolist(), 30, Sampling(temperature=0.0)))
    assert text == TEXT[:5] + tokenizer.decode(ids) + "\n"

    assert main(["convert", str(out), str(tmp_path / "hf"), "--to", "hf"]) == 0
    ours, theirs = open_source(out), open_source(tmp_path / "hf")
    assert theirs.model == ours.model == NoPositions(**SIZES)
    for name in ours.weights.shapes:
        assert np.array_equal(theirs.weights.tensor(name), ours.weights.tensor(name))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--family gpt2", "[resume] the checkpoint's model has family gpt2_without_positions, but got gpt2."),
        (
            "--family gpt9",
            "[model] a family is one of ",
        ),
    ],
)
def test_resume_by_command_with_another_family_is_refused(words, tmp_path, capsys, flags, line):
    out = tmp_path / "out"
    assert train(words, out, FAMILY) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(out), *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(line)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_init_takes_the_family_of_the_model_on_disk(words, run, model, tmp_path):
    """A learning rate of 0 leaves the weights as they are."""
    assert train(words, tmp_path / "out", f"--init {run[0]} --lr 0", sizes="") == 0
    source = open_source(tmp_path / "out")
    assert source.model == model
    for name, values in run[1].items():
        assert np.array_equal(source.weights.tensor(name, rows=len(values)), values)
    assert main(["train", "--resume", str(tmp_path / "out"), "--steps", "9"]) == 0


def test_init_of_another_family_is_refused(words, tmp_path, capsys):
    gpt2 = GPT2(**SIZES)
    save(gpt2, tmp_path / "gpt2", weights(gpt2))
    assert train(words, tmp_path / "out", f"{FAMILY} --init {tmp_path / 'gpt2'}", sizes="") == 2
    rule = "[model] --family is left to the model that --init names, but got gpt2_without_positions."
    assert capsys.readouterr().err == rule + "\n" and not (tmp_path / "out").exists()


def test_settings_that_a_family_lacks_are_refused(words, tmp_path, capsys):
    """Left alone, they do not matter."""
    flags = "--family untied --max-seq-len 20"
    assert train(words, tmp_path / "out", flags) == 0
    assert open_source(tmp_path / "out").model == Untied(**SIZES)
    capsys.readouterr()
    for more, field in (("--dropout 0.1", "dropout"), ("--no-tie-embeddings", "tie_embeddings")):
        assert train(words, tmp_path / "other", f"{flags} {more}") == 2
        rule = "[model] a model of the family untied has vocab_size, max_seq_len, num_layers, num_heads, hidden_size"
        assert capsys.readouterr().err == f"{rule}, but got '{field}'.\n"
    assert main(["explain", "tiny", "--family", "untied", "--dropout", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("[model] a model of the family untied has ")


def test_a_model_type_of_hugging_face_has_one_family():
    with pytest.raises(HandgradError, match="gpt2 reads Hugging Face's 'gpt2'"):
        register(dataclass(frozen=True)(type("Second", (GPT2,), {"family": "second"})))
    assert "second" not in registry.FAMILIES
