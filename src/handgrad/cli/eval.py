"""handgrad eval RUN: validation loss and benchmark tasks of a trained model, as a table and in eval.json beside it."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from handgrad import data as hg_data
from handgrad import evals
from handgrad.cli.compute import Compute
from handgrad.cli.flags import parse
from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.json_file import read_object
from handgrad.core.number import whole
from handgrad.infer.load import open_source
from handgrad.infer.texts import TextEncoder, load_encoder
from handgrad.io.checkpoint import is_checkpoint
from handgrad.models import Model
from handgrad.train.config import PACKAGED, Config, DataConfig
from handgrad.train.datasets import Shards, find_data, objective_of
from handgrad.train.folder import SETTINGS

RESULTS = "eval.json"
Opened = evals.Loaded | evals.Denoiser | TextEncoder
BATCH_TOKENS = 2048  # at least, of a batch of hidden tokens where no run says its size


@dataclass(frozen=True)
class Eval:
    """Model and tasks."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, one of its checkpoints, a .bin of llm.c, a .gguf, a Hugging Face folder, or hf:NAME"""
    tasks: str = "val"
    """val, hellaswag, lambada, mmlu, piqa, arc_easy, arc_challenge, winogrande, with commas; NAME=FILE gives a file"""
    data: str = "."
    """folder with the tasks' files; val is the run's own data, unless val=GLOB"""
    seq_len: int = 0
    """tokens of a sequence of val, a T5's targets; 0: those of the run, or as many as the model reads"""
    limit: int = 0
    """at most this many questions, or sequences of val; 0: all"""
    out: str = ""
    """file that the results are added to; empty: eval.json beside the model"""
    ema: bool = False
    """the average of the weights that train --ema keeps"""
    compute: Compute = field(default_factory=Compute)


def main(argv: list[str]) -> int:
    """Evaluates task by task and writes each result before the next task starts."""
    a = parse(Eval, argv, "eval")
    if a.limit < 0:
        raise HandgradError("eval", "--limit is at least 1, or 0 for all", a.limit)
    whole("eval", "--seq-len", a.seq_len)
    places = dict(place(word, a) for word in a.tasks.split(","))
    m = open_model(a)
    table = Table("task", "of", "metric", "value", "± standard error", box=None)
    for column in table.columns[1:2] + table.columns[3:]:
        column.justify = "right"
    beside = m.source.path if m.source.kind == "hf" else m.source.path.parent
    path = Path(a.out) if a.out else beside / RESULTS
    console = Console(highlight=False, markup=False, emoji=False)
    bars = Console(stderr=True)
    with Progress(console=bars, transient=True, disable=not bars.is_terminal) as progress:
        # read all tasks before computing anything, so that a mistake shows at once
        read = {name: questions(name, at, a, m) for name, at in places.items()}
        write_text(path, dumped(results_in(path)))
        for name, (what, count) in read.items():
            bar, begin = progress.add_task(name, total=count), time.perf_counter()

            def done(pairs: int, bar: Any = bar) -> None:
                progress.update(bar, completed=pairs)

            if isinstance(m, TextEncoder):
                found = evals.class_metrics(what, m, a.limit or None, done)
            elif isinstance(m, evals.Denoiser):
                found = evals.denoising_metrics(what, m, a.limit or None, done)
            elif name == "val":
                found = evals.val_metrics(what, m.tokenizer, m.scorer, a.limit * what.seq_len or None, done)
            else:
                found = evals.evaluate(name, what, m.scorer, done)
            of = count if name == "val" else len(what)
            key = f"{name} (first {of})" if a.limit else name  # beside the result of them all
            key += f" at {a.seq_len} tokens" * (name == "val" and a.seq_len > 0) + " of the average" * a.ema
            note(path, m, key, found, {"count": of, "file": str(places[name]), "seconds": time.perf_counter() - begin})
            for i, (metric, (value, error)) in enumerate(found.items()):
                row = ("", "") if i else (name, f"{of:,}")
                table.add_row(*row, metric, f"{value:.4f}", "" if error != error else f"{error:.4f}")
    console.print(table)
    console.print(f"\n{m.source.path}, {m.dtype}, {m.backend.hardware}; in {path}", soft_wrap=True)
    return 0


def open_model(a: Eval) -> Opened:
    """The model, ready to score texts, to classify them if it has labels, or to find what is hidden of them."""
    model, how = open_source(a.run).model, a.compute.settings
    if getattr(model, "labels", ()):
        return load_encoder(a.run, *how, ema=a.ema)
    if model.continues_text:
        return evals.load_scorer(a.run, *how, a.ema)
    T = seq_len_of(a, model)
    own = whole("eval", "micro_batch in the run's settings", run_settings(Path(a.run), "compute").get("micro_batch", 0))
    return evals.load_denoiser(a.run, T, own or max(BATCH_TOKENS // T, 1), *how, a.ema)


def place(word: str, a: Eval) -> tuple[str, str | Path]:
    """(task, its file) of a word of --tasks."""
    name, equals, where = word.strip().partition("=")
    if name not in ("val", *evals.TASKS):
        hint = did_you_mean(name, ("val", *evals.TASKS))
        raise HandgradError("eval", f"a task is one of val, {', '.join(evals.TASKS)}", f"'{name}'", hint=hint)
    if equals:
        return name, where
    return name, own_val(Path(a.run)) if name == "val" else evals.find(name, a.data)


def run_settings(run: Path, group: str) -> dict[str, Any]:
    """The settings in a group of a run, or of the run of a checkpoint; none for any other model."""
    path = (run.parent if is_checkpoint(run) else run) / SETTINGS
    found = read_object(path, "eval").get(group) if os.path.exists(path) else None
    return found if isinstance(found, dict) else {}


def seq_len_of(a: Eval, model: Model) -> int:
    """Tokens of a sequence of val."""
    own = run_settings(Path(a.run), "data").get("seq_len", 0)
    return a.seq_len or whole("eval", "seq_len in the run's settings", own, 0) or model.usual_seq_len


def own_val(run: Path) -> str:
    """A glob of the run's validation shards."""
    open_source(str(run))  # raises if there is no model
    run, settings = run.parent if is_checkpoint(run) else run, run_settings(run, "data")
    paths = {name: settings[name] for name in ("train", "val") if name in settings}
    is_gone = paths.get("train") == PACKAGED and not (run / "data" / "meta.json").exists()  # a run makes its own
    found = find_data(Config(data=DataConfig(**paths)), run) if "train" in paths and not is_gone else [Shards("", "")]
    vals = [one.val for one in found if one.val]
    if len(vals) > 1:
        hint = f"one of them: --tasks val={vals[0]}"
        raise HandgradError("eval", f"val of '{run}' is one set", f"a mixture of {len(vals)}", hint=hint)
    val = vals[0] if vals else ""
    if found[0].train and not val:  # of a run from Python, whose shards a glob names
        beside = Path(found[0].train).parent
        val = f"{beside}/val_*.bin" if any(beside.glob("val_*.bin")) else ""
    if not val:
        what = f"no validation shards are known for '{run}', or none can be seen from here"
        raise HandgradError("eval", what, hint="--tasks val=GLOB")
    return val


def questions(name: str, where: str | Path, a: Eval, m: Opened) -> tuple[Any, int]:
    """(a task's questions, the number of their pairs); for val, (its shards, the number of sequences)."""
    if isinstance(m, TextEncoder):
        texts = labelled_texts(name, where, a, m)
        return texts, min(texts.windows, a.limit or texts.windows)
    if name != "val":
        if isinstance(m, evals.Denoiser):
            hint = "--tasks val, the loss of its own objective"
            raise HandgradError("eval", f"a {m.source.model.family} continues no texts", f"'{name}'", hint=hint)
        items = evals.read_items(name, where, m.tokenizer, a.limit)
        return items, len(m.scorer.texts([pair for item in items for pair in item.pairs]))
    settings, model = run_settings(Path(a.run), "data"), m.source.model
    T, found = seq_len_of(a, model), hg_data.common_meta(hg_data.find_shards(where, "val"))
    is_on = {name: settings.get(name) is True for name in ("documents", "whole_word")}
    objective = objective_of(model, m.tokenizer.eot, m.tokenizer, meta=found[1] if found else None, **is_on)
    kind: dict[str, Any] = {"split": "val", "objective": objective}
    shards = hg_data.tokens(where, T, T, shuffle=False, vocab_size=model.vocab_size, **kind)
    evals.check_tokenizer(shards, m.tokenizer, f"the model {m.source.path}")
    return shards, min(shards.windows, a.limit or shards.windows)


def labelled_texts(name: str, where: str | Path, a: Eval, m: TextEncoder) -> hg_data.Tokens:
    """The shards of a classifier's val. Raises HandgradError if they have other labels."""
    if name != "val":
        raise HandgradError("eval", "a classifier is evaluated on val, labelled texts", f"'{name}'")
    found = hg_data.common_meta(hg_data.find_shards(where, "val"))
    known = hg_data.labelled(found[1], found[0]) if found else None
    if known is None or known.labels != m.labels:
        got = f"the labels {', '.join(known.labels)}" if known else "texts without labels"
        raise HandgradError("eval", f"{where} holds texts with the labels {', '.join(m.labels)}", got)
    objective = objective_of(m.model, None, m.tokenizer, meta=found[1] if found else None)
    T, V = a.seq_len or known.record + 1, m.model.vocab_size
    if T > m.context:
        raise HandgradError("eval", f"the model reads at most {m.context} tokens", T)
    shards = hg_data.tokens(where, T, T, shuffle=False, vocab_size=V, split="val", objective=objective)
    evals.check_tokenizer(shards, m.tokenizer, f"the model {m.source.path}")
    return shards


def note(path: Path, m: Opened, name: str, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Adds a task's results to the file, beside those of other tasks and checkpoints."""
    results = results_in(path)
    flat = {metric: value for metric, (value, _) in found.items()}
    flat |= {f"{metric}_stderr": error for metric, (_, error) in found.items()}
    facts |= {"dtype": m.dtype, "backend": m.backend.name, "seconds": round(facts["seconds"], 3)}
    results.setdefault(m.source.path.name, {})[name] = flat | facts
    write_text(path, dumped(results))


def results_in(path: Path) -> dict[str, Any]:
    """The results in the file, by checkpoint and task; none if there is no file."""
    hint = "another --out"
    results = read_object(path, "eval", hint=hint) if os.path.exists(path) else {}
    if not all(isinstance(tasks, dict) for tasks in results.values()):
        raise HandgradError("eval", f"{path} holds results of evaluations", "another JSON object", hint=hint)
    return results


def dumped(results: dict[str, Any]) -> str:
    """The results as JSON. JSON has no NaN: the standard error of a single question becomes null."""
    return json.dumps(json.loads(json.dumps(results), parse_constant=lambda _: None), indent=2) + "\n"
