"""Rows that people have for fine-tuning: JSON lines, JSON lists and Parquet tables, in several layouts; bad rows."""

import gzip
import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from chats import tokenizer_folder
from test_wordpiece import VOCAB

from handgrad import data
from handgrad.cli.__main__ import main
from handgrad.data.prepare import bounds
from handgrad.data.prepare.messages import chat_in, chats
from handgrad.data.prepare.readers import rows_of
from handgrad.tokenizers.template import OWN, TEMPLATES

pytest.importorskip("jinja2")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

ENDINGS = ("jsonl", "json", "parquet", "json.gz", "lines.json")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a tokenizer for chats in tokens/, whose template is chatml, and BERT's vocab.txt."""
    monkeypatch.chdir(tmp_path)
    Path("tokens").mkdir()
    tokenizer_folder(Path("tokens"), "chatml")
    about = {"chat_template": TEMPLATES["chatml"].read_text(), "eos_token": "<|im_end|>"}
    Path("tokens/tokenizer_config.json").write_text(json.dumps(about))
    Path("vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return tmp_path


def write(name, rows):
    """A file of rows in the format that its name ends in; a row that is text is a line as it is."""
    if name.endswith("parquet"):
        columns = dict.fromkeys(key for row in rows for key in row)
        pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), name, row_group_size=3)
    elif name.endswith("json.gz"):
        Path(name).write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif name.endswith("json") and "lines" not in name:
        Path(name).write_text("\n " + json.dumps(rows, indent=1))
    else:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        Path(name).write_text("".join(f"{line}\n" for line in lines))
    return name


def chat(*words, out="out"):
    return main(["data", "chat", *words, "--model", "tokens", "--out", out])


def labels(*words, out="out"):
    return main(["data", "labels", *words, "--tokenizer", "vocab.txt", "--seq-len", "16", "--out", out])


def chats_in(name):
    """(messages, tools) of every row of a file."""
    return [row[1:3] for _, job in rows_of(Path(name), chats("stop")) for row in job.read(*job.arguments)]


def shards(folder, split="*"):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob(f"{split}_0*"))}


def error(capsys):
    """The one line on standard error."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# formats and layouts --------------------------------------------------------------------------------------------------

PAIRS = [(f"Hello {n}", f"us {n}") for n in range(10)]
USUAL = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in PAIRS]
ROWS = {
    "messages": [{"messages": chat, "id": 7} for chat in USUAL],
    "prompt": [{"prompt": a, "completion": b} for a, b in PAIRS],
    "sharegpt": [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in PAIRS],
    "roles": [{"conversations": chat} for chat in USUAL],
    "alpaca": [
        {"instruction": a if n % 2 else "Hello", "input": "" if n % 2 else f"{n}", "output": b}
        for n, (a, b) in enumerate(PAIRS)
    ],
}


@pytest.mark.parametrize("layout", ROWS)
def test_formats_of_chats_give_the_same_shards(here, layout):
    want = [[{**m, "content": m["content"].replace("Hello ", "Hello\n")} for m in chat] for chat in USUAL]
    want = [b if layout == "alpaca" and n % 2 == 0 else a for n, (a, b) in enumerate(zip(USUAL, want))]
    assert chat(write("want.jsonl", [{"messages": chat} for chat in want]), out="want") == 0
    for ending in ENDINGS:
        assert chat(write(f"a.{ending}", ROWS[layout]), out=ending) == 0
        assert shards(ending) == shards("want") and len(shards(ending)) == 4


def test_prompts_and_completions_of_messages(here):
    """TRL's: the ids are those of the whole chat, and of its replies the completion's alone are learned."""
    talks = [[*USUAL[n], *USUAL[n + 1], *USUAL[n + 2]] for n in range(4)]
    rows = [{"prompt": messages[:3], "completion": messages[3:]} for messages in talks]
    assert chat(write("whole.jsonl", [{"messages": messages} for messages in talks]), out="whole") == 0
    whole = data.read_meta("whole")["train"]
    for ending in ("jsonl", "parquet"):
        assert chat(write(f"a.{ending}", rows), out=ending) == 0
        ids = {name: raw for name, raw in shards(ending).items() if name.endswith("bin")}
        assert ids.items() <= shards("whole").items() and ids
        assert data.read_meta(ending)["train"] == whole | {"assistant": whole["assistant"] * 2 // 3}
        assert [messages for messages, _ in chats_in(f"a.{ending}")] == talks


def test_roles_of_sharegpt():
    names = ["system", "human", "gpt", "observation", "tool", "user", "assistant"]
    row = {"conversations": [{"from": name, "value": "a", "weight": 1} for name in names]}
    roles = ["system", "user", "assistant", "tool", "tool", "user", "assistant"]
    assert chat_in(row, "")[1] == [{"role": role, "content": "a", "weight": 1} for role in roles]


def test_keys_that_a_table_adds_are_not_there(here):
    """A template that asks whether a key is defined sees what it sees of JSON; a date is no obstacle."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "b"}}]
    rows = [{"messages": [*USUAL[0], {"role": "assistant", "content": "c", "tool_calls": [call]}]} for call in calls]
    rows += [{"messages": USUAL[1], "tools": [{"f": {"a": 1}}, {"f": {"b": [None]}}]}]

    found = chats_in(write("a.parquet", rows))
    assert found == chats_in(write("a.jsonl", rows))
    assert found[0][0][-1]["tool_calls"] == calls[:1] and "tool_calls" not in found[2][0][-1]
    dated = [{"messages": [{**m, "when": datetime(2024, 1, 1)} for m in chat]} for chat in USUAL]
    assert chat(write("dated.parquet", dated)) == 0


def test_tool_calls_without_content(here):
    """OpenAI's form: the content is null, or not there; what templates get is an empty text."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    said = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "assistant", "tool_calls": calls}]
    rows = [{"messages": [USUAL[0][0], message, {"role": "tool", "content": "2"}]} for message in said]
    for ending in ("jsonl", "parquet"):
        for messages, _ in chats_in(write(f"a.{ending}", rows)):
            assert messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    [(messages, _)] = chats_in(write("b.jsonl", [{"messages": [*USUAL[0], USUAL[0][1] | {"tool_calls": None}]}]))
    assert messages[2] == USUAL[0][1]


TEXTS = [{"text": f"the cat {n}", "label": n % 2, "other": None} for n in range(40)]


def test_formats_of_labels_give_the_same_shards(here):
    for ending in ENDINGS[:3]:
        assert labels(write(f"a.{ending}", TEXTS), "--val-fraction", "0.3", out=ending) == 0
        assert shards(ending) == shards("jsonl") and len(shards(ending)) == 2
    assert labels("a.json", "--val", "a.parquet", "a.jsonl", out="val") == 0
    meta = data.read_meta("val")
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (40 * meta["record"], 80 * meta["record"])


def test_halves_of_characters_in_any_format(here):
    row = '{"prompt": "Hello", "completion": "us \\ud800"}'
    for name, text in (("a.jsonl", row + "\n"), ("a.json", f"[{row}]")):
        Path(name).write_text(text)
        assert chats_in(name) == [(chat_in({"prompt": "Hello", "completion": "us \ufffd"}, "")[1], None)]


# validation -----------------------------------------------------------------------------------------------------------


def test_files_of_validation(here, capsys):
    """All rows of the files train, all of --val validate, whatever their layouts and formats."""
    train, val = write("a.jsonl", ROWS["messages"][:6]), write("b.parquet", ROWS["sharegpt"][6:])
    more = write("c.json", ROWS["prompt"][:1])
    assert chat(train, "--val", val, more) == 0
    meta = data.read_meta("out")
    assert (meta["train"]["rows"], meta["val"]["rows"]) == (6, 5)
    assert chat(train, "--val-fraction", "0", out="train") == 0 and shards("out", "train") == shards("train")
    both = write("d.jsonl", [*ROWS["messages"][6:], *ROWS["messages"][:1]])
    assert chat(both, "--val-fraction", "0", out="val") == 0
    assert list(shards("out", "val").values()) == list(shards("val").values())
    before = shards("out")
    assert chat(train, "--val", more) == 2 and "tokens of another" in error(capsys)  # the same rows train
    for words, said in (
        (["--val", val, "--val-fraction", "0.1"], "with --val the validation set is its files, but got --val-fraction"),
        (["--val", write("empty.json", [])], "empty.json must hold rows, but got 0 in 1 file."),
        (["--val", "none.jsonl"], "a source must be a file, but got none.jsonl, which is missing"),
    ):
        assert chat(train, "--replace", *words) == 2 and said in error(capsys)
        assert labels(train, *words, out="new") == 2 and not Path("new").exists()
        capsys.readouterr()
    assert shards("out") == before


# bad rows -------------------------------------------------------------------------------------------------------------

USER, SYSTEM = {"role": "user", "content": "a"}, {"role": "system", "content": "a"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
BAD_CHATS = {
    "role": ({"messages": [USER, {"role": "alien", "content": "b"}]}, "the role of message 2 is one of"),
    "system alone": ({"messages": [SYSTEM]}, "a row must have a token of the assistant's, but got none of"),
    "no content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2"),
    "no calls": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "message 2"),
    "calls": ({"messages": [USER, CALLING]}, "the template .* must write tool calls, but got those of message 2 left"),
    "calls and text": ({"messages": [USER, CALLING | {"content": "a"}]}, "the template .* must write tool calls"),
    "tools": ({"messages": USUAL[0], "tools": [{"f": 1}]}, "the template .* has no place for tools"),
    "from": ({"conversations": [{"from": "alien", "value": "b"}]}, "the role of message 1 is one of"),
    "completion": (
        {"prompt": USUAL[0], "completion": [USER]},
        "a row must have a token of the assistant's, but got none",
    ),
    "half a chat": ({"prompt": [USER], "completion": "b"}, "the content of message 1 is a text, but got a list"),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, "the content of message 1 is a text, but got a list"),
    "no column": ({"text": "a"}, "a row has a list of messages, or prompt and completion, but got an object with"),
}
NO_ROWS = {"list": [1], "text": "a", "number": 3}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("bad, said", BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_chats_stop_or_are_counted(here, capsys, monkeypatch, bad, said, ending):
    """Those that are left are the shards of a file without them; the bad row has its number in the error."""
    monkeypatch.setattr(bounds, "BLOCK_BYTES", 100)  # a line or two, as row groups of three rows
    assert chat(write("good.jsonl", ROWS["messages"])) == 0
    before, number = shards("out"), 5 if ending == "jsonl" else 4
    name = write(f"a.{ending}", [*ROWS["messages"][:4], bad, *ROWS["messages"][4:], bad, bad])
    capsys.readouterr()
    assert chat(name, "--replace") == 2
    line = error(capsys)
    assert line.startswith(
        f"[{'chat' if 'template' in said else 'data'}] {name}, {'line' if number == 5 else 'row'} {number}: "
    )
    assert re.search(said, line) and shards("out") == before
    assert chat(name, "--on-error", "skip", out="skip") == 0
    assert "rows that are no chat to learn, left out: 3\n" in capsys.readouterr().out
    assert shards("skip") == before and data.read_meta("skip")["skipped"] == 3
    assert "skipped" not in data.read_meta("out")


def test_rows_of_another_kind_are_skipped(here, capsys):
    bad = [*NO_ROWS.values(), None]
    assert chat(write("good.jsonl", ROWS["messages"]), out="good") == 0
    for name, rows, count in (
        ("a.jsonl", [*bad, "{", '{"messages": ' + "[" * 9999, "\udc80", *ROWS["messages"]], 7),
        ("a.json", [*bad, *ROWS["messages"]], 4),
    ):
        if name == "a.jsonl":
            lines = [row if isinstance(row, str) and row[0] in "{\udc80" else json.dumps(row) for row in rows]
            Path(name).write_text("\n".join(lines), errors="surrogateescape")
        else:
            write(name, rows)
        assert chat(name) == 2 and "1: must be a JSON object" in error(capsys).replace("row 0", "row 1")
        assert chat(name, "--on-error", "skip", out=f"{name}-out") == 0
        assert data.read_meta(f"{name}-out")["skipped"] == count and shards(f"{name}-out") == shards("good")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_bad_labels_are_counted_once(here, capsys, ending):
    """Although both parts of a file read them; a label whose text is missing is none."""
    assert labels(write("good.jsonl", TEXTS), out="good") == 0
    bad = [{"text": None, "label": 9}, {"text": "the", "label": None}, {"text": "the"}]
    name = write(f"a.{ending}", [TEXTS[0], *bad, *TEXTS[1:]])
    assert labels(name) == 2
    assert (
        f"{'line 2' if ending == 'jsonl' else 'row 1'}: an object must hold text under 'text', but got null"
        in error(capsys)
    )
    assert labels(name, "--on-error", "skip") == 0
    assert "rows without text or label, left out: 3\n" in capsys.readouterr().out
    assert shards("out") == shards("good")
    meta = data.read_meta("out")
    assert meta["skipped"] == 3 and meta["labels"] == ["0", "1"]


def changed(raw, at):
    """Bytes of which four are others."""
    return raw[:at] + bytes(byte ^ 0x5A for byte in raw[at:][:4]) + raw[at:][4:]


def zipped(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def test_a_text_that_is_no_utf8(here, capsys):
    """A column of a table may hold any bytes; with --on-error skip the row is left out, and counted."""
    said = pa.array([b"Hello 1", b"\xff\xfe", b"Hello 2"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, said.buffers())
    pq.write_table(pa.table({"prompt": column, "completion": ["us"] * 3}), "a.parquet")
    assert chat("a.parquet") == 2 and "a.parquet must be readable and whole, but got 'utf-8' codec" in error(capsys)
    good = write("good.jsonl", [{"prompt": f"Hello {n}", "completion": "us"} for n in (1, 2)])
    assert chat("a.parquet", "--on-error", "skip") == chat(good, out="good") == 0
    assert shards("out") == shards("good") and data.read_meta("out")["skipped"] == 1


COLUMNS = (
    "must have a column 'messages', or 'conversations', or 'prompt' and 'completion', or 'instruction' and 'output'"
)
BAD_FILES = {  # name: (how it is made, what is said for chats, for labels)
    "cut.parquet": (
        lambda name: Path(name).write_bytes(Path(write(name, ROWS["prompt"])).read_bytes()[:-9]),
        "cut.parquet must be readable and whole, but got ",
        "cut.parquet must be readable and whole, but got ",
    ),
    "other.parquet": (
        lambda name: write(name, [{"body": "a"}]),
        f"other.parquet {COLUMNS}, but got body.",
        "other.parquet must have a column 'text' and 'label', but got body. hint: --column and --label name other columns",
    ),
    "changed.parquet": (
        lambda name: Path(name).write_bytes(changed(Path(write(name, ROWS["prompt"])).read_bytes(), at=4)),
        "changed.parquet must be readable and whole, but got ",
        "changed.parquet must have a column 'text' and 'label'",
    ),
    "cut.jsonl.gz": (
        lambda name: Path(name).write_bytes(zipped(TEXTS + ROWS["prompt"])[:-9]),
        "cut.jsonl.gz must be readable and whole, but got Compressed file ended",
        "cut.jsonl.gz must be readable and whole, but got Compressed file ended",
    ),
    "changed.jsonl.gz": (
        lambda name: Path(name).write_bytes(changed(zipped(TEXTS + ROWS["prompt"]), at=-8)),  # the checksum
        "changed.jsonl.gz must be readable and whole, but got CRC check failed",
        "changed.jsonl.gz must be readable and whole, but got CRC check failed",
    ),
    "empty.parquet": (
        lambda name: Path(name).write_bytes(b""),
        "must be readable and whole",
        "must be readable and whole",
    ),
    "empty.json": (lambda name: Path(name).write_text(""), "must hold rows, but got 0 in 1 file.", "but got 0."),
    "none.parquet": (
        lambda name: pq.write_table(
            pa.table({k: pa.array([], pa.string()) for k in ("text", "label", "prompt", "completion")}), name
        ),
        "none.parquet must hold rows, but got 0 in 1 file.",
        "the texts must have two labels or more under 'label', but got 0.",
    ),
    "cut.json": (
        lambda name: Path(name).write_text('[{"prompt": "a"'),
        "cut.json must be readable and whole, but got ",
        "cut.json must be readable and whole, but got ",
    ),
    "bad.json": (
        lambda name: write(name, [{"a": 1}, {"a": 2}]),
        "bad.json must hold rows, but got 0 in 1 file: 2 left out. hint: without --on-error skip",
        "under 'label', but got 0: 2 rows are left out.",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_and_change_nothing(here, capsys, name):
    """Also with --on-error skip, which is about rows."""
    make, of_chats, of_labels = BAD_FILES[name]
    make(name)
    for verb, said, good in ((chat, of_chats, ROWS["prompt"]), (labels, of_labels, TEXTS)):
        assert verb(write("good.jsonl", good), out="out") == 0
        before = shards("out")
        capsys.readouterr()
        assert verb(name, "--replace", "--on-error", "skip") == 2
        assert said in error(capsys) and shards("out") == before
        assert verb(name, "--on-error", "skip", out="new") == 2 and not Path("new").exists()
        shutil.rmtree("out")


# what is learned ------------------------------------------------------------------------------------------------------


def test_show_prints_what_is_learned(here, capsys):
    assert chat(write("a.jsonl", ["{", *ROWS["messages"]]), "--show", "2", "--on-error", "skip") == 0
    out = capsys.readouterr().out
    text = "<|im_start|>user\nHello {}<|im_end|>\n<|im_start|>assistant\n⟦us {}<|im_end|>⟧\n"
    pieces = out.split("a.jsonl, line ")[1:]
    assert [piece.split("\n", 1)[1] for piece in pieces] == [text.format(n, n) for n in (0, 1)]
    assert [piece[:1] for piece in pieces] == ["2", "3"] and not Path("out").exists()
    learned = int(pieces[0].split("\n")[0].rsplit(" ", 1)[1])
    assert chat("a.jsonl", "--on-error", "skip", "--val-fraction", "0") == 0
    assert data.read_meta("out")["train"]["assistant"] == 10 * learned
    capsys.readouterr()
    assert chat("a.jsonl", "--show", "-1") == 2 and "--show is at least 0, but got -1" in error(capsys)


def test_a_folder_with_a_tokenizer_alone(here, capsys):
    """As `handgrad data tokenizer` writes it; its template and its special tokens count."""
    write("a.jsonl", ROWS["messages"])
    assert chat("a.jsonl") == 0
    assert main("data chat a.jsonl --model tokens/tokenizer.json --out file".split()) == 0
    assert shards("out") == shards("file") and "train --init MODEL --train file" in capsys.readouterr().out
    assert data.read_meta("out")["chat"]["tokens"]["eos_token"] == "<|im_end|>"
    assert (here / "out" / OWN).read_text() == TEMPLATES["chatml"].read_text()
    Path("tokens/config.json").write_text("{}")  # a model's
    assert chat("a.jsonl", "--replace") == 2 and "but got 'tokens', which holds no complete checkpoint" in error(capsys)


def test_a_run_folder_without_settings_is_a_model(here, capsys):
    """As `handgrad convert` writes it: a checkpoint, beside a tokenizer.json."""
    assert chat(write("a.jsonl", ROWS["messages"])) == 0
    sizes = (
        "--preset smollm2-135m --num-layers 1 --num-heads 2 --num-kv-heads 1 --hidden-size 8 --head-size 4 --mlp-size 8"
    )
    train = f"train --train out {sizes} --max-seq-len 64 --micro-batch 1 --steps 1 --sample-tokens 0 --out run --backend cpu"
    for command in (train, "convert run hf", "convert hf again", "data chat a.jsonl --model again --out two"):
        capsys.readouterr()
        assert main(command.split()) == 0
    assert (
        "train --init again --train two --micro-batch 4 --batch-tokens 256 " in capsys.readouterr().out
    )  # no sequence of the model is longer
    assert not (here / "again" / "config.json").exists() and shards("two") == shards("out")


def test_gpt2_is_no_folder(here, capsys):
    """A folder of that name has no say: not its template, not its special tokens."""
    write("a.jsonl", ROWS["messages"])
    shutil.copytree("tokens", "gpt2")
    words = "data chat a.jsonl --model gpt2 --out out".split()
    assert main(words) == 2 and "gpt2 holds a chat template, in " in error(capsys)
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert main([*words, "--template", "t.jinja"]) == 0
    meta = data.read_meta("out")
    assert (meta["vocab_size"], meta["chat"]["tokens"]) == (50257, {"eos_token": "<|endoftext|>"})


def test_a_table_of_two_layouts_has_nulls_in_one():
    row = {"prompt": None, "completion": None, "instruction": "Add.", "input": "", "output": "2"}
    assert [message["content"] for message in chat_in(row, "row 0")[1]] == ["Add.", "2"]
