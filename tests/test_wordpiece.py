"""BERT's WordPiece: against transformers' own Python implementation, in folders, and as what masks and exports read."""

import json
from pathlib import Path

import numpy as np
import pytest

from handgrad import tokenizers
from handgrad.core.errors import HandgradError

SPECIAL = ["[PAD]", *(f"[unused{i}]" for i in range(4)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "un ##aff ##able the cat ##s cafe naive café Hello hello , . ! $ 5 ##0 中 文 ' don t [ ] mask ß straße i ##ng go a b c"
VOCAB = [*SPECIAL, *WORDS.split()]
MIXED = [
    "Unaffable cats, THE Café!",
    "naïve café Hello hello.",
    "中文 the中文cat",
    "don't $50 [MASK] going\tgo\u00a0a\u200bb\x00c\r\n",
    "STRAßE xyz unaffablexyz",
    "a" * 101 + " a",
    "cats—the “cat”…",
    "",
]


@pytest.fixture
def folder(tmp_path):
    """A folder with vocab.txt, as BERT's have."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "settings", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_it_equals_the_python_implementation(folder, settings):
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    basic = legacy.BasicTokenizer(**{"do_lower_case": True} | settings)
    pieces = legacy.WordpieceTokenizer({token: id for id, token in enumerate(VOCAB)}, "[UNK]")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizers.from_folder(folder)
    for text in MIXED:
        want = [VOCAB.index(piece) for word in basic.tokenize(text) for piece in pieces.tokenize(word)]
        assert ours.encode(text).tolist() == want, text


def test_special_tokens_lie_anywhere(folder):
    ours = tokenizers.from_file(folder / "vocab.txt")
    assert tokenizers.special_ids(ours, ["[MASK]", "[PAD]"]) == {"[MASK]": 8, "[PAD]": 0}
    assert tokenizers.special_ids(ours, ["[MASK]", "[none]"]) is None and ours.ends == (7,)
    continues = tokenizers.continuations(ours)
    assert [VOCAB[id] for id in np.flatnonzero(continues)] == ["##aff", "##able", "##s", "##0", "##ng"]
    assert ours.decode(ours.encode("Unaffable cats")) == "unaffable cats"
    with pytest.raises(
        HandgradError, match="whole words are known of WordPiece, whose pieces begin with ##, but got chars"
    ):
        tokenizers.continuations(tokenizers.chars("abc"))


def test_it_is_saved_and_exported(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizers.from_folder(folder)
    run = tmp_path / "run"
    run.mkdir()
    again = tokenizers.load(ours.save(run), run)
    exported = tmp_path / "hf"
    exported.mkdir()
    tokenizers.to_folder(ours, exported)
    read = tokenizers.from_folder(exported)
    for text in MIXED:
        assert again.encode(text).tolist() == read.encode(text).tolist() == ours.encode(text).tolist()
    assert again.ends == read.ends == (7,)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert theirs(["the cats", "go"], padding=True)["input_ids"] == [
        [6, *ours.encode("the cats"), 7],
        [6, ours.encode("go")[0], 7, 0, 0],
    ]
    assert theirs("the", "cat")["token_type_ids"] == [0, 0, 0, 1, 1]
    names = ("unk", "cls", "sep", "pad", "mask")
    assert [getattr(theirs, f"{name}_token_id") for name in names] == [5, 6, 7, 0, 8]


def test_what_is_no_wordpiece_is_refused(tmp_path):
    Path(tmp_path, "vocab.txt").write_text("a\nb\n[CLS]\n")
    with pytest.raises(HandgradError, match=r"vocab.txt is WordPiece: it holds '?\[UNK\]'?, but got 3 other tokens"):
        tokenizers.from_folder(tmp_path)
    Path(tmp_path, "vocab.txt").write_text("\n".join(VOCAB))
    Path(tmp_path, "tokenizer_config.json").write_text(json.dumps({"do_lower_case": "yes"}))
    with pytest.raises(HandgradError, match="give do_lower_case as true or false"):
        tokenizers.from_folder(tmp_path)
