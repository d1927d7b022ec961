"""explain: all about a run before it runs: the listing, the memory map to the byte, flops, the price of remedies."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from handgrad.backends.base import Planner
from handgrad.backends.ref import RefBackend
from handgrad.core.backward import POLICIES
from handgrad.core.listing import listing
from handgrad.core.op import Call
from handgrad.core.plan import MIB, Plan
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.models import Model
from handgrad.models.lora import adapter_params
from handgrad.optim import AdamW, Optimizer
from handgrad.train.execution import Execution
from handgrad.train.record import flops_per_token, head_chunks, head_rows, logits_row_bytes, record, record_train
from handgrad.train.scaling import Cluster, Exchange, GpuRanks, Prediction, exchanges, predict


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is the page that the command prints, `calls()` the list of all calls."""

    program: Program
    plan: Plan
    rows: int
    remedies: tuple[tuple[str, int, int], ...]  # what to change to save memory, arena bytes, flops of a micro-batch
    accumulation: int  # micro-batches of a step on each rank
    note: Callable[[Call], str]  # what the backend binds a call to
    cluster: Cluster | None = None  # the GPUs that the ranks run on
    prediction: Prediction | None = None  # of the time of a step on them

    @property
    def flops_per_token(self) -> float:
        """Multiply and add count of forward, backward and recompute for one token, from the calls themselves."""
        return flops(self.program) / self.rows

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors in a checkpoint: parameters, and vectors and states of the optimizer."""
        vectors = [v for name, v in self.program.vectors.items() if name != "grad"]
        params = [info.tensor for info in self.program.params.values()]
        held = sum(v.nbytes_of(t) for v in vectors for t in params if v.covers(t))
        return held + sum(t.nbytes for t in self.program.states.values())

    def traffic(self) -> list[Exchange]:
        """What a rank exchanges in a step; the seconds are 0 without a cluster."""
        return exchanges(self.program, self.accumulation, self.cluster.seconds if self.cluster else lambda c: 0.0)

    def calls(self) -> str:
        """Every call with its shapes, offsets, source line and the kernel that it is bound to."""
        return listing(self.program, self.plan, self.note)

    def _adapters(self) -> list[str]:
        """The line of the adapters, none without them. The parameters of a block contain theirs."""
        p = self.program
        if not p.adapters:
            return []
        count = sum(p.params[name].tensor.size for name in adapter_params(p))
        ranks = ", ".join(sorted({str(adapter.rank) for adapter in p.adapters.values()}))
        matrices = sum(len(adapter.modules) for adapter in p.adapters.values())
        return [f"adapters      {count:,}, of rank {ranks} beside {matrices} matrices"]

    def __str__(self) -> str:
        p, at = self.program, self.plan
        calls = {phase: sum(c.phase == phase for c in p.calls) for phase in dict.fromkeys(c.phase for c in p.calls)}
        lines = [
            f"parameters    {p.num_params - p.num_padding:,}, and {p.num_padding:,} of padded vocabulary rows"
            f" ({p.flat_size:,} with alignment)",
            f"trainable     {p.num_trainable:,}",
            *self._adapters(),
            f"calls         {', '.join(f'{n} {phase}' for phase, n in calls.items())}",
            f"flops         {self.flops_per_token / 1e6:,.1f} M a token,"
            f" {self.flops_per_token * self.rows / 1e9:,.1f} G a micro-batch",
            "",
            at.memory_map(),
            "",
            f"{'block':20} {'parameters':>14} {'grads + state':>14} {'kept activations':>18}   MiB",
        ]
        for (params, state, kept), rows in groupby(at.by_block(), lambda row: row[1:]):
            first, *others = (block for block, *_ in rows)
            blocks = f"{first} to {others[-1]}, each" if others else first
            lines.append(f"{blocks:20} {params / MIB:14.1f} {state / MIB:14.1f} {kept / MIB:18.1f}")
        if p.ranks.world > 1:
            is_timed, title = self.cluster is not None, "exchanged in a step"
            lines += ["", f"{title:24} {'calls':>8} {'sent by a rank, MiB':>20}" + f"{'ms':>10}" * is_timed]
            for e in self.traffic():
                row = f"{e.name:24} {e.calls:8} {e.nbytes / MIB:20.1f}"
                lines.append(row + f"{1e3 * e.seconds:10.2f}" * is_timed)
        lines += ["", str(self.prediction)] if self.prediction else []
        base = at.nbytes
        if self.remedies:
            lines += ["", f"{'remedy':32} {'arena MiB':>10} {'saves MiB':>10} {'more flops':>11}"]
        for name, nbytes, count in self.remedies:
            more = 100 * (count / flops(p) - 1)
            lines.append(f"{name:32} {nbytes / MIB:10.1f} {(base - nbytes) / MIB:10.1f} {more:10.1f}%")
        return "\n".join(lines)


def flops(p: Program) -> int:
    """FLOP of a micro-batch, without those of the update, which runs once a step."""
    return sum(c.flops for c in p.part(p.segments.forward_backward))


def explain(
    model: Model,
    seq_len: int,
    *,
    execution: Execution,
    precision: Precision = Precision(),
    backend: Planner = RefBackend(),
    accumulation: int = 1,
    optim: Optimizer = AdamW(),
    remedies: bool = True,
) -> Explanation:
    """What a run of these settings would record and allocate. Nothing is allocated here.

    The plan is the one that Trainer makes from the same objects: `plan.nbytes` equals its arena, to the byte.

    backend: whose kernels' scratch is counted; the default one needs none. The ranks are those of its `comm`; of a
        cluster (`GpuRanks`) the time of a step is predicted, too
    accumulation: micro-batches of a step, on each rank
    remedies: whether what would save memory is priced, each by a plan of its own

    >>> import handgrad as hg
    >>> page = hg.explain(hg.models.gpt2("124m"), seq_len=1024, execution=hg.Execution(micro_batch=16))
    >>> page.program.num_params
    124475904
    """

    def lay_out(execution: Execution, accumulation: int) -> tuple[Program, Plan]:
        accumulates = accumulation > 1
        programs = record(model, optim, seq_len, precision, execution, backend, accumulates=accumulates)
        return programs.train, backend.plan(*programs)

    program, layout = lay_out(execution, accumulation)
    prices = []
    for name, other in options(model, seq_len, precision, execution, backend) if remedies else ():
        factor = execution.micro_batch // other.micro_batch
        train, its = lay_out(other, accumulation * factor)
        if layout.nbytes - its.nbytes < MIB / 20:  # saves nothing that shows
            continue
        prices.append((name, its.nbytes, flops(train) * factor))
    rows, cluster, prediction = execution.micro_batch * seq_len, None, None
    if isinstance(backend, GpuRanks):
        cluster = backend.cluster
        chunks = head_chunks(model, seq_len, precision, execution, backend)
        alone = record_train(model, optim, seq_len, precision, execution, chunks=chunks, accumulates=True)
        prediction = predict(
            program,
            alone,
            cluster,
            dtype=precision.dtype,
            tokens=rows,
            flops_per_token=flops_per_token(model, program, execution.micro_batch, seq_len),
            accumulation=accumulation,
        )
    return Explanation(program, layout, rows, tuple(prices), accumulation, backend.note, cluster, prediction)


def options(
    model: Model, seq_len: int, precision: Precision, execution: Execution, backend: Planner
) -> Iterator[tuple[str, Execution]]:
    """What a run could do otherwise to take less memory: (the flag, how a step is executed then)."""
    for policy in POLICIES:
        if policy != execution.recompute:
            yield f"recompute {policy}", replace(execution, recompute=policy)
    for n in (2, 4):
        if execution.micro_batch % n == 0:
            yield (
                f"micro-batch {execution.micro_batch // n}",
                replace(execution, micro_batch=execution.micro_batch // n),
            )
    rows = min(head_rows(model, precision, execution, backend), execution.micro_batch * seq_len)
    for n in (2, 4):
        mib = rows * logits_row_bytes(model, precision) // n // MIB
        if mib:
            yield f"head-mib {mib}", replace(execution, head_bytes=mib * MIB)
