"""What stays of two texts that are too long for a model together. Training data and what reads texts agree on it."""


def cut_longest(first: int, second: int, most: int) -> tuple[int, int]:
    """Returns how many tokens of two texts stay if both have at most `most`: the longer one loses its end. This is the
    truncation "longest_first" of Hugging Face's tokenizers.

    >>> cut_longest(3, 9, 8), cut_longest(9, 3, 8), cut_longest(9, 9, 7), cut_longest(9, 8, 7), cut_longest(2, 3, 8)
    ((3, 5), (5, 3), (3, 4), (4, 3), (2, 3))
    """
    if first + second <= most:
        return first, second
    less = min(first, second, most // 2)
    return (most - less, less) if first > second else (less, most - less)
