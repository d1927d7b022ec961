"""Peak rates by the names that drivers report, and MFU."""

import pytest

from handgrad.backends.cuda.peaks import GPUS, peaks
from handgrad.models import gpt2
from handgrad.optim import AdamW
from handgrad.train.mfu import mfu


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),  # SXM; 1979 is with sparsity
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),  # older drivers report it without the brand
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),  # accumulates in float32; 142 is with float16
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
    ],
)
def test_known_names(name, bf16):
    assert peaks(name).bf16 == bf16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",  # a slice of a GPU
        "NVIDIA H100 64GB HBM2",  # made for one customer
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A10G",  # not an A10
        "NVIDIA A100-40C",  # a virtual GPU
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "Tesla V100-SXM2-16GB",
        "NVIDIA H100",
        "B",
        "",
    ],
)
def test_unknown_names_have_no_peaks(name):
    assert peaks(name) is None


def test_bandwidths_of_the_same_chip_differ():
    names = ["H100 PCIe", "H100 80GB HBM3", "H100 NVL", "H200"]
    assert [peaks("NVIDIA " + name).gbps for name in names] == [2039, 3352, 3938, 4800]


@pytest.mark.parametrize("name", GPUS)
def test_rates_of_a_gpu_are_consistent(name):
    """Tensor cores halve their rate each time the element doubles in size."""
    p = GPUS[name]
    assert p.bf16 / p.tf32 == pytest.approx(2, rel=0.02)
    assert p.fp8 is None or p.fp8 / p.bf16 == pytest.approx(2, rel=0.02)
    assert p.f32 <= p.tf32 * 1.01
    assert 300 <= p.gbps <= 8000


# published or measured on one H100: llm.c's table in tokens/s, and the MFU
@pytest.mark.parametrize(
    ("name", "speed", "percent"),
    [
        ("124m", 548_400, 44.5),
        ("355m", 208_600, 48.1),
        ("774m", 96_200, 47.9),
        ("1558m", 48_190, 47.8),
    ],
)
def test_mfu_equals_llmc(name, speed, percent):
    from handgrad.core.precision import Precision
    from handgrad.train.execution import Execution
    from handgrad.train.record import record_train

    model = gpt2(name)
    params = record_train(model, AdamW(), 1024, Precision("bf16"), Execution(1), chunks=1).num_params
    flops = model.flops_per_token(params, 1024)
    assert 100 * mfu(speed, flops, 989.4e12) == pytest.approx(percent, abs=0.1)
