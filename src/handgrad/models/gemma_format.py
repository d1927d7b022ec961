"""Gemma 3 in Hugging Face's library. A norm there multiplies by 1 + weight, here by the weight."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.models.llama_format import names, rows

Fields = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"
EVERY = 6  # layers of which the last sees the whole text, where config.json does not say
IN_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out": "self_attn.o_proj",
    "ln_attn": "post_attention_layernorm",
    "ln_2": "pre_feedforward_layernorm",
    "mlp.down": "mlp.down_proj",
    "ln_mlp": "post_feedforward_layernorm",
}

LAYERS_27B = 62  # llama.cpp knows Gemma 3 27B, whose scores are scaled otherwise, by its number of layers


def _fixed(fields: Fields) -> dict[str, object]:
    """What scales the scores, which no key of a .gguf gives. llama.cpp stops at a pattern without a window."""
    width, heads = fields["hidden_size"], fields["num_heads"]
    if fields["global_every"] == 1:
        raise HandgradError("gguf", "llama.cpp runs a Gemma 3 some of whose layers have a window", "global_every 1")
    if fields["num_layers"] != LAYERS_27B or type(width) is not int or type(heads) is not int or heads < 1:
        return {"query_size": fields["head_size"]}
    return {"query_size": width // heads}


def _only(_: Fields) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    return {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attention_dropout": (0.0, 0),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }


def _decode(config: Fields) -> dict[str, Any]:
    """Our fields that need more than one key of config.json."""
    return {
        "rope_theta": _theta(config, FULL, "rope_theta", 1e6),
        "local_theta": _theta(config, SLIDING, "rope_local_base_freq", 1e4),
        "global_every": _every(config),
    }


def _theta(config: Fields, kind: str, older: str, default: float) -> object:
    """The base of the angles of one kind of layer, from `rope_parameters` or the older key."""
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not isinstance(rope.get(kind, {}), dict):
        raise HandgradError("hf", "rope_parameters that are an object for each kind of layer", shown(rope))
    for spelling in (config.get("rope_scaling"), rope.get(kind)):
        type_ = (spelling or {}).get("rope_type", "default") if isinstance(spelling, dict | None) else spelling
        if type_ != "default":
            raise HandgradError("hf", "a rope_type default", shown(type_), hint="no kernel here computes another")
    theta = rope.get(kind, {}).get("rope_theta", config.get(older, default))
    return float(theta) if type(theta) is int else theta


def _every(config: Fields) -> object:
    """Every which layer sees the whole text."""
    types, layers = config.get("layer_types"), config.get("num_hidden_layers", 26)
    if types is None:
        return config.get("sliding_window_pattern", config.get("_sliding_window_pattern", EVERY))
    if not isinstance(types, list) or set(types) - {SLIDING, FULL} or len(types) != layers:
        raise HandgradError("hf", f"layer_types {SLIDING} or {FULL}, one for each layer", shown(types))
    every = types.index(FULL) + 1 if FULL in types else len(types) + 1
    if types != _types(len(types), every):
        raise HandgradError("hf", f"layer_types with {FULL} at equal distances", shown(types))
    return every


def _types(layers: int, every: int) -> list[str]:
    return [SLIDING if (i + 1) % every else FULL for i in range(layers)]


def _encode(fields: Fields) -> dict[str, Any]:
    """The keys that `_decode` reads."""
    bases = {SLIDING: fields["local_theta"], FULL: fields["rope_theta"]}
    return {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "layer_types": _types(fields["num_layers"], fields["global_every"]),
    }


GGUF: Mapping[str, Any] = {  # see io.gguf.Layout
    "architectures": {"gemma3_text": "gemma3"},
    "keys": {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "attention.sliding_window_pattern": "_sliding_window_pattern",
        "rope.dimension_count": "head_dim",
        "rope.freq_base": f"rope_parameters.{FULL}.rope_theta",
        "rope.freq_base_swa": f"rope_parameters.{SLIDING}.rope_theta",
    },
    "tensors": {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
        "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
        "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
        "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
        "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
        "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
        "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
        "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
        "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
        "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
        "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
        "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
        "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
    },
    # a file without a window: all layers would see the whole text
    "defaults": {"attention.sliding_window": 0, "rope.freq_base": 1e4},
    "encode": lambda fields: {"_sliding_window_pattern": fields["global_every"]},
    "fixed": _fixed,
}

HUGGING_FACE: Mapping[str, Any] = {  # see io.format.Format
    "model_types": {"gemma3_text": "Gemma3ForCausalLM"},
    "fields": {
        "vocab_size": ("vocab_size", 262208),
        "max_seq_len": ("max_position_embeddings", 131072),
        "num_layers": ("num_hidden_layers", 26),
        "num_heads": ("num_attention_heads", 8),
        "num_kv_heads": ("num_key_value_heads", 4),
        "hidden_size": ("hidden_size", 2304),
        "head_size": ("head_dim", 256),
        "mlp_size": ("intermediate_size", 9216),
        "query_size": ("query_pre_attn_scalar", 256),
        "window": ("sliding_window", 4096),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    "aliases": {},
    "shared": {},
    "only": _only,
    "decode": _decode,
    "encode": _encode,
    "computes": frozenset({"layer_types", "sliding_window"}),
    "names": partial(names, in_block=IN_BLOCK),
    "rows": rows,
    "prefix": "model.",
    "transposed": "(?!)",  # none
    "shifted": r".*(ln_\w+|_norm)\.weight",
    "ignored": r"lm_head\.weight",  # of a tied head
    "tied": ("tie_embeddings", "wte.weight", "lm_head.weight"),
    "gguf": GGUF,
}
