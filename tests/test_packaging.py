"""What is installed: the compiler's messages, the wheel's name, the hints of a copy, `python -m handgrad`."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import handgrad as hg
from handgrad.backends.cpu.library import PATH
from handgrad.core import install
from handgrad.core.errors import HandgradError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
setuptools = pytest.importorskip("setuptools", "77")


def script(cc=None):
    """The names of setup.py, with this compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", cc) if cc else patch.delenv("CC", raising=False)
        return runpy.run_path(str(ROOT / "setup.py"))


def fake_compiler(folder, macros, works=True):
    """A compiler that defines these macros and, if it works, accepts everything."""
    path = folder / "fakecc"
    lines = "\\n".join(f"#define {name} {value}" for name, value in macros.items())
    path.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) printf "{lines}\\n";; esac\nexit {0 if works else 1}\n')
    path.chmod(0o755)
    return str(path)


# the compiler -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cc", ["/nonexistent", "no-such-compiler --flag", "broken"])
def test_no_compiler_is_one_line(cc, tmp_path):
    if cc == "broken":
        cc = fake_compiler(tmp_path, {}, works=False)
    with pytest.raises(SystemExit) as end:
        script(cc)["check_compiler"]()
    assert end.value.code == (
        f"handgrad needs a C compiler to build its kernels, but '{cc}' does not work. "
        "hint: install gcc 11 or newer, or set CC to it"
    )


@pytest.mark.parametrize(
    ("macros", "line"),
    [
        ({"__GNUC__": 10}, "handgrad's kernels need gcc 11 or newer, but '{}' is gcc 10. hint: "),
        (
            {"__GNUC__": 4, "__clang__": 1, "__clang_major__": 13},
            "handgrad's kernels need clang 14 or newer, but '{}' is clang 13",
        ),
        ({}, "need gcc 11 or newer, but '{}' is gcc 0"),
        ({"__GNUC__": 11}, None),
        ({"__GNUC__": 4, "__clang__": 1, "__clang_major__": 14}, None),  # clang calls itself gcc 4
    ],
)
def test_an_old_compiler_is_one_line(macros, line, tmp_path):
    cc = fake_compiler(tmp_path, macros)
    if line is None:
        return script(cc)["check_compiler"]()
    with pytest.raises(SystemExit) as end:
        script(cc)["check_compiler"]()
    assert line.format(cc) in end.value.code and "\n" not in end.value.code


@pytest.mark.skipif(shutil.which("pip") is None and not (Path(sys.executable).parent / "pip").exists(), reason="no pip")
def test_pip_shows_the_line_without_a_compiler(tmp_path):
    """`pip install .` where there is no cc at all."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    env = os.environ | {"PATH": str(tmp_path)} | {"CC": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=tmp_path)
    assert (
        done.returncode
        and "handgrad needs a C compiler to build its kernels, but 'cc' does not work." in done.stdout + done.stderr
    )


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang")
def test_clang_accepts_every_kernel_without_a_warning(tmp_path):
    names = script("clang")
    header = runpy.run_path(str(names["CPU"] / "arguments.py"))["header"]
    (tmp_path / "arguments.h").write_text(header(names["PACKAGE"]))
    for source in [names["CPU"] / "gemm.c", *sorted(names["PACKAGE"].glob("ops/*/cpu.c"))]:
        for (dtype, isa), flags in names["X86_64" if names["processor"]() == "x86_64" else "PORTABLE"].items():
            words = [*names["FLAGS"], *flags, f"-DHG_DTYPE={dtype}", f"-DHG_ISA={isa}", f"-I{tmp_path}"]
            words += ["-Wno-unknown-pragmas", "-fsyntax-only", "-Werror"]
            done = subprocess.run(["clang", *words, str(source)], capture_output=True, text=True)
            assert not done.returncode, done.stderr[:3000]


# the wheel --------------------------------------------------------------------------------------------------------------

READELF = """
  NEEDED             Shared library: [libm.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [{needed}]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
  0x0010:   Name: GLIBC_2.14  Flags: none  Version: 3
  0x0020:   Name: GLIBC_{glibc}  Flags: none  Version: 2
"""


@pytest.mark.parametrize(
    ("needed", "glibc", "expected"),
    [
        ("libm.so.6", "2.28", True),
        ("libm.so.6", "2.2.5", True),
        ("libm.so.6", "2.29", False),
        ("libm.so.6", "2.4", True),
        ("libm.so.6", "3.0", False),
        ("libgomp.so.1", "2.17", False),
        ("libomp.so.5", "2.17", False),
    ],
)
def test_the_manylinux_tag_is_given_where_it_is_true(tmp_path, monkeypatch, needed, glibc, expected):
    (tmp_path / "lib.so").touch()
    (tmp_path / "readelf").write_text(f"#!/bin/sh\n/bin/cat <<'E'\n{READELF.format(needed=needed, glibc=glibc)}E\n")
    (tmp_path / "readelf").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    is_manylinux = script()["is_manylinux"]
    assert is_manylinux(tmp_path / "lib.so") is expected
    assert is_manylinux(tmp_path / "none.so") is False
    (tmp_path / "readelf").unlink()
    assert is_manylinux(tmp_path / "lib.so") is False  # unknown is not true


def compiler(name):
    """Whether a compiler is here and works."""
    return shutil.which(name) is not None


@pytest.mark.parametrize(
    ("cc", "processor"),
    [
        pytest.param("cc", os.uname().machine, marks=pytest.mark.skipif(not compiler("cc"), reason="no cc")),
        pytest.param(
            "aarch64-linux-gnu-gcc",
            "aarch64",
            marks=pytest.mark.skipif(not compiler("aarch64-linux-gnu-gcc"), reason="no cross compiler"),
        ),
    ],
)
@pytest.mark.skipif(not os.environ.get("HANDGRAD_SLOW_TESTS"), reason="half a minute: HANDGRAD_SLOW_TESTS=1")
def test_a_wheel_holds_the_kernels_and_is_named_after_them(cc, processor, tmp_path):
    """One wheel for any Python; without tests and build files, with the kernels of the processor in its name."""
    copy = shutil.copytree(
        ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "*.so", "__pycache__")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(copy),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CC": cc, "CFLAGS": "-O0"}, timeout=900
    )
    assert not done.returncode, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"handgrad-[\d.]+-py3-none-(linux|manylinux_2_28)_{processor}\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "handgrad/backends/cpu/libhandgrad_cpu.so" in names and "handgrad/__main__.py" in names
    assert not [name for name in names if "/test_" in name or name.endswith(".o") or name.startswith("tests/")]
    (meta,) = (name for name in names if name.endswith("WHEEL"))
    text = zipfile.ZipFile(wheel).read(meta).decode()
    assert f"Tag: {wheel.stem.split('-', 2)[2]}" in text and "Root-Is-Purelib: false" in text
    machine = zipfile.ZipFile(wheel).read("handgrad/backends/cpu/libhandgrad_cpu.so")[18]  # e_machine of the ELF header
    assert machine == {"x86_64": 62, "aarch64": 183}[processor]


def test_kernels_that_do_not_load_say_which_library_is_missing(monkeypatch):
    def missing(path):
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    library = import_module("handgrad.backends.cpu.library")
    monkeypatch.setattr(library.ctypes, "CDLL", missing)
    line = r"\[cpu\] the compiled kernels do not load: libgomp.so.1: .* hint: apt-get install libgomp1"
    with pytest.raises(HandgradError, match=line):
        library.Library()


# the installed copy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'handgrad[cuda]'"),
        ({"url": "https://x/handgrad.whl", "archive_info": {}}, "pip install 'handgrad[cuda]'"),
        ({"url": "file://{}", "dir_info": {}}, "pip install '{}[cuda]'"),
        ({"url": "file:///gone", "dir_info": {}}, "pip install 'handgrad[cuda]'"),
        (
            {"url": "https://host/handgrad.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'handgrad[cuda] @ git+https://host/handgrad.git'",
        ),
    ],
)
def test_hints_name_where_an_installed_copy_came_from(origin, command, monkeypatch, tmp_path):
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    if origin and "{}" in origin["url"]:
        origin["url"] = origin["url"].format(str(clone).replace(" ", "%20"))
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(install, "distribution", lambda name: type("D", (), {"read_text": lambda self, name: text})())
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "handgrad" / "core" / "install.py"))
    assert install.install_command("cuda") == command.format(clone)
    monkeypatch.chdir(clone)
    assert install.install_command("cuda") == command.format(".")


@pytest.mark.parametrize("editable", [True, False])
def test_hints_in_a_clone_are_typed_there(editable, monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(install, "__file__", str(tmp_path / "src" / "handgrad" / "core" / "install.py"))
    monkeypatch.setattr(install, "_origin", lambda: {"dir_info": {"editable": True}} if editable else {})
    monkeypatch.chdir(tmp_path)
    assert install.install_command("hub") == ("pip install -e '.[hub]'" if editable else "pip install '.[hub]'")
    monkeypatch.chdir("/")
    assert f"{tmp_path}[hub]" in install.install_command("hub")


def test_every_hint_comes_from_one_function_and_names_an_extra_that_exists():
    extras, found = set(PROJECT["optional-dependencies"]), set()
    for path in (ROOT / "src" / "handgrad").rglob("*.py"):
        if path.name != "install.py" and not path.name.startswith("test_"):
            text = path.read_text(encoding="utf-8")
            assert "handgrad[" not in text, path
            found |= set(re.findall(r"""\binstall_command\(["'](\w+)["']\)""", text))
    assert {"cuda", "hub", "parquet", "harness"} <= found <= extras and {"wandb", "tensorboard"} <= extras


def test_python_dash_m_runs_the_command_line():
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", "handgrad", "--version"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, hg.__version__, "")
    done = subprocess.run([sys.executable, "-m", "handgrad", "nonsense"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("[handgrad] the verb is one of")


def test_version_and_no_other_name_is_made_up():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", hg.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hg.nonsense  # noqa: B018


def test_the_project_says_what_it_supports():
    assert PROJECT["requires-python"] == ">=3.11"
    for minor in (11, 12, 13, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"]
    light = " ".join(PROJECT["optional-dependencies"]["dev"])
    assert all(name in light for name in ("pytest", "hypothesis", "ruff", "mypy")) and "torch" not in light
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in changes and f"## {PROJECT['version']}" in changes


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_kernels_need_no_newer_glibc_than_the_wheel_says():
    """So that .ci/wheel, which adds OpenMP's library, can name the wheel manylinux_2_28."""
    text = subprocess.run(["readelf", "--wide", "-V", PATH], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"\bGLIBC_([\d.]+)", text)}
    assert versions and max(versions) <= script()["MANYLINUX"] == (2, 28)


def test_a_clone_that_is_not_installed_knows_its_version(tmp_path):
    """The package's files alone on the path, as on a machine without an index."""
    code = "import sys; sys.path[:0] = [sys.argv[1]]; from handgrad.core import install; "
    code += "install.version = lambda name: (_ for _ in ()).throw(install.PackageNotFoundError(name)); "
    code += "import handgrad; print(handgrad.__version__)"
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == tomllib.loads((source.parent / "pyproject.toml").read_text())["project"]["version"]
