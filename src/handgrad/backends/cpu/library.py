"""The compiled kernels: opens the library, chooses the instruction set, looks up entry points."""

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Any

from handgrad.core import limits
from handgrad.core.errors import HandgradError

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
PATH = Path(__file__).parent / "libhandgrad_cpu.so"
SPINS_IDLE, SPINS_BUSY = 10_000, 1000  # measured: dev/LOG.md
RECOMPILE = "recompile the kernels: pip install -e ."


def processor() -> str:
    """The processor's name, as Linux reports it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def spin_count(root: Path = limits.ROOT) -> int:
    """How often a waiting thread looks before it sleeps.

    Some microseconds save the wake-up on idle cores. Where other processes need the cores, spinning takes their time
    and ours: a step takes twice the CPU time. libgomp spins for milliseconds unless it is told when it is opened.
    """
    found = re.findall(r" (\d+)/\d+ ", limits.read_system_file(root / "proc/loadavg"))
    others = int(found[0]) - 1 if found else 0  # running now, this thread not counted
    return SPINS_BUSY if others + limits.threads(root) > (os.cpu_count() or 1) else SPINS_IDLE


class Library:
    """libhandgrad_cpu.so, opened once per process. `isa`: HANDGRAD_ISA if set, else the widest of this machine."""

    def __init__(self) -> None:
        if not PATH.exists():
            hint = "pip install . compiles them; it needs a C compiler (gcc 11 or newer, or clang 14)"
            raise HandgradError("cpu", f"the compiled kernels are missing: there is no {PATH}", hint=hint)
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count()))
        try:
            self._dll = ctypes.CDLL(str(PATH))
        except OSError as error:  # of a library that it needs: gcc's OpenMP, which not every system has
            hint = "apt-get install libgomp1 (Fedora: libgomp)" if "libgomp" in str(error) else RECOMPILE
            raise HandgradError("cpu", f"the compiled kernels do not load: {error}", hint=hint) from None
        widest = self._dll.hg_isa()
        while widest and getattr(self._dll, f"add_bf16_{ISAS[widest]}", None) is None:
            widest -= 1  # the compiler that built the library did not support it
        wanted = os.environ.get("HANDGRAD_ISA", ISAS[widest])
        if wanted not in ISAS:
            raise HandgradError("cpu", f"HANDGRAD_ISA is one of {', '.join(ISAS)}", f"'{wanted}'")
        if ISAS.index(wanted) > widest:
            raise HandgradError("cpu", f"this processor runs up to {ISAS[widest]}", f"HANDGRAD_ISA={wanted}")
        self.isa = wanted
        if not hasattr(self._dll, "hg_skip"):
            raise HandgradError("cpu", "the compiled kernels are of an earlier version", hint=RECOMPILE)
        self.skip = ctypes.cast(self._dll.hg_skip, ctypes.c_void_p).value
        self._checked: set[tuple[str, str]] = set()
        self.run = self._dll.hg_run
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self.run.restype = None
        self.run_timed = self._dll.hg_run_timed
        self.run_timed.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self.run_timed.restype = None

    def set_threads(self, threads: int) -> None:
        """Sets the number of threads of all later kernels of this process."""
        self._dll.hg_set_threads(threads)

    def normal(self, out: int, words: int, blocks: int, std: float) -> None:
        """Fills 16 * blocks float32 at address `out` with normal numbers from as many random 32-bit words."""
        sizes = ctypes.c_int64(blocks), ctypes.c_float(std)
        self._dll.hg_normal(ctypes.c_void_p(out), ctypes.c_void_p(words), *sizes)

    def _symbol(self, name: str, dtype: str) -> Any:
        isa = "avx512" if self.isa == "avx512bf16" and dtype == "f32" else self.isa
        return getattr(self._dll, f"{name}_{dtype}_{isa}", None)

    def entry(self, name: str, dtype: str) -> int | None:
        """The address of a kernel for this instruction set; None if the library has no such kernel."""
        symbol = self._symbol(name, dtype)
        return None if symbol is None else ctypes.cast(symbol, ctypes.c_void_p).value

    def check_arguments(self, name: str, args: str) -> None:
        """Raises HandgradError unless the library was compiled from this declaration of a kernel's arguments."""
        if (name, args) not in self._checked:
            symbol = ctypes.c_char.in_dll(self._dll, f"{name}_arguments")
            compiled = ctypes.string_at(ctypes.addressof(symbol)).decode()
            if compiled != args:
                rule = f"kernel {name} was compiled for the arguments '{compiled}'"
                raise HandgradError("cpu", rule, f"'{args}'", hint=RECOMPILE)
            self._checked.add((name, args))

    def scratch(self, name: str, dtype: str, sizes: list[int]) -> int:
        """Bytes of scratch of a kernel at these sizes."""
        symbol = self._symbol(name, dtype)
        if symbol is None:
            rule = "every kernel that declares scratch exports a function of its size"
            raise HandgradError("cpu", rule, f"no {name}_{dtype}_{self.isa}")
        symbol.restype = ctypes.c_int64
        return symbol(*[ctypes.c_int64(size) for size in sizes])


_OPEN: list[Library] = []


def library() -> Library:
    """The library, opened at first use."""
    if not _OPEN:
        _OPEN.append(Library())
    return _OPEN[0]
