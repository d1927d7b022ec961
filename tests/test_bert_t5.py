"""docs/bert-t5.md, executed as it stands, and what the verbs say to a family that they do not take."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from handgrad import models
from handgrad.cli.__main__ import main
from handgrad.infer.load import open_source

PAGE = (Path(__file__).parents[1] / "docs" / "bert-t5.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
MISTAKES = [  # a command in the folder of the page, what it says
    (
        "generate bert --prompt a",
        r"\[generate\] a bert continues no texts, .* hint: handgrad embed and handgrad classify",
    ),
    ("chat t5", r"\[chat\] a t5 continues no texts, .* hint: handgrad generate writes about a prompt"),
    ("data chat texts.txt --model t5 --template chatml", r"\[chat\] a t5 continues no texts"),
    ("classify gpt texts.txt", r"\[model\] a bert reads whole texts, but got a gpt2. hint: handgrad generate"),
    ("convert bert out.gguf", r"\[convert\] a .gguf holds a gemma or a gpt2 or a llama, but got a bert. hint: --to hf"),
    ("convert t5 out.gguf", r"\[convert\] a .gguf holds a gemma or a gpt2 or a llama, but got a t5. hint: --to hf"),
    (
        "train --init t5 --train book --seq-len 9",
        r"sources of 64 tokens have targets of seq_len 14, but got 9. hint: leave",
    ),
    (
        "train --init bert --train gptdata",
        r"but got b'\S+ of the data's chars .* hint: handgrad data text FILE... --tokenizer bert --out gptdata --replace",
    ),
    (
        "train --init bert --train long",
        r"reads at most 64 tokens, but got labelled texts of up to 65. hint: .* --seq-len 64",
    ),
    (
        "train --init classifier --train book",
        r"have the labels of .*, but got none. hint: start from a model without labels",
    ),
    ("profile classifier", r"\[profile\] a step of masked tokens, spans or next tokens is timed, but got a classifier"),
    ("explain nowhere/run", r"\[model\] a model is a run folder, .* but got no 'nowhere/run'"),
    ("explain t5 --family llama", r"--family is of a preset; 't5' is a t5, but got llama"),
    ("train --family mistral", r"a family is one of .* but got 'mistral'. hint: mistral is of the family llama"),
    ("train --family qwen", r"but got 'qwen'. hint: qwen2 is of the family llama"),
    ("train --family neox", r"but got 'neox'. hint: did you mean gpt_neox\?"),
    (
        "train --preset qwen3-0.6b --num-heads 2",
        r"num_kv_heads divides the 2 heads, but got 8. hint: give num_kv_heads",
    ),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder in which the page has been executed; what its commands printed is in said.json."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert [kind for kind, _ in BLOCKS] == ["python", "sh", "sh"]
        exec(compile(BLOCKS[0][1], "bert-t5.md", "exec"), {})
        for _, text in BLOCKS[1:]:
            for line in text.splitlines():
                verb, *words = shlex.split(line)
                assert verb == "handgrad" and main(words) == 0, line
        more = [
            "data text book.txt --tokenizer chars --out gptdata",
            "data labels reviews.jsonl --tokenizer bert --seq-len 65 --out long",
            "train --train gptdata --depth 1 --max-seq-len 16 --steps 1 --micro-batch 1 --sample-tokens 0 --out gpt",
        ]
        for line in more:
            assert main(line.split()) == 0, line
    return folder


def test_the_page_does_what_it_says(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    assert main("classify classifier texts.txt".split()) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["good", "bad"]
    assert open_source("bert").model.vocab_size == 512  # the special tokens are the tokenizer's
    assert open_source("t5").model.vocab_size == 512 + 100 + 2


@pytest.mark.parametrize("command, said", MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_with_a_way_out(here, command, said, monkeypatch, capsys):
    monkeypatch.chdir(here)
    assert main([*command.split(), *(["--out", "never"] if command.startswith("train") else [])]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1, error
    assert not Path("never").exists()


@pytest.mark.parametrize("run", ["gpt", "bert", "t5", "classifier"])
def test_explain_takes_the_sizes_of_a_model_on_disk(here, run, monkeypatch, capsys):
    monkeypatch.chdir(here)
    model = open_source(run).model
    count = sum(math.prod(shape) for shape in models.shapes(models.declare(model)).values())
    assert main(["convert", run, f"{run}-hf"]) == 0
    capsys.readouterr()
    for path in (run, f"{run}-hf"):
        assert main(["explain", path, "--micro-batch", "1", "--backend", "cpu"]) == 0
        out = capsys.readouterr().out
        assert f"1 micro-batch of 1 x {model.usual_seq_len} tokens" in out
        assert re.search(rf"^parameters +{count:,},? ", out, re.MULTILINE)


def test_a_preset_goes_before_a_folder_of_its_name(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    Path("d1").mkdir(exist_ok=True)
    assert main("explain d1 --micro-batch 1 --seq-len 16 --backend cpu".split()) == 0
    assert main("profile ./gpt --micro-batch 1 --steps 1 --backend cpu --threads 1".split()) == 0


@pytest.mark.parametrize("model", ["gpt", "gpt/step_000001", "bert/step_000020"])
def test_data_takes_the_tokenizer_of_a_model(here, model, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    assert main(["data", "text", "book.txt", "--tokenizer", model, "--out", str(tmp_path / "data")]) == 0
    flags = "--steps 1 --micro-batch 1 --sample-tokens 0 --seq-len 16".split()
    assert (
        main(["train", "--init", model, "--train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *flags]) == 0
    )


def test_convert_says_what_it_wrote(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    for to, said in (("hf", "a Hugging Face folder"), ("handgrad", "a run folder")):
        assert main(["convert", "bert", f"said-{to}", "--to", to]) == 0
        assert f"said-{to}, {said}: " in capsys.readouterr().out
