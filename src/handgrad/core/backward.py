"""backward: walks the recorded forward in reverse; every op appends its own gradient calls to the same list."""

from collections.abc import Callable
from dataclasses import replace

from handgrad.core.op import Call, Op, Phase, is_activation
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor

Policy = Callable[[Program, Call], set[str]]  # which outputs of a call are recomputed in backward, by name


def keep_all(p: Program, c: Call) -> set[str]:
    """Recompute nothing."""
    return set()


def drop_act(p: Program, c: Call) -> set[str]:
    """Recompute activation functions."""
    return {out for out, kind in c.op.cheap(c).items() if kind == "act"}


def drop_act_norm(p: Program, c: Call) -> set[str]:
    """Recompute activation functions and the outputs of norms."""
    return set(c.op.cheap(c))


def drop_block(p: Program, c: Call) -> set[str]:
    """Recompute a block from its input. Keeps the input (except cheap outputs), what ops declare as `kept`, and the
    gradient that the loss computed."""
    if c.op.starts_gradient:
        return set()
    entering = [t for t in c.ins if t is not None and is_activation(t)]
    if entering and all(p.producer[t].block != c.block for t in entering):
        return set(c.op.cheap(c))
    return {name for name, t in c.named_outs() if is_activation(t)} - set(c.op.kept.split())


POLICIES: dict[str, Policy] = {"none": keep_all, "act": drop_act, "act_norm": drop_act_norm, "block": drop_block}


def backward(p: Program, add: Op, *, drop: Policy = keep_all, seeds: dict[Tensor, Tensor] | None = None) -> None:
    """Appends the gradient of everything recorded so far.

    Gradients start at ops that compute their own (lm_loss) and at `seeds`, which maps outputs to their gradients. If
    two rules contribute to the gradient of one activation, the op `add` sums them (core knows no op by name), unless
    the later rule passes the earlier gradient to its kernel. Outputs that `drop` names are recomputed at their first
    use, once per block and never across blocks. Gradients that no parameter needs are not computed.
    """
    forward, block = list(p.calls), None
    dropped: dict[Tensor, Call] = {}
    for c in forward:
        names = drop(p, c)
        dropped |= {t: c for name, t in c.named_outs() if name in names}
    recomputed: dict[Tensor, Tensor] = {}
    p.pending_grads.clear()
    p.pending_grads.update(seeds or {})

    def live(t: Tensor | None) -> Tensor | None:
        """The tensor itself, or what recomputes it in this block."""
        if t is None or t not in dropped or dropped[t].block != block:
            return t
        if t not in recomputed:
            source = dropped[t]
            want = {name for name, out in source.named_outs() if out in dropped}
            kept = tuple(None if arg.name in want else out for arg, out in zip(source.op.out_args, source.outs))
            again = replace(source, outs=kept, ins=tuple(live(i) for i in source.ins))
            with p.at(source, Phase.RECOMPUTE):
                for name, new in source.op.recompute(p, again, want).items():
                    recomputed[getattr(source, name)] = new
                    p.recomputes[new] = getattr(source, name)
        return recomputed[t]

    for c in reversed(forward):
        if c.block != block:
            block = c.block
            recomputed.clear()
        d = {name: p.pending_grads.pop(t, None) for name, t in c.named_outs()}
        if not c.op.starts_gradient and all(t is None for t in d.values()):
            continue
        if not any(map(p.wants, c.ins)):  # nothing below learns
            continue
        saved = c.op.reads(p, c)
        view = replace(
            c,
            outs=tuple(live(t) if a.name in saved else t for a, t in zip(c.op.out_args, c.outs)),
            ins=tuple(live(t) if a.name in saved else t for a, t in zip(c.op.in_args, c.ins)),
        )
        with p.at(c, Phase.BACKWARD):
            for name, gradient in c.op.backward(p, view, d).items():
                target = getattr(c, name)
                if is_activation(target) and p.wants(target):
                    held = p.pending_grads.get(target)
                    p.pending_grads[target] = gradient if held is None else p.emit(add, held, gradient)
