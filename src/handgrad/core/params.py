"""Parameters, the buckets they are laid out in, and the flat vectors over buckets.

Parameters, gradients and optimizer state are flat vectors in one order: block by block, and within a block group by
group, each parameter aligned to FLAT_ALIGN elements. A bucket (one block, one group of the optimizer) is a contiguous
slice of every vector that covers it. The optimizer and the global norm work on slices, and so would shards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.tensor import Role, Tensor

FLAT_ALIGN = 128  # elements: 256 bytes in bf16, so that a parameter is aligned in every vector


@dataclass(frozen=True)
class Init:
    """Initial values: "normal" with a standard deviation, "ones" or "zeros"; rows from `rows` on are zero."""

    kind: str
    std: float = 0.0
    rows: int | None = None


def normal(std: float, rows: int | None = None) -> Init:
    """Independent draws from N(0, std^2)."""
    return Init("normal", std, rows)


ZEROS, ONES = Init("zeros"), Init("ones")


@dataclass(frozen=True)
class Param:
    """A parameter: its handle, initial values, and the block that uses it first."""

    tensor: Tensor
    init: Init
    block: str


@dataclass(frozen=True)
class Groups:
    """The optimizer's groups: names, in the order in which a block lays out its parameters, and a function from the
    name and shape of a parameter to its group."""

    names: tuple[str, ...]
    group_of: Callable[[str, tuple[int, ...]], str]


ONE_GROUP = Groups(("",), lambda name, shape: "")


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


def lay_out(params: Sequence[Param], groups: Groups) -> tuple[Bucket, ...]:
    """The buckets of parameters in their flat order."""
    members: dict[tuple[str, str], list[Param]] = {}
    for block in dict.fromkeys(p.block for p in params):
        for group in groups.names:
            members[block, group] = []
    for p in params:
        group = groups.group_of(p.tensor.name, p.tensor.shape)
        if group not in groups.names:
            rule = f"a parameter's group is one of {', '.join(groups.names)}"
            raise HandgradError("optim", rule, f"'{group}' for {p.tensor.name}")
        members[p.block, group].append(p)
    buckets, at = [], 0
    for (block, group), found in members.items():
        size = sum(padded_size(p.tensor) for p in found)
        if found:
            buckets.append(Bucket(block, group, at, size, tuple(found)))
        at += size
    return tuple(buckets)


def padded_size(param: Tensor) -> int:
    """Elements of a parameter in a flat vector, padding included."""
    return -(-param.size // FLAT_ALIGN) * FLAT_ALIGN


class Vector:
    """A flat vector over some buckets, in their order and without gaps between them.

    sharded: each rank holds a shard; otherwise every rank holds the whole vector.
    """

    def __init__(self, name: str, dtype: DType, role: Role, buckets: Sequence[Bucket], sharded: bool):
        self.name, self.dtype, self.role, self.buckets, self.sharded = name, dtype, role, tuple(buckets), sharded
        self._bucket: dict[Bucket, int] = {}
        self._param: dict[str, int] = {}
        self.size = 0  # elements, alignment included
        for bucket in self.buckets:
            self._bucket[bucket] = at = self.size
            for p in bucket.members:
                self._param[p.tensor.name] = at
                at += padded_size(p.tensor)
            self.size = at

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    def covers(self, param: Tensor) -> bool:
        """Whether a parameter has a slice of this vector."""
        return param.name in self._param

    def start(self, param: Tensor) -> int:
        """The element at which a parameter's slice starts."""
        return self._param[param.name]

    def bucket_start(self, bucket: Bucket) -> int:
        """The element at which a bucket's slice starts."""
        return self._bucket[bucket]
