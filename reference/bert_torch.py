"""BERT with masked tokens in plain PyTorch: the baseline for handgrad's speed. The package does not import this file.

Norms come after the residual sum, GELU is the erf form, and the head reads the predicted rows alone. The loss is the
mean over them in nats.
"""

import torch
from torch import nn
from torch.nn import functional as F

SIZES = {"bert-base": (12, 12, 768, 3072, 30592, 512)}  # layers, heads, width, MLP, padded vocabulary, positions


class Block(nn.Module):
    def __init__(self, hidden, heads, mlp):
        super().__init__()
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, mlp), nn.Linear(mlp, hidden)
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden, 1e-12), nn.LayerNorm(hidden, 1e-12)
        self.heads = heads

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = self.ln_1(x + self.out(y))
        return self.ln_2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """A model of SIZES. `bf16` runs the forward under autocast. Call `model.compile()` for speed."""

    def __init__(self, name, *, bf16=False):
        super().__init__()
        layers, heads, hidden, mlp, vocab, positions = SIZES[name]
        self.bf16 = bf16
        self.wte, self.types = nn.Embedding(vocab, hidden), nn.Embedding(2, hidden)
        self.wpe = nn.Embedding(positions, hidden)
        self.ln = nn.LayerNorm(hidden, 1e-12)
        self.h = nn.ModuleList(Block(hidden, heads, mlp) for _ in range(layers))
        self.dense, self.head_ln = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, 1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab))
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, ids, rows, targets):
        """Returns None and the mean loss. ids: (B, T) int64;  rows, targets: (M,) int64, rows of (B T) to predict."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.ln(self.wte(ids) + self.wpe.weight[: ids.shape[1]] + self.types.weight[0])
            for block in self.h:
                x = block(x)
            x = self.head_ln(F.gelu(self.dense(x.flatten(0, 1)[rows])))
            return None, F.cross_entropy(F.linear(x, self.wte.weight, self.bias), targets)
