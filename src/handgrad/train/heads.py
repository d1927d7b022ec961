"""A BERT on disk as the start of a classifier: its body and pooler, and a new head."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.infer.load import HEADLESS, Source, with_pooler
from handgrad.io.weights import Weights
from handgrad.models import Bert, Model, create, declare, shapes, to_dict
from handgrad.models.lora import CLASSIFIER
from handgrad.train.start import draw


def for_labels(source: Source, labels: Sequence[str], seed: int) -> Source:
    """The model with a head for these labels. What the model on disk lacks of it is drawn: the head, and the pooler of
    a model that has none. A head for the same labels stays.

    Raises HandgradError if the model is no BERT.
    """
    if not isinstance(source.model, Bert):
        raise not_a_bert(source.model)
    if source.model.labels == tuple(labels):
        return source
    source = with_pooler(source)
    model = as_classifier(source.model, labels)
    program, held = declare(model), source.weights

    def read(name: str) -> np.ndarray:
        if name in held.shapes and not name.startswith(CLASSIFIER):
            return held.read(name)
        return draw(program.params[name], seed, list(program.params).index(name))

    weights = Weights(to_dict(model)["model"], held.dtype, shapes(program), read)
    return replace(source, model=model, weights=weights)


def as_classifier(model: Model, labels: Sequence[str]) -> Model:
    """The model with a head for these labels and no other. Raises HandgradError if it is no BERT."""
    if not isinstance(model, Bert):
        raise not_a_bert(model)
    return create(model.family, to_dict(model)["model"] | HEADLESS | {"labels": tuple(labels)})


def not_a_bert(model: Model) -> HandgradError:
    """The error of labelled texts for another family."""
    hint = "--init FOLDER of a BERT, or --family bert"
    return HandgradError("model", "labelled texts train a bert", f"a {model.family}", hint=hint)
