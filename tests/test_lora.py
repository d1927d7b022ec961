"""Adapters: against peft on transformers, to and from its folders, through every verb, and the memory they take."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from rank_threads import on_ranks
from safetensors import safe_open
from safetensors.numpy import save_file

import handgrad as hg
from handgrad.backends import open_backend
from handgrad.backends.cpu import CpuBackend
from handgrad.backends.ref import RefBackend
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data import id_dtype, write_shard
from handgrad.infer import adapters as packed
from handgrad.infer.load import open_source
from handgrad.io import newest
from handgrad.io.weights import NUMPY
from handgrad.models import Lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB, T, BATCH, LR, STEPS = 61, 8, 2, 3e-3, 10
MODELS = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
            )
        ),
        ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # without k: a gap in the packed qkv
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        "all-linear",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Ids with frequencies as uneven as in text, so that ten steps change the loss."""
    folder = tmp_path_factory.mktemp("text")
    write_shard(folder / "train_0.bin", [np.random.default_rng(0).zipf(1.3, 4000) % VOCAB], id_dtype(VOCAB))
    return str(folder / "train_0.bin")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name: (peft's model in float64, the folder of the base, that of the adapter). B is not zero, so A learns."""
    found = {}
    for name, (make, targets) in MODELS.items():
        torch.manual_seed(1)
        base, adapter = (tmp_path_factory.mktemp(f"{name}_{part}") for part in ("base", "adapter"))
        plain = make()
        plain.save_pretrained(base)
        model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
        for key, p in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, 0, 0.3)
        model.save_pretrained(adapter)
        found[name] = model.double(), base, adapter
    return found


def trainer(name, folders, text, backend=None, **changes):
    _, base, adapter = folders[name]
    source, lora = open_source(base), changes.get("lora", packed.lora_of(adapter))
    start = hg.Start(3, source.weights, packed.read_peft(adapter, lora, source.model) if lora else {})
    data = hg.data.tokens(text, T, BATCH * T)
    execution = hg.Execution(**{"micro_batch": BATCH, "lora": lora, "extra_programs": ()} | changes)
    optim = hg.optim.AdamW(betas=(0.9, 0.99), weight_decay=0.1, clip=0.0)
    kinds = {"precision": hg.Precision("f32"), "backend": backend or RefBackend()}
    return hg.Trainer(source.model, optim, data, execution=execution, start=start, **kinds), source.model, lora


def by_peft_name(run, model, lora, tensors):
    """Tensors of a run's adapters by peft's names."""
    return {name: tensors[ours][rows] for name, _, ours, rows in packed._places(lora, model)}


def close(ours, theirs, limit):
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        error = np.abs(value - theirs[name]).max() / np.abs(theirs[name]).max()
        assert error <= limit, f"{name}: {error:.1e}"


def theirs_of(model, pick):
    """Of peft's parameters that learn, by the names in its files."""
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    clean = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in names.items()}
    return {n: pick(p).detach().numpy().copy() for n, p in clean.items()}


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_steps_equal_peft(name, folders, text):
    """In float64, 10 steps of AdamW; float32 kernels for the first loss and gradients.

    transformers rounds rotary angles and RMS norms to float32, by 6e-8: a gradient passes some ten of them, and Adam's
    division by small numbers amplifies that. float32 kernels round 24 times in each of two layers: 48 x 6e-8 = 3e-6.
    """
    run, model, lora = trainer(name, folders, text)
    cpu, *_ = trainer(name, folders, text, open_backend("cpu"))
    theirs = folders[name][0]
    state = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    optim = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], LR, (0.9, 0.99), 1e-8, 0.1)
    losses = []
    for step in range(1, STEPS + 1):
        batch = run.data.batch(step - 1)
        ids, targets = (torch.tensor(batch[key].reshape(BATCH, T), dtype=torch.long) for key in ("ids", "targets"))
        logits = theirs(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        optim.zero_grad()
        loss.backward()
        ours = run.step(step, LR).loss
        assert abs(ours - loss.item()) <= 1e-7 * loss.item()
        losses.append(ours)
        if step == 1:
            want = theirs_of(theirs, lambda p: p.grad)
            close(by_peft_name(run, model, lora, run.grads()), want, 1e-6)
            assert abs(cpu.step(1, LR).loss - loss.item()) <= 3e-6 * loss.item()
            close(by_peft_name(cpu, model, lora, cpu.grads()), want, 1e-5)
        optim.step()
    close(by_peft_name(run, model, lora, run.params()), theirs_of(theirs, lambda p: p), 1e-5)
    assert losses[-1] < losses[0] - 0.02
    frozen = {n for n, info in run.program.params.items() if not info.trainable}
    start = open_source(folders[name][1]).weights
    for n in frozen:  # not a bit
        rows = start.shapes[n][0]
        np.testing.assert_array_equal(run.params()[n][:rows], start.tensor(n))
    for n, p in theirs.named_parameters():  # the fixture is shared
        p.data.copy_(state[n])


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_merged_export_equal_pefts_merge(name, folders, text, tmp_path):
    """From a run that starts at the adapter: --to hf merges, --adapter gives the adapter back, bit for bit."""
    theirs, base, adapter = folders[name]
    run, model, lora = trainer(name, folders, text, open_backend("cpu"))
    run.out = tmp_path / "run"
    run.save(0)
    assert main(["convert", str(run.out), str(tmp_path / "merged"), "--to", "hf"]) == 0
    assert main(["convert", str(run.out), str(tmp_path / "adapter"), "--adapter"]) == 0
    ids = torch.arange(T)[None] * 5 % VOCAB
    with torch.no_grad():
        want = theirs(ids).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        again = transformers.AutoModelForCausalLM.from_pretrained(base)
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
        for found in (plain, again):
            error = (found.double()(ids).logits - want).abs().max() / want.abs().max()
            assert error <= 1e-6, error
    ours, files = (packed.read_peft(folder, lora, model) for folder in (tmp_path / "adapter", adapter))
    for n, values in ours.items():
        np.testing.assert_array_equal(values, files[n])


def test_a_run_of_the_command_line_trains_resumes_generates_and_converts(tmp_path, monkeypatch, capsys):
    """A run that is interrupted has the bits of one that is not; what it generates is what its merged export does."""
    monkeypatch.chdir(tmp_path)
    small = "--preset tiny --num-layers 1 --num-heads 2 --hidden-size 16 --max-seq-len 16 --micro-batch 2 --backend cpu"
    common = f"train {small} --val-every 0 --val-tokens 64 --sample-tokens 4 --dtype bf16"
    assert main(f"{common} --steps 2 --out base".split()) == 0
    tune = "--init base --lora-rank 2 --lora-alpha 4 --lora-targets c_attn,c_fc --lora-dropout 0.1"
    common = f"train --micro-batch 2 --backend cpu --val-every 0 --val-tokens 64 --sample-tokens 4 --dtype bf16 {tune}"
    assert main(f"{common} --steps 4 --out whole".split()) == 0
    assert main(f"{common} --steps 4 --save-every 2 --keep-last 0 --out cut".split()) == 0
    (tmp_path / "cut" / "step_000004" / "DONE").unlink()
    assert main("train --resume cut".split()) == 0
    for file in ("model.safetensors", "state.rank00.safetensors"):
        a, b = (tmp_path / run / "step_000004" / file for run in ("whole", "cut"))
        assert a.read_bytes() == b.read_bytes()
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert settings["tune"]["lora_rank"] == 2 and settings["model"]["init"] == "base"
    capsys.readouterr()
    texts = []
    assert main("convert whole merged --dtype f32".split()) == 0
    for source in ("whole", "merged"):
        capsys.readouterr()
        assert (
            main(f"generate {source} --prompt A --max-tokens 8 --dtype f32 --backend cpu --temperature 0".split()) == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 8
    # from the adapter that it gives: the same adapter again
    assert main("convert whole adapter --adapter --dtype f32".split()) == 0
    assert main("generate adapter --prompt a".split()) == 2
    assert "hint: it is an adapter, for handgrad train --init MODEL --lora-init FOLDER" in capsys.readouterr().err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_fc"] and config["base_model_name_or_path"] == "base"
    more = "train --micro-batch 2 --backend cpu --val-every 0 --val-tokens 64 --sample-tokens 0 --dtype f32 --steps 1"
    assert main(f"{more} --lr 0 --init base --lora-init adapter --out again".split()) == 0
    assert main("convert again adapter2 --adapter".split()) == 0
    one, two = (tmp_path / f / "adapter_model.safetensors" for f in ("adapter", "adapter2"))
    assert one.read_bytes() == two.read_bytes()


REFUSED = {
    "--lora-rank 2 --lora-targets q,c_attn": r"\[lora\] a target is all-linear or a linear.*c_attn, c_proj, c_fc.*'q'",
    "--lora-alpha 3": r"--lora-alpha goes with --lora-rank",
    "--lora-rank 2 --train-only wte.*": r"--train-only goes without adapters",
    "--lora-init {llama}": r"\[lora\] a target is all-linear or a linear of the model: c_attn",
    "--lora-init {gpt2}": r"\[lora\] '.*' is an adapter of this model, but got .*lora_A.weight of shape \(4, 32\), not \(4, 16\)",
    "--lora-init {gpt2} --lora-rank 3": r"--lora-rank is left to the adapter that --lora-init names, which has 4",
    "--lora-init .": r"an adapter is a folder with adapter_config.json",
    "--lora-init {dora}": r"has use_dora False, but got True",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_adapters_that_do_not_fit_are_refused_in_one_line(flags, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named = {name: folder for name, (_, _, folder) in folders.items()}
    named["dora"] = tmp_path / "dora"
    named["dora"].mkdir()
    config = json.loads((named["gpt2"] / "adapter_config.json").read_text()) | {"use_dora": True}
    (named["dora"] / "adapter_config.json").write_text(json.dumps(config))
    small = "--num-layers 3 --num-heads 2 --hidden-size 16 --max-seq-len 16 --micro-batch 2 --backend cpu --out new"
    assert main(f"train {small} {flags.format(**named)}".split()) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(REFUSED[flags], error), error
    assert not (tmp_path / "new").exists()


def test_memory_of_adapters_is_what_they_and_the_frozen_weights_need():
    """llama3.2-1b in bf16, rank 16, all linears, planned: the arena by hand, to the byte."""
    model = hg.models.preset("llama3.2-1b")
    execution = hg.Execution(micro_batch=1, lora=Lora(rank=16), extra_programs=())
    page = hg.explain(model, 512, execution=execution, precision=hg.Precision("bf16"), remedies=False)
    C, kv, F, L, r = 2048, 512, 8192, 16, 16
    # A and B of q, k, v, o, gate, up, down; each is a multiple of 128 elements
    adapters = L * r * ((C + C) + 2 * (C + kv) + (C + C) + 2 * (C + F) + (F + C))
    base = 128256 * C + L * (C * C * 2 + 2 * kv * C + 3 * C * F + 2 * C) + C
    assert page.program.num_trainable == adapters == 11_272_192  # peft's count for this model and rank
    assert "adapters      11,272,192, of rank 16 beside 112 matrices\n" in str(page)
    assert "adapters " not in str(hg.explain(model, 512, execution=replace(execution, lora=None), remedies=False))
    region = page.plan.region
    assert region["params"][1] == 2 * (base + adapters)
    assert region["state"][1] == (4 + 4 + 2) * adapters  # m, v, low halves
    assert region["grads"][1] == 4 * adapters
    assert not any(c.op.name == "linear_backward_w" and c.dw.shape[0] > 3 * r for c in page.program.calls)


def test_dropout_and_recompute_policies_keep_the_gradients(folders, text):
    """Masks are functions of counters: a recomputed adapter drops what the first one dropped."""
    lora = replace(packed.lora_of(folders["gpt2"][2]), dropout=0.25)
    found = []
    for policy in ("none", "act", "act_norm", "block"):
        run, *_ = trainer("gpt2", folders, text, open_backend("cpu"), lora=lora, recompute=policy)
        run.step(1, 0.0)
        found.append({name: g.copy() for name, g in run.grads().items()})
    for other in found[1:]:
        for name, g in found[0].items():
            np.testing.assert_array_equal(g, other[name])
    run, *_ = trainer("gpt2", folders, text, open_backend("cpu"))
    run.step(1, 0.0)
    assert any(not np.array_equal(g, found[0][name]) for name, g in run.grads().items())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_resume_of_a_llama_is_bit_exact_on_any_number_of_ranks(kind, world, folders, text, tmp_path):
    """Four steps at once, and two steps twice: the files of the last checkpoint, which hold the state of all ranks."""
    changes = {"micro_batch": BATCH // world, "zero": 2 * (world > 1), "recompute": "block"}
    changes |= {"lora": None} if kind == "whole" else {}

    def span(comm, out, first, last):
        run, *_ = trainer("llama", folders, text, CpuBackend(1, comm), **changes)
        run.out = tmp_path / out
        assert run.resume() == first - 1
        for step in range(first, last + 1):
            run.step(step, LR)
        run.save(last)

    for words in (("straight", 1, 4), ("resumed", 1, 2), ("resumed", 3, 4)):
        on_ranks(world, partial(lambda words, comm: span(comm, *words), words))
    for file in ("model.safetensors", "state.rank00.safetensors"):
        straight, resumed, half = (
            (tmp_path / place / file).read_bytes()
            for place in ("straight/step_000004", "resumed/step_000004", "resumed/step_000002")
        )
        assert straight == resumed != half
    if kind == "adapters":
        files = [tmp_path / out / step / "frozen.safetensors" for out, step in (
            ("straight", "step_000004"), ("resumed", "step_000004"), ("resumed", "step_000002"))]  # fmt: skip
        assert files[0].read_bytes() == files[1].read_bytes() and files[1].samefile(files[2])


def test_a_run_on_changing_numbers_of_ranks_keeps_one_file_of_frozen_weights(folders, text, tmp_path):
    """With zero 3 they are gathered from the ranks: the same bytes."""

    def work(comm):
        changes = {"micro_batch": BATCH // comm.world, "zero": 3 * (comm.world > 1)}
        run, *_ = trainer("llama", folders, text, CpuBackend(1, comm), **changes)
        run.out = tmp_path
        step = run.resume() + 1
        run.step(step, LR)
        run.save(step)

    for world in (2, 1, 2):
        on_ranks(world, work)
    files = [path.stat().st_ino for path in tmp_path.glob("step_*/frozen.safetensors")]
    assert len(files) == 3 and len(set(files)) == 1


def test_a_checkpoint_with_the_base_among_its_weights_resumes(folders, text, tmp_path):
    """As earlier versions wrote them: one file of weights, frozen or not."""
    run, *_ = trainer("llama", folders, text, open_backend("cpu"))
    run.out = tmp_path
    run.step(1, LR)
    run.save(1)
    path, names = tmp_path / "step_000001", run.program.params
    assert set(safe_open(path / "model.safetensors", "np").keys()) == {n for n in names if names[n].trainable}
    (path / "frozen.safetensors").unlink()
    save_file({name: np.array(values) for name, values in run.params().items()}, path / "model.safetensors")
    again, *_ = trainer("llama", folders, text, open_backend("cpu"))
    again.out = tmp_path
    assert again.resume() == 1
    for one in (run, again):
        one.step(2, LR)
    for name, values in run.params().items():
        np.testing.assert_array_equal(values, again.params()[name])
    again.save(2)
    assert (tmp_path / "step_000002" / "frozen.safetensors").exists() and open_source(tmp_path).path.name[-1] == "2"


def test_a_checkpoint_with_another_lora_does_not_resume(folders, text, tmp_path):
    run, _, lora = trainer("gpt2", folders, text, open_backend("cpu"))
    run.out = tmp_path
    run.save(0)
    assert newest(tmp_path)
    other, *_ = trainer("gpt2", folders, text, open_backend("cpu"), lora=replace(lora, alpha=5.0))
    other.out = tmp_path
    with pytest.raises(HandgradError, match=r"\[resume\] the checkpoint's model has lora .*'alpha': 6.0.*'alpha': 5.0"):
        other.resume()


def test_an_adapter_is_taken_on_its_own_base_in_any_format_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = "--micro-batch 2 --backend cpu --val-every 0 --val-tokens 64 --sample-tokens 0"
    Path("plays.txt").write_text(hg.data.shakespeare().read_text()[:20_000])
    assert main("data tokenizer plays.txt --vocab 257 --out tokens".split()) == 0  # .gguf holds no characters
    assert main("data text plays.txt --tokenizer tokens --out plays".split()) == 0
    common += " --train plays"
    small = f"--preset tiny --num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len 16 {common} --steps 2"
    for out, seed in (("base", 1), ("other", 2)):
        assert main(f"train {small} --seed {seed} --dtype f32 --out {out}".split()) == 0
    for words in ("hf --to hf --dtype f32", "bf16 --to hf --dtype bf16", "q8.gguf --dtype q8_0", "base.bin --to llmc"):
        assert main(f"convert base {words}".split()) == 0
    assert main(f"train {common} --init base --lora-rank 2 --steps 2 --dtype bf16 --out tuned".split()) == 0
    assert main("convert tuned adapter --adapter".split()) == 0

    def start(init):
        capsys.readouterr()
        code = main(f"train {common} --steps 1 --init {init} --lora-init adapter --out again_{init}".split())
        return code, capsys.readouterr().err.strip()

    for init in ("base", "hf", "bf16", "q8.gguf", "base.bin"):
        assert start(init)[0] == 0, init
    refusal = r"^\[lora\] 'adapter' is an adapter of the model 'base', but got other weights of the same shapes, "
    refusal += r"--init other\. hint: if it is on purpose, delete adapter/adapter_base\.json$"
    code, error = start("other")
    assert code == 2 and re.search(refusal, error), error
    assert not (tmp_path / "again_other").exists()
    assert main(f"train {small} --lora-init adapter --out drawn".split()) == 2
    assert "--init random" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # without the comparison it is taken
        patch.setattr(packed, "is_same", lambda one, other: True)
        assert start("other")[0] == 0
    shutil.rmtree("again_other")
    file = tmp_path / "adapter" / "adapter_base.json"
    for text in ("[]", '{"h.0.attn.c_attn.weight": [1.0, "x"]}', '{"h.0.attn.c_attn.weight": [NaN]}', "{"):
        file.write_text(text)
        code, error = start("other")
        assert code == 2 and "adapter_base.json" in error and len(error.splitlines()) == 1, error
    file.write_text("{}")  # of no weights: of another model
    assert start("base")[0] == 2
    file.unlink()
    assert start("other")[0] == 0


def test_copies_of_weights_in_all_types_are_the_same_and_other_weights_are_not():
    quants = pytest.importorskip("gguf").quants
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((1, packed.ALIKE)).astype(np.float32) * 0.02 for _ in range(packed.SAMPLED)]
    names = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")

    def quantised(w, name):
        kind = getattr(quants.GGMLQuantizationType, name)
        return quants.dequantize(quants.quantize(w, kind), kind)

    copies = {kind: [w.astype(NUMPY[kind]) for w in weights] for kind in ("f32", "bf16")}
    copies["f16"] = [w.astype(np.float16) for w in weights]
    copies |= {name: [quantised(w, name) for w in weights] for name in names}
    copies |= {f"{name}, bf16": [quantised(w, name).astype(NUMPY["bf16"]) for w in weights] for name in names}
    copies = {name: [w[0].astype(np.float64) for w in copy] for name, copy in copies.items()}
    for (a, one), (b, two) in product(copies.items(), repeat=2):
        assert packed.is_same(one, two), (a, b)
    tuned = [w + 0.1 * 0.02 * rng.standard_normal(w.shape) for w in copies["f32"]]  # by a tenth of their size
    others = [0.02 * rng.standard_normal(w.shape) for w in copies["f32"]]
    for name, copy in copies.items():
        assert not packed.is_same(copy, others), name
        assert "Q" in name or not packed.is_same(copy, tuned), name
