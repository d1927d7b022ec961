"""How long a checkpoint stalls the training that continues meanwhile.

    python bench/stall.py --out bench/results/stall.txt      the Shakespeare recipe's model, d6, GPT-2 124M
    python bench/stall.py --out bench/results/stall_gpu.txt  on a GPU: 124M as in its recipe, 1558M with a smaller batch

The script times every step. The stall of a checkpoint is the time of `save` and of all steps until the checkpoint is
complete on disk, minus the same number of steps at the median before it. The table shows the median stall of the
rounds, the median and the largest as a share of the default interval (`--save-every`), and the time of a save that
training waits for.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import handgrad as hg
from handgrad.backends import best_dtype, open_backend
from handgrad.io import newest
from handgrad.train.config import CheckpointConfig

# vocabulary, sequences in a micro-batch, tokens in a sequence, micro-batches in a step, steps before a checkpoint
SHAPES = {"tiny": (65, 12, 64, 1, 200), "d6": (50257, 1, 256, 1, 10), "gpt2-124m": (50257, 4, 64, 1, 6)}
GPU_SHAPES = {"gpt2-124m": (50257, 64, 1024, 8, 6), "gpt2-1558m": (50257, 8, 1024, 32, 2)}


def measure(preset: str, folder: Path, rounds: int, steps: int) -> str:
    """Returns a line of the table."""
    backend = open_backend("auto")
    vocab_size, B, T, micro_steps, usual_steps = (GPU_SHAPES if backend.name == "cuda" else SHAPES)[preset]
    ids = np.random.default_rng(0).integers(0, vocab_size, 2_000_000)
    hg.data.write_shard(folder / "a.bin", [ids], hg.data.id_dtype(vocab_size))
    data = hg.data.tokens(folder / "a.bin", T, B * T * micro_steps)
    model = hg.models.preset(preset, vocab_size=vocab_size)
    kinds = dict(execution=hg.Execution(B, extra_programs=()), precision=hg.Precision(best_dtype(backend.name)))
    run = hg.Trainer(model, hg.optim.AdamW(), data, **kinds, backend=backend, out=folder / "run")
    counter = iter(range(1, 1 << 30))

    def step() -> float:
        begin = time.perf_counter()
        run.step(next(counter), 1e-4).loss  # noqa: B018  waits for it
        return time.perf_counter() - begin

    stalls, waits, usual = [], [], []
    for _ in range(3):
        step()
    for _ in range(rounds):
        median = statistics.median(step() for _ in range(steps or usual_steps))
        at, begin, count = run.last_step, time.perf_counter(), 0
        run.save(at, keep_last=1, wait=False)
        while (path := newest(folder / "run")) is None or path.name != f"step_{at:06d}":
            step()
            count += 1
        stalls.append(time.perf_counter() - begin - count * median)
        usual.append(median)
        begin = time.perf_counter()
        run.save(run.last_step, keep_last=1)
        waits.append(time.perf_counter() - begin)
    size = sum(path.stat().st_size for path in newest(folder / "run").iterdir())
    one, stall, wait, every = *map(statistics.median, (usual, stalls, waits)), CheckpointConfig.save_every
    share = 100 * stall / (every * one)
    worst = 100 * max(stalls) / (every * one)
    return f"{preset:10} {1e3 * one:9.1f} {size / 2**20:9.1f} {stall:9.3f} {share:8.3f} {worst:8.3f} {wait:9.3f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    backend = open_backend("auto")
    shapes = GPU_SHAPES if backend.name == "cuda" else SHAPES
    parser.add_argument("--presets", nargs="+", default=list(shapes), choices=list(shapes))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="steps before a checkpoint; 0: the default of the preset")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    hardware, every = backend.hardware, CheckpointConfig.save_every
    lines = [
        f"date {datetime.date.today()}, {hardware}, {a.rounds} rounds, share of {every} steps",
        "model        step ms       MiB   stall s  share %  worst %  waited s",
    ]
    print("\n".join(lines), flush=True)
    for preset in a.presets:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(preset, Path(folder), a.rounds, a.steps))
            print(lines[-1], flush=True)
    if a.out:
        a.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
