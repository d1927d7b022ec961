"""train: a training run from its settings to its run folder: what comes before the loop and after it."""

import json
import math
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from handgrad.backends.ranks.comm import Comm, RankError
from handgrad.backends.ranks.startup import open_comm
from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError, one_line
from handgrad.core.output import Output, redirected
from handgrad.data import Data
from handgrad.io import checkpoint, newest
from handgrad.models import EncoderDecoder, Model
from handgrad.train.config import Config
from handgrad.train.extend import set_aside
from handgrad.train.folder import Lock, changes, claim, describe, run_folder, saved_settings
from handgrad.train.interrupt import EXIT_CODE, Interrupt, as_ctrl_c
from handgrad.train.log import RunLog
from handgrad.train.loop import Log, loop, sample, save
from handgrad.train.ranks import NullLog, check_same, exit_code, on_rank_0, together
from handgrad.train.report import write_report
from handgrad.train.resolve import Run, resolve
from handgrad.train.schedule import schedule_of
from handgrad.train.show import show


def train(c: Config, quiet: bool = False) -> int:
    """Trains as the settings say. Returns the exit code: 0, or 130 when interrupted; a checkpoint is then written.

    Raises HandgradError for a mistake; before the run folder is made, if the mistake can be known by then. Whatever is
    raised later leaves a checkpoint of the last step, if it can be written. A closed output does not stop the run.
    """
    comm = open_comm()
    with together(comm):
        check_same(comm, c)
        out = Path(on_rank_0(comm, lambda: str(run_folder(c))))
        with redirected(Output(sys.stdout, partial(unread, out)), Output(sys.stderr)), as_ctrl_c():
            is_finished = train_in(out, c, comm, quiet)
    return 0 if is_finished else EXIT_CODE


def train_in(out: Path, c: Config, comm: Comm, quiet: bool) -> bool:
    """Trains in a run folder, which rank 0 claims; whether the run has reached its end."""
    leads = comm.rank == 0
    with claim(out, c.run.resume) if leads else nullcontext() as lock:
        run = resolve(c, out, comm)
        processes = comm.all_gather_object(os.getpid())
        log = open_log(run, c, quiet) if leads else NullLog()
        if leads and run.done < run.steps:
            write_folder(run)
        if leads and not quiet:
            show(run, c, processes)
    last = partial(comm.fail, "stopped at once, without saving", EXIT_CODE)
    with lock or nullcontext(), log, Interrupt(log.say, last) as interrupt:
        try:
            keep = partial(keep_folder, run, log, lock) if lock else lambda: False
            is_finished = loop(run, log, interrupt, keep)
            text = finish(run, is_finished)
            check_converged(run)
        except BaseException as error:
            rescue(run, log, lock, error)
            raise
    if leads:
        farewell(run, log, is_finished, text)
    return is_finished


def write_folder(run: Run) -> None:
    """Writes what describes the run into its folder, so that a report of a running one knows it."""
    describe(run.out, asdict(run.config), run.trainer.plan.memory_map(), run.tokenizer, run.template)
    write_summary(run, run.facts)


def write_summary(run: Run, facts: dict[str, Any]) -> None:
    """Writes run.json of the run folder."""
    write_text(run.out / "run.json", json.dumps({"summary": facts}, indent=2) + "\n")


def check_converged(run: Run) -> None:
    """Raises HandgradError if the last step's loss is not finite: the weights are of no use."""
    if run.trainer.skips and not math.isfinite(run.trainer.last_loss):
        what = f"the run diverged: the last {run.trainer.skips} updates were skipped, as the loss is no number"
        raise HandgradError("train", what, hint="a lower --lr; --check nan names the call")


def unread(out: Path, error: OSError) -> None:
    """Says, where somebody may still see it, that the output of a run is lost."""
    what = f"the output cannot be written: {error.strerror}; training continues; its log is {out / 'log.jsonl'}"
    print(f"[handgrad] {what}", file=sys.stderr)


def open_log(run: Run, asked: Config, quiet: bool) -> RunLog:
    """The log of the run; if it resumes with other settings, a line says which, and how the learning rate jumps.

    Another line says if it does not resume from the newest checkpoint; what --extend leaves behind is set aside first.
    """
    sent = run.config.log
    changed = changes(run.out, run.config) if 0 < run.done < run.steps else ""
    aside = set_aside(run.out, run.done) if asked.run.extend else ""
    if run.done:
        checkpoint.link_best(run.out, run.best.step if run.config.checkpoint.keep_best else 0)
    jump = rate_jump(run) if changed else ""
    log = RunLog(
        run.out,
        run.steps,
        resumed_at=run.done,
        tensorboard=sent.tensorboard,
        wandb=sent.wandb,
        settings=asdict(run.config),
        quiet=quiet,
    )
    if run.trainer.passed_over:
        log.event(run.done, run.trainer.passed_over)
    if asked.run.extend:
        log.event(run.done, f"extended from step {run.done} to {run.steps} steps{aside}")
    if asked.run.fresh_optimizer:
        log.event(
            run.done, f"the state of {run.config.optim.optimizer} starts anew here; the weights are the checkpoint's"
        )
    if changed:
        log.event(run.done, f"from here on {changed}{jump}", lr=run.lr(run.done + 1))
    return log


def keep_folder(run: Run, log: Log, lock: Lock) -> bool:
    """Makes the run folder again if it, or the log in it, was deleted or moved; whether that was so.

    What was in it and is known is written again, and the lock is taken. Raises HandgradError if another run is there.
    """
    if lock.is_lost():
        lock.renew()
    elif not log.is_deleted:
        return False
    write_folder(run)
    log.restore()
    log.event(run.trainer.last_step, f"{run.out} or its log was deleted or moved; both are here again")
    return True


def rescue(run: Run, log: Log, lock: Lock | None, error: BaseException) -> None:
    """Saves the steps before an error, and says so; or adds to the error why that is not possible.

    Several ranks save if the error has reached all of them after the same step, with its parameters and states whole.
    """
    trainer = run.trainer
    trainer.comm.fail(str(error) or type(error).__name__, exit_code(error))
    try:
        if agree_to_save(run, error):
            save_last(run, log, lock, error)
    finally:
        with suppress(Exception):
            trainer.wait_saved()  # the log is still open, and the folder locked


def agree_to_save(run: Run, error: BaseException) -> bool:
    """Whether all ranks hold the same step, whole and worth a checkpoint; adds to the error that it is lost."""
    trainer, step = run.trainer, run.trainer.last_step
    if isinstance(error, RankError) and error.is_gone:  # and its share of the state with it
        if step > run.done:
            error.add_note(lost_steps(run))
        return False
    try:
        is_whole = trainer.is_whole()
        trainer.comm = trainer.comm.after_failure()
        states = trainer.comm.all_gather_object([step, is_whole])
    except Exception as failure:
        add_note(error, f"step {step} could not be saved", failure)
        return False
    if states != [[step, True]] * trainer.comm.world and trainer.comm.world > 1:
        error.add_note(f"The ranks stopped at different places. {lost_steps(run)}")
        return False
    return step > run.done and trainer.skips <= run.config.optim.max_skipped  # else nothing new, or nothing good


def lost_steps(run: Run) -> str:
    """That steps are lost, and how to go on."""
    last = newest(run.out)
    if last is None:
        return "No checkpoint was written."
    return f"The steps after {last.name} are lost; resume: handgrad train --resume {run.out}"


def save_last(run: Run, log: Log, lock: Lock | None, error: BaseException) -> None:
    """Saves the last step and writes the report, or adds to the error why that is not possible."""
    trainer, step = run.trainer, run.trainer.last_step
    try:
        if lock:
            keep_folder(run, log, lock)
    except Exception as failure:  # the folder is another's now
        add_note(error, f"step {step} could not be saved", failure)
        return
    try:
        if on_rank_0(trainer.comm, lambda: newest(run.out) != run.out / f"step_{step:06d}"):
            save(run, log, wait=True)
        log.say(f"saved step {step}; resume: handgrad train --resume {run.out}")
    except Exception as failure:
        add_note(error, f"step {step} could not be saved", failure)
    try:
        finish(run, is_finished=False)
    except Exception as failure:
        add_note(error, "there is no report", failure)


def add_note(error: BaseException, what: str, failure: Exception) -> None:
    """Adds to an error what else went wrong, unless it is the same again."""
    if str(failure) != str(error):
        error.add_note(f"And {what}: {one_line(failure)}")


def reader(model: Model, out: str, data: Data) -> str:
    """The command that reads texts with a model that continues none."""
    if isinstance(model, EncoderDecoder):
        return f"generate: handgrad generate {out} --prompt TEXT"
    if getattr(model, "labels", ()):
        return f"classify: handgrad classify {out} FILE{' --pair' * getattr(data.objective, 'pairs', False)}"
    return f"embed: handgrad embed {out} FILE"


def farewell(run: Run, log: Log, is_finished: bool, text: str) -> None:
    """The last lines, below the live line, which has ended."""
    out, last = run.out, run.trainer.last_step
    if is_finished:
        log.say(f"\n{text}\n" if text else "")
        log.say(f"in {out}: report.html, log.jsonl, step_{last:06d}")
        if run.template.source:
            log.say(f"chat: handgrad chat {out}")
        elif run.trainer.model.continues_text:
            log.say(f"generate: handgrad generate {out} --prompt TEXT")
        else:
            evaluate = f"evaluate: handgrad eval {out}; " if run.val is not None else ""
            log.say(evaluate + reader(run.trainer.model, str(out), run.trainer.data))
    else:
        log.say(f"stopped after step {last}, saved in {out}")
        log.say(f"resume: handgrad train --resume {out}")


def rate_jump(run: Run) -> str:
    """How the learning rate jumps if the next step has another one than the saved settings give it, else nothing."""
    saved = saved_settings(run.config)
    if saved is None or saved.optim.warmup is None:
        return ""
    try:
        before = schedule_of(saved)
    except HandgradError:  # a schedule that only earlier versions allowed
        return ""
    if run.lr(run.done + 1) == before(run.done + 1):
        return ""
    return f"; the learning rate goes from {before(run.done):.6g} to {run.lr(run.done + 1):.6g}"


def finish(run: Run, is_finished: bool) -> str:
    """Writes the summary, the page and, if the run has reached its end, a last sample; returns it, or no text. Rank 0
    does; the others take part in the sample."""
    text = sample(run) if is_finished and run.prompt else ""
    if run.trainer.comm.rank > 0:
        return ""
    if text:
        write_text(run.out / "sample.txt", text + "\n")
    write_summary(run, run.facts | {"tokens": run.trainer.tokens(run.trainer.last_step)})
    write_report(run.out)
    return text
