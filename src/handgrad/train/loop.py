"""The training loop: steps, and what happens between them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from handgrad import evals
from handgrad.backends.ranks.comm import RankError
from handgrad.core.errors import HandgradError
from handgrad.data import Mixture
from handgrad.infer import Sampling
from handgrad.io import checkpoint
from handgrad.optim import schedules
from handgrad.train.interrupt import Interrupt
from handgrad.train.log import RunLog
from handgrad.train.mfu import mfu
from handgrad.train.ranks import NullLog
from handgrad.train.resolve import Run
from handgrad.train.step import Step
from handgrad.train.trainer import Trainer

Log = RunLog | NullLog
WARM, SLOW = 5, 0.25  # steps until a step is typical; the share of it in waiting for other ranks that is worth a line
SAMPLING = Sampling(temperature=0.8, top_k=200)


@dataclass(frozen=True)
class Due:
    """What happens after a step, before the next one starts."""

    val: bool
    hellaswag: bool
    sample: bool
    save: bool
    stop: bool


@dataclass(frozen=True)
class Finished:
    """A step, the backend's mark before it, and what is due after it."""

    number: int
    result: Step
    begin: Any
    due: Due


def loop(run: Run, log: Log, interrupt: Interrupt, keep: Callable[[], bool]) -> bool:
    """Steps to the end, or until the user stops it; False for the latter. Both leave a checkpoint of the last step.

    keep: called after every step, before anything is written; it returns whether the run folder had to be made again

    All ranks do the same, and agree on what only one of them knows.
    """
    trainer, last, is_renewed = run.trainer, run.steps, False
    if isinstance(trainer.data, Mixture):
        text = f"epochs of each set in {last:,} steps: {epochs(trainer.data, last)}"
        log.event(run.done, text, sets=trainer.data.progress(run.done))
    if is_exhausted(run):
        log.say(f"nothing left to do: {exhausted(run)}; a larger --patience goes on")
        return True

    def due(number: int) -> Due:
        usual = due_after(run, interrupt, number)
        return replace(usual, save=usual.save or is_renewed)

    for f in steps(trainer, run.lr, run.done + 1, last, due, run.momentum):
        is_renewed = trainer.comm.any(keep()) or is_renewed
        is_best = log_step(run, log, f) and run.config.checkpoint.keep_best
        is_over = is_exhausted(run)
        if is_over:
            log.event(f.number, f"stopped early: {exhausted(run)}")
        is_whole = f.number == trainer.last_step  # the log has every step of a checkpoint
        if f.due.save or is_best or is_over or (is_renewed and is_whole):
            is_renewed = False
            with log.activity("saving"):
                save(run, log, wait=f.due.stop or is_over or f.number == last)
        if is_over:
            return True
        if f.due.stop:
            return f.number == last
        if f.due.sample:
            with log.activity("sampling"):
                text = sample(run)
            log.say(f"\n{text}\n")
    return True


def epochs(data: Mixture, steps: int) -> str:
    """How often each set of a mixture has been read after so many steps, in words."""
    return ", ".join(f"{one['name']} {one['epochs']:.2f}" for one in data.progress(steps))


def is_exhausted(run: Run) -> bool:
    """Whether --patience ends the run: the same on all ranks."""
    return 0 < run.config.eval.patience <= run.best.since


def exhausted(run: Run) -> str:
    """Why."""
    best = run.best
    return f"{best.since} validations without a loss below {best.val_loss:.4f}, that of step {best.step}"


def steps(
    trainer: Trainer,
    lr: schedules.Schedule,
    first: int,
    last: int,
    due: Callable[[int], Due],
    momentum: schedules.Schedule | None = None,
) -> Iterator[Finished]:
    """Runs the steps `first` to `last` and yields each in order.

    On an asynchronous device, a step is yielded once the next one has been started: the device works while the caller
    writes numbers. A step after which something is due is yielded before the next one starts.
    """
    waiting: list[Finished] = []  # at most one
    begin = trainer.backend.mark()
    for number in range(first, last + 1):
        try:
            result = trainer.step(number, lr(number), momentum(number) if momentum else None)
        finally:  # also if it raises: the step before it is done
            yield from waiting
        waiting = [Finished(number, result, begin, due(number))]
        begin = result.end
        if trainer.backend.is_asynchronous and not any(astuple(waiting[0].due)):
            continue
        yield from waiting
        waiting, begin = [], trainer.backend.mark()  # after whatever the caller did
    yield from waiting


def due_after(run: Run, interrupt: Interrupt, number: int) -> Due:
    """What is due after a step."""
    c, is_stopped = run.config, run.trainer.comm.any(interrupt.requested)
    is_last = number == run.steps
    return Due(
        val=run.val is not None and (is_last or every(c.eval.val_every, number)),
        hellaswag=bool(run.hellaswag) and (is_last or every(c.eval.eval_every, number)),
        sample=bool(run.prompt) and not is_last and every(c.eval.sample_every, number),
        save=is_last or is_stopped or number == run.branch or every(c.checkpoint.save_every, number),
        stop=is_stopped,
    )


def every(count: int, number: int) -> bool:
    """Whether an event that happens every `count` steps (0: never) is due."""
    return count > 0 and number % count == 0


def log_step(run: Run, log: Log, f: Finished) -> bool:
    """Waits for a step, evaluates if that is due, and writes the line of the log; whether its validation loss is the
    lowest so far.

    Raises HandgradError if too many updates in a row were skipped.
    """
    c, trainer, result = run.config, run.trainer, f.result
    seconds = trainer.backend.seconds(f.begin, result.end) - result.waited
    write = partial(
        log.step,
        f.number,
        loss=result.loss,
        lr=run.lr(f.number),
        grad_norm=result.grad_norm,
        tokens=trainer.data.sequences * trainer.data.sequence_tokens,
        step_seconds=seconds,
        mfu=mfu(c.data.batch_tokens / seconds, run.flops_per_token, run.peak_flops) if run.peak_flops else None,
        exposed=result.exposed if trainer.ranks.world > 1 else None,
        gpu=run.telemetry.read() if run.telemetry and every(c.log.telemetry_every, f.number) else None,
    )
    try:
        found = measure(run, log, f)
    except BaseException:
        write()  # the step was done, whatever went wrong after it
        raise
    write(**found)
    if result.skipped:
        log.event(f.number, f"update skipped: {result.skipped}")
    if f.number == run.done + WARM and result.exposed > SLOW * seconds:
        share = f"{100 * result.exposed / seconds:.0f} % of a step"
        log.event(f.number, f"computation waits for other ranks {share}; more --batch-tokens exchange less often")
    if result.skips > c.optim.max_skipped:
        what = f"{result.skips} updates in a row were skipped, the last at step {f.number}: {result.skipped}"
        raise HandgradError("train", what, hint=f"{way_back(run.out)} with a lower --lr; --check nan names the call")
    return "val_loss" in found and run.best.take(f.number, found["val_loss"])


def measure(run: Run, log: Log, f: Finished) -> dict[str, Any]:
    """What is due to be measured after a step: val_loss, a classifier's val_acc, and HellaSwag's accuracy."""
    found: dict[str, Any] = {}
    if f.due.hellaswag:
        run.trainer.use_average()  # all ranks, also where one of them runs the model
    if f.due.val and run.val is not None:
        with log.activity("validating"):
            found |= run.trainer.validate(run.val, run.config.eval.val_tokens or None)
    if f.due.hellaswag:
        with log.activity("HellaSwag"):
            found["hellaswag"] = hellaswag(run) if takes_part(run) else None
    return found


def way_back(out: Path) -> str:
    """How to go on from the last checkpoint in a run folder after which no update was skipped."""
    found = checkpoint.complete(out)
    later = list(takewhile(lambda path: checkpoint.load_meta(path).get("skips"), found))
    if len(later) == len(found):
        return "there is no checkpoint from before them: start again"
    first = f"delete {', '.join(path.name for path in later)} and " if later else ""
    return f"{first}resume {found[len(later)]}, the last good checkpoint, by --resume {out}"


def hellaswag(run: Run) -> float:
    """The share of HellaSwag's questions that the model answers rightly, by llm.c's rule."""
    assert run.trainer.scorer is not None  # planned where there are questions
    return evals.evaluate("hellaswag", run.hellaswag, run.trainer.scorer)["acc_llmc"][0]


def takes_part(run: Run) -> bool:
    """Whether this rank runs the model where one rank's result counts: rank 0 alone, unless it needs others' shares."""
    ranks = run.trainer.ranks
    return ranks.rank == 0 or ranks.shares(3) > 1


def sample(run: Run) -> str:
    """The prompt and its continuation, the same for the same weights; or why there is none, which stops no run."""
    run.trainer.use_average()  # all ranks
    if not takes_part(run):
        return ""
    c, drawable = run.config, run.tokenizer.drawable()  # the model may have more rows
    sampling = replace(SAMPLING, seed=c.run.seed)
    try:
        ids = run.trainer.generate(run.prompt, c.eval.sample_tokens, sampling, run.ends, drawable)
        return run.tokenizer.decode([*run.prompt, *ids])
    except RankError:
        raise
    except HandgradError as error:
        return f"no sample: {error}"


def save(run: Run, log: Log, wait: bool) -> None:
    """Writes a checkpoint of the step just done; without `wait`, while the next steps run. The log is on disk first."""
    kept, config = run.config.checkpoint, asdict(run.config)
    keep: dict[str, Any] = {"keep_last": kept.keep_last, "keep_every": kept.keep_every, "keep": (run.branch,)}
    keep |= {"best": run.best.step if kept.keep_best else None, "notes": run.best.saved()}
    run.trainer.save(run.trainer.last_step, config, **keep, wait=wait, before_done=log.flush)
