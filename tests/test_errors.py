"""HandgradError: one printable line, whatever the values are."""

import doctest

import pytest

from handgrad.core import errors
from handgrad.core.errors import HandgradError


def test_error_examples():
    result = doctest.testmod(errors)
    assert result.attempted == 5 and not result.failed


@pytest.mark.parametrize(
    "value, shown",
    [
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),  # a terminal's escape sequence
        ("\x9b31m\x85", r"\x9b31m\x85"),  # the same in one character; a line break of Unicode
        ("abc\u202etxt.exe", r"abc\u202etxt.exe"),  # shown from right to left from there on
        ("\u2066x\u2069\u200b", r"\u2066x\u2069\u200b"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("naïve 中文 😀 'a'", "naïve 中文 😀 'a'"),
        (0, "0"),
        (["a\n"], r"['a\n']"),
    ],
)
def test_message_is_printable(value, shown):
    assert str(HandgradError("data", "x must be y", value)) == f"[data] x must be y, but got {shown}."
    if isinstance(value, str):
        error = HandgradError("data", f"{value} must be y", context=value, hint=value)
        assert str(error) == f"[data] {shown} must be y. {shown}. hint: {shown}"
        assert str(error).isprintable() and str(error).encode()
    assert HandgradError("data", "x", value).got == value


def test_long_values_lose_their_middle():
    """200 characters stay as they are; of 201, the ends stay around the count, 200 characters in all."""
    assert str(HandgradError("a", "b", "c" * 200)) == f"[a] b, but got {'c' * 200}."
    ends = (200 - len("...(201 characters)...")) // 2
    cut = "c" * ends + "...(201 characters)..." + "c" * ends
    assert len(cut) == 200
    assert str(HandgradError("a", "b", "c" * 201)) == f"[a] b, but got {cut}."
    assert str(HandgradError("a", f"{'c' * 201} must be b")) == f"[a] {cut} must be b."
    assert str(HandgradError("a", f"'{'c' * 199}' must be b", hint="c" * 201)).endswith(
        f"{cut[0:0]}must be b. hint: {cut}"
    )
    words = "word " * 100_000
    assert len(str(HandgradError("a", words, words, context=words, hint=words))) < 1000 * 3 + 200 + 50
    assert str(HandgradError("a", "b", "x\n" * 10**6)).count("(3000000 characters)") == 1  # each \n as two


def test_integer_that_python_does_not_print():
    assert str(HandgradError("a", "b", 10**5000)) == "[a] b, but got an integer of 16610 bits."  # 5000 / log10(2)
    assert str(HandgradError("a", "b", [10**5000])) == "[a] b, but got a list."
