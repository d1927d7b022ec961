"""handgrad convert: what it takes, what it makes, and that a destination is whole or untouched."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from handgrad.cli import convert
from handgrad.cli.__main__ import main
from handgrad.infer.load import open_source
from handgrad.io import checkpoint, llmc
from handgrad.io.weights import Weights
from handgrad.models import GPT2, declare, shapes

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
    assert "no tokenizer: " in out and "deep/run: 36,324 parameters, f32, from " in out and "--init" in out
    assert names(tmp_path / "deep") == ["run"] and names(tmp_path / "deep" / "run") == ["step_000000"]
    assert main(["convert", str(tmp_path / "deep" / "run"), str(tmp_path / "folder")]) == 0  # handgrad's becomes hf
    assert names(tmp_path / "folder") == ["config.json", "model.safetensors"]
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "again.bin")]) == 0
    assert (tmp_path / "again.bin").read_bytes() == model.read_bytes()
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "b"), "--to", "handgrad", "--dtype", "bf16"]) == 0
    assert open_source(tmp_path / "b").weights.dtype == "bf16"


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
    """Between the two renamings of a replaced folder, the second fails."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").touch()

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError), convert.replacing(tmp_path / "folder") as new:
        new.mkdir()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["config.json"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["none", "b"],
            "[model] a model is a run folder, one of its checkpoints, a .bin of llm.c, a Hugging Face folder or hf:NAME, "
            "but got no 'none'. hint: handgrad train makes one",
        ),
        (
            ["MODEL", "b", "--to", "llmc"],
            "[convert] llm.c's models are files FILE.bin, all others folders, but got 'b' for llmc.",
        ),
        (
            ["MODEL", "b.bin", "--to", "hf"],
            "[convert] llm.c's models are files FILE.bin, all others folders, but got 'b.bin' for hf.",
        ),
        (["MODEL", "b", "--to", "gguf"], "[convert] --to takes one of auto, hf, llmc, handgrad, but got 'gguf'."),
    ],
)
def test_invalid_arguments_are_refused(model, told, words, line):
    assert told(*(model if word == "MODEL" else word for word in words)) == line


def test_folders_without_a_model_are_refused(tmp_path, told):
    assert f"but got '{tmp_path}', which holds no complete checkpoint." in told(tmp_path, tmp_path / "b")
    (tmp_path / "config.json").write_text("{")
    assert "config.json is JSON" in told(tmp_path, tmp_path / "b")
    (tmp_path / "DONE_00000005").touch()
    (tmp_path / "config.json").unlink()
    assert "model_00000005.bin is a model of llm.c, but got no such file." in told(tmp_path, tmp_path / "b")


def test_bf16_to_f32_is_exact(model, tmp_path):
    assert main(["convert", str(model), str(tmp_path / "a"), "--to", "handgrad", "--dtype", "bf16"]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "handgrad", "--dtype", "f32"]) == 0
    a, b = (open_source(tmp_path / name).weights for name in "ab")
    assert all((a.tensor(name, "f32") == b.tensor(name)).all() for name in a.shapes)
    assert checkpoint.load_meta(tmp_path / "b" / "step_000000")["converted_from"].endswith("step_000000")
