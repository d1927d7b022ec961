"""Journal: the log and the settings that a Trainer keeps in its run folder, as `handgrad train` does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from handgrad import tokenizers
from handgrad.core.disk import make_folder
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.data import Data, Mixture, common_meta
from handgrad.models import Model
from handgrad.optim import Optimizer
from handgrad.train.config import PACKAGED, by_group
from handgrad.train.execution import Execution
from handgrad.train.folder import Lock, describe, holds_run, recorded
from handgrad.train.log import RunLog
from handgrad.train.optimizers import optimizer_settings
from handgrad.train.step import Step
from handgrad.train.tuning import tune_settings

_OPEN: WeakValueDictionary[Path, "Journal"] = WeakValueDictionary()  # by folder


class Journal:
    """The log, the settings and the tokenizer in a run folder: `generate`, `eval`, `report` and `convert` read them.

    out: the folder, which no other process may write into until `close`. Another trainer of this process takes it over
    resumed_at: the step whose checkpoint the run resumes from, 0 to start over, None for a new run
    settings: by group, what is known of them; a resumed folder keeps the others;  memory: the memory map

    Raises HandgradError if the folder holds a run that was not resumed, is in use, or cannot be written.
    """

    def __init__(self, out: Path, resumed_at: int | None, settings: dict[str, dict[str, Any]], memory: str, data: Data):
        if resumed_at is None and holds_run(out):
            raise HandgradError("train", f"'{out}' already holds a run", hint="resume() continues it; or another out")
        try:
            make_folder(out)
            self._out = out.resolve()
            if self._out in _OPEN:
                _OPEN[self._out].close()
            self._lock: Lock | None = Lock(out)
        except OSError as error:
            raise HandgradError("train", f"the run folder '{out}' cannot be written: {error.strerror}") from None
        self._added: tuple[int, float, Step, Callable[[], float]] | None = None
        self._tokens, known = data.sequences * data.sequence_tokens, recorded(out) if resumed_at else {}
        try:
            tokenizer = tokenizer_of([shard.path for shard in data.shards])
            is_known = data.meta is not None or (data.vocab_size or 0) >= tokenizer.vocab_size
            merged = {group: known.get(group, {}) | values for group, values in settings.items()}
            template = template_of([shard.path for shard in data.shards])
            describe(out, merged, memory, tokenizer if is_known else None, template)
            self._log = RunLog(out, 0, resumed_at=resumed_at or 0, quiet=True)
            if isinstance(data, Mixture):
                self._log.event(resumed_at or 0, f"a mixture: {data.about()}", sets=data.progress(resumed_at or 0))
        except BaseException:
            self._lock.close()
            raise
        _OPEN[self._out] = self

    def check_open(self) -> None:
        """Raises HandgradError if another trainer has taken the folder over."""
        if self._lock is None:
            raise HandgradError("train", f"another Trainer writes into '{self._out}'", hint="resume() continues there")

    def add(self, number: int, lr: float, result: Step, seconds: Callable[[], float]) -> None:
        """Takes a step that may still be running; `write` writes its line.

        seconds: returns how long it took, once it is over
        """
        self._added = number, lr, result, seconds

    def write(self) -> None:
        """Waits for the step that was added and writes its line, and why it changed nothing if so."""
        if self._added is None:
            return
        number, lr, r, seconds = self._added
        took = seconds()
        self._log.step(number, loss=r.loss, lr=lr, grad_norm=r.grad_norm, tokens=self._tokens, step_seconds=took)
        self._added = None
        if r.skipped:
            self._log.event(number, f"update skipped: {r.skipped}")

    def validation(self, number: int, **found: float) -> None:
        """Writes what was measured on other data after a step."""
        self.write()
        self._log.validation(number, **found)

    def flush(self) -> None:
        """Returns once every line is on disk."""
        self._log.flush()

    def close(self) -> None:
        """Writes what is left and frees the folder. Twice is harmless."""
        lock, self._lock = self._lock, None
        if lock is not None:
            try:
                self.write()
            finally:
                _OPEN.pop(self._out, None)
                self._log.close()
                lock.close()


def recorded_settings(model: Model, optim: Optimizer, data: Data, execution: Execution, dtype: str) -> dict[str, Any]:
    """The settings that these objects stand for, by group; the schedule and the length of a run are not among them."""
    values: dict[str, Any] = {"family": model.family, **asdict(model)}
    # to the command line the word is the text in the package; to `data.tokens` it was a folder
    values |= {
        "train": f"./{PACKAGED}" if data.pattern == PACKAGED else data.pattern,
        "seq_len": data.seq_len,
        "batch_tokens": data.batch_tokens,
    }
    values |= {"shuffle": data.shuffle, "overfit": data.overfit, "seed": data.seed, "dtype": dtype}
    values["documents"] = execution.documents and data.packing is None  # of chat data it is no choice
    values |= {"packing": data.packing.method} if data.packing else {}
    values |= {name: getattr(execution, name) for name in ("micro_batch", "recompute", "threads", "check")}
    return by_group(values | optimizer_settings(optim) | tune_settings(execution))


def tokenizer_of(shards: Sequence[Path]) -> tokenizers.Tokenizer:
    """The tokenizer that made these shards, by the meta.json of their folders; without one, GPT-2's.

    Raises HandgradError if a meta.json is damaged, or gives another vocabulary size than its tokenizer has.
    """
    found = common_meta(shards)
    if found is None:
        return tokenizers.gpt2()
    folder, meta = found
    tokenizer = tokenizers.load(meta["tokenizer"], folder)
    if meta["vocab_size"] != tokenizer.vocab_size:
        rule = f"{folder}/meta.json gives the {tokenizer.vocab_size} tokens of its tokenizer as 'vocab_size'"
        raise HandgradError("data", rule, meta["vocab_size"])
    return tokenizer


def template_of(
    shards: Sequence[Path], otherwise: tokenizers.OwnTemplate = tokenizers.OwnTemplate()
) -> tokenizers.OwnTemplate:
    """The template that made the chats among these shards, the first of several; `otherwise` without chats."""
    for path in {path.parent: path for path in reversed(shards)}.values():
        found = common_meta([path])
        if found and "chat" in found[1]:
            folder, about = found[0], found[1]["chat"]
            about = about if isinstance(about, dict) else {}
            ends = tokenizers.id_list(about.get("ends"), f"{folder}/meta.json gives ends")
            tokens = about.get("tokens", {})
            if not isinstance(tokens, dict) or not all(isinstance(token, str) for token in tokens.values()):
                raise HandgradError(
                    "data", f"{folder}/meta.json gives the tokens of the template by name", shown(tokens)
                )
            return replace(tokenizers.template_in_folder(folder), ends=ends, tokens=tokens)
    return otherwise
