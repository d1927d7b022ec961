"""The training loop: in which order steps are started and read, and that a step's time in the log is its own."""

import inspect

import numpy as np
import pytest

from handgrad import Trainer, backends
from handgrad.backends.cpu import CpuBackend
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY
from handgrad.data import id_dtype, write_shard
from handgrad.train.log import RunLog
from handgrad.train.loop import Due, steps
from handgrad.train.step import Step

NOTHING = Due(val=False, hellaswag=False, sample=False, save=False, stop=False)
SAVE = Due(val=False, hellaswag=False, sample=False, save=True, stop=False)


class Recorder:
    """A trainer and its backend that note what is asked of them. Step `fails` raises."""

    def __init__(self, is_asynchronous, fails=0):
        self.is_asynchronous, self.fails, self.events, self.backend = is_asynchronous, fails, [], self

    def mark(self):
        self.events.append("mark")
        return len(self.events)

    def step(self, number, lr, momentum):
        if number == self.fails:
            raise HandgradError("data", "bad tokens")
        self.events.append(f"start {number}")
        result = Step(lambda: (0.0, 0.0, "", 0))
        result.end = f"end of {number}"
        return result


def run(trainer, last, saved=()):
    """The steps as they were yielded; the caller reads each."""
    found = []
    for f in steps(trainer, lambda number: 0.0, 1, last, lambda number: SAVE if number in saved else NOTHING):
        trainer.events.append(f"read {f.number}")
        found.append(f)
    return found


def test_a_host_steps_and_reads_in_turn():
    trainer = Recorder(is_asynchronous=False)
    run(trainer, 2)
    assert trainer.events == ["mark", "start 1", "read 1", "mark", "start 2", "read 2", "mark"]


def test_a_device_has_the_next_step_before_one_is_read():
    """Except where something is due, for which it must be done."""
    trainer = Recorder(is_asynchronous=True)
    found = run(trainer, 4, saved=(3, 4))
    order = "mark, start 1, start 2, read 1, start 3, read 2, read 3, mark, start 4, read 4, mark"
    assert ", ".join(trainer.events) == order
    assert [f.due.save for f in found] == [False, False, True, True]
    assert [f.begin for f in found] == [1, "end of 1", "end of 2", 8]  # after the save, a new mark


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_a_step_that_raises_hides_none_before_it(is_asynchronous):
    trainer = Recorder(is_asynchronous, fails=3)
    with pytest.raises(HandgradError):
        run(trainer, 5)
    assert [event for event in trainer.events if "read" in event] == ["read 1", "read 2"]


class ClockedBackend(CpuBackend):
    """The cpu backend on a clock of its own, on which every call takes a second and nothing else takes any."""

    now = 0

    def bind(self, program, arena):
        bound = super().bind(program, arena)
        start_calls = bound.run

        def run(segment=None, micro_batch=ONLY):
            self.now += len(program.part(segment))
            start_calls(segment, micro_batch)

        bound.run = run
        return bound

    def mark(self):
        return self.now


@pytest.mark.parametrize("guard", ["", " --skip-loss-z 50"])
@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_step_times_are_the_steps_own(tmp_path, monkeypatch, is_asynchronous, guard):
    """Validations, samples and checkpoints every few steps take time, and no step is charged for it; each is charged
    for every call of its own, also one that is validated, and one whose update the host allows."""
    rng = np.random.default_rng(0)
    for name, count in (("train_0.bin", 5000), ("val_0.bin", 500)):
        write_shard(tmp_path / name, [rng.integers(0, 97, count)], id_dtype(97))
    seconds, rates, opened, programs, write = {}, {}, [], [], RunLog.step

    def step(self, number, **figures):
        seconds[number] = figures["step_seconds"]
        write(self, number, **figures)
        rates[number] = self.tokens_per_second

    def open_clocked(threads, precision, comm):
        opened.append(ClockedBackend(threads))
        opened[-1].is_asynchronous = is_asynchronous
        return opened[-1]

    monkeypatch.setattr(RunLog, "step", step)
    monkeypatch.setitem(backends.BACKENDS, "cpu", open_clocked)
    bind = ClockedBackend.bind
    monkeypatch.setattr(ClockedBackend, "bind", lambda self, p, arena: programs.append(p) or bind(self, p, arena))
    flags = f"--train {tmp_path}/train_*.bin --val {tmp_path}/val_*.bin --out {tmp_path}/run"
    flags += " --num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len 32"
    flags += " --batch-tokens 128 --micro-batch 2 --threads 1 --backend cpu --dtype f32"
    flags += " --steps 24 --warmup 2 --val-every 3 --val-tokens 128 --save-every 5"
    flags += " --sample-every 4 --sample-tokens 2 --prompt a" + guard
    assert main(["train", *flags.split()]) == 0
    (train,) = (p for p in programs if p.trains)
    part = {name: len(train.part(getattr(train.segments, name))) for name in ("forward_backward", "norm", "update")}
    own = 2 * part["forward_backward"] + part["norm"] + part["update"]  # two micro-batches
    assert seconds == {number: own for number in range(1, 25)}
    assert rates == pytest.approx({number: 128 / own for number in range(1, 25)})
    (backend,) = opened  # once for the whole run
    assert backend.now > 1.1 * sum(seconds.values())  # the rest took time on the same clock


def test_trainer_has_at_most_eight_parameters():
    assert len(inspect.signature(Trainer).parameters) <= 8


def test_a_mark_on_a_gpu_is_a_timing_event(monkeypatch):
    """Taking one waits for nothing, reading waits for the later one, and the driver gets its event back."""
    pytest.importorskip("cuda.bindings")
    from handgrad.backends.cuda import driver
    from handgrad.backends.cuda.backend import CudaBackend

    calls = []

    def answer(name, *values):
        monkeypatch.setattr(
            driver.cu, name, lambda *args: calls.append((name, *args)) or (driver.cu.CUresult.CUDA_SUCCESS, *values)
        )

    answer("cuEventCreate", "event")
    answer("cuEventRecord")
    answer("cuEventSynchronize")
    answer("cuEventElapsedTime", 12.5)
    monkeypatch.setattr(driver.Mark.__del__, "__defaults__", (lambda event: calls.append(("destroyed", event)),))
    backend = object.__new__(CudaBackend)
    backend.device = object.__new__(driver.Device)
    backend.device.stream = "stream"
    begin, end = backend.mark(), backend.mark()
    assert [name for name, *_ in calls] == ["cuEventCreate", "cuEventRecord"] * 2
    assert calls[1] == ("cuEventRecord", "event", "stream")
    assert backend.seconds(begin, end) == 0.0125
    assert calls[4:] == [("cuEventSynchronize", "event"), ("cuEventElapsedTime", "event", "event")]
    del begin, end
    assert calls[6:] == [("destroyed", "event")] * 2


def test_the_last_step_is_yielded_with_nothing_due():
    for is_asynchronous in (False, True):
        trainer = Recorder(is_asynchronous)
        assert [
            f.number for f in steps(trainer, lambda n: 0.0, 1, 6, lambda n: Due(False, False, False, False, False))
        ] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]
