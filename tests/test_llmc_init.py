"""P2: the weights that llm.c starts from are torch's own draws, without torch."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

import handgrad as hg
from handgrad.core.errors import HandgradError
from handgrad.models import GPT2
from handgrad.train.llmc_init import Twister

torch = pytest.importorskip("torch")

SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 100, 1000, 65537 * 16 + 5)

# torch has two versions of normal_: scalar code over the C library's functions, which llm.c follows, and vector code with
# functions of its own. ATEN_CPU_CAPABILITY chooses when torch starts.
DRAW = """
import sys, numpy as np, torch
torch.manual_seed({seed})
np.save(sys.argv[1], torch.cat([torch.empty(n).normal_(0, std) for n, std in {draws}]).numpy())
"""


def torchs(tmp_path, draws, seed=42):
    """Draws [(count, std)] by torch's scalar code."""
    path = tmp_path / "draws.npy"
    command = [sys.executable, "-c", DRAW.format(seed=seed, draws=draws), str(path)]
    subprocess.run(command, check=True, env=os.environ | {"ATEN_CPU_CAPABILITY": "default"})
    return np.load(path)


@pytest.mark.parametrize("seed", [42, 0, 2**32 - 1])
def test_p2_normals_of_torch_bit_for_bit(tmp_path, seed):
    draws = [(n, 0.02) for n in SIZES if n >= 16]  # below, torch keeps the odd half of a pair for the next tensor
    twister = Twister(seed)
    ours = np.concatenate([twister.normal(*draw) for draw in draws])
    theirs = torchs(tmp_path, draws, seed)
    # llm.c adds 1e-12 below the logarithm: it moves a radius in 2^16 numbers by a bit or two
    same = ours == theirs
    assert same.mean() > 1 - 2**-15
    assert np.abs(ours - theirs).max() <= 8 * 2**-24 * 0.02 * 5.8


@pytest.mark.parametrize("count", [n for n in SIZES if n < 16])
def test_p2_few_numbers_bit_for_bit(tmp_path, count):
    assert (Twister().normal(count, 0.02) == torchs(tmp_path, [(count, 0.02)])).all()


@pytest.mark.parametrize("count", SIZES)
def test_p2_normals_equal_torchs_vector_code_within_its_error(count):
    """It multiplies by a float32 2 pi: the angle, up to 2 pi, is off by 3 roundings; the radius is at most sqrt(48 ln 2)."""
    torch.manual_seed(42)
    theirs = torch.empty(count).normal_(0, 0.02).numpy()
    tolerance = 0.02 * (48 * np.log(2)) ** 0.5 * (3 * 2 * np.pi + 4) * 2.0**-24
    assert np.abs(Twister().normal(count, 0.02) - theirs).max() <= tolerance


def weights(shards, **sizes):
    model = GPT2(vocab_size=97, max_seq_len=20, num_heads=2, **sizes)
    data = hg.data.tokens(shards, seq_len=16, batch_tokens=32)
    execution, start = hg.Execution(2, backend="cpu"), hg.Start(seed=1, init="llmc")
    return model, hg.Trainer(
        model, hg.optim.AdamW(), data, precision=hg.Precision("f32"), execution=execution, start=start
    ).params()


@pytest.mark.parametrize("layers", [1, 2, 6])  # at 6 llm.c's residual deviation is not the nearest float32
def test_p2_initial_weights_equal_llmcs(shards, tmp_path, layers):
    C = 10
    model, ours = weights(shards, num_layers=layers, hidden_size=C)
    residual = np.float32(0.02) * (np.float32(1) / np.sqrt(np.float32(2 * layers)))
    assert (residual != np.float32(0.02 / (2 * layers) ** 0.5)) == (layers == 6)
    wanted = [("wte.weight", 97 * C, 0.02), ("wpe.weight", 20 * C, 0.02)]
    for i in range(layers):
        wanted += [
            (f"h.{i}.attn.c_attn.weight", 3 * C * C, 0.02),
            (f"h.{i}.attn.c_proj.weight", C * C, float(residual)),
            (f"h.{i}.mlp.c_fc.weight", 4 * C * C, 0.02),
            (f"h.{i}.mlp.c_proj.weight", 4 * C * C, float(residual)),
        ]
    theirs = torchs(tmp_path, [(n, std) for _, n, std in wanted])
    at = 0
    for name, n, _ in wanted:
        assert (ours[name].reshape(-1)[:n] == theirs[at : at + n]).all(), name
        at += n
    assert not ours["wte.weight"][97:].any()
    rest = {name: w for name, w in ours.items() if name not in {name for name, *_ in wanted}}
    assert all((w == (1 if name.endswith("weight") else 0)).all() for name, w in rest.items())


def test_p2_124m_in_seconds():
    twister, begin = Twister(), time.perf_counter()
    for count in [50257 * 768, 1024 * 768, *12 * [3 * 768**2, 768**2, 4 * 768**2, 4 * 768**2]]:
        twister.normal(count, 0.02)
    assert time.perf_counter() - begin < 20  # 1.4 s on two free cores


def test_unknown_init_is_refused():
    with pytest.raises(
        HandgradError, match=r"\[train\] weights start as 'random', 'llmc', or a model on disk, but got 'lmc'"
    ):
        hg.Start(init="lmc")
