"""What NVML reports of the GPU while it trains: load, power, temperature, clocks, and why clocks are lowered."""

from collections.abc import Callable
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.core.plan import MIB

# bits of NVML's reasons for clocks below their maximum; being idle and the user's own setting are left out
REASONS = {
    0x04: "power",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat",
    0x40: "hardware heat",
    0x80: "power brake",
    0x100: "display",
}


class Telemetry:
    """Reads one GPU.

    pci_bus: its address as the CUDA driver gives it. An index would not do: CUDA numbers the visible GPUs by its own
        rule, NVML all GPUs of the machine

    Raises HandgradError if there is no GPU, no package nvidia-ml-py, or NVML does not answer.
    """

    def __init__(self, pci_bus: str):
        if not pci_bus:
            raise HandgradError("telemetry", "--telemetry-every needs a GPU; this run has none")
        try:
            import pynvml
        except ImportError:
            what, hint = "--telemetry-every needs the package nvidia-ml-py", install_command("cuda")
            raise HandgradError("telemetry", what, hint=hint) from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus)
        except pynvml.NVMLError as error:
            raise HandgradError("telemetry", f"NVML cannot read the GPU at {pci_bus}: {error}") from None

    def read(self) -> dict[str, float | str]:
        """The figures of this moment; those that the GPU does not report are left out.

        load, memory_load: % of the last moments in which a kernel ran, and in which memory was at work
        power, power_limit: W;  temperature: degrees Celsius;  clock, max_clock, memory_clock: MHz
        memory: MiB in use by all processes;  fan: % of its speed
        throttled: what holds the clocks back, e.g. "power, heat"; empty for nothing
        """
        n, gpu = self._nvml, self._gpu
        figures: dict[str, Callable[[], Any]] = {
            "load": lambda: n.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "memory_load": lambda: n.nvmlDeviceGetUtilizationRates(gpu).memory,
            "power": lambda: n.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "power_limit": lambda: n.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
            "temperature": lambda: n.nvmlDeviceGetTemperature(gpu, n.NVML_TEMPERATURE_GPU),
            "clock": lambda: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_SM),
            "max_clock": lambda: n.nvmlDeviceGetMaxClockInfo(gpu, n.NVML_CLOCK_SM),
            "memory_clock": lambda: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_MEM),
            "memory": lambda: n.nvmlDeviceGetMemoryInfo(gpu).used // MIB,
            "fan": lambda: n.nvmlDeviceGetFanSpeed(gpu),
            "throttled": lambda: reasons(n.nvmlDeviceGetCurrentClocksEventReasons(gpu)),
        }
        found = {}
        for name, read in figures.items():
            try:
                found[name] = read()
            except n.NVMLError:  # a GPU in a server has no fan, a MIG slice no load of its own
                continue
        return found


def reasons(bits: int) -> str:
    """What holds the clocks back, in words.

    >>> reasons(0x24), reasons(0x1)
    ('power, heat', '')
    """
    return ", ".join(text for bit, text in REASONS.items() if bits & bit)


def in_words(gpu: dict[str, Any]) -> str:
    """A line for people.

    >>> in_words({"load": 99, "power": 698.4, "temperature": 64, "clock": 1605, "throttled": "power"})
    'gpu 99 % 698 W 64 C 1605 MHz, held back by power'
    """
    units = {"load": "%", "power": "W", "temperature": "C", "clock": "MHz"}
    shown = " ".join(f"{gpu[name]:.0f} {unit}" for name, unit in units.items() if name in gpu)
    return f"gpu {shown}" + (f", held back by {gpu['throttled']}" if gpu.get("throttled") else "")
