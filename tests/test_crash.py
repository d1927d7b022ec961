"""kill -9 and power cuts: whatever the instant, a run that goes on from what is left ends bit for bit as if it had not
been stopped, and nothing is lost but the steps since the newest complete checkpoint."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from handgrad import io
from handgrad.core.errors import HandgradError
from handgrad.io import checkpoint

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}


def python(*words, **variables):
    """A finished process of this interpreter."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300)


# whole runs -----------------------------------------------------------------------------------------------------------

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


# every instant of one save --------------------------------------------------------------------------------------------


def no_flush():
    checkpoint.flush = lambda path: None


def a_forgotten_file():
    flush = checkpoint.flush
    checkpoint.flush = lambda path: None if path.name == checkpoint.STATE else flush(path)


def the_name_first():
    """The folder gets its name, and DONE, before it is complete."""

    def save(out_dir, step, tensors, state, meta, when_read):
        folder = out_dir / f"step_{step:06d}"
        folder.mkdir()
        for name, content in (
            (checkpoint.META, f'{{"step": {step}, "value": {meta["value"]}}}'),
            (checkpoint.DONE, ""),
        ):
            (folder / name).write_text(content)
            checkpoint.flush(folder / name)
        for name, arrays in ((checkpoint.MODEL, tensors), (checkpoint.STATE, state)):
            checkpoint._write_tensors(folder / name, arrays)
            checkpoint.flush(folder / name)
        when_read()
        checkpoint.prune(out_dir, 1)

    checkpoint.save = save


def in_order():
    """The writer as it is."""


def the_old_one_first():
    """The older checkpoint is deleted before the new one is there."""
    save = checkpoint.save

    def hasty(out_dir, *args, **kwargs):
        checkpoint._delete(out_dir / "step_000001")
        return save(out_dir, *args, **kwargs)

    checkpoint.save = hasty


def value(number):
    return {"w": np.full(1000, number, np.float32)}, {"m": np.full(10, number)}, {"value": number}


def end_before(count, power, out):
    """Ends this process before its operation on files number `count`. power: what was not flushed by then is lost."""
    flush, flushed = checkpoint.flush, {path.stat().st_ino for path in out.rglob("*")}

    def remember(path):
        flush(path)
        flushed.add(path.stat().st_ino)

    done = 0

    def hook(event, args):
        nonlocal done
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"):
            done += 1
            if done == count:
                lost = [path for path in out.rglob("*") if path.stat().st_ino not in flushed] if power else []
                for path in filter(Path.is_file, lost):
                    os.truncate(path, 0)
                os._exit(9)

    checkpoint.flush = remember
    sys.addaudithook(hook)


def instants(power, mutation):
    """Saves step 2 beside step 1 again and again, ended before each of its operations; prints what each time left."""
    with tempfile.TemporaryDirectory() as folder:
        out, code, count = Path(folder) / "run", 9, 0
        while code == 9:
            shutil.rmtree(out, ignore_errors=True)
            io.save(out, 1, *value(1))
            count += 1
            child = os.fork()
            if child == 0:
                end_before(count, power, out)
                mutation()
                writer = io.Writer()
                writer.save(out, 2, *value(2))
                writer.wait()
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(code, left(out), flush=True)


def left(out):
    """The value that the newest checkpoint holds in all its parts; "damage" otherwise."""
    try:
        path = io.newest(out)
        number = io.load_meta(path, {"value": int})["value"]
        w = io.load(path, {"w": ((1000,), "float32")})["w"]
        m = io.load_state(path, {"m": ((10,), "int64")})["m"]
        return number if (w == number).all() and (m == number).all() else "damage"
    except (HandgradError, TypeError):
        return "damage"


def outcomes(power, mutation):
    done = python(__file__, int(power), mutation.__name__)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("power", [False, True])
def test_an_end_at_any_instant_leaves_a_complete_checkpoint(power):
    codes, values = zip(*outcomes(power, in_order))
    assert codes == ("9",) * (len(codes) - 1) + ("0",) and len(codes) > 12
    assert values[0] == "1" and values[-1] == "2" and list(values) == sorted(values)


@pytest.mark.parametrize(
    ("power", "mutation"),
    [
        (True, no_flush),
        (True, a_forgotten_file),
        (False, the_name_first),
        (True, the_name_first),
        (False, the_old_one_first),
    ],
)
def test_a_careless_writer_is_noticed(power, mutation):
    assert "damage" in {value for _, value in outcomes(power, mutation)}


if __name__ == "__main__":
    instants(sys.argv[1] == "1", globals()[sys.argv[2]])
