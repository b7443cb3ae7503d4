"""The merging of states: attentions over parts of the keys into the attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cupyattn import numpy_ref, reading
from cupyattn.arrays import Arrays, Visit, check_destinations, destinations_of, enter, put, recorded, shapes
from cupyattn.corridor import Named
from cupyattn.problem import FLOATS, A, Axes, Spec
from cupyattn.reading import expect, refusal
from cupyattn.rounding import narrow, widen


@recorded(shapes.of_states, ("out", "lse"), destinations=("out", "lse_out"), finish=lambda _, found: tuple(found))
def merge_states(
    outs: Sequence[A],
    lses: Sequence[A],
    *,
    layout: Axes = "bshd",
    out: A | None = None,
    lse_out: A | None = None,
) -> tuple[A, A]:
    """The attention over all keys, from attentions over disjoint sets of keys.

    Associative and commutative up to rounding; ``out = 0, lse = -inf`` is the identity.  A state whose
    lse is -inf adds nothing, whatever its out holds.  Where an lse is +inf it outweighs all finite ones.

    Parameters
    ----------
    outs : sequence of arrays, each of one shape
        Outputs of `attention` over parts of the keys: (batch, seqlen, num_heads, head_dim),
        (..., num_heads, seqlen, head_dim) or (tokens, num_heads, head_dim), as `layout` says.
    lses : sequence of arrays
        Their log-sum-exps (natural): (..., num_heads, seqlen), or (num_heads, tokens); float32 or float64.
    layout : {"bshd", "bhsd", "thd"}
        Of `outs`.
    out, lse_out : array, optional
        Memory for the results, as for `attention`.

    Returns
    -------
    out, lse : array
        In the library, dtype and shape of the arguments.

    Raises
    ------
    TypeError
        Not arrays, of different libraries or dtypes.
    ValueError
        No states, more outs than lses, or shapes that do not fit.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 6, 2, 4))
    >>> halves = [cupyattn.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(0, 2), slice(2, 6))]
    >>> out, lse = cupyattn.merge_states(*zip(*halves))
    >>> bool(np.allclose(out, cupyattn.attention(q, k, v)))
    True
    """
    function = "merge_states"
    reading.choice(function, "layout", layout, ("bshd", "bhsd", "thd"))
    if not isinstance(outs, (list, tuple)) or not isinstance(lses, (list, tuple)):
        came = (("outs", type(outs).__name__), ("lses", type(lses).__name__))
        raise TypeError(refusal(function, "outs and lses have to be lists or tuples of arrays", *came))
    if len(outs) != len(lses) or not outs:
        rule = "outs and lses have to hold the same number of states, at least one"
        raise ValueError(refusal(function, rule, ("outs", len(outs)), ("lses", len(lses))))
    count, into = len(outs), destinations_of(function, out, lse_out, True)
    named: Named = {
        **{f"out{i}": (f"outs[{i}]", array) for i, array in enumerate(outs)},
        **{f"lse{i}": (f"lses[{i}]", array) for i, array in enumerate(lses)},
    }
    visit = enter(function, named)
    out_spec, lse_spec = _check_states(visit, count, layout)
    if visit.kind == "cuda":
        visit.device()

    def states_of(operands: Arrays) -> list[numpy_ref.State]:
        rows = [widen(operands[f"out{i}"], "float64") for i in range(count)]
        rows = [x.swapaxes(-3, -2) if layout != "bhsd" else x for x in rows]
        return [numpy_ref.State(x, widen(operands[f"lse{i}"], "float64")) for i, x in enumerate(rows)]

    def forward(operands: Arrays) -> Arrays:
        whole = numpy_ref.merge(states_of(operands))
        rows = whole.out.swapaxes(-3, -2) if layout != "bhsd" else whole.out
        return {"out": np.ascontiguousarray(narrow(rows, out_spec.dtype)), "lse": narrow(whole.lse, lse_spec.dtype)}

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        states = states_of(operands)
        dout, dlse = known["dout"], known["dlse"]
        dout = np.zeros(out_spec.shape) if dout is None else widen(dout, "float64")
        dout = dout.swapaxes(-3, -2) if layout != "bhsd" else dout
        dlse = np.zeros(lse_spec.shape) if dlse is None else widen(dlse, "float64")
        found: Arrays = {}
        for i, (part_dout, part_dlse) in enumerate(numpy_ref.merge_backward(states, dout, dlse)):
            part_dout = part_dout.swapaxes(-3, -2) if layout != "bhsd" else part_dout
            found[f"out{i}"] = np.ascontiguousarray(narrow(part_dout, out_spec.dtype))
            found[f"lse{i}"] = narrow(part_dlse, lse_spec.dtype)
        return found

    results = {"out": out_spec, "lse": lse_spec}
    if into:
        check_destinations(visit, into, results)
    merged = put(visit, visit.run(forward, backward, results), into)
    return merged["out"], merged["lse"]


def _check_states(visit: Visit, count: int, layout: Axes) -> tuple[Spec, Spec]:
    specs = dict(visit.specs)
    out, lse = specs["out0"], specs["lse0"]
    rank = {"bshd": (4, 4), "thd": (3, 3), "bhsd": (3, 64)}[layout]
    if not rank[0] <= len(out.shape) <= rank[1]:
        rule = f"{out.name} has to be {reading.AXES[layout]}"
        raise ValueError(refusal(visit.function, rule, (out.name, out.shape)))
    head_axis, row_axis = (-3, -2) if layout == "bhsd" else (-2, -3)
    expected = (*out.shape[:-3], out.shape[head_axis], out.shape[row_axis])
    for spec in (out, lse):
        if spec.dtype not in (("float32", "float64") if spec is lse else FLOATS):
            rule = f"{spec.name} cannot be {spec.dtype}"
            raise TypeError(refusal(visit.function, rule, (spec.name, spec.shape, spec.dtype)))
    for i in range(count):
        expect(visit.function, specs[f"out{i}"], out.shape, out.dtype)
        expect(visit.function, specs[f"lse{i}"], expected, lse.dtype)
    return out, lse
