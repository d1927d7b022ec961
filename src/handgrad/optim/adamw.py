"""AdamW (Loshchilov & Hutter 2019): records its update onto a program."""

from dataclasses import dataclass
from typing import Any

from handgrad.core.dtypes import BF16, BYTE, F32
from handgrad.core.errors import HandgradError
from handgrad.core.params import Bucket, Groups, Param
from handgrad.core.program import Program
from handgrad.ops import adamw, adamw_bf16, adamw_int8
from handgrad.ops.adamw.op import BLOCK
from handgrad.optim.checks import check_betas, check_eps, check_reals
from handgrad.optim.slices import declare_low, pieces, sizes_of, slices

DECAY, PLAIN = "decay", "plain"
MOMENTS = {"f32": (F32, adamw), "bf16": (BF16, adamw_bf16), "int8": (BYTE, adamw_int8)}


def decays(param: Param) -> str:
    """The group of a parameter: matrices and embeddings decay, biases and norms do not."""
    return DECAY if len(param.tensor.shape) > 1 else PLAIN


def by_decay(weight_decay: float) -> Groups:
    """The groups of parameters that decay and that do not, in this order in every block."""
    rules = {DECAY: f"weight decay {weight_decay:g}", PLAIN: "no weight decay"} if weight_decay else {}
    return Groups((DECAY, PLAIN), decays, rules)


@dataclass(frozen=True)
class AdamW:
    """AdamW's hyperparameters; the learning rate is a step scalar.

    Matrices and embeddings decay; biases and norms do not.

    clip             the largest global L2 norm of the gradients that is not scaled down, 0 for no clipping
    moments          "f32", "bf16" or "int8": 8, 4 or 2.06 bytes a parameter (ops/adamw/README.md)
    scale_parameter  a parameter's step is multiplied by its RMS, at least 1e-3, as Adafactor's is: for a T5 from
                     scratch

    Raises HandgradError for a number that is not finite or out of range: with it an update would make NaN.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: str = "f32"
    scale_parameter: bool = False

    def __post_init__(self) -> None:
        check_betas(self)
        check_eps(self)
        check_reals(self, "weight_decay", "clip")
        if self.moments not in MOMENTS:
            raise HandgradError("optim", f"moments are one of {', '.join(MOMENTS)}", repr(self.moments))
        if self.scale_parameter and self.moments != "f32":
            raise HandgradError("optim", "AdamW that scales by the parameter has moments f32", self.moments)

    @property
    def groups(self) -> Groups:
        """The parameters that decay, and those that do not."""
        return by_decay(self.weight_decay)

    def declare(self, g: Program) -> None:
        """Declares the moments m and v, with a scale per block if they are of 8 bits, and the low halves."""
        dtype, _ = MOMENTS[self.moments]
        g.flat("m", dtype)
        g.flat("v", dtype)
        if dtype is BYTE:
            g.flat("m_scale", F32, block=BLOCK)
            g.flat("v_scale", F32, block=BLOCK)
        declare_low(g)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket."""
        rule: dict[str, Any] = {
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
            "weight_decay": self.weight_decay if bucket.group == DECAY else 0.0,
        }
        if self.scale_parameter:
            found = pieces(g, bucket)
            for piece, factor in zip(found, sizes_of(g, bucket, found)):
                if piece.grad.size:
                    g.emit(adamw, piece.grad, factor, into=piece.into, start=piece.start, **rule)
            return
        _, op = MOMENTS[self.moments]
        ins = (g.slice("grad", bucket), *[None] * (len(op.in_args) - 1))
        g.emit(op, *ins, into=slices(g, bucket), start=g.share_start(bucket), **rule)
