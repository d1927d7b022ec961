"""From the settings of data to the batches of a run."""

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

import handgrad.data as hg_data
from handgrad import evals, tokenizers
from handgrad.backends.ranks.comm import Comm
from handgrad.core.errors import HandgradError
from handgrad.data.meta import Labelled
from handgrad.infer.texts import special_ids
from handgrad.models import T5, Bert, Model
from handgrad.train.config import PACKAGED, Config
from handgrad.train.ranks import on_rank_0

FROM_FILES = ("text", "jsonl", "json", "parquet", "labels")  # recipes of handgrad data


@dataclass(frozen=True)
class Shards:
    """The shards of one data set.

    train, val: globs; val is "" where there is none
    """

    train: str
    val: str


def settle_data(c: Config, out: Path, comm: Comm) -> tuple[Config, list[Shards]]:
    """(the settings, the shards of each data set). Rank 0 looks, and prepares what is missing, for all."""

    def look() -> list[list[str]]:
        chosen = local_folder_first(c, out)
        return [[chosen.data.train], *([found.train, found.val] for found in find_data(chosen, out))]

    (train,), *found = on_rank_0(comm, look)
    return replace(c, data=replace(c.data, train=train)), [Shards(*globs) for globs in found]


def local_folder_first(c: Config, out: Path) -> Config:
    """The settings; `shakespeare` becomes ./shakespeare if that folder exists.

    A run that was trained on the packaged text, in its own folder, continues with it.
    """
    is_own = bool(c.run.resume) and (out / "data" / "meta.json").exists()
    if c.data.train != PACKAGED or is_own or not os.path.isdir(PACKAGED):
        return c
    return replace(c, data=replace(c.data, train=f"./{PACKAGED}"))


def find_data(c: Config, out: Path) -> list[Shards]:
    """The shards that --train names, those of several sets if there are commas in it. --val replaces their own."""
    word, val = c.data.train, c.data.val
    words = [word] if "," not in word or os.path.exists(word) else [part for part in word.split(",") if part]
    found = [_find(one, out) for one in words]
    if not val:
        return found
    return [Shards(found[0].train, val), *(Shards(one.train, "") for one in found[1:])]


def _find(word: str, out: Path) -> Shards:
    """The shards of one set. Packaged text is prepared inside the run folder; a folder has its split."""
    if word == PACKAGED:
        folder = out / "data"
        if not (folder / "meta.json").exists():
            text = hg_data.shakespeare()
            hg_data.prepare_text(text, folder, tokenizers.chars(hg_data.read_text(text)))
    elif os.path.isdir(word):
        folder = Path(word)
    else:
        return Shards(word, "")
    own = f"{glob.escape(str(folder))}/val_*.bin" if any(folder.glob("val_*.bin")) else ""
    return Shards(f"{glob.escape(str(folder))}/train_*.bin", own)


def paths_of(found: list[Shards]) -> list[Path]:
    """The training shards of all sets."""
    return [path for one in found for path in hg_data.find_shards(one.train)]


def labels_of(found: list[Shards]) -> tuple[str, ...]:
    """The labels of the texts in these shards; none if they have none."""
    meta = hg_data.common_meta(paths_of(found))
    known = hg_data.labelled(meta[1], meta[0]) if meta else None
    return known.labels if known else ()


def command_for(paths: list[Path], train: str, model: str) -> str:
    """The command that makes these shards with the tokenizer of a model, as far as their meta.json tells.

    train: the setting that names the shards;  model: what names the model on disk
    """
    meta = hg_data.common_meta(paths)
    folder, about = (meta[0], meta[1].get("source")) if meta else (paths[0].parent, None)
    recipe = about.get("recipe") if isinstance(about, dict) else None
    out = f"--out {quote(str(folder))} --replace"
    if recipe == "chat":
        return f"handgrad data chat FILE... --model {quote(model)} {out}"
    if train == PACKAGED:
        return f"handgrad data {PACKAGED} --tokenizer {quote(model)} --out plays, then --train plays"
    files = "RECIPE FILE..." if recipe in (None, "tokens") else recipe + " FILE..." * (recipe in FROM_FILES)
    return f"handgrad data {files} --tokenizer {quote(model)} {out}"


def training_data(
    c: Config, found: list[Shards], model: Model, world: int, tokenizer: tokenizers.Tokenizer
) -> hg_data.Data:
    """The batches that the settings ask for, of so many ranks."""
    paths = [hg_data.find_shards(one.train) for one in found]
    has_chats = any(map(_is_chat, paths))
    if c.data.packing == "none" and not has_chats:
        raise HandgradError("data", "--packing none is for chat data, whose rows it pads", c.data.train)
    # beside chats, which bound their rows, texts bound their documents
    documents = c.data.documents or len(found) > 1 and has_chats
    sets = []
    for one, shards in zip(found, paths):
        objective = _objective(shards, model, tokenizer, c.data.whole_word, documents)
        sets.append(_training_set(c, one, shards, model, world, objective))
    weights = weights_of(c.data.mix, len(sets))
    return sets[0] if len(sets) == 1 else hg_data.Mixture(sets, weights)


def weights_of(text: str, count: int) -> list[float]:
    """The weights of so many sets, from a list separated by commas; empty: equal.

    Raises HandgradError unless there is one for each.
    """
    words = text.split(",") if text else ["1"] * count
    rule = "--mix takes a positive number for each set of --train, separated by commas"
    if len(words) != count or (text and count == 1):
        raise HandgradError("data", rule, f"'{text}' for {count} set{'s' * (count > 1)}")
    try:
        return [float(word) for word in words]
    except ValueError:
        raise HandgradError("data", rule, f"'{text}'") from None


def _training_set(
    c: Config, found: Shards, paths: list[Path], model: Model, world: int, objective: hg_data.Objective
) -> hg_data.Tokens:
    d = c.data
    usual = objective.seq_len if isinstance(objective, hg_data.Labels) else model.usual_seq_len
    seq_len = d.seq_len or usual
    held_out = [path for path in paths if path.name.startswith("val_")]
    if held_out and len(held_out) < len(paths):
        hint = f"--train {held_out[0].parent}, which validates on them"
        raise HandgradError("data", f"{d.train} names no validation shards", str(held_out[0]), hint=hint)
    batch_tokens = d.batch_tokens or world * c.compute.micro_batch * seq_len
    return hg_data.tokens(
        found.train,
        seq_len,
        batch_tokens,
        seed=c.run.seed,
        shuffle=d.shuffle,
        overfit=d.overfit,
        vocab_size=model.vocab_size,
        objective=objective,
        packing=d.packing if objective.packs else "best_fit",
    )


def chats_in(data: hg_data.Data) -> list[hg_data.Tokens]:
    """The sets of chats among the run's data."""
    return [one for one in (data.sets if isinstance(data, hg_data.Mixture) else [data]) if one.packing]


def is_all_chat(data: hg_data.Data) -> bool:
    """Whether every sequence is of chats, so that a loss is the mean over the assistant's tokens alone."""
    return len(chats_in(data)) == (len(data.sets) if isinstance(data, hg_data.Mixture) else 1)


def chat_prompt(data: hg_data.Data, val: hg_data.Data | None) -> list[int]:
    """The tokens that ask for the first reply of the validation rows, of the others if there are none; [] for texts."""
    if not is_all_chat(data):
        return []
    packing = chats_in(val if val is not None and is_all_chat(val) else data)[0].packing
    return packing.first_prompt() if packing else []


def _is_chat(paths: list[Path]) -> bool:
    """Whether these shards are chat data."""
    meta = hg_data.common_meta(paths)
    return meta is not None and "chat" in meta[1]


def _objective(
    paths: list[Path], model: Model, tokenizer: tokenizers.Tokenizer, whole_word: bool, documents: bool
) -> hg_data.Objective:
    """What a model learns from these shards. documents: those of texts are kept apart, as rows of chats always are"""
    meta, is_chat = hg_data.common_meta(paths), _is_chat(paths)
    about = meta[1] if meta else None
    return objective_of(model, tokenizer.eot, tokenizer, whole_word, about, documents and not is_chat)


def objective_of(
    model: Model,
    eot: int | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    whole_word: bool = False,
    meta: dict[str, Any] | None = None,
    documents: bool = False,
) -> hg_data.Objective:
    """What a model learns from a text, or from chat data.

    eot: the id between documents;  documents: attention stays within them;  whole_word: a BERT's words are masked whole
    tokenizer: a BERT takes its special tokens, if it has them; None: they are the last of the vocabulary
    meta: what meta.json says of the shards
    """
    is_chat = "chat" in (meta or {})
    if whole_word and not isinstance(model, Bert):
        raise HandgradError("data", "--whole-word is for a bert", f"a {model.family}")
    if (is_chat or documents) and not model.continues_text:
        rule = f"{'chat data' if is_chat else '--documents'} is for models that continue texts"
        raise HandgradError("data", rule, f"a {model.family}")
    if is_chat:
        return hg_data.Chat()
    if documents and eot is None:
        raise HandgradError("data", "--documents needs an end-of-text id, which begins each", "a tokenizer without one")
    if isinstance(model, T5):
        first, end, pad = model.special_ids
        if first >= model.vocab_size:
            rule = f"the released T5's first sentinel {first} lies in the vocabulary"
            raise HandgradError("model", rule, f"{model.vocab_size} tokens")
        return hg_data.Spans(first_sentinel=first, eos_id=end, pad_id=pad, source_len=model.max_seq_len)
    if not isinstance(model, Bert):
        return hg_data.Causal(eot if documents else None)
    id_of, continues = special_ids(model, tokenizer), None
    if model.labels:
        return _labels(model, id_of, hg_data.labelled(meta, "the data"))
    if whole_word and tokenizer is not None:
        continues = np.zeros(model.vocab_size, bool)
        found = tokenizers.continuations(tokenizer)
        continues[: len(found)] = found
    return hg_data.Masked(
        mask_id=id_of["[MASK]"],
        cls_id=id_of["[CLS]"],
        sep_id=id_of["[SEP]"],
        pad_id=id_of["[PAD]"],
        special_ids=(id_of["[MASK]"],),
        vocab_size=model.vocab_size,
        rate=model.mask_rate,
        whole_word=continues,
        next_sentence=model.nsp,
        eot=eot,
    )


def _labels(model: Bert, id_of: Mapping[str, int], known: Labelled | None) -> hg_data.Labels:
    """What a classifier learns. Raises HandgradError unless the texts have its labels, and it can tell two texts apart
    where they are pairs."""
    if known is None or known.labels != model.labels:
        rule = f"the texts have the labels of the model, {', '.join(model.labels)}"
        hint = "" if known else "a bert without labels learns from texts without"
        raise HandgradError("data", rule, ", ".join(known.labels) if known else "none", hint=hint)
    if known.record + 1 > model.max_seq_len:
        rule = f"the model reads at most {model.max_seq_len} tokens"
        hint = f"handgrad data labels --seq-len {model.max_seq_len}"
        raise HandgradError("model", rule, f"labelled texts of up to {known.record + 1}", hint=hint)
    if known.pairs and model.num_types < 2:
        raise HandgradError("model", "pairs of texts take a bert with two types of tokens", model.num_types)
    return hg_data.Labels(
        cls_id=id_of["[CLS]"],
        sep_id=id_of["[SEP]"],
        pad_id=id_of["[PAD]"],
        count=len(known.values or known.labels),
        record=known.record,
        pairs=known.pairs,
        numbers=known.values,
    )


def validation_data(
    found: list[Shards], weights: str, data: hg_data.Data, model: Model, tokenizer: tokenizers.Tokenizer
) -> hg_data.Data | None:
    """The validation sets, in sequences as long as the training data's; None if there are none.

    What counts is what the sets' own shards say: of chats the assistant's tokens, of texts all. Chats are packed: the
    loss is the same whatever --packing says. Each set has its weight's share of the tokens. Raises HandgradError if one
    is of another tokenizer, or holds chats that the run does not keep apart.
    """
    T, V = data.seq_len, model.vocab_size
    sets = data.sets if isinstance(data, hg_data.Mixture) else [data]
    vals, shares, is_bounded = [], [], "positions" in data.objective.inputs
    for one, train, weight in zip(found, sets, weights_of(weights, len(found))):
        if one.val:
            objective = train.objective
            # --val may name chats beside texts, and texts beside chats; labelled texts have numbers of their own
            if model.continues_text or isinstance(objective, hg_data.Labels):
                objective = _objective(hg_data.find_shards(one.val, "val"), model, tokenizer, False, is_bounded)
            if isinstance(objective, hg_data.Chat) and not is_bounded:
                hint = "--documents, which bounds the texts, too"
                raise HandgradError("data", "chats validate a run that keeps them apart", one.val, hint=hint)
            kind: dict[str, Any] = {"split": "val", "objective": objective}
            vals.append(hg_data.tokens(one.val, T, T, shuffle=False, vocab_size=V, **kind))
            evals.check_tokenizer(vals[-1], tokenizer, f"the training data in {data.folder}")
            shares.append(weight)
    return vals[0] if len(vals) == 1 else hg_data.Mixture(vals, shares) if vals else None
