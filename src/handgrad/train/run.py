"""run: one training run from its settings to a run folder. The loop is linear; `once in a while` says what happens when."""

import json
import os
import platform
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

import handgrad.data as hg_data
from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.core.errors import HandgradError
from handgrad.infer import Sampling
from handgrad.models import GPT2, preset
from handgrad.optim import AdamW, schedules
from handgrad.train.config import Config
from handgrad.train.log import RunLog
from handgrad.train.report import write_report
from handgrad.train.trainer import Trainer

INTERRUPTED = 130  # exit code, as shells give for Ctrl-C


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop reads between steps; the second one acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: Any) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._old[number])


def model_of(c: Config, vocab_size: int) -> GPT2:
    """The model that the settings ask for, on data with this vocabulary."""
    m = c.model
    sizes = preset(f"d{m.depth}" if m.depth else m.preset)
    for name in ("num_layers", "num_heads", "hidden_size", "max_seq_len"):
        sizes[name] = getattr(m, name) or sizes[name]
    if 0 < m.vocab_size < vocab_size:
        raise HandgradError("model", f"the data needs a vocabulary of {vocab_size}", f"--model.vocab-size {m.vocab_size}")
    sizes["vocab_size"] = m.vocab_size or vocab_size
    return GPT2(**sizes, dropout=m.dropout, tie_embeddings=m.tie_embeddings)


def find_data(c: Config, out: Path) -> tuple[str, str, dict[str, Any] | None]:
    """(train glob, val glob or "", meta): packaged text is prepared inside the run folder, a folder brings its own split."""
    d = c.data
    if d.train == "shakespeare":
        folder = out / "data"
        if not (folder / "meta.json").exists():
            text = hg_data.shakespeare()
            hg_data.prepare_text([text], folder, tokenizers.chars(text.read_text(encoding="utf-8")))
    elif Path(d.train).is_dir():
        folder = Path(d.train)
    else:
        return d.train, d.val, hg_data.read_meta(Path(d.train).parent)
    meta = hg_data.read_meta(folder)
    has_val = any(folder.glob("val_*.bin"))
    return str(folder / "train_*.bin"), d.val or (str(folder / "val_*.bin") if has_val else ""), meta


def run_folder(c: Config) -> Path:
    """The folder of this run. A folder that holds a run is only entered to resume it."""
    if c.run.out:
        out = Path(c.run.out)
        if (out / "log.jsonl").exists() and not c.run.resume:
            raise HandgradError("run", "a run folder holds one run", f"'{out}' with a log in it", hint="--run.resume, or another --run.out")
    else:
        stem = "shakespeare" if c.data.train == "shakespeare" else (Path(c.data.train).name.split("*")[0].strip("_-.") or "run")
        taken = [int(p.name.rsplit("-", 1)[1]) for p in Path("runs").glob(f"{stem}-*") if p.name.rsplit("-", 1)[1].isdigit()]
        number = max(taken, default=0) + (0 if c.run.resume and taken else 1)
        out = Path("runs") / f"{stem}-{number:03d}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HandgradError("run", "the run folder is writable", f"'{out}': {error.strerror}", hint="--run.out") from None
    return out


def resolve(c: Config, model: GPT2, isa: str) -> Config:
    """The settings with every 0 and "auto" replaced by what is meant."""
    seq_len = c.data.seq_len or model.max_seq_len
    batch_tokens = c.data.batch_tokens or c.run.micro_batch * seq_len
    dtype = ("bf16" if isa == "avx512bf16" else "f32") if c.run.dtype == "auto" else c.run.dtype
    sizes = {k: v for k, v in asdict(model).items()}
    return replace(c, model=replace(c.model, **sizes), data=replace(c.data, seq_len=seq_len, batch_tokens=batch_tokens),
                   run=replace(c.run, dtype=dtype))


def train(c: Config, quiet: bool = False) -> int:
    """Trains as the settings say; returns the exit code: 0, or 130 when interrupted (a checkpoint is then written)."""
    lr = schedules.schedule(c.optim.schedule, c.optim.lr, min(c.optim.warmup, c.run.steps), c.run.steps, c.optim.final)
    optim = AdamW((c.optim.beta1, c.optim.beta2), c.optim.eps, c.optim.weight_decay, c.optim.clip)
    out = run_folder(c)
    train_glob, val_glob, meta = find_data(c, out)
    tokenizer = tokenizers.load(meta["tokenizer"], Path(train_glob).parent) if meta else tokenizers.gpt2()
    model = model_of(c, meta["vocab_size"] if meta else tokenizer.vocab_size)
    backend = open_backend(c.run.backend, c.run.threads)
    c = resolve(c, model, getattr(backend, "isa", ""))
    r = c.run
    data = hg_data.tokens(train_glob, c.data.seq_len, c.data.batch_tokens, seed=r.seed, shuffle=c.data.shuffle, vocab_size=model.vocab_size)
    val = hg_data.tokens(val_glob, c.data.seq_len, c.data.seq_len, shuffle=False, vocab_size=model.vocab_size) if val_glob else None
    prompt = tokenizer.encode(r.prompt) if r.sample_tokens else []
    trainer = Trainer(model, optim, data, micro_batch=r.micro_batch, backend=r.backend, dtype=r.dtype, recompute=r.recompute,
                      head_chunks=r.head_chunks, val=val is not None, sample=len(prompt) > 0, seed=r.seed, threads=r.threads, out=out,
                      skip_loss_z=r.skip_loss_z, skip_grad_z=r.skip_grad_z, check=r.check)
    done = trainer.resume() if r.resume else 0
    hardware = f"{platform.processor() or platform.machine()}, {getattr(backend, 'threads', 1)} threads, {r.backend} {getattr(backend, 'isa', '')}"
    _write(out / "config.json", json.dumps(asdict(c), indent=2))
    _write(out / "memory.txt", trainer.plan.report())
    if meta:
        _write(out / "tokenizer-spec.json", json.dumps(tokenizer.save(out), ensure_ascii=False))
    facts = {"params": trainer.program.num_params, "arena": f"{trainer.plan.nbytes / 2**20:.1f} MiB", "hardware": hardware, "dtype": r.dtype,
             "isa": getattr(backend, "isa", ""), "threads": getattr(backend, "threads", 1)}
    log = RunLog(out, r.steps, resumed_at=done, tensorboard=r.tensorboard, quiet=quiet)
    if not quiet:
        print_settings(c, facts | {"run folder": str(out)} | ({"resumed at": f"step {done}"} if done else {}))
    skipped, code = 0, 0

    def sample() -> str:
        ids = trainer.generate(prompt, r.sample_tokens, Sampling(temperature=0.8, top_k=200, seed=r.seed))
        return r.prompt + "".join(tokenizer.stream(ids))

    def save(step: int) -> None:
        trainer.save(step, asdict(c), keep_last=r.keep_last, keep_every=r.keep_every)

    with Interrupt() as interrupt, log:
        for step in range(done + 1, r.steps + 1):
            begin = time.perf_counter()
            result = trainer.step(step, lr(step))
            seconds = time.perf_counter() - begin
            last = step == r.steps
            # once in a while: validate
            val_loss = None
            if val is not None and (last or (r.val_every and step % r.val_every == 0)):
                val_loss = trainer.evaluate(val, r.val_tokens or None)
            log.step(step, loss=result.loss, val_loss=val_loss, lr=lr(step), grad_norm=result.grad_norm,
                     tokens=c.data.batch_tokens, step_seconds=seconds)
            if result.skipped:
                log.event(step, f"update skipped: {result.skipped}")
            skipped = skipped + 1 if result.skipped else 0
            if skipped > r.max_skipped:
                raise HandgradError("train", f"at most {r.max_skipped} updates in a row are skipped",
                                    f"step {step}: {result.skipped}", hint="a lower --optim.lr; --run.check nan names the call")
            # once in a while: sample
            if len(prompt) and r.sample_every and step % r.sample_every == 0 and not last:
                log.say(sample())
            # once in a while: save
            if last or interrupt.asked or (r.save_every and step % r.save_every == 0):
                save(step)
            if interrupt.asked and not last:
                code = INTERRUPTED
                break
        if len(prompt) and not code:
            text = sample()
            log.say(text)
            _write(out / "sample.txt", text)
        log.say(f"stopped at step {trainer.last_step} and saved; go on with: handgrad train --run.resume --run.out {out}" if code
                else f"run folder {out}: report.html, log.jsonl, step_{trainer.last_step:06d}/")
    _write(out / "run.json", json.dumps({"summary": facts | {"tokens": trainer.last_step * c.data.batch_tokens}}, indent=2))
    write_report(out)
    return code


def print_settings(c: Config, facts: dict[str, Any]) -> None:
    """The resolved settings as a table, group by group."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    for group, values in asdict(c).items():
        for i, (key, value) in enumerate(values.items()):
            table.add_row(group if i == 0 else "", key.replace("_", "-"), repr(value) if isinstance(value, str) else str(value))
    for i, (key, value) in enumerate(facts.items()):
        table.add_row("run is" if i == 0 else "", key, f"{value:,}" if isinstance(value, int) else str(value))
    Console(highlight=False).print(table)


def _write(path: Path, text: str) -> None:
    """Replaces a small text file in one step."""
    new = path.with_name(path.name + ".tmp")
    with open(new, "w", encoding="utf-8") as f:
        f.write(text + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)
