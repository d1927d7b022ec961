"""Golden listings: what a tiny GPT-2 computes in every mode, as text. A change of the computation is a diff of these files.

HANDGRAD_GOLDEN=write pytest tests/test_listings.py   rewrites them. They have no line numbers, which change too often.
"""

import difflib
import os
import re
from pathlib import Path

import pytest

from handgrad.core.dtypes import BF16
from handgrad.core.listing import listing
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.infer.engine import record
from handgrad.models import GPT2, forward_logits
from handgrad.optim import AdamW
from handgrad.train.execution import Execution
from handgrad.train.record import record_loss, record_train

GOLDEN = Path(__file__).parent / "golden"
SIZES = dict(vocab_size=97, max_seq_len=16, num_layers=2, num_heads=2, hidden_size=32)


def train(policy="none", optim=AdamW(), documents=False, **changes):
    model, execution = GPT2(**SIZES, **changes), Execution(micro_batch=2, recompute=policy, documents=documents)
    return record_train(model, optim, 16, Precision("bf16"), execution, chunks=2)


def logits():
    p = Program(BF16)
    forward_logits(p, GPT2(**SIZES), 2, 16)
    return p


PROGRAMS = {
    "train_none": train,
    "train_act": lambda: train("act"),
    "train_documents": lambda: train("act", documents=True),
    "train_act_norm": lambda: train("act_norm"),
    "train_block": lambda: train("block"),
    "train_dropout": lambda: train(dropout=0.1),
    "train_dropout_block": lambda: train("block", dropout=0.1),
    "train_untied": lambda: train(tie_embeddings=False),
    "loss": lambda: record_loss(GPT2(**SIZES), 16, Precision("bf16"), Execution(micro_batch=2), chunks=2),
    "logits": logits,
    "prefill": lambda: record(GPT2(**SIZES), BF16)[0],
    "decode": lambda: record(GPT2(**SIZES), BF16)[1],
}


def text(p):
    return re.sub(r"(\w+\.py):\d+$", r"\1", listing(p), flags=re.MULTILINE) + "\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_listing_equals_golden_file(name):
    path, got = GOLDEN / f"{name}.txt", text(PROGRAMS[name]())
    if os.environ.get("HANDGRAD_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(got, encoding="utf-8")
    want = path.read_text(encoding="utf-8") if path.exists() else ""
    diff = difflib.unified_diff(want.splitlines(), got.splitlines(), str(path.name), "now", lineterm="", n=1)
    assert got == want, (
        "the computation changed; if that is intended: HANDGRAD_GOLDEN=write pytest tests/test_listings.py\n"
        + "\n".join(diff)
    )


def test_every_golden_file_has_a_program():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(PROGRAMS)


def test_changed_program_changes_its_listing():
    assert text(train()) != text(train(optim=AdamW(weight_decay=0.0)))


def test_listing_names_the_model_line_of_each_call():
    source = (
        (Path(__file__).parents[1] / "src" / "handgrad" / "models" / "gpt2.py").read_text(encoding="utf-8").splitlines()
    )
    for line in listing(train()).splitlines():
        file, number = line.split()[-1].split(":")
        if file == "gpt2.py":  # other lines are recorded by the trainer
            assert re.search(r"layer_norm|self_attention|mlp|embed|drop|lm_head", source[int(number) - 1]), line
    assert "gpt2.py:" in listing(train())
