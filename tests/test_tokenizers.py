"""Tokenizers: exact ids, round trips, streaming, saving, errors."""

import doctest
import json
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from handgrad import data, tokenizers
from handgrad.core.errors import HandgradError
from handgrad.tokenizers.gpt2 import END_OF_TEXT, MERGES, read_ranks

PARTS = "a bc S 's 'S 'll 'l 'v 've 'r 're ' '' é 1 ² ½ . ! 😀 中文 λ ж ’ — supercalifragilistic <|endoftext|>".split(
    " "
)
PARTS += [
    "\u0301",
    " ",
    "    ",
    "\n",
    "\n\n\n",
    "\t",
    "\r\n",
    "\u3000",
    "\xa0",
    "\x1c",
    "\x85",
    "\u2028",
    "\0",
    "a\0",
    "\ufffe",
]
MIXED = "Hello world's été\r\n\t  naïve 😀👩‍👩‍👧 漢字 ١٢٣ 12345 <|endoftext|> \x00\x7f  end  "


@pytest.fixture(scope="module")
def file_tokenizer(tmp_path_factory):
    """A small byte-level BPE from a tokenizer.json with padding and truncation, which `from_file` turns off."""
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(data.shakespeare().read_text(encoding="utf-8")[:50_000].splitlines(), trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizers.from_file(path)


@pytest.mark.parametrize("name", ["handgrad.tokenizers", "handgrad.tokenizers.gpt2", "handgrad.tokenizers.chars"])
def test_examples(name):
    result = doctest.testmod(sys.modules[name])
    assert result.attempted and not result.failed


def test_gpt2_ids():
    tokenizer = tokenizers.gpt2()
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("").tolist() == [] and tokenizer.encode("").dtype == np.int32
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.name) == (50257, END_OF_TEXT, "gpt2")
    assert tokenizer.decode([END_OF_TEXT]) == "<|endoftext|>"
    assert END_OF_TEXT not in tokenizer.encode("<|endoftext|>")
    assert tokenizers.gpt2() is tokenizer


def test_gpt2_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ranks = read_ranks(MERGES)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    sign = dict(zip(printable, map(chr, printable), strict=True))
    sign.update({byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in printable)})
    vocab = {"".join(sign[byte] for byte in token): id for token, id in ranks.items()}
    vocab["<|endoftext|>"] = END_OF_TEXT
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    judge = transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)
    ours = tokenizers.gpt2()
    text = data.shakespeare().read_text(encoding="utf-8")[:200_000]
    assert ours.encode(text).tolist() == judge(text)["input_ids"]
    plain = MIXED.replace("<|endoftext|>", "")
    assert ours.encode(plain).tolist() == judge(plain)["input_ids"]

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=80))
    def same(text):
        if "<|endoftext|>" not in text:
            assert ours.encode(text).tolist() == judge(text)["input_ids"]

    same()


@pytest.fixture(scope="module")
def expected():
    """Ids by tiktoken's own GPT-2 pattern; the merges are OpenAI's, checked by their sha256."""
    ranks, special = read_ranks(MERGES), {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    ).encode_ordinary


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_gpt2_equals_tiktoken_on_awkward_parts(expected, text):
    assert tokenizers.gpt2().encode(text).tolist() == expected(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_gpt2_equals_tiktoken_on_any_text(expected, text):
    assert tokenizers.gpt2().encode(text).tolist() == expected(text)


def test_gpt2_equals_tiktoken_on_every_character(expected):
    points = [*range(0x3000), *range(0x3000, sys.maxunicode, 97)]
    for p in points:
        if not 0xD800 <= p < 0xE000:
            text = f"a{chr(p)}a {chr(p)}'s\n{chr(p)}{chr(p)}1{chr(p)} ."
            assert tokenizers.gpt2().encode(text).tolist() == expected(text)


def test_gpt2_equals_tiktoken_on_shakespeare(expected):
    for text in data.read_text([data.shakespeare()]):
        assert len(text) > 2000 and tokenizers.gpt2().encode(text).tolist() == expected(text)


def test_gpt2_encodes_a_million_spaces():
    for text in (" " * 10**6 + "a", "a" * 10**6):
        assert tokenizers.gpt2().decode(tokenizers.gpt2().encode(text)) == text


def every(file_tokenizer):
    return [tokenizers.gpt2(), tokenizers.chars(MIXED), file_tokenizer]


def test_round_trip_and_stream(file_tokenizer):
    for tokenizer in every(file_tokenizer):
        ids = tokenizer.encode(MIXED)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert 0 <= ids.min() and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == MIXED
        pieces = list(tokenizer.stream(iter(ids)))
        assert "".join(pieces) == MIXED
        assert all("\N{REPLACEMENT CHARACTER}" not in piece and piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_gpt2_stream_joins_to_decode(ids):
    tokenizer = tokenizers.gpt2()
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_file_stream_joins_to_decode(file_tokenizer, text):
    ids = file_tokenizer.encode(text)
    assert "".join(file_tokenizer.stream(ids)) == file_tokenizer.decode(ids) == text


def test_stream_is_lazy():
    def endless():
        while True:
            yield 0

    stream = tokenizers.gpt2().stream(endless())
    assert [next(stream) for _ in range(3)] == ["!", "!", "!"]
    cut = tokenizers.gpt2().encode("😀")[:1]
    assert list(tokenizers.gpt2().stream(cut)) == ["\N{REPLACEMENT CHARACTER}"]  # an incomplete character at the end


def test_save_and_load(file_tokenizer, tmp_path):
    for tokenizer in every(file_tokenizer):
        spec = json.loads(json.dumps(tokenizer.save(tmp_path)))
        again = tokenizers.load(spec, tmp_path)
        assert again.encode(MIXED).tolist() == tokenizer.encode(MIXED).tolist()
        assert (again.vocab_size, again.eot) == (tokenizer.vocab_size, tokenizer.eot)
    with pytest.raises(HandgradError, match="must be writable"):
        file_tokenizer.save(tmp_path / "none")


def test_file_equals_tokenizers_library(file_tokenizer, tmp_path):
    file_tokenizer.save(tmp_path)
    judge = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = data.shakespeare().read_text(encoding="utf-8")[:20_000]
    assert file_tokenizer.encode(text).tolist() == judge.encode(text).ids
    assert file_tokenizer.eot == judge.token_to_id("<|endoftext|>")
    assert file_tokenizer.eot not in file_tokenizer.encode("<|endoftext|>")


def test_chars():
    tokenizer = tokenizers.chars(["ba", "c\n😀"])
    assert tokenizer.characters == "\nabc😀" and tokenizer.eot is None
    assert tokenizer.encode("cab😀").tolist() == [3, 1, 2, 4]
    for text, place in [("abX", 2), ("\U0010ffff", 0), ("é", 0)]:
        with pytest.raises(HandgradError, match=f"at character {place}"):
            tokenizer.encode(text)
    with pytest.raises(HandgradError, match="must not be empty"):
        tokenizers.chars("")


def test_ids_out_of_range(file_tokenizer):
    for tokenizer in every(file_tokenizer):
        for bad in (-1, tokenizer.vocab_size, 2**40):
            with pytest.raises(HandgradError, match=f"must lie in 0..{tokenizer.vocab_size - 1}, but got {bad}"):
                tokenizer.decode([0, bad])
            with pytest.raises(HandgradError, match="must lie in"):
                list(tokenizer.stream([bad]))


def test_the_neutral_prompt_is_a_line_break_if_it_can_be_spelled(file_tokenizer, tmp_path):
    assert tokenizers.neutral_prompt(tokenizers.gpt2()) == [198]
    assert tokenizers.neutral_prompt(file_tokenizer) == file_tokenizer.encode("\n").tolist()
    assert tokenizers.neutral_prompt(tokenizers.chars("a\nb")) == [0]
    assert tokenizers.neutral_prompt(tokenizers.chars("xyz")) == [0]
    ends = tokenizers.load({"kind": "chars", "characters": "xyz", "eot": 2})
    assert tokenizers.neutral_prompt(ends) == [2]
    words = library.Tokenizer(library.models.WordLevel({"[UNK]": 3, "a": 5}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))  # spells a line break as an unknown token
    assert tokenizers.neutral_prompt(tokenizers.from_file(tmp_path / "tokenizer.json")) == [3]


@pytest.mark.parametrize("text", ["a\udc80", "a\ud800", "a" * 5000 + "\ud800"])
def test_lone_surrogate_is_an_error(file_tokenizer, text):
    for tokenizer in (tokenizers.gpt2(), file_tokenizer):
        with pytest.raises(HandgradError, match="must be Unicode"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "spec, message",
    [
        (None, "kind must be"),
        ({}, "kind must be"),
        ({"kind": ["gpt2"]}, "kind must be"),
        ({"kind": "chars"}, "each once"),
        ({"kind": "chars", "characters": "aa"}, "each once"),
        ({"kind": "chars", "characters": ""}, "each once"),
        ({"kind": "file", "path": 3}, "must have a path"),
        ({"kind": "file", "path": "a\0"}, "must have a path"),
        ({"kind": "chars", "characters": "ab", "eot": 2}, "must be among its ids, but got 2"),
        ({"kind": "chars", "characters": "ab", "eot": -1}, "must be among its ids, but got -1"),
        ({"kind": "chars", "characters": "ab", "eot": True}, "an id, a list of ids, or null, but got True"),
        ({"kind": "file", "path": "none.json"}, "no file"),
    ],
)
def test_bad_spec(tmp_path, spec, message):
    with pytest.raises(HandgradError, match=message):
        tokenizers.load(spec, tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_bad_tokenizer_file(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(HandgradError, match="must describe a tokenizer"):
        tokenizers.from_file(tmp_path / "tokenizer.json")
