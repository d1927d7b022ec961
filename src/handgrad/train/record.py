"""Recording: the programs of a training run. What they are depends on objects that `explain` and Trainer share."""

from collections.abc import Iterator
from dataclasses import dataclass

from handgrad.backends.base import Planner
from handgrad.core.backward import POLICIES, backward
from handgrad.core.communicate import gather_parameters, sum_losses
from handgrad.core.errors import HandgradError
from handgrad.core.op import Phase
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.core.ranks import ALONE, Ranks
from handgrad.evals import record as record_scorer
from handgrad.infer.engine import record as record_engine
from handgrad.models import Bert, Model, forward_loss
from handgrad.ops import add, collectives
from handgrad.optim import Optimizer, record_step
from handgrad.train.average import record_average
from handgrad.train.execution import Execution
from handgrad.train.tuning import adapters_of, learns


@dataclass(frozen=True)
class Programs:
    """The programs that share one arena. Iterating gives them all, in the order in which they are planned."""

    train: Program
    loss: Program | None
    engine: tuple[Program, ...] | None
    scorer: tuple[Program, ...]
    average: Program | None

    def __iter__(self) -> Iterator[Program]:
        yield self.train
        if self.loss is not None:
            yield self.loss
        yield from self.engine or ()
        yield from self.scorer
        if self.average is not None:
            yield self.average


def record(
    model: Model,
    optim: Optimizer,
    seq_len: int,
    precision: Precision,
    execution: Execution,
    planner: Planner,
    *,
    accumulates: bool,
) -> Programs:
    """All programs of a run whose steps have one micro-batch, or several if it `accumulates`, for this rank."""
    ranks = planner.ranks(execution.zero)
    chunks, extra = head_chunks(model, seq_len, precision, execution, planner), execution.extra_programs
    dtype, adapters, tokens = precision.working, adapters_of(model, execution), execution.micro_batch * seq_len
    train = record_train(
        model, optim, seq_len, precision, execution, chunks=chunks, accumulates=accumulates, ranks=ranks
    )
    programs = Programs(
        train,
        record_loss(model, seq_len, precision, execution, chunks=chunks) if "val" in extra else None,
        record_engine(model, dtype, 0, adapters) if "sample" in extra and model.continues_text else None,
        record_scorer(model, dtype, tokens, adapters) if "score" in extra else (),
        record_average(train, optim),
    )
    for p in programs if ranks.shares(3) > 1 else ():
        if p is not train:
            gather_parameters(p, train, collectives.all_gather)
    if programs.loss is not None and ranks.world > 1:
        sum_losses(programs.loss, collectives.sum_losses)
    return programs


def record_train(
    model: Model,
    optim: Optimizer,
    seq_len: int,
    precision: Precision,
    execution: Execution,
    *,
    chunks: int,
    accumulates: bool = False,
    ranks: Ranks = ALONE,
) -> Program:
    """The list of one step of one of the `ranks`: forward, backward | norm | update.

    chunks: of the head's logits.  accumulates: a step has several micro-batches.
    """
    if seq_len > model.max_seq_len:
        rule = f"the model reads at most {model.max_seq_len} tokens"
        hint = "a shorter seq_len, or a model with a larger max_seq_len"
        raise HandgradError("train", rule, f"seq_len {seq_len}", hint=hint)
    p = Program(
        precision.working,
        trains=True,
        accumulates=accumulates,
        grad_dtype=precision.gradients,
        master=precision.master_weights,
        ranks=ranks,
        trainable=learns(model, execution),
        adapters=adapters_of(model, execution),
    )
    forward_loss(p, model, execution.micro_batch, seq_len, chunks, execution.documents)
    backward(p, add, drop=POLICIES[execution.recompute])
    record_step(p, optim)
    return p


def record_loss(model: Model, seq_len: int, precision: Precision, execution: Execution, *, chunks: int) -> Program:
    """The list of one evaluation batch; a classifier's also has the logits, of which accuracy is counted."""
    p = Program(precision.working, adapters=adapters_of(model, execution))
    classifies = isinstance(model, Bert) and bool(model.labels) and not model.is_regression
    forward_loss(p, model, execution.micro_batch, seq_len, chunks, execution.documents, classifies)
    return p


def flops_per_token(model: Model, p: Program, micro_batch: int, seq_len: int) -> int:
    """FLOP of forward and backward per token: the model's own count, or that of the calls where parameters are frozen,
    since gradients of those are not computed.

    p: the program of training
    """
    if all(info.trainable for info in p.params.values()):
        return model.flops_per_token(p.num_params, seq_len)
    return sum(c.flops for c in p.calls if c.phase in (Phase.FORWARD, Phase.BACKWARD)) // (micro_batch * seq_len)


def head_chunks(model: Model, seq_len: int, precision: Precision, execution: Execution, planner: Planner) -> int:
    """The number of chunks of the head's logits."""
    return -(-execution.micro_batch * model.predictions(seq_len) // head_rows(model, precision, execution, planner))


def head_rows(model: Model, precision: Precision, execution: Execution, planner: Planner) -> int:
    """Rows of logits that exist at a time, at least 1. `head_bytes` of the user's may allow more than the backend's."""
    row = logits_row_bytes(model, precision)
    most = min(planner.head_rows, planner.head_bytes(precision.working) // row)
    return max(execution.head_bytes // row if execution.head_bytes else most, 1)


def logits_row_bytes(model: Model, precision: Precision) -> int:
    """Bytes of the logits of one token, with those of the padded rows of the vocabulary."""
    return model.vocab_padded * precision.working.size
