"""JSON objects from files that anyone may have written: what is no file, no JSON or too large is refused in one line."""

import os
from pathlib import Path

import pytest

from handgrad.cli.eval import results_in, run_settings
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import MOST_OF_TOKENIZER, read_object
from handgrad.data.meta import read_meta
from handgrad.infer.load import TOKENIZER, _tokenizer_of_run
from handgrad.io import load_meta
from handgrad.train.config import from_names
from handgrad.train.folder import saved_settings
from handgrad.train.log_file import read_log
from handgrad.train.report.read import object_in, read_text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.json"


def told(path, *args, **kwargs):
    with pytest.raises(HandgradError) as error:
        read_object(path, "here", *args, **kwargs)
    return str(error.value)


def test_an_object_is_read(path):
    path.write_text('{"é": [1, 2.5]}', encoding="utf-8")
    assert read_object(path, "here") == {"é": [1, 2.5]}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "must be JSON, but got Expecting value"),
        (b"\xff", "must be JSON, but got 'utf-8' codec"),
        (b"[" * 100_000, "must be JSON, but got maximum recursion depth"),
        (b"1" * 5000, "must be JSON, but got Exceeds the limit"),
        (b"[]", "must hold a JSON object, but got list."),
        (b"null", "must hold a JSON object, but got NoneType."),
    ],
)
def test_no_object_is_told_with_its_hint(path, content, line):
    path.write_bytes(content)
    text = told(path, hint="another file")
    assert text.startswith(f"[here] {path} {line}") and text.endswith("hint: another file")


def test_a_missing_file_is_told_with_its_hint(path):
    text = told(path, hint="another file")
    assert text == f"[here] a.json must be a file, but got {path}, which is missing. hint: another file"


def test_a_file_over_its_bound_is_not_read(path):
    path.write_text("{}")
    os.truncate(path, (6 << 20) + 1)
    assert told(path) == f"[here] {path} must have at most 6,291,456 bytes, but got 6,291,457."
    assert "must be JSON" in told(path, MOST_OF_TOKENIZER)


# every file in which a reader expects an object, if it exists: the reader of a folder, the file's name
READERS = {
    "config.json of a run": (lambda folder: saved_settings(from_names({"out": str(folder)})), "config.json"),
    "config.json in eval": (lambda folder: run_settings(folder, "data"), "config.json"),
    "eval.json": (lambda folder: results_in(folder / "eval.json"), "eval.json"),
    "run.json": (load_meta, "run.json"),
    "a report's objects": (lambda folder: object_in(folder / "config.json"), "config.json"),
    "a report's texts": (lambda folder: read_text(folder / "sample.txt"), "sample.txt"),
    "log.jsonl": (lambda folder: read_log(folder / "log.jsonl"), "log.jsonl"),
    "meta.json": (read_meta, "meta.json"),
    "tokenizer-spec.json": (_tokenizer_of_run, TOKENIZER),
}


@pytest.mark.parametrize("kind", ["a folder", "a pipe, a socket or a device", "/dev/zero"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, reader, kind):
    """A pipe would wait for a writer, /dev/zero fill the memory."""
    (tmp_path / "DONE").touch()  # as in a checkpoint
    read, name = READERS[reader]
    if kind == "a folder":
        (tmp_path / name).mkdir()
    elif kind == "/dev/zero":
        (tmp_path / name).symlink_to(kind)
    else:
        os.mkfifo(tmp_path / name)
    with pytest.raises(HandgradError) as error:
        read(tmp_path)
    got = "a pipe, a socket or a device" if kind == "/dev/zero" else kind
    assert f"but got {tmp_path / name}, which is {got}." in str(error.value)


def test_a_tokenizer_of_many_characters_is_read_from_a_run(tmp_path):
    """As large as meta.json may be: data whose tokenizer training takes can be generated from."""
    spec = '{"kind": "chars", "characters": "abc"}'
    Path(tmp_path, TOKENIZER).write_text(spec + " " * (7 << 20))
    assert _tokenizer_of_run(tmp_path).vocab_size == 3
