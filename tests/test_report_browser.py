"""Reports in a real browser, headless Chromium: curves are drawn and answer the pointer, and nothing is asked of a network."""

import json
import re
import shutil
import socket
import subprocess
import threading
from html import unescape

import pytest

from handgrad.train.report import compare_runs, write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]
LIGHT = {0: "2a6fb0", 1: "d0632b", 2: "2b8a57"}
DARK = {0: "6cb0ee", 1: "f0945c", 2: "6cc995"}


def browse(page, *flags):
    """What headless Chromium prints when it has opened a file."""
    profile = page.parent / f"profile_{page.stem}"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *QUIET,
        f"--user-data-dir={profile}",
        "--hide-scrollbars",
    ]
    command += ["--virtual-time-budget=2000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def scripted(page, script):
    """The page's title after a script has run in it; the script's value, as JSON."""
    copy = page.with_name(f"{page.stem}_{abs(hash(script)) % 10**8}.html")
    catch = f"try {{ document.title = JSON.stringify((() => {{ {script} }})()) }} catch (e) {{ document.title = JSON.stringify('' + e) }}"
    copy.write_text(page.read_text(encoding="utf-8") + f"<script>{catch}</script>", encoding="utf-8")
    return json.loads(
        unescape(re.search(r"<title>(.*?)</title>", browse(copy, "--dump-dom", "--window-size=1000,900"))[1])
    )


def make_run(folder, losses, batch_tokens, **config):
    """A run folder with losses, two seconds a step, an event, and settings."""
    folder.mkdir()
    lines = []
    for step, loss in enumerate(losses, 1):
        line = {
            "step": step,
            "loss": loss,
            "lr": 1e-3 / step,
            "grad_norm": 9 / step,
            "tokens_per_second": 500.0,
            "seconds": 2 * step,
        }
        lines.append(line | ({"val_loss": loss + 0.1, "hellaswag": 0.25 + step / 1e4} if step % 20 == 0 else {}))
    lines.append({"step": 7, "event": "skipped: <b>&"})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.json").write_text(json.dumps(config | {"data": {"batch_tokens": batch_tokens}}))
    (folder / "run.json").write_text(
        json.dumps({"summary": {"hardware": "a rather long name of a processor", "params": 10}})
    )
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(the page of one run, the page of three runs). The one run has the sizes of OpenAI's smallest model."""
    folder = tmp_path_factory.mktemp("report")
    sizes = dict(num_layers=12, num_heads=12, hidden_size=768, vocab_size=50257, max_seq_len=1024)
    runs = [
        make_run(folder / "first", [3 + 7 / step for step in range(1, 1201)], 64, model=sizes),
        make_run(
            folder / "second-with-a-name-that-goes-on", [4 + 7 / step for step in range(1, 201)], 128, model=sizes
        ),
        make_run(folder / "third", [5.0] * 80, 64),
    ]
    return write_report(runs[0]), compare_runs(runs, folder / "all.html")


def drawn(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1])


def test_every_curve_is_drawn_whole(pages):
    """Each series of the data is a path with all of its points, inside its picture."""
    for page in pages:
        dom = browse(page, "--dump-dom", "--window-size=1000,900")
        pictures, panels = re.findall(r'<div class="plot">(<svg.*?</svg>)', dom, re.S), drawn(page)["panels"]
        assert len(pictures) == len(panels) >= 5
        for picture, panel in zip(pictures, panels):
            width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', picture).groups())
            paths = re.findall(r'<path class="(raw|line)[^"]*"[^>]*data-run="(\d+)" d="([^"]+)"', picture)
            found = sorted((run, len(re.findall("[ML]", d))) for _, run, d in paths)
            assert found == sorted((str(one["run"]), len(one["x"])) for one in panel["series"]), panel["title"]
            for _, _, d in paths:
                points = [tuple(map(float, point.split(","))) for point in re.split("[ML]", d)[1:]]
                assert all(0 <= x <= width and y <= height for x, y in points)
                assert points == sorted(points, key=lambda p: p[0]) and (len({x for x, _ in points}) > 1)
            assert len(re.findall(r"<text", picture)) >= 5 and "NaN" not in picture and "Infinity" not in picture
            assert picture.count('class="base"') == len(panel["lines"])
        assert "skipped: &lt;b&gt;&amp;</title>" in dom and "OpenAI GPT-2 124M</text>" in dom


@pytest.mark.parametrize(
    ("scheme", "colours", "page_colour"), [("1", LIGHT, "fcfbf9"), ("0", DARK, "17181a")], ids=["light", "dark"]
)
def test_every_run_is_seen_in_its_colour(pages, tmp_path, scheme, colours, page_colour):
    """Of the pixels of a screenshot; a run that is not in the page leaves none of its colour."""
    Image = pytest.importorskip("PIL.Image", reason="pillow reads the screenshots")
    for page, runs in zip(pages, (1, 3)):
        shot = tmp_path / "page.png"
        browse(
            page, f"--screenshot={shot}", "--window-size=1000,900", f"--blink-settings=preferredColorScheme={scheme}"
        )
        with Image.open(shot) as image:
            counts = {f"{r:02x}{g:02x}{b:02x}": n for n, (r, g, b) in image.convert("RGB").getcolors(1 << 20)}
        assert max(counts, key=counts.get) == page_colour
        shown = max(runs, 2)  # one run has a second colour, for its validation loss
        assert all(counts.get(colours[i], 0) > 150 for i in range(shown)), {i: counts.get(colours[i]) for i in colours}
        assert all(counts.get(colours[i], 0) == 0 for i in range(shown, 3))


POINTER = """
const plot = document.querySelectorAll('.plot')[0], svg = () => plot.querySelector('svg'), box = svg().getBoundingClientRect();
const send = (kind, part) => svg().dispatchEvent(new PointerEvent(kind, {pointerType: 'mouse', pointerId: 1, button: 0,
  clientX: box.left + 50 + part * (box.width - 64), clientY: box.top + 50}));
SVGElement.prototype.setPointerCapture = () => {};  // the pointer is not a real one
const path = (run) => (plot.querySelector(`path.line[data-run="${run}"]`) || {getAttribute: () => null}).getAttribute('d');
"""


def test_the_pointer_finds_values(pages):
    text = scripted(pages[0], POINTER + "send('pointermove', 600 / 1200); return plot.querySelector('.tip').innerText")
    step = int(re.match(r"step (\d+)", text)[1])
    val, train = 3 + 7 / 600 + 0.1, 3 + 7 / step
    assert abs(step - 600) <= 3 and f"{val:.4f}" in text and f"{train:.4f}" in text
    assert ("at 600" in text) == (step != 600), "a value of another step says so"


def test_the_pointer_finds_every_run(pages):
    text = scripted(pages[1], POINTER + "send('pointermove', 0.9); return plot.querySelector('.tip').innerText")
    assert all(name in text for name in ("first", "second-with-a-name-that-goes-on", "third")) and "5" in text


def test_a_stretch_can_be_chosen_and_given_back(pages):
    """Dragging from a quarter to a half shows steps 300 to 600 in every picture, until the button is pressed."""
    before, zoomed, is_hidden, after = scripted(
        pages[0],
        POINTER
        + """
      const labels = () => [...document.querySelectorAll('.plot:last-child')].map((p) => [...p.querySelectorAll('text[text-anchor=middle]')].map((t) => t.textContent).join(' '));
      const whole = document.getElementById('whole'), before = labels();
      send('pointerdown', 0.25); send('pointermove', 0.4); send('pointerup', 0.5);
      const zoomed = labels(), isHidden = whole.hidden; whole.click();
      return [before, zoomed, isHidden, labels()]""",
    )
    assert before == after != zoomed and not is_hidden
    for texts in zoomed:
        assert all(300 <= int(text.replace(",", "")) <= 600 for text in texts.split()) and len(texts.split()) >= 2


def test_runs_can_be_switched_off_and_axes_changed(pages):
    """In tokens, the second run with its doubled batch ends at a third of the first; a run switched off is not drawn."""
    ends, gone, back = scripted(
        pages[1],
        POINTER
        + """
      const end = (run) => Number(path(run).split('L').pop().split(',')[0]);
      const ends = ['step', 'tokens', 'seconds'].map((axis) => {
        document.querySelector(`button[data-axis=${axis}]`).click();
        return [end(0), end(1)];
      });
      const button = document.querySelector('button[data-run="1"]');
      button.click(); const gone = path(1); button.click();
      return [ends, gone, path(1) !== null]""",
    )
    shares = [(second - 50) / (first - 50) for first, second in ends]
    assert shares == [
        pytest.approx(200 / 1200, rel=0.01),
        pytest.approx(400 / 1200, rel=0.01),
        pytest.approx(200 / 1200, rel=0.01),
    ]
    assert gone is None and back


def test_a_narrow_page_fits(pages):
    """At 360 pixels, a telephone's, nothing but a table in its own scroller is wider than the screen."""
    for page in pages:
        inner = json.dumps(page.read_text(encoding="utf-8")).replace("<", "\\u003c")
        outer = page.with_name(f"{page.stem}_narrow.html")
        outer.write_text(
            f"""<title>0</title><iframe width=360 height=800 style="border:0"></iframe><script>
          const frame = document.querySelector('iframe'); frame.srcdoc = {inner};
          frame.onload = () => setTimeout(() => {{ const d = frame.contentDocument;
            document.title = d.documentElement.scrollWidth + ' ' + d.querySelector('svg').getBoundingClientRect().width; }}, 200);
        </script>""",
            encoding="utf-8",
        )
        content, picture = map(float, re.search(r"<title>(.*?)</title>", browse(outer, "--dump-dom"))[1].split())
        assert content == 360 and 250 < picture <= 360


def requests_of(page):
    """The lines that a proxy hears, through which the browser would reach everything that is not a file."""
    heard, server = [], socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                line, _ = server.accept()
            except OSError:
                return
            with line:
                line.settimeout(5)
                heard.append(line.recv(4096).decode("latin-1").split("\r\n")[0])

    thread = threading.Thread(target=listen)
    thread.start()
    browse(page, "--dump-dom", f"--proxy-server=127.0.0.1:{server.getsockname()[1]}")
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    return [line for line in heard if "handgrad.test" in line]


def test_nothing_is_asked_of_a_network(pages, tmp_path):
    """And could not be: a page that asks for a picture, a script and data is stopped by the policy, and heard without it."""
    asks = "<img src='http://a.handgrad.test/x.png'><script src='http://b.handgrad.test/x.js'></script>"
    asks += "<script>fetch('http://c.handgrad.test/x').catch(() => 0)</script>"
    text = pages[0].read_text(encoding="utf-8").replace("</body>", asks + "</body>")
    guarded, open_page = tmp_path / "guarded.html", tmp_path / "open.html"
    guarded.write_text(text, encoding="utf-8")
    open_page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")
    assert not re.search(r"https?:", pages[0].read_text() + pages[1].read_text()), "the page itself names no address"
    assert requests_of(guarded) == []
    assert {host for line in requests_of(open_page) for host in re.findall(r"\w\.handgrad", line)} == {
        "a.handgrad",
        "b.handgrad",
        "c.handgrad",
    }
