import io
import json
import math
import os
import re
import sys
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.train import log as log_module
from handgrad.train.log import RunLog
from handgrad.train.log_file import dump, read_log, rows
from handgrad.train.log_text import clock, plain_line, short

KEYS = ["step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"]


def write(log, steps, **more):
    usual = {"lr": 1e-3, "grad_norm": 0.5, "tokens": 100, "step_seconds": 0.1}
    for step in steps:
        log.step(step, **({"loss": 5.0 - step} | usual | more))


def log_of(folder, steps, **more):
    with RunLog(folder, 100, quiet=True) as log:
        write(log, steps, **more)
    return folder / "log.jsonl"


# the file -----------------------------------------------------------------------------------------------------------


def test_a_line_has_exactly_the_promised_keys(tmp_path):
    with RunLog(tmp_path, 2, quiet=True) as log:
        write(log, [1])
        write(log, [2], val_loss=4.5)
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert list(first) == KEYS
    assert sorted(second) == sorted([*KEYS, "val_loss"])
    assert (second["step"], second["loss"], second["val_loss"], second["lr"]) == (2, 3.0, 4.5, 1e-3)


def test_a_line_is_in_the_file_as_soon_as_step_returns(tmp_path):
    log = RunLog(tmp_path, 2, quiet=True)
    write(log, [1])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]
    log.close()
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    path = log_of(tmp_path, [1], loss=value, grad_norm=value, val_loss=value)
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] is None and line["grad_norm"] is None and line["val_loss"] is None


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    (line,) = read_log(log_of(tmp_path, [1], loss=numpy.float32("nan"), grad_norm=numpy.float32(0.25)))
    assert line["loss"] is None and line["grad_norm"] == 0.25


def test_a_fresh_run_starts_an_empty_log(tmp_path):
    log_of(tmp_path, [1, 2, 3])
    assert [line["step"] for line in read_log(log_of(tmp_path, [1]))] == [1]


def test_resume_drops_later_steps_and_a_torn_end(tmp_path):
    path = log_of(tmp_path, range(1, 8))
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    with RunLog(tmp_path, 100, resumed_at=4, quiet=True) as log:
        write(log, range(5, 10))
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert [json.loads(line)["step"] for line in after] == list(range(1, 10))


def test_seconds_go_on_where_the_earlier_attempt_stopped(tmp_path):
    path = log_of(tmp_path, [1, 2])
    lines = read_log(path)
    lines[0]["seconds"], lines[1]["seconds"] = 100.0, 900.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with RunLog(tmp_path, 100, resumed_at=1, quiet=True) as log:
        assert 100.0 <= log.seconds < 110.0
        write(log, [2])
    assert 100.0 <= read_log(path)[-1]["seconds"] < 110.0


def test_a_rewrite_that_fails_keeps_the_old_log(tmp_path, monkeypatch):
    path = log_of(tmp_path, range(1, 8))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(HandgradError, match="No space left on device"):
        RunLog(tmp_path, 100, resumed_at=4, quiet=True)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["log.jsonl", "main.log"]


def test_an_event_is_a_line_of_its_own(tmp_path):
    with RunLog(tmp_path, 2, quiet=True) as log:
        log.event(1, "skipped: non-finite gradient")
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "event": "skipped: non-finite gradient"}]


def test_the_rate_is_a_mean_that_leaves_out_the_first_step(tmp_path):
    log = RunLog(tmp_path, 100, quiet=True)
    rates = []
    for step, seconds in enumerate([10.0, 1.0, 2.0, 4.0], 1):
        write(log, [step], tokens=100, step_seconds=seconds)
        rates.append(log.tokens_per_second)
    log.close()
    mean_seconds = (0.95**2 * 1.0 + 0.95 * 2.0 + 4.0) / (0.95**2 + 0.95 + 1)
    assert rates == pytest.approx([10.0, 100.0, 100 * (0.95 + 1) / (0.95 + 2), 100 / mean_seconds])


# bad input ----------------------------------------------------------------------------------------------------------


def test_a_missing_log_has_no_lines(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


def test_damage_costs_only_its_own_line(tmp_path):
    path = log_of(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": x'))
    assert [line["step"] for line in read_log(path)] == [1, 3]
    assert [row.number for row in rows(path) if row.line is None] == [2]


def test_resume_sets_a_damaged_row_aside_and_says_so(tmp_path):
    path = log_of(tmp_path, range(1, 8))
    before = path.read_bytes().splitlines(keepends=True)
    bad = b'\xff{"step": 3, \n'
    path.write_bytes(b"".join([*before[:2], bad, *before[3:]]))
    for _ in range(2):  # a second time there is nothing more to set aside
        with RunLog(tmp_path, 100, resumed_at=6, quiet=True):
            pass
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:5] == [*before[:2], *before[3:6]]
    text = "1 of the log's rows were damaged and are now in log.jsonl.bad: row 3"
    assert [json.loads(line) for line in after[5:]] == [{"step": 6, "event": text}]
    assert (tmp_path / "log.jsonl.bad").read_bytes() == bad
    assert list(streams(tmp_path / "main.log")["trl"]) == [0, 1, 3, 4, 5]


def test_resume_names_the_steps_that_the_log_lacks(tmp_path):
    log_of(tmp_path, range(1, 5))
    for _ in range(2):  # said once
        with RunLog(tmp_path, 100, resumed_at=6, quiet=True):
            pass
    events = [line for line in read_log(tmp_path / "log.jsonl") if "event" in line]
    assert events == [{"step": 6, "event": "the log lacks step 5, 6"}]
    with RunLog(tmp_path, 100, resumed_at=6, quiet=True) as log:
        write(log, [7])
    with RunLog(tmp_path, 100, resumed_at=7, quiet=True):
        pass
    assert len([line for line in read_log(tmp_path / "log.jsonl") if "event" in line]) == 1


def test_a_whole_log_lacks_nothing(tmp_path):
    log_of(tmp_path, range(1, 5))
    with RunLog(tmp_path, 100, resumed_at=4, quiet=True):
        pass
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


ODD = ['{"step": 2}', '{"step": 2, "loss": 1}', '{"step": 2, "seconds": NaN}', '{"step": 2, "seconds": Infinity}']


@pytest.mark.parametrize("row", [*ODD, '{"step": 2, "event": 3}', '{"step": 2, "loss": 2, "lr": null}'])
def test_resume_takes_lines_that_lack_figures(tmp_path, row):
    path = log_of(tmp_path, [1])
    path.write_bytes(path.read_bytes() + row.encode() + b"\n")
    with RunLog(tmp_path, 100, resumed_at=2, quiet=True) as log:
        assert 0 <= log.seconds < 60
        write(log, [3])
    assert row in path.read_text() and read_log(path)[-1]["step"] == 3


class Short(io.FileIO):
    """A file that takes at most 7 bytes at a time and, once `left` bytes are written, none."""

    left = 10**9

    def write(self, data):
        if self.left <= 0:
            raise OSError(28, "No space left on device")
        count = super().write(bytes(data[: min(7, self.left)]))
        self.left -= count
        return count


def test_short_writes_make_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "FileIO", Short)
    log_of(tmp_path, [1, 2, 3])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert len((tmp_path / "main.log").read_text().splitlines()) == 3


def test_a_line_that_does_not_fit_leaves_no_half_of_it(tmp_path, monkeypatch):
    """The next line, if the disk has room again, is not glued to it."""
    monkeypatch.setattr(log_module, "FileIO", Short)
    with RunLog(tmp_path, 5, quiet=True) as log:
        write(log, [1])
        log._file.left = 20
        with pytest.raises(HandgradError, match="log.jsonl must be writable, but got No space left on device"):
            write(log, [2])
        log._file.left = 10**9
        write(log, [3])
    assert [json.loads(row)["step"] for row in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 3]


def test_flush_syncs_both_files_and_their_folder(tmp_path, monkeypatch):
    synced = []
    with RunLog(tmp_path, 5, quiet=True) as log:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        log.flush()
    assert synced == ["log.jsonl", "main.log", tmp_path.name]
    log.flush()  # closed: there is nothing left to flush


def test_a_deleted_log_is_noticed_and_written_again(tmp_path):
    with RunLog(tmp_path, 5, quiet=True) as log:
        write(log, [1, 2])
        assert not log.is_deleted
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "main.log").unlink()
        assert log.is_deleted
        log.restore()
        assert not log.is_deleted
        write(log, [3])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert len((tmp_path / "main.log").read_text().splitlines()) == 3


@given(cut=st.integers(0, 500), at=st.integers(0, 499), byte=st.binary(max_size=3))
def test_a_mutated_log_keeps_what_was_not_mutated(tmp_path_factory, cut, at, byte):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    lines = [dump({"step": i, "loss": 1.5, "seconds": 2.0 * i}) for i in range(9)]
    good = b"".join(lines)
    path.write_bytes((good[:at] + byte + good[at + len(byte) :])[:cut])
    found = read_log(path)
    assert all(isinstance(line["step"], int) for line in found)
    ends = [sum(map(len, lines[: i + 1])) for i in range(9)]
    whole = [
        i
        for i, end in enumerate(ends)
        if end <= min(cut, at) or (at + len(byte) + 1 < end - len(lines[i]) and end <= cut)
    ]
    assert set(whole) <= {line["step"] for line in found}


DAMAGED = ["[]", "3", "{}", '{"step": -1}', '{"step": 1.5}', '{"step": 1, "loss": "x"}', "\0" * 64, "[" * 100_000]
DAMAGED += ['{"step": 1' + "0" * 5000 + "}", '{"step": 1, "loss": 1' + "0" * 400 + "}"]


@pytest.mark.parametrize("row", DAMAGED)
def test_what_is_not_a_line_is_left_out(tmp_path, row):
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n' + row + '\n{"step": 1}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 7}, {"step": 1}]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(HandgradError, match=r"\[log\] .*log.jsonl must be writable, but got No such file or directory"):
        RunLog(tmp_path / "nowhere", 1, quiet=True)
    (tmp_path / "file").write_text("")
    for resumed_at in (0, 3):
        with pytest.raises(HandgradError, match="Not a directory"):
            RunLog(tmp_path / "file", 5, resumed_at=resumed_at, quiet=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with RunLog(tmp_path, 1, quiet=True) as log, pytest.raises(HandgradError, match="No space left on device"):
        write(log, [1])


# the screen ---------------------------------------------------------------------------------------------------------


def test_the_plain_line(tmp_path):
    line = {"step": 9, "loss": 3.412, "grad_norm": 0.41, "lr": 5.9e-4, "tokens_per_second": 171_000.0}
    assert plain_line(line, 18865, 3.06) == "step 9/18865 | loss 3.4120 | grad 0.41 | lr 5.9e-4 | 171k tok/s | 3.06 s"
    odd = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0, "tokens_per_second": 0.0}
    assert plain_line(odd, 2, 0.0123) == "step 1/2 | loss nan | grad inf | lr 0.0e+0 | 0 tok/s | 12.3 ms"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (89, "step 2000/2000 | loss 1.4321 | val 1.6543 | grad 0.41 | lr 2.0e-4 | 17.2k tok/s | 44.6 ms"),
        (88, "step 2000/2000 | loss 1.4321 | val 1.6543 | grad 0.41 | 17.2k tok/s | 44.6 ms"),
        (76, "step 2000/2000 | loss 1.4321 | val 1.6543 | 17.2k tok/s | 44.6 ms"),
        (20, "step 2000/2000 | loss 1.4321 | val 1.6543 | 17.2k tok/s | 44.6 ms"),
    ],
)
def test_a_narrow_terminal_still_shows_the_time_of_a_step(width, shown):
    line = {"step": 2000, "loss": 1.4321, "val_loss": 1.6543, "grad_norm": 0.41, "lr": 2e-4}
    assert plain_line(line | {"tokens_per_second": 17_200.0}, 2000, 0.0446, width) == shown


def test_short_numbers():
    numbers = (0, 999, 999.6, 12_345, 999_600, 1.5e9, 2e12)
    assert [short(n) for n in numbers] == ["0", "999", "1.00k", "12.3k", "1.00M", "1.50B", "2.00T"]


def test_clock():
    assert [clock(s) for s in (0, 59.6, 3599.7, 90_000)] == ["0:00", "1:00", "1:00:00", "25:00:00"]


def test_without_a_terminal_a_line_every_few_seconds_and_at_each_validation(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now)
    with RunLog(tmp_path, 20) as log:
        for step in range(1, 21):
            now += 1.0
            write(log, [step], val_loss=4.0 if step == 9 else None)
        log.say("[bold]saved[/bold] :smile: " + "x" * 200)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/20", "6/20", "9/20", "11/20", "16/20", "20/20"]
    assert "val 4.0000" in lines[2] and "\x1b" not in "".join(lines)
    assert lines[-1] == "[bold]saved[/bold] :smile: " + "x" * 200


def test_quiet_shows_nothing(tmp_path, capsys):
    with RunLog(tmp_path, 2, quiet=True) as log:
        write(log, [1, 2], val_loss=3.0)
        log.event(2, "skipped")
        log.say("hello")
    assert capsys.readouterr() == ("", "")


def on_a_terminal(monkeypatch, width, block):
    """What a terminal of this width gets while `block` runs."""
    master, slave = os.openpty()
    shown = []

    def collect():
        try:
            while piece := os.read(master, 4096):
                shown.append(piece)
        except OSError:  # how a pty says that its other end is closed
            pass

    reader = threading.Thread(target=collect)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(log_module, "LIVE_SECONDS", 0.0)
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        block()
    reader.join(timeout=10)
    monkeypatch.undo()
    os.close(master)
    return b"".join(shown).decode()


@pytest.mark.parametrize("width", [120, 80, 40])
def test_on_a_terminal_one_live_line(tmp_path, monkeypatch, width):
    def run():
        with RunLog(tmp_path, 3) as log:
            write(log, [1])
            write(log, [2], val_loss=4.5)
            with log.activity("validating"):
                pass
            log.say("saved step_000002")
            write(log, [3])

    text = on_a_terminal(monkeypatch, width, run)
    assert "step 1/3  loss 4.0000" in text and "saved step_000002" in text
    assert ("━" in text) == (width == 120)
    assert ("0:00 left" in text) == ("in all" in text) == (width > 40)
    at_work, after = text.partition("validating")[::2]
    assert not after or "tok/s" in after.partition("saved step_000002")[0], "the figures come back"
    assert bool(after) == (width > 40) and "step 2/3" in at_work
    assert text.count("step 2/3 | loss 3.0000") == 1, "a validation leaves a line behind"
    assert "\x1b[?25l" not in text.replace("\x1b[?25l\x1b[?25h", ""), "the cursor is never hidden for long"


@pytest.mark.parametrize("width", [120, 80])
def test_a_run_that_stops_early_leaves_its_last_state(tmp_path, monkeypatch, width):
    """No time left stays on the screen, and the step is the last one, whichever the live line showed."""

    def run():
        log = RunLog(tmp_path, 1000)
        write(log, [1, 2])
        monkeypatch.setattr(log_module, "LIVE_SECONDS", 1e9)
        write(log, [3])  # not shown
        log.close()
        log.say("stopped after step 3")

    last = on_a_terminal(monkeypatch, width, run).replace("\r", "").partition("stopped after")[0]
    assert "step 2/1000" in last and "left" in last
    final = last.rpartition("step ")[2]
    assert final.startswith("3/1000  loss 2.0000") and "0:00 in all\n" in final and "left" not in final


def test_the_figures_of_a_last_step_that_is_validated_stand_once(tmp_path, monkeypatch):
    def run():
        with RunLog(tmp_path, 2) as log:
            write(log, [1])
            write(log, [2], val_loss=4.5)

    text = on_a_terminal(monkeypatch, 80, run).replace("\r", "")
    assert text.count("step 2/2 | loss 3.0000 | val 4.5000") == 1
    assert text.rpartition("step ")[2].startswith("2/2  0:00 in all")


def test_every_printed_line_is_whole_on_a_terminal(tmp_path, monkeypatch):
    def run():
        with RunLog(tmp_path, 100_000) as log:
            write(log, [54_321], val_loss=4.5, mfu=0.5, step_seconds=0.0446)

    text = on_a_terminal(monkeypatch, 80, run)
    assert " tok/s | mfu 50.0 | 44.6 ms" in text and "\u2026" not in text.partition("44.6 ms")[0]


# TensorBoard --------------------------------------------------------------------------------------------------------


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, 3, tensorboard=True, quiet=True) as log:
        write(log, [1, 2])
        write(log, [3], val_loss=4.5)
    read = scalars(tmp_path)
    assert set(read) == {"loss/train", "loss/val", "lr", "grad_norm", "tokens_per_second"}
    assert read["loss/train"] == [(1, 4.0), (2, 3.0), (3, 2.0)] and read["loss/val"] == [(3, 4.5)]
    with RunLog(tmp_path, 3, resumed_at=1, tensorboard=True, quiet=True) as log:
        write(log, [2], loss=7.0)
    assert scalars(tmp_path)["loss/train"] == [(1, 4.0), (2, 7.0)]


def test_without_the_package_tensorboard_nothing_is_touched(tmp_path, monkeypatch):
    path = log_of(tmp_path, [1, 2])
    before = path.read_bytes()
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"] + ["tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HandgradError, match=r"hint: " + re.escape(install_command("tensorboard"))):
        RunLog(tmp_path, 3, tensorboard=True)
    assert path.read_bytes() == before


# llm.c's log --------------------------------------------------------------------------------------------------------


def streams(path):
    """What llm.c's notebook takes from a main.log: name -> {step: value}, the first word after the step alone."""
    found = {}
    for row in path.read_text().splitlines():
        step, first = row.split(" ")[:2]
        name, _, value = first.partition(":")
        found.setdefault(name, {})[int(step.removeprefix("s:"))] = float(value)
    return found


def test_p13_main_log_is_what_llmc_writes(tmp_path):
    with RunLog(tmp_path, 3, quiet=True) as log:
        write(log, [1], lr=6e-4, grad_norm=18.336)
        log.event(2, "update skipped: loss is nan")
        write(log, [2], loss=math.nan, grad_norm=math.inf)
        write(log, [3], loss=3.28215, val_loss=3.3, hellaswag=0.29556)
    text = (tmp_path / "main.log").read_text()
    assert text == (
        "s:0 trl:4.0000 lr:0.000600 norm:18.34\n"
        "s:1 trl:nan lr:0.001000 norm:inf\n"
        "s:2 trl:3.2822 lr:0.001000 norm:0.50\ns:3 tel:3.3000\ns:3 eval:0.2956\n"
    )
    assert streams(tmp_path / "main.log")["tel"] == {3: 3.3} and set(streams(tmp_path / "main.log")["trl"]) == {0, 1, 2}


def test_p13_main_log_of_a_resumed_run_names_no_step_twice(tmp_path):
    log_of(tmp_path, range(1, 8), val_loss=4.0)
    with RunLog(tmp_path, 9, resumed_at=4, quiet=True) as log:
        write(log, range(5, 10))
    read = streams(tmp_path / "main.log")
    assert list(read["trl"]) == list(range(9)) and list(read["tel"]) == [1, 2, 3, 4]
    assert len((tmp_path / "main.log").read_text().splitlines()) == 9 + 4


# Weights & Biases -----------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: what it was told."""
    told = []

    class Run:
        def log(self, figures, step):
            told.append((step, figures))

        def finish(self):
            told.append("finish")

    class Refused(Exception):
        pass

    def init(**settings):
        if settings["project"] == "refused":
            raise Refused("no such project")
        told.append(settings)
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.Error = init, Refused
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_weights_and_biases_gets_the_figures_and_one_run_however_often_it_is_resumed(tmp_path, wandb):
    folder = tmp_path / "shakespeare-001"
    folder.mkdir()
    for resumed_at in (0, 1):
        with RunLog(folder, 3, wandb="proj", settings={"optim": {"lr": 1.0}}, resumed_at=resumed_at, quiet=True) as log:
            write(log, [resumed_at + 1], gpu={"power": 690.0, "throttled": "power"}, val_loss=2.0)
    first, (step, figures), end, second, (again, _), _ = wandb
    assert first == second and first["project"] == "proj" and first["name"] == "shakespeare-001"
    assert first["config"] == {"optim": {"lr": 1.0}} and first["resume"] == "allow" and len(first["id"]) == 16
    assert (step, again, end) == (1, 2, "finish")
    assert (figures["loss/train"], figures["loss/val"], figures["gpu/power"]) == (4.0, 2.0, 690.0) and len(figures) == 6


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), RuntimeError()])
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path, wandb, monkeypatch, capsys, error):
    with RunLog(tmp_path, 3, wandb="proj") as log:
        write(log, [1])

        def fail(*_, **__):
            raise error

        run = log._trackers[0]._run
        monkeypatch.setattr(type(run), "log", fail)
        monkeypatch.setattr(type(run), "finish", fail)
        write(log, [2, 3])
    lines = read_log(tmp_path / "log.jsonl")
    text = f"Weights & Biases gets no more figures: {'no network at all' if str(error) else 'RuntimeError'}"
    assert [line["step"] for line in lines] == [1, 2, 2, 3] and lines[2] == {"step": 2, "event": text}
    assert text in capsys.readouterr().out


def test_a_tracker_that_fails_at_its_end_is_told(tmp_path, wandb, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with RunLog(tmp_path, 3, wandb="proj") as log:
        write(log, [1])
        monkeypatch.setattr(type(log._trackers[0]._run), "finish", fail)
    assert "Weights & Biases failed at the end: [Errno 28] No space left on device" in capsys.readouterr().out


def test_weights_and_biases_refused_or_not_installed(tmp_path, wandb, monkeypatch):
    with pytest.raises(HandgradError, match="Weights & Biases refuses the run: no such project"):
        RunLog(tmp_path, 3, wandb="refused")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(HandgradError, match=r"--wandb needs .* hint: " + re.escape(install_command("wandb"))):
        RunLog(tmp_path, 3, wandb="proj")
