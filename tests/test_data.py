"""Token shards, the loader's guarantees, and building shards from text."""

import doctest
import errno
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handgrad import data, tokenizers
from handgrad.core.errors import HandgradError
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data import loader, shards
from handgrad.data.prepare import text as prepare

U16, U32 = np.dtype("<u2"), np.dtype("<u4")


@pytest.mark.parametrize("module", [loader, shards, prepare])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# shards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, magic, version", [(U16, 20240520, 1), (U32, 20240801, 7)])
def test_shard_is_llmc_format(tmp_path, dtype, magic, version):
    path = tmp_path / "a.bin"
    ids = np.array([1, 2, np.iinfo(dtype).max])
    data.write_shard(path, [ids[:1], [], ids[1:]], dtype)
    raw = path.read_bytes()
    assert np.frombuffer(raw, "<i4", 256).tolist() == [magic, version, 3] + [0] * 253
    assert np.frombuffer(raw, dtype, offset=1024).tolist() == ids.tolist()
    assert data.open_shard(path).read().tolist() == ids.tolist()


@pytest.mark.parametrize("count", [2**31 + 7, 2**32 + 7])  # beyond int32, beyond the header's 32-bit count
def test_shard_over_2_gib(tmp_path, count):
    path = tmp_path / "a.bin"
    data.write_shard(path, [[1]], U16)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(np.array(count % 2**32, "<u4"))
        file.truncate(1024 + 2 * count)  # sparse: uses no disk space
        file.seek(1024 + 2 * (count - 3))
        file.write(np.array([7, 8, 9], U16))
    shard = data.open_shard(path)
    assert shard.count == count
    assert shard.read(count - 3).tolist() == [7, 8, 9]
    last = data.tokens(path, 2, 2, shuffle=False)
    assert last.batch(last.windows - 1)["targets"].tolist() == [[8, 9]]


def header(magic=20240520, version=1, count=4):
    words = np.zeros(256, "<u4")
    words[:3] = magic, version, count
    return words.tobytes()


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "must hold tokens, but got an empty file"),
        (header()[:600], "header of 1024 bytes, but got 600"),
        (header(count=0), "a header that counts 0"),
        (header(magic=20240326) + bytes(8), "magic number 20240520 or 20240801, but got 20240326"),
        (header(version=7) + bytes(8), "must be version 1, but got 7"),
        (header(magic=20240801, version=1) + bytes(16), "must be version 7, but got 1"),
        (header() + bytes(6), "must have 1032 bytes, as its header counts 4 tokens, but got 1030"),
        (header() + bytes(7), "but got 1031"),
        (header() + bytes(10), "but got 1034"),
    ],
)
def test_damaged_shard(tmp_path, raw, message):
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(HandgradError, match=message) as error:
        data.tokens(tmp_path / "*.bin", 1, 1)
    assert str(error.value).startswith("[data] ") and "\n" not in str(error.value)


def test_no_shard(tmp_path):
    with pytest.raises(HandgradError, match="must match .*, but got none"):
        data.tokens(tmp_path / "*.bin", 1, 1)
    with pytest.raises(HandgradError, match="which is missing"):
        data.open_shard(tmp_path / "a.bin")
    with pytest.raises(HandgradError, match="a folder"):
        data.open_shard(tmp_path)


def test_failed_write_keeps_old_shard(tmp_path):
    path = tmp_path / "a.bin"
    data.write_shard(path, [[1, 2, 3]], U16)
    with pytest.raises(HandgradError, match="0..65535, but got 65536"):
        data.write_shard(path, [[4], [65536]], U16)
    with pytest.raises(HandgradError, match="but got -1"):
        data.write_shard(path, [[-1]], U16)
    assert data.open_shard(path).read().tolist() == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(HandgradError, match="must be writable, but got No such file"):
        data.write_shard(tmp_path / "none" / "a.bin", [[1]], U16)


# loader ---------------------------------------------------------------------------------------------------------------


def make(folder, counts, seq_len, batch, **options):
    """Tokens over shards that together hold 0, 1, 2, ..., so that an id is its own position."""
    begin = 0
    for index, count in enumerate(counts):
        data.write_shard(folder / f"train_{index:03d}.bin", [np.arange(begin, begin + count)], U32)
        begin += count
    return data.tokens(folder / "train_*.bin", seq_len, batch * seq_len, **options)


def sizes():
    return st.lists(st.integers(1, 60), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(counts=sizes(), seq_len=st.integers(1, 12), shuffle=st.booleans(), seed=st.integers(-(2**70), 2**70))
def test_epoch_reads_every_window_once(tmp_path_factory, counts, seq_len, shuffle, seed):
    folder = tmp_path_factory.mktemp("data")
    if max(counts) <= seq_len:
        with pytest.raises(HandgradError, match="a shard must hold a window"):
            make(folder, counts, seq_len, 1)
        return
    tokens = make(folder, counts, seq_len, 1, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        batches = [tokens.batch(epoch * tokens.windows + step) for step in range(tokens.windows)]
        ids = np.concatenate([b["ids"] for b in batches])
        targets = np.concatenate([b["targets"] for b in batches])
        assert (targets == ids + 1).all() and (np.diff(ids, axis=1) == 1).all()
        assert len(np.unique(ids)) == ids.size  # no token predicted from twice
        edges = np.cumsum([0, *counts])
        home = np.searchsorted(edges, ids[:, 0], side="right")
        assert (home == np.searchsorted(edges, targets[:, -1], side="right")).all()  # no window crosses shards
        for shard, count in enumerate(counts):
            used = int((home == shard + 1).sum())
            assert used * seq_len > count - 1 - (2 if shuffle else 1) * seq_len
        if not shuffle:
            assert (np.sort(ids[:, 0]) == ids[:, 0]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_and_micro_batches_split_the_same_sequences(tmp_path_factory, draw):
    world = draw.draw(st.integers(1, 4))
    micro_batch = draw.draw(st.integers(1, 3))
    micro_steps = draw.draw(st.integers(1, 3))
    step = draw.draw(st.integers(0, 10**6))
    batch = world * micro_batch * micro_steps
    tokens = make(tmp_path_factory.mktemp("data"), [50, 7, 31], 3, batch, seed=draw.draw(st.integers(0, 99)))
    whole = tokens.batch(step)
    parts = [
        tokens.batch(step, rank, world, micro_batch=micro_batch, micro_step=micro_step)
        for micro_step in range(micro_steps)
        for rank in range(world)
    ]
    for key in ("ids", "targets"):
        assert whole[key].shape == (batch, 3) and whole[key].dtype == np.int32 and whole[key].flags.c_contiguous
        assert (np.concatenate([part[key] for part in parts]) == whole[key]).all()


def test_batch_is_pure(tmp_path):
    one = make(tmp_path, [100, 50], 4, 6, seed=3)
    other = data.tokens(one.pattern, 4, 24, seed=3)
    steps = [0, 17, 5, 10**12, 17]
    forward = [one.batch(step)["ids"] for step in steps]
    backward = [other.batch(step)["ids"] for step in reversed(steps)][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))
    assert (forward[1] == forward[4]).all()
    assert (data.tokens(one.pattern, 4, 24, seed=4).batch(0)["ids"] != forward[0]).any()
    order = np.concatenate([one.batch(step)["ids"][:, 0] for step in range(12)])
    assert (order[: one.windows] != order[one.windows : 2 * one.windows]).any()  # each epoch has another order


@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 64])
def test_epochs_shift_windows_to_every_alignment(tmp_path, seq_len):
    tokens = make(tmp_path, [seq_len * 5 + 2], seq_len, 1)
    starts = Counter(int(tokens.batch(step)["ids"][0, 0]) for step in range(tokens.windows * seq_len))
    assert starts == Counter(range(tokens.windows * seq_len))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(n, seed, epoch):
    order = loader._permute(np.arange(n), n, seed, epoch)
    assert (np.sort(order) == np.arange(n)).all()
    some = np.array([n - 1, 0, n // 2])
    assert (loader._permute(some, n, seed, epoch) == order[some]).all()


def test_permutation_is_uniform():
    n = 16
    tables = np.array([loader._permute(np.arange(n), n, seed, 0) for seed in range(4000)])
    for place in range(n):
        expected = 4000 / n
        chi2 = ((np.bincount(tables[:, place].astype(int), minlength=n) - expected) ** 2 / expected).sum()
        assert chi2 < 60  # 15 degrees of freedom: p below 1e-6
    large = loader._permute(np.arange(2**40, 2**40 + 10_000), 10**12 * 2, 1, 1).astype(float)
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.05


@settings(max_examples=60, deadline=None)
@given(
    counts=sizes(),
    seq_len=st.integers(1, 9),
    micro_batch=st.integers(1, 5),
    world=st.integers(1, 3),
    limit=st.one_of(st.none(), st.integers(1, 200)),
)
def test_sweep_is_independent_of_ranks_and_micro_batch(tmp_path_factory, counts, seq_len, micro_batch, world, limit):
    if max(counts) <= seq_len:
        return
    tokens = make(tmp_path_factory.mktemp("data"), counts, seq_len, 1)
    ranks = [list(tokens.sweep(micro_batch, limit, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = []
    for batches in zip(*ranks, strict=True):
        for batch in batches:
            assert batch["ids"].shape == batch["targets"].shape == (micro_batch, seq_len)
            counted = batch["targets"] != IGNORE_INDEX
            assert (counted.all(axis=1) | ~counted.any(axis=1)).all()
            rows += batch["targets"][counted.any(axis=1)].tolist()
    edges = np.cumsum([0, *counts])
    grid = [
        list(range(begin + 1 + k * seq_len, begin + 1 + (k + 1) * seq_len))
        for begin, count in zip(edges, counts, strict=False)
        for k in range((count - 1) // seq_len)
    ]
    assert rows == (grid if limit is None else grid[: max(limit // seq_len, 1)])


def test_loader_argument_errors(tmp_path):
    tokens = make(tmp_path, [100], 4, 6)
    with pytest.raises(HandgradError, match="multiple of seq_len 4, but got 10. hint: 8 or 12"):
        data.tokens(tokens.pattern, 4, 10)
    with pytest.raises(HandgradError, match="multiple of seq_len 8, but got 4. hint: 8"):
        data.tokens(tokens.pattern, 8, 4)
    with pytest.raises(HandgradError, match="at least 1 token"):
        data.tokens(tokens.pattern, 0, 4)
    with pytest.raises(HandgradError, match=r"batch_tokens 24 must be .* but got 4 \* 4 \* 1"):
        tokens.batch(0, micro_batch=4)
    with pytest.raises(HandgradError, match=r"4 \* 1 \* 7"):
        tokens.batch(0, 0, 7)
    for wrong in [dict(step=-1), dict(step=0, rank=2, world=2), dict(step=0, micro_batch=3, micro_step=2)]:
        with pytest.raises(HandgradError, match="must lie in"):
            tokens.batch(**wrong)


def test_loader_fills_the_named_inputs(tmp_path):
    """The names are a program's inputs: a model that needs an input the shards do not hold learns it by name."""
    tokens = make(tmp_path, [100], 4, 6)
    whole = tokens.batch(0)
    assert list(whole) == ["ids", "targets"]
    for names in (["targets", "ids"], ["ids"], ["targets"], []):
        batch = tokens.batch(0, names=names)
        assert list(batch) == names and all((batch[name] == whole[name]).all() for name in names)
        assert list(next(tokens.sweep(2, names=names))) == names
    for call in (tokens.batch, lambda step, names: next(tokens.sweep(2, names=names))):
        with pytest.raises(
            HandgradError, match="objective Causal fills the model inputs ids and targets, but got 'positions'"
        ):
            call(0, names={"ids": None, "positions": None})
    apart = data.tokens(tokens.pattern, 4, 24, objective=data.Causal(eot=7))
    assert list(apart.batch(0)) == ["ids", "targets", "first", "positions"]
    assert list(apart.batch(0, names=["first"])) == ["first"]
    with pytest.raises(HandgradError, match="ids, targets, first and positions, but got 'types'"):
        apart.batch(0, names=["types"])


@pytest.mark.parametrize("bad, place", [(64, 3), (2**31, 3), (2**32 - 1, 99), (64, 0)])
def test_id_outside_vocabulary_is_an_error(tmp_path, bad, place):
    ids = np.arange(100) % 64
    ids[place] = bad
    data.write_shard(tmp_path / "a.bin", [ids], U32)
    tokens = data.tokens(tmp_path / "a.bin", 9, 9 * 11, shuffle=False, vocab_size=64)
    with pytest.raises(HandgradError, match=f"a.bin must hold ids below the vocabulary size 64, but got {bad}"):
        tokens.batch(0)
    with pytest.raises(HandgradError, match=f"but got {bad}"):
        list(tokens.sweep(4))
    tokens.vocab_size = None
    tokens.batch(0)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_OPEN_SHARDS", 2)
    tokens = make(tmp_path, [9] * 8, 4, 16, shuffle=False)
    assert (tokens.batch(0)["ids"][:, 0] == np.repeat(np.arange(8) * 9, 2) + np.tile([0, 4], 8)).all()


def test_batch_time(tmp_path):
    """At most as long as 5,000 additions in Python; 2,100 to 2,600 were measured, on slow and on fast machines.

    Machines differ by a factor of 3 and vary from second to second, so batches and additions alternate.
    """
    data.write_shard(tmp_path / "a.bin", [np.arange(1_000_000) % 64], U16)
    tokens = data.tokens(tmp_path / "a.bin", 64, 768, vocab_size=64)
    batches, additions = [], []
    for step in range(2000):
        begin = time.perf_counter()
        tokens.batch(step)
        between, total = time.perf_counter(), 0
        for i in range(1000):
            total += i
        batches.append(between - begin)
        additions.append(time.perf_counter() - between)
    assert np.median(batches) < 5 * np.median(additions)


# files that change during a run ---------------------------------------------------------------------------------------


def test_shard_that_shrinks_is_an_error(tmp_path):
    """With mapped memory the process would die by SIGBUS. The bytes that are still there are read."""
    tokens = make(tmp_path, [100_000], 64, 640, shuffle=False)
    path = tmp_path / "train_000.bin"
    assert tokens.batch(0)["ids"][0, 0] == 0
    os.truncate(path, 1024 + 4 * 50_000)
    assert tokens.batch(0)["ids"].ravel().tolist() == list(range(640 * 64))  # windows 0..639 end at id 40,960
    with pytest.raises(HandgradError) as error:
        tokens.batch(1)
    expected = f"[data] {path} must not change during a run, but got 201,024 bytes, 401,024 before."
    assert str(error.value) == expected and error.value.where == "data"


def test_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    tokens = make(tmp_path, [100], 4, 24)

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    rule = r"train_000.bin must stay readable during a run, but got Input/output error at byte [\d,]+ of 1,424"
    with pytest.raises(HandgradError, match=rule) as error:
        tokens.batch(0)
    assert error.value.where == "data"  # the training loop then saves


def test_short_reads_are_continued(tmp_path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [memoryview(to[0]).cast("B")[:3]], at))
    assert make(tmp_path, [100], 4, 24, shuffle=False).batch(0)["targets"][5].tolist() == [21, 22, 23, 24]


def test_file_replaced_by_renaming_is_read_on(tmp_path, monkeypatch):
    """As long as it is open. Opened again, it is another file, which is refused; so are other sizes and headers."""
    monkeypatch.setattr(loader, "_OPEN_SHARDS", 1)
    tokens = make(tmp_path, [9, 9], 4, 1, shuffle=False)
    path = tmp_path / "train_000.bin"
    assert tokens.batch(0)["ids"].tolist() == [[0, 1, 2, 3]]
    older = path.read_bytes()
    data.write_shard(path, [np.arange(50, 59)], U32)
    assert tokens.batch(1)["ids"].tolist() == [[4, 5, 6, 7]]
    tokens.batch(2)  # another shard: the first is closed
    with pytest.raises(HandgradError, match="train_000.bin must not change during a run, but got another file"):
        tokens.batch(0)
    shard = data.open_shard(path)
    for raw, message in [
        (older[:-4], "but got 1,056 bytes, 1,060 before"),
        (older[:12] + b"\0" + older[13:], None),  # header words that nothing reads may differ
        (np.array([20240520, 1, 18], "<u4").tobytes() + older[12:], "but got another header"),
        (b"x" + older[1:], "magic number"),
    ]:
        path.write_bytes(raw)  # in place: the same inode
        if message is None:
            assert shard.read(7).tolist() == [7, 8]
            continue
        with pytest.raises(HandgradError, match=message):
            shard.read()
    path.unlink()
    with pytest.raises(HandgradError, match="must stay readable during a run, but got No such file"):
        shard.read()


def test_shards_are_closed(tmp_path):
    def open_files():
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(tmp_path)) for fd in os.listdir("/proc/self/fd")
        )

    tokens = make(tmp_path, [9] * 8, 4, 64)
    tokens.batch(0)
    assert open_files() == 8
    del tokens
    assert open_files() == 0
    data.open_shard(tmp_path / "train_000.bin").read()
    assert open_files() == 0


def test_shards_of_both_formats_in_one_batch(tmp_path):
    data.write_shard(tmp_path / "a.bin", [np.arange(9)], U16)
    data.write_shard(tmp_path / "b.bin", [np.arange(70_000, 70_009)], U32)
    batch = data.tokens(tmp_path / "*.bin", 4, 16, shuffle=False).batch(0)
    assert batch["ids"][:, 0].tolist() == [0, 4, 70_000, 70_004]
    assert batch["targets"][:, -1].tolist() == [4, 8, 70_004, 70_008]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "zero", "long", "denied"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    """At once: a pipe would wait for a writer, and a device might never end."""
    path, got = tmp_path / "a.bin", "a pipe, a socket or a device"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
        got = "a folder"
    elif kind == "zero":
        path, got = tmp_path / "a\0b", "not reachable: embedded null byte"
    elif kind == "long":
        path, got = tmp_path / ("x" * 300), "not reachable: File name too long"
    else:
        (tmp_path / "file").write_text("")
        path, got = tmp_path / "file" / "a.bin", "not reachable: Not a directory"
    with pytest.raises(HandgradError) as error:
        data.open_shard(path)
    assert f"which is {got}." in str(error.value)


# text -----------------------------------------------------------------------------------------------------------------


def read(folder, split):
    paths = sorted(folder.glob(f"{split}_*.bin"))
    return np.concatenate([data.open_shard(path).read() for path in paths]).tolist()


def test_shakespeare(tmp_path):
    text = data.shakespeare()
    begin = time.perf_counter()
    meta = data.prepare_text([text], tmp_path, tokenizers.chars(data.read_text([text])))
    assert time.perf_counter() - begin < 1
    assert (meta["vocab_size"], meta["dtype"]) == (64, "uint16")
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (1_011_385, 112_377)
    assert data.read_meta(tmp_path) == meta
    tokenizer = tokenizers.load(meta["tokenizer"], tmp_path)
    assert tokenizer.decode(read(tmp_path, "train") + read(tmp_path, "val")) == text.read_text(encoding="utf-8")


def test_shakespeare_as_gpt2(tmp_path):
    tokenizer = tokenizers.gpt2()
    meta = data.prepare_text([data.shakespeare()], tmp_path, tokenizer, shard_tokens=100_000)
    assert [len(meta[split]["shards"]) for split in ("train", "val")] == [4, 1]
    raw = data.shakespeare().read_bytes()
    cut = meta["train"]["bytes"]
    assert read(tmp_path, "train") == [50256, *tokenizer.encode(raw[:cut].decode())]
    assert read(tmp_path, "val") == tokenizer.encode(raw[cut:].decode()).tolist()
    assert data.open_shard(tmp_path / "train_000002.bin").count == 100_000


SPACES = [" ", "    ", "\n", "\n\n\n", "\t", "\r\n", "\u3000", "\x1c"]
BITS = st.sampled_from(["a", "bc", "'s", "é", "1", ".", "😀", *SPACES])


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.lists(BITS, max_size=40).map("".join), min_size=1, max_size=3),
    piece=st.integers(1, 40),
    fraction=st.sampled_from([0, 0.1, 0.5, 0.9]),
)
def test_ids_are_independent_of_piece_size(tmp_path_factory, texts, piece, fraction):
    """Pieces of a few bytes, cut where `_pieces` allows it, give GPT-2's ids of the whole text."""
    folder = tmp_path_factory.mktemp("text")
    files = [folder / f"{index}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    tokenizer = tokenizers.gpt2()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE_BYTES", piece)
        assert "".join(data.read_text(files)) == "".join(texts)
        try:
            meta = data.prepare_text(files, folder / "out", tokenizer, val_fraction=fraction)
        except HandgradError as error:
            assert "must hold tokens" in str(error) or "must not be empty" in str(error)
            return
    expected = {"train": [], "val": []}
    left = meta["train"]["bytes"]
    for text in texts:
        raw = text.encode()
        for split, part in (("train", raw[:left]), ("val", raw[left:])):
            if part:
                starts = split == "train" or left == 0
                expected[split] += [50256] * starts + tokenizer.encode(part.decode()).tolist()
        left = max(left - len(raw), 0)
    for split in ("train", "val"):
        assert (read(folder / "out", split) if expected[split] else []) == expected[split]


def test_text_without_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 2**20 + " " * 2**20)
    meta = data.prepare_text([tmp_path / "a.txt"], tmp_path, tokenizers.gpt2(), val_fraction=0)
    text = tokenizers.gpt2().decode(read(tmp_path, "train")[1:])
    assert text == "é" * 2**20 + " " * 2**20 and meta["val"] == {"tokens": 0, "bytes": 0, "shards": []}


def test_large_vocabulary_is_uint32(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    tokenizer = tokenizers.chars(map(chr, range(70_000)))
    meta = data.prepare_text([tmp_path / "a.txt"], tmp_path, tokenizer, val_fraction=0)
    assert meta["dtype"] == "uint32" and read(tmp_path, "train") == [97, 98, 99]


def test_bad_text_leaves_folder_unchanged(tmp_path):
    out = tmp_path / "out"
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("to be or not to be, that is the question")
    bad.write_bytes(b"fine so far \xff\xfe")
    tokenizer = tokenizers.gpt2()
    data.prepare_text([good], out, tokenizer)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for files, message in [
        ([good, bad], "bad.txt must be UTF-8 text, but got byte 0xff at offset 12"),
        ([tmp_path / "none.txt"], "none.txt, which is missing"),
        ([tmp_path], "which is a folder"),
        ([], "must not be empty"),
    ]:
        with pytest.raises(HandgradError, match=message):
            data.prepare_text(files, out, tokenizer, replace=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(HandgradError, match="'X' at character 0"):
        (tmp_path / "x.txt").write_text("X")
        data.prepare_text([tmp_path / "x.txt"], out, tokenizers.chars("abc"), val_fraction=0, replace=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for name, got in [
        ("good.txt", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
    ]:
        with pytest.raises(HandgradError, match=f"must be .*, but got {got}"):
            data.prepare_text([good], tmp_path / name, tokenizer)


def test_one_path_is_a_list_of_one(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    for one in (tmp_path / "a.txt", str(tmp_path / "a.txt")):
        assert list(data.read_text(one)) == ["to be or not to be"]
        meta = data.prepare_text(one, tmp_path / "out", tokenizers.chars(data.read_text(one)))
        assert meta == data.prepare_text([one], tmp_path / "out", tokenizers.chars("to be or not to be"))
        assert meta["source"]["first"] == "a.txt:0"


def test_prepare_removes_older_shards(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten")
    (tmp_path / "train_notes.bin").write_text("not ours")
    tokenizer = tokenizers.gpt2()
    data.prepare_text([tmp_path / "a.txt"], tmp_path, tokenizer, shard_tokens=2)
    assert len(list(tmp_path.glob("train_0*.bin"))) > 1
    data.prepare_text([tmp_path / "a.txt"], tmp_path, tokenizer)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["SHA256SUMS", "a.txt", "meta.json", "train_000000.bin", "train_notes.bin", "val_000000.bin"]


def test_prepare_does_not_overwrite_another_data_set(tmp_path):
    """Unless `replace` says so. The same content in another folder is the same source; changed content is another."""
    a, b, out, gpt2 = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out", tokenizers.gpt2()
    a.write_text("one two three four five six seven eight nine ten")
    b.write_text("to be or not to be")
    data.prepare_text([a], out, gpt2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for files, tokenizer in (([b], gpt2), ([a, b], gpt2), ([a], tokenizers.chars(a.read_text()))):
        with pytest.raises(HandgradError, match="out holds shards of this source, but got 12 tokens of another"):
            data.prepare_text(files, out, tokenizer)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    moved = tmp_path / "moved" / "a.txt"
    moved.parent.mkdir()
    moved.write_bytes(a.read_bytes())
    for same in (Path(os.path.relpath(a)), moved):
        data.prepare_text([same], out, gpt2)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    a.write_text(a.read_text().replace("ten", "two"))
    with pytest.raises(HandgradError, match="holds shards of this source"):
        data.prepare_text([a], out, gpt2)
    assert data.prepare_text([b], out, gpt2, replace=True) == data.read_meta(out)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"tokenizer": 3}', "[" * 10**5, "\x00"])
def test_damaged_meta(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(HandgradError, match="meta.json must"):
        data.read_meta(tmp_path)


def test_no_meta(tmp_path):
    assert data.read_meta(tmp_path) is None
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": {}, "vocab_size": 3}))
    with pytest.raises(HandgradError, match="'dtype' of type str"):
        data.read_meta(tmp_path)
