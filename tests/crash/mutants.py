"""Faults that all_instants.py must notice: each function spoils the process that calls it, before a verb runs."""

import os
import shutil
from pathlib import Path

from handgrad.io import checkpoint


def nothing_is_flushed():
    os.fsync = os.fdatasync = lambda handle: None


def model_is_not_flushed():
    forget(lambda path: path.endswith("model.safetensors"))


def frozen_is_not_flushed():
    forget(lambda path: path.endswith("frozen.safetensors"))


def links_are_not_flushed():
    """The bytes of a checkpoint are flushed, but the names in its folder only when it has its own."""
    forget(lambda path: "/.step_" in path and os.path.isdir(path))


def log_is_not_flushed():
    forget(lambda path: path.endswith("log.jsonl"))


def flushed_after_the_rename():
    """The files of a checkpoint are flushed only when its folder has its name."""
    fsync, save = os.fsync, checkpoint.save
    forget(lambda path: "step_" in path)  # under its temporary name, too

    def late(*args, **kwargs):
        path = save(*args, **kwargs)
        for file in path.iterdir():
            with file.open("rb") as opened:
                fsync(opened.fileno())
        return path

    checkpoint.save = late


def done_before_the_files():
    """A folder has its name, and DONE, before it is complete."""
    save = checkpoint.save

    def early(out_dir, step, *args, **kwargs):
        folder = Path(out_dir) / f"step_{step:06d}"
        folder.mkdir()
        (folder / checkpoint.DONE).touch()
        return save(out_dir, step, *args, **kwargs)

    checkpoint.save = early


def the_older_ones_first():
    """Older checkpoints are deleted before the new one is there."""
    save = checkpoint.save

    def hasty(out_dir, *args, **kwargs):
        for older in Path(out_dir).glob("step_*"):
            shutil.rmtree(older)
        return save(out_dir, *args, **kwargs)

    checkpoint.save = hasty


def copied_not_renamed():
    """A file reaches its name by a copy."""
    rename = os.rename

    def copy(source, target, **kwargs):
        if os.path.isdir(source):
            return rename(source, target)
        content = Path(source).read_bytes()
        with open(target, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.unlink(source)

    os.rename = os.replace = copy


def forget(which):
    """Makes os.fsync do nothing for some paths."""
    fsync = os.fsync
    os.fsync = lambda handle: None if which(os.readlink(f"/proc/self/fd/{handle}")) else fsync(handle)
