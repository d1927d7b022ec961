import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from handgrad.core.errors import HandgradError
from handgrad.train import report
from handgrad.train.log import RunLog
from handgrad.train.report import write_report

pytestmark = pytest.mark.filterwarnings("error")
VOID = {"meta", "br", "link", "img"}


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
    path = write_report(tmp_path)
    page = Page(path)
    assert path == tmp_path / "report.html" and page.tags.count("svg") == 4
    last = 4.0 / (1 + 199 / 50) + 1.0
    shown = ["gpt2 tiny", "a CPU · bf16", "810k", "809,856", "154k", f"{last:.4f}", f"{last + 0.1:.4f}"]
    shown += ["validation", "Speak, speak.", "params   3.1 MiB", "deep.er", "0.002", '"\\n"', "null", "1337", "threads"]
    assert [text for text in [*shown, "skipped: non-finite gradient"] if text not in page.texts] == []


def test_the_page_needs_nothing_from_outside(tmp_path):
    log(tmp_path, [3.0, 2.0])
    text = write_report(tmp_path).read_text()
    assert not re.search(r"https?:|<script|<link|<img|@import|src=|url\((?!#)", text)
    assert "#2a6fb0" in report.STYLE and text.count("#2a6fb0") == 1, "pictures take their colours from the page"


SHORT = [[], [2.5], [2.5, 2.25], [math.nan], [math.nan, 2.0, math.inf], [0.0, 0.0], [1e300, 1e-300], [-1.0, 1e30]]


@pytest.mark.parametrize("losses", SHORT)
def test_short_and_broken_runs(tmp_path, losses):
    log(tmp_path, losses, grad_norm=losses[0] if losses else 0.0)
    page = Page(write_report(tmp_path))
    assert page.tags.count("svg") == (4 if losses else 0)
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
DAMAGED += [("run.json", "[" * 99_999), ("log.jsonl", "x\n{}\n")]


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


def test_thinning_keeps_spikes():
    points = [(step, step * 7919 % 101) for step in range(100_000)]
    points[77_777] = (77_777, 900)
    thin = report._thin(points)
    assert (77_777, 900) in thin and len(thin) <= 2 * report.POINTS and thin == sorted(thin)


def test_the_mean_of_a_line_is_the_line():
    points = [(step, 5.0 - step / 500) for step in range(1, 1001)]
    faint, mean = report._noisy(points, "train")
    assert faint.points == points
    middle = slice(0, -10)  # near the end half of the window is missing
    assert mean.points[middle] == [(step, pytest.approx(value)) for step, value in points[middle]]
    assert mean.points[-1][1] == pytest.approx(points[-1][1], abs=0.02)


def test_pictures_are_paid_for_by_those_who_report():
    code = "import sys, handgrad.train.report; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
