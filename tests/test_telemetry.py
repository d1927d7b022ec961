"""What is read of a card, and of which card: against a stand-in for NVML's library that lies below the real bindings."""

import ctypes
import json
import re
import sys

import pytest

from handgrad.backends.cpu import CpuBackend
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.train.log import RunLog
from handgrad.train.log_file import read_log
from handgrad.train.telemetry import Telemetry, in_words

pynvml = pytest.importorskip("pynvml")
NOT_SUPPORTED, NOT_FOUND = 3, 6
# two cards in NVML's order; a process that sees only the second calls it its first
CARDS = {b"0000:17:00.0": 1, b"0000:65:00.0": 2}


class Library:
    """The C functions that are called. Card 1 is idle and has a fan; card 2 works, has none, and is held back."""

    def __init__(self, started=0):
        self.started = started

    def __getattr__(self, name):
        if name in ("nvmlInit_v2", "nvmlInitWithFlags"):
            return lambda *_: self.started
        figures = {
            "nvmlDeviceGetPowerUsage": {1: 60_000, 2: 698_400},
            "nvmlDeviceGetEnforcedPowerLimit": {1: 700_000, 2: 700_000},
            "nvmlDeviceGetFanSpeed": {1: 30},
            "nvmlDeviceGetCurrentClocksEventReasons": {1: 0x1, 2: 0x24},
        }
        if name == "nvmlDeviceGetHandleByPciBusId_v2":
            return self.find
        if name in figures:
            return lambda card, out: self.put(out, figures[name].get(card.value))
        if name == "nvmlDeviceGetUtilizationRates":
            return self.load
        if name == "nvmlDeviceGetTemperature":
            return lambda card, kind, out: self.put(out, {1: 31, 2: 64}[card.value])
        if name == "nvmlDeviceGetClockInfo":
            return lambda card, kind, out: self.put(out, 2619 if kind.value == pynvml.NVML_CLOCK_MEM else 1605)
        if name == "nvmlDeviceGetMaxClockInfo":
            return lambda card, kind, out: self.put(out, 1980)
        if name == "nvmlDeviceGetMemoryInfo":
            return self.memory
        raise AttributeError(name)

    def find(self, bus, out):
        return self.put(out, CARDS.get(bus.value), NOT_FOUND)

    def put(self, out, value, otherwise=NOT_SUPPORTED):
        if value is None:
            return otherwise
        out._obj.value = value
        return 0

    def load(self, card, out):
        out._obj.gpu, out._obj.memory = {1: (0, 0), 2: (99, 61)}[card.value]
        return 0

    def memory(self, card, out):
        out._obj.used = card.value << 30
        return 0


@pytest.fixture
def nvml(monkeypatch):
    """Puts a library of that kind under the bindings."""

    def put(**kwargs):
        library = Library(**kwargs)
        monkeypatch.setattr(pynvml, "nvmlLib", library)
        monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", lambda name, *_: getattr(library, name))

    return put


def test_the_card_of_the_run_is_read_wherever_nvml_counts_it(nvml):
    nvml()
    figures = Telemetry("0000:65:00.0").read()
    assert figures == {
        "load": 99,
        "memory_load": 61,
        "power": 698.4,
        "power_limit": 700.0,
        "temperature": 64,
        "clock": 1605,
        "max_clock": 1980,
        "memory_clock": 2619,
        "memory": 2048,
        "throttled": "power, heat",
    }
    assert in_words(figures) == "gpu 99 % 698 W 64 C 1605 MHz, held back by power, heat"
    other = Telemetry("0000:17:00.0").read()
    assert (other["load"], other["fan"], other["throttled"]) == (0, 30, "")
    assert in_words(other) == "gpu 0 % 60 W 31 C 1605 MHz"


def test_index_0_would_be_the_wrong_card(nvml):
    """What the test above is for: the first card of NVML is not the first that CUDA sees."""
    nvml()
    assert Telemetry(next(iter(CARDS)).decode()).read() != Telemetry("0000:65:00.0").read()


@pytest.mark.parametrize(
    ("bus", "started", "part"),
    [
        ("", 0, "needs a GPU; this run has none"),
        ("0000:99:00.0", 0, "NVML cannot read the GPU at 0000:99:00.0: Not Found"),
        ("0000:17:00.0", 9, ": Driver Not Loaded"),
    ],
)
def test_a_card_that_cannot_be_read_is_named(nvml, bus, started, part):
    nvml(started=started)
    with pytest.raises(HandgradError, match=part):
        Telemetry(bus)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(HandgradError, match=r"hint: " + re.escape(install_command("cuda"))):
        Telemetry("0000:17:00.0")


def test_the_bindings_have_every_function_that_is_called():
    source = open(sys.modules["handgrad.train.telemetry"].__file__).read()
    names = {
        word.split("(")[0].rstrip(").,")
        for word in source.replace("n.nvml", " nvml").replace("n.NVML", " NVML").split()
    }
    names = {name for name in names if name.startswith(("nvmlDevice", "NVML_"))}
    assert len(names) >= 9 and all(hasattr(pynvml, name) for name in names), names
    assert isinstance(pynvml.c_nvmlUtilization_t(), ctypes.Structure)


def test_the_log_and_the_screen_show_it(tmp_path, capsys):
    gpu = {"load": 99, "power": 698.4, "temperature": 64, "clock": 1605, "throttled": "power"}
    usual = dict(loss=4.0, lr=1e-3, grad_norm=0.5, tokens=100, step_seconds=0.1)
    with RunLog(tmp_path, 100) as log:
        for step in range(1, 7):
            log.step(step, **usual, gpu=gpu if step == 4 else None)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "gpu" in line] == [4] and lines[3]["gpu"] == gpu
    shown = [line for line in capsys.readouterr().out.splitlines() if "gpu" in line]
    assert len(shown) == 1 and "gpu 99 % 698 W 64 C 1605 MHz, held back by power" in shown[0]
    assert json.dumps(gpu) in (tmp_path / "log.jsonl").read_text()


def test_a_run_looks_at_its_card_every_so_many_steps(nvml, tmp_path, monkeypatch):
    """On the CPU, told to be the second card."""
    nvml()
    monkeypatch.setattr(CpuBackend, "pci_bus", "0000:65:00.0")
    flags = "--num-layers 1 --micro-batch 1 --threads 1 --steps 5 --val-tokens 64 --sample-tokens 0"
    out = str(tmp_path / "run")
    assert main(["train", *flags.split(), "--backend", "cpu", "--out", out, "--telemetry-every", "2"]) == 0
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert {line["step"]: line["gpu"]["power"] for line in lines if "gpu" in line} == {2: 698.4, 4: 698.4}


def test_the_driver_tells_the_address(monkeypatch):
    driver = pytest.importorskip("handgrad.backends.cuda.driver")
    asked = []

    def answer(length, handle):
        asked.append(handle)
        return driver.cu.CUresult.CUDA_SUCCESS, b"0000:65:00.0\0"

    assert callable(driver.cu.cuDeviceGetPCIBusId)
    monkeypatch.setattr(driver.cu, "cuDeviceGetPCIBusId", answer)
    device = object.__new__(driver.Device)
    device.handle = 1
    assert device.pci_bus == "0000:65:00.0" and asked == [1]


@pytest.mark.gpu
def test_the_card_of_this_machine():
    from handgrad.backends import open_backend

    backend = open_backend("cuda")
    figures = Telemetry(backend.pci_bus).read()
    assert figures["power"] > 10 and 10 < figures["temperature"] < 110 and figures["memory"] > 0
