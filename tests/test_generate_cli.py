"""handgrad generate: what the flags do, and one line for whatever is wrong with a checkpoint or a prompt."""

import inspect
import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.cli.generate import Generate

LINE = "the quick brown fox jumps over a lazy dog.\n"  # 43 letters: the model sees it begin everywhere
TEXT = LINE * 200
TINY = (
    "--num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len 32 --micro-batch 4 "
    "--threads 1 --steps 150 --dtype f32 --lr 0.01 --warmup 10 --save-every 75"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has read one line again and again."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "line.txt").write_text(TEXT)
    words = f"data text {folder}/line.txt --out {folder}/data --tokenizer chars".split()
    assert main(words) == 0
    assert main(["train", "--train", f"{folder}/data", "--out", f"{folder}/run", *TINY]) == 0
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def says(run, capsys):
    """A function that generates from the run and returns what is printed."""

    def generate(*flags, at=run):
        assert main(["generate", str(at), "--threads", "1", "--max-tokens", "30", *flags]) == 0
        out, err = capsys.readouterr()
        assert not err
        return out

    return generate


@pytest.fixture
def told(capsys):
    """A function that generates, which must fail; returns its one line of error."""

    def generate(at, *flags):
        capsys.readouterr()
        assert main(["generate", str(at), "--threads", "1", *flags]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("[") and err.count("\n") == 1, out + err
        return err.strip()

    return generate


# what the flags do ----------------------------------------------------------------------------------------------------


def test_greedy_continues_the_prompt(says):
    text = says("--prompt", "the quick b", "--temperature", "0")
    assert text == LINE[:41] + "\n"


def test_seeds(says):
    one, again, two = (says("--temperature", "2", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == again != two


def test_top_k_and_top_p_at_their_narrowest_are_greedy(says):
    greedy = says("--temperature", "0", "--prompt", "the")
    assert says("--top-k", "1", "--prompt", "the") == greedy
    assert says("--top-p", "1e-9", "--prompt", "the") == greedy


def test_stop_strings_are_not_printed(says):
    assert says("--temperature", "0", "--prompt", "the quick", "--stop", "over", "fox") == "the quick brown \n"
    assert says("--temperature", "0", "--prompt", "the quick", "--stop", "never").startswith("the quick brown fox")


def test_generate_past_max_seq_len(says):
    """The window moves on: 200 tokens from a model of 32, after a prompt of 80."""
    text = says("--temperature", "0", "--prompt", TEXT[:80], "--max-tokens", "200")
    assert text.startswith(TEXT[:80]) and len(text) == 80 + 200 + 1


def test_a_checkpoint_and_other_dtypes_and_backends(says, run):
    flags = ("--temperature", "0", "--prompt", "the ")
    text = says(*flags)
    assert says(*flags, at=run / "step_000150") == text
    assert says(*flags, "--backend", "ref") == text
    assert says(*flags, "--dtype", "bf16").startswith("the ")
    assert says(*flags, at=run / "step_000075").startswith("the ")


def test_a_prompt_from_standard_input(says, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the fox\n")))
    assert says("--prompt", "-").startswith("the fox\n")


def test_streaming(run):
    """The first characters are there while the last are still to come."""
    command = [sys.executable, "-m", "handgrad.cli", "generate", str(run), "--threads", "1", "--max-tokens", "20000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert len(process.stdout.read(10)) == 10
        first = time.perf_counter()
        assert process.poll() is None
        rest = process.stdout.read()
        assert len(rest) > 10_000 and time.perf_counter() - first > 0.05
    assert process.returncode == 0


# handgrad.load --------------------------------------------------------------------------------------------------------


def test_load_generates_what_the_command_line_prints(run, says):
    loaded = hg.load(run, threads=1)
    for flags, settings in (
        (["--prompt", "the "], {}),
        (["--prompt", "the ", "--seed", "3", "--top-k", "5"], {"seed": 3, "top_k": 5}),
        (["--prompt", "the ", "--temperature", "2", "--top-p", "0.9"], {"temperature": 2.0, "top_p": 0.9}),
        (["--prompt", "the ", "--temperature", "0", "--stop", "fox"], {"temperature": 0.0, "stop": ["fox"]}),
    ):
        assert says(*flags) == "the " + loaded.generate("the ", max_tokens=30, **settings) + "\n"
        assert loaded.generate("the ", 30, **settings) == "".join(loaded.stream("the ", 30, **settings))
    assert says() == "\n" + loaded.generate(max_tokens=30) + "\n"
    assert loaded.generate("the quick", temperature=0, stop="over", max_tokens=99) == " brown fox jumps "


def test_the_defaults_are_in_one_place(run):
    loaded = hg.load(run, threads=1)
    for how in (loaded.generate, loaded.stream):
        defaults = {name: p.default for name, p in inspect.signature(how).parameters.items()}
        own = {f.name: f.default for f in fields(Generate)}
        assert {name: own[name] for name in defaults} == defaults
    assert asdict(hg.Sampling()) == {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert len(loaded.generate("the ")) == 256


def test_what_load_returns(run):
    loaded = hg.load(run / "step_000150", dtype="bf16", backend="ref")
    assert loaded.model.hidden_size == 32 and loaded.tokenizer.vocab_size == 29
    assert repr(loaded).startswith("Loaded(GPT2(vocab_size=29, ") and repr(loaded).endswith("chars of 29 tokens)")
    assert next(loaded.stream("the ")) in LINE


@pytest.mark.parametrize("to", ["model.bin", "folder"])
def test_load_takes_what_the_command_line_takes(run, tmp_path, to):
    assert main(["convert", str(run), str(tmp_path / to)]) == 0
    found = hg.load(tmp_path / to, threads=1).generate("the quick b", 30, temperature=0)
    assert found == hg.load(run, threads=1).generate("the quick b", 30, temperature=0) == LINE[11:41]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"prompt": ""}, "[generate] a prompt holds at least one character, but got an empty one."),
        ({"prompt": "é"}, "[tokenizer] the text must be spelled with the 29 characters"),
        ({"max_tokens": 0}, "[generate] max_tokens is at least 1, but got 0."),
        ({"temperature": -1}, "[sample] temperature must be"),
        ({"stop": [""]}, "[sample] a stop string must hold at least one character"),
    ],
)
def test_load_refuses_values_at_once(run, given, part):
    loaded = hg.load(run, threads=1)
    with pytest.raises(hg.HandgradError) as error:
        loaded.stream(**given)
    assert str(error.value).startswith(part)
    with pytest.raises(hg.HandgradError, match="no 'none'"):
        hg.load("none")


# vocabularies and prompts that do not fit -----------------------------------------------------------------------------

SHORT = "--num-layers 1 --hidden-size 16 --num-heads 1 --seq-len 16 --micro-batch 2 --threads 1"


@pytest.fixture
def digits(tmp_path):
    """Data of twelve characters, none of them a line break."""
    (tmp_path / "digits.txt").write_text("0123456789 a" * 200)
    assert main(f"data text {tmp_path}/digits.txt --out {tmp_path}/data --tokenizer chars --workers 1".split()) == 0
    return tmp_path / "data"


def test_a_run_samples_tokens_of_its_tokenizer_alone(digits, tmp_path, capsys):
    """A model of 128 rows, fresh and thus without an opinion, samples twelve characters."""
    flags = f"{SHORT} --steps 4 --sample-every 1 --lr 1e-9 --vocab-size 128".split()
    assert main(["train", "--train", str(digits), "--out", str(tmp_path / "run"), *flags]) == 0
    text = (tmp_path / "run" / "sample.txt").read_text()[:-1]
    assert len(text) == 257 and set(text) <= set("0123456789 a") and len(set(text)) > 6
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--threads", "1", "--temperature", "3"]) == 0
    assert set(capsys.readouterr().out) <= set("\n0123456789 a")
    # and it resumes, although its prompt is no line break
    flags = f"--resume {tmp_path}/run --steps 5".split()
    assert main(["train", "--train", str(digits), *flags]) == 0


def test_a_given_prompt_that_cannot_be_spelled_is_refused_before_training(digits, tmp_path, capsys):
    for flag, value in (("--prompt", "\n"), ("--prompt", "b")):
        words = ["train", "--train", str(digits), "--out", str(tmp_path / "run"), *SHORT.split(), flag, value]
        assert main(words) == 2
        assert "is spelled with the data's characters" in capsys.readouterr().err and not (tmp_path / "run").exists()


# prompts and flags out of range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--prompt", ""], "[generate] a prompt holds at least one character, but got an empty one."),
        (["--max-tokens", "0"], "[generate] --max-tokens is at least 1, but got 0."),
        (["--temperature", "-1"], "[sample] temperature must be 0 (greedy) or a positive number, but got -1.0."),
        (["--temperature", "nan"], "[sample] temperature must be 0 (greedy) or a positive number, but got nan."),
        (["--top-k", "-1"], "[sample] top_k must be 0 (all tokens) or more, but got -1."),
        (["--top-p", "0"], "[sample] top_p must lie above 0 and at most at 1 (all tokens), but got 0.0."),
        (["--seed", "-1"], "[sample] seed must be 0 or more, but got -1."),
        (["--stop", ""], "[sample] a stop string must hold at least one character, but got an empty one."),
        (
            ["--dtype", "f16"],
            "[generate] --dtype takes one of saved, f32, bf16, but got 'f16'. hint: did you mean bf16?",
        ),
    ],
)
def test_flags_out_of_range(run, told, flags, line):
    assert told(run, *flags) == line


def test_characters_outside_the_vocabulary(run, told):
    line = told(run, "--prompt", "foxé")
    assert line.startswith("[tokenizer] the text must be spelled with the 29 characters of the training text")
    assert "but got 'é' at character 3." in line


def test_standard_input_that_is_empty(run, told, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "but got an empty one" in told(run, "--prompt", "-")


# damaged run folders --------------------------------------------------------------------------------------------------


def test_folders_without_a_run_are_refused(told, tmp_path):
    rule = "[model] a model is a run folder, one of its checkpoints, a .bin of llm.c, a .gguf, a Hugging Face folder or hf:NAME"
    assert told("none") == f"{rule}, but got no 'none'. hint: handgrad train makes one"
    assert told(tmp_path) == f"{rule}, but got '{tmp_path}', which holds no complete checkpoint."


def test_a_checkpoint_without_done(copy, told, says):
    (copy / "step_000150" / "DONE").unlink()
    assert "must be complete, but got no file DONE in it." in told(copy / "step_000150")
    assert says(at=copy)  # the one before it
    (copy / "step_000075" / "DONE").unlink()
    assert "which holds no complete checkpoint." in told(copy)


def change(copy, do):
    """Rewrites the newest checkpoint's tensors."""
    path = copy / "step_000150" / "model.safetensors"
    tensors = load_file(path)
    do(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("do", "part"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.weight"), "must hold the tensor 'h.1.mlp.c_fc.weight', but got no such."),
        (lambda t: t.update({"h.2.ln_1.weight": np.zeros(32, np.float32)}), "but got also 'h.2.ln_1.weight'."),
        (
            lambda t: t.update({"wte.weight": np.zeros((128, 31), np.float32)}),
            "must be float32 (128, 32), but got float32 (128, 31).",
        ),
        (
            lambda t: t.update({"wpe.weight": t["wpe.weight"].astype(np.float64)}),
            "must be float32 (32, 32), but got float64 (32, 32).",
        ),
    ],
)
def test_invalid_tensors_are_refused(copy, told, do, part):
    change(copy, do)
    line = told(copy)
    assert line.startswith("[checkpoint] ") and part in line


def test_nan_weights_are_refused(copy, capsys):
    change(copy, lambda tensors: tensors["wte.weight"].fill(np.nan))
    capsys.readouterr()
    assert main(["generate", str(copy), "--threads", "1"]) == 2
    assert "the weights are damaged or the training run diverged" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["empty", "truncated", "header", "noise", "missing"])
def test_damaged_safetensors_are_refused(copy, told, how):
    path = copy / "step_000150" / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    if how != "missing":
        new = {"empty": b"", "truncated": raw[:-100], "header": b"\xff" * 8 + raw[8:], "noise": raw[:20] + raw[40:]}
        path.write_bytes(new[how])
    line = told(copy)
    assert "model.safetensors must be a whole safetensors file, but got " in line or "which is missing" in line


@pytest.mark.parametrize(
    ("do", "part"),
    [
        (lambda saved: saved["model"].pop("num_heads"), "run.json gives "),
        (lambda saved: saved["model"].update(color=1), "but got 'color'."),
        (
            lambda saved: saved["model"].update(num_heads="2"),
            "run.json gives a model whose num_heads is a whole number, but got '2'.",
        ),
        (
            lambda saved: saved["model"].update(num_layers=10**9),
            "num_layers is at most 1,024, but got 1",
        ),
        (lambda saved: saved["model"].update(dropout=float("nan")), "dropout lies in [0, 1), but got nan"),
        (lambda saved: saved["model"].update(tie_embeddings=1), "tie_embeddings is true or false, but got 1."),
        (lambda saved: saved.update(family="gpt9"), "t5, but got 'gpt9'."),
        (lambda saved: saved.update(family=None), "t5, but got None."),
        (lambda saved: saved["model"].update(num_heads=3), "hidden_size is a multiple of num_heads"),
        (lambda saved: saved.update(dtype="f16"), "run.json gives a dtype of bf16, f32, but got 'f16'."),
        (lambda saved: saved.pop("model"), "must hold 'model' of type dict"),
    ],
)
def test_damaged_run_json_is_refused(copy, told, do, part):
    path = copy / "step_000150" / "run.json"
    saved = json.loads(path.read_text())
    do(saved)
    path.write_text(json.dumps(saved))
    assert part in told(copy)


def test_missing_and_damaged_tokenizers_are_refused(copy, told):
    path = copy / "tokenizer-spec.json"
    path.write_text("{")
    assert "tokenizer-spec.json must be JSON" in told(copy)
    path.write_text('{"kind": "words"}')
    assert "a tokenizer's kind must be" in told(copy)
    path.unlink()
    assert "tokenizer-spec.json says how text becomes tokens, but got no such file." in told(copy / "step_000150")
