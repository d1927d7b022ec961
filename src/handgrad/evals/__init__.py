"""Evaluation: benchmark tasks, scored by the losses of continuations, hidden tokens, and labels of texts."""

from handgrad.evals.classes import class_metrics
from handgrad.evals.denoising import Denoiser, denoising_metrics, load_denoiser
from handgrad.evals.load import Loaded, check_tokenizer, load_scorer
from handgrad.evals.metrics import choice_metrics, evaluate, val_metrics, word_metrics
from handgrad.evals.scoring import Scorer, record
from handgrad.evals.tasks import TASKS, Item, find, read_items

__all__ = [
    "TASKS",
    "Denoiser",
    "Item",
    "Loaded",
    "Scorer",
    "check_tokenizer",
    "choice_metrics",
    "class_metrics",
    "denoising_metrics",
    "evaluate",
    "find",
    "load_denoiser",
    "load_scorer",
    "read_items",
    "record",
    "val_metrics",
    "word_metrics",
]
