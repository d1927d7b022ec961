"""longest_first: how a pair of texts that is too long is truncated, alike where it is prepared and where it is read.

data prepares pairs and infer reads them. Neither imports the other, and the only rooms that both may import are ops,
which are kernels, and core.
"""


def longest_first(first: int, second: int, most: int) -> tuple[int, int]:
    """Returns how many tokens of each text are kept, together at most `most`: the longer one loses its end, as by the
    truncation "longest_first" of Hugging Face's tokenizers.

    >>> longest_first(3, 9, 8), longest_first(9, 3, 8), longest_first(9, 9, 7), longest_first(2, 3, 8)
    ((3, 5), (5, 3), (3, 4), (2, 3))
    """
    if first + second <= most:
        return first, second
    less = min(first, second, most // 2)
    return (most - less, less) if first > second else (less, most - less)
