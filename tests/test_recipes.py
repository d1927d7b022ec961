"""The recipes of runs/: their flags are parsed, their figures computed again, the smallest is run, killed and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handgrad.cli.__main__ import main
from handgrad.cli.flags import parse
from handgrad.models import preset
from handgrad.train.config import Config

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "runs").glob("*.sh") if path.name != "until_done.sh")
HOUR = 3.50  # dollars, of one H100


@pytest.fixture
def shell(tmp_path):
    """A function that runs a script where `handgrad` is the given text, a shell script; returns the finished process."""

    def run(script, handgrad, *words, background=False, **variables):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "handgrad").write_text(f"#!/usr/bin/env bash\n{handgrad}\n")
        (folder / "handgrad").chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PAUSE": "0",
            "OPENBLAS_NUM_THREADS": "1",
        }
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
        start = dict(
            cwd=tmp_path,
            start_new_session=True,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        command = ["bash", str(ROOT / "runs" / script), *words]
        return subprocess.Popen(command, **start) if background else subprocess.run(command, timeout=300, **start)

    return run


def calls(shell, name, *words):
    """The command lines with which a recipe calls handgrad."""
    done = shell(name, 'printf "%s\\0" "$@"; printf "\\n"', *words)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_flags_are_a_run(shell, recipe):
    *data, (verb, *flags) = calls(shell, recipe.name)
    c = parse(Config, flags, "train")
    assert verb == "train" and c.run.resume == "auto" and c.run.out == f"runs/{recipe.stem.replace('_', '-')}"
    model = preset(c.model.preset, **({"max_seq_len": c.model.max_seq_len} if c.model.max_seq_len else {}))
    tokens = c.compute.micro_batch * (c.data.seq_len or model.max_seq_len)
    assert c.data.batch_tokens % tokens == 0
    named = {"gpt2_124m": 124e6, "gpt2_350m": 354e6, "gpt2_774m": 774e6, "gpt2_1558m": 1557e6, "gpt3_125m": 125e6}
    embedding = 50304 * model.hidden_size + model.max_seq_len * model.hidden_size
    about = embedding + 12 * model.num_layers * model.hidden_size**2
    if recipe.stem in named:
        assert about == pytest.approx(named[recipe.stem], rel=0.01)
    for words in data:
        assert words[0] == "data" and words[words.index("--out") + 1] == c.data.train


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_data_line_is_one_that_handgrad_data_takes(shell, recipe, capsys):
    for words in calls(shell, recipe.name)[:-1]:
        assert main([*words, "--help"]) == 0
        assert "--out" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_time_and_cost_are_what_its_figures_say(shell, recipe):
    """Steps times tokens over the measured rate: no 121 % of the hardware's peak."""
    comment = " ".join(line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert all(f" {word} " in comment for word in ("loss", "time", "cost"))
    found = re.search(r"([\d,]+) steps of ([\d,]+) tokens at ([\d,]+) a second", comment)
    if not found:
        assert recipe.stem in ("shakespeare", "tinystories")
        return
    steps, tokens, rate = (int(word.replace(",", "")) for word in found.groups())
    c = parse(Config, calls(shell, recipe.name)[-1][1:], "train")
    assert (steps, tokens) == (c.run.steps, c.data.batch_tokens)
    hours = steps * tokens / rate / 3600
    assert float(re.search(r"time +([\d.]+) hours on one H100", comment)[1]) == pytest.approx(hours, rel=0.02)
    assert float(re.search(r"cost +\$([\d,.]+) ", comment)[1].replace(",", "")) == pytest.approx(HOUR * hours, rel=0.02)
    m = preset(c.model.preset)
    params = (50304 + m.max_seq_len + 12 * m.num_layers * m.hidden_size) * m.hidden_size
    flops = 6 * params + 6 * m.num_layers * m.hidden_size * m.max_seq_len
    assert 0.45 < rate * flops / 989.4e12 < 0.8  # products alone reach 790 of the 989.4
    source = re.search(r"bench/results/(\w+\.json)", comment)
    assert bool(source) == ("(computed:" in comment)
    if source:
        assert str(rate) in (ROOT / "bench" / "results" / source[1].replace(".json", ".txt")).read_text()


# the supervisor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ((0,), 1, 0),
        ((137, 139, 1, 0), 4, 0),  # killed, a crash, an exception; then the end
        ((2, 0), 1, 2),  # a mistake would be made again
        ((1, 2, 0), 2, 2),
        ((130, 0), 1, 130),  # Ctrl-C
        ((1,) * 9, 5, 1),  # dies at once, again and again
    ],
)
def test_until_done(shell, tmp_path, codes, starts, code):
    script = f"n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n; c=({' '.join(map(str, codes))}); exit ${{c[$n]}}"
    done = shell("until_done.sh", script, "handgrad", "train", "a b")
    assert (int((tmp_path / "n").read_text()), done.returncode) == (starts, code), done.stderr
    assert done.stderr.count("again in 0 s") == starts - 1


REAL = f'echo $$ > pid; exec {sys.executable} -c "import sys; from handgrad.cli.__main__ import main; sys.exit(main())" "$@"'
FEW = "--steps 200 --save-every 5 --val-every 0 --threads 1 --sample-tokens 8 --micro-batch 2".split()


def test_shakespeare_is_killed_and_started_again_and_ends_well(shell, tmp_path):
    process = shell("shakespeare.sh", REAL, *FEW, background=True)
    run = tmp_path / "runs" / "shakespeare"
    while not list(run.glob("step_??????/DONE")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "exit code 137; again in 0 s" in stderr and "resumed at step" in stdout
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == list(range(1, 201))
    again = shell("shakespeare.sh", REAL, *FEW)  # finished: nothing to do, no loop
    assert again.returncode == 0 and (run / "step_000200" / "DONE").exists()


def test_ctrl_c_stops_the_recipe_too(shell, tmp_path):
    """As a terminal sends it, to all processes of the group: the run saves, and is not started again."""
    process = shell("shakespeare.sh", REAL, *FEW, background=True)
    log = tmp_path / "runs" / "shakespeare" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 20):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "again in" not in stderr and "saved in runs/shakespeare" in stdout


def test_a_mistake_in_a_recipe_ends_it(shell):
    done = shell("shakespeare.sh", REAL, "--stepz", "5")
    assert done.returncode == 2 and "[train] flags are those of --help, but got '--stepz'" in done.stderr
