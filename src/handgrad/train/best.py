"""Best: the lowest validation loss of a run, for the checkpoint that is kept beside the newest, and for patience."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.io.checkpoint import OLDER


@dataclass
class Best:
    """The lowest validation loss so far. All ranks have the same.

    step, val_loss: where it was measured, 0 and infinity before the first;  since: validations after it
    """

    step: int = 0
    val_loss: float = math.inf
    since: int = 0

    def take(self, step: int, val_loss: float) -> bool:
        """Counts a validation; whether its loss is the lowest so far. NaN never is.

        >>> best = Best()
        >>> best.take(10, 2.5), best.take(20, 2.5), best.take(30, math.nan), best
        (True, False, False, Best(step=10, val_loss=2.5, since=2))
        """
        if val_loss < self.val_loss:
            self.step, self.val_loss, self.since = step, val_loss, 0
            return True
        self.since += 1
        return False

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best": asdict(self)} if self.step else {}

    @staticmethod
    def of(saved: dict[str, Any], path: Any) -> "Best":
        """The best so far of a checkpoint's run.json, which may have none. Raises HandgradError if it is damaged."""
        found = saved.get("best", {})
        kinds = {"step": int, "val_loss": float, "since": int}
        if found and not (
            isinstance(found, dict)
            and found.keys() == kinds.keys()
            and all(type(found[name]) is kind for name, kind in kinds.items())
        ):
            rule = f"{path}/run.json gives 'best' as step, val_loss and since"
            raise HandgradError("checkpoint", rule, repr(found), hint=OLDER)
        return Best(**found)
