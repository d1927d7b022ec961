"""Imports only go down: the table of ARCHITECTURE.md, checked over the syntax tree of every module."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "handgrad"

# part: other parts of handgrad that it may import
INSIDE = {
    "core": "",
    "launch": "core",
    "backends": "launch core",
    "ops": "launch core",
    "models": "ops core",
    "optim": "ops core",
    "data": "ops core",
    "tokenizers": "ops core",
    "io": "ops core",
    "infer": "models tokenizers io backends ops core",
    "evals": "infer models data tokenizers io backends ops core",
    "train": "evals infer models optim data tokenizers io backends ops core",
    "testing": "models optim backends ops core",
    "cli": "train evals infer testing models optim data tokenizers io backends ops core",
    "__main__": "cli",
    "__init__": "train infer models optim data core",  # the public names
}
# module: parts (or files) that may import it; the standard library is free, ctypes excepted
OUTSIDE = {
    "numpy": "backends data io tokenizers infer evals train testing reference.py",
    "ml_dtypes": "backends io testing",
    "ctypes": "backends replace.py",
    "cuda": "backends",
    "cudnn": "backends",
    "mpi4py": "backends",
    "safetensors": "io",
    "gguf": "io",
    "tiktoken": "tokenizers",
    "tokenizers": "tokenizers",
    "jinja2": "tokenizers",
    "tyro": "cli",
    "yaml": "cli",
    "rich": "train cli",
    "tensorboard": "train",
    "wandb": "train",
    "pynvml": "train",
    "lm_eval": "evals",
    "huggingface_hub": "data io",
    "pyarrow": "data",
    "backports": "data",
    "compression": "data",
}


def imports(tree):
    """(line, module) of every import, however deep; `from handgrad import x` counts as handgrad.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module == "handgrad":
                yield from ((node.lineno, f"handgrad.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def violations(path, source):
    """`file:line: text` of each import that the tables forbid."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    lines = source.splitlines()
    for line, module in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        if top == "handgrad":
            allowed = rest.split(".")[0] in (part, *INSIDE[part].split())
        elif top in OUTSIDE:
            allowed = part in OUTSIDE[top].split() or path.name in OUTSIDE[top].split()
        else:
            allowed = top in sys.stdlib_module_names
        if not allowed:
            yield f"{path.relative_to(PACKAGE)}:{line}: {lines[line - 1].strip()}"


def test_imports_only_go_down():
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.startswith("test_")]
    assert len(paths) > 50
    found = [text for path in paths for text in violations(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(["imports that go up or sideways:", *found])


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/plan.py", "import numpy as np"),
        ("core/plan.py", "from handgrad.ops import add"),
        ("ops/add/op.py", "from handgrad.backends.ref import RefBackend"),
        ("ops/add/op.py", "import numpy"),
        ("ops/add/reference.py", "import ctypes"),
        ("backends/ref.py", "from handgrad import ops"),
        ("models/gpt2.py", "from handgrad.optim import AdamW"),
        ("data/loader.py", "from handgrad.io import load"),
        ("data/loader.py", "from handgrad.tokenizers import gpt2"),
        ("tokenizers/gpt2.py", "from handgrad.data import read_text"),
        ("infer/engine.py", "from handgrad.train.trainer import Trainer"),
        ("train/trainer.py", "from handgrad.cli.flags import parse"),
        ("train/trainer.py", "import torch"),
        ("infer/load.py", "from ..train import run"),
    ],
)
def test_a_forbidden_import_is_named(path, line):
    assert list(violations(PACKAGE / path, f"import os\n\n\ndef f():\n    {line}\n")) == [f"{path}:5: {line}"]


REFERENCES = (
    "torch transformers peft pytorch_optimizer lm_eval gguf pyarrow tensorboard mpi4py matplotlib PIL cuda pynvml"
)


def unguarded(source):
    """Imports of what the extra `test` has and `dev` has not, without an importorskip or a suppressed ImportError."""
    tree = ast.parse(source)
    guarded = {
        node.args[0].value.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip")
        if isinstance(node.args[0], ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and "suppress(ImportError)" in ast.unparse(node.items[0]):
            guarded |= {module.split(".")[0] for _, module in imports(node)}
    names = {module.split(".")[0] for _, module in imports(tree)}
    return sorted(names & set(REFERENCES.split()) - guarded)


def test_the_light_extra_skips_what_it_lacks():
    """pip install '.[dev]' && pytest: a test that needs a large reference is skipped, not failed."""
    files = [*PACKAGE.rglob("test_*.py"), *Path(__file__).parent.rglob("*.py")]
    found = {str(path): names for path in files if (names := unguarded(path.read_text(encoding="utf-8")))}
    assert not found


def test_an_import_that_fails_in_the_light_extra_is_named():
    assert unguarded("def f():\n    import torch") == ["torch"]
    assert unguarded("import pytest\ntorch = pytest.importorskip('torch')\nimport transformers") == ["transformers"]
    assert not unguarded("with contextlib.suppress(ImportError):\n    import gguf")
