"""NVRTC: compiles kernels at run time, always to machine code for one architecture, with a cache on disk.

NVRTC compiles on one core of a process at a time, so several processes compile many kernels.
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

from handgrad.backends.cuda import cache
from handgrad.backends.cuda.libraries import INSTALL
from handgrad.core.errors import HandgradError

INCLUDE = Path(__file__).parent / "include"
OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Source:
    """One compilation: a file, an architecture and -D definitions."""

    path: str
    arch: str
    defines: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """Names the cubin by everything it depends on."""
        headers = [p.read_text() for p in sorted(INCLUDE.glob("*.cuh"))]
        own = [p.read_text() for p in sorted(Path(self.path).parent.glob("*.cuh"))]
        return cache.key("cubin", compiler(), self.arch, self.defines, Path(self.path).read_text(), *headers, *own)


@once
def compiler() -> str:
    """The compiler's version, with the build number if a package tells it."""
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return f"{major}.{minor}"


def compile_all(sources: Sequence[Source]) -> dict[Source, bytes]:
    """The cubin of every source, from the cache or compiled now on all cores."""
    names = {s: s.key for s in dict.fromkeys(sources)}
    found = {s: cache.load(name) for s, name in names.items()}
    missing = [s for s, cubin in found.items() if cubin is None]
    workers = min(len(missing) // 2, len(os.sched_getaffinity(0)))
    if workers > 1:
        _headers()  # unpacked once, before several processes need them
        environment = os.environ | {"HANDGRAD_CACHE": str(cache.folder())}
        processes = []
        for i in range(workers):
            process = subprocess.Popen(
                [sys.executable, "-c", f"import {__name__} as nvrtc; nvrtc.work()"],
                stdin=subprocess.PIPE,
                text=True,
                env=environment,
            )
            process.stdin.write(json.dumps([asdict(s) for s in missing[i::workers]]))
            process.stdin.close()
            processes.append(process)
        for process in processes:
            process.wait()
        found |= {s: cache.load(names[s]) for s in missing}
    for s in missing:
        if (
            found[s] is None
        ):  # few, or a process failed, or the cache is read-only: compile here, where errors are reported
            found[s] = compile_one(s)[0]
            cache.store(names[s], found[s])
    return found


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
    log = bytes(size + 1)  # NVRTC writes into it; a single byte would be the object that Python shares
    nvrtc.nvrtcGetProgramLog(program, log)
    report = log.decode(errors="replace").rstrip("\0 \n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise HandgradError("nvrtc", f"{source.path} compiles for {source.arch}", f"{status.name}\n{report}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin, report


@once
def _nvrtc():
    """cuda.bindings.nvrtc, with its library loaded."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
        return nvrtc
    except (ImportError, RuntimeError) as error:
        raise HandgradError(
            "nvrtc", "the compiler's package nvidia-cuda-nvrtc is installed", error, hint=INSTALL
        ) from None


@once
def _headers() -> tuple[str, ...]:
    """Folders with cuda_bf16.h: unpacked from NVRTC, which has it from 13.3 on, else those that are installed."""
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    if (major, minor) >= (13, 3):
        folder = cache.folder() / f"headers-{compiler()}"
        folder.mkdir(parents=True, exist_ok=True)
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
        hint = "pip install 'nvidia-cuda-nvrtc>=13.3', which has it"
        raise HandgradError("nvrtc", "cuda_bf16.h is installed", f"none in {places}", hint=hint)
    return tuple(found[:1])


def work() -> None:
    """The compiler process: reads jobs as JSON from stdin and stores cubins in the cache."""
    for job in json.loads(sys.stdin.read()):
        job = Source(job["path"], job["arch"], tuple((n, v) for n, v in job["defines"]))
        cache.store(job.key, compile_one(job)[0])
