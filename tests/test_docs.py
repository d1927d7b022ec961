"""The pages for those who extend handgrad: quoted code is in the tree, and files and tests that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "handgrad"
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("add-a-model.md", "add-an-op.md")}


def quotes(page):
    """(file, piece) of every piece of code on a page; lines of dots divide pieces."""
    found = re.findall(r"^```\S+ (\S+)\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    return [(file, piece) for file, code in found for piece in re.split(r"^\.\.\.\n", code, flags=re.MULTILINE)]


def missing(page, root=ROOT):
    """The pieces that are not in their files, line by line and in this order."""
    return [piece for file, piece in quotes(page) if f"\n{piece}" not in (root / file).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PAGES)
def test_quoted_code_is_in_the_tree(name):
    assert missing(PAGES[name]) == [] and len(quotes(PAGES[name])) >= 6
    assert not re.search(r"^```(?:python|c|c\+\+)$", PAGES[name], re.MULTILINE)  # no quote without its file


def test_a_quote_that_has_changed_is_noticed(tmp_path):
    page = "```python a.py\nx = 1\n...\nz = 3\n```\n"
    (tmp_path / "a.py").write_text("\nx = 1\ny = 2\nz = 4\n")
    assert missing(page, tmp_path) == ["z = 3\n"]


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name):
    page = PAGES[name]
    named = {*re.findall(r"[\w.]+(?:/[\w.]+)+\.(?:py|md|c|cu)\b", page), *re.findall(r"\]\(([^)]+)\)", page)}
    roots = (ROOT, PACKAGE, ROOT / "docs")
    assert len(named) > 5
    assert [file for file in named if not any((root / file).exists() for root in roots)] == []
    assert len(page.splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_commands_name_what_exists(name):
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGES[name], re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 6
    for command in commands:
        assert command.split()[0] in ("handgrad", "pytest", "python", "ruff"), command
        for path in re.findall(r"(?:src|tests|bench)/\S+", command):
            assert (ROOT / path).exists(), command
