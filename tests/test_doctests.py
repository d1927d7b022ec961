"""Every docstring example runs and prints what it shows."""

import doctest
import importlib
import pkgutil

import pytest

import handgrad


def module(name):
    """A module; None for one of the CUDA backend where its packages are not installed."""
    try:
        return importlib.import_module(name)
    except handgrad.HandgradError:
        assert name.startswith("handgrad.backends.cuda."), name
        return None


EXAMPLES = [
    example
    for info in pkgutil.walk_packages(handgrad.__path__, "handgrad.")
    if not info.name.rsplit(".", 1)[-1].startswith(("test_", "__main__", "libhandgrad"))
    for found in [module(info.name)]
    if found is not None
    for example in doctest.DocTestFinder(exclude_empty=True).find(found)
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
