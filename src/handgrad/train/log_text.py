"""The lines of a log as people read them."""

import math

from handgrad.train.telemetry import in_words


def plain_line(line: dict, total_steps: int, step_seconds: float, width: float = math.inf) -> str:
    """Returns a log line for people. One longer than `width` lacks the learning rate, or the gradient norm, too.

    >>> line = {"step": 1200, "loss": 3.412, "lr": 5.9e-4, "grad_norm": 0.4123, "tokens_per_second": 171_300.0}
    >>> plain_line(line | {"val_loss": 3.5}, 18865, 3.061)
    'step 1200/18865 | loss 3.4120 | val 3.5000 | grad 0.41 | lr 5.9e-4 | 171k tok/s | 3.06 s'
    """
    took = f"{step_seconds:.2f} s" if step_seconds >= 1 else f"{1e3 * step_seconds:.1f} ms"
    return " | ".join(fitted(parts(line, total_steps) | {"took": took}, " | ", width).values())


def fitted(shown: dict[str, str], between: str, width: float) -> dict[str, str]:
    """The pieces without those of least use, as far as the line would be longer than `width` columns."""
    for name in ("exposed", "lr", "grad_norm"):
        if len(between.join(shown.values())) > width:
            shown = {key: text for key, text in shown.items() if key != name}
    return shown


def short(number: float) -> str:
    """Returns a count in three digits.

    >>> short(985), short(17_130), short(124_439_808), short(999_999_999)
    ('985', '17.1k', '124M', '1.00B')
    """
    if number < 999.5:
        return f"{number:.0f}"
    power = next((power for power in (3, 6, 9) if number < 999.5 * 10**power), 12)
    return f"{number / 10**power:#.3g}".rstrip(".") + "kMBT"[power // 3 - 1]


def clock(seconds: float) -> str:
    """Returns a span of time as hours, minutes and seconds.

    >>> clock(31.4), clock(3725)
    ('0:31', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parts(line: dict, total_steps: int) -> dict[str, str]:
    """The pieces of a line for people, in order, by key."""
    grad_norm = line["grad_norm"]
    shown = {"step": f"step {line['step']}/{total_steps}", "loss": f"loss {line['loss']:.4f}"}
    if "val_loss" in line:
        shown["val_loss"] = f"val {line['val_loss']:.4f}"
    if "val_acc" in line:
        shown["val_acc"] = f"acc {100 * line['val_acc']:.1f} %"
    if "hellaswag" in line:
        shown["hellaswag"] = f"hellaswag {100 * line['hellaswag']:.1f} %"
    shown["grad_norm"] = f"grad {grad_norm:.2f}" if 0.1 <= grad_norm < 1000 else f"grad {grad_norm:.2g}"
    shown["lr"] = f"lr {line['lr']:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    shown["tokens_per_second"] = f"{short(line['tokens_per_second'])} tok/s"
    if "mfu" in line:
        shown["mfu"] = f"mfu {100 * line['mfu']:.1f}"
    if "exposed_ms" in line:
        shown["exposed"] = f"exposed {line['exposed_ms']:.1f} ms"
    if "gpu" in line:
        shown["gpu"] = in_words(line["gpu"])
    return shown
