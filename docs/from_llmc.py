"""Writes docs/from-llmc.md: llm.c's flags and pitfalls, and handgrad's counterparts.

    python docs/from_llmc.py

The statements about llm.c are in this file. Names, meanings and defaults of handgrad's flags come from its code; a flag
that does not exist raises KeyError. tests/test_parity.py compares the page with this script's output.
"""

import ast
from dataclasses import fields
from inspect import getsource
from pathlib import Path

from handgrad.train import config

PAGE = Path(__file__).with_name("from-llmc.md")

# flag of train_gpt2.cu, its default, handgrad's flags, the difference
FLAGS = [
    ("-i", "tinyshakespeare", "train", "also a folder written by `handgrad data`, with its validation split"),
    ("-j", "tinyshakespeare", "val", ""),
    (
        "-e",
        "gpt2_124M_bf16.bin",
        "preset depth num_layers num_heads hidden_size max_seq_len vocab_size init",
        "the same descriptors (`d12`, `gpt3:c768`), or any size by separate flags; `--init llmc` draws the "
        "weights that llm.c draws for a descriptor, `--init FILE.bin` reads those of a file",
    ),
    ("-o", "none", "out", "every run has a folder"),
    ("-lg", "-1", "telemetry_every", "the GPU that the run uses, not GPU 0; also in the log"),
    ("-n", "0", "save_every", "also after the last step, as in llm.c. A thread writes it while training continues"),
    ("-nk", "0", "keep_last", "old checkpoints are deleted only after the new one is complete"),
    ("-nm", "0", "keep_every", "must be a multiple of --save-every"),
    (
        "-y",
        "0",
        "resume",
        "`-y 1` is `--resume auto`; also with another micro-batch or batch size, from the next unread token",
    ),
    ("-b", "4", "micro_batch", ""),
    ("-t", "1024", "seq_len", ""),
    ("-d", "B T", "batch_tokens", "in tokens, as in llm.c"),
    ("-x", "-1", "steps", "`-x -1` is `--steps 0`: one pass over the data"),
    (
        "-k",
        "cosine",
        "schedule",
        "llm.c's four, step for step, and four more; by default linear and wsd end at 0, cosine at 0.1 of the peak. constant warms up, too (`--warmup 0`: as in llm.c)",
    ),
    ("-l", "3e-4", "lr", ""),
    ("-u", "0", "warmup", ""),
    ("-q", "1.0", "final", ""),
    ("-c", "0.0", "weight_decay", "on matrices and embeddings, as in llm.c"),
    ("-sl", "0", "skip_loss_z", "checkpoints contain the window of 128 values"),
    ("-sg", "0", "skip_grad_z", "as for -sl"),
    ("-v", "20", "val_every", "0: only after the last step"),
    ("-m", "20 batches", "val_tokens", "in tokens, so that the loss depends on neither B nor ranks; `-m -1` is 0"),
    ("-s", "20", "sample_every", "also after the last step"),
    ("-g", "64", "sample_tokens prompt", "with a key/value cache, up to the model's max_seq_len"),
    ("-h", "0", "hellaswag eval_every", "takes the file's path; no padding to T"),
    ("-a", "0", "overfit", "the first batch of the training data; in llm.c, of the validation data"),
    ("-f", "1", "dtype", "`tf32`, `f32` or `bf16`, at run time, not at compile time"),
    ("-w", "1", "master_weights", "a float32 stored as its bf16 value and the 16 low bits: 4 bytes, 6 in llm.c"),
    (
        "-ge",
        "0",
        "",
        "automatic: fused into the GEMM if its algorithm supports it; `--deterministic` never fuses",
    ),
    ("-z", "0", "zero", "0 and 1 are llm.c's (docs/distributed.md)"),
    ("-r", "1", "recompute", "0 is `none`, 1 `act`, 2 `act_norm`; `block` keeps only the inputs of blocks"),
    (
        "-pn",
        "1",
        "ranks",
        "without --rank it starts all ranks on this machine (`--gpus 8`), with no mpirun; ranks that mpirun, Slurm or "
        "torchrun has started are recognised without it",
    ),
    ("-pr", "0", "rank", "only where each rank is started by a command of its own"),
    ("-pg", "8", "ranks_per_machine", ""),
    (
        "-pi",
        "mpi",
        "rendezvous",
        "`tcp` is `HOST:PORT`, `fs` a file; `mpi` needs none on one machine (its help calls it -pm)",
    ),
    ("-ps", "", "rendezvous", "the HOST of `HOST:PORT`: the machine of rank 0"),
    ("-pf", "", "rendezvous", "a file, not a folder (its help calls it -pp)"),
]

# constants of train_gpt2.cu: name, value, handgrad's flags
FIXED = [
    ("AdamW's betas", "0.9, 0.95", "beta1 beta2"),
    ("AdamW's epsilon", "1e-8", "eps"),
    ("gradient clipping", "1.0", "clip"),
    ("seeds", "42, 1337, 13371337", "seed init"),
    ("updates skipped in a row", "no limit", "max_skipped"),
    ("log", "main.log", "tensorboard wandb"),
]

# flags of train_gpt2.py, also of the other programs that have them: handgrad's
OTHERS = [
    ("--input_bin, --input_val_bin, --output_dir", "train val out"),
    ("--model", "preset"),
    ("--batch_size, --sequence_length, --total_batch_size", "micro_batch seq_len batch_tokens"),
    ("--num_iterations", "steps"),
    ("--learning_rate, --warmup_iters, --learning_rate_decay_frac", "lr warmup final"),
    ("--weight_decay, --grad_clip", "weight_decay clip"),
    ("--val_loss_every, --val_max_steps, --sample_every", "val_every val_tokens sample_every"),
    ("--overfit_single_batch", "overfit"),
    ("--tensorcores, --dtype", "dtype"),
    ("--device", "backend"),
    ("--zero_stage", "zero"),
]

PITFALLS = [
    (
        "T1",
        "the Makefile passes no GPU architecture",
        "nothing to pass: NVRTC compiles the kernels for the installed GPU at the first start; `handgrad doctor` prints its architecture",
    ),
    (
        "T2",
        "help and parser disagree, unknown letters are accepted",
        "both come from one dataclass; an unknown flag is an error that suggests the closest flag",
    ),
    (
        "T3",
        "the quick start aborts on 8 GPUs: a validation shard is too short",
        "a shard needs seq_len + 1 tokens; the last validation batch is padded with ignored targets",
    ),
    (
        "T4",
        "the all-gather of sharded weights does not wait for AdamW",
        "the host derives every wait from the memory that calls touch (core/streams.py); a test delays each collective "
        "as far as it allows and compares bits",
    ),
    (
        "T5",
        "counts for NCCL are four times too large",
        "a count is the number of elements of a tensor, next to its dtype",
    ),
    ("T6", "gpt3:c5140, the 13B, always aborts", "`gpt3:c5140` has 5120 channels: 40 heads of 128"),
    (
        "T7",
        "shards over 2 GiB cannot be read",
        "shards are read by pread with 64-bit offsets; the file size determines the count, and the header must agree with it",
    ),
    (
        "T8",
        "resuming aborts if shards differ in size",
        "a batch is a function of seed and position. The position counts tokens, so micro-batch, batch size and ranks "
        "may change, and no window of an epoch is read twice or skipped. With another seq_len the rest of the epoch is "
        "cut and shuffled again, so some of its tokens repeat and some are skipped. --overfit repeats one batch",
    ),
    (
        "T9",
        "a non-finite loss still updates the weights",
        "the device skips the update if the gradient norm is not finite, which a non-finite loss implies; more than "
        "--max-skipped in a row end the run",
    ),
    (
        "T10",
        "a recipe states a time that would need 121 % of the hardware's peak",
        "times in `runs/` are tokens divided by a measured rate; a test recomputes them",
    ),
    ("T11", "the README's sweep example is outdated", "tests run the README's commands and the recipes"),
    (
        "T12",
        "the restart loop waits for a file whose name contains a fixed step",
        "`runs/until_done.sh` goes by the exit code: 0 done, 2 a user error that would recur, 130 Ctrl-C; else it restarts",
    ),
    (
        "T13",
        "two of three test programs return 0 even if they fail",
        "every check is a pytest test; mutations show that the safety tests can fail",
    ),
]


def meanings() -> dict[str, tuple[str, object]]:
    """Returns {flag with underscores and without dashes, such as "save_every": (its text in one line, its default)}."""
    found = {}
    for group in fields(config.Config):
        kind = group.default_factory
        texts = {}
        body = ast.parse(getsource(kind)).body[0].body
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[field.target.id] = text.value.value.replace("<", "&lt;")
        for field in fields(kind):
            found[field.name] = " ".join(texts[field.name].split()), field.default
    return found


def ours(names: str, known: dict[str, tuple[str, object]]) -> str:
    """Returns flags as typed on the command line. Raises KeyError for one that does not exist."""
    return ", ".join(f"`--{name.replace('_', '-')}`" for name in names.split() if known[name])


def shown(default: object) -> str:
    """Returns a default as a table cell."""
    return "-" if default in ("", None) else f"`{default}`"


def page() -> str:
    """Returns the text of from-llmc.md."""
    known = meanings()
    lines = [
        "# From llm.c",
        "",
        "Generated from the code by `python docs/from_llmc.py`; do not edit.",
        "",
        "`handgrad convert` converts a model of llm.c; its token shards need no conversion; a run writes llm.c's `main.log`",
        "next to its own log.",
        "",
        "## train_gpt2.cu",
        "",
        "| llm.c | its default | handgrad | default | what it is | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for flag, default, names, difference in FLAGS:
        first = names.split()[0] if names else None
        text, value = known[first] if first else ("", "")
        row = [
            f"`{flag}`",
            shown(default),
            ours(names, known) or "-",
            shown(value),
            text,
            difference,
        ]
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "Constants of train_gpt2.cu that are flags of handgrad:",
        "",
        "| llm.c | handgrad | defaults |",
        "| --- | --- | --- |",
    ]
    for name, value, names in FIXED:
        defaults = ", ".join(shown(known[name][1]) for name in names.split())
        lines.append(f"| {name}: {value} | {ours(names, known)} | {defaults} |")
    lines += [
        "",
        "## train_gpt2.py, train_gpt2_fp32.cu, train_gpt2.c",
        "",
        "train_gpt2_fp32.cu has the flags above, train_gpt2.c has none. Flags of train_gpt2.py:",
        "",
        "| train_gpt2.py | handgrad |",
        "| --- | --- |",
        *(f"| `{theirs}` | {ours(names, known)} |" for theirs, names in OTHERS),
        "| `--inference_only` | `handgrad generate`, `handgrad eval` |",
        "| `--compile`, `--flash` | always |",
        "| `--write_tensors` | `handgrad convert` |",
        "",
        "Other programs: `handgrad profile` replaces profile_gpt2.cu, `handgrad ops bench` the benchmarks of dev/cuda,",
        "`handgrad ops check`, `handgrad ops grad` and `pytest` the test programs, `handgrad convert` export_hf.py.",
        "",
        "## Pitfalls",
        "",
        "| | in llm.c | in handgrad |",
        "| --- | --- | --- |",
        *(f"| {number} | {theirs} | {here} |" for number, theirs, here in PITFALLS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
