"""HellaSwag and MMLU as llm.c's evaluation files, with llm.c's prompts, so that accuracies are comparable.

HellaSwag: the context is `ctx` unchanged; a space precedes every ending.
MMLU: the context is "Question: ...", a blank line, "Answer:"; the endings are the choices, a space before each.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from handgrad.core.disk import make_folder, require_file
from handgrad.core.errors import HandgradError
from handgrad.data.choices import Choices, write_choices
from handgrad.data.json_lines import json_rows
from handgrad.data.meta import sha256_of
from handgrad.data.prepare.bounds import readable
from handgrad.data.prepare.build import write_sums
from handgrad.data.prepare.hub import hub_files, local
from handgrad.data.prepare.readers import batches, parquet
from handgrad.data.prepare.workers import Encoder

LETTERS = "ABCD"
QUESTIONS = {  # recipe: (file written, repository, file in it, files in a local folder)
    "hellaswag": (
        "hellaswag_val.bin",
        "Rowan/hellaswag",
        "data/validation-*.parquet",
        ("hellaswag_val.jsonl", "hellaswag_val.jsonl.*", "data/hellaswag_val.jsonl"),
    ),
    "mmlu": ("mmlu_test.bin", "cais/mmlu", "all/test-*.parquet", ("data/test/*.csv", "test/*.csv", "*_test.csv")),
}


def prepare_questions(
    recipe: str, out_dir: str | Path, tokenizer: Encoder, source: str | Path | None = None
) -> tuple[Path, int]:
    """Writes the evaluation file of `recipe`, "hellaswag" or "mmlu", into `out_dir`; returns (path, questions in it).

    tokenizer: a `handgrad.tokenizers.Tokenizer`
    source: JSON lines (also .gz, .xz, .bz2), Parquet, or the folder as published; None downloads it

    Raises HandgradError for a source that is missing or damaged, and for a vocabulary above 65,536.
    """
    name, repo, published, patterns = QUESTIONS[recipe]
    if tokenizer.vocab_size > 2**16:
        rule = "evaluation files hold 16-bit ids: the vocabulary must be at most 65,536"
        raise HandgradError("data", rule, tokenizer.vocab_size, hint="handgrad eval reads .jsonl with any tokenizer")
    if source:
        paths = local(source, (published, *patterns))
    else:
        paths = hub_files(repo, (published,))
    question = _hellaswag if recipe == "hellaswag" else _mmlu
    items = [_item(*question(row, where), tokenizer) for path in paths for where, row in _rows(path)]
    path = Path(out_dir) / name
    try:
        make_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise HandgradError("data", f"{out_dir} must be writable", getattr(error, "strerror", error)) from None
    count = write_choices(path, items, tokenizer)
    names = (name, f"{name}.json")
    write_sums(path.parent, path.parent, {name: sha256_of(path.parent / name) for name in names})
    return path, count


def _hellaswag(row: dict, where: str) -> tuple[str, list[str], int]:
    return _checked(row.get("ctx"), row.get("endings"), row.get("label"), where)


def _mmlu(row: dict, where: str) -> tuple[str, list[str], int]:
    answer = row.get("answer")
    label = LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    question, choices, label = _checked(row.get("question"), row.get("choices"), label, where)
    return f"Question: {question}\n\nAnswer:", choices, label


def _checked(text: object, answers: object, label: object, where: str) -> tuple[str, list[str], int]:
    if not isinstance(text, str) or not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise HandgradError("data", f"{where}: a question must have a text and a list of answers", "another row")
    right = str(label)  # the hub's labels are strings
    if not right.isdecimal() or int(right) >= len(answers):
        raise HandgradError("data", f"{where}: one of the {len(answers)} answers must be right", repr(label))
    return text, answers, int(right)


def _item(context: str, answers: list[str], label: int, tokenizer: Encoder) -> Choices:
    endings = [tokenizer.encode(f" {answer}").tolist() for answer in answers]
    return Choices(tokenizer.encode(context).tolist(), endings, label)


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (location for error messages, row) for each question in a file."""
    if path.suffix not in (".parquet", ".csv"):
        yield from json_rows(path)
        return
    require_file(path, "a file of questions", "data")
    for number, row in enumerate(_table(path) if path.suffix == ".parquet" else _csv(path), 1):
        yield f"{path}, row {number}", row


def _table(path: Path) -> Iterator[dict]:
    with readable(path), parquet().ParquetFile(path) as file:
        groups = file.num_row_groups
    for group in range(groups):
        for batch in batches(path, group):
            yield from batch.to_pylist()


def _csv(path: Path) -> Iterator[dict]:
    with readable(path), path.open(encoding="utf-8", newline="") as lines:
        for question, *choices, answer in filter(None, csv.reader(lines)):  # csv yields [] for a blank line
            yield {"question": question, "choices": choices, "answer": answer}
