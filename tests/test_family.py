"""A new family is one dataclass: a GPT-2 without positions, through every part that must not know GPT-2 by name."""

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pytest

from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.cli.__main__ import main
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
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
from handgrad.ops import embed
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.llmc_init import draws


@dataclass(frozen=True)
class NoPositions(GPT2):
    family: ClassVar[str] = "gpt2_without_positions"
    hugging_face: ClassVar = GPT2.hugging_face | {"model_type": "gpt2_without_positions"}

    def embedding(self, g, data):
        return g.emit(embed, data.ids, self._table(g, "wte.weight"), None, T=data.seq_len, decode=False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registered in these tests alone."""
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    register(NoPositions)


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
    with pytest.raises(HandgradError, match=r"\[model\] a family is one of gpt2, .*, but got 'gpt9'"):
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
