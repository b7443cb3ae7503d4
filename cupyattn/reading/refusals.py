"""How a refusal is worded: function, rule, and what came, with shapes aligned.  And the words for axes and indices."""

from __future__ import annotations

from collections.abc import Sequence

from cupyattn.problem import Array, Shape, Spec

LARGEST_SIZE = 2**31 - 1
"""Of any axis: index arrays are int32, and random numbers are counted in 32-bit words."""
LONGEST_VALUE = 300
"""Characters of an argument that an error shows."""
LARGEST_RESULT = 2**47
"""Bytes; the memory a process can address."""
AXES = {
    "bshd": "(batch, seqlen, num_heads, head_dim)",
    "bhsd": "(batch, num_heads, seqlen, head_dim)",
    "thd": "(tokens, num_heads, head_dim)",
}
INDICES = (
    *("cu_seqlens_q", "cu_seqlens_k", "block_table"),
    *(
        "seqlens_q",
        "seqlens_k",
        "cache_seqlens",
        "cache_batch_idx",
        "cache_leftpad",
        "cu_seqlens_k_new",
        "rotary_seqlens",
    ),
)
"""Our words for arrays of int32, whose values are lengths and places."""
DESCALES = ("q_descale", "k_descale", "v_descale")
"""Of FLOAT8 operands: the factor that each head's numbers were divided by before they were rounded."""


def refusal(function: str, rule: str, *shown: tuple[str, object] | tuple[str, object, str]) -> str:
    """The text of an error: function and rule, then what came, one argument a line, aligned."""
    rows = [(name, _in_a_line(value), *note) for name, value, *note in shown]
    # No default=, which torch.compile does not know, and a call that is compiled may be refused.
    names = max([0, *(len(row[0]) for row in rows)])
    values = max([0, *(len(row[1]) for row in rows)])
    lines = [f"{function}: {rule}"]
    for name, value, *note in rows:
        lines.append(f"    {name:<{names}}  {value:<{values}}  {note[0] if note else ''}".rstrip())
    return "\n".join(lines)


def _in_a_line(value: object) -> str:
    """A value's text, of which the middle is left out where it is long: an array, where a number was to come."""
    text = str(value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 50]} ... {text[-40:]}"


def expect(function: str, spec: Spec, shape: Shape, dtype: str) -> None:
    """Refuse an array that has to be of this shape and dtype and is not."""
    if spec.shape != shape:
        rule = f"{spec.name} has to have the shape {shape}"
        raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    if spec.dtype != dtype:
        raise TypeError(refusal(function, f"{spec.name} has to be {dtype}", (spec.name, spec.shape, spec.dtype)))


def span(low: int, high: int) -> str:
    """What an integer has to be, in words."""
    return f"from {low} to {high}" if low <= high else "one of those that there are, and there are none"


def short(values: Sequence[int] | Array) -> str:
    first = [int(value) for value in values[:12]]
    return str(first) if len(values) <= 12 else f"[{', '.join(map(str, first[:10]))}, ... {len(values)} entries]"


def int32_rule(name: str) -> str:
    """Other integers are not converted: on a GPU that would be one more launch, and too large ones would go unseen."""
    return f"{name} has to be int32, as flash-attn has it; pass {name}.astype(np.int32), in torch .to(torch.int32)"
