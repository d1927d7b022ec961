"""Predictions of a step on several GPUs: the formulae by hand, limits of the overlap, and what is refused."""

import json
import re
import statistics
from pathlib import Path

import pytest

import handgrad as hg
from handgrad.backends.cuda.planner import GPUS
from handgrad.backends.ranks.comm import Planned
from handgrad.backends.ref import RefBackend
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY, MicroBatch
from handgrad.core.streams import joins
from handgrad.models import gpt2
from handgrad.ops import collectives
from handgrad.train import scaling
from handgrad.train.scaling import Cluster, GpuRanks, step_seconds, timeline

US = 1e-6


def page(name="124m", gpu="h200", ranks=2, zero=1, accumulation=1, micro_batch=4, cluster=None, **changes):
    """The page of one of several GPUs."""
    return hg.explain(
        gpt2(name),
        1024,
        execution=hg.Execution(micro_batch=micro_batch, zero=zero, **changes),
        precision=hg.Precision("bf16"),
        backend=GpuRanks(cluster or Cluster(gpu, ranks)),
        accumulation=accumulation,
        remedies=False,
    )


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def program(request):
    """The list of one of two GPUs, for each ZeRO stage."""
    return page(zero=request.param).program


def find(p, op):
    return next(c for c in p.calls if c.op is op)


def by_op(compute, collective):
    """Seconds of a call: one number for all that compute, one for all collectives."""
    return lambda c: collective if c.op.communicates else compute


# formulae --------------------------------------------------------------------------------------------------------------


def test_collectives_take_latency_and_bytes_over_bandwidth():
    """A block's decayed gradients of 124M: 7,077,888 float32. By hand, two ranks: half of them over 250 GB/s."""
    p = page().program
    c = next(c for c in p.calls if c.op is collectives.reduce_scatter and c.block == "h.0")
    n = c.full.nbytes
    assert Cluster("h200", 2).seconds(c) == pytest.approx((8.4 + 3.4) * US + n / 2 / 250e9)
    c = next(c for c in page(zero=0).program.calls if c.op is collectives.all_reduce and c.block == "h.0")
    assert c.x.nbytes == n
    assert Cluster("h200", 2).seconds(c) == pytest.approx((8.4 + 2 * 3.4) * US + n / 250e9)


def test_machines_are_joined_by_a_port_of_each_gpu():
    """4 machines of 2: 85 GB/s through their ports, less than NVLink; 4 hops inside machines and 3 between them."""
    cluster = Cluster("h200", 8, 4)
    c = find(page(ranks=8, cluster=cluster).program, collectives.all_gather)
    assert cluster.bandwidth == pytest.approx(2 * 0.85 * 50e9)
    assert cluster.seconds(c) == pytest.approx((8.4 + 4 * 3.4 + 3 * 14) * US + c.full.nbytes / 8 * 7 / 85e9)
    assert Cluster("h200", 64, 8).bandwidth == pytest.approx(250e9)  # 8 ports carry more than NVLink
    assert Cluster("h200", 64, 8, "pcie").bandwidth == pytest.approx(32e9)
    assert Cluster("h200", 8, 8).bandwidth == pytest.approx(42.5e9)  # a GPU a machine: no link inside
    assert Cluster("4090", 2).inside == "pcie"


@pytest.mark.parametrize("mib, op, measured", [(128, "reduce_scatter", 294), (128, "all_gather", 278)])
def test_bandwidth_is_what_two_h200_reached(mib, op, measured):
    """Microseconds, within 10 %; 1 MiB is the latency."""
    cluster, latency = Cluster("h200", 2), scaling.BASE_US + scaling.LINKS["nvlink"].hop_us
    assert latency + 1e6 * mib * 2**20 / 2 / cluster.bandwidth == pytest.approx(measured, rel=0.1)
    assert latency + 1e6 * 2**20 / 2 / cluster.bandwidth == pytest.approx(14, rel=0.1)


def test_one_gpu_has_the_stated_mfu():
    """In a step of many micro-batches, so that the update does not count. What is recomputed comes on top."""
    cluster, peak = Cluster("h200", 2, mfu=0.4), 989.4e12
    found = {how: page(cluster=cluster, accumulation=1000, recompute=how) for how in ("none", "block")}
    flops = gpt2("124m").flops_per_token(found["none"].program.num_params, 1024)
    step = 1000 * 4 * 1024 * flops / (0.4 * peak)
    assert found["none"].prediction.compute == pytest.approx(step, rel=2e-3)
    assert found["none"].prediction.mfu == pytest.approx(0.4, rel=5e-3)
    assert found["block"].prediction.compute > 1.1 * step


def test_mfu_is_that_of_the_nearest_model_or_stated():
    lines = {name: "\n".join(page(name).prediction.assumptions) for name in ("124m", "355m")}
    assert "51.8 %, measured on one H200 at 124M parameters, 2026-11-30" in lines["124m"]
    assert "53.5 %, measured on one H200 at 355M parameters" in lines["355m"]
    assert "MFU of one GPU 40.0 %, as stated" in str(page(cluster=Cluster("h200", 2, mfu=0.4)))
    assert "no MFU of one B200 in bf16 has been measured" in str(page(gpu="b200"))


def test_mfu_of_an_h100_is_that_of_the_benchmark():
    found = json.loads((Path(__file__).parents[1] / "bench/results/gpu_step.json").read_text(encoding="utf-8"))
    name = next(gpu for gpu in ("h100", "h200") if gpu.upper() in found["facts"]["card"])
    if found["facts"]["date"] == scaling.MEASURED_ON[name]:
        rows = [m["handgrad"] for m in found["models"].values()]
        assert scaling.MEASURED[name] == {round(r["params"] / 1e6): round(r["mfu"], 3) for r in rows}


# overlap ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_are_hidden_where_calls_are_long(zero):
    """All but those that end with the list, and the sum of the losses."""
    p = page(zero=zero).program
    segment = p.segments.forward_backward
    communicates = [c.op.communicates for c in p.part(segment)]
    tail = communicates[::-1].index(False)
    compute, exposed = timeline(p, segment, ONLY, by_op(1.0, 1e-3))
    assert compute == communicates.count(False)
    assert exposed == pytest.approx(1e-3 * tail) and 4 * tail < sum(communicates)
    later = timeline(p, segment, ONLY, lambda c: 0.0 if c in p.calls[segment.stop - tail :] else by_op(1.0, 1e-3)(c))
    assert later == (compute, 0.0)


def test_all_is_exposed_where_calls_take_no_time(program):
    compute, exposed = step_seconds(program, 1, by_op(0.0, 1.0))
    assert compute == 0 and exposed == sum(c.op.communicates for c in program.calls)


def test_nothing_is_exposed_without_collectives(program):
    assert step_seconds(program, 3, by_op(1.0, 0.0))[1] == 0


def test_exposed_lies_between_nothing_and_all(program):
    for collective in (0.1, 1.0, 10.0):
        compute, exposed = step_seconds(program, 1, by_op(1.0, collective))
        assert compute == sum(not c.op.communicates for c in program.calls)
        assert 0 <= exposed <= collective * sum(c.op.communicates for c in program.calls) + 1e-6


def test_the_first_reader_waits():
    """A gather before a call that reads it is exposed, however long the calls are; ZeRO 1 has none in forward."""
    p = page(zero=3).program
    i = next(i for i, c in enumerate(p.calls) if c.op is collectives.all_gather)
    reader = p.calls[joins(p)[i]]
    assert any(t in p.inside for t in reader.ins if t is not None)
    assert timeline(p, p.segments.forward_backward, ONLY, by_op(1.0, 0.5))[1] > 0.5


def test_gradients_are_summed_in_the_last_micro_batch_only():
    p = page(zero=1, accumulation=4).program
    segment, seconds = p.segments.forward_backward, by_op(0.0, 1.0)
    assert timeline(p, segment, MicroBatch(last=False), seconds)[1] == 0
    assert timeline(p, segment, MicroBatch(first=False), seconds)[1] > 10
    p = page(zero=2, accumulation=4).program
    calls = sum(c.op is collectives.reduce_scatter for c in p.calls)
    traffic = {e.name: e for e in scaling.exchanges(p, 4)}
    assert traffic["reduce_scatter"].calls == 4 * calls and traffic["sum_losses"].calls == 1


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_more_bandwidth_never_makes_a_step_longer(zero, monkeypatch):
    steps = []
    for rate in (5, 50, 500, 5000):
        monkeypatch.setattr(scaling, "IB_RATE", rate)
        steps.append(page(zero=zero, ranks=8, accumulation=2, cluster=Cluster("h200", 8, 4)).prediction.step)
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[1]


# the page --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, micro_batch, accumulation", [("124m", 64, 4), ("1558m", 8, 16)])
def test_two_h200_scale_as_llmc_measured(name, micro_batch, accumulation):
    """524,288 and 262,144 tokens a step with ZeRO 1: llm.c measured 99.6 to 99.8 % of twice one GPU."""
    found = page(name, micro_batch=micro_batch, accumulation=accumulation, recompute="none").prediction
    assert 0.995 < found.efficiency < 0.999
    assert 0 < found.exposed < found.communication
    hidden = found.communication - found.exposed
    assert found.step == found.compute + found.exposed + 0.43 * hidden


def test_memory_is_that_of_the_plan():
    """The page prints the bytes of the plan, and links change none of them. Vectors are those of ranks on CPUs."""
    run = dict(execution=hg.Execution(micro_batch=2, zero=2), remedies=False)
    pages = [hg.explain(gpt2("124m"), 1024, backend=GpuRanks(Cluster("h100", 4, n)), **run) for n in (1, 4)]
    planner = RefBackend()
    planner.comm = Planned(4)
    plain = hg.explain(gpt2("124m"), 1024, backend=planner, **run)
    assert pages[0].plan.region == pages[1].plan.region and f"{pages[0].plan.nbytes:,} B" in str(pages[0])
    for part in ("params", "state", "grads"):
        assert pages[0].plan.region[part][1] == plain.plan.region[part][1] > 0


def test_the_page_says_what_it_assumes(capsys):
    argv = "explain gpt2 --gpus 16 --gpu h200 --nodes 2 --zero 3 --link ib --micro-batch 4".split()
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"exchanged in a step +calls +sent by a rank, MiB +ms\nall_gather +\d+ +[\d.]+ +[\d.]+\n", out)
    for word in (
        "compute",
        "exposed communication",
        "slowdown of compute",
        "step",
        "tok/s",
        "MFU",
        "scaling efficiency",
    ):
        assert re.search(rf"^{word} +[\d,.]+ ", out, re.MULTILINE)
    assert "nvlink: 250 of 450 GB/s" in out and "ib: 340 of 400 GB/s" in out and "--mfu states yours" in out
    assert main([word.replace("--gpus", "--ranks") for word in argv]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    "flags, line",
    [
        (
            "gpt2 --gpus 8",
            r"NVIDIA H100 80GB HBM3 \(--gpu names another\); the arena of \d,\d{3} MiB fits in its 81,559 MiB",
        ),
        (
            "gpt2-xl --gpus 2 --gpu 4090 --micro-batch 8",
            r"NVIDIA GeForce RTX 4090 .* MiB does not fit in its 24,564 MiB",
        ),
        ("gpt2 --gpus 2 --backend cpu", ""),
    ],
)
def test_the_page_says_which_gpu_it_assumes_and_whether_the_arena_fits(flags, line, capsys):
    """--gpus plans for GPUs on any machine."""
    assert main(f"explain {flags} --threads 1".split()) == 0
    out = capsys.readouterr().out
    assert out.count("assumed GPU: ") == bool(line) and re.search(line, out)


def test_equal_blocks_are_one_row():
    """Its numbers are of each block, as the plan has them."""
    found = page(micro_batch=4)
    rows = {name: sizes for name, *sizes in found.plan.by_block()}
    assert rows["h.1"] == rows["h.11"] != rows["h.0"]
    names = re.findall(r"^(h\.\d.*?)  ", str(found), re.MULTILINE)
    assert names == ["h.0", "h.1 to h.11, each"]


def test_ranks_on_cpus_have_no_times(capsys):
    assert main("explain tiny --backend cpu --ranks 4 --threads 1".split()) == 0
    out = capsys.readouterr().out
    assert "sent by a rank" in out and "predicted step" not in out and "links between CPUs are not known" in out


@pytest.mark.parametrize(
    "flags, error",
    [
        ("--gpus 10 --nodes 4", "ranks are a multiple of nodes 4, but got 10. hint: --ranks 8 or --ranks 12"),
        ("--gpus 3 --nodes 4", "ranks are a multiple of nodes 4, but got 3. hint: --ranks 4"),
        ("--gpus 2 --link ib", "ib joins several machines, but got nodes 1. hint: --nodes 2, or --link nvlink"),
        ("--gpus 2 --gpu 4090 --link nvlink", "NVIDIA GeForce RTX 4090 has no NVLink. hint: --link pcie"),
        ("--gpus 2 --mfu 52", "mfu is a fraction of the peak, at most 1, but got 52.0. hint: --mfu 0.5 is 50 %"),
        ("--gpus 2 --mfu -1", "mfu is a number from 0 on, but got -1.0."),
        ("--gpus 2 --nodes 0", "nodes is a number from 1 on, but got 0."),
        ("--gpus 2 --link eth", "--link takes one of nvlink, pcie, ib or None, but got 'eth'."),
        (
            "--gpus 2 --backend cpu --link nvlink",
            "--nodes, --link and --mfu are of several ranks on GPUs, but got --backend cpu --ranks 2."
            " hint: --gpu h200 --ranks 8",
        ),
    ],
)
def test_errors_name_the_flag(flags, error, capsys):
    assert main(f"explain tiny --micro-batch 1 --threads 1 {flags}".split()) == 2
    assert capsys.readouterr().err.strip() == f"[explain] {error}"


def test_clusters_of_unknown_parts_are_refused():
    assert set(scaling.RATES) == set(GPUS)
    for wrong in (dict(gpu="v100"), dict(link="token ring"), dict(ranks=1)):
        with pytest.raises(HandgradError, match="explain"):
            Cluster(**dict(gpu="h200", ranks=2) | wrong)


MEASURED = json.loads((Path(__file__).parents[1] / "bench" / "results" / "multi_gpu.json").read_text())
STEPS = [r for r in MEASURED if r["job"]["what"] == "speed" and r["world"] > 1 and r["job"]["overlap"]]


@pytest.mark.parametrize("r", STEPS, ids=lambda r: f"{r['job']['model']}-zero{r['job']['zero']}-machine{r['machine']}")
def test_predictions_are_within_a_tenth_of_measured_steps(r):
    """Of two H200: bench/results/multi_gpu.txt."""
    name, zero = r["job"]["model"], r["job"]["zero"]
    micro_batch, accumulation = {"124m": (64, 4), "1558m": (8, 16)}[name]
    sizes = dict(micro_batch=micro_batch, accumulation=accumulation, recompute="none", extra_programs=())
    found = page(name, ranks=r["world"], zero=zero, **sizes)
    assert found.prediction.step == pytest.approx(1e-3 * statistics.median(r["ms"]), rel=0.1)
    assert found.plan.nbytes / 2**20 == r["arena_mib"]  # memory to the byte
