"""Optimizers on books, over a grid of learning rates: Muon with three quarters of AdamW's steps.

    python bench/gpu_optimizers.py --data 'books/train*.bin*' --val 'books/val*.bin*'     about 4 minutes on one H200
    python bench/gpu_optimizers.py --optimizers adamw adamw-bf16 adamw-int8 --rates 2e-3 --data ... --val ...
                                                                                           AdamW with smaller moments
    python bench/gpu_optimizers.py --smoke --data ... --val ...                            a tiny model on the CPU

--data and --val are globs of token shards, which may be compressed (.bin.xz). All runs start from the same weights and
see the same sequences in the same order, with a cosine to a tenth after a tenth of warm-up. The last validation losses
go to bench/results/gpu_optimizers.json, with the curves, and to standard output.
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

from gpu_books import unpacked
from gpu_step import ROOT, commit

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
OPTIMIZERS = {  # name in handgrad, settings
    "adamw": ("AdamW", {}),
    "muon": ("Muon", {}),
    "adamw-bf16": ("AdamW", {"moments": "bf16"}),
    "adamw-int8": ("AdamW", {"moments": "int8"}),
}
FEWER = 0.75  # of AdamW's steps


def train(a: argparse.Namespace, name: str, peak: float, steps: int, shards: str, val_shards: str) -> dict:
    """One run: validation losses by step, and its time."""
    import handgrad as hg

    preset, B, T, batch = ("d2", 2, 32, 128) if a.smoke else ("d6", 64, 512, 65536)
    data = hg.data.tokens(shards, T, batch, seed=1)
    val = hg.data.tokens(val_shards, T, T, shuffle=False)
    backend, dtype = ("cpu", "f32") if a.smoke else ("cuda", "bf16")
    kind = dict(execution=hg.Execution(B, extra_programs=("val",), backend=backend), precision=hg.Precision(dtype))
    kind_of, settings = OPTIMIZERS[name]
    optim = getattr(hg.optim, kind_of)(betas=(0.9, 0.95), **settings)
    run = hg.Trainer(hg.models.preset(preset, max_seq_len=T), optim, data, **kind)
    lr = hg.schedules.cosine(peak, steps // 10, steps)
    losses, begin = {}, time.perf_counter()
    for step in range(1, steps + 1):
        run.step(step, lr(step))
        if step % max(steps // 10, 1) == 0 or step == steps:
            losses[step] = run.evaluate(val, 2**10 if a.smoke else None)
    took, found = time.perf_counter() - begin, {"arena": run.plan.nbytes, "hardware": run.backend.hardware}
    return {"val_loss": losses, "seconds": took} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--steps", type=int, default=600, help="of AdamW")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["adamw", "muon"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="peak learning rates")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("--commit", default="", help="what to call this tree where git does not know")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    results: dict = {"date": datetime.date.today().isoformat(), "commit": a.commit or commit(), "runs": []}
    out = a.json or (None if a.smoke else ROOT / "bench" / "results" / "gpu_optimizers.json")
    print(f"{'optimizer':12}{'steps':>7}{'peak rate':>11}{'val loss':>10}{'MiB':>7}{'s':>7}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shards, val_shards = (unpacked(glob, Path(folder) / name) for glob, name in ((a.data, "train"), (a.val, "val")))
        for peak in a.rates[:1] if a.smoke else a.rates:
            for name in a.optimizers:
                steps = round(FEWER * a.steps) if name == "muon" else a.steps
                found = train(a, name, peak, steps, shards, val_shards)
                results["runs"].append({"optimizer": name, "steps": steps, "rate": peak} | found)
                last = found["val_loss"][steps]
                row = f"{name:12}{steps:7}{peak:11.0e}{last:10.4f}{found['arena'] / 2**20:7.0f}{found['seconds']:7.1f}"
                print(row, flush=True)
                if out is not None:
                    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
