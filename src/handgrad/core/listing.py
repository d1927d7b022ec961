"""The listing: one line a call, with phase, block, op, offsets, shapes, dtypes and source line."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from handgrad.core.op import Call, Phase
from handgrad.core.plan import MIB, Plan
from handgrad.core.program import Program
from handgrad.core.tensor import Role, Tensor

PHASE = dict(zip(Phase, ("fwd", "re", "bwd", "nrm", "upd", "com")))


def _tensor(t: Tensor, c: Call, plan: Plan | None) -> str:
    name = t.name.removeprefix(c.block + "/") if t.role is Role.ACT else t.name
    at = f"@{plan.offset[t] / MIB:.1f}M" if plan is not None else ""
    return f"{name}{at} ({','.join(map(str, t.shape))}) {t.dtype}"


def attribute(v: Any) -> str:
    """An attribute as text; a member of an enumeration by its name."""
    return v.name.lower() if isinstance(v, Enum) else f"{v:g}" if isinstance(v, float) else str(v)


def line(c: Call, plan: Plan | None = None, note: str = "") -> str:
    """One call of the listing."""
    outs = [
        ("+= " if arg.inout and arg.name not in c.first | c.overwrites else "") + _tensor(t, c, plan)
        for arg, t in zip(c.op.out_args, c.outs)
        if t is not None
    ]
    ins = [_tensor(t, c, plan) for t in c.ins if t is not None]
    attrs = " ".join(f"{k}={attribute(v)}" for k, v in c.attrs.items())
    parts = (
        f"{PHASE[c.phase]:4} {c.block:6} {c.op.name:20}",
        " | ".join(outs),
        "<-",
        " | ".join(ins),
        attrs,
        c.where,
        note,
    )
    return "  ".join(part for part in parts if part)


def listing(p: Program, plan: Plan | None = None, note: Callable[[Call], str] = lambda c: "") -> str:
    """All calls, one line each. Without a plan the lines have no offsets, as in the golden files.

    `@` is the offset in the arena in MiB; `+=` marks outputs that the call adds to or updates; `note` appends a
    backend's remark.
    """
    return "\n".join(line(c, plan, note(c)) for c in p.calls)
