"""GPT-2 in plain PyTorch: the independent reference for handgrad's numbers and the baseline for its speed.

Nothing in the package imports this file. Parameters have handgrad's names, shapes and layout: c_attn.weight is (3C, C).
The loss is the mean over tokens in nats, the norms' eps is 1e-5, GELU is the tanh form, and there is no dropout.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    def __init__(self, hidden_size, num_heads, attention):
        super().__init__()
        self.c_attn = nn.Linear(hidden_size, 3 * hidden_size)
        self.c_proj = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads
        self.attention = attention

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.attention == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            o = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.c_proj(o.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.c_fc = nn.Linear(hidden_size, 4 * hidden_size)
        self.c_proj = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden_size, num_heads, attention):
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads, attention)
        self.ln_2 = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """A GPT-2 with tied head, initialised like handgrad's (same distributions, other random numbers).

    wte has `vocab_padded` rows, of which the model uses `vocab_size`; omit `vocab_padded` when you compare speed, since
    slicing costs a copy of the gradient. `attention` is "sdpa" or "eager" (explicit softmax). `bf16` runs the forward
    under autocast. Call `model.compile()` for the compiled variants; it keeps the parameter names.
    """

    def __init__(
        self,
        vocab_size,
        max_seq_len,
        num_layers,
        num_heads,
        hidden_size,
        *,
        vocab_padded=None,
        attention="sdpa",
        bf16=False,
    ):
        super().__init__()
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"[gpt2_torch] attention is 'sdpa' or 'eager', but got {attention!r}.")
        self.vocab_size = vocab_size
        self.bf16 = bf16
        self.wte = nn.Embedding(vocab_padded or vocab_size, hidden_size)
        self.wpe = nn.Embedding(max_seq_len, hidden_size)
        self.h = nn.ModuleList(Block(hidden_size, num_heads, attention) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(hidden_size)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, 0, 0.02 / (2 * num_layers) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
        with torch.no_grad():
            self.wte.weight[vocab_size:] = 0

    def forward(self, ids, targets=None):
        """Returns logits (B, T, V) and the mean loss, or None without targets. ids, targets: (B, T) int64."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
            for block in self.h:
                x = block(x)
            wte = self.wte.weight
            logits = F.linear(self.ln_f(x), wte if len(wte) == self.vocab_size else wte[: self.vocab_size])
            loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def load(self, params):
        """Copies a dictionary of numpy arrays into the parameters. All names and shapes must match."""
        self.load_state_dict({name: torch.from_numpy(np.asarray(p)) for name, p in params.items()})

    def arrays(self):
        """Returns the parameters as {name: numpy array} (copies)."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.named_parameters()}

    def gradients(self):
        """Returns the gradients of the last `loss.backward()` as {name: numpy array} (copies)."""
        return {name: p.grad.cpu().numpy().copy() for name, p in self.named_parameters()}


def adamw(model, lr, betas, eps, weight_decay):
    """Returns PyTorch's fused AdamW, which decays matrices only."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def train_step(model, optimizer, ids, targets, clip):
    """Updates the model; returns (loss, gradient norm before clipping) as tensors. ids, targets: (B, T) int64."""
    optimizer.zero_grad(set_to_none=True)
    _, loss = model(ids, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach(), norm


def train_steps(model, batches, lr, betas, eps, weight_decay, clip):
    """Trains; returns the loss of each step, before its update, as floats.

    batches: (ids, targets) pairs of integer arrays (B, T);  lr: function of the step, counted from 1.
    """
    optimizer = adamw(model, lr(1), betas, eps, weight_decay)
    device, losses = next(model.parameters()).device, []
    for step, (ids, targets) in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        ids, targets = (torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(device) for a in (ids, targets))
        losses.append(float(train_step(model, optimizer, ids, targets, clip)[0]))
    return losses
