"""train: a training run from its settings to its run folder: what comes before the loop and after it."""

import json
from dataclasses import asdict

from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError
from handgrad.infer.load import TOKENIZER
from handgrad.train.config import Config
from handgrad.train.folder import SETTINGS, changes, claim, run_folder, saved_settings
from handgrad.train.interrupt import EXIT_CODE
from handgrad.train.log import RunLog
from handgrad.train.loop import loop, sample
from handgrad.train.report import write_report
from handgrad.train.resolve import Run, resolve, schedule_of
from handgrad.train.show import show


def train(c: Config, quiet: bool = False) -> int:
    """Trains as the settings say. Returns the exit code: 0, or 130 when interrupted; a checkpoint is then written.

    Raises HandgradError for a mistake; before the run folder is made, if the mistake can be known by then.
    """
    out = run_folder(c)
    with claim(out, c.run.resume) as lock:
        run = resolve(c, out)
        log = open_log(run, quiet)
        if run.done < run.config.run.steps:
            describe(run)
    if not quiet:
        show(run, c)
    with lock, log:
        is_finished = loop(run, log)
        text = finish(run, is_finished)
    last = run.trainer.last_step
    if is_finished:  # below the live line, which has ended
        log.say(f"\n{text}\n" if text else "")
        log.say(f"in {out}: report.html, log.jsonl, step_{last:06d}")
        log.say(f"generate: handgrad generate {out} --prompt TEXT")
    else:
        log.say(f"stopped after step {last}, saved in {out}")
        log.say(f"resume: handgrad train --resume {out}")
    return 0 if is_finished else EXIT_CODE


def open_log(run: Run, quiet: bool) -> RunLog:
    """The log of the run; if it resumes with other settings, a line says which, and how the learning rate jumps."""
    r, sent = run.config.run, run.config.log
    changed = changes(run.out, run.config) if 0 < run.done < r.steps else ""
    jump = rate_jump(run) if changed else ""
    log = RunLog(
        run.out,
        r.steps,
        resumed_at=run.done,
        tensorboard=sent.tensorboard,
        wandb=sent.wandb,
        settings=asdict(run.config),
        quiet=quiet,
    )
    if changed:
        log.event(run.done, f"from here on {changed}{jump}")
    return log


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


def describe(run: Run) -> None:
    """Writes what a reader, `handgrad generate` and a resumption need to know into the run folder."""
    write_text(run.out / SETTINGS, json.dumps(asdict(run.config), indent=2) + "\n")
    write_text(run.out / "memory.txt", run.trainer.plan.memory_map() + "\n")
    write_text(run.out / TOKENIZER, json.dumps(run.tokenizer.save(run.out)) + "\n")


def finish(run: Run, is_finished: bool) -> str:
    """Writes the summary, the page and, if the run has reached its end, a last sample; returns it, or no text."""
    text = sample(run) if is_finished and run.prompt else ""
    if text:
        write_text(run.out / "sample.txt", text + "\n")
    summary = run.facts | {"tokens": run.trainer.tokens(run.trainer.last_step)}
    write_text(run.out / "run.json", json.dumps({"summary": summary}, indent=2) + "\n")
    write_report(run.out)
    return text
