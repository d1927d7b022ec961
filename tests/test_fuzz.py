"""Readers meet mutated bytes: they succeed or raise HandgradError with one line, nothing else, and soon."""

import functools
import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import json_values, mutations

from handgrad import data, io, tokenizers
from handgrad.core.errors import HandgradError
from handgrad.infer.convert import to_hf
from handgrad.infer.load import open_source
from handgrad.models import GPT2, declare, to_dict
from handgrad.tokenizers.gpt2 import MERGES, read_ranks

SECONDS = 2
fuzz = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(read) -> None:
    begin = time.perf_counter()
    try:
        read()
    except HandgradError as error:
        assert str(error).startswith("[") and "\n" not in str(error)
    assert time.perf_counter() - begin < SECONDS


@functools.cache
def whole(folder: Path) -> dict[str, bytes]:
    """The bytes of one healthy file of each kind."""
    data.write_shard(folder / "u16.bin", [np.arange(100)], np.dtype("<u2"))
    data.write_shard(folder / "u32.bin", [np.arange(100)], np.dtype("<u4"))
    (folder / "a.txt").write_text("to be or not to be, that is the question")
    data.prepare_text([folder / "a.txt"], folder / "data", tokenizers.chars((folder / "a.txt").read_text()))
    tensors = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, ml_dtypes.bfloat16)}
    path = io.save(folder / "run", 7, tensors, tensors, {"config": {"layers": 2, "lr": 1e-3}, "names": ["a", "b"]})
    return {
        "u16": (folder / "u16.bin").read_bytes(),
        "u32": (folder / "u32.bin").read_bytes(),
        "meta": (folder / "data" / "meta.json").read_bytes(),
        "safetensors": (path / "model.safetensors").read_bytes(),
        "run": (path / "run.json").read_bytes(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", ["u16", "u32"])
@fuzz
@given(mutate=mutations(head=16))
def test_shards(folder, kind, mutate):
    (folder / "mutated.bin").write_bytes(mutate(whole(folder)[kind]))

    def read():
        tokens = data.tokens(folder / "mutated.bin", 4, 8, vocab_size=100)
        for step in range(20):
            batch = tokens.batch(step)
            assert batch["ids"].min() >= 0 and batch["targets"].max() < 100
        list(tokens.sweep(3))

    survives(read)


@fuzz
@given(mutate=mutations(head=200))
def test_safetensors(folder, mutate):
    raw = whole(folder)["safetensors"]
    path = folder / "run" / "step_000007"
    (path / "model.safetensors").write_bytes(mutate(raw))
    survives(lambda: dict(io.load(path, {"w": ((2, 3), "float32"), "b": ((3,), "bfloat16")})))


@fuzz
@given(size=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 200)), header=st.binary(max_size=100))
def test_safetensors_headers(folder, size, header):
    path = folder / "run" / "step_000007"
    whole(folder)
    (path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)
    survives(lambda: dict(io.load(path, {"w": ((2, 3), "float32")})))


@fuzz
@given(dtype=json_values(), shape=json_values(), offsets=json_values())
def test_safetensors_fields(folder, dtype, shape, offsets):
    whole(folder)
    path = folder / "run" / "step_000007"
    text = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    survives(lambda: dict(io.load(path, {"w": ((2, 3), "float32")})))


@fuzz
@given(mutate=mutations(head=120))
def test_run_json(folder, mutate):
    raw = whole(folder)["run"]
    path = folder / "run" / "step_000007"
    (path / "run.json").write_bytes(mutate(raw))
    survives(lambda: io.load_meta(path, {"config": dict, "names": list}))


@functools.cache
def models(folder: Path) -> dict[Path, bytes]:
    """The description of a healthy model, of ours and at Hugging Face, by its place."""
    model = GPT2(vocab_size=5, max_seq_len=4, num_layers=1, num_heads=1, hidden_size=2)
    params = {name: np.zeros(info.tensor.shape, np.float32) for name, info in declare(model).params.items()}
    path = io.save(folder / "model", 1, params, {}, to_dict(model) | {"dtype": "f32"})
    (folder / "hf").mkdir()
    to_hf(open_source(path), folder / "hf", "f32", None)
    return {place: place.read_bytes() for place in (path / "run.json", folder / "hf" / "config.json")}


@pytest.mark.parametrize("which", [0, 1], ids=["run.json", "config.json"])
@fuzz
@given(mutate=mutations(head=800))
def test_descriptions_of_models(folder, which, mutate):
    place, raw = list(models(folder).items())[which]
    place.write_bytes(mutate(raw))
    survives(lambda: open_source(place.parent))


@pytest.mark.parametrize("which", [0, 1], ids=["run.json", "config.json"])
@fuzz
@given(pick=st.data(), value=json_values() | st.integers(1, 2**70) | st.integers(1, 2048))
def test_fields_of_models(folder, which, pick, value):
    """Also sizes that no machine could hold, in a file of a few bytes."""
    place, raw = list(models(folder).items())[which]
    about = json.loads(raw)
    fields = about.get("model", about)
    key = pick.draw(st.sampled_from([*about, *fields]))
    (fields if key in fields else about)[key] = value
    place.write_text(json.dumps(about))
    survives(lambda: open_source(place.parent))


KEYS = ["tokenizer", "vocab_size", "dtype", "train", "val"]


def use_meta(folder):
    meta = data.read_meta(folder)
    tokenizer = tokenizers.load(meta["tokenizer"], folder)
    tokenizer.decode(tokenizer.encode("to be"))


@fuzz
@given(mutate=mutations(head=300))
def test_meta_json(folder, mutate):
    (folder / "data" / "meta.json").write_bytes(mutate(whole(folder)["meta"]))
    survives(lambda: use_meta(folder / "data"))


@fuzz
@given(key=st.sampled_from([*KEYS, "kind", "characters"]), value=json_values())
def test_meta_json_fields(folder, key, value):
    meta = json.loads(whole(folder)["meta"])
    (meta["tokenizer"] if key in ("kind", "characters") else meta)[key] = value
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    survives(lambda: use_meta(folder / "data"))


@settings(fuzz, max_examples=50)
@given(mutate=mutations(head=400_000))
def test_gpt2_merges(folder, mutate):
    raw = MERGES.read_bytes()
    mutated = mutate(raw)
    (folder / "merges.bpe").write_bytes(mutated)
    if mutated == raw:
        return
    with pytest.raises(HandgradError, match="must be GPT-2's merges"):
        read_ranks(folder / "merges.bpe")


MODELS = {
    "BPE": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": "a"},
    "Unigram": {"unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -2.5]]},
    "WordPiece": {
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
}


@pytest.mark.parametrize("kind", MODELS)
@fuzz
@given(mutate=mutations(head=200))
def test_tokenizer_json(folder, kind, mutate):
    parts = dict(normalizer=None, pre_tokenizer=None, post_processor=None, decoder=None)
    model = {"type": kind, **MODELS[kind]}
    raw = json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model}).encode()
    file = folder / "tokenizer.json"
    file.write_bytes(raw)
    tokenizers.from_file(file).encode("ab")
    file.write_bytes(mutate(raw))

    def read():
        tokenizer = tokenizers.from_file(file)
        tokenizer.decode(tokenizer.encode("abc ab"))

    survives(read)


@fuzz
@given(raw=st.binary(max_size=200))
def test_text(folder, raw):
    (folder / "fuzzed.txt").write_bytes(raw)
    survives(lambda: data.prepare_text([folder / "fuzzed.txt"], folder / "text", tokenizers.gpt2()))
