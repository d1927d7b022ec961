"""Peak rates of GPUs by product name, from NVIDIA's data sheets: dense matmuls and device memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Dense TFLOP/s by element type with float32 accumulation, and GB/s of device memory."""

    bf16: float
    tf32: float
    f32: float  # without tensor cores
    fp8: float | None  # None: no fp8
    gbps: float


# Data sheets and white papers: "NVIDIA A100 Tensor Core GPU", "NVIDIA Ampere GA102 GPU Architecture",
# "NVIDIA ADA GPU Architecture", "NVIDIA H100 Tensor Core GPU Architecture", "NVIDIA H200", "GH200 Grace Hopper",
# "NVIDIA Blackwell Architecture Technical Brief", "NVIDIA RTX Blackwell GPU Architecture", "HGX B300", "RTX PRO 6000".
# The sheets of Hopper and later print figures with sparsity, twice these. GeForce GPUs accumulate in float32 at half
# the printed rate. Names that stand for products of several speeds are left out; handgrad measures their peak.
# fmt: off
GPUS = {
    #                                             bf16    tf32    f32     fp8     GB/s
    "A30":                                  Peaks(165.0,   82.0,  10.3,   None,    933),
    "A100-PCIE-40GB":                       Peaks(312.0,  156.0,  19.5,   None,   1555),
    "A100-SXM4-40GB":                       Peaks(312.0,  156.0,  19.5,   None,   1555),
    "A100 80GB PCIe":                       Peaks(312.0,  156.0,  19.5,   None,   1935),
    "A100-SXM4-80GB":                       Peaks(312.0,  156.0,  19.5,   None,   2039),
    "A10":                                  Peaks(125.0,   62.5,  31.2,   None,    600),
    "A40":                                  Peaks(149.7,   74.8,  37.4,   None,    696),
    "RTX A5000":                            Peaks(111.1,   55.6,  27.8,   None,    768),
    "RTX A6000":                            Peaks(154.8,   77.4,  38.7,   None,    768),
    "RTX 3090":                             Peaks( 71.0,   35.6,  35.6,   None,    936),
    "RTX 3090 Ti":                          Peaks( 80.0,   40.0,  40.0,   None,   1008),
    "L4":                                   Peaks(121.0,   60.0,  30.3,  242.5,    300),
    "L40":                                  Peaks(181.0,   90.5,  90.5,  362.0,    864),
    "L40S":                                 Peaks(362.0,  183.0,  91.6,  733.0,    864),
    "RTX 4080":                             Peaks( 97.5,   48.7,  48.7,  194.9,    717),
    "RTX 4090":                             Peaks(165.2,   82.6,  82.6,  330.3,   1008),
    "RTX 6000 Ada Generation":              Peaks(364.2,  182.1,  91.1,  728.5,    960),
    "H100 PCIe":                            Peaks(756.0,  378.0,  51.2, 1513.0,   2039),
    "H100 80GB HBM3":                       Peaks(989.4,  494.7,  66.9, 1978.9,   3352),  # SXM
    "H100 NVL":                             Peaks(835.5,  417.5,  60.0, 1670.5,   3938),
    "H200":                                 Peaks(989.4,  494.7,  66.9, 1978.9,   4800),
    "H200 NVL":                             Peaks(835.5,  417.5,  60.0, 1670.5,   4800),
    "GH200 480GB":                          Peaks(989.4,  494.7,  66.9, 1978.9,   4000),  # 96 GB of HBM3
    "GH200 144G HBM3e":                     Peaks(989.4,  494.7,  66.9, 1978.9,   4900),
    "B100":                                 Peaks(1750.0, 875.0,  60.0, 3500.0,   8000),
    "B200":                                 Peaks(2250.0, 1125.0, 75.0, 4500.0,   8000),
    "GB200":                                Peaks(2500.0, 1250.0, 80.0, 5000.0,   8000),
    "B300 SXM6 AC":                         Peaks(2250.0, 1125.0, 75.0, 4500.0,   8000),
    "GB300":                                Peaks(2500.0, 1250.0, 80.0, 5000.0,   8000),
    "RTX 5080":                             Peaks(112.6,   56.3,  56.3,  225.1,    960),
    "RTX 5090":                             Peaks(209.5,  104.8, 104.8,  419.0,   1792),
    "RTX PRO 6000 Blackwell Workstation Edition":
                                            Peaks(503.8,  251.9, 125.9, 1007.6,   1792),
    "RTX PRO 6000 Blackwell Max-Q Workstation Edition":
                                            Peaks(438.9,  219.5, 109.7,  877.9,   1792),
}
# fmt: on


def peaks(name: str) -> Peaks | None:
    """The peaks of a GPU by the name that its driver reports; None for unknown names.

    MIG slices, laptop GPUs and reduced products have longer names and other peaks.

    >>> h100 = "NVIDIA H100 80GB HBM3"
    >>> peaks(h100).bf16, peaks("NVIDIA GeForce RTX 4090").gbps, peaks(h100 + " MIG 1g.10gb")
    (989.4, 1008, None)
    """
    return GPUS.get(name.removeprefix("NVIDIA ").removeprefix("GeForce "))
