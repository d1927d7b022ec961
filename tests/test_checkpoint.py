"""Checkpoints: exact, small in memory, and never spoiled by a kill, a full disk or damage."""

import doctest
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import handgrad as hg
from handgrad import io
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.io import checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
TENSORS = {
    "h.0.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "h.0.b": np.array([1.5, -0.0, ml_dtypes.finfo(BF16).max], BF16),
    "scalar": np.array(np.finfo(np.float32).smallest_subnormal, np.float32),
    "none": np.zeros((0, 4), np.float32),
}
STATE = {"m": np.full(5, 0.25, np.float32), "rng": np.array([2**63 + 1], np.uint64), "n": np.array(-3, np.int64)}


def expected(tensors):
    return {name: (array.shape, array.dtype) for name, array in tensors.items()}


def folders(out_dir):
    return sorted(path.name for path in Path(out_dir).iterdir())


def test_examples():
    result = doctest.testmod(checkpoint)
    assert result.attempted and not result.failed


def test_round_trip_is_exact(tmp_path):
    meta = {"config": {"layers": 4, "name": "é"}, "lr": 0.1, "best": None, "inf": float("inf")}
    path = io.save(tmp_path / "run", 500, TENSORS, STATE, meta)
    assert path == tmp_path / "run" / "step_000500" == io.newest(tmp_path / "run")
    assert folders(path) == ["DONE", "model.safetensors", "run.json", "state.rank00.safetensors"]
    assert len({(path / name).stat().st_mode for name in folders(path)}) == 1
    for tensors, found in [(TENSORS, io.load(path, expected(TENSORS))), (STATE, io.load_state(path, expected(STATE)))]:
        assert list(found) == list(tensors) and len(found) == len(tensors)
        for name, array in found.items():
            assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape
            assert array.tobytes() == tensors[name].tobytes() and array.flags.writeable
        with pytest.raises(KeyError):
            found["x"]
    assert io.load_meta(path, {"config": dict, "lr": float}) == {**meta, "step": 500}


def test_membership_reads_no_tensor(tmp_path, monkeypatch):
    tensors = {"a": np.zeros(3, np.float32)}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {}, {}), expected(tensors))
    monkeypatch.setattr(checkpoint.Tensors, "__getitem__", None)
    assert "a" in loaded and "b" not in loaded


def test_strided_and_large_steps(tmp_path):
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = io.save(tmp_path, 12_345_678, {"t": w.T, "s": w[:, ::2]}, {}, {})
    found = io.load(path, {"t": ((3, 2), "float32"), "s": ((2, 2), "float32")})
    assert (found["t"] == w.T).all() and (found["s"] == w[:, ::2]).all()
    assert io.newest(tmp_path).name == "step_12345678"


def test_other_libraries_read_it(tmp_path):
    torch_reader = pytest.importorskip("safetensors.torch")
    path = io.save(tmp_path, 1, TENSORS, {}, {})
    for name, tensor in torch_reader.load_file(path / "model.safetensors").items():
        assert tensor.float().numpy().tobytes() == TENSORS[name].astype(np.float32).tobytes()


def test_keeping(tmp_path):
    for step in range(0, 1100, 100):
        io.save(tmp_path, step, {}, {}, {}, keep_last=2, keep_every=400)
    assert folders(tmp_path) == [f"step_{step:06d}" for step in (0, 400, 800, 900, 1000)]
    io.save(tmp_path, 500, {}, {}, {}, keep_last=1)  # a run that went back: what it has just saved stays
    assert folders(tmp_path) == ["step_000500", "step_001000"]
    io.prune(tmp_path, 1)
    assert folders(tmp_path) == ["step_001000"]
    for wrong in [dict(keep_last=0), dict(keep_last=1, keep_every=-1)]:
        with pytest.raises(HandgradError, match="keep_last must"):
            io.save(tmp_path, 1, {}, {}, {}, **wrong)


def test_newest_wants_done(tmp_path):
    assert io.newest(tmp_path / "none") is None and io.newest(tmp_path) is None
    io.save(tmp_path, 1, TENSORS, {}, {}, keep_last=9)
    path = io.save(tmp_path, 2, TENSORS, {}, {}, keep_last=9)
    (path / "DONE").unlink()
    (tmp_path / "step_000009.tmp-1").mkdir()
    (tmp_path / "step_000009.tmp-1" / "DONE").touch()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_000007").touch()
    assert io.newest(tmp_path).name == "step_000001"
    for load in (io.load, io.load_state, io.load_meta):
        with pytest.raises(HandgradError, match="no file DONE in it"):
            load(path, {})
        with pytest.raises(HandgradError, match="no folder"):
            load(tmp_path / "step_000003", {})


# what is not finite ---------------------------------------------------------------------------------------------------

KINDS = [np.float64, np.float32, np.float16, BF16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_is_found_wherever_it_is(kind, value, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PIECE", 8)
    for size in (1, 8, 9, 40):
        for at in range(size):
            array = np.full(size, np.finfo(kind).max if kind is not BF16 else ml_dtypes.finfo(BF16).max, kind)
            assert checkpoint.is_finite(array)
            array[at] = value
            assert not checkpoint.is_finite(array)
    table = np.zeros((4, 6), kind)
    table[2, 3] = value
    assert not checkpoint.is_finite(table.T) and not checkpoint.is_finite(table[2:, 3])
    assert checkpoint.is_finite(table[:2]) and checkpoint.is_finite(table[:0])
    assert checkpoint.is_finite(np.array([2**63 + 1, 2**64 - 1], np.uint64))


@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_does_not_replace_a_checkpoint(tmp_path, part):
    """Neither in a weight nor in the optimizer state; the error names the tensor and the checkpoint that is left."""
    io.save(tmp_path, 4, TENSORS, STATE, {})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts = [dict(TENSORS), dict(STATE)]
    name = list(parts[part])[0]
    parts[part][name] = np.full_like(parts[part][name], np.nan)
    rule = rf"must be finite, but got an infinite value or NaN in '{name}' of step 5\. "
    for step in (4, 5):
        rule = rf"must be finite, but got an infinite value or NaN in '{name}' of step {step}\. "
        with pytest.raises(checkpoint.NotFiniteError, match=rule + r"hint: resume from .*/step_000004, which is whole"):
            io.save(tmp_path, step, *parts, {})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_belongs_to_a_checkpoint_is_flushed_before_it_counts(tmp_path):
    """When `before_done` is called, the tensors and run.json are there and DONE is not; if it fails, nothing is."""
    seen = []

    def look():
        (building,) = tmp_path.glob(".step_000001.tmp-*")
        seen.extend(folders(building))
        assert io.newest(tmp_path) is None

    io.save(tmp_path, 1, TENSORS, STATE, {}, before_done=look)
    assert seen == ["model.safetensors", "run.json", "state.rank00.safetensors"]

    def fail():
        raise OSError(5, "Input/output error")

    with pytest.raises(HandgradError, match="step_000002 must be writable, but got Input/output error"):
        io.save(tmp_path, 2, TENSORS, STATE, {}, before_done=fail)
    assert folders(tmp_path) == ["step_000001"]


# frozen parameters ----------------------------------------------------------------------------------------------------

FROZEN = {"base": np.arange(70_001, dtype=np.float32), "base.b": np.array([1.5, -2.0], BF16), "none": np.zeros((0, 4))}


def save_beside_frozen(out, step, frozen=FROZEN, **kept):
    learns = {"w": np.full(3, step, np.float32)}
    return io.save(out, step, learns | frozen, {}, {}, frozen=set(frozen), **{"keep_last": 9} | kept)


def check_beside_frozen(path, step, frozen=FROZEN):
    found = io.load(path, expected(frozen) | {"w": ((3,), "float32")})
    assert (found["w"] == step).all()
    for name, array in frozen.items():
        assert found[name].tobytes() == array.tobytes() and found[name].dtype == array.dtype


def shares(path, other):
    return os.path.samefile(path / "frozen.safetensors", other / "frozen.safetensors")


def test_frozen_parameters_are_on_disk_once_and_every_checkpoint_is_whole(tmp_path):
    one = save_beside_frozen(tmp_path, 1)
    two = save_beside_frozen(tmp_path, 2)
    assert folders(two) == ["DONE", "frozen.safetensors", "model.safetensors", "run.json", "state.rank00.safetensors"]
    assert shares(one, two) and (two / "model.safetensors").stat().st_size < 200
    assert shares(two, save_beside_frozen(tmp_path, 2))  # in its own place
    three = save_beside_frozen(tmp_path, 3, keep_last=1)
    assert folders(tmp_path) == ["step_000003"] and (three / "frozen.safetensors").stat().st_nlink == 1
    check_beside_frozen(three, 3)
    shutil.copytree(three, tmp_path / "step_000004")
    check_beside_frozen(tmp_path / "step_000004", 3)


DAMAGES = {
    "a bit": lambda raw: raw[:-9000] + bytes([raw[-9000] ^ 1]) + raw[-8999:],
    "cut": lambda raw: raw[:-1],
    "empty": lambda raw: b"",
    "header": lambda raw: b"\xff" * 8 + raw[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_frozen_parameters_does_not_spread(tmp_path, damage, monkeypatch):
    one = save_beside_frozen(tmp_path, 1)
    file = one / "frozen.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    two = save_beside_frozen(tmp_path, 2)
    assert not shares(one, two)
    check_beside_frozen(two, 2)
    monkeypatch.setattr(checkpoint, "_holds", lambda path, tensors: path.exists())  # what a writer that trusts does
    shutil.rmtree(two)
    with pytest.raises((AssertionError, HandgradError)):
        check_beside_frozen(save_beside_frozen(tmp_path, 2), 2)


@pytest.mark.parametrize(
    "other",
    [{**FROZEN, "base": FROZEN["base"] + 1}, {"base": FROZEN["base"]}, {**FROZEN, "base": FROZEN["base"][None]}],
)
def test_other_frozen_parameters_are_written_anew(tmp_path, other):
    one, two = save_beside_frozen(tmp_path, 1), save_beside_frozen(tmp_path, 2, other)
    assert not shares(one, two)
    check_beside_frozen(one, 1)
    check_beside_frozen(two, 2, other)


def test_a_disk_without_links_gets_a_copy(tmp_path, monkeypatch):
    one = save_beside_frozen(tmp_path, 1)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    two = save_beside_frozen(tmp_path, 2)
    assert not shares(one, two)
    check_beside_frozen(two, 2)


def test_a_checkpoint_of_an_earlier_version_holds_all_parameters_in_one_file(tmp_path):
    old = io.save(tmp_path, 1, {"w": np.full(3, 1, np.float32)} | FROZEN, {}, {})
    assert not (old / "frozen.safetensors").exists()
    check_beside_frozen(old, 1)
    check_beside_frozen(save_beside_frozen(tmp_path, 2), 2)
    check_beside_frozen(old, 1)


def test_frozen_parameters_that_are_gone_are_named(tmp_path):
    path = save_beside_frozen(tmp_path, 1)
    (path / "frozen.safetensors").unlink()
    with pytest.raises(
        HandgradError, match="model.safetensors must hold the tensor 'base', but got no such and 2 more"
    ):
        check_beside_frozen(path, 1)


# kills ----------------------------------------------------------------------------------------------------------------

KILLED_AT_EVERY_CALL = """
import os, sys
import numpy as np
from handgrad import io

out, step = sys.argv[1], int(sys.argv[2])
count = 0

def die(event, args):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.link"):
        count += 1
        if count == at:
            os._exit(9)

for at in range(1, 200):
    child = os.fork()
    if child == 0:
        sys.addaudithook(die)  # for good: hence the fork
        w, base = np.full(1000, 2, np.float32), np.full(1000, 7, np.float32)
        io.save(out, step, {"w": w, "base": base}, {"m": np.full(10, 2)}, {"value": 2}, frozen={"base"})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    sys.stdin.readline()
"""


def check_whole(out_dir, allowed, frozen=None):
    """Returns the value that the newest checkpoint holds, after checking that all its files agree on it.

    frozen: the value of the tensor "base", None if there is none
    """
    path = io.newest(out_dir)
    value = io.load_meta(path, {"value": int})["value"]
    names = ["w", "base"][: 1 if frozen is None else 2]
    for wanted, array in zip((value, frozen), io.load(path, dict.fromkeys(names, ((1000,), "float32"))).values()):
        assert (array == wanted).all()
    assert (io.load_state(path, {"m": ((10,), "int64")})["m"] == value).all()
    assert value in allowed
    return value


@pytest.mark.parametrize("step", [2, 1])  # a new step; the step that is there already
def test_killed_between_any_two_file_operations(tmp_path, step):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_AT_EVERY_CALL, str(out), str(step)]
    values, codes = [], []

    def save(step, value, **kept):
        tensors = {"w": np.full(1000, value, np.float32), "base": np.full(1000, 7, np.float32)}
        io.save(out, step, tensors, {"m": np.full(10, value)}, {"value": value}, frozen={"base"}, **kept)

    def fresh():
        shutil.rmtree(out, ignore_errors=True)
        save(1, 1)

    fresh()
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        for line in process.stdout:
            codes.append(int(line))
            values.append(check_whole(out, {1, 2}, 7))
            if codes[-1] == 0:
                break
            # whoever comes next finds order again, and what was there
            save(3, 3, keep_last=9)
            assert set(folders(out)) <= {"step_000001", "step_000002", "step_000003"}
            assert (out / f"step_{1 if values[-1] == 1 else step:06d}" / "DONE").exists()
            assert check_whole(out, {3}, 7) == 3
            fresh()
            process.stdin.write("\n")
            process.stdin.flush()
        process.kill()
    assert codes[-1] == 0 and set(codes[:-1]) == {9} and len(codes) > 10
    assert values[0] == 1 and values[-1] == 2 and values == sorted(values)
    assert folders(out) == [f"step_{step:06d}"]


@pytest.mark.parametrize("old_is_whole", [True, False])
def test_leftover_of_a_replacement(tmp_path, old_is_whole):
    path = io.save(tmp_path, 1, {}, {}, {"value": "old"})
    path.rename(tmp_path / "step_000001.old")
    (tmp_path / "step_000001").mkdir()  # a copy of something that stopped at once
    if not old_is_whole:
        (tmp_path / "step_000001.old" / "DONE").unlink()
    assert (io.newest(tmp_path) is not None) == old_is_whole
    io.save(tmp_path, 2, {}, {}, {}, keep_last=9)
    assert folders(tmp_path) == ["step_000001", "step_000002"]
    assert (tmp_path / "step_000001" / "DONE").exists() == old_is_whole


SAVES_FOREVER = """
import sys
import threading
import numpy as np
from handgrad import io

value = int(sys.argv[2])
while True:
    value += 1
    w, m = np.full(1_000_000, value, np.float32), np.full(1_000_000, value, np.float32)
    io.save(sys.argv[1], value // 3, {"w": w}, {"m": m}, {"value": value})
    print(value, flush=True)
"""


def test_kill_9_at_random_instants(tmp_path):
    rng = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    value = 2
    for _ in range(6):
        command = [sys.executable, "-c", SAVES_FOREVER, str(tmp_path), str(value)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout]
        process.wait()
        path = io.newest(tmp_path)
        found = io.load_meta(path, {"value": int})["value"]
        assert found >= (said[-1] if said else value + 1)  # what was said to be saved is
        for tensors in (io.load(path, {"w": ((10**6,), "float32")}), io.load_state(path, {"m": ((10**6,), "float32")})):
            assert all((array == found).all() for array in tensors.values())
        value = found


# disks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("which", ["model", "state", "meta"])
def test_full_disk(small_disk, step, which):
    value = {"w": np.full(1000, 1, np.float32)}, {"m": np.full(10, 1)}, {"value": 1}
    io.save(small_disk, 1, *value)
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    parts = [{"w": np.zeros(1000, np.float32)}, {"m": np.zeros(10)}, {"value": 2}]
    large = {"model": {"w": np.zeros(150_000)}, "state": {"m": np.zeros(150_000)}, "meta": {"x": "x" * 2**21}}
    parts[list(large).index(which)] = large[which]
    with pytest.raises(HandgradError, match="No space left on device") as error:
        io.save(small_disk, step, *parts)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()} == before
    assert folders(small_disk) == ["step_000001"]
    check_whole(small_disk, {1})
    io.save(small_disk, 2, *value)
    assert folders(small_disk) == ["step_000002"]


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HandgradError, match="must be writable"):
        io.save(tmp_path / "file", 1, {}, {}, {})
    with pytest.raises(HandgradError, match="must be writable, but got Not a directory"):
        io.save(tmp_path / "file" / "run", 1, {}, {}, {})


def test_meta_that_is_not_json(tmp_path):
    with pytest.raises(HandgradError, match="run.json must be JSON"):
        io.save(tmp_path / "run", 1, {}, {}, {"x": np.float32(1)})
    assert not (tmp_path / "run").exists()


# damage ---------------------------------------------------------------------------------------------------------------


WHOLE = expected(TENSORS)
OTHERS = [
    ({**WHOLE, "more": ((1,), "float32")}, "must hold the tensor 'more', but got no such"),
    ({name: WHOLE[name] for name in list(WHOLE)[1:]}, "only the 3 expected tensors, but got also 'h.0.w'"),
    ({**WHOLE, "h.0.w": ((3, 2), "float32")}, r"'h.0.w' in .* must be float32 \(3, 2\), but got float32 \(2, 3\)"),
    ({**WHOLE, "h.0.b": ((3,), "float32")}, r"must be float32 \(3\), but got bfloat16 \(3\)"),
]


@pytest.mark.parametrize("wanted, message", OTHERS)
def test_another_model(tmp_path, wanted, message):
    path = io.save(tmp_path, 1, TENSORS, TENSORS, {})
    for load in (io.load, io.load_state):
        with pytest.raises(HandgradError, match=message) as error:
            load(path, wanted)
        assert "\n" not in str(error.value) and str(error.value).startswith("[checkpoint]")


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "long", "header", "text"])
def test_damaged_safetensors(tmp_path, damage):
    path = io.save(tmp_path, 1, TENSORS, {}, {})
    file = path / "model.safetensors"
    raw = file.read_bytes()
    file.unlink()
    content = {
        "empty": b"",
        "short": raw[:-1],
        "long": raw + b"x",
        "header": b"\xff" * 8 + raw[8:],
        "text": b"not a checkpoint at all",
    }
    if damage != "gone":
        file.write_bytes(content[damage])
    rule = "must be a file, but got .* missing" if damage == "gone" else "must be a whole safetensors file"
    with pytest.raises(HandgradError, match=rule):
        io.load(path, expected(TENSORS))


def test_damaged_between_opening_and_reading(tmp_path):
    path = io.save(tmp_path, 1, TENSORS, {}, {})
    found = io.load(path, expected(TENSORS))
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(HandgradError, match="must be a whole safetensors file"):
        dict(found)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be JSON"),
        ('{"step": 1, "conf', "must be JSON"),
        ("[" * 10**5, "must be JSON"),
        ("[]", "must hold a JSON object, but got list"),
        ("{}", "'step' of type int, but got nothing"),
        ('{"step": "1"}', "'step' of type int, but got str"),
        ('{"step": true}', "'step' of type int, but got bool"),
        ('{"step": -1, "config": {}, "lr": 1}', "step of at least 0, but got -1"),
        ('{"step": 1}', "'config' of type dict, but got nothing"),
        ('{"step": 1, "config": []}', "'config' of type dict, but got list"),
        ('{"step": 1, "config": {}, "lr": true}', "'lr' of type float, but got bool"),
    ],
)
def test_damaged_run_json(tmp_path, text, message):
    path = io.save(tmp_path, 1, {}, {}, {})
    (path / "run.json").write_text(text)
    with pytest.raises(HandgradError, match=message):
        io.load_meta(path, {"config": dict, "lr": float})
    (path / "run.json").write_text(json.dumps({"step": 1, "config": {}, "lr": 1}))
    assert io.load_meta(path, {"config": dict, "lr": float})["lr"] == 1
    (path / "run.json").unlink()
    with pytest.raises(HandgradError, match="run.json must be a file, but got .*missing. hint: delete this folder"):
        io.load_meta(path)


# memory ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
import numpy as np
from handgrad import io

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

w = {f"w{i}": np.ones((8, 2**18), np.float32) for i in range(16)}  # 16 tensors of 8 MiB
io.save(sys.argv[1], 1, {}, {}, {})
before = peak()
path = io.save(sys.argv[1], 2, w, w, {})
saved = peak()
for name, array in io.load(path, {name: ((8, 2**18), "float32") for name in w}).items():
    w[name][...] = array
    del array
print(saved - before, peak() - saved)
"""


def test_peak_memory(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    saving, loading = map(float, done.stdout.split())
    assert saving < 4  # MiB, of 256 written
    assert loading < 8 + 12  # one tensor, and the next while the last is being dropped


# while training runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """A disk that takes its time: writing waits for one event, flushing for another."""
    events = SimpleNamespace(write=threading.Event(), flush=threading.Event())
    write, flush = checkpoint._write_tensors, checkpoint.flush
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *args: events.write.wait() and write(*args))
    monkeypatch.setattr(checkpoint, "flush", lambda *args: events.flush.wait() and flush(*args))
    yield events
    events.write.set()
    events.flush.set()


def test_a_writer_reads_first_and_flushes_beside_the_caller(tmp_path, slow):
    writer, w = io.Writer(), np.zeros(1000, np.float32)
    writer.save(tmp_path, 1, {"w": w}, {}, {})  # returns at once
    waiting = threading.Thread(target=writer.wait_until_read)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive(), "the array may not change yet"
    slow.write.set()
    waiting.join(10)
    assert not waiting.is_alive() and io.newest(tmp_path) is None
    w.fill(7)  # the next update; the checkpoint holds what was there before
    slow.flush.set()
    writer.wait()
    assert not io.load(io.newest(tmp_path), {"w": ((1000,), "float32")})["w"].any()


def test_a_second_checkpoint_waits_for_the_first(tmp_path, slow):
    writer, begun = io.Writer(), []
    slow.write.set()
    writer.save(tmp_path, 1, TENSORS, STATE, {})
    second = threading.Thread(target=lambda: (writer.save(tmp_path, 2, TENSORS, STATE, {}), begun.append(2)))
    second.start()
    time.sleep(0.05)
    assert second.is_alive() and not begun
    slow.flush.set()
    second.join(10)
    assert begun == [2] and (tmp_path / "step_000001").exists()
    writer.wait()
    assert io.newest(tmp_path).name == "step_000002"


def test_what_goes_wrong_is_raised_once_where_it_is_waited_for(tmp_path):
    (tmp_path / "file").touch()
    for wait in (io.Writer.wait, io.Writer.wait_until_read, lambda w: w.save(tmp_path / "run", 2, {}, {}, {})):
        writer = io.Writer()
        writer.save(tmp_path / "file", 1, {}, {}, {})
        while not writer._saving.done():
            time.sleep(0.001)
        with pytest.raises(HandgradError, match="must be writable"):
            wait(writer)
        writer.wait()


ENDS_AT_ONCE = """
import sys
import threading
import numpy as np
from handgrad import io
io.Writer().save(sys.argv[1], 1, {"w": np.ones(10_000_000, np.float32)}, {}, {})
"""


def test_a_process_that_ends_finishes_its_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ENDS_AT_ONCE, str(tmp_path / "run")], env=environment, check=True)
    assert io.load(io.newest(tmp_path / "run"), {"w": ((10_000_000,), "float32")})["w"].all()


@pytest.mark.parametrize(("backend", "how"), [("cpu", "without a copy"), ("cuda", "copied to host memory first")])
def test_explain_tells_what_a_checkpoint_takes(tmp_path, capsys, backend, how):
    assert main(["explain", "tiny", "--backend", backend, "--micro-batch", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert how in line and line.startswith("a checkpoint is ")
    if backend == "cpu":
        model = hg.models.preset("tiny")
        hg.data.write_shard(tmp_path / "a.bin", [np.arange(1000)], hg.data.id_dtype(50257))
        data = hg.data.tokens(tmp_path / "a.bin", 64, 64)
        kind = dict(execution=hg.Execution(1, backend="cpu"), precision=hg.Precision("bf16"))
        hg.Trainer(model, hg.optim.AdamW(), data, **kind, out=tmp_path).save(0)
        size = sum(path.stat().st_size for path in io.newest(tmp_path).glob("*.safetensors"))
        assert float(line.split()[3]) == pytest.approx(size / 2**20, rel=0.01)


def test_bench_stall_runs():
    command = [sys.executable, str(Path(__file__).parents[1] / "bench" / "stall.py"), "--presets", "tiny"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, "--rounds", "1", "--steps", "2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 and len(done.stdout.splitlines()[-1].split()) == 7


@pytest.mark.parametrize("kind", ["fifo", "device", "missing"])
def test_tensors_that_are_no_file_are_one_line(tmp_path, kind):
    """A pipe would wait for a writer for ever, and /dev/zero never end."""
    io.save(tmp_path, 1, {"w": np.ones(3, np.float32)}, {}, {})
    path = tmp_path / "step_000001" / "model.safetensors"
    path.unlink()
    if kind != "missing":
        os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(HandgradError, match=r"^\[checkpoint\] a checkpoint's tensors must be a file, but got "):
        io.load(tmp_path / "step_000001", {"w": ((3,), "float32")})


def test_a_save_leaves_what_others_write_beside_it(tmp_path):
    """`handgrad convert run/step_000001 run/step_000001.bin` is at work while the run saves."""
    others = [f"step_000001.bin.tmp-{os.getppid()}", f"step_000001-hf.tmp-{os.getppid()}"]
    dead = [
        f".step_000001.tmp-{os.getppid()}",
        f"step_000001.tmp-{os.getppid()}",
        f".step_000001.old.tmp-{os.getppid()}",
    ]
    for name in (*others, *dead):
        (tmp_path / name).mkdir()
    io.save(tmp_path, 2, {"w": np.ones(3, np.float32)}, {}, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step_000002"])
