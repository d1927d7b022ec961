"""Backends turn a list of calls into running code. `BACKENDS` is the table; the rest of handgrad asks nothing else."""

from handgrad.backends.base import Backend
from handgrad.backends.ref import RefBackend
from handgrad.core.errors import HandgradError


def _cpu(threads: int) -> Backend:
    from handgrad.backends.cpu import CpuBackend

    return CpuBackend(threads)


BACKENDS = {"ref": lambda threads: RefBackend(), "cpu": _cpu}


def open_backend(name: str, threads: int = 0) -> Backend:
    """A backend by name; threads 0 takes the physical cores (the ref backend has none of its own)."""
    if threads < 0:
        raise HandgradError("backend", "threads is at least 1, or 0 for the physical cores", threads)
    if name not in BACKENDS:
        raise HandgradError("backend", f"the backend is one of {', '.join(BACKENDS)}", f"'{name}'")
    return BACKENDS[name](threads)
