"""Every docstring example runs and prints what it shows."""

import doctest
import importlib
import pkgutil

import pytest

import handgrad

EXAMPLES = [
    example
    for info in pkgutil.walk_packages(handgrad.__path__, "handgrad.")
    if not info.name.rsplit(".", 1)[-1].startswith(("test_", "__main__", "libhandgrad"))
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(info.name))
    if example.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_docstring_example(example, shards):
    example.globs["shards"] = shards  # a glob of token shards with ids below 97
    said = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not failed, "".join(said)


def test_docstring_examples_are_found():
    assert len(EXAMPLES) > 15
