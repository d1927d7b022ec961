"""The lengths that texts are padded to: a program each, so that a short text is not padded to a long one."""

STEPS = tuple(n << k for k in range(3, 20) for n in (2, 3))  # 16 24 32 48 64 96 ...


def lengths(longest: int) -> list[int]:
    """Returns the lengths that have a program, ascending.

    >>> lengths(40)
    [16, 24, 32, 40]
    """
    return [n for n in STEPS if n < longest] + [longest]
