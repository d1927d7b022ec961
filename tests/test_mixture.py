"""Mixtures: exact shares in every window, the same batches for any ranks, and settings that make none."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data import Masked, Mixture, id_dtype, tokens, write_shard
from handgrad.data.mixture import WINDOW
from handgrad.tokenizers import chars
from handgrad.train.report.read import read_run

SEQ_LEN, VOCAB = 2, 3000
FIRST = (0, 1000, 2000)  # the ids of each set begin here, so an id says its set


@pytest.fixture
def sets(tmp_path):
    """Three sets of 300, 40 and 110 sequences, in their own random order."""
    for name, first, count in zip("abc", FIRST, (300, 40, 110)):
        ids = first + np.arange(count * SEQ_LEN + 1 + SEQ_LEN) % 1000  # one window more, which shuffling leaves out
        write_shard(tmp_path / f"{name}.bin", [ids], id_dtype(VOCAB))
    return [tokens(tmp_path / f"{name}.bin", SEQ_LEN, 25 * SEQ_LEN, seed=3) for name in "abc"]


def which(batch):
    return batch["ids"][:, 0] // 1000


def test_shares_are_exact_in_every_window(sets):
    """Whatever the window of a thousand, and to one sequence in every part of it."""
    data = Mixture(sets, [5, 1.5, 3.5])
    found = np.concatenate([which(data.batch(step)) for step in range(3 * WINDOW // 25)])
    for start in (0, 1, 777, 2 * WINDOW):
        window = found[start : start + WINDOW]
        assert [int((window == k).sum()) for k in range(3)] == [500, 150, 350]
    for n in range(1, WINDOW):
        seen = np.bincount(found[:n], minlength=3)
        assert np.abs(seen - n * np.array([0.5, 0.15, 0.35])).max() <= 1
    assert np.allclose(data.epochs(3 * WINDOW), [1500 / 300, 450 / 40, 1050 / 110])


def test_every_set_keeps_its_own_order(sets):
    data = Mixture(sets, [2, 1, 1])
    batches = [data.batch(step) for step in range(100)]
    for k, own in enumerate(sets):
        seen = np.concatenate([b["ids"][which(b) == k] for b in batches])
        want = np.concatenate([own.batch(step)["ids"] for step in range(100)])[: len(seen)]
        assert len(seen) > 500 and np.array_equal(seen, want)


def test_ranks_and_micro_batches_divide_the_same_sequences(sets):
    data = Mixture(sets, [0.2, 0.5, 0.3])
    for step in (0, 41):
        whole = data.batch(step)
        parts = [
            data.batch(step, rank, 5, micro_batch=1, micro_step=k, names=("targets", "ids"))
            for k in range(5)
            for rank in range(5)
        ]
        for name in ("ids", "targets"):
            assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    again = Mixture(sets, [2, 5, 3])  # the sum does not matter, nor do earlier calls
    assert np.array_equal(again.batch(41)["ids"], data.batch(41)["ids"])


def test_a_sweep_covers_every_set(sets):
    data = Mixture(sets, [1, 1, 2])
    batches = list(data.sweep(7))
    counts = np.bincount(np.concatenate([which(b)[b["targets"][:, 0] >= 0] for b in batches]), minlength=3)
    assert counts.tolist() == [301, 41, 111]
    limited = list(data.sweep(4, 40 * SEQ_LEN, names=("ids", "targets")))
    counts = np.bincount(np.concatenate([which(b)[b["targets"][:, 0] >= 0] for b in limited]), minlength=3)
    assert counts.tolist() == [10, 10, 20]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "a mixture has one weight for each set, but got 2 for 3"),
        ([1, 0, 1], "the weights of a mixture are positive, but got 0"),
        ([1, -1, 1], "a weight is a number from 0 on, but got -1"),
        ([1, float("nan"), 1], "a weight is a"),
        ([1, 1e-5, 1], "every set of a mixture has at least one of 1000 sequences"),
    ],
)
def test_weights_that_make_no_mixture(sets, weights, message):
    with pytest.raises(HandgradError, match=message):
        Mixture(sets, weights)


def test_sets_that_differ_make_no_mixture(sets):
    other = tokens(sets[0].pattern, SEQ_LEN + 1, 25 * (SEQ_LEN + 1))
    with pytest.raises(HandgradError, match="the sets of a mixture have one seq_len, but got 2, 3"):
        Mixture([sets[0], other], [1, 1])
    masked = Masked(mask_id=2999, cls_id=2998, sep_id=2997, pad_id=2996, vocab_size=VOCAB)
    read = [tokens(data.pattern, 8, 200, objective=masked) for data in sets]
    with pytest.raises(HandgradError, match="next tokens or spans"):
        Mixture(read, [1, 1, 1])


def test_a_trainer_takes_a_mixture_and_resumes_to_the_same_bits(sets, tmp_path):
    def run(out):
        model = hg.models.GPT2(vocab_size=VOCAB, max_seq_len=SEQ_LEN, num_layers=1, num_heads=1, hidden_size=8)
        execution = hg.Execution(5, backend="cpu", threads=1)
        data = Mixture(sets, [1, 2, 1])
        return hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, out=tmp_path / out)

    whole, part = run("whole"), run("part")
    want = [whole.step(step, 1e-3).loss for step in range(1, 7)]
    got = [part.step(step, 1e-3).loss for step in range(1, 4)]
    part.save(3)
    part.close()
    again = run("part")
    assert again.resume() == 3
    got += [again.step(step, 1e-3).loss for step in range(4, 7)]
    assert got == want


# the verbs --------------------------------------------------------------------------------------------------------------

FLAGS = (
    "--num-layers 1 --num-heads 1 --hidden-size 8 --max-seq-len 8 --seq-len 8 --micro-batch 4 --threads 1 --dtype f32"
    " --sample-tokens 0 --val-every 2 --val-tokens 64 --steps 4 --warmup 0"
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of texts with one tokenizer and their own validation split, of other letters."""
    monkeypatch.chdir(tmp_path)
    tokenizer = chars("abcdefgh\n")
    for name, letters in (("one", "abcd\n"), ("two", "efgh\n")):
        text = "".join(np.random.default_rng(2).choice(list(letters), 3_000).tolist())
        (tmp_path / f"{name}.txt").write_text(text)
        hg.data.prepare_text([tmp_path / f"{name}.txt"], name, tokenizer)


def test_train_mixes_folders_and_says_so(folders, capsys):
    assert main(["train", *FLAGS.split(), "--train", "one,two", "--mix", "3,1", "--out", "run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "75.0 % one (336 sequences), 25.0 % two (336 sequences)" in out
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert any("epochs of each set in 4 steps: one 0.04, two 0.01" in line.get("event", "") for line in log), log
    assert [line["val_loss"] for line in log if line.get("val_loss")]  # of both sets
    assert main(["eval", "run", "--threads", "1"]) == 2
    assert "val of 'run' is one set, but got a mixture of 2. hint: one of them: --tasks val=" in capsys.readouterr().err


def test_a_mixed_run_resumes_to_the_same_bits(folders):
    for out, last in (("whole", (4,)), ("part", (2, 4))):
        for steps in last:
            flags = [*FLAGS.split(), "--schedule", "constant", "--steps", str(steps), "--out", out, "--resume", "auto"]
            assert main(["train", *flags, "--train", "one,two", "--mix", "3,1"]) == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        assert Path("whole/step_000004", name).read_bytes() == Path("part/step_000004", name).read_bytes()


def table(run):
    """The rows of a report's table of sets."""
    found = re.search(r"<h2>Mixture</h2>.*?</table>", Path(run, "report.html").read_text())
    rows = re.findall(r"<tr>(<th.*?)</tr>", found[0])
    return [re.findall(r">([^<]+)<", row) for row in rows]


def test_the_report_says_how_often_each_set_was_read(folders):
    """Of 12 steps of 4 sequences; a resumed run that doubles its batch goes on from there, and so does the count."""
    flags = f"train {FLAGS.replace('--steps 4', '')} --schedule constant --train one,two --mix 3,1 --out run".split()
    assert main([*flags, "--steps", "12"]) == 0
    one, two = (sum(shard.count for shard in tokens(name, 8, 8).shards) for name in ("one", "two"))
    windows = tokens("one", 8, 8).windows
    want = [[name, share, f"{ids:,}"] for name, share, ids in (("one", "75.0 %", one), ("two", "25.0 %", two))]
    assert [row[:3] for row in table("run")] == want
    assert [row[3] for row in table("run")] == [f"{36 / windows:.2f}", f"{12 / windows:.2f}"]
    assert main([*flags, "--steps", "20", "--batch-tokens", "64", "--resume", "auto"]) == 0
    assert [row[3] for row in table("run")] == [f"{(36 + 48) / windows:.2f}", f"{(12 + 16) / windows:.2f}"]


def test_a_trainer_in_python_logs_its_sets_too(sets, tmp_path):
    model = hg.models.GPT2(vocab_size=VOCAB, max_seq_len=SEQ_LEN, num_layers=1, num_heads=1, hidden_size=8)
    execution = hg.Execution(5, backend="cpu", threads=1)
    run = hg.Trainer(model, hg.optim.AdamW(), Mixture(sets, [1, 2, 1]), execution=execution, out=tmp_path / "run")
    for step in (1, 2):
        run.step(step, 1e-3)
    run.save(2)
    run.close()
    found = read_run(tmp_path / "run").sets()
    assert [one[1] for one in found] == [0.25, 0.5, 0.25]
    assert [one[3] for one in found] == pytest.approx([12.5 / 300, 25 / 40, 12.5 / 110])


@pytest.mark.parametrize("mix", ["3", "1,2,3", "1,x", "0,1"])
def test_bad_mix_on_the_command_line(folders, mix, capsys):
    assert main(["train", *FLAGS.split(), "--train", "one,two", "--mix", mix, "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("[data] ") and ("--mix" in err or "weights" in err) and err.count("\n") == 1
    assert main(["train", *FLAGS.split(), "--train", "one", "--mix", "1", "--out", "run"]) == 2
