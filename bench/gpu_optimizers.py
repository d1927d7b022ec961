"""Muon against AdamW on books: each over the same grid of learning rates, Muon with fewer steps.

    python bench/gpu_optimizers.py --data 'books/train*.bin*' --val 'books/val*.bin*'     about 4 minutes on one H200
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
FEWER = 0.75  # of AdamW's steps


def train(a: argparse.Namespace, name: str, peak: float, steps: int, shards: str, val_shards: str) -> dict:
    """One run: validation losses by step, and its time."""
    import handgrad as hg

    preset, B, T, batch = ("d2", 2, 32, 128) if a.smoke else ("d6", 64, 512, 65536)
    data = hg.data.tokens(shards, T, batch, seed=1)
    val = hg.data.tokens(val_shards, T, T, shuffle=False)
    backend, dtype = ("cpu", "f32") if a.smoke else ("cuda", "bf16")
    kind = dict(execution=hg.Execution(B, extra_programs=("val",), backend=backend), precision=hg.Precision(dtype))
    optim = {"adamw": hg.optim.AdamW, "muon": hg.optim.Muon}[name](betas=(0.9, 0.95))
    run = hg.Trainer(hg.models.preset(preset, max_seq_len=T), optim, data, **kind)
    lr = hg.schedules.cosine(peak, steps // 10, steps)
    losses, begin = {}, time.perf_counter()
    for step in range(1, steps + 1):
        run.step(step, lr(step))
        if step % max(steps // 10, 1) == 0 or step == steps:
            losses[step] = run.evaluate(val, 2**10 if a.smoke else None)
    return {"val_loss": losses, "seconds": time.perf_counter() - begin, "hardware": run.backend.hardware}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--steps", type=int, default=600, help="of AdamW")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("--commit", default="", help="what to call this tree where git does not know")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    results: dict = {"date": datetime.date.today().isoformat(), "commit": a.commit or commit(), "runs": []}
    out = a.json or (None if a.smoke else ROOT / "bench" / "results" / "gpu_optimizers.json")
    print(f"{'optimizer':10}{'steps':>7}{'peak rate':>11}{'val loss':>10}{'s':>7}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shards, val_shards = (unpacked(glob, Path(folder) / name) for glob, name in ((a.data, "train"), (a.val, "val")))
        for peak in RATES[:1] if a.smoke else RATES:
            for name, steps in (("adamw", a.steps), ("muon", round(FEWER * a.steps))):
                found = train(a, name, peak, steps, shards, val_shards)
                results["runs"].append({"optimizer": name, "steps": steps, "rate": peak} | found)
                last = found["val_loss"][steps]
                print(f"{name:10}{steps:7}{peak:11.0e}{last:10.4f}{found['seconds']:7.1f}", flush=True)
                if out is not None:
                    out.write_text(json.dumps(results, indent=1) + "\n")
    best = {
        name: min(r["val_loss"][r["steps"]] for r in results["runs"] if r["optimizer"] == name)
        for name in ("adamw", "muon")
    }
    print(f"best: AdamW {best['adamw']:.4f} in {a.steps} steps, Muon {best['muon']:.4f} in {round(FEWER * a.steps)}")


if __name__ == "__main__":
    main()
