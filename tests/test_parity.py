"""Everything that llm.c's users do: the rows of the parity list that have no file of their own, and that each row has a
test. P1, P2 and P14 are in test_llmc_files, test_llmc_init, test_hf and test_convert, P9 in test_evals, P10 in test_resume
and test_crash, P12 in test_data, P13 also in test_log."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import handgrad as hg
from handgrad.backends.cuda.peaks import peaks
from handgrad.cli import ops as ops_verb
from handgrad.cli.__main__ import main
from handgrad.ops.adamw.reference import join_weight
from handgrad.train.outliers import WINDOW

ROOT = Path(__file__).parents[1]
ROWS = "p1 p2 p3 p4 p5 p8 p9 p10 p12 p13 p14 p15".split()
LLMC = (
    "-i -j -e -o -lg -n -nk -nm -y -b -t -d -x -k -l -u -q -c -sl -sg -v -m -s -g -h -a -f -w -ge -z -r -pn -pr -pg -pi -ps -pf"
).split()


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_tests():
    """The names of all tests."""
    files = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "src").rglob("test_*.py")]
    return [name.lower() for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test_that_bears_its_name(row):
    assert any(row in name.split("_") for name in named_tests())


def test_a_row_without_a_test_is_noticed():
    assert not any("p6" + "0" in name.split("_") for name in named_tests())


# P3: ten steps on one batch -------------------------------------------------------------------------------------------


@pytest.fixture
def judge():
    pytest.importorskip("torch")
    return script(ROOT / "reference" / "gpt2_torch.py")


@pytest.mark.parametrize(("betas", "decay", "clip"), [((0.9, 0.95), 0.0, 1.0), ((0.9, 0.999), 0.01, 0.0)])
def test_p3_ten_steps_on_one_batch_are_pytorchs(judge, shards, betas, decay, clip):
    """llm.c's two settings (its GPU's, its CPU's) and shape B=4, T=64; to the 1e-5 that it asks of its float32. Its own ten
    losses are those of OpenAI's weights, which are a download."""
    data = hg.data.tokens(shards, seq_len=64, batch_tokens=256, overfit=True)
    model = hg.models.GPT2(vocab_size=97, max_seq_len=64, num_layers=3, num_heads=4, hidden_size=64)
    execution = hg.Execution(micro_batch=4, backend="cpu")
    run = hg.Trainer(
        model, hg.optim.AdamW(betas, 1e-8, decay, clip), data, precision=hg.Precision("f32"), execution=execution
    )
    torch_model = judge.GPT2(97, 64, 3, 4, 64, vocab_padded=len(run.params()["wte.weight"]))
    torch_model.load({name: w.copy() for name, w in run.params().items()})
    ours = [run.step(step, 1e-3).loss for step in range(1, 11)]
    batch = data.batch(0)
    settings = dict(betas=betas, eps=1e-8, weight_decay=decay, clip=clip or math.inf)
    theirs = judge.train_steps(torch_model, [(batch["ids"], batch["targets"])] * 10, lambda step: 1e-3, **settings)
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[-1] < ours[0] - 0.3


def test_p3_without_overfit_every_step_has_its_own_batch(shards):
    model = hg.models.GPT2(97, 16, 1, 2, 32)
    losses = {}
    for overfit in (False, True):
        data = hg.data.tokens(shards, seq_len=16, batch_tokens=64, overfit=overfit)
        run = hg.Trainer(
            model,
            hg.optim.AdamW(),
            data,
            precision=hg.Precision("f32"),
            execution=hg.Execution(micro_batch=2, backend="cpu"),
        )
        losses[overfit] = [run.step(step, 0.0).loss for step in (1, 2, 3)]
    assert len(set(losses[True])) == 1 and len(set(losses[False])) == 3 and losses[True][0] == losses[False][0]


# P4: sizes and flags --------------------------------------------------------------------------------------------------


def test_p4_t6_the_13b_works():
    """llm.c's aborts. Planned whole, and its block (40 heads of 128) trained."""
    model = hg.models.preset("gpt3:c5140")
    page = hg.explain(model, 2048, execution=hg.Execution(micro_batch=1), remedies=False)
    assert page.program.num_params == pytest.approx(12.85e9, rel=0.01)
    assert model.hidden_size == 40 * 128 == 128 * model.num_heads


def test_p4_from_llmc_is_made_from_the_code():
    made = script(ROOT / "docs" / "from_llmc.py").page()
    assert (ROOT / "docs" / "from-llmc.md").read_text() == made, "python docs/from_llmc.py"
    rows = dict(re.findall(r"^\| `(-\w+)` \| [^|]* \| ([^|]*) \|", made, re.M))
    assert list(rows) == LLMC and len(LLMC) == 37
    without = [flag for flag, ours in rows.items() if ours == "-"]
    assert without == ["-ge"]
    assert all(re.search(rf"^\| `{flag}` .*automatic", made, re.M) for flag in without)
    assert [f"T{n}" for n in range(1, 14)] == re.findall(r"^\| (T\d+) \|", made, re.M)


def test_p4_a_flag_that_does_not_exist_stops_the_page(monkeypatch):
    module = script(ROOT / "docs" / "from_llmc.py")
    monkeypatch.setattr(module, "FLAGS", [*module.FLAGS, ("-zz", "", "nonsense", "")])
    with pytest.raises(KeyError):
        module.page()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--train", "--train takes text"),
        ("--val", "--val takes text"),
        ("--preset d0", "a preset is tiny, gpt2,"),
        ("--out", "--out takes text"),
        ("--telemetry-every -1", "a number from 0 on"),
        ("--save-every -1", "a number from 0 on"),
        ("--keep-last -1", "a number from 0 on"),
        ("--save-every 10 --keep-every 15", "a multiple of --save-every 10"),
        ("--save-every 0 --keep-every 15", "a multiple of --save-every 0"),
        ("--resume", "takes text"),
        ("--micro-batch 0", "a number from 1 on"),
        ("--seq-len -1", "a number from 0 on"),
        ("--batch-tokens 100", "must be a multiple of seq_len"),
        ("--steps -1", "a number from 0 on"),
        ("--schedule steps", "one of cosine, linear, constant, wsd"),
        ("--lr fast", "takes a number"),
        ("--warmup -1", "a number from 0 on"),
        ("--final -1", "a number from 0 on"),
        ("--weight-decay -1", "weight_decay"),
        ("--skip-loss-z -1", "a number from 0 on"),
        ("--skip-grad-z nan", "a number from 0 on"),
        ("--val-every -1", "a number from 0 on"),
        ("--val-tokens -1", "a number from 0 on"),
        ("--sample-every -1", "a number from 0 on"),
        ("--sample-tokens -1", "a number from 0 on"),
        ("--hellaswag nowhere", "nowhere"),
        ("--overfit=1", "takes nothing"),
        ("--dtype fp16", "one of auto, f32, tf32, bf16"),
        ("--master-weights=1", "takes nothing"),
        ("--recompute 1", "one of none, act, act_norm, block"),
        ("-y 1", "after the verb come flags"),
        ("--telemetry-every 5 --backend cpu", "this run has none"),
    ],
)
def test_p4_every_flag_is_validated(tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_p4_llmcs_flags_in_handgrads_words_make_a_run(tmp_path, monkeypatch):
    """Its 124M recipe, flag by flag, at a toy's size: one pass, checkpoints kept and major, samples, validation."""
    monkeypatch.chdir(tmp_path)
    hg.data.write_shard("fineweb_train_000001.bin", [np.arange(600) % 97], hg.data.id_dtype(97))
    hg.data.write_shard("fineweb_val_000000.bin", [np.arange(200) % 97], hg.data.id_dtype(97))
    flags = (
        "--train fineweb_train_*.bin --val fineweb_val_*.bin --out log --preset d6 --num-layers 1 "
        "--hidden-size 12 --vocab-size 50257 --micro-batch 2 --seq-len 16 --batch-tokens 64 --recompute none "
        "--weight-decay 0.1 --lr 0.0006 --final 0.0 --warmup 2 --steps 0 --val-every 2 "
        "--val-tokens 64 --sample-every 4 --sample-tokens 3 --save-every 1 --keep-last 2 --keep-every 3 --threads 1"
    ).split()
    assert main(["train", *flags]) == 0
    steps = json.loads(Path("log/config.json").read_text())["run"]["steps"]
    assert steps == (600 // 16 - 1) // 4 == 9  # one pass: 36 windows, 4 a step
    assert sorted(path.name for path in Path("log").glob("step_*")) == [f"step_{n:06d}" for n in (3, 6, 8, 9)]
    assert Path("log/main.log").read_text().count(" tel:") == 5


# P5: precisions -------------------------------------------------------------------------------------------------------


def test_p5_bf16_with_master_weights_and_with_random_rounding_follow_float32(shards):
    data = hg.data.tokens(shards, seq_len=16, batch_tokens=128, overfit=True)
    model = hg.models.GPT2(vocab_size=97, max_seq_len=16, num_layers=2, num_heads=2, hidden_size=32)
    last, kinds = {}, {"f32": ("f32", True), "low halves": ("bf16", True), "random": ("bf16", False)}
    for name, (dtype, master) in kinds.items():
        kind = dict(execution=hg.Execution(4, backend="cpu"), precision=hg.Precision(dtype, master_weights=master))
        run = hg.Trainer(model, hg.optim.AdamW(), data, **kind)
        losses = [run.step(step, 3e-3).loss for step in range(1, 31)]
        last[name] = losses[-1]
        assert losses[-1] < losses[0] - 0.5
        if (
            name == "low halves"
        ):  # a weight is a float32: its half is a nearest bf16; of a tie, low bits -32768, the larger
            state = run._state()
            for key, high in run.params().items():
                whole = join_weight(np.array(high, np.float32), state[f"low.{key}"])
                nearest = whole.astype(high.dtype).astype(np.float32)
                assert np.array_equal(np.abs(whole - high.astype(np.float32)), np.abs(whole - nearest))
        else:
            assert not any(key.startswith("low.") for key in run._state())
    assert last["low halves"] == pytest.approx(last["f32"], rel=0.02)
    assert last["random"] == pytest.approx(last["f32"], rel=0.05)


# P8: AdamW, clipping, schedules, guards -------------------------------------------------------------------------------


def llmc_lr(kind, step, peak, warmup, steps, final):
    """llm.c's learning rates, whose steps count from 0."""
    if kind == "constant":
        return peak
    least = peak * final
    if kind == "wsd":
        if step < warmup:
            return peak * (step + 1) / warmup
        begin = int((1 - 0.2) * steps)
        if step < begin:
            return peak
        return least + (1 - math.sqrt((step - begin) / (steps - begin))) * (peak - least)
    if step < warmup:
        return peak * (step + 1) / warmup
    ratio = (step - warmup) / (steps - warmup)
    return least + (0.5 * (1 + math.cos(math.pi * ratio)) if kind == "cosine" else 1 - ratio) * (peak - least)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_p8_schedules_are_llmcs_step_for_step(kind, final):
    """The last step is one short of the end of the shape: it learns, also where the final rate is 0."""
    peak, warmup, steps = 6e-4, 0 if kind == "constant" else 7, 100
    lr = hg.schedules.schedule(kind, peak, warmup, steps, 1.0 if kind == "constant" else final)
    for step in range(1, steps + 1):
        assert lr(step) == pytest.approx(llmc_lr(kind, step - 1, peak, warmup, steps, final), rel=1e-12)
    assert lr(steps) > 0


def test_p8_matrices_decay_and_others_do_not(tiny, shards):
    data = hg.data.tokens(shards, seq_len=16, batch_tokens=64)
    weights = {}
    for decay in (0.0, 0.5):
        execution = hg.Execution(micro_batch=4, backend="cpu")
        run = hg.Trainer(
            tiny(), hg.optim.AdamW(weight_decay=decay), data, precision=hg.Precision("f32"), execution=execution
        )
        for info in run.params().values():
            info += 0.01
        run.step(1, 1e-2)
        weights[decay] = {name: w.copy() for name, w in run.params().items()}
    changed = {name for name, w in weights[0.0].items() if not np.array_equal(w, weights[0.5][name])}
    assert changed == {name for name, w in weights[0.0].items() if w.ndim == 2}


def test_p8_t9_spikes_and_what_is_not_finite_change_nothing(tiny, shards):
    """Also what llm.c lets through: a loss that is not finite."""
    data = hg.data.tokens(shards, seq_len=16, batch_tokens=64)
    execution = hg.Execution(micro_batch=4, backend="cpu", guard=hg.Guard(loss_z=3.0))
    run = hg.Trainer(tiny(), hg.optim.AdamW(), data, precision=hg.Precision("f32"), execution=execution)
    for step in range(1, WINDOW + 1):
        run.step(step, 0.0)
    kept = {name: w.copy() for name, w in run.params().items()}
    for spoilt in (10.0, np.inf):
        run.params()["ln_f.weight"][...] = spoilt
        before = {name: w.copy() for name, w in run.params().items()}
        with np.errstate(all="ignore"):
            result = run.step(run.last_step + 1, 1e-3)
        assert ("standard deviations" in result.skipped) == (spoilt == 10.0) and result.skipped
        assert all(np.array_equal(w, before[name], equal_nan=True) for name, w in run.params().items())
        run.params()["ln_f.weight"][...] = kept["ln_f.weight"]
    assert not run.step(run.last_step + 1, 1e-3).skipped


# P13: MFU -------------------------------------------------------------------------------------------------------------


def test_p13_mfu_is_llmcs_and_knows_the_cards_that_it_does_not():
    assert hg.models.gpt2("d12").flops_per_token(124_475_904, 1024) == 6 * 124_475_904 + 6 * 12 * 768 * 1024
    known = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA GeForce RTX 4090": 165.2,
    }
    assert {name: peaks(name).bf16 for name in known} == pytest.approx(known, rel=1e-3)
    for name in ("NVIDIA H200", "NVIDIA B200", "NVIDIA GeForce RTX 5090", "NVIDIA L4", "NVIDIA L40S", "NVIDIA A10"):
        assert peaks(name).bf16 > 100
    assert peaks("NVIDIA T9000") is None  # measured, never -100 %


# P15: tools that measure, and that fail when they should --------------------------------------------------------------


def test_p15_profile_and_bench(capsys):
    flags = "--micro-batch 1 --seq-len 16 --threads 1".split()
    assert main(["profile", "tiny", *flags]) == 0
    assert "lm_loss_forward_backward" in capsys.readouterr().out
    assert main(["ops", "bench", "global_norm", "--threads", "1"]) == 0
    assert re.search(r"global_norm +f32", capsys.readouterr().out)


def test_p15_t13_a_check_that_fails_is_an_exit_code(monkeypatch, capsys):
    assert main(["ops", "check", "add", "--threads", "1"]) == 0 and "FAILED" not in capsys.readouterr().out
    check = ops_verb.check_case

    def off(op, case, backend, dtype):
        """A kernel whose result is 1 % wrong: less than llm.c's 0.079 would notice."""
        alloc = backend.alloc

        def wrong(plan):
            arena = alloc(plan)
            fetch = arena.fetch
            arena.fetch = lambda tensor: (
                lambda: fetch(tensor)() * np.float32(1.01) if tensor.dtype.unit else fetch(tensor)()
            )
            return arena

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "alloc", wrong)
            return check(op, case, backend, dtype)

    monkeypatch.setattr(ops_verb, "check_case", off)
    assert main(["ops", "check", "add", "--threads", "1"]) == 1
    assert capsys.readouterr().out.count("FAILED") == 2
