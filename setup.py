"""Compiles every cpu.c of the package into one library, once per element type and instruction set.

backends/cpu/library.py picks the variant when it opens the library, so one build serves every x86-64 machine. For other
processors this script builds only the portable variant. CC is the compiler, with its flags if need be: what it compiles
for decides, not the machine that builds, so a cross compiler works. CFLAGS come after our own flags.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).parent / "src" / "handgrad"
CPU = PACKAGE / "backends" / "cpu"
CC = shlex.split(os.environ.get("CC", "")) or ["cc"]

OLDEST = {"gcc": 11, "clang": 14}  # major versions that the kernels are tested with
AVX2 = ["-mavx2", "-mfma", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
PORTABLE = {("f32", "portable"): [], ("bf16", "portable"): []}  # (dtype, isa): flags
X86_64 = PORTABLE | {
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
    *shlex.split(os.environ.get("CFLAGS", "")),
]
MANYLINUX = (2, 28)  # the glibc of the wheel's tag, and the libraries that every such system has
EVERYWHERE = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
EVERYWHERE |= {"ld-linux-aarch64.so.1", "libgcc_s.so.1"}


def call(command: list[str], text: str = "") -> subprocess.CompletedProcess:
    """Runs a command with this text as its input; a command that does not exist fails like one that does."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


@cache
def compiles(*flags: str) -> bool:
    """Whether the compiler and its run-time library accept these flags."""
    with tempfile.TemporaryDirectory() as d:
        source = Path(d) / "probe.c"
        source.write_text("int main(void) { return 0; }\n")
        return call([*CC, *flags, str(source), "-o", str(Path(d) / "probe")]).returncode == 0


@cache
def macros() -> dict[str, str]:
    """What the compiler defines: its version, and the processor that it compiles for."""
    return dict(re.findall(r"^#define (\w+) (.*)$", call([*CC, "-dM", "-E", "-x", "c", "-"]).stdout, re.M))


def processor() -> str:
    """The processor that the compiler compiles for, as a wheel's tag names it."""
    return next((name for name in ("x86_64", "aarch64") if f"__{name}__" in macros()), os.uname().machine)


def check_compiler() -> None:
    """Ends the build with one line unless there is a compiler that is new enough."""
    name, hint = shlex.join(CC), "hint: install gcc 11 or newer, or set CC to it"
    if not compiles():
        sys.exit(f"handgrad needs a C compiler to build its kernels, but '{name}' does not work. {hint}")
    kind, major = ("clang", "__clang_major__") if "__clang__" in macros() else ("gcc", "__GNUC__")
    version = int(macros().get(major, 0))
    if version < OLDEST[kind]:
        rule = f"handgrad's kernels need {kind} {OLDEST[kind]} or newer"
        sys.exit(f"{rule}, but '{name}' is {kind} {version}. {hint}")


def is_manylinux(library: Path) -> bool:
    """Whether a library runs on every system with the glibc of MANYLINUX: by the versions of its symbols, and the names
    of the libraries that it needs. One that needs OpenMP's does not."""
    if shutil.which("readelf") is None or not library.is_file():
        return False
    text = call(["readelf", "--wide", "-d", "-V", str(library)]).stdout
    versions = [tuple(map(int, found.split("."))) for found in re.findall(r"\bGLIBC_([\d.]+)", text)]
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    return bool(versions) and max(versions) <= MANYLINUX and needed <= EVERYWHERE


class Wheel(bdist_wheel):
    """Names the wheel: for any Python 3, without an interface to it, for the processor that was compiled for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext")
        library = Path(built.get_ext_fullpath(built.extensions[0].name))
        system = "manylinux_{}_{}".format(*MANYLINUX) if is_manylinux(library) else "linux"
        return "py3", "none", f"{system}_{processor()}"


class WithoutTests(build_py):
    """Excludes the tests in the op folders from the wheel."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith("test_")]


class BuildKernels(build_ext):
    """Compiles all variants in parallel and links them; prints a failing command with its output."""

    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        openmp = ["-fopenmp"] if compiles("-fopenmp") else []
        if not openmp:
            print(f"warning: {shlex.join(CC)} has no OpenMP; the kernels will run on one thread", file=sys.stderr)
        build = Path(self.build_temp) / "kernels"
        build.mkdir(parents=True, exist_ok=True)
        header = runpy.run_path(str(CPU / "arguments.py"))["header"]  # a build has neither numpy nor the package
        (build / "arguments.h").write_text(header(PACKAGE))
        jobs = [(CPU / "run.c", [], "run.o"), (CPU / "normal.c", [], "normal.o")]
        for source in [CPU / "gemm.c", *sorted(PACKAGE.glob("ops/*/cpu.c"))]:
            stem = source.stem if source.parent == CPU else source.parent.name
            for (dtype, isa), flags in (X86_64 if processor() == "x86_64" else PORTABLE).items():
                if compiles(*flags):
                    jobs.append((source, [*flags, f"-DHG_DTYPE={dtype}", f"-DHG_ISA={isa}"], f"{stem}_{dtype}_{isa}.o"))

        def compile_one(job: tuple[Path, list[str], str]) -> str:
            source, flags, name = job
            run([*CC, *FLAGS, f"-I{build}", *openmp, *flags, "-c", str(source), "-o", str(build / name)])
            return str(build / name)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*CC, "-shared", *openmp, *objects, "-lm", "-o", str(target)])

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # a plain library: no Python version in its name


def run(command: list[str]) -> None:
    """Runs a compiler command; if it fails, stops the build with its output."""
    done = call(command)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("handgrad.backends.cpu.libhandgrad_cpu", sources=[])],
        cmdclass={"build_ext": BuildKernels, "build_py": WithoutTests, "bdist_wheel": Wheel},
    )
