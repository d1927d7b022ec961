"""Lora: low-rank adapters beside the linears of a model (Hu et al. 2021), named and counted as peft does.

Adapters belong to no family: blocks.py records them beside the weights that `Program.adapters` names. A packed weight
has an adapter for each of the matrices that Hugging Face's library keeps apart (q, k, v; gate, up).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.number import real, whole
from handgrad.core.program import Program
from handgrad.models.model import Model, declare
from handgrad.ops import linear

ALL = "all-linear"  # the target that is every linear of the body
CLASSIFIER = "classifier."  # begins the names of a head of labels, which learns whole beside adapters
A, B = "lora_A.weight", "lora_B.weight"  # of an adapter, beside the "weight" that it belongs to


@dataclass(frozen=True)
class Adapter:
    """The adapters of one weight of ours, packed: A (spans x rank, K) and B (rows of all spans, rank).

    modules: Hugging Face's names of the matrices that have one;  spans: (first row, rows) of each in the weight
    """

    rank: int
    scale: float
    dropout: float
    modules: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Rows of B."""
        return sum(count for _, count in self.spans)

    @property
    def columns(self) -> dict[str, int]:
        """The spans as attributes of the op `lora`."""
        spans = [*self.spans, *((0, 0),) * (3 - len(self.spans))]
        return {f"{key}{p}": value for p, span in enumerate(spans) for key, value in zip(("at", "n"), span)}


Adapters = Mapping[str, Adapter]  # by the name of the weight


@dataclass(frozen=True)
class Lora:
    """y = x W^T + b + (alpha / rank) B A x, with W and b frozen. B starts as zeros, A uniform in +-K^-1/2, as in peft.

    targets  names of Hugging Face's modules (q_proj, or short q; c_attn), or "all-linear": every linear of the body
    dropout  probability of dropping elements of x before A, in training. Matrices that are packed here share the mask;
             peft draws one for each

    Raises HandgradError for a number out of range.

    >>> from handgrad.models import GPT2
    >>> Lora(rank=4).adapters(GPT2(num_layers=1))["h.0.attn.c_attn.weight"].spans
    ((0, 2304),)
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole("lora", "rank", self.rank, 1))
        object.__setattr__(self, "alpha", real("lora", "alpha", self.alpha, 0.0))
        object.__setattr__(self, "dropout", real("lora", "dropout", self.dropout, 0.0))
        if isinstance(self.targets, str):  # whose letters would be targets
            raise HandgradError("lora", "targets is a tuple of names", repr(self.targets), hint=f"({self.targets!r},)")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.alpha:
            raise HandgradError("lora", "alpha is positive: with 0 nothing learns", self.alpha)
        if self.dropout >= 1.0:
            raise HandgradError("lora", "dropout lies in [0, 1)", self.dropout)
        if not self.targets:
            raise HandgradError("lora", "targets name at least one module", "none", hint=ALL)

    def adapters(self, model: Model) -> dict[str, Adapter]:
        """The adapters of a model's weights. Raises HandgradError for a target that it lacks."""
        found: dict[str, Adapter] = {}
        used, known = set(), dict[str, None]()
        for weight, parts in linears(model).items():
            known |= {module.rpartition(".")[2]: None for module, _, _ in parts}
            chosen = [(part, [t for t in self.targets if matches(t, part[0])]) for part in parts]
            used |= {target for _, targets in chosen for target in targets}
            mine = [part for part, targets in chosen if targets]
            if mine:
                modules, spans = tuple(module for module, _, _ in mine), tuple((at, n) for _, at, n in mine)
                found[weight] = Adapter(self.rank, self.alpha / self.rank, self.dropout, modules, spans)
        for target in self.targets:
            if target not in used:
                rule = f"a target is {ALL} or a linear of the model: {', '.join(known)}"
                raise HandgradError("lora", rule, f"'{target}'")
        return found

    def to_dict(self) -> dict[str, Any]:
        """What run.json keeps; `from_saved` reads it."""
        return asdict(self) | {"targets": list(self.targets)}


def from_saved(saved: object, source: object) -> Lora | None:
    """The Lora of a checkpoint's run.json, None if it has none. Raises HandgradError that names the source."""
    if saved is None:
        return None
    names = list(Lora.__dataclass_fields__)
    if not isinstance(saved, dict) or set(saved) != set(names) or not isinstance(saved["targets"], list):
        raise HandgradError("lora", f"{source} gives a lora with {', '.join(names)}", repr(saved)[:80])
    try:
        return Lora(**saved | {"targets": tuple(map(str, saved["targets"]))})
    except HandgradError as error:
        raise HandgradError("lora", f"{source} gives a lora whose {error.rule}", error.got) from None


def matches(target: str, module: str) -> bool:
    """Whether a target names a module: all-linear, the end of its name, or that without _proj."""
    return target == ALL or any(f".{module}".endswith(f".{target}{end}") for end in ("", "_proj"))


def linears(model: Model) -> dict[str, list[tuple[str, int, int]]]:
    """The weights of the linears of a model's body: (module, first row, rows) of the matrices that each is made of."""
    names, rows = (model.hugging_face.get(key) for key in ("names", "rows"))
    found, g = {}, declare(model)
    weights = {call.w.name: call.w for call in g.calls if call.op is linear}
    beside = declare(
        model, adapters={name: Adapter(1, 1.0, 0.0, (), ((0, w.shape[0]),)) for name, w in weights.items()}
    )
    for w in weights.values():
        if tensors(w.name)[0] not in beside.params:  # a head: a table of tokens, or a classifier
            continue
        theirs = names(w.name) if names else (w.name,)
        counts = rows(w.name, asdict(model)) if len(theirs) > 1 and rows else w.shape[:1]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        modules = [name.removesuffix(".weight") for name in theirs]
        found[w.name] = list(zip(modules, starts, counts, strict=True))
    return found


def tensors(weight: str) -> tuple[str, str]:
    """The names of A and B beside a weight."""
    module = weight.removesuffix("weight")
    return module + A, module + B


def adapter_params(g: Program) -> set[str]:
    """The names of the parameters of a program that belong to adapters."""
    return {name for weight in g.adapters for name in tensors(weight)}
