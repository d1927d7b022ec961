"""Labels of pairs of texts: their records, a BERT on them against transformers, and the verbs."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_encoder import release
from test_wordpiece import VOCAB

import handgrad as hg
from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.truncate import longest_first
from handgrad.infer.load import open_source
from handgrad.train.datasets import objective_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")

WORDS = "the cat go hello un aff a b c ! don t".split()
T, ON_ONE = 16, "--threads 1 --backend cpu"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder to work in, with pairs in pairs.jsonl: whether both name an animal. Some are empty or too long."""
    monkeypatch.chdir(tmp_path)
    rng, rows = np.random.default_rng(0), []
    for _ in range(300):
        first, second = (" ".join(rng.choice(WORDS, rng.integers(0, 14))) for _ in range(2))
        same = ("cat" in first.split()) == ("cat" in second.split())
        rows.append({"text": first, "text2": second, "label": "same" if same else "other"})
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return rows


def prepare(*flags):
    flags = ["--pair", "text2", "--tokenizer", "vocab.txt", "--seq-len", str(T), "--out", "data", *flags]
    return main(["data", "labels", "pairs.jsonl", *flags])


def classifier():
    """A BERT of transformers with two labels, and it as a folder."""
    ids = {"id2label": {0: "other", 1: "same"}, "label2id": {"other": 0, "same": 1}}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None}
    return release(transformers.BertForSequenceClassification, "bert", **ids, **still)


def theirs():
    """transformers' tokenizer of the same vocabulary."""
    return transformers.AutoTokenizer.from_pretrained("bert")


def test_records_equal_the_inputs_of_transformers(rows, capsys):
    """Ids, segments, attention and labels of every pair: cut, whole, or with an empty text."""
    classifier()
    assert prepare("--val-fraction", "0.3") == 0
    assert "pairs of at most 16 tokens" in capsys.readouterr().out
    tokenizer = theirs()
    settings = dict(truncation=True, max_length=T, padding="max_length")
    texts = ([row[name] for row in rows] for name in ("text", "text2"))  # lists: an empty text alone would be no text
    t = tokenizer(*texts, **settings)
    labels = [[int(row["label"] == "same")] for row in rows]
    parts = zip(t["input_ids"], t["token_type_ids"], t["attention_mask"], labels)
    want = [tuple(sum(row, [])) for row in parts]
    assert sum(row[2 * T + T - 1] for row in want) > 100  # are as long as can be
    meta = hg.data.read_meta("data")
    model, ours = open_source("bert").model, tokenizers.from_file("vocab.txt")
    objective = objective_of(model, None, ours, meta=meta)
    found = []
    for split in ("train", "val"):
        data = hg.data.tokens("data", T, T, objective=objective, split=split)
        for b in data.sweep(1):
            seen = np.arange(T) <= b["last"][0]
            assert b["first"][0].tolist() == [0] * seen.sum() + [seen.sum()] * (T - seen.sum())
            found.append((*b["ids"][0].tolist(), *b["types"][0].tolist(), *map(int, seen), int(b["targets"][0])))
    assert sorted(found) == sorted(want) and meta["pairs"] is True


def test_surrogates_at_the_ends_of_texts(tmp_path):
    """A lone one is U+FFFD, though the other text begins with its counterpart; two that json leaves apart are paired."""
    vocab = "[PAD] [UNK] [CLS] [SEP] [MASK] cat go hello \N{GRINNING FACE}".split()
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    texts = [rb'"cat \ud83d", "text2": "\ude00 go"', b'"cat \xed\xa0\xbd\xed\xb8\x80", "text2": "go hello"']
    rows = [b'{"label": %d, "text": %b}' % row for row in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(rows))
    own, columns = tokenizers.from_file(tmp_path / "vocab.txt"), hg.data.Columns(pair="text2")
    how = dict(columns=columns, val_fraction=0, seq_len=9)
    meta = hg.data.prepare_labels([tmp_path / "pairs.jsonl"], tmp_path / "data", own, 0, **how)
    found = hg.data.open_shard(tmp_path / "data" / "train_000000.bin").read().reshape(-1, 8)
    cat, go, hello, face = range(5, 9)  # WordPiece leaves U+FFFD out
    assert found.tolist() == [[0, cat, 0, go, 0, 0, 0, 0], [1, cat, face, 0, go, hello, 0, 0]]
    assert meta["replaced"] == 2


def test_the_longer_text_is_cut_as_by_transformers(rows):
    classifier()
    tokenizer = theirs()
    counts = [(first, second) for first in range(12) for second in range(12)]
    texts = [" a" * first for first, _ in counts], [" b" * second for _, second in counts]
    for most in (1, 2, 5, 8):
        found = tokenizer(*texts, truncation=True, max_length=most + 3)["token_type_ids"]
        kept = [longest_first(*pair, most) for pair in counts]
        assert found == [[0] * (a + 2) + [1] * (b + 1) for a, b in kept]


def test_loss_and_gradients_equal_transformers(rows, monkeypatch):
    bert = classifier()
    assert prepare() == 0
    model, params = parity.tensors(bert)
    objective = objective_of(model, None, tokenizers.from_file("vocab.txt"), meta=hg.data.read_meta("data"))
    data = hg.data.tokens("data", T, 8 * T, objective=objective)
    b = {name: torch.from_numpy(values).long() for name, values in data.batch(0).items()}
    assert b["types"].sum() > 8
    seen = (torch.arange(T) <= b["last"]).long()
    out = bert(b["ids"], attention_mask=seen, token_type_ids=b["types"], labels=b["targets"])
    out.loss.backward()
    _, want = parity.tensors(bert, gradients=True)

    def worst():
        execution = hg.Execution(8, threads=1, backend="cpu")
        run = hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, precision=hg.Precision("f32"))
        run.load_params(params)
        loss, found = run.step(1, 0.0).loss, run.grads()
        return abs(loss - out.loss.item()), max(parity.relative(found[name], g) for name, g in want.items())

    loss, gradient = worst()
    print(f"loss {loss:.1e}, worst gradient {gradient:.1e}")
    assert loss <= 1e-5 and gradient <= 1e-5
    fill = hg.data.Labels.fill  # the comparison's power: types of the second text that are not there
    monkeypatch.setattr(hg.data.Labels, "fill", lambda *a: (found := fill(*a)) | {"types": 0 * found["types"]})
    assert worst()[1] > 1e-3


def test_train_eval_and_classify(rows, capsys):
    bert = classifier()
    assert prepare("--val-fraction", "0.3") == 0
    train = f"train --init bert --train data --micro-batch 10 --steps 3 --dtype f32 --val-tokens 0 --out run {ON_ONE}"
    assert main(train.split()) == 0
    assert "classify: handgrad classify run FILE --pair" in capsys.readouterr().out
    assert main(["eval", "run", *ON_ONE.split()]) == 0
    found = json.loads(Path("run/eval.json").read_text())["step_000003"]["val"]
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert found["acc"] == last["val_acc"] and found["loss"] == pytest.approx(last["val_loss"], abs=1e-5)
    Path("lines.txt").write_text("".join(f"{row['text']}\t{row['text2']}\n" for row in rows[:40]))
    capsys.readouterr()
    assert main(["classify", "bert", "lines.txt", "--pair", *ON_ONE.split()]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["pair"]) for row in said] == [(row["text"], row["text2"]) for row in rows[:40]]
    tokenizer = theirs()
    pairs = [(row["text"], row["text2"]) for row in rows[:40]]
    logits = np.array([c.logits for c in hg.load_encoder("bert", backend="cpu", threads=1).classify(pairs)])
    inputs = tokenizer(*map(list, zip(*pairs)), truncation=True, max_length=40, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = bert.eval()(**inputs).logits
    assert np.abs(logits - want.numpy()).max() < 1e-5
    assert [row["label"] for row in said] == [["other", "same"][i] for i in want.argmax(1).tolist()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text2": 3}, "must hold text under 'text2', but got a number"),
        ({"text2": None}, "must hold text under 'text2', but got null"),
    ],
)
def test_rows_that_are_no_pairs(rows, capsys, change, said):
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], rows[3] | change]))
    assert prepare() == 2
    assert said in capsys.readouterr().err


def test_pairs_that_do_not_fit_are_refused(rows, capsys):
    assert prepare("--seq-len", "4") == 2
    assert "seq_len must be at least 5 tokens, but got 4" in capsys.readouterr().err
    release(transformers.BertForSequenceClassification, "one", type_vocab_size=1)
    assert prepare() == 0
    Path("lines.txt").write_text("a\tb\na b\n")
    for flags, said in (
        ("train --init one --train data --steps 1", "pairs of texts take a bert with two types of tokens, but got 1"),
        ("classify one lines.txt --pair", "line 2 holds two texts with a tab between them, but got 0 tabs"),
    ):
        capsys.readouterr()
        assert main(flags.split()) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(HandgradError, match="pairs of texts take a bert with two types of tokens, but got 1"):
        hg.load_encoder("one", backend="cpu").classify([("a", "b")])
    objective = hg.data.Labels(cls_id=6, sep_id=7, pad_id=0, count=2, record=6, pairs=True)
    for record in ([2, 9, 0, 9, 0, 0], [1, 9, 9, 9, 9, 9], [1, 9, 0, 0, 9, 0]):  # a third label; one text; three
        with pytest.raises(HandgradError, match="a record of the shards is one of 2 labels, two texts, and padding"):
            objective.fill(np.array([record], np.int32), None, None, objective.inputs)
    found = objective.fill(np.array([[1, 0, 9, 9, 0, 0]], np.int32), None, None, objective.inputs)
    assert found["ids"].tolist() == [[6, 7, 9, 9, 7, 0, 0]] and found["types"].tolist() == [[0, 0, 1, 1, 1, 0, 0]]


def test_padding_may_have_any_id(tmp_path):
    """A batch that the last pairs do not fill has rows of zeros, which hold no padding where its id is another."""
    objective = hg.data.Labels(cls_id=6, sep_id=7, pad_id=3, count=2, record=6, pairs=True)
    hg.data.write_shard(tmp_path / "val_0.bin", [np.array([0, 0, 3, 9, 3, 3, 1, 3, 9, 3, 3, 3])], hg.data.id_dtype(10))
    data = hg.data.tokens(tmp_path / "val_*.bin", 7, 7, shuffle=False, objective=objective)
    (batch,) = data.sweep(4)
    assert batch["ids"][:2].tolist() == [[6, 0, 7, 9, 7, 3, 3], [6, 7, 9, 7, 3, 3, 3]]
    assert batch["targets"].tolist() == [0, 1, -1, -1] and (batch["last"][2:] == -1).all()
