"""How this package was installed: its version, and the command that installs an extra in the same way."""

import json
import re
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlsplit


def own_version() -> str:
    """The version of handgrad: of the installed package, or of the clone whose files are used without an installation.

    >>> own_version().count(".")
    2
    """
    try:
        return version("handgrad")
    except PackageNotFoundError:
        text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
        return re.findall(r'^version = "(.+)"', text, re.MULTILINE)[0]


def install_command(extra: str) -> str:
    """The command that installs an extra of handgrad, such as "cuda".

    A clone names itself, for there 'handgrad[cuda]' would be another package than the one in use.
    """
    own = Path(__file__).parents[3]  # of a clone: its files are used where they lie
    origin = _origin()
    is_editable = origin.get("dir_info", {}).get("editable", False)
    if (own / "pyproject.toml").is_file():
        return f"pip install {'-e ' * is_editable}'{_short(own)}[{extra}]'"
    if "vcs_info" in origin:
        return f"pip install 'handgrad[{extra}] @ {origin['vcs_info']['vcs']}+{origin['url']}'"
    place = Path(unquote(urlsplit(origin.get("url", "")).path))
    if "dir_info" in origin and (place / "pyproject.toml").is_file():
        return f"pip install '{_short(place)}[{extra}]'"
    return f"pip install 'handgrad[{extra}]'"


def _origin() -> dict:
    """What pip recorded about where this package came from; nothing if it came from an index or was not installed."""
    try:
        return json.loads(distribution("handgrad").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return {}


def _short(folder: Path) -> str:
    """A folder as one types it here."""
    return "." if folder == Path.cwd() else str(folder)
