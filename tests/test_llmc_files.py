"""P1: llm.c's files, written here once more from their description, by torch and struct, and read by the package."""

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.precision import Precision
from handgrad.data import Causal
from handgrad.infer.load import load_run, open_source
from handgrad.io import llmc
from handgrad.io.weights import Weights
from handgrad.optim import AdamW
from handgrad.train.execution import Execution
from handgrad.train.start import Start
from handgrad.train.trainer import Trainer

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
transformers = pytest.importorskip("transformers")
GPT2Config, GPT2LMHeadModel = transformers.GPT2Config, transformers.GPT2LMHeadModel

SHAPES = [  # vocabulary, longest sequence, layers, heads, width
    (97, 20, 2, 3, 36),
    (128, 7, 1, 1, 8),  # no padding at all
    (129, 33, 3, 2, 10),
    (1, 1, 1, 1, 1),
]
BLOCK = [
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
]


def torch_model(V, T, L, H, C, seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_layer=L,
        n_head=H,
        n_embd=C,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    return model


def header(*words, **more):
    values = dict(enumerate(words)) | {int(place[1:]): word for place, word in more.items()}
    return b"".join(struct.pack("<I", values.get(i, 0) & 0xFFFFFFFF) for i in range(256))


def ordered(tensors, L, rows):
    """[(tensor, layers)] in the file's order, matrices (out, in); `tensors`: transformers' name -> array."""

    def of(name):
        t = torch.as_tensor(tensors[f"transformer.{name}"])
        return t.T if name.startswith("h.") and t.ndim == 2 else t

    wte = of("wte.weight")
    table = torch.zeros(rows, wte.shape[1])
    table[: len(wte)] = wte
    yield table[None]
    yield of("wpe.weight")[None]
    for name in BLOCK:
        yield torch.stack([of(f"h.{i}.{name}") for i in range(L)])
    yield of("ln_f.weight")[None]
    yield of("ln_f.bias")[None]


def raw(t, dtype=torch.float32):
    return t.detach().to(dtype).flatten().contiguous().view(torch.uint8).numpy().tobytes()


def model_bytes(model, dtype=torch.float32, rows=None):
    c = model.config
    rows = rows or -(-c.vocab_size // 128) * 128
    words = (
        20240326,
        {torch.float32: 3, torch.bfloat16: 5}[dtype],
        c.n_positions,
        c.vocab_size,
        c.n_layer,
        c.n_head,
        c.n_embd,
    )
    return header(*words, rows) + b"".join(raw(t, dtype) for t in ordered(model.state_dict(), c.n_layer, rows))


def told(what, *args):
    """The error's one line."""
    with pytest.raises(HandgradError) as error:
        what(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["v3", "v5"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p1_a_model_is_read_and_written_bit_for_bit(tmp_path, shape, dtype):
    model, kind = torch_model(*shape), {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    data = model_bytes(model, dtype)
    (tmp_path / "a.bin").write_bytes(data)
    weights = llmc.read_model(tmp_path / "a.bin")
    assert weights.dtype == kind and len(weights.shapes) == 4 + 12 * shape[2]
    for name, size in weights.shapes.items():
        theirs = model.state_dict()[f"transformer.{name}"].to(dtype)
        theirs = theirs.T if name.startswith("h.") and theirs.ndim == 2 else theirs
        assert weights.tensor(name).shape == size and weights.tensor(name).tobytes() == raw(theirs, dtype), name
    llmc.write_model(tmp_path / "b.bin", weights)
    assert (tmp_path / "b.bin").read_bytes() == data


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p1_bf16_is_the_nearest_and_f32_of_it_exact(tmp_path, shape):
    model = torch_model(*shape)
    (tmp_path / "a.bin").write_bytes(model_bytes(model))
    llmc.write_model(tmp_path / "b.bin", llmc.read_model(tmp_path / "a.bin"), "bf16")
    assert (tmp_path / "b.bin").read_bytes() == model_bytes(model, torch.bfloat16)
    llmc.write_model(tmp_path / "c.bin", llmc.read_model(tmp_path / "b.bin"), "f32")
    assert (tmp_path / "c.bin").read_bytes() == model_bytes(model.bfloat16().float())


@pytest.mark.parametrize("rows", [97, 98, 256])
def test_p1_any_padding_of_the_vocabulary_is_read(tmp_path, rows):
    model = torch_model(*SHAPES[0])
    (tmp_path / "a.bin").write_bytes(model_bytes(model, rows=rows))
    llmc.write_model(tmp_path / "b.bin", llmc.read_model(tmp_path / "a.bin"))
    assert (tmp_path / "b.bin").read_bytes() == model_bytes(model)


def test_p1_logits_of_a_bin_are_torchs(tmp_path):
    model = torch_model(*SHAPES[0])
    (tmp_path / "a.bin").write_bytes(model_bytes(model))
    text = "".join(map(chr, range(256, 256 + 97)))
    tokenizer = tokenizers.chars(text)
    llmc.write_tokenizer(tmp_path / "a_tokenizer.bin", [tokenizer.bytes_of(i) for i in range(97)], None)
    engine, found = load_run(tmp_path / "a.bin")
    assert found.characters == text
    ids = np.random.default_rng(0).integers(0, 97, 20)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    # sums of at most 4 C products in another order, a few of them after each other in each of L layers
    tolerance = 2.0**-24 * 8 * (4 * 36) ** 0.5 * 2 * np.abs(theirs).max()
    assert np.abs(engine.logits(ids) - theirs).max() <= tolerance


SMALL = model_bytes(torch_model(*SHAPES[2]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SMALL) - 1), st.booleans())
def test_p1_truncated_and_grown_files_are_refused(tmp_path, length, grown):
    """Without the check of the size, tensors before the cut would pass."""
    path = tmp_path / "a.bin"
    path.write_bytes(SMALL + SMALL[: 1 + length] if grown else SMALL[:length])
    line = told(llmc.read_model, path)
    assert line.startswith("[llmc] ") and ("bytes" in line or "magic" in line)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 7), st.integers(-(2**31), 2**31 - 1))
def test_p1_a_damaged_header_never_reads_another_model(tmp_path, place, word):
    """Also one that asks for 2^31 layers or a width of 2^31 is refused at once, before any memory is taken."""
    data = bytearray(SMALL)
    data[4 * place : 4 * place + 4] = struct.pack("<i", word)
    (tmp_path / "a.bin").write_bytes(data)
    try:
        llmc.read_model(tmp_path / "a.bin")
    except HandgradError as error:
        assert str(error).startswith("[llmc] ") and "\n" not in str(error)
    else:  # the number of heads and of padded rows are not in the size of tensors
        assert bytes(data) == SMALL or (place == 5 and 10 % word == 0) or place == 3 and 0 < word <= 256


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "but got 0 bytes. hint: it was not made by llm.c, or a download stored an error page"),
        (b"<!DOCTYPE html>" + bytes(2000), "with the magic number 20240326, but got the magic number "),
        (header(20240520, 1, 5), "is a model of llm.c, with the magic number 20240326, but got token shards of llm.c."),
        (header(20240327, 2), "but got a debug state of llm.c."),
        (
            header(20240326, 1),
            "is of version 3 or 5, but got 1. hint: an old version: llm.c's train_gpt2.py writes it anew",
        ),
        (header(20240326, 6), "is of version 3 or 5, but got 6."),
        (SMALL[:500], "begins with 1024 bytes of header, but got 500. hint: it is cut off"),
        (SMALL[:-1], f"is {len(SMALL)} bytes long, by its header, but got {len(SMALL) - 1}. hint: it is cut off"),
        (
            header(20240326, 3, 8, 9, 1, 3, 8, 9),
            "gives a hidden_size that is a multiple of num_heads, but got 8 and 3 heads.",
        ),
        (header(20240326, 3, 8, 9, 1, 1, 8, 8), "pads its vocabulary of 9, but got 8 rows."),
        (header(20240326, 3, 8, 9, 0, 1, 8, 9), "gives num_layers as a number from 1 on, but got 0."),
    ],
)
def test_p1_invalid_models_are_refused(tmp_path, data, part):
    (tmp_path / "a.bin").write_bytes(data)
    line = told(llmc.read_model, tmp_path / "a.bin")
    assert line.startswith("[llmc] ") and part in line


def test_missing_files_and_untied_heads_are_refused(tmp_path):
    assert "is a model of llm.c, but got no such file." in told(llmc.read_model, tmp_path / "a.bin")
    sizes = dict(vocab_size=5, max_seq_len=4, num_layers=1, num_heads=1, hidden_size=2, tie_embeddings=False)
    line = told(llmc.write_model, tmp_path / "a.bin", Weights(sizes, "f32", {}, None))
    assert "uses its token embedding as the head, but got a separate lm_head." in line
    assert not (tmp_path / "a.bin").exists()


# debug states: what llm.c's own tests compare with, and ours ----------------------------------------------------------


def read_debug(path, sizes):
    """{"x", "y", "logits", "loss", "d <tensor>"} of a debug state. After the header, whose words 2 and 3 are B and T: x, y
    (int32), logits without padding, loss, and the gradients as a model's tensors lie, wte's with padding (float32)."""
    words = np.fromfile(path, "<i4", 256)
    assert words[:2].tolist() == [20240327, 2]
    B, T = words[2:4].tolist()
    found, at = {}, 1024
    for name, dtype, shape in [
        ("x", "<i4", (B, T)),
        ("y", "<i4", (B, T)),
        ("logits", "<f4", (B, T, sizes["vocab_size"])),
        ("loss", "<f4", ()),
    ]:
        found[name] = np.fromfile(path, dtype, int(np.prod(shape)), offset=at).reshape(shape)
        at += found[name].nbytes
    layout = llmc.Layout(sizes, llmc.padded(sizes["vocab_size"]))
    assert path.stat().st_size == at + 4 * layout.count
    return found | {f"d {name}": layout.read(path, at, np.dtype("<f4"), name) for name in layout.names()}


def test_p1_gradients_equal_a_debug_state(tmp_path, shards):
    """Its gradients are what handgrad computes from its batch."""
    V, T, L, H, C = shape = SHAPES[0]
    model, B = torch_model(*shape), 2
    x, y = torch.randint(0, V, (2, B, T), generator=torch.Generator().manual_seed(1))
    logits = model(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    grads = {f"{name}": p.grad for name, p in model.named_parameters()}
    data = header(20240327, 2, B, T) + raw(x, torch.int32) + raw(y, torch.int32) + raw(logits) + raw(loss[None])
    data += b"".join(raw(t) for t in ordered(grads, L, 128))
    (tmp_path / "debug.bin").write_bytes(data)
    (tmp_path / "model.bin").write_bytes(model_bytes(model))
    weights = llmc.read_model(tmp_path / "model.bin")
    debug = read_debug(tmp_path / "debug.bin", weights.fields)
    assert (debug["x"] == x.numpy()).all() and (debug["y"] == y.numpy()).all() and debug["loss"] == loss.item()
    assert (debug["logits"] == logits.detach().numpy()).all()

    class Batch:  # what a Trainer needs of its data
        seq_len, batch_tokens, vocab_size, windows, sequences, ahead = T, B * T, V, B, B, 0
        objective = Causal()

        def batch(self, *args, **kwargs):
            return {"ids": debug["x"], "targets": debug["y"]}

    model, execution = open_source(tmp_path / "model.bin").model, Execution(B, extra_programs=(), backend="cpu")
    trainer = Trainer(
        model, AdamW(), Batch(), precision=Precision("f32"), execution=execution, start=Start(init=weights)
    )
    assert abs(trainer.step(1, 0.0).loss - loss.item()) < 1e-6
    for name, ours in trainer.grads().items():
        theirs = debug[f"d {name}"]  # the tolerance that llm.c's own float32 test has, without its factor of the value
        assert np.abs(ours - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1), name


# tokenizers -----------------------------------------------------------------------------------------------------------


def test_p1_tokenizers_are_written_and_read(tmp_path):
    gpt2, chars = tokenizers.gpt2(), tokenizers.chars("héello\n日")
    for tokenizer, eot in ((gpt2, 50256), (chars, 0)):
        tokens = [tokenizer.bytes_of(id) for id in range(tokenizer.vocab_size)]
        llmc.write_tokenizer(tmp_path / "t.bin", tokens, tokenizer.eot)
        table = b"".join(bytes([len(token)]) + token for token in tokens)
        assert (tmp_path / "t.bin").read_bytes() == header(20240328, 2, len(tokens), eot) + table
        assert llmc.read_tokenizer(tmp_path / "t.bin") == (tokens, eot)
        ids = tokenizer.encode("hello\n")
        assert b"".join(tokens[id] for id in ids) == b"hello\n"
        assert (tokenizers.from_tokens(tokens).encode("hello\n") == ids).all()
    assert tokens[chars.encode("日")[0]] == "日".encode()


def test_p1_a_tokenizer_file_of_the_library(tmp_path):
    """Byte-level BPE spells bytes by characters; a token of some bytes of a character keeps them."""
    tokenizers.to_folder(tokenizers.gpt2(), tmp_path)
    file = tokenizers.from_file(tmp_path / "tokenizer.json")
    assert [file.bytes_of(id) for id in range(50257)] == [tokenizers.gpt2().bytes_of(id) for id in range(50257)]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (header(20240328, 1, 3), "is of version 2, but got 1."),
        (header(20240328, 2, 3, 3) + b"\1a\1b\1c", "gives tokens, and one of them as an end, but got 3 and 3."),
        (header(20240328, 2, -1, 0) + b"\1a", "but got -1 and 0."),
        (header(20240328, 2, 2**31 - 1, 0) + b"\1a", "but got 2147483647 and 0."),
        (
            header(20240328, 2, 2, 0) + b"\1a\3bc",
            "holds 2 tokens and ends there, but got 2 in 1029 bytes. hint: it is cut off or damaged",
        ),
        (header(20240328, 2, 2, 0) + b"\3abc", "holds 2 tokens and ends there, but got 1 in "),
        (header(20240328, 2, 2, 0) + b"\1a\1b\1c", "holds 2 tokens and ends there, but got 2 in "),
    ],
)
def test_p1_invalid_tokenizers_are_refused(tmp_path, data, part):
    (tmp_path / "t.bin").write_bytes(data)
    assert part in told(llmc.read_tokenizer, tmp_path / "t.bin")


def test_p1_tokens_that_llmc_or_we_cannot_use_are_refused(tmp_path):
    assert "1 to 255 bytes long, but got token 1 of 256." in told(
        llmc.write_tokenizer, tmp_path / "t.bin", [b"a", b"b" * 256], 0
    )
    line = told(tokenizers.from_tokens, [b"a", b"bc"])
    assert "can encode text if it is GPT-2's, or holds characters, but got 2 other tokens." in line
    assert "other tokens" in told(tokenizers.from_tokens, [b"a", b"\xff"])


# training states ------------------------------------------------------------------------------------------------------

TWISTER = struct.pack("<QiI624I2I", 0xDEAD, 5, 619, *range(624), 0, 0x9908B0DF)


def state_bytes(vectors, L, rank, ranks, parts, step, shuffled, master):
    """The file of one process; `vectors`: [(transformers' name -> array)] for m, v and perhaps master weights."""
    data = header(20240527, 1, ranks, rank, master, shuffled, w10=step, w20=7, w21=1, w22=8, w30=rank, w32=40 + rank)
    for tensors in vectors:
        for t in ordered(tensors, L, 128):  # (layers, ...): a process has its stretch of each layer
            flat = t.reshape(len(t), parts, -1)
            data += raw(flat[:, rank] if parts > 1 else flat)
    if shuffled:
        data += struct.pack("<Q3i", 3, 2, 0, 1) + struct.pack("<Q4i", 4, 3, 1, 0, 2) + TWISTER
    return data


def write_run(folder, model, vectors, ranks=1, zero=False, step=30, shuffled=True, dtype=torch.float32):
    folder.mkdir()
    L, master = model.config.n_layer, len(vectors) == 3
    (folder / f"model_{step:08d}.bin").write_bytes(model_bytes(model, dtype))
    for rank in range(ranks):
        data = state_bytes(vectors, L, rank, ranks, ranks if zero else 1, step, shuffled, master)
        (folder / f"state_{step:08d}_{rank:05d}.bin").write_bytes(data)
    (folder / f"DONE_{step:08d}").touch()
    return folder / f"model_{step:08d}.bin"


EVEN = 97, 20, 2, 3, 36  # every tensor divides by 4


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("count", [2, 3])  # without and with master weights
@pytest.mark.parametrize(("ranks", "zero"), [(1, False), (3, False), (2, True), (4, True)])
def test_p1_training_states_of_all_processes_are_read(tmp_path, ranks, zero, count, shuffled):
    model = torch_model(*EVEN)
    vectors = [torch_model(*EVEN, seed=s).state_dict() for s in range(1, 1 + count)]
    path = write_run(tmp_path / "log", model, vectors, ranks, zero, shuffled=shuffled)
    state = llmc.read_state(path, llmc.state_files(path))
    assert state.step == 30 and state.flats == ("m", "v", "master")[:count] and len(state.loaders) == ranks
    for flat, tensors in zip(state.flats, vectors):
        for name in llmc.read_model(path).shapes:
            theirs = tensors[f"transformer.{name}"].numpy()
            theirs = theirs.T if name.startswith("h.") and theirs.ndim == 2 else theirs
            assert (state.read(flat, name)[: len(theirs)] == theirs).all(), (flat, name)
    for rank, loader in enumerate(state.loaders):
        assert (loader.rng, loader.rng_before_update, loader.shard, loader.sample) == (
            7 + (1 << 32),
            8,
            rank,
            40 + rank,
        )
        if shuffled:
            assert loader.shard_order.tolist() == [2, 0, 1] and loader.sample_order.tolist() == [3, 1, 0, 2]
            assert loader.twister.tolist() == [5, 619, *range(624), 0, 0x9908B0DF]
        else:
            assert loader.shard_order is loader.sample_order is loader.twister is None


def test_p1_mismatched_training_states_are_refused(tmp_path):
    model = torch_model(*EVEN)
    path = write_run(tmp_path / "log", model, [model.state_dict()] * 2, 2, True)
    first, second = files = llmc.state_files(path)
    assert "a file for every process, but got 1 files" in told(llmc.read_state, path, [first])
    assert "a file for every process, but got 2 files" in told(llmc.read_state, path, [second, first])
    whole = second.read_bytes()
    for at, word in ((40, 31), (8, 3), (16, 1)):  # of another step, of three processes, with master weights
        second.write_bytes(whole[:at] + struct.pack("<i", word) + whole[at + 4 :])
        assert told(llmc.read_state, path, files).startswith("[llmc] ")
    for length in (len(whole) - 1, len(whole) - 2520, 1024, 1030, 100, 0):
        second.write_bytes(whole[:length])
        assert told(llmc.read_state, path, files).startswith("[llmc] ")
    other = write_run(tmp_path / "other", torch_model(97, 20, 2, 3, 24), [model.state_dict()] * 2)
    assert "cut off, or another model's" in told(llmc.read_state, other, llmc.state_files(other))


# a run of llm.c goes on here ------------------------------------------------------------------------------------------

TRAIN = (
    "--num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len 16 --micro-batch 4 "
    "--threads 1 --steps 8 --beta2 0.95 --schedule constant --warmup 0 "
    "--lr 1e-3 --keep-last 0 --save-every 4 --val-every 0 --sample-tokens 0"
).split()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_p1_resume_from_llmc_is_bit_exact(tmp_path, dtype, master, zero, capsys):
    """A run of eight steps, put into llm.c's files after four, converted, and resumed, ends in the same bits."""
    own = [] if master or dtype == "f32" else ["--no-master-weights"]
    run, data = tmp_path / "run", ["--train", "shakespeare"]
    assert main(["train", *data, *TRAIN, *own, "--dtype", dtype, "--out", str(run)]) == 0
    source = open_source(run / "step_000004")
    model = torch_model(source.model.vocab_size, 16, 2, 2, 32)
    param = load_file(run / "step_000004" / "model.safetensors")
    state = load_file(run / "step_000004" / "state.rank00.safetensors")

    def theirs(flat):
        named = (
            param
            if flat == "param"
            else {name[len(flat) + 1 :]: t for name, t in state.items() if name.startswith(flat + ".")}
        )
        named = {name: t[: source.model.vocab_size] if name == "wte.weight" else t for name, t in named.items()}
        return {f"transformer.{name}": t.T if name.startswith("h.") and t.ndim == 2 else t for name, t in named.items()}

    weights = theirs("param")
    vectors = [theirs("m"), theirs("v")]
    if master:
        joined = {name: t.float() for name, t in weights.items()}
        if dtype == "bf16":
            low = theirs("low")
            joined = {name: (t.view(torch.int32) + low[name].int()).view(torch.float32) for name, t in joined.items()}
        vectors.append(joined)
        if dtype == "bf16":  # llm.c's bf16 weights are rounded at random: they may be one bit off the nearest
            weights = {name: t * 1.0078125 for name, t in weights.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict({name: t.float() for name, t in weights.items()})
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    write_run(tmp_path / "log", model, vectors, 2 if zero else 1, zero, 4, dtype=kind)
    shutil.copy(run / "tokenizer-spec.json", tmp_path)
    chars = json.loads((run / "tokenizer-spec.json").read_text())["characters"]
    llmc.write_tokenizer(tmp_path / "log" / "gpt2_tokenizer.bin", [c.encode() for c in chars], None)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "log"), str(tmp_path / "ours")]) == 0
    assert f"resume: handgrad train --resume {tmp_path / 'ours'}" in capsys.readouterr().out
    about = tmp_path / "ours" / "step_000004" / "run.json"
    saved = json.loads(about.read_text())
    assert (
        saved["tokens"] == 0
    )  # llm.c's place in its data says nothing about ours: it begins anew, except in this test
    about.write_text(json.dumps(saved | {"tokens": 4 * 4 * 16}))
    # settings that the files do not say
    again = TRAIN[TRAIN.index("--micro-batch") :]
    del again[again.index("--beta2") : again.index("--beta2") + 2]  # llm.c knows one
    assert main(["train", *data, *again, "--resume", str(tmp_path / "ours")]) == 0
    for file in ("model.safetensors", "state.rank00.safetensors"):
        ours, theirs = (load_file(folder / "step_000008" / file) for folder in (tmp_path / "ours", run))
        assert ours.keys() == theirs.keys()
        for name, t in theirs.items():
            assert ours[name].dtype == t.dtype and torch.equal(ours[name], t), name
