"""The z-score of a value among the last ones: llm.c's guard against loss and gradient spikes."""

import math
from collections import deque

WINDOW = 128  # values; until so many are known there is no score


class Outliers:
    """Remembers the last WINDOW values. `limit` is the score above which the caller should skip; 0 for never."""

    def __init__(self, limit: float):
        self.limit = limit
        self.window: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> float:
        """The score of a new value in population standard deviations, itself in the window; 0 while it fills."""
        self.window.append(value)
        if len(self.window) < WINDOW:
            return 0.0
        mean = math.fsum(self.window) / WINDOW
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in self.window) / WINDOW)
        return (value - mean) / deviation if deviation > 0 else 0.0
