"""The chapters of learn/: gradients against finite differences and PyTorch, training, sampling, exercises solved."""
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
    """Parameters far from their initial values: nonzero biases, norms' weights other than one, zero padding rows."""
    rng = np.random.default_rng(1)
    params = {name: p + rng.normal(0, 0.1, p.shape) for name, p in gpt2.init(config, 0, "float64").items()}
    params["wte.weight"][config.vocab_size:] = 0
    return {name: p.astype(dtype) for name, p in params.items()}


def tokens(config, B=4, T=None):
    return np.random.default_rng(2).integers(0, config.vocab_size, (2, B, T or config.max_seq_len))


def gradients(config, params, ids, targets):
    return gpt2.backward(config, params, gpt2.forward(config, params, ids, targets)[2])


def torch_model(config, params, **options):
    model = judge.GPT2(config.vocab_size, config.max_seq_len, config.num_layers, config.num_heads, config.hidden_size,
                       vocab_padded=len(params["wte.weight"]), **options)
    model.to(torch.from_numpy(params["wte.weight"]).dtype).load(params)
    return model


def worst(got, want):
    """The largest |got - want| / |want| over the tensors of two dictionaries with the same names, and its name."""
    assert got.keys() == want.keys()
    return max((np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name]), name) for name in want)


# ---- chapter 1 -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_finite_differences(seed):
    errors = gpt2.check(TINY, seed)
    assert errors.keys() == gpt2.init(TINY, 0).keys()
    assert max(errors.values()) < 1e-7, errors


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("T", [SMALL.max_seq_len, 7])
def test_torch_agrees(dtype, tolerance, attention, T):
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


def test_training_steps_agree_with_torch():
    start, batches = weights(SMALL), [tokens(SMALL)] * 10

    def lr(step):
        return 1e-2 / step

    params = {name: p.copy() for name, p in start.items()}
    losses = [loss for loss, _ in gpt2.train(SMALL, params, batches, lr)]
    model = torch_model(SMALL, start)
    want = judge.train_steps(model, batches, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, clip=1.0)
    assert np.abs(np.subtract(losses, want)).max() < 1e-9
    # The key's bias has gradient 0 (softmax ignores what all scores of a row share), so AdamW divides rounding noise by
    # the size of that noise: eps keeps it small in float64, and nothing does in float32.
    assert max(np.abs(params[name] - w).max() for name, w in model.arrays().items()) < 1e-8


def test_cosine():
    rates = [gpt2.cosine(step, 110, peak=1.0, final=0.1, warmup=10) for step in (1, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1])


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
    config = gpt2.Config(vocab_size=61)
    text = np.frombuffer(b"to be, or not to be, that is the question. " * 100, np.uint8) % 61
    batches = (gpt2.batch(text, step, 0, 12, config.max_seq_len) for step in range(30))
    params = gpt2.init(config, 0)
    losses = [loss for loss, _ in gpt2.train(config, params, batches, lambda step: 1e-3)]
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
    losses = [gpt2.forward(TINY, params, text[None, i:i + 8], text[None, i + 1:i + 9])[1] for i in range(0, 8 * 37, 8)]
    assert gpt2.evaluate(TINY, params, text) == pytest.approx(np.mean(losses), rel=1e-12)


def test_sampling_depends_on_the_seed_alone():
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


def test_command_line(tmp_path):
    assert run("--check").returncode == 0
    done = run("--steps", "3")
    assert done.returncode == 0 and "step 3/3" in done.stdout and "val loss" in done.stdout
    (tmp_path / "short.txt").write_text("too short")
    refused = run(str(tmp_path / "short.txt"))
    assert refused.returncode == 2 and "[text]" in refused.stderr and "Traceback" not in refused.stderr


# ---- the exercises of chapter 1, solved ------------------------------------------------------------------------------

def test_exercise_1_a_term_goes_missing(monkeypatch):
    def broken(params, grads, name, dy, saved):
        n, rstd = saved
        grads[name + ".weight"] = (dy * n).sum(0)
        grads[name + ".bias"] = dy.sum(0)
        dn = dy * params[name + ".weight"]
        return rstd * (dn - dn.mean(1, keepdims=True))

    monkeypatch.setattr(gpt2, "layernorm_backward", broken)
    right = {name for name, error in gpt2.check(TINY).items() if error < 1e-6}
    # The last norm's own parameters see its dy, which is right; everything before it sees its dx, which is not.
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
        return rstd * (dn - n * (dn * n).mean(1, keepdims=True))  # the mean may move now, so its term is gone

    monkeypatch.setattr(gpt2, "layernorm", rmsnorm)
    monkeypatch.setattr(gpt2, "layernorm_backward", rmsnorm_backward)
    assert max(gpt2.check(TINY).values()) < 1e-6


def test_exercise_4_attention_that_saves_one_number_per_row(monkeypatch):
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
            z = x[rows] @ params["wte.weight"][:SMALL.vocab_size].T
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
            grads["wte.weight"][:config.vocab_size] += dz.T @ x[rows]
            dx[rows] = dz @ params["wte.weight"][:config.vocab_size]
        return dx

    monkeypatch.setattr(gpt2, "lm_loss", lm_loss)
    monkeypatch.setattr(gpt2, "lm_loss_backward", lm_loss_backward)
    # N = 16384, V = 50257 in float32: three arrays of 3.3 GB become three of 0.8 GB; the price is the matmul again.
    assert worst(gradients(SMALL, weights(SMALL), *tokens(SMALL)), want)[0] < 1e-12


def test_exercise_6_two_halves_make_a_batch():
    params, (ids, targets) = weights(SMALL), tokens(SMALL, B=12)
    first, second = gradients(SMALL, params, ids[:6], targets[:6]), gradients(SMALL, params, ids[6:], targets[6:])
    mean = {name: (first[name] + second[name]) / 2 for name in params}
    # Not so when the halves count different numbers of targets: then weigh each half by its own count.
    assert worst(mean, gradients(SMALL, params, ids, targets))[0] < 1e-12


def test_chapter_1_and_the_package_are_the_same_computation(tmp_path):
    """Ten optimizer steps from the same weights on the same batches, float32: the losses differ by rounding only."""
    import handgrad as hg
    from handgrad.data import id_dtype, write_shard

    ids = np.random.default_rng(3).integers(0, SMALL.vocab_size, 4000)
    write_shard(tmp_path / "train_0.bin", [ids], id_dtype(SMALL.vocab_size))
    data = hg.data.tokens(tmp_path / "*.bin", seq_len=SMALL.max_seq_len, batch_tokens=6 * SMALL.max_seq_len)
    model = hg.models.GPT2(SMALL.vocab_size, SMALL.max_seq_len, SMALL.num_layers, SMALL.num_heads, SMALL.hidden_size)
    run = hg.Trainer(model, hg.optim.AdamW(betas=(0.9, 0.99)), data, micro_batch=6, val=False, sample=False)
    params = {name: p.astype(np.float32) for name, p in run.params().items()}
    batches = [data.batch(step) for step in range(10)]
    theirs = [loss for loss, _ in gpt2.train(SMALL, params, [(b["ids"], b["targets"]) for b in batches], lambda step: 1e-3)]
    ours = [run.step(step, 1e-3).loss for step in range(1, 11)]
    print("largest difference of a loss", max(abs(a - b) for a, b in zip(ours, theirs)))
    assert ours[0] > ours[-1]
    assert np.allclose(ours, theirs, rtol=0, atol=2e-5)  # float32 sums in another order, ten updates apart
