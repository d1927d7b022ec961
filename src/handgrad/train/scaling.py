"""scaling: predicts a step on several GPUs from the MFU of one GPU and the bandwidth of links.

docs/distributed.md has the formulae, under "Planning".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from handgrad.backends.cuda.peaks import peaks
from handgrad.backends.cuda.planner import GPUS, PRODUCT_NAMES, GpuPlanner
from handgrad.backends.ranks.comm import Planned
from handgrad.core.errors import HandgradError
from handgrad.core.number import real, whole
from handgrad.core.op import ONLY, Call, MicroBatch, Phase
from handgrad.core.precision import Precision
from handgrad.core.program import Program, Segment
from handgrad.core.streams import joins
from handgrad.train.mfu import mfu as utilisation


class Link(NamedTuple):
    """What a GPU sends by, while it receives as much. reached: the part of the data sheet's rate that collectives
    reach. hop_us: microseconds from one rank to the next, by NCCL's cost model (src/graph/tuning.cc, ring, Simple)."""

    reached: float
    hop_us: float
    source: str


LINKS = {
    # Measured, NCCL 2.28.9 in a captured graph: of 128 MiB, reduce-scatter 294 us and all-gather 278 us (240 GB/s of
    # 450), all-reduce 468 us (296 GB/s); of 1 MiB 14 and 18 us. 250 GB/s predicts 280, 280, 552, 14 and 19 us.
    "nvlink": Link(250 / 450, 3.4, "the fraction measured on two H200, 2026-11-30"),
    "pcie": Link(0.5, 5.7, "assumed: half of the data sheet"),  # 28 to 35 of 64 GB/s are reported for 8 and 4 RTX 5090
    "ib": Link(0.85, 14.0, "assumed: 85 % of 400 Gbit/s"),  # 340 of 400 GB/s are reported for 32 machines of 8 H100
}
BASE_US = 8.4  # microseconds of every collective, from the same cost model
RATES = {  # GB/s of a GPU in one direction, from data sheets: NVLink (0: none), PCIe x16
    "a100": {"nvlink": 300, "pcie": 32},
    "4090": {"nvlink": 0, "pcie": 32},
    "h100": {"nvlink": 450, "pcie": 64},
    "h200": {"nvlink": 450, "pcie": 64},
    "b200": {"nvlink": 900, "pcie": 64},
}
IB_RATE = 50  # GB/s of one NDR port (400 Gbit/s) a GPU

# MFU of one GPU in bf16 by millions of parameters: T=1024, 8 to 64 sequences a micro-batch, 8 to 32 of them a step,
# nothing recomputed; h100: bench/results/gpu_step.txt, h200: bench/results/compare.txt
MEASURED_ON = {"h100": "2026-11-26", "h200": "2026-11-30"}
MEASURED = {
    "h100": {124: 0.522, 355: 0.540, 774: 0.544, 1558: 0.535},
    "h200": {124: 0.518, 355: 0.535, 774: 0.542, 1558: 0.535},
}
# Seconds that a hidden second of collectives adds to compute. Measured on two H200, 2026-11-30: 1.25 ms of
# reduce-scatter in 12 buckets during 11.2 ms of GEMMs cost 0.6 ms, 0.1 of them the last bucket, which nothing hides.
CONTENTION = 0.43
EFFICIENCY = 0.58  # of the bounds of calls, where no MFU is measured; the steps above reach 0.56 to 0.60


@dataclass(frozen=True)
class Cluster:
    """The GPUs that train together, one a rank.

    gpu    a key of RATES
    ranks  how many there are
    nodes  machines that the ranks are divided among
    link   between the GPUs of a machine: nvlink or pcie; None: nvlink where the GPU has it. Machines are joined by ib,
           which may be named instead
    mfu    of one GPU in forward and backward; 0: the measured one of the nearest model
    """

    gpu: str
    ranks: int
    nodes: int = 1
    link: str | None = None
    mfu: float = 0.0

    def __post_init__(self) -> None:
        rest = whole("explain", "ranks", self.ranks, 2) % whole("explain", "nodes", self.nodes, 1)
        if rest:
            below, above = self.ranks - rest, self.ranks - rest + self.nodes
            hint = " or ".join(f"--ranks {n}" for n in (below, above) if n > 1)
            raise HandgradError("explain", f"ranks are a multiple of nodes {self.nodes}", self.ranks, hint=hint)
        if self.gpu not in RATES:
            raise HandgradError("explain", f"a GPU is one of {', '.join(RATES)}", f"'{self.gpu}'")
        if self.link not in (None, *LINKS):
            raise HandgradError("explain", f"a link is one of {', '.join(LINKS)}", f"'{self.link}'")
        if self.link == "nvlink" and not RATES[self.gpu]["nvlink"]:
            raise HandgradError("explain", f"{PRODUCT_NAMES[self.gpu]} has no NVLink", hint="--link pcie")
        if self.link == "ib" and self.nodes == 1:
            raise HandgradError("explain", "ib joins several machines", "nodes 1", hint="--nodes 2, or --link nvlink")
        if real("explain", "mfu", self.mfu, 0) > 1:
            raise HandgradError(
                "explain", "mfu is a fraction of the peak, at most 1", self.mfu, hint="--mfu 0.5 is 50 %"
            )

    @property
    def inside(self) -> str:
        """The link between the GPUs of one machine."""
        return "pcie" if self.link == "pcie" or not RATES[self.gpu]["nvlink"] else "nvlink"

    @property
    def rates(self) -> dict[str, float]:
        """GB/s in one direction by kind of link, of those that the ranks use: within a machine of one GPU, between
        machines of all its GPUs."""
        each, inside = self.ranks // self.nodes, self.inside
        found = {inside: RATES[self.gpu][inside] * LINKS[inside].reached} if each > 1 else {}
        return found | ({"ib": each * IB_RATE * LINKS["ib"].reached} if self.nodes > 1 else {})

    @property
    def bandwidth(self) -> float:
        """Bytes/s that every rank sends in rings through all of them, bound by the slowest link. Each ring of a machine
        leaves it through the port of another GPU, so that the machine has the bandwidth of all its ports."""
        return 1e9 * min(self.rates.values())

    def seconds(self, c: Call) -> float:
        """Of a collective: its latency, and the bytes that a rank sends over the bandwidth of the ring."""
        hops = (self.ranks - self.nodes) * LINKS[self.inside].hop_us + (self.nodes - 1) * LINKS["ib"].hop_us
        return 1e-6 * (BASE_US + rounds(c) * hops) + sent(c, self.ranks) / self.bandwidth


class GpuRanks(GpuPlanner):
    """Plans for one of the GPUs of a cluster."""

    def __init__(self, cluster: Cluster, precision: Precision = Precision()):
        super().__init__(replace(GPUS[cluster.gpu], tf32=precision.tf32, deterministic=precision.deterministic))
        self.cluster, self.comm = cluster, Planned(cluster.ranks)


@dataclass(frozen=True)
class Exchange:
    """What a rank exchanges by one op in a step: calls, bytes that it sends to the others, and seconds of all calls."""

    name: str
    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A step of several GPUs, in seconds. `str()` of it is the part of the page that `explain` prints."""

    ranks: int
    compute: float
    communication: float
    exposed: float  # of the communication, for which compute waits
    slowdown: float  # of compute, by the communication that it overlaps
    tokens_per_second: float  # of all ranks
    mfu: float
    efficiency: float  # tokens/s over those of as many ranks alone, each of which takes the whole step
    assumptions: tuple[str, ...]

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.exposed + self.slowdown

    def __str__(self) -> str:
        hidden = f"of {1e3 * self.communication:,.2f} ms; the rest overlaps compute"
        lines = [
            "predicted step",
            f"compute              {1e3 * self.compute:12,.2f} ms",
            f"exposed communication{1e3 * self.exposed:12,.2f} ms, {hidden}",
            f"slowdown of compute  {1e3 * self.slowdown:12,.2f} ms, by what overlaps it",
            f"step                 {1e3 * self.step:12,.2f} ms",
            f"tok/s                {self.tokens_per_second:12,.0f} of {self.ranks} ranks",
            f"MFU                  {100 * self.mfu:12.1f} %",
            f"scaling efficiency   {100 * self.efficiency:12.1f} % of {self.ranks} times one rank with the same step",
            "",
            *self.assumptions,
        ]
        return "\n".join(lines)


def rounds(c: Call) -> int:
    """How often a collective goes round the ring: a sum that all ranks get is a reduce-scatter and an all-gather."""
    return 1 if any(c.ins) else 2


def sent(c: Call, world: int) -> int:
    """Bytes that a rank sends in one exchange: its part to every other rank, for a sum also the sum of its part."""
    whole = max(t.nbytes for t in (*c.ins, *c.outs) if t is not None)
    return whole // world * (world - 1) * rounds(c)


def exchanges(p: Program, accumulation: int, seconds: Callable[[Call], float] = lambda c: 0.0) -> list[Exchange]:
    """What a rank exchanges in a step of so many micro-batches, an entry for each op that communicates."""
    found: dict[str, Exchange] = {}
    for segment, kind, times in _runs(p, accumulation):
        for c in p.part(segment):
            if c.op.communicates and kind.runs(c.when):
                e = found.get(c.op.name, Exchange(c.op.name))
                nbytes = e.nbytes + times * sent(c, p.ranks.world)
                found[c.op.name] = Exchange(e.name, e.calls + times, nbytes, e.seconds + times * seconds(c))
    return list(found.values())


def predict(
    p: Program, alone: Program, cluster: Cluster, *, dtype: str, tokens: int, flops_per_token: int, accumulation: int
) -> Prediction:
    """The time of a step of several GPUs.

    p: the list of one of them;  alone: of one GPU that trains without others, with the same micro-batch
    tokens: of a micro-batch;  accumulation: micro-batches of a step on each rank
    flops_per_token: as MFU counts them (`Model.flops_per_token`)
    """
    sheet = peaks(PRODUCT_NAMES[cluster.gpu])
    assert sheet is not None
    peak, bandwidth = 1e12 * getattr(sheet, dtype), 1e9 * sheet.gbps
    share, source = _single_gpu_mfu(cluster, dtype, alone.num_params)

    def bound(c: Call) -> float:
        return max(c.flops / peak, c.op.nbytes(c) / bandwidth)

    efficiency = EFFICIENCY
    if share:  # of the calls that MFU counts; what is recomputed comes on top
        counted = [c for c in alone.part(alone.segments.forward_backward) if c.phase is not Phase.RECOMPUTE]
        efficiency = min(sum(map(bound, counted)) * share * peak / (tokens * flops_per_token), 1.0)

    def seconds(c: Call) -> float:
        return cluster.seconds(c) if c.op.communicates else bound(c) / efficiency

    compute, waiting = step_seconds(p, accumulation, seconds)
    communication = sum(e.seconds for e in exchanges(p, accumulation, cluster.seconds))
    slowdown = CONTENTION * (communication - waiting)
    step = compute + waiting + slowdown
    one = sum(step_seconds(alone, accumulation * cluster.ranks, seconds))
    speed = cluster.ranks * accumulation * tokens / step
    return Prediction(
        ranks=cluster.ranks,
        compute=compute,
        communication=communication,
        exposed=waiting,
        slowdown=slowdown,
        tokens_per_second=speed,
        mfu=utilisation(speed, flops_per_token, cluster.ranks * peak),
        efficiency=one / (cluster.ranks * step),
        assumptions=(
            *_links_of(cluster),
            f"compute: {source}",
            f"calls: each takes its bound (FLOP over peak or bytes over memory bandwidth) divided by {efficiency:.2f}",
            "exposed: the first call that uses a collective's result, and the end of a segment, wait for it",
            f"slowdown: {CONTENTION} of the time of collectives that is not exposed, measured on two H200, 2026-11-30",
        ),
    )


def step_seconds(p: Program, accumulation: int, seconds: Callable[[Call], float]) -> tuple[float, float]:
    """(seconds of compute in a step, seconds in which it waits for collectives)."""
    compute = waiting = 0.0
    for segment, kind, times in _runs(p, accumulation):
        busy, waits = timeline(p, segment, kind, seconds)
        compute, waiting = compute + times * busy, waiting + times * waits
    return compute, waiting


def timeline(
    p: Program, segment: Segment, micro_batch: MicroBatch, seconds: Callable[[Call], float]
) -> tuple[float, float]:
    """(seconds of compute, seconds in which it waits) of a segment on two streams.

    A collective starts when the call before it has ended and the collective before it has. The first call that touches
    what it uses waits for it, as does the end of the segment. A call that overlaps the next one counts in full.
    """
    now = compute = free = 0.0  # free: when the stream of collectives has ended all that it was given
    flying: list[tuple[int, float]] = []  # collectives, and when each of them ends
    ends = joins(p)
    for i in range(segment.start, segment.stop):
        c = p.calls[i]
        now = max([now, *(end for at, end in flying if ends[at] <= i)])
        flying = [f for f in flying if f[1] > now]
        if not micro_batch.runs(c.when):
            continue
        if c.op.communicates:
            free = max(now, free) + seconds(c)
            flying.append((i, free))
        else:
            busy = seconds(c)
            now, compute = now + busy, compute + busy
    return compute, max(now, free) - compute


def _runs(p: Program, accumulation: int) -> list[tuple[Segment, MicroBatch, int]]:
    """(segment, micro-batch, how often it runs) of a step."""
    n, fb = accumulation, p.segments.forward_backward
    several = [(MicroBatch(last=False), 1), (MicroBatch(first=False, last=False), n - 2), (MicroBatch(first=False), 1)]
    kinds = several if n > 1 else [(ONLY, 1)]
    return [(fb, kind, times) for kind, times in kinds if times] + [(p.segments.norm_update, ONLY, 1)]


def _single_gpu_mfu(cluster: Cluster, dtype: str, params: int) -> tuple[float, str]:
    """(MFU of one GPU in forward and backward, where it is from); 0 where none is known."""
    if cluster.mfu:
        return cluster.mfu, f"MFU of one GPU {100 * cluster.mfu:.1f} %, as stated"
    gpu = cluster.gpu.upper()
    if dtype != "bf16" or cluster.gpu not in MEASURED:
        return 0.0, f"no MFU of one {gpu} in {dtype} has been measured; --mfu states yours"
    millions, share = min(MEASURED[cluster.gpu].items(), key=lambda row: abs(1e6 * row[0] - params))
    when = f"measured on one {gpu} at {millions}M parameters, {MEASURED_ON[cluster.gpu]}"
    return share, f"MFU of one GPU {100 * share:.1f} %, {when}; --mfu states yours"


def _links_of(cluster: Cluster) -> list[str]:
    """A line for each kind of link that the ranks use, and one for the slowest."""
    each = cluster.ranks // cluster.nodes
    known = RATES[cluster.gpu] | {"ib": each * IB_RATE}
    lines = [
        f"{name}: {rate:.0f} of {known[name]} GB/s in one direction"
        f"{f' for {each} ports of a machine' if name == 'ib' else ' of a GPU'}, {LINKS[name].source}"
        for name, rate in cluster.rates.items()
    ]
    return [*lines, f"ring: every rank sends {cluster.bandwidth / 1e9:.0f} GB/s, which the slowest of its links allows"]
