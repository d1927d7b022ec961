"""Data recipes (P12) on small copies of each source in its published layout."""

import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers as library

from handgrad import data, tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.data.prepare import bounds, build, hub, readers, recipes
from handgrad.data.prepare.workers import Job, tokenize

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
EOT = 50256
WORDS = "the of and to a in it's he'd naïve — “quoted” 12 3.5% \n \n\n GPT\t中文 I'll don't über".split(" ")


def documents(count, seed=0):
    """Texts of a few words to a few thousand characters; one is empty."""
    rng = random.Random(seed)
    return ["", *(" ".join(rng.choices(WORDS, k=rng.randrange(1, 300))) for _ in range(count - 1))]


def expected(texts):
    encode = tokenizers.gpt2()._encoding.encode_ordinary
    return [i for text in texts for i in [EOT, *encode(text)]]


def read(folder, split):
    return [i for path in sorted(folder.glob(f"{split}_*.bin")) for i in data.open_shard(path).read().tolist()]


def tables(folder, texts, files=3):
    """Parquet files named as FineWeb's are, with several row groups each and a second column."""
    folder.mkdir(parents=True)
    for index, part in enumerate(np.array_split(np.arange(len(texts)), files)):
        rows = [texts[i] for i in part]
        made = pa.table({"id": [str(i) for i in part], "text": rows})
        pq.write_table(made, folder / f"{index:03d}_00000.parquet", row_group_size=7)
    return texts


def run(out, recipe, **options):
    return data.prepare(recipe, out, tokenizers.gpt2(), **options)


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# each source ----------------------------------------------------------------------------------------------------------


def test_p12_shakespeare(tmp_path, monkeypatch):
    meta = run(tmp_path / "out", "shakespeare")
    text = data.shakespeare().read_text(encoding="utf-8")
    ids = expected([part + "\n\n" for part in text.split("\n\n")[:-1]] + text.split("\n\n")[-1:])
    assert read(tmp_path / "out", "val") == ids[:32768] and read(tmp_path / "out", "train") == ids[32768:]
    monkeypatch.chdir(tmp_path)
    assert main(["data", "shakespeare", "--workers", "1"]) == 0
    # not "shakespeare", which --train takes for the packaged text, without a folder of that name
    assert everything(tmp_path / "plays") == everything(tmp_path / "out")
    assert meta["source"]["recipe"] == "shakespeare" and data.read_meta(tmp_path / "out") == meta
    tiny_shakespeare = "First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n" * 4000
    (tmp_path / "input.txt").write_text(tiny_shakespeare)
    run(tmp_path / "tiny", "shakespeare", source=tmp_path / "input.txt")
    ids = expected(["First Citizen:\nSpeak.\n\n", "All:"])
    assert read(tmp_path / "tiny", "val")[: len(ids)] == ids


def stories(folder, count=4):
    folder.mkdir()
    rows = {}
    for index in range(count):
        rows[index] = [{"story": f"  {text}\n", "source": "GPT-4"} for text in documents(20, index)]
        (folder / f"data{index:02d}.json").write_text(json.dumps(rows[index]))
    return rows


def shuffled(rows, seed):
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return [row["story"].strip() for row in rows]


def test_p12_tinystories(tmp_path):
    rows = stories(tmp_path / "TinyStories_all_data")
    with tarfile.open(tmp_path / "TinyStories_all_data.tar.gz", "w:gz") as tar:
        for path in sorted((tmp_path / "TinyStories_all_data").iterdir(), reverse=True):
            tar.add(path, path.name)
    meta = run(tmp_path / "a", "tinystories", source=tmp_path / "TinyStories_all_data")
    assert read(tmp_path / "a", "val") == expected(shuffled(rows[0], 1337))
    train = [shuffled(rows[1], 1337), shuffled(rows[2], 1338), shuffled(rows[3], 1339)]
    assert read(tmp_path / "a", "train") == expected(sum(train, []))
    assert run(tmp_path / "b", "tinystories", source=tmp_path / "TinyStories_all_data.tar.gz") == meta
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize("recipe", ["fineweb", "fineweb-edu"])
def test_p12_fineweb(tmp_path, recipe):
    texts = tables(tmp_path / "snapshot" / "sample" / "100BT", documents(60))
    meta = run(tmp_path / "out", recipe, source=tmp_path / "snapshot", sample="100B", shard_tokens=1000)
    ids = expected(texts)
    assert read(tmp_path / "out", "val") == ids[:1000]  # shard 0
    assert read(tmp_path / "out", "train") == ids[1000:]
    counts = [data.open_shard(tmp_path / "out" / name).count for name in meta["train"]["shards"]]
    assert len(counts) > 3 and counts[:-1] == [1000] * (len(counts) - 1) and sum(counts) == meta["train"]["tokens"]
    run(tmp_path / "flat", recipe, source=tmp_path / "snapshot" / "sample" / "100BT", shard_tokens=1000)
    assert read(tmp_path / "flat", "train") == ids[1000:]
    with pytest.raises(HandgradError, match="sample/10BT"):
        run(tmp_path / "none", recipe, source=tmp_path / "snapshot")


def packed(texts, mode):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return raw.getvalue()


def test_p12_openwebtext(tmp_path):
    texts = [f"Page {index}\n\n\n\nends.\n" + text for index, text in enumerate(documents(12))]
    clean = ["\n\n".join(p.strip("\n") for p in text.split("\n\n") if p.strip("\n")).strip() for text in texts]
    parts = [
        packed({f"{i:07d}-{part}.txt": texts[i].encode() for i in range(part, 12, 4)}, "w:xz") for part in range(4)
    ]
    order = [clean[i] for part in range(4) for i in range(part, 12, 4)]
    (tmp_path / "subsets").mkdir()
    for number in range(2):
        names = {f"openwebtext/urlsf_subset0{number}-{k}_data.xz": parts[2 * number + k] for k in range(2)}
        (tmp_path / "subsets" / f"urlsf_subset0{number}.tar").write_bytes(packed(names, "w"))
    run(tmp_path / "a", "openwebtext", source=tmp_path, shard_tokens=200)
    assert read(tmp_path / "a", "val") + read(tmp_path / "a", "train") == expected(order)
    (tmp_path / "xz").mkdir()
    for index, raw in enumerate(parts):
        (tmp_path / "xz" / f"urlsf_subset0{index}_data.xz").write_bytes(raw)
    run(tmp_path / "b", "openwebtext", source=tmp_path / "xz", shard_tokens=200)
    tables(tmp_path / "hub" / "plain_text", order)
    run(tmp_path / "c", "openwebtext", source=tmp_path / "hub", shard_tokens=200)
    for other in ("b", "c"):
        assert read(tmp_path / other, "train") == read(tmp_path / "a", "train")


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_jsonl(tmp_path, monkeypatch, suffix, opener):
    texts = documents(50)
    with opener(tmp_path / f"a.jsonl{suffix}", "wt", encoding="utf-8") as file:
        for index, text in enumerate(texts):
            file.write(json.dumps({"body": text, "text": 3}, ensure_ascii=index % 2 == 0) + "\n" * (1 + index % 3))
    for size in (37, 5000, 2**20):  # the ids are independent of where jobs end
        for module in (bounds, readers):
            monkeypatch.setattr(module, "BLOCK_BYTES", size)
        out = tmp_path / f"out{size}"
        run(out, "jsonl", files=[tmp_path / f"a.jsonl{suffix}"], column="body", val_tokens=500)
        assert (read(out, "val"), read(out, "train")) == (expected(texts)[:500], expected(texts)[500:])


def test_parquet_on_the_command_line(tmp_path, monkeypatch, capsys):
    texts = tables(tmp_path / "t", documents(30), files=1)
    monkeypatch.chdir(tmp_path)
    assert main("data parquet t/000_00000.parquet --val-tokens 300 --out d --shard-tokens 1000".split()) == 0
    assert "train --train d" in capsys.readouterr().out
    assert read(tmp_path / "d", "val") + read(tmp_path / "d", "train") == expected(texts)
    assert main("data check d".split()) == 0
    assert "all as they were made" in capsys.readouterr().out


def test_tokenizer_json_with_uint32_ids(tmp_path):
    words = {f"w{index}": index for index in range(70_000)} | {"</s>": 70_000}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w69999"}\n{"text": "w2"}\n')
    tokenizer = tokenizers.from_file(tmp_path / "tokenizer.json")
    meta = data.prepare("jsonl", tmp_path / "out", tokenizer, files=[tmp_path / "a.jsonl"], val_tokens=3, workers=2)
    assert meta["dtype"] == "uint32" and read(tmp_path / "out", "val") == [70_000, 1, 69_999]
    assert read(tmp_path / "out", "train") == [70_000, 2]
    raw = (tmp_path / "out" / "val_000000.bin").read_bytes()
    assert np.frombuffer(raw, "<i4", 3).tolist() == [20240801, 7, 3]
    assert tokenizers.load(meta["tokenizer"], tmp_path / "out").vocab_size == 70_001
    assert "tokenizer.json" in data.check(tmp_path / "out")


# questions ------------------------------------------------------------------------------------------------------------

QUESTION = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "label": 3,
    "endings": ["is using wrap.", "is ripping tiles off.", "is holding a cube.", "starts pulling up roofing."],
}


def test_p9_hellaswag(tmp_path):
    encode = tokenizers.gpt2().encode
    short = {key: QUESTION[key] for key in ("ctx", "endings")} | {"label": 1}
    source = tmp_path / "hellaswag_val.jsonl.xz"
    with lzma.open(source, "wt") as file:
        file.write(json.dumps(QUESTION) + "\n" + json.dumps(short) + "\n")
    path, count = data.prepare_questions("hellaswag", tmp_path / "a", tokenizers.gpt2(), source)
    items = data.read_choices(path)
    assert count == 2 and [item.label for item in items] == [3, 1]
    assert items[0].context == encode(QUESTION["ctx"]).tolist()
    assert items[0].endings == items[1].endings == [encode(" " + e).tolist() for e in QUESTION["endings"]]
    words = np.frombuffer(path.read_bytes(), "<u2", offset=1024)
    assert words[[0, 2, 3, 4, 5]].tolist() == [65535, 0, 3, 4, len(items[0].context)]
    (tmp_path / "data").mkdir()
    rows = [short | {"label": str(short["label"])}]  # the hub's labels are strings
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "validation-00000-of-00001.parquet")
    path, _ = data.prepare_questions("hellaswag", tmp_path / "b", tokenizers.gpt2(), tmp_path)
    assert data.read_choices(path) == items[1:]


def test_mmlu(tmp_path, capsys):
    (tmp_path / "data" / "test").mkdir(parents=True)
    rows = [['What is "x", if 2x = 4?', "1", "2", "3", "None"], ["Why?", "a", "b, c", "d", "e"]]
    for name, row, answer in (("anatomy", rows[0], "B"), ("law", rows[1], "D")):
        with (tmp_path / "data" / "test" / f"{name}_test.csv").open("w", newline="") as file:
            csv.writer(file).writerow([*row, answer])
    out = tmp_path / "out"
    assert main(["data", "mmlu", "--source", str(tmp_path), "--out", str(out)]) == 0
    assert "2 questions" in capsys.readouterr().out
    decode = tokenizers.gpt2().decode
    items = data.read_choices(out / "mmlu_test.bin")
    assert [decode(item.context) for item in items] == [f"Question: {row[0]}\n\nAnswer:" for row in rows]
    assert [[decode(e) for e in item.endings] for item in items] == [[f" {a}" for a in row[1:]] for row in rows]
    assert [item.label for item in items] == [1, 3]
    table = [{"question": r[0], "choices": r[1:], "answer": a} for r, a in zip(rows, (1, 3), strict=True)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "test.parquet")
    path, _ = data.prepare_questions("mmlu", tmp_path / "again", tokenizers.gpt2(), tmp_path / "test.parquet")
    assert data.read_choices(path) == items


def test_questions_and_shards_share_checksums(tmp_path):
    """SHA256SUMS lists the newest version of every file in the folder."""
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "q.csv").write_text("Why?,a,b,c,d,B\n")
    run(tmp_path / "out", "shakespeare")
    shards = set(data.check(tmp_path / "out"))
    made = {"hellaswag_val.bin", "hellaswag_val.bin.json", "mmlu_test.bin", "mmlu_test.bin.json"}
    for recipe, name in (("hellaswag", "q.jsonl"), ("mmlu", "q.csv"), ("hellaswag", "q.jsonl")):
        data.prepare_questions(recipe, tmp_path / "out", tokenizers.gpt2(), tmp_path / name)
    assert set(data.check(tmp_path / "out")) == {*shards, *made}
    run(tmp_path / "out", "shakespeare")
    assert set(data.check(tmp_path / "out")) == {*shards, *made}


# documents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer, texts, ids",
    [
        (tokenizers.gpt2(), [], []),
        (tokenizers.gpt2(), [""], [EOT]),
        (tokenizers.gpt2(), ["", "Hello world", ""], [EOT, EOT, 15496, 995, EOT]),
        (tokenizers.chars("abc"), ["ab", "", "c"], [0, 1, 2]),
        (tokenizers.chars("abc"), [], []),
    ],
)
def test_end_of_text_precedes_every_document(tokenizer, texts, ids):
    [(_, whole), (_, continued)] = tokenize(
        [(0, Job(lambda: texts, ())), (1, Job(lambda: texts, (), continues=True))], tokenizer, 1
    )
    assert whole.ids.tolist() == ids and whole.ids.dtype == np.uint16 and whole.damage.replaced == 0
    assert continued.ids.tolist() == (ids[1:] if tokenizer.eot is not None else ids)


# guarantees -----------------------------------------------------------------------------------------------------------


def test_p12_shards_are_independent_of_workers(tmp_path):
    source = tmp_path / "source"
    tables(source, documents(80))
    made = []
    for workers in (1, 3):
        run(tmp_path / str(workers), "fineweb", source=source, shard_tokens=1500, workers=workers)
        made.append(everything(tmp_path / str(workers)))
    assert made[0] == made[1] and len(made[0]) > 5


SLOW = """
import sys, time
from pathlib import Path
from handgrad import data, tokenizers
from handgrad.data.prepare import build

def write(path, pieces):
    plain(path, pieces)
    print("shard", flush=True)
    time.sleep(0.2)

if __name__ == "__main__":
    plain, build.write_whole = build.write_whole, write
    data.prepare("fineweb", sys.argv[2], tokenizers.gpt2(), source=sys.argv[1], shard_tokens=1500, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_p12_resume_after_kill_is_bit_exact(tmp_path, monkeypatch, workers):
    """Fails if resuming forgets `_Done.ids`, the ids of a job that crosses from one shard to the next."""
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    tables(source, documents(80))
    run(whole, "fineweb", source=source, shard_tokens=1500)
    (tmp_path / "slow.py").write_text(SLOW)
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), str(source), str(out), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert child.stdout.readline() == "shard\n"
    with pytest.raises(HandgradError, match="by one process, but got another at work"):
        run(out, "fineweb", source=source, shard_tokens=1500)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert [path.name for path in out.iterdir()] == [".preparing"]  # no incomplete data set
    kept = {path.name: path.stat().st_mtime_ns for path in (out / ".preparing").glob("*.bin")}
    assert len(kept) >= 3
    read = []
    table = recipes.table

    def noting(path, parser):
        for end, job in table(path, parser):
            yield end, Job(partial(noted, job), ())

    def noted(job):
        read.append(job.arguments[:2])
        return job.read(*job.arguments)

    monkeypatch.setattr(recipes, "table", noting)
    run(out, "fineweb", source=source, shard_tokens=1500)
    assert everything(out) == everything(whole)
    assert 0 < len(read) < sum(pq.ParquetFile(path).num_row_groups for path in source.iterdir())
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items() if name < max(kept))


def test_resume_restarts_when_settings_changed(tmp_path, monkeypatch):
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    tables(source, documents(40))

    def interrupted(**options):
        with monkeypatch.context() as patch:
            patch.setattr(build, "install", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(out, "fineweb", source=source, **options)
        assert (out / ".preparing" / "progress.json").exists()

    interrupted(shard_tokens=1000)
    run(out, "fineweb", source=source, shard_tokens=1500)
    run(whole, "fineweb", source=source, shard_tokens=1500)
    assert everything(out) == everything(whole)
    interrupted(shard_tokens=1500)
    (out / ".preparing" / "train_000001.bin").write_bytes(b"")
    run(out, "fineweb", source=source, shard_tokens=1500)
    assert everything(out) == everything(whole)
    interrupted(shard_tokens=1500)
    (out / ".preparing" / "progress.json").write_text("{")
    run(out, "fineweb", source=source, shard_tokens=1500)
    assert everything(out) == everything(whole)
    for value in (2**70, -1, "1"):
        interrupted(shard_tokens=1500)
        saved = json.loads((out / ".preparing" / "progress.json").read_text())
        saved["done"]["ids"] = value
        (out / ".preparing" / "progress.json").write_text(json.dumps(saved))
        run(out, "fineweb", source=source, shard_tokens=1500)
        assert everything(out) == everything(whole)
    interrupted(shard_tokens=1500)
    (source / "001_00000.parquet").unlink()
    run(out, "fineweb", source=source, shard_tokens=1500, replace=True)
    assert data.read_meta(out)["source"]["files"] == 2


def test_resume_restarts_under_another_column(tmp_path, monkeypatch):
    rows = [json.dumps({"text": text, "other": text.upper()}) for text in documents(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    for name, columns in (("out", ("text", "other")), ("whole", ("other",))):
        for column in columns:
            given = dict(files=tmp_path / "rows.jsonl", column=column, val_tokens=500, shard_tokens=1000)
            with monkeypatch.context() as patch:
                if column == "text":
                    patch.setattr(build, "install", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
                with contextlib.suppress(KeyboardInterrupt):
                    run(tmp_path / name, "jsonl", **given)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_resume_compares_source_content(tmp_path, monkeypatch):
    """A new mtime is the same source; other content of the same size and mtime is not."""
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text('{"text": "one"}\n{"text": "two"}\n')
    make = partial(run, out, "jsonl", files=[source], val_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(build, "install", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make()
        os.utime(source, ns=(1, 1))
        patch.setattr(
            build, "_write", lambda parts, building, tokenizer, settings, plan, done, progress: kept.append(done)
        )
        kept = []
        with pytest.raises(KeyboardInterrupt):
            make()
        assert kept[0].tokens("val") == 2
    source.write_text('{"text": "two"}\n{"text": "one"}\n')
    os.utime(source, ns=(1, 1))
    make()
    assert read(out, "val") == expected(["two"])


def test_resume_after_kill_during_install(tmp_path, monkeypatch):
    """Killed at each move in turn: moved files are recognised, the others are moved by the next run."""
    source, whole = tmp_path / "source", tmp_path / "whole"
    tables(source, documents(20))
    run(whole, "fineweb", source=source, shard_tokens=1500)
    moves = len(list(whole.iterdir()))
    for after in range(moves):
        out = tmp_path / f"out{after}"
        run(out, "shakespeare")
        with monkeypatch.context() as patch:
            plain, count = build.Path.replace, iter(range(99))

            def stop(self, target, plain=plain, count=count, after=after):
                if next(count) == after:
                    raise KeyboardInterrupt
                return plain(self, target)

            patch.setattr(build.Path, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                run(out, "fineweb", source=source, shard_tokens=1500, replace=True)
        assert not (out / "meta.json").exists()  # a mixture must not look complete
        run(out, "fineweb", source=source, shard_tokens=1500)
        assert everything(out) == everything(whole)


def test_check_detects_changed_byte(tmp_path, capsys):
    run(tmp_path, "shakespeare")
    sizes = data.check(tmp_path)
    assert set(sizes) == {"train_000000.bin", "val_000000.bin", "meta.json"}
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True).returncode == 0
    for name in sizes:
        raw = (tmp_path / name).read_bytes()
        for place in (0, len(raw) // 2, len(raw) - 1):
            (tmp_path / name).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            assert main(["data", "check", str(tmp_path)]) == 2
            assert f"{name} must have the sha256" in capsys.readouterr().err
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "val_000000.bin").unlink()
    with pytest.raises(HandgradError, match="must list files of its folder"):
        data.check(tmp_path)
    with pytest.raises(HandgradError, match="readable list of checksums"):
        data.check(tmp_path / "none")


JOBS = """
import os, signal
from handgrad.core.errors import HandgradError

def dies():
    os.kill(os.getpid(), signal.SIGKILL)
    yield ""

def eats():
    yield "fine"
    raise MemoryError

def refuses():
    yield "fine"
    raise HandgradError("data", "a rule", "a value", hint="a hint")
"""


def test_worker_failure_is_reported(tmp_path, monkeypatch):
    (tmp_path / "failing_jobs.py").write_text(JOBS)  # a module, because worker processes import it
    monkeypatch.syspath_prepend(tmp_path)
    jobs = importlib.import_module("failing_jobs")
    with pytest.raises(HandgradError, match="^.data. a rule, but got a value. hint: a hint$"):
        list(tokenize([(0, Job(jobs.refuses, ()))] * 9, tokenizers.gpt2(), 2))
    begin = time.monotonic()
    with pytest.raises(HandgradError, match="must stay alive, but got one that died. hint: .* use fewer workers"):
        list(tokenize([(0, Job(jobs.dies, ()))] * 99, tokenizers.gpt2(), 2))
    assert time.monotonic() - begin < 30
    for workers in (1, 2):
        with pytest.raises(HandgradError, match="tokenizing ran out of memory. hint: use fewer workers"):
            list(tokenize([(0, Job(jobs.eats, ()))], tokenizers.gpt2(), workers))


TRAP = """
import importlib, sys
if {is_child}:
    open({mark!r}, "a").write(__name__ + " ")
path, sys.path, name = sys.path, [p for p in sys.path if p not in ("", {here!r})], __name__
del sys.modules[name]
importlib.import_module(name)  # the real one, so that the process goes on
sys.path = path
"""


def trapped(folder, is_child):
    """A folder with modules named as Python's and the packages', which note in `imported` who imports them; that file."""
    for name in ("random", "tempfile", "numpy", "tiktoken", "multiprocessing", "json"):
        trap = TRAP.format(mark=str(folder / "imported"), here=str(folder), is_child=is_child)
        (folder / f"{name}.py").write_text(trap)
    return folder / "imported"


def found():
    """The environment in which a process finds this package from any folder."""
    return os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[2])}


@pytest.mark.parametrize("start", ["script", "-m", "-c"])
def test_workers_do_not_import_from_the_current_folder(tmp_path, start):
    """However this process was started. `-m` and `-c` look there themselves; workers look there last."""
    here = tmp_path / "here"
    here.mkdir()
    mark = trapped(here, '"--multiprocessing-fork" in sys.orig_argv or "tracker" in str(sys.orig_argv)')
    words = ["data", "text", str(data.shakespeare()), "--out", str(tmp_path / "out"), "--workers", "2"]
    code = "import sys\nfrom handgrad.cli.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
    (tmp_path / "run.py").write_text(code)
    how = {"script": [str(tmp_path / "run.py")], "-m": ["-m", "handgrad.cli.__main__"], "-c": ["-c", code]}
    done = subprocess.run([sys.executable, *how[start], *words], cwd=here, capture_output=True, text=True, env=found())
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()
    assert data.read_meta(tmp_path / "out")["train"]["tokens"] > 300_000


def test_compilers_do_not_import_from_the_current_folder(tmp_path, monkeypatch):
    """The processes that compile CUDA kernels, too; no compiler is needed for none."""
    nvrtc, started = importlib.import_module("handgrad.backends.cuda.nvrtc"), []
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc.subprocess, "Popen", lambda command, **_: started.append(command) or mock.MagicMock())
        nvrtc._start_compiler([], tmp_path)
    mark = trapped(tmp_path, "True")
    done = subprocess.run(started[0], cwd=tmp_path, capture_output=True, text=True, input="[]", env=found())
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()


def test_workers_exit_with_killed_parent(tmp_path):
    (tmp_path / "a.py").write_text(
        "import multiprocessing, time\n"
        "from handgrad import tokenizers\n"
        "from handgrad.data.prepare.workers import Job, tokenize\n"
        "def texts():\n    yield 'a'\n"
        "if __name__ == '__main__':\n"
        "    for _ in tokenize([(0, Job(texts, ()))] * 99, tokenizers.gpt2(), 2):\n"
        "        print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "        time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, str(tmp_path / "a.py")], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in child.stdout.readline().split()]
    assert len(pids) == 2
    child.kill()
    child.wait()
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") and running(pid) for pid in pids):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# mistakes -------------------------------------------------------------------------------------------------------------


def test_damaged_sources(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with lzma.open(tmp_path / "cut.jsonl.xz", "wt") as file:
        file.write('{"text": "abc"}\n' * 9)
    (tmp_path / "cut.jsonl.xz").write_bytes((tmp_path / "cut.jsonl.xz").read_bytes()[:-20])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    for recipe, name, message in [
        ("jsonl", "bad.jsonl", "line at byte 14: must be JSON"),
        ("jsonl", "other.jsonl", "must hold text under 'text', but got one with 'body'. hint: --column"),
        ("jsonl", "list.jsonl", "but got a list"),
        ("jsonl", "cut.jsonl.xz", "cut.jsonl.xz must be readable and whole"),
        ("jsonl", "none.jsonl", "which is missing"),
        ("parquet", "a.parquet", "a.parquet must be readable and whole"),
        ("parquet", "null.parquet", "row 1: an object must hold text under 'text', but got null"),
    ]:
        with pytest.raises(HandgradError, match=message):
            run(tmp_path / "out", recipe, files=[tmp_path / name], val_tokens=1)
        assert not (tmp_path / "out").exists()
    with pytest.raises(HandgradError, match="jsonl comes from at least one file, but got none"):
        run(tmp_path / "out", "jsonl")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(HandgradError, match="must have a column 'text', but got body"):
        run(tmp_path / "out", "parquet", files=[tmp_path / "b.parquet"])
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "data00.json").write_text("{}")
    with pytest.raises(HandgradError, match="two files or more"):
        run(tmp_path / "out", "tinystories", source=tmp_path / "s")
    (tmp_path / "s" / "data01.json").write_text("[]")
    with pytest.raises(HandgradError, match="a JSON list of stories, but got a dict"):
        run(tmp_path / "out", "tinystories", source=tmp_path / "s")
    with pytest.raises(HandgradError, match="must be a file, or a folder with .* but got no such file"):
        run(tmp_path / "out", "openwebtext", source=tmp_path / "s")
    with pytest.raises(HandgradError, match="train part of the text must hold tokens, .* first 32,768 tokens are val"):
        (tmp_path / "short.txt").write_text("to be or not to be")
        run(tmp_path / "out", "shakespeare", source=tmp_path / "short.txt")
    tables(tmp_path / "few", ["to be"], files=1)
    (tmp_path / "few.jsonl").write_text('{"text": "to be"}')
    for words, flag in (
        (f"fineweb --source {tmp_path}/few", "--shard-tokens"),
        (f"jsonl {tmp_path}/few.jsonl", "--val-tokens"),
    ):
        assert main(f"data {words} --out {tmp_path}/out".split()) == 2
        assert f" tokens are val: {flag} can be smaller" in capsys.readouterr().err
        assert main([*f"data {words}".split(), flag, "word"]) == 2  # so the flag exists
        assert f"{flag} takes a whole number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_questions(tmp_path):
    ask = partial(data.prepare_questions, "hellaswag", tmp_path / "out", tokenizers.gpt2(), tmp_path / "q.jsonl")
    for row, message in [
        (QUESTION | {"label": ""}, "line 1: one of the 4 answers must be right, but got ''"),
        (QUESTION | {"label": 4}, "but got 4"),
        (QUESTION | {"endings": "abcd"}, "a text and a list of answers"),
        ([1], "must be a JSON object"),
        (QUESTION | {"endings": ["a"], "label": 0}, "two or more"),
        (QUESTION | {"ctx": "word " * 40_000}, "must take under 65,536 bytes"),
    ]:
        (tmp_path / "q.jsonl").write_text(json.dumps(row))
        with pytest.raises(HandgradError, match=message):
            ask()
    with pytest.raises(HandgradError, match="at most 65,536, but got 70000"):
        wide = tokenizers.chars(map(chr, range(70_000)))
        data.prepare_questions("hellaswag", tmp_path / "out", wide, tmp_path / "q.jsonl")


def test_hub_files_of_one_revision(tmp_path, monkeypatch):
    """One request lists the revision and its files; every file is then fetched from that revision."""
    tables(tmp_path / "sample" / "10BT", documents(30))
    fetched = []

    class Hub:
        class HfApi:
            def dataset_info(self, repo, files_metadata):
                files = [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.parquet"), reverse=True)]
                named = [type("File", (), {"rfilename": name, "size": 5}) for name in ["README.md", *files]]
                return type("Info", (), {"sha": "abc", "siblings": named})

        @staticmethod
        def hf_hub_download(repo, name, repo_type, revision):
            fetched.append((repo, name, repo_type, revision))
            return str(tmp_path / name)

    monkeypatch.setattr(hub, "_library", lambda: Hub)
    meta = run(tmp_path / "out", "fineweb-edu", shard_tokens=1000)
    names = [f"sample/10BT/{index:03d}_00000.parquet" for index in range(3)]
    assert fetched == [("HuggingFaceFW/fineweb-edu", name, "dataset", "abc") for name in names]
    assert meta["source"]["first"] == f"hf:HuggingFaceFW/fineweb-edu@abc/{names[0]}"
    assert "sha256" not in meta["source"]  # the name has the revision
    with pytest.raises(HandgradError, match="must hold sample/100BT/.*, but got none"):
        run(tmp_path / "none", "fineweb-edu", sample="100B")


@pytest.mark.parametrize(
    "module, words",
    [
        ("huggingface_hub", "data fineweb"),
        ("huggingface_hub", "data hellaswag"),
        ("pyarrow.parquet", "data parquet a.parquet"),
    ],
)
def test_missing_package_is_named(tmp_path, monkeypatch, capsys, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    assert main(words.split()) == 2
    extra = {"huggingface_hub": "hub", "pyarrow.parquet": "parquet"}[module]
    assert f"no such package. hint: {install_command(extra)}" in capsys.readouterr().err


def test_missing_network_is_reported(monkeypatch, capsys):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["data", "tinystories"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("[data] roneneldan/TinyStories must be downloadable, but got ")
    assert line.endswith("hint: --source reads local files\n")


def test_progress_reaches_the_end(tmp_path):
    tables(tmp_path / "t", documents(30))
    seen = []
    run(tmp_path / "out", "fineweb", source=tmp_path / "t", shard_tokens=1000, progress=lambda *a: seen.append(a))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and seen[-1][2] == len(expected(documents(30)))
