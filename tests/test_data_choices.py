"""Evaluation files: llm.c's layout word for word, and every inconsistency is an error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handgrad import data
from handgrad.core.errors import HandgradError
from handgrad.data import Choices

ITEMS = [Choices([7, 8, 9], [[1], [2, 3], [4], [5]], 2), Choices([6], [[65535, 1], [0]], 0)]
WORDS = [65535, 34, 0, 2, 4, 3, 7, 8, 9, 1, 1, 2, 2, 3, 1, 4, 1, 5, 65535, 24, 1, 0, 2, 1, 6, 2, 65535, 1, 1, 0]


def header(magic=20240522, version=1, count=2, longest=34):
    words = np.zeros(256, "<i4")
    words[:4] = magic, version, count, longest
    return words.tobytes()


def body(words):
    return np.array(words, "<u2").tobytes()


def changed(place, value):
    return body([*WORDS[:place], value, *WORDS[place + 1 :]])


def test_p1_evaluation_file_is_llmc_format(tmp_path):
    words = list(WORDS)
    words[1], words[19] = 2 * 18, 2 * 12  # all words of an example count
    assert data.write_choices(tmp_path / "a.bin", ITEMS) == 2
    raw = (tmp_path / "a.bin").read_bytes()
    assert raw == header(longest=36) + body(words)
    assert data.read_choices(tmp_path / "a.bin") == ITEMS
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_evaluation_file_round_trip(tmp_path_factory, draw):
    ids = st.lists(st.integers(0, 65535), min_size=1, max_size=9)
    items = []
    for _ in range(draw.draw(st.integers(1, 5))):
        endings = draw.draw(st.lists(ids, min_size=2, max_size=5))
        items.append(Choices(draw.draw(ids), endings, draw.draw(st.integers(0, len(endings) - 1))))
    path = tmp_path_factory.mktemp("eval") / "a.bin"
    data.write_choices(path, items)
    assert data.read_choices(path) == items


GOOD = [*WORDS]
GOOD[1], GOOD[19] = 36, 24


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "header of 1024 bytes, but got 0 in all"),
        (header(magic=20240520), "magic number 20240522, but got 20240520. hint"),
        (header(version=2), "must be version 1, but got 2"),
        (header(count=0), "at least one example, but got a header that counts 0"),
        (header(count=-1), "counts -1"),
        (header(longest=36) + body(GOOD) + b"\0", "whole 16-bit words"),
        (header(longest=36) + body([*GOOD, 1]), "must end after the 2 examples .* but got 2 bytes more"),
        (header(longest=36) + body(GOOD[:20]), "example 1: the file must hold it, but got its end"),
        (
            header(longest=36) + body(GOOD[:-1]),
            "example 1: its length must be even and inside the file, but got 24 bytes",
        ),
        (header(longest=34) + body(GOOD), "longest example must have 34 bytes as in the header, but got 36"),
        (header(count=3, longest=36) + body(GOOD), "example 2: the file must hold it"),
    ],
)
def test_damaged_evaluation_file(tmp_path, raw, message):
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(HandgradError, match=message):
        data.read_choices(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, 1, "example 0: it must begin with 65535, but got 1"),
        (1, 35, "must be even"),
        (1, 34, "fit its 34 bytes|fill its 34 bytes"),
        (1, 38, "fill its 38 bytes"),
        (1, 8, "fit its 8 bytes"),
        (2, 1, "must be numbered 0, but got 1"),
        (3, 4, "label must be one of two or more endings, but got label 4, 4 endings"),
        (4, 1, "two or more endings, but got label 2, 1 endings"),
        (4, 5, "context and 5 endings must fit"),
        (4, 3, "must fill its 36 bytes, but got 32"),
        (5, 0, "none empty, but got length 0"),
        (5, 14, "must fit"),
    ],
)
def test_changed_word_is_detected(tmp_path, place, value, message):
    """A reader without the check would accept or misread each of these."""
    (tmp_path / "a.bin").write_bytes(header(longest=36) + body([*GOOD[:place], value, *GOOD[place + 1 :]]))
    with pytest.raises(HandgradError, match=message):
        data.read_choices(tmp_path / "a.bin")


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 4 * 4 + 2 * len(WORDS) - 1), value=st.integers(0, 255))
def test_changed_byte_raises_handgrad_error_or_reads(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    raw = bytearray(header(longest=36) + body(GOOD))
    raw[place if place < 16 else 1024 + place - 16] = value
    path.write_bytes(raw)
    try:
        items = data.read_choices(path)
    except HandgradError as error:
        assert str(error).startswith("[data] ") and "\n" not in str(error)
    else:
        assert [len(item.endings) for item in items] == [4, 2]


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "at least one example, but got none"),
        ([Choices([1], [[1]], 0)], "two or more, but got label 0, 1 endings"),
        ([Choices([1], [[1], [2]], 2)], "label 2, 2 endings"),
        ([Choices([1], [[1], [2]], -1)], "label -1"),
        ([Choices([], [[1], [2]], 0)], "must hold tokens, but got none"),
        ([Choices([1], [[1], []], 0)], "must hold tokens"),
        ([Choices([1], [[1], [65536]], 0)], "must lie in 0..65535, but got 65536. hint"),
        ([Choices([-1], [[1], [2]], 0)], "must lie in 0..65535, but got -1"),
        ([Choices([1] * 32760, [[1], [2]], 0)], "under 65,536 bytes"),
        ([ITEMS[0]] * 65_537, "at most 65,536 examples"),
    ],
)
def test_write_choices_argument_errors(tmp_path, items, message):
    with pytest.raises(HandgradError, match=message):
        data.write_choices(tmp_path / "a.bin", items)
    assert not list(tmp_path.iterdir())


def test_unreadable_and_unwritable_evaluation_file(tmp_path):
    with pytest.raises(HandgradError, match="an evaluation file must be a file, but got .*none.bin, which is missing"):
        data.read_choices(tmp_path / "none.bin")
    with pytest.raises(HandgradError, match="which is a folder"):
        data.read_choices(tmp_path)
    with pytest.raises(HandgradError, match="must be writable"):
        data.write_choices(tmp_path / "none" / "a.bin", ITEMS)
