"""GGUF in and out: judged by the package gguf, by transformers, and by llama.cpp itself where it is installed."""

import json
import struct
import urllib.request
from dataclasses import asdict, replace

import numpy as np
import pytest
import tokenizers as tokenizers_library
from test_llama_format import FORM, LLAMA3, read, shapes, torch_model

from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.infer import Sampling, convert
from handgrad.infer.load import load_run, open_source
from handgrad.io import gguf, hf
from handgrad.io.format import Format
from handgrad.io.gguf_file import NUMBER_OF, TYPES, open_file
from handgrad.models import GPT2, Gemma, build_from_file, declare
from handgrad.models import shapes as shapes_of
from handgrad.models.gemma_format import FULL, SLIDING
from handgrad.tokenizers.file import FileTokenizer, put_before
from handgrad.tokenizers.gguf import RULES

package = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=4)
GEMMA_FORM = Format(**Gemma.hugging_face)
BASES = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in ((SLIDING, 9e3), (FULL, 2e5))}
TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 5}
CASES = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "heads of another width": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
GEMMA = dict(num_hidden_layers=4, num_key_value_heads=2, sliding_window=7, query_pre_attn_scalar=16)
GEMMAS = {  # layers that see the whole text; llama.cpp's default is every sixth
    f"gemma3, {name}": GEMMA | changes
    for name, changes in {
        "every third": {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "tie_word_embeddings": True},
        "every sixth": {"num_hidden_layers": 7, "rope_parameters": BASES, "tie_word_embeddings": False},
        "none": {"layer_types": [SLIDING] * 4},
        "every second": {"layer_types": [SLIDING, FULL] * 2, "head_dim": 32, "query_pre_attn_scalar": 32},
    }.items()
}


def told(what, *args):
    with pytest.raises(HandgradError) as error:
        what(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def made(folder, case, dtype=torch.float32):
    """The weights of a small model, from transformers' folder of it."""
    kind, changes = CASES[case]
    torch_model(kind, **SIZES | changes).to(dtype).save_pretrained(folder / "in")
    return read(folder / "in")


def gemma(case, **changes):
    """transformers' model, its norms far from 1."""
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.Gemma3TextConfig(**sizes | GEMMAS[case] | changes)
    model = transformers.Gemma3ForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.05, 0.3)
    return model


def gemma_weights(folder, case, **changes):
    gemma(case, **changes).save_pretrained(folder / "in")
    return open_source(folder / "in").weights


def again(path, form=FORM):
    """The weights in a file."""
    file = open_file(path)
    fields = gguf.read_fields(file, form)
    return gguf.read(file, form, fields, shapes(fields))


@pytest.mark.parametrize("case", CASES)
def test_a_model_in_and_out_is_bit_exact(tmp_path, case):
    for dtype, kind in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        weights = made(tmp_path, case, dtype)
        gguf.write(tmp_path / "x.gguf", FORM, weights, kind, TOKENIZER)
        found = again(tmp_path / "x.gguf")
        assert dict(found.fields) == dict(weights.fields) and found.dtype == weights.dtype == kind
        for name in weights.shapes:
            values = weights.tensor(name)
            assert found.tensor(name).dtype == values.dtype and np.array_equal(found.tensor(name), values)


@pytest.mark.parametrize("case", GEMMAS)
def test_a_gemma_in_and_out_is_bit_exact(tmp_path, case):
    """A norm multiplies by what the file holds, as here: 1 and more than Hugging Face's weight."""
    weights = gemma_weights(tmp_path, case)
    gguf.write(tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", TOKENIZER)
    found = open_source(tmp_path / "x.gguf").weights
    assert found.fields == weights.fields and found.shapes == weights.shapes
    for name in weights.shapes:
        assert np.array_equal(found.tensor(name), weights.tensor(name)), name
    stored = {tensor.name: tensor.data for tensor in package.GGUFReader(tmp_path / "x.gguf").tensors}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").model.layers[1]
    for name, norm in (("post_ffw_norm", theirs.post_feedforward_layernorm), ("attn_q_norm", theirs.self_attn.q_norm)):
        assert np.array_equal(stored[f"blk.1.{name}.weight"], norm.weight.detach().numpy() + np.float32(1))


def test_a_gemma_that_llama_cpp_would_scale_otherwise_is_refused(tmp_path):
    weights = gemma_weights(tmp_path, "gemma3, none", query_pre_attn_scalar=20)
    line = told(gguf.write, tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", TOKENIZER)
    assert line == "[gguf] llama.cpp runs a model whose query_size is 16, but got 20."
    weights = gemma_weights(tmp_path, "gemma3, none", layer_types=[FULL] * 4)
    line = told(gguf.write, tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", TOKENIZER)
    assert line == "[gguf] llama.cpp runs a Gemma 3 some of whose layers have a window, but got global_every 1."
    # the one that has 62 layers
    weights = gemma_weights(tmp_path, "gemma3, none", num_hidden_layers=62, layer_types=None, num_attention_heads=2)
    line = told(gguf.write, tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", TOKENIZER)
    assert line == "[gguf] llama.cpp runs a model whose query_size is 32, but got 16."
    weights = replace(weights, fields=weights.fields | {"query_size": 32})
    gguf.write(tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", TOKENIZER)
    assert open_source(tmp_path / "x.gguf").model.query_size == 32


def test_what_a_gemma_leaves_out_is_as_llama_cpp_takes_it(tmp_path):
    """Files of earlier versions have neither the pattern nor the base of layers with a window."""
    gguf.write(tmp_path / "x.gguf", GEMMA_FORM, gemma_weights(tmp_path, "gemma3, every third"), "f32", TOKENIZER)
    file = open_file(tmp_path / "x.gguf")

    def without(*keys):
        return replace(file, metadata={key: x for key, x in file.metadata.items() if not key.endswith(keys)})

    fields = gguf.read_fields(without("sliding_window_pattern", "rope.freq_base_swa", "rope.freq_base"), GEMMA_FORM)
    assert (fields["global_every"], fields["local_theta"], fields["rope_theta"]) == (6, 1e4, 1e4)
    fields = gguf.read_fields(without("attention.sliding_window"), GEMMA_FORM)
    assert "whose window is at least 1, but got 0." in told(build_from_file, Gemma, fields, "gguf", "x")


def test_only_the_architecture_llama_has_its_rows_reordered(tmp_path):
    """As the package reads them: rows of neighbours for llama, Hugging Face's order for the others."""
    for case in ("llama", "qwen3"):
        weights = made(tmp_path, case)
        gguf.write(tmp_path / "x.gguf", FORM, weights, "f32", TOKENIZER)
        stored = {tensor.name: tensor.data for tensor in package.GGUFReader(tmp_path / "x.gguf").tensors}
        D = weights.fields["head_size"]
        q, k = (weights.tensor("h.1.attn.qkv.weight")[rows] for rows in (slice(4 * D), slice(4 * D, 6 * D)))
        for theirs, ours in ((stored["blk.1.attn_q.weight"], q), (stored["blk.1.attn_k.weight"], k)):
            order = [D * h + i + D // 2 * half for h in range(len(ours) // D) for i in range(D // 2) for half in (0, 1)]
            assert np.array_equal(theirs, ours[order] if case == "llama" else ours)


def test_f16_and_q8_0_round_as_their_formulas_say(tmp_path):
    weights = made(tmp_path, "llama")
    for kind in ("f16", "q8_0"):
        gguf.write(tmp_path / "x.gguf", FORM, weights, kind, TOKENIZER)
        found = again(tmp_path / "x.gguf")
        for name in weights.shapes:
            values, got = weights.tensor(name), found.tensor(name)
            if values.ndim == 1:
                assert np.array_equal(got, values)
            elif kind == "f16":
                assert np.array_equal(got, values.astype(np.float16).astype(np.float32))
            else:
                blocks = np.abs(values.reshape(-1, 32)).max(1, keepdims=True)
                # half a step of max / 127, and the step itself is a float16
                assert (np.abs(got - values).reshape(-1, 32) <= blocks * (0.5 / 127 + 2.0**-11)).all()


def test_rows_that_are_no_blocks_are_float16_in_a_q8_0(tmp_path):
    torch_model("llama").save_pretrained(tmp_path / "in")  # 36 columns
    gguf.write(tmp_path / "x.gguf", FORM, read(tmp_path / "in"), "q8_0", TOKENIZER)
    types = {t.name: t.tensor_type.name for t in package.GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == "F16" and types["output_norm.weight"] == "F32"


def test_float16_that_overflows_is_refused(tmp_path):
    weights = made(tmp_path, "qwen2")
    large = replace(weights, read=lambda name: weights.read(name) * np.float32(1e6))
    line = told(gguf.write, tmp_path / "x.gguf", FORM, large, "f16", TOKENIZER)
    assert "token_embd.weight has numbers that float16 can hold, up to 65504, but got" in line and "bf16" in line


def test_what_gguf_cannot_say_is_refused(tmp_path):
    torch_model("mistral").save_pretrained(tmp_path / "in")
    line = told(gguf.write, tmp_path / "x.gguf", FORM, read(tmp_path / "in"), "f32", TOKENIZER)
    assert line == "[gguf] llama.cpp runs a model whose window is 0, but got 4096."
    form = replace(FORM, gguf={**FORM.gguf, "fixed": lambda _: {}})
    line = told(gguf.write, tmp_path / "x.gguf", form, read(tmp_path / "in"), "f32", TOKENIZER)
    assert "runs a model of the kind llama or qwen2 or qwen3, but got mistral, which its files cannot" in line
    line = told(gguf.write, tmp_path / "x.gguf", replace(FORM, gguf=None), read(tmp_path / "in"), "f32", TOKENIZER)
    assert line == "[gguf] a model of this family cannot be written as a .gguf."


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16", "F32"])
def test_every_type_is_unpacked(tmp_path, kind):
    """Blocks of random bytes: each value is what the package's own reader gives."""
    rng, number = np.random.default_rng(0), NUMBER_OF[kind]
    _, block, size = TYPES[number]
    assert (block, size) == package.GGML_QUANT_SIZES[package.GGMLQuantizationType(number)]
    raw = rng.integers(0, 60, (3, 512 // block * size), dtype=np.uint8)  # below 60: float16 factors are finite
    path = tmp_path / "x.gguf"
    path.write_bytes(header([("general.architecture", 8, text("llama"))], [("x", (512, 3), number, 0)]) + raw.tobytes())
    found = open_file(path).read("x")
    theirs = package.GGUFReader(path).tensors[0]
    assert found.shape == (3, 512)
    assert np.array_equal(found, package.quants.dequantize(theirs.data, theirs.tensor_type))


def test_q4_0_by_hand(tmp_path):
    """A block is a float16 step and 32 numbers of 4 bits less 8, the first half in the low bits."""
    block = np.float16(0.5).tobytes() + bytes(range(16))
    path = tmp_path / "x.gguf"
    path.write_bytes(header([("general.architecture", 8, text("llama"))], [("x", (32,), 2, 0)]) + block)
    assert open_file(path).read("x").tolist() == [0.5 * (i - 8) for i in range(16)] + [-4.0] * 16


def test_scaling_of_rotary_positions_is_llama_3s():
    """The factors are what transformers' frequencies are divided by."""
    for theta, size in ((500000.0, 64), (10000.0, 128)):
        rope = LLAMA3 | {"rope_theta": theta}
        config = transformers.LlamaConfig(head_dim=size, rope_parameters=dict(rope))
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        plain, _ = rotary.compute_default_rope_parameters(config)
        # both are float32: a few roundings each
        assert np.allclose(gguf._factors(rope, size), (plain / rotary.inv_freq).numpy(), rtol=2.0**-20, atol=0)


# GPT-2, by the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of a small GPT-2 with its tokenizer, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("gpt2") / "in"
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=32, n_layer=2, n_head=2, n_embd=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.05, 0.2)
    model.save_pretrained(folder)
    tokenizers.to_folder(tokenizers.gpt2(), folder)
    return folder, model


@pytest.mark.parametrize("dtype", ["saved", "bf16", "f16", "q8_0"])
def test_gpt2_by_command(gpt2, tmp_path, capsys, dtype):
    file = tmp_path / "x.gguf"
    assert main(["convert", str(gpt2[0]), str(file), "--dtype", dtype]) == 0
    printed = f"parameters, {'f32' if dtype == 'saved' else dtype}, from "
    assert printed in capsys.readouterr().out
    source, first = open_source(file), open_source(gpt2[0])
    assert source.kind == "gguf" and source.tokenizer() is tokenizers.gpt2() and source.ends == (50256,)
    assert source.model == replace(first.model, dropout=0.0)
    assert source.weights.shapes == first.weights.shapes
    for name in first.weights.shapes:
        values = first.weights.tensor(name)
        error = {"saved": 0, "bf16": 2.0**-8, "f16": 2.0**-11, "q8_0": 1 / 200}[dtype]
        bound = error * (np.abs(values).max() if dtype == "q8_0" else np.abs(values)) + 2.0**-24
        assert (np.abs(source.weights.tensor(name, "f32") - values) <= bound * (error > 0)).all(), name
    assert main(["generate", str(file), "--prompt", "Hello", "--max-tokens", "3", "--threads", "1"]) == 0
    assert main(["convert", str(file), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["convert", str(file), str(file), "--dtype", "f32"]) == 2
    assert main(["convert", str(file), str(file), "--dtype", "f32", "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["x", "--to", "gguf"], "[convert] models for llm.c are files FILE.bin, for llama.cpp FILE.gguf, all others"),
        (
            ["x.GGUF", "--to", "hf"],
            "[convert] models for llm.c are files FILE.bin, for llama.cpp FILE.gguf, all others",
        ),
        (["x", "--dtype", "q8_0"], "[convert] --dtype q8_0 is for FILE.gguf, but got 'x'."),
        (["x.bin", "--dtype", "f16"], "[convert] --dtype f16 is for FILE.gguf, but got 'x.bin'."),
    ],
)
def test_what_goes_with_a_gguf_alone(gpt2, tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(gpt2[0]), *words]) == 2
    assert capsys.readouterr().err.startswith(line) and not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_for_llama_cpp_is_refused(gpt2, tmp_path, capsys):
    model = GPT2(vocab_size=97, max_seq_len=20, num_layers=1, num_heads=2, hidden_size=32)
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes_of(declare(model)).items()}
    (tmp_path / "in").mkdir()
    weights = hf.Weights(asdict(model), "f32", shapes_of(declare(model)), values.__getitem__)
    hf.write(tmp_path / "in", Format(**GPT2.hugging_face), weights)
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "x.gguf")]
    assert main(command) == 2
    assert "tokenizer.json says how text becomes tokens, but got no such file, and 97" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
    line = told(convert.to_gguf, open_source(tmp_path / "in"), tmp_path / "x.gguf", "f32", None)
    assert line == "[convert] a .gguf holds a tokenizer, but got a model without one. hint: --to hf needs none"
    tokenizers.to_folder(tokenizers.chars("".join(map(chr, range(256, 256 + 97)))), tmp_path / "in")
    assert main(command) == 2
    assert "[tokenizer] llama.cpp reads byte-level BPE that cuts text as gpt-2 or" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


# tokenizers -----------------------------------------------------------------------------------------------------------

TEXT = "Hello  world, it's <é日> 1234 5\n\n x\tHe'LL go;\r\n"


@pytest.mark.parametrize("pre", RULES)
def test_tokenizers_in_and_out_give_the_same_ids(tmp_path, pre):
    library = tokenizers_library.Tokenizer(tokenizers_library.models.BPE())
    library.pre_tokenizer, library.decoder = RULES[pre], tokenizers_library.decoders.ByteLevel()
    trainer = tokenizers_library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers_library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT] * 3, trainer)
    library.add_tokens(["<tab>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    ours = tokenizers.from_folder(tmp_path)
    about = tokenizers.to_gguf(ours, ours.vocab_size + 3)
    assert about["tokenizer.ggml.pre"] == pre and len(about["tokenizer.ggml.tokens"]) == ours.vocab_size + 3
    kinds = about["tokenizer.ggml.token_type"]
    assert kinds[0] == 3 and kinds[ours.vocab_size - 1] == 4 and kinds[-3:] == [5] * 3
    found = tokenizers.from_gguf(about, "x.gguf")
    assert found.vocab_size == ours.vocab_size and found.ends == ours.ends == (0,)
    for text in (TEXT, "a<tab>b<|end|>"):
        assert found.encode(text).tolist() == ours.encode(text).tolist() and found.decode(found.encode(text)) == text
    line = told(tokenizers.to_gguf, ours, ours.vocab_size - 1)
    assert "has at most the" in line


WORDS = {  # what merges make, with a score; a Gemma lists spaces and line breaks as user-defined tokens, first
    "\n\n": 0, "▁▁": 0, "▁▁▁": 0, "▁t": -1, "he": -2, "▁the": -3, "th": -4, "ere": -5, "re": -6, "▁a": -7, "▁there": -8,
    "in": -9, "he▁": -10, "ll": -11, "▁the▁": -12, "日é": -13,
}  # fmt: skip


def like_gemmas(merges=None, begins=True):
    """A tokenizer as Gemma's tokenizer.json has it, and its scores: its merges are all pairs that make a token."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "\n", *"abcdehilnortz日é", *WORDS]
    tokens[tokens.index("<0x09>")] = "\t"
    vocab = {token: id for id, token in enumerate(tokens)}
    if merges is None:
        cuts = [(t[:i], t[i:]) for t in sorted(WORDS, key=lambda t: -WORDS[t]) for i in range(len(t) - 1, 0, -1)]
        merges = [pair for pair in cuts if vocab.keys() >= set(pair)]
    model = tokenizers_library.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    library = tokenizers_library.Tokenizer(model)
    library.normalizer = tokenizers_library.normalizers.Replace(" ", "▁")
    library.pre_tokenizer = tokenizers_library.pre_tokenizers.Split(" ", "merged_with_previous")
    steps = tokenizers_library.decoders
    library.decoder = steps.Sequence([steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse()])
    library.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    library.add_tokens([tokenizers_library.AddedToken("\n\n", normalized=False)])
    if begins:
        put_before(library, "<bos>")
    return FileTokenizer(library, "like Gemma's", (1,))


SCORED = "the there   in he  \n\n\n all日é\tthe 1\U0001f600a<bos>zé "


def texts():
    rng = np.random.default_rng(0)
    return [SCORED, *("".join(rng.choice(list(" theraeilnz日\n"), 40)) for _ in range(200))]


@pytest.mark.parametrize("begins", [True, False])
def test_a_tokenizer_with_scores_in_and_out_gives_the_same_ids(begins):
    ours = like_gemmas(begins=begins)
    about = tokenizers.to_gguf(ours, ours.vocab_size + 2)
    kinds = about["tokenizer.ggml.token_type"]
    assert (kinds[:5], kinds[-2:]) == ([3, 3, 3, 2, 6], [5, 5]) and kinds[
        about["tokenizer.ggml.tokens"].index("\n\n")
    ] == 4
    assert about["tokenizer.ggml.add_bos_token"] is begins and about["tokenizer.ggml.bos_token_id"] == (
        2 if begins else 1
    )
    for told_spaces in (False, True):  # llama.cpp's own converter writes spaces of user-defined tokens as such
        if told_spaces:
            at = about["tokenizer.ggml.tokens"].index("▁▁")
            about["tokenizer.ggml.tokens"][at], about["tokenizer.ggml.token_type"][at] = "  ", 4
        found = tokenizers.from_gguf(about, "x")
        assert (found.vocab_size, found.ends, found.begins) == (ours.vocab_size, (1,), ours.begins)
        for text in texts():
            for special in (False, True):
                assert found.encode(text, special).tolist() == ours.encode(text, special).tolist()
            assert found.decode(found.encode(text)) == text
    assert tokenizers.to_gguf(tokenizers.from_gguf(about, "x"), ours.vocab_size)["tokenizer.ggml.model"] == "llama"


@pytest.mark.parametrize(
    ("merges", "line"),
    [
        ([("h", "e"), ("r", "e")], "llama.cpp merges any two neighbours whose text is a token, but got no merge of "),
        ([("e", "re"), ("h", "e"), ("er", "e")], "llama.cpp has one score for all merges that make a token"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(monkeypatch, merges, line):
    if line.endswith("make a token"):
        monkeypatch.setitem(WORDS, "er", -20)
    assert line in told(tokenizers.to_gguf, like_gemmas(merges), 400)


def test_scores_that_lie_are_one_line():
    about = tokenizers.to_gguf(like_gemmas(), 400)
    for changes, part in (
        ({"scores": None}, "gives a score for each of 400 tokens, but got None."),
        ({"scores": [0.0] * 399}, "gives a score for each of 400 tokens"),
        ({"add_space_prefix": True}, "or llama without add_space_prefix, but got llama of the kind default."),
        (
            {"tokens": ["x" * 257, *map(str, range(399))], "token_type": [1] * 400},
            "at most 256 characters, and 4,194,304",
        ),
    ):
        changed = about | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        assert part in told(tokenizers.from_gguf, changed, "x")


def test_too_many_special_tokens_are_refused():
    about = {"model": "gpt2", "pre": "gpt-2", "tokens": [f"t{i}" for i in range(65537)], "token_type": [3] * 65537}
    about = {f"tokenizer.ggml.{key}": x for key, x in (about | {"merges": []}).items()}
    assert "x has at most 65,536 special tokens, but got 65,537." in told(tokenizers.from_gguf, about, "x")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"model": "llama"},
            "of the kind gpt-2 or smollm or llama-bpe or qwen2, or llama without add_space_prefix, but",
        ),
        ({"pre": "falcon"}, "but got gpt2 of the kind falcon."),
        ({"pre": None}, "but got gpt2 of the kind None."),
        ({"pre": ["gpt-2"]}, "but got gpt2 of the kind ['gpt-2']."),
        ({"tokens": None}, "lists the texts tokenizer.ggml.tokens, but got None."),
        ({"merges": np.zeros(3)}, "lists the texts tokenizer.ggml.merges, but got"),
        ({"token_type": [1]}, "but got 3 tokens, 1 types."),
        ({"tokens": ["a", "a", "b"]}, "lists tokens, each once"),
        ({"merges": ["a b c"]}, "merges of two"),
        ({"merges": ["a z"]}, "must describe a tokenizer"),
        ({"eos_token_id": "x"}, "gives ends as an id"),
    ],
)
def test_other_tokenizers_are_refused(changes, part):
    about = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": [1] * 3, "merges": ["a b"]}
    assert tokenizers.from_gguf({f"tokenizer.ggml.{key}": x for key, x in about.items()}, "x").encode(
        "ab"
    ).tolist() == [2]
    assert part in told(tokenizers.from_gguf, {f"tokenizer.ggml.{key}": x for key, x in (about | changes).items()}, "x")


# what is wrong --------------------------------------------------------------------------------------------------------


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(keys, tensors, version=3, counts=None):
    """The bytes before the data: keys are (name, type, bytes), tensors (name, dimensions, type, place)."""
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    raw = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    for name, kind, value in keys:
        raw += text(name) + struct.pack("<I", kind) + value
    for name, shape, kind, at in tensors:
        raw += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)
    return raw + b"\0" * (-len(raw) % 32)


ARCH = ("general.architecture", 8, text("llama"))
HUGE = 2**63


def listed(kind, count, items=b""):
    return struct.pack("<IQ", kind, count) + items


@pytest.mark.parametrize(
    ("keys", "tensors", "more", "part"),
    [
        ([ARCH], [], {"version": 1}, "is of GGUF version 2 or 3, little-endian, but got version 1."),
        ([ARCH], [], {"version": 3 << 24}, "but got version 50331648."),
        ([ARCH], [], {"counts": (HUGE, 1)}, "has at most 4,096 keys and 65,536 tensors"),
        ([ARCH], [], {"counts": (0, HUGE)}, "has at most 4,096 keys and 65,536 tensors"),
        ([ARCH], [], {"counts": (65536, 1)}, "ends within 96 bytes, but got a value of 2,097,152 bytes"),
        ([ARCH], [], {"counts": (0, 4096)}, "x.gguf"),
        ([], [], {}, "names its general.architecture, but got none."),
        ([("general.architecture", 4, b"\0" * 4)], [], {}, "names its general.architecture, but got none."),
        ([ARCH, ARCH], [], {}, "gives every key once, but got general.architecture twice."),
        ([ARCH, ("a", 13, b"")], [], {}, "a in "),
        ([ARCH, ("a", 8, struct.pack("<Q", HUGE))], [], {}, "got a value of 9,223,372,036,854,775,808 bytes"),
        ([ARCH, ("a", 9, listed(0, HUGE))], [], {}, "got a value of 9,223,372,036,854,775,808 bytes"),
        ([ARCH, ("a", 9, listed(8, HUGE))], [], {}, "bytes at "),
        ([ARCH, ("a", 9, listed(12, 2**40))], [], {}, "got a value of 8,796,093,022,208 bytes"),
        ([ARCH, ("a", 9, listed(9, 1))], [], {}, "is a list of numbers or texts, but got type 9."),
        ([ARCH, ("a", 8, text(b"\xff\n"))], [], {}, "texts in "),
        ([(b"\xff", 0, b"a")], [], {}, "are UTF-8, but got"),
        ([ARCH, ("split.count", 2, struct.pack("<H", 3))], [], {}, "holds a whole model, but got one of 3 files."),
        (
            [ARCH, ("general.alignment", 4, b"\0" * 4)],
            [],
            {},
            "gives general.alignment from 1 to 1,048,576, but got 0.",
        ),
        ([ARCH, ("general.alignment", 8, text("x"))], [], {}, "from 1 to 1,048,576, but got x."),
        ([ARCH], [("x" * 65, (1,), 0, 0)], {}, "have at most 64 characters, but got xxx"),
        ([ARCH], [("x", (), 0, 0)], {}, "x in "),
        ([ARCH], [("x", (1,) * 5, 0, 0)], {}, "has from 1 to 4 dimensions, but got 5."),
        ([ARCH], [("x", (32,), 10, 0)], {}, "Q4_K, Q6_K, BF16, but got type 10."),
        ([ARCH], [("x", (0,), 0, 0)], {}, "are blocks of 1 numbers, but got [0]."),
        ([ARCH], [("x", (33, 2), 2, 0)], {}, "are blocks of 32 numbers, but got [33, 2]."),
        ([ARCH], [("x", (32,), 0, 5)], {}, "begins at a multiple of 32, but got 5."),
        ([ARCH], [("x", (HUGE,) * 4, 0, 0)], {}, "bytes that x ends at, but got "),
        ([ARCH], [("x", (2**32, 2**32), 0, 0)], {}, "bytes that x ends at, but got "),
        ([ARCH], [("x", (32,), 0, 2**64 - 32)], {}, "bytes that x ends at, but got "),
        ([ARCH], [("x", (8,), 0, 0), ("x", (8,), 0, 0)], {}, "x twice"),
    ],
)
def test_headers_that_lie_are_one_line(tmp_path, keys, tensors, more, part):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(keys, tensors, **more) + b"\0" * (32 if "twice" in part else 0))
    line = told(open_file, path)
    assert line.startswith("[gguf] ") and part in line


def test_files_cut_anywhere_are_one_line(tmp_path):
    weights = made(tmp_path, "llama3")
    path = tmp_path / "x.gguf"
    gguf.write(path, FORM, weights, "q8_0", TOKENIZER | {"tokenizer.ggml.tokens": ["a", "b"]})
    raw = path.read_bytes()
    start = min(place.start for place in open_file(path).places.values())
    for size in [*range(0, start + 1, 7), start - 1, start + 1, len(raw) - 33]:
        path.write_bytes(raw[:size])
        assert told(open_file, path).startswith("[gguf] ")


def test_random_changes_of_a_header_give_a_model_or_one_line(tmp_path):
    weights = made(tmp_path, "llama3")
    path = tmp_path / "x.gguf"
    gguf.write(path, FORM, weights, "bf16", TOKENIZER)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    start = min(place.start for place in open_file(path).places.values())
    refused = 0
    for _ in range(400):
        changed = bytearray(raw)
        for at in rng.integers(4, start, rng.integers(1, 4)):
            changed[at] = rng.choice([0, 1, 2, 127, 128, 255, changed[at] ^ 1])
        path.write_bytes(changed)
        try:
            fields = gguf.read_fields(open_file(path), FORM)
            sizes = [value for value in fields.values() if type(value) is int]
            if all(0 < value < 1000 for value in sizes if value):
                again(path).tensor("h.0.attn.qkv.weight")
        except HandgradError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200


def uint(value):
    return struct.pack("<I", value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"general.architecture": "gemma3"}, "has the architecture llama or qwen2 or qwen3, but got gemma3."),
        ({"llama.expert_count": 8}, "but got expert_count 8. hint: no kernel here computes another"),
        ({"llama.rope.scaling.type": "yarn"}, "but got rope.scaling.type yarn. hint: no kernel here computes another"),
        ({"llama.attention.sliding_window": 4}, "but got attention.sliding_window 4."),
        (
            {"llama.attention.value_length": 8},
            "has one value for attention.value_length and its like, but got 8 and 16.",
        ),
        ({"llama.rope.dimension_count": 8}, "has one value for rope.dimension_count and its like, but got 8 and 16."),
        ({"llama.attention.head_count": 5}, "attn_q.weight in"),
        ({"llama.block_count": 3}, "holds the tensor blk.2.attn_k.weight, but got no such."),
        ({"llama.block_count": 1}, "holds the tensors of its metadata alone, but got also blk.1."),
        ({"llama.embedding_length": 32}, "has shape"),
    ],
)
def test_metadata_that_we_do_not_know_are_refused(tmp_path, change, part):
    weights = made(tmp_path, "llama")
    gguf.write(tmp_path / "x.gguf", FORM, weights, "f32", TOKENIZER)
    file = open_file(tmp_path / "x.gguf")
    other = replace(file, metadata={**file.metadata, **change})

    def run():
        fields = gguf.read_fields(other, FORM)
        gguf.read(other, FORM, fields, shapes(fields))

    line = told(run)
    assert line.startswith("[gguf] ") and part in line


def test_other_factors_of_rotary_positions_are_refused(tmp_path, monkeypatch):
    weights = made(tmp_path, "llama3")
    scaled = replace(weights, fields={**weights.fields, "rope_scaling": (32.0, 1.0, 4.0, 4096)})
    with pytest.raises(HandgradError, match="original_max_position_embeddings 8192, but got .*4096"):
        gguf.write(tmp_path / "x.gguf", FORM, scaled, "f32", TOKENIZER)
    monkeypatch.setattr(gguf, "LLAMA3", gguf.LLAMA3 | {"original_max_position_embeddings": 4096})
    gguf.write(tmp_path / "x.gguf", FORM, scaled, "f32", TOKENIZER)
    monkeypatch.undo()
    assert "rope_freqs.weight in" in told(again, tmp_path / "x.gguf")


def test_llama_cpps_defaults_are_ours(tmp_path):
    """Without the heads of keys and their width, both are those of the queries."""
    gguf.write(tmp_path / "x.gguf", FORM, made(tmp_path, "llama"), "f32", TOKENIZER)
    file = open_file(tmp_path / "x.gguf")
    gone = ("head_count_kv", "key_length", "value_length", "dimension_count")
    told_less = {key: x for key, x in file.metadata.items() if not key.endswith(gone)}
    fields = gguf.read_fields(replace(file, metadata=told_less), FORM)
    assert fields["num_kv_heads"] == 4 and fields["head_size"] == 16


def test_other_files_with_its_name_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for raw in (b"", b"GG", b"<html>"):
        path.write_bytes(raw)
        assert "begins with GGUF, but got other bytes. hint" in told(open_source, path)
    path.write_bytes(header([("general.architecture", 8, text("mamba"))], []))
    assert "has the architecture gemma3 or gpt2 or llama or" in told(open_source, path)
    path.rename(tmp_path / "model")  # by its first bytes
    assert "has the architecture" in told(open_source, tmp_path / "model")


def test_quantised_files_need_the_package(tmp_path, monkeypatch):
    gguf.write(tmp_path / "x.gguf", FORM, made(tmp_path, "llama"), "q8_0", TOKENIZER)
    weights = again(tmp_path / "x.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    line = told(weights.tensor, "wte.weight")
    assert "token_embd.weight in" in line and "which is Q8_0, needs the package gguf, but got none. hint: pip" in line


# other programs -------------------------------------------------------------------------------------------------------


def serve(path, exact=False):
    llama = pytest.importorskip("xllamacpp", reason="no llama.cpp")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.n_parallel = str(path), 256, False, 1
    if exact:
        settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    return llama.Server(settings)


def ask(server, verb, asked):
    with urllib.request.urlopen(f"{server.listening_address}/{verb}", json.dumps(asked).encode()) as answer:
        return json.load(answer)


def next_token(path, ids, count=5):
    """llama.cpp's most likely tokens behind a text: [(id, log of the probability)]."""
    asked = {"prompt": ids, "n_predict": 1, "max_tokens": 1, "temperature": 0.0, "logprobs": count, "n_probs": count}
    done = serve(path).handle_completions(asked)
    return [(t["id"], t["logprob"]) for t in done["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]


@pytest.mark.parametrize("case", CASES | GEMMAS)
def test_llama_cpp_computes_the_same(tmp_path, case):
    if case in GEMMAS:
        model, form = gemma(case, vocab_size=50304), GEMMA_FORM
    else:
        kind, changes = CASES[case]
        model = torch_model(kind, **SIZES | changes | {"vocab_size": 50304, "max_position_embeddings": 256})
        form = FORM
    model.save_pretrained(tmp_path / "in")
    about = tokenizers.to_gguf(tokenizers.gpt2(), 50304)
    gguf.write(tmp_path / "x.gguf", form, open_source(tmp_path / "in").weights, "f32", about)
    ids = np.random.default_rng(0).integers(0, 50000, 200).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
    found = next_token(tmp_path / "x.gguf", ids)
    assert [id for id, _ in found] == want.topk(len(found)).indices.tolist()
    # its cache holds keys and values in float16
    assert all(abs(log - want[id]) < 2.0**-9 for id, log in found)


@pytest.mark.parametrize("case", ["gemma3, every third", "gemma3, every sixth"])
def test_llama_cpp_continues_a_gemma_alike(tmp_path, case):
    """Greedy tokens of a float32 file, with keys and values in float32 as well: many windows long.

    llama.cpp looks GELU up by float16 inputs: 2^-11 of a value at most, 0.4 of it in root mean square, once a layer.
    Where the texts part, three standard deviations of the difference of two logits decide between the tokens.
    """
    ours = like_gemmas()
    model = gemma(case, vocab_size=ours.vocab_size)
    model.model.embed_tokens.weight.data *= 0.02  # else the last token alone decides, and the text repeats it
    for layer in model.model.layers:  # attention that sees few tokens
        layer.self_attn.q_norm.weight.data += 4
    model.save_pretrained(tmp_path / "in")
    weights = open_source(tmp_path / "in").weights
    gguf.write(tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", tokenizers.to_gguf(ours, ours.vocab_size))
    ids = [*ours.begins, *ours.encode(SCORED).tolist()]
    asked = {"prompt": ids, "n_predict": 60, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    theirs = ask(serve(tmp_path / "x.gguf", exact=True), "completion", asked)["tokens"]
    engine, _ = load_run(tmp_path / "x.gguf", "f32")
    mine = list(engine.generate(ids, 60, Sampling(temperature=0.0)))
    same = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), len(mine))
    assert len(theirs) == 60 and same > 20 and len(set(mine[:same])) > 3
    if same < 60:
        engine.position = 0
        logits = engine.logits(ids + mine[:same])
        margin = 3 * 2**0.5 * logits.std() * 0.4 * 2.0**-11 * weights.fields["num_layers"] ** 0.5
        assert logits[mine[same]] - logits[theirs[same]] < margin


def test_llama_cpp_cuts_text_alike(tmp_path):
    """With a tokenizer that has scores."""
    ours = like_gemmas()
    weights = gemma_weights(tmp_path, "gemma3, every third", vocab_size=ours.vocab_size)
    gguf.write(tmp_path / "x.gguf", GEMMA_FORM, weights, "f32", tokenizers.to_gguf(ours, ours.vocab_size))
    server = serve(tmp_path / "x.gguf")
    for content in texts():
        asked = {"content": content, "add_special": True, "parse_special": True}
        assert ask(server, "tokenize", asked)["tokens"] == [
            *ours.begins,
            *ours.encode(content, special=True).tolist(),
        ], content


def test_llama_cpp_computes_the_same_gpt2(gpt2, tmp_path):
    assert main(["convert", str(gpt2[0]), str(tmp_path / "x.gguf")]) == 0
    ids = np.random.default_rng(0).integers(0, 50000, 20).tolist()
    with torch.no_grad():
        want = gpt2[1](torch.tensor([ids])).logits[0, -1].log_softmax(0)
    found = next_token(tmp_path / "x.gguf", ids)
    assert [id for id, _ in found] == want.topk(len(found)).indices.tolist()
    assert all(abs(log - want[id]) < 2.0**-7 for id, log in found)
