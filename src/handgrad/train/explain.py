"""explain: all about a run before it runs: the listing, the memory map to the byte, flops, the price of remedies."""

from collections.abc import Callable
from dataclasses import dataclass

from handgrad.backends.base import Planner
from handgrad.core.backward import POLICIES
from handgrad.core.dtypes import DTYPES
from handgrad.core.listing import listing
from handgrad.core.op import Call
from handgrad.core.plan import MIB, Plan, plan
from handgrad.core.program import Program
from handgrad.infer.engine import record as record_engine
from handgrad.models import GPT2
from handgrad.optim import AdamW
from handgrad.train.record import chunks_of, record_loss, record_train

REMEDIES = tuple(POLICIES)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is the page that the command prints."""

    program: Program
    plan: Plan
    rows: int
    remedies: tuple[tuple[str, int, int], ...]  # what to change, arena bytes, flops of a micro-step
    note: Callable[[Call], str] = lambda c: ""  # what the backend binds a call to

    @property
    def flops_per_token(self) -> float:
        """Multiply and add count of forward, backward and recompute for one token, from the calls themselves."""
        return sum(c.flops for c in self.program.calls) / self.rows

    def __str__(self) -> str:
        p, at = self.program, self.plan
        calls = {phase: sum(c.phase == phase for c in p.calls) for phase in dict.fromkeys(c.phase for c in p.calls)}
        lines = [
            listing(p, at, self.note),
            "",
            f"parameters    {p.num_params:,} ({p.flat_size:,} with alignment)",
            f"calls         {', '.join(f'{n} {phase}' for phase, n in calls.items())}",
            f"flops         {self.flops_per_token / 1e6:,.1f} M a token,"
            f" {self.flops_per_token * self.rows / 1e9:,.1f} G a micro-step",
            "",
            at.report(),
            "",
            f"{'block':8} {'parameters':>14} {'grads + state':>14} {'kept activations':>18}   MiB",
        ]
        for block, params, state, kept in at.by_block():
            lines.append(f"{block:8} {params / MIB:14.1f} {state / MIB:14.1f} {kept / MIB:18.1f}")
        base = at.nbytes
        lines += ["", f"{'remedy':32} {'arena MiB':>10} {'saves MiB':>10} {'more flops':>11}"]
        flops = sum(c.flops for c in p.calls)
        for name, nbytes, count in self.remedies:
            lines.append(
                f"{name:32} {nbytes / MIB:10.1f} {(base - nbytes) / MIB:10.1f} {100 * (count / flops - 1):10.1f}%"
            )
        return "\n".join(lines)


def explain(
    model: GPT2,
    micro_batch: int,
    seq_len: int,
    *,
    dtype: str = "bf16",
    backend: Planner | None = None,
    recompute: str = "act",
    head_chunks: int = 0,
    accumulation: int = 1,
    grad_dtype: str = "f32",
    master_weights: bool = True,
    optim: AdamW = AdamW(),
    val: bool = True,
    sample: bool = True,
    remedies: bool = True,
) -> Explanation:
    """What a run of these settings would record and allocate. Nothing is allocated here.

    The plan is the one that Trainer makes from the same arguments: `plan.nbytes` equals its arena, to the byte.
    `accumulation` is the number of micro-batches in a step.
    Without a backend, kernels are taken to need no scratch.

    >>> import handgrad as hg
    >>> page = hg.explain(hg.models.gpt2("124m"), micro_batch=16, seq_len=1024)
    >>> page.program.num_params
    124475904
    """
    kind, head_rows = DTYPES["f32" if dtype == "tf32" else dtype], 512 if backend is None else backend.head_rows

    def lay_out(micro_batch: int, recompute: str, head_chunks: int, steps: int) -> tuple[Program, Plan]:
        chunks = chunks_of(micro_batch * seq_len, head_chunks, head_rows)
        train = record_train(
            model,
            optim,
            micro_batch,
            seq_len,
            kind,
            chunks=chunks,
            recompute=recompute,
            accumulates=steps > 1,
            grad_dtype=DTYPES[grad_dtype],
            master=master_weights,
        )
        others = [record_loss(model, micro_batch, seq_len, kind, chunks)] if val else []
        others += record_engine(model, kind) if sample else ()
        return train, (plan if backend is None else backend.plan)(train, *others)

    program, layout = lay_out(micro_batch, recompute, head_chunks, accumulation)
    chunks = chunks_of(micro_batch * seq_len, head_chunks, head_rows)
    prices = []
    if remedies:
        options = [(f"recompute {r}", micro_batch, r, chunks) for r in REMEDIES if r != recompute]
        options += [
            (f"micro-batch {micro_batch // n}", micro_batch // n, recompute, head_chunks)
            for n in (2, 4)
            if micro_batch % n == 0
        ]
        options += [
            (f"head chunks {n}", micro_batch, recompute, n)
            for n in (1, 4 * chunks)
            if n != chunks and n <= micro_batch * seq_len
        ]
        for name, b, r, n in options:
            other, its = lay_out(b, r, n, accumulation * micro_batch // b)
            prices.append((name, its.nbytes, sum(c.flops for c in other.calls) * micro_batch // b))
    notes = (lambda c: "") if backend is None else backend.note
    return Explanation(program, layout, micro_batch * seq_len, tuple(prices), notes)
