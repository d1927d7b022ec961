"""Generates arguments.h from the declarations of the ops: a struct for the arguments of every CPU kernel.

setup.py runs this file alone when it compiles the kernels. So the file parses declarations as syntax trees and imports
only the standard library.
"""

import ast
from pathlib import Path

HEAD = """// Generated from the declarations `cpu = CpuKernel(entry, args)` of the ops.
#pragma once
#include <stdint.h>
"""
LINES = """#ifdef HG_ARGUMENT_LINES  // Python compares these with the declarations that it binds
#define EXPORT __attribute__((visibility("default")))
%s
#undef EXPORT
#endif
"""


def header(package: Path) -> str:
    """The text of arguments.h for the ops of a package: the files ops/*/op.py."""
    structs, lines = [], []
    for path in sorted(package.glob("ops/*/op.py")):
        for entry, args, floats in kernels(path.read_text()):
            pointers, _, numbers = args.partition("|")
            members = [f"  void *{word};" for word in pointers.split()]
            for word in numbers.split():
                members.append(f"  {'double' if word in floats else 'int64_t'} {word.replace('.', '_')};")
            structs.append(
                "\n".join([f"typedef struct {{  // {path.parent.name}/op.py", *members, f"}} {entry}_args;"])
            )
            lines.append(f'EXPORT const char {entry}_arguments[] = "{args}";')
    return "\n".join([HEAD, *structs, LINES % "\n".join(lines)])


def kernels(source: str) -> list[tuple[str, str, set[str]]]:
    """(entry, line of arguments, names of float attributes) of every CPU kernel that an op.py declares.

    >>> kernels("class A(Op):\\n  attrs = {'p': float, 'T': int}\\n  cpu = CpuKernel('a', 'y x | N p T')")
    [('a', 'y x | N p T', {'p'})]
    """
    found = []
    classes = {node.name: _fields(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for fields in classes.values():
        if "cpu" in fields:
            entry, args = (ast.literal_eval(arg) for arg in fields["cpu"].args[:2])
            attrs = fields.get("attrs", ast.Dict([], []))
            while isinstance(attrs, ast.Attribute) and isinstance(attrs.value, ast.Name):  # `attrs = Attention.attrs`
                attrs = classes[attrs.value.id]["attrs"]
            floats = {ast.literal_eval(k) for k, v in zip(attrs.keys, attrs.values) if k and ast.unparse(v) == "float"}
            found.append((entry, args, floats))
    return found


def _fields(node: ast.ClassDef) -> dict:
    """The values of a class's attributes, as syntax trees."""
    return {
        a.targets[0].id: a.value for a in node.body if isinstance(a, ast.Assign) and isinstance(a.targets[0], ast.Name)
    }
