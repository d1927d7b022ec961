"""Where else a run's figures go: TensorBoard's event files, Weights & Biases. Imported only if a flag asks for them."""

import secrets
import time
from pathlib import Path
from typing import Any

from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command

NAMES = {"loss": "loss/train", "val_loss": "loss/val", "val_acc": "acc/val"}


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line of the log, by the names that they are drawn under.

    >>> scalars({"step": 3, "loss": 4.5, "seconds": 2.0, "gpu": {"power": 690.0, "throttled": "power"}})
    {'loss/train': 4.5, 'gpu/power': 690.0}
    """
    found = {NAMES.get(key, key): value for key, value in line.items() if key not in ("step", "seconds", "gpu")}
    return found | {f"gpu/{key}": value for key, value in line.get("gpu", {}).items() if not isinstance(value, str)}


class TensorBoard:
    """TensorBoard's own writer of event files.

    resumed_at: TensorBoard drops what an attempt that died wrote about later steps
    """

    NAME = "TensorBoard"

    def __init__(self, folder: Path, resumed_at: int):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise missing("--tensorboard", "tensorboard") from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        try:
            self._writer = EventFileWriter(str(folder))
        except OSError as error:
            raise HandgradError("log", f"{folder} must be writable", error.strerror) from None
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=resumed_at + 1, session_log=restart))

    def add(self, line: dict[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=line["step"], summary=summary))

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. WANDB_MODE=offline, as any of its own settings, holds here too.

    A resumed run continues the same one, whose name is kept in the run folder. Steps that an attempt that died had
    already sent stay: they are the same figures.
    """

    NAME = "Weights & Biases"

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise missing("--wandb", "wandb") from None
        path = folder / "wandb-id.txt"
        if not path.exists():
            write_text(path, secrets.token_hex(8) + "\n")
        name = path.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=project, id=name, name=folder.name, dir=str(folder), config=settings, resume="allow"
            )
        except Exception as error:  # its own, or of the network below
            hint = "wandb login, or WANDB_MODE=offline"
            raise HandgradError("log", f"Weights & Biases refuses the run: {error}", hint=hint) from None

    def add(self, line: dict[str, Any]) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def missing(flag: str, package: str) -> HandgradError:
    """The error of a package that is an extra."""
    return HandgradError("log", f"{flag} needs the package {package}", hint=install_command(package))
