"""`handgrad data tokenizer`: the merges of a plain implementation, the same bytes whatever threads, and what reads them."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import regex
import tokenizers as library

from handgrad import data, tokenizers
from handgrad.cli.__main__ import main
from handgrad.cli.data_tokenizer import Training, train_tokenizer
from handgrad.core.errors import HandgradError
from handgrad.tokenizers.gguf import WORDS
from handgrad.tokenizers.gpt2 import spelled_bytes

TEXT = data.shakespeare().read_text(encoding="utf-8")[:20_000] + " naïve 😀 1234567 !!?\r\n\n  x"
SPECIAL = ("<|im_start|>", "<|im_end|>")


def made(folder, **changes):
    """The tokenizer that the command trains on TEXT, in `folder`/t."""
    path = folder / "text.txt"
    path.write_bytes(TEXT.encode())
    train_tokenizer(Training((str(path),), out=str(folder / "t"), **{"vocab": 400, "special": SPECIAL} | changes), "")
    return tokenizers.from_folder(folder / "t")


def plain_merges(text, count):
    """Byte-level BPE as it is written down: the most frequent pair, of the smallest ids among equals, `count` times."""
    words = Counter(regex.findall(WORDS.replace("DIGITS", "{1,3}"), text))
    spelled = sorted(spelled_bytes())  # the library numbers the bytes in the order of their characters
    id_of = {spelled_bytes()[character]: id for id, character in enumerate(spelled)}
    split = {word: [id_of[byte] for byte in word.encode()] for word in words}
    bytes_of, merges = [bytes([spelled_bytes()[character]]) for character in spelled], []
    for _ in range(count):
        pairs = Counter()
        for word, ids in split.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((bytes_of[best[0]], bytes_of[best[1]]))
        new = len(bytes_of)
        bytes_of.append(b"".join(merges[-1]))
        for word, ids in split.items():
            at, found = 0, []
            while at < len(ids):
                fits = tuple(ids[at : at + 2]) == best
                found.append(new if fits else ids[at])
                at += 2 if fits else 1
            split[word] = found
    return merges


def test_merges_are_those_of_a_plain_implementation():
    text = TEXT[:3000]
    tokenizer = tokenizers.train([text], 256 + 60 + 3, SPECIAL)
    spelled = spelled_bytes()
    about = json.loads(tokenizer.library.to_str())["model"]
    found = [tuple(bytes(spelled[c] for c in part) for part in merge) for merge in about["merges"]]
    assert len(found) == 60 and found == plain_merges(text, 60)
    assert about["ignore_merges"] is True  # as llama.cpp encodes texts that are cut by this rule
    assert [tokenizer.decode([id]) for id in range(316, 319)] == ["<|endoftext|>", *SPECIAL]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT  # any text, with characters that it was not trained on


def test_same_files_give_the_same_bytes_whatever_threads(tmp_path):
    made(tmp_path)
    first = (tmp_path / "t/tokenizer.json").read_bytes()
    code = "import sys; from handgrad.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    words = f"data tokenizer {tmp_path}/text.txt --vocab 400 --out {tmp_path}/u --special".split()
    run = [sys.executable, "-c", code, *words, *SPECIAL]
    threads = {"RAYON_NUM_THREADS": "1" if len(os.sched_getaffinity(0)) > 1 else "3"}
    subprocess.run(run, env=os.environ | threads, check=True, capture_output=True)
    assert (tmp_path / "u/tokenizer.json").read_bytes() == first
    made(tmp_path, replace=True)
    assert (tmp_path / "t/tokenizer.json").read_bytes() == first


def test_report_is_of_text_that_was_not_trained_on(tmp_path, capsys):
    tokenizer = made(tmp_path)
    size = len(TEXT.encode())
    cut = int(size * 0.95)
    while TEXT.encode()[cut] >> 6 == 0b10:
        cut += 1
    tail, report = TEXT.encode()[cut:].decode(), json.loads((tmp_path / "t/tokenizer_report.json").read_text())
    ratio = len(tail.encode()) / len(tokenizer.encode(tail))
    assert report["held_out"]["bytes"] == size - cut and report["trained_on"]["bytes"] == cut
    assert report["held_out"]["bytes_per_token"] == pytest.approx(ratio, rel=1e-12)
    assert f"{ratio:.3f} bytes per token on {size - cut:,} bytes" in capsys.readouterr().out
    assert tokenizer.library.to_str() == tokenizers.train([TEXT.encode()[:cut].decode()], 400, SPECIAL).library.to_str()
    made(tmp_path, replace=True, held_out=(str(tmp_path / "text.txt"),))
    again = json.loads((tmp_path / "t/tokenizer_report.json").read_text())
    assert again["held_out"]["bytes"] == again["trained_on"]["bytes"] == size


def test_transformers_and_llama_cpp_get_the_same_tokens(tmp_path):
    """The folder itself, an exported model, and a .gguf, by data and a run that were made with it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    ours = made(tmp_path)
    assert main(f"data text {tmp_path}/text.txt --tokenizer {tmp_path}/t --out {tmp_path}/d --workers 1".split()) == 0
    assert data.read_meta(tmp_path / "d")["vocab_size"] == 400
    sizes = "--num-layers 1 --num-heads 1 --hidden-size 16 --seq-len 16 --micro-batch 2 --steps 1 --sample-tokens 0"
    assert main(f"train --train {tmp_path}/d --out {tmp_path}/r {sizes} --backend cpu --threads 1".split()) == 0
    for place in ("hf", "m.gguf"):
        assert main(["convert", f"{tmp_path}/r", f"{tmp_path}/{place}", "--to", place[-4:].strip("m.")]) == 0
    from handgrad.infer.load import open_source

    plain = TEXT[-5000:] + " I'll 12345\n\n\nx<|im_end"
    for folder in ("t", "hf"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert theirs.encode(plain) == ours.encode(plain).tolist() and len(theirs) == 400
        spelled = "<|im_start|>user\nhi<|im_end|><|endoftext|>"
        assert theirs.encode(spelled) == ours.encode(spelled, special=True).tolist()
        assert theirs.eos_token_id == ours.eot and theirs.decode(theirs.encode(spelled)) == spelled
    for model in ("hf", "m.gguf"):
        read = open_source(tmp_path / model).tokenizer()
        assert read.encode(plain).tolist() == ours.encode(plain).tolist()
        assert (read.ends, read.specials) == (ours.ends, ours.specials)


def test_extend_keeps_every_id(tmp_path):
    base = tokenizers.train([TEXT], 300)
    more = tokenizers.extend(base, SPECIAL)
    assert more.vocab_size == 302 and base.vocab_size == 300 and more.ends == base.ends == (299,)
    assert more.encode(TEXT).tolist() == base.encode(TEXT).tolist()
    assert more.encode("a<|im_end|>", special=True).tolist() == [*base.encode("a").tolist(), 301]
    assert main(["data", "tokenizer", "--extend", "gpt2", "--special", "<|x|>", "--out", str(tmp_path / "g")]) == 0
    read = tokenizers.from_folder(tmp_path / "g")
    assert read.vocab_size == 50258 and read.encode(TEXT).tolist() == tokenizers.gpt2().encode(TEXT).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab=258), "has 256 bytes and 3 special tokens: 259 to 16,777,216, but got 258"),
        (dict(special=("<|a|>", "<|a|>")), "that is no token yet, but got '<|a|>'"),
        (dict(special=("e",)), "that is no token yet, but got 'e'"),
        (dict(special=("",)), "that is no token yet, but got ''"),
        (dict(files=()), "a tokenizer is trained on at least one file, but got none"),
        (dict(files=("none.txt",)), "a text must be a file, but got none.txt, which is missing"),
        (dict(extend="gpt2"), "--extend adds --special to a tokenizer and trains nothing"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(tmp_path, changes, message):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    a = Training(**{"files": (str(path),), "vocab": 400, "out": str(tmp_path / "t"), "special": SPECIAL} | changes)
    with pytest.raises(HandgradError) as error:
        train_tokenizer(a, "")
    assert message in str(error.value) and os.listdir(tmp_path) == ["text.txt"]


def test_a_folder_is_replaced_only_if_it_holds_a_tokenizer(tmp_path):
    made(tmp_path)
    before = (tmp_path / "t/tokenizer.json").read_bytes()
    with pytest.raises(HandgradError, match="exists already. hint: use another --out, or --replace"):
        made(tmp_path, vocab=300)
    (tmp_path / "t/notes.txt").write_text("mine")
    with pytest.raises(HandgradError, match="only a tokenizer: .*, but got notes.txt"):
        made(tmp_path, vocab=300, replace=True)
    assert (tmp_path / "t/tokenizer.json").read_bytes() == before
    assert (tmp_path / "t/notes.txt").read_text() == "mine"


def test_fewer_tokens_where_no_pair_is_left(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abab " * 40)
    assert main(f"data tokenizer {tmp_path}/text.txt --vocab 5000 --out {tmp_path}/t".split()) == 0
    out = capsys.readouterr().out
    assert "fewer than --vocab 5,000: no other pair of tokens is in the text twice" in out
    assert tokenizers.from_folder(tmp_path / "t").vocab_size < 270
    assert isinstance(library.Tokenizer.from_file(str(tmp_path / "t/tokenizer.json")), library.Tokenizer)
