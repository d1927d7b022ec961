"""HellaSwag and LAMBADA in full, by `handgrad eval` and by transformers on the exported model, compared task by task.

    python bench/evals.py train FOLDER --shards BOOKS        a small model on token shards (a folder with train_*.bin)
    python bench/evals.py ours FOLDER --hellaswag FILE --lambada FILE
    python bench/evals.py theirs FOLDER --hellaswag FILE --lambada FILE
    python bench/evals.py compare FOLDER                     how many tasks agree
    python bench/evals.py speed FOLDER --hellaswag FILE      tasks a second, by length and padded as in llm.c

`theirs` is PyTorch in float32, one task at a time, its endings padded to the longest of them.
"""

import argparse
import json
import lzma
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from handgrad.core.tensor import IGNORE_INDEX

SIZES = "--num-layers 4 --num-heads 4 --hidden-size 128 --max-seq-len 256 --micro-batch 8"
RULES = ("acc", "acc_norm", "acc_llmc")
QUESTIONS, ROUNDS = 64, 5  # for `speed`; the questions are spread over the whole file


def train(a: argparse.Namespace) -> None:
    """Trains the model and writes it as a Hugging Face folder."""
    flags = f"{SIZES} --steps {a.steps} --dtype f32 --val-every 0 --sample-tokens 0 --lr 3e-3"
    command = [sys.executable, "-m", "handgrad.cli"]
    subprocess.run([*command, "train", "--train", a.shards, "--out", f"{a.folder}/run", *flags.split()], check=True)
    subprocess.run([*command, "convert", f"{a.folder}/run", f"{a.folder}/hf"], check=True)


def ours(a: argparse.Namespace) -> None:
    """Writes handgrad's choices, losses and seconds as JSON."""
    from handgrad import evals
    from handgrad.evals.metrics import choices

    m = evals.load_scorer(Path(a.folder) / "run", a.dtype, threads=a.threads)
    found = {}
    for name in ("hellaswag", "lambada"):
        items = evals.read_items(name, getattr(a, name), m.tokenizer, a.limit)
        pairs = [pair for item in items for pair in item.pairs]
        begin = time.perf_counter()
        scores = m.scorer.score(pairs, greedy=name == "lambada")
        seconds = time.perf_counter() - begin
        result = {"tasks": len(items), "seconds": seconds, "labels": [item.label for item in items]}
        result["losses"] = [float(s.losses.sum(dtype=np.float64)) for s in scores]
        if name == "lambada":
            result["greedy"] = [s.greedy for s in scores]
        else:
            result |= {rule: chosen.tolist() for rule, chosen in choices(items, scores).items()}
        found[name] = result
        print(name, len(items), "tasks", f"{seconds:.1f} s", flush=True)
    found["hardware"] = m.backend.hardware
    Path(a.folder, f"ours_{a.dtype}.json").write_text(json.dumps(found))


def speed(a: argparse.Namespace) -> None:
    """Prints the median tasks a second with batches by length, and with every row padded to the model's full length."""
    from handgrad import evals
    from handgrad.core.dtypes import DTYPES
    from handgrad.core.program import Program
    from handgrad.models import forward_loss

    m = evals.load_scorer(Path(a.folder) / "run", a.dtype, threads=a.threads)
    items = evals.read_items("hellaswag", a.hellaswag, m.tokenizer)
    pairs = [pair for item in items[:: len(items) // QUESTIONS][:QUESTIONS] for pair in item.pairs]
    model, B = m.source.model, 8
    T, p = model.max_seq_len, Program(DTYPES[m.dtype])
    forward_loss(p, model, B, T, B * T // 512)
    arena = m.backend.alloc(m.backend.plan(p))
    for name, info in p.params.items():
        arena.write_part("param", info.tensor, m.source.weights.tensor(name, rows=info.tensor.shape[0]))
    run = m.backend.bind(p, arena)

    def padded() -> list[float]:
        """Returns the loss of every pair."""
        losses = []
        for at in range(0, len(pairs), B):
            ids, targets = np.zeros((B, T), np.int32), np.full((B, T), IGNORE_INDEX, np.int32)
            for row, (context, ending) in enumerate(pairs[at : at + B]):
                text = np.concatenate([context, ending])
                ids[row, : len(text) - 1] = text[:-1]
                targets[row, len(context) - 1 : len(text) - 1] = ending
            arena.write(p.inputs["ids"], ids.reshape(-1))
            arena.write(p.inputs["targets"], targets.reshape(-1))
            run.run()
            found = arena.read(p.outputs["losses"]).reshape(B, T)
            losses += np.where(targets == IGNORE_INDEX, 0, found).sum(axis=1, dtype=np.float64).tolist()
        return losses

    times: dict[str, list[float]] = {"by length": [], "padded": []}
    for turn in range(ROUNDS + 1):  # the first warms up
        begin = time.perf_counter()
        ours = [float(s.losses.sum(dtype=np.float64)) for s in m.scorer.score(pairs)]
        middle = time.perf_counter()
        theirs = padded()
        if turn:
            times["by length"].append(middle - begin)
            times["padded"].append(time.perf_counter() - middle)
    assert np.allclose(ours, theirs, rtol=1e-4), "the two methods give different losses"
    rates = {name: QUESTIONS / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{QUESTIONS} questions of HellaSwag, {ROUNDS} interleaved rounds, {a.dtype}, {m.backend.hardware}")
    for name, rate in rates.items():
        print(f"  {name:9} {rate:6.1f} tasks a second")
    print(f"  ratio     {rates['by length'] / rates['padded']:6.1f}")


def theirs(a: argparse.Namespace) -> None:
    """Writes the same from transformers alone: the exported model, its tokenizer, the original files."""
    import torch
    import transformers

    torch.set_num_threads(a.threads or 2)
    model = transformers.GPT2LMHeadModel.from_pretrained(f"{a.folder}/hf").eval()
    encode, T = transformers.AutoTokenizer.from_pretrained(f"{a.folder}/hf").encode, model.config.n_positions
    found = {}
    for name in ("hellaswag", "lambada"):
        begin, result = time.perf_counter(), {"losses": [], "greedy": [], **{rule: [] for rule in RULES}}
        for row in rows(getattr(a, name), a.limit):
            context, _, word = (row["text"].rpartition(" ")) if name == "lambada" else (row["ctx"], "", "")
            answers = [word] if name == "lambada" else row["endings"]
            start = len(encode(context))
            texts = [encode(f"{context} {answer}") for answer in answers]
            ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
            for line, text in zip(ids, texts):
                line[: len(text)] = torch.tensor(text)
            with torch.no_grad():
                x = model.transformer(ids[:, :-1][:, -T:]).last_hidden_state
                logp = [model.lm_head(x[i, start - 1 : len(t) - 1]).log_softmax(-1) for i, t in enumerate(texts)]
            wanted = [torch.tensor(text[start:]) for text in texts]
            sums = [float(p.gather(1, w[:, None]).double().sum()) for p, w in zip(logp, wanted)]
            result["losses"] += [-s for s in sums]
            result["greedy"].append(bool((logp[0].argmax(-1) == wanted[0]).all()))
            for rule, sizes in zip(RULES, ([1] * 4, map(len, answers), map(len, wanted))):
                result[rule].append(int(np.argmax([s / n for s, n in zip(sums, sizes)])))
        found[name] = result | {"seconds": time.perf_counter() - begin}
        print(name, len(result["greedy"]), "tasks", f"{found[name]['seconds']:.1f} s", flush=True)
    Path(a.folder, "theirs.json").write_text(json.dumps(found))


def rows(path: str, limit: int) -> list[dict]:
    with lzma.open(path, "rt") as lines:
        return [json.loads(line) for line in lines][: limit or None]


def compare(a: argparse.Namespace) -> None:
    """Prints both results side by side."""
    one, two = (json.loads(Path(a.folder, f"{name}.json").read_text()) for name in (f"ours_{a.dtype}", "theirs"))
    print(f"{a.dtype} on {one['hardware']}")
    for name in ("hellaswag", "lambada"):
        x, y = one[name], two[name]
        apart = np.abs(np.array(x["losses"]) - y["losses"])
        print(f"{name}: {x['tasks']:,} tasks, largest difference of a log-probability {apart.max():.1e}")
        for rule in RULES if name == "hellaswag" else ("greedy",):
            same = np.sum(np.array(x[rule]) == y[rule])
            acc = [np.mean(np.array(z[rule]) == (x["labels"] if name == "hellaswag" else True)) for z in (x, y)]
            print(
                f"  {rule:9} {same:,} of {x['tasks']:,} tasks agree; accuracy {acc[0]:.4f}, transformers {acc[1]:.4f}"
            )
        print(f"  {x['seconds']:.0f} s, transformers {y['seconds']:.0f} s, on a shared machine")
    print("  perplexity", *(f"{np.exp(np.mean(z['lambada']['losses'])):.2f}" for z in (one, two)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "ours", "theirs", "compare", "speed"))
    parser.add_argument("folder", help="folder of the model and the results")
    parser.add_argument("--shards", help="a folder with train_*.bin")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--hellaswag", help=".jsonl.xz of {ctx, endings, label}")
    parser.add_argument("--lambada", help=".jsonl.xz of {text}")
    parser.add_argument("--limit", type=int, default=0, help="largest number of tasks; 0: all")
    parser.add_argument("--dtype", default="f32", choices=("f32", "bf16"))
    parser.add_argument("--threads", type=int, default=0)
    a = parser.parse_args()
    {"train": train, "ours": ours, "theirs": theirs, "compare": compare, "speed": speed}[a.what](a)


if __name__ == "__main__":
    main()
