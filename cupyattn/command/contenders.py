"""Who is measured against whom, with their arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cupyattn.api import attention
from cupyattn.cpu import memory_of_machine, num_cores


class Sizes(NamedTuple):
    """How many of everything; as many keys as queries."""

    batch: int
    seqlen: int
    num_heads: int
    num_heads_kv: int
    head_dim: int

    @property
    def num_scores(self) -> int:
        return self.batch * self.num_heads * self.seqlen**2


@dataclass(frozen=True)
class Call:
    """One contender's call, ready to be made again and again."""

    run: Callable[[], Any]
    exact: Callable[[], Any]
    """The same by float64 arithmetic, in NumPy."""
    wait: Callable[[], object] = lambda: None
    """For what was queued on a GPU."""
    to_numpy: Callable[[Any], Any] = np.asarray

    def result(self) -> Any:
        """What it computes, as float64."""
        return np.asarray(self.to_numpy(self.run()), np.float64)


def calls(sizes: Sizes, dtype: str, causal: bool, device: str, against: str) -> tuple[dict[str, Call], dict[str, str]]:
    """The contenders by name, cupyattn first and the peer last, and who is left out and why."""
    rng = np.random.default_rng(sizes.seqlen)
    shapes = [
        (sizes.batch, heads, sizes.seqlen, sizes.head_dim) for heads in (sizes.num_heads, *2 * (sizes.num_heads_kv,))
    ]
    arrays = [rng.standard_normal(shape, np.float64 if dtype == "float64" else np.float32) for shape in shapes]
    if device == "cuda":
        return _on_a_gpu(arrays, dtype, causal), {}
    exact = partial(attention, *arrays, layout="bhsd", causal=causal)
    given = _tensors(arrays) if against == "torch" else arrays  # or torch's threads would spin beside ours
    ours = partial(attention, *given, layout="bhsd", causal=causal)
    found = {"cupyattn float64": Call(ours, exact)}
    if dtype == "float32":
        found["cupyattn float32"] = Call(partial(ours, compute_dtype="float32"), exact)
    name = f"{against} {dtype}"
    if against == "torch":
        return found | {name: Call(partial(_sdpa(given), *given, is_causal=causal), exact)}, {}
    needed = 2 * sizes.num_scores * arrays[0].itemsize  # the scores, and one more of them where some are hidden
    if needed > memory_of_machine() / 2:
        return found, {name: f"its scores would take {needed / 1e9:.1f} GB"}
    q, k, v = arrays
    return found | {name: Call(partial(naive, q, k, v, causal), exact)}, {}


def naive(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """The formula with all its scores in memory, once and in place where that is easy; in the arrays' dtype."""
    shared = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, shared, axis=1) if shared > 1 else x for x in (k, v))
    scores = q @ k.swapaxes(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if causal:
        scores = np.where(np.tri(q.shape[-2], k.shape[-2], dtype=bool), scores, np.asarray(-np.inf, scores.dtype))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores @ v


def torch_sees_a_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def versions(device: str, against: str) -> dict[str, str]:
    """Of the peer, and the GPU's name."""
    if against != "torch":
        return {}
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"torch": torch.__version__, **gpu}


def _tensors(arrays: list[Any]) -> list[Any]:
    """torch's, which works on as many cores as cupyattn takes."""
    import torch

    torch.set_num_threads(num_cores())
    return [torch.from_numpy(x) for x in arrays]


def _sdpa(tensors: list[Any]) -> Callable[..., Any]:
    """torch's function; key heads that are shared it has to be told of."""
    from torch.nn.functional import scaled_dot_product_attention

    shared = tensors[0].shape[1] != tensors[1].shape[1]
    return partial(scaled_dot_product_attention, enable_gqa=True) if shared else scaled_dot_product_attention


def _on_a_gpu(arrays: list[Any], dtype: str, causal: bool, device: str = "cuda") -> dict[str, Call]:
    import torch

    tensors = [torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in arrays]
    rounded = [x.double().cpu().numpy() for x in tensors]
    exact = partial(attention, *rounded, layout="bhsd", causal=causal)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def call(run: Callable[[], Any]) -> Call:
        return Call(run, exact, wait, lambda x: x.double().cpu().numpy())

    ours = partial(attention, *tensors, layout="bhsd", causal=causal)
    theirs = partial(_sdpa(tensors), *tensors, is_causal=causal)
    return {f"cupyattn {dtype}": call(ours), f"torch {dtype}": call(theirs)}
