"""The report of a run: one self-contained page with its curves, figures, sample, memory map and settings."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.train.log import clock, read_log, replace_file, short

NICE = (1, 2, 2.5, 5, 10)  # distances of tick marks, times a power of ten
POINTS = 400  # of a curve: about what a screen can show
SUBTITLE = ("hardware", "dtype")
COUNTS = {"params": "parameters", "tokens": "tokens seen"}

Points = Sequence[tuple[int, float]]  # (step, value)


def write_report(out_dir: str | Path) -> Path:
    """Writes report.html into a run folder from what lies there, and returns its path.

    log.jsonl    the curves
    run.json     its "summary", a flat object: model, params, tokens, hardware, dtype, and anything else
    config.json  the resolved settings, nested
    sample.txt, memory.txt  shown as they are

    Any of them may be missing. Raises HandgradError if one is damaged, or the report cannot be written.
    """
    folder = Path(out_dir)
    lines = read_log(folder / "log.jsonl")
    summary = _read_object(folder / "run.json").get("summary", {})
    if not isinstance(summary, Mapping):
        raise HandgradError("report", f"'summary' in {folder / 'run.json'} must be a JSON object", _shown(summary))
    steps = [line for line in lines if "event" not in line]
    events = [line for line in lines if "event" in line]
    title = escape(str(summary.get("model", folder.resolve().name)))
    about = [_shown(summary[key]) for key in SUBTITLE if key in summary]
    rest = {key: value for key, value in summary.items() if key not in ("model", *SUBTITLE, *COUNTS)}
    body = [
        f"<header><h1>{title}</h1><p>{escape(' · '.join(about))}</p></header>",
        _figures(steps, summary),
        _curves(steps, events),
        _events(events),
        _text("Sample", folder / "sample.txt"),
        _text("Memory", folder / "memory.txt"),
        _settings(_read_object(folder / "config.json") | ({"summary": rest} if rest else {})),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = f'<!doctype html>\n<html lang="en">\n<head>{head}\n<style>{STYLE}</style></head>\n<body>\n'
    path = folder / "report.html"
    replace_file(path, page + "\n".join(filter(None, body)) + "\n</body>\n</html>\n")
    return path


def _figures(steps: list[dict], summary: Mapping) -> str:
    """The numbers that sum up the run, each with its name and a remark."""
    tiles = []
    losses, vals = _points(steps, "loss"), _points(steps, "val_loss")
    if losses:
        tiles.append(("train loss", f"{losses[-1][1]:.4f}", f"step {losses[-1][0]:,}"))
    if vals:
        step, best = min(vals, key=lambda point: point[1])
        tiles.append(("best val loss", f"{best:.4f}", f"step {step:,}"))
    for key, name in COUNTS.items():
        if isinstance(summary.get(key), int):
            tiles.append((name, short(summary[key]), f"{summary[key]:,}"))
    if rates := _points(steps, "tokens_per_second"):
        tiles.append(("throughput", short(rates[-1][1]), "tokens per second"))
    if seconds := _points(steps, "seconds"):
        tiles.append(("wall time", clock(seconds[-1][1]), f"to step {steps[-1]['step']:,}"))
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd><dd>{remark}</dd></div>" for name, value, remark in tiles)
    return f"<dl>{''.join(cells)}</dl>" if tiles else ""


def _curves(steps: list[dict], events: list[dict]) -> str:
    """The four pictures."""
    if not steps:
        return "<p>No step has been logged yet.</p>"
    marks = [line["step"] for line in events]
    last = max(line["step"] for line in steps + events)
    names = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second")
    loss, val_loss, lr, grad_norm, speed = (_points(steps, name) for name in names)
    losses = [*_noisy(loss, "train"), Curve(val_loss, "val", "validation", dots=True)]
    norms = [value for _, value in grad_norm]
    is_wide = bool(norms) and min(norms) > 0 and max(norms) > 10 * min(norms)
    pictures = {
        "Loss, nats per token": _draw("loss", losses, last, size=(10.0, 3.3), marks=marks),
        "Learning rate": _draw("lr", [Curve(lr, "train")], last, from_zero=True),
        "Gradient norm, before clipping": _draw("grad_norm", _noisy(grad_norm), last, is_log=is_wide),
        "Throughput, tokens per second": _draw("speed", [Curve(speed, "train")], last, from_zero=True, is_large=True),
    }
    html = "".join(f"<figure><figcaption>{name}</figcaption>{svg}</figure>" for name, svg in pictures.items())
    return f'<section class="curves">{html}</section>'


@dataclass(frozen=True)
class Curve:
    """What is drawn in one colour; `faint` for single steps behind their running mean."""

    points: Points
    colour: str
    label: str = ""
    faint: bool = False
    dots: bool = False


COLOURS = {"train": "#2a6fb0", "val": "#d0632b", "rule": "#d9d6cf"}  # in the SVG; the page's own take their place


def _draw(
    name: str,
    curves: Sequence[Curve],
    last: int,
    *,
    size: tuple[float, float] = (3.2, 2.1),
    marks: Sequence[int] = (),
    is_log: bool = False,
    from_zero: bool = False,
    is_large: bool = False,
) -> str:
    """An SVG of steps 0 to `last`, `size` inches wide and high; `marks` are the steps of events."""
    import matplotlib  # half a second: paid for by those who report
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    (width, height), rule = size, COLOURS["rule"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(size)
        axes = figure.add_axes((0.5 / width, 0.4 / height, 1 - 0.75 / width, 1 - 0.5 / height))
        curves = [curve for curve in curves if curve.points]
        for curve in curves:
            points = _thin(curve.points)
            is_dotted = len(points) == 1 or (curve.dots and len(points) <= 60)
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                "o-" if is_dotted else "-",
                color=COLOURS[curve.colour],
                label=curve.label or None,
                linewidth=0.6 if curve.faint else 1.6,
                alpha=0.35 if curve.faint else 1.0,
                markersize=3.5,
                clip_on=False,
            )
        if marks:
            heights = [0.02] * len(marks)  # of the picture, not a loss
            place = axes.get_xaxis_transform()
            axes.plot(marks, heights, "x", color=COLOURS["val"], label="event", markersize=5, transform=place)
        axes.set_xlim(0, max(last, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=NICE))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("step")
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if is_large else plain)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=rule, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        for side, spine in axes.spines.items():
            spine.set(visible=side == "bottom", color=rule)
        if any(curve.label for curve in curves):
            axes.legend(frameon=False, loc="upper right", ncols=3, borderaxespad=0)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True)
    return _inline(svg.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, as HTML wants it: no prolog, no namespaces, no metadata, no fonts of its own."""
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"^.*?<svg[^>]*>", f'<svg {box} role="img" aria-label="{name}">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*;?", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(figure|axes|patch|text|line2d|legend|matplotlib\.axis|[xy]tick)_\d+"', "", svg)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg


def _points(lines: list[dict], key: str) -> Points:
    """(step, value) wherever the value was logged and finite."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _thin(points: Points) -> Points:
    """At most about 2 POINTS of a curve: the lowest and the highest of each stretch, so that no spike is lost."""
    size = -(-len(points) // POINTS)
    if size <= 2:
        return points
    stretches = [points[at : at + size] for at in range(0, len(points), size)]
    return [point for s in stretches for point in sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])})]


def _noisy(points: Points, label: str = "") -> list[Curve]:
    """Single steps, faint, behind their mean over a fiftieth of the run; only the steps where a mean would blur them.

    The window is centred, so that the mean does not lag; it shrinks at the start, and at the end loses its right half.
    """
    count, reach = len(points), len(points) // 100
    if reach < 1:
        return [Curve(points, "train", label)]
    sums = [0.0, *accumulate(value for _, value in points)]
    means = []
    for at, (step, _) in enumerate(points):
        left = min(at, reach)
        right = min(left, count - 1 - at)
        means.append((step, (sums[at + right + 1] - sums[at - left]) / (left + right + 1)))
    return [Curve(points, "train", faint=True), Curve(means, "train", label and f"{label}, running mean")]


def _events(events: list[dict]) -> str:
    if not events:
        return ""
    rows = "".join(f"<tr><th>{line['step']:,}</th><td>{escape(str(line['event']))}</td></tr>" for line in events[:100])
    more = f"<p>and {len(events) - 100:,} more</p>" if len(events) > 100 else ""
    return f'<section><h2>Events</h2><table class="events">{rows}</table>{more}</section>'


def _text(title: str, path: Path) -> str:
    """A text file as it is, but for characters that HTML does not allow."""
    text = _read(path)
    if text is None:
        return ""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text.strip("\n"))
    return f'<section><h2>{title}</h2><pre class="{title.lower()}">{escape(text)}</pre></section>'


def _settings(config: Mapping) -> str:
    """One table for each group of settings."""
    if not config:
        return ""
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, value in config.items():
        for name, leaf in _leaves(value, ""):
            groups.setdefault(group if name else "", []).append((name or group, _shown(leaf)))
    tables = []
    for group, rows in groups.items():
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        tables.append(f"<table><caption>{escape(group)}</caption>{cells}</table>")
    return f'<section><h2>Settings</h2><div class="groups">{"".join(tables)}</div></section>'


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is not an object."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _shown(value: Any) -> str:
    """A setting for people: text as it is where nothing would be invisible, all else as JSON."""
    if isinstance(value, str) and value == value.strip() != "":
        return value
    return json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> str | None:
    """The text of a file, None if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HandgradError("report", f"{path} must be readable", error.strerror) from None


def _read_object(path: Path) -> dict:
    """The object in a JSON file, empty if there is no file."""
    try:
        value = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HandgradError("report", f"{path} must hold a JSON object", "something else")
    return value


STYLE = """
:root { color-scheme: light dark; --page: #fcfbf9; --ink: #22211f; --dim: #726f69; --rule: #e3e0d9; --soft: #f4f2ed;
  --train: #2a6fb0; --val: #d0632b; }
@media (prefers-color-scheme: dark) { :root { --page: #17181a; --ink: #e6e4df; --dim: #97948d; --rule: #34353a;
  --soft: #1f2023; --train: #6cb0ee; --val: #f0945c; } }
* { box-sizing: border-box; }
body { max-width: 64rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; line-height: 1.2; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.05rem; }
header p { margin: 0.3rem 0 0; color: var(--dim); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.25rem 2rem;
  margin: 2rem 0 2.5rem; }
dt, dd, figcaption, caption, th { color: var(--dim); font-size: 0.85rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
dt + dd { color: var(--ink); font-size: 1.6rem; line-height: 1.25; letter-spacing: -0.01em; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 2rem 1.5rem; }
figure { margin: 0; min-width: 0; }
figure:first-child { grid-column: 1 / -1; overflow-x: auto; }
figure:first-child svg { min-width: 42rem; max-width: none; }
figcaption { margin-bottom: 0.4rem; }
svg { display: block; width: 100%; max-width: 21rem; height: auto; overflow: visible; stroke-linejoin: round; }
svg text { fill: var(--dim); font-family: inherit; }
pre { margin: 0; padding: 1rem 1.25rem; max-height: 32rem; overflow: auto; background: var(--soft); border-radius: 6px;
  font: 0.85rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
.groups { columns: 13rem; column-gap: 2rem; }
.groups table { margin-bottom: 2rem; break-inside: avoid; }
table { width: 100%; border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 0.35rem; text-align: left; font-weight: 600; }
th, td { padding: 0.22rem 0; border-top: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { padding-right: 1rem; font-weight: 400; white-space: nowrap; }
.events th { width: 5rem; }
td { overflow-wrap: anywhere; }
@media print { pre { max-height: none; } }
"""
