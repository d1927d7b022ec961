"""Ranks: the processes that train one model together, and what each of them holds of it."""

from dataclasses import dataclass

from handgrad.core.errors import HandgradError
from handgrad.core.number import whole

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees them.

    rank   its number, from 0
    world  how many there are
    zero   the ZeRO stage (Rajbhandari et al. 2020). A rank holds only its share of: from 1 on the optimizer state, from
           2 on the gradients too, from 3 on the parameters too
    overlaps  collectives run while calls compute: parameters are gathered a block before they are read

    Raises HandgradError for numbers that cannot be.
    """

    rank: int = 0
    world: int = 1
    zero: int = 0
    overlaps: bool = False

    def __post_init__(self) -> None:
        if whole("ranks", "world", self.world, 1) <= whole("ranks", "rank", self.rank, 0):
            raise HandgradError("ranks", f"rank is below world {self.world}", self.rank)
        if self.zero not in STAGES:
            raise HandgradError("ranks", f"zero is one of {', '.join(map(str, STAGES))}", self.zero)

    def shares(self, stage: int) -> int:
        """How many shares there are of what is sharded from this stage on: one a rank, or one."""
        return self.world if self.zero >= stage else 1


ALONE = Ranks()
