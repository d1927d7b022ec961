"""Files of a source: on the Hugging Face hub, or local in the same layout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from handgrad.core.errors import HandgradError
from handgrad.data.prepare.build import Part, sha256_of
from handgrad.data.prepare.text import size_of
from handgrad.data.prepare.workers import Job

Jobs = Callable[[Path], Iterator[tuple[int, Job]]]


def local(path: str | Path, patterns: Sequence[str]) -> list[Path]:
    """Returns the file `path`, or the files below the folder `path` that match the first pattern that any does.

    Raises HandgradError if there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    for pattern in patterns:
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if found:
            return found
    got = "no such file" if path.is_dir() else f"{path}, which is missing"
    raise HandgradError("data", f"the source must be a file, or a folder with {' or '.join(patterns)}", got)


def local_part(path: Path, jobs: Jobs, split: str = "") -> Part:
    """Returns the Part that is the file `path`."""
    return Part(path.name, size_of(path), sha256_of(path), lambda: path, jobs, split)


def hub_parts(repo: str, patterns: Sequence[str], jobs: Callable[[str], Jobs]) -> list[Part]:
    """Returns the files of the data set `repo` that match the first pattern that any does, in the order of names.

    They are downloaded one by one when their turn comes, and kept where huggingface_hub keeps things; what is there
    is not downloaded again. The revision is fixed now, so that a run continued later reads the same files.
    Raises HandgradError if the hub cannot be asked, or has no such file.
    """
    library = _library()
    with _answering(repo):
        info = library.HfApi().dataset_info(repo, files_metadata=True)
    for pattern in patterns:
        files = sorted((f for f in info.siblings if fnmatch(f.rfilename, pattern)), key=lambda f: f.rfilename)
        if files:
            break
    else:
        raise HandgradError("data", f"the data set {repo} must hold {' or '.join(patterns)}", "none")
    return [
        Part(
            f"hf:{repo}@{info.sha}/{f.rfilename}",
            f.size or 0,
            "",
            partial(_fetch, repo, f.rfilename, info.sha),
            jobs(f.rfilename),
        )
        for f in files
    ]


def _fetch(repo: str, name: str, revision: str) -> Path:
    library = _library()
    with _answering(repo):
        return Path(library.hf_hub_download(repo, name, repo_type="dataset", revision=revision))


def _library():
    try:
        import huggingface_hub
    except ImportError:
        hint = "pip install 'handgrad[hub]', or --source with files that are here"
        raise HandgradError("data", "downloads go through huggingface_hub", "no such package", hint=hint) from None
    return huggingface_hub


@contextmanager
def _answering(repo: str) -> Iterator[None]:
    """Turns whatever the hub or the network raises in the block into a HandgradError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "--source takes files that are here"
        raise HandgradError("data", f"{repo} must be downloadable", reason, hint=hint) from None
