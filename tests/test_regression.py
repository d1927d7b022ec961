"""Labels that are numbers: a BERT with one output against transformers, and the verbs."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_encoder import release
from test_wordpiece import VOCAB

import handgrad as hg
from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.backward import POLICIES
from handgrad.core.errors import HandgradError
from handgrad.evals.classes import value_metrics
from handgrad.infer.load import open_source
from handgrad.models import Bert, forward_loss
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.datasets import objective_of
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")

WORDS = "the cat go hello un aff a b c ! don t".split()
T, ON_ONE = 16, "--threads 1 --backend cpu"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder to work in, with shards in data/ of pairs with a number: how often both name a cat, less 1.5."""
    monkeypatch.chdir(tmp_path)
    rng, rows = np.random.default_rng(0), []
    for _ in range(300):
        first, second = (rng.choice(WORDS[:4], 5).tolist() for _ in range(2))
        number = min(first.count("cat"), 2) + min(second.count("cat"), 2) - 1.5
        rows.append({"text": " ".join(first), "text2": " ".join(second), "label": number})
    rows[0]["label"] = -1  # as IGNORE_INDEX, and a whole number
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("vocab.txt").write_text("\n".join(VOCAB) + "\n")
    flags = f"--pair text2 --regression --tokenizer vocab.txt --seq-len {T} --val-fraction 0.3"
    assert main(["data", "labels", "pairs.jsonl", *flags.split()]) == 0
    return rows


def regression():
    """A BERT of transformers with one output, and it as a folder."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None}
    return release(transformers.BertForSequenceClassification, "bert", num_labels=1, **still)


def batches(model, sequences, **kwargs):
    objective = objective_of(model, None, tokenizers.from_file("vocab.txt"), meta=hg.data.read_meta("data"))
    return hg.data.tokens("data", T, sequences * T, objective=objective, **kwargs)


def test_shards_of_a_regression_hold_the_numbers_exactly(rows):
    model = Bert(60, T, 1, 2, 8, 12, mlm=False, pooler=True, labels=("value",))
    found = []
    for split in ("train", "val"):
        for b in batches(model, 1, split=split).sweep(1):
            assert b["values"].dtype == np.float32
            found.append((b["ids"][0, : b["last"][0, 0] + 1].tolist(), float(b["values"][0])))
    tokenizer = tokenizers.from_file("vocab.txt")
    want = [([6, *tokenizer.encode(row["text"]), 7, *tokenizer.encode(row["text2"]), 7], row["label"]) for row in rows]
    assert sorted(found) == sorted(want)
    assert hg.data.read_meta("data")["values"] == [-1.5, -1.0, -0.5, 0.5, 1.5, 2.5]


def test_loss_and_gradients_equal_transformers(rows):
    bert = regression()
    model, params = parity.tensors(bert)
    assert model.labels == ("value",)
    data = batches(model, 8)
    b = {name: torch.from_numpy(values) for name, values in data.batch(0).items()}
    seen = (torch.arange(T) <= b["last"]).long()
    out = bert(b["ids"].long(), attention_mask=seen, token_type_ids=b["types"].long(), labels=b["values"])
    out.loss.backward()
    _, want = parity.tensors(bert, gradients=True)
    execution = hg.Execution(8, threads=1, backend="cpu")
    run = hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, precision=hg.Precision("f32"))
    run.load_params(params)
    loss, found = run.step(1, 0.0).loss, run.grads()
    gradient = max(parity.relative(found[name], g) for name, g in want.items())
    print(f"loss {abs(loss - out.loss.item()):.1e}, worst gradient {gradient:.1e}")
    assert abs(loss - out.loss.item()) <= 1e-5 and gradient <= 1e-5


def test_gradients_equal_finite_differences(rows):
    model = Bert(60, T, 1, 2, 8, 12, dropout=0.2, mlm=False, pooler=True, labels=("value",))
    batch = batches(model, 3).batch(0)

    def fill(p, arena):
        initialize(p, arena, Start(seed=1))
        for info in p.params.values():
            w = arena.part("param", info.tensor)[: info.init.rows]
            w += np.random.default_rng(0).normal(0, 0.2, w.shape)
        for name, t in p.inputs.items():
            arena.view(t)[...] = batch[name].reshape(-1)
        set_scalars(p, arena)

    assert gradcheck(lambda p: forward_loss(p, model, 3, T), fill, POLICIES["act"]) < 1e-6


def test_train_eval_classify_and_convert(rows, capsys):
    regression()
    train = f"train --init bert --train data --micro-batch 10 --lr 5e-3 --steps 90 --dtype f32 --val-tokens 0 {ON_ONE}"
    assert main([*train.split(), "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", *ON_ONE.split()]) == 0
    found = json.loads(Path("run/eval.json").read_text())["step_000090"]["val"]
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert "val_acc" not in last and found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert found["loss"] < 0.5 and found["pearson"] > 0.7 and found["spearman"] > 0.7
    Path("lines.txt").write_text("".join(f"{row['text']}\t{row['text2']}\n" for row in rows[:20]))
    capsys.readouterr()
    assert main(["classify", "run", "lines.txt", "--pair", *ON_ONE.split()]) == 0
    values = [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()]
    assert main(["convert", "run", "hf"]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    texts = ([row[name] for row in rows[:20]] for name in ("text", "text2"))
    with torch.no_grad():
        want = theirs(**tokenizer(*texts, padding=True, return_tensors="pt")).logits[:, 0]
    assert theirs.config.num_labels == 1 and np.abs(np.array(values) - want.numpy()).max() < 1e-5
    encoder = hg.load_encoder("hf", backend="cpu", threads=1)
    with pytest.raises(HandgradError, match="a classifier has two labels or more, but got a regression"):
        encoder.classify(["a"])
    assert open_source("hf").model == open_source("run").model


def test_validation_texts_have_numbers_of_their_own(rows, capsys):
    """Their records are indices into another list. Other texts than the model's are refused."""
    regression()
    Path("val.jsonl").write_text(
        "".join(json.dumps(row | {"label": 4.25}) + "\n" for row in rows[:9]) + json.dumps(rows[9])
    )
    flags = f"--pair text2 --regression --tokenizer vocab.txt --seq-len {T} --val-fraction 0.5 --out other"
    assert main(["data", "labels", "val.jsonl", *flags.split()]) == 0
    assert hg.data.read_meta("other")["values"][-1] == 4.25 != hg.data.read_meta("data")["values"][-1]
    train = f"train --init bert --train data --steps 1 --lr 0 --dtype f32 {ON_ONE} --val"
    assert main([*train.split(), "other", "--out", "run"]) == 0
    assert main(["eval", "run", *ON_ONE.split(), "--tasks", "val=other"]) == 0
    found = json.loads(Path("run/eval.json").read_text())["step_000001"]["val"]
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-5) and found["loss"] > 9
    assert "Loss, squared error" in Path("run/report.html").read_text()
    Path("texts.jsonl").write_text(
        "".join(json.dumps(row | {"label": i % 2}) + "\n" for i, row in enumerate(rows[:40]))
    )
    flags = f"--tokenizer vocab.txt --seq-len {T} --out classes"
    assert main(["data", "labels", "texts.jsonl", *flags.split()]) == 0
    capsys.readouterr()
    assert main([*train.split(), "classes", "--out", "no"]) == 2
    assert "the texts have the labels of the model, value, but got 0, 1" in capsys.readouterr().err


def test_one_set_has_one_list_of_numbers(rows, capsys):
    """A record gives its number by an index, which means another number in another folder. A mixture knows both."""
    regression()
    Path("more.jsonl").write_text("".join(json.dumps(row | {"label": row["label"] + 9}) + "\n" for row in rows))
    flags = f"--pair text2 --regression --tokenizer vocab.txt --seq-len {T} --val-fraction 0.3 --out data2"
    assert main(["data", "labels", "more.jsonl", *flags.split()]) == 0
    capsys.readouterr()
    train = f"train --init bert --steps 2 --micro-batch 2 --dtype f32 {ON_ONE} --out run --train"
    assert main([*train.split(), "data*/train_*.bin"]) == 2
    assert "one set has the labels of data/meta.json, but got others in data2/meta.json" in capsys.readouterr().err
    assert main([*train.split(), "data,data2"]) == 0


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**128, float("nan"), float("inf"), True, "1", None])
def test_a_meta_with_other_values_is_refused(value):
    meta = {"labels": ["value"], "record": 15, "values": [1.0, value]}
    with pytest.raises(HandgradError, match="data/meta.json must hold numbers as 'values'"):
        hg.data.labelled(meta, "data")
    assert hg.data.labelled(meta | {"values": [1.0, 2]}, "data").values == (1.0, 2.0)


def test_correlations_equal_pytorch():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 5, 50).astype(float)
    given = right + rng.normal(0, 2, 50).round(1)
    found = value_metrics(given, right)
    pearson = torch.corrcoef(torch.tensor(np.stack([given, right])))[0, 1].item()
    place = [[np.mean([i for i, b in enumerate(sorted(x)) if b == a]) for a in x] for x in (given, right)]
    spearman = torch.corrcoef(torch.tensor(np.array(place)))[0, 1].item()
    assert (found["pearson"][0], found["spearman"][0]) == pytest.approx((pearson, spearman), rel=1e-12)
    assert np.isnan(value_metrics(given, 0 * right)["pearson"][0])


@pytest.mark.parametrize("label", ["3", True, None, 1e10, float("nan")])
def test_rows_without_a_number(rows, capsys, label):
    Path("pairs.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"label": label}))
    assert main("data labels pairs.jsonl --regression --tokenizer vocab.txt --out other".split()) == 2
    assert "must hold a number of at most 1e+09 under 'label', but got" in capsys.readouterr().err
