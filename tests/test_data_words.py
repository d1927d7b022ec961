"""GPT-2's words by numpy against tiktoken's pattern, and the size of what is remembered."""

import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handgrad import data, tokenizers
from handgrad.core.errors import HandgradError
from handgrad.tokenizers import words

GPT2 = tokenizers.gpt2()
ASK = GPT2._encoding.encode_ordinary
PARTS = [
    "a",
    "bc",
    "S",
    "'s",
    "'S",
    "'ll",
    "'l",
    "'v",
    "'ve",
    "'r",
    "'re",
    "'",
    "''",
    "é",
    "1",
    "²",
    "½",
    ".",
    "!",
    "😀",
    "中文",
    "λ",
    "ж",
    "’",
    "—",
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
    "supercalifragilistic",
    "15 letters long",
]


def expected(texts):
    return [i for text in texts for i in [GPT2.eot, *ASK(text)]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), max_size=4))
def test_documents_of_awkward_parts(texts):
    assert GPT2.encode_documents(texts).tolist() == expected(texts)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=4))
def test_documents_of_any_text(texts):
    assert GPT2.encode_documents(texts).tolist() == expected(texts)


def test_every_character_has_the_class_that_the_pattern_gives_it():
    points = [*range(0x3000), *range(0x3000, sys.maxunicode, 97)]
    texts = [f"a{chr(p)}a {chr(p)}'s\n{chr(p)}{chr(p)}1{chr(p)} ." for p in points if not 0xD800 <= p < 0xE000]
    assert GPT2.encode_documents(texts).tolist() == expected(texts)
    ordinary = [p for p in range(0x2200) if words._CLASS[p] != words._EXOTIC]
    assert len(ordinary) > 1400 and all(unicodedata.category(chr(p)) != "Cn" for p in ordinary)


def test_shakespeare_in_long_pieces():
    for text in data.read_text([data.shakespeare()]):
        assert len(text) > words._LONGEST and GPT2.encode(text).tolist() == ASK(text)


def test_the_table_is_emptied_in_time(monkeypatch):
    """Mutation: without emptying, `_known` holds all 3,000 words."""
    made = words.Words(ASK, GPT2.eot)
    monkeypatch.setattr(words, "_MOST_IDS", 500)
    letters = random.Random(0)
    for _ in range(30):
        texts = [" ".join("".join(letters.choices("abcdefgh", k=9)) for _ in range(100)), "to be"]
        assert made.encode(texts).tolist() == expected(texts)
    assert made._used < 2000 and len(made._known) < 1000


def test_colliding_words_are_told_apart(monkeypatch):
    """Mutation: compare half a key, and words of one slot take each other's ids."""
    monkeypatch.setattr(words, "_MIX", np.zeros(2, np.int64))  # one slot for all
    made = words.Words(ASK, GPT2.eot)
    texts = ["the cat sat on the mat", "on the hat", "a\0 a a\0\0 abcdefgh abcdefghi abcdefgh\0"]
    for _ in range(3):
        assert made.encode(texts).tolist() == expected(texts)


def test_nothing_and_no_unicode():
    assert GPT2.encode_documents([]).tolist() == [] and GPT2.encode_documents([""]).tolist() == [GPT2.eot]
    for text in ("a\ud800", "a" * 5000 + "\ud800"):
        with pytest.raises(HandgradError, match="text must be Unicode"):
            GPT2.encode(text)


def test_other_tokenizers_one_by_one():
    letters = tokenizers.chars("abc")
    assert letters.encode_documents(["ab", "", "c"]).tolist() == [0, 1, 2]
    assert letters.encode_documents([]).dtype == np.int32
