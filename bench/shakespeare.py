"""`handgrad train` without arguments against the same recipe in eager float32 PyTorch: ms a step, in alternation.

python bench/shakespeare.py               3 rounds of 400 steps each, about 2 minutes on 2 cores
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def handgrad(steps: int) -> float:
    """Median ms of a step, from the times in the run's log (without the first tenth, a warm-up)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--out {folder}/run --steps {steps} --val-every 0 --sample-tokens 0".split()
        subprocess.run([sys.executable, "-m", "handgrad.cli", "train", *flags], check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    seconds = [b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])]
    return 1e3 * statistics.median(seconds[steps // 10 : -1])


def torch(steps: int) -> float:
    """Median ms of a step of the PyTorch counterpart."""
    command = [sys.executable, str(ROOT / "reference" / "shakespeare_torch.py"), "--steps", str(steps)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"([\d.]+) ms/step", text)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    a = parser.parse_args()
    times: dict[str, list[float]] = {"handgrad": [], "torch eager f32": []}
    for _ in range(a.rounds):
        times["handgrad"].append(handgrad(a.steps))
        times["torch eager f32"].append(torch(a.steps))
    for name, ms in times.items():
        print(f"{name:16} {statistics.median(ms):7.2f} ms/step  ({', '.join(f'{t:.2f}' for t in ms)})")
    print(f"ratio of medians {statistics.median(times['torch eager f32']) / statistics.median(times['handgrad']):.2f}")


if __name__ == "__main__":
    main()
