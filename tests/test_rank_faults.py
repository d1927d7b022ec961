"""Ranks as processes: every way to start them gives the same bits, and whatever happens to one of them ends all, with
one message, a checkpoint where that is possible, and no process left.

HANDGRAD_SLOW_TESTS=1 runs all combinations and 30 random kills.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import handgrad as hg
from handgrad.io import checkpoint
from handgrad.tokenizers import chars

SLOW = os.environ.get("HANDGRAD_SLOW_TESTS") == "1"
MPIEXEC = Path(sys.executable).parent / "mpiexec"
mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="pip install '.[mpi]'")
FLAGS = "--preset tiny --num-layers 2 --hidden-size 32 --num-heads 2 --backend cpu --dtype f32 --threads 1 "
FLAGS += "--seq-len 16 --max-seq-len 16 --no-shuffle --sample-tokens 0 --val-every 0 --train text --save-every 0"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(sys.path),
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_NUM_THREADS": "1",
    "COLUMNS": "200",
}
END = 25.0  # seconds in which a command must end


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 20_000).tolist())
    (folder / "words.txt").write_text(words)
    hg.data.prepare_text([folder / "words.txt"], folder / "text", chars(words))
    return folder / "text"


@pytest.fixture(autouse=True)
def folder(text_folder, tmp_path, monkeypatch):
    """A folder to work in, with a folder of tokens."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text_folder, "text")
    return tmp_path


class Command:
    """A command in a session of its own, so that whatever it starts can be found."""

    def __init__(self, command, env):
        self.file = Path(f"output_{time.monotonic_ns()}")
        with self.file.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )

    @property
    def output(self):
        return self.file.read_text(errors="replace")

    def wait_for(self, pattern, seconds=END):
        """The match of a pattern in the output, as soon as it is there."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < end and self.process.poll() is None, self.output
            time.sleep(0.01)
        return found

    def ranks(self):
        """The process of every rank."""
        line = self.wait_for(r"ranks +(0 is process [^;]*);")[1]
        return [int(number) for number in re.findall(r"process (\d+)", line)]

    def end(self, code):
        """The output of a command that ends with this code, and leaves no process."""
        try:
            self.process.wait(END)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output) from None
        assert self.process.returncode == code, self.output
        return self.output

    def members(self):
        """Processes of the session that run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state not in "ZX":
                    found.append(int(stat.parent.name))
        return found

    def assert_nobody_left(self, seconds=0.0):
        end = time.monotonic() + seconds
        while members := self.members():
            assert time.monotonic() < end, (members, self.output)
            time.sleep(0.02)

    def kill(self):
        for member in self.members():
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(flags, *, before=(), code="", env=None, out="run"):
    """`handgrad train` with these flags. code: what every Python process of it does first, `rank` being its number in
    a command that starts its own ranks."""
    env = ENVIRONMENT | (env or {})
    if code:
        site = Path(f"site_{out.replace('/', '_')}")
        site.mkdir(exist_ok=True)
        number = 'import os\nrank = int(os.environ.get("HANDGRAD_RANK", "0").split()[0])\n'
        (site / "sitecustomize.py").write_text(number + code)
        env["PYTHONPATH"] = f"{site.absolute()}{os.pathsep}{env['PYTHONPATH']}"
    command = [*before, sys.executable, "-m", "handgrad.cli", "train", *FLAGS.split(), *flags.split(), "--out", out]
    started = Command(command, env)
    try:
        yield started
    finally:
        started.kill()


def done(flags, **options):
    """The output of a command that succeeds."""
    with running(flags, **options) as command:
        output = command.end(0)
        command.assert_nobody_left()
        return output


def together(*commands, code=0):
    """The outputs of commands that run at the same time: flags and options of each."""
    with running(commands[0][0], **commands[0][1]) as command:
        others = together(*commands[1:], code=code) if len(commands) > 1 else []
        return [command.end(code), *others]


def files(out):
    """What a run leaves that must be the same bits."""
    found = {path.relative_to(out): path.read_bytes() for path in Path(out).glob("step_*/*.safetensors")}
    found["losses"] = [(row["loss"], row["grad_norm"]) for row in rows(out)]
    assert len(found) >= 3
    return found


def rows(out):
    return [row for row in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "loss" in row]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


STEPS = "--steps 3 --micro-batch 2"

# starts ----------------------------------------------------------------------------------------------------------------

LOOP = """
import sys
from handgrad.cli.__main__ import main
for zero in "0123":
    code = main(["train", *sys.argv[1:], "--zero", zero, "--out", f"mpi_{zero}"])
    if code:
        sys.exit(code)
"""


@mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_own_ranks_give_the_bits_of_mpiexec(ranks):
    """All stages of ZeRO; and the same bits again."""
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, "-c", LOOP, *FLAGS.split(), *STEPS.split()]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=2 * END, capture_output=True)
    for zero in range(4) if SLOW else (ranks - 2, ranks):
        output = done(f"{STEPS} --ranks {ranks} --zero {zero}", out=f"own_{zero}")
        assert output.count("step 3/3") == output.count("generate: handgrad generate") == 1  # rank 0 alone speaks
        assert files(f"own_{zero}") == files(f"mpi_{zero}")
    if SLOW or ranks == 2:
        done(f"{STEPS} --gpus {ranks} --zero {zero}", out="again")
        assert files("again") == files(f"own_{zero}")


def test_ranks_by_hand_meet_at_a_port_or_by_a_file_and_as_torchrun_starts_them():
    """All give the bits of ranks that one command starts."""
    done(f"{STEPS} --ranks 2", out="own")
    for where in (f"localhost:{free_port()}", "meet"):
        out = f"hand_{where[:4]}"
        together(*((f"{STEPS} --ranks 2 --rank {r} --rendezvous {where}", {"out": out}) for r in (1, 0)))
        assert files(out) == files("own") and not Path("meet").exists()
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    together(*((STEPS, {"out": "torchrun", "env": variables | {"RANK": str(r)}}) for r in (0, 1)))
    assert files("torchrun") == files("own")


@pytest.mark.parametrize(
    ("flag", "told"), [("--lr 1e-4", "--lr 0.002, but got 0.0001"), ("--zero 3", "--zero 1, but got 3")]
)
def test_ranks_with_other_settings_are_refused(flag, told):
    """Otherwise they would train another model than rank 0 says, without a word."""
    flags = f"{STEPS} --ranks 2 --rendezvous meet --rank"
    with running(f"{flags} 0") as first, running(f"{flags} 1 {flag}") as second:
        assert f"all ranks have the settings of rank 0: {told} on rank 1" in first.end(2)
        assert second.end(2) == "" and not Path("run").exists()


def test_three_ranks_by_hand():
    port = free_port()
    flags = f"{STEPS} --ranks 3 --rendezvous 127.0.0.1:{port} --ranks-per-machine 2 --rank"
    outputs = together(*((f"{flags} {r}", {}) for r in (2, 0, 1)))
    assert [output.count("step 3/3") for output in outputs] == [0, 1, 0] and len(rows("run")) == 3


@mpi
def test_ranks_of_mpiexec_without_mpi4py_meet(tmp_path):
    code = "import sys\nsys.modules['mpi4py'] = None\n"
    code += "import importlib.util as u\nfind = u.find_spec\n"
    code += "u.find_spec = lambda name, *rest: None if name == 'mpi4py' else find(name, *rest)\n"
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp")}
    assert done(STEPS, before=[str(MPIEXEC), "-n", "2"], code=code, env=env).count("step 3/3") == 1
    assert not list((tmp_path / "tmp").glob("handgrad*"))
    done(f"{STEPS} --ranks 2", out="own")
    assert files("run") == files("own")


# two hosts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    """Commands that run what follows on one of two hosts, and the address of the first: network namespaces."""
    names = [f"hg{os.getpid()}{letter}" for letter in "ab"]
    links = [f"v{name}" for name in names]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10)

    try:
        for name in names:
            try:
                made = ip("netns", "add", name)
            except OSError:
                pytest.skip("needs ip, of iproute2")
            if made.returncode:
                pytest.skip(f"needs network namespaces: {made.stderr.strip()}")
        if ip(
            "link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1]
        ).returncode:
            pytest.skip("needs veth pairs")
        for i, (name, link) in enumerate(zip(names, links)):
            for words in (f"addr add 10.77.0.{i + 1}/24 dev {link}", f"link set {link} up", "link set lo up"):
                assert ip("-n", name, *words.split()).returncode == 0
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1"
    finally:
        for name in names:
            with suppress(OSError):
                ip("netns", "del", name)


@pytest.mark.parametrize("kind", ["port", "file"])
def test_two_hosts_train(hosts, kind):
    before, first = hosts
    where = f"{first}:29511" if kind == "port" else "meet"
    flags = f"{STEPS} --ranks 2 --ranks-per-machine 1 --rendezvous {where} --rank"
    together(*((f"{flags} {r}", {"before": before[r]}) for r in (1, 0)))
    assert len(rows("run")) == 3


# killed ranks ----------------------------------------------------------------------------------------------------------

LONG = "--steps 100000 --micro-batch 2"
SLEEPS = "import sys, time\nif rank == {rank} and 'train' in sys.orig_argv: time.sleep(2)\n"
SLOW_SAVE = """
import sys, time
if rank == 0 and "train" in sys.orig_argv:
    from handgrad.io import checkpoint
    complete = checkpoint._complete_folder
    def slow(folder, meta, before_done):
        if '"step": 5,' not in meta:
            print("IN CHECKPOINT", flush=True)
            time.sleep(1.5)
        complete(folder, meta, before_done)
    checkpoint._complete_folder = slow
"""


@pytest.mark.parametrize(("ranks", "victim"), [(2, 1), (2, 0), (3, 2)])
def test_killed_rank_ends_all(ranks, victim):
    """In steps: within a second or two, by name."""
    with running(f"{LONG} --ranks {ranks}") as command:
        numbers = command.ranks()
        command.wait_for("step 1/")
        begin = time.monotonic()
        os.kill(numbers[victim], signal.SIGKILL)
        if victim:
            output = command.end(1)
            command.assert_nobody_left()
            assert f"[rank {victim}] its process was ended by signal 9." in output
        else:
            command.end(-9)
            command.assert_nobody_left(10)
            output = command.output
            assert "[rank 0] its process has ended." in output
        assert time.monotonic() - begin < 10 and output.count("[rank") == 1, output
        assert "No checkpoint was written." in output


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_before_ranks_have_met(victim):
    """Rank 1 or 2 is not there yet, so the others wait."""
    with running(f"{LONG} --ranks 3", code=SLEEPS.format(rank=2 if victim == 0 else 1)) as command:
        end = time.monotonic() + 10
        while len(command.members()) < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.8)
        number = command.process.pid
        if victim:
            number = next(m for m in command.members() if rank_of(m) == 1)
        begin = time.monotonic()
        os.kill(number, signal.SIGKILL)
        if victim:
            output = command.end(2)
            command.assert_nobody_left()
            assert output.count("[ranks] rank 1: its process was ended by signal 9.") == 1
        else:
            command.end(-9)
            command.assert_nobody_left(8)
            assert command.output.count("[ranks] rank 0: its process has ended.") == 1
        assert time.monotonic() - begin < 9 and command.output.count("[rank") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_during_a_checkpoint(victim):
    """If it is rank 0, the checkpoint before it is the newest whole one; otherwise rank 0 still completes it."""
    with running(f"{LONG} --ranks 2 --save-every 5", code=SLOW_SAVE) as command:
        numbers = command.ranks()
        command.wait_for("IN CHECKPOINT")
        os.kill(numbers[victim], signal.SIGKILL)
        output = command.end(1 if victim else -9)
        command.assert_nobody_left(10)
        assert f"[rank {victim}] its process " in output + command.output
        assert "are lost; resume: handgrad train --resume run" in output + command.output
        assert checkpoint.newest("run") == Path("run") / f"step_{10 if victim else 5:06d}"
    if not victim:
        done(f"--ranks 3 --micro-batch 2 --steps 12 --resume run --batch-tokens {3 * 32}")


def rank_of(process):
    """The rank of a process that `handgrad train --ranks` has started."""
    with suppress(OSError):
        for word in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"HANDGRAD_RANK="):
                return int(word.partition(b"=")[2].split()[0])
    return 0


def test_end_of_the_first_rank_before_ranks_have_met_ends_the_others():
    """Ctrl-C that only rank 0 hears."""
    with running(f"{LONG} --ranks 2", code=SLEEPS.format(rank=1)) as command:
        end = time.monotonic() + 10
        while len(command.members()) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.8)
        os.kill(command.process.pid, signal.SIGINT)
        begin = time.monotonic()
        assert "interrupted" in command.end(130)
        command.assert_nobody_left()
        assert time.monotonic() - begin < 3


# stopped ranks ---------------------------------------------------------------------------------------------------------

IMPATIENT = """
import sys
if "train" in sys.orig_argv:
    from handgrad.backends.ranks import watch, processes, sockets
    watch.TIMEOUT_SECONDS, watch.HEARTBEAT_SECONDS = 1.2, 0.15
    processes.EXIT_SECONDS = sockets.LAST_EXCHANGE_SECONDS = 0.4
"""


@pytest.mark.parametrize("victim", [1, 0])
def test_rank_that_is_stopped_ends_all(victim):
    with running(f"{LONG} --ranks 2", code=IMPATIENT) as command:
        numbers = command.ranks()
        command.wait_for("step 1/")
        os.kill(numbers[victim], signal.SIGSTOP)
        told = rf"\[rank {victim}\] it has not answered for 1 s: its process is stopped"
        if victim:
            assert re.search(told, command.end(1))
        else:  # rank 1 tells it; rank 0 does once it goes on
            command.wait_for(told)
            os.kill(numbers[victim], signal.SIGCONT)
            command.end(1)
        command.assert_nobody_left(3)


def test_ranks_that_are_stopped_for_a_while_go_on():
    """One of them for less than the limit; all of them, as by Ctrl-Z and fg, for longer than it."""
    with running(f"{LONG} --ranks 2", code=IMPATIENT) as command:
        numbers = command.ranks()
        command.wait_for("step 1/")
        for stopped, seconds in (([1], 0.5), ([0], 0.5), ([1, 0], 1.8)):
            for rank in stopped:
                os.kill(numbers[rank], signal.SIGSTOP)
            before = len(rows("run"))
            time.sleep(seconds)
            for rank in stopped:
                os.kill(numbers[rank], signal.SIGCONT)
            end = time.monotonic() + 5
            while len(rows("run")) <= before + 20:
                assert command.process.poll() is None and time.monotonic() < end, command.output
                time.sleep(0.05)
        os.kill(numbers[0], signal.SIGTERM)
        assert "stopped after step" in command.end(130)
        command.assert_nobody_left()


# errors and signals ----------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
if rank == 0 and "train" in sys.orig_argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes of a file
"""
BUG = """
import sys
if "train" in sys.orig_argv:
    from handgrad.train import loop
    due = loop.due_after
    def due_after(run, interrupt, number):
        if run.trainer.comm.rank == 1 and number == 7:
            raise ZeroDivisionError("a bug")
        return due(run, interrupt, number)
    loop.due_after = due_after
"""


@pytest.mark.parametrize(
    ("code", "exit_code", "told", "step"),
    [(FULL, 2, "must be writable, but got", 0), (BUG, 1, "ZeroDivisionError: a bug", 7)],
    ids=["full disk on rank 0", "bug on rank 1"],
)
def test_failure_of_one_rank_ends_all(code, exit_code, told, step):
    with running("--steps 20 --micro-batch 2 --save-every 10 --ranks 2", code=code) as command:
        output = command.end(exit_code)
        command.assert_nobody_left()
    assert told in output
    assert not step or (Path("run") / f"step_{step:06d}" / "DONE").exists(), output


def test_error_on_one_rank_is_told_once_and_leaves_a_checkpoint():
    """Step 5 of 2 x 2 sequences: rank 1 reads sequences 18 and 19, and the first is damaged."""
    shard = next(Path("text").glob("train_*.bin"))
    raw = bytearray(shard.read_bytes())
    at = len(raw) - 2 * hg.data.tokens("text", 16, 16).shards[0].count + 2 * 16 * 18
    raw[at + 6 : at + 8] = (60_000).to_bytes(2, "little")
    shard.write_bytes(raw)
    with running("--steps 50 --micro-batch 2 --ranks 2") as command:
        output = command.end(2)
        command.assert_nobody_left()
    assert output.count("must hold ids below the vocabulary size") == 1 and "[rank 1] [data]" in output
    assert "saved step 4" in output and (Path("run") / "step_000004" / "DONE").exists()


def test_mistake_on_all_ranks_is_told_once_and_leaves_no_folder():
    with running("--steps 5 --ranks 2 --batch-tokens 777") as command:
        output = command.end(2)
        command.assert_nobody_left()
    assert output.count("batch_tokens") == output.count("but got") == 1 and not Path("run").exists()


SIGNALS = [(sent, rank) for sent in ("SIGINT", "SIGTERM", "SIGHUP") for rank in (0, 1)]


@pytest.mark.parametrize(("sent", "rank"), SIGNALS if SLOW else [SIGNALS[i] for i in (0, 3, 5)])
def test_signal_to_one_rank_stops_all_with_a_checkpoint(sent, rank):
    with running(f"{LONG} --ranks 2") as command:
        numbers = command.ranks()
        command.wait_for("step 1/")
        os.kill(numbers[rank], getattr(signal, sent))
        output = command.end(130)
        command.assert_nobody_left()
    last = int(re.search(r"stopped after step (\d+), saved in run", output)[1])
    assert (Path("run") / f"step_{last:06d}" / "DONE").exists() and rows("run")[-1]["step"] == last


def test_ctrl_c_on_a_terminal_reaches_all_and_the_second_ends_them_at_once():
    with running(f"{LONG} --ranks 2 --batch-tokens 640000") as command:  # a step of many seconds
        numbers = command.ranks()
        time.sleep(0.5)
        for _ in range(2):
            os.killpg(command.process.pid, signal.SIGINT)
            time.sleep(0.3)
        assert command.end(130).count("[rank") == 0
        command.assert_nobody_left(1)
        assert len(numbers) == 2


# random kills ----------------------------------------------------------------------------------------------------------


def test_resume_after_random_kills():
    """On another number of ranks, with another stage of ZeRO: it starts at the newest whole checkpoint."""
    draw, step = random.Random(7), 0
    for i in range(30 if SLOW else 6):
        ranks, zero = draw.choice([2, 3]) if i % 3 else 1 + i % 2, draw.randrange(4)
        flags = f"{LONG} --micro-batch 1 --batch-tokens 96 --save-every 5 --keep-last 3 --zero {zero}"
        flags += f" --ranks {ranks}" * (ranks > 1) + " --resume run" * (step > 0)
        with running(flags) as command:
            command.wait_for(r"step \d+/" if not step else rf"resumed at step {step}\b")
            time.sleep(draw.uniform(0.05, 0.4))
            numbers = command.ranks() if ranks > 1 else [command.process.pid]
            victim = draw.randrange(ranks)
            os.kill(numbers[victim], signal.SIGKILL)
            command.end(1 if victim else -9)
            command.assert_nobody_left(10)
        newest = checkpoint.newest("run")
        assert newest is not None, command.output
        assert int(newest.name[5:]) >= step
        step = int(newest.name[5:])
    done(f"--steps {step + 3} --ranks 2 --micro-batch 1 --batch-tokens 96 --zero 3 --resume run")
    assert [row["step"] for row in rows("run")] == list(range(1, step + 4))
