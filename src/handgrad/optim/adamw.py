"""AdamW (Loshchilov & Hutter 2019): records its update onto a program."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32, I16
from handgrad.core.errors import HandgradError
from handgrad.core.number import F32_TINY, real
from handgrad.core.params import Bucket, Groups, Param
from handgrad.core.program import Program
from handgrad.ops import adamw

DECAY, PLAIN = "decay", "plain"


def decays(param: Param) -> str:
    """The group of a parameter: matrices and embeddings decay, biases and norms do not."""
    return DECAY if len(param.tensor.shape) > 1 else PLAIN


@dataclass(frozen=True)
class AdamW:
    """AdamW's hyperparameters; the learning rate is a step scalar.

    Matrices and embeddings decay; biases and norms do not. `clip` is the largest global L2 norm of the gradients that
    is not scaled down, 0 for no clipping. Raises HandgradError for a number that is not finite or out of range: with it
    an update would make NaN.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise HandgradError("optim", "betas are two numbers", repr(self.betas))
        betas = tuple(real("optim", "beta", b) for b in self.betas)
        if not all(0.0 <= b < 1.0 for b in betas):
            raise HandgradError("optim", "both betas lie in [0, 1)", betas)
        object.__setattr__(self, "betas", betas)
        for name in ("eps", "weight_decay", "clip"):
            object.__setattr__(self, name, real("optim", name, getattr(self, name), 0.0))
        if self.eps < F32_TINY:  # a parameter that never had a gradient would become 0 / 0
            raise HandgradError("optim", f"eps is at least {F32_TINY:.2g}, the smallest normal float32", self.eps)

    @property
    def groups(self) -> Groups:
        """The groups of parameters that decay and that do not, in this order in every block."""
        return Groups((DECAY, PLAIN), decays)

    def declare(self, g: Program) -> None:
        """Declares the moments m and v in float32 and, for bf16 weights with master weights, the low halves."""
        g.flat("m", F32)
        g.flat("v", F32)
        if g.dtype is not F32 and g.master:
            g.flat("low", I16)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket."""
        g.emit(
            adamw,
            g.slice("grad", bucket),
            into={
                "p": g.slice("param", bucket),
                "m": g.slice("m", bucket),
                "v": g.slice("v", bucket),
                "low": g.slice("low", bucket) if "low" in g.vectors else None,
            },
            start=g.share_start(bucket),
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay if bucket.group == DECAY else 0.0,
        )
