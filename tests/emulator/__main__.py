"""python -m tests.emulator [OP ...] [--verbose]: see the package's docstring."""

import sys
import time

from handgrad.core.dtypes import BF16, F32
from handgrad.ops import OPS
from handgrad.testing import check_case
from tests.emulator import EmulatedBackend, variants

names = [word for word in sys.argv[1:] if word != "--verbose"]
bad = 0
for op in [OPS[name] for name in names] or [op for op in OPS.values() if EmulatedBackend().has(op)]:
    for case in op.cases:
        if case.real:
            continue
        for dtype in (F32, BF16):
            for name, variant in variants(op, case, dtype).items():
                start, worst = time.perf_counter(), float("inf")
                try:
                    errors = check_case(op, case, EmulatedBackend(variant), dtype)
                    worst, said = (
                        max((e.ratio for e in errors), default=0.0),
                        " ".join(f"{e.out} {e.ratio:.2f}" for e in errors),
                    )
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"
                bad += worst > 1
                sizes = " ".join(f"{k}={v}" for k, v in case.sizes.items())
                without = f" without {' '.join(case.without)}" if case.without else ""
                print(
                    f"{'ok  ' if worst <= 1 else 'BAD '} {worst:5.2f} {op.name:24} {dtype} {name:13} {sizes}{without}  {time.perf_counter() - start:.2f} s",
                    flush=True,
                )
                if worst > 1 or "--verbose" in sys.argv:
                    print(f"     {said}")
print("error / tolerance is at most 1 everywhere" if not bad else f"{bad} are BAD")
sys.exit(int(bad > 0))
