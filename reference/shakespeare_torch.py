"""The recipe of `handgrad train` without arguments in eager float32 PyTorch: the baseline for its time and val loss.

python reference/shakespeare_torch.py                4 layers, 4 heads, 128 wide, 2000 steps of 12 x 64 characters
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from gpt2_torch import GPT2, adamw, train_step

TEXT = Path(__file__).resolve().parents[1] / "src/handgrad/data/shakespeare.txt"
B, T = 12, 64


def learning_rate(step, steps, peak=2e-3, final=2e-4, warmup=100):
    """Returns the learning rate of a step, counted from 1: linear warm-up, then a cosine from peak towards final."""
    if step <= warmup:
        return peak * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


@torch.no_grad()
def evaluate(model, tokens):
    """Returns the mean loss over the text cut into windows of T tokens. tokens: 1-D int64 tensor."""
    count = (len(tokens) - 1) // T
    ids, targets = tokens[: count * T].view(count, T), tokens[1 : count * T + 1].view(count, T)
    total = sum(float(model(i, t)[1]) * len(i) for i, t in zip(ids.split(64), targets.split(64)))
    return total / count


def shakespeare(steps=2000, seed=0):
    """Trains; returns a dictionary: losses (one per step), val_loss, seconds (one per step), tokens_per_second.

    A step's time covers forward, backward, clip, update and reading the loss, but not drawing the batch.
    """
    text = TEXT.read_text(encoding="utf-8")
    code = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([code[c] for c in text])
    train_tokens, val_tokens = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = GPT2(len(code), T, num_layers=4, num_heads=4, hidden_size=128)
    optimizer = adamw(model, 1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    losses, seconds = [], []
    for step in range(1, steps + 1):
        starts = torch.from_numpy(rng.integers(0, len(train_tokens) - T, (B, 1)))
        windows = train_tokens[starts + torch.arange(T + 1)]
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss, _ = train_step(model, optimizer, windows[:, :-1], windows[:, 1:], clip=1.0)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "val_loss": evaluate(model, val_tokens),
        "seconds": seconds,
        "tokens_per_second": B * T * steps / sum(seconds),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = shakespeare(args.steps, args.seed)
    seconds = run["seconds"]
    print(
        f"{args.steps} steps | {sum(seconds):.1f} s | {np.median(seconds) * 1e3:.2f} ms/step (median) | "
        f"{run['tokens_per_second']:,.0f} tok/s | last loss {run['losses'][-1]:.3f} | "
        f"val loss {run['val_loss']:.4f} | torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
