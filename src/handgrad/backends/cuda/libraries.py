"""Finds the CUDA libraries with cuda.pathfinder: pip packages first, then the system's folders."""

import ctypes
import importlib.util
import re
from pathlib import Path

from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command


def load(name: str, package: str) -> ctypes.CDLL:
    """Opens a library such as "cublasLt". Raises HandgradError if pathfinder does not find it or it does not load."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib(name).abs_path)
    except Exception as error:  # pathfinder raises exceptions of its own types
        reason = str(error).strip().split("\n")[0]
        rule = f"the package {package} does not load: {reason}"
        raise HandgradError("cuda", rule, hint=install_command("cuda")) from None


def path_of(name: str) -> Path:
    """The path of a library that this process has loaded; the bare name if it has not."""
    mapped = re.findall(rf"\S*/lib{name}\.so\S*", Path("/proc/self/maps").read_text())
    return Path(mapped[0]) if mapped else Path(name)


def folder_of(module: str) -> Path:
    """The folder of a Python module, without importing it. Raises ImportError if there is no such module."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"no module {module}")
    return Path(found.origin).parent
