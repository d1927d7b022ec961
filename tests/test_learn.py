"""The chapters of learn/: gradients against finite differences and PyTorch, training, sampling, solved exercises."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]


def module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


gpt2 = module("learn/01_gpt2_numpy.py")
judge = module("reference/gpt2_torch.py")

TINY = gpt2.Config(vocab_size=11, max_seq_len=8, num_layers=2, num_heads=2, hidden_size=12)
SMALL = gpt2.Config(vocab_size=61, max_seq_len=24, num_layers=3, num_heads=3, hidden_size=48)


def weights(config, dtype="float64"):
    """Parameters far from their initial values: biases not 0, norm weights not 1, zero padding rows."""
    rng = np.random.default_rng(1)
    params = {name: p + rng.normal(0, 0.1, p.shape) for name, p in gpt2.init(config, 0, "float64").items()}
    params["wte.weight"][config.vocab_size :] = 0
    return {name: p.astype(dtype) for name, p in params.items()}


def tokens(config, B=4, T=None):
    return np.random.default_rng(2).integers(0, config.vocab_size, (2, B, T or config.max_seq_len))


def gradients(config, params, ids, targets):
    return gpt2.backward(config, params, gpt2.forward(config, params, ids, targets)[2])


def torch_model(config, params, **options):
    model = judge.GPT2(
        config.vocab_size,
        config.max_seq_len,
        config.num_layers,
        config.num_heads,
        config.hidden_size,
        vocab_padded=len(params["wte.weight"]),
        **options,
    )
    model.to(torch.from_numpy(params["wte.weight"]).dtype).load(params)
    return model


def replaced(source, *pairs):
    """The source with each old text, which must occur exactly once, replaced by the new one."""
    for old, new in zip(pairs[::2], pairs[1::2]):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def worst(got, want):
    """The largest |got - want| / |want| over the tensors of two dictionaries, and the tensor's name."""
    assert got.keys() == want.keys()
    return max((np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name]), name) for name in want)


# ---- chapter 1 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_numpy_gradients_match_finite_differences(seed):
    errors = gpt2.check(TINY, seed)
    assert errors.keys() == gpt2.init(TINY, 0).keys()
    assert max(errors.values()) < 1e-7, errors


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("T", [SMALL.max_seq_len, 7])
def test_numpy_matches_torch(dtype, tolerance, attention, T):
    params, (ids, targets) = weights(SMALL, dtype), tokens(SMALL, T=T)
    logits, loss, saved = gpt2.forward(SMALL, params, ids, targets)
    grads = gpt2.backward(SMALL, params, saved)

    model = torch_model(SMALL, params, attention=attention)
    want_logits, want_loss = model(torch.from_numpy(ids), torch.from_numpy(targets))
    want_loss.backward()
    assert np.abs(logits - want_logits.detach().numpy()).max() < tolerance
    assert abs(loss - want_loss.item()) < tolerance
    error, name = worst(grads, model.gradients())
    assert error < tolerance, name
    assert {a.dtype for a in [logits, *grads.values()]} == {np.dtype(dtype)}


def test_numpy_training_matches_torch():
    start, batches = weights(SMALL), [tokens(SMALL)] * 10

    def lr(step):
        return 1e-2 / step

    params = {name: p.copy() for name, p in start.items()}
    losses = [loss for loss, _ in gpt2.train(SMALL, params, batches, lr)]
    model = torch_model(SMALL, start)
    want = judge.train_steps(model, batches, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, clip=1.0)
    assert np.abs(np.subtract(losses, want)).max() < 1e-9
    # The key's bias has gradient 0 (softmax ignores a constant added to all scores of a row), so AdamW divides rounding
    # noise by the size of that noise. eps keeps the quotient small in float64; in float32 nothing does.
    assert max(np.abs(params[name] - w).max() for name, w in model.arrays().items()) < 1e-8


def test_cosine():
    rates = [gpt2.cosine(step, 110, peak=1.0, final=0.1, warmup=10) for step in (1, 10, 11, 61, 111)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])


def test_init():
    config = gpt2.Config(vocab_size=65)
    params, again, other = gpt2.init(config, 3), gpt2.init(config, 3), gpt2.init(config, 4)
    assert all(np.array_equal(params[name], again[name]) for name in params)
    assert not np.array_equal(params["wte.weight"], other["wte.weight"])
    assert params["wte.weight"].shape == (128, 128) and not params["wte.weight"][65:].any()
    assert params["h.0.mlp.c_fc.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert params["h.0.mlp.c_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert params.keys() == dict(judge.GPT2(65, 64, 4, 4, 128).named_parameters()).keys()


def test_loss_falls_and_padding_stays_zero():
    config = gpt2.Config(vocab_size=61, max_seq_len=32, num_layers=2, hidden_size=64)
    text = np.frombuffer(b"to be, or not to be, that is the question. " * 100, np.uint8) % 61
    batches = (gpt2.batch(text, step, 0, 12, config.max_seq_len) for step in range(30))
    params = gpt2.init(config, 0)
    losses = [loss for loss, _ in gpt2.train(config, params, batches, lambda step: 2e-3)]
    assert losses[0] == pytest.approx(math.log(61), abs=0.2)
    assert max(losses[-5:]) < losses[0] - 1.2
    assert not params["wte.weight"][61:].any()


def test_clip():
    grads = {"a": np.full(4, 3.0), "b": np.full(16, 2.0)}
    assert gpt2.clip(grads, 1.0) == pytest.approx(10)
    assert gpt2.clip(grads, 1.0) == pytest.approx(1) and grads["a"][0] == pytest.approx(0.3)
    assert gpt2.clip(grads, 5.0) == pytest.approx(1)


def test_evaluate_reads_every_window_once():
    params, text = weights(TINY), np.random.default_rng(0).integers(0, 11, 8 * 37 + 5)
    losses = [
        gpt2.forward(TINY, params, text[None, i : i + 8], text[None, i + 1 : i + 9])[1] for i in range(0, 8 * 37, 8)
    ]
    assert gpt2.evaluate(TINY, params, text) == pytest.approx(np.mean(losses), rel=1e-12)


def test_sampling_depends_only_on_the_seed():
    params = weights(TINY)
    first = gpt2.sample(TINY, params, [1, 2], 20, seed=0)
    assert first == gpt2.sample(TINY, params, [1, 2], 20, seed=0)
    assert first != gpt2.sample(TINY, params, [1, 2], 20, seed=1)
    assert first[:2] == [1, 2] and len(first) == 22 and max(first) < TINY.vocab_size
    greedy = gpt2.sample(TINY, params, [1, 2], 3, seed=0, temperature=0)
    assert greedy == gpt2.sample(TINY, params, [1, 2], 3, seed=9, temperature=0)
    assert greedy[2] == gpt2.forward(TINY, params, np.array([[1, 2]]))[0][0, -1].argmax()


def run(*arguments):
    return subprocess.run([sys.executable, ROOT / "learn/01_gpt2_numpy.py", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("slope", ["1 - th", "1 + float('nan') * th"])
def test_check_fails_on_a_wrong_backward(tmp_path, slope):
    source = (ROOT / "learn/01_gpt2_numpy.py").read_text()
    (tmp_path / "broken.py").write_text(replaced(source, "x * (1 - th * th) * du", f"x * ({slope}) * du"))
    done = subprocess.run([sys.executable, tmp_path / "broken.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and "FAIL" in done.stdout.splitlines()[-1]
    wrong = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("WRONG")]
    assert "h.1.mlp.c_fc.weight" in wrong and "h.1.mlp.c_proj.weight" not in wrong


def test_command_line(tmp_path):
    checked = run("--check")
    assert checked.returncode == 0 and re.search(
        r"worst relative error \d\.\de-\d\d, pass", checked.stdout.splitlines()[-1]
    )
    (tmp_path / "part.txt").write_text((ROOT / "src/handgrad/data/shakespeare.txt").read_text()[:20_000])
    done = run("--steps", "3", str(tmp_path / "part.txt"))
    assert done.returncode == 0 and "step 3/3" in done.stdout and "val loss" in done.stdout
    (tmp_path / "short.txt").write_text("too short")
    refused = run(str(tmp_path / "short.txt"))
    assert refused.returncode == 2 and "[text]" in refused.stderr and "Traceback" not in refused.stderr


# ---- the exercises of chapter 1, solved ------------------------------------------------------------------------------


def test_exercise_1_layernorm_without_a_term(monkeypatch):
    def broken(params, grads, name, dy, saved):
        n, rstd = saved
        grads[name + ".weight"] = (dy * n).sum(0)
        grads[name + ".bias"] = dy.sum(0)
        dn = dy * params[name + ".weight"]
        return rstd * (dn - dn.mean(1, keepdims=True))

    monkeypatch.setattr(gpt2, "layernorm_backward", broken)
    right = {name for name, error in gpt2.check(TINY).items() if error < 1e-6}
    # The gradients of the last norm's own parameters use its dy, which is right; all earlier ones use its dx, which is not.
    assert right == {"ln_f.weight", "ln_f.bias"}


def test_exercise_2_squared_relu(monkeypatch):
    def relu2(x):
        positive = np.maximum(x, 0)
        return positive * positive, positive

    monkeypatch.setattr(gpt2, "gelu", relu2)
    monkeypatch.setattr(gpt2, "gelu_backward", lambda dy, positive: dy * 2 * positive)
    assert max(gpt2.check(TINY).values()) < 1e-6


def test_exercise_3_rmsnorm(monkeypatch):
    def rmsnorm(params, name, x):
        rstd = 1 / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
        n = x * rstd
        return n * params[name + ".weight"] + params[name + ".bias"], (n, rstd)

    def rmsnorm_backward(params, grads, name, dy, saved):
        n, rstd = saved
        grads[name + ".weight"] = (dy * n).sum(0)
        grads[name + ".bias"] = dy.sum(0)
        dn = dy * params[name + ".weight"]
        return rstd * (dn - n * (dn * n).mean(1, keepdims=True))  # RMSNorm subtracts no mean, so its term is gone

    monkeypatch.setattr(gpt2, "layernorm", rmsnorm)
    monkeypatch.setattr(gpt2, "layernorm_backward", rmsnorm_backward)
    assert max(gpt2.check(TINY).values()) < 1e-6


def test_exercise_4_attention_saves_lse(monkeypatch):
    want = gradients(SMALL, weights(SMALL), *tokens(SMALL))
    backward_from_p = gpt2.attention_backward

    def masked_scores(q, k):
        T, D = q.shape[2:]
        scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
        scores[:, :, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        return scores

    def attention(config, qkv, T):
        H, D = config.num_heads, config.hidden_size // config.num_heads
        q, k, v = qkv.reshape(-1, T, 3, H, D).transpose(2, 0, 3, 1, 4)
        scores = masked_scores(q, k)
        top = scores.max(3, keepdims=True)
        lse = top + np.log(np.exp(scores - top).sum(3, keepdims=True))
        o = np.exp(scores - lse) @ v
        return o.transpose(0, 2, 1, 3).reshape(len(qkv), H * D), (lse, q, k, v)

    def attention_backward(do, saved):
        lse, q, k, v = saved
        return backward_from_p(do, (np.exp(masked_scores(q, k) - lse), q, k, v))

    monkeypatch.setattr(gpt2, "attention", attention)
    monkeypatch.setattr(gpt2, "attention_backward", attention_backward)
    assert worst(gradients(SMALL, weights(SMALL), *tokens(SMALL)), want)[0] < 1e-12


def test_exercise_5_head_in_slices(monkeypatch):
    want = gradients(SMALL, weights(SMALL), *tokens(SMALL))

    def slices(params, x, targets):
        for rows in np.array_split(np.arange(len(x)), 4):
            z = x[rows] @ params["wte.weight"][: SMALL.vocab_size].T
            e = np.exp(z - z.max(1, keepdims=True))
            yield rows, e / e.sum(1, keepdims=True), (np.arange(len(rows)), targets[rows])

    def lm_loss(config, params, x, targets):
        targets = targets.ravel()
        total = sum(-np.log(p[target]).sum() for _, p, target in slices(params, x, targets))
        return np.zeros((len(x), 0)), total / len(x), (x, targets)

    def lm_loss_backward(config, params, grads, saved):
        x, targets = saved
        dx = np.empty_like(x)
        grads["wte.weight"] = np.zeros_like(params["wte.weight"])
        for rows, dz, target in slices(params, x, targets):
            dz[target] -= 1
            dz /= len(x)
            grads["wte.weight"][: config.vocab_size] += dz.T @ x[rows]
            dx[rows] = dz @ params["wte.weight"][: config.vocab_size]
        return dx

    monkeypatch.setattr(gpt2, "lm_loss", lm_loss)
    monkeypatch.setattr(gpt2, "lm_loss_backward", lm_loss_backward)
    # N = 16384, V = 50257 in float32: three arrays of 3.3 GB become three of 0.8 GB; the cost is one more matmul.
    assert worst(gradients(SMALL, weights(SMALL), *tokens(SMALL)), want)[0] < 1e-12


def test_exercise_6_gradient_accumulation():
    params, (ids, targets) = weights(SMALL), tokens(SMALL, B=12)
    first, second = gradients(SMALL, params, ids[:6], targets[:6]), gradients(SMALL, params, ids[6:], targets[6:])
    mean = {name: (first[name] + second[name]) / 2 for name in params}
    # If the halves have different numbers of targets, weight each half by its number instead.
    assert worst(mean, gradients(SMALL, params, ids, targets))[0] < 1e-12


def test_chapter_1_matches_package_losses(tmp_path):
    """Ten optimizer steps from the same weights on the same batches in float32: the losses differ only by rounding."""
    import handgrad as hg
    from handgrad.data import id_dtype, write_shard

    ids = np.random.default_rng(3).integers(0, SMALL.vocab_size, 4000)
    write_shard(tmp_path / "train_0.bin", [ids], id_dtype(SMALL.vocab_size))
    data = hg.data.tokens(tmp_path / "*.bin", seq_len=SMALL.max_seq_len, batch_tokens=6 * SMALL.max_seq_len)
    model = hg.models.GPT2(SMALL.vocab_size, SMALL.max_seq_len, SMALL.num_layers, SMALL.num_heads, SMALL.hidden_size)
    execution = hg.Execution(6, extra_programs=(), backend="cpu")
    run = hg.Trainer(model, hg.optim.AdamW(betas=(0.9, 0.99)), data, precision=hg.Precision("f32"), execution=execution)
    params = {name: p.astype(np.float32) for name, p in run.params().items()}
    batches = [data.batch(step) for step in range(10)]
    theirs = [
        loss for loss, _ in gpt2.train(SMALL, params, [(b["ids"], b["targets"]) for b in batches], lambda step: 1e-3)
    ]
    ours = [run.step(step, 1e-3).loss for step in range(1, 11)]
    print("largest difference of a loss", max(abs(a - b) for a, b in zip(ours, theirs)))
    assert ours[0] > ours[-1]
    assert np.allclose(ours, theirs, rtol=0, atol=2e-5)  # float32 sums in another order, over ten updates


# ---- chapter 2 -------------------------------------------------------------------------------------------------------

C_SOURCE = (ROOT / "learn/02_gpt2.c").read_text()


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A function that compiles chapter 2, or an edited version, and returns the program. real: "float" or "double"."""
    folder, made = tmp_path_factory.mktemp("chapter2"), {}

    def compiled(real="float", source=C_SOURCE):
        if (real, source) not in made:
            path = folder / f"gpt2_{len(made)}"
            path.with_suffix(".c").write_text(source)
            flags = ["-O3", "-fopenmp", f"-DREAL={real}"] + ["-Wall", "-Wextra", "-Werror"] * (source == C_SOURCE)
            command = [os.environ.get("CC", "cc"), *flags, path.with_suffix(".c"), "-o", path, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[real, source] = path
        return made[real, source]

    return compiled


def call(program, *words, threads=2):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment, errors="replace"
    )


def checked(program):
    """(exit code, tensors with right gradients in every layer, tensors with wrong ones, last line) of --check."""
    done = call(program, "--check")
    *rows, verdict = done.stdout.splitlines()
    wrong = {row.split(" layer")[0].strip() for row in rows if row.endswith("WRONG")}
    return done.returncode, {row.split(" layer")[0].strip() for row in rows} - wrong, wrong, verdict


@pytest.mark.parametrize("real", ["float", "double"])
def test_c_gradients_match_finite_differences(build, real):
    code, right, wrong, verdict = checked(build(real))
    assert code == 0 and len(right) == 16 and not wrong and re.search(r"worst relative error \d.*, pass", verdict)


MUTATIONS = [
    ("pt[s] * (dp[s] - mean) * scale", "pt[s] * dp[s] * scale"),
    ("(1 + 3 * cubic * x[i] * x[i])", "(1 + 2 * cubic * x[i] * x[i])"),
    ("pn[targets[n]] -= 1;", "pn[targets[n]] -= 0.999;"),
    ("if (db) db[o] += dy[(size_t)n * O + o];", "if (db) db[o] += 0;"),
    ("add_scaled(dwte + (size_t)ids[n] * C, 1, dx + (size_t)n * C, C);", ""),
    ("add_scaled(dv + (size_t)s * 3 * C, pt[s], do_t, D);", "add_scaled(dv + (size_t)s * 3 * C, NAN, do_t, D);"),
]


@pytest.mark.parametrize(("right", "wrong"), MUTATIONS)
def test_c_check_finds_mistakes(build, right, wrong):
    code, _, named, verdict = checked(build("double", replaced(C_SOURCE, right, wrong)))
    assert code == 1 and named and "FAIL" in verdict


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """A folder with model.bin, train.bin and, from ten steps of handgrad, losses_cpu.txt, losses_ref.txt, greedy.txt."""
    import handgrad as hg
    from handgrad.data import id_dtype, write_shard
    from handgrad.io.llmc import write_model
    from handgrad.io.weights import Weights
    from handgrad.models import declare, shapes

    folder = tmp_path_factory.mktemp("ten_steps")
    ids = np.random.default_rng(5).integers(0, 211, 64 * 24 + 9) ** 2 % 211  # some tokens are more frequent than others
    write_shard(folder / "train.bin", [ids], id_dtype(211))
    sizes = dict(vocab_size=211, max_seq_len=96, num_layers=3, num_heads=3, hidden_size=48)
    lr = hg.schedules.cosine(peak=3e-3, warmup=3, steps=10)
    start = {}
    for backend in ("cpu", "ref"):
        data = hg.data.tokens(folder / "train.bin", seq_len=64, batch_tokens=4 * 64, shuffle=False)
        optim = hg.optim.AdamW(betas=(0.9, 0.95), weight_decay=0.2, clip=0.5)
        execution = hg.Execution(4, extra_programs=("sample",), backend=backend)
        run = hg.Trainer(hg.models.GPT2(**sizes), optim, data, precision=hg.Precision("f32"), execution=execution)
        if not start:
            rng = np.random.default_rng(6)
            start = {name: p + rng.normal(0, 0.05, p.shape).astype(np.float32) for name, p in run.params().items()}
            start["wte.weight"][211:] = 0
            wanted = shapes(declare(run.model))
            write_model(folder / "model.bin", Weights(sizes, "f32", wanted, start.get))
        run.load_params(start)
        if backend == "cpu":
            (folder / "greedy.txt").write_text(
                " ".join(map(str, run.generate([ids[0]], 40, hg.Sampling(temperature=0))))
            )
        losses = [run.step(step, lr(step)).loss for step in range(1, 11)]
        (folder / f"losses_{backend}.txt").write_text("".join(f"{loss:.9f}\n" for loss in losses))
    return folder


def train_words(folder, backend="cpu", **changes):
    """The flags that reproduce those ten steps."""
    files = dict(model=folder / "model.bin", data=folder / "train.bin", reference=folder / f"losses_{backend}.txt")
    sizes = dict(batch=4, length=64, steps=10, lr=3e-3, warmup=3, decay=0.2, beta2=0.95, clip=0.5, sample=0)
    return [word for name, value in (files | sizes | changes).items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("backend", ["cpu", "ref"])
def test_c_losses_match_package(build, ten_steps, backend):
    """Ten steps from the same weights on the same tokens: each loss agrees to 1e-4, by the program's check and by ours."""
    done = call(build(), *train_words(ten_steps, backend))
    verdict = done.stdout.splitlines()[-1]
    print(f"{backend}: {verdict}")
    losses = np.array([float(x) for x in re.findall(r"loss (\d\S+)", done.stdout)])
    assert done.returncode == 0 and "in 10 of 10 steps, pass" in verdict
    assert np.abs(losses - np.loadtxt(ten_steps / f"losses_{backend}.txt")).max() <= 1e-4
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    "change", [dict(beta2=0.96), dict(decay=0.1), dict(clip=0), dict(warmup=2), dict(steps=11), dict(lr=float("nan"))]
)
def test_c_reference_check_fails_on_other_settings(build, ten_steps, change):
    done = call(build(), *train_words(ten_steps, **change))
    assert done.returncode == 1 and "FAIL" in done.stdout.splitlines()[-1]


def test_c_results_do_not_depend_on_threads(build, ten_steps, tmp_path):
    """Also: a model file that is read and written again, with lr 0, keeps its bytes."""
    for threads in (1, 3):
        call(build(), *train_words(ten_steps, save=tmp_path / f"{threads}.bin"), threads=threads)
    assert (
        (tmp_path / "1.bin").read_bytes() == (tmp_path / "3.bin").read_bytes() != (ten_steps / "model.bin").read_bytes()
    )
    call(build(), *train_words(ten_steps, lr=0, steps=1, save=tmp_path / "same.bin"))
    assert (tmp_path / "same.bin").read_bytes() == (ten_steps / "model.bin").read_bytes()


def greedy(program, folder):
    """The greedy continuation of the first token with the initial weights."""
    return call(program, *train_words(folder, lr=0, steps=1, sample=40, temperature=0)).stdout.splitlines()[-1].split()


def test_c_greedy_sample_matches_package(build, ten_steps):
    assert greedy(build(), ten_steps) == (ten_steps / "greedy.txt").read_text().split()


def test_c_learns_a_text(build, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question. " * 100)
    sizes = ["--layers", 2, "--heads", 2, "--channels", 32, "--length", 32, "--batch", 4]

    def sample(*words):
        done = call(build(), "--data", text, *sizes, "--lr", 1e-2, "--steps", 100, "--sample", 90, *words, threads=1)
        *_, val, written = done.stdout.splitlines()
        assert done.returncode == 0 and float(val.removeprefix("val loss ")) < 0.8
        return written

    assert "question. to be" in sample("--temperature", 0)
    first = sample()
    assert first == sample() != sample("--seed", 2) and set(first) <= set(text.read_text())


def test_c_sample_longer_than_the_stack(build, tmp_path):
    (tmp_path / "text.txt").write_text("to be, or not to be. " * 20)
    sizes = "--layers 1 --heads 1 --channels 4 --length 4 --batch 1 --steps 1 --sample 500000000".split()
    with subprocess.Popen(
        [build(), "--data", tmp_path / "text.txt", *sizes], stdout=subprocess.PIPE, text=True
    ) as child:
        while not (line := child.stdout.readline()).startswith("val loss"):
            assert line
        letter = child.stdout.read(1)
        child.kill()
    assert letter


def test_c_draw_token_frequencies(build):
    """200,000 draws from softmax((0, 1, 2, -1) / 0.5): frequencies within six standard deviations of probabilities."""
    main = """int main(void) {
      int hits[4] = {0};
      for (int i = 0; i < 200000; i++) hits[draw_token((real[]){0, 1, 2, -1}, 4, 0.5)]++;
      for (int i = 0; i < 4; i++) printf("%d ", hits[i]);
    }
    int unused_main("""
    source = replaced(C_SOURCE, "int main(", main)
    hits = np.array(call(build(source=source)).stdout.split(), float)
    p = np.exp(2 * np.array([0, 1, 2, -1]))
    p /= p.sum()
    assert (np.abs(hits - 200_000 * p) < 6 * np.sqrt(200_000 * p)).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "1"], "[flags] flags are those of --help"),
        (["--steps"], "[flags] --steps takes a value"),
        (["--steps", "1x"], "[flags] --steps takes a number"),
        (["--steps", "0"], "[flags] sizes are at least 1"),
        (["--data", "/nowhere"], "[data] a text or a token shard"),
        (["--data", "SHORT"], "[data] SHORT has more than 64 tokens"),
        (["--data", "CUT"], "[data] CUT holds 9 tokens, by its header"),
        (["--model", "SHORT"], "[model] SHORT begins with 20240326"),
        (["--model", "MODEL_CUT"], "[model] MODEL_CUT holds"),
        (["--model", "MODEL", "--length", "97"], "[model] --length is at most 96"),
        (["--model", "MODEL", "--data", "SHARD"], "[data] token ids lie below 211, but got 300"),
        (["--data", "WIDE"], "[data] token ids lie below 1073741824, but got 4294967295"),
        (["--heads", "3"], "[model] channels are a multiple of heads"),
    ],
)
def test_c_errors_name_the_rule(build, ten_steps, tmp_path, words, message):
    from handgrad.data import id_dtype, write_shard

    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "CUT").write_bytes(np.array([20240520, 1, 9] + [0] * 253, "<i4").tobytes() + b"..")
    (tmp_path / "MODEL").write_bytes((ten_steps / "model.bin").read_bytes())
    (tmp_path / "MODEL_CUT").write_bytes((ten_steps / "model.bin").read_bytes()[:-3])
    write_shard(tmp_path / "SHARD", [np.arange(301)], id_dtype(301))
    (tmp_path / "WIDE").write_bytes(np.array([20240801, 7, 99] + [0] * 253 + [-1] * 99, "<i4").tobytes())
    done = call(build(), *[tmp_path / word if word.isupper() else word for word in words])
    told = done.stderr.replace(f"{tmp_path}/", "")
    assert done.returncode == 2 and told.startswith(message) and told.count("\n") == 1


def test_c_help_names_every_flag(build):
    done = call(build(), "--help")
    assert done.returncode == 0 and set(re.findall(r"^--\S+", done.stdout, re.M)) == {"--check"} | set(
        re.findall(r'\{"(--\w+)"', C_SOURCE)
    )


# ---- the exercises of chapter 2, solved ------------------------------------------------------------------------------


def test_c_exercise_1_layernorm_without_mean(build):
    source = replaced(
        C_SOURCE,
        "(dyr[c] * w[c] - mean - nr[c] * mean_n)",
        "(dyr[c] * w[c] - nr[c] * mean_n)",
        "mean += dyr[c] * w[c] / C;\n      mean_n",
        "mean_n",
        "real mean = 0, mean_n = 0;\n",
        "real mean_n = 0;\n",
    )
    code, right, _, _ = checked(build("double", source))
    # As in chapter 1: only the gradients of the last norm's own parameters use its dy, which is right.
    assert code == 1 and right == {"ln_f w", "ln_f b"}


def test_c_exercise_2_recompute_gelu(build, ten_steps):
    source = replaced(
        C_SOURCE,
        "real *u, *a;            // MLP before and after GELU: (N, 4C) both",
        "real *u;",
        ".u = reals(rows * 4 * C), .a = reals(rows * 4 * C),",
        ".u = reals(rows * 4 * C),",
        "real *dx, *dbranch, *d3, *d4;",
        "real *a, *dx, *dbranch, *d3, *d4;",
        "b.logits = reals(rows * c.V);",
        "b.logits = reals(rows * c.V), b.a = reals(rows * 4 * C);",
        "gelu(s->a, s->u,",
        "gelu(f->a, s->u,",
        "linear(f->branch, s->a,",
        "linear(f->branch, f->a,",
        "  linear_backward(f->d4, grad(m, OUT_W, l), grad(m, OUT_B, l), f->dx, s->a,",
        "  gelu(f->a, s->u, (size_t)N * 4 * C);\n  linear_backward(f->d4, grad(m, OUT_W, l), grad(m, OUT_B, l), f->dx, f->a,",
    )
    # Of a layer's (16 + H T / C) C + 2 numbers per row this saves 4C, at most a quarter, for one more tanh per number.
    assert checked(build("double", source))[0] == 0
    assert call(build(source=source), *train_words(ten_steps)).returncode == 0


def test_c_exercise_3_gradient_accumulation(build, ten_steps):
    source = replaced(
        C_SOURCE,
        "  memset(m->grads, 0, m->count * sizeof(real));\n",
        "",
        "pn[i] /= N;",
        "pn[i] /= 2 * N;  // each half contributes half of the mean",
        "    double loss = forward(model, buffers, ids, targets, B, T);\n    backward(model, buffers, ids, targets, B, T);\n",
        """    double loss = 0;
    memset(model->grads, 0, model->count * sizeof(real));
    for (int half = 0; half < 2; half++) {
      int *some = ids + half * B / 2 * T, *their_targets = targets + half * B / 2 * T;
      loss += forward(model, buffers, some, their_targets, B / 2, T) / 2;
      backward(model, buffers, some, their_targets, B / 2, T);
    }
""",
    )
    assert call(build(source=source), *train_words(ten_steps)).returncode == 0


def test_c_exercise_4_kv_cache(build, ten_steps):
    step = """
static void attention_step(real *o, const real *qkv, int t, int C, int H) {
  int D = C / H;
  for (int h = 0; h < H; h++) {
    const real *q = qkv + (size_t)t * 3 * C + h * D, *k = qkv + h * D + C, *v = k + C;
    real p[t + 1], top = -INFINITY, sum = 0;
    for (int s = 0; s <= t; s++) {
      p[s] = dot(q, k + (size_t)s * 3 * C, D) / sqrt((real)D);
      if (p[s] > top) top = p[s];
    }
    for (int s = 0; s <= t; s++) sum += p[s] = exp(p[s] - top);
    memset(o + h * D, 0, D * sizeof(real));
    for (int s = 0; s <= t; s++) add_scaled(o + h * D, p[s] / sum, v + (size_t)s * 3 * C, D);
  }
}

// The layers' qkv buffers are the KV cache: row t holds token t.
static void forward_step(const Model *m, Buffers *f, int id, int t) {
  int C = m->config.C;
  embed(f->x, &id, param(m, WTE, 0), param(m, WPE, 0) + (size_t)t * C, 1, 1, C);
  for (int l = 0; l < m->config.L; l++) {
    Layer *s = &f->layers[l];
    layernorm(s->y1, s->n1, s->rstd1, f->x, param(m, LN1_W, l), param(m, LN1_B, l), 1, C);
    linear(s->qkv + (size_t)t * 3 * C, s->y1, param(m, QKV_W, l), param(m, QKV_B, l), 1, C, 3 * C);
    attention_step(s->o, s->qkv, t, C, m->config.H);
    linear(f->branch, s->o, param(m, PROJ_W, l), param(m, PROJ_B, l), 1, C, C);
    add_scaled(f->x, 1, f->branch, C);
    layernorm(s->y2, s->n2, s->rstd2, f->x, param(m, LN2_W, l), param(m, LN2_B, l), 1, C);
    linear(s->u, s->y2, param(m, FC_W, l), param(m, FC_B, l), 1, C, 4 * C);
    gelu(s->a, s->u, 4 * C);
    linear(f->branch, s->a, param(m, OUT_W, l), param(m, OUT_B, l), 1, 4 * C, C);
    add_scaled(f->x, 1, f->branch, C);
  }
  layernorm(f->yf, f->nf, f->rstdf, f->x, param(m, LNF_W, 0), param(m, LNF_B, 0), 1, C);
  linear(f->logits, f->yf, param(m, WTE, 0), NULL, 1, C, m->config.V);
}

static void sample(const Model"""
    source = replaced(
        C_SOURCE,
        "static void sample(const Model",
        step,
        "forward(model, f, text + length - T, NULL, 1, T);",
        "forward_step(model, f, text[length - 1], length - 1);",
        "draw_token(f->logits + (size_t)(T - 1) * V, V,",
        "draw_token(f->logits, V,",
        "    int T = length < longest ? length : longest;\n",
        '    if (length > longest) fail("[sample] no room");\n',
    )
    # A token costs 12 L C^2 multiplications for the matrices, 2 L t C for t cached keys and V C for the head: t times fewer.
    assert greedy(build(source=source), ten_steps) == (ten_steps / "greedy.txt").read_text().split()
