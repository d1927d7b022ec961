"""Labelled texts: their shards, a BERT that classifies against transformers, and the verbs that train and use one."""

import json
import pickle
from dataclasses import replace
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
from handgrad.data.prepare.labels import Records
from handgrad.infer.load import open_source
from handgrad.io import checkpoint
from handgrad.models import Bert, from_dict, to_dict
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.datasets import objective_of
from handgrad.train.heads import for_labels
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")

RULE = {"cat": "one", "café": "one", "go": "two", "mask": "two"}  # the word that says the label
FILL = "the a b c . , ! un don t $ straße i hello".split()
T = 16


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with texts in texts.jsonl and BERT's vocab.txt."""
    monkeypatch.chdir(tmp_path)
    rng, lines = np.random.default_rng(0), []
    for _ in range(400):
        words = rng.choice(FILL, rng.integers(2, 20)).tolist()
        word = str(rng.choice(list(RULE)))
        words.insert(int(rng.integers(min(len(words), 8))), word)  # before the cut
        lines.append(json.dumps({"text": " ".join(words), "label": RULE[word]}) + "\n")
    Path("texts.jsonl").write_text("".join(lines))
    Path("vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return tmp_path


def prepare(*flags):
    return main(
        ["data", "labels", "texts.jsonl", "--tokenizer", "vocab.txt", "--seq-len", str(T), "--out", "data", *flags]
    )


def batch_of(model, sequences=6, **kwargs):
    objective = objective_of(model, None, tokenizers.from_file("vocab.txt"), meta=hg.data.read_meta("data"))
    return hg.data.tokens("data", T, sequences * T, objective=objective, **kwargs)


# shards -----------------------------------------------------------------------------------------------------------------


def test_records_hold_the_texts(here, capsys):
    """Every text is in one split, whole or cut, with its label; sorting decides the labels' numbers."""
    assert prepare("--val-fraction", "0.3") == 0
    rows = [json.loads(line) for line in Path("texts.jsonl").read_text().splitlines()]
    tokenizer, model = tokenizers.from_file("vocab.txt"), Bert(mlm=False, pooler=True, labels=("one", "two"))
    want = sorted((tokenizer.encode(row["text"]).tolist()[: T - 2], ["one", "two"].index(row["label"])) for row in rows)
    found = {split: [] for split in ("train", "val")}
    for split in found:
        for b in batch_of(model, split=split).sweep(4):
            assert b["types"].sum() == 0
            for ids, first, last, label in zip(b["ids"], b["first"], b["last"], b["targets"]):
                n = last[0] + 1
                if n:  # the last batch has rows without a text
                    assert ids[0] == 6 and ids[n - 1] == 7 and (ids[n:] == 0).all() and (last == n - 1).all()
                    assert first.tolist() == [0] * n + [n] * (T - n)
                    found[split].append((ids[1 : n - 1].tolist(), int(label)))
    assert sorted(found["train"] + found["val"]) == want and 80 < len(found["val"]) < 160
    meta = json.loads(Path("data/meta.json").read_text())
    assert meta["labels"] == ["one", "two"] and meta["record"] == T - 1
    assert "labels one, two" in capsys.readouterr().out


def test_small_shards_hold_the_same(here):
    assert prepare("--shard-tokens", "100") == 0  # 6 records
    shards = sorted(Path("data").glob("train_*.bin"))
    assert len(shards) > 50 and {hg.data.open_shard(path).count % (T - 1) for path in shards} == {0}
    model = Bert(mlm=False, pooler=True, labels=("one", "two"))
    small = [b["ids"] for b in batch_of(model).sweep(8)]
    assert prepare("--replace") == 0
    for a, b in zip(small, (b["ids"] for b in batch_of(model).sweep(8)), strict=True):
        assert np.array_equal(a, b)
    records = Records(tokenizers.from_file("vocab.txt"), 0, 6)  # as a worker process gets it
    assert pickle.loads(pickle.dumps(records)).encode("1 the cat").tolist() == records.encode("1 the cat").tolist()
    assert records.encode("1 a b c a b c").tolist() == [1, *(VOCAB.index(word) for word in "abcab")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "must hold a label, text or a whole number, under 'label', but got none"),
        ({"text": "a", "label": 0.5}, "under 'label', but got a number"),
        ({"text": "a", "label": True}, "under 'label', but got true or false"),
        ({"label": "one"}, "must hold text under 'text', but got one with 'label'"),
        (None, "must have two labels or more under 'label', but got 1"),
    ],
)
def test_rows_that_are_no_labelled_texts(here, capsys, row, said):
    Path("texts.jsonl").write_text(json.dumps({"text": "a", "label": "one"}) + "\n" + (json.dumps(row) if row else ""))
    if row and "text" not in row:
        Path("texts.jsonl").write_text('{"text": "a", "label": "two"}\n' + json.dumps(row))
    assert prepare() == 2
    assert said in capsys.readouterr().err and not Path("data").exists()


def test_damaged_records_are_refused():
    objective = hg.data.Labels(cls_id=6, sep_id=7, pad_id=0, count=2, record=5)
    for record in ([2, 9, 9, 0, 0], [1, 9, 0, 9, 0]):  # a third label; padding inside
        with pytest.raises(HandgradError, match="a record of the shards is one of 2 labels, a text, and padding"):
            objective.fill(np.array([record], np.int32), None, None, objective.inputs)
    with pytest.raises(HandgradError, match="have seq_len 6, but got 7"):
        objective.window(7)


# against transformers ---------------------------------------------------------------------------------------------------


def classifier(labels=("one", "two"), **changes):
    ids = {"id2label": dict(enumerate(labels)), "label2id": {name: id for id, name in enumerate(labels)}}
    changes = {"pad_token_id": None, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | ids | changes
    return release(transformers.BertForSequenceClassification, "bert", **changes)


def compare(theirs):
    """(the worst gradient's relative error, the losses' difference) of a batch with padding."""
    model, params = parity.tensors(theirs)
    data = batch_of(model)
    run = hg.Trainer(model, hg.optim.AdamW(), data, execution=hg.Execution(6, threads=1), precision=hg.Precision("f32"))
    run.load_params(params)
    b = {name: torch.from_numpy(values).long() for name, values in data.batch(0).items()}
    seen = (torch.arange(T) <= b["last"]).long()
    assert 0 < seen.float().mean() < 1
    out = theirs(b["ids"], attention_mask=seen, token_type_ids=b["types"], labels=b["targets"])
    out.loss.backward()
    _, want = parity.tensors(theirs, gradients=True)
    loss, found = run.step(1, 0.0).loss, run.grads()
    return max(parity.relative(found[name], g) for name, g in want.items()), abs(loss - out.loss.item())


@pytest.mark.parametrize("labels", [("one", "two"), ("one", "two", "x", "y", "z")])
def test_loss_and_gradients_equal_transformers(here, labels):
    assert prepare() == 0
    meta = json.loads(Path("data/meta.json").read_text()) | {"labels": list(labels)}
    Path("data/meta.json").write_text(json.dumps(meta))
    gradient, loss = compare(classifier(labels))
    print(f"{len(labels)} labels: worst gradient {gradient:.1e}, loss {loss:.1e}")
    assert gradient <= 1e-4 and loss <= 1e-5


def test_padding_that_is_seen_is_caught(here, monkeypatch):
    """The comparison's power: with wrong bounds of ours it fails."""
    assert prepare() == 0
    right = hg.data.Labels.fill

    def wrong(self, raw, partner, draw, names):
        arrays = right(self, raw, partner, draw, names)
        if "ids" in names and len(names) < 6 and wrong.ours:
            arrays["last"] = np.full_like(arrays["last"], T - 1)
            arrays["first"] = np.zeros_like(arrays["first"])
        return arrays

    step = hg.Trainer.step

    def ours(self, *args):
        wrong.ours = True
        return step(self, *args)

    wrong.ours = False
    monkeypatch.setattr(hg.data.Labels, "fill", wrong)
    monkeypatch.setattr(hg.Trainer, "step", ours)
    assert compare(classifier())[0] > 1e-3


def test_gradients_equal_finite_differences(here):
    assert prepare() == 0
    model = Bert(60, 16, 1, 2, 8, 12, dropout=0.2, mlm=False, pooler=True, labels=("one", "two"))
    batch = batch_of(model, 3).batch(0)

    def fill(p, arena):
        initialize(p, arena, Start(seed=1))
        for info in p.params.values():
            w = arena.part("param", info.tensor)[: info.init.rows]
            w += np.random.default_rng(0).normal(0, 0.2, w.shape)
        for name, t in p.inputs.items():
            arena.view(t)[...] = batch[name].reshape(-1)
        set_scalars(p, arena)

    assert gradcheck(lambda p: hg.models.forward_loss(p, model, 3, T), fill, POLICIES["act"]) < 1e-6


# the verbs --------------------------------------------------------------------------------------------------------------

FLAGS = "--micro-batch 16 --threads 1 --backend cpu --dtype f32 --train data"


def test_a_bert_learns_to_classify(here, capsys):
    """From train to transformers: 95 % of held-out texts; logits of the exported model are the same."""
    assert prepare("--val-fraction", "0.25") == 0
    sizes = "--family bert --num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len 16 --steps 60 --lr 3e-3"
    assert main(["train", *FLAGS.split(), *sizes.split(), "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "evaluate: handgrad eval run; classify: handgrad classify run FILE" in out
    assert main(["eval", "run", "--threads", "1", "--backend", "cpu"]) == 0
    result = json.loads(Path("run/eval.json").read_text())["step_000060"]["val"]
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert result["acc"] >= 0.95 and result["loss"] == pytest.approx(last["val_loss"], abs=1e-5)
    assert last["val_acc"] == result["acc"] and abs(result["macro_f1"] - result["acc"]) < 0.05
    assert f"val {last['val_loss']:.4f} | acc {100 * last['val_acc']:.1f} % |" in out
    page = Path("run/report.html").read_text()
    assert (
        "Validation accuracy, %" in page
        and "Loss, nats per text" in page
        and f"<dd>{100 * last['val_acc']:.1f} %</dd><dd>step 60</dd>" in page
    )
    Path("lines.txt").write_text("the cat .\na b c go")
    capsys.readouterr()
    assert main(["classify", "run", "lines.txt", "--threads", "1", "--backend", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == [("the cat .", "one"), ("a b c go", "two")]
    assert main(["convert", "run", "hf"]) == 0
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained("hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.config.id2label == {0: "one", 1: "two"}
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    with torch.no_grad():
        want = theirs.eval()(**tokenizer(["the cat .", "a b c go"], padding=True, return_tensors="pt")).logits
    found = hg.load_encoder("hf", backend="cpu", threads=1).classify(["the cat .", "a b c go"])
    assert np.abs(np.array([c.logits for c in found]) - want.numpy()).max() < 1e-5
    share = torch.softmax(want, 1).max(1).values
    assert [row["probability"] for row in rows] == pytest.approx(share.tolist(), abs=1e-5)
    assert main(["eval", "hf", "--tasks", "val=data", "--threads", "1", "--backend", "cpu"]) == 0
    assert json.loads(Path("hf/eval.json").read_text())["hf"]["val"]["acc"] == result["acc"]


def test_special_tokens_are_read_as_the_data_have_them(here, capsys):
    """By the flag, tokens; without, plain text. [PAD] would end a text, and goes."""
    with Path("texts.jsonl").open("a") as file:
        file.write(json.dumps({"text": "the [SEP] cat [PAD] go [MASK]", "label": "one"}) + "\n")
    assert prepare("--special-tokens") == prepare("--replace", "--out", "plain") == 0
    model = Bert(60, T, 1, 2, 8, 12, mlm=False, pooler=True, labels=("one", "two"))
    run = hg.Trainer(
        model, hg.optim.AdamW(), batch_of(model), execution=hg.Execution(6, threads=1, backend="cpu"), out="run"
    )
    for step in (1, 2, 3):
        run.step(step, 1e-1)
    run.save(3)
    run.close()
    texts, rows = [json.loads(line)["text"] for line in Path("texts.jsonl").read_text().splitlines()], {}
    for folder, is_special in (("data", True), ("plain", False)):
        encoder = hg.load_encoder("run", backend="cpu", threads=1, special_tokens=is_special)
        rows[folder] = sorted(encoder.read(text)[0, 1:-1].tolist() for text in texts)
        shards = [hg.data.open_shard(path).read() for path in sorted(Path(folder).glob("*_0*.bin"))]
        records = np.concatenate(shards).reshape(-1, T - 1)[:, 1:]
        assert rows[folder] == sorted(record[record > 0].tolist() for record in records.astype(int))
    the, cat, go = (VOCAB.index(word) for word in ("the", "cat", "go"))
    assert [the, 7, cat, go, 8] in rows["data"] and [the, 7, cat, go, 8] not in rows["plain"]
    Path("a.txt").write_text(texts[-1] + "\n")
    capsys.readouterr()
    for verb, key in (("classify", "probability"), ("embed", "embedding")):
        said = []
        for flags in ([], ["--special-tokens"]):
            assert main([verb, "run", "a.txt", "--backend", "cpu", "--threads", "1", *flags]) == 0
            said.append(json.loads(capsys.readouterr().out)[key])
        assert said[0] != said[1]


def test_accuracy_counts_every_text_once(here):
    """By `Trainer`, in batches that the last one does not fill, on another set, in the log as well."""
    assert prepare("--val-fraction", "0.3") == 0
    model = Bert(60, T, 1, 2, 8, 12, mlm=False, pooler=True, labels=("one", "two"))
    data, val = batch_of(model, 7), batch_of(model, split="val", shuffle=False)
    run = hg.Trainer(model, hg.optim.AdamW(), data, execution=hg.Execution(7, threads=1, backend="cpu"), out="run")
    run.step(1, 1e-3)
    found = run.validate(val)
    run.save(1)
    run.close()
    want = hg.evals.class_metrics(val, hg.load_encoder("run", backend="cpu", threads=1))
    assert val.windows % 7 and found["val_acc"] == want["acc"][0] and 0 < found["val_acc"] < 1
    assert json.loads(Path("run/log.jsonl").read_text().splitlines()[-1]) == {"step": 1, **found}
    assert run.validate(val, 21 * T)["val_acc"] != found["val_acc"]


def test_a_resumed_run_has_the_same_bits(here, capsys):
    assert prepare() == 0
    release(transformers.BertForMaskedLM, "bert")
    for out, steps in (("whole", (4,)), ("run", (2, 4))):
        for last in steps:
            flags = f"--init bert --steps {last} --out {out} --resume auto --dropout 0.1 --schedule constant --warmup 0"
            assert main(["train", *FLAGS.split(), *flags.split()]) == 0
    whole, run = (Path(out, "step_000004/model.safetensors").read_bytes() for out in ("whole", "run"))
    assert whole == run


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("BertModel", True), ("BertForMaskedLM", False), ("BertForPreTraining", True), ("as BertForMaskedLM", True)],
)
def test_a_new_head_on_the_body_of_a_file(here, kind, kept):
    """The body's tensors stay, and the pooler if the file has one, whatever class its config names."""
    theirs = release(getattr(transformers, "BertForPreTraining" if kind[:2] == "as" else kind), "bert")
    if kind[:2] == "as":
        config = json.loads(Path("bert/config.json").read_text()) | {"architectures": [kind[3:]]}
        Path("bert/config.json").write_text(json.dumps(config))
    source = for_labels(open_source("bert"), ("one", "two", "three"), 5)
    assert source.model.labels == ("one", "two", "three") and not source.model.mlm and not source.model.nsp
    body = getattr(theirs, "bert", theirs)
    w = source.weights
    assert np.array_equal(w.tensor("wte.weight"), body.embeddings.word_embeddings.weight.detach().numpy())
    assert np.array_equal(w.tensor("h.1.mlp.up.bias"), body.encoder.layer[1].intermediate.dense.bias.detach().numpy())
    if kept:
        assert np.array_equal(w.tensor("pooler.weight"), body.pooler.dense.weight.detach().numpy())
    else:
        assert 0.01 < w.tensor("pooler.weight").std() < 0.03 and not w.tensor("pooler.bias").any()
    assert w.shapes["classifier.weight"] == (3, 24) and 0.01 < w.tensor("classifier.weight").std() < 0.03
    again = for_labels(open_source("bert"), ("one", "two", "three"), 6)
    assert not np.array_equal(again.weights.tensor("classifier.weight"), w.tensor("classifier.weight"))


def test_a_head_for_the_same_labels_stays(here):
    theirs = classifier()
    kept = for_labels(open_source("bert"), ("one", "two"), 5).weights.tensor("classifier.weight")
    assert np.array_equal(kept, theirs.classifier.weight.detach().numpy())
    new = for_labels(open_source("bert"), ("two", "one"), 5).weights.tensor("classifier.weight")
    assert not np.array_equal(new, kept)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "train --train data --steps 1",
            "[model] labelled texts train a bert, but got a gpt2. hint: --init FOLDER of a BERT",
        ),
        ("train --train plain --init bert --steps 1", "the texts have the labels of bert, one, two, but got none"),
        ("eval bert --tasks val=other", "holds texts with the labels one, two, but got the labels one, three"),
        ("eval bert --tasks val=plain", "holds texts with the labels one, two, but got texts without labels"),
        ("eval bert --tasks hellaswag=x", "a classifier is evaluated on val, labelled texts, but got 'hellaswag'"),
        ("train --train data --init bert --steps 1 --seq-len 8", "these labelled texts have seq_len 16, but got 8"),
        ("data labels texts.jsonl", "labelled texts take a tokenizer with [PAD], but got gpt2"),
    ],
)
def test_what_does_not_fit_is_said(here, capsys, flags, said):
    classifier()
    assert prepare() == 0
    if "other" in flags or "plain" in flags:
        Path("texts.jsonl").write_text(Path("texts.jsonl").read_text().replace('"two"', '"three"'))
        assert prepare("--out", "other") == 0
        assert main("data jsonl texts.jsonl --tokenizer vocab.txt --out plain --val-tokens 500".split()) == 0
    capsys.readouterr()
    assert main(flags.split()) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(HandgradError, match="holds labelled texts, which a bert learns to classify"):
        hg.data.tokens("data", T, T)


def test_checkpoints_of_earlier_versions_have_no_labels():
    saved = to_dict(Bert())
    del saved["model"]["labels"]
    assert from_dict(json.loads(json.dumps(saved)), "model", "run.json") == Bert()
    assert replace(Bert(), mlm=False, pooler=True, labels=["a", "b"]).labels == ("a", "b")
    for labels in ((1,), ("a", "a"), ("a", 1)):
        with pytest.raises(HandgradError, match="labels is a list of 1 to 65,536 names, each once, or empty"):
            Bert(mlm=False, pooler=True, labels=labels)
    with pytest.raises(HandgradError, match="a BERT with labels has a pooler and no other head"):
        Bert(labels=("a", "b"))


def test_adapters_leave_the_new_head_to_learn(here, capsys):
    """A drawn head that nothing changes would be noise: it learns whole, and evaluations and exports have it."""
    assert prepare() == 0
    sizes = "--family bert --num-layers 1 --num-heads 2 --hidden-size 8 --max-seq-len 16 --steps 2 --warmup 0"
    assert main(["train", *FLAGS.split(), *sizes.split(), "--lora-rank", "2", "--ema", "0.5", "--out", "run"]) == 0
    run = open_source("run")
    found = checkpoint.state_names(run.path)
    assert {"m.classifier.weight", "ema.classifier.bias"} <= found and "m.pooler.weight" not in found
    assert not any(name.startswith("m.classifier.lora") for name in found)
    assert run.weights.read("classifier.bias").any()  # drawn as zeros
    assert main(["eval", "run", "--ema", "--threads", "1", "--backend", "cpu"]) == 0
    capsys.readouterr()
    assert main(["convert", "run", "adapter", "--adapter"]) == 2
    assert "an adapter alone holds no classifier" in capsys.readouterr().err
