"""What other trainers call a flag: our name if it means the same in the same unit, otherwise a hint.

The names are those of nanoGPT, llm.c's train_gpt2.py, Hugging Face's Trainer and model configs, and Megatron-LM.
"""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path
from shlex import quote

from handgrad.models import names as preset_names

SAME = {  # our flag: theirs
    "batch-tokens": "total-batch-size",
    "beta1": "adam-beta1",
    "beta2": "adam-beta2",
    "clip": "grad-clip gradient-clipping max-grad-norm",
    "ema": "ema-decay",
    "epochs": "epoch num-epochs num-train-epochs max-epochs",
    "eps": "adam-eps adam-epsilon",
    "final": "min-lr-frac learning-rate-decay-frac",
    "hidden-size": "n-embd d-model",
    "init": "init-from",
    "keep-last": "save-total-limit",
    "lr": "learning-rate",
    "max-seq-len": "n-positions max-position-embeddings",
    "max-tokens": "max-new-tokens",
    "micro-batch": "micro-batch-size device-batch-size per-device-train-batch-size",
    "num-heads": "n-head num-attention-heads",
    "num-layers": "n-layer num-hidden-layers",
    "out": "out-dir output-dir",
    "patience": "early-stopping-patience",
    "prompt": "start",
    "ranks": "gpus num-gpus nproc-per-node",
    "recompute": "activation-checkpointing",
    "save-every": "save-interval save-steps",
    "seq-len": "seq-length sequence-length",
    "steps": "max-steps max-iters num-iterations train-iters",
    "tokens": "train-tokens max-train-tokens",
    "train": "input-bin",
    "val": "input-val-bin",
    "val-every": "eval-interval eval-steps val-loss-every",
    "wandb": "wandb-project",
    "warmup": "warmup-steps warmup-iters lr-warmup-iters warmup-ratio warmup-fraction lr-warmup-fraction",
    "zero": "zero-stage",
}
ALIASES = {name: ours for ours, names in SAME.items() for name in names.split()}

_HINTS = {  # hint: names
    "--ranks (how many in all)": "world-size nprocs num-processes",
    "--rank (this one's number), with --ranks-per-machine": "local-rank node-rank process-rank",
    "--ranks-per-machine; docs/distributed.md has every way to start several machines": "nnodes num-nodes num-machines",
    "--rendezvous HOST:PORT": "master-addr master-port rdzv-endpoint main-process-ip",
    "--zero": "strategy distributed-strategy sharding-strategy",
    "--micro-batch (sequences at a time) or --batch-tokens (tokens in a step)": "batch-size global-batch-size",
    "--batch-tokens, a multiple of --micro-batch x --seq-len": "gradient-accumulation-steps grad-accum-steps",
    "--seq-len (tokens in a training sequence) or --max-seq-len (longest)": "block-size context-length n-ctx",
    "--backend cpu or --backend cuda": "device gpu cpu cuda use-cuda use-gpu",
    "--dtype bf16, tf32 or f32; there is no float16": "fp16 bf16 tf32 fp32 half amp precision mixed-precision",
    "--final, as a fraction of --lr": "min-lr",
    "--warmup, in steps or as a fraction of them": "warmup-tokens",
    "--cooldown, of --schedule wsd": "lr-wsd-decay-iters cooldown-steps cooldown-frac warmdown-iters",
    "--schedule cosine, linear, constant, wsd and others": "lr-scheduler lr-scheduler-type scheduler lr-decay-style",
    "--optimizer NAME (--help lists them)": "optim optimizer-type opt",
    "leave it out: there is nothing to compile, the kernels are hand-written": "compile torch-compile",
    "leave it out: every step is in log.jsonl": "log-interval logging-steps log-every log-every-n-steps",
    "--ranks, one a GPU; --zero says what they divide": "ddp fsdp devices",
    "--train FOLDER, which handgrad data makes": "dataset data data-dir data-path train-file tokenizer",
    "--preset (named sizes) or --init (a model on disk)": "model model-name model-type model-name-or-path arch",
    "--keep-best, and then RUN/best": "load-best-model-at-end save-best-model metric-for-best-model",
    "--resume RUN": "resume-from resume-from-checkpoint load ckpt checkpoint load-checkpoint",
    "--val-tokens, in tokens": "eval-iters val-max-steps eval-batches limit-val-batches",
    "--wandb PROJECT or --tensorboard": "wandb-log report-to",
    "handgrad eval RUN, handgrad generate RUN": "eval-only inference-only",
    "repeat the command with another --seed": "num-samples num-return-sequences n-samples",
}
HINTS = {name: hint for hint, names in _HINTS.items() for name in names.split()}


def hint_for(flag: str, known: Collection[str], verb: str) -> str:
    """The hint for a flag, such as "--block-size", that the verb does not have; known: its flags."""
    last = flag.lstrip("-").rpartition(".")[2]
    hint = HINTS.get(last.removeprefix("no-"), "")
    if hint and all(named in known for named in re.findall(r"--[a-z-]+", hint)):
        return hint
    is_off = flag.startswith("--no-")  # --no-data.shuffle is --no-shuffle
    name = "no-" * is_off + last.removeprefix("no-")
    near = difflib.get_close_matches(f"--{name}", known, 1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else f"handgrad {verb} --help"


def place_of(word: str, verb: str) -> str:
    """The flag that a word without one was meant for, with the word; empty if that cannot be told."""
    path = Path(word)
    if verb == "generate":
        return f"--prompt {quote(word)}"
    if verb != "train" or word.startswith("-"):
        return ""
    if path.suffix in (".json", ".yaml", ".yml", ".toml"):
        return f"--config {quote(word)}"
    if os.path.exists(path / "log.jsonl"):
        return f"--resume {quote(word)}"
    if os.path.isdir(path) or path.suffix == ".bin":
        return f"--train {quote(word)}"
    return f"--preset {word}" if word in preset_names() else ""
