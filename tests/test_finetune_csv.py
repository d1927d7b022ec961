"""CSV and TSV as rows to fine-tune on: the shards of the JSON lines of the same rows; damage names its line."""

import csv
import gzip
import io
import re
from pathlib import Path

import pytest
from test_finetune_rows import PAIRS, ROWS, TEXTS, chat, error, here, labels, shards, write

from handgrad import data
from handgrad.data.prepare import bounds, readers

__all__ = ["here"]  # a fixture
ODD = ['a "quoted" word', "two\nlines\r\nand one", "a, b\tc", " spaces ", "Köln 🙂", '"', "a\n\n\nb", "'", "\\n", "#"]


def table(name, rows, begin="", end="\r\n"):
    """Writes rows as CSV or TSV, and returns the name."""
    columns, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if ".tsv" in name else ",", lineterminator=end)
    writer.writerow(columns)
    writer.writerows([[row.get(key) for key in columns] for row in rows])
    raw = (begin + text.getvalue()).encode()
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return name


@pytest.mark.parametrize("block", [60, 2**20])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz"])
def test_pairs_give_the_shards_of_json_lines(here, monkeypatch, name, block):
    """With line breaks, separators and quotes in texts, a BOM, and columns that are none of ours."""
    monkeypatch.setattr(bounds, "BLOCK_BYTES", block)
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    rows = [{"id": n, "prompt": a + b, "completion": b + a} for n, (a, b) in enumerate(zip(ODD, reversed(ODD)))]
    for layout in (rows, ROWS["prompt"], ROWS["alpaca"]):
        assert chat(write("want.jsonl", layout), "--replace", out="want") == 0
        for begin, end in (("", "\r\n"), ("\ufeff", "\n")):
            assert chat(table(name, layout, begin, end), "--replace") == 0
            assert shards("out") == shards("want") and len(shards("out")) == 4


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_labels_give_the_shards_of_json_lines(here, name):
    """Whole numbers, words, pairs of texts, and numbers to learn."""
    wordy = [{"text": row["text"], "more": f"{text} x", "label": "a, b"[: 1 + n % 2]}
             for n, (row, text) in enumerate(zip(TEXTS, ODD * 4))]  # fmt: skip
    numbers = [row | {"label": number} for row, number in zip(TEXTS, [1, 2.5, -3, 1e-3, 0] * 8)]
    for rows, flags in ((TEXTS, ()), (wordy, ("--pair", "more")), (numbers, ("--regression",))):
        for words in (("--replace", *flags), ("--replace", "--workers", "2", *flags)):
            assert labels(write("want.jsonl", rows), *words, out="want") == 0
            assert labels(table(name, rows), *words) == 0
            assert shards("out") == shards("want") and len(shards("out")) == 2
        (want, found) = (data.read_meta(folder) for folder in ("want", "out"))
        assert want["labels"] == found["labels"] and want.get("values") == found.get("values")


GOOD = "".join(f'"{a}\n",{b}\n' for a, b in PAIRS)  # rows of two lines each
BAD = {
    "too few": ("a\n", "line 4: a row must have the 2 fields of the first, but got 1"),
    "too many": ("a,b,c\n", "line 4: a row must have the 2 fields of the first, but got 3"),
    "empty": ("a,\n", "line 4: a row has a list of messages, or prompt and completion, but got an object with prompt"),
    "quote": ('"a"b,c\n', "line 4: must be CSV, but got ',' expected after"),
    "bytes": ("a,\udcff\n", "line 4: must be CSV, but got 'utf-8' codec"),
    "bytes in a row of two lines": ('"\n",\udcff\n', "line 4: must be CSV, but got 'utf-8' codec"),
}


@pytest.mark.parametrize("bad, said", BAD.values(), ids=BAD)
def test_bad_rows_stop_or_are_counted(here, capsys, bad, said):
    """A row that is damaged after one of two lines has the number of its first line."""
    Path("good.csv").write_text(f"prompt,completion\n{GOOD}")
    first, rest = GOOD[: GOOD.index("Hello 1") - 1], GOOD[GOOD.index("Hello 1") - 1 :]
    raw = f"prompt,completion\n{first}{bad}\n,\n{rest}"  # with a blank line, and a row of empty fields
    Path("a.csv").write_bytes(raw.encode(errors="surrogateescape"))
    assert chat("good.csv", out="good") == 0
    capsys.readouterr()
    assert chat("a.csv") == 2
    line = error(capsys)
    assert line.startswith(f"[data] a.csv, {said}") and ("--on-error skip" in line or "messages" in said)
    assert chat("a.csv", "--on-error", "skip") == 0
    assert shards("out") == shards("good") and data.read_meta("out")["skipped"] == 2


def test_labels_that_are_missing(here, capsys):
    rows = [*TEXTS[:2], {"text": "the cat", "label": None}, {"text": "", "label": 1}, *TEXTS[2:]]
    assert labels(table("a.csv", rows)) == 2
    assert "a.csv, line 4: an object must hold a label, text or a whole number, under 'label', but got" in error(capsys)
    assert labels("a.csv", "--on-error", "skip") == labels(write("good.jsonl", TEXTS), out="good") == 0
    assert shards("out") == shards("good") and data.read_meta("out")["skipped"] == 2
    for word in ("much", "nan", "1_0"):
        table("b.csv", [{"text": "the cat", "label": number} for number in (1, 2, word)])
        assert labels("b.csv", "--regression", out="b") == 2
        assert re.search(f"b.csv, line 4: an object must hold a number .* but got '{word}'", error(capsys))


FILES = {  # a damaged file is an error in any case
    "": "a.csv, line 1: the first row must name the columns, but got none",
    "\n": "a.csv, line 1: the first row must name the columns, but got none",
    "prompt;completion\na;b\n": "a.csv must have commas between fields, but got prompt;completion",
    "prompt,completion\n": "a.csv must hold rows, but got 0",
    "prompt,reply\na,b\n": "a.csv must have a column 'messages', or .*, but got prompt, reply",
    "prompt,completion,prompt\na,b,c\n": "a.csv must have one column 'prompt', but got 2",
    'prompt,"compl\na,b\n': "a.csv, line 1: must be CSV, but got unexpected end of data. hint: a quote",
    'prompt,completion\n"a,b\nc,d\n"e",f\n': "a.csv, line 2: must be CSV, but got ',' expected after '\"'. hint: a quote",
    'prompt,completion\na,"b\nc,d\n': "a.csv, line 2: must be CSV, but got unexpected end of data. hint: a quote",
    "prompt,\udcff\na,b\n": "a.csv, line 1: the first row must name the columns, but got 'utf-8' codec",
}


@pytest.mark.parametrize("text, said", FILES.items())
def test_damaged_files(here, capsys, text, said):
    Path("a.csv").write_bytes(text.encode(errors="surrogateescape"))
    assert chat("a.csv", "--on-error", "skip") == 2 and not Path("out").exists()
    assert re.match(re.escape("[data] ") + said, error(capsys))


def test_a_text_longer_than_csv_allows_by_itself(here, monkeypatch, capsys):
    """The limit is ours, that of any document, and the process keeps its own."""
    limit = csv.field_size_limit()
    rows = [{"prompt": "a" * (limit + 9), "completion": "b"}, {"prompt": "a\n" * limit, "completion": "b"}]
    assert (
        chat(table("a.csv", rows), "--val-fraction", "0")
        == chat(write("a.jsonl", rows), "--val-fraction", "0", out="want")
        == 0
    )
    assert shards("out") == shards("want") and csv.field_size_limit() == limit
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 2 * limit - 1)
    assert chat("a.csv", "--replace", "--on-error", "skip") == 2
    assert "a.csv, line 3: must be CSV, but got field larger than field limit" in error(capsys)
    assert shards("out") == shards("want") and csv.field_size_limit() == limit
