"""Execution: micro-batch, memory, backend and checks of a step."""

from dataclasses import dataclass, replace
from typing import Any

from handgrad.core.backward import POLICIES
from handgrad.core.errors import HandgradError
from handgrad.core.number import I64_MAX, whole
from handgrad.core.ranks import STAGES
from handgrad.data import Data
from handgrad.models.lora import Lora
from handgrad.train.outliers import Guard

EXTRA_PROGRAMS = ("val", "sample", "score")
CHECKS = ("off", "nan")


@dataclass(frozen=True)
class Execution:
    """How a step is executed. Trainer, explain and profile take it whole.

    micro_batch      sequences per forward and backward pass; a step accumulates as many passes as it needs
    recompute        outputs that backward recomputes: "none"; "act": activation functions; "act_norm": norms too;
                     "block": all but the inputs of blocks
    head_bytes       bytes of logits in one chunk of the head; 0: the backend's default
    extra_programs   what the arena is planned for besides training: "val" for Trainer.evaluate, "sample" for
                     Trainer.generate, "score" for Trainer.scorer
    backend          "auto" (cuda where there is a GPU, else cpu), "cpu", "cuda" or "ref"
    threads          of the cpu backend; 0: the physical cores that this process may use
    check            "nan" looks at every output of every call and names the first that is not finite; slow
    guard            which updates are skipped as outliers
    train_only       patterns of the names of parameters that learn, as of the shell; the others are frozen: they have
                     neither gradients nor optimizer state. None: all learn
    lora             adapters, which alone learn; None: none
    zero             the ZeRO stage of several ranks: each holds only its share of 1 the optimizer state, 2 the
                     gradients too, 3 the parameters too; 0: of nothing
    documents        a sequence holds several documents, which attention and positions keep apart. Trainer sets it
                     where the data's objective gives their bounds

    Raises HandgradError for another word or a size that cannot be.

    >>> Execution(micro_batch=4, extra_programs=("val",)).recompute
    'act'
    """

    micro_batch: int
    recompute: str = "act"
    head_bytes: int = 0
    extra_programs: tuple[str, ...] = ("val", "sample")
    backend: str = "auto"
    threads: int = 0
    check: str = "off"
    guard: Guard = Guard()
    zero: int = 1
    train_only: tuple[str, ...] = ()
    lora: Lora | None = None
    documents: bool = False

    def __post_init__(self) -> None:
        for name in ("micro_batch", "head_bytes", "threads"):
            object.__setattr__(self, name, whole("execution", name, getattr(self, name), -I64_MAX))
        if self.micro_batch < 1:
            raise HandgradError("execution", "micro_batch is at least 1", self.micro_batch)
        if self.head_bytes < 0:
            raise HandgradError("execution", "head_bytes is not negative", self.head_bytes)
        if whole("execution", "zero", self.zero, 0) not in STAGES:
            raise HandgradError("execution", f"zero is one of {', '.join(map(str, STAGES))}", self.zero)
        if isinstance(self.train_only, str):  # whose letters would be patterns
            rule = "train_only is a tuple of patterns"
            raise HandgradError("execution", rule, repr(self.train_only), hint=f"({self.train_only!r},)")
        object.__setattr__(self, "train_only", tuple(self.train_only))
        if self.train_only and self.lora:
            rule = "adapters alone learn beside a frozen model: train_only goes without lora"
            raise HandgradError("execution", rule, f"train_only {', '.join(self.train_only)}")
        words = [("recompute", self.recompute, tuple(POLICIES)), ("check", self.check, CHECKS)]
        words += [("an extra program", word, EXTRA_PROGRAMS) for word in self.extra_programs]
        for name, word, known in words:
            if word not in known:
                raise HandgradError("execution", f"{name} is one of {', '.join(known)}", f"'{word}'")

    @property
    def tuning(self) -> dict[str, Any]:
        """What a checkpoint keeps of `lora` and `train_only`."""
        return {"lora": self.lora.to_dict() if self.lora else None, "train_only": list(self.train_only)}


def for_data(execution: Execution, data: Data) -> Execution:
    """The same, with documents kept apart where the data's objective gives their bounds."""
    return replace(execution, documents=execution.documents or "positions" in data.objective.inputs)
