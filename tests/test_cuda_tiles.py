"""Which cluster of our GEMMs computes which tiles: split_k.cuh and exp_tiles.cuh, compiled for this machine."""

import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from handgrad.backends.cuda.planner import describe
from handgrad.ops import OPS, wgmma_gemm
from handgrad.ops.linear.op import weight_gradient

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ compiles the headers")
SPLIT_K = (OPS["linear"].folder / "split_k.cuh").read_text()
EXP_TILES = (OPS["lm_loss"].folder / "exp_tiles.cuh").read_text()
MAIN = """
#include <cstdio>
#define __device__
typedef long long i64;
#include "tiles.cuh"
#if SPLIT
static void header(const SplitK &work) {
  float *end = work.row_sums((float *)0, work.whole + work.clusters + work.split);
  printf("gemm %d %d %lld\\n", work.whole, work.split, (long long)(end - (float *)0) * 4);
}
static int partial(const TileSteps &at) { return at.partial; }
#else
static void header(const ExpTiles &work) { printf("gemm %d 0 0\\n", work.tiles); }
static int partial(const TileSteps &) { return -1; }
#endif
int main() {
  long long M, N, K;
  int clusters, split;
  while (scanf("%lld %lld %lld %d %d", &M, &N, &K, &clusters, &split) == 5) {
#if SPLIT
    SplitK work(M, N, K, clusters, split);
#else
    ExpTiles work(M, N, K, clusters);
#endif
    header(work);
    for (int c = 0; c < clusters; c++) {
      TileSteps at;
      int m, n;
      for (int i = 0; work.get(i, c, at); i++) {
        work.coordinates(at.tile, m, n);
        printf("get %d %d %d %d %d %d %d\\n", c, at.tile, at.k0, at.k1, partial(at), m, n);
      }
    }
#if SPLIT
    for (int t = 0; t < split; t++) work.for_each_partial(t, [&](int i) { printf("partial %d %d\\n", work.whole + t, i); });
#endif
    printf("end\\n");
  }
}
"""


def launched(gemm: tuple[int, int, int, int]) -> tuple[int, int]:
    """(split tiles, bytes of scratch) that linear's op passes for M, N, K and a number of clusters."""
    M, N, _, clusters = gemm
    launches = weight_gradient(M, N, describe("sm_90a", wgmma_gemm.CLUSTER * clusters, 227 << 10, 50 << 20))
    split = int(launches.steps[0].args.partition("|")[2].split()[3])
    return split, launches.scratch


def gives(folder: Path, text: str, gemms: list[tuple[int, int, int, int]]) -> list[list[list[str]]]:
    """What each GEMM's clusters do, as lines of words; the first one: gemm, whole tiles, split tiles, bytes."""
    (folder / "tiles.cuh").write_text(text)
    (folder / "main.cc").write_text(MAIN)
    options = [f"-D{name}={value}" for name, value in wgmma_gemm.TILES.items()]
    options += [f"-DSPLIT={int('SplitK' in text)}", "-w", "-O1", "-o", folder / "main", folder / "main.cc"]
    subprocess.run(["g++", "-std=c++17", *map(str, options)], check=True)
    asked = "\n".join(" ".join(map(str, (*g, launched(g)[0]))) for g in gemms)
    with (folder / "said.txt").open("wb") as file:  # a mutant may never end: what it says must not fill the memory
        subprocess.run(
            [folder / "main"], input=asked.encode(), stdout=file, check=True, timeout=60, preexec_fn=limit_files
        )
    said = (folder / "said.txt").read_text()
    return [[line.split() for line in one.strip().splitlines()] for one in said.split("end\n")[:-1]]


def limit_files():
    """Ends this process if it writes a file of more than 256 MiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))


def judge(gemm: tuple[int, int, int, int], lines: list[list[str]]) -> None:
    """Every step of every tile once, in its place; partials do not overlap, and each is added up once."""
    M, N, K, clusters = gemm
    rows, columns, steps = -(-M // 256), -(-N // 256), -(-K // 64)
    whole, rest, nbytes = map(int, lines[0][1:])
    assert whole + rest == rows * columns
    done, slots, places = set(), {}, {}
    for c, tile, k0, k1, slot, m, n in (map(int, line[1:]) for line in lines if line[0] == "get"):
        assert (
            0 <= k0 < k1 <= steps and 0 <= m < rows and 0 <= n < columns and places.setdefault(tile, (m, n)) == (m, n)
        )
        assert (slot < 0) == (tile < whole) and (slot >= 0 or (k0, k1) == (0, steps))
        for k in range(k0, k1):
            assert (tile, k) not in done, (gemm, c, tile, k)
            done.add((tile, k))
        if slot >= 0:
            assert slot not in slots and slot < clusters + rest
            slots[slot] = tile
    assert len(done) == rows * columns * steps and len(set(places.values())) == rows * columns
    added = [(int(tile), int(slot)) for _, tile, slot in (line for line in lines if line[0] == "partial")]
    assert sorted(added) == sorted((tile, slot) for slot, tile in slots.items())
    assert launched(gemm) == (rest, nbytes)


def gemms() -> list[tuple[int, int, int, int]]:
    """GPT-2's weight gradients on an H100, and others of any size on any GPU."""
    found = [
        (M * C, N * C, T, 66)
        for C, T in ((768, 65536), (1024, 32768), (1280, 16384), (1600, 8192))
        for M, N in ((3, 1), (1, 1), (4, 1), (1, 4))
    ]
    rng = random.Random(0)
    sizes = [8, 64, 576, 600, 8192, 8200]
    return found + [
        (
            rng.randint(1, 9000),
            rng.randint(1, 9000),
            rng.choice(sizes) + rng.randint(0, 700),
            rng.choice([1, 2, 3, 57, 66]),
        )
        for _ in range(400)
    ]


def test_split_k_covers_every_step_of_every_tile_once(tmp_path):
    for gemm, lines in zip(gemms(), gives(tmp_path, SPLIT_K, gemms()), strict=True):
        judge(gemm, lines)


def test_exp_gemm_never_splits_tiles(tmp_path):
    for (M, N, _, _), lines in zip(gemms(), gives(tmp_path, EXP_TILES, gemms()), strict=True):
        places = [(int(line[6]), int(line[7])) for line in lines if line[0] == "get"]
        assert lines[0][2] == "0" and sorted(places) == [
            (m, n) for m in range(-(-M // 256)) for n in range(-(-N // 256))
        ]


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("if (heads * head_steps > steps) heads = (steps + head_steps - 1) / head_steps;", ""),
        ("at.k1 = at.k0 + head_steps < steps ? at.k0 + head_steps : steps;", "at.k1 = at.k0 + head_steps;"),
        ("((t + 1) * tail - 1) / helper_steps", "(t + 1) * tail / helper_steps"),
        ("t * tail > begin ? t * tail : begin", "begin"),
    ],
)
def test_mutations_of_split_k_are_caught(tmp_path, right, wrong):
    assert SPLIT_K.count(right) == 1
    with pytest.raises((AssertionError, ValueError, subprocess.SubprocessError)):
        for gemm, lines in zip(gemms(), gives(tmp_path, SPLIT_K.replace(right, wrong), gemms()), strict=True):
            judge(gemm, lines)
