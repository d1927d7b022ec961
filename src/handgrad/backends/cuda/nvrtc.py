"""NVRTC: compiles kernels at run time, always to machine code for one architecture, with a cache on disk.

NVRTC compiles on one core per process, so several processes compile many kernels.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from handgrad.backends.cuda import cache
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.core.limits import cpus

INCLUDE = Path(__file__).parent / "include"
OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Source:
    """One compilation: a file, an architecture and -D definitions."""

    path: str
    arch: str
    defines: tuple[tuple[str, int | float], ...]

    @property
    def key(self) -> str:
        """The cache's name of the cubin: a hash of everything it depends on."""
        headers = [p.read_text() for p in sorted(INCLUDE.glob("*.cuh"))]
        own = [p.read_text() for p in sorted(Path(self.path).parent.glob("*.*h"))]
        return cache.key("cubin", compiler(), self.arch, self.defines, Path(self.path).read_text(), *headers, *own)


@once
def compiler() -> str:
    """The compiler's version: that of its package, with the build number, if it is installed as one."""
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return f"{major}.{minor}"


def compile_all(sources: Sequence[Source]) -> dict[Source, bytes]:
    """The cubin of every source, from the cache or compiled now on all cores."""
    found = _cached(sources)
    missing = [s for s in dict.fromkeys(sources) if s not in found]
    workers, place = min(len(missing) // 2, cpus()), cache.writable() if missing else None
    if workers > 1 and place is not None:
        _headers()  # unpacks them before several processes need them
        processes = [_start_compiler(missing[i::workers], place) for i in range(workers)]
        for process in processes:
            process.wait()
        found |= _cached(missing)
    for s in missing:
        if s not in found:  # few are missing, or a process failed, or the cache is read-only; errors are raised here
            found[s], _ = compile_one(s)
            cache.store(s.key, found[s])
    return found


def _cached(sources: Sequence[Source]) -> dict[Source, bytes]:
    """The cubins that the cache has."""
    cubins = {s: cache.load(s.key) for s in dict.fromkeys(sources)}
    return {s: cubin for s, cubin in cubins.items() if cubin is not None}


def _start_compiler(sources: Sequence[Source], place: Path) -> subprocess.Popen[str]:
    """A process that compiles these sources and stores the cubins in this folder."""
    # -P and the end of the path: a random.py in the current folder is not Python's
    command = [sys.executable, "-P", "-c", f"import sys; sys.path += {sys.path}; import {__name__} as n; n.work()"]
    environment = os.environ | {"HANDGRAD_CACHE": str(place)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    process.stdin.write(json.dumps([asdict(s) for s in sources]))
    process.stdin.close()
    return process


def compile_one(source: Source) -> tuple[bytes, str]:
    """(cubin, the assembler's report of registers and spills). Raises HandgradError with the compiler's log."""
    nvrtc = _nvrtc()
    text = Path(source.path).read_text()
    options = [f"--gpu-architecture={source.arch}", *OPTIONS, f"-I{INCLUDE}", f"-I{Path(source.path).parent}"]
    options += [f"-I{folder}" for folder in _headers()]
    options += [f"-D{name}={value}" for name, value in source.defines]
    options += ["--ptxas-options=-v"]
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), source.path.encode(), 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size + 1)  # NVRTC writes into it; Python shares single-byte objects, so at least two bytes
    nvrtc.nvrtcGetProgramLog(program, log)
    report = log.decode(errors="replace").rstrip("\0 \n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        first = next((line for line in report.splitlines() if "error" in line), "no message")
        error = HandgradError("nvrtc", f"{source.path} does not compile for {source.arch}: {status.name}", first)
        error.add_note(report)  # the whole log, in the traceback of a test
        raise error
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin, report


@once
def _nvrtc() -> ModuleType:
    """cuda.bindings.nvrtc, with its library loaded."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
        return nvrtc
    except (ImportError, RuntimeError) as error:
        raise HandgradError(
            "nvrtc", f"the package nvidia-cuda-nvrtc does not load: {error}", hint=install_command("cuda")
        ) from None


@once
def _headers() -> tuple[str, ...]:
    """The folder of cuda_bf16.h: unpacked from NVRTC, which includes it from 13.3 on, else where it is installed."""
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    if (major, minor) >= (13, 3):
        place = cache.writable()
        if place is not None:
            folder = place / f"headers-{compiler()}"
            folder.mkdir(exist_ok=True)
            (status,) = nvrtc.nvrtcInstallBundledHeaders(str(folder).encode(), 0)[:1]
            if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
                return (str(folder),)
    from cuda.pathfinder import find_nvidia_header_directory

    places = [
        find_nvidia_header_directory("cudart"),
        os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include"),
    ]
    found = [p for p in places if p and os.path.exists(os.path.join(p, "cuda_bf16.h"))]
    if not found:
        hint = "pip install 'nvidia-cuda-nvrtc>=13.3', which includes it"
        raise HandgradError("nvrtc", f"cuda_bf16.h is missing: it is in none of {places}", hint=hint)
    return tuple(found[:1])


def work() -> None:
    """The compiler process: reads jobs as JSON from stdin and stores cubins in the cache."""
    for job in json.loads(sys.stdin.read()):
        job = Source(job["path"], job["arch"], tuple((n, v) for n, v in job["defines"]))
        cache.store(job.key, compile_one(job)[0])
