"""--config FILE: the settings of a run, or names and values in JSON, YAML or TOML. Flags override it."""

import json

import pytest

from handgrad.cli.__main__ import main
from handgrad.cli.flags import parse
from handgrad.cli.train import from_file
from handgrad.train.config import Config, from_names

NAMES = {"lr": 3e-4, "steps": 7, "micro-batch": 2, "schedule": "wsd", "shuffle": False}
TEXTS = {
    "a.json": json.dumps(NAMES),
    "b.json": json.dumps(
        {"optim": {"lr": 3e-4, "schedule": "wsd"}, "run": {"steps": 7, "micro_batch": 2}, "data": {"shuffle": False}}
    ),
    "c.yaml": "lr: 3.0e-4\nsteps: 7\nmicro_batch: 2\nschedule: wsd\nshuffle: false\n",
    "names.yaml": "learning-rate: 3e-4\nmax_steps: 7\nmicro-batch: 2\nschedule: wsd\nshuffle: false\n",
    "d.yml": "optim:\n  lr: 3.0e-4\n  schedule: wsd\nrun: {steps: 7}\ncompute: {micro-batch: 2}\nshuffle: no\n",
    "e.toml": 'lr = 3e-4\nsteps = 7\nschedule = "wsd"\n[compute]\nmicro_batch = 2\n[data]\nshuffle = false\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_file_gives_the_same_settings(name, tmp_path):
    (tmp_path / name).write_text(TEXTS[name])
    argv = ["--config", str(tmp_path / name), "--micro-batch", "5"]
    c = parse(Config, argv, "train", from_names(from_file(tmp_path / name)))
    assert (c.optim.lr, c.run.steps, c.optim.schedule, c.data.shuffle) == (3e-4, 7, "wsd", False)
    assert c.compute.micro_batch == 5  # the flag goes first
    assert c.optim.beta1 == Config().optim.beta1


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "a.json",
            '{"stepps": 3}',
            "[config] settings are the flags of handgrad train, but got 'stepps'. hint: did you mean --steps?",
        ),
        ("a.yaml", "compile: true", "but got 'compile'. hint: leave it out: there is nothing to compile"),
        ("a.toml", "gradient_accumulation_steps = 4", "hint: --batch-tokens, a multiple of --micro-batch x --seq-len"),
        (
            "a.yaml",
            "schedule: cosin",
            "[optim] --schedule is one of cosine, linear, constant, wsd, inverse_sqrt, polynomial, step, cosine_with_restarts, but got 'cosin'. hint: did",
        ),
        (
            "a.json",
            '{"backend": "gpu"}',
            "[compute] --backend is one of auto, cpu, cuda, ref, but got 'gpu'. hint: did you mean cuda?",
        ),
        ("a.json", '{"steps": "3"}', "[run] --steps is a whole number, but got '3'."),
        ("a.json", '{"steps": -3}', "[run] --steps is a number from 0 on, but got -3."),
        ("a.json", "[]", "no names and values."),
        ("a.json", "{", "is not json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
        ("a.json", '{"steps": 3,\n "lr": }', "is not json: Expecting value: line 2 column 8 (char 20)."),
        ("a.json", "[" * 100_000, "[config] --config '"),
        ("a.yaml", "a: [", "is not yaml: expected the node content, but found '<stream end>', line 1, column 5."),
        ("a.yaml", "steps: 3\n lr: 1", "is not yaml: mapping values are not allowed here, line 2, column 4."),
        ("a.yaml", "a: !b 1", "is not yaml: could not determine a constructor for the tag '!b', line 1, column 4."),
        ("a.yaml", "1: 2", "no names and values."),
        ("a.toml", "steps = ", "is not toml: Invalid value (at end of document)."),
        ("a.toml", "steps = 3\nlr = x", "is not toml: Invalid value (at line 2, column 6)."),
        ("a.yaml", "config: b.yaml", "names no other file of settings, but got 'b.yaml'."),
        ("a.ini", "steps = 3", "[config] --config is a file .json, .yaml, .yml, .toml, but got '"),
    ],
)
def test_bad_files_are_one_line(name, text, line, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["train", "--config", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert not out and line in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("train --config nowhere.json".split()) == 2
    assert capsys.readouterr().err == "[config] --config 'nowhere.json': no such file.\n"
    (tmp_path / "dir.json").mkdir()
    assert main("train --config dir.json".split()) == 2
    assert "--config must be a file, but got dir.json, which is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["book.txt", "book.txt/run"])
def test_a_run_folder_that_is_a_file(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a book")
    assert main(["train", "--out", out]) == 2
    line = f"[run] the run folder '{out}' cannot be written: 'book.txt' is a file. hint: another --out\n"
    assert capsys.readouterr().err == line and (tmp_path / "book.txt").read_text() == "a book"


def test_the_settings_of_a_run_start_another(tmp_path, capsys):
    flags = "--num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len 32 --micro-batch 2 --threads 1 --backend cpu"
    flags += " --steps 2 --val-tokens 64 --sample-tokens 0 --lr 7e-4"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "a")]) == 0
    config = tmp_path / "a" / "config.json"
    argv = ["--config", str(config), "--out", str(tmp_path / "b"), "--seed", "5"]
    assert main(["train", *argv]) == 0
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    differ = {(g, n) for g in a for n in a[g] if a[g][n] != b[g][n]}
    assert differ == {("run", "out"), ("run", "config"), ("run", "seed")}
    shown = " ".join(capsys.readouterr().out.rpartition(" settings ")[2].split())
    assert "lr 0.0007" in shown and "seed 5" in shown


SMALL = "--num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len 32 --micro-batch 2 --threads 1 --backend cpu"
SMALL += " --val-tokens 64 --sample-tokens 0"


def test_a_file_may_name_the_folder_and_the_run(tmp_path, monkeypatch):
    """A run's saved settings, then the file's, then the flags, wherever `out` and `resume` stand."""
    monkeypatch.chdir(tmp_path)
    assert main(f"train {SMALL} --steps 2 --lr 0.5 --dropout 0.3".split()) == 0  # runs/shakespeare-001
    (tmp_path / "mine.yaml").write_text("out: runs/mine\nsteps: 2\n")
    assert main(f"train {SMALL} --config mine.yaml --resume auto".split()) == 0
    optim, model = (json.loads((tmp_path / "runs/mine/config.json").read_text())[group] for group in ("optim", "model"))
    assert (optim["lr"], model["dropout"]) == (2e-3, 0.0)
    (tmp_path / "on.yaml").write_text("resume: runs/shakespeare-001\nsteps: 4\nlr: 0.25\n")
    assert main("train --config on.yaml --lr 0.125".split()) == 0
    saved = json.loads((tmp_path / "runs/shakespeare-001/config.json").read_text())
    assert (saved["run"]["steps"], saved["optim"]["lr"], saved["model"]["dropout"]) == (4, 0.125, 0.3)


def test_another_schedule_ends_where_its_own_default_says(tmp_path):
    assert main(f"train {SMALL} --steps 2 --out {tmp_path}/a".split()) == 0
    for schedule, final in (("constant", 1.0), ("linear", 0.0)):
        argv = f"train --config {tmp_path}/a/config.json --schedule {schedule} --out {tmp_path}/{schedule}"
        assert main(argv.split()) == 0
        assert json.loads((tmp_path / schedule / "config.json").read_text())["optim"]["final"] == final
