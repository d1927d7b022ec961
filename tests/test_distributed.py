"""Several ranks: threads of this process against one rank in float64, and processes under mpiexec.

Trap of every comparison: the key bias of attention has no effect (it adds the same number to all scores of a row, and
softmax subtracts it), so its gradient is 0 but for rounding, and Adam divides rounding by its own size. W ranks round
otherwise than one. The key bias is exempt; no tolerance is wider for it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from rank_threads import Threads, on_ranks

import handgrad as hg
from handgrad.backends.arena import HostMemory
from handgrad.backends.cpu import CpuBackend
from handgrad.backends.ranks.comm import Planned, RankError
from handgrad.backends.ref import RefBackend, RefExecutable
from handgrad.cli.__main__ import main
from handgrad.core import streams
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY
from handgrad.core.params import FLAT_ALIGN
from handgrad.core.program import Segment
from handgrad.core.streams import joins
from handgrad.core.tensor import IGNORE_INDEX, Role
from handgrad.data import id_dtype, write_shard
from handgrad.models import GPT2
from handgrad.ops import collectives
from handgrad.tokenizers import chars

SEQUENCES, SEQ_LEN, STEPS, LR = 24, 8, 20, 3e-3
WIDTH = 24


@pytest.fixture(scope="module", autouse=True)
def data_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_shard(folder / "train_0.bin", [np.random.default_rng(0).integers(0, 97, 5000)], id_dtype(97))
    global FOLDER
    FOLDER = str(folder)


def model(tie=True, dropout=0.1):
    return GPT2(97, SEQ_LEN, 2, 2, WIDTH, dropout=dropout, tie_embeddings=tie)


def masked(data):
    """Data with targets that do not count, more of them in some sequences than in others."""
    whole = data.batch

    def batch(*args, **kwargs):
        found = whole(*args, **kwargs)
        rows = np.arange(SEQ_LEN) < 1 + found["ids"][:, :1] % (SEQ_LEN - 1)
        return found | {"targets": np.where(rows, found["targets"], IGNORE_INDEX).astype(np.int32)}

    data.batch = batch
    return data


def trainer(comm, micro_batch, zero, backend=None, out=None, recompute="act", **changes):
    data = masked(hg.data.tokens(FOLDER, SEQ_LEN, SEQ_LEN * SEQUENCES))
    execution = hg.Execution(micro_batch=micro_batch, zero=zero, recompute=recompute)
    backend = backend or RefBackend(comm=comm)
    return hg.Trainer(
        model(**changes),
        hg.optim.AdamW(),
        data,
        execution=execution,
        precision=hg.Precision("f32"),
        backend=backend,
        start=hg.Start(3),
        out=out,
    )


def steps(run, first=1, last=STEPS):
    """(loss, norm) of steps."""
    return [(r.loss, r.grad_norm) for r in (run.step(k, LR) for k in range(first, last + 1))]


def arrays(found):
    """Copies of weights, without the key bias."""
    copies = {name: np.array(a) for name, a in found.items()}
    for name in copies:
        if name.endswith("c_attn.bias"):
            copies[name] = np.delete(copies[name], np.s_[WIDTH : 2 * WIDTH])
    return copies


def ranks(world, micro_batch, zero, count=STEPS, **options):
    """On every rank (losses and norms, validation loss, gradients, weights)."""

    def work(comm):
        run = trainer(comm, micro_batch, zero, **options)
        found = steps(run, last=count)
        return found, run.evaluate(run.data, 7 * SEQ_LEN), arrays(run.grads()), arrays(run.params())

    return on_ranks(world, work)


@lru_cache
def one(micro_batch, tie=True, count=STEPS):
    return ranks(1, micro_batch, 0, count, tie=tie)[0]


def distance(found, other):
    """The largest difference of two results of `ranks`."""
    pairs = [(np.array(found[0]), np.array(other[0])), (found[1], other[1])]
    for i in (2, 3):
        assert found[i].keys() == other[i].keys()
        pairs += [(found[i][name], other[i][name]) for name in other[i]]
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_train_as_one(world, zero, accumulation):
    """Losses, norms, gradients and weights of 20 steps, with dropout and uneven numbers of targets."""
    micro_batch = SEQUENCES // world // accumulation
    found = ranks(world, micro_batch, zero)
    assert all(r[:2] == found[0][:2] for r in found)  # the same bits on all
    assert distance(found[0], one(micro_batch)) < 1e-12


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_untied_embeddings_and_recompute_policies(zero, recompute):
    found = ranks(2, 12, zero, 4, tie=False, recompute=recompute)
    assert distance(found[0], one(12, False, 4)) < 1e-12


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", [12, 6])
def test_no_two_live_tensors_overlap_in_the_arena(zero, micro_batch):
    """Outputs that are NaN before a call writes them give the same bits: no call reads what a live tensor has lost."""

    def work(comm, poison):
        return steps(trainer(comm, micro_batch, zero, RefBackend(False, poison, comm)), last=3)

    poisoned, plain = (on_ranks(2, partial(work, poison=poison))[0] for poison in (True, False))
    assert poisoned == plain and np.isfinite(plain).all()


class LateExecutable(RefExecutable):
    """Runs a collective as late as a second stream may: when the first call that waits for it comes. Until then what it
    gathers is NaN."""

    def run(self, segment=None, micro_batch=ONLY):
        segment = segment or Segment(0, len(self.program.calls))
        ends, pending = joins(self.program), []
        for i in range(segment.start, segment.stop):
            c = self.program.calls[i]
            if any(ends[k] <= i for k in pending):  # a stream keeps its order
                last = max(n for n, k in enumerate(pending) if ends[k] <= i)
                for k in pending[: last + 1]:
                    self._call(self.program.calls[k], micro_batch)
                pending = pending[last + 1 :]
            if not micro_batch.runs(c.when):
                continue
            if c.op.communicates:
                pending.append(i)
                if c.op is collectives.all_gather and c.full.role is Role.ACT:
                    self.arena.view(c.full).view(np.uint8)[...] = 0xFF
            else:
                self._call(c, micro_batch)
        for k in pending:
            self._call(self.program.calls[k], micro_batch)


class Late(RefBackend):
    is_concurrent = True

    def bind(self, program, arena):
        return LateExecutable(program, arena, self.poison, self.comm)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", [12, 6])
def test_collectives_may_end_as_late_as_their_join(zero, micro_batch):
    """On streams of their own: the same bits as in the order of the list, with the memory of a concurrent plan."""

    def work(comm, backend):
        run = trainer(comm, micro_batch, zero, backend(False, True, comm))
        return steps(run, last=3), run.evaluate(run.data, 7 * SEQ_LEN), arrays(run.params())

    class Early(RefBackend):
        is_concurrent = True

    late, early = (on_ranks(2, partial(work, backend=backend))[0] for backend in (Late, Early))
    plain = on_ranks(2, partial(work, backend=RefBackend))[0]
    for found in (late, early):
        assert found[:2] == plain[:2] and all(np.array_equal(found[2][n], w) for n, w in plain[2].items())


def test_a_collective_that_nobody_waits_for_is_caught(monkeypatch):
    monkeypatch.setattr(streams, "_intersect", lambda some, others: False)

    def work(comm):
        return steps(trainer(comm, 12, 3, Late(False, True, comm)), last=2)

    assert not np.isfinite(on_ranks(2, work)[0]).all()


def test_overlap_costs_the_memory_of_a_block():
    """With zero 3, a block is gathered while the one before it runs, and its gradients are summed while the next one
    does: no more than two more buckets are alive."""
    size = {}
    for kind in (RefBackend, Late):
        planner = kind()
        planner.comm = Planned(2)
        execution = hg.Execution(micro_batch=2, zero=3)
        page = hg.explain(GPT2(97, 8, 12, 2, 64), SEQ_LEN, execution=execution, backend=planner, remedies=False)
        size[kind] = page.plan.nbytes
        block = max(4 * b.size for b in page.program.buckets if b.block.startswith("h.1"))
    assert 0 <= size[Late] - size[RefBackend] <= 4 * block


# mutations: each must be caught by the comparison above ---------------------------------------------------------------


def caught(world, micro_batch, zero):
    return distance(ranks(world, micro_batch, zero, 3)[0], one(micro_batch, True, 3)) > 1e-9  # of one rank: as it is


def test_a_bucket_that_is_not_reduced_is_caught(monkeypatch):
    whole = {op: type(op).exchange for op in (collectives.all_reduce, collectives.reduce_scatter)}
    bucket = 2 * FLAT_ALIGN  # the final norm's weight and bias

    def skipping(op):
        def exchange(self, comm, v):
            if getattr(v, "x", getattr(v, "full", None)).size > bucket:
                whole[op](self, comm, v)
            elif op is collectives.reduce_scatter:
                v.share[...] = v.full[: v.share.size]

        return exchange

    assert not caught(2, 12, 0) and not caught(2, 12, 2)
    for op in whole:
        monkeypatch.setattr(type(op), "exchange", skipping(op))
    assert caught(2, 12, 0) and caught(2, 12, 2)


def test_a_scale_by_the_own_targets_is_caught(monkeypatch):
    total = Threads.total
    monkeypatch.setattr(Threads, "total", lambda self, x: x if isinstance(x, int) else total(self, x))
    assert caught(2, 12, 1)


def test_the_same_dropout_masks_on_all_ranks_are_caught(monkeypatch):
    write = HostMemory.write_scalars

    def same(self, program, **values):
        if "micro_step" in values:
            values["micro_step"] //= 2
        write(self, program, **values)

    want = one(12, True, 3)
    monkeypatch.setattr(HostMemory, "write_scalars", same)
    assert distance(ranks(2, 12, 1, 3)[0], want) > 1e-9


def test_the_norm_of_one_share_is_caught(monkeypatch):
    def own(self, comm, v):
        v.full[...] = 0
        v.full[comm.rank * v.share.size : (comm.rank + 1) * v.share.size] = v.share

    monkeypatch.setattr(type(collectives.all_gather_f32), "exchange", own)
    assert caught(2, 12, 1)


# memory, checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_memory_of_a_rank_is_what_explain_plans(zero):
    execution = hg.Execution(micro_batch=4, zero=zero)
    planner = CpuBackend(1)
    planner.comm = Planned(3)
    plan = hg.explain(model(), SEQ_LEN, execution=execution, backend=planner, accumulation=2, remedies=False).plan

    def work(comm):
        run = trainer(comm, 4, zero, CpuBackend(1, comm))
        assert run.plan.region == plan.region
        return run.arena.bytes.size

    assert on_ranks(3, work) == [plan.nbytes] * 3


def test_shards_divide_memory_by_the_number_of_ranks():
    """Vectors of a rank: (4 + 4 + 8) bytes a parameter, of which ZeRO divides 8, 12 and 16 by the number of ranks."""
    size = {}
    for zero in (0, 1, 2, 3):
        planner = RefBackend()
        planner.comm = Planned(4)
        page = hg.explain(model(), SEQ_LEN, execution=hg.Execution(micro_batch=2, zero=zero), backend=planner)
        size[zero] = sum(v.nbytes for v in page.plan.vectors.values()) / page.program.flat_size
        assert "sent by a rank" in str(page)
    assert size == {0: 16.0, 1: 10.0, 2: 7.0, 3: 4.0}


def test_checkpoints_know_nothing_of_ranks(tmp_path):
    """2 ranks with zero 3 -> 1 -> 3 with zero 2 -> 2 with zero 1, five steps each, are one run of 20 steps. Without
    dropout, whose masks depend on the size of a micro-batch."""
    history, weights = [], {}
    for world, zero in ((2, 3), (1, 0), (3, 2), (2, 1)):

        def work(comm, zero=zero, world=world):
            run = trainer(comm, SEQUENCES // world, zero, out=tmp_path / "run", dropout=0.0)
            first = run.resume() + 1
            found = steps(run, first, first + 4)
            run.save(first + 4)
            return found, arrays(run.params())

        found, weights = on_ranks(world, work)[0]
        history += found
    whole = ranks(1, SEQUENCES, 0, dropout=0.0)[0]
    assert np.max(np.abs(np.array(history) - np.array(whole[0]))) < 1e-12
    assert all(np.max(np.abs(weights[name] - w)) < 1e-12 for name, w in whole[3].items())


def test_resumed_ranks_give_the_same_bits(tmp_path):
    def work(comm, out, spans):
        for first, last in spans:
            run = trainer(comm, 6, 2, CpuBackend(1, comm), out)
            assert run.resume() == first - 1
            steps(run, first, last)
            run.save(last)
        return {name: np.array(a) for name, a in (run.params() | run._state()).items()}

    straight = on_ranks(2, lambda c: work(c, tmp_path / "a", [(1, 6)]))[0]
    resumed = on_ranks(2, lambda c: work(c, tmp_path / "b", [(1, 3), (4, 6)]))[0]
    assert straight.keys() == resumed.keys() and len(straight) > 60
    assert all(straight[name].tobytes() == resumed[name].tobytes() for name in straight)


# engines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("size", [1, 7, 1 << 20, (1 << 20) + 129])
def test_sums_are_in_the_order_of_the_ranks(world, size):
    """Float32 sums of any length, a chunk and a bit included, equal the sum from rank 0 upwards."""
    values = np.random.default_rng(1).standard_normal((world, size)).astype(np.float32)

    def work(comm):
        x = values[comm.rank].copy()
        comm.all_reduce(x)
        return x

    want = values[0].copy()
    for other in values[1:]:
        want += other
    assert all(np.array_equal(x, want) for x in on_ranks(world, work))


def test_collectives_of_matrices():
    """Elements count, not rows. A size that does not fit, and an array whose copy would be filled, are errors."""

    def work(comm):
        share, full = np.full((3, 5), comm.rank + 1.0), np.zeros((2, 3, 5))
        comm.all_gather(share, full)
        total, part = full * (comm.rank + 1), np.zeros((3, 5))
        comm.reduce_scatter(total, part)
        comm.all_reduce(total)
        for args, message in (((share, full[:1]), "fill an array"), ((share[:, :1], full[:1, :, :2]), "contiguous")):
            with pytest.raises(ValueError, match=message):
                comm.all_gather(*args)
        return full[:, 0, 0].tolist(), part[0, 0], total.ravel().tolist()

    ours = [on_ranks(2, work)[rank] for rank in (0, 1)]
    assert [rank[:2] for rank in ours] == [([1.0, 2.0], 3.0), ([1.0, 2.0], 6.0)]
    assert all(rank[2] == [3.0] * 15 + [6.0] * 15 for rank in ours)


def test_error_of_a_rank_reaches_those_that_wait():
    def work(comm):
        if comm.rank == 1:
            raise HandgradError("data", "a file is whole", "half")
        with pytest.raises(RankError, match=r"\[rank 1\] \[data\] a file is whole, but got half"):
            comm.total(1.0)
        return "told"

    with pytest.raises(HandgradError, match="a file is whole"):
        on_ranks(3, work)


# processes -------------------------------------------------------------------------------------------------------------

MPIEXEC = Path(sys.executable).parent / "mpiexec"
processes = pytest.mark.skipif(not MPIEXEC.exists(), reason="pip install '.[mpi]'")
FLAGS = "--preset tiny --num-layers 2 --hidden-size 32 --num-heads 2 --backend cpu --dtype f32 --threads 1 "
FLAGS += "--seq-len 16 --max-seq-len 16 --no-shuffle --sample-tokens 0 --val-every 0 --train text"
TOKENS = 16 * 8


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder to work in, with a folder of tokens."""
    monkeypatch.chdir(tmp_path)
    words = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 20_000).tolist())
    Path("words.txt").write_text(words)
    hg.data.prepare_text([Path("words.txt")], "text", chars(words))
    return tmp_path


def start(world, flags, out):
    """`handgrad train`, under mpiexec if there are several ranks."""
    command = [sys.executable, "-m", "handgrad.cli.__main__", "train", *FLAGS.split(), *flags.split(), "--out", out]
    env = os.environ | {"OMP_WAIT_POLICY": "passive", "COLUMNS": "200"}
    many = [str(MPIEXEC), "-n", str(world)] if world > 1 else []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*many, *command], env=env, **pipe)


def finish(process, code=0):
    """The output of a command that ends in 30 s with this code."""
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def log(out):
    return [row for row in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "loss" in row]


@processes
def test_processes_train_as_one_and_repeat_bit_for_bit(text):
    """Bound, to first order: ranks differ from one by the rounding of sums of 8 gradients and of the norm, 2^-21 of a
    gradient at most, so by lr 2^-21 of each weight in a step, where Adam's update is at most lr. A loss then differs by
    |gradient|_1 <= |gradient|_2 sqrt(parameters) times that, and 2^-23 of itself for its own rounding."""
    finish(start(1, f"--steps 12 --micro-batch 2 --batch-tokens {TOKENS}", "one"))
    for out, zero, count in (("a", 1, 12), ("b", 1, 12), ("c", 3, 12)):
        told = finish(start(2, f"--steps {count} --micro-batch 2 --batch-tokens {TOKENS} --zero {zero}", out))
        assert told.count("step 12/12") == told.count("generate: handgrad generate") == 1  # rank 0 alone speaks
        assert len(log(out)) == 12
    files = sorted(Path("a").glob("step_000012/*.safetensors"))
    assert len(files) == 2 and all(f.read_bytes() == Path("b", *f.parts[1:]).read_bytes() for f in files)
    params = json.loads(Path("one/run.json").read_text())["summary"]["params"]
    moved = 0.0
    for row, other, third in zip(log("one"), log("a"), log("c")):
        bound = row["grad_norm"] * params**0.5 * moved + 2.0**-23 * row["loss"]
        assert abs(row["loss"] - other["loss"]) <= bound and abs(row["loss"] - third["loss"]) <= bound
        moved += row["lr"] * 2.0**-21


@processes
@pytest.mark.parametrize(("optimizer", "zero", "enlarged"), [("muon", 1, 1000), ("adafactor", 3, 1)])
def test_muon_and_adafactor_on_four_processes_equal_one(text, optimizer, zero, enlarged):
    """Bound, as above: gradients differ by 2^-21 of themselves, and a step by as much of itself, in Muon's by 1000
    times that, the product of its polynomials' slopes. A step of adafactor has an RMS of lr times that of the weights,
    which is below 1, and so have Muon's and AdamW's, below lr. Of a Llama, which has no key bias."""
    flags = f"--family llama --optimizer {optimizer} --lr 3e-3 --steps 4 --warmup 0 --batch-tokens {TOKENS}"
    ranks = start(4, f"{flags} --micro-batch 2 --zero {zero}", "four")
    assert main(["train", *FLAGS.split(), *flags.split(), "--micro-batch", "8", "--out", "one"]) == 0
    finish(ranks)
    params, moved = json.loads(Path("one/run.json").read_text())["summary"]["params"], 0.0
    for row, other in zip(log("one"), log("four"), strict=True):
        bound = row["grad_norm"] * params**0.5 * moved + 2.0**-23 * row["loss"]
        assert abs(row["loss"] - other["loss"]) <= bound
        moved += row["lr"] * enlarged * 2.0**-21


@processes
def test_resume_on_another_number_of_processes(text):
    finish(start(2, f"--steps 4 --micro-batch 2 --batch-tokens {TOKENS} --zero 3", "run"))
    finish(start(1, f"--steps 8 --micro-batch 2 --batch-tokens {TOKENS} --resume run", "run"))
    told = finish(start(3, "--steps 10 --micro-batch 2 --batch-tokens 192 --zero 2 --resume run", "run"))
    assert "resumed at step 8" in told
    assert [row["step"] for row in log("run")] == list(range(1, 11))
    assert "zero is 2, not" in Path("run/log.jsonl").read_text()


def started(process, out):
    """The process of rank 1 of a run, once it has made some steps."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 1/"):
            break
    number = re.search(r"1 is process (\d+)", "".join(lines))
    assert number, lines
    time.sleep(0.5)
    return int(number[1])


@processes
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_one_rank_stops_all_with_a_checkpoint(text, sent):
    process = start(2, "--steps 100000 --micro-batch 2 --save-every 0", "run")
    os.kill(started(process, "run"), sent)
    told = finish(process, 130)
    last = int(re.search(r"stopped after step (\d+), saved in run", told)[1])
    assert (Path("run") / f"step_{last:06d}" / "DONE").exists() and log("run")[-1]["step"] == last


@processes
def test_killed_rank_ends_all(text):
    process = start(2, "--steps 100000 --micro-batch 2 --save-every 0", "run")
    number = started(process, "run")
    begin = time.monotonic()
    os.kill(number, signal.SIGKILL)
    assert f"PID {number}" in finish(process, 9) and time.monotonic() - begin < 10


@processes
def test_error_on_one_rank_ends_all_with_one_message_and_a_checkpoint(text):
    """Step 5 of 2 x 2 sequences: rank 1 reads sequences 18 and 19, and the first is damaged."""
    shard = next(Path("text").glob("train_*.bin"))
    raw = bytearray(shard.read_bytes())
    at = len(raw) - 2 * hg.data.tokens("text", 16, 16).shards[0].count + 2 * 16 * 18
    raw[at + 6 : at + 8] = (60_000).to_bytes(2, "little")
    shard.write_bytes(raw)
    told = finish(start(2, "--steps 50 --micro-batch 2 --save-every 0", "run"), 2)
    assert told.count("must hold ids below the vocabulary size") == 1 and "[rank 1] [data]" in told
    assert "saved step 4" in told and (Path("run") / "step_000004" / "DONE").exists()


FULL = """
import resource, sys
from handgrad.backends.ranks.startup import open_comm
from handgrad.cli.__main__ import main
from handgrad.core import streams
if open_comm().rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes of a file
sys.exit(main(["train", *sys.argv[1:]]))
"""
BUG = """
import sys, time
from handgrad.cli.__main__ import main
from handgrad.core import streams
from handgrad.train import loop
class Bug(Exception):  # whose traceback takes longer than the other rank's end
    def __str__(self):
        time.sleep(0.5)
        return "a bug"
due = loop.due_after
def due_after(run, interrupt, number):
    if run.trainer.comm.rank == 1 and number == 7:
        raise Bug
    return due(run, interrupt, number)
loop.due_after = due_after
sys.exit(main(["train", *sys.argv[1:]]))
"""


@processes
@pytest.mark.parametrize(
    ("script", "code", "told", "steps"),
    [(FULL, 2, "must be writable, but got", 0), (BUG, 1, "Bug: a bug", 7)],
    ids=["full disk", "bug"],
)
def test_failure_of_one_rank_ends_all(text, script, code, told, steps):
    flags = f"{FLAGS} --steps 20 --micro-batch 2 --save-every 10 --out run".split()
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-c", script, *flags]
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    begin = time.monotonic()
    output = finish(
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), code
    )
    assert told in output and time.monotonic() - begin < 30, output
    assert not steps or (Path("run") / f"step_{steps:06d}" / "DONE").exists(), output


@processes
def test_second_signal_to_one_rank_ends_all_at_once(text):
    process = start(2, "--steps 1000 --micro-batch 2 --batch-tokens 640000 --save-every 0", "run")
    lines = []
    while not (number := re.search(r"1 is process (\d+)", "".join(lines))):
        lines.append(process.stdout.readline())
        assert lines[-1], lines  # the ranks have ended
    time.sleep(0.5)
    for _ in range(2):
        os.kill(int(number[1]), signal.SIGTERM)
        time.sleep(0.2)
    finish(process, 130)


@processes
@pytest.mark.parametrize(
    ("flags", "word"), [("--batch-tokens 777", "batch_tokens"), ("--zero 9", "--zero takes one of")]
)
def test_mistake_on_all_ranks_is_told_once_and_leaves_no_folder(text, flags, word):
    told = finish(start(2, f"--steps 5 {flags}", "run"), 2)
    assert told.count(word) == told.count("but got") == 1 and not Path("run").exists()


@pytest.mark.parametrize("value", ["4", "-1", "x"])
def test_zero_is_one_of_four(value, capsys):
    assert main(["train", "--zero", value]) == 2
    assert "--zero takes one of 0, 1, 2, 3, but got" in capsys.readouterr().err


# docs/distributed.md ---------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()


def test_commands_of_the_page_work(tmp_path):
    """With a thread a rank. What needs mpiexec is left out where there is none."""
    commands = re.search(r"```sh\n(.*?)```", PAGE, re.S)[1].splitlines()
    assert len(commands) == 5 and sum(command.startswith("mpiexec") for command in commands) == 1
    for command in commands:
        if command.startswith("mpiexec") and not MPIEXEC.exists():
            continue
        line = command.replace("handgrad", f"{sys.executable} -m handgrad.cli", 1).replace("mpiexec", str(MPIEXEC), 1)
        line = line.replace("--backend cpu --ranks 2", "--backend cpu --threads 1 --ranks 2")
        done = subprocess.run(line.split(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        last = re.search(r"--steps (\d+)", command)
        assert last is None or (tmp_path / "runs" / "two" / f"step_{int(last[1]):06d}" / "DONE").exists(), command
    assert "exchanged in a step" in done.stdout


def test_the_page_names_every_variable_that_is_read():
    source = (Path(hg.__file__).parent / "backends" / "ranks" / "launchers.py").read_text()
    read = re.findall(r"\b(?:SLURM|PMI|MPI|OMPI|MASTER|LOCAL)_[A-Z_]+\b|\bRANK\b|\bWORLD_SIZE\b", source)
    assert len(set(read)) > 15
    assert set(read) == set(re.findall(r"`([A-Z][A-Z_]+)`", PAGE.partition("| started by |")[2].partition("\n\n")[0]))
