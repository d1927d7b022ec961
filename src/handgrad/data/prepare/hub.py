"""The files of a data set: on the Hugging Face hub, or local in the same layout."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.data.meta import sha256_of
from handgrad.data.prepare.build import Jobs, Part


def local(path: str | Path, patterns: Sequence[str]) -> list[Path]:
    """Returns `path` if it is a file, else its files that match the first pattern with a match, sorted by name.

    Raises HandgradError if there are none.
    """
    path = Path(path)
    if not os.path.isdir(path):
        require_file(path, "the source", "data")
        return [path]
    for pattern in patterns:
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if found:
            return found
    rule = f"the source must be a file, or a folder with {' or '.join(patterns)}"
    raise HandgradError("data", rule, "no such file" if os.access(path, os.R_OK | os.X_OK) else f"{path}, not readable")


def local_part(path: Path, jobs: Jobs, split: str = "") -> Part:
    """Returns the whole file `path` as a Part."""
    return Part(path.name, require_file(path, "a source", "data"), sha256_of(path), lambda: path, jobs, split)


def hub_parts(repo: str, patterns: Sequence[str], jobs: Jobs) -> list[Part]:
    """Returns the files of the hub's data set `repo` that match the first pattern with a match, sorted by name.

    Each is downloaded when its turn comes, into huggingface_hub's cache. The names contain the revision, so that a
    resumed run reads the same files.
    Raises HandgradError if the hub does not answer, or has no such file.
    """
    revision, files = _listed(repo, patterns)
    return [
        Part(f"hf:{repo}@{revision}/{name}", size, "", partial(_fetch, repo, name, revision), jobs)
        for name, size in files
    ]


def hub_files(repo: str, patterns: Sequence[str]) -> list[Path]:
    """Downloads the files that `hub_parts` would name now, and returns where they are."""
    revision, files = _listed(repo, patterns)
    return [_fetch(repo, name, revision) for name, _ in files]


def _listed(repo: str, patterns: Sequence[str]) -> tuple[str, list[tuple[str, int]]]:
    """Returns the newest revision of a data set, and the names and sizes of its files that match."""
    library = _library()
    with _answering(repo):
        info = library.HfApi().dataset_info(repo, files_metadata=True)
    for pattern in patterns:
        files = sorted((f.rfilename, f.size or 0) for f in info.siblings if fnmatch(f.rfilename, pattern))
        if files:
            return info.sha, files
    raise HandgradError("data", f"the data set {repo} must hold {' or '.join(patterns)}", "none")


def _fetch(repo: str, name: str, revision: str) -> Path:
    library = _library()
    with _answering(repo):
        return Path(library.hf_hub_download(repo, name, repo_type="dataset", revision=revision))


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        hint = f"{install_command('hub')}, or --source for local files"
        raise HandgradError("data", "downloads go through huggingface_hub", "no such package", hint=hint) from None
    return huggingface_hub


@contextmanager
def _answering(repo: str) -> Iterator[None]:
    """Re-raises whatever the hub or the network raises in the block as a HandgradError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "--source reads local files"
        raise HandgradError("data", f"{repo} must be downloadable", reason, hint=hint) from None
