"""handgrad convert: what it takes, what it makes, and that a destination is whole or untouched."""

import inspect
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from handgrad import tokenizers
from handgrad.cli import convert
from handgrad.cli.__main__ import main
from handgrad.core import replace as replacing
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.infer.load import TOKENIZER, open_source
from handgrad.io import checkpoint, llmc
from handgrad.io.weights import Weights
from handgrad.models import GPT2, declare, shapes, to_dict

MODEL = GPT2(vocab_size=97, max_seq_len=20, num_layers=2, num_heads=3, hidden_size=36)


@pytest.fixture
def model(tmp_path):
    """A .bin of llm.c, of random weights."""
    rng = np.random.default_rng(0)
    sizes = shapes(declare(MODEL))
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    llmc.write_model(tmp_path / "model.bin", Weights(asdict(MODEL), "f32", sizes, made.__getitem__))
    return tmp_path / "model.bin"


@pytest.fixture
def told(capsys):
    """A function that converts, which must fail; returns its one line of error."""

    def run(*words):
        capsys.readouterr()
        assert main(["convert", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("[") and err.count("\n") == 1, out + err
        return err.strip()

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_convert_between_all_formats(model, tmp_path, capsys):
    assert main(["convert", str(model), str(tmp_path / "deep" / "run")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("no tokenizer: ")
    needs = "it converts without one; handgrad generate and eval need a tokenizer beside the new model"
    assert out.splitlines()[1] == needs
    assert "deep/run, a run folder: 36,324 parameters, f32, from " in out and "--init" in out
    assert names(tmp_path / "deep") == ["run"] and names(tmp_path / "deep" / "run") == ["step_000000"]
    assert main(["convert", str(tmp_path / "deep" / "run"), str(tmp_path / "folder")]) == 0  # handgrad's becomes hf
    assert names(tmp_path / "folder") == ["config.json", "model.safetensors"]
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "again.bin")]) == 0
    assert (tmp_path / "again.bin").read_bytes() == model.read_bytes()
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "b"), "--to", "handgrad", "--dtype", "bf16"]) == 0
    assert open_source(tmp_path / "b").weights.dtype == "bf16"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".onnx", ".PT", ".ckpt", ".zip"])
def test_formats_that_are_not_written_are_refused(model, tmp_path, told, suffix):
    """A folder named x.pt would be no file of PyTorch."""
    for more in ([], ["--to", "hf"], ["--force"]):
        line = told(model, tmp_path / f"x{suffix}", *more)
        assert (
            f"[convert] DST is a folder, FILE.bin for llm.c, or FILE.gguf for llama.cpp, but got '{tmp_path}/x{suffix}'. hint: "
            in line
        )
    assert names(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("name", ["gpt2.v1", "model-0.5", "run.d"])
def test_other_dots_in_the_name_of_a_folder(model, tmp_path, name):
    assert main(["convert", str(model), str(tmp_path / name)]) == 0
    assert (tmp_path / name / "step_000000").is_dir()


def test_the_newest_complete_model_of_a_folder_of_llmc(model, tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    for step in (100, 20000, 300):
        shutil.copy(model, log / f"model_{step:08d}.bin")
    (log / "DONE_00000100").touch()
    (log / "DONE_00000300").touch()
    assert open_source(log).path == log / "model_00000300.bin"


@pytest.mark.parametrize("to", ["model2.bin", "folder", "run"])
def test_force_is_needed_to_replace_a_destination(model, tmp_path, told, to):
    kind = {"model2.bin": "llmc", "folder": "hf", "run": "handgrad"}[to]
    command = model, tmp_path / to, "--to", kind
    assert main(["convert", *map(str, command)]) == 0
    line = f"[convert] '{tmp_path / to}' exists already. hint: choose another name, or --force"
    assert told(*command) == line
    before = names(tmp_path)
    assert main(["convert", *map(str, command), "--dtype", "bf16", "--force"]) == 0
    assert names(tmp_path) == before and open_source(tmp_path / to).weights.dtype == "bf16"
    assert main(["convert", str(tmp_path / to), str(tmp_path / to), "--to", kind, "--force"]) == 0  # onto itself


def test_force_does_not_replace_folders_with_other_files(model, tmp_path, told):
    (tmp_path / "folder" / "thesis").mkdir(parents=True)
    line = told(model, tmp_path / "folder", "--force")
    assert (
        line == f"[convert] --force replaces a folder that holds only a model: '{tmp_path / 'folder'}', but got thesis."
    )
    assert (tmp_path / "folder" / "thesis").is_dir()


@pytest.mark.parametrize("to", ["b.bin", "run", "folder"])
@pytest.mark.parametrize("force", [False, True])
def test_a_failed_conversion_changes_nothing(model, tmp_path, told, monkeypatch, to, force):
    """A full disk in the middle of a tensor. Written under its own name, the destination would now be half."""
    kind = {"b.bin": "llmc", "folder": "hf", "run": "handgrad"}[to]
    if force:
        assert main(["convert", str(model), str(tmp_path / to), "--to", kind]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read = Weights.tensor

    def tensor(self, name, *args):
        if name == "h.1.ln_1.bias":
            raise OSError(28, "No space left on device")
        return read(self, name, *args)

    monkeypatch.setattr(Weights, "tensor", tensor)
    line = told(model, tmp_path / to, "--to", kind, *(["--force"] if force else []))
    assert line == f"[convert] cannot write '{tmp_path / to}': No space left on device."
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_is_restored_if_its_replacement_fails(tmp_path, monkeypatch):
    """Where names cannot be swapped, between the two renamings of a replaced folder, the second fails."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").touch()
    rename = Path.rename

    def fail(self, target):
        if self.name.startswith("folder.tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(replacing, "exchange", lambda a, b: False)
    with pytest.raises(OSError), replacing.staged(tmp_path / "folder") as new:
        new.mkdir()
        replacing.replace(new, tmp_path / "folder")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["config.json"]


# every instant of a replacement ---------------------------------------------------------------------------------------

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym")
KINDS = {"folder": "hf", "run": "handgrad", "pair.bin": "llmc"}


def source_of(folder, seed, letters):
    """A run folder of random weights whose tokenizer has these 97 letters."""
    rng = np.random.default_rng(seed)
    made = {name: np.zeros(info.tensor.shape, np.float32) for name, info in declare(MODEL).params.items()}
    made["wte.weight"][:97] = rng.normal(size=(97, MODEL.hidden_size))
    checkpoint.save(folder, 5, made, {}, to_dict(MODEL) | {"dtype": "f32", "stored": "float32"})
    (folder / TOKENIZER).write_text(json.dumps(tokenizers.chars(letters).save(folder)))
    return folder


OLD, NEW = ("".join(map(chr, range(at, at + 97))) for at in (256, 512))


def state(path):
    """Which model a name stands for, and whose tokenizer it has: "old" or "new"; None where there is none."""
    try:
        source = open_source(path)
        assert source.weights.shapes.keys() == declare(MODEL).params.keys()
        whose = {0: "old", 1: "new"}[
            [source.weights.tensor("wte.weight")[0, 0] == first for first in FIRST].index(True)
        ]
    except (HandgradError, ValueError):
        return None, None
    try:
        return whose, {OLD: "old", NEW: "new"}[source.tokenizer().characters]
    except HandgradError:
        return whose, None


FIRST = [np.float32(np.random.default_rng(seed).normal()) for seed in (1, 2)]


def killed(count, words, before=lambda: None):
    """Converts in a child that ends before its operation on files number `count`; whether it was ended."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        before()
        done = 0

        def hook(event, args):
            nonlocal done
            if event in EVENTS:
                done += 1
                if done == count:
                    os._exit(9)

        sys.addaudithook(hook)
        os._exit(main(["convert", *map(str, words)]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def instants(tmp_path, to, before=lambda: None):
    """What is there after an end at every instant of a replacement: states before and after what the next one does."""
    old, new = source_of(tmp_path / "s1", 1, OLD), source_of(tmp_path / "s2", 2, NEW)
    place, ready = tmp_path / "place", tmp_path / "ready"
    assert main(["convert", str(old), str(ready / to), "--to", KINDS[to]]) == 0
    assert state(ready / to) == ("old", "old")
    found, count, dies = [], 0, True
    while dies:
        count += 1
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(ready, place)
        dies = killed(count, (new, place / to, "--to", KINDS[to], "--force"), before)
        at_once = state(place / to)
        convert.repair(place / to, place / f"{Path(to).stem}_tokenizer.bin")
        assert names(place) == names(ready)
        found.append((at_once, state(place / to)))
    return found


def no_exchange():
    replacing.exchange = lambda a, b: False


@pytest.mark.parametrize("to", ["folder", "run"])
@pytest.mark.parametrize("before", [lambda: None, no_exchange], ids=["exchange", "renames"])
def test_a_kill_at_any_instant_leaves_a_model_folder(tmp_path, to, before):
    """With one system call always under its name; with two renames, again after the next conversion's start."""
    found = instants(tmp_path, to, before)
    assert len(found) > 15 and {whole for _, whole in found} == {("old", "old"), ("new", "new")}
    assert [whole for _, whole in found] == sorted((whole for _, whole in found), reverse=True)
    missing = sum(at_once == (None, None) for at_once, _ in found)
    assert missing == 0 if before is not no_exchange else missing > 0


def test_a_kill_at_any_instant_never_mixes_a_model_and_another_tokenizer(tmp_path):
    found = instants(tmp_path, "pair.bin")
    assert {at_once for at_once, _ in found} == {("old", "old"), ("old", None), ("new", None), ("new", "new")}
    assert {whole for _, whole in found} == {("old", "old"), ("new", "new")}


def test_an_older_table_goes_if_the_new_model_has_none(model, tmp_path):
    source_of(tmp_path / "s1", 1, OLD)
    assert main(["convert", str(tmp_path / "s1"), str(tmp_path / "b.bin")]) == 0
    assert (tmp_path / "b_tokenizer.bin").is_file()
    assert main(["convert", str(model), str(tmp_path / "b.bin"), "--force"]) == 0
    assert names(tmp_path) == ["b.bin", "model.bin", "s1"]


@pytest.mark.parametrize("to", KINDS)
def test_everything_is_on_disk_before_it_gets_its_name(model, tmp_path, monkeypatch, to):
    flushed, seen, flush, remove = set(), [], replacing.flush, replacing.os.replace

    def remember(path):
        flush(path)
        flushed.add(os.stat(path).st_ino)

    def check(new):
        if new.parent != tmp_path:  # a file inside a folder that has no name yet
            return
        seen.append(new)
        inside = [new, *new.rglob("*")] if new.is_dir() else [new]
        assert {path.stat().st_ino for path in inside} <= flushed

    monkeypatch.setattr(replacing, "flush", remember)
    monkeypatch.setattr(replacing.os, "replace", lambda new, path: (check(Path(new)), remove(new, path)))
    assert main(["convert", str(model), str(tmp_path / to), "--to", KINDS[to]]) == 0
    assert any(path.name.startswith(f"{to}.tmp-") for path in seen) and tmp_path.stat().st_ino in flushed


def test_what_living_processes_write_is_left_alone(model, tmp_path):
    (tmp_path / f"b.tmp-{os.getppid()}").mkdir()
    (tmp_path / "b.tmp-4194304999").mkdir()  # no process has such a number
    (tmp_path / "b.old-x").mkdir()
    assert main(["convert", str(model), str(tmp_path / "b"), "--to", "hf"]) == 0
    assert names(tmp_path) == ["b", "b.old-x", f"b.tmp-{os.getppid()}", "model.bin"]


# uploads --------------------------------------------------------------------------------------------------------------


class Hub:
    """The part of huggingface_hub that uploads: calls must fit the real functions' signatures."""

    def __init__(self, monkeypatch, fail=None):
        self.calls, self.fail = [], fail
        for name in ("create_repo", "upload_folder", "upload_file"):
            monkeypatch.setattr(
                huggingface_hub, name, self.double(name, inspect.signature(getattr(huggingface_hub, name)))
            )
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")

    def double(self, name, signature):
        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            for key in ("folder_path", "path_or_fileobj"):
                if key in given:
                    assert Path(given[key]).exists()
            if name == self.fail:
                raise OSError("the hub\nis away")
            self.calls.append((name, given))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{given['repo_id'].split('/')[-1]}")

        return call


def test_push_uploads_a_folder(model, tmp_path, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    out = tmp_path / "folder"
    assert main(["convert", str(model), str(out), "--to", "hf", "--push", "hf:small", "--private"]) == 0
    assert hub.calls == [
        ("create_repo", {"repo_id": "small", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/small", "folder_path": out}),
    ]
    assert "uploaded: https://huggingface.co/me/small" in capsys.readouterr().out


def test_push_uploads_a_bin_with_its_table(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    source_of(tmp_path / "s1", 1, OLD)
    assert main(["convert", str(tmp_path / "s1"), str(tmp_path / "b.bin"), "--push", "hf:me/small"]) == 0
    assert [(name, given.get("private"), given.get("path_in_repo")) for name, given in hub.calls] == [
        ("create_repo", None, None),
        ("upload_file", None, "b.bin"),
        ("upload_file", None, "b_tokenizer.bin"),
    ]


@pytest.mark.parametrize("fail", ["create_repo", "upload_folder"])
def test_a_failed_upload_keeps_what_was_written(model, tmp_path, told, monkeypatch, fail):
    Hub(monkeypatch, fail)
    out = tmp_path / "folder"
    words = ["convert", str(model), str(out), "--to", "hf", "--push", "hf:me/small"]
    assert main(words) == 2
    assert open_source(out).model.hidden_size == MODEL.hidden_size
    line = told(*words[1:], "--force")
    assert line.startswith(f"[hf] {out} can be uploaded to hf:me/small, but got OSError: the hub is away. hint: ")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--push", "small"], "[convert] --push takes hf:NAME, but got 'small'. hint: --push hf:small"),
        (["--private"], "[convert] --private goes with --push hf:NAME, but got no --push."),
        (
            ["--push", "hf:a--b"],
            "[hf] a model on the hub is called hf:OWNER/NAME or hf:NAME, but got HFValidationError",
        ),
        (["--push", "hf:"], "[hf] a model on the hub is called hf:OWNER/NAME or hf:NAME, but got HFValidationError"),
    ],
)
def test_uploads_that_cannot_begin_write_nothing(model, tmp_path, told, monkeypatch, flags, part):
    Hub(monkeypatch)
    assert part in told(model, tmp_path / "b", *flags) and names(tmp_path) == ["model.bin"]


def test_an_upload_needs_the_package_and_a_token(model, tmp_path, told, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    line = told(model, tmp_path / "b", "--push", "hf:me/small")
    assert line == (
        "[hf] an upload to hf:me/small needs a token of the hub, but got none. "
        "hint: hf auth login, with a token that may write"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = told(model, tmp_path / "b", "--push", "hf:me/small")
    assert line.endswith(f"hint: {install_command('hub')}, or leave out the upload")
    assert names(tmp_path) == ["model.bin"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["none", "b"],
            "[model] a model is a run folder, one of its checkpoints, a .bin of llm.c, a .gguf, a Hugging Face folder or hf:NAME, "
            "but got no 'none'. hint: handgrad train makes one",
        ),
        (
            ["MODEL", "b", "--to", "llmc"],
            "[convert] models for llm.c are files FILE.bin, for llama.cpp FILE.gguf, all others folders, but got 'b' for llmc.",
        ),
        (
            ["MODEL", "b.bin", "--to", "hf"],
            "[convert] models for llm.c are files FILE.bin, for llama.cpp FILE.gguf, all others folders, but got 'b.bin' for hf.",
        ),
        (["MODEL", "b", "--to", "onnx"], "[convert] --to takes one of auto, hf, llmc, gguf, handgrad, but got 'onnx'."),
    ],
)
def test_invalid_arguments_are_refused(model, told, words, line):
    assert told(*(model if word == "MODEL" else word for word in words)) == line


def test_folders_without_a_model_are_refused(tmp_path, told):
    assert f"but got '{tmp_path}', which holds no complete checkpoint." in told(tmp_path, tmp_path / "b")
    (tmp_path / "config.json").write_text("{")
    assert "config.json must be JSON" in told(tmp_path, tmp_path / "b")
    (tmp_path / "DONE_00000005").touch()
    (tmp_path / "config.json").unlink()
    assert "model_00000005.bin is a model of llm.c, but got no such file." in told(tmp_path, tmp_path / "b")


def test_bf16_to_f32_is_exact(model, tmp_path):
    assert main(["convert", str(model), str(tmp_path / "a"), "--to", "handgrad", "--dtype", "bf16"]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "handgrad", "--dtype", "f32"]) == 0
    a, b = (open_source(tmp_path / name).weights for name in "ab")
    assert all((a.tensor(name, "f32") == b.tensor(name)).all() for name in a.shapes)
    assert checkpoint.load_meta(tmp_path / "b" / "step_000000")["converted_from"].endswith("step_000000")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_destination_needs_a_name(model, told, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "DST names a file or a folder" in told(model, name)
