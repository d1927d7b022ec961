"""Named models: GPT-2's four, every llm.c descriptor, `d<layers>` for any depth, and released models."""

from dataclasses import asdict
from typing import Any

from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.models.bert import Bert
from handgrad.models.gemma import Gemma
from handgrad.models.gpt2 import GPT2
from handgrad.models.llama import Llama
from handgrad.models.model import Model
from handgrad.models.neox import GPTNeoX
from handgrad.models.registry import create
from handgrad.models.t5 import T5

# fmt: off
# name: layers, heads, hidden size
GPT2_SIZES = {
    "124m":  (12, 12, 768),
    "355m":  (24, 16, 1024),
    "774m":  (36, 20, 1280),
    "1558m": (48, 25, 1600),
}
HUGGING_FACE = {"gpt2": "124m", "gpt2-medium": "355m", "gpt2-large": "774m", "gpt2-xl": "1558m"}  # the hub's names
OTHERS = {  # names that are no presets: the nearest
    "gpt2-small": "gpt2",
    "small": "gpt2",
    "medium": "gpt2-medium",
    "large": "gpt2-large",
    "xl": "gpt2-xl",
    "d0": "d6",
    "gpt3": "gpt3:c768",
    "gpt3-small": "gpt3:c768",
    "gpt3-125m": "gpt3:c768",
    "gpt3-175b": "gpt3:c12288",
    "llama": "llama3.2-1b",
    "llama-3.2-1b": "llama3.2-1b",
    "llama-3.1-8b": "llama3.1-8b",
    "smollm2": "smollm2-135m",
    "qwen2.5": "qwen2.5-0.5b",
    "qwen3": "qwen3-0.6b",
    "pythia": "pythia-70m",
    "gemma3": "gemma3-270m",
    "t5": "t5-small",
}
# llm.c's depth descriptors; its head size is 64 up to d60 and 96 above
# layers: heads, hidden size
DEPTHS = {
    6:  (6, 384),
    12: (12, 768),
    24: (16, 1024),
    36: (20, 1280),
    48: (25, 1600),
    60: (30, 1920),
    72: (30, 2880),
    84: (36, 3456),
}
# GPT-3 by width (Brown et al. 2020, table 2.1). The paper's 13B width of 5140 is no multiple of its head size 128; we
# build 40 heads of 128, which are 5120.
GPT3_WIDTHS = {
    384:   (6, 6, 384),
    768:   (12, 12, 768),
    1024:  (24, 16, 1024),
    1536:  (24, 16, 1536),
    2048:  (24, 16, 2048),
    2560:  (32, 32, 2560),
    4096:  (32, 32, 4096),
    5140:  (40, 40, 5120),
    12288: (96, 96, 12288),
}
BERTS = {"bert-base": Bert(pooler=True, nsp=True)}
PYTHIAS = {
    "pythia-70m": GPTNeoX(num_layers=6, num_heads=8, hidden_size=512),
    "pythia-160m": GPTNeoX(num_layers=12, num_heads=12, hidden_size=768),
    "pythia-410m": GPTNeoX(num_layers=24, num_heads=16, hidden_size=1024),
}
V11: dict[str, Any] = dict(tie_embeddings=False, gated=True, scaled=False)
T5S = {
    "t5-small": T5(),
    "t5-base": T5(num_layers=12, num_heads=12, hidden_size=768, mlp_size=3072),
    "t5-v1.1-small": T5(num_layers=8, num_heads=6, head_size=64, hidden_size=512, mlp_size=1024, **V11),
    "t5-v1.1-base": T5(num_layers=12, num_heads=12, hidden_size=768, mlp_size=2048, **V11),
}
LLAMAS = {
    "llama3.2-1b": Llama(
        vocab_size=128256, max_seq_len=131072, num_layers=16, num_heads=32, num_kv_heads=8, hidden_size=2048,
        mlp_size=8192, rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192),
    ),
    "llama3.1-8b": Llama(
        vocab_size=128256, max_seq_len=131072, num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096,
        mlp_size=14336, rope_theta=5e5, rope_scaling=(8.0, 1.0, 4.0, 8192), tie_embeddings=False,
    ),
    "smollm2-135m": Llama(
        vocab_size=49152, max_seq_len=8192, num_layers=30, num_heads=9, num_kv_heads=3, hidden_size=576,
        mlp_size=1536, rope_theta=1e5,
    ),
    "qwen2.5-0.5b": Llama(
        vocab_size=151936, max_seq_len=32768, num_layers=24, num_heads=14, num_kv_heads=2, hidden_size=896,
        mlp_size=4864, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True,
    ),
    "qwen2.5-1.5b": Llama(
        vocab_size=151936, max_seq_len=131072, num_layers=28, num_heads=12, num_kv_heads=2, hidden_size=1536,
        mlp_size=8960, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True,
    ),
    "qwen3-0.6b": Llama(
        vocab_size=151936, max_seq_len=40960, num_layers=28, num_heads=16, num_kv_heads=8, hidden_size=1024,
        head_size=128, mlp_size=3072, rope_theta=1e6, norm_eps=1e-6, qk_norm=True,
    ),
}
GEMMAS = {"gemma3-270m": Gemma(num_kv_heads=1, head_size=256, mlp_size=2048)}
RELEASED: dict[str, Model] = {**LLAMAS, **GEMMAS, **BERTS, **PYTHIAS, **T5S}
# fmt: on


SIZES = ("num_layers", "num_heads", "hidden_size", "max_seq_len", "vocab_size")  # that every family of decoders has


def names() -> list[str]:
    """Every preset's name."""
    return (
        ["tiny"]
        + [f"gpt2-{n}" for n in GPT2_SIZES]
        + list(HUGGING_FACE)
        + [f"d{d}" for d in DEPTHS]
        + [f"gpt2:d{d}" for d in DEPTHS]
        + [f"gpt3:c{c}" for c in GPT3_WIDTHS]
        + list(RELEASED)
    )


def preset(name: str, family: str = "", **changes: Any) -> Model:
    """The model of a preset, with fields changed.

    family: another family than the preset's, which gets the preset's layers, heads, width, length and vocabulary

    A depth that is not in the table gets 64 columns per layer and heads of 64: the table's own rule at d6 and d12.
    Raises HandgradError for an unknown name, and for a field that the family lacks.

    >>> preset("gpt2-124m").hidden_size, preset("d8").hidden_size, preset("gpt3:c5140").hidden_size
    (768, 512, 5120)
    >>> preset("d8", "llama").mlp_size, preset("qwen2.5-0.5b").num_kv_heads
    (1408, 2)
    """
    key = name.lower()
    model: Model = RELEASED[key] if key in RELEASED else GPT2(**_gpt2_sizes(name))
    if family in ("", model.family):
        return create(model.family, asdict(model) | changes)
    return create(family, {field: getattr(model, field) for field in SIZES} | changes)


def _gpt2_sizes(name: str) -> dict[str, Any]:
    """The sizes of a GPT-2 or GPT-3 by its preset's name."""
    seq_len, row = 1024, None
    key = name.lower().removeprefix("gpt2:")
    if key == "tiny":  # the Shakespeare recipe's
        seq_len, row = 64, (4, 4, 128)
    elif key.startswith("gpt2"):
        row = GPT2_SIZES.get(HUGGING_FACE.get(key, key.removeprefix("gpt2-")))
    elif key.startswith("gpt3:c") and key[6:].isdigit():
        seq_len, row = 2048, GPT3_WIDTHS.get(int(key[6:]))
    elif key.startswith("d") and key[1:].isdigit() and int(key[1:]) > 0:
        depth = int(key[1:])
        row = (depth, *DEPTHS.get(depth, (depth, 64 * depth)))
    if row is None:
        sizes = "d6 .. d84 (or any d<layers>), gpt3:c384 .. gpt3:c12288"
        rule = f"a preset is tiny, {', '.join(HUGGING_FACE)}, {sizes}, {', '.join(RELEASED)}"
        raise HandgradError("model", rule, f"'{name}'", hint=did_you_mean(key, names(), OTHERS))
    layers, heads, hidden = row
    return dict(num_layers=layers, num_heads=heads, hidden_size=hidden, max_seq_len=seq_len, vocab_size=50257)


def gpt2(name: str = "124m", **changes: Any) -> GPT2:
    """A GPT2 by preset name ("124m" is "gpt2-124m"), with fields changed.

    >>> gpt2("124m", dropout=0.1).num_layers
    12
    """
    return GPT2(**(_gpt2_sizes(name if not name[0].isdigit() else "gpt2-" + name) | changes))
