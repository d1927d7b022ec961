"""Tasks: reads the files of benchmarks into pairs of tokens.

Questions are worded as in the lm-evaluation-harness (0.4.13, zero-shot), so that results compare with its published
numbers. llm.c's evaluation files hold tokens, in llm.c's own wording.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.data.choices import read_choices, tokens_digest, tokens_record
from handgrad.data.json_lines import json_kind, json_rows
from handgrad.data.prepare.bounds import readable
from handgrad.evals.load import described
from handgrad.evals.scoring import Pair
from handgrad.tokenizers import Tokenizer

LETTERS = ["A", "B", "C", "D"]

LONGEST_TEXT = 2**16  # characters of a question with an answer; the benchmarks have up to 10,000


@dataclass(frozen=True)
class Question:
    """(context, continuation) texts, the index of the right one, and the answers whose lengths acc_norm divides by."""

    pairs: tuple[tuple[str, str], ...]
    label: int
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A question in tokens. `characters`: the length of each answer, without the space before it."""

    pairs: tuple[Pair, ...]
    label: int
    characters: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """files: glob patterns below a data folder, the first match is read;  question: makes a question from a row."""

    files: tuple[str, ...]
    question: Callable[[dict[str, Any]], Question]
    metrics: tuple[str, ...] = ("acc", "acc_norm", "acc_llmc")


# rows to questions ----------------------------------------------------------------------------------------------------


def _choice(context: str, answers: list[str], label: int) -> Question:
    """The same context before every answer."""
    return Question(tuple((context, f" {a}") for a in answers), label, tuple(answers))


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{json_kind(row[key])} under {key!r}")
    return row[key]


def _texts(row: dict[str, Any], key: str) -> list[str]:
    found = row[key]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{json_kind(found)} under {key!r}, not a list of texts")
    return found


def _number(row: dict[str, Any], key: str) -> int:
    """The whole number under the key; some benchmarks write it as text."""
    found = row[key]
    if isinstance(found, bool) or not str(found).isdecimal():
        raise ValueError(f"{found!r} under {key!r}, not a whole number")
    return int(found)


def _hellaswag(row: dict[str, Any]) -> Question:
    """Official rows have the activity and two halves of the context; other rows have a context, used unchanged."""
    if "ctx_a" not in row:
        return _choice(_text(row, "ctx"), _texts(row, "endings"), _number(row, "label"))
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    return _choice(_cleaned(context), [_cleaned(e) for e in _texts(row, "endings")], _number(row, "label"))


def _cleaned(text: str) -> str:
    """The text without WikiHow's markup."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lambada(row: dict[str, Any]) -> Question:
    context, _, word = _text(row, "text").rpartition(" ")
    return _choice(context, [word], 0)


def _mmlu(row: dict[str, Any]) -> Question:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, _texts(row, "choices"), strict=True)]
    subject = _text(row, "subject").replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}."
    context = "\n".join([about, "", _text(row, "question").strip(), *lines, "Answer:"])
    answer = row["answer"]
    return _choice(context, LETTERS, LETTERS.index(answer) if answer in LETTERS else _number(row, "answer"))


def _piqa(row: dict[str, Any]) -> Question:
    answers = [_text(row, "sol1"), _text(row, "sol2")]
    return _choice(f"Question: {_text(row, 'goal')}\nAnswer:", answers, _number(row, "label"))


def _arc(row: dict[str, Any]) -> Question:
    inner = row["question"]
    if isinstance(inner, dict):  # the official nesting; the hub's tables have another
        pairs = inner["choices"]
        row = row | {"question": inner["stem"], "choices": {k: [c[k] for c in pairs] for k in ("text", "label")}}
    choices, right = row["choices"], _text(row, "answerKey")
    return _choice(
        f"Question: {_text(row, 'question')}\nAnswer:", _texts(choices, "text"), _texts(choices, "label").index(right)
    )


def _winogrande(row: dict[str, Any]) -> Question:
    """The options complete the context; the text after them is scored."""
    before, _, after = _text(row, "sentence").partition("_")
    contexts = [before + _text(row, "option1"), before + _text(row, "option2")]
    return Question(tuple((c, f" {after.strip()}") for c in contexts), _number(row, "answer") - 1, tuple(contexts))


ROWS = "jsonl", "jsonl.xz", "jsonl.gz"


def _files(*stems: str, others: tuple[str, ...] = ()) -> tuple[str, ...]:
    return tuple(f"{stem}.{ending}" for stem in stems for ending in ROWS) + others


TASKS = {
    "hellaswag": Task(
        _files("hellaswag_val", "hellaswag/hellaswag_val", others=("hellaswag_val.bin", "hellaswag/hellaswag_val.bin")),
        _hellaswag,
    ),
    "lambada": Task(_files("lambada_openai_test", "lambada_test", "lambada/*test*"), _lambada, ("acc", "perplexity")),
    "mmlu": Task(
        _files("mmlu_test", "mmlu/mmlu_test", others=("mmlu/test", "mmlu_test.bin", "mmlu/mmlu_test.bin")), _mmlu
    ),
    "piqa": Task(_files("piqa_val*", "piqa/val*"), _piqa),
    "arc_easy": Task(_files("arc_easy_test", "arc_easy/*test*", "ARC-Easy/ARC-Easy-Test"), _arc),
    "arc_challenge": Task(
        _files("arc_challenge_test", "arc_challenge/*test*", "ARC-Challenge/ARC-Challenge-Test"), _arc
    ),
    "winogrande": Task(_files("winogrande_val*", "winogrande/dev"), _winogrande, ("acc", "acc_llmc")),
}


# files to rows --------------------------------------------------------------------------------------------------------


def find(name: str, folder: str | Path) -> Path:
    """The file of a task below a folder. Raises HandgradError if there is none."""
    for pattern in TASKS[name].files:
        for path in sorted(Path(folder).glob(pattern)) if os.path.isdir(folder) else ():
            return path
    own = "hellaswag", "mmlu"
    get = f"handgrad data {name}, or " if name in own else ""
    raise HandgradError(
        "eval",
        f"{name} lies in '{folder}' as {', '.join(TASKS[name].files[:2])} or the like",
        "no such file",
        hint=f"{get}--tasks {name}=FILE",
    )


def read_items(name: str, path: str | Path, tokenizer: Tokenizer, limit: int = 0) -> list[Item]:
    """The task's questions in tokens, at most `limit` if that is not 0.

    path: .jsonl (also .xz or .gz), llm.c's evaluation .bin, or for mmlu a folder of *_test.csv

    Raises HandgradError for a file that is missing, damaged, of other rows, or whose tokens are not the model's.
    """
    path, most = Path(path), limit or None
    if not os.path.isdir(path):
        require_file(path, f"the questions of {name}", "eval")
    if path.suffix == ".bin":
        return _read_tokens(path, tokenizer, most)
    items = []
    for number, row in enumerate(islice(_rows(path), most), 1):
        try:
            question = TASKS[name].question(row)
            if not 0 <= question.label < len(question.answers):
                raise ValueError(f"the label {question.label} of {len(question.answers)} answers")
            if max(len(context) + len(answer) for context, answer in question.pairs) > LONGEST_TEXT:
                raise ValueError(f"more than {LONGEST_TEXT:,} characters")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            got = f"no {error}" if isinstance(error, KeyError) else error
            raise HandgradError("eval", f"row {number} of {path} is a question of {name}", got) from None
        pairs = tuple(encode_pair(tokenizer, *pair) for pair in question.pairs)
        items.append(Item(pairs, question.label, tuple(max(len(a), 1) for a in question.answers)))
    if not items:
        raise HandgradError("eval", f"{path} holds questions", "none")
    return items


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The tokens of both, from the text tokenized in one piece; spaces between them belong to the continuation.

    What the tokenizer puts before every text precedes the context. An empty context without it becomes the token that
    ends documents.

    >>> from handgrad import tokenizers
    >>> [ids.tolist() for ids in encode_pair(tokenizers.gpt2(), "Hello ", "world")]
    [[15496], [995]]
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    whole, begins = tokenizer.encode(context + continuation), list(tokenizer.begins)
    if not context:
        if not begins and not tokenizer.ends:
            raise HandgradError("eval", "an empty context needs a tokenizer that ends documents", tokenizer.name)
        return begins or [tokenizer.ends[0]], whole
    at = len(tokenizer.encode(context))
    return [*begins, *whole[:at]] if begins else whole[:at], whole[at:]


def _read_tokens(path: Path, tokenizer: Tokenizer, most: int | None) -> list[Item]:
    """Questions of llm.c's evaluation file."""
    questions, record = read_choices(path)[:most], tokens_record(path)
    if record is not None and record["tokens"] != tokens_digest(tokenizer):
        rule = f"{path} must hold tokens of {described(tokenizer)}, the model's tokenizer"
        got = f"those of {record['tokenizer']} ({record['vocab_size']:,} tokens)"
        raise HandgradError("eval", rule, got, context=f"{path}.json says so", hint="a .jsonl fits every model")
    if not all(_spells(tokenizer, q.context) for q in questions):
        hint = "a .jsonl fits every model"
        raise HandgradError("eval", f"{path} holds tokens of the model's tokenizer", "another's", hint=hint)
    return [
        Item(
            tuple(([*tokenizer.begins, *q.context], ending) for ending in q.endings),
            q.label,
            tuple(max(len(tokenizer.decode(ending).removeprefix(" ")), 1) for ending in q.endings),
        )
        for q in questions
    ]


def _spells(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether the tokenizer encodes the text of these tokens to these tokens; another tokenizer's fail this."""
    try:
        return tokenizer.encode(tokenizer.decode(ids)).tolist() == ids
    except HandgradError:
        return False


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file, or of a folder of csv files named after subjects."""
    if not os.path.isdir(path):
        yield from _json_rows(path)
        return
    where = ""
    try:
        for place, row in _mmlu_rows(path):
            where = place
            yield row
    except (OSError, ValueError, csv.Error) as error:
        rule = f"{path} holds rows of question, choices and answer"
        raise HandgradError("eval", rule, error, context=f"after {where}" if where else "") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; PIQA has its labels in a file beside it."""
    beside = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
    labels = None
    if beside.is_file():
        with readable(beside):
            labels = iter(beside.read_text(encoding="utf-8").split())
    for _, row in json_rows(path):
        yield row if labels is None else row | {"label": next(labels, None)}


def _mmlu_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every question in a folder of csv files."""
    for file in sorted(folder.glob("*.csv")):
        require_file(file, "a subject", "eval")
        subject = re.sub(r"_(test|val|dev)$", "", file.stem)
        with file.open(encoding="utf-8", newline="") as lines:
            for number, (question, *choices, answer) in enumerate(filter(None, csv.reader(lines)), 1):
                row = {"subject": subject, "question": question, "choices": choices, "answer": answer}
                yield f"row {number} of {file.name}", row
