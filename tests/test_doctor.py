"""handgrad doctor: one line per finding, an exit code for the `auto` backend, and no crash on a broken installation."""

import subprocess
import sys
from pathlib import Path

import pytest

from handgrad import backends
from handgrad.cli import doctor
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command

NAMES = ["handgrad", "cpu backend", "driver", *(name for name, *_ in doctor.LIBRARIES), "auto"]


class Device:
    """A GPU as `doctor` sees it."""

    sms = 132

    def __init__(self, index):
        pass

    def memory(self):
        return 70 << 30, 80 << 30


@pytest.fixture
def findings():
    def by_name():
        return {f.name: f for f in doctor.examine()}

    return by_name


def test_every_line_has_a_state_and_auto_is_ok(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert not err and all(line.split()[0] in (doctor.OK, doctor.OPTIONAL) for line in lines)
    for name in NAMES:
        assert any(line[9:].startswith(name) for line in lines), name
    assert lines[-1].startswith("ok       auto            ")
    if backends.why_no_cuda():
        assert "no GPU, so a run uses the cpu backend" in lines[-1]


def test_findings_that_are_not_ok_have_a_hint(findings):
    for f in findings().values():
        assert f.state == doctor.OK or f.hint or "hint: " in f.text, f


def test_no_gpu_packages_installed():
    """Without any CUDA module or package, they are optional, with the command that installs them: no word of failure."""
    code = (
        "import sys, importlib.metadata as m; from unittest import mock\n"
        "sys.modules['cuda'] = sys.modules['cudnn'] = None\n"
        "whole = m.version\n"
        "def version(name):\n"
        "    if name != 'handgrad': raise m.PackageNotFoundError(name)\n"
        "    return whole(name)\n"
        "m.version = version\n"
        "from handgrad.cli.__main__ import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    states = {line[9:25].strip(): line.split()[0] for line in done.stdout.splitlines()}
    assert {states[name] for name, *_ in doctor.LIBRARIES} == {doctor.OPTIONAL}
    assert states["driver"] == doctor.OPTIONAL and states["auto"] == doctor.OK
    assert install_command("cuda") in done.stdout and doctor.PROBLEM not in done.stdout


def test_gpus_are_listed_with_memory_and_peak(findings, monkeypatch):
    cards = [("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30), ("NVIDIA Something New", (12, 0), 80 << 30)]
    pytest.importorskip("cuda.bindings")
    from handgrad.backends.cuda import driver

    monkeypatch.setattr(driver, "find_gpus", lambda: cards)
    monkeypatch.setattr(driver, "Device", Device)
    lines = list(doctor.gpus())
    assert [f.name for f in lines] == ["GPU 0", "peaks", "GPU 1", "peaks", "several GPUs"]
    assert "9.0, 132 SMs, 71,680 of 81,920 MiB free" in lines[0].text and "another process" in lines[0].hint
    assert "989.4" in lines[1].text and "measured" in lines[3].text
    assert lines[4].text == "handgrad train --gpus 2 uses all 2"


def test_one_gpu_is_not_several(monkeypatch):
    pytest.importorskip("cuda.bindings")
    from handgrad.backends.cuda import driver

    monkeypatch.setattr(driver, "find_gpus", lambda: [("NVIDIA H200", (9, 0), 141 << 30)])
    monkeypatch.setattr(driver, "Device", Device)
    assert [f.name for f in doctor.gpus()] == ["GPU 0", "peaks"]


def test_nccl_is_found_with_its_version_or_the_hint_installs_it(monkeypatch):
    versions = {"nvidia-nccl-cu13": "2.28.9"}
    monkeypatch.setattr(doctor, "load", lambda library, package: Path(f"/lib/lib{library}.so.2"))
    monkeypatch.setattr(doctor, "version", versions.__getitem__)
    monkeypatch.setattr(doctor, "LIBRARIES", [row for row in doctor.LIBRARIES if row[0] == "NCCL"])
    (line,) = doctor.libraries()
    assert (line.state, line.text) == (doctor.OK, "nvidia-nccl-cu13 2.28.9 in /lib/libnccl.so.2")

    def none(*args):
        raise doctor.PackageNotFoundError("nccl")

    monkeypatch.setattr(doctor, "version", none)
    monkeypatch.setattr(doctor, "load", none)
    (line,) = doctor.libraries()
    assert (line.state, line.text) == (doctor.OPTIONAL, "not installed")
    assert line.hint == f"{install_command('cuda')}; only several GPUs need it"


def test_gpu_held_by_another_process_is_a_problem(monkeypatch):
    def held(index):
        raise HandgradError("cuda", "driver calls succeed", "CUDA_ERROR_OUT_OF_MEMORY")

    pytest.importorskip("cuda.bindings")
    from handgrad.backends.cuda import driver

    monkeypatch.setattr(driver, "find_gpus", lambda: [("NVIDIA H200", (9, 0), 141 << 30)])
    monkeypatch.setattr(driver, "Device", held)
    (line,) = doctor.gpus()
    assert line.state == doctor.PROBLEM and "OUT_OF_MEMORY" in line.text and "nvidia-smi" in line.hint


def test_broken_backend_sets_exit_code(monkeypatch, capsys):
    def broken(name, *args, **kwargs):
        raise HandgradError("cublaslt", "the package nvidia-cublas is installed", "none")

    monkeypatch.setattr(doctor, "open_backend", broken)
    assert main(["doctor"]) == 1
    assert "problem  auto" in capsys.readouterr().out


def test_exception_in_a_check_is_a_finding(monkeypatch):
    def bad():
        raise ValueError("torn")
        yield

    monkeypatch.setitem(doctor.CHECKS, "GPU", bad)
    found = {f.name: f for f in doctor.examine()}
    assert found["GPU"].state == doctor.PROBLEM and found["GPU"].text == "ValueError: torn"
    assert found["auto"].state == doctor.OK


def machine(root, vendor="0x10de", kind="0x030200"):
    """The files of a machine with one PCI device."""
    device = root / "sys/bus/pci/devices/0000:65:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")
    return root


def test_a_gpu_is_found_by_its_files(tmp_path):
    assert doctor.gpu_here(tmp_path / "empty") == ""
    assert doctor.gpu_here(machine(tmp_path / "nvidia")) == "an NVIDIA GPU at PCI 0000:65:00.0"
    assert doctor.gpu_here(machine(tmp_path / "other", vendor="0x1002")) == ""
    assert doctor.gpu_here(machine(tmp_path / "sound", kind="0x040300")) == ""  # the audio part of another card
    (tmp_path / "node" / "dev").mkdir(parents=True)
    (tmp_path / "node" / "dev" / "nvidia0").touch()
    assert doctor.gpu_here(tmp_path / "node") == "an NVIDIA GPU, /dev/nvidia0"


def test_a_gpu_without_its_driver_is_a_problem_and_what_to_do_is_said(monkeypatch, capsys):
    pytest.importorskip("cuda.bindings")
    from handgrad.backends.cuda import driver

    def none():
        raise HandgradError("cuda", "no NVIDIA driver found: libcuda.so.1 is missing", hint="install one")

    monkeypatch.setattr(driver, "start", none)
    monkeypatch.setattr(doctor, "gpu_here", lambda: "an NVIDIA GPU at PCI 0000:65:00.0")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem  driver          there is an NVIDIA GPU at PCI 0000:65:00.0, but no NVIDIA driver found" in out
    assert "install one; in a container: --gpus all" in out


def test_a_gpu_without_its_libraries_is_a_problem_but_cudnn_and_nccl_are_optional(monkeypatch):
    def gone(name):
        raise doctor.PackageNotFoundError(name)

    def no_library(*args):
        raise OSError("none")

    monkeypatch.setattr(doctor, "gpu_here", lambda: "an NVIDIA GPU")
    for name, value in (("version", gone), ("load", no_library), ("folder_of", no_library)):
        monkeypatch.setattr(doctor, name, value)
    states = {f.name: f.state for f in doctor.libraries()}
    assert [name for name, state in states.items() if state == doctor.PROBLEM] == ["cuda-bindings", "NVRTC", "cuBLASLt"]
    assert [name for name, state in states.items() if state == doctor.OPTIONAL] == ["cuDNN frontend", "cuDNN", "NCCL"]


def test_unwritable_cache_is_a_problem_where_there_is_a_gpu(findings, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HANDGRAD_CACHE", str(tmp_path / "file" / "inside"))
    assert findings()["cache"].state == doctor.lacking()
    monkeypatch.setattr(doctor, "gpu_here", lambda: "an NVIDIA GPU")
    assert findings()["cache"].state == doctor.PROBLEM
    monkeypatch.setenv("HANDGRAD_CACHE", str(tmp_path))
    assert "1 files" in findings()["cache"].text and findings()["cache"].state == doctor.OK


def test_auto_finds_the_backend_that_a_run_uses(findings):
    assert backends.open_backend("auto").name in findings()["auto"].text
