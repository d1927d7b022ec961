"""Writes docs/from-llmc.md: llm.c's flags and traps, and what handgrad has in their place.

    python docs/from_llmc.py

What is said of llm.c is written here; names, meanings and defaults of handgrad's flags are taken from its code, and a
flag that does not exist stops the script. tests/test_parity.py runs it and compares.
"""

import ast
from dataclasses import fields
from inspect import getsource
from pathlib import Path

from handgrad.train import config

PAGE = Path(__file__).with_name("from-llmc.md")

# flag of train_gpt2.cu, its default, handgrad's flags, the difference
FLAGS = [
    ("-i", "tinyshakespeare", "data.train", "also a folder made by `handgrad data`, with its validation split"),
    ("-j", "tinyshakespeare", "data.val", ""),
    (
        "-e",
        "gpt2_124M_bf16.bin",
        "model.preset model.depth model.num_layers model.num_heads model.hidden_size "
        "model.max_seq_len model.vocab_size model.init",
        "descriptors as they are (`d12`, `gpt3:c768`), any size by "
        "its own flags; `--model.init llmc` starts from the weights that a descriptor starts from there, "
        "`--model.init FILE.bin` from those of a file",
    ),
    ("-o", "none", "run.out", "there always is a run folder"),
    ("-lg", "-1", "run.telemetry_every", "the card that the run is on, not card 0; also into the log"),
    ("-n", "0", "run.save_every", "the last step too, as there. Written beside the steps that follow"),
    ("-nk", "0", "run.keep_last", "pruned only when the new one is complete"),
    ("-nm", "0", "run.keep_every", "must be a multiple of --run.save-every"),
    (
        "-y",
        "0",
        "run.resume",
        "`-y 1` is `--run.resume auto`; also with another micro-batch or batch: the next token "
        "is the one after the last",
    ),
    ("-b", "4", "run.micro_batch", ""),
    ("-t", "1024", "data.seq_len", ""),
    ("-d", "B T", "data.batch_tokens", "tokens, as there"),
    ("-x", "-1", "run.steps", "`-x -1` is `--run.steps 0`: one pass over the data"),
    ("-k", "cosine", "optim.schedule", "the same four; linear and wsd end at 0, cosine at 0.1; constant has a warm-up"),
    ("-l", "3e-4", "optim.lr", ""),
    ("-u", "0", "optim.warmup", ""),
    ("-q", "1.0", "optim.final", ""),
    ("-c", "0.0", "optim.weight_decay", "matrices and embeddings, as there"),
    ("-sl", "0", "run.skip_loss_z", "the window of 128 is part of a checkpoint"),
    ("-sg", "0", "run.skip_grad_z", "the same"),
    ("-v", "20", "run.val_every", "0 is never"),
    ("-m", "20 batches", "run.val_tokens", "tokens, so that the loss does not depend on B and ranks; `-m -1` is 0"),
    ("-s", "20", "run.sample_every", "the last step too"),
    ("-g", "64", "run.sample_tokens run.prompt", "with a key/value cache, up to the model's longest"),
    ("-h", "0", "run.hellaswag run.eval_every", "the file is named; no padding to T"),
    ("-a", "0", "data.overfit", "the first batch of the training data; there, of the validation data"),
    ("-f", "1", "run.dtype", "`tf32`, `f32` or `bf16`: chosen at the start, not when compiled"),
    ("-w", "1", "run.master_weights", "float32 as bf16 and the 16 bits it lacks: 4 bytes, there 6"),
    (
        "-ge",
        "0",
        "",
        "automatic: where the product can, GELU and its gradient are in it. `--run.deterministic` keeps both apart",
    ),
    ("-z", "0", "", "not yet: one process, nothing to share out"),
    ("-r", "1", "run.recompute", "0 is `none`, 1 `act`, 2 `act_norm`; `block` keeps only the blocks' inputs"),
    ("-pn", "1", "", "not yet: one process, one GPU"),
    ("-pr", "0", "", "not yet"),
    ("-pg", "8", "", "not yet"),
    ("-pi", "mpi", "", "not yet (its help calls it -pm)"),
    ("-ps", "", "", "not yet"),
    ("-pf", "", "", "not yet (its help calls it -pp)"),
]

# what train_gpt2.cu fixes: constant, its value, handgrad's flag
FIXED = [
    ("AdamW's betas", "0.9, 0.95", "optim.beta1 optim.beta2"),
    ("AdamW's epsilon", "1e-8", "optim.eps"),
    ("gradient clipping", "1.0", "optim.clip"),
    ("seeds", "42, 1337, 13371337", "run.seed model.init"),
    ("updates skipped in a row", "no limit", "run.max_skipped"),
    ("log", "main.log", "run.tensorboard run.wandb"),
]

# flags of train_gpt2.py (and of the other programs where they have them): handgrad's
OTHERS = [
    ("--input_bin, --input_val_bin, --output_dir", "data.train data.val run.out"),
    ("--model", "model.preset"),
    ("--batch_size, --sequence_length, --total_batch_size", "run.micro_batch data.seq_len data.batch_tokens"),
    ("--num_iterations", "run.steps"),
    ("--learning_rate, --warmup_iters, --learning_rate_decay_frac", "optim.lr optim.warmup optim.final"),
    ("--weight_decay, --grad_clip", "optim.weight_decay optim.clip"),
    ("--val_loss_every, --val_max_steps, --sample_every", "run.val_every run.val_tokens run.sample_every"),
    ("--overfit_single_batch", "data.overfit"),
    ("--tensorcores, --dtype", "run.dtype"),
    ("--device", "run.backend"),
]

TRAPS = [
    (
        "T1",
        "the Makefile passes no GPU architecture",
        "nothing to pass: kernels are compiled at the first start, for the very card; `handgrad doctor` says for which",
    ),
    (
        "T2",
        "help and parser disagree, unknown letters are accepted",
        "both come from one dataclass; an unknown flag is an error that names the nearest one",
    ),
    (
        "T3",
        "the quick start aborts on 8 GPUs: a validation shard is too short",
        "a shard needs seq_len + 1 tokens; the last batch of a validation is filled up with targets that do not count",
    ),
    ("T4", "the gather of sharded weights does not wait for AdamW", "weights are not sharded yet"),
    ("T5", "counts for NCCL are four times too large", "NCCL is not used yet"),
    ("T6", "gpt3:c5140, the 13B, always aborts", "40 heads of 128 are 5120, and that is what `gpt3:c5140` is here"),
    (
        "T7",
        "shards over 2 GiB cannot be read",
        "they are mapped, offsets have 64 bits, and the count is the file's size, with which the header must agree",
    ),
    (
        "T8",
        "resuming aborts where shards differ in size",
        "a batch is a function of seed and position; the position is a count of tokens, so micro-batch, batch and ranks "
        "may change, and no window of an epoch is read twice or left out. Another seq_len cuts and shuffles the rest of "
        "the epoch anew, so that some of its tokens come again and some do not come; --data.overfit reads one batch for "
        "ever",
    ),
    (
        "T9",
        "a loss that is not finite still updates the weights",
        "the update is skipped, on the device, for any gradient norm that is not finite (a loss that is not makes it so); "
        "one more than --run.max-skipped in a row ends the run",
    ),
    (
        "T10",
        "a recipe's time would be 121 % of the hardware's peak",
        "times in `runs/` are tokens over a measured rate, and a test computes them again",
    ),
    ("T11", "the README's example of a sweep is stale", "tests run the README's commands and the recipes"),
    (
        "T12",
        "the supervising loop waits for a file whose name has a fixed step in it",
        "`runs/until_done.sh` goes by the exit code: 0 is done, 2 a mistake that would be made again, 130 Ctrl-C",
    ),
    (
        "T13",
        "two of three test programs return 0 when they fail",
        "every check is a pytest test, and the safety tests have a mutation that they must notice",
    ),
]


def meanings() -> dict[str, tuple[str, object]]:
    """Flag without dashes, e.g. "run.save_every": (the text below its field, its default)."""
    found = {}
    for group in fields(config.Config):
        kind = group.default_factory
        texts = {}
        body = ast.parse(getsource(kind)).body[0].body
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[field.target.id] = text.value.value.replace("<", "&lt;")
        for field in fields(kind):
            found[f"{group.name}.{field.name}"] = texts[field.name], field.default
    return found


def ours(names: str, known: dict[str, tuple[str, object]]) -> str:
    """Flags as they are typed; raises KeyError for one that does not exist."""
    return ", ".join(f"`--{name.replace('_', '-')}`" for name in names.split() if known[name])


def shown(default: object) -> str:
    """A default in a table."""
    return "-" if default in ("", None) else f"`{default}`"


def page() -> str:
    """The text of from-llmc.md."""
    known = meanings()
    lines = [
        "# From llm.c",
        "",
        "Made by `python docs/from_llmc.py` from the code; do not edit.",
        "",
        "A model of llm.c comes over with `handgrad convert`, its token shards are read as they are, and a run writes",
        "llm.c's `main.log` beside its own log.",
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
    lines += ["", "What it fixes and handgrad does not:", "", "| llm.c | handgrad | defaults |", "| --- | --- | --- |"]
    for name, value, names in FIXED:
        defaults = ", ".join(shown(known[name][1]) for name in names.split())
        lines.append(f"| {name}: {value} | {ours(names, known)} | {defaults} |")
    lines += [
        "",
        "## train_gpt2.py, train_gpt2_fp32.cu, train_gpt2.c",
        "",
        "The second has the letters above, the third no flags. What the first calls otherwise:",
        "",
        "| train_gpt2.py | handgrad |",
        "| --- | --- |",
        *(f"| `{theirs}` | {ours(names, known)} |" for theirs, names in OTHERS),
        "| `--inference_only` | `handgrad generate`, `handgrad eval` |",
        "| `--compile`, `--flash` | always |",
        "| `--write_tensors` | `handgrad convert` |",
        "| `--zero_stage` | not yet |",
        "",
        "Other programs: profile_gpt2.cu is `handgrad profile`, dev/cuda's benchmarks are `handgrad ops bench`, the",
        "test programs `handgrad ops check`, `handgrad ops grad` and `pytest`; export_hf.py is `handgrad convert`.",
        "",
        "## Traps",
        "",
        "| | in llm.c | in handgrad |",
        "| --- | --- | --- |",
        *(f"| {number} | {theirs} | {here} |" for number, theirs, here in TRAPS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
