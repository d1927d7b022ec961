"""Output that goes away, signals, and errors in the middle of a run: what was trained is kept, and one line says so."""

import errno
import io
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.output import Output
from handgrad.data import id_dtype, write_shard
from handgrad.io import checkpoint, complete, newest
from handgrad.train.config import from_names
from handgrad.train.folder import flat
from handgrad.train.log import RunLog
from handgrad.train.log_file import read_log
from handgrad.train.run import train
from handgrad.train.trainer import Trainer

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists() or not stat.S_ISCHR(FULL.stat().st_mode), reason="needs /dev/full")
HANDGRAD = [sys.executable, "-m", "handgrad.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder of shards of ids below 97, and characters for them."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    for name, count in (("train_0.bin", 5000), ("val_0.bin", 500)):
        write_shard(folder / name, [np.cumsum(rng.integers(0, 3, count)) % 97], id_dtype(97))
    characters = "".join(map(chr, range(33, 130)))
    meta = {"tokenizer": {"kind": "chars", "characters": characters}, "vocab_size": 97, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": {}, "val": {}}))
    return str(folder)


def config(words, out, **run):
    usual = dict(
        out=str(out), steps=8, micro_batch=2, threads=1, save_every=100, val_every=0, sample_tokens=0, dtype="f32"
    )
    model = dict(num_layers=1, num_heads=2, hidden_size=32, max_seq_len=16)
    return from_names(usual | model | dict(train=words, warmup=4) | run)


CODE = """
import json, sys
from handgrad.cli import __main__, train as verb
from handgrad.train.config import from_names
from handgrad.train.run import train
verb.main = lambda argv: train(from_names(json.loads(sys.argv[1])))
sys.exit(__main__.main(["train"]))
"""


def command(c):
    """`handgrad train` with these settings, as a command."""
    return [sys.executable, "-c", CODE, json.dumps(flat(asdict(c)))]


def shell(words_, command_, **kwargs):
    """A finished process of a shell's command; "$@" in it are the words."""
    usual = dict(env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=120)
    return subprocess.run(["bash", "-c", command_, "bash", *map(str, words_)], **usual | kwargs)


def is_whole(out, steps=8):
    """Whether the run has come to its end, with a log that holds its steps alone."""
    lines = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return (out / f"step_{steps:06d}" / "DONE").exists() and (out / "report.html").exists()


def told(out, reason):
    return f"[handgrad] the output cannot be written: {reason}; training continues; its log is {out / 'log.jsonl'}\n"


# the stream -----------------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream that takes `count` texts and then fails; its descriptor is that of a file."""

    def __init__(self, count, error, file):
        super().__init__()
        self.count, self.error, self.file = count, error, file

    def write(self, text):
        self.count -= 1
        if self.count < 0:
            raise self.error
        return super().write(text)

    def fileno(self):
        return self.file.fileno()


def test_a_stream_is_lost_once(tmp_path):
    heard = []
    with open(tmp_path / "file", "w") as file:
        stream = Broken(1, OSError(errno.EIO, "Input/output error"), file)
        out = Output(stream, heard.append)
        assert [out.write("one"), out.write("two"), out.write("three")] == [3, 3, 5]
        assert heard == [stream.error] and stream.getvalue() == "one"
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))  # what is pending fails no more


def test_a_slow_reader_is_not_lost(tmp_path):
    with open(tmp_path / "file", "w") as file:
        stream = Broken(0, BlockingIOError(errno.EAGAIN, "busy"), file)
        out = Output(stream, lambda error: pytest.fail("lost"))
        out.write("one")
        stream.count = 9
        out.write("two")
    assert stream.getvalue() == "two"


def test_output_wraps_output_once():
    inner = Output(io.StringIO(), lambda error: pytest.fail("the inner one hears"))
    assert Output(inner)._stream is inner._stream and not Output(inner).isatty()


# train ----------------------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_does_not_end_the_run(words, tmp_path):
    out = tmp_path / "run"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    with subprocess.Popen(command(config(words, out, val_every=1)), **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == told(out, "Broken pipe")
    lines = read_log(out / "log.jsonl")
    assert process.returncode == 0 and is_whole(out) and all("val_loss" in line for line in lines)


@needs_full
@pytest.mark.parametrize("redirect", ["> /dev/full", "2>&1 > /dev/full", "> /dev/full 2>&1"])
def test_a_full_disk_behind_the_output_does_not_end_the_run(words, tmp_path, redirect):
    out = tmp_path / "run"
    done = shell(command(config(words, out)), f'"$@" {redirect}', stdout=subprocess.PIPE)
    assert done.returncode == 0 and is_whole(out)
    line = told(out, "No space left on device")
    is_both = redirect == "> /dev/full 2>&1"
    assert done.stdout + done.stderr == ("" if is_both else line)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_are_closed(words, tmp_path, closed):
    """No file of the run gets their numbers: what is printed does not get into the log."""
    out = tmp_path / "run"
    done = shell(command(config(words, out)), f'"$@" {closed}', stdout=subprocess.PIPE)
    assert done.returncode == 0 and is_whole(out)
    is_told = ">&-" in closed.split() and "2>&-" not in closed.split()
    assert done.stderr == (told(out, "Bad file descriptor") if is_told else "")
    assert ("generate: handgrad generate" in done.stdout) == (">&-" not in closed.split())


def on_terminal(c, is_controlling):
    """(process, other end) of a run on a terminal of its own, which is its controlling terminal or not."""
    leader, follower = pty.openpty()

    def take():
        os.setsid()
        if is_controlling:
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    how = dict(stdin=follower, stdout=follower, stderr=follower, preexec_fn=take, env=ENVIRONMENT | {"TERM": "xterm"})
    process = subprocess.Popen(command(c), **how)
    os.close(follower)
    return process, leader


@pytest.mark.parametrize("is_controlling", [False, True])
def test_a_terminal_that_closes(words, tmp_path, is_controlling):
    """Without SIGHUP the run goes on in silence; with it, a checkpoint is saved."""
    out = tmp_path / "run"
    process, leader = on_terminal(config(words, out, steps=4000), is_controlling)
    shown = b""
    while b"tok/s" not in shown:
        shown += os.read(leader, 65536)
    os.close(leader)
    code = process.wait(timeout=120)
    if is_controlling:
        assert code == 130 and newest(out).name == f"step_{read_log(out / 'log.jsonl')[-1]['step']:06d}"
        assert (out / "report.html").exists()
    else:
        assert code == 0 and is_whole(out, 4000)


def test_an_ignored_sighup_stays_ignored(words, tmp_path):
    """As under nohup."""
    out = tmp_path / "run"
    how = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command(config(words, out, steps=2000)), env=ENVIRONMENT, **how)
    after_lines(out, process, 5)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and is_whole(out, 2000)


def test_a_second_sighup_does_not_prevent_the_checkpoint(words, tmp_path):
    """A terminal that closes and the shell in it send one each."""
    out = tmp_path / "run"
    process = subprocess.Popen(command(config(words, out, steps=100_000)), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    after_lines(out, process, 5)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 130
    assert newest(out).name == f"step_{read_log(out / 'log.jsonl')[-1]['step']:06d}"


def after_lines(out, process, count):
    end = time.time() + 120
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)


# other verbs ----------------------------------------------------------------------------------------------------------


@needs_full
@pytest.mark.parametrize("verb", ["--help", "--version", "explain tiny --threads 1", "train --help", "ops --threads 1"])
def test_a_full_disk_behind_another_verb_is_one_line(verb):
    done = shell([*HANDGRAD, *verb.split()], '"$@" > /dev/full')
    assert done.returncode == 2
    assert done.stderr == "[handgrad] standard output cannot be written: No space left on device.\n"
    assert shell([*HANDGRAD, *verb.split()], '"$@" > /dev/full 2>&1').returncode == 2


@pytest.mark.parametrize("verb", ["--help", "explain tiny --threads 1"])
def test_a_closed_output_of_another_verb_is_one_line(verb):
    done = shell([*HANDGRAD, *verb.split()], '"$@" >&-')
    assert done.returncode == 2
    assert done.stderr == "[handgrad] standard output cannot be written: Bad file descriptor.\n"


@needs_full
@pytest.mark.parametrize("redirect", ["2> /dev/full", "2>&-", "<&- >&- 2>&-"])
def test_a_mistake_that_cannot_be_told_keeps_its_exit_code(redirect):
    assert shell([*HANDGRAD, "trian"], f'"$@" {redirect}').returncode == 2


def test_a_reader_of_another_verb_that_leaves_ends_it_silently():
    done = shell([*HANDGRAD, "ops", "--threads", "1"], 'set -o pipefail; "$@" | true')
    assert (done.returncode, done.stderr) == (0, "")


@needs_full
def test_generate_into_a_full_disk(words, tmp_path):
    out = tmp_path / "run"
    assert train(config(words, out, steps=1), quiet=True) == 0
    done = shell([*HANDGRAD, "generate", out, "--prompt", "a", "--threads", "1"], '"$@" > /dev/full')
    assert done.returncode == 2
    assert done.stderr == "[handgrad] standard output cannot be written: No space left on device.\n"
    done = shell([*HANDGRAD, "eval", out, "--threads", "1"], '"$@" > /dev/full')
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "val" in next(iter(json.loads((out / "eval.json").read_text()).values()))  # what was measured is kept


# before the first step ------------------------------------------------------------------------------------------------


def test_the_entry_point_imports_nothing_large():
    code = "import sys, handgrad.cli.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"numpy", "rich", "tyro", "ml_dtypes", "safetensors", "tokenizers", "difflib", "email"}


@pytest.mark.parametrize("module", ["numpy", "ml_dtypes", "tyro", "rich"])
@pytest.mark.parametrize(
    "start", [["-m", "handgrad.cli.__main__"], ["-c", "from handgrad.cli.__main__ import main; main()"]]
)
def test_ctrl_c_while_modules_are_imported(tmp_path, module, start):
    """Also where the module turns KeyboardInterrupt into an error of its own, as C extensions do."""
    text = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(10**6): pass\n"
    (tmp_path / f"{module}.py").write_text(
        text + "except BaseException:\n    raise ImportError('half of it') from None\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
    ready = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  a background job ignores it
    command_ = [sys.executable, *start, "train"]
    done = subprocess.run(command_, env=environment, capture_output=True, text=True, preexec_fn=ready, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "[handgrad] interrupted.\n")


def test_ctrl_c_in_code_made_from_text_is_told_like_any_other(tmp_path):
    """`dataclass` and `namedtuple` run such code when a module is imported."""
    text = "import sys, types\nverb = sys.modules['handgrad.cli.train'] = types.ModuleType('handgrad.cli.train')\n"
    (tmp_path / "sitecustomize.py").write_text(text + "verb.main = lambda argv: exec('raise KeyboardInterrupt')\n")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
    done = subprocess.run([*HANDGRAD, "train"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "[handgrad] interrupted.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["resolve.Trainer", "run.describe", "run.show"])
def test_a_signal_before_the_first_step_leaves_nothing(words, tmp_path, number, place):
    """In the middle of what is built, and when the run folder is already full."""
    out = tmp_path / "run"
    module, name = place.split(".")
    code = f"import signal, handgrad.train.{module} as m\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += (
        f"was = m.{name}\ndef hit(*a, **k):\n    was(*a, **k)\n    signal.raise_signal({int(number)})\nm.{name} = hit\n"
    )
    words_ = command(config(words, out))
    words_[2] = code + words_[2]
    done = subprocess.run(words_, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "[handgrad] interrupted.\n") and not out.exists()


# errors after the first step ------------------------------------------------------------------------------------------

ERRORS = [RuntimeError("boom"), OSError(5, "Input/output error"), HandgradError("eval", "no luck"), KeyboardInterrupt()]


def fails_in_validation(monkeypatch, error, at=4):
    validate = Trainer.validate

    def fail(self, *args):
        if self.last_step == at:
            raise error
        return validate(self, *args)

    monkeypatch.setattr(Trainer, "validate", fail)


@pytest.mark.parametrize("error", [*ERRORS, SystemExit(3), MemoryError()], ids=lambda error: type(error).__name__)
def test_an_error_leaves_a_checkpoint_of_the_last_step(words, tmp_path, monkeypatch, capsys, error):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fails_in_validation(patch, error)
        with pytest.raises(type(error)) as raised:
            train(config(words, out, val_every=2))
    assert raised.value is error
    assert [path.name for path in complete(out)] == ["step_000004"]
    assert (out / "report.html").exists() and json.loads((out / "run.json").read_text())["summary"]["tokens"] == 4 * 32
    assert f"saved step 4; resume: handgrad train --resume {out}" in capsys.readouterr().out
    assert train(config(words, out, val_every=2, resume=str(out)), quiet=True) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line] == list(range(1, 9))
    assert train(config(words, tmp_path / "whole", val_every=2), quiet=True) == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        assert (out / "step_000008" / name).read_bytes() == (tmp_path / "whole" / "step_000008" / name).read_bytes()


def test_an_error_before_the_first_step_is_done_leaves_no_checkpoint(words, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        train(config(words, tmp_path / "run"), quiet=True)
    assert not complete(tmp_path / "run")


def test_a_log_that_cannot_be_written_leaves_a_checkpoint(words, tmp_path, monkeypatch):
    write = RunLog._write

    def fail(self, line):
        if line["step"] >= 5:
            raise HandgradError("log", f"{self.path} must be writable", "No space left on device")
        write(self, line)

    monkeypatch.setattr(RunLog, "_write", fail)
    with pytest.raises(HandgradError, match="log.jsonl must be writable, but got No space left on device"):
        train(config(words, tmp_path / "run"), quiet=True)
    assert newest(tmp_path / "run").name == "step_000005"


def test_an_error_whose_checkpoint_fails_too_names_both(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fails_in_validation(monkeypatch, HandgradError("eval", "no luck"))
    monkeypatch.setattr(
        "handgrad.io.checkpoint._write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    flags = f"--train {words} --num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len 16"
    flags += f" --out {out} --steps 8 --micro-batch 2 --threads 1 --val-every 2 --sample-tokens 0"
    assert main(["train", *flags.split()]) == 2
    line = capsys.readouterr().err
    assert line.startswith("[eval] no luck. And step 4 could not be saved: [checkpoint] ") and line.count("\n") == 1
    assert f"{out}/step_000004 must be writable, but got No space." in line


def test_a_sample_that_fails_does_not_end_the_run(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def fail(self, *_, **__):
        raise HandgradError("generate", "this token has no text", 97)

    monkeypatch.setattr(Trainer, "generate", fail)
    assert train(config(words, out, sample_tokens=4, sample_every=3, prompt="a")) == 0
    assert is_whole(out)
    assert capsys.readouterr().out.count("no sample: [generate] this token has no text, but got 97.") == 3  # 3, 6, 8


# a run folder that goes away ------------------------------------------------------------------------------------------


def at_step(monkeypatch, number, do):
    """Calls `do` when a step begins and no checkpoint is being written."""
    step = Trainer.step

    def then(self, at, *rates):
        if at == number:
            self.wait_saved()
            do()
        return step(self, at, *rates)

    monkeypatch.setattr(Trainer, "step", then)


def vanish(out, how):
    if how == "moved":
        out.rename(out.with_name("elsewhere"))
    elif how == "log":
        (out / "log.jsonl").unlink()
    elif how == "emptied":
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        shutil.rmtree(out)
        if how == "replaced":
            out.mkdir()


@pytest.mark.parametrize("how", ["deleted", "moved", "emptied", "replaced", "log"])
def test_a_run_folder_that_vanishes_is_made_again(words, tmp_path, monkeypatch, how):
    """With its settings, the log from the start, and a checkpoint at once; the run ends as if nothing had happened."""
    out = tmp_path / "run"
    at_step(monkeypatch, 5, lambda: vanish(out, how))
    saved = []
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self, step, *a, **k: saved.append(step) or save(self, step, *a, **k))
    assert train(config(words, out, save_every=3), quiet=True) == 0
    lines = read_log(out / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    text = f"{out} or its log was deleted or moved; both are here again"
    assert [line for line in lines if "event" in line] == [{"step": 5, "event": text}]
    assert saved == [3, 5, 6, 8]
    assert {"config.json", "tokenizer-spec.json", "memory.txt", "main.log", "report.html"} <= set(os.listdir(out))
    assert len((out / "main.log").read_text().splitlines()) == 8 + 1  # and a validation
    monkeypatch.undo()
    assert train(config(words, out, steps=9, resume=str(out)), quiet=True) == 0


def test_a_run_folder_that_vanishes_under_a_checkpoint_loses_no_step(words, tmp_path, monkeypatch):
    """The run ends, since a checkpoint could not be written; the last step is saved, in a folder that is whole."""
    out = tmp_path / "run"
    write, deleted = checkpoint._write_tensors, []

    def delete(path, tensors):
        write(path, tensors)
        if not deleted:
            deleted.append(path)
            shutil.rmtree(out, ignore_errors=True)

    monkeypatch.setattr(checkpoint, "_write_tensors", delete)
    with pytest.raises(HandgradError, match="step_000003 must be writable, but got .*No such file"):
        train(config(words, out, save_every=3, steps=2000), quiet=True)
    monkeypatch.undo()
    step = int(newest(out).name[5:])
    assert step >= 3 and [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line][:3] == [1, 2, 3]
    assert train(config(words, out, steps=step + 2, resume=str(out)), quiet=True) == 0


def test_a_run_folder_in_which_another_run_lies_is_left_alone(words, tmp_path, monkeypatch):
    out, other = tmp_path / "run", tmp_path / "other"
    assert train(config(words, other, steps=2), quiet=True) == 0
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}

    def replace():
        out.rename(tmp_path / "mine")
        other.rename(out)

    at_step(monkeypatch, 5, replace)
    rule = r"\[run\] the run folder '.*/run' was deleted or moved during the run, and another run is there now"
    with pytest.raises(HandgradError, match=rule):
        train(config(words, out, save_every=2), quiet=True)
    assert {path: (out / path.relative_to(other)).read_bytes() for path in before} == before
    assert {path for path in out.rglob("*") if path.is_file()} == {out / path.relative_to(other) for path in before}
    assert newest(tmp_path / "mine").name == "step_000004"


# leftovers ------------------------------------------------------------------------------------------------------------


def test_what_dead_processes_left_is_deleted_at_the_next_start(words, tmp_path):
    out = tmp_path / "run"
    assert train(config(words, out, save_every=4), quiet=True) == 0
    alive = os.getppid()
    for name in (f".report.html.tmp-{2**22 + 1}", f".config.json.tmp-{os.getpid()}", f".eval.json.tmp-{alive}"):
        (out / name).write_text("half")
    for name in (f".step_000009.tmp-{2**22 + 1}", f"step_000009.tmp-{alive}", f".step_000004.tmp-{alive}"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_text("half")
    assert train(config(words, out, steps=9, resume=str(out)), quiet=True) == 0
    left = {path.name for path in out.iterdir() if ".tmp-" in path.name}
    assert left == {f".eval.json.tmp-{alive}"}
