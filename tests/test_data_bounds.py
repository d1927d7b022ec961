"""Small files that stand for gigabytes, or never end: refused in seconds and without gigabytes, in one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from handgrad import data, evals, tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data.prepare import bounds, readers
from handgrad.data.prepare.recipes import prepare

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
SECONDS, MIB = 5, 500  # of a refusal, the start of Python and its libraries (1.5 s, 160 MiB) included
RUN = """
import sys
from handgrad.cli.__main__ import main
code = main(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) // 1024)
sys.exit(code)
"""
EVALUATE = """
import sys
from handgrad import evals, tokenizers
from handgrad.core.errors import HandgradError
code = 0
try:
    evals.read_items(sys.argv[1], sys.argv[2], tokenizers.gpt2())
except HandgradError as error:
    print(error, file=sys.stderr)
    code = 2
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) // 1024)
sys.exit(code)
"""


def refused(script, *words):
    """The only line on standard error of a process that must be refused within SECONDS of CPU time and MIB of memory."""

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, preexec_fn=limit, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 2, process.stderr[-2000:]
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    mib = int(process.stdout.split()[-1])
    assert seconds < SECONDS and mib < MIB, (seconds, mib, process.stderr)
    (line,) = process.stderr.splitlines()
    return line


def packed_zeros(opener, path, mib, begin=b'{"text": "', unit=b"a", end=b""):
    """A file of `mib` MiB of the same bytes, written in pieces."""
    piece = unit * (2**20 // len(unit))
    with opener(path, "wb") as file:
        file.write(begin)
        for _ in range(mib):
            file.write(piece)
        file.write(end)
    return path


def tar_of(members):
    """An uncompressed tar of {name: bytes or a size of zeros}."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            body = bytes(content) if isinstance(content, int) else content
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return raw.getvalue()


def bomb_table(path, mib=48, rows=256):
    """One value of `mib` MiB that stands in every row: a Parquet file of a few KB for 12 GiB of text."""
    value = pa.array(["ab" * (mib * 2**19)])
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), value)})
    pq.write_table(table, path, compression="zstd")
    return path


def documents(path, column):
    """Those of a Parquet file."""
    return [text for _, job in readers.table(path, readers.texts(column)) for text in job.read(*job.arguments)]


BOMBS = {
    "jsonl.xz": lambda p: packed_zeros(lzma.open, p, 64),
    "jsonl.gz": lambda p: packed_zeros(gzip.open, p, 64),
    "jsonl.bz2": lambda p: packed_zeros(bz2.open, p, 64),
    "lines.xz": lambda p: packed_zeros(lzma.open, p, 64, b"", b'{"text": "abcdefg"}\n'),
    "blank.xz": lambda p: packed_zeros(lzma.open, p, 64, b"", b"\n"),
    "lists.xz": lambda p: packed_zeros(lzma.open, p, 64, b'{"text": [', b"[],"),
}


@pytest.mark.parametrize("ending", BOMBS)
def test_compressed_json_lines_are_bounded(tmp_path, ending):
    path = BOMBS[ending](tmp_path / f"a.{ending}")
    assert path.stat().st_size < 2**17
    most = max(2**20, 256 * path.stat().st_size)
    expected = (
        f"[data] {path} may unfold to 256 times its bytes and to 1,048,576, but got more than {most:,}. "
        "hint: plain files may be of any size"
    )
    words = ["data", "jsonl", path, "--out", tmp_path / "out", "--workers", 1]
    assert refused(RUN, *words) == expected
    if ending.startswith("jsonl") and not ending.endswith("gz"):
        assert refused(EVALUATE, "hellaswag", path) == expected


@pytest.mark.parametrize("mib, rows", [(48, 256), (3, 4000), (1, 10**6)])
def test_parquet_that_unfolds(tmp_path, mib, rows):
    path = bomb_table(tmp_path / "a.parquet", mib, rows)
    assert path.stat().st_size < 20_000
    line = refused(RUN, "data", "parquet", path, "--out", tmp_path / "out", "--workers", 1)
    most = max(2**20, 256 * pq.ParquetFile(path).metadata.row_group(0).column(0).total_compressed_size)
    assert line == (
        f"[data] {path} may unfold to 256 times its bytes and to 1,048,576, but got more than {most:,}. "
        "hint: plain files may be of any size"
    )
    line = refused(RUN, "data", "hellaswag", "--source", path, "--out", tmp_path / "out")
    assert line.startswith(f"[data] {path} may unfold to 256 times")


def test_parquet_of_many_row_groups_shares_its_allowance(tmp_path):
    """A hundred groups that each unfold to 1 MiB: none is large, and all together are."""
    value = pa.array(["ab" * 2**15])
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 1600, pa.int32()), value)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16, compression="zstd")
    with pytest.raises(HandgradError, match=r"may unfold to .* more than [\d,]+\."):
        prepare("parquet", tmp_path / "out", tokenizers.gpt2(), files=tmp_path / "a.parquet", val_tokens=0, workers=1)


def test_large_parquet_is_read_in_small_batches(tmp_path, monkeypatch):
    """A table as FineWeb's is read whole, and in batches that a bound of bytes makes small."""
    rows = [f"{i} " + os.urandom(500).hex() for i in range(3000)]
    pq.write_table(pa.table({"text": rows, "n": range(3000)}), tmp_path / "a.parquet", row_group_size=1500)
    for size, most in ((2**30, 256), (2**10, 1)):
        monkeypatch.setattr(readers, "BATCH_BYTES", size)
        assert max(len(batch) for batch in readers.batches(tmp_path / "a.parquet", 0, ["text"])) == most
        assert documents(tmp_path / "a.parquet", "text") == rows


def test_column_with_a_dot_in_its_name(tmp_path):
    """Its bytes are those of the column, not of none, nor of one whose name begins as its does."""
    rows = [f"{i} " + os.urandom(500).hex() for i in range(1200)]
    zeros = pa.DictionaryArray.from_arrays(pa.array([0] * 1200, pa.int32()), pa.array(["ab" * 2**20]))
    pq.write_table(pa.table({"my.text": rows, "my.text2": zeros}), tmp_path / "a.parquet", compression="zstd")
    assert [batch.num_columns for batch in readers.batches(tmp_path / "a.parquet", 0, ["my.text"])][0] == 1
    assert documents(tmp_path / "a.parquet", "my.text") == rows


def test_archives_that_unfold(tmp_path):
    """Members of zeros, a header that claims to be long, a file of holes; in OpenWebText's and TinyStories' layout."""
    holes = tarfile.TarInfo("holes.txt")
    holes.size, holes.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(holes.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000001000\0"  # one piece of 512 bytes at 0
    header[483:495] = b"77777777777\0"  # of a file of 8 GiB
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**26
    kinds = {
        "zeros": tar_of({"a.txt": 2**26}),
        "name": long_name.tobuf(tarfile.GNU_FORMAT) + bytes(2**26 + 1024),
        "holes": bytes(header) + b"x" * 512 + bytes(1024),
    }
    for kind, raw in kinds.items():
        path = tmp_path / f"{kind}.xz"
        path.write_bytes(lzma.compress(raw, preset=0))
        line = refused(RUN, "data", "openwebtext", "--source", path, "--out", tmp_path / "out", "--workers", 1)
        wrong = "a text must have at most 33,554,432 bytes" if kind in ("holes", "zeros") else "may unfold to 256 times"
        assert line.startswith("[data] ") and (wrong in line or "may unfold" in line), line
    for kind, raw in {"zeros": tar_of({"data00.json": 2**26}), "name": kinds["name"]}.items():
        path = tmp_path / f"{kind}.tar.gz"
        path.write_bytes(gzip.compress(raw, 9))
        line = refused(RUN, "data", "tinystories", "--source", path, "--out", tmp_path / "out2", "--workers", 1)
        assert "may unfold to 256 times" in line or "must be readable and whole" in line, line


def test_json_that_is_deep_or_long(tmp_path):
    """In every reader of JSON."""
    deep, digits = '{"text": ' + "[" * 10**5, '{"text": ' + "1" * 10**6 + "}"
    path = tmp_path / "a.jsonl"
    for text, got in ((deep, "lists or objects nested too deeply"), (digits, "Exceeds the limit")):
        path.write_text(text + "\n")
        with pytest.raises(HandgradError, match=f"line at byte 0: must be JSON, but got {got}"):
            prepare("jsonl", tmp_path / "out", tokenizers.gpt2(), files=path)
        with pytest.raises(HandgradError, match=f"line 1: must be JSON, but got {got}"):
            data.prepare_questions("hellaswag", tmp_path / "out", tokenizers.gpt2(), path)
        for task in evals.TASKS:
            with pytest.raises(HandgradError, match=f"line 1: must be JSON, but got {got}"):
                evals.read_items(task, path, tokenizers.gpt2())
    (tmp_path / "s").mkdir()
    for name in ("data00.json", "data01.json"):
        (tmp_path / "s" / name).write_text("[" * 10**5)
    with pytest.raises(HandgradError, match="data00.json must be readable and whole, but got JSON nested too deeply"):
        prepare("tinystories", tmp_path / "out", tokenizers.gpt2(), source=tmp_path / "s", workers=1)


def test_plain_line_has_a_bound(tmp_path, monkeypatch):
    """Also where a job begins inside it: jobs of a file of one line would read it over and over."""
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 2**16)
    monkeypatch.setattr(bounds, "LONGEST_DOCUMENT", 2**16)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2**12)
    path = tmp_path / "a.jsonl"
    for length, fits in ((2**16, True), (2**16 + 1, False)):
        path.write_text(json.dumps({"text": "a" * (length - 13)}) + "\n")
        assert path.stat().st_size == length
        if fits:
            prepare("jsonl", tmp_path / "out", tokenizers.gpt2(), files=path, val_tokens=0)
            continue
        with pytest.raises(HandgradError, match="line at byte 0: a line must have at most 65,536 bytes, but got more"):
            prepare("jsonl", tmp_path / "out", tokenizers.gpt2(), files=path, val_tokens=0, replace=True)
        with pytest.raises(HandgradError, match="line at byte 4095: a line must have at most"):
            path.write_text(json.dumps({"text": "a" * 2**18}) + "\n")
            list(readers._lines_between(path, 4096, 8192, readers.texts("text")))


def test_real_sources_are_far_below_the_bounds(tmp_path):
    """Shakespeare's plays, packed by each program, are read whole; the most compressible real text is refused nowhere."""
    text = data.shakespeare().read_text(encoding="utf-8")
    rows = "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n"))
    for ending, opener in (("gz", gzip.open), ("xz", lzma.open), ("bz2", bz2.open)):
        with opener(tmp_path / f"a.jsonl.{ending}", "wt") as file:
            file.write(rows)
        size = (tmp_path / f"a.jsonl.{ending}").stat().st_size
        assert len(rows) / size < bounds.MOST_UNFOLDED / 50
        meta = prepare(
            "jsonl", tmp_path / ending, tokenizers.gpt2(), files=tmp_path / f"a.jsonl.{ending}", val_tokens=0
        )
        assert meta["train"]["tokens"] == 347_060 or meta["train"]["tokens"] > 300_000


# what is no file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder", "missing"])
def test_sources_that_are_no_files(tmp_path, kind):
    """A pipe would wait for a writer, a device never end; each recipe and each task refuses them at once."""
    path = Path("/dev/zero") if kind == "/dev/zero" else tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    got = {"folder": "a folder", "missing": "missing"}.get(kind, "a pipe, a socket or a device")
    begin = time.perf_counter()
    for recipe in ("text", "jsonl", "parquet"):
        with pytest.raises(HandgradError, match=f"must be a file, but got {path}, which is {got}"):
            prepare(recipe, tmp_path / "out", tokenizers.gpt2(), files=path)
    with pytest.raises(HandgradError, match=f"must be a file, but got {path}, which is {got}"):
        list(data.read_text(path))
    for recipe in ("shakespeare", "tinystories", "fineweb", "openwebtext"):
        with pytest.raises(HandgradError, match="must be a file"):
            prepare(recipe, tmp_path / "out", tokenizers.gpt2(), source=path)
    for recipe in ("hellaswag", "mmlu"):
        with pytest.raises(HandgradError, match="must be a file"):
            data.prepare_questions(recipe, tmp_path / "out", tokenizers.gpt2(), path)
    with pytest.raises(HandgradError, match=f"an evaluation file must be a file, but got {path}, which is {got}"):
        data.read_choices(path)
    for task in evals.TASKS:
        with pytest.raises(HandgradError, match="which is|holds questions"):
            evals.read_items(task, path, tokenizers.gpt2())
    assert time.perf_counter() - begin < SECONDS


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/b"])
def test_names_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    calls = [
        lambda: prepare("text", tmp_path / "out", tokenizers.gpt2(), files=path),
        lambda: prepare("jsonl", tmp_path / "out", tokenizers.gpt2(), files=path),
        lambda: prepare("fineweb", tmp_path / "out", tokenizers.gpt2(), source=path),
        lambda: prepare("tinystories", tmp_path / "out", tokenizers.gpt2(), source=path),
        lambda: data.prepare_questions("hellaswag", tmp_path / "out", tokenizers.gpt2(), path),
        lambda: data.tokens(path, 4, 4),
        lambda: data.read_choices(path),
        lambda: data.check(path),
        lambda: data.read_meta(path) or pytest.fail("none") if name == "none" else data.open_shard(path),
        lambda: evals.read_items("hellaswag", path, tokenizers.gpt2()),
        lambda: evals.find("hellaswag", path),
    ]
    for call in calls:
        with pytest.raises(HandgradError) as error:
            call()
        assert str(error.value).isprintable()


def test_lone_surrogates_are_replaced(tmp_path, capsys):
    """As tiktoken does: U+FFFD for each; an escaped pair is its character. Their number is told and recorded."""
    rows = [r'{"text": "\ud800 x"}', r'{"text": "a\udc00\ud83d\ude00"}', '{"text": "plain \ufffd"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    assert main(f"data jsonl {tmp_path}/a.jsonl --val-tokens 0 --out {out} --workers 1".split()) == 0
    assert "lone surrogates in the text, now U+FFFD: 2" in capsys.readouterr().out
    ids = data.open_shard(out / "train_000000.bin").read().tolist()
    gpt2 = tokenizers.gpt2()
    assert ids[:3] == [50256, 4210, 2124]
    assert gpt2.decode(ids) == "<|endoftext|>\ufffd x<|endoftext|>a\ufffd😀<|endoftext|>plain \ufffd"
    assert data.read_meta(out)["replaced"] == 2
    meta = prepare(
        "jsonl", tmp_path / "small", gpt2, files=tmp_path / "a.jsonl", val_tokens=0, shard_tokens=2, workers=2
    )
    assert meta["replaced"] == 2 and meta["train"]["tokens"] == len(ids)
    (tmp_path / "raw.jsonl").write_bytes(b'{"text": "\xed\xa0\x80 x"}\n')  # the same in bytes, which json accepts
    assert prepare("jsonl", tmp_path / "raw", gpt2, files=tmp_path / "raw.jsonl", val_tokens=0)["replaced"] == 1
    (tmp_path / "q.jsonl").write_text(r'{"ctx": "\ud800 x", "endings": ["a\udfff", "b"], "label": 0}')
    path, _ = data.prepare_questions("hellaswag", tmp_path / "q", gpt2, tmp_path / "q.jsonl")
    (choices,) = data.read_choices(path)
    assert choices.context == [4210, 2124] and gpt2.decode(choices.endings[0]) == " a\ufffd"
    (item,) = evals.read_items("hellaswag", tmp_path / "q.jsonl", gpt2)
    assert list(item.pairs[0][0]) == [4210, 2124] and gpt2.decode(item.pairs[0][1]) == " a\ufffd"


def test_no_half_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "plain \ufffd"}\n')
    assert "replaced" not in prepare(
        "jsonl", tmp_path / "out", tokenizers.gpt2(), files=tmp_path / "a.jsonl", val_tokens=0
    )


def test_null_text_is_called_null(tmp_path):
    for value, got in [
        ("null", "null"),
        ("3", "a number"),
        ("true", "true or false"),
        ("[]", "a list"),
        ("{}", "an object"),
    ]:
        (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n')
        with pytest.raises(HandgradError) as error:
            prepare("jsonl", tmp_path / "out", tokenizers.gpt2(), files=tmp_path / "a.jsonl")
        expected = f"[data] {tmp_path}/a.jsonl, line at byte 0: an object must hold text under 'text', but got {got}."
        assert str(error.value) == f"{expected} hint: --on-error skip leaves such rows out, and counts them"


def test_parquet_whose_text_is_no_unicode(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(HandgradError, match=r"a.parquet must be readable and whole, but got .*utf-8"):
        documents(tmp_path / "a.parquet", "text")


def test_an_empty_archive_has_an_allowance():
    assert bounds.most_unfolded(0, 0) == bounds.FREE
