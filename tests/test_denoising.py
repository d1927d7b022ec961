"""`handgrad eval` of what predicts hidden tokens: the run's own validation loss, and every figure by transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_encoder import release

import handgrad as hg
from handgrad import evals, tokenizers
from handgrad.cli.__main__ import main
from handgrad.evals.denoising import Denoiser
from handgrad.infer.load import open_source
from handgrad.train.datasets import objective_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ON_ONE = "--threads 1 --backend cpu"
SIZES = "--num-layers 1 --num-heads 2 --hidden-size 16 --max-seq-len 24"
SHORT = f"{ON_ONE} --dtype f32 --train data --micro-batch 5 --lr 1e-2 --warmup 0 --steps 5 --val-every 2 --val-tokens 0"
WORDS = "the cats hello unaffable going a b c naive cafe straße".split()
T = 20


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with shards of BERT's tokens in data/: few documents, so that pairs follow each other."""
    monkeypatch.chdir(tmp_path)
    release(transformers.BertForPreTraining, "bert", max_position_embeddings=T)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(60)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main("data jsonl a.jsonl --tokenizer bert/vocab.txt --val-tokens 1200".split()) == 0


def evaluated(model, *flags):
    """The results of the validation set in eval.json."""
    assert main(["eval", model, *ON_ONE.split(), *flags]) == 0
    (tasks,) = json.loads(Path(model, "eval.json").read_text()).values()
    return list(tasks.values())[-1]


def logged(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()][-1]["val_loss"]


@pytest.mark.parametrize("start", [f"--family bert {SIZES} --whole-word", f"--family t5 {SIZES}", "--init bert"])
def test_eval_equals_the_last_validation_loss_bit_for_bit(here, start, capsys):
    assert main(["train", *SHORT.split(), *start.split(), "--out", "run"]) == 0
    found = evaluated("run")
    assert found["loss"] == logged("run") and 0 < found["loss_stderr"] < 0.1
    assert not found.keys() & {"perplexity", "bits_per_byte"} and 0 < found["acc"] < 1
    assert ("nsp_acc" in found) == ("init" in start)
    if "word" not in start:  # which only the run's settings know
        assert main(["convert", "run", "hf"]) == 0
        model = open_source("run").model
        again = evaluated("hf", "--tasks", "val=data", "--seq-len", str(model.usual_seq_len))
        assert again["loss"] == pytest.approx(found["loss"], abs=1e-5) and again["acc"] == found["acc"]
    assert evaluated("run", "--limit", "3")["count"] == 3


def test_eval_with_other_masks_differs(here, monkeypatch):
    assert main(["train", *SHORT.split(), "--family", "bert", *SIZES.split(), "--out", "run"]) == 0
    tokens = hg.data.tokens
    monkeypatch.setattr(hg.data, "tokens", lambda *a, **k: tokens(*a, **k, seed=1))
    assert abs(evaluated("run")["loss"] - logged("run")) > 1e-4


def by_transformers(theirs, data):
    """Every figure of a pre-training BERT, a batch at a time."""
    sums, nats = np.zeros(5), torch.nn.functional.cross_entropy
    for b in data.sweep(1):
        t = {name: torch.from_numpy(values) for name, values in b.items()}
        seen = torch.arange(T) <= t["last"]
        with torch.no_grad():
            out = theirs(t["ids"].long(), attention_mask=seen.long(), token_type_ids=t["types"].long())
        counts = t["targets"] >= 0
        rows, targets = out.prediction_logits[0][t["rows"][counts].long()], t["targets"][counts].long()
        pair, right = out.seq_relationship_logits, t["nsp_targets"].long()
        n = len(targets)
        hits = (rows.argmax(1) == targets).sum()
        sums += [n, nats(rows, targets, reduction="sum"), hits, n * nats(pair, right), int(pair.argmax(1) == right)]
    n, masked, hits, pairs, right = sums
    found = {"loss": (masked + pairs) / n, "acc": hits / n, "masked_loss": masked / n, "nsp_loss": pairs / n}
    return found | {"nsp_acc": right / data.windows}


def test_every_figure_equals_transformers(here, monkeypatch):
    assert main(["train", *SHORT.split(), "--init", "bert", "--out", "run"]) == 0  # it has learnt something
    assert main(["convert", "run", "hf"]) == 0
    theirs = transformers.BertForPreTraining.from_pretrained("hf").eval()
    model, tokenizer = open_source("hf").model, tokenizers.from_file("bert/vocab.txt")
    objective = objective_of(model, tokenizer.eot, tokenizer)
    data = hg.data.tokens("data", T, T, shuffle=False, split="val", objective=objective)
    m = evals.load_denoiser("hf", T, 7, backend="cpu", threads=1)
    found = {name: value for name, (value, _) in evals.denoising_metrics(data, m).items()}
    want = by_transformers(theirs, data)
    print(found)
    assert found == pytest.approx(want, abs=2e-6) and found["acc"] == want["acc"] > 0.06
    likeliest = Denoiser._likeliest  # the comparison's power: rows that are one place off
    monkeypatch.setattr(Denoiser, "_likeliest", lambda self, hidden: np.roll(likeliest(self, hidden), 1))
    assert evals.denoising_metrics(data, m)["acc"][0] != want["acc"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("bert --tasks hellaswag=a.jsonl", "a bert continues no texts, but got 'hellaswag'. hint: --tasks val"),
        ("bert --tasks val=data --seq-len 64", "a sequence of the model has at most 20 tokens, but got 64"),
        ("bert --tasks val=data --seq-len -1", "--seq-len is a number from 0 on, but got -1"),
        ("body --tasks val=data", "a bert has the head of masked tokens, or labels, but got body without"),
    ],
)
def test_eval_refuses_other_tasks_lengths_and_heads(here, capsys, flags, said):
    release(transformers.BertModel, "body", max_position_embeddings=T)
    capsys.readouterr()
    assert main(["eval", *flags.split()]) == 2
    assert said in capsys.readouterr().err
