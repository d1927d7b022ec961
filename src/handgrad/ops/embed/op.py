"""embed: token and position embeddings. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.embed import reference

GPT2 = "gpt2-124m, B=4 T=256"


class Embed(Op):
    """y = scale * wte[ids] + wpe[place]; without wpe only scale * wte[ids].

    The place of row n is positions[n] if they are given, each below Tmax; else n % T, and in decode scalars.position +
    n % T.
    """

    name = "embed"
    ins = "ids:N:i32 wte:V,C wpe:Tmax,C? positions:N:i32?"
    outs = "y:N,C"
    attrs = {"T": int, "decode": bool, "scale": float}
    params = "wte wpe"
    saved = "ids positions"
    cpu = CpuKernel("embed_forward", "y ids wte wpe positions scalars | N C T decode scale")
    cases = (
        case(N=6, C=33, V=11, Tmax=5, T=3, decode=False, scale=1.0, without="positions"),
        case(N=1, C=1, V=1, Tmax=1, T=1, decode=False, scale=1.0),
        case(N=4, C=1032, V=3, Tmax=2, T=2, decode=False, scale=1.0, without="positions"),
        case(N=9, C=24, V=3, Tmax=9, T=9, decode=False, scale=1.0, without="wpe positions"),
        case(N=9, C=24, V=3, Tmax=9, T=9, decode=False, scale=55.5, without="wpe positions"),
        case(N=6, C=33, V=11, Tmax=5, T=3, decode=False, scale=0.5),
        case(N=14, C=40, V=5, Tmax=9, T=7, decode=True, scale=1.0, without="positions"),
        case(N=14, C=40, V=5, Tmax=9, T=7, decode=True, scale=1.0),
        case(N=1024, C=768, V=50304, Tmax=1024, T=256, decode=False, scale=1.0, without="positions", real=GPT2),
    )

    def derive(self, d: dict[str, int]) -> None:
        if d["N"] % d["T"]:
            raise HandgradError("embed", f"the number of rows is a multiple of T = {d['T']}", d["N"])
        if d["T"] > d.get("Tmax", d["T"]):
            raise HandgradError("embed", f"wpe has at least {d['T']} rows, one per position", d["Tmax"])

    def ref(self, v: Any) -> tuple:
        return (reference.embed_forward(v, int(v.scalars.position) if v.decode else 0),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = _layout(c) | {"FORWARD": 1}
        grid = -(-c.sizes["N"] * (c.sizes["C"] // defines["VEC"]) // THREADS)
        return Launches(
            (Kernel("embed_forward_kernel", "y ids wte wpe positions scalars | N T decode", grid, THREADS, 0, defines),)
        )

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _indices(rng, arg, shape, v)

    def nbytes(self, c: Call) -> int:
        """Counts one row of wte per token, not the table, and the positions of one sequence."""
        positions = 0 if c.wpe is None else c.attrs["T"] * c.sizes["C"] * c.wpe.dtype.size
        return c.ids.nbytes + 2 * c.y.nbytes + positions

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        into = {"dwte": g.wanted_grad(c.wte), "dwpe": g.wanted_grad(c.wpe)}
        Tmax = 0 if c.wpe is None else c.wpe.shape[0]
        attrs = dict(V=c.wte.shape[0], Tmax=Tmax, T=c.attrs["T"], scale=c.attrs["scale"])
        g.emit(embed_backward, d["y"], c.ids, c.positions, into=into, **attrs)
        return {}  # ids have no gradient


class EmbedBackward(Op):
    """dwte[ids[n]] += scale * dy[n];  dwpe[n % T] += dy[n], with positions dwpe[positions[n]]."""

    name = "embed_backward"
    ins = "dy:N,C ids:N:i32 positions:N:i32?"
    outs = "+dwte:V,C:grad? +dwpe:Tmax,C:grad?"
    attrs = {"V": int, "Tmax": int, "T": int, "scale": float}
    cpu = CpuKernel("embed_backward", "dwte dwpe dy ids positions | N C V T Tmax scale accumulate.dwte accumulate.dwpe")
    cases = (
        case(N=6, C=33, V=11, Tmax=5, T=3, scale=1.0, without="positions"),
        case(N=1, C=1, V=1, Tmax=1, T=1, scale=1.0),
        case(N=60, C=100, V=3, Tmax=20, T=20, scale=1.0, without="positions"),
        case(N=60, C=100, V=3, Tmax=20, T=20, scale=0.5),
        case(N=2100, C=40, V=300, Tmax=700, T=700, scale=1.0, without="positions"),
        case(N=2100, C=40, V=300, Tmax=700, T=700, scale=1.0),
        case(N=300, C=1032, V=2, Tmax=12, T=10, scale=1.0, without="positions"),
        case(N=64, C=24, V=9, Tmax=0, T=64, scale=5.5, without="positions"),
        case(N=60, C=40, V=7, Tmax=20, T=20, scale=1.0, without="dwte positions"),
        case(N=60, C=40, V=7, Tmax=20, T=20, scale=1.0, without="dwpe"),
        case(N=1024, C=768, V=50304, Tmax=1024, T=256, scale=1.0, without="positions", real=GPT2),
    )

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return out == "dwte" or attrs["Tmax"] > 0

    def ref(self, v: Any) -> tuple:
        return reference.embed_backward(v)

    def nbytes(self, c: Call) -> int:
        """Counts the rows of dwte that tokens read and write, and all of dwte if it is set to zero first."""
        total = c.ids.nbytes + c.dy.nbytes + (0 if c.dwpe is None else 2 * c.dwpe.nbytes)
        if c.dwte is None:
            return total
        rows = 2 * min(c.sizes["N"], c.sizes["V"]) * c.sizes["C"] * c.dwte.dtype.size
        return total + rows + (c.dwte.nbytes if c.begins("dwte") else 0)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        N, C = c.sizes["N"], c.sizes["C"]
        d = _layout(c)
        accesses, chunks, segments = C // d["VEC"], -(-N // CHUNK), -(-N // SEGMENT)
        sum_threads = min(256, max(64, -(-accesses // 32) * 32))
        d |= {"FORWARD": 0, "ROWS": N, "SUM_THREADS": sum_threads, "CHUNK": CHUNK, "SEGMENT": SEGMENT}
        columns = -(-accesses // sum_threads)
        sorted_, partial = chunks * CHUNK * 8, (2 * chunks * CHUNK) * 8  # their offsets in scratch, bytes
        steps = []
        plain = d | {"SCALE": 1.0}
        tables = [] if c.dwte is None else [("dwte", "ids", "V", d)]
        if c.dwpe is not None and c.positions is None:
            grid = -(-c.sizes["Tmax"] * accesses // THREADS)
            steps.append(Kernel("embed_position_kernel", "dwpe dy | T Tmax accumulate.dwpe", grid, THREADS, 0, plain))
        elif c.dwpe is not None:
            tables.append(("dwpe", "positions", "Tmax", plain))
        for dw, ids, V, d in tables:
            add = f"accumulate.{dw}"
            if c.begins(dw):
                steps.append(Kernel("embed_zero_kernel", f"{dw} | {V} {add}", 8 * gpu.sms, THREADS, 0, d))
            steps += [
                Kernel("embed_sort_kernel", f"scratch {ids}", chunks, CHUNK // 2, 0, d),
                Kernel("embed_merge_kernel", f"scratch@{sorted_} scratch", chunks * CHUNK // THREADS, THREADS, 0, d),
            ]
            for entry, args in (
                ("embed_backward_kernel", f"{dw} scratch@{partial} dy scratch@{sorted_} | {add}"),
                ("embed_across_kernel", f"{dw} scratch@{partial} scratch@{sorted_} | {add}"),
            ):
                steps.append(Kernel(entry, args, (segments, columns, 1), sum_threads, 0, d))
        return Launches(tuple(steps), scratch=partial + segments * 2 * C * 4)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _indices(rng, arg, shape, v)


THREADS = 256  # of a CUDA block
CHUNK = 2048  # keys that a block sorts, two per thread
SEGMENT = 32  # sorted rows that a block sums


def _layout(c: Call) -> dict[str, Any]:
    vec = 16 // c.dtype.size
    vec = vec if c.sizes["C"] % vec == 0 else 1
    return {"THREADS": THREADS, "COLUMNS": c.sizes["C"], "VEC": vec, "SCALE": c.attrs["scale"]}


def _indices(rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
    """Random rows of the table that an input indexes."""
    table = {"ids": "V", "positions": "Tmax"}.get(arg.name)
    return None if table is None else rng.integers(0, v[table], shape, dtype="int32")


embed, embed_backward = Embed(), EmbedBackward()
