"""What a BERT is called in Hugging Face's files: see `io.format.Format`."""

import re
from collections.abc import Mapping
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown

MOST = 2**16  # classes, whose names a damaged file may give

IN_BLOCK = {
    "attn.out": "attention.output.dense",
    "ln_1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "ln_2": "output.LayerNorm",
}
OUTSIDE = {
    "wte": "bert.embeddings.word_embeddings",
    "wpe": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "ln": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "mlm.dense": "cls.predictions.transform.dense",
    "mlm.ln": "cls.predictions.transform.LayerNorm",
    "mlm": "cls.predictions",
    "nsp": "cls.seq_relationship",
    "classifier": "classifier",
}
HEADS = {  # transformers' class: whether it has the masked-language-model head, the pooler, and the next-sentence head
    "BertForPreTraining": (True, True, True),
    "BertForMaskedLM": (True, False, False),
    "BertModel": (False, True, False),
}
CLASSIFIER = "BertForSequenceClassification"  # the heads of a BertModel, and one on the pooler for the classes
VALUE = ("value",)  # the labels of a regression, whatever its file calls its number
BODY = (False, False, False)  # no head: a BertModel without its pooler
OLDER = {"gamma": "weight", "beta": "bias"}  # of a LayerNorm, in files that come from TensorFlow


def _names(name: str) -> tuple[str, ...]:
    """Their tensors that are the rows of one of ours."""
    module, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"h\.(\d+)\.(.+)", module)
    if block is None:
        return (f"{OUTSIDE[module]}.{kind}",)
    at = f"bert.encoder.layer.{block[1]}."
    if block[2] == "attn.qkv":
        return tuple(f"{at}attention.self.{part}.{kind}" for part in ("query", "key", "value"))
    return (f"{at}{IN_BLOCK[block[2]]}.{kind}",)


def _renamed(name: str) -> str:
    """A tensor's name in newer files."""
    module, _, kind = name.rpartition(".")
    return f"{module}.{OLDER[kind]}" if kind in OLDER and module.endswith("LayerNorm") else name


def _decode(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which heads a file has, by its architecture, and the names of its classes."""
    named = config.get("architectures") or ["BertForPreTraining"]
    found = named[0] if isinstance(named, list) else named
    if not isinstance(found, str) or found not in (*HEADS, CLASSIFIER):
        raise HandgradError("hf", f"an architecture {', '.join(HEADS)}, {CLASSIFIER}", shown(found))
    labels: tuple[Any, ...] = ()
    if found == CLASSIFIER:
        count = config.get("num_labels", 2)
        usual = {str(id): f"LABEL_{id}" for id in range(count if type(count) is int and 0 <= count <= MOST else 0)}
        names = config.get("id2label") or usual
        if not isinstance(names, dict) or names.keys() != {str(id) for id in range(len(names))}:
            raise HandgradError("hf", "an id2label that names the classes 0, 1, ...", shown(names))
        labels = tuple(names[str(id)] for id in range(len(names))) if len(names) != 1 else VALUE
    return dict(zip(("mlm", "pooler", "nsp"), HEADS.get(found, HEADS["BertModel"]))) | {"labels": labels}


def _encode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that has these heads."""
    labels, heads = fields["labels"], (fields["mlm"], fields["pooler"], fields["nsp"])
    if labels:
        ids = {"id2label": {str(id): name for id, name in enumerate(labels)}}
        return {"architectures": [CLASSIFIER], **ids, "label2id": {name: id for id, name in enumerate(labels)}}
    return {"architectures": [next((name for name, found in HEADS.items() if found == heads), "BertModel")]}


def _only(fields: Mapping[str, Any]) -> dict[str, tuple]:
    """Keys of config.json that change the computation: the values that we compute, their default first."""
    kind = "regression" if len(fields["labels"]) == 1 else "single_label_classification"
    of_classes = {
        "problem_type": (None, kind),
        "classifier_dropout": (None, fields["dropout"]),
    }
    return {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    } | (of_classes if fields["labels"] else {})


HUGGING_FACE: dict[str, Any] = {  # see io.format.Format
    "model_types": {"bert": "BertForPreTraining"},
    "fields": {
        "vocab_size": ("vocab_size", 30522),
        "max_seq_len": ("max_position_embeddings", 512),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "hidden_size": ("hidden_size", 768),
        "mlp_size": ("intermediate_size", 3072),
        "num_types": ("type_vocab_size", 2),
        "norm_eps": ("layer_norm_eps", 1e-12),
    },
    "aliases": {},
    "shared": {"dropout": (("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)},
    "only": _only,
    "names": _names,
    "rows": lambda name, fields: (fields["hidden_size"],) * 3,
    "prefix": "bert.",
    "transposed": "(?!)",
    "ignored": r"embeddings\.position_ids|cls\..*|pooler\..*",
    "tied": ("", "wte.weight", "wte.weight"),
    "renamed": _renamed,
    "optional": {"pooler": "pooler.weight"},
    "decode": _decode,
    "encode": _encode,
}
