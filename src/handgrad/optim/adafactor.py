"""Adafactor (Shazeer & Stern 2018): records its update onto a program."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32
from handgrad.core.params import Bucket, Groups
from handgrad.core.program import Program
from handgrad.ops import adafactor
from handgrad.optim.adamw import DECAY, by_decay
from handgrad.optim.checks import check_reals
from handgrad.optim.slices import declare_low, gather, pieces, sizes_of

BETA_DECAY = 0.8  # the second moment decays by 1 - step^-0.8
EPS = 1e-30  # added to squared gradients
STEP_RMS = 1.0  # the largest RMS of a step, before the learning rate


@dataclass(frozen=True)
class Adafactor:
    """Adafactor's hyperparameters; the learning rate is a step scalar. The defaults are those that T5 was trained with.

    scale_parameter  a parameter's step is multiplied by its RMS, at least 1e-3
    relative_step    the learning rate of step t is at most 1 / sqrt(t)
    weight_decay     decoupled, of matrices and embeddings alone; T5 has none
    clip             the largest global L2 norm of the gradients that is not scaled down; T5 has 0: no clipping

    A matrix of M rows and K columns has M + K numbers of state, on every rank. Raises HandgradError for a number that
    is not finite or out of range.
    """

    scale_parameter: bool = True
    relative_step: bool = False
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        check_reals(self, "weight_decay", "clip")

    @property
    def groups(self) -> Groups:
        """The parameters that decay, and those that do not."""
        return by_decay(self.weight_decay)

    def declare(self, g: Program) -> None:
        """Declares the low halves; the states of a parameter are declared where it is updated."""
        declare_low(g)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the updates of one bucket, a call for each parameter. Ranks that hold shares of it send each other
        the gradients; each finds the means of all rows and columns, and updates its pieces."""
        found, grads = pieces(g, bucket), gather(g, bucket, g.slice("grad", bucket))
        factors = sizes_of(g, bucket, found) if self.scale_parameter else [None] * len(found)
        for piece, factor in zip(found, factors):
            rows, columns = piece.shape if len(piece.shape) == 2 else (1, piece.shape[0])  # a vector is one row
            row, col = g.state(f"row.{piece.name}", (rows,), F32), g.state(f"col.{piece.name}", (columns,), F32)
            g.emit(
                adafactor,
                g.within(grads, piece.place, rows * columns),
                factor,
                into=piece.into | {"row": row, "col": col},
                first=piece.first,
                start=piece.start,
                M=rows,
                K=columns,
                count=piece.count,
                relative_step=self.relative_step,
                decay=BETA_DECAY,
                eps=EPS,
                clip=STEP_RMS,
                weight_decay=self.weight_decay if bucket.group == DECAY else 0.0,
            )
