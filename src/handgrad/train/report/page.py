"""The page of a report: figures and tables as HTML, the curves as JSON for page.js, which draws them.

The page asks for nothing from outside and cannot: its content security policy allows no request at all.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from handgrad.train.log_file import abbreviated
from handgrad.train.log_text import clock, short
from handgrad.train.report.curves import curves, running_mean
from handgrad.train.report.read import Run, number

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
OWN = ("run.out", "run.resume")  # settings that no two runs share
ABSENT = "–"
SHOWN = ("model", "hardware", "dtype", "params", "tokens", "arena")  # of a summary, at the top of the page
BASELINE = (
    "Dashed: OpenAI's model of the same size. Its loss was measured on the validation text of llm.c's notebook; on any "
    "other text a loss of the same height does not mean a model as good."
)


def single(run: Run) -> str:
    """The page of one run."""
    title = str(run.summary.get("model", run.name))
    rest = {key: value for key, value in run.summary.items() if key not in SHOWN}
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(' · '.join(_about(run)))}</p></header>",
        _tiles(run),
        _plots([run]),
        _sets(run),
        _damage([run]),
        _evals([run]),
        _events([run]),
        _text("Sample", run.sample),
        _text("Memory", run.memory),
        _settings(dict(run.config) | ({"summary": rest} if rest else {})),
    ]
    return _page(title, body)


def comparison(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    runs = _named(runs)
    title = f"{len(runs)} runs"
    heads = "".join(f'<th scope="col">{_swatch(i)}{escape(run.name)}</th>' for i, run in enumerate(runs))
    body = [
        f"<header><h1>{title}</h1><p>{escape(', '.join(run.name for run in runs))}</p></header>",
        _plots(runs),
        _damage(runs),
        _table("Results", heads, _results(runs)),
        _table("Settings that differ", heads, differences(runs)) or "<p>The settings of all are the same.</p>",
        _evals(runs),
        _events(runs),
        *(_text(f"Sample of {run.name}", run.sample) for run in runs),
    ]
    return _page(title, body)


def _page(title: str, body: Sequence[str]) -> str:
    style, script = ((Path(__file__).with_name(f"page.{kind}")).read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>\n'
        f"<style>\n{style}</style></head>\n<body>\n{chr(10).join(filter(None, body))}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _named(runs: Sequence[Run]) -> list[Run]:
    """Runs whose names differ."""
    names: dict[str, int] = {}
    renamed = []
    for run in runs:
        names[run.name] = count = names.get(run.name, 0) + 1
        renamed.append(run if count == 1 else Run(**vars(run) | {"name": f"{run.name} ({count})"}))
    return renamed


# the parts ------------------------------------------------------------------------------------------------------------


def _about(run: Run) -> list[str]:
    """What the run was, in a line."""
    model = run.config.get("model")
    found = [_shown(run.summary[key]) for key in ("hardware", "dtype") if key in run.summary]
    if isinstance(model, Mapping) and all(type(model.get(key)) is int for key in ("num_layers", "hidden_size")):
        found.insert(0, f"{model['num_layers']} layers, {model['hidden_size']} wide")
    return found


def figures(run: Run) -> dict[str, tuple[str, str]]:
    """The numbers that sum up a run: name -> (value, remark)."""
    found = {}
    if losses := run.points("loss"):
        means, window = running_mean(losses)
        last = window // 2 + 1
        remark = f"mean of the last {last} steps" if last > 1 else f"step {losses.steps[-1]:,}"
        found["train loss"] = f"{means.values[-1]:.4f}", remark
    if vals := run.points("val_loss"):
        best = vals.values.argmin()
        found["best val loss"] = f"{vals.values[best]:.4f}", f"step {vals.steps[best]:,}"
    if accs := run.points("val_acc"):
        best = accs.values.argmax()
        found["best val accuracy"] = f"{100 * accs.values[best]:.1f} %", f"step {accs.steps[best]:,}"
    if scores := run.hellaswag():
        found["HellaSwag"] = f"{100 * scores.values[-1]:.1f} %", f"step {scores.steps[-1]:,}"
    for key, name in {"params": "parameters", "tokens": "tokens seen"}.items():
        if isinstance(count := run.summary.get(key), int) and number(count) is not None:
            found[name] = short(count), f"{count:,}"
    if (rate := run.median("tokens_per_second")) is not None:
        mfu = run.median("mfu")
        found["throughput"] = short(rate), f"tokens per second{f', {100 * mfu:.1f} % MFU' if mfu else ''}, median"
    memory = run.points("gpu.memory") * (1 / 1024)
    if isinstance(arena := run.summary.get("arena"), str):
        found["memory"] = _gib(arena), f"planned; {memory.values.max():.1f} GiB on the GPU" if memory else "planned"
    if seconds := run.points("seconds"):
        found["wall time"] = clock(seconds.values[-1]), f"to step {seconds.steps[-1]:,}"
    return found


def _gib(text: str) -> str:
    """A size in MiB, as run.json has it, in GiB where that is shorter."""
    number, _, unit = text.partition(" ")
    return f"{float(number) / 1024:.1f} GiB" if unit == "MiB" and re.fullmatch(r"\d{4,}\.\d+", number) else text


def _tiles(run: Run) -> str:
    cells = (
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd><dd>{escape(remark)}</dd></div>"
        for name, (value, remark) in figures(run).items()
    )
    return f"<dl>{''.join(cells)}</dl>" if run.log.steps else ""


def _results(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """(name, its value in each run)."""
    of_all = [figures(run) for run in runs]
    for name in dict.fromkeys(name for found in of_all for name in found):
        cells = (found.get(name, (ABSENT, "")) for found in of_all)
        yield name, [f"{escape(value)}<small>{escape(remark)}</small>" for value, remark in cells]
    for key in ("hardware", "dtype"):
        if any(key in run.summary for run in runs):
            yield key, [escape(_shown(run.summary.get(key, ABSENT))) for run in runs]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for settings that are not the same in all; ABSENT where a run has none."""
    settings = [dict(_leaves(run.config, "")) for run in runs]
    names = [name for name in dict.fromkeys(name for s in settings for name in s) if name not in OWN]
    rows = ((name, [_shown(s[name]) if name in s else ABSENT for s in settings]) for name in names)
    return [(name, [escape(value) for value in values]) for name, values in rows if len(set(values)) > 1]


def _table(title: str, heads: str, rows: Any) -> str:
    """One row for each (name, cells of HTML); nothing without rows."""
    lines = [f'<tr><th scope="row">{escape(name)}</th><td>{"</td><td>".join(cells)}</td></tr>' for name, cells in rows]
    if not lines:
        return ""
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return f'<section><h2>{title}</h2><div class="scroll"><table>{head}{"".join(lines)}</table></div></section>'


def _plots(runs: Sequence[Run]) -> str:
    """Controls and an empty place for each panel; page.js fills them."""
    drawn = curves(runs)
    if not drawn["panels"]:
        return "<p>No step has been logged yet.</p>"
    known = {
        "step": ("steps", True),
        "tokens": ("tokens", all(run.batch_tokens() for run in runs)),
        "seconds": ("time", all(run.points("seconds") for run in runs)),
    }
    axes = [_button("axis", key, name, key == "step") for key, (name, is_known) in known.items() if is_known]
    names = (
        [_button("run", i, _swatch(i) + escape(run.name), True) for i, run in enumerate(runs)] if len(runs) > 1 else []
    )
    panels = "".join(
        f"<figure{' class=wide' if panel['wide'] else ''}><figcaption>{escape(panel['title'])}</figcaption>"
        '<div class="plot"></div></figure>'
        for panel in drawn["panels"]
    )
    note = f'<p class="note">{BASELINE}</p>' if any(panel["lines"] for panel in drawn["panels"]) else ""
    data = json.dumps(drawn, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="controls"><span>{"".join(names)}</span><span>{"".join(axes)}</span>'
        '<button type="button" id="whole" hidden>show all</button></div>'
        f'<section class="curves">{panels}</section>{note}'
        "<noscript><p>The curves are drawn by JavaScript.</p></noscript>"
        f'<script type="application/json" id="data">{data}</script>'
    )


def _button(kind: str, value: Any, name: str, is_pressed: bool) -> str:
    pressed = str(is_pressed).lower()
    return f'<button type="button" class="{kind}" data-{kind}="{value}" aria-pressed="{pressed}">{name}</button>'


def _swatch(run: int) -> str:
    return f'<i style="--c:var(--c{run % 8})"></i>'


def _sets(run: Run) -> str:
    """The sets of a mixture."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("share", "tokens", "epochs so far"))
    sets = run.sets()
    rows = ((name, [f"{100 * share:.1f} %", f"{tokens:,.0f}", f"{epochs:.2f}"]) for name, share, tokens, epochs in sets)
    return _table("Mixture", heads, rows)


def _damage(runs: Sequence[Run]) -> str:
    """Which rows of the logs say nothing."""
    lines = [
        f"<p>{len(run.log.damaged)} damaged rows in the log of {escape(run.name)} are left out: row "
        f"{abbreviated(run.log.damaged)}</p>"
        for run in runs
        if run.log.damaged
    ]
    return "".join(lines)


def _evals(runs: Sequence[Run]) -> str:
    """What `handgrad eval` measured: of one run a column for each checkpoint, of several their newest."""
    columns = [(run, checkpoint) for run in runs for checkpoint in sorted(run.evals)[-(1 if len(runs) > 1 else 5) :]]
    names = [_swatch(i) + escape(run.name) if len(runs) > 1 else "" for i, run in enumerate(runs)]
    heads = "".join(f'<th scope="col">{names[runs.index(run)]}<small>{escape(at)}</small></th>' for run, at in columns)
    rows: dict[str, list[str]] = {}
    for i, (run, checkpoint) in enumerate(columns):
        for name, value in _measured(run.evals[checkpoint]):
            rows.setdefault(name, [ABSENT] * len(columns))[i] = value
    return _table("Evaluations", heads, rows.items())


def _measured(tasks: Any) -> Iterator[tuple[str, str]]:
    """("task metric", value) of a checkpoint in eval.json: the numbers that have a standard error beside them."""
    for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
        for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
            if isinstance(value, float) and f"{metric}_stderr" in metrics:
                error = metrics[f"{metric}_stderr"]
                yield f"{task} {metric}", f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _events(runs: Sequence[Run]) -> str:
    events = [(run.name, line) for run in runs for line in run.log.events]
    if not events:
        return ""
    cells = (
        (f"{line['step']:,}", *([name] if len(runs) > 1 else []), str(line["event"])) for name, line in events[:100]
    )
    rows = "".join(f"<tr><th>{step}</th><td>{'</td><td>'.join(map(escape, rest))}</td></tr>" for step, *rest in cells)
    more = f"<p>and {len(events) - 100:,} more</p>" if len(events) > 100 else ""
    return f'<section><h2>Events</h2><div class="scroll"><table class="events">{rows}</table></div>{more}</section>'


def _text(title: str, text: str | None) -> str:
    """A text as it is, but for characters that HTML does not allow."""
    if text is None:
        return ""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text.strip("\n"))
    return f'<section><h2>{escape(title)}</h2><pre class="{title.split()[0].lower()}">{escape(text)}</pre></section>'


def _settings(config: Mapping) -> str:
    """One table for each group of settings."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, value in config.items():
        for name, leaf in _leaves(value, ""):
            groups.setdefault(group if name else "", []).append((name or group, _shown(leaf)))
    tables = []
    for group, rows in groups.items():
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        tables.append(f"<table><caption>{escape(group)}</caption>{cells}</table>")
    return f'<section><h2>Settings</h2><div class="groups">{"".join(tables)}</div></section>' if tables else ""


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
