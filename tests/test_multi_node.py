"""The scripts of runs/multi_node/, each on this machine with two CPU ranks. ssh and srun are replaced by short scripts."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import handgrad as hg
from handgrad.cli.flags import parse
from handgrad.tokenizers import chars
from handgrad.train.config import Config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "runs" / "multi_node").glob("*.sh"))
BIN = Path(sys.executable).parent
SMALL = (
    "--preset tiny --num-layers 1 --num-heads 1 --hidden-size 16 --max-seq-len 16 --micro-batch 2 --batch-tokens 64 "
    "--backend cpu --threads 1 --warmup 1 --sample-tokens 0 --val-every 0 --train text --out run"
).split()
STUBS = {
    "handgrad": f'exec {sys.executable} -m handgrad.cli "$@"',
    "ssh": 'test "$1 $2" = "-n -tt" || exit 1; test "$3" = localhost || exit 255; exec bash -c "$4"',
    # as Slurm does for a step of two tasks on this machine
    "srun": """
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_JOB_ID=$$ SLURM_STEP_ID=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & done
wait -n && wait -n""",
}


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """A function that starts a script in a folder with a small data set."""
    words = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 20_000).tolist())
    (tmp_path / "words.txt").write_text(words)
    hg.data.prepare_text([tmp_path / "words.txt"], tmp_path / "text", chars(words))
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stubs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{stubs}:{BIN}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}

    def run(script, *words, **variables):
        command = ["bash", str(ROOT / "runs" / "multi_node" / f"{script}.sh"), *words]
        return subprocess.Popen(command, cwd=tmp_path, env=env | variables, **pipes)

    return run


def finish(process, code=0):
    """The output of a script that ends in 60 s with this code."""
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize(
    ("script", "words", "variables"),
    [
        pytest.param(
            "mpirun",
            [],
            {"HOSTS": "localhost:2", "RANKS": "2", "FIRST": "localhost"},
            marks=pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="pip install '.[mpi]'"),
        ),
        ("slurm", [], {}),
        ("ssh_tcp", [], {"HOSTS": "localhost", "GPUS": "2"}),
        ("ssh_tcp", [], {"HOSTS": "localhost localhost", "GPUS": "1"}),
        pytest.param(
            "torchrun",
            ["0"],
            {"NODES": "1", "GPUS": "2", "FIRST": "localhost"},
            marks=pytest.mark.skipif(not shutil.which(BIN / "torchrun"), reason="no torchrun"),
        ),
    ],
)
def test_script_trains_two_ranks(start, tmp_path, script, words, variables):
    output = finish(start(script, *words, *SMALL, "--steps", "3", **variables))
    assert "0 is process" in output and "1 is process" in output and "2 is process" not in output
    assert output.count("step 3/3") == 1 and (tmp_path / "run" / "step_000003" / "DONE").exists()


def test_ctrl_c_stops_what_ssh_has_started_with_a_checkpoint(start, tmp_path):
    """The stub hands the script's SIGTERM to the rank, as a closing terminal sends SIGHUP."""
    process = start("ssh_tcp", *SMALL, "--steps", "1000000", HOSTS="localhost", GPUS="2")
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    assert list((tmp_path / "run").glob("step_*/DONE"))


def test_error_of_a_rank_is_the_exit_code_of_the_script(start):
    output = finish(start("ssh_tcp", *SMALL, "--batch-tokens", "777", HOSTS="localhost", GPUS="2"), 2)
    assert output.count("batch_tokens") == 1


def test_ssh_that_fails_ends_the_others(start, tmp_path):
    """A host that does not answer: the rank on the other one would wait for 28 s."""
    begin = time.monotonic()
    process = start("ssh_tcp", *SMALL, "--steps", "3", HOSTS="localhost nowhere", GPUS="1")
    finish(process, 255)
    assert time.monotonic() - begin < 15 and not (tmp_path / "run").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process is left


def test_scripts_train_the_same_run_in_a_batch_that_16_ranks_divide():
    flags = {re.search(r"(    --out .*?)    \"\$@\"", p.read_text(), re.S)[1].replace("\\\n", "") for p in SCRIPTS}
    assert len(SCRIPTS) == 4 and len(flags) == 1
    c = parse(Config, flags.pop().split(), "train")
    assert c.data.batch_tokens % (16 * c.compute.micro_batch * 1024) == 0 and c.run.resume == "auto"
    alone = (ROOT / "runs" / "gpt2_124m.sh").read_text()
    for flag in (f"--steps {c.run.steps}", f"--batch-tokens {c.data.batch_tokens}", f"--warmup {c.optim.warmup}"):
        assert flag in alone
    for path in SCRIPTS:
        text = path.read_text()
        assert os.access(path, os.X_OK) and "# edit " in text and "# needs " in text
        assert len([line for line in text.splitlines() if line and line[0] != "#"]) < 20
