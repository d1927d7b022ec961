"""The C headers that the kernels share: vmath.h's error bounds, philox.h's known answers, rounding to bf16."""

import ctypes
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import handgrad
from handgrad.backends.arena import STEP_SCALARS_DTYPE
from handgrad.backends.cpu import arguments
from handgrad.ops.dropout.reference import keep_mask, philox4x32

INCLUDE = Path(handgrad.__file__).parent / "backends" / "cpu" / "include"
SOURCE = """
#include "philox.h"
#include "vmath.h"
#define SWEEP(f, type) EXPORT void sweep_##f(type *y, const float *x, int64_t n) { \\
  _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = f(x[i]); }
SWEEP(vexp, float)
SWEEP(vtanh, float)
SWEEP(vgelu, float)
SWEEP(vgelu_grad, float)
SWEEP(float_to_bf16, bf16)
EXPORT void four(uint32_t *out, uint64_t lo, uint64_t hi, uint64_t key) {
  philox4 r = philox(lo, hi, key);
  memcpy(out, r.v, sizeof r.v);
}
EXPORT void factors(float *out, int64_t first, int64_t n, const StepScalars *scalars, double p, int64_t call) {
  dropout_factors(out, first, n, dropout_rule(scalars, (float)p, call));
}
"""
KNOWN = (  # counter (lo, hi), key, answer: test vectors published with Random123
    ((0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**64 - 1, 2**64 - 1), 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
)


@pytest.fixture(scope="module", params=[[], ["-march=native"]], ids=["baseline", "native"])
def lib(request, tmp_path_factory):
    """The headers, compiled with the flags of the kernels."""
    folder = tmp_path_factory.mktemp("headers")
    (folder / "headers.c").write_text(SOURCE)
    flags = "-std=gnu11 -O3 -fPIC -shared -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
    target = str(folder / "headers.so")
    (folder / "arguments.h").write_text(arguments.header(INCLUDE.parents[2]))
    names = [
        f"-I{INCLUDE}",
        f"-I{folder}",
        "-DHG_DTYPE=f32",
        "-DHG_ISA=test",
        str(folder / "headers.c"),
        "-lm",
        "-o",
        target,
    ]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *request.param, *names], check=True)
    return ctypes.CDLL(target)


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def sweep(lib, name, x, dtype=np.float32):
    y = np.empty(x.shape, dtype)
    getattr(lib, "sweep_" + name)(pointer(y), pointer(x), ctypes.c_int64(x.size))
    return y


def floats(low, high, stride=499):
    """Every stride-th float32 between low < 0 and high > 0."""
    parts = [np.arange(0, int(np.float32(abs(end)).view(np.uint32)), stride, dtype=np.uint32) for end in (low, high)]
    return np.concatenate([-parts[0].view(np.float32), parts[1].view(np.float32)])


def logistic_u(x):
    """u, the argument of tanh in GELU, and its derivative, float64."""
    k = np.sqrt(2 / np.pi)
    return k * (x + 0.044715 * x**3), k * (1 + 3 * 0.044715 * x**2)


def test_exp_error_bound(lib):
    x = floats(-87.3365, 88.7228)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(sweep(lib, "vexp", x) - exact) / np.spacing(exact.astype(np.float32))) <= 1.1


def test_tanh_error_bound(lib):
    x = floats(-30, 30)
    exact = np.tanh(x.astype(np.float64))
    assert np.max(np.abs(sweep(lib, "vtanh", x) - exact) / np.spacing(np.abs(exact).astype(np.float32))) <= 3


def test_gelu_error_bound(lib):
    x = floats(-30, 30)
    u, _ = logistic_u(x.astype(np.float64))
    exact = x * (0.5 + 0.5 * np.tanh(u))
    assert np.max(np.abs(sweep(lib, "vgelu", x) - exact) / np.maximum(1, np.abs(exact))) <= 1.5e-7


def test_gelu_grad_error_bound(lib):
    x = floats(-30, 30)
    u, du = logistic_u(x.astype(np.float64))
    t = np.tanh(u)
    exact = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du
    assert np.max(np.abs(sweep(lib, "vgelu_grad", x) - exact)) <= 2.5e-7


def test_vmath_special_values(lib):
    x = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 100, -100, 0, -0.0], np.float32)
    inf = np.inf
    np.testing.assert_array_equal(sweep(lib, "vexp", x), np.float32([np.nan, inf, 0, inf, 0, inf, 0, 1, 1]))
    np.testing.assert_array_equal(sweep(lib, "vtanh", x), np.float32([np.nan, 1, -1, 1, -1, 1, -1, 0, 0]))
    large = np.float32([np.nan, inf, 3e38, -3e38, 100, -100, 0])
    np.testing.assert_array_equal(sweep(lib, "vgelu", large), np.float32([np.nan, inf, 3e38, 0, 100, 0, 0]))
    slope = sweep(lib, "vgelu_grad", x)
    np.testing.assert_allclose(slope, [np.nan, 1, 0, 1, 0, 1, 0, 0.5, 0.5], atol=1e-30)


def test_bf16_rounds_to_nearest_even(lib):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    halves = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000  # every tie
    x = np.concatenate([bits, halves]).view(np.float32)
    got, is_nan = sweep(lib, "float_to_bf16", x, np.uint16), np.isnan(x)
    np.testing.assert_array_equal(got[~is_nan], x[~is_nan].astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.isnan(got[is_nan].view(ml_dtypes.bfloat16).astype(np.float32)).all()


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_philox_known_answers(lib, counter, key, answer):
    out = np.empty(4, np.uint32)
    lib.four(pointer(out), *(ctypes.c_uint64(v) for v in (*counter, key)))
    assert " ".join(f"{v:08x}" for v in out) == answer
    assert " ".join(f"{v:08x}" for v in philox4x32(np.uint64(counter[0]), counter[1], key)) == answer


@pytest.mark.parametrize("first, n", [(0, 512), (1, 511), (7, 1), (2**34 - 3, 100), (2**40 + 2, 37)])
def test_dropout_mask_matches_oracle(lib, first, n):
    scalars = np.zeros(1, STEP_SCALARS_DTYPE)
    scalars["seed"], scalars["step"], scalars["micro_step"] = 2**63 + 5, 70_000, 3
    out = np.empty(n, np.float32)
    span = ctypes.c_int64(first), ctypes.c_int64(n)
    lib.factors(pointer(out), *span, pointer(scalars), ctypes.c_double(0.1), ctypes.c_int64(900))
    kept = keep_mask(np.arange(first, first + n, dtype=np.uint64), 0.1, 2**63 + 5, 70_000, 3, 900)
    np.testing.assert_array_equal(out, np.where(kept, np.float32(1) / np.float32(0.9), 0))
