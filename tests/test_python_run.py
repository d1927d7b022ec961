"""A Trainer with a run folder leaves what `handgrad train` leaves: every verb takes the folder."""

import json

import pytest

import handgrad as hg
from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.train.log_file import read_log

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 60


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with shards of a small text and their characters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    hg.data.prepare_text(["text.txt"], "words", tokenizers.chars(TEXT))
    return tmp_path


def trainer(out="run", **kind):
    data = hg.data.tokens("words", seq_len=16, batch_tokens=64)
    model = hg.models.GPT2(vocab_size=len(set(TEXT)), max_seq_len=16, num_layers=1, num_heads=2, hidden_size=32)
    execution = hg.Execution(micro_batch=2, threads=1, backend="cpu")
    return hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, out=out, **kind)


def test_every_verb_takes_the_folder(here, capsys):
    run = trainer()
    val = hg.data.tokens("words", seq_len=16, batch_tokens=16, split="val", shuffle=False)
    results = [run.step(step, 1e-3) for step in range(1, 7)]
    loss = run.evaluate(val)
    run.save(6)
    lines = [line for line in read_log("run/log.jsonl") if "loss" in line]
    assert [(line["step"], line["loss"], line["lr"]) for line in lines] == [
        (r + 1, x.loss, 1e-3) for r, x in enumerate(results)
    ]
    assert read_log("run/log.jsonl")[-1] == {"step": 6, "val_loss": loss}
    assert main("generate run --prompt To --max-tokens 4".split()) == 0
    assert main("report run".split()) == 0 and "val" in (here / "run/report.html").read_text()
    assert main("convert run hf".split()) == 0
    capsys.readouterr()
    assert main("eval run --threads 1".split()) == 0
    assert float(json.loads((here / "run/eval.json").read_text())["step_000006"]["val"]["loss"]) == pytest.approx(
        loss, 1e-3
    )
    assert main("train --resume run --steps 8 --sample-tokens 0".split()) == 0
    assert [line["step"] for line in read_log("run/log.jsonl") if "loss" in line] == list(range(1, 9))


def test_a_trainer_resumes_its_log_and_refuses_another_run(here):
    first = trainer()
    for step in range(1, 5):
        first.step(step, 1e-3)
        if step == 3:
            first.save(3)
    with pytest.raises(hg.HandgradError, match=r"\[train\] 'run' already holds a run. hint: resume\(\) continues it"):
        trainer().step(1, 1e-3)
    again = trainer()
    assert again.resume() == 3
    again.step(4, 1e-3)
    again.save(4)
    assert [line["step"] for line in read_log("run/log.jsonl")] == [1, 2, 3, 4]
    started_over = trainer("other")
    assert started_over.resume() == 0 and started_over.step(1, 1e-3).loss > 0


def test_without_a_folder_nothing_is_written(here):
    before = sorted(here.rglob("*"))
    run = trainer(out=None)
    run.step(1, 1e-3)
    assert sorted(here.rglob("*")) == before


def test_defaults_are_the_command_lines(here):
    """dtype and backend auto, and the sampling of `generate`."""
    from handgrad.backends import best_dtype, resolve_name
    from handgrad.cli.generate import Generate
    from handgrad.infer.load import MAX_TOKENS, Loaded
    from handgrad.train.config import Config

    assert trainer().precision.dtype == best_dtype("cpu")
    assert hg.Execution(1).backend == Config().compute.backend == "auto" and resolve_name("auto") in ("cpu", "cuda")
    assert (
        hg.Execution(1).recompute == Config().compute.recompute and hg.Execution(1).threads == Config().compute.threads
    )
    assert (Generate.max_tokens, Generate.temperature) == (MAX_TOKENS, hg.Sampling().temperature)
    assert (Generate.top_k, Generate.top_p, Generate.seed) == (0, hg.Sampling().top_p, hg.Sampling().seed)
    assert Loaded.generate.__defaults__[1:3] == (Generate.max_tokens, Generate.temperature)


def test_objects_show_themselves(here):
    run = trainer()
    result = run.step(1, 1e-3)
    assert repr(result) == f"Step(loss={result.loss:.4f}, grad_norm={result.grad_norm:.4f})"
    assert repr(run).startswith("Trainer(GPT2(vocab_size=") and ", step 1, " in repr(run)
    run.save(1)
    model = hg.load("run", threads=1)
    assert repr(model).endswith(f"tokenizer chars of {len(set(TEXT))} tokens)")
    assert repr(model.engine).endswith("0 tokens in the cache)")
    assert len(model.generate("To", max_tokens=3)) == 3
