"""Step: what an optimizer step did, awaited when it is first looked at."""

from collections.abc import Callable
from typing import Any


class Step:
    """What a step did. Where a device computes it, the values are awaited when they are first looked at.

    loss: mean, in nats per token;  grad_norm: global L2 norm before clipping;  skipped: why there was no update, or ""
    skips: how many updates in a row have been skipped, this one included
    end: the backend's mark after the last launch of the step
    waited: seconds in it that belong to what was before: until a checkpoint had read the weights, and until these were
        back in the place of their average
    exposed: seconds in it that computation waited for other ranks
    """

    end: Any
    waited = exposed = 0.0

    def __init__(self, finish: Callable[[], tuple[float, float, str, int]]):
        self._finish = finish
        self._values: tuple[float, float, str, int] | None = None

    def wait(self) -> tuple[float, float, str, int]:
        """Waits until the step is over; returns loss, grad_norm, skipped and skips."""
        if self._values is None:
            self._values, self._finish = self._finish(), self.wait  # the trainer need not live as long as its steps
        return self._values

    def __repr__(self) -> str:
        loss, grad_norm, skipped, _ = self.wait()
        return f"Step(loss={loss:.4f}, grad_norm={grad_norm:.4f}{f', skipped={skipped!r}' if skipped else ''})"

    @property
    def loss(self) -> float:
        return self.wait()[0]

    @property
    def grad_norm(self) -> float:
        return self.wait()[1]

    @property
    def skipped(self) -> str:
        return self.wait()[2]

    @property
    def skips(self) -> int:
        return self.wait()[3]
