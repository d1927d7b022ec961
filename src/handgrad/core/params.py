"""Parameters, the buckets they are laid out in, and the flat vectors over buckets.

Parameters, gradients and optimizer state are flat vectors in one order: block by block, and within a block group by
group, each parameter aligned to FLAT_ALIGN elements. A bucket (one block, one group of the optimizer) is a contiguous
slice of every vector that covers it. The frozen parameters of a block are a bucket of their own, which only "param"
covers. The optimizer and the norm work on slices. A rank's share of a bucket is the
rank-th of `world` equal parts; a sharded vector holds the shares of one rank, bucket after bucket.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.ranks import ALONE, Ranks
from handgrad.core.tensor import Role, Tensor

FLAT_ALIGN = 128  # elements: 256 bytes in bf16, so that a parameter is aligned in every vector


@dataclass(frozen=True)
class Init:
    """Initial values: "normal" with a standard deviation, "uniform" between -std and std, "ones" or "zeros"; rows from
    `rows` on are zero.

    first: (rows, std) of the first rows, where a parameter is several matrices that start differently
    """

    kind: str
    std: float = 0.0
    rows: int | None = None
    first: tuple[int, float] | None = None


def normal(std: float, rows: int | None = None, first: tuple[int, float] | None = None) -> Init:
    """Independent draws from N(0, std^2)."""
    return Init("normal", std, rows, first)


def uniform(bound: float) -> Init:
    """Independent draws from [-bound, bound)."""
    return Init("uniform", bound)


ZEROS, ONES = Init("zeros"), Init("ones")


# a matrix that maps one hidden layer to the next: its rows, and how many heads they are divided among
Part = tuple[int, int]


@dataclass(frozen=True)
class Param:
    """A parameter: its handle, initial values, the block that uses it first, whether it learns or is frozen, and the
    matrices that its rows stack: none for a table, a head or a vector."""

    tensor: Tensor
    init: Init
    block: str
    trainable: bool = True
    parts: tuple[Part, ...] = ()

    @property
    def size(self) -> int:
        """Its elements, without those of padded rows."""
        rows = self.tensor.shape[0]
        return self.tensor.size if self.init.rows is None else self.tensor.size // rows * self.init.rows


@dataclass(frozen=True)
class Groups:
    """The optimizer's groups: names, in the order in which a block lays out its parameters, and a function from a
    parameter to its group. `rules` says in words how a group is updated, for whoever starts a run."""

    names: tuple[str, ...]
    group_of: Callable[[Param], str]
    rules: Mapping[str, str] = field(default_factory=dict)


ONE_GROUP = Groups(("",), lambda param: "")
FROZEN = "frozen"  # the group of parameters that no optimizer updates


@dataclass(frozen=True)
class Bucket:
    """One block's parameters of one group: elements [start, start + size) of the flat order of all parameters."""

    block: str
    group: str
    start: int
    size: int
    members: tuple[Param, ...]

    @property
    def name(self) -> str:
        return f"{self.block}.{self.group}" if self.group else self.block

    @property
    def trainable(self) -> bool:
        """Whether its parameters learn: all do, or none."""
        return self.group != FROZEN

    def places(self) -> Iterator[tuple[Tensor, int]]:
        """Its parameters, with the element of the bucket at which each starts."""
        at = 0
        for p in self.members:
            yield p.tensor, at
            at += padded_size(p.tensor)


def lay_out(params: Sequence[Param], groups: Groups, world: int = 1) -> tuple[Bucket, ...]:
    """The buckets of parameters in their flat order, each padded so that every rank's share is aligned."""
    members: dict[tuple[str, str], list[Param]] = {}
    for block in dict.fromkeys(p.block for p in params):
        for group in (*groups.names, FROZEN):
            members[block, group] = []
    for p in params:
        group = groups.group_of(p) if p.trainable else FROZEN
        if p.trainable and group not in groups.names:
            rule = f"a parameter's group is one of {', '.join(groups.names)}"
            raise HandgradError("optim", rule, f"'{group}' for {p.tensor.name}")
        members[p.block, group].append(p)
    buckets, at = [], 0
    for (block, group), found in members.items():
        size = up(sum(padded_size(p.tensor) for p in found), world * FLAT_ALIGN)
        if found:
            buckets.append(Bucket(block, group, at, size, tuple(found)))
        at += size
    return tuple(buckets)


def padded_size(param: Tensor) -> int:
    """Elements of a parameter in a flat vector, padding included."""
    return up(param.size, FLAT_ALIGN)


def up(size: int, multiple: int) -> int:
    """A size rounded up to a multiple."""
    return -(-size // multiple) * multiple


class Vector:
    """A flat vector over some buckets, in their order and without gaps between them.

    sharded: each rank holds its shares; otherwise every rank holds the whole vector.
    block: it has one element for so many of each parameter, such as the scale of a block; a divisor of FLAT_ALIGN
    """

    def __init__(
        self,
        name: str,
        dtype: DType,
        role: Role,
        buckets: Sequence[Bucket],
        sharded: bool,
        ranks: Ranks = ALONE,
        block: int = 1,
    ):
        self.block = block
        self.name, self.dtype, self.role, self.buckets = name, dtype, role, tuple(buckets)
        self.ranks, self.shares = ranks, ranks.world if sharded else 1
        self._bucket: dict[Bucket, int] = {}
        self._param: dict[str, tuple[Bucket, int]] = {}  # its bucket, and its place in it
        self.size = 0  # elements, alignment included
        for bucket in self.buckets:
            self._bucket[bucket] = self.size
            for tensor, place in bucket.places():
                self._param[tensor.name] = bucket, place
            self.size += bucket.size // self.shares // block

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    def shape(self, param: Tensor) -> tuple[int, ...]:
        """The shape of a parameter's elements: its own, or one element for each block."""
        return param.shape if self.block == 1 else (-(-param.size // self.block),)

    def nbytes_of(self, param: Tensor) -> int:
        """Bytes of a parameter's elements, on all ranks together if it is sharded."""
        return math.prod(self.shape(param)) * self.dtype.size

    def covers(self, param: Tensor) -> bool:
        """Whether a parameter has a slice of this vector."""
        return param.name in self._param

    def start(self, param: Tensor) -> int:
        """The element at which a parameter's slice starts, in a vector that is not sharded."""
        bucket, at = self._param[param.name]
        return self._bucket[bucket] + at // self.block

    def piece(self, param: Tensor, shares: int = 0) -> tuple[int, int, int]:
        """(start, low, high): where this rank's elements of a parameter start in the vector, and which they are of all
        that the vector has of it.

        shares: of a vector that is not sharded, how many a bucket is divided into; the elements of one share
        """
        bucket, at = self._param[param.name]
        at, size = at // self.block, bucket.size // self.block
        share = size // (shares or self.shares)
        begin = self.ranks.rank * share if share < size else 0
        low, high = max(at, begin), min(at + math.prod(self.shape(param)), begin + share)
        start = self._bucket[bucket] + low - (begin if self.shares > 1 else 0)
        return (start, low - at, high - at) if low < high else (0, 0, 0)

    def bucket_start(self, bucket: Bucket) -> int:
        """The element at which a bucket's slice starts."""
        return self._bucket[bucket]
