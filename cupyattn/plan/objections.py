"""What each implementation has against a problem on a device; the first that has nothing takes it."""

from __future__ import annotations

from collections.abc import Callable

from cupyattn.plan.gpu import bytes_in_a_ring, bytes_of_a_query, padded
from cupyattn.plan.hopper import KEYS_IN_A_BOX
from cupyattn.problem import FLOAT8, Device, Problem


def objections_of_numpy(problem: Problem, device: Device) -> tuple[str, ...]:
    if device.kind == "cpu":
        return ()
    return (f"works on the CPU, and the arrays are on {device.name}",)


LONGEST = 2**30 - 2**10
"""Rows or keys that a kernel counts, ``kOpen`` there: the sum of two such numbers and a tile fits an int of 32 bits."""


def _objections_of_a_kernel(problem: Problem, device: Device) -> list[str]:
    """What every CUDA kernel asks for."""
    if device.kind != "cuda":
        return ["works on an NVIDIA GPU, and the arrays are on the CPU"]
    reasons = []
    if device.compute_capability is None or device.compute_capability < (8, 0):
        reasons.append("needs compute capability 8.0 or newer (Ampere)")
    if problem.dtype == "float64":
        reasons.append("has no float64 arithmetic")
    if problem.compute_dtype not in (None, "float32"):
        reasons.append(f"accumulates in float32, not in {problem.compute_dtype}")
    longest = max(problem.sizes.seqlen_q, problem.sizes.seqlen_k, problem.sizes.total_q)
    if longest > LONGEST:
        reasons.append(f"counts rows and keys in 32 bits, at most {LONGEST}, not {longest}")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem.sizes, name)
        if size % 8 or not 0 < size <= 256:
            reasons.append(f"needs {name} to be a multiple of 8 from 8 to 256, not {size}")
    reasons += _objections_to_distances(problem)
    if problem.needs_dropout_mask:
        reasons.append("does not write out dropped weights (return_attn_probs with dropout)")
    return reasons


def _objections_to_distances(problem: Problem) -> list[str]:
    """What kernels have against ALiBi's distances that are not from the diagonal of the mask."""
    apart, sizes = problem.edits.distances, problem.sizes
    if apart is None:
        return []
    reasons = []
    if problem.layout.lengths_are_data and problem.mask.alignment == "bottom-right":
        reasons.append("knows no distances of ALiBi's own where lengths are data and end at the diagonal")
    # Four lengths and their tiles: what a kernel computes on the way has to fit, too.
    furthest = abs(apart.first) + 4 * apart.step * (max(sizes.seqlen_q, sizes.seqlen_k) + 2**10)
    if furthest >= 2**31:
        reasons.append(f"counts ALiBi's distances in 32 bits: {apart} and {max(sizes.seqlen_q, sizes.seqlen_k)} tokens")
    return reasons


def objections_of_flash(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    if device.kind == "cuda" and problem.dtype == FLOAT8:
        reasons.append("reads no float8; hopper and splitkv do")
    return tuple(reasons)


MOST_PACKED_ROWS = 64
"""Query rows per key head up to which decoding in splits beats tiles of rows."""
MOST_BESIDE_HOPPER = 16
"""The same where the Hopper kernel splits keys, too: one tile of the split-KV kernel, which reads keys once."""


def objections_of_splitkv(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    rows = problem.sizes.seqlen_q * problem.sizes.queries_per_pair
    with_hopper = device.kind == "cuda" and not objections_of_hopper(problem, device)
    alone = problem.dtype == FLOAT8 and not with_hopper  # nobody else reads float8
    if device.kind == "cuda" and rows > MOST_PACKED_ROWS and not alone:
        reasons.append(f"is for decoding: at most {MOST_PACKED_ROWS} query rows per key head, not {rows}")
    elif with_hopper and rows > MOST_BESIDE_HOPPER:
        reasons.append(f"would read keys again for every {MOST_BESIDE_HOPPER} of {rows} rows; hopper splits them, too")
    packed = max(problem.sizes.seqlen_q, problem.sizes.total_q) * problem.sizes.queries_per_pair
    if device.kind == "cuda" and packed > LONGEST:
        reasons.append(f"counts packed rows in 32 bits, at most {LONGEST}, not {packed}")
    columns, dtype = padded(problem.sizes), problem.dtype  # queries, and two stages of one warp
    least = 16 * bytes_of_a_query(columns, dtype) + 4 * 16 * bytes_in_a_ring(columns, dtype, columns)
    if device.kind == "cuda" and least > device.shared_memory:
        reasons.append(f"needs {least} bytes of shared memory for such heads; a block has {device.shared_memory}")
    return tuple(reasons)


def objections_of_hopper(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    if device.kind != "cuda":
        return tuple(reasons)
    if device.compute_capability != (9, 0):
        reasons.append("needs compute capability 9.0 (Hopper)")
    elif not device.tensor_maps:
        reasons.append("needs a driver for CUDA 12 or newer, to encode tensor maps")
    if problem.dtype == "float32":
        reasons.append("has no float32 arithmetic")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem.sizes, name)
        if problem.dtype == FLOAT8 and size % 16:
            reasons.append(f"needs {name} to be a multiple of 16 in float8, not {size}")
    page_size = problem.layout.page_size
    if page_size is not None and page_size % KEYS_IN_A_BOX:
        reasons.append(f"needs pages of a multiple of {KEYS_IN_A_BOX} keys, not {page_size}")
    for wanted, what in (
        (problem.mask.array is not None, "boolean mask"),
        (problem.edits.bias is not None, "bias"),
        (problem.dropout_p > 0.0, "dropout"),
    ):
        if wanted:
            reasons.append(f"knows no {what}")
    return tuple(reasons)


IMPLEMENTATIONS: dict[str, Callable[[Problem, Device], tuple[str, ...]]] = {
    "numpy": objections_of_numpy,
    "splitkv": objections_of_splitkv,
    "hopper": objections_of_hopper,
    "flash": objections_of_flash,
}
"""In the order tried: splitkv first, since it takes only what it is better at, and flash last, which takes the most."""


def is_allowed(name: str, allowed: tuple[str, ...] | None) -> bool:
    """Whether a call that may take those implementations only (None: all) may take this one."""
    return allowed is None or name in allowed


def only(allowed: tuple[str, ...] | None) -> str:
    """The reason against all others."""
    return f"may not be taken: only {', '.join(allowed or ())} may"
