"""A real run: GPT-2 124M on books, 150 steps of 524,288 tokens, and its first 30 steps in PyTorch for comparison.

    python bench/gpu_books.py --data 'books/train*.bin' --val 'books/val*.bin'     about 4 minutes on one H100
    python bench/gpu_books.py --smoke --data ... --val ...                         a tiny model on the CPU

--data and --val are globs of token shards, which may be compressed (.bin.xz). PyTorch starts from the same weights,
sees the same batches in the same order and follows the same schedule, in bf16 autocast under torch.compile. Results go
to bench/results/gpu_books.{json,txt,png}: loss and gradient norm of every step, validation loss, largest difference.
"""

import argparse
import datetime
import glob
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_step import ROOT, commit, say, smi

PEAK, WARMUP = 6e-4, 20  # peak learning rate, warm-up steps; then half a cosine to a tenth
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
SIZES = {  # micro-batch, sequence, tokens a step, layers, heads, width
    "gpt2-124m": (64, 1024, 524288, 12, 12, 768),
    "d2": (2, 32, 128, 2, 2, 128),
}
VOCAB, VOCAB_PADDED = 50257, 50304


def train(a: argparse.Namespace, shards: str, val_shards: str, folder: Path) -> dict:
    """handgrad's run. Writes the initial weights and the first batches to the folder, for PyTorch."""
    import handgrad as hg
    from handgrad.optim import schedules
    from handgrad.train.start import draw

    B, T, step_tokens, *_ = SIZES[a.preset]
    data = hg.data.tokens(shards, T, step_tokens, seed=1)
    val = hg.data.tokens(val_shards, T, T, shuffle=False)
    optim, lr = hg.optim.AdamW(BETAS, EPS, DECAY, CLIP), schedules.cosine(PEAK, min(WARMUP, a.steps), a.steps)
    backend, dtype = ("cpu", "f32") if a.smoke else ("cuda", "bf16")
    kind = dict(execution=hg.Execution(B, extra_programs=("val",), backend=backend), precision=hg.Precision(dtype))
    run = hg.Trainer(hg.models.gpt2(a.preset), optim, data, **kind)
    start = {name: draw(info, 0, i) for i, (name, info) in enumerate(run.program.params.items())}
    run.load_params(start)
    np.savez(folder / "start.npz", **start)
    del start
    rows = [data.batch(k) for k in range(a.torch_steps)]
    np.save(folder / "batches.npy", np.stack([np.concatenate([b["ids"], b["targets"][:, -1:]], 1) for b in rows]))
    np.save(folder / "rates.npy", [lr(step) for step in range(1, a.torch_steps + 1)])

    results, val_losses, busy = [], {0: run.evaluate(val, a.val_tokens)}, 0.0
    begin = time.perf_counter()
    for step in range(1, a.steps + 1):
        results.append(run.step(step, lr(step)))
        if step % a.val_every == 0 or step == a.steps:
            loss = results[-1].loss
            busy += time.perf_counter() - begin
            val_losses[step] = run.evaluate(val, a.val_tokens)
            say(f"step {step}: loss {loss:.4f}, val {val_losses[step]:.4f}")
            begin = time.perf_counter()
    skipped = [i for i, r in enumerate(results, 1) if r.skipped]
    return {
        "loss": [r.loss for r in results],
        "grad_norm": [r.grad_norm for r in results],
        "val_loss": val_losses,
        "skipped": skipped,
        "tokens_per_second": a.steps * step_tokens / busy,
        "hardware": run.backend.hardware,
    }


def torch_worker(preset: str, folder: Path, device: str) -> None:
    """Runs the first steps in PyTorch; prints a line of JSON for each."""
    sys.path.insert(0, str(ROOT / "reference"))
    import torch
    from gpt2_torch import GPT2, adamw

    torch.set_float32_matmul_precision("high")
    B, T, step_tokens, layers, heads, width = SIZES[preset]
    model = GPT2(VOCAB, 1024, layers, heads, width, vocab_padded=VOCAB_PADDED, bf16=device == "cuda")
    with np.load(folder / "start.npz") as start:
        model.load(dict(start))
    model.to(device)
    if device == "cuda":
        model.compile()
    optimizer, parts = adamw(model, PEAK, BETAS, EPS, DECAY), step_tokens // (B * T)
    for rows, rate in zip(np.load(folder / "batches.npy"), np.load(folder / "rates.npy")):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in np.split(rows, parts):
            both = torch.from_numpy(part.astype(np.int64)).to(device)
            loss = model(both[:, :-1].contiguous(), both[:, 1:].contiguous())[1] / parts
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        print(json.dumps({"loss": float(total), "grad_norm": float(norm), "torch": torch.__version__}), flush=True)


def compare(a: argparse.Namespace, folder: Path) -> dict:
    """PyTorch's losses and gradient norms, from a process of its own."""
    words = ["--worker", a.preset, str(folder), "cpu" if a.smoke else "cuda"]
    done = subprocess.run([a.torch_python, __file__, *words], stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) < a.torch_steps:
        say(f"PyTorch ended after {len(lines)} steps with exit code {done.returncode}")
    return {key: [line[key] for line in lines] for key in ("loss", "grad_norm")} | {
        "version": lines[0]["torch"] if lines else ""
    }


def differences(mine: dict, theirs: dict) -> dict:
    """Differences of the loss (in nats) and of the gradient norm (relative): the largest, its step, and the mean."""
    found = {}
    for key in ("loss", "grad_norm"):
        x, y = np.array(mine[key][: len(theirs[key])]), np.array(theirs[key])
        gaps = np.abs(x - y) / (y if key == "grad_norm" else 1.0)
        found[key] = {"max": float(gaps.max()), "mean": float(gaps.mean()), "step": int(gaps.argmax()) + 1}
    return found


def text(results: dict) -> str:
    """The results as text."""
    mine, theirs, gaps = results["handgrad"], results.get("torch", {}), results.get("differences")
    lines = [f"{key:12} {value}" for key, value in results["facts"].items()]
    lines += [f"{'speed':12} {mine['tokens_per_second']:,.0f} tokens a second, without validation"]
    lines += [f"{'skipped':12} {len(mine['skipped'])} updates", ""]
    lines.append(f"{'step':>5}{'loss':>9}{'PyTorch':>9}{'val':>9}{'grad':>8}")
    count = len(mine["loss"])
    lines.append(f"{0:5}{'':18}{mine['val_loss'][0]:9.4f}")
    for step in range(1, count + 1):
        paired, val = step <= len(theirs.get("loss", ())), mine["val_loss"].get(step)
        if not (step <= 5 or step == count or val is not None or (paired and step % 5 == 0)):
            continue
        other = f"{theirs['loss'][step - 1]:9.4f}" if paired else f"{'':9}"
        shown = f"{val:9.4f}" if val is not None else f"{'':9}"
        lines.append(f"{step:5}{mine['loss'][step - 1]:9.4f}{other}{shown}{mine['grad_norm'][step - 1]:8.3f}")
    if gaps:
        g, n = gaps["loss"], gaps["grad_norm"]
        lines += [
            "",
            f"against PyTorch over {len(theirs['loss'])} steps: loss differs by at most {g['max']:.5f}"
            f" (step {g['step']}), {g['mean']:.5f} on average;"
            f" gradient norm by at most {100 * n['max']:.2f} % (step {n['step']})",
        ]
    return "\n".join(lines)


def draw_curves(results: dict, path: Path) -> None:
    """Draws the whole loss curve, and the first steps with PyTorch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    mine, theirs = results["handgrad"], results.get("torch", {}).get("loss", [])
    figure, (whole, start) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = range(1, len(mine["loss"]) + 1)
    whole.plot(steps, mine["loss"], linewidth=1, label="training")
    whole.plot(list(mine["val_loss"]), list(mine["val_loss"].values()), "o-", markersize=3, label="validation")
    whole.set(xlabel="step", ylabel="loss, nats a token", title=results["facts"]["model"])
    whole.legend(frameon=False)
    first = len(theirs) or min(30, len(mine["loss"]))
    start.plot(steps[:first], mine["loss"][:first], label="handgrad")
    if theirs:
        start.plot(range(1, first + 1), theirs, "--", label=f"PyTorch {results['torch']['version']}")
    start.set(xlabel="step", title="first steps, same weights and batches")
    start.legend(frameon=False)
    for axes in (whole, start):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    figure.savefig(path, dpi=120)


def unpacked(pattern: str, folder: Path) -> str:
    """A glob of the same shards, uncompressed so that training can map them; unpacks .xz files into the folder."""
    paths = sorted(glob.glob(pattern))
    if not any(p.endswith(".xz") for p in paths):
        return pattern
    folder.mkdir()
    for p in paths:
        with lzma.open(p) as source, open(folder / Path(p).stem, "wb") as target:
            shutil.copyfileobj(source, target)
    return str(folder / "*.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required="--worker" not in sys.argv, help="glob of training shards, .bin or .bin.xz")
    parser.add_argument("--val", required="--worker" not in sys.argv, help="glob of validation shards")
    parser.add_argument("--steps", type=int, default=0, help="0: 150, or 12 with --smoke")
    parser.add_argument("--torch-steps", type=int, default=-1, help="-1: 30, or 6 with --smoke; 0: no PyTorch")
    parser.add_argument("--val-every", type=int, default=10)
    parser.add_argument("--val-tokens", type=int, default=524288, help="tokens of one validation")
    parser.add_argument("--torch-python", default=sys.executable, help="the interpreter that has PyTorch")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--commit", default="", help="commit to report if git does not know it")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to test this script")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return torch_worker(a.worker[0], Path(a.worker[1]), a.worker[2])
    a.preset = "d2" if a.smoke else "gpt2-124m"
    a.steps = a.steps or (12 if a.smoke else 150)
    a.torch_steps = min(a.steps, a.torch_steps if a.torch_steps >= 0 else (6 if a.smoke else 30))
    if a.smoke:
        a.val_tokens = min(a.val_tokens, 1024)
    B, T, step_tokens, *_ = SIZES[a.preset]
    results = {
        "facts": {
            "model": f"{a.preset}, {a.steps} steps of {step_tokens:,} tokens, {B} x {T} at a time",
            "recipe": f"AdamW {BETAS}, eps {EPS}, decay {DECAY}, clip {CLIP}, cosine from {PEAK} after {WARMUP} steps",
            "date": datetime.date.today().isoformat(),
            "commit": a.commit or commit(),
        }
    }
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, val_shards = unpacked(a.data, folder / "train"), unpacked(a.val, folder / "val")
        results["handgrad"] = train(a, shards, val_shards, folder)
        watts = "" if a.smoke else f", {smi('power.limit')} W"
        results["facts"]["hardware"] = results["handgrad"].pop("hardware") + watts
        if a.torch_steps:
            results["torch"] = compare(a, folder)
            if results["torch"]["loss"]:
                results["differences"] = differences(results["handgrad"], results["torch"])
    stem = a.out / "gpu_books"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".txt").write_text(text(results) + "\n")
    draw_curves(results, stem.with_suffix(".png"))
    print(text(results))


if __name__ == "__main__":
    main()
