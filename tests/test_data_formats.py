"""Rows and formats that people have: damaged rows, .zst, JSON lists, ids of others, validation files."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from handgrad import data, tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data import prepare
from handgrad.data.prepare import bounds, build, readers

GPT2 = tokenizers.gpt2()
GOOD = "café ok"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(folder, split="train"):
    return GPT2.decode(i for p in sorted(Path(folder).glob(f"{split}_*.bin")) for i in data.open_shard(p).read())


def documents(*texts):
    return "".join(f"<|endoftext|>{text}" for text in texts)


def table(path, values):
    """A Parquet file of two row groups whose column may hold null and bytes that are no UTF-8."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = [None if v is None else v if isinstance(v, bytes) else v.encode() for v in values]
    column = pa.array(raw, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(column), column.buffers(), column.null_count)
    pq.write_table(pa.table({"text": text}), path, row_group_size=2)


# damaged rows ---------------------------------------------------------------------------------------------------------

LINES = [
    json.dumps({"text": GOOD}).encode(),
    b'{"text": "caf\xe9"}',  # Latin-1: replaced, else skipped
    b'{"text": "cut',
    b'{"txt": "another column"}',
    b'{"text": null}',
    b"3",
    json.dumps({"text": "end"}).encode(),
]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("on_error", "texts", "counts"),
    [("skip", [GOOD, "end"], {"skipped": 5}), ("replace", [GOOD, "caf\ufffd", "end"], {"skipped": 4, "replaced": 1})],
)
def test_damaged_json_lines_are_counted(ending, on_error, texts, counts, capsys):
    raw = b"\n".join(LINES) + b"\n"
    Path(f"a.jsonl{ending}").write_bytes(gzip.compress(raw) if ending else raw)
    words = f"data jsonl a.jsonl{ending} --val-tokens 0 --out d --workers 1 --on-error"
    assert main([*words.split(), on_error]) == 0
    assert text_of("d") == documents(*texts)
    assert {name: data.read_meta("d").get(name) for name in counts} == counts
    out = capsys.readouterr().out
    assert f"rows without text, left out: {counts['skipped']}" in out
    assert ("bytes that are no UTF-8, and lone surrogates in the text, now U+FFFD: 1" in out) is ("replaced" in counts)


def test_a_damaged_row_stops_with_one_line(here):
    Path("a.jsonl").write_bytes(b"\n".join(LINES))
    with pytest.raises(HandgradError) as error:
        prepare("jsonl", "d", GPT2, files="a.jsonl", val_tokens=0)
    at = len(LINES[0]) + 1
    assert str(error.value).startswith(f"[data] a.jsonl, line at byte {at}: must be JSON, but got ")
    assert str(error.value).endswith("hint: --on-error skip leaves such rows out, and counts them")
    assert not Path("d").exists()


def test_counts_survive_a_resumption_and_rows_at_the_end(monkeypatch):
    """Each shard ends a run; the rows after the last good one, in blocks of their own, are counted too."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 40)
    rows = [json.dumps({"text": f"row {n}"}) if n % 3 else "broken" for n in range(30)] + ["x" * 20] * 9
    Path("a.jsonl").write_text("\n".join(rows) + "\n")
    kinds = dict(files="a.jsonl", val_tokens=0, shard_tokens=7, on_error="skip")
    whole = prepare("jsonl", "whole", GPT2, **kinds)
    assert whole["skipped"] == 19 and len(whole["train"]["shards"]) > 5
    real, calls = build.write_whole, []

    def stops(path, pieces):
        real(path, pieces)
        calls.append(path)
        raise HandgradError("test", "stopped after a shard")

    monkeypatch.setattr(build, "write_whole", stops)
    for _ in range(4):
        with pytest.raises(HandgradError, match="stopped after a shard"):
            prepare("jsonl", "parts", GPT2, **kinds)
    monkeypatch.setattr(build, "write_whole", real)
    assert prepare("jsonl", "parts", GPT2, **kinds) == whole and len(calls) == 4
    for path in Path("whole").glob("*.bin"):
        assert path.read_bytes() == Path("parts", path.name).read_bytes()


@pytest.mark.parametrize(
    ("on_error", "text", "count"),
    [("skip", "one\nfour", ("skipped", 2)), ("replace", "one\nt\ufffdo\n\ufffdx\nfour", ("replaced", 2))],
)
def test_text_with_bytes_that_are_no_utf8(on_error, text, count):
    Path("a.txt").write_bytes(b"one\nt\xffo\n\xe9x\nfour")
    meta = prepare("text", "d", GPT2, files="a.txt", val_fraction=0, on_error=on_error)
    assert text_of("d") == documents(text) and meta[count[0]] == count[1]
    with pytest.raises(HandgradError, match="a.txt must be UTF-8 text, but got byte 0xff at offset 5"):
        prepare("text", "e", GPT2, files="a.txt", val_fraction=0)


@pytest.mark.parametrize(
    ("on_error", "texts", "counts"),
    [("skip", ["a", "b"], (2, None)), ("replace", ["a", "caf\ufffd", "b"], (1, 1))],
)
def test_parquet_with_nulls_and_bytes(on_error, texts, counts):
    table("a.parquet", ["a", None, b"caf\xe9", "b"])
    meta = prepare("parquet", "d", GPT2, files="a.parquet", val_tokens=0, on_error=on_error)
    assert text_of("d") == documents(*texts) and (meta.get("skipped"), meta.get("replaced")) == counts
    with pytest.raises(HandgradError, match="a.parquet, row 1: an object must hold text under 'text', but got null"):
        prepare("parquet", "e", GPT2, files="a.parquet", val_tokens=0)


# formats --------------------------------------------------------------------------------------------------------------


def zstd():
    return bounds.zstd_module() or pytest.skip("no module for .zst")


def test_zstd_holds_what_the_plain_file_does():
    rows = "\n".join(json.dumps({"text": f"{GOOD} {n}"}) for n in range(50)) + "\n"
    Path("plain").mkdir()
    for name, recipe, kinds in (("a.jsonl", "jsonl", {"val_tokens": 30}), ("a.txt", "text", {"val_fraction": 0.3})):
        Path("plain", name).write_text(rows)
        Path(f"{name}.zst").write_bytes(zstd().compress(rows[:999].encode()) + zstd().compress(rows[999:].encode()))
        plain = prepare(recipe, f"{recipe}-plain", GPT2, files=f"plain/{name}", **kinds)
        packed = prepare(recipe, f"{recipe}-zst", GPT2, files=f"{name}.zst", **kinds)
        assert [packed[s] for s in ("train", "val")] == [plain[s] for s in ("train", "val")]
        assert [text_of(f"{recipe}-zst", s) for s in ("train", "val")] == [
            text_of(f"{recipe}-plain", s) for s in ("train", "val")
        ]
        assert sorted(p.name for p in Path(f"{recipe}-zst").iterdir()) == sorted(
            p.name for p in Path(f"{recipe}-plain").iterdir()
        )


@pytest.mark.parametrize("recipe", ["jsonl", "text"])
def test_a_damaged_zstd_is_one_line(recipe):
    raw = zstd().compress(b"\n".join(json.dumps({"text": str(n) * 9}).encode() for n in range(3000)))
    bomb = zstd().compress(b"0" * 2**22)
    for content, got in (
        (raw[:-9], "ended before"),
        (b"plain", ""),
        (bomb, "may unfold"),
    ):
        Path(f"a.{recipe}.zst").write_bytes(content)
        with pytest.raises(HandgradError, match=rf"\[data\] a.{recipe}.zst .*{got}"):
            prepare(recipe, "d", GPT2, files=f"a.{recipe}.zst")
    assert not Path("d").exists()


def test_without_the_package_the_extra_is_named(monkeypatch):
    bounds.zstd_module.cache_clear()
    for name in ("compression", "compression.zstd", "backports", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    Path("a.jsonl.zst").write_bytes(b"x")
    try:
        with pytest.raises(HandgradError, match=r"by Python 3.14, or by backports.zstd, but got .*\[zstd\]'"):
            prepare("jsonl", "d", GPT2, files="a.jsonl.zst")
    finally:
        bounds.zstd_module.cache_clear()


def test_json_lists():
    Path("a.json").write_text(json.dumps([{"story": "a"}, "b", {"story": ""}]))
    Path("b.json.gz").write_bytes(gzip.compress(b'[{"story": "c\xe9"}, {"other": 1}, 7]'))
    kinds = dict(column="story", val_tokens=0)
    meta = prepare("json", "d", GPT2, files=["a.json", "b.json.gz"], on_error="replace", **kinds)
    assert text_of("d") == documents("a", "b", "", "c\ufffd") and (meta["skipped"], meta["replaced"]) == (2, 1)
    for content, line in [
        ('{"story": "a"}', "a.json must hold a JSON list, but got an object. hint: handgrad data jsonl FILE"),
        ('[{"story": "a"}', "a.json must be readable and whole, but got Expecting ',' delimiter"),
        ('["a", {"x": 1}]', "a.json, row 1: an object must hold text under 'story', but got one with 'x'"),
        ("[" * 100_000, "a.json must be readable and whole, but got JSON nested too deeply"),
    ]:
        Path("a.json").write_text(content)
        with pytest.raises(HandgradError) as error:
            prepare("json", "e", GPT2, files="a.json", **kinds)
        assert str(error.value).startswith(f"[data] {line}")


def test_ids_of_nanogpt_and_numpy():
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50257, 5000), rng.integers(0, 50257, 300)
    Path("train.bin").write_bytes(train.astype("<u2").tobytes())
    Path("val.bin").write_bytes(val.astype("<u2").tobytes())
    assert main("data tokens train.bin --val val.bin --raw uint16 --out d --shard-tokens 2000".split()) == 0

    def ids(folder, split):
        return [i for p in sorted(Path(folder).glob(f"{split}_*.bin")) for i in data.open_shard(p).read().tolist()]

    assert ids("d", "train") == train.tolist() and ids("d", "val") == val.tolist()
    assert len(data.check("d")) == 5 and data.read_meta("d")["tokenizer"] == {"kind": "gpt2"}
    for dtype in ("<u2", "<u4", ">i8"):
        np.save("a.npy", train.astype(dtype))
        prepare("tokens", "n", GPT2, files="a.npy", val_tokens=100, replace=True)
        assert ids("n", "val") == train[:100].tolist() and ids("n", "train") == train[100:].tolist(), dtype
    batch = data.tokens("d", 16, 32).batch(0)
    assert batch["ids"].max() < 50257


@pytest.mark.parametrize(
    ("name", "content", "raw", "line"),
    [
        ("t.bin", lambda: b"\1\0\2\0", "", "a file of ids is a .npy, or --raw says what its ids are, but got t.bin. hint: --raw uint16"),
        ("t.bin", lambda: b"\1\0\2", "uint16", "t.bin must hold whole ids of 2 bytes, but got 3 bytes"),
        ("t.bin", lambda: b"\1\0\2\0\3\0\xff\xff", "uint16", "t.bin must hold ids below the vocabulary size 50,257, but got 65535 at id 3."),
        ("t.bin", lambda: np.full(4, 60_000, "<u4").tobytes(), "uint32", "t.bin must hold ids below the vocabulary size 50,257, but got 60000 at id 0."),
        ("t.bin", lambda: np.array([20240520, 1], "<u4").tobytes(), "uint16", "--raw is for files without a header, but got the token shard t.bin. hint: handgrad train --train t.bin"),
        ("t.npy", lambda: np.arange(4), "uint16", "--raw is for files without a header, but got t.npy. hint: leave it out for .npy"),
        ("t.npy", lambda: np.arange(4.0), "", "t.npy must hold ids in one dimension, but got float64 of 4."),
        ("t.npy", lambda: np.zeros((2, 2), "<u2"), "", "t.npy must hold ids in one dimension, but got uint16 of 2x2."),
        ("t.npy", lambda: np.array([1, -2]), "", "t.npy must hold ids below the vocabulary size 50,257, but got -2 at id 1."),
        ("t.npy", lambda: np.array(["a", None]), "", "t.npy must be readable and whole, but got "),
        ("t.npy", lambda: b"\x93NUMPY\1\0", "", "t.npy must be readable and whole, but got "),
        ("t.npy", lambda: b"", "", "t.npy must be readable and whole, but got "),
    ],
)  # fmt: skip
def test_ids_that_are_refused(name, content, raw, line):
    made = content()
    Path(name).write_bytes(made) if isinstance(made, bytes) else np.save(name, made)
    with pytest.raises(HandgradError) as error:
        prepare("tokens", "d", GPT2, files=name, raw=raw, val_tokens=0)
    assert str(error.value).startswith(f"[data] {line}") and not Path("d").exists()


# validation files -----------------------------------------------------------------------------------------------------


def test_validation_files_of_every_source():
    np.save("tokens.npy", GPT2.encode("train"))
    np.save("tokens-val.npy", GPT2.encode("held out"))
    sources = [("tokens", ".npy", None), ("text", ".txt", str), ("jsonl", ".jsonl", lambda t: json.dumps({"text": t}))]
    sources.append(("json", ".json", lambda t: json.dumps([t])))
    for recipe, ending, write in sources:
        if write:
            Path(f"{recipe}{ending}").write_text(write("train"))
            Path(f"{recipe}-val{ending}").write_text(write("held out"))
        words = f"data {recipe} {recipe}{ending} --val {recipe}-val{ending} --out {recipe}"
        assert main(words.split()) == 0
        wrap = (lambda text: text) if recipe == "tokens" else documents
        assert (text_of(recipe), text_of(recipe, "val")) == (wrap("train"), wrap("held out")), recipe
    table("t.parquet", ["train"])
    table("v.parquet", ["held out"])
    prepare("parquet", "parquet", GPT2, files="t.parquet", val="v.parquet")
    assert (text_of("parquet"), text_of("parquet", "val")) == (documents("train"), documents("held out"))
    for changes, got in (
        (dict(recipe="jsonl", files="jsonl.jsonl", val="no.jsonl"), "a source must be a file, but got no.jsonl, which is missing"),
        (dict(recipe="jsonl", files="jsonl.jsonl", val="json-val.json", val_tokens=9), "with --val the validation set is its files, but got --val-tokens"),
        (dict(recipe="text", files="text.txt", val="text.txt", val_fraction=0.5), "with --val the validation set is its files, but got --val-fraction"),
        (dict(recipe="shakespeare", val="text.txt"), "val and on_error are for text, jsonl, json, parquet, tokens, but got 'shakespeare'"),
        (dict(recipe="tokens", files="tokens.npy", on_error="skip"), "on_error and special_tokens are for text, but got 'tokens'"),
        (dict(recipe="text", files="text.txt", on_error="ignore"), "on_error is one of stop, skip, replace, but got 'ignore'"),
    ):  # fmt: skip
        recipe = changes.pop("recipe")
        with pytest.raises(HandgradError) as error:
            prepare(recipe, "x", GPT2, **changes)
        assert str(error.value).startswith(f"[data] {got}")
    assert not Path("x").exists()
