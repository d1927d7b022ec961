"""--config FILE: the settings of a run, or names and values in JSON, YAML or TOML. Flags override it."""

import json

import pytest

from handgrad.cli.__main__ import main
from handgrad.cli.flags import parse
from handgrad.cli.train import from_file
from handgrad.train.config import Config

NAMES = {"lr": 3e-4, "steps": 7, "micro-batch": 2, "schedule": "wsd", "shuffle": False}
TEXTS = {
    "a.json": json.dumps(NAMES),
    "b.json": json.dumps(
        {"optim": {"lr": 3e-4, "schedule": "wsd"}, "run": {"steps": 7, "micro_batch": 2}, "data": {"shuffle": False}}
    ),
    "c.yaml": "lr: 3.0e-4\nsteps: 7\nmicro_batch: 2\nschedule: wsd\nshuffle: false\n",
    "d.yml": "optim:\n  lr: 3.0e-4\n  schedule: wsd\nrun: {steps: 7}\ncompute: {micro-batch: 2}\nshuffle: no\n",
    "e.toml": 'lr = 3e-4\nsteps = 7\nschedule = "wsd"\n[compute]\nmicro_batch = 2\n[data]\nshuffle = false\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_file_gives_the_same_settings(name, tmp_path):
    (tmp_path / name).write_text(TEXTS[name])
    argv = ["--config", str(tmp_path / name), "--micro-batch", "5"]
    c = parse(Config, argv, "train", from_file(tmp_path / name, parse(Config, argv, "train"), None))
    assert (c.optim.lr, c.run.steps, c.optim.schedule, c.data.shuffle) == (3e-4, 7, "wsd", False)
    assert c.compute.micro_batch == 5  # the flag goes first
    assert c.optim.beta1 == Config().optim.beta1


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.json", '{"stepps": 3}', "[config] settings are the flags of handgrad train, but got 'stepps'."),
        ("a.json", '{"steps": "3"}', "[run] --steps is a whole number, but got '3'."),
        ("a.json", '{"steps": -3}', "[run] --steps is a number from 0 on, but got -3."),
        ("a.json", "[]", "no names and values."),
        ("a.json", "{", "[config] --config '"),
        ("a.json", "[" * 100_000, "[config] --config '"),
        ("a.yaml", "a: [", "[config] --config '"),
        ("a.yaml", "1: 2", "no names and values."),
        ("a.toml", "steps = ", "[config] --config '"),
        ("a.ini", "steps = 3", "[config] --config is a file .json, .yaml, .yml, .toml, but got '"),
    ],
)
def test_bad_files_are_one_line(name, text, line, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["train", "--config", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert not out and line in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


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
