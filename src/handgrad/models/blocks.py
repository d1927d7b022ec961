"""Pieces that families share: functions that declare parameters where they use them, and emit calls."""

from typing import Any

from handgrad.core.params import ONES, ZEROS, normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.model import Batch
from handgrad.ops import (
    add_norm,
    attention,
    attention_decode,
    cap_logits,
    dropout,
    linear,
    lm_loss,
    lm_loss_forward_backward,
    loss_sum,
    norm,
)

# what the next norm adds to the residual: (N, C), and its bias if that is still to be added
Branch = tuple[Tensor, Tensor | None]


def dense(g: Program, x: Tensor, name: str, size: int, *, gelu: bool = False) -> Tensor:
    """x w^T + b (N, size), optionally with GELU; keeps the pre-activation only where a backward will read it."""
    with g.scope(name):
        w = g.param("weight", (size, x.shape[-1]), normal(0.02))
        b = g.param("bias", (size,), ZEROS)
    return g.emit(linear, x, w, b, None, gelu=gelu, keep_pre=gelu and g.trains)[0]


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
    if p == 0.0 or not g.trains:
        return x
    return g.emit(dropout, x, p=p, stream=g.next_stream())


def project(
    g: Program, x: Tensor, name: str, size: int, *, std: float, p: float, pre_x: Tensor | None = None
) -> Branch:
    """The end of a branch: x w^T + b (N, size), then dropout. Without dropout the next add_norm adds b: its backward
    sums b's gradient anyway; the linear would need another pass over dy."""
    with g.scope(name):
        w = g.param("weight", (size, x.shape[-1]), normal(std))
        b = g.param("bias", (size,), ZEROS)
    drops = p > 0.0 and g.trains
    y = g.emit(linear, x, w, b if drops else None, pre_x, gelu=False, keep_pre=False)[0]
    return (drop(g, y, p), None) if drops else (y, b)


def self_attention(g: Program, x: Tensor, name: str, data: Batch, *, heads: int, p: float, std: float) -> Branch:
    """Causal self-attention with packed q, k, v. With a cache it appends to and reads the batch's keys and values."""
    size = x.shape[-1]
    with g.scope(name):
        qkv = dense(g, x, "c_attn", 3 * size)
        if data.cache:
            cache = g.state("cache", (data.batch_size, data.cache, 2, heads, size // heads), g.dtype)
            y = g.emit(attention_decode, qkv, into={"cache": cache}, T=data.seq_len, S=data.cache, H=heads, K=heads)
        else:
            active = p if g.trains else 0.0
            stream = g.next_stream() if active else 0
            y, _ = g.emit(attention, qkv, T=data.seq_len, H=heads, K=heads, causal=True, p=active, stream=stream)
        return project(g, y, "c_proj", size, std=std, p=p)


def mlp(g: Program, x: Tensor, name: str, *, size: int, p: float, std: float) -> Branch:
    """w2 gelu(w1 x + b1) + b2."""
    with g.scope(name):
        h = dense(g, x, "c_fc", size, gelu=True)
        pre = g.producer[h].pre  # None unless training
        return project(g, h, "c_proj", x.shape[-1], std=std, p=p, pre_x=pre)


def lm_head_loss(
    g: Program,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    chunks: int,
    b: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """The losses (N,) f32 of the logits of lm_head_logits, as `Model.loss` describes them; w (Vp, C), b (Vp).

    weights: (N,) f32, factors of the losses and of their gradients
    """
    attrs: dict[str, Any] = dict(V=vocab_size, chunks=chunks, scale=scale, softcap=softcap)
    if g.trains:
        into = {"dw": g.grad(w), "db": None if b is None else g.grad(b)}
        losses, *_ = g.emit(lm_loss_forward_backward, x, w, targets, b, weights, into=into, **attrs)
    else:
        losses, _ = g.emit(lm_loss, x, w, targets, b, weights, **attrs)
    g.emit(loss_sum, losses, into={"scalars": g.scalars})
    return g.output("losses", losses)


def lm_head_logits(
    g: Program, x: Tensor, w: Tensor, *, b: Tensor | None = None, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """The logits cap(scale (x w^T + b)) (N, Vp), as `Model.logits` describes them.

    cap(z) is softcap tanh(z / softcap); softcap 0: z
    """
    z = g.emit(linear, x, w, b, None, gelu=False, keep_pre=False)[0]
    if scale != 1.0 or softcap != 0.0:
        z = g.emit(cap_logits, z, scale=scale, softcap=softcap)
    return g.output("logits", z)
