"""The lm-evaluation-harness on a handgrad model (P9): its own task files, on local questions, give our numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from handgrad import data, evals, tokenizers
from handgrad.cli.__main__ import main

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'handgrad[harness]'")

GPT = tokenizers.gpt2()
T = 64
WORDS = "hay grass meat milk honey worms seeds cheese".split()
COUNT = 12
# ours, the harness's file that is included, the metrics that both have
TASKS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", ["acc", "acc_norm"]),
    "lambada": ("lambada/lambada_openai.yaml", ["acc", "perplexity"]),
    "piqa": ("piqa/piqa.yaml", ["acc", "acc_norm"]),
    "arc_easy": ("arc/arc_easy.yaml", ["acc", "acc_norm"]),
    "winogrande": ("winogrande/default.yaml", ["acc"]),
    "mmlu": ("mmlu/default/mmlu_anatomy.yaml", ["acc"]),
}


def rows(name):
    """Made-up questions in the form of the hub's tables."""
    rng = np.random.default_rng(list(TASKS).index(name))
    for i in range(COUNT):
        text = f"In the barn a girl fed the {rng.choice(['horse', 'cow', 'dog'])} number {i}"
        answers, label = rng.permutation(WORDS)[:4].tolist(), int(rng.integers(4))
        yield {
            "hellaswag": dict(
                activity_label="Feeding",
                ctx_a=text + ". It was  glad.",
                ctx_b="then they",
                label=str(label),
                endings=[f"ate {a} [title] and {'very ' * rng.integers(3)}[x] slept" for a in answers],
            ),
            "lambada": dict(text=f"{text} some {answers[0]}"),
            "piqa": dict(goal=text, sol1=answers[0], sol2=f"{answers[1]} and {answers[2]}", label=label % 2),
            "arc_easy": dict(
                question=text, choices=dict(text=answers, label=["1", "2", "3", "4"]), answerKey=str(label + 1)
            ),
            "winogrande": dict(
                sentence=f"{text} because _ liked {answers[0]} best.",
                option1="girl",
                option2="horse",
                answer=str(1 + label % 2),
            ),
            "mmlu": dict(question=text, choices=answers, answer=label, subject="anatomy"),
        }[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model after a few steps, the questions, and task files that are the harness's but for where questions lie."""
    folder = tmp_path_factory.mktemp("harness")
    ids = np.concatenate(
        [GPT.encode(f"{text} ") for name in TASKS for row in rows(name) for text in map(str, row.values())] * 8
    )
    data.write_shard(folder / "train_0.bin", [ids], data.id_dtype(GPT.vocab_size))
    sizes = f"--num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len {T} --micro-batch 2"
    steps = "--steps 60 --dtype f32 --threads 1 --lr 0.01 --warmup 5 --sample-tokens 0"
    assert main(f"train --train {folder}/train_0.bin --out {folder}/run {sizes} {steps}".split()) == 0
    (folder / "tasks").mkdir()
    for name, (file, _) in TASKS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
        splits = "\n".join(f"    {split}: {path}" for split in ("train", "validation", "test", "dev"))
        text = f"""include: {Path(lm_eval.__file__).parent / "tasks" / file}
task: own_{name}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
{splits}
training_split: null
"""
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """What the harness finds, by task; it goes through the model's three kinds of requests."""
    from lm_eval.tasks import TaskManager

    from handgrad.evals.harness import register

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = register()(run=str(folder / "run"), backend="cpu", threads=1)
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        names = [f"own_{name}" for name in TASKS]
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, cache_requests=False
        )
    return model, found


@pytest.mark.parametrize("name", TASKS)
def test_P9_the_harness_agrees(name, folder, theirs):
    model, found = theirs
    ours = evals.evaluate(
        name, evals.read_items(name, folder / f"{name}.jsonl", GPT), evals.load_scorer(folder / "run", threads=1).scorer
    )
    for metric in TASKS[name][1]:
        want = found["results"][f"own_{name}"][f"{metric},none"]
        assert ours[metric][0] == pytest.approx(want, rel=1e-5), (metric, ours, found["results"][f"own_{name}"])
    assert found["results"][f"own_{name}"]["sample_len"] == COUNT


@pytest.mark.parametrize("name", TASKS)
def test_P9_the_harness_words_questions_as_we_do(name, folder, theirs):
    """Context and continuation of every question, to the character."""
    asked = [
        tuple(arguments)
        for sample in sorted(theirs[1]["samples"][f"own_{name}"], key=lambda s: s["doc_id"])
        for arguments in sample["arguments"]
    ]
    ours = [pair for row in rows(name) for pair in evals.TASKS[name].question(row).pairs]
    assert ours == asked


def test_P9_texts_longer_than_the_model_and_generation(folder, theirs):
    """Perplexity of a text in windows; greedy generation up to a stop string."""
    from lm_eval.api.instance import Instance

    def requests(kind, *arguments):
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    model, scorer = theirs[0], evals.load_scorer(folder / "run", threads=1).scorer
    short, long = "In the barn a girl", " ".join(f"In the barn a girl fed the dog number {i}" for i in range(12))
    ids = GPT.encode(short)
    rolled = model.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)))
    assert rolled[0] == pytest.approx(-float(scorer.score([([50256], ids)])[0].losses.sum()), rel=1e-5)
    assert len(GPT.encode(long)) > T and rolled[1] < 2 * rolled[0] and math.isfinite(rolled[1])
    text, stopped, drawn = model.generate_until(
        requests(
            "generate_until",
            (short, {"until": [], "max_gen_toks": 8}),
            (short, {"until": ["number"], "max_gen_toks": 40}),
            (short, {"until": "zzz", "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}),
        )
    )
    assert "number" not in stopped and text and drawn != text
    assert model.loglikelihood(requests("loglikelihood", (short, text)))[0][1]  # what it writes is greedy


def test_P9_the_harness_command_line_finds_the_model():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "handgrad.evals.harness",
            "run",
            "--model",
            "handgrad",
            "--model_args",
            "run=nowhere",
            "--tasks",
            "hellaswag",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert "no 'nowhere'" in done.stderr, done.stderr
