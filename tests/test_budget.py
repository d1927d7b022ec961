"""Line budgets. Parts and files: code without blanks, comments and docstrings. Functions and kernels: all their lines.

Whoever raises a budget changes ARCHITECTURE.md, too, with the reason.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "handgrad"
FILE = 350
BUDGETS = {  # folders that share a budget: lines
    "core": 1700,
    "backends": 4610,
    "train": 4315,
    "optim": 690,
    "data tokenizers": 4330,
    "io": 1450,
    "evals": 670,
    "infer": 1010,
    "cli": 2110,
}
OP, ATTENTION, MODEL = 725, 2800, 250
FUNCTION, KERNEL = 60, 90  # lines of a Python function, docstring included; of a CPU or GPU kernel
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


def functions(source):
    """(name, first line, lines) of every Python function."""
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [(n.name, n.lineno, n.end_lineno - n.lineno + 1) for n in nodes]


def kernels(source):
    """(name, first line, lines) of every C and CUDA function after ENTRY(name), KERNEL(name), KERNEL or __global__."""

    def blank(match):
        return re.sub(r"[^\n]", " ", match.group())

    source = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", blank, source, flags=re.DOTALL)
    source = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, source, flags=re.MULTILINE)
    found = []
    for head in re.finditer(r"(?:__global__|\bKERNEL\b|\bENTRY\b)[^;{}]*\{", source):
        inside = re.match(r"(?:ENTRY|KERNEL)\((\w+)\)", head.group())
        name = inside[1] if inside else re.search(r"\b(?!__)(\w+)\s*\(", head.group())[1]
        depth, end = 1, head.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        found.append((name, source.count("\n", 0, head.start()) + 1, source.count("\n", head.start(), end) + 1))
    return found


def too_long(path, found, limit):
    """A sentence for every function with more lines than the limit."""
    return [f"{path}:{line} {name}: {lines} lines, budget {limit}" for name, line, lines in found if lines > limit]


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


def test_functions_and_kernels_stay_within_their_budget():
    found = []
    for path in sources(PACKAGE):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)
        is_python = path.suffix == ".py"
        found += too_long(name, functions(text), FUNCTION) if is_python else too_long(name, kernels(text), KERNEL)
    assert not found, "\n".join(found)


def test_every_kernel_is_found():
    """As many kernels as the ops declare and launch: a budget that misses kernels limits nothing."""
    for op in sorted((PACKAGE / "ops").glob("*/op.py")):
        entries = re.findall(r'\bCpuKernel\(\s*"(\w+)"', op.read_text(encoding="utf-8"))
        names = [name for name, *_ in kernels((op.parent / "cpu.c").read_text(encoding="utf-8"))]
        assert sorted(names) == sorted(entries), op
    declared = r"(?:__global__|^KERNEL\b)"
    for path in sorted(PACKAGE.glob("ops/*/*.cu")):
        text = path.read_text(encoding="utf-8")
        assert len(kernels(text)) == len(re.findall(declared, text, re.MULTILINE)) > 0, path


def test_function_over_its_budget_is_named():
    source = (
        '@cache\ndef short():\n    """Doc."""\n    return 1\n\n\nclass A:\n    async def long(self):\n'
        + "        x = 1\n" * 60
    )
    assert functions(source) == [("short", 2, 3), ("long", 8, 61)]
    assert too_long("a.py", functions(source), FUNCTION) == ["a.py:8 long: 61 lines, budget 60"]


def test_kernel_over_its_budget_is_named():
    body = 'if (x) { y("}"); }  // }\n'
    source = (
        "#define KERNEL extern C __global__ void \\\n  { \nstatic void helper(int x) {\n" + body * 99 + "}\n"
        "ENTRY(short) {\n" + body + "}\n"
        "KERNEL __launch_bounds__(THREADS) long_kernel(float *x,\n  int n) {\n" + body * 88 + "}\n"
        'extern "C" __global__ void\n__launch_bounds__(64) other_kernel(int n) {}\n'
        "int64_t KERNEL(size)(int64_t n) {\n}\n"
    )
    assert kernels(source) == [("short", 104, 3), ("long_kernel", 107, 91), ("other_kernel", 198, 2), ("size", 200, 2)]
    assert too_long("a.cu", kernels(source), KERNEL) == ["a.cu:107 long_kernel: 91 lines, budget 90"]


def test_line_counts_exclude_comments_docstrings_and_blanks():
    source = '"""Doc\nstring."""\n\nimport os  # why\n# a comment\n\n\ndef f():\n    """Doc."""\n    text = """two\n    lines"""\n    return text\n'
    assert python_lines(source) == 5
    assert c_lines("// a\n\n/* b\n c */\nint x;  // d\nint y; /* e */ int z;\n}\n") == 3


def test_part_over_its_budget_is_named():
    lines = count(PACKAGE / "core" / "plan.py")
    assert 50 < lines < FILE
    assert over(lines, PACKAGE / "core" / "plan.py") == []
    assert over(lines - 1, PACKAGE / "core" / "plan.py") == [f"core/plan.py: {lines} code lines, budget {lines - 1}"]
