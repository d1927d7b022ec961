"""Who computes what of our own product on Hopper: work.cuh, compiled for this machine, for every cluster of a card."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from handgrad.backends.cuda import card
from handgrad.core.launch import Gemm, Gpu

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="work.cuh is compiled by g++")
TEXT = (Path(card.__file__).parent / "work.cuh").read_text()
MAIN = """
#include <cstdio>
#define __device__
typedef long long i64;
#include "work.cuh"
int main() {
  long long M, N, K;
  int clusters;
  while (scanf("%lld %lld %lld %d", &M, &N, &K, &clusters) == 4) {
    Work work(M, N, K, clusters);
    printf("product %d %d %lld\\n", work.whole, work.rest, (long long)(work.rows((float *)0, work.whole + clusters + work.rest) - (float *)0) * 4);
    for (int c = 0; c < clusters; c++) {
      int tile, k0, k1, slot, m, n;
      for (int i = 0; work.get(i, c, tile, k0, k1, slot); i++) {
        work.place(tile, m, n);
        printf("get %d %d %d %d %d %d %d\\n", c, tile, k0, k1, slot, m, n);
      }
    }
    for (int t = 0; t < work.rest; t++) work.pieces(t, [&](int slot) { printf("piece %d %d\\n", work.whole + t, slot); });
    printf("end\\n");
  }
}
"""


def gives(
    folder: Path, text: str, exponentials: int, products: list[tuple[int, int, int, int]]
) -> list[list[list[str]]]:
    """What each product's clusters do, as lines of words; the first one: product, whole, rest, bytes of workspace."""
    (folder / "work.cuh").write_text(text)
    (folder / "main.cc").write_text(MAIN)
    options = [f"-DEXPONENTIALS={exponentials}", "-w", "-O1", "-o", folder / "main", folder / "main.cc"]
    subprocess.run(["g++", "-std=c++17", *map(str, options)], check=True)
    asked = "\n".join(" ".join(map(str, p)) for p in products)
    said = subprocess.run([folder / "main"], input=asked, capture_output=True, text=True, check=True, timeout=60).stdout
    return [[line.split() for line in one.strip().splitlines()] for one in said.split("end\n")[:-1]]


def judge(product: tuple[int, int, int, int], lines: list[list[str]]) -> None:
    """Every step of every tile once, in its place; pieces in slots of their own, and each added up once."""
    M, N, K, clusters = product
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
            assert (tile, k) not in done, (product, c, tile, k)
            done.add((tile, k))
        if slot >= 0:
            assert slot not in slots and slot < clusters + rest
            slots[slot] = tile
    assert len(done) == rows * columns * steps and len(set(places.values())) == rows * columns
    added = [(int(tile), int(slot)) for _, tile, slot in (line for line in lines if line[0] == "piece")]
    assert sorted(added) == sorted((tile, slot) for slot, tile in slots.items())
    gemm, gpu = Gemm("out", "a", "b", M, N, K, sums="sums"), Gpu(sms=2 * clusters)
    assert card.own_tiles(gemm, gpu) == (rows * columns, rest) and card.gemm_workspace(gemm, gpu) == nbytes


def products() -> list[tuple[int, int, int, int]]:
    """GPT-2's weight gradients on an H100, and others of any size on any card."""
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


def test_every_step_of_every_tile_once(tmp_path):
    for product, lines in zip(products(), gives(tmp_path, TEXT, 0, products())):
        judge(product, lines)


def test_tiles_are_never_cut_where_exponentials_leave(tmp_path):
    for (M, N, _, _), lines in zip(products(), gives(tmp_path, TEXT, 1, products())):
        places = [(int(line[6]), int(line[7])) for line in lines if line[0] == "get"]
        assert lines[0][2] == "0" and sorted(places) == [
            (m, n) for m in range(-(-M // 256)) for n in range(-(-N // 256))
        ]


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("if (heads * part > steps) heads = (steps + part - 1) / part;", ""),
        ("k1 = k0 + part < steps ? k0 + part : steps;", "k1 = k0 + part;"),
        ("((t + 1) * tail - 1) / share", "(t + 1) * tail / share"),
        ("t * tail > begin ? t * tail : begin", "begin"),
    ],
)
def test_mutations_are_seen(tmp_path, right, wrong):
    assert TEXT.count(right) == 1
    with pytest.raises((AssertionError, ValueError, subprocess.SubprocessError)):
        for product, lines in zip(products(), gives(tmp_path, TEXT.replace(right, wrong), 0, products()), strict=True):
            judge(product, lines)
