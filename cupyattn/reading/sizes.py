"""The sizes of a problem, from the shapes of q, k and v: dense, ragged, or before a cache."""

from __future__ import annotations

from collections.abc import Mapping

from cupyattn.problem import Shape, Sizes, Spec
from cupyattn.reading.options import Options
from cupyattn.reading.refusals import AXES, LARGEST_SIZE, refusal


def sizes_of(function: str, specs: Mapping[str, Spec], options: Options) -> Sizes:
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    if options.any_rank:
        for spec in (q, k, v):
            if len(spec.shape) < 2:
                rule = f"{spec.name} has to have at least 2 axes, (..., heads, seqlen, head_dim)"
                raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    else:
        _check_rank(function, specs, dict.fromkeys(("q", "k", "v"), (4, AXES[options.axes])))
    head_axis, row_axis = (-2, -3) if options.axes == "bshd" else (-3, -2)
    if q.shape[-1] != k.shape[-1]:
        hint = "; k looks transposed" if q.shape[-1] in k.shape[-2:] and not options.any_rank else ""
        rule = f"{q.name} and {k.name} have different head_dim; expected {AXES[options.axes]}{hint}"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    if k.shape[row_axis] != v.shape[row_axis]:
        rule = f"{k.name} and {v.name} have different seqlen_k; expected {AXES[options.axes]}"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    heads = tuple(spec.shape[head_axis] if len(spec.shape) > 2 else 1 for spec in (q, k, v))
    num_heads = _heads(function, specs, (heads[0], heads[1], heads[2]), options.grouped_heads)
    leads = [spec.shape[:-3] for spec in (q, k, v)]
    try:
        batch_shape = _broadcast(*leads)
    except ValueError:
        rule = f"the batch axes of {q.name}, {k.name} and {v.name} do not fit together"
        raise ValueError(refusal(function, rule, *((spec.name, spec.shape) for spec in (q, k, v)))) from None
    return Sizes(
        batch_shape,
        num_heads,
        heads[1],
        heads[2],
        q.shape[row_axis],
        k.shape[row_axis],
        q.shape[-1],
        v.shape[-1],
    )


def ragged_sizes_of(function: str, specs: Mapping[str, Spec], options: Options) -> Sizes:
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    starts_q, paged = specs["cu_seqlens_q"], "block_table" in specs
    in_keys = "cu_seqlens_k" if "cu_seqlens_k" in specs else "cache_seqlens"  # how many each sequence has
    starts_k = specs[in_keys]
    keys = (4, "(num_pages, page_size, num_heads_kv, head_dim), with a block_table") if paged else (3, AXES["thd"])
    starts, in_pages = (1, "(batch + 1,)"), in_keys == "cache_seqlens"
    ranks = {"q": (3, AXES["thd"]), "k": keys, "v": keys, "cu_seqlens_q": starts}
    _check_rank(function, specs, {**ranks, in_keys: (1, "(batch,)") if in_pages else starts})
    batch = starts_q.shape[0] - 1
    if batch < 0 or starts_k.shape[0] != batch + (not in_pages):
        rule = f"{starts_q.name} and {starts_k.name} have to have batch + 1 entries each"
        if in_pages:
            rule = f"{starts_q.name} has to have batch + 1 entries, and {starts_k.name} batch"
        raise ValueError(refusal(function, rule, (starts_q.name, starts_q.shape), (starts_k.name, starts_k.shape)))
    if q.shape[-1] != k.shape[-1]:
        rule = f"{q.name} and {k.name} have different head_dim"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    if k.shape[:-2] != v.shape[:-2]:
        rule = f"{k.name} and {v.name} have to hold the same {'pages' if paged else 'tokens'}"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    if paged:
        table = specs["block_table"]
        _check_rank(function, specs, {"block_table": (2, "(batch, pages of a sequence)")})
        if table.shape[0] != batch:
            rule = f"{table.name} has to have one row per sequence, {batch}"
            raise ValueError(refusal(function, rule, (table.name, table.shape), (starts_q.name, starts_q.shape)))
        if k.shape[1] < 1:
            raise ValueError(refusal(function, "a page has to hold at least one key", (k.name, k.shape)))
    heads = (q.shape[-2], k.shape[-2], v.shape[-2])
    num_heads = _heads(function, specs, heads, grouped=True)
    return Sizes(
        (batch,),
        num_heads,
        heads[1],
        heads[2],
        options.max_seqlen_q,
        options.max_seqlen_k,
        q.shape[-1],
        v.shape[-1],
        total_q=q.shape[0],
    )


def cached_sizes_of(function: str, specs: Mapping[str, Spec], options: Options) -> Sizes:
    """Of q before a cache; seqlen_k is the longest that a sequence can get there."""
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    paged, ragged = "block_table" in specs, options.axes == "thd"
    places = "(num_pages, page_size, num_heads_kv, head_dim)" if paged else "(batch, seqlen, num_heads_kv, head_dim)"
    ranks = {"q": (3 if ragged else 4, AXES[options.axes]), "k": (4, places), "v": (4, places)}
    if ragged:
        ranks["cu_seqlens_q"] = (1, "(batch + 1,)")
    _check_rank(function, specs, ranks)
    if ragged and not specs["cu_seqlens_q"].shape[0]:
        starts = specs["cu_seqlens_q"]
        raise ValueError(refusal(function, f"{starts.name} has to be (batch + 1,)", (starts.name, starts.shape)))
    batch = specs["cu_seqlens_q"].shape[0] - 1 if ragged else q.shape[0]
    if q.shape[-1] != k.shape[-1]:
        rule = f"{q.name} and {k.name} have different head_dim"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    if k.shape[:2] != v.shape[:2]:
        rule = f"{k.name} and {v.name} have to hold the same {'pages' if paged else 'sequences and places for keys'}"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "rotary_seqlens"):
        if name in specs and specs[name].shape != (batch,):
            rule = f"{specs[name].name} has to have one entry per sequence, ({batch},)"
            raise ValueError(refusal(function, rule, (specs[name].name, specs[name].shape), (q.name, q.shape)))
    longest = k.shape[1]
    if paged:
        table = specs["block_table"]
        _check_rank(function, specs, {"block_table": (2, "(batch, pages of a sequence)")})
        if table.shape[0] != batch:
            rule = f"{table.name} has to have one row per sequence, {batch}"
            raise ValueError(refusal(function, rule, (table.name, table.shape), (q.name, q.shape)))
        if k.shape[1] < 1:
            raise ValueError(refusal(function, "a page has to hold at least one key", (k.name, k.shape)))
        if "cache_batch_idx" in specs:
            rule = f"{table.name} and {specs['cache_batch_idx'].name} exclude each other: a table says where keys lie"
            raise ValueError(refusal(function, rule, *((specs[x].name, specs[x].shape) for x in ("block_table", "k"))))
        longest *= table.shape[1]
        if longest > LARGEST_SIZE:
            rule = f"no sequence may have room for more than {LARGEST_SIZE} keys"
            raise ValueError(refusal(function, rule, (table.name, table.shape), (k.name, k.shape)))
    elif "cache_batch_idx" not in specs and k.shape[0] != batch:
        rule = f"{k.name} has to hold as many sequences as {q.name}, {batch}, if there is no cache_batch_idx"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    heads = (q.shape[-2], k.shape[-2], v.shape[-2])
    return Sizes(
        (batch,),
        _heads(function, specs, heads, grouped=True),
        heads[1],
        heads[2],
        options.max_seqlen_q if ragged else q.shape[1],
        longest,
        q.shape[-1],
        v.shape[-1],
        total_q=q.shape[0] if ragged else 0,
    )


def _check_rank(function: str, specs: Mapping[str, Spec], ranks: Mapping[str, tuple[int, str]]) -> None:
    for name, (rank, axes) in ranks.items():
        spec = specs[name]
        if len(spec.shape) != rank:
            rule = f"{spec.name} has to have {rank} axes, {axes}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))


def _heads(function: str, specs: Mapping[str, Spec], heads: tuple[int, int, int], grouped: bool) -> int:
    """The number of query heads, once the heads of q, k and v are known to fit."""
    rows = [specs[name] for name in ("q", "k", "v")]
    notes = ("num_heads = {}", "num_heads_k = {}", "num_heads_v = {}")
    shown = [(spec.name, spec.shape, note.format(n)) for spec, note, n in zip(rows, notes, heads, strict=True)]
    if grouped:
        for spec, count in zip(rows[1:], heads[1:], strict=True):
            if count != heads[0] and (count == 0 or heads[0] % count):
                rule = f"the number of heads of {spec.name} has to divide that of {rows[0].name}"
                raise ValueError(refusal(function, rule, *shown))
        return heads[0]
    if len({count for count in heads if count != 1}) > 1:
        rule = "the numbers of heads have to be equal (or one); enable_gqa=True lets key heads serve groups"
        raise ValueError(refusal(function, rule, *shown))
    return 0 if 0 in heads else max(heads)


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    result = []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        different = {size for size in sizes if size != 1}
        if len(different) > 1:
            raise ValueError
        result.append(different.pop() if different else 1)
    return tuple(result)


def broadcasts_to(shape: Shape, target: Shape) -> bool:
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))
