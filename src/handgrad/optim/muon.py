"""Muon (Jordan et al. 2024): hidden matrices move along orthogonalised momentum, everything else by AdamW."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import sqrt

from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.params import Bucket, Groups, Param
from handgrad.core.program import Program
from handgrad.core.tensor import Role, Tensor
from handgrad.ops import muon, muon_momentum
from handgrad.ops.muon.reference import Polynomial
from handgrad.optim.adamw import DECAY, PLAIN, AdamW, decays
from handgrad.optim.checks import check_reals
from handgrad.optim.slices import declare_low, gather

MATRIX = "matrix"
SCALES = {"adamw": "0.2 sqrt(max(m, n))", "aspect": "sqrt(max(1, m/n))"}
POLYNOMIALS = {p.name.lower(): p for p in Polynomial}
Stack = tuple[int, int, int]  # the first row of equal matrices in a parameter, rows of each, how many


@dataclass(frozen=True)
class Muon:
    """Muon's hyperparameters; the learning rate is a step scalar.

    The matrices that a model declares as hidden (`Param.parts`: q, k and v apart) take Muon's steps; tables, heads,
    norms and biases take AdamW's, with `betas` and `eps`. ops/muon/README.md has the formulas.

    momentum      decay of the momentum of matrices
    matrix_rate   the learning rate of matrices, as a multiple of AdamW's
    matrix_scale  of a step of an m x n matrix: "adamw", 0.2 sqrt(max(m, n)), has the size of AdamW's steps, so its rate
                  and decay carry over; "aspect", sqrt(max(1, m/n)), is that of Muon's authors
    orthogonalize the polynomials that do it: "polar_express" or "newton_schulz"
    row_scale     rows get the same norm before it (MuonEq);  rescale: the result gets its exact norm (Muon+)
    second_beta   decay of the mean square of each row or column of the result, which evens them out (NorMuon); 0: none
    cautious      matrices decay only where the step shrinks the weight
    per_head      q, k and v are a matrix for each head
    weight_decay  of matrices;  embedding_decay: of embeddings and heads, None: the same
    clip          the largest global L2 norm of the gradients that is not scaled down, 0 for no clipping

    Raises HandgradError for a number that is not finite or out of range.

    >>> Muon().groups.rules["matrix"]
    'Muon, rate 1 x 0.2 sqrt(max(m, n)), decay 0.1'
    """

    momentum: float = 0.95
    matrix_rate: float = 1.0
    matrix_scale: str = "adamw"
    orthogonalize: str = "polar_express"
    row_scale: bool = False
    rescale: bool = False
    second_beta: float = 0.0
    cautious: bool = False
    per_head: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    embedding_decay: float | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_reals(self, "momentum", "matrix_rate", "second_beta", "weight_decay")
        if self.embedding_decay is not None:
            check_reals(self, "embedding_decay")
        for name in ("momentum", "second_beta"):
            if getattr(self, name) >= 1.0:
                raise HandgradError("optim", f"{name} lies in [0, 1)", getattr(self, name))
        for name, words in (("matrix_scale", SCALES), ("orthogonalize", POLYNOMIALS)):
            if getattr(self, name) not in words:
                raise HandgradError("optim", f"{name} is one of {', '.join(words)}", repr(getattr(self, name)))
        rest = self._rest
        object.__setattr__(self, "betas", rest.betas)
        object.__setattr__(self, "eps", rest.eps)
        object.__setattr__(self, "clip", rest.clip)

    @property
    def scheduled_momentum(self) -> float:
        """The momentum of matrices where no schedule changes it."""
        return self.momentum

    @property
    def _rest(self) -> AdamW:
        """What updates everything but hidden matrices."""
        decay = self.weight_decay if self.embedding_decay is None else self.embedding_decay
        return AdamW(self.betas, self.eps, decay, self.clip)

    @property
    def groups(self) -> Groups:
        """Hidden matrices, then those of AdamW that decay, then the others, in every block."""
        rules = {
            MATRIX: f"Muon, rate {self.matrix_rate:g} x {SCALES[self.matrix_scale]}, decay {self.weight_decay:g}",
            DECAY: f"AdamW, decay {self._rest.weight_decay:g}",
            PLAIN: "AdamW, no decay",
        }
        return Groups((MATRIX, DECAY, PLAIN), lambda p: MATRIX if p.parts else decays(p), rules)

    def declare(self, g: Program) -> None:
        """Declares m in float32 for all, v for AdamW's parameters alone and, for bf16 weights with master weights, the
        low halves."""
        if not any(b.group == MATRIX for b in g.trained):
            rule = "muon is for runs in which a hidden matrix learns; adapters, tables and norms are AdamW's"
            raise HandgradError("optim", rule, "none", hint="--optimizer adamw")
        g.flat("m", F32)
        g.flat("v", F32, [b for b in g.trained if b.group != MATRIX])
        declare_low(g)

    def update(self, g: Program, bucket: Bucket) -> None:
        """Appends the update of one bucket. Ranks that hold shares of it send each other the momentum, and each
        orthogonalises the matrices that its share touches; all of them, where v of rows is kept, which ranks do not
        share."""
        if bucket.group != MATRIX:
            self._rest.update(g, bucket)
            return
        into: dict[str, Tensor | None] = {"m": g.slice("m", bucket)}
        u = gather(g, bucket, g.emit(muon_momentum, g.slice("grad", bucket), into=into))
        for param, (tensor, place) in zip(bucket.members, bucket.places()):
            for stack in self._stacks(param):
                self._step(g, bucket, tensor, place, stack, u)

    def _stacks(self, param: Param) -> Iterator[Stack]:
        """The matrices of a parameter; neighbours of the same size together."""
        row = 0
        for (rows, heads), same in groupby(param.parts):
            count = len(list(same)) * (heads if self.per_head else 1)
            each = rows // heads if self.per_head else rows
            yield row, each, count
            row += each * count

    def _step(self, g: Program, bucket: Bucket, tensor: Tensor, place: int, stack: Stack, u: Tensor) -> None:
        """Appends the call for a stack of a parameter, which begins at element `place` of the bucket."""
        (row, rows, count), columns = stack, tensor.shape[1]
        size, begin = rows * columns, place + row * columns
        p = g.slice("param", bucket)
        low, high = (g.share_start(bucket) - bucket.start + n for n in (0, p.size))  # of the bucket: this rank's share
        first, last = 0, count
        if not self.second_beta:
            first, last = max((low - begin) // size, 0), min(-((begin - high) // size), count)
        if first >= last:
            return
        start, stop = begin + first * size, begin + last * size
        mine = max(low, start), min(high, stop)
        name, v = f"{tensor.name}[{row + first * rows}]", None
        matrices = g.part_of(u, start, f"{name}.u", ((last - first) * rows, columns), Role.ACT)
        if self.second_beta:
            v = g.state(f"squares.{tensor.name}.{row}", (count * max(rows, columns),), F32)
        touches = mine[0] < mine[1]
        span = mine[0] - low, mine[1] - mine[0]
        has_low = touches and "low" in g.vectors
        ratio = 0.2 * sqrt(max(rows, columns)) if self.matrix_scale == "adamw" else sqrt(max(1.0, rows / columns))
        g.emit(
            muon,
            matrices,
            into={
                "p": g.within(p, *span) if touches else None,
                "low": g.within(g.slice("low", bucket), *span) if has_low else None,
                "v": v,
            },
            rows=rows,
            first=mine[0] - start if touches else 0,
            count=span[1] if touches else 0,
            start=bucket.start + mine[0] if touches else 0,
            polynomial=POLYNOMIALS[self.orthogonalize],
            row_scale=self.row_scale,
            rescale=self.rescale,
            beta2=self.second_beta,
            scale=self.matrix_rate * ratio,
            weight_decay=self.matrix_rate * self.weight_decay,
            cautious=self.cautious,
        )
