"""Journal: the log and the settings that a Trainer keeps in its run folder, as `handgrad train` does."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handgrad import tokenizers
from handgrad.core.disk import make_folder
from handgrad.core.errors import HandgradError
from handgrad.data import Tokens, common_meta
from handgrad.models import Model
from handgrad.optim import AdamW, Optimizer
from handgrad.train.config import by_group
from handgrad.train.execution import Execution
from handgrad.train.folder import describe
from handgrad.train.log import RunLog


class Journal:
    """The log, the settings and the tokenizer in a run folder: `generate`, `eval`, `report` and `convert` read them.

    out: the folder;  resumed_at: the step whose checkpoint the run resumes from, 0 to start over, None for a new run
    settings: by group, what is known of them;  memory: the memory map

    Raises HandgradError if the folder holds a run that was not resumed, or cannot be written.
    """

    def __init__(
        self, out: Path, resumed_at: int | None, settings: dict[str, dict[str, Any]], memory: str, data: Tokens
    ):
        if resumed_at is None and (out / "log.jsonl").exists():
            raise HandgradError("train", f"'{out}' already holds a run", hint="resume() continues it; or another out")
        try:
            make_folder(out)
        except OSError as error:
            raise HandgradError("train", f"the run folder '{out}' cannot be written: {error.strerror}") from None
        tokenizer = tokenizer_of([shard.path for shard in data.shards])
        is_known = data.meta is not None or (data.vocab_size or 0) >= tokenizer.vocab_size
        describe(out, settings, memory, tokenizer if is_known else None)
        self._log = RunLog(out, 0, resumed_at=resumed_at or 0, quiet=True)

    def step(self, number: int, loss: float, lr: float, grad_norm: float, skipped: str, tokens: int, seconds: float):
        """Writes the line of a step, and why it changed nothing if so."""
        self._log.step(number, loss=loss, lr=lr, grad_norm=grad_norm, tokens=tokens, step_seconds=seconds)
        if skipped:
            self._log.event(number, f"update skipped: {skipped}")

    def validation(self, number: int, loss: float) -> None:
        """Writes the loss that was measured on other data after a step."""
        self._log.validation(number, loss)

    def flush(self) -> None:
        """Returns once every line is on disk."""
        self._log.flush()


def recorded_settings(model: Model, optim: Optimizer, data: Tokens, execution: Execution, dtype: str) -> dict[str, Any]:
    """The settings that these objects stand for, by group; the schedule and the length of a run are not among them."""
    values: dict[str, Any] = {"family": model.family, **asdict(model)}
    values |= {"train": data.pattern, "seq_len": data.seq_len, "batch_tokens": data.batch_tokens}
    values |= {"shuffle": data.shuffle, "overfit": data.overfit, "seed": data.seed, "dtype": dtype}
    values |= {name: getattr(execution, name) for name in ("micro_batch", "recompute", "threads", "check")}
    if isinstance(optim, AdamW):
        values |= {"beta1": optim.betas[0], "beta2": optim.betas[1], "eps": optim.eps}
        values |= {"weight_decay": optim.weight_decay, "clip": optim.clip}
    return by_group(values)


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
