"""Evaluation (P9): losses of continuations against transformers one by one, every task's metrics by a second way,
every form that a benchmark's file comes in, and one line for whatever is wrong with one."""

import gzip
import json
import lzma
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from handgrad import evals, tokenizers
from handgrad.backends import open_backend
from handgrad.cli.__main__ import main
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.data import prepare_questions
from handgrad.data.choices import Choices, write_choices
from handgrad.evals import scoring
from handgrad.evals.metrics import choices
from handgrad.evals.tasks import encode_pair
from handgrad.models import GPT2, declare
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[2] / "shared" / "data"
GPT = tokenizers.gpt2()
T = 44  # what the model reads: less than some questions have
ANIMALS = dict(
    zip("horse cow dog cat bear fish bird mouse".split(), "hay grass meat milk honey worms seeds cheese".split())
)
PLACES, PEOPLE = "barn field garden forest".split(), "farmer girl boy woman soldier".split()


def sentence(rng, liar=0.0):
    """(all but the last word, the last word) of a sentence about an animal and what it eats, or now and then a lie."""
    animal = rng.choice(list(ANIMALS))
    food = rng.choice(list(ANIMALS.values())) if rng.random() < liar else ANIMALS[animal]
    return f"In the {rng.choice(PLACES)} a {rng.choice(PEOPLE)} fed the {animal}", food


def story(rng, liar=0.0, before=2):
    sentences = [" ".join(sentence(rng)) + "." for _ in range(before)]
    last, word = sentence(rng, liar)
    return " ".join([*sentences, last]), word


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run (run/) that has learnt what animals eat, and a folder of tasks (tasks/) about it, all made up."""
    folder, rng = tmp_path_factory.mktemp("evals"), random.Random(0)
    (folder / "text.txt").write_text(
        "\n".join(" ".join(" ".join(sentence(rng)) + "." for _ in range(4)) for _ in range(600))
    )
    assert main(f"data text {folder}/text.txt --out {folder}/shards".split()) == 0
    sizes = f"--num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len {T} --micro-batch 4"
    steps = "--steps 240 --dtype f32 --threads 1 --lr 0.01 --warmup 10 --sample-tokens 0 --val-tokens 0"
    assert main(f"train --train {folder}/shards --out {folder}/run {sizes} {steps}".split()) == 0
    write_tasks(folder / "tasks")
    return folder


def write_tasks(out, count=24):
    """A file of every task, in the form that its makers or the hub give it."""
    rng = random.Random(1)
    out.mkdir()
    rows = {
        name: []
        for name in (
            "hellaswag_val",
            "lambada_test",
            "piqa_val",
            "arc_easy_test",
            "arc_challenge_test",
            "winogrande_val",
            "mmlu_test",
        )
    }
    for _ in range(count):
        text, word = story(rng)
        label, wrong = rng.randrange(4), rng.sample([f for f in ANIMALS.values() if f != word], 3)
        answers = [*wrong[:label], word, *wrong[label:]]
        if rng.random() < 0.4:  # a question that nobody can answer
            label = (label + 1) % 4
        halves = text.rpartition(". ")
        endings = [f"{a}.  [title] It was {'very ' * rng.randrange(4)}glad [step] of it." for a in answers]
        rows["hellaswag_val"].append(
            dict(
                activity_label="Feeding animals",
                ctx_a=halves[0] + ".",
                ctx_b=halves[2].lower(),
                ctx=text,
                endings=endings,
                label=str(label),
            )
        )
        rows["lambada_test"].append(dict(text=" ".join(story(rng, liar=0.5))))
        pair = answers[label], answers[label - 1]
        rows["piqa_val"].append(dict(goal=text, sol1=pair[label % 2], sol2=pair[1 - label % 2], label=label % 2))
        for name in ("arc_easy_test", "arc_challenge_test"):
            rows[name].append(
                dict(question=text, choices=dict(text=answers, label=list("ABCD")), answerKey="ABCD"[label])
            )
        rows["winogrande_val"].append(
            dict(
                sentence=f"The _ ate the {word}. It likes {word}",
                option1="horse",
                option2="cow",
                answer=str(1 + label % 2),
            )
        )
        rows["mmlu_test"].append(dict(question=f" {text}", choices=answers, answer=label, subject="animal_food"))
    for name, lines in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return rows


@pytest.fixture(scope="module")
def model(folder):
    return evals.load_scorer(folder / "run", backend="cpu", threads=1)


@pytest.fixture(scope="module")
def judge(folder):
    """The exported model in transformers, with the tokenizer that came along."""
    assert main(f"convert {folder}/run {folder}/hf".split()) == 0
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").eval()
    theirs.tokens = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    return theirs


# the second way: transformers, a pair at a time, and the rules written down once more ---------------------------------


@torch.no_grad()
def asked(judge, context, continuation):
    """(log-probability, tokens, greedy) of a continuation."""
    whole = judge.tokens.encode(context + continuation)
    n, ids = len(whole) - len(judge.tokens.encode(context)), torch.tensor(whole[-T - 1 :])
    logp = judge(ids[None, :-1]).logits[0, -n:].double().log_softmax(-1)
    return float(logp[range(n), ids[-n:]].sum()), n, bool((logp.argmax(-1) == ids[-n:]).all())


def chosen(judge, context, answers):
    """The choices by acc, acc_norm and acc_llmc."""
    found = [asked(judge, context, " " + answer) for answer in answers]
    sums = [logp for logp, _, _ in found]
    return (
        int(np.argmax(sums)),
        int(np.argmax([s / len(a) for s, a in zip(sums, answers)])),
        int(np.argmax([logp / n for logp, n, _ in found])),
    )


def prompts(name, row):
    """(context, answers, label) of a row, as the harness's own files word them."""
    if name == "hellaswag":
        clean = lambda s: re.sub(r"\[.*?\]", "", s.strip().replace(" [title]", ". ")).replace("  ", " ")  # noqa: E731
        return (
            clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            [clean(e) for e in row["endings"]],
            int(row["label"]),
        )
    if name == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    if name.startswith("arc"):
        return f"Question: {row['question']}\nAnswer:", row["choices"]["text"], "ABCD".index(row["answerKey"])
    lines = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row["choices"]))
    subject = "The following are multiple choice questions (with answers) about animal food.\n\n"
    return f"{subject}{row['question'].strip()}{lines}\nAnswer:", list("ABCD"), row["answer"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["hellaswag", "piqa", "arc_easy", "arc_challenge", "mmlu"])
def test_P9_choices_equal_transformers_task_by_task(name, folder, model, judge):
    path = evals.find(name, folder / "tasks")
    items = evals.read_items(name, path, GPT)
    scores = model.scorer.score([pair for item in items for pair in item.pairs])
    want = [prompts(name, row) for row in rows_of(path)]
    theirs = np.array([chosen(judge, context, answers) for context, answers, _ in want])
    ours = choices(items, scores)
    for column, rule in enumerate(("acc", "acc_norm", "acc_llmc")):
        assert ours[rule].tolist() == theirs[:, column].tolist(), rule
    right = (theirs == np.array([label for *_, label in want])[:, None]).mean(axis=0)
    found = evals.evaluate(name, items, model.scorer)
    assert [value for value, _ in found.values()] == pytest.approx(right.tolist())
    print(name, {rule: f"{value:.3f} +- {error:.3f}" for rule, (value, error) in found.items()})
    if name == "hellaswag":  # the model has learnt something, and some questions are unfair
        assert 0.3 < right.max() < 1


def test_P9_winogrande_scores_what_follows_the_gap(folder, model, judge):
    path = evals.find("winogrande", folder / "tasks")
    right = []
    for row in rows_of(path):
        before, after = row["sentence"].split("_")
        found = [asked(judge, before + row[f"option{i}"], " " + after.strip())[0] for i in (1, 2)]
        right.append(str(1 + int(np.argmax(found))) == row["answer"])
    found = evals.evaluate("winogrande", evals.read_items("winogrande", path, GPT), model.scorer)
    assert set(found) == {"acc", "acc_llmc"} and found["acc"][0] == np.mean(right)


def test_P9_lambada_equals_transformers_word_by_word(folder, model, judge):
    path = evals.find("lambada", folder / "tasks")
    found = [
        asked(judge, row["text"].rpartition(" ")[0], " " + row["text"].rpartition(" ")[2]) for row in rows_of(path)
    ]
    acc, perplexity = np.mean([greedy for *_, greedy in found]), math.exp(-np.mean([logp for logp, *_ in found]))
    ours = evals.evaluate("lambada", evals.read_items("lambada", path, GPT), model.scorer)
    assert 0.2 < acc < 0.9 and ours["acc"][0] == acc
    assert ours["perplexity"][0] == pytest.approx(perplexity, rel=1e-4)
    spread = np.std([greedy for *_, greedy in found], ddof=1) / len(found) ** 0.5
    assert ours["acc"][1] == pytest.approx(spread)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: the real HellaSwag and LAMBADA are not in the project")
@pytest.mark.parametrize(
    ("name", "file"), [("hellaswag", "hellaswag_val.jsonl.xz"), ("lambada", "lambada_openai_test.jsonl.xz")]
)
def test_P9_the_first_real_tasks_equal_transformers(name, file, model, judge):
    with lzma.open(SHARED / file, "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(20)]
    items = evals.read_items(name, SHARED / file, GPT, limit=20)
    scores = iter(model.scorer.score([pair for item in items for pair in item.pairs], greedy=True))
    for row in rows:
        context, _, word = row.get("text", "").rpartition(" ")
        for answer in row.get("endings", [word]):
            logp, n, greedy = asked(judge, row.get("ctx", context), " " + answer)
            ours = next(scores)
            assert (
                float(ours.losses.sum()) == pytest.approx(-logp, rel=1e-4)
                and len(ours.losses) == n
                and ours.greedy == greedy
            )


# the scorer -----------------------------------------------------------------------------------------------------------


def some_pairs(count, vocab, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, vocab, rng.integers(1, 2 * longest)), rng.integers(0, vocab, rng.integers(1, longest)))
        for _ in range(count)
    ]


def scorer_of(model, backend="cpu", dtype="f32", tokens=256):
    opened = open_backend(backend, 1 if backend == "cpu" else 0)
    programs = evals.record(model, DTYPES[dtype], tokens)
    declared = declare(model, DTYPES[dtype])
    arena = opened.alloc(opened.plan(declared, *programs))
    initialize(declared, arena, Start(seed=3))
    for info in declared.params.values():  # away from the start, where all logits are alike
        w = np.array(arena.read_part("param", info.tensor)).astype(np.float32)
        w[: info.init.rows] *= 4
        arena.write_part("param", info.tensor, w)
    return evals.Scorer(model, programs, arena, opened)


@pytest.mark.parametrize("backend", ["cpu", "ref", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tie", [True, False])
def test_P9_scores_do_not_depend_on_the_batch(backend, tie, monkeypatch):
    """Alone, among others in any order, in small batches or with a small head: the same losses."""
    model = GPT2(vocab_size=97, max_seq_len=40, num_layers=2, num_heads=3, hidden_size=36, tie_embeddings=tie)
    pairs = some_pairs(60, 97, 30)
    scorer = scorer_of(model, backend)
    together = scorer.score(pairs, greedy=True)
    assert all(len(s.losses) == len(pair[1]) for s, pair in zip(together, pairs))
    for i in range(0, 60, 7):
        alone = scorer.score(pairs[i : i + 1], greedy=True)[0]
        assert np.allclose(alone.losses, together[i].losses, atol=1e-4) and alone.greedy == together[i].greedy
    backwards = scorer.score(pairs[::-1], greedy=True)[::-1]
    assert all(np.allclose(a.losses, b.losses, atol=1e-4) for a, b in zip(together, backwards))
    monkeypatch.setattr(scoring, "HEAD_ROWS", 7)
    small = scorer_of(model, backend, tokens=1).score(pairs)
    assert all(np.allclose(a.losses, b.losses, atol=1e-4) for a, b in zip(together, small)) and small[0].greedy is None


def test_P9_greedy_is_what_generation_would_write(model):
    """Continuations that the model itself wrote are greedy; one changed token is not."""
    from handgrad.infer import Sampling
    from handgrad.infer.load import load_run

    engine, _ = load_run(model.source.path, threads=1)
    prompt = GPT.encode("In the barn a girl fed the").tolist()
    written = list(engine.generate(prompt, 12, Sampling(temperature=0.0)))
    other = [*written[:-1], written[-1] + 1]
    assert [s.greedy for s in model.scorer.score([(prompt, written), (prompt, other)], greedy=True)] == [True, False]


def test_P9_long_contexts_are_truncated_on_the_left(model):
    pair = some_pairs(1, 50257, 20)[0]
    long = np.concatenate([np.arange(300), pair[0]]), pair[1]
    assert np.array_equal(
        model.scorer.score([long])[0].losses, model.scorer.score([(long[0][-100:], pair[1])])[0].losses
    )


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        (([], [1]), "a context and a continuation hold at least one token, but got an empty one"),
        (([1], []), "a context and a continuation hold at least one token, but got an empty one"),
        (([1], [1] * 45), "a continuation is at most as long as the 44 tokens that the model reads, but got 45"),
        (([1, 50257], [1]), "ids lie below the vocabulary of 50257, but got 50257"),
        (([-1], [1]), "ids lie below the vocabulary of 50257, but got -1"),
    ],
)
def test_P9_invalid_pairs_are_refused(model, pair, line):
    with pytest.raises(HandgradError, match=re.escape(f"[eval] {line}")):
        model.scorer.score([pair])


def test_P9_nothing_to_score(model):
    assert model.scorer.score([]) == []


def test_P9_a_shifted_row_is_caught(folder, model, judge, monkeypatch):
    """The comparison with transformers catches losses that are one place off."""
    right = scoring.Scorer._text
    monkeypatch.setattr(scoring.Scorer, "_text", lambda self, c, t: (right(self, c, t)[0][:-1], right(self, c, t)[1]))
    with pytest.raises(AssertionError):
        test_P9_choices_equal_transformers_task_by_task("hellaswag", folder, model, judge)


# files ----------------------------------------------------------------------------------------------------------------


def same(items, others):
    return len(items) == len(others) and all(
        a.label == b.label
        and a.characters == b.characters
        and all(np.array_equal(x, y) for p, q in zip(a.pairs, b.pairs, strict=True) for x, y in zip(p, q, strict=True))
        for a, b in zip(items, others)
    )


def test_P9_official_files_read_like_the_tables(folder, tmp_path):
    """PIQA's labels in a file of their own, ARC's nested questions, MMLU's csv files, compressed files."""
    tasks = folder / "tasks"
    rows = rows_of(tasks / "piqa_val.jsonl")
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows)
    )
    (tmp_path / "piqa" / "valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows))
    (tmp_path / "ARC-Easy").mkdir()
    nested = [
        dict(
            id="x",
            answerKey=row["answerKey"],
            question=dict(
                stem=row["question"],
                choices=[dict(text=t, label=letter) for t, letter in zip(*row["choices"].values())],
            ),
        )
        for row in rows_of(tasks / "arc_easy_test.jsonl")
    ]
    (tmp_path / "ARC-Easy" / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    lines = [
        ",".join(f'"{cell}"' for cell in (r["question"], *r["choices"], "ABCD"[r["answer"]]))
        for r in rows_of(tasks / "mmlu_test.jsonl")
    ]
    (tmp_path / "mmlu" / "test" / "animal_food_test.csv").write_text("\n".join(lines))
    with lzma.open(tmp_path / "hellaswag_val.jsonl.xz", "wt") as file:
        file.write((tasks / "hellaswag_val.jsonl").read_text())
    with gzip.open(tmp_path / "lambada_test.jsonl.gz", "wt") as file:
        file.write((tasks / "lambada_test.jsonl").read_text())
    for name in ("piqa", "arc_easy", "mmlu", "hellaswag", "lambada"):
        ours = evals.read_items(name, evals.find(name, tmp_path), GPT)
        assert same(ours, evals.read_items(name, evals.find(name, tasks), GPT)), name


def test_P9_hellaswag_rows_with_a_context(tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(json.dumps(dict(ctx="A man sits. he", label=1, endings=["runs [x].", "eats."])) + "\n")
    item = evals.read_items("hellaswag", path, GPT)[0]
    assert [GPT.decode(end) for _, end in item.pairs] == [" runs [x].", " eats."] and GPT.decode(
        item.pairs[0][0]
    ) == "A man sits. he"
    assert item.label == 1 and item.characters == (9, 5)


def test_P9_blank_lines_are_skipped(tmp_path):
    """Neither of the two that read questions."""
    row = json.dumps(dict(ctx="The cow eats", endings=["hay.", "meat."], label=0)) + "\n"
    (tmp_path / "a.jsonl").write_text(row + "\n" + row + "\n \n")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "x_test.csv").write_text("Why?,a,b,c,d,B\n\n\n")
    for recipe, path, count in (("hellaswag", tmp_path / "a.jsonl", 2), ("mmlu", tmp_path / "csv", 1)):
        source = path / "x_test.csv" if path.is_dir() else path
        assert prepare_questions(recipe, tmp_path / "made", GPT, source)[1] == count
        assert len(evals.read_items(recipe, path, GPT)) == count


def test_P9_spaces_between_belong_to_the_continuation():
    assert [list(ids) for ids in encode_pair(GPT, "Hello ", "world")] == [[15496], [995]]
    assert [list(ids) for ids in encode_pair(GPT, "", "Hello")] == [[50256], [15496]]
    with pytest.raises(HandgradError, match="an empty context needs a tokenizer that ends documents, but got chars"):
        encode_pair(tokenizers.chars("abc"), "", "a")


def test_P9_limit(folder):
    path = evals.find("hellaswag", folder / "tasks")
    assert same(evals.read_items("hellaswag", path, GPT, limit=3), evals.read_items("hellaswag", path, GPT)[:3])


def test_P9_llmc_evaluation_files(folder, judge, tmp_path):
    """The .bin of the same questions gives the same items and numbers; a model of other tokens cannot read it."""
    items = evals.read_items("hellaswag", evals.find("hellaswag", folder / "tasks"), GPT)
    path = tmp_path / "hellaswag_val.bin"
    write_choices(path, [Choices(list(i.pairs[0][0]), [list(end) for _, end in i.pairs], i.label) for i in items])
    spec = json.loads((folder / "hf" / "tokenizer.json").read_text())
    spec["model"]["vocab"] = {token: (50255 - id) % 50257 for token, id in spec["model"]["vocab"].items()}
    (tmp_path / "turned.json").write_text(json.dumps(spec))
    turned = tokenizers.from_file(tmp_path / "turned.json")  # the same words, other ids
    assert evals.find("hellaswag", tmp_path) == path
    assert same(evals.read_items("hellaswag", path, GPT), items) and same(
        evals.read_items("hellaswag", path, GPT, 2), items[:2]
    )
    for other in (tokenizers.chars("Hello world"), turned):
        with pytest.raises(
            HandgradError, match=r"hellaswag_val.bin holds tokens of the model's tokenizer, but got another's"
        ):
            evals.read_items("hellaswag", path, other)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("hellaswag", "", "holds questions, but got none"),
        ("hellaswag", "{", "PATH, line 1: must be JSON, but got Expecting property name"),
        ("hellaswag", "[]", "PATH, line 1: must be a JSON object, but got a list"),
        ("hellaswag", "\nnull", "PATH, line 2: must be a JSON object, but got null"),
        ("hellaswag", "3", "PATH, line 1: must be a JSON object, but got a number"),
        ("hellaswag", '"{}"', "PATH, line 1: must be a JSON object, but got a text"),
        ("hellaswag", "{}", "row 1 of PATH is a question of hellaswag, but got no 'ctx'"),
        (
            "hellaswag",
            '{"ctx":' + "[" * 30_000,
            "PATH, line 1: must be JSON, but got lists or objects nested too deeply",
        ),
        ("hellaswag", '{"ctx": ' + "1" * 10**6 + "}", "PATH, line 1: must be JSON, but got Exceeds the limit"),
        (
            "hellaswag",
            '{"ctx": "a", "endings": null, "label": 0}',
            "row 1 of PATH is a question of hellaswag, but got null under 'endings'",
        ),
        (
            "hellaswag",
            '{"ctx": [], "endings": ["b", "c"], "label": 0}',
            "row 1 of PATH is a question of hellaswag, but got a list under 'ctx'",
        ),
        (
            "hellaswag",
            '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
            "row 1 of PATH is a question of hellaswag, but got the label 2 of 2 answers",
        ),
        (
            "hellaswag",
            '{"ctx": "a", "endings": ["b"], "label": ""}',
            "row 1 of PATH is a question of hellaswag, but got '' under 'label', not a whole number",
        ),
        ("hellaswag", '{"ctx": "a", "label": 2}', "row 1 of PATH is a question of hellaswag, but got no 'endings'"),
        ("lambada", '{"text": 3}', "row 1 of PATH is a question of lambada, but got a number under 'text'"),
        (
            "hellaswag",
            '{"ctx": "a", "endings": ["b", 3], "label": 0}',
            "row 1 of PATH is a question of hellaswag, but got a list under 'endings', not a list of texts",
        ),
        (
            "hellaswag",
            '{"ctx": "a", "endings": ["b", "c"], "label": 0.5}',
            "row 1 of PATH is a question of hellaswag, but got 0.5 under 'label', not a whole number",
        ),
        (
            "arc_easy",
            '{"question": {"stem": "q", "choices": 3}, "answerKey": "A"}',
            "is a question of arc_easy, but got",
        ),
        ("arc_easy", '{"question": "q", "choices": [], "answerKey": "A"}', "is a question of arc_easy, but got"),
        (
            "arc_easy",
            '{"question": "q", "choices": {"text": ["a"], "label": 3}, "answerKey": "A"}',
            "a number under 'label'",
        ),
        (
            "winogrande",
            '{"sentence": "a _ b", "option1": {}, "option2": "d", "answer": "1"}',
            "an object under 'option1'",
        ),
        (
            "mmlu",
            '{"question": "q", "choices": ["a"], "answer": "", "subject": "s"}',
            "row 1 of PATH is a question of mmlu, but got",
        ),
        (
            "hellaswag",
            json.dumps({"ctx": "a" * 70_000, "endings": ["b", "c"], "label": 0}),
            "row 1 of PATH is a question of hellaswag, but got more than 65,536 characters",
        ),
        ("piqa", '{"goal": "q", "sol1": "a", "sol2": "b"}', "row 1 of PATH is a question of piqa, but got no 'label'"),
    ],
)
def test_P9_damaged_files(tmp_path, name, text, line):
    path = tmp_path / "a.jsonl"
    path.write_text(text and text + "\n")
    with pytest.raises(HandgradError, match=r"^\[(eval|data)\]") as caught:
        evals.read_items(name, path, GPT)
    assert line.replace("PATH", str(path)) in str(caught.value) and "\n" not in str(caught.value)


def test_P9_damaged_compression_and_csv(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a b"}\n' * 1000)[:60])
    with pytest.raises(HandgradError, match="a.jsonl.xz must be readable and whole, but got Compressed file ended"):
        evals.read_items("lambada", tmp_path / "a.jsonl.xz", GPT)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x_test.csv").write_text("question\n")
    with pytest.raises(HandgradError, match="holds rows of question, choices and answer, but got not enough values"):
        evals.read_items("mmlu", tmp_path / "test", GPT)


# the command ----------------------------------------------------------------------------------------------------------


def evaluated(folder, capsys, *flags):
    capsys.readouterr()
    code = main(["eval", str(folder / "run"), "--threads", "1", "--data", str(folder / "tasks"), *flags])
    return code, *capsys.readouterr()


def test_P9_eval_prints_a_table_and_keeps_the_numbers(folder, model, capsys):
    (folder / "run" / "eval.json").unlink(missing_ok=True)
    code, out, err = evaluated(
        folder, capsys, "--tasks", "val,hellaswag,lambada,mmlu,piqa,arc_easy,arc_challenge,winogrande"
    )
    assert code == 0 and not err
    kept = json.loads((folder / "run" / "eval.json").read_text())["step_000240"]
    assert set(kept) == {"val", *evals.TASKS}
    for name, facts in kept.items():
        assert re.search(rf"^ *{name} +{facts['count']} ", out, re.MULTILINE), out
        values = {k: v for k, v in facts.items() if k not in ("count", "file", "seconds", "dtype", "backend")}
        for metric, value in values.items():
            assert metric.endswith("_stderr") or f"{value:.4f}" in out
    items = evals.read_items("hellaswag", evals.find("hellaswag", folder / "tasks"), GPT)
    assert kept["hellaswag"]["acc_norm"] == evals.evaluate("hellaswag", items, model.scorer)["acc_norm"][0]
    code, out, _ = evaluated(folder, capsys, "--tasks", "hellaswag", "--limit", "5", "--dtype", "bf16")
    again = json.loads((folder / "run" / "eval.json").read_text())["step_000240"]
    first = again.pop("hellaswag (first 5)")
    assert code == 0 and first["count"] == 5 and first["dtype"] == "bf16"
    assert again == kept  # what was not asked again stays, and so does the result of all questions


def test_P9_val_is_the_loss_of_training_and_bits_of_its_bytes(folder, capsys):
    """The same val loss as the run's last; bits per byte from the text that the tokens spell."""
    code, out, _ = evaluated(folder, capsys, "--tasks", "val")
    found = json.loads((folder / "run" / "eval.json").read_text())["step_000240"]["val"]
    logged = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()][-1]["val_loss"]
    assert code == 0 and found["loss"] == pytest.approx(logged, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    ids = np.fromfile(next((folder / "shards").glob("val_*.bin")), "<u2")[512:]
    windows = (len(ids) - 1) // T
    text = GPT.decode([i for i in ids[1 : windows * T + 1] if i != GPT.eot])
    assert found["count"] == windows
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * windows * T / len(text.encode()) / math.log(2))


def test_P9_a_model_without_validation_shards(folder, judge, capsys):
    capsys.readouterr()
    assert main(["eval", f"{folder}/hf"]) == 2
    assert "or none can be seen from here. hint: --tasks val=GLOB" in capsys.readouterr().err
    path = folder / "tasks" / "lambada_test.jsonl"
    assert main(["eval", f"{folder}/hf", "--tasks", f"lambada={path}", "--threads", "1"]) == 0
    assert main(["eval", f"{folder}/run", "--tasks", f"lambada={path}", "--threads", "1"]) == 0
    kept = [json.loads((folder / name / "eval.json").read_text()) for name in ("hf", "run")]
    assert kept[0]["hf"]["lambada"]["perplexity"] == kept[1]["step_000240"]["lambada"]["perplexity"]


def test_P9_out_names_the_results_file(folder, tmp_path, capsys):
    flags = "--tasks", "hellaswag", "--limit", "2", "--out"
    code, out, _ = evaluated(folder, capsys, *flags, f"{tmp_path}/x.json")
    assert (
        code == 0
        and f"in {tmp_path}/x.json" in out
        and json.loads((tmp_path / "x.json").read_text())["step_000240"]["hellaswag (first 2)"]["count"] == 2
    )
    for text, rule in (
        ("# notes", "must be JSON"),
        ("[1, 2]", "must hold a JSON object"),
        ('{"a": 3}', "holds results"),
    ):
        (tmp_path / "notes.md").write_text(text)
        code, out, err = evaluated(folder, capsys, *flags, f"{tmp_path}/notes.md")
        assert code == 2 and err.startswith(f"[eval] {tmp_path}/notes.md {rule}") and "another --out" in err
        assert (tmp_path / "notes.md").read_text() == text
    code, out, err = evaluated(folder, capsys, *flags, f"{tmp_path}/nowhere/x.json")
    assert code == 2 and not out and err.startswith(f"[disk] {tmp_path}/nowhere/x.json must be writable")


def test_P9_own_paths_and_the_ref_backend(folder, capsys):
    """--tasks NAME=FILE; float64 numpy agrees with the kernels."""
    path = folder / "tasks" / "hellaswag_val.jsonl"
    flags = "--tasks", f"hellaswag={path},val={folder}/shards/val_*.bin", "--limit", "4"
    assert evaluated(folder, capsys, *flags)[0] == 0
    ours = json.loads((folder / "run" / "eval.json").read_text())["step_000240"]
    assert evaluated(folder, capsys, *flags, "--backend", "ref")[0] == 0
    truth = json.loads((folder / "run" / "eval.json").read_text())["step_000240"]
    val, task = "val (first 4)", "hellaswag (first 4)"
    assert truth[task]["backend"] == "ref" and truth[val]["count"] == 4
    assert truth[val]["loss"] == pytest.approx(ours[val]["loss"], abs=1e-5)
    assert {k: truth[task][k] for k in ("acc", "acc_norm", "acc_llmc")} == {
        k: ours[task][k] for k in ("acc", "acc_norm", "acc_llmc")
    }


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--tasks", "helaswag"],
            "[eval] a task is one of val, hellaswag, lambada, mmlu, piqa, arc_easy, arc_challenge, winogrande, but got 'helaswag'. hint: did you mean hellaswag?",
        ),
        (
            ["--tasks", "hellaswag", "--data", "nowhere"],
            "[eval] hellaswag lies in 'nowhere' as hellaswag_val.jsonl, hellaswag_val.jsonl.xz or the like, but got no such file. hint: handgrad data hellaswag, or --tasks hellaswag=FILE",
        ),
        (
            ["--tasks", "lambada=x.jsonl"],
            "[eval] the questions of lambada must be a file, but got x.jsonl, which is missing.",
        ),
        (["--limit", "-1"], "[eval] --limit is at least 1, or 0 for all, but got -1."),
        (["--dtype", "f64"], "[eval] --dtype takes one of saved, f32, bf16, but got 'f64'."),
    ],
)
def test_P9_errors_are_one_line(folder, capsys, flags, line):
    code, out, err = evaluated(folder, capsys, *flags)
    assert (code, out, err) == (2, "", line + "\n")


def test_P9_tokens_of_another_tokenizer_are_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abd\n" * 200)
    main(f"data text {tmp_path}/a.txt --out {tmp_path}/shards --tokenizer chars".split())
    main(
        f"train --train {tmp_path}/shards --out {tmp_path}/run --num-layers 1 --num-heads 1 --hidden-size 8 "
        "--max-seq-len 8 --micro-batch 2 --steps 1 --threads 1 --sample-tokens 0".split()
    )
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "xyz abc"}\n')
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--tasks", "lambada", "--data", str(tmp_path)]) == 2
    assert "the text must be spelled with the" in capsys.readouterr().err


# in training ----------------------------------------------------------------------------------------------------------


def test_P9_hellaswag_in_training(folder, tmp_path, capsys):
    """Its accuracy goes into the logs, is the one of `handgrad eval`, and leaves the training as it is."""
    path = folder / "tasks" / "hellaswag_val.jsonl"
    flags = (
        f"train --train {folder}/shards --num-layers 1 --num-heads 1 --hidden-size 16 --max-seq-len {T} "
        "--micro-batch 2 --steps 5 --dtype f32 --threads 1 --sample-tokens 0 --val-every 0 --val-tokens 256"
    ).split()
    assert main([*flags, "--out", f"{tmp_path}/plain"]) == 0
    assert main([*flags, "--out", f"{tmp_path}/run", "--hellaswag", str(path), "--eval-every", "2"]) == 0
    plain, lines = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "run")
    )
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [
        (line["loss"], line["grad_norm"]) for line in plain
    ]
    found = {line["step"]: line["hellaswag"] for line in lines if "hellaswag" in line}
    assert list(found) == [2, 4, 5]
    logged = re.findall(r"s:(\d+) eval:(\S+)", (tmp_path / "run" / "main.log").read_text())
    assert logged == [(str(step), f"{value:.4f}") for step, value in found.items()]
    assert main(["eval", f"{tmp_path}/run", "--tasks", f"hellaswag={path}", "--threads", "1"]) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["step_000005"]["hellaswag"]["acc_llmc"] == found[5]
    capsys.readouterr()
    small = [word if word != str(T) else "8" for word in flags]
    assert main([*small, "--out", f"{tmp_path}/small", "--hellaswag", str(path)]) == 2
    assert "a continuation is at most as long as the 8 tokens that the model reads" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
