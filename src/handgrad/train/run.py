"""train: a training run, from its settings to a run folder. The loop is linear: what happens now and then is in it."""

import fcntl
import glob
import inspect
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import handgrad.data as hg_data
from handgrad import evals, tokenizers
from handgrad.backends import open_backend
from handgrad.backends.base import Backend
from handgrad.core.errors import HandgradError
from handgrad.infer import Sampling
from handgrad.infer.load import TOKENIZER, check_same_tokens, open_source
from handgrad.io import newest
from handgrad.io.weights import Weights
from handgrad.models import GPT2, preset
from handgrad.optim import AdamW, schedules
from handgrad.train.config import Config, ModelConfig
from handgrad.train.explain import explain
from handgrad.train.log import RunLog, replace_file
from handgrad.train.mfu import mfu
from handgrad.train.report import write_report
from handgrad.train.telemetry import Telemetry
from handgrad.train.trainer import Step, Trainer

INTERRUPTED = 130  # exit code, as shells give for Ctrl-C
SETTINGS = "config.json"
UNNOTED = {("run", name) for name in ("out", "resume", "steps", "threads")}  # of a resumed run
SIZES = ("num_layers", "num_heads", "hidden_size", "max_seq_len")  # a preset's, of which each may be set alone
SAMPLING = {"temperature": 0.8, "top_k": 200}


def train(c: Config, quiet: bool = False) -> int:
    """Trains as the settings say. Returns the exit code: 0, or 130 when interrupted; a checkpoint is then written.

    Raises HandgradError for a mistake; before the run folder is made, if the mistake can be known by then.
    """
    out = run_folder(c)
    with undone_unless_begun(out, c.run.resume) as claim:
        run = Run(c, out)
        log = RunLog(
            out,
            run.config.run.steps,
            resumed_at=run.done,
            tensorboard=c.run.tensorboard,
            wandb=c.run.wandb,
            settings=asdict(run.config),
            quiet=quiet,
        )
        changed = changes(out, run.config) if run.done else ""
        if changed and run.done < run.config.run.steps:
            log.event(run.done, f"from here on {changed}")
        if not run.done or run.done < run.config.run.steps:
            run.describe()
    if not quiet:
        run.show()
    with claim, log:
        finished = loop(run, log)
        last = run.trainer.last_step
        text = run.sample() if finished and run.prompt else ""
        if text:
            replace_file(out / "sample.txt", text + "\n")
        summary = run.facts | {"tokens": run.trainer.tokens(last)}
        replace_file(out / "run.json", json.dumps({"summary": summary}, indent=2) + "\n")
        write_report(out)
    if finished:  # below the live line, which has ended
        log.say(f"\n{text}\n" if text else "")
        log.say(f"in {out}: report.html, log.jsonl, step_{last:06d}")
        log.say(f"ask it: handgrad generate {out} --prompt TEXT")
    else:
        log.say(f"stopped after step {last}, saved in {out}")
        log.say(f"go on: handgrad train --run.resume {out}")
    return 0 if finished else INTERRUPTED


def loop(run: "Run", log: RunLog) -> bool:
    """Steps to the end, or until the user stops it; False for the latter. Both leave a checkpoint of the last step.

    A step is logged when the next one has been started, so that a device is never idle while numbers are written.
    """
    c, trainer = run.config, run.trainer
    r, saved = c.run, run.done
    begin = time.perf_counter()

    def report(step: int, result: Step, val_loss: float | None = None) -> None:
        """Waits for a step, and writes what it did."""
        nonlocal begin
        loss, norm, skipped = result.loss, result.grad_norm, result.skipped
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        if val_loss is None and is_validated(step):
            val_loss = trainer.evaluate(run.val, r.val_tokens or None)
        hellaswag = run.ask() if is_asked(step) else None
        begin = time.perf_counter()
        log.step(
            step,
            loss=loss,
            val_loss=val_loss,
            lr=run.lr(step),
            grad_norm=norm,
            tokens=c.data.batch_tokens,
            step_seconds=seconds,
            mfu=run.mfu(c.data.batch_tokens / seconds),
            hellaswag=hellaswag,
            gpu=run.telemetry.read() if run.telemetry and due(step, r.telemetry_every) else None,
        )
        if skipped:
            log.event(step, f"update skipped: {skipped}")
        if result.skips > r.max_skipped:
            raise HandgradError(
                "train",
                f"at most {r.max_skipped} updates in a row are skipped",
                f"step {step}: {skipped}",
                hint="a lower --optim.lr; --run.check nan names the call",
            )

    def is_validated(step: int) -> bool:
        return run.val is not None and (step == r.steps or due(step, r.val_every))

    def is_asked(step: int) -> bool:
        return bool(run.hellaswag) and (step == r.steps or due(step, r.eval_every))

    with Interrupt(log.say) as interrupt:
        try:
            waiting: tuple[int, Step] | None = None
            for step in range(run.done + 1, r.steps + 1):
                result, last = trainer.step(step, run.lr(step)), step == r.steps
                if waiting is not None:
                    report(*waiting)
                waiting = step, result
                asked, samples = interrupt.asked, due(step, r.sample_every)
                saves = last or asked or due(step, r.save_every)
                if trainer.backend.is_asynchronous and not (saves or samples or is_validated(step) or is_asked(step)):
                    continue
                report(*waiting)
                waiting = None
                if saves:
                    run.save(wait=last or asked)
                    saved = step
                if asked:
                    return last
                if run.prompt and samples and not last:
                    log.say(f"\n{run.sample()}\n")
                begin = time.perf_counter()
        except HandgradError as error:
            if error.where == "data" and trainer.last_step > saved:  # bad tokens far into the data lose no work
                run.save()
            raise
    return True


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens at this one."""
    return every > 0 and step % every == 0


class Run:
    """What the settings of a run come to: data, tokenizer, schedule, trainer; resumed, if asked.

    config: the settings, with every 0, "auto", None and empty text replaced by what it stands for
    facts: what the settings do not say, by name
    done: steps that are behind it
    """

    def __init__(self, c: Config, out: Path):
        backend = open_backend(c.run.backend, c.run.threads)
        shards, val_shards, meta = find_data(c, out)
        hg_data.find_shards(shards)
        self.out = out
        self.tokenizer = tokenizers.load(meta["tokenizer"], Path(shards).parent) if meta else tokenizers.gpt2()
        c, init = started(c, out, self.tokenizer)
        model = model_of(c, meta["vocab_size"] if meta else self.tokenizer.vocab_size)
        data = training_data(c, shards, model)
        self.config = c = resolve(c, model, data, out, backend)
        r, o = c.run, c.optim
        self.lr = schedules.schedule(o.schedule, o.lr, min(o.warmup, r.steps), r.steps, o.final)
        optim = AdamW((o.beta1, o.beta2), o.eps, o.weight_decay, o.clip)
        self.prompt = prompt_ids(self.tokenizer, r.prompt) if r.sample_tokens else []
        self.hellaswag = evals.read_items("hellaswag", r.hellaswag, self.tokenizer) if r.hellaswag else []
        self.val = None
        if val_shards:
            lengths = data.seq_len, data.seq_len
            self.val = hg_data.tokens(val_shards, *lengths, shuffle=False, vocab_size=model.vocab_size)
        try:
            self.trainer = self._trainer(model, optim, data, out, init)
        except HandgradError as error:
            raise (priced(error, model, c, backend) if error.where == "memory" else error) from None
        data.batch(0, micro_batch=1)  # tokens of another vocabulary show here, most often
        if self.hellaswag:  # and questions that the model cannot read
            self.trainer.scorer.texts([pair for item in self.hellaswag for pair in item.pairs])
        if self.val is not None:
            next(self.val.sweep(1))
        self.peak = self.trainer.backend.peak_flops(r.dtype)
        self.telemetry = Telemetry(self.trainer.backend.pci_bus) if r.telemetry_every else None
        self.done = self.trainer.resume() if r.resume else 0
        if self.done > r.steps:
            raise HandgradError("resume", f"--run.steps is at least the checkpoint's step {self.done}", r.steps)
        self.facts = {
            "params": self.trainer.program.num_params,
            "arena": f"{self.trainer.plan.nbytes / 2**20:.1f} MiB",
            "hardware": backend.hardware,
            "dtype": r.dtype,
        }

    def _trainer(self, model: GPT2, optim: AdamW, data: hg_data.Tokens, out: Path, init: str | Weights) -> Trainer:
        r = self.config.run
        return Trainer(
            model,
            optim,
            data,
            micro_batch=r.micro_batch,
            backend=r.backend,
            dtype=r.dtype,
            master_weights=r.master_weights,
            grad_dtype=r.grad_dtype,
            deterministic=r.deterministic,
            recompute=r.recompute,
            head_chunks=r.head_chunks,
            val=self.val is not None,
            sample=bool(self.prompt),
            score=bool(self.hellaswag),
            seed=r.seed,
            threads=r.threads,
            out=out,
            skip_loss_z=r.skip_loss_z,
            skip_grad_z=r.skip_grad_z,
            check=r.check,
            overfit=self.config.data.overfit,
            init=init,
        )

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model flops as a fraction of the hardware's peak, where that is known."""
        if self.peak is None:
            return None
        per_token = self.trainer.model.flops_per_token(self.facts["params"], self.config.data.seq_len)
        return mfu(tokens_per_second, per_token, self.peak)

    def describe(self) -> None:
        """Writes what a reader, `handgrad generate` and a resumption need to know into the run folder."""
        replace_file(self.out / SETTINGS, json.dumps(asdict(self.config), indent=2) + "\n")
        replace_file(self.out / "memory.txt", self.trainer.plan.report() + "\n")
        replace_file(self.out / TOKENIZER, json.dumps(self.tokenizer.save(self.out)) + "\n")

    def show(self) -> None:
        """Prints the settings, the longest group beside the others, and the facts."""
        table = Table(box=None, padding=(0, 1), show_header=False)
        for _ in range(7):
            table.add_column(overflow="fold")
        columns: list[list[tuple[str, str, str]]] = [[], []]
        for group, values in asdict(self.config).items():
            for i, (name, value) in enumerate(values.items()):
                text = repr(value) if isinstance(value, str) else str(value)
                columns[group == "run"].append(("" if i else group, name.replace("_", "-"), text))
        for left, right in zip_longest(*columns, fillvalue=("", "", "")):
            table.add_row(*left, "  ", *right)
        console = Console(highlight=False, markup=False, emoji=False)
        console.print(table)
        f, where = self.facts, f"run folder {self.out}"
        console.print(f" {f['params']:,} parameters, {f['arena']} of memory, {f['hardware']}", soft_wrap=True)
        console.print(f" {where}, resumed at step {self.done}" if self.done else f" {where}", soft_wrap=True)
        if self.done == self.config.run.steps:
            console.print(" nothing is left to do: more --run.steps would go on", soft_wrap=True)
        elif self.config.optim.warmup >= self.config.run.steps:
            console.print(f" all {self.config.run.steps} steps are warm-up: --optim.warmup", soft_wrap=True)
        console.print()

    def sample(self) -> str:
        """The prompt and how the model goes on, always drawn alike."""
        r = self.config.run
        ids = self.trainer.generate(self.prompt, r.sample_tokens, Sampling(**SAMPLING, seed=r.seed))
        return self.tokenizer.decode([*self.prompt, *ids])

    def ask(self) -> float:
        """The share of HellaSwag's questions that the model answers rightly, by llm.c's rule."""
        return evals.evaluate("hellaswag", self.hellaswag, self.trainer.scorer)["acc_llmc"][0]

    def save(self, wait: bool = True) -> None:
        """Writes a checkpoint of the step just done; without `wait`, beside the steps that follow."""
        kept = {name: getattr(self.config.run, name) for name in ("keep_last", "keep_every")}
        self.trainer.save(self.trainer.last_step, asdict(self.config), **kept, wait=wait)


# from flags to what they mean -----------------------------------------------------------------------------------------


def changes(out: Path, c: Config) -> str:
    """What of a run folder's settings these change, in words."""
    try:
        before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a converted model has none
        return ""
    found = []
    for group, values in asdict(c).items():
        for name, value in values.items():
            was = before.get(group, {}).get(name, value)
            if was != value and (group, name) not in UNNOTED:
                found.append(f"{group}.{name.replace('_', '-')} is {value!r}, not {was!r}")
    return ", ".join(found)


def find_data(c: Config, out: Path) -> tuple[str, str, dict[str, Any] | None]:
    """(train glob, val glob or "", meta). Packaged text is prepared inside the run folder; a folder has its split."""
    d = c.data
    if d.train == "shakespeare":
        folder = out / "data"
        if not (folder / "meta.json").exists():
            text = hg_data.shakespeare()
            hg_data.prepare_text([text], folder, tokenizers.chars(hg_data.read_text([text])))
    elif Path(d.train).is_dir():
        folder = Path(d.train)
    else:
        return d.train, d.val, hg_data.read_meta(Path(d.train).parent)
    own = f"{glob.escape(str(folder))}/val_*.bin" if any(folder.glob("val_*.bin")) else ""
    return f"{glob.escape(str(folder))}/train_*.bin", d.val or own, hg_data.read_meta(folder)


def started(c: Config, out: Path, tokenizer: tokenizers.Tokenizer) -> tuple[Config, str | Weights]:
    """(the settings, what the weights start from). A model on disk brings its sizes; a resumed run needs no start."""
    m, last = c.model, newest(out) if c.run.resume else None
    if last is not None:
        check_same_tokens(open_source(str(last)), tokenizer)
        return c, "random"
    if m.init in ("random", "llmc"):
        return c, m.init
    source = open_source(m.init)
    sizes = {name: getattr(source.model, name) for name in (*SIZES, "vocab_size")}
    for name, size in ({"depth": 0} | sizes).items():
        if getattr(m, name) not in (0, size):
            rule = f"--model.{name.replace('_', '-')} is left to the model that --model.init names"
            raise HandgradError("model", rule, getattr(m, name))
    check_same_tokens(source, tokenizer)
    return replace(c, model=replace(m, **sizes, tie_embeddings=source.model.tie_embeddings)), source.weights


def model_of(c: Config, vocab_size: int) -> GPT2:
    """The model that the settings ask for, on data with this vocabulary."""
    m = c.model
    if 0 < m.vocab_size < vocab_size:
        raise HandgradError("model", f"--model.vocab-size is at least the data's {vocab_size}", m.vocab_size)
    sizes = preset(f"d{m.depth}" if m.depth else m.preset)
    sizes |= {name: getattr(m, name) for name in SIZES if getattr(m, name)} | {"vocab_size": m.vocab_size or vocab_size}
    return GPT2(**sizes, dropout=m.dropout, tie_embeddings=m.tie_embeddings)


def training_data(c: Config, shards: str, model: GPT2) -> hg_data.Tokens:
    """The batches that the settings ask for."""
    d, seq_len = c.data, c.data.seq_len or model.max_seq_len
    batch_tokens = d.batch_tokens or c.run.micro_batch * seq_len
    order = dict(seed=c.run.seed, shuffle=d.shuffle)
    return hg_data.tokens(shards, seq_len, batch_tokens, **order, vocab_size=model.vocab_size)


def resolve(c: Config, model: GPT2, data: hg_data.Tokens, out: Path, backend: Backend) -> Config:
    """The settings with every 0, "auto", None and empty text replaced by what it stands for."""
    steps = c.run.steps or max(data.windows // data.sequences, 1)
    final = c.optim.final
    if final is None:
        final = inspect.signature(schedules.SCHEDULES[c.optim.schedule]).parameters["final"].default
    dtype = backend.dtype if c.run.dtype == "auto" else c.run.dtype
    return Config(
        replace(c.model, **asdict(model)),
        replace(c.data, seq_len=data.seq_len, batch_tokens=data.batch_tokens),
        replace(c.optim, final=final),
        replace(c.run, out=str(out), steps=steps, dtype=dtype, backend=backend.name, prompt=c.run.prompt or "\n"),
    )


def priced(error: HandgradError, model: GPT2, c: Config, backend: Backend) -> HandgradError:
    """The error of an arena that does not fit, with what each remedy would save."""
    r, d = c.run, c.data
    page = explain(
        model,
        r.micro_batch,
        d.seq_len,
        dtype=r.dtype,
        backend=backend,
        recompute=r.recompute,
        head_chunks=r.head_chunks,
        accumulation=d.batch_tokens // (r.micro_batch * d.seq_len),
        grad_dtype=r.grad_dtype,
        master_weights=r.master_weights,
    )
    saves = [(page.plan.nbytes - nbytes, name) for name, nbytes, _ in page.remedies]
    prices = "; ".join(
        f"{name} saves {saved / 2**30:.1f} GiB" for saved, name in sorted(saves, reverse=True) if saved > 0
    )
    hint = f"{error.hint}; {prices}" if prices else error.hint
    return HandgradError(error.where, error.rule, error.got, hint=hint)


def prompt_ids(tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
    """The tokens of the prompt of samples."""
    try:
        return tokenizer.encode(prompt).tolist()
    except HandgradError:
        rule, hint = "--run.prompt is spelled with the data's characters", "another, or --run.sample-tokens 0"
        raise HandgradError("run", rule, repr(prompt), hint=hint) from None


# the run folder -------------------------------------------------------------------------------------------------------


def run_folder(c: Config) -> Path:
    """--run.resume's, --run.out, or runs/<data>-NNN: the next free number, or the last taken one to resume "auto"."""
    r = c.run
    if r.resume not in ("", "auto"):
        if r.out and Path(r.out) != Path(r.resume):
            rule = "--run.resume names the run folder, and --run.out the same or none"
            raise HandgradError("resume", rule, f"'{r.resume}' and '{r.out}'")
        if newest(r.resume) is None:
            got = f"none in '{r.resume}'" if Path(r.resume).is_dir() else f"no folder '{r.resume}'"
            hint = f"--run.resume auto --run.out {r.resume} starts afresh where there is none"
            raise HandgradError("resume", "there is a complete checkpoint to go on from", got, hint=hint)
        return Path(r.resume)
    if r.out:
        return Path(r.out)
    stem = re.split(r"[*?\[]", Path(c.data.train).name)[0].strip("_-.") or "run"
    taken = [int(p.name[len(stem) + 1 :]) for p in Path("runs").glob(f"{stem}-*") if p.name[len(stem) + 1 :].isdigit()]
    number = max(taken, default=0) + (0 if r.resume and taken else 1)
    return Path("runs") / f"{stem}-{number:03d}"


@contextmanager
def undone_unless_begun(out: Path, resume: str) -> Iterator[ExitStack]:
    """Makes the run folder, and claims it for this process until what it gives is closed.

    If the block fails, all that was not there before is gone again.
    """
    if (out / "log.jsonl").exists() and not resume:
        hint = f"--run.resume {out if newest(out) else f'auto --run.out {out}'}, or another --run.out"
        raise HandgradError("run", "a run folder holds one run", f"'{out}', which has a log", hint=hint)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = set(out.iterdir())
        (out / ".writable").touch()
        (out / ".writable").unlink()
        claim = claimed(out)
    except OSError as error:
        got = f"'{out}': {error.strerror}"
        raise HandgradError("run", "the run folder is writable", got, hint="another --run.out") from None
    try:
        yield claim
    except BaseException:
        claim.close()
        for path in set(out.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:
            if not any(folder.iterdir()):  # another run may live beside it by now
                folder.rmdir()
        raise


def claimed(out: Path) -> ExitStack:
    """Locks a folder until it is closed; a process that dies lets go. Raises HandgradError if another holds it."""
    claim, folder = ExitStack(), os.open(out, os.O_RDONLY)
    claim.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise HandgradError("run", "one process trains in a run folder", f"another at work in '{out}'") from None
    return claim


def resumed(c: Config) -> Config | None:
    """The settings saved in the run folder that these resume, or None: defaults to read the command line over.

    Sizes that are the preset's are left to it, and all are where another is asked for: that is another model.
    """
    out = run_folder(c)
    path = out / SETTINGS
    if not path.is_file():
        return None
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        saved = Config(**{f.name: f.default_factory(**groups[f.name]) for f in fields(Config)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HandgradError("resume", f"'{path}' holds the settings of a run", error) from None
    m = saved.model
    own = preset(f"d{m.depth}" if m.depth else m.preset)
    other = (c.model.preset, c.model.depth) not in ((m.preset, m.depth), (ModelConfig.preset, ModelConfig.depth))
    sizes = {name: 0 for name in SIZES if other or getattr(m, name) == own[name]}
    return replace(saved, model=replace(m, **sizes), run=replace(saved.run, out=str(out)))


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into `asked`, which the loop reads between steps; the second ends the process.

    A step may be one long call into C, and Python's own handlers wait for its end. A thread hears of the signal at
    once, through a pipe.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None]):
        self.asked, self._say = False, say

    def __enter__(self) -> "Interrupt":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in self.SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):  # none once the other end is closed
            if number[0] not in self.SIGNALS:
                continue
            if self.asked:
                os._exit(INTERRUPTED)
            self.asked = True
            self._say("stopping after this step; once more to stop at once, without saving")
