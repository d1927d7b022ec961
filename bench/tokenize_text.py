"""Text to token ids: MB per second and core, and peak memory, of handgrad and of tiktoken called directly.

    python bench/tokenize_text.py [SHARD.bin[.xz]...] [--megabytes 100] [--rounds 3]

The text is decoded from the given GPT-2 token shards; if they hold less than --megabytes, it is extended with its own
beginning in capitals. Without shards it is the packaged Shakespeare, repeated with a third of its words reversed.
Every contender runs in a process of its own, with one thread unless it says otherwise; contenders alternate, and the
table shows medians over the rounds. MB/s/core counts processor time, so other load on the machine matters less;
seconds are wall-clock time.
"""

import argparse
import json
import lzma
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median


def pieces(path):
    """Yields the text in pieces of 256 KiB."""
    from handgrad import data

    return data.read_text([path])


def handgrad_pipeline(path, workers=1):
    """File to token shards with checksums on disk, as `handgrad data text` does it."""
    from handgrad import data, tokenizers

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        meta = data.prepare_text([path], folder, tokenizers.gpt2(), val_fraction=0, workers=workers)
        return meta["train"]["tokens"] - 1


def handgrad_workers(path):
    """The same with two worker processes."""
    return handgrad_pipeline(path, 2)


def handgrad_encode(path):
    """`tokenizers.gpt2().encode`, piece by piece."""
    from handgrad import tokenizers

    encode = tokenizers.gpt2().encode
    return sum(len(encode(text)) for text in pieces(path))


def tiktoken_numpy(path):
    """tiktoken's encode_to_numpy, piece by piece."""
    encoding = tiktoken_encoding()
    return sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in pieces(path))


def tiktoken_list(path):
    """tiktoken's encode_ordinary, piece by piece."""
    encoding = tiktoken_encoding()
    return sum(len(encoding.encode_ordinary(text)) for text in pieces(path))


def tiktoken_batch(path):
    """tiktoken's encode_ordinary_batch on two threads, 16 pieces at a time."""
    encoding, texts, total = tiktoken_encoding(), pieces(path), 0
    while batch := list(islice(texts, 16)):
        total += sum(map(len, encoding.encode_ordinary_batch(batch, num_threads=2)))
    return total


CONTENDERS = (
    handgrad_pipeline,
    handgrad_workers,
    handgrad_encode,
    tiktoken_numpy,
    tiktoken_list,
    tiktoken_batch,
)


def tiktoken_encoding():
    """Returns GPT-2's encoding as tiktoken defines it."""
    import tiktoken

    from handgrad.tokenizers.gpt2 import END_OF_TEXT, MERGES, PATTERN, read_ranks

    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=read_ranks(MERGES), special_tokens=special)


def write_text(path, shards, size):
    """Writes `size` bytes of text to `path`."""
    import numpy as np

    from handgrad import data, tokenizers

    tokenizer = tokenizers.gpt2()
    written = 0
    with path.open("wb") as file:
        for shard in shards:
            raw = lzma.open(shard).read() if str(shard).endswith(".xz") else Path(shard).read_bytes()
            ids = np.frombuffer(raw, "<u2", offset=1024)
            for start in range(0, len(ids), 2**20):
                text = tokenizer.decode(ids[start : start + 2**20]).replace("<|endoftext|>", "\n\n")
                written += file.write(text.encode()[: size - written])
        source = data.shakespeare() if not shards else path
        file.flush()
        generator = random.Random(0)
        while written < size:
            for text in data.read_text([source]):
                if shards:
                    text = text.upper()
                else:
                    text = re.sub(r"\w+", lambda m: m[0][::-1] if generator.random() < 1 / 3 else m[0], text)
                written += file.write(text.encode()[: size - written])
                if written == size:
                    break


def one(name, path):
    """Runs one contender in this process and prints its tokens, seconds, processor seconds and peak memory as JSON."""
    contender = globals()[name]
    begin, wall = os.times(), time.perf_counter()
    tokens = contender(Path(path))
    wall, end = time.perf_counter() - wall, os.times()
    cpu = sum(end[:4]) - sum(begin[:4])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"tokens": tokens, "seconds": wall, "cpu": cpu, "mib": max(peak, children) / 1024}))


def main():
    """Runs the contenders in turn and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", nargs="*")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        run(["--write", path, round(a.megabytes * 1e6), *a.shards])  # in a child: a process inherits its parent's peak
        found = {contender.__name__: [] for contender in CONTENDERS}
        for _ in range(a.rounds):
            for name in found:
                found[name].append(json.loads(run(["--one", name, path])))
    assert len({run["tokens"] for runs in found.values() for run in runs}) == 1, "not the same number of tokens"
    print(f"{a.megabytes:g} MB of text, {runs_tokens(found):,} tokens, medians of {a.rounds} alternating rounds\n")
    print(f"{'':18} {'MB/s/core':>9} {'seconds':>8} {'peak MiB':>8}")
    for name, runs in found.items():
        cpu, seconds, mib = (median(run[key] for run in runs) for key in ("cpu", "seconds", "mib"))
        print(f"{name:18} {a.megabytes / cpu:9.1f} {seconds:8.2f} {mib:8.0f}   {globals()[name].__doc__}")


def run(words):
    """Runs this file with these arguments and returns its output."""
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def runs_tokens(found):
    """Returns the number of tokens, which is the same for every contender."""
    return next(iter(found.values()))[0]["tokens"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    elif sys.argv[1:2] == ["--write"]:
        write_text(Path(sys.argv[2]), sys.argv[4:], int(sys.argv[3]))
    else:
        main()
