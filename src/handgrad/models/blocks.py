"""Pieces that architectures share: functions that declare parameters where they use them and emit calls."""

from dataclasses import dataclass

from handgrad.core.dtypes import I32
from handgrad.core.params import ONES, ZEROS, normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.ops import (
    add_norm,
    attention,
    attention_decode,
    dropout,
    linear,
    lm_loss,
    lm_loss_forward_backward,
    loss_sum,
    norm,
)

Branch = tuple[Tensor, Tensor | None]  # what a norm is to add to the residual: (N, C), and a bias that it still lacks


@dataclass(frozen=True)
class Batch:
    """Input handles of one micro-batch: ids and targets (N) i32, N = batch_size * seq_len rows."""

    ids: Tensor
    targets: Tensor | None
    batch_size: int
    seq_len: int


def batch(g: Program, batch_size: int, seq_len: int) -> Batch:
    """The inputs that a model's forward reads in this mode; targets only where a loss is recorded."""
    rows = (batch_size * seq_len,)
    targets = g.input("targets", rows, I32) if g.mode in ("train", "loss") else None
    return Batch(g.input("ids", rows, I32), targets, batch_size, seq_len)


def dense(g: Program, x: Tensor, name: str, size: int, *, gelu: bool = False) -> Tensor:
    """x w^T + b (N, size), with GELU if asked; the pre-activation is kept only where a backward will read it."""
    with g.scope(name):
        w = g.param("weight", (size, x.shape[-1]), normal(0.02))
        b = g.param("bias", (size,), ZEROS)
    return g.emit(linear, x, w, b, None, gelu=gelu, keep_pre=gelu and g.mode == "train")[0]


def layer_norm(g: Program, x: Tensor, h: Branch | None, name: str, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(residual, normed): adds the pending branch h to the residual and norms the sum.

    With h None, at the start of a model, there is nothing to add: the only special case in the system.
    """
    with g.scope(name):
        w = g.param("weight", x.shape[-1:], ONES)
        b = g.param("bias", x.shape[-1:], ZEROS)
    if h is None:
        return x, g.emit(norm, x, w, b, eps=eps)[0]
    return g.emit(add_norm, x, h[0], w, b, h[1], eps=eps)[:2]


def drop(g: Program, x: Tensor, p: float) -> Tensor:
    """Dropout in training, x itself otherwise."""
    if p == 0.0 or g.mode != "train":
        return x
    return g.emit(dropout, x, p=p, stream=g.next_stream())


def project(
    g: Program, x: Tensor, name: str, size: int, *, std: float, p: float, pre_x: Tensor | None = None
) -> Branch:
    """The end of a branch: x w^T + b (N, size) and dropout. b waits for the add, unless dropout comes before that: the
    backward of the add has b's gradient at hand, the linear would read all of dy for it."""
    with g.scope(name):
        w = g.param("weight", (size, x.shape[-1]), normal(std))
        b = g.param("bias", (size,), ZEROS)
    drops = p > 0.0 and g.mode == "train"
    y = g.emit(linear, x, w, b if drops else None, pre_x, gelu=False, keep_pre=False)[0]
    return (drop(g, y, p), None) if drops else (y, b)


def self_attention(
    g: Program, x: Tensor, name: str, data: Batch, *, heads: int, p: float, std: float, max_len: int
) -> Branch:
    """Causal self-attention with packed q, k, v. In prefill and decode it appends to and reads a KV cache."""
    size = x.shape[-1]
    with g.scope(name):
        qkv = dense(g, x, "c_attn", 3 * size)
        if g.mode in ("prefill", "decode"):
            cache = g.state("cache", (data.batch_size, max_len, 2, heads, size // heads), g.dtype)
            y = g.emit(attention_decode, qkv, into={"cache": cache}, T=data.seq_len, S=max_len, H=heads, K=heads)
        else:
            active = p if g.mode == "train" else 0.0
            stream = g.next_stream() if active else 0
            y, _ = g.emit(attention, qkv, T=data.seq_len, H=heads, K=heads, causal=True, p=active, stream=stream)
        return project(g, y, "c_proj", size, std=std, p=p)


def mlp(g: Program, x: Tensor, name: str, *, size: int, p: float, std: float) -> Branch:
    """w2 gelu(w1 x + b1) + b2."""
    with g.scope(name):
        h = dense(g, x, "c_fc", size, gelu=True)
        pre = g.producer[h].pre  # None unless training
        return project(g, h, "c_proj", x.shape[-1], std=std, p=p, pre_x=pre)


def lm_head(g: Program, x: Tensor, w: Tensor, data: Batch, *, vocab_size: int, chunks: int) -> None:
    """Ends a program: losses (N) f32 in nats, logits (N, Vp), or x itself, marked as outputs; nothing in prefill."""
    if g.mode == "train":
        losses, *_ = g.emit(
            lm_loss_forward_backward, x, w, data.targets, into={"dw": g.grad(w)}, V=vocab_size, chunks=chunks
        )
        g.output("losses", losses)
        g.emit(loss_sum, losses, into={"scalars": g.scalars})
    elif g.mode == "loss":
        losses, _ = g.emit(lm_loss, x, w, data.targets, V=vocab_size, chunks=chunks)
        g.output("losses", losses)
        g.emit(loss_sum, losses, into={"scalars": g.scalars})
    elif g.mode == "hidden":  # the host picks rows for a head of their own
        g.output("hidden", x)
    elif g.mode in ("logits", "decode"):
        g.output("logits", g.emit(linear, x, w, None, None, gelu=False, keep_pre=False)[0])
