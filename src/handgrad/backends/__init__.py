"""Backends turn a list of calls into running code. `BACKENDS` is the table of all."""

from handgrad.backends.base import Backend
from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.backends.ref import RefBackend
from handgrad.core.errors import HandgradError
from handgrad.core.number import I64_MAX, whole
from handgrad.core.precision import Precision


def _cpu(threads: int, precision: Precision, comm: Comm) -> Backend:
    from handgrad.backends.cpu import CpuBackend

    return CpuBackend(threads, comm)


def _cuda(threads: int, precision: Precision, comm: Comm) -> Backend:
    from handgrad.backends.cuda.backend import CudaBackend

    return CudaBackend(precision.tf32, precision.deterministic, comm=comm)


BACKENDS = {"ref": lambda threads, precision, comm: RefBackend(comm=comm), "cpu": _cpu, "cuda": _cuda}


def open_backend(name: str, threads: int = 0, precision: Precision = Precision(), comm: Comm = Alone()) -> Backend:
    """A backend by name; "auto" is cuda if there is a GPU and the packages for it, else cpu.

    threads: of the cpu backend; 0: one per physical core that this process may use
    precision: of the run; the cuda backend chooses its kernels by `tf32` and `deterministic`

    comm: the ranks that train together

    Raises HandgradError for any other name, and if the hardware or a package is missing.
    """
    if whole("backend", "threads", threads, -I64_MAX) < 0:
        raise HandgradError("backend", "threads is at least 1, or 0 for one per physical core", threads)
    return BACKENDS[resolve_name(name)](threads, precision, comm)


def resolve_name(name: str) -> str:
    """The name itself; for "auto" the backend that it means on this machine."""
    if name == "auto":
        return "cuda" if why_no_cuda() == "" else "cpu"
    if name not in BACKENDS:
        raise HandgradError("backend", f"the backend is one of auto, {', '.join(BACKENDS)}", f"'{name}'")
    return name


def best_dtype(name: str) -> str:
    """The fastest working dtype of a backend, without opening it: bf16 if the hardware multiplies bf16, else f32."""
    if resolve_name(name) == "cpu":
        from handgrad.backends.cpu.library import library

        return "bf16" if library().isa == "avx512bf16" else "f32"
    return "bf16" if resolve_name(name) == "cuda" else "f32"


def why_no_cuda() -> str:
    """What the cuda backend lacks on this machine; empty if it works."""
    try:
        from handgrad.backends.cuda.driver import find_gpus

        return "" if find_gpus() else "the driver sees no GPU"
    except HandgradError as error:
        return str(error)
