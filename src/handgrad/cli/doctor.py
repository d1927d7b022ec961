"""handgrad doctor: what is installed, what was found where, and what a run would be bound to. It changes nothing.

A machine without a GPU lacks nothing: what only a GPU needs is optional there. With one, it is a problem.
"""

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from handgrad.backends import best_dtype, open_backend
from handgrad.backends.cuda.libraries import folder_of
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command, own_version
from handgrad.core.plan import MIB
from handgrad.core.precision import Precision
from handgrad.models import gpt2
from handgrad.optim import AdamW
from handgrad.train.execution import Execution
from handgrad.train.record import record_train

OK, OPTIONAL, PROBLEM = "ok", "optional", "problem"
COLOURS = {OK: "green", OPTIONAL: "dim", PROBLEM: "bold red"}
LIBRARIES = (
    # what, its package, the library's name, what a GPU does without it
    ("cuda-bindings", "cuda-bindings", "", ""),
    ("NVRTC", "nvidia-cuda-nvrtc", "nvrtc", ""),
    ("cuBLASLt", "nvidia-cublas", "cublasLt", ""),
    ("cuDNN frontend", "nvidia-cudnn-frontend", "", "without it attention is handgrad's own"),
    ("cuDNN", "nvidia-cudnn-jit-cu13", "cudnn", "without it attention is handgrad's own"),
    ("NCCL", "nvidia-nccl-cu13", "nccl", "only several GPUs need it"),
)
NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI vendor and class


@dataclass(frozen=True)
class Finding:
    """One line: "ok", "optional" or "problem", of what, in words, and what to do about it."""

    state: str
    name: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Doctor:
    """No flags."""


MODULES = {"cuda-bindings": "cuda.bindings.driver", "nvidia-cudnn-frontend": "cudnn"}


def main(argv: list[str]) -> int:
    """Prints the findings; the exit code is 1 if one of them is a problem, else 0."""
    parse(Doctor, argv, "doctor")
    console = Console(highlight=False, emoji=False)
    problems = 0
    for f in examine():
        problems += f.state == PROBLEM
        line = Text.assemble((f"{f.state:8}", COLOURS[f.state]), f" {f.name:15} {f.text}")
        console.print(line, soft_wrap=True)
        if f.hint:
            console.print(Text(f"{'':24} {f.hint}", style="dim"), soft_wrap=True)
    return 1 if problems else 0


def examine() -> Iterator[Finding]:
    """All findings, the one about the backend `auto` last. Never raises: an error is a finding."""
    for name, check in CHECKS.items():
        try:
            yield from check()
        except HandgradError as error:
            yield Finding(PROBLEM, name, str(error))
        except Exception as error:  # whatever a broken installation throws
            yield Finding(PROBLEM, name, f"{type(error).__name__}: {error}")


def gpu_here(root: Path = Path("/")) -> str:
    """The NVIDIA GPU that the machine has, by the system's files, whether it works or not; empty: none."""
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            return f"an NVIDIA GPU at PCI {device.name}"
    nodes = sorted(p.name for p in root.glob("dev/nvidia[0-9]*"))
    return f"an NVIDIA GPU, /dev/{nodes[0]}" if nodes else ""


def lacking() -> str:
    """The state of what only a GPU needs, where it is not there."""
    return PROBLEM if gpu_here() else OPTIONAL


def host() -> Iterator[Finding]:
    """Versions of what runs this."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    yield Finding(OK, "handgrad", f"{own_version()}, {system}")


def cpu() -> Iterator[Finding]:
    """The CPU backend."""
    yield Finding(OK, "cpu backend", open_backend("cpu").hardware)


def driver() -> Iterator[Finding]:
    """The NVIDIA driver."""
    try:
        from handgrad.backends.cuda.driver import start

        cuda = start()
    except HandgradError as error:
        there = gpu_here()
        hint = error.hint + ("; in a container: --gpus all" if there else "; only a GPU needs it")
        yield Finding(lacking(), "driver", f"there is {there}, but {error.rule}" if there else error.rule, hint)
        return
    try:
        kernel = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text().split("\n")[0])
    except OSError:
        kernel = None
    text = f"{kernel[1] if kernel else 'version unknown'}, for CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    yield Finding(OK, "driver", text) if cuda >= 13000 else Finding(PROBLEM, "driver", text, "driver 580 or newer")


def gpus() -> Iterator[Finding]:
    """Every GPU that this process sees, and its peaks."""
    try:
        from handgrad.backends.cuda.driver import Device, find_gpus
        from handgrad.backends.cuda.peaks import peaks

        found = find_gpus()
    except HandgradError:  # reported by the driver's line
        return
    if not found:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "nvidia-smi lists them" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden} hides them"
        yield Finding(lacking() if hidden is None else OPTIONAL, "GPU", "the driver sees none", hint)
    for i, (name, (major, minor), total) in enumerate(found):
        text, which = f"{name}, compute capability {major}.{minor}", f"GPU {i}"
        try:
            device = Device(i)
            free, total = device.memory()
        except HandgradError as error:
            yield Finding(PROBLEM, which, f"{text}, {total / MIB:,.0f} MiB: {error}", "nvidia-smi shows who holds it")
            continue
        text += f", {device.sms} SMs, {free / MIB:,.0f} of {total / MIB:,.0f} MiB free"
        hint = "another process holds much of its memory: nvidia-smi" if free < 0.9 * total else ""
        yield Finding(OK, which, text, hint)
        known = peaks(name)
        if known is None:
            yield Finding(OK, "peaks", "of a GPU that the table does not list: a matmul is measured instead")
        else:
            yield Finding(OK, "peaks", f"bf16 {known.bf16:g} TFLOP/s, tf32 {known.tf32:g}, memory {known.gbps:,} GB/s")
    if len(found) > 1:
        yield Finding(OK, "several GPUs", f"handgrad train --gpus {len(found)} uses all {len(found)}")


def libraries() -> Iterator[Finding]:
    """What the CUDA backend loads: version, and where it lies."""
    for name, package, library, without in LIBRARIES:
        hint = install_command("cuda") + (f"; {without}" if without else "")
        try:
            installed = f"{package} {version(package)}"
        except PackageNotFoundError:
            installed = ""
        try:
            where = load(library, package) if library else folder_of(MODULES[package])
        except Exception as error:  # the finder and the loader raise errors of their own
            reason = str(error).strip().split("\n")[0]
            if installed:
                yield Finding(PROBLEM, name, f"{installed} is installed, but does not load: {reason}", hint)
            else:
                yield Finding(OPTIONAL if without else lacking(), name, "not installed", hint)
            continue
        yield Finding(OK, name, f"{installed or 'no package, but a library'} in {where}")


def load(library: str, package: str) -> Path:
    """Loads a library the way the backend does; returns its path."""
    from handgrad.backends.cuda import cudnn, libraries

    if library == "cudnn":  # its finder is the front end's
        if cudnn.library() is None:
            raise OSError("the front end finds no library")
    else:
        libraries.load(library, package)
    return libraries.path_of(library)


def compile_cache() -> Iterator[Finding]:
    """The folder of compiled kernels and chosen algorithms."""
    try:
        from handgrad.backends.cuda.cache import folder
    except HandgradError:  # without the packages there is nothing to keep
        return
    place = folder()
    if place is None:
        yield Finding(lacking(), "cache", "none: this user has no home folder", "HANDGRAD_CACHE=FOLDER")
        return
    files = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else []
    text = f"{place}, {len(files)} files, {sum(p.stat().st_size for p in files) / MIB:.1f} MiB"
    nearest = next(p for p in (place, *place.parents) if p.exists())
    if nearest.is_dir() and is_writable(nearest):
        yield Finding(OK, "cache", text)
    else:
        hint = "HANDGRAD_CACHE=FOLDER; else every start compiles again"
        yield Finding(lacking(), "cache", f"{text}, not writable", hint)


def is_writable(folder: Path) -> bool:
    """Whether a file can be made here; asks the system, writes nothing."""
    return os.access(folder, os.W_OK | os.X_OK)


def bound() -> Iterator[Finding]:
    """What `auto` means here, whether it works, and the choices it would make for GPT-2 124M."""
    backend = open_backend("auto")
    program = record_train(gpt2("124m"), AdamW(), 1024, Precision("bf16"), Execution(micro_batch=1), chunks=1)
    notes = dict.fromkeys(f"{c.op.name}: {backend.note(c)}" for c in program.calls if backend.note(c))
    for note in notes:
        yield Finding(OK, "bound", note)
    none = "no GPU, so a run uses " if backend.name == "cpu" and not gpu_here() else ""
    yield Finding(OK, "auto", f"{none}the {backend.name} backend, {best_dtype(backend.name)}: {backend.hardware}")


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "handgrad": host,
    "cpu backend": cpu,
    "driver": driver,
    "GPU": gpus,
    "libraries": libraries,
    "cache": compile_cache,
    "auto": bound,
}
