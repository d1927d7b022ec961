"""squared_error: the loss of a regression. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import IGNORE_INDEX, Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.squared_error import reference

THREADS = 256  # of a CUDA block


class SquaredError(Op):
    """losses = (z - values)^2, and 0 where targets is IGNORE_INDEX: for evaluation."""

    name = "squared_error"
    ins = "z:N,O targets:N:i32 values:N:f32"
    outs = "losses:N:f32"
    cpu = CpuKernel("squared_error", "losses z targets values | N ignore_index")
    cases = (
        case(N=7, O=1),
        case(N=1, O=1),
        case(N=300, O=1),
        case(N=4096, O=1, real="a regression, B=4096"),
    )

    def derive(self, d: dict[str, int]) -> None:
        if d["O"] != 1:
            raise HandgradError("op", "squared_error reads one prediction a row", d["O"])
        d["ignore_index"] = IGNORE_INDEX

    def ref(self, v: Any) -> tuple:
        return (reference.squared_error(v.z, v.targets, v.values, v.ignore_index),)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _targets(rng, shape) if arg.name == "targets" else None

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _launches(c, "losses z targets values | N ignore_index")


class SquaredErrorForwardBackward(Op):
    """The losses, and dz, the gradient of scalars.loss_scale * sum(losses)."""

    name = "squared_error_forward_backward"
    ins = SquaredError.ins
    outs = "losses:N:f32 dz:N,O"
    saved = "dz"
    differentiated = "losses"
    starts_gradient = True
    cpu = CpuKernel("squared_error_forward_backward", "losses dz z targets values scalars | N ignore_index")
    cases = SquaredError.cases

    derive = SquaredError.derive
    sample = SquaredError.sample

    def ref(self, v: Any) -> tuple:
        arrays = v.z, v.targets, v.values, v.ignore_index
        dz = reference.squared_error_gradient(*arrays, v.scalars.loss_scale)
        return reference.squared_error(*arrays), dz

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"z": c.dz}

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _launches(c, "losses dz z targets values scalars | N ignore_index")


def _launches(c: Call, args: str) -> Launches:
    grid = -(-c.sizes["N"] // THREADS)
    return Launches((Kernel(f"{c.op.name}_kernel", args, grid, THREADS, 0, {"THREADS": THREADS}),))


def _targets(rng: Any, shape: tuple[int, ...]) -> Any:
    """Zeros, of which every fifth one is ignored."""
    targets = rng.integers(0, 1, shape, dtype="int32")
    targets[4::5] = IGNORE_INDEX
    return targets


squared_error, squared_error_forward_backward = SquaredError(), SquaredErrorForwardBackward()
