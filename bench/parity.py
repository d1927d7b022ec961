"""Decoders against transformers and PyTorch on the CPU, in float32, at sizes that divide nothing evenly.

    python bench/parity.py      prints the table: relative errors of logits and of the worst gradient, and the largest
                                difference of a loss in ten steps of AdamW

A model of transformers is saved as a folder and read as any model on disk; its gradients are read in the same way, so
names and layouts are tested as well.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import handgrad as hg
from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.program import Program
from handgrad.infer.load import open_source
from handgrad.io.format import Format
from handgrad.models import Model, declare, forward_logits
from handgrad.optim import schedules

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "reference"))
import gpt2_torch  # noqa: E402

VOCAB, SEQUENCES, STEPS = 97, 3, 10
OPTIM: dict[str, Any] = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0)
LR = schedules.cosine(6e-4, warmup=3, steps=STEPS)
THREE = {  # Llama 3's rope in a model whose texts are as short as these
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA: dict[str, Any] = {  # a window shorter than the text, a full layer, and a scale that is not the width's
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
}


@dataclass(frozen=True)
class Case:
    """A model of transformers at a small size, and the tokens of a text."""

    config: type
    sizes: dict[str, Any]
    seq_len: int


def small(heads: int, kv_heads: int, head: int, hidden: int, mlp: int, **more: Any) -> dict[str, Any]:
    """Sizes as the configs of the Llama kind name them."""
    return dict(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )


def neox(heads: int, hidden: int, mlp: int, **more: Any) -> dict[str, Any]:
    """Sizes as the config of a GPT-NeoX names them."""
    sizes = small(heads, heads, hidden // heads, hidden, mlp, **more)
    return {name: value for name, value in sizes.items() if name not in ("num_key_value_heads", "head_dim")}


CASES = {
    "llama": Case(transformers.LlamaConfig, small(3, 1, 20, 60, 77), 37),
    "llama untied": Case(transformers.LlamaConfig, small(5, 5, 14, 35, 50, tie_word_embeddings=False), 70),
    "llama tied, rope of Llama 3": Case(
        transformers.LlamaConfig, small(4, 2, 16, 64, 96, tie_word_embeddings=True, rope_parameters=THREE), 65
    ),
    "mistral, window": Case(transformers.MistralConfig, small(4, 2, 16, 64, 96, sliding_window=9), 41),
    "mistral, no window": Case(transformers.MistralConfig, small(3, 3, 20, 60, 77, sliding_window=None), 33),
    "qwen2": Case(transformers.Qwen2Config, small(6, 2, 10, 60, 77), 37),
    "qwen2 tied": Case(transformers.Qwen2Config, small(4, 1, 16, 64, 50, tie_word_embeddings=True), 66),
    "qwen3": Case(transformers.Qwen3Config, small(3, 1, 24, 60, 77, tie_word_embeddings=True), 37),
    "qwen3 untied": Case(transformers.Qwen3Config, small(4, 2, 10, 36, 50), 70),
    "gemma3": Case(transformers.Gemma3TextConfig, small(4, 1, 20, 60, 77, **GEMMA), 41),
    "gemma3 untied": Case(
        transformers.Gemma3TextConfig, small(3, 3, 14, 36, 50, **GEMMA | {"tie_word_embeddings": False}), 66
    ),
    "gpt_neox": Case(transformers.GPTNeoXConfig, neox(3, 72, 77), 37),
    "gpt_neox tied, sequential, GELU by tanh": Case(
        transformers.GPTNeoXConfig,
        neox(5, 70, 50, use_parallel_residual=False, hidden_act="gelu_new", tie_word_embeddings=True,
             rope_parameters={"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.3}),
        70,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """errors: relative, of "logits" and of each gradient;  ours, theirs: losses of the steps."""

    model: Model
    errors: dict[str, float]
    ours: list[float]
    theirs: list[float]

    @property
    def worst_gradient(self) -> tuple[float, str]:
        """The largest relative error, and whose it is."""
        return max((error, name) for name, error in self.errors.items() if name != "logits")

    @property
    def loss(self) -> float:
        """The largest difference of a loss."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))


class WithLoss(torch.nn.Module):
    """A causal language model of transformers with the interface of reference/gpt2_torch.py."""

    def __init__(self, case: Case):
        super().__init__()
        torch.manual_seed(0)
        config = case.config(**case.sizes)
        config._attn_implementation = "eager"
        self.inner = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # biases of 0 and norms of 1 would hide mistakes
            for p in self.parameters():
                p += 0.05 * torch.randn_like(p)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, mean loss)."""
        logits = self.inner(ids, use_cache=False).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tensors(inner: Any, gradients: bool = False) -> tuple[Model, dict[str, np.ndarray]]:
    """Our model of a transformers model, and its weights or gradients by our names, read from a folder."""
    kept = [p.data for p in inner.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        if gradients:
            for p in inner.parameters():
                p.data = p.grad
        transformers.logging.disable_progress_bar()
        inner.save_pretrained(folder)
        for p, data in zip(inner.parameters(), kept, strict=True):
            p.data = data
        source = open_source(folder)
        form = Format(**source.model.hugging_face)
        rows = {name: info.tensor.shape[0] for name, info in declare(source.model).params.items()}
        found = {name: np.array(source.weights.tensor(name, "f32", n)) for name, n in rows.items()}
        for name in found:
            if gradients and re.fullmatch(form.shifted, name):  # a weight that is theirs plus 1: not so its gradient
                found[name] -= 1
        return source.model, found


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want| of a whole tensor."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def logits_of(model: Model, params: dict[str, np.ndarray], ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits (rows, V) float32 of handgrad for these weights."""
    p = Program(DTYPES[dtype])
    forward_logits(p, model, *ids.shape)
    backend = open_backend("cpu")
    arena = backend.alloc(backend.plan(p))
    for name, info in p.params.items():
        arena.write_part("param", info.tensor, params[name])
    arena.write(p.inputs["ids"], ids.reshape(-1))
    backend.bind(p, arena).run()
    return np.array(arena.read(p.outputs["logits"])[:, : model.vocab_size], np.float32)


def compare(case: Case, shards: str, backend: str = "cpu", dtype: str = "f32") -> Found:
    """Both on the same tokens: logits and gradients of the first step, and the losses of all."""
    theirs = WithLoss(case)
    model, params = tensors(theirs.inner)
    data = hg.data.tokens(shards, case.seq_len, SEQUENCES * case.seq_len, vocab_size=VOCAB)
    batches = [data.batch(step) for step in range(STEPS)]
    ids, targets = (torch.from_numpy(np.ascontiguousarray(batches[0][name], np.int64)) for name in ("ids", "targets"))
    logits, loss = theirs(ids, targets)
    got = logits_of(model, params, batches[0]["ids"], dtype)
    errors = {"logits": relative(got, logits.detach().flatten(0, 1).numpy())}
    loss.backward()
    _, want = tensors(theirs.inner, gradients=True)
    execution, precision = hg.Execution(SEQUENCES, backend=backend), hg.Precision(dtype)
    run = hg.Trainer(model, hg.optim.AdamW(**OPTIM), data, execution=execution, precision=precision)
    run.load_params(params)
    ours = [run.step(1, LR(1)).loss]
    found = run.grads()
    errors |= {name: relative(found[name], g) for name, g in want.items()}
    ours += [run.step(step, LR(step)).loss for step in range(2, STEPS + 1)]
    steps = gpt2_torch.train_steps(theirs, [(b["ids"], b["targets"]) for b in batches], LR, **OPTIM)
    return Found(model, errors, ours, steps)


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).zipf(1.3, 20_000) % VOCAB  # uneven, as in texts: the loss falls
        hg.data.write_shard(f"{folder}/a.bin", [ids], hg.data.id_dtype(VOCAB))
        print(f"float32, transformers {transformers.__version__}, PyTorch {torch.__version__}, relative errors\n")
        print(f"{'':40} {'logits':>8} {'worst gradient':>34} {'losses of 10 steps':>20}")
        for name, case in CASES.items():
            found = compare(case, f"{folder}/a.bin")
            error, whose = found.worst_gradient
            print(f"{name:40} {found.errors['logits']:8.1e} {error:8.1e} {whose:>25} {found.loss:20.1e}")


if __name__ == "__main__":
    main()
