"""Every instruction set of this processor, each in its own process: all ops and a few steps against the oracle."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

library = importlib.import_module("handgrad.backends.cpu.library")
HERE = library.ISAS[: library.ISAS.index(library.ISAS[library.library()._dll.hg_isa()]) + 1]

STEP = """
import json, sys
from handgrad import Execution, Precision, Trainer, data
from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.models import GPT2
from handgrad.ops import OPS
from handgrad.optim import AdamW
from handgrad.testing import check_case

shards, backend = sys.argv[1:]
result = {"isa": getattr(open_backend(backend), "isa", ""), "worst": {}}
for dtype in ("f32", "bf16"):
    tokens = data.tokens(shards, seq_len=33, batch_tokens=132)
    model = GPT2(vocab_size=97, max_seq_len=40, num_layers=2, num_heads=3, hidden_size=60, dropout=0.1)
    execution = Execution(2, extra_programs=("val",), backend=backend)
    run = Trainer(model, AdamW(), tokens, execution=execution, precision=Precision(dtype))
    result[dtype] = [*(run.step(step, lr=1e-2).loss for step in range(1, 5)), run.evaluate(tokens, 264)]
    if backend == "cpu":
        for op in OPS.values():
            errors = [e for case in op.cases if not case.real for e in check_case(op, case, run.backend, DTYPES[dtype])]
            result["worst"][f"{op.name} {dtype}"] = max(e.ratio for e in errors)
print(json.dumps(result))
"""


def step(shards, backend, **env):
    done = subprocess.run(
        [sys.executable, "-c", STEP, shards, backend], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def oracle(shards):
    return step(shards, "ref")


@pytest.mark.parametrize("isa", library.ISAS)
def test_ops_and_training_steps_match_oracle(shards, oracle, isa):
    if isa not in HERE:
        pytest.skip(f"this processor supports up to {HERE[-1]}")
    got = step(shards, "cpu", HANDGRAD_ISA=isa)
    assert got["isa"] == isa  # the variant that ran
    worst = max(got["worst"], key=got["worst"].get)
    print(
        f"{isa}: worst op {worst}, error / tolerance {got['worst'][worst]:.2f};  losses {got['f32']} f32, {got['bf16']} bf16"
    )
    assert got["worst"][worst] <= 1, worst
    np.testing.assert_allclose(got["f32"], oracle["f32"], rtol=2e-5)
    # bf16 has 8 bits, so logits have relative errors of about 2^-8, and the loss is their mean over rows
    np.testing.assert_allclose(got["bf16"], oracle["f32"], rtol=5e-3)
