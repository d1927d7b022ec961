"""Documents in one sequence: packed rows of chats, and texts with --documents, train as the documents apart."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from chats import rows, tokenizer_folder, write_rows
from rank_threads import on_ranks

import handgrad as hg
from handgrad.backends.ref import RefBackend
from handgrad.cli.__main__ import main
from handgrad.core.backward import backward
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data.draws import Draws
from handgrad.data.shards import BEGINS, LEARNED, MARK
from handgrad.models import GPT2, GPTNeoX, Llama, declare, forward_loss
from handgrad.ops import add
from handgrad.tokenizers import TEMPLATES
from handgrad.train.config import from_names
from handgrad.train.journal import recorded_settings
from handgrad.train.log import RunLog
from handgrad.train.report import write_report
from handgrad.train.run import train

V, T = 61, 24
SIZES = dict(vocab_size=V, max_seq_len=T, num_layers=2, num_heads=2, hidden_size=16)
MODELS = {
    "gpt2": GPT2(**SIZES),
    "llama": Llama(**SIZES, num_kv_heads=1, mlp_size=24, qk_norm=True),
    "window": Llama(**SIZES, mlp_size=24, window=3),
    "neox": GPTNeoX(**SIZES),
}
# Both sides sum the same float64 terms, some in another order. A sum of n terms errs by at most n 2^-53 of the sum of
# their sizes; the longest here, of V or T 16 terms through two layers and back, stay below 2^12 roundings: 5e-13.
EXACT = 1e-12


def angles(positions, columns, theta, scaling):
    """The rotary table without its rounding to float32, which alone depends on where a row begins (2e-8 here)."""
    assert scaling is None
    found = np.arange(positions)[:, None] * theta ** (-np.arange(0, columns, 2) / columns)
    return np.concatenate([np.cos(found), np.sin(found)], axis=1)


def weights(model):
    """Random weights by name, with rows of padding."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, info.tensor.shape) for name, info in declare(model).params.items()}


def run(model, batch, documents):
    """(losses, gradients by name) of a batch in float64, with the same weights for every shape."""
    B, length = batch["ids"].shape
    p = Program(F32, trains=True)
    forward_loss(p, model, B, length, documents=documents)
    backward(p, add)
    backend = RefBackend()
    arena = backend.alloc(backend.plan(p))
    for name, value in weights(model).items():
        arena.part("param", p.params[name].tensor)[...] = value
    for name, tensor in p.inputs.items():
        arena.write(tensor, np.ascontiguousarray(batch[name]).reshape(-1))
    for tensor, table in p.constants.values():
        arena.view(tensor)[...] = angles(*table.args)
    arena.write_scalars(p, seed=0, step=1, micro_step=0, position=0, loss_sum=0.0, loss_scale=1.0)
    backend.bind(p, arena).run()
    losses = np.array(arena.view(p.outputs["losses"])).reshape(B, length)
    return losses, {name: np.array(arena.view(p.grad(info.tensor))) for name, info in p.params.items()}


def apart(model, documents):
    """(losses one after another, sums of gradients) of (ids, targets) that are each a sequence of its own."""
    found = [run(model, {"ids": ids[None], "targets": targets[None]}, False) for ids, targets in documents]
    sums = {name: sum(gradients[name] for _, gradients in found) for name in found[0][1]}
    return np.concatenate([losses[0] for losses, _ in found]), sums


def error(packed, separate, counts):
    """The largest difference of losses and gradients, relative to the largest value."""
    (losses, gradients), (want, sums) = packed, separate
    pairs = [(losses[counts], want[want != 0]), *((gradients[name], sums[name]) for name in sums)]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


def chats():
    """(windows of ids, marks, the rows apart): three rows and padding, and two rows that fill a window."""
    rng = np.random.default_rng(1)
    ids, marks, documents = np.zeros((2, T + 1), np.int32), np.full((2, T + 1), BEGINS, MARK), []
    for window, sizes in enumerate([(6, 9, 5), (12, 13)]):
        at = 0
        for size in sizes:
            row, own = rng.integers(1, V, size).astype(np.int32), rng.integers(0, 2, size).astype(MARK)
            own[[0, -1]] = BEGINS, LEARNED
            ids[window, at : at + size], marks[window, at : at + size] = row, own
            documents.append((row[:-1], np.where(own[1:] == LEARNED, row[1:], IGNORE_INDEX).astype(np.int32)))
            at += size
    return ids, marks, documents


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_the_rows_apart(name):
    ids, marks, documents = chats()
    batch = hg.data.Chat().fill(ids, marks, Draws(0, [0, 1]), hg.data.Chat.inputs)
    counts, separate = batch["targets"] != IGNORE_INDEX, apart(MODELS[name], documents)
    assert counts.sum() == sum((targets != IGNORE_INDEX).sum() for _, targets in documents)
    assert error(run(MODELS[name], batch, True), separate, counts) < EXACT
    assert error(run(MODELS[name], batch, False), separate, counts) > 1e-3  # without bounds
    if name == "gpt2":  # or with positions that go on
        batch["positions"] = np.tile(np.arange(T, dtype=np.int32), (2, 1))
        assert error(run(MODELS[name], batch, True), separate, counts) > 1e-3


def padded(folder):
    """(the batch of a shard's five rows, each padded to T, the rows apart)."""
    ids, marks, documents = chats()
    sizes = [len(row) + 1 for row, _ in documents]
    held = [np.concatenate([a[0, :20], a[1]]) for a in (ids, marks)]
    hg.data.write_shard(folder / "train_0.bin", held[:1], hg.data.id_dtype(V))
    hg.data.write_shard(folder / "train_0.mask", held[1:], MARK)
    data = hg.data.tokens(folder, T, 5 * T, shuffle=False, objective=hg.data.Chat(), packing="none")
    assert data.windows == 5 and str(data.packing) == "5 rows in 5 windows, 36.0 % full"
    batch = data.batch(0)
    held = np.arange(T) < np.array(sizes)[:, None] - 1
    assert not (batch["targets"] != IGNORE_INDEX)[~held].any()
    held = np.arange(T) < np.array(sizes)[:, None]  # a row's last token is a target alone, and of none
    assert (batch["first"] == np.where(held, 0, np.arange(T))).all()
    return batch, documents


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_equal_the_rows_apart(name, tmp_path):
    """So they equal packed rows, which do."""
    batch, documents = padded(tmp_path)
    found = run(MODELS[name], batch, True)
    assert error(found, apart(MODELS[name], documents), batch["targets"] != IGNORE_INDEX) < EXACT
    batch["ids"] = np.where(batch["ids"] == 0, 7, batch["ids"])  # whatever the padding is
    again = run(MODELS[name], batch, True)
    assert error(again, (found[0].ravel(), found[1]), batch["targets"] != IGNORE_INDEX) < EXACT


def test_padded_rows_equal_those_of_transformers(tmp_path):
    """In float64: a right-padded batch with attention_mask, and labels of -100 for what does not count."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    batch, documents = padded(tmp_path)
    ids, mask, labels = (np.full((5, T + 1), fill, np.int64) for fill in (0, 0, -100))
    for n, (row, targets) in enumerate(documents):
        ids[n, : row.size], mask[n, : row.size + 1] = row, 1
        labels[n, 1 : row.size + 1] = np.where(targets == IGNORE_INDEX, -100, targets)
        ids[n, row.size] = max(targets[-1], 0)
    model = replace(MODELS["gpt2"], num_heads=4)  # float32 holds the scale of its attention, 1/2
    sizes = dict(vocab_size=V, n_positions=T + 1, n_layer=2, n_head=4, n_embd=16)
    off = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None)
    config = transformers.GPT2Config(**sizes, **off)
    judge = transformers.GPT2LMHeadModel(config).double()
    names = {name.removeprefix("transformer."): p for name, p in judge.named_parameters()}
    losses, gradients = run(model, batch, True)
    with torch.no_grad():
        for name, value in weights(model).items():
            value = value.T if ".c_" in name and value.ndim == 2 else value
            names[name][: len(value)] = torch.from_numpy(value[: len(names[name])])
    logits = judge(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    own = logits[:, :-1].reshape(-1, V), torch.from_numpy(labels[:, 1:]).reshape(-1)
    loss = torch.nn.functional.cross_entropy(*own, reduction="sum")  # their own casts the logits to float32
    loss.backward()
    assert abs(losses.sum() - loss.item()) < EXACT * loss.item()
    for name, ours in gradients.items():
        theirs = names[name].grad.numpy()
        theirs = theirs.T if ".c_" in name and theirs.ndim == 2 else theirs
        rows = min(len(ours), len(theirs))
        assert np.abs(ours[:rows] - theirs[:rows]).max() < EXACT * np.abs(theirs).max(), name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_documents_of_a_text_equal_the_documents_apart(name):
    """The last token of each predicts the end-of-text id that begins the next."""
    text = np.random.default_rng(2).integers(1, V, T + 1).astype(np.int32)
    text[[0, 7, 8, 19]] = 0
    batch = hg.data.Causal(eot=0).fill(text[None], None, Draws(0, [0]), hg.data.Causal(eot=0).inputs)
    ends = [7, 8, 19, T]
    documents = [(text[a:b], text[a + 1 : b + 1]) for a, b in zip([0, *ends], ends)]
    assert error(run(MODELS[name], batch, True), apart(MODELS[name], documents), np.s_[0, :]) < EXACT


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Chats of the chatml tokenizer, made by the command."""
    model = tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), "chatml")
    out = tmp_path_factory.mktemp("chats") / "chat"
    source = write_rows(out.with_name("rows.jsonl"), rows(60))
    words = ["--model", f"{model}/tokenizer.json", "--template", "chatml", "--val-fraction", "0.2"]
    assert main(["data", "chat", source, *words, "--out", str(out)]) == 0
    return out


def config(folder, out, **changes):
    settings = dict(family="gpt2", num_layers=1, num_heads=2, hidden_size=16, max_seq_len=128, lr=1e-3)
    settings |= dict(train=str(folder), seq_len=96, micro_batch=2, batch_tokens=384, steps=6, threads=1, warmup=0)
    settings |= dict(out=str(out), sample_tokens=0, val_every=3, val_tokens=0, save_every=3, dtype="f32", backend="cpu")
    return from_names(settings | changes)


def test_an_adapter_has_the_tokenizer_and_the_template_of_a_whole_model(folder, tmp_path):
    """The files that convert writes into a Hugging Face folder, from which transformers makes the same ids."""
    transformers = pytest.importorskip("transformers")
    run, adapter, whole = (tmp_path / name for name in ("run", "adapter", "whole"))
    assert train(config(folder, run, steps=1, val_every=0, lora_rank=2), quiet=True) == 0
    assert main(["convert", str(run), str(adapter), "--adapter"]) == main(["convert", str(run), str(whole)]) == 0
    own = {"adapter_base.json", "adapter_config.json", "adapter_model.safetensors"}
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.name not in own}
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files == {name: (whole / name).read_bytes() for name in files}
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "us"}]
    found = transformers.AutoTokenizer.from_pretrained(adapter).apply_chat_template(chat)["input_ids"]
    ids = hg.data.open_shard(folder / "train_000000.bin").read()
    assert len(found) > 9 and found[0] == ids[0]
    assert main(["convert", str(run), str(adapter), "--adapter", "--force"]) == 0


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_a_model_folder_is_tuned_with_its_own_template(folder, tmp_path, capsys):
    """From a Hugging Face folder of a Llama: data by its template, training from its weights, and back to a folder."""
    base, model = tmp_path / "base", tmp_path / "model"
    assert train(config(folder, base, family="llama", preset="smollm2-135m", num_kv_heads=1, head_size=8, mlp_size=24, steps=1), quiet=True) == 0  # fmt: skip
    assert main(["convert", str(base), str(model)]) == 0
    about = json.loads((model / "tokenizer_config.json").read_text())
    about["chat_template"] = TEMPLATES["chatml"].read_text()
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    own, tuned = tmp_path / "own", tmp_path / "tuned"
    assert (
        main(
            [
                "data",
                "chat",
                str(folder.with_name("rows.jsonl")),
                "--model",
                str(model),
                "--val-fraction",
                "0.2",
                "--out",
                str(own),
            ]
        )
        == 0
    )
    for name in ("train_000000.bin", "train_000000.mask", "val_000000.mask"):
        assert (own / name).read_bytes() == (folder / name).read_bytes()
    capsys.readouterr()
    words = ["--init", str(model), "--train", str(own), "--seq-len", "96", "--micro-batch", "2", "--lr", "5e-3"]
    words += ["--steps", "12", "--backend", "cpu", "--threads", "1", "--dtype", "f32", "--sample-tokens", "0"]
    assert main(["train", *words, "--out", str(tuned)]) == 0
    said = capsys.readouterr().out
    assert "48 rows in " in said and "losses are of the assistant's tokens" in " ".join(said.split())
    losses = [line["loss"] for line in log(tuned)]
    assert losses[-1] < 0.8 * losses[0]
    assert "Loss, nats per token of the assistant" in (tuned / "report.html").read_text()
    assert json.loads((tuned / "run.json").read_text())["summary"]["chat"].startswith("48 rows in ")
    assert main(["eval", str(tuned), "--backend", "cpu", "--threads", "1"]) == 0
    found = json.loads((tuned / "eval.json").read_text())["step_000012"]["val"]["loss"]
    assert abs(found - log(tuned)[-1]["val_loss"]) < 1e-5 * found  # both in float32, packed and row by row


def test_report_of_a_running_run_says_what_its_losses_are_of(folder, tmp_path, monkeypatch):
    titles, step = [], RunLog.step

    def reported(log, *args, **figures):
        step(log, *args, **figures)
        titles.append(re.search("Loss, [^<]*", write_report(log.path.parent).read_text())[0])

    monkeypatch.setattr(RunLog, "step", reported)
    assert train(config(folder, tmp_path / "run", steps=1), quiet=True) == 0
    assert titles == ["Loss, nats per token of the assistant"]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_resume_is_bit_for_bit(folder, tmp_path, packing):
    assert train(config(folder, tmp_path / "whole", packing=packing), quiet=True) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_000006")
    assert train(config(folder, tmp_path / "run", resume="auto", packing=packing), quiet=True) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    for name in ("model.safetensors", "state.rank00.safetensors"):
        ours, theirs = (tmp_path / out / "step_000006" / name for out in ("run", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_start_counts_rows_that_are_cut(folder, tmp_path, capsys):
    """Those longer than a sequence, and those of which nothing of the assistant's is left."""
    marks = hg.data.open_shard(folder / "train_000000.mask").read()
    row_marks = np.split(marks, np.flatnonzero(marks & BEGINS)[1:])
    length = sorted(map(len, row_marks))[4]  # of a row that just fits
    cut = [row for row in row_marks if len(row) > length]
    lost = [row for row in cut if not (row[:length] == LEARNED).any()]
    assert len(row_marks) > len(cut) > len(lost) > 0
    assert train(config(folder, tmp_path / "run", seq_len=length - 1, batch_tokens=2 * length - 2, steps=1)) == 0
    said = " ".join(capsys.readouterr().out.split())
    left = f"{len(lost)} of them left out: no token of the assistant's remains"
    assert re.search(
        rf"48 rows in \d+ windows, [\d.]+ % full; {len(cut)} longer than {length} tokens and cut, {left}", said
    )
    with pytest.raises(HandgradError, match="one of 48 rows must have .* among its first 9, but got none. hint: use a"):
        train(config(folder, tmp_path / "short", seq_len=8, batch_tokens=16), quiet=True)


def test_start_counts_the_rows_of_every_set_of_chats(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "other")
    both = f"{folder},{tmp_path / 'other'}"
    assert train(config(both, tmp_path / "run", seq_len=40, batch_tokens=80, steps=1)) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"48 rows in \d+ windows, .*? longer than 41", " ".join(said.split()))) == 2
    assert "epochs" not in re.search(r" length .*", said)[0], (
        "of a mixture, the line of the mixture has those of each set"
    )


def test_rows_of_chats_padded(folder, tmp_path, capsys):
    """The start says how full the windows are and how to fill them; validation has the same loss; and a text has no
    rows to pad."""
    said, val = {}, {}
    for packing in ("none", "best_fit"):
        out = tmp_path / packing
        assert train(config(folder, out, packing=packing, steps=1, seq_len=128, batch_tokens=512)) == 0
        said[packing], val[packing] = " ".join(capsys.readouterr().out.split()), log(out)[-1]["val_loss"]
        assert json.loads((out / "config.json").read_text())["data"]["packing"] == packing
    assert "48 rows in 48 windows, 4" in said["none"] and "48 rows in 48" not in said["best_fit"]
    assert ("--packing best_fit puts several" in said["none"], "--packing" in said["best_fit"]) == (True, False)
    shorter = re.search(r"; --seq-len (\d+) --batch-tokens (\d+) pads every row to the longest", said["none"])
    size, tokens = map(int, shorter.groups())
    longest = json.loads((folder / "meta.json").read_text())["chat"]["longest"]
    assert size % 16 == 0 and size - 16 < longest - 1 <= size and tokens == 4 * size
    out = tmp_path / "short"
    assert train(config(folder, out, packing="none", steps=1, seq_len=size, batch_tokens=tokens)) == 0
    assert "cut" not in (said := " ".join(capsys.readouterr().out.split())) and "pads every row" not in said
    first = [log(tmp_path / name)[0]["loss"] for name in ("none", "short")]
    assert abs(first[0] - first[1]) < 1e-6  # the same four rows
    assert abs(val["none"] - val["best_fit"]) < 0.1  # of weights one step apart, on other rows
    with pytest.raises(HandgradError, match="--packing none is for chat data, whose rows it pads, but got shakespeare"):
        train(config("shakespeare", tmp_path / "text", packing="none"), quiet=True)
    with pytest.raises(HandgradError, match="packing none is for chat data, by Chat, but got Causal"):
        hg.data.tokens(folder, 96, 96, packing="none")
    data = hg.data.tokens(folder, 96, 96, objective=hg.data.Chat(), packing="none")
    recorded = recorded_settings(GPT2(**SIZES), hg.optim.AdamW(), data, hg.Execution(1), "f32")
    assert recorded["data"]["packing"] == "none"  # of a run from Python
    with pytest.raises(HandgradError, match="packing is one of best_fit, none, but got 'bfd'"):
        hg.data.tokens(folder, 96, 96, objective=hg.data.Chat(), packing="bfd")


def test_losses_are_of_the_assistants_tokens_on_any_number_of_ranks(folder):
    def work(comm):
        data = hg.data.tokens(folder, 96, 384, objective=hg.data.Chat())
        val = hg.data.tokens(folder, 96, 96, split="val", shuffle=False, objective=hg.data.Chat())
        model = GPT2(**SIZES | dict(vocab_size=data.meta["vocab_size"], max_seq_len=96))
        execution = hg.Execution(micro_batch=1, extra_programs=("val",))
        backend = RefBackend(comm=comm)
        trainer = hg.Trainer(
            model, hg.optim.AdamW(), data, execution=execution, precision=hg.Precision(), backend=backend
        )
        weights = {name: np.array(value) for name, value in trainer.params().items()}
        return [trainer.evaluate(val), trainer.step(1, 1e-3).loss, trainer.step(2, 1e-3).loss], model, weights

    ((one, model, weights),) = on_ranks(1, work)
    for losses, *_ in on_ranks(2, work):
        assert np.abs(np.subtract(losses, one)).max() < EXACT * max(one)
    total = count = 0
    p = Program(F32)
    forward_loss(p, model, 1, 96)
    backend = RefBackend()
    arena = backend.alloc(backend.plan(p))
    for name, value in weights.items():
        arena.part("param", p.params[name].tensor)[...] = value
    bound = backend.bind(p, arena)
    ids, marks = (hg.data.open_shard(folder / f"val_000000.{end}").read() for end in ("bin", "mask"))
    for row, own in zip(*(np.split(a, np.flatnonzero(marks & BEGINS)[1:]) for a in (ids, marks))):
        own, row, size = own[1:97] == LEARNED, row.astype(np.int32), min(row.size - 1, 96)
        for name, values in (("ids", row[:-1][:96]), ("targets", np.where(own, row[1:97], IGNORE_INDEX))):
            arena.write(p.inputs[name], np.pad(values, (0, 96 - size), constant_values=-(name == "targets")))
        bound.run()
        total, count = total + arena.view(p.outputs["losses"]).sum(), count + own.sum()
    assert abs(total / count - one[0]) < EXACT * one[0]


def test_documents_flag(tmp_path, folder):
    text = np.random.default_rng(0).integers(1, 50, 3000)
    text[::37] = 0
    hg.data.write_shard(tmp_path / "train_0.bin", [text], hg.data.id_dtype(50))
    spec = {"kind": "chars", "characters": "".join(map(chr, range(50, 100)))}
    meta = {"vocab_size": 50, "dtype": "uint16", "train": {}, "val": {}}
    settings = dict(train=str(tmp_path), seq_len=32, batch_tokens=0, steps=3, save_every=0, val_every=0)

    def go(out="none", **changes):
        return train(config(folder, tmp_path / out, **settings | changes), quiet=True)

    (tmp_path / "meta.json").write_text(json.dumps(meta | {"tokenizer": spec}))
    with pytest.raises(HandgradError, match="--documents needs an end-of-text id, which begins each, but got a token"):
        go(documents=True)
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"tokenizer": spec | {"eot": [0]}}))
    losses = {}
    for documents in (False, True):
        assert go(documents=documents, out=f"run{documents}") == 0
        losses[documents] = [line["loss"] for line in log(tmp_path / f"run{documents}")]
        saved = json.loads((tmp_path / f"run{documents}" / "config.json").read_text())
        assert saved["data"]["documents"] is documents
    assert all(a != b for a, b in zip(*losses.values()))
    with pytest.raises(HandgradError, match="--documents is for models that continue texts, but got a bert"):
        go(family="bert", preset="bert-base", documents=True)
    with pytest.raises(HandgradError, match="chat data is for models that continue texts, but got a bert"):
        go(family="bert", preset="bert-base", train=str(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_explain_plans_what_a_run_of_documents_takes(folder, tmp_path, capsys, family):
    """To the byte, tensor by tensor."""
    same = f"--family {family} --seq-len 32 --micro-batch 2 --backend cpu --threads 1 --dtype f32".split()
    run = f"--preset tiny --steps 1 --val-tokens 32 --sample-tokens 1 --train {folder} --out {tmp_path / 'run'}"
    assert main(["train", *run.split(), *same]) == 0
    vocab = ["--vocab-size", str(hg.data.read_meta(folder)["vocab_size"])]
    capsys.readouterr()
    assert main(["explain", "tiny", *vocab, *same, "--documents"]) == 0
    assert (tmp_path / "run" / "memory.txt").read_text() in capsys.readouterr().out
    assert main(["explain", "tiny", *vocab, *same]) == 0
    assert (tmp_path / "run" / "memory.txt").read_text() not in capsys.readouterr().out


def test_explain_of_documents_names_the_kernels_and_refuses_a_bert(capsys):
    assert main(["explain", "tiny", "--gpu", "h100", "--documents", "--calls"]) == 0
    kernels = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if " attention" in line[:40]]
    assert len(kernels) == 8 and set(kernels) == {"own"}
    assert main(["explain", "bert-base", "--documents"]) == 2
    assert "documents are kept apart by models that continue texts, but got a bert" in capsys.readouterr().err


def test_validation_counts_what_its_own_shards_say(folder, tmp_path, capsys):
    """--val may name texts beside chats, and chats beside texts; eval finds the loss that training found."""
    texts = tmp_path / "texts"
    texts.mkdir()
    text = np.random.default_rng(0).integers(1, 50, 2000)
    text[::37] = next(t for t in [hg.data.read_meta(folder)] if t)["tokenizer"].get("eot", [0])[0]
    for split in ("train", "val"):
        hg.data.write_shard(texts / f"{split}_0.bin", [text], hg.data.id_dtype(50))
    meta = {name: value for name, value in hg.data.read_meta(folder).items() if name != "chat"}
    (texts / "meta.json").write_text(json.dumps(meta))
    for file in folder.glob("tokenizer*.json"):
        (texts / file.name).write_bytes(file.read_bytes())
    kinds = {"chats": (folder, texts, False), "texts": (texts, folder, True)}
    for name, (own, other, documents) in kinds.items():
        val = f"{other}/val_*.bin"
        assert train(config(own, tmp_path / name, val=val, steps=2, documents=documents), quiet=True) == 0
        assert main(["eval", str(tmp_path / name), "--threads", "1", "--backend", "cpu"]) == 0
        found = json.loads((tmp_path / name / "eval.json").read_text())["step_000002"]["val"]["loss"]
        assert found == pytest.approx(log(tmp_path / name)[-1]["val_loss"], abs=1e-5)
    mixed = config(f"{texts},{folder}", tmp_path / "mixed", packing="none", steps=2, val_every=0, save_every=0)
    assert train(mixed, quiet=True) == 0  # beside texts, too, rows of chats are padded
    capsys.readouterr()
    assert train(config(f"{folder},{texts}", tmp_path / "both", steps=1)) == 0
    assert "losses are of the assistant's tokens, and of all tokens of texts" in " ".join(
        capsys.readouterr().out.split()
    )
    titles = {
        name: re.search("Loss, [^<]*", (tmp_path / name / "report.html").read_text())[0] for name in ("chats", "both")
    }
    assert titles == {"chats": "Loss, nats per token of the assistant", "both": "Loss, nats per token"}
    with pytest.raises(HandgradError, match="chats validate a run that keeps them apart"):
        train(config(texts, tmp_path / "none", val=f"{folder}/val_*.bin", steps=2), quiet=True)
