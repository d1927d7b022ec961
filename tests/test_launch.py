"""The words of the launch vocabulary: what they resolve to."""

import pytest

from handgrad.backends.cuda.planner import GPUS, describe
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import MicroBatch, case, resolve_number, resolve_pointer
from handgrad.launch import Kernel, pointer_word, tensor_map_shape, type_defines
from handgrad.ops import OPS, wgmma_gemm
from handgrad.testing import case_program


@pytest.fixture(scope="module")
def call():
    wide = case(N=70, C=512, Vp=520, V=513, chunks=2, scale=1.0, softcap=0.0, without="b weights db")
    return case_program(OPS["lm_loss_forward_backward"], wide, BF16)[1]


def test_pointers(call):
    assert resolve_pointer("x", call) == (call.x, 0)
    assert resolve_pointer("x@4096", call) == (call.x, 4096)
    assert resolve_pointer(pointer_word("tma.x@4096:35x512"), call) == (call.x, 4096)
    assert resolve_pointer("scratch@128", call) == ("scratch", 128)
    assert resolve_pointer("scalars", call) == ("scalars", 0)
    assert resolve_pointer("null", call) == (None, 0)


def test_tensor_maps(call):
    assert tensor_map_shape("x", call) is None
    assert tensor_map_shape("tma.w", call) == (520, 512)
    assert tensor_map_shape("tma.x@4096:35x512", call) == (35, 512)


def test_numbers(call):
    assert [resolve_number(word, call) for word in ("V", "Vp", "35", "accumulate.dw")] == [513, 520, 35, 0]
    assert resolve_number("accumulate.dw", call, MicroBatch(first=False)) == 1


def test_type_defines(call):
    assert type_defines(call) == {"HG_BF16": 1, "HG_GRAD_BF16": 0}


def test_chunks_map_their_rows_of_x_and_logits(call):
    """Each exp GEMM reads the rows of its chunk, and writes as many rows of the one chunk of logits."""
    launches = call.op.cuda(call, GPUS["h100"])
    gemms = [s for s in launches.steps if isinstance(s, Kernel) and s.file == "exp_gemm.cu"]
    words = [k.args.partition("|")[0].split() for k in gemms]
    assert [resolve_pointer(pointer_word(w[0]), call) for w in words] == [(call.x, 0), (call.x, 35 * 512 * 2)]
    assert [[tensor_map_shape(word, call) for word in w[:3]] for w in words] == [[(35, 512), (520, 512), (35, 520)]] * 2


def test_features_follow_from_the_architecture():
    assert [(g.has_wgmma, g.has_tma) for g in (GPUS[n] for n in ("a100", "4090", "h100", "b200"))] == [
        (False, False),
        (False, False),
        (True, True),
        (False, True),
    ]
    small = describe("sm_90a", 4, 227 << 10, 1 << 20)
    assert wgmma_gemm.clusters(small) == 2 and wgmma_gemm.supports(small, BF16, 8, 16)
    assert not wgmma_gemm.supports(small, BF16, 12) and not wgmma_gemm.supports(small, F32, 8)
