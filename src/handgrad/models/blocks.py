"""Pieces that families share: functions that declare parameters where they use them, and emit calls."""

from functools import partial
from typing import Any

from handgrad.core.dtypes import F32, I32
from handgrad.core.params import ONES, ZEROS, Init, Part, normal, uniform
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.model import Batch
from handgrad.ops import (
    add_norm,
    add_rms_norm,
    attention,
    attention_decode,
    cap_logits,
    dropout,
    embed,
    gated,
    linear,
    linear_act,
    lm_loss,
    lm_loss_forward_backward,
    lora,
    loss_sum,
    norm,
    rope,
    squared_error,
    squared_error_forward_backward,
)
from handgrad.ops import rms_norm as rms_norm_alone
from handgrad.ops.act import Act
from handgrad.ops.rope.reference import Llama3Scaling, rotary_table

# what the next norm adds to the residual: (N, C), and its bias if that is still to be added
Branch = tuple[Tensor, Tensor | None]


def token_table(g: Program, model: Any, name: str = "wte.weight", std: float = 0.02) -> Tensor:
    """A table with a row of hidden_size columns per token, and rows of padding."""
    return g.param(name, (model.vocab_padded, model.hidden_size), normal(std, rows=model.vocab_size))


def head_table(g: Program, model: Any, std: float = 0.02) -> Tensor:
    """The table whose rows the head multiplies: the embedding's, unless the model's head is untied."""
    return token_table(g, model, "wte.weight" if model.tie_embeddings else "lm_head.weight", std)


def embedding(g: Program, data: Batch, wte: Tensor, wpe: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(N, C): `scale` times the rows of wte that the ids name and, if there is wpe, its rows by position; with a cache,
    positions continue after its tokens."""
    positions = g.input("positions", data.ids.shape, I32) if wpe is not None and data.documents else None
    return g.emit(embed, data.ids, wte, wpe, positions, T=data.seq_len, decode=data.cache > 0, scale=scale)


def dense(
    g: Program,
    x: Tensor,
    name: str,
    size: int,
    *,
    act: Act = Act.NONE,
    bias: bool = True,
    init: Init = normal(0.02),
    into: Tensor | None = None,
    parts: tuple[Part, ...] | None = None,
) -> Tensor:
    """act(x w^T + b) (N, size), in the state `into` if that is given; keeps the pre-activation only where a backward
    will read it.

    parts: the hidden matrices in w, one if None, none in a head
    """
    with g.scope(name):
        w = g.param("weight", (size, x.shape[-1]), init, ((size, 1),) if parts is None else parts)
        b = g.param("bias", (size,), ZEROS) if bias else None
        if w.name in g.adapters:
            y = adapted(g, x, w, b, into=into)
            return y if act is Act.NONE else g.emit(linear_act, y, act=act)
    keep_pre = act is not Act.NONE and g.trains and any(map(g.wants, (x, w, b)))
    return g.emit(linear, x, w, b, None, into=_state(into), act=act, keep_pre=keep_pre)[0]


def adapted(
    g: Program, x: Tensor, w: Tensor, b: Tensor | None, pre_x: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """x w^T + b (N, M), and the adapter of w (models/lora.py): A and B are parameters of the current scope."""
    a, K = g.adapters[w.name], x.shape[-1]
    plain: dict[str, Any] = {"act": Act.NONE, "keep_pre": False}
    base = g.emit(linear, x, w, b, pre_x, **plain)[0]
    low = drop(g, x, a.dropout)
    down = g.param("lora_A.weight", (a.rank * len(a.spans), K), uniform(K**-0.5))
    u = g.emit(linear, low, down, None, pre_x if low is x else None, **plain)[0]
    up = g.param("lora_B.weight", (a.rows, a.rank), ZEROS)
    return g.emit(lora, base, u, up, into=_state(into), scale=a.scale, **a.columns)


def _state(into: Tensor | None) -> dict[str, Tensor | None]:
    """The state that a call's output y goes into, if any."""
    return {} if into is None else {"y": into}


def packed(heads: int, kv_heads: int, head_size: int) -> tuple[Part, Part, Part]:
    """The parts of packed q, k, v."""
    kv = kv_heads * head_size, kv_heads
    return (heads * head_size, heads), kv, kv


def layer_norm(g: Program, x: Tensor, h: Branch | None, name: str, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(residual, normed): adds the pending branch h to the residual and norms the sum.

    With h None nothing is pending: at the start of a model, after a parallel residual, in a head.
    """
    with g.scope(name):
        w = g.param("weight", x.shape[-1:], ONES)
        b = g.param("bias", x.shape[-1:], ZEROS)
    if h is None:
        return x, g.emit(norm, x, w, b, eps=eps)[0]
    return g.emit(add_norm, x, h[0], w, b, h[1], eps=eps)[:2]


def rms_norm(g: Program, x: Tensor, h: Branch | None, name: str, eps: float) -> tuple[Tensor, Tensor]:
    """(residual, normed), as `layer_norm`, with the RMS norm: neither mean nor bias."""
    with g.scope(name):
        w = g.param("weight", x.shape[-1:], ONES)
    if h is None:
        return x, g.emit(rms_norm_alone, x, w, eps=eps)[0]
    return g.emit(add_rms_norm, x, h[0], w, h[1], eps=eps)[:2]


def drop(g: Program, x: Tensor, p: float) -> Tensor:
    """Dropout in training, x itself otherwise."""
    if p == 0.0 or not g.trains:
        return x
    return g.emit(dropout, x, p=p, stream=g.next_stream())


def project(
    g: Program,
    x: Tensor,
    name: str,
    size: int,
    *,
    std: float,
    p: float,
    pre_x: Tensor | None = None,
    bias: bool = True,
) -> Branch:
    """The end of a branch: x w^T + b (N, size), then dropout. Without dropout the next add_norm adds b: its backward
    sums b's gradient anyway; the linear would need another pass over dy."""
    drops = p > 0.0 and g.trains
    with g.scope(name):
        w = g.param("weight", (size, x.shape[-1]), normal(std), ((size, 1),))
        b = g.param("bias", (size,), ZEROS) if bias else None
        if w.name in g.adapters:
            y = adapted(g, x, w, b if drops else None, pre_x)
        else:
            y = g.emit(linear, x, w, b if drops else None, pre_x, act=Act.NONE, keep_pre=False)[0]
    return (drop(g, y, p), None) if drops else (y, b)


def attend(
    g: Program,
    qkv: Tensor,
    data: Batch,
    *,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    window: int = 0,
    causal: bool = True,
    p: float = 0.0,
    kv: Tensor | None = None,
    rel: Tensor | None = None,
) -> Tensor:
    """Attention (N, heads D) of packed q, k, v, within the bounds that the batch gives. With a cache and without kv it
    appends to and reads the batch's keys and values.

    scale: of the scores, D^-1/2 if None;  window: tokens that a token sees, itself included; 0: all
    p: dropout of attention weights, in training
    kv: packed k, v of the batch's sources; qkv then is q alone;  rel: a parameter, biases by distance (buckets, heads)
    """
    D = qkv.shape[-1] // (heads + (2 * kv_heads if kv is None else 0))
    sizes: dict[str, Any] = {"T": data.seq_len, "H": heads, "K": kv_heads, "window": window, "scale": scale or D**-0.5}
    if data.cache and kv is None:
        cache = g.state("cache", (data.batch_size, data.cache, 2, kv_heads, D), g.dtype)
        return g.emit(attention_decode, qkv, rel, into={"cache": cache}, **sizes, S=data.cache)
    active = p if g.trains else 0.0
    stream = g.next_stream() if active else 0
    ins = (qkv, None, rel, data.first, data.last) if kv is None else (qkv, kv, rel, None, data.source_last)
    return g.emit(attention, *ins, **sizes, causal=causal, p=active, stream=stream)[0]


def self_attention(g: Program, x: Tensor, name: str, data: Batch, *, heads: int, p: float, std: float) -> Branch:
    """Causal self-attention with biases and as many key/value heads as query heads."""
    with g.scope(name):
        C = x.shape[-1]
        qkv = dense(g, x, "c_attn", 3 * C, parts=packed(heads, heads, C // heads))
        y = attend(g, qkv, data, heads=heads, kv_heads=heads, p=p)
        return project(g, y, "c_proj", C, std=std, p=p)


def rotary(
    g: Program,
    qkv: Tensor,
    data: Batch,
    *,
    heads: int,
    kv_heads: int,
    table_rows: int,
    theta: float,
    scaling: Llama3Scaling | None = None,
    rotary_dims: int | None = None,
    qk_norm_eps: float | None = None,
) -> Tensor:
    """qkv (N, (heads + 2 kv_heads) D) with rotary positions in q and k, by half-split pairs; what attention reads.

    table_rows: positions that the table covers: at least seq_len, with a cache as many as it holds
    rotary_dims: the first columns of a head that rotate, all if None
    qk_norm_eps: not None norms every head of q and k first, with parameters q_norm.weight and k_norm.weight (D)
    """
    D = qkv.shape[-1] // (heads + 2 * kv_heads)
    R, wq, wk = rotary_dims or D, None, None
    if qk_norm_eps is not None:
        wq, wk = (g.param(f"{name}_norm.weight", (D,), ONES) for name in "qk")
    values = partial(rotary_table, table_rows, R, theta, scaling)
    table = g.constant(f"rope {(table_rows, R, theta, scaling)}", (table_rows, R), F32, values)
    sizes = {"T": data.seq_len, "H": heads, "K": kv_heads}
    attrs: dict[str, Any] = sizes | {"eps": qk_norm_eps or 0.0, "decode": data.cache > 0, "interleaved": False}
    return g.emit(rope, qkv, table, wq, wk, **attrs)


def mlp(
    g: Program,
    x: Tensor,
    name: str,
    *,
    size: int,
    p: float,
    std: float,
    act: Act = Act.GELU_TANH,
    up: str = "c_fc",
    down: str = "c_proj",
) -> Branch:
    """down act(up x): two linears with biases, of these names, `size` wide between them."""
    with g.scope(name):
        h = dense(g, x, up, size, act=act)
        return project(g, h, down, x.shape[-1], std=std, p=p, pre_x=pre_of(g, h))


def pre_of(g: Program, y: Tensor) -> Tensor | None:
    """What the linear that makes y has kept before its activation; None unless training, and behind an adapter, whose
    activation is a call of its own."""
    made = g.producer[y]
    return made.pre if made.op is linear else None


def gated_mlp(g: Program, x: Tensor, name: str, *, size: int, act: Act, p: float, std: float) -> Branch:
    """down (act(gate x) * up x) without biases, `size` wide inside: SwiGLU, GeGLU. The rows of gate_up.weight are those
    of gate, then those of up."""
    with g.scope(name):
        h = dense(g, x, "gate_up", 2 * size, bias=False, parts=((size, 1), (size, 1)))
        return project(g, g.emit(gated, h, act=act), "down", x.shape[-1], std=std, p=p, bias=False)


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
    name: str = "losses",
) -> Tensor:
    """The losses (N,) f32 of the logits of lm_head_logits, as `Model.loss` describes them; w (Vp, C), b (Vp).

    weights: (N,) f32, factors of the losses and of their gradients
    """
    attrs: dict[str, Any] = dict(V=vocab_size, chunks=chunks, scale=scale, softcap=softcap)
    if g.trains and any(map(g.wants, (x, w, b))):
        into, without = {"dw": g.wanted_grad(w), "db": g.wanted_grad(b)}, () if g.wants(x) else ("dx",)
        losses, *_ = g.emit(lm_loss_forward_backward, x, w, targets, b, weights, into=into, without=without, **attrs)
    else:
        losses, _ = g.emit(lm_loss, x, w, targets, b, weights, **attrs)
    g.emit(loss_sum, losses, into={"scalars": g.scalars})
    return g.output(name, losses)


def regression_loss(g: Program, x: Tensor, w: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    """The losses (N,) f32 of predictions x w^T + b, w (1, C), against the input "values" (N,) f32: squared errors, as
    `Model.loss` describes losses."""
    z = g.emit(linear, x, w, b, None, act=Act.NONE, keep_pre=False)[0]
    values = g.input("values", targets.shape, F32)
    if g.trains and g.wants(z):
        losses, _ = g.emit(squared_error_forward_backward, z, targets, values)
    else:
        losses = g.emit(squared_error, z, targets, values)
    g.emit(loss_sum, losses, into={"scalars": g.scalars})
    return g.output("losses", losses)


def lm_head_logits(
    g: Program, x: Tensor, w: Tensor, *, b: Tensor | None = None, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """The logits cap(scale (x w^T + b)) (N, Vp), as `Model.logits` describes them.

    cap(z) is softcap tanh(z / softcap); softcap 0: z
    """
    z = g.emit(linear, x, w, b, None, act=Act.NONE, keep_pre=False)[0]
    if scale != 1.0 or softcap != 0.0:
        z = g.emit(cap_logits, z, scale=scale, softcap=softcap)
    return g.output("logits", z)
