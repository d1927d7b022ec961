"""Model flops utilisation: the model's own flops as a fraction of the hardware's peak, by llm.c's formula."""


def flops_per_token(num_params: int, num_layers: int, hidden_size: int, seq_len: int) -> int:
    """Multiply and add count of one token's forward and backward: 6 a parameter, and attention over half of T x T.

    num_params: all of them, with the padded rows of the vocabulary, positions, norms and biases; a tied head once.
    Recomputation does not count.

    >>> flops_per_token(124_475_904, 12, 768, 1024)
    803478528
    """
    return 6 * num_params + 6 * num_layers * hidden_size * seq_len


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """The part, 0 to 1, of `peak_flops` (FLOP/s, dense, of the element type that matmuls are computed in).

    >>> round(mfu(548_400, 803_478_528, 989.4e12), 3)
    0.445
    """
    return tokens_per_second * flops_per_token / peak_flops
