"""Line budgets: code without blanks, comments and docstrings. Raising one is a line in ARCHITECTURE.md, with its reason."""

import ast
import io
import re
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "handgrad"
FILE = 450
BUDGETS = {  # folders that share a budget: lines
    "core": 1000,
    "backends": 3300,
    "train": 2300,
    "optim": 350,
    "data tokenizers": 1750,
    "io": 750,
    "evals": 500,
    "infer": 500,
    "cli": 1050,
}
OP, ATTENTION, MODEL = 700, 2100, 250
QUIET = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def python_lines(source):
    """Lines of Python that hold code."""
    tree = ast.parse(source)
    docs = set()
    for node in ast.walk(tree):  # docstrings, and the strings below dataclass fields
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, node.end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in QUIET:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


def c_lines(source):
    """Lines of C that hold code."""
    source = re.sub(r"/\*.*?\*/|//[^\n]*", lambda m: "\n" * m.group().count("\n"), source, flags=re.DOTALL)
    return sum(bool(line.strip()) for line in source.splitlines())


def count(path):
    """Code lines of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(count(p) for p in sources(path))
    text = path.read_text(encoding="utf-8")
    return python_lines(text) if path.suffix == ".py" else c_lines(text)


def sources(folder):
    return [
        p
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".py", ".c", ".h", ".cu", ".cuh") and not p.name.startswith("test_")
    ]


def over(budget, *paths):
    """A sentence for the parts that together exceed a budget, or nothing."""
    lines = sum(count(p) for p in paths)
    names = " + ".join(str(p.relative_to(PACKAGE)) for p in paths)
    return [f"{names}: {lines} code lines, budget {budget}"] if lines > budget else []


def test_every_part_stays_within_its_budget():
    found = [text for path in sources(PACKAGE) for text in over(FILE, path)]
    found += [
        text for folders, budget in BUDGETS.items() for text in over(budget, *(PACKAGE / f for f in folders.split()))
    ]
    for op in sorted((PACKAGE / "ops").iterdir()):
        if op.is_dir():
            found += over(ATTENTION if op.name == "attention" else OP, op)
    found += [text for path in sorted((PACKAGE / "models").glob("*.py")) for text in over(MODEL, path)]
    assert not found, "\n".join(found)


def test_the_counter_counts_code_alone():
    source = '"""Doc\nstring."""\n\nimport os  # why\n# a comment\n\n\ndef f():\n    """Doc."""\n    text = """two\n    lines"""\n    return text\n'
    assert python_lines(source) == 5
    assert c_lines("// a\n\n/* b\n c */\nint x;  // d\nint y; /* e */ int z;\n}\n") == 3


def test_a_part_over_its_budget_is_named():
    lines = count(PACKAGE / "core" / "plan.py")
    assert 50 < lines < FILE
    assert over(lines, PACKAGE / "core" / "plan.py") == []
    assert over(lines - 1, PACKAGE / "core" / "plan.py") == [f"core/plan.py: {lines} code lines, budget {lines - 1}"]
