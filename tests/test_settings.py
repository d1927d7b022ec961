"""Settings flow from flags to Precision, Execution, Guard and Start, which check their own words."""

import pytest

from handgrad import Execution, Guard, HandgradError, Precision, Start
from handgrad.backends import best_dtype, open_backend, resolve_name
from handgrad.cli.__main__ import main
from handgrad.cli.flags import parse
from handgrad.core.dtypes import BF16, F32
from handgrad.models import GPT2, Lora, registry
from handgrad.train.config import Config
from handgrad.train.resolve import resolve


@pytest.mark.parametrize(
    ("words", "working", "tf32", "splits"),
    [
        ({}, F32, False, False),
        ({"dtype": "tf32"}, F32, True, False),
        ({"dtype": "bf16"}, BF16, False, True),
        ({"dtype": "bf16", "master_weights": False}, BF16, False, False),
    ],
)
def test_precision_in_the_planners_terms(words, working, tf32, splits):
    precision = Precision(**words)
    assert (precision.working, precision.tf32, precision.splits_weights) == (working, tf32, splits)
    assert precision.gradients is F32 and Precision(grad_dtype="bf16").gradients is BF16


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Precision("f16"), "[precision] dtype is one of f32, tf32, bf16, but got 'f16'."),
        (lambda: Precision(grad_dtype="tf32"), "[precision] grad_dtype is one of f32, bf16, but got 'tf32'."),
        (lambda: Execution(0), "[execution] micro_batch is at least 1, but got 0."),
        (lambda: Execution(1, head_bytes=-1), "[execution] head_bytes is not negative, but got -1."),
        (
            lambda: Execution(1, recompute="all"),
            "[execution] recompute is one of none, act, act_norm, block, but got 'all'.",
        ),
        (
            lambda: Execution(1, train_only="h.*"),
            "[execution] train_only is a tuple of patterns, but got 'h.*'. hint: ('h.*',)",
        ),
        (lambda: Lora(4, targets="qkv"), "[lora] targets is a tuple of names, but got 'qkv'. hint: ('qkv',)"),
        (lambda: Execution(1, check="inf"), "[execution] check is one of off, nan, but got 'inf'."),
        (
            lambda: Execution(1, extra_programs=("val", "vale")),
            "[execution] an extra program is one of val, sample, score, but got 'vale'.",
        ),
        (
            lambda: Start(init="lmc"),
            "[train] weights start as 'random', 'llmc', or a model on disk, but got 'lmc'.",
        ),
        (lambda: open_backend("gpu"), "[backend] the backend is one of auto, ref, cpu, cuda, but got 'gpu'."),
    ],
)
def test_wrong_words_are_named(make, line):
    with pytest.raises(HandgradError) as error:
        make()
    assert str(error.value) == line


def test_flags_become_one_precision_and_one_execution(tmp_path):
    flags = "--num-layers 1 --micro-batch 3 --recompute block --head-mib 2 --check nan"
    flags += " --backend cpu --threads 1 --dtype bf16 --no-master-weights --deterministic"
    flags += " --skip-loss-z 4 --skip-grad-z 5 --seed 7 --sample-tokens 0"
    run = resolve(parse(Config, flags.split(), "train"), tmp_path)
    trainer = run.trainer
    assert trainer.precision == Precision("bf16", "f32", master_weights=False, deterministic=True)
    guard = Guard(loss_z=4.0, grad_z=5.0)
    sizes = dict(micro_batch=3, recompute="block", head_bytes=2 << 20, extra_programs=("val",))
    assert trainer.execution == Execution(**sizes, backend="cpu", threads=1, check="nan", guard=guard)
    assert trainer.backend.threads == 1 and trainer.arena.scalars(trainer.program).seed == 7


def test_what_auto_stands_for_is_known_before_a_backend_is_opened():
    assert resolve_name("auto") == open_backend("auto").name
    assert best_dtype("ref") == "f32" and best_dtype("cuda") == "bf16"
    assert best_dtype("cpu") == ("bf16" if open_backend("cpu").isa == "avx512bf16" else "f32")


def test_the_family_is_that_of_the_preset(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # --help in one column
    flags = "--backend cpu --threads 1 --sample-tokens 0 --micro-batch 1 --num-layers 1".split()
    run = resolve(parse(Config, flags, "train"), tmp_path)
    assert type(run.trainer.model) is GPT2 and run.config.model.family == "gpt2"
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    names = ", ".join(registry.FAMILIES)
    assert f"--family STR architecture: {names}; empty: the preset's" in text


def test_an_unknown_family_is_refused_before_the_run_folder_is_made(tmp_path, capsys):
    assert main(["train", "--family", "gpt9", "--out", str(tmp_path / "run")]) == 2
    names = ", ".join(registry.FAMILIES)
    assert capsys.readouterr().err == f"[model] a family is one of {names}, but got 'gpt9'. hint: did you mean gpt2?\n"
    assert not (tmp_path / "run").exists()
