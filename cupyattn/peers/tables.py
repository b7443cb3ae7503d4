"""The cosines and sines that rotary position embedding turns features by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupyattn import reading
from cupyattn.arrays import Arrays, enter, recorded, shapes
from cupyattn.peers.frequencies import read_rule
from cupyattn.problem import FLOATS, Array, Spec
from cupyattn.reading import refusal
from cupyattn.rounding import narrow


@recorded(
    shapes.of_tables,
    ("cos", "sin"),
    has_gradients=False,
    finish=lambda asked, found: _as_positions(asked["positions"], found),
)
def rotary_tables(
    positions: Array | int,
    dim: int,
    *,
    theta: float | None = None,
    scaling: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    dtype: Any = "float32",
) -> tuple[Array, Array]:
    """Cosines and sines for `apply_rotary_emb` and `flash_attn_with_kvcache`, by the rules of models.

    Pair ``i`` of the features at position ``p`` turns by the angle ``p * theta ** (-2 * i / dim)``, unless `scaling`
    names another rule.

    Parameters
    ----------
    positions : int or array of int, any shape
        An int is a number of tokens, 0 and on, and the tables are NumPy's, which go with arrays of any library.
    dim : int
        Features of a head, an even number; times ``scaling["partial_rotary_factor"]`` if there is one.
    theta : float, optional
        Default ``scaling["rope_theta"]``, or 10000.
    scaling : dict, optional
        As ``config.rope_parameters`` of transformers (or one layer type's, where these differ): "rope_type", and what
        the rule has to know.  None values are as good as none.

        ==============  ================================================================================
        "default"       as above
        "linear"        angles divided by "factor"
        "dynamic"       NTK: theta grows with "factor" once there are more than `max_position_embeddings`
                        tokens
        "yarn"          fast pairs as they are, slow ones divided by "factor", a ramp between "beta_fast"
                        (32) and "beta_slow" (1) rotations in "original_max_position_embeddings";
                        "truncate", "attention_factor", "mscale" and "mscale_all_dim"
        "llama3"        the same by "low_freq_factor" and "high_freq_factor"
        "longrope"      divided by "short_factor", or by "long_factor" once there are more than
                        "original_max_position_embeddings" tokens, a list each; "attention_factor"
        "proportional"  "partial_rotary_factor" of the pairs turn, the others have columns, too, of angle 0
        ==============  ================================================================================
    max_position_embeddings : int, optional
        What "dynamic" has to know; for others it is the length that they were trained for, and for "yarn" and
        "longrope" the one that they grew to, where `scaling` does not say so.  As ``config.max_position_embeddings``.
    dtype : str or dtype
        Of the tables: float16, bfloat16, float32 or float64.

    Returns
    -------
    cos, sin : array, shape ``(*positions.shape, dim / 2)``
        In the library of `positions`; float64 arithmetic, rounded once.  "yarn" and "longrope" have them multiplied by
        "attention_factor", as transformers has, so that scores grow by its square.

    Raises
    ------
    TypeError
        Positions that are not integers, numbers that are none, or a dtype that the library does not have.
    ValueError
        A rule that is unknown, is not told what it needs, or is told what it does not know; numbers out of range.
    NotImplementedError
        Positions are on a GPU.

    Notes
    -----
    How many tokens there are, for "dynamic" and "longrope", is told by the largest position: ask for tables no longer
    than the sequence.  transformers computes the same in float32, where angles of large positions p are off by about
    ``p * 2**-24``.

    In a graph of torch.compile tables of a number of tokens are NumPy's, too, but for bfloat16, which it does not know
    there: these are tensors.

    References
    ----------
    .. [1] J. Su et al., "RoFormer", 2021, arXiv:2104.09864, section 3.2.2.
    .. [2] B. Peng et al., "YaRN", 2023, arXiv:2309.00071, sections 3.1 to 3.4.
    .. [3] Y. Ding et al., "LongRoPE", 2024, arXiv:2402.13753, section 3.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cos, sin = cupyattn.rotary_tables(6, 4, dtype="float64")
    >>> x = np.random.default_rng(0).standard_normal((1, 6, 2, 4))
    >>> turned = cupyattn.apply_rotary_emb(x, cos, sin, interleaved=True)

    Llama's reference code says the same in complex numbers, of which a pair of features is one:

    >>> freqs_cis = cos + 1j * sin
    >>> by_llama = (x.view(complex) * freqs_cis[:, None, :]).view(float)
    >>> bool(np.allclose(turned, by_llama, rtol=0, atol=1e-15))
    True

    The tables of a model of transformers, by its configuration:

    >>> qwen = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    >>> cos, sin = cupyattn.rotary_tables(4096, 128, scaling=qwen)
    >>> cos.shape, round(float(cos[0, 0]), 4)  # 1 + log(4) / 10
    ((4096, 64), 1.1386)
    """
    function = "rotary_tables"
    rule = read_rule(function, dim, theta, scaling, max_position_embeddings)
    kind = reading.dtype_name(dtype)
    if kind not in FLOATS:
        said = f"dtype has to be one of {', '.join(FLOATS)}"
        raise TypeError(refusal(function, said, ("dtype", repr(dtype))))
    if reading.is_one_number(positions):
        positions = np.arange(reading.integer(function, "positions", positions, low=0))
    visit = enter(function, {"positions": ("positions", positions)})
    spec = visit.specs[0][1]
    if not spec.dtype.startswith("int"):
        said = "positions has to be an int, or an array of signed integers"
        raise TypeError(refusal(function, said, ("positions", spec.shape, spec.dtype)))
    if kind == "float64" and visit.library.index_dtype() == "int32":
        said = f"{visit.library.title} has no float64 until jax_enable_x64 is switched on"
        raise TypeError(refusal(function, said, ("dtype", repr(dtype))))

    def forward(operands: Arrays) -> Arrays:
        places = operands["positions"]
        inverse, factor = rule.of_length(int(places.max(initial=-1)) + 1)
        angles = places[..., None] * inverse
        return {"cos": narrow(np.cos(angles) * factor, kind), "sin": narrow(np.sin(angles) * factor, kind)}

    shape = (*spec.shape, rule.dim // 2)
    found = visit.run(forward, None, {"cos": Spec("cos", shape, kind), "sin": Spec("sin", shape, kind)})
    return found["cos"], found["sin"]


def _as_positions(positions: Any, tables: Any) -> tuple[Any, Any]:
    """An operator's tables, in a graph: NumPy's where the positions were a number."""
    cos, sin = tables
    is_tensor = hasattr(positions, "shape") or str(cos.dtype) == "torch.bfloat16"
    return (cos, sin) if is_tensor else (cos.numpy(), sin.numpy())
