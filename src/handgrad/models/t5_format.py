"""T5 in Hugging Face's library: its fields, and the names of its tensors."""

import re
from collections.abc import Mapping
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown

Fields = Mapping[str, Any]

KINDS = {"relu": False, "gated-gelu": True}  # feed_forward_proj: whether it is gated
SIDES = {"enc": "encoder", "dec": "decoder"}
OUTSIDE = {
    "wte": "shared",
    "enc.rel": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "dec.rel": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "enc.ln_f": "encoder.final_layer_norm",
    "dec.ln_f": "decoder.final_layer_norm",
    "lm_head": "lm_head",
}
PARTS = {  # in a block; {} is the last sublayer of its side
    "attn.qkv": ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
    "attn.out": ("0.SelfAttention.o",),
    "cross.q": ("1.EncDecAttention.q",),
    "cross.kv": ("1.EncDecAttention.k", "1.EncDecAttention.v"),
    "cross.out": ("1.EncDecAttention.o",),
    "mlp.up": ("{}.DenseReluDense.wi",),
    "mlp.gate_up": ("{}.DenseReluDense.wi_0", "{}.DenseReluDense.wi_1"),
    "mlp.down": ("{}.DenseReluDense.wo",),
    "ln_1": ("0.layer_norm",),
    "ln_2": ("1.layer_norm",),
    "ln_3": ("2.layer_norm",),
}


def _names(name: str) -> tuple[str, ...]:
    """Their tensors that are the rows of one of ours."""
    module = name.removesuffix(".weight")
    block = re.fullmatch(r"(enc|dec)\.(\d+)\.(.+)", module)
    if block is None:
        return (f"{OUTSIDE[module]}.weight",)
    side, last = SIDES[block[1]], 2 if block[1] == "dec" else 1
    return tuple(f"{side}.block.{block[2]}.layer.{part.format(last)}.weight" for part in PARTS[block[3]])


def _rows(name: str, fields: Fields) -> tuple[int, ...]:
    width = fields["mlp_size"] if ".gate_up." in name else fields["num_heads"] * fields["head_size"]
    return (width,) * len(_names(name))


def _decode(config: Fields) -> dict[str, Any]:
    """Our fields that need more than one key of config.json."""
    kind = config.get("feed_forward_proj", "relu")
    if kind not in KINDS:
        raise HandgradError("hf", f"a feed_forward_proj {' or '.join(KINDS)}", shown(kind))
    layers, last = config.get("num_decoder_layers"), config.get("vocab_size", 32128)
    return {
        "gated": KINDS[kind],
        "num_decoder_layers": 0 if layers in (None, config.get("num_layers", 6)) else layers,
        # transformers 5 has a key for it; before, and in files of the hub, a tied head was scaled
        "scaled": config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
        "specials_last": type(last) is int and config.get("pad_token_id", 0) == last - 1,
    }


def _encode(fields: Fields) -> dict[str, Any]:
    """The keys that `_decode` reads, and where a text begins and ends."""
    eos, pad = (fields["vocab_size"] - 2, fields["vocab_size"] - 1) if fields["specials_last"] else (1, 0)
    return {
        "feed_forward_proj": next(kind for kind, gated in KINDS.items() if gated == fields["gated"]),
        "num_decoder_layers": fields["num_decoder_layers"] or fields["num_layers"],
        "scale_decoder_outputs": fields["scaled"],
        "eos_token_id": eos,
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
    }


def _only(fields: Fields) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    return {
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
        "relative_attention_max_distance": (128,),
    }


HUGGING_FACE: Mapping[str, Any] = {  # see io.format.Format
    "model_types": {"t5": "T5ForConditionalGeneration"},
    "fields": {
        "vocab_size": ("vocab_size", 32128),
        "max_seq_len": ("n_positions", 512),
        "num_layers": ("num_layers", 6),
        "num_heads": ("num_heads", 8),
        "head_size": ("d_kv", 64),
        "hidden_size": ("d_model", 512),
        "mlp_size": ("d_ff", 2048),
        "num_buckets": ("relative_attention_num_buckets", 32),
        "norm_eps": ("layer_norm_epsilon", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    "aliases": {},
    "shared": {"dropout": (("dropout_rate",), 0.1)},
    "only": _only,
    "names": _names,
    "rows": _rows,
    "prefix": "",
    "transposed": "(?!)",  # none
    # the table under other names; a tied head; a table of cross-attention that the first files had and nobody read
    "ignored": r"(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    "tied": ("tie_embeddings", "wte.weight", "lm_head.weight"),
    "decode": _decode,
    "encode": _encode,
}
