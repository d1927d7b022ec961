"""attention_decode: appends new keys and values to the cache and attends to all of it. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.attention.reference import FAR
from handgrad.ops.attention_decode import reference

THREADS = 128  # of a CUDA block
GPT2 = "gpt2-124m, decode at 0 of 1024"


class AttentionDecode(Op):
    """Appends k, v of T new tokens at scalars.position;  y = softmax(scale q k') v over keys up to each token,
    of which it sees the last `window`, itself included (0: all). rel: a bias for each head and bucket of the distance
    of a key before its query (T5)."""

    name = "attention_decode"
    ins = "qkv:N,Q rel:R,H?"
    outs = "y:N,C +cache:B,S,2,K,D"
    attrs = {"T": int, "S": int, "H": int, "K": int, "window": int, "scale": float}
    params = "rel"
    cpu = CpuKernel(
        "attention_decode",
        "y cache qkv rel scalars scratch | N T S H K D R window scale",
        "attention_decode_scratch N T S H D threads",
    )
    cases = (
        case(N=1, Q=48, T=1, S=7, H=2, K=2, window=0, scale=8**-0.5, without="rel"),
        case(N=10, Q=99, T=5, S=13, H=1, K=1, window=0, scale=33**-0.5, without="rel"),
        case(N=128, Q=128, T=64, S=65, H=4, K=2, window=0, scale=0.25, without="rel"),
        case(N=10, Q=99, T=5, S=13, H=1, K=1, window=3, scale=0.3, without="rel"),
        case(N=300, Q=72, T=150, S=150, H=1, K=1, window=70, scale=1 / 16, without="rel"),
        case(N=14, Q=45, R=8, T=7, S=9, H=3, K=1, window=0, scale=1.0),
        case(N=1, Q=2304, T=1, S=1024, H=12, K=12, window=0, scale=0.125, without="rel", real=GPT2),
    )

    def derive(self, d: dict[str, int]) -> None:
        H, K = d["H"], d["K"]
        if H % K:
            raise HandgradError("attention_decode", f"the number of key/value heads divides the {H} query heads", K)
        if d["Q"] % (H + 2 * K):
            raise HandgradError("attention_decode", f"the width of qkv is a multiple of {H} + 2 x {K} heads", d["Q"])
        d["D"], d["B"] = d["Q"] // (H + 2 * K), d["N"] // d["T"]
        d["C"] = H * d["D"]
        if d.setdefault("R", 0) % 4 or d["R"] > FAR:
            raise HandgradError("attention_decode", f"rel has a multiple of 4 buckets, at most {FAR}", d["R"])

    def ref(self, v: Any) -> tuple:
        return reference.attention_decode(v.cache, v.qkv, v.rel, v.T, v.H, v.window, v.scale, int(v.scalars.position))

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        S, D, queries = c.sizes["S"], c.sizes["D"], c.sizes["N"] * c.sizes["H"]
        vec = 16 // c.dtype.size if D % (16 // c.dtype.size) == 0 else 1
        lanes = min(32, 1 << (-(-D // vec) - 1).bit_length())
        parts = max(1, min(2 * gpu.sms // queries, S // 128))  # two blocks per SM, at least 128 keys each
        defines = {"D": D, "VEC": vec, "LANES": lanes, "PARTS": parts, "THREADS": THREADS, "BUCKETS": c.sizes["R"]}
        args = "y scratch cache qkv rel scalars | T S H K window scale"
        attend = Kernel("attention_decode_kernel", args, (queries, parts, 1), THREADS, defines=defines)
        merge = Kernel("attention_decode_merge_kernel", "y scratch", queries, THREADS, defines=defines)
        return Launches((attend, merge) if parts > 1 else (attend,), scratch=4 * queries * parts * (D + 2))


attention_decode = AttentionDecode()
