"""Runs the README's commands as they stand, except for the install command, which CI runs itself."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def run(command: str, folder: Path) -> str:
    """Runs a command line in the folder, with this interpreter's `handgrad`; returns its standard output."""
    script = re.sub(r"^handgrad", f"{sys.executable} -m handgrad.cli", command)
    done = subprocess.run(script, shell=True, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `handgrad train` without arguments has run."""
    folder = tmp_path_factory.mktemp("readme")
    assert "pip install . && handgrad train" in SHELL
    run("handgrad train", folder)
    return folder


def test_no_placeholder_is_left():
    log = (Path(__file__).parent.parent / "dev" / "LOG.md").read_text(encoding="utf-8")
    assert not re.search(r"[A-Z]+_(FIGURES|PLACEHOLDER)", README + log)


def test_train_without_arguments_reaches_readme_loss(folder):
    """Validation loss of at most 1.90 after 2000 steps, and a complete run folder."""
    out = folder / "runs" / "shakespeare-001"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = lines[-1]
    print(f"val loss {last['val_loss']:.4f} after {last['step']} steps in {last['seconds']:.1f} s")
    assert last["step"] == 2000 and last["val_loss"] <= 1.90
    assert set(last) == {"step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert "val_loss" not in lines[0]
    assert (out / "step_002000" / "DONE").exists() and (out / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("command", [line for line in SHELL if line.startswith("handgrad ")])
def test_shell_commands(folder, command):
    assert len(run(command, folder)) > 50


def test_readme_flags_exist(folder):
    """Every flag that the README and these pages mention appears in the --help of a command."""
    helps = "".join(
        run(f"handgrad {verb} --help", folder)
        for verb in (
            "train",
            "generate",
            "explain",
            "data text",
            "data chat",
            "data labels",
            "data fineweb",
            "data tokens",
            "data tokenizer",
            "eval",
            "convert",
            "chat",
            "report",
            "ops",
            "profile",
        )
    )
    helps += " --model --tasks"  # of the lm-evaluation-harness
    pages = [
        README,
        *((ROOT / "docs" / name).read_text() for name in ("data.md", "optimizers.md", "chat.md", "finetune.md")),
    ]
    for flag in set(re.findall(r"--[a-z][a-z.\-]+", "".join(pages))):
        assert flag in helps, flag


def test_resume_command(folder):
    """Resuming a finished run succeeds and leaves its log unchanged."""
    command = re.search(r"`(handgrad train --resume[^`]*)`", README)[1]
    before = (folder / "runs" / "shakespeare-001" / "log.jsonl").read_text()
    run(command, folder)
    assert (folder / "runs" / "shakespeare-001" / "log.jsonl").read_text() == before


def test_data_command(folder):
    (folder / "play.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    command = re.search(r"`(handgrad data text [^`]*)`", README)[1].replace("FILE...", "play.txt")
    run(command, folder)
    train = re.search(r"`(handgrad train --train [^`]*)`", README)[1]
    run(
        f"{train} --steps 3 --micro-batch 2 --sample-tokens 8 --val-tokens 256 --num-layers 1",
        folder,
    )


def test_python_example(tmp_path):
    assert len(PYTHON) == 1
    done = subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ROMEO" not in done.stdout and len(done.stdout.splitlines()) >= 3
