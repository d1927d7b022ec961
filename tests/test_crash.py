"""kill -9 at random instants of whole runs: a run that is resumed ends bit for bit as if it had not been stopped, and
nothing is lost but the steps since the newest complete checkpoint. tests/crash stops runs at chosen instants."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}


def python(*words, **variables):
    """A finished process of this interpreter."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300)


CRASH = ROOT / "bench" / "crash.py", "--steps", 60


def test_p10_a_few_kills_of_whole_runs(tmp_path):
    """bench/crash.py does it fifty times; its result is bench/results/crash.txt."""
    done = python(*CRASH, "--kills", 5, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit: 5 of 5" in done.stdout


FORGETS = """
from handgrad.train.trainer import Trainer
resume = Trainer.resume
def forgetful(self, **how):
    step = resume(self, **how)
    for name, values in self._state().items():
        if step and name.startswith("v."):
            values.fill(0)
    return step
Trainer.resume = forgetful
"""


def test_a_resume_that_forgets_the_second_moments_is_noticed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FORGETS)  # every Python process of the run begins with it
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    done = python(*CRASH, "--kills", 2, "--folder", tmp_path / "runs", PYTHONPATH=path)
    assert done.returncode == 1 and "differs" in done.stdout, done.stdout + done.stderr
