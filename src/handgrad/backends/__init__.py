"""Backends turn a list of calls into running code. `BACKENDS` is the table; the rest of handgrad asks nothing else."""

from handgrad.backends.base import Backend
from handgrad.backends.ref import RefBackend
from handgrad.core.errors import HandgradError


def _cpu(threads: int, tf32: bool, deterministic: bool) -> Backend:
    from handgrad.backends.cpu import CpuBackend

    return CpuBackend(threads)


def _cuda(threads: int, tf32: bool, deterministic: bool) -> Backend:
    from handgrad.backends.cuda.backend import CudaBackend

    return CudaBackend(tf32, deterministic)


BACKENDS = {"ref": lambda threads, tf32, deterministic: RefBackend(), "cpu": _cpu, "cuda": _cuda}


def open_backend(name: str, threads: int = 0, *, tf32: bool = False, deterministic: bool = False) -> Backend:
    """A backend by name; "auto" is cuda where there is a GPU and the packages for it, else cpu.

    threads: of the cpu backend, 0 for the physical cores.  tf32, deterministic: of the cuda backend; the others never
    round factors and always repeat themselves.
    """
    if threads < 0:
        raise HandgradError("backend", "threads is at least 1, or 0 for the physical cores", threads)
    if name == "auto":
        name = "cuda" if why_no_cuda() == "" else "cpu"
    if name not in BACKENDS:
        raise HandgradError("backend", f"the backend is one of auto, {', '.join(BACKENDS)}", f"'{name}'")
    return BACKENDS[name](threads, tf32, deterministic)


def why_no_cuda() -> str:
    """What is missing for the cuda backend; empty where it works."""
    try:
        from handgrad.backends.cuda.driver import find_gpus

        return "" if find_gpus() else "the driver sees no GPU"
    except HandgradError as error:
        return str(error)
