"""Model flops utilisation: the part of the hardware's peak that the model itself needs."""


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """The part, 0 to 1, of `peak_flops` (FLOP/s, dense, of the element type that matmuls are computed in).

    flops_per_token: `Model.flops_per_token`

    >>> round(mfu(548_400, 803_478_528, 989.4e12), 3)
    0.445
    """
    return tokens_per_second * flops_per_token / peak_flops
