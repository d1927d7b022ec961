"""transformers' GPT2LMHeadModel with random weights: logits, loss, every gradient, and ten training steps."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from handgrad.models import GPT2

transformers = pytest.importorskip("transformers")
SPEC = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("test_models.py"))
parity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parity)

ODD = [  # sizes that no kernel likes
    GPT2(vocab_size=97, max_seq_len=37, num_layers=2, num_heads=3, hidden_size=60),
    GPT2(vocab_size=1009, max_seq_len=70, num_layers=3, num_heads=5, hidden_size=35),
]


class Judge(torch.nn.Module):
    """Their model behind the interface of reference/gpt2_torch.py: (ids, targets) -> (logits, mean loss)."""

    def __init__(self, model):
        super().__init__()
        config = transformers.GPT2Config(vocab_size=model.vocab_size, n_positions=model.max_seq_len, n_layer=model.num_layers,
                                         n_head=model.num_heads, n_embd=model.hidden_size, attn_pdrop=0.0, resid_pdrop=0.0,
                                         embd_pdrop=0.0)
        torch.manual_seed(0)
        self.inner = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():  # biases and norms start at 0 and 1, where mistakes hide
            for p in self.parameters():
                p += 0.05 * torch.randn_like(p)

    def forward(self, ids, targets):
        logits = self.inner(ids).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def to_ours(model, tensors):
    """Their names and layout to ours: Conv1D stores (in, out), and our vocabulary is padded with zero rows."""
    ours = {}
    for name, w in tensors.items():
        name = name.removeprefix("inner.transformer.")
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.T
        if name == "wte.weight":
            w = np.pad(w, ((0, model.vocab_padded - model.vocab_size), (0, 0)))
        ours[name] = np.array(w)
    return ours


@pytest.mark.parametrize("model", ODD, ids=lambda m: f"V{m.vocab_size}-H{m.num_heads}x{m.hidden_size // m.num_heads}")
def test_random_gpt2_equals_transformers(model, shards):
    errors, ours, theirs = parity.compare(model, Judge(model), lambda t: to_ours(model, t), shards, seq_len=model.max_seq_len)
    parity.report(f"transformers {transformers.__version__}, {model}", errors, ours, theirs)
    assert max(errors.values()) <= 1e-4
    assert np.abs(np.array(ours) - theirs).max() <= 1e-4
