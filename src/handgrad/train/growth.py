"""New rows in a model on disk, for the tokens that the data's tokenizer adds to the model's own."""

from dataclasses import asdict, replace

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.infer.load import Source
from handgrad.io.weights import Weights
from handgrad.models import Model, create, declare, shapes
from handgrad.tokenizers import Tokenizer

MOST = 8  # tokens that are named


def with_new_rows(source: Source, added: range) -> tuple[Model, Weights]:
    """Returns a model and its weights with rows for the ids `added`, which follow those that the model knows.

    Every tensor with a row per token, the table and a head of its own, gets the mean of the rows before them, in
    float64 and rounded once: logits and embeddings of an average token. Rows that the file has for these ids are
    padding, and replaced; what follows them is kept.
    """
    if source.model.special_tokens:
        rule = f"a {source.model.family} gets no new rows: its special tokens are the last of its vocabulary"
        raise HandgradError(
            "model", rule, f"{len(added)} added tokens", hint="data made with the model's own tokenizer"
        )
    old, fields = source.weights, asdict(source.model)
    model = create(source.model.family, fields | {"vocab_size": max(source.model.vocab_size, added.stop)})
    new_shapes = shapes(declare(model))
    wider = shapes(declare(create(source.model.family, fields | {"vocab_size": source.model.vocab_size + 1})))
    per_token = {name for name, shape in old.shapes.items() if wider[name] != shape}

    def read(name: str) -> np.ndarray:
        values = old.tensor(name)
        if name not in per_token:
            return values
        mean = values[: added.start].mean(axis=0, keepdims=True, dtype=np.float64).astype(values.dtype)
        return np.concatenate([values[: added.start], np.repeat(mean, len(added), axis=0), values[added.stop :]])

    kept = {name: new_shapes[name] for name in old.shapes}
    return model, replace(old, fields=asdict(model), shapes=kept, read=read)


def described(tokenizer: Tokenizer, added: range) -> str:
    """Which tokens have new rows, as a sentence; empty if none has."""
    if not added:
        return ""
    names = ", ".join(repr(tokenizer.decode([id])) for id in added[:MOST])
    names += f" and {len(added) - MOST:,} more" if len(added) > MOST else ""
    return f"{len(added):,}, each the mean of the {added.start:,} others, for the added tokens {names}"
