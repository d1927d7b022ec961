"""What `explain` says before a run is what the run allocates, to the byte; each remedy's price is a plan of its own."""

import re
from dataclasses import replace

import pytest

from handgrad import Trainer, data, explain
from handgrad.backends import open_backend
from handgrad.backends.cuda.planner import GPUS, GpuPlanner
from handgrad.models import gpt2
from handgrad.optim import AdamW


@pytest.fixture(scope="module")
def page():
    return explain(gpt2("124m"), 16, 1024, dtype="bf16", backend=open_backend("cpu"))


def test_gpt2_124m_is_what_a_run_allocates(page, tmp_path):
    data.write_shard(tmp_path / "a.bin", [[1] * 20_000], data.id_dtype(50257))
    tokens = data.tokens(tmp_path / "a.bin", seq_len=1024, batch_tokens=16 * 1024)
    run = Trainer(gpt2("124m"), AdamW(), tokens, micro_batch=16, dtype="bf16")  # takes the memory, touches little of it
    assert page.plan.nbytes == run.plan.nbytes == run.arena.bytes.nbytes
    assert page.plan.region == run.plan.region
    assert page.program.num_params == 124_475_904
    print(f"arena {page.plan.nbytes:,} B")


def test_the_page_shows_every_call_the_memory_and_the_prices(page):
    text = str(page)
    calls = [line for line in text.splitlines() if re.match(r"(fwd|re|bwd|nrm|upd) ", line)]
    assert len(calls) == len(page.program.calls)
    assert all(
        re.search(r"@\d+\.\dM \([\d,]+\) (f32|bf16|i32|i16|byte)", line) and re.search(r"\w+\.py:\d+$", line)
        for line in calls
    )
    assert "124,475,904" in text and f"{page.plan.nbytes:,} B" in text
    for name, *_ in page.remedies:
        assert name in text
    for block in ("embed", "h.0", "h.11", "head"):
        assert re.search(rf"^{re.escape(block)} +[\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)


@pytest.mark.parametrize("name, micro_batch, limit", [("124m", 64, 28), ("1558m", 16, 79)])
def test_a_plan_for_a_card_that_is_elsewhere(name, micro_batch, limit):
    """Nothing recomputed, in GiB: no more than llm.c takes, and all of 1558M on one card of 80 GB."""
    page = explain(
        gpt2(name), micro_batch, 1024, backend=GpuPlanner("h100"), recompute="none", accumulation=8, remedies=False
    )
    assert page.plan.nbytes < limit * 2**30
    lines = str(page).splitlines()
    assert sum(line.endswith(" wgmma, or cudnn") for line in lines) >= 24  # the clock that chooses is elsewhere
    assert any(line.endswith(" gelu in the GEMM, or apart") for line in lines)
    page = explain(
        gpt2(name), micro_batch, 1024, backend=GpuPlanner(replace(GPUS["h100"], deterministic=True)), remedies=False
    )
    assert sum(line.endswith(" wgmma") for line in str(page).splitlines()) >= 24  # without autotuning


def test_flops_are_those_of_the_products(page):
    """6 per weight of a matrix and token, and attention: 7 products over half of T x T (2 forward, 5 backward)."""
    C, L, V, T = 768, 12, 50304, 1024
    matrices = 6 * (L * 12 * C * C + V * C)
    attention = L * (2 + 5) * (T + 1) * C
    assert page.flops_per_token == matrices + attention


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_remedy_is_planned_for_real(tiny, shards, dtype):
    """Each price equals the arena of a trainer that takes the remedy."""
    model, tokens = (
        tiny(max_seq_len=64, num_layers=3, dropout=0.1),
        data.tokens(shards, seq_len=64, batch_tokens=8 * 64),
    )
    found = explain(model, 8, 64, dtype=dtype, backend=open_backend("cpu"))
    kinds = set()
    for name, nbytes, flops in found.remedies:
        kind, value = name.rsplit(" ", 1)
        kinds.add(kind)
        change = {kind.replace("-", "_").replace(" ", "_"): value if kind == "recompute" else int(value)}
        run = Trainer(model, AdamW(), tokens, dtype=dtype, **dict(micro_batch=8) | change)
        assert run.plan.nbytes == run.arena.bytes.nbytes == nbytes, name
        # the same tokens, so the same flops, unless a product is made again
        base = sum(c.flops for c in found.program.calls)
        again = sum(c.flops for c in run.program.calls if c.phase == "recompute")
        assert flops == base + again * 8 // run.micro_batch and (again > 0) == (name == "recompute block")
    assert kinds == {"recompute", "micro-batch", "head chunks"}


@pytest.mark.parametrize("changes", [dict(val=False), dict(sample=False), dict(recompute="block"), dict(head_chunks=3)])
def test_the_same_arguments_give_the_same_plan(tiny, shards, changes):
    model, tokens = tiny(), data.tokens(shards, seq_len=16, batch_tokens=64)
    run = Trainer(model, AdamW(), tokens, micro_batch=4, dtype="f32", **changes)
    assert (
        explain(model, 4, 16, dtype="f32", backend=open_backend("cpu"), remedies=False, **changes).plan.region
        == run.plan.region
    )


def test_the_largest_models_are_explained_anywhere():
    page = explain(gpt2("gpt3:c12288"), 1, 2048, remedies=False, sample=False, val=False)
    assert page.program.num_params > 174e9 and page.plan.nbytes > (2 + 2 + 8 + 4) * page.program.num_params
