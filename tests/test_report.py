import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.train import log_file
from handgrad.train.log import RunLog
from handgrad.train.report import compare_runs, curves, read, write_report
from handgrad.train.report.page import differences, figures
from handgrad.train.report.read import Points, read_run

pytestmark = pytest.mark.filterwarnings("error")
VOID = {"meta", "br", "link", "img"}


PLACES = re.compile(r'<figcaption>([^<]*)</figcaption><div class="plot"></div>')


def drawn(path):
    """What the page gives its script to draw: title -> panel."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))[1]
    return {panel["title"]: panel for panel in json.loads(data)["panels"]}


class Page(HTMLParser):
    """The elements and the text of a page; fails if they are not nested properly."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def log(folder, losses, **more):
    with RunLog(folder, len(losses), quiet=True) as run:
        for step, loss in enumerate(losses, 1):
            numbers = {"lr": 1e-3 / step, "grad_norm": 5.0 / step, "tokens": 768, "step_seconds": 0.01} | more
            run.step(step, loss=loss, val_loss=loss + 0.1 if step % 50 == 0 else None, **numbers)
        run.event(len(losses) + 1, "skipped: non-finite gradient")


def test_everything_that_lies_in_the_folder_is_shown(tmp_path):
    log(tmp_path, [4.0 / (1 + step / 50) + 1.0 for step in range(200)])
    config = {"model": {"preset": "tiny", "deep": {"er": 0.002}}, "run": {"prompt": "\n", "final": None}, "seed": 1337}
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = {"model": "gpt2 tiny", "params": 809_856, "tokens": 153_600, "dtype": "bf16", "hardware": "a CPU"}
    (tmp_path / "run.json").write_text(json.dumps({"summary": summary | {"threads": 2}}))
    (tmp_path / "sample.txt").write_text("Speak, speak.\n")
    (tmp_path / "memory.txt").write_text("params   3.1 MiB\n")
    (tmp_path / "eval.json").write_text(
        json.dumps({"step_000200": {"lambada": {"acc": 0.25, "acc_stderr": 0.0123, "of": 9}}})
    )
    path = write_report(tmp_path)
    page = Page(path)
    assert path == tmp_path / "report.html" and PLACES.findall(path.read_text()) == list(drawn(path))
    assert list(drawn(path)) == [
        "Loss, nats per token",
        "Gradient norm, before clipping",
        "Learning rate",
        "Throughput, tokens per second",
    ]
    last = [4.0 / (1 + step / 50) + 1.0 for step in (197, 198, 199)]
    shown = [
        "gpt2 tiny",
        "a CPU · bf16",
        "810k",
        "809,856",
        "154k",
        f"{sum(last) / 3:.4f}",
        "mean of the last 3 steps",
        f"{last[-1] + 0.1:.4f}",
    ]
    shown += [
        "Speak, speak.",
        "params   3.1 MiB",
        "deep.er",
        "0.002",
        '"\\n"',
        "null",
        "1337",
        "threads",
        "lambada acc",
        "0.2500 ± 0.0123",
    ]
    assert [text for text in [*shown, "skipped: non-finite gradient"] if text not in page.texts] == []


def test_the_page_needs_nothing_from_outside(tmp_path):
    log(tmp_path, [3.0, 2.0])
    text = write_report(tmp_path).read_text()
    assert not re.search(r"https?:|<link|<img|@import|src=|url\((?!#)|fetch\(|XMLHttp|import\(", text)
    assert "default-src 'none'" in text


SHORT = [[], [2.5], [2.5, 2.25], [math.nan], [math.nan, 2.0, math.inf], [0.0, 0.0], [1e300, 1e-300], [-1.0, 1e30]]


@pytest.mark.parametrize("losses", SHORT)
def test_short_and_broken_runs(tmp_path, losses):
    log(tmp_path, losses, grad_norm=losses[0] if losses else 0.0)
    path = write_report(tmp_path)
    page = Page(path)
    assert bool(PLACES.findall(path.read_text())) == bool(losses)
    for panel in drawn(path).values() if losses else ():
        assert all(math.isfinite(y) for one in panel["series"] for y in one["y"])
    assert ("No step has been logged yet." in page.texts) == (not losses)


def test_numbers_that_are_none_are_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN, "val_loss": 1e999, "lr": null, "seconds": "nan"}\n')
    assert not {"nan", "inf", "NaN", "Infinity", "train loss", "wall time"} & set(Page(write_report(tmp_path)).texts)


def test_an_empty_folder_has_a_report(tmp_path):
    assert tmp_path.name in Page(write_report(tmp_path)).texts


def test_text_is_escaped(tmp_path):
    evil = '<b x="1">&amp;\x00\x1b'
    with RunLog(tmp_path, 1, quiet=True) as run:
        run.event(1, evil)
    (tmp_path / "config.json").write_text(json.dumps({evil: {evil: evil}, "other": evil}))
    (tmp_path / "run.json").write_text(json.dumps({"summary": {"model": evil, "hardware": evil, evil: evil}}))
    (tmp_path / "sample.txt").write_text(evil)
    (tmp_path / "memory.txt").write_bytes(evil.encode() + b"\xff")
    path = write_report(tmp_path)
    assert "b" not in Page(path).tags
    assert path.read_text().count("&lt;b x=&quot;1&quot;&gt;&amp;amp;") >= 8


DAMAGED = [("config.json", "{"), ("config.json", "[]"), ("run.json", "3"), ("run.json", '{"summary": [1]}')]
DAMAGED += [("run.json", "[" * 99_999)]


def test_numbers_that_no_float_or_step_holds_are_left_out(tmp_path):
    run = run_folder(tmp_path / "a", [3.0] * 2, summary={"params": 10**400, "tokens": 7}, hellaswag=0.25)
    later = {f"step_{digits}": {"hellaswag": {"acc_llmc": 0.5}} for digits in ("9" * 19, "9" * 5000)}
    (run / "eval.json").write_text(json.dumps(later))
    path = write_report(run)
    assert drawn(path)["HellaSwag accuracy, %"]["series"][0]["x"] == [1, 2]
    assert "tokens seen" in path.read_text()


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(HandgradError, match=rf"{name}.* must "):
        write_report(tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_a_write_that_fails_keeps_the_old_report(tmp_path, monkeypatch):
    before = write_report(tmp_path).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "sample.txt").write_text("new")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(HandgradError, match="No space left on device"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "sample.txt"]


def test_the_same_run_gives_the_same_page(tmp_path):
    log(tmp_path, [3.0 - step / 100 for step in range(120)])
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def points_of(values):
    return Points(np.arange(1, len(values) + 1), np.array(values, float))


@pytest.mark.parametrize("count", [100_000, 99_999, 1203, 801])
def test_thinning_keeps_spikes_and_ends(count):
    values = np.arange(count) * 7919 % 101
    values[count * 7 // 9], values[count - 3] = 900, -5
    points = points_of(values)
    thin = curves.thin(points)
    kept = list(zip(thin.steps.tolist(), thin.values.tolist()))
    assert {(count * 7 // 9 + 1, 900), (count - 2, -5), (1, values[0]), (count, values[-1])} <= set(kept)
    assert len(thin) <= 2 * curves.POINTS + 2 and kept == sorted(set(kept))
    assert all(values[step - 1] == value for step, value in kept)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 799, 800])
def test_short_curves_are_not_thinned(count):
    assert curves.thin(points_of(range(count))).values.tolist() == list(range(count))


def test_the_mean_of_a_line_is_the_line():
    points = points_of([5.0 - step / 500 for step in range(1, 1001)])
    means, window = curves.running_mean(points)
    assert window == 21
    middle = slice(0, -10)  # near the end half of the window is missing
    assert means.values[middle] == pytest.approx(points.values[middle])
    assert means.values[-1] == pytest.approx(points.values[-1], abs=0.02)


def test_a_report_leaves_out_damaged_rows_and_names_them(tmp_path):
    log(tmp_path, [4.0, 3.0, 2.0, 1.0])
    rows = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    rows[1] = b"\0" * 40 + b"\n"
    (tmp_path / "log.jsonl").write_bytes(b"".join(rows) + b'{"step": 9, "lo')
    path = write_report(tmp_path)
    assert f"1 damaged rows in the log of {tmp_path.name} are left out: row 2" in Page(path).texts
    (loss,) = drawn(path)["Loss, nats per token"]["series"]
    assert (loss["x"], loss["y"]) == ([1, 3, 4], [4.0, 2.0, 1.0])


def test_a_whole_log_names_no_damage(tmp_path):
    log(tmp_path, [4.0, 3.0])
    assert "damaged" not in write_report(tmp_path).read_text()


def test_figures_too_large_for_a_float_are_left_out(tmp_path):
    huge = "1" + "0" * 400
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": 2, "gpu": {{"power": {huge}}}, "x": {huge}}}\n')
    assert list(drawn(write_report(tmp_path))) == ["Loss, nats per token"]


def test_every_line_of_a_log_is_read_once(tmp_path, monkeypatch):
    """400,000 lines take seconds. The old reader walked through all of them once for each of 19 figures."""
    log(tmp_path, [4.0] * 50)
    looked = []

    def counted(path):
        for row in log_file.rows(path):
            looked.append(row.number)
            yield row

    monkeypatch.setattr(read, "rows", counted)
    run = read_run(tmp_path)
    write_report(tmp_path)
    assert looked == [*range(1, 52)] * 2 and not hasattr(run, "steps")


def run_folder(folder, losses=(3.0, 2.5), settings=None, summary=None, **more):
    """A run folder with a log and settings."""
    folder.mkdir()
    log(folder, losses, **more)
    (folder / "config.json").write_text(json.dumps(settings or {}))
    (folder / "run.json").write_text(json.dumps({"summary": summary or {}}))
    return folder


def test_the_throughput_is_the_median(tmp_path):
    """Not the last value, which a pause at the end, or a machine that sleeps, may spoil."""
    lines = [
        {"step": step, "tokens_per_second": rate, "mfu": rate / 1e6}
        for step, rate in enumerate([9e5, 5e5, 5e5, 4e5, 7.0], 1)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert figures(read_run(tmp_path))["throughput"] == ("500k", "tokens per second, 50.0 % MFU, median")


def test_the_time_is_that_of_the_step_it_names(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 61}\n{"step": 2, "loss": 1}\n')
    assert figures(read_run(tmp_path))["wall time"] == ("1:01", "to step 1")


def settings(batch, lr, **model):
    return {"data": {"batch_tokens": batch}, "optim": {"lr": lr, "beta1": 0.9}, "run": {"out": str(lr)}, "model": model}


def test_runs_are_compared(tmp_path):
    first = run_folder(tmp_path / "low", [3.0] * 60, settings(64, 1e-3), {"hardware": "a CPU", "arena": "2048.0 MiB"})
    second = run_folder(tmp_path / "high", [2.0] * 60, settings(64, 2e-3, dropout=0.1), {"hardware": "a GPU"})
    path = compare_runs([first, second], tmp_path / "both.html")
    page, panels = Page(path), drawn(path)
    assert list(panels)[:2] == ["Training loss, nats per token", "Validation loss, nats per token"]
    assert [one["run"] for one in panels["Validation loss, nats per token"]["series"]] == [0, 1]
    assert {"low", "high", "a CPU", "a GPU", "2.0 GiB", "optim.lr", "0.001", "0.002", "model.dropout", "–"} <= set(
        page.texts
    )
    assert not {"optim.beta1", "run.out", "data.batch_tokens"} & set(page.texts), "only what differs"


def test_settings_that_differ(tmp_path):
    runs = [
        run_folder(tmp_path / name, settings=one)
        for name, one in {
            "a": {"x": 1, "same": {"y": 2}},
            "b": {"x": 1.5, "same": {"y": 2}},
            "c": {"same": {"y": 2}, "z": "<"},
        }.items()
    ]
    assert differences([read_run(run) for run in runs]) == [("x", ["1", "1.5", "–"]), ("z", ["–", "–", "&lt;"])]


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    runs = [run_folder(tmp_path / side / "run") for side in "xy"]
    assert {"run", "run (2)"} <= set(Page(compare_runs(runs, tmp_path / "page.html")).texts)


GPT2 = dict(num_layers=12, num_heads=12, hidden_size=768, vocab_size=50257, max_seq_len=1024)


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (GPT2, [{"label": "OpenAI GPT-2 124M", "y": 3.424958}]),
        (
            GPT2 | {"num_layers": 24, "num_heads": 16, "hidden_size": 1024},
            [{"label": "OpenAI GPT-2 355M", "y": 3.083089}],
        ),
        (
            GPT2 | {"num_layers": 36, "num_heads": 20, "hidden_size": 1280},
            [{"label": "OpenAI GPT-2 774M", "y": 3.000580}],
        ),
        (
            GPT2 | {"num_layers": 48, "num_heads": 25, "hidden_size": 1600},
            [{"label": "OpenAI GPT-2 1558M", "y": 2.831273}],
        ),
        (GPT2 | {"num_layers": 11}, []),
        (GPT2 | {"vocab_size": 64}, []),  # the loss of letters is no loss of words
        (GPT2 | {"max_seq_len": 2048}, []),
        ({}, []),
    ],
)
def test_openais_lines_stand_where_they_apply(tmp_path, model, lines):
    run = run_folder(tmp_path / "a", [3.0] * 50, {"model": model}, hellaswag=0.29)
    panels = drawn(write_report(run))
    assert panels["Loss, nats per token"]["lines"] == lines
    assert [line["label"] for line in panels["HellaSwag accuracy, %"]["lines"]] == [line["label"] for line in lines]
    assert ("validation text of llm.c's notebook" in (run / "report.html").read_text()) == bool(lines)
    no_val = run_folder(tmp_path / "b", [3.0], {"model": model})
    assert drawn(write_report(no_val))["Loss, nats per token"]["lines"] == []


def test_hellaswag_of_training_and_of_eval(tmp_path):
    run = run_folder(tmp_path / "a", [3.0] * 2, hellaswag=0.25)
    later = {
        "step_000002": {"hellaswag": {"acc_llmc": 0.5, "acc_llmc_stderr": 0.01}},
        "hf": {"hellaswag": {"acc_llmc": 0.9}},
    }
    (run / "eval.json").write_text(json.dumps(later))
    panel = drawn(write_report(run))["HellaSwag accuracy, %"]["series"][0]
    assert (panel["x"], panel["y"]) == ([1, 2], [25.0, 50.0])


def test_telemetry_is_drawn(tmp_path):
    run = run_folder(
        tmp_path / "a", [3.0] * 2, {}, {"arena": "100.5 MiB"}, gpu={"memory": 2048, "power": 700.5, "throttled": "heat"}
    )
    panels = drawn(write_report(run))
    assert (
        panels["GPU memory in use, GiB"]["series"][0]["y"] == [2.0, 2.0]
        and panels["GPU power, W"]["series"][0]["y"][0] == 700.5
    )
    assert not [title for title in panels if "clock" in title or "temperature" in title]
    assert figures(read_run(run))["memory"] == ("100.5 MiB", "planned; 2.0 GiB on the GPU")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        run_folder(tmp_path / name)
    assert main(["report", "a"]) == 0 and (tmp_path / "a" / "report.html").exists()
    assert main(["report", "a", "--out", "one.html"]) == 0 and "2 runs" not in (tmp_path / "one.html").read_text()
    assert main(["report", "a", "b"]) == 0 and "2 runs" in (tmp_path / "report.html").read_text()
    assert main(["report", "b", "a", "--out", "two.html"]) == 0 and (tmp_path / "two.html").exists()
    assert capsys.readouterr().out.split() == ["a/report.html", "one.html", "report.html", "two.html"]
    for words, told in (
        (["nowhere"], "'nowhere'"),
        ([], "got none"),
        (["a", "--out", "no/where.html"], "no/where.html"),
    ):
        assert main(["report", *words]) == 2
        assert told in capsys.readouterr().err


def test_a_run_at_work_has_a_report(tmp_path):
    run = run_folder(tmp_path / "a")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.')
    assert drawn(write_report(run))["Loss, nats per token"]["series"][0]["x"] == [1, 2]


@pytest.mark.parametrize("size", [[1], {"a": 1}, "12", None, 12.0, True, -5, 2**70])
def test_sizes_of_any_kind_make_a_page(tmp_path, size):
    """config.json is anybody's: a size may be a list."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    sizes = dict.fromkeys(("num_layers", "num_heads", "hidden_size", "vocab_size", "max_seq_len"), 12)
    (tmp_path / "config.json").write_text(json.dumps({"model": sizes | {"num_layers": size}}))
    assert "OpenAI GPT-2" not in write_report(tmp_path).read_text()


def test_the_mean_behind_a_spike_is_the_mean():
    """Differences of sums from the start would cancel: one value of 1e18 among 2.0s made every later mean 0."""
    values = np.full(1000, 2.0)
    values[100] = 1e18
    means, window = curves.running_mean(Points(np.arange(1000), values))
    assert window == 21 and len(means) == 1000
    assert means.values[:90].tolist() == [2.0] * 90 and means.values[111:].tolist() == [2.0] * 889
    rng = np.random.default_rng(0).normal(size=1234)
    means, window = curves.running_mean(Points(np.arange(1234), rng))
    reach = window // 2
    for at in (0, 1, 5, reach, 600, 1233 - reach, 1232, 1233):
        left = min(at, reach)
        expected = rng[at - left : at + min(left, 1233 - at) + 1].mean()
        assert means.values[at] == pytest.approx(expected, abs=1e-14)


def test_means_that_overflow_are_left_out():
    means, _ = curves.running_mean(Points(np.arange(1000), np.full(1000, 1e308)))
    assert np.isfinite(means.values).all()
