"""The model that `explain` and `profile` get by one word: a preset, or the sizes of a model on disk."""

import os
from dataclasses import asdict
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.infer.load import open_source
from handgrad.models import Model, create, preset


def model_of(word: str, family: str, **changes: Any) -> Model:
    """The preset of this name, or the family and sizes of the model at this path or hf:NAME, with fields changed.

    A preset goes before a file of its name. Raises HandgradError for a word that is neither, and as `preset` and
    `open_source` do.
    """
    is_path = word.startswith("hf:") or os.sep in word or os.path.exists(word)
    if not is_path or _is_preset(word):
        return preset(word, family, **changes)
    model = open_source(word).model
    if family not in ("", model.family):
        raise HandgradError("model", f"--family is of a preset; '{word}' is a {model.family}", family)
    return create(model.family, asdict(model) | changes)


def _is_preset(word: str) -> bool:
    try:
        preset(word)
    except HandgradError:
        return False
    return True
