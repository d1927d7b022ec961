"""Llama, Qwen2 and Qwen3 in plain PyTorch: the baseline for handgrad's speed. Nothing in the package imports this file.

Parameters have handgrad's names, shapes and layout: attn.qkv.weight holds q, k and v, mlp.gate_up.weight both halves of
the MLP. The loss is the mean over tokens in nats.
"""

import torch
from torch import nn
from torch.nn import functional as F

# layers, heads, key/value heads, width of a head, hidden size, MLP size, vocabulary, theta, eps, bias of q, k and v
SIZES = {
    "smollm2-135m": (30, 9, 3, 64, 576, 1536, 49152, 1e5, 1e-5, False),
    "llama3.2-1b": (16, 32, 8, 64, 2048, 8192, 128256, 5e5, 1e-5, False),
    "qwen2.5-0.5b": (24, 14, 2, 64, 896, 4864, 151936, 1e6, 1e-6, True),
    "qwen2.5-1.5b": (28, 12, 2, 128, 1536, 8960, 151936, 1e6, 1e-6, True),
}


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """x (B, H, T, D) turned by its positions; columns i and i + D/2 are a pair."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, head, bias):
        super().__init__()
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * head, bias=bias)
        self.out = nn.Linear(heads * head, hidden, bias=False)
        self.parts = [heads, kv_heads, kv_heads]
        self.head = head

    def forward(self, x, cos, sin):  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head).transpose(1, 2)
        q, k, v = qkv.split(self.parts, 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, hidden, size):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * size, bias=False)
        self.down = nn.Linear(size, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, hidden, heads, kv_heads, head, mlp, eps, bias):
        super().__init__()
        self.ln_1 = RMSNorm(hidden, eps)
        self.attn = Attention(hidden, heads, kv_heads, head, bias)
        self.ln_2 = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, mlp)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.ln_1(x), cos, sin)
        return x + self.mlp(self.ln_2(x))


class Llama(nn.Module):
    """A model of SIZES with a tied head. `bf16` runs the forward under autocast. Call `model.compile()` for speed."""

    def __init__(self, name, max_seq_len, *, bf16=False):
        super().__init__()
        layers, heads, kv_heads, head, hidden, mlp, vocab, theta, eps, bias = SIZES[name]
        self.bf16 = bf16
        self.wte = nn.Embedding(vocab, hidden)
        self.h = nn.ModuleList(Block(hidden, heads, kv_heads, head, mlp, eps, bias) for _ in range(layers))
        self.ln_f = RMSNorm(hidden, eps)
        angles = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, head, 2) / head)
        kind = torch.bfloat16 if bf16 else torch.float32
        self.register_buffer("cos", angles.cos().to(kind), persistent=False)
        self.register_buffer("sin", angles.sin().to(kind), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, ids, targets=None):
        """Returns logits (B, T, V) and the mean loss, or None without targets. ids, targets: (B, T) int64."""
        T = ids.shape[1]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.wte(ids)
            for block in self.h:
                x = block(x, self.cos[:T], self.sin[:T])
            logits = F.linear(self.ln_f(x), self.wte.weight)
            loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss
