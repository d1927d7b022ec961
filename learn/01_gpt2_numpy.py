"""Chapter 1: a GPT-2 whose gradients are written by hand, in numpy.

    python learn/01_gpt2_numpy.py --steps 100     train on Shakespeare, then sample
    python learn/01_gpt2_numpy.py --check         compare every gradient with finite differences

Each layer is a forward function and, directly below it, its backward. A forward returns its output and whatever its
backward needs. A backward takes the gradient of the output, stores the gradients of its parameters, and returns the
gradient of the input. `dx` always means d loss / d x and has the shape of x.

One flat dictionary holds the parameters, under Hugging Face's names; a second one holds the gradients, under the same
names. Letters: B sequences of T tokens make N = B*T rows of C channels; H heads of D = C/H channels; V tokens in the
vocabulary. Plain softmax, plain loops over layers, nothing clever: the formulas are the point.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHAKESPEARE = Path(__file__).resolve().parents[1] / "src/handgrad/data/shakespeare.txt"


@dataclass(frozen=True)
class Config:
    vocab_size: int
    max_seq_len: int = 64
    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128


def init(config, seed, dtype="float32"):
    """Returns fresh parameters. Matrices are (out, in); zero rows pad the vocabulary to a multiple of 128."""
    rng = np.random.default_rng(seed)
    C, V = config.hidden_size, config.vocab_size
    # Every layer adds two branches to the residual stream. Smaller weights keep its variance independent of the depth.
    shrunk = 0.02 / math.sqrt(2 * config.num_layers)
    params = {"wte.weight": np.zeros((-(-V // 128) * 128, C))}
    params["wte.weight"][:V] = rng.normal(0, 0.02, (V, C))
    params["wpe.weight"] = rng.normal(0, 0.02, (config.max_seq_len, C))

    def add(name, weight):
        params[name + ".weight"], params[name + ".bias"] = weight, np.zeros(len(weight))

    for h in (f"h.{i}" for i in range(config.num_layers)):
        add(f"{h}.ln_1", np.ones(C))
        add(f"{h}.attn.c_attn", rng.normal(0, 0.02, (3 * C, C)))
        add(f"{h}.attn.c_proj", rng.normal(0, shrunk, (C, C)))
        add(f"{h}.ln_2", np.ones(C))
        add(f"{h}.mlp.c_fc", rng.normal(0, 0.02, (4 * C, C)))
        add(f"{h}.mlp.c_proj", rng.normal(0, shrunk, (C, 4 * C)))
    add("ln_f", np.ones(C))
    return {name: p.astype(dtype) for name, p in params.items()}


# ---- the layers ------------------------------------------------------------------------------------------------------


def embed(params, ids):
    """x[b,t] = wte[ids[b,t]] + wpe[t].   ids: (B, T) -> x: (N, C)"""
    x = params["wte.weight"][ids] + params["wpe.weight"][: ids.shape[1]]
    return x.reshape(ids.size, -1), ids


def embed_backward(params, grads, dx, ids):
    # Forward copies row r of wte to every position that holds token r, so its gradient is the sum over those positions.
    # It copies row t of wpe to position t of every sequence, so its gradient is the sum over the batch.
    np.add.at(grads["wte.weight"], ids.ravel(), dx)  # adds to the gradient from the head, which shares wte
    grads["wpe.weight"] = np.zeros_like(params["wpe.weight"])
    grads["wpe.weight"][: ids.shape[1]] = dx.reshape(*ids.shape, -1).sum(0)


def linear(params, name, x):
    """y = x W' + b.   x: (N, I), W: (O, I), b: (O) -> y: (N, O)"""
    return x @ params[name + ".weight"].T + params[name + ".bias"], x


def linear_backward(params, grads, name, dy, x):
    # y_no = sum_i x_ni W_oi + b_o.  Nudging x_ni moves y_no by W_oi for every o:  dx_ni = sum_o dy_no W_oi.
    # Nudging W_oi moves y_no by x_ni for every n:  dW_oi = sum_n dy_no x_ni;  in the same way  db_o = sum_n dy_no.
    grads[name + ".weight"] = dy.T @ x
    grads[name + ".bias"] = dy.sum(0)
    return dy @ params[name + ".weight"]


def layernorm(params, name, x):
    """y = n w + b with n = (x - mean) * rstd, over the channels of each row.   x: (N, C) -> y: (N, C)"""
    centred = x - x.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(1, keepdims=True) + 1e-5)
    n = centred * rstd
    return n * params[name + ".weight"] + params[name + ".bias"], (n, rstd)


def layernorm_backward(params, grads, name, dy, saved):
    # n does not change when x moves along the all-ones vector (only the mean changes) or along n (only the deviation
    # changes). So remove both directions and scale by rstd:  dx = rstd (dn - 1 <dn> - n <dn n>),  <> = mean over C.
    n, rstd = saved
    grads[name + ".weight"] = (dy * n).sum(0)
    grads[name + ".bias"] = dy.sum(0)
    dn = dy * params[name + ".weight"]
    return rstd * (dn - dn.mean(1, keepdims=True) - n * (dn * n).mean(1, keepdims=True))


def gelu(x):
    """y = x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), elementwise."""
    th = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + th), (x, th)


def gelu_backward(dy, saved):
    # Product rule, and tanh' = 1 - tanh^2:   y' = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) u'
    # with u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2).
    x, th = saved
    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return dy * 0.5 * (1 + th + x * (1 - th * th) * du)


def attention(config, qkv, T):
    """o = softmax(q k' / sqrt(D)) v in each sequence and head, with a causal mask.   (N, 3C) -> (N, C)"""
    H, D = config.num_heads, config.hidden_size // config.num_heads
    q, k, v = qkv.reshape(-1, T, 3, H, D).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
    scores[:, :, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(3, keepdims=True))
    p /= p.sum(3, keepdims=True)
    return (p @ v).transpose(0, 2, 1, 3).reshape(len(qkv), H * D), (p, q, k, v)


def attention_backward(do, saved):
    # o = p v is linear in p and in v, so  dv = p' do  and  dp = do v'.  The softmax p_i = e^s_i / sum_j e^s_j has
    # dp_i/ds_j = p_i (1[i=j] - p_j),  hence  ds_i = p_i (dp_i - sum_j dp_j p_j);  where masked, p = 0, so ds = 0.
    p, q, k, v = saved
    B, H, T, D = q.shape
    do = do.reshape(B, T, H, D).transpose(0, 2, 1, 3)
    dv = p.swapaxes(2, 3) @ do
    dp = do @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(3, keepdims=True)) / math.sqrt(D)
    dq, dk = ds @ k, ds.swapaxes(2, 3) @ q
    return np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B * T, 3 * H * D)


def self_attention(config, params, name, x, T):
    """c_attn computes query q, key k and value v of each row; c_proj mixes the heads.   (N, C) -> (N, C)"""
    qkv, c_attn = linear(params, name + ".c_attn", x)
    o, attn = attention(config, qkv, T)
    y, c_proj = linear(params, name + ".c_proj", o)
    return y, (c_attn, attn, c_proj)


def self_attention_backward(params, grads, name, dy, saved):
    # The chain rule: the three calls of the forward in reverse order, each replaced by its backward.
    c_attn, attn, c_proj = saved
    do = linear_backward(params, grads, name + ".c_proj", dy, c_proj)
    dqkv = attention_backward(do, attn)
    return linear_backward(params, grads, name + ".c_attn", dqkv, c_attn)


def mlp(params, name, x):
    """Per row: expand to 4C channels, GELU, project back.   x: (N, C) -> (N, C)"""
    u, c_fc = linear(params, name + ".c_fc", x)
    a, act = gelu(u)
    y, c_proj = linear(params, name + ".c_proj", a)
    return y, (c_fc, act, c_proj)


def mlp_backward(params, grads, name, dy, saved):
    c_fc, act, c_proj = saved
    da = linear_backward(params, grads, name + ".c_proj", dy, c_proj)
    du = gelu_backward(da, act)
    return linear_backward(params, grads, name + ".c_fc", du, c_fc)


def block(config, params, name, x, T):
    """x + attention(norm(x)), then x + mlp(norm(x)): a layer reads the residual stream and adds to it."""
    n, ln_1 = layernorm(params, name + ".ln_1", x)
    branch, attn = self_attention(config, params, name + ".attn", n, T)
    x = x + branch
    n, ln_2 = layernorm(params, name + ".ln_2", x)
    branch, mlp_saved = mlp(params, name + ".mlp", n)
    return x + branch, (ln_1, attn, ln_2, mlp_saved)


def block_backward(params, grads, name, dx, saved):
    # y = x + f(x) gives dx = dy + (gradient through f): a sum passes its gradient to both terms, so the stream's own
    # share goes through unchanged. That is why deep residual networks train.
    ln_1, attn, ln_2, mlp_saved = saved
    dn = mlp_backward(params, grads, name + ".mlp", dx, mlp_saved)
    dx = dx + layernorm_backward(params, grads, name + ".ln_2", dn, ln_2)
    dn = self_attention_backward(params, grads, name + ".attn", dx, attn)
    return dx + layernorm_backward(params, grads, name + ".ln_1", dn, ln_1)


def lm_loss(config, params, x, targets):
    """Logits z = x wte' and the mean over rows of -log softmax(z)[target].   x: (N, C) -> (N, V), scalar"""
    z = x @ params["wte.weight"][: config.vocab_size].T
    if targets is None:
        return z, None, None
    e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    rows = np.arange(len(x)), targets.ravel()
    return z, -np.log(p[rows]).mean(), (x, p, rows)


def lm_loss_backward(config, params, grads, saved):
    # -log p_t = log sum_j e^z_j - z_t, so its derivative in z_j is p_j - 1[j=t]; the mean divides by N.
    # z = x wte' is a linear layer without bias; it does not use the padding rows of wte, so their gradient is 0.
    x, p, rows = saved
    dz = p.copy()
    dz[rows] -= 1
    dz /= len(x)
    grads["wte.weight"] = np.zeros_like(params["wte.weight"])
    grads["wte.weight"][: config.vocab_size] = dz.T @ x
    return dz @ params["wte.weight"][: config.vocab_size]


# ---- the model -------------------------------------------------------------------------------------------------------


def forward(config, params, ids, targets=None):
    """Returns logits (B, T, V), the mean loss in nats per token (None without targets), and what backward needs."""
    x, emb = embed(params, ids)
    blocks = []
    for i in range(config.num_layers):
        x, saved = block(config, params, f"h.{i}", x, ids.shape[1])
        blocks.append(saved)
    n, ln_f = layernorm(params, "ln_f", x)
    logits, loss, head = lm_loss(config, params, n, targets)
    return logits.reshape(*ids.shape, -1), loss, (emb, blocks, ln_f, head)


def backward(config, params, saved):
    """Returns the gradient of the loss, one array per parameter, under the parameter's name."""
    emb, blocks, ln_f, head = saved
    grads = {}
    dn = lm_loss_backward(config, params, grads, head)
    dx = layernorm_backward(params, grads, "ln_f", dn, ln_f)
    for i in reversed(range(config.num_layers)):
        dx = block_backward(params, grads, f"h.{i}", dx, blocks[i])
    embed_backward(params, grads, dx, emb)
    return grads


def check(config, seed=0):
    """Returns {name: error}: for each parameter, |slope of the loss along a random direction u - gradient . u|.

    The slope is (loss(p + e u) - loss(p - e u)) / 2e in float64; the error is relative to the norm of the gradient.
    """
    rng = np.random.default_rng(seed)
    # Far from the initial values: zero biases and norm weights of 1 would hide mistakes.
    params = {name: p + rng.normal(0, 0.2, p.shape) for name, p in init(config, seed, "float64").items()}
    ids, targets = rng.integers(0, config.vocab_size, (2, 3, config.max_seq_len))
    grads = backward(config, params, forward(config, params, ids, targets)[2])
    errors, e = {}, 1e-5
    for name, p in params.items():
        u = rng.normal(size=p.shape)
        up, down = (forward(config, params | {name: p + step * u}, ids, targets)[1] for step in (e, -e))
        errors[name] = abs((up - down) / (2 * e) - (grads[name] * u).sum()) / np.linalg.norm(grads[name])
    return errors


# ---- training --------------------------------------------------------------------------------------------------------


def clip(grads, limit):
    """Returns the norm of all gradients as one vector; if it exceeds `limit`, scales them down to it, in place."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    for g in grads.values():
        g *= min(1.0, limit / (norm + 1e-6))
    return norm


def adamw(params, grads, m, v, step, lr, betas, eps, weight_decay):
    """One AdamW update, in place. m, v: running means of g and g^2, by name, zero at first; step counts from 1."""
    for name, p in params.items():
        g = grads[name]
        if p.ndim == 2:  # biases and norm weights do not decay
            p *= 1 - lr * weight_decay
        m[name] += (1 - betas[0]) * (g - m[name])
        v[name] += (1 - betas[1]) * (g * g - v[name])
        # Means that start at zero are too small by a factor of 1 - beta^step: undo that.
        p -= lr / (1 - betas[0] ** step) * m[name] / (np.sqrt(v[name]) / math.sqrt(1 - betas[1] ** step) + eps)


def train(config, params, batches, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, max_norm=1.0):
    """Updates params in place, a step per (ids, targets); yields (loss, gradient norm). lr: step (from 1) -> rate."""
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for step, (ids, targets) in enumerate(batches, 1):
        _, loss, saved = forward(config, params, ids, targets)
        grads = backward(config, params, saved)
        norm = clip(grads, max_norm)
        adamw(params, grads, m, v, step, lr(step), betas, eps, weight_decay)
        yield float(loss), norm


def cosine(step, steps, peak, final, warmup):
    """Returns the learning rate of a step, counted from 1: linear up to `peak`, then half a cosine towards `final`."""
    if step <= warmup:
        return peak * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


def batch(tokens, step, seed, B, T):
    """Returns ids, targets (B, T): B random windows, and the same shifted by one token. A pure function."""
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - T, B)
    windows = tokens[starts[:, None] + np.arange(T + 1)]
    return windows[:, :-1], windows[:, 1:]


def evaluate(config, params, tokens):
    """Returns the mean loss over the text, split into windows of max_seq_len; drops the incomplete last window."""
    T = config.max_seq_len
    count = (len(tokens) - 1) // T
    windows = np.stack([tokens[: count * T].reshape(count, T), tokens[1 : count * T + 1].reshape(count, T)])
    total = 0.0
    for i in range(0, count, 16):
        ids, targets = windows[:, i : i + 16]
        total += float(forward(config, params, ids, targets)[1]) * len(ids)
    return total / count


def sample(config, params, ids, count, seed, temperature=1.0):
    """Returns ids (a list) followed by `count` sampled tokens. temperature 0 takes the most likely token."""
    rng = np.random.default_rng(seed)
    ids = list(ids)
    for _ in range(count):
        logits = forward(config, params, np.array([ids[-config.max_seq_len :]]))[0][0, -1]
        # The argmax of logits plus Gumbel noise is a sample from their softmax.
        ids.append(int(np.argmax(logits + temperature * rng.gumbel(size=len(logits)))))
    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, default=SHAKESPEARE, help="text to train on (or Shakespeare)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 12 x 64 characters")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and the sample")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--check", action="store_true", help="check the gradients instead of training")
    args = parser.parse_args()

    if args.check:
        errors = check(Config(vocab_size=11, max_seq_len=8, num_layers=2, num_heads=2, hidden_size=12))
        for name, error in errors.items():
            print(f"{name:24} {error:.1e}{'' if error <= 1e-6 else '   WRONG'}")
        worst = float(np.max(list(errors.values())))  # np.max, unlike max(), returns NaN if there is one
        is_right = worst <= 1e-6
        print(f"gradients: worst relative error {worst:.1e}, {'pass' if is_right else 'FAIL'} (at most 1e-06)")
        raise SystemExit(int(not is_right))

    text = args.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    code = {c: i for i, c in enumerate(characters)}
    tokens = np.array([code[c] for c in text])
    train_tokens, val_tokens = np.split(tokens, [len(tokens) * 9 // 10])

    config = Config(vocab_size=len(characters))
    if len(val_tokens) <= config.max_seq_len:
        parser.error(f"[text] at least 650 characters are needed, but {args.text} has {len(text)}")
    params = init(config, args.seed, args.dtype)
    print(f"{sum(p.size for p in params.values()):,} parameters, {len(train_tokens):,} characters to learn from")
    batches = (batch(train_tokens, step, args.seed, 12, config.max_seq_len) for step in range(args.steps))

    def lr(step):
        return cosine(step, args.steps, peak=1e-3, final=1e-4, warmup=args.steps // 20)

    start = time.perf_counter()
    for step, (loss, norm) in enumerate(train(config, params, batches, lr), 1):
        if step % 20 == 0 or step == args.steps:
            ms = (time.perf_counter() - start) / step * 1e3
            print(f"step {step}/{args.steps} | loss {loss:.3f} | grad {norm:.2f} | {ms:.0f} ms/step", flush=True)
    print(f"val loss {evaluate(config, params, val_tokens):.4f}\n")
    print("".join(characters[i] for i in sample(config, params, [code.get("\n", 0)], 300, args.seed)))


if __name__ == "__main__":
    main()

# ---- exercises -------------------------------------------------------------------------------------------------------
#
# After each, run --check: are the gradients still right? Solutions: tests/test_learn.py.
#
# 1. Delete the term `n * (dn * n).mean(...)` from layernorm_backward. Which parameters keep right gradients, and why?
# 2. Replace gelu by the squared ReLU, max(x, 0)^2, and write its backward. What must it save?
# 3. Replace layernorm by RMSNorm: n = x / sqrt(mean(x^2) + eps), no mean to subtract. Which term of dx goes away?
# 4. attention saves p: T numbers per row and head. Save lse = log sum_j e^s_j instead, one number per row and head,
#    and let the backward recompute p = e^(s - lse). Fast attention kernels do this.
# 5. lm_loss holds three arrays of N x V numbers. Process the rows in 4 slices, save only x, and let the backward
#    recompute p of each slice. How much memory does this save at N = 16384, V = 50257, and what does it cost?
# 6. Show that the gradient of a batch of 12 is the mean of the gradients of its two halves, so a large batch fits a
#    small machine (gradient accumulation). When is it not the mean? (Think of targets that the loss ignores.)
