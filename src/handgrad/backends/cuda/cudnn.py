"""cuDNN's attention by its Python frontend, on plain addresses. The cache on disk keeps built plans."""

import ctypes
from collections.abc import Callable
from dataclasses import astuple
from types import ModuleType
from typing import Any

from handgrad.backends.cuda import cache
from handgrad.backends.cuda.graph import Graphs
from handgrad.backends.cuda.libraries import load, path_of
from handgrad.backends.cuda.planner import attention_workspace
from handgrad.core.errors import HandgradError
from handgrad.launch import Sdpa

Q, K, V, Y, LSE, DY, DQ, DK, DV = range(1, 10)  # ids of a graph's tensors


def library() -> ModuleType | None:
    """The frontend's module; None unless both it and cuDNN are installed and load."""
    try:
        load("nvrtc", "nvidia-cuda-nvrtc")  # cuDNN finds NVRTC and its builtins by name
        for builtins in sorted(path_of("nvrtc").parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        import cudnn

        cudnn.backend_version()
        return cudnn
    except Exception:  # package or library missing or broken: our own attention runs
        return None


class Cudnn:
    """cuDNN on one GPU and stream."""

    def __init__(self, graphs: Graphs):
        cudnn = library()
        assert cudnn is not None  # Gpu.has_library_attention says so
        self._cudnn, self.graphs, self.device = cudnn, graphs, graphs.device
        self._handle = self._cudnn.create_handle()
        self._cudnn.set_stream(handle=self._handle, stream=int(self.device.stream))
        self.version = self._cudnn.backend_version_string()
        self._graphs: dict[Sdpa, Any] = {}

    def bind(self, s: Sdpa, addresses: dict[str, int], scratch: int) -> Callable[[], None]:
        """A function that starts the attention. Addresses by name: qkv, y, lse, and in backward dy and dqkv."""
        graph = self._graph(s)
        size = graph.get_workspace_size()
        if size > attention_workspace(s):
            raise HandgradError("cudnn", f"attention needs at most {attention_workspace(s)} bytes of workspace", size)
        k, v = s.H * s.D * 2, (s.H + s.K) * s.D * 2  # bytes from q to k and v in a row
        pack = {Y: addresses["y"], LSE: addresses["lse"]}
        pack |= dict(zip((Q, K, V), (addresses["qkv"] + at for at in (0, k, v))))
        if s.direction == "backward":
            pack |= {DY: addresses["dy"]}
            pack |= dict(zip((DQ, DK, DV), (addresses["dqkv"] + at for at in (0, k, v))))

        def start() -> None:
            graph.execute(pack, self.graphs.workspace(size, scratch), handle=self._handle)

        return start

    def _graph(self, s: Sdpa) -> Any:
        if s not in self._graphs:
            cudnn, d = self._cudnn, self.device
            parts = (cudnn.__version__, self.version, d.name, d.sms, astuple(s))
            name = cache.key("attention", *parts)
            stored = cache.load(name)
            if stored is None:
                graph = build(
                    cudnn, s, handle=self._handle, sm_version=d.capability[0] * 10 + d.capability[1], sm_count=d.sms
                )
                cache.store(name, bytes(graph.serialize()))
            else:
                graph = empty(cudnn, s, handle=self._handle)
                graph.deserialize(self._handle, list(stored))
            self._graphs[s] = graph
        return self._graphs[s]


def empty(cudnn: ModuleType, s: Sdpa, **options: Any) -> Any:
    """An empty graph: bf16 tensors, float32 arithmetic."""
    f32 = cudnn.data_type.FLOAT
    return cudnn.pygraph(
        name=s.direction,
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=f32,
        compute_data_type=f32,
        **options,
    )


def build(cudnn: ModuleType, s: Sdpa, **options: Any) -> Any:
    """The built graph of one direction: q, k, v packed in rows, y in rows, lse (B, H, T, 1) as natural logarithms."""
    bf16, f32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    graph, wide = empty(cudnn, s, **options), (s.H + 2 * s.K) * s.D

    def tensor(uid: int, heads: int, row: int) -> Any:
        strides = [s.T * row, s.D, row, 1]
        return graph.tensor(dim=[s.B, heads, s.T, s.D], stride=strides, data_type=bf16, uid=uid, name=f"t{uid}")

    qkv = {"q": tensor(Q, s.H, wide), "k": tensor(K, s.K, wide), "v": tensor(V, s.K, wide), "attn_scale": s.scale}
    if s.causal:
        qkv |= {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
    if s.window:
        qkv["diagonal_band_left_bound"] = s.window  # the diagonal included
    statistics = [s.B, s.H, s.T, 1], [s.H * s.T, s.T, 1, 1]
    if s.direction == "forward":
        y, lse = graph.sdpa(**qkv, generate_stats=True, name="sdpa")
        rows = [s.T * s.H * s.D, s.D, s.H * s.D, 1]
        y.set_output(True).set_uid(Y).set_dim([s.B, s.H, s.T, s.D]).set_stride(rows).set_data_type(bf16)
        lse.set_output(True).set_uid(LSE).set_dim(statistics[0]).set_stride(statistics[1]).set_data_type(f32)
    else:
        lse = graph.tensor(dim=statistics[0], stride=statistics[1], data_type=f32, uid=LSE, name="lse")
        y, dy = tensor(Y, s.H, s.H * s.D), tensor(DY, s.H, s.H * s.D)
        order = {"use_deterministic_algorithm": True} if s.deterministic else {}
        gradients = graph.sdpa_backward(**qkv, o=y, dO=dy, stats=lse, name="sdpa_backward", **order)
        for t, uid, heads in zip(gradients, (DQ, DK, DV), (s.H, s.K, s.K)):
            t.set_output(True).set_uid(uid).set_dim([s.B, heads, s.T, s.D])
            t.set_stride([s.T * wide, s.D, wide, 1]).set_data_type(bf16)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph
