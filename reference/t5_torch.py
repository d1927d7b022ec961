"""T5 1.0 with span corruption in plain PyTorch: the baseline for handgrad's speed. The package does not import this
file.

Attention adds a learned bias for the distance between two tokens, one table for each stack. The loss is the mean over
targets in nats.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

SIZES = {"t5-base": (12, 12, 64, 768, 3072, 32128, 512)}  # layers, heads, width of a head, width, MLP, rows, source
BUCKETS, FARTHEST = 32, 128


def buckets(queries, keys, bidirectional):
    """The bucket of every distance between a query and a key, (queries, keys): near ones apart, far ones by log."""
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None]
    count, first = BUCKETS, 0
    if bidirectional:
        count //= 2
        first = count * (distance > 0)
    distance = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = count // 2
    far = (distance.clamp(min=1) / exact).log() / math.log(FARTHEST / exact) * (count - exact)
    return first + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=count - 1))


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    """Of x to itself, or to the rows of a memory."""

    def __init__(self, hidden, heads, head, *, cross=False):
        super().__init__()
        A = heads * head
        self.cross, self.heads = cross, heads
        if cross:
            self.q, self.kv = nn.Linear(hidden, A, bias=False), nn.Linear(hidden, 2 * A, bias=False)
        else:
            self.qkv = nn.Linear(hidden, 3 * A, bias=False)
        self.out = nn.Linear(A, hidden, bias=False)

    def forward(self, x, memory=None, bias=None):  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        if self.cross:
            q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)
            k, v = self.kv(memory).view(B, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, hidden, heads, head, mlp, *, decodes):
        super().__init__()
        self.ln_1, self.attn = RMSNorm(hidden), Attention(hidden, heads, head)
        if decodes:
            self.ln_2, self.cross = RMSNorm(hidden), Attention(hidden, heads, head, cross=True)
        self.ln_3 = RMSNorm(hidden)
        self.up, self.down = nn.Linear(hidden, mlp, bias=False), nn.Linear(mlp, hidden, bias=False)
        self.decodes = decodes

    def forward(self, x, bias, memory=None):
        x = x + self.attn(self.ln_1(x), bias=bias)
        if self.decodes:
            x = x + self.cross(self.ln_2(x), memory)
        return x + self.down(F.relu(self.up(self.ln_3(x))))


class Stack(nn.Module):
    def __init__(self, layers, hidden, heads, head, mlp, *, decodes):
        super().__init__()
        self.h = nn.ModuleList(Block(hidden, heads, head, mlp, decodes=decodes) for _ in range(layers))
        self.rel, self.ln_f, self.decodes = nn.Embedding(BUCKETS, heads), RMSNorm(hidden), decodes

    def forward(self, x, distances, memory=None):
        bias = self.rel(distances).permute(2, 0, 1)[None].to(torch.bfloat16 if torch.is_autocast_enabled() else x.dtype)
        if self.decodes:
            hidden = torch.ones(bias.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(hidden, -torch.inf)
        bias = bias.expand(len(x), -1, -1, -1)
        for block in self.h:
            x = block(x, bias, memory)
        return self.ln_f(x)


class T5(nn.Module):
    """A model of SIZES with a tied head. `bf16` runs the forward under autocast. Call `model.compile()` for speed."""

    def __init__(self, name, seq_len, *, bf16=False):
        super().__init__()
        layers, heads, head, hidden, mlp, vocab, source = SIZES[name]
        self.bf16, self.wte = bf16, nn.Embedding(vocab, hidden)
        self.encoder = Stack(layers, hidden, heads, head, mlp, decodes=False)
        self.decoder = Stack(layers, hidden, heads, head, mlp, decodes=True)
        self.register_buffer("of_source", buckets(source, source, True), persistent=False)
        self.register_buffer("of_targets", buckets(seq_len, seq_len, False), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, source, ids, targets):
        """Returns None and the mean loss. source: (B, S), ids and targets: (B, T), int64."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            memory = self.encoder(self.wte(source), self.of_source)
            x = self.decoder(self.wte(ids), self.of_targets, memory)
            logits = F.linear(x * x.shape[-1] ** -0.5, self.wte.weight)
            return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
