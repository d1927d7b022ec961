"""The Llama family in Hugging Face's library, which has it as four: Llama, Mistral, Qwen2 and Qwen3.

They differ in what config.json leaves out, in the bias of q, k and v (Qwen2), the norm of q and k (Qwen3) and the
window (Mistral; Qwen2 and Qwen3 on request). Of our fields, `rope_scaling` is None or Llama 3.1's (factor,
low_freq_factor, high_freq_factor, original_max_position_embeddings), and `window` is 0 where attention sees the whole
text.
"""

import re
from collections.abc import Mapping
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown

Fields = Mapping[str, Any]

KEYS = {  # our field: their key
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp_size": "intermediate_size",
}
DEFAULTS: dict[str, dict[str, Any]] = {  # what transformers takes for a key that is left out
    "llama": dict(zip(KEYS.values(), (32000, 2048, None, None, 11008))),
    "mistral": dict(zip(KEYS.values(), (32000, 131072, 8, None, 14336))) | {"sliding_window": 4096},
    "qwen2": dict(zip(KEYS.values(), (151936, 32768, 32, None, 22016))) | {"sliding_window": 4096},
    "qwen3": dict(zip(KEYS.values(), (151936, 32768, 32, 128, 22016))) | {"sliding_window": 4096},
}
MAX_WINDOW_LAYERS = 28  # of Qwen: layers from here on have a window, if any has
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PARTS = {  # tensors of ours that are several of theirs
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
IN_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
}
OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}


GGUF: Mapping[str, Any] = {  # see io.gguf.Layout
    "architectures": {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
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
        "rope.dimension_count": "head_dim",
        "rope.freq_base": "rope_parameters.rope_theta",
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
        "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
        "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
        "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
        "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    },
    "fixed": lambda _: {"window": 0},
    "interleaved": {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}},
}


def names(name: str, in_block: Mapping[str, str] = IN_BLOCK) -> tuple[str, ...]:
    """Their tensors that are the rows of one of ours. in_block: what they call those of a block"""
    module, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"h\.(\d+)\.(.+)", module)
    if block is None:
        return (f"{OUTSIDE[module]}.{kind}",)
    parts = PARTS.get(block[2]) or (in_block[block[2]],)
    return tuple(f"model.layers.{block[1]}.{part}.{kind}" for part in parts)


def rows(name: str, fields: Fields) -> tuple[int, ...]:
    if ".gate_up." in name:
        return fields["mlp_size"], fields["mlp_size"]
    q, kv = (fields[heads] * fields["head_size"] for heads in ("num_heads", "num_kv_heads"))
    return q, kv, kv


def _kind(fields: Fields) -> str:
    """The model_type that computes what these fields say; the most general one of several."""
    if fields["qkv_bias"] and fields["qk_norm"]:
        raise HandgradError("convert", "Hugging Face's library has no Llama with both qkv_bias and qk_norm")
    if fields["qk_norm"]:
        return "qwen3"
    if fields["qkv_bias"]:
        return "qwen2"
    return "mistral" if fields["window"] else "llama"


def _only(fields: Fields) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    kind = _kind(fields)
    only: dict[str, tuple] = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0, 0)}
    if kind in ("llama", "qwen3"):
        only["attention_bias"] = (False,)  # it would be one of the projection behind attention, too
    return only | ({"mlp_bias": (False,)} if kind == "llama" else {})


def _decode(config: Fields) -> dict[str, Any]:
    """Our fields that need more than one key of config.json."""
    kind = str(config.get("model_type"))
    defaults = DEFAULTS[kind]
    found = {ours: config.get(key, defaults[key]) for ours, key in KEYS.items()}
    heads, width = (config.get(key, default) for key, default in (("num_attention_heads", 32), ("hidden_size", 4096)))
    for ours, key in KEYS.items():
        if found[ours] == 0:  # which would mean here that it follows from the others
            raise HandgradError("hf", f"a {key} of at least 1", 0)
    if found["num_kv_heads"] is None:
        found["num_kv_heads"] = heads
    if found["head_size"] is None and type(heads) is type(width) is int and heads > 0:
        found["head_size"] = width // heads
    theta, scaling = _rope(config, found["max_seq_len"])
    return found | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "window": _window(kind, config),
    }


def _rope(config: Fields, max_seq_len: object) -> tuple[object, tuple | None]:
    """(theta, scaling) of rotary positions, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise HandgradError("hf", "rope_parameters that are an object", shown(rope))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    theta = float(theta) if type(theta) is int else theta
    for key in rope.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor", *SCALING}:
        raise HandgradError("hf", "rope_parameters without a key that is unknown here", shown(key))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise HandgradError("hf", "a partial_rotary_factor of 1", shown(part), hint="no kernel here computes another")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        hint = "no kernel here computes another"
        raise HandgradError("hf", "a rope_type default or llama3", shown(kind), hint=hint)
    return theta, tuple(rope.get(key, max_seq_len if key == SCALING[-1] else None) for key in SCALING)


def _window(kind: str, config: Fields) -> object:
    """Tokens that attention sees, 0 for all: a model here has one window for all layers."""
    window = config.get("sliding_window", DEFAULTS[kind].get("sliding_window"))
    if window is not None and (type(window) is not int or window < 1):
        raise HandgradError("hf", "a sliding_window of at least 1, or none", shown(window))
    if kind == "mistral":
        return 0 if window is None else window
    types = config.get("layer_types")
    if kind.startswith("qwen") and types is None:
        layers = config.get("num_hidden_layers", 32)
        first = config.get("max_window_layers", MAX_WINDOW_LAYERS) if config.get("use_sliding_window") else layers
        if type(layers) is not int or type(first) is not int:
            raise HandgradError("hf", "max_window_layers that is a whole number", shown(first))
        types = ["full_attention"] * (first > 0) + ["sliding_attention"] * (first < layers and window is not None)
    types = [] if types is None else types
    if not isinstance(types, list) or any(types != [name] * len(types) for name in types[:1]):
        raise HandgradError("hf", "layer_types that are alike: a model here has one window", shown(types))
    if types[:1] not in ([], ["full_attention"], ["sliding_attention"]):
        raise HandgradError("hf", "layer_types full_attention or sliding_attention", shown(types))
    if kind == "llama" and (window is not None or "sliding_attention" in types):
        raise HandgradError("hf", "no sliding_window, which a llama has not", shown(window or types))
    return window if "sliding_attention" in types else 0


def _encode(fields: Fields) -> dict[str, Any]:
    """The keys that `_decode` reads."""
    kind, scaling, window = _kind(fields), fields["rope_scaling"], fields["window"]
    rope = {"rope_theta": fields["rope_theta"], "rope_type": "llama3" if scaling else "default"}
    config = {key: fields[ours] for ours, key in KEYS.items()}
    config |= {"rope_parameters": rope | dict(zip(SCALING, scaling or ()))}
    if kind == "mistral":
        config["sliding_window"] = window
    if kind.startswith("qwen"):
        layers = ["sliding_attention" if window else "full_attention"] * fields["num_layers"]
        config |= {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": layers}
        config["max_window_layers"] = 0 if window else fields["num_layers"]
    return config


HUGGING_FACE: Mapping[str, Any] = {  # see io.format.Format
    "model_types": {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    },
    "kind": _kind,
    "fields": {
        "num_layers": ("num_hidden_layers", 32),
        "num_heads": ("num_attention_heads", 32),
        "hidden_size": ("hidden_size", 4096),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    "aliases": {},
    "shared": {},
    "only": _only,
    "decode": _decode,
    "encode": _encode,
    "computes": frozenset({"layer_types", "sliding_window"}),
    "names": names,
    "rows": rows,
    "prefix": "model.",
    "transposed": "(?!)",  # none
    "ignored": r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq|lm_head\.weight",  # of old versions; a tied head
    "tied": ("tie_embeddings", "wte.weight", "lm_head.weight"),
    "gguf": GGUF,
}
