"""Numbers from outside: Python's and numpy's scalars become plain int and float, anything else is refused."""

import math
from numbers import Integral, Real

from handgrad.core.errors import HandgradError

F32_MAX = 3.4028234663852886e38  # the kernels compute in float32
F32_TINY = 1.1754943508222875e-38
I64_MAX = 2**63 - 1


def real(where: str, name: str, value: object, least: float | None = None) -> float:
    """A number, at least `least`, that float32 can hold, as a float.

    Raises HandgradError for any other, NaN and infinity among them.

    >>> real("optim", "clip", 1)
    1.0
    """
    rule = f"{name} is a number" if least is None else f"{name} is a number from {least:g} on"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise HandgradError(where, rule, repr(value))
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 1023 bits
        number = math.inf
    if not math.isfinite(number) or (least is not None and number < least):
        raise HandgradError(where, rule, value)
    if abs(number) > F32_MAX:
        raise HandgradError(where, f"{rule}, at most {F32_MAX:.2g} (the largest float32)", number)
    return number


def whole(where: str, name: str, value: object, least: int = 0) -> int:
    """An integer from `least` on, below 2^63, as an int. Raises HandgradError for any other, True and 1.0 among them.

    >>> whole("run", "steps", 3)
    3
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise HandgradError(where, f"{name} is a whole number", repr(value))
    number = int(value)
    if number < least:
        raise HandgradError(where, f"{name} is a number from {least} on", number)
    if number > I64_MAX:
        raise HandgradError(where, f"{name} is below 2^63", f"an integer of {number.bit_length()} bits")
    return number
