"""Compiles every cpu.c of the package into one library, once per element type and instruction set.

backends/cpu/library.py picks the variant when it opens the library, so one build serves every x86-64 machine. On other
processors this script builds only the portable variant.
"""

import os
import platform
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).parent / "src" / "handgrad"
CPU = PACKAGE / "backends" / "cpu"

AVX2 = ["-mavx2", "-mfma", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANTS = {  # (dtype, isa): flags
    ("f32", "portable"): [],
    ("bf16", "portable"): [],
}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {
        ("f32", "avx2"): AVX2,
        ("bf16", "avx2"): AVX2,
        ("f32", "avx512"): AVX512,
        ("bf16", "avx512"): AVX512,
        ("bf16", "avx512bf16"): [*AVX512, "-mavx512bf16"],
    }
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-falign-functions=64",  # the GEMM tile loses 10 % on Zen 3 if its loop is shifted by 16 bytes
    "-falign-loops=32",
    "-Wall",
    "-Wextra",
    "-I" + str(CPU / "include"),
]


def compiles(cc: str, flags: list[str]) -> bool:
    """Whether the compiler and its run-time library accept these flags."""
    with tempfile.TemporaryDirectory() as d:
        source = Path(d) / "probe.c"
        source.write_text("int main(void) { return 0; }\n")
        probe = subprocess.run([cc, *flags, str(source), "-o", str(Path(d) / "probe")], capture_output=True)
    return probe.returncode == 0


class WithoutTests(build_py):
    """Excludes the tests in the op folders from the wheel."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith("test_")]


class BuildKernels(build_ext):
    """Compiles all variants in parallel and links them; prints a failing command with its output."""

    def build_extension(self, ext: Extension) -> None:
        cc = os.environ.get("CC", "cc")
        if not compiles(cc, []):
            sys.exit(
                f"handgrad needs a C compiler to build its kernels, but '{cc}' does not work. "
                "hint: install gcc 11 or newer, or set CC to it"
            )
        openmp = ["-fopenmp"] if compiles(cc, ["-fopenmp"]) else []
        if not openmp:
            print(f"warning: {cc} has no OpenMP; the kernels will run on one thread", file=sys.stderr)
        build = Path(self.build_temp) / "kernels"
        build.mkdir(parents=True, exist_ok=True)
        header = runpy.run_path(str(CPU / "arguments.py"))["header"]  # a build has neither numpy nor the package
        (build / "arguments.h").write_text(header(PACKAGE))
        jobs = [(CPU / "run.c", [], "run.o"), (CPU / "normal.c", [], "normal.o")]
        for source in [CPU / "gemm.c", *sorted(PACKAGE.glob("ops/*/cpu.c"))]:
            stem = source.stem if source.parent == CPU else source.parent.name
            for (dtype, isa), flags in VARIANTS.items():
                if compiles_once(cc, flags):
                    jobs.append((source, [*flags, f"-DHG_DTYPE={dtype}", f"-DHG_ISA={isa}"], f"{stem}_{dtype}_{isa}.o"))

        def compile_one(job: tuple[Path, list[str], str]) -> str:
            source, flags, name = job
            run([cc, *FLAGS, f"-I{build}", *openmp, *flags, "-c", str(source), "-o", str(build / name)])
            return str(build / name)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([cc, "-shared", *openmp, *objects, "-lm", "-o", str(target)])

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # a plain library: no Python version in its name


_PROBED: dict[tuple[str, ...], bool] = {}


def compiles_once(cc: str, flags: list[str]) -> bool:
    """`compiles`, cached."""
    key = (cc, *flags)
    if key not in _PROBED:
        _PROBED[key] = compiles(cc, flags)
    return _PROBED[key]


def run(command: list[str]) -> None:
    """Runs a compiler command; if it fails, stops the build with its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


setup(
    ext_modules=[Extension("handgrad.backends.cpu.libhandgrad_cpu", sources=[])],
    cmdclass={"build_ext": BuildKernels, "build_py": WithoutTests},
)
