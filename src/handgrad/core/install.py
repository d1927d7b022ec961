"""The command that installs an extra, as this package was installed: from its folder, a repository, or an index."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


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
