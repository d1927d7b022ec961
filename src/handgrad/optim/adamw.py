"""AdamW (Loshchilov & Hutter 2019) with global-norm clipping: records the update onto a program."""

from dataclasses import dataclass

from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.ops import adamw, fill, global_norm


@dataclass(frozen=True)
class AdamW:
    """Hyperparameters. The learning rate is a step scalar: it changes from step to step.

    Matrices and embeddings decay; biases and norms (declared with decay=False) do not. `clip` is the largest allowed
    global L2 norm of the gradients, 0 for no clipping.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not all(0.0 <= b < 1.0 for b in self.betas):
            raise HandgradError("optim", "both betas lie in [0, 1)", self.betas)
        for name in ("eps", "weight_decay", "clip"):
            if not getattr(self, name) >= 0.0:
                raise HandgradError("optim", f"{name} is not negative", getattr(self, name))

    def record(self, g: Program) -> None:
        """Appends the norm of all gradients, then one update per bucket.

        Between the two phases "norm" and "update" the host may decide to skip the update.
        """
        g.phase = "backward"
        for info in g.params.values():
            if not g.is_written(g.grad(info.tensor)):  # nothing reads this parameter: its gradient is zero
                g.emit(fill, into={"x": g.grad(info.tensor)}, n=info.tensor.size, value=0.0)
        g.phase = "norm"
        total = g.slice("grad", 0, g.flat_size, "grads")
        g.emit(global_norm, total, into={"scalars": g.scalars}, clip=self.clip)
        g.phase = "update"
        for bucket in g.buckets:
            with g.block(bucket.block, prefix=False):
                name = f"{bucket.block}.{'decay' if bucket.decay else 'plain'}"
                part = {
                    flat: g.slice(flat, bucket.start, bucket.size, f"{name}.{flat}")
                    for flat in ("param", "grad", "m", "v")
                }
                low = (
                    None if g.dtype is F32 or not g.master else g.slice("low", bucket.start, bucket.size, f"{name}.low")
                )
                g.emit(
                    adamw,
                    part["grad"],
                    into={"p": part["param"], "m": part["m"], "v": part["v"], "low": low},
                    start=bucket.start,
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    eps=self.eps,
                    weight_decay=self.weight_decay if bucket.decay else 0.0,
                )
        g.phase = "forward"
