"""GPT-NeoX (Black et al. 2022), the family of Pythia (Biderman et al. 2023): a decoder with a parallel residual.

Attention and MLP read the same residual, each through a layer norm of its own, and both are added to it. Rotary
positions turn the first columns of a head; every linear has a bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from handgrad.core.dtypes import I32
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.core.params import normal
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.models.blocks import (
    Branch,
    attend,
    dense,
    embedding,
    head_table,
    layer_norm,
    lm_head_logits,
    lm_head_loss,
    mlp,
    packed,
    rotary,
    token_table,
)
from handgrad.models.model import MAX_LAYERS, Batch, check_fields, choice, flag, head_columns, number, padded, size
from handgrad.models.registry import register
from handgrad.ops import add
from handgrad.ops.act import Act

ACTS = {  # the names are those of Hugging Face's library
    "gelu": Act.GELU_ERF,
    "gelu_new": Act.GELU_TANH,
    "gelu_fast": Act.GELU_TANH,
    "gelu_pytorch_tanh": Act.GELU_TANH,
    "relu": Act.RELU,
    "silu": Act.SILU,
}


# Hugging Face's library -----------------------------------------------------------------------------------------------

MODULES = {  # ours: theirs
    "wte": "gpt_neox.embed_in",
    "ln_1": "input_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
    "ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}


def _hf_names(name: str) -> tuple[str]:
    """The name of one of our tensors in their files."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("h."):
        return (f"{MODULES[module]}.{kind}",)
    _, layer, inner = module.split(".", 2)
    return (f"gpt_neox.layers.{layer}.{MODULES[inner]}.{kind}",)


def _hf_order(name: str, fields: Mapping[str, Any]) -> Sequence[int] | None:
    """They pack q, k and v head by head, (H, 3, D); here all of q comes first, then k, then v."""
    if ".qkv." not in name:
        return None
    H, C = fields["num_heads"], fields["hidden_size"]
    D = C // H
    return [part * C + head * D + column for head in range(H) for part in range(3) for column in range(D)]


def _hf_only(fields: Mapping[str, Any]) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    return {"attention_bias": (True,), "attention_dropout": (0.0, 0), "hidden_dropout": (0.0, 0)}


def _hf_decode(config: Mapping[str, Any]) -> dict[str, Any]:
    """(rope_theta, rotary_pct) from `rope_parameters`, or from the older `rotary_emb_base` and `rotary_pct`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise HandgradError("hf", "rope_parameters that are an object", shown(rope))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        hint = "no kernel here computes another"
        raise HandgradError("hf", "a rope_type default", shown(kind), hint=hint)
    for key in rope.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}:
        raise HandgradError("hf", "rope_parameters without a key that is unknown here", shown(key))
    theta = rope.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    return {
        "rope_theta": float(theta) if type(theta) is int else theta,
        "rotary_pct": rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)),
    }


def _hf_encode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that `_hf_decode` reads."""
    rope = {"rope_theta": fields["rope_theta"], "partial_rotary_factor": fields["rotary_pct"]}
    return {"rope_parameters": rope | {"rope_type": "default"}}


# the model ------------------------------------------------------------------------------------------------------------


@register
@dataclass(frozen=True)
class GPTNeoX:
    """A GPT-NeoX.

    mlp_size    columns of the MLP; 0: 4 hidden_size
    act         its activation function: a key of ACTS
    rope_theta  base of the angles;  rotary_pct: part of a head's columns that rotate
    parallel    x + attn(ln_1(x)) + mlp(ln_2(x)); otherwise the MLP reads the sum of x and attention, as in a GPT-2
    """

    vocab_size: int = size(50304)
    max_seq_len: int = size(2048)
    num_layers: int = size(12, MAX_LAYERS)
    num_heads: int = size(12)
    hidden_size: int = size(768)
    mlp_size: int = size(0, least=0)
    act: str = choice("gelu", *ACTS)
    rope_theta: float = number(1e4)
    rotary_pct: float = number(0.25)
    norm_eps: float = number(1e-5)
    parallel: bool = flag(True)
    tie_embeddings: bool = flag(False)

    family: ClassVar[str] = "gpt_neox"
    special_tokens: ClassVar[tuple[str, ...]] = ()
    continues_text: ClassVar[bool] = True
    hugging_face: ClassVar[Mapping[str, Any]] = {  # see io.format.Format
        "model_types": {"gpt_neox": "GPTNeoXForCausalLM"},
        "fields": {
            "vocab_size": ("vocab_size", 50432),
            "max_seq_len": ("max_position_embeddings", 2048),
            "num_layers": ("num_hidden_layers", 44),
            "num_heads": ("num_attention_heads", 64),
            "hidden_size": ("hidden_size", 6144),
            "mlp_size": ("intermediate_size", 24576),
            "act": ("hidden_act", "gelu"),
            "norm_eps": ("layer_norm_eps", 1e-5),
            "parallel": ("use_parallel_residual", True),
            "tie_embeddings": ("tie_word_embeddings", False),
        },
        "aliases": {},
        "shared": {},
        "only": _hf_only,
        "decode": _hf_decode,
        "encode": _hf_encode,
        "names": _hf_names,
        "order": _hf_order,
        "prefix": "gpt_neox.",
        "transposed": "(?!)",  # none
        # causal masks and frequencies of old versions; a tied head
        "ignored": r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)|embed_out\.weight",
        "tied": ("tie_embeddings", "wte.weight", "lm_head.weight"),
    }

    def __post_init__(self) -> None:
        check_fields(self)
        columns = head_columns(self)
        object.__setattr__(self, "mlp_size", self.mlp_size or 4 * self.hidden_size)
        if self.rotary_pct > 1 or self.rotary_dims < 2 or self.rotary_dims % 2:
            rule = f"rotary_pct is a part of a head's {columns} columns, which are rotated in pairs"
            raise HandgradError("model", rule, f"{self.rotary_pct}, {self.rotary_dims} columns")

    @property
    def rotary_dims(self) -> int:
        """Columns of a head that rotate: the first ones."""
        return int(head_columns(self) * self.rotary_pct)

    @property
    def vocab_padded(self) -> int:
        """Rows of the embedding table."""
        return padded(self.vocab_size)

    @property
    def usual_seq_len(self) -> int:
        """See `Model.usual_seq_len`."""
        return self.max_seq_len

    def predictions(self, seq_len: int) -> int:
        """Every token predicts the next."""
        return seq_len

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """Token ids alone."""
        return Batch(g.input("ids", (batch_size * seq_len,), I32), batch_size, seq_len, cache)

    def body(self, g: Program, data: Batch) -> Tensor:
        """Embedding, blocks and the last norm."""
        eps, std = self.norm_eps, 0.02 / (2 * self.num_layers) ** 0.5
        h: Branch | None = None
        with g.block("embed", prefix=False):
            x = embedding(g, data, token_table(g, self))
        for i in range(self.num_layers):
            with g.block(f"h.{i}"):
                x, n = layer_norm(g, x, h, "ln_1", eps)
                a = self.attention(g, n, data, std)
                x, n = layer_norm(g, x, None if self.parallel else (a, None), "ln_2", eps)
                m, bias = mlp(g, n, "mlp", size=self.mlp_size, act=ACTS[self.act], p=0.0, std=std)
                h = g.emit(add, a, m) if self.parallel else m, bias
        with g.block("head", prefix=False):
            return layer_norm(g, x, h, "ln_f", eps)[1]

    def attention(self, g: Program, x: Tensor, data: Batch, std: float) -> Tensor:
        """Self-attention, in which the first columns of q and k are rotated."""
        H, C, rows = self.num_heads, self.hidden_size, data.cache or data.seq_len
        rope: dict[str, Any] = dict(table_rows=rows, theta=self.rope_theta, rotary_dims=self.rotary_dims)
        with g.scope("attn"):
            qkv = dense(g, x, "qkv", 3 * C, parts=packed(H, H, C // H))
            qkv = rotary(g, qkv, data, heads=H, kv_heads=H, **rope)
            return dense(g, attend(g, qkv, data, heads=H, kv_heads=H), "out", C, init=normal(std))

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """See `Model.loss`."""
        with g.block("head", prefix=False):
            return lm_head_loss(g, x, head_table(g, self), targets, vocab_size=self.vocab_size, chunks=chunks)

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """See `Model.logits`."""
        with g.block("head", prefix=False):
            return lm_head_logits(g, x, head_table(g, self))

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """6 a parameter that is multiplied, and attention over half of the keys.

        num_params: with the padded rows of the vocabulary; the table of an untied head is a lookup and does not count

        >>> GPTNeoX(vocab_size=128, num_layers=1, num_heads=2, hidden_size=64).flops_per_token(60_000, 16)
        316992
        """
        lookup = 0 if self.tie_embeddings else self.vocab_padded * self.hidden_size
        return 6 * (num_params - lookup) + 6 * self.num_layers * self.hidden_size * seq_len
