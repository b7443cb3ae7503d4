"""Every public function of attention, asked at random, against a float64 oracle that shares no line with the package.

A case is wholly determined by its seed: ``case(seed)`` says what was wrong, or None.  It draws a function, sizes,
numbers, memory layouts and options, calls the function as a user would, with warnings as errors and NumPy's errstate
set to anything, and looks at the answer:

- each number lies between the oracle's lower and upper bound, rounded to the dtype of the result, see `Expected`;
- nan and infinities are where the definition of attention has them, and nothing hidden is ever seen;
- no argument has changed, but caches that were to be written to, and they as the oracle says;
- an argument that is wrong is refused in words that begin with the function's name.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from attacks.drawing import Draw, band, draw_edits
from attacks.outcome import Outcome
from attacks.witness import (
    ARITHMETIC,
    BFLOAT16,
    DTYPES,
    INF,
    NAN,
    Expected,
    Question,
    Wrong,
    answer,
    as_float64,
    check,
    computed_again,
    finite,
    gradients,
    rounded,
    scores_of,
    summed_to,
    total_of,
    turned,
)

import cupyattn

try:
    import torch
except ImportError:
    torch = None

# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    name: str
    expected: Expected
    dtype: Any


@dataclass
class Call:
    """A function's name, its arguments, and what it should answer."""

    function: str
    arguments: dict
    results: Callable[[], list[Result]]
    gradients: Callable[[Any, Any], dict[str, Expected]] | None = None
    """Of arguments by name, from dout and dlse in the caller's layout."""
    written: dict[str, Callable[[], Expected]] = field(default_factory=dict)
    """Arguments that are overwritten, and with what."""


@cache
def parameters(function):
    return tuple(inspect.signature(getattr(cupyattn, function)).parameters.values())


def asked(d, function, arguments):
    """Call as a user would: some arguments by position, warnings as errors, any errstate."""
    before = {name: contents(value) for name, value in arguments.items()}
    by_name, by_place = dict(arguments), []
    for parameter in parameters(function)[: d.upto(6)]:
        if parameter.kind == parameter.KEYWORD_ONLY or parameter.name not in by_name:
            break
        by_place.append(by_name.pop(parameter.name))
    try:
        with warnings.catch_warnings(), np.errstate(all=d.errstate):
            warnings.simplefilter("error")
            return getattr(cupyattn, function)(*by_place, **by_name), before
    except Exception as error:
        return error, before


def taken(d, function, arguments):
    """The same of a call that nobody may refuse."""
    d.shown = function, arguments
    found, before = asked(d, function, arguments)
    if isinstance(found, Exception):
        raise Wrong(f"refused or failed: {type(found).__name__}: {str(found)[:300]}")
    return found, before


def contents(value):
    if isinstance(value, (list, tuple)):
        return [contents(item) for item in value]
    if torch is not None and isinstance(value, torch.Tensor):
        return value.detach().double().numpy().tobytes() if value.is_floating_point() else value.numpy().tobytes()
    return (value.tobytes(), value.strides, value.dtype) if isinstance(value, np.ndarray) else value


def check_untouched(arguments, before, but=()):
    for name, value in arguments.items():
        if name not in but and isinstance(value, (list, tuple, np.ndarray)) and contents(value) != before[name]:
            raise Wrong(f"{name} was changed")


def run(d, call):
    """Call, and compare everything."""
    found, before = taken(d, call.function, call.arguments)
    check_untouched(call.arguments, before, call.written)
    expected = call.results()
    found = found if isinstance(found, tuple) else (found,)
    if len(found) != len(expected):
        raise Wrong(f"{len(found)} results, expected {len(expected)}")
    for actual, result in zip(found, expected, strict=True):
        check(result.name, actual, result.expected, result.dtype)
    for name, values in call.written.items():
        check(f"{name} afterwards", call.arguments[name], values(), call.arguments[name].dtype)
    return found


def result_dtypes(q):
    """Of out and lse."""
    return q.dtype, np.dtype("float64" if q.dtype.newbyteorder("=") == np.float64 else "float32")


def poison(d, ask_of, k, v):
    """nan and infinities for keys that nobody sees, in arrays (batch, key heads, keys, dim); the clean ones too."""
    with np.errstate(all="ignore"):
        hidden = np.isneginf(scores_of(ask_of(np.zeros_like(k), v))[0])  # whatever the key
    clean, found = (k, v), []
    for x in clean:
        groups = (x.shape[-3], hidden.shape[-3] // max(1, x.shape[-3]))
        unseen = hidden.reshape(*hidden.shape[:-3], *groups, *hidden.shape[-2:]).all(axis=(-3, -2))
        if x.shape[0] == 1:
            unseen = unseen.all(axis=0, keepdims=True)
        found.append(np.where(unseen[..., None], np.asarray(d.one(NAN, INF, -INF, 6e4), x.dtype), x))
    return found


def attention(d, backward=False):
    """attention, on which attention_backward is built: everything that there is but dropout."""
    (heads, heads_k, heads_v), dim = d.heads(), d.few(17)
    rows, keys = d.length(), d.length()
    keys = rows if d.chance(0.4) else keys
    batch = d.few(3)
    batches = [1 if d.chance(0.15) else batch for _ in range(3)]
    batch = 0 if 0 in batches else max(batches)
    dim_v = dim if d.chance(0.7) else d.few(20)
    edits = draw_edits(
        d, heads, dim, batch, ("causal", "window_size", "softmax_scale", "softcap", "alibi_slopes", "sinks")
    )
    arithmetic = edits.fields["arithmetic"]
    arguments = dict(edits.arguments)
    alignment = d.one("top-left", "bottom-right")
    has_diagonal = edits.left is not None or edits.right is not None or "alibi_slopes" in arguments
    if (rows != keys and has_diagonal) or d.chance(0.3):
        arguments["alignment"] = alignment
    fields = edits.fields_for(rows, keys, arguments.get("alignment") == "bottom-right" and rows != keys)
    shape = (batch, heads, rows, keys)

    def broadcast():
        return tuple(1 if d.chance(0.3) else size for size in shape)[d.one(0, 0, 1, 2) :]

    if d.chance(0.25):
        mask = d.rng.random(broadcast()) < d.one(0.5, 0.9, 0.1)
        arguments["mask"], fields["seen"] = d.laid(mask), fields["seen"] & mask
    if d.chance(0.25):
        bias = d.floats(*broadcast(), dtype=d.one(d.dtype, *DTYPES)).copy()
        if d.chance(0.4):
            bias[d.rng.random(bias.shape) < 0.3] = -INF
        if d.chance(0.2):  # where a mask hides, nobody may look at a bias
            bias[d.rng.random(bias.shape) < 0.1] = NAN
        arguments["bias"], fields["bias"] = d.laid(bias), arithmetic.read(bias)
    q, k, v = (
        d.floats(n, h, s, size)
        for n, h, s, size in zip(batches, (heads, heads_k, heads_v), (rows, keys, keys), (dim, dim, dim_v), strict=True)
    )

    def question(k, v):
        whole = [np.broadcast_to(arithmetic.read(x), (batch, *x.shape[1:])) for x in (q, k, v)]
        return Question(*whole, **fields)

    clean = None
    if d.chance(0.35):
        clean, (k, v) = (k, v), poison(d, question, k, v)
    layout = d.one("bshd", "bhsd")

    def home(x):
        return x.swapaxes(1, 2) if layout == "bshd" else x

    given = {name: d.laid(home(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    if layout == "bhsd" or d.chance(0.3):
        arguments["layout"] = layout
    if not backward:
        arguments["return_lse"] = True
    ask = question(k, v)
    found = answer(ask)
    dtypes = result_dtypes(given["q"])

    def slopes_shape(x):
        return x.reshape(batch, heads)

    def all_gradients(dout, dlse):
        by_word = gradients(ask, found, arithmetic.read(home(dout)), arithmetic.read(dlse))
        result = {}
        for name, word in (("q", "q"), ("k", "k"), ("v", "v"), ("bias", "bias"), ("sinks", "sinks")):
            if name in given:
                first = {"q": q, "k": k, "v": v}[name].shape
                result[name] = summed_to(arithmetic, by_word[word], first).map(home)
            elif name == "bias" and name in arguments:
                result[name] = summed_to(arithmetic, by_word[word], arguments[name].shape)
            elif name in arguments:
                result[name] = total_of(arithmetic, by_word[word], (0,))
        if "alibi_slopes" in arguments:
            whole = by_word["slopes"].map(slopes_shape)
            one_for_all = arguments["alibi_slopes"].ndim == 1
            result["alibi_slopes"] = total_of(arithmetic, whole, (0,)) if one_for_all else whole
        return result

    def results():
        return [Result("out", found.out.map(home), dtypes[0]), Result("lse", found.lse, dtypes[1])]

    call = Call("attention", {**given, **arguments}, results, all_gradients)
    if clean is not None:
        call.clean = {name: home(x) for name, x in zip(("k", "v"), clean, strict=True)}
    return call


def laid_like(given, values):
    """`values` with the steps and the alignment of `given`: the BLAS may round by them."""
    if not given.size:
        return values
    low, high = np.lib.array_utils.byte_bounds(given)
    memory = np.zeros(high - low + 64, np.uint8)
    start = given.__array_interface__["data"][0] - low + (low - memory.__array_interface__["data"][0]) % 64
    laid = np.ndarray(given.shape, given.dtype, memory, start, given.strides)
    laid[...] = values
    return laid


def check_attention(d):
    call = attention(d)
    found = run(d, call)
    clean = getattr(call, "clean", None)
    if clean is not None:
        # What nobody sees must not change a bit, in no way by which it is computed.
        clean = {name: laid_like(call.arguments[name], x) for name, x in clean.items()}
        again, _ = taken(d, "attention", {**call.arguments, **clean})
        for name, one, other in zip(("out", "lse"), found, again, strict=True):
            if one.tobytes() != other.tobytes() and not np.isnan(as_float64(one)).any():
                raise Wrong(f"{name} depends on what hidden keys hold")


def check_backward(d):
    call = attention(d, backward=True)
    expected = call.results()
    arguments, q = call.arguments, call.arguments["q"]
    dout = d.floats(*expected[0].expected.value.shape, dtype=q.dtype.newbyteorder("=") if q.dtype != BFLOAT16 else None)
    dlse = d.floats(*expected[1].expected.value.shape, dtype=expected[1].dtype)
    has_dlse = d.chance(0.6)
    dlse = dlse if has_dlse else np.zeros_like(dlse)
    extra = {"dout": d.laid(dout), **({"dlse": d.laid(dlse)} if has_dlse else {})}
    if d.chance(0.4):
        found, _ = taken(d, "attention", {**arguments, "return_lse": True})
        extra |= dict(zip(("out", "lse"), found, strict=True))
    arguments = {**extra, **arguments}
    found, before = taken(d, "attention_backward", arguments)
    check_untouched(arguments, before)
    wanted = call.gradients(dout, dlse)
    for name in ("q", "k", "v", "bias", "sinks", "alibi_slopes"):
        actual = getattr(found, f"d{name}")
        if (actual is None) != (name not in wanted):
            raise Wrong(f"d{name} is {'missing' if actual is None else 'more than was asked'}")
        if actual is not None:
            check(f"d{name}", actual, wanted[name], arguments[name].dtype, lenient=True)


def sdpa(d):
    """torch's function: any rank, leading axes broadcast, heads grouped or equal or one."""
    rank, grouped = d.upto(5, 2), d.chance(0.3)
    lead = tuple(d.few(2) for _ in range(max(0, rank - 3)))
    heads, heads_k, heads_v = d.heads()
    if not grouped:
        heads_k = heads_v = heads
    rows, keys, dim = d.length(), d.length(), d.few(17)
    dim_v = d.one(dim, d.few(9))
    edits = draw_edits(d, heads, dim, names=("softmax_scale",))
    arithmetic, arguments = edits.fields["arithmetic"], dict(edits.arguments)
    if "softmax_scale" in arguments:
        arguments["scale"] = arguments.pop("softmax_scale")

    def shape(h, s, size):
        ones = tuple(1 if d.chance(0.15) else n for n in lead)
        h = 1 if not grouped and d.chance(0.15) else h
        return (*ones[(d.upto(len(ones)) if d.chance(0.1) else 0) :], h, s, size)[-rank:]

    q, k, v = (
        d.floats(*shape(h, s, n)) for h, s, n in ((heads, rows, dim), (heads_k, keys, dim), (heads_v, keys, dim_v))
    )
    heads = (q.shape[-3] if rank > 2 else 1) if grouped else np.broadcast_shapes(*(x.shape[-3:-2] for x in (q, k, v)))
    heads = heads if isinstance(heads, int) else (heads[0] if heads else 1)
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    fields = edits.fields_for(rows, keys, bottom_right=False)
    kind = d.upto(4)
    mask_shape = (*batch, heads, rows, keys)
    mask_shape = tuple(1 if d.chance(0.3) else n for n in mask_shape)[d.upto(len(mask_shape) - 1) :]
    if kind == 0:
        arguments["is_causal"] = True
        fields["seen"] = band(rows, keys, None, 0, 0)[0]
    elif kind == 1:
        mask = d.rng.random(mask_shape) < 0.7
        arguments["attn_mask"], fields["seen"] = d.laid(mask), mask
    elif kind == 2:
        bias = d.floats(*mask_shape, dtype=d.one(d.dtype, np.dtype("float32"))).copy()
        bias[d.rng.random(bias.shape) < d.one(0.0, 0.3)] = -INF
        arguments["attn_mask"], fields["bias"] = d.laid(bias), arithmetic.read(bias)
    if grouped:
        arguments["enable_gqa"] = True

    def whole(x, repeated):
        x = arithmetic.read(x)
        x = x if x.ndim > 2 else x[None]
        return np.broadcast_to(x, (*batch, x.shape[-3] if repeated else heads, *x.shape[-2:]))

    ask = Question(*(whole(x, grouped) for x in (q, k, v)), **fields)
    given = {name: d.laid(x) for name, x in (("query", q), ("key", k), ("value", v))}

    def home(x):
        return x[0] if rank == 2 else x

    found = answer(ask)
    dtypes = result_dtypes(given["query"])

    def all_gradients(dout, dlse):
        dout, dlse = (x if rank > 2 else x[None] for x in (dout, dlse))
        by_word = gradients(ask, found, arithmetic.read(dout), arithmetic.read(dlse))
        shapes = {"query": ("q", q.shape), "key": ("k", k.shape), "value": ("v", v.shape)}
        if fields.get("bias") is not None:
            shapes["attn_mask"] = ("bias", fields["bias"].shape)
        return {name: summed_to(arithmetic, by_word[word], shape) for name, (word, shape) in shapes.items()}

    def results():
        return [Result("out", found.out.map(home), dtypes[0]), Result("lse", found.lse.map(home), dtypes[1])]

    return Call("scaled_dot_product_attention", {**given, **arguments, "return_lse": True}, results, all_gradients)


class Piece(NamedTuple):
    """One sequence: its question, its rows among all rows, its keys' index in the arrays of all keys."""

    ask: Question
    rows: slice
    keys: tuple
    sequence: int


def in_pieces(d, function, given, arguments, pieces, total, heads, dim_v, arithmetic, batch_rows=None):
    """A call whose sequences each have lengths of their own; `batch_rows`: they come in a batch all the same."""
    answers = [answer(piece.ask) for piece in pieces]
    dtypes = result_dtypes(given["q"] if "q" in given else next(iter(given.values())))

    def results():
        out = Expected(np.zeros((total, heads, dim_v)), np.zeros((total, heads, dim_v)))
        lse = Expected(np.full((heads, total), -INF), np.zeros((heads, total)))
        for piece, found in zip(pieces, answers, strict=True):
            for whole, part in zip((*out, *lse), (*found.out, *found.lse), strict=True):
                if whole.ndim == 3:
                    whole[piece.rows] = part.swapaxes(0, 1)
                else:
                    whole[:, piece.rows] = part
        if batch_rows is not None:
            batch, rows = batch_rows
            out = out.map(lambda x: x.reshape(batch, rows, heads, dim_v))
            lse = lse.map(lambda x: x.reshape(heads, batch, rows).swapaxes(0, 1))
        return [Result("out", out, dtypes[0]), Result("lse", lse, dtypes[1])]

    def all_gradients(dout, dlse):
        result = {}
        dout, dlse = arithmetic.read(dout), arithmetic.read(dlse)
        for name in ("q", "k", "v"):
            shape = given[name].shape
            result[name] = Expected(np.zeros(shape), np.zeros(shape))
        for piece, found in zip(pieces, answers, strict=True):
            by_word = gradients(piece.ask, found, dout[piece.rows].swapaxes(0, 1), dlse[:, piece.rows])
            for name, index in (("q", (piece.rows,)), ("k", piece.keys), ("v", piece.keys)):
                value, tolerance = (x.swapaxes(0, 1) for x in by_word[name])
                np.add.at(result[name].value, index, value)
                with np.errstate(all="ignore"):
                    np.add.at(result[name].tolerance, index, tolerance + 8 * arithmetic.eps * np.abs(value))
        return result

    return Call(function, {**given, **arguments}, results, all_gradients)


def flash(d):
    """flash_attn_func and its packed forms."""
    form = d.one("flash_attn_func", "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func")
    (heads, heads_k, _), dim, batch, rows = d.heads(), d.few(17), d.few(3), d.length()
    keys = rows if "qkv" in form else d.length()
    heads_k = heads if "qkv" in form else heads_k
    edits = draw_edits(d, heads, dim, batch)
    arithmetic = edits.fields["arithmetic"]
    fields = edits.fields_for(rows, keys, bottom_right=True)
    arguments = dict(edits.arguments)
    if d.chance(0.1):
        arguments["deterministic"] = d.chance(0.5)
    q = d.floats(batch, rows, heads, dim)
    k, v = (d.floats(batch, keys, heads_k, dim) for _ in range(2))
    if "qkv" in form:
        given = {"qkv": d.laid(np.stack([q, k, v], axis=2))}
    elif "kv" in form:
        given = {"q": d.laid(q), "kv": d.laid(np.stack([k, v], axis=2))}
    else:
        given = {"q": d.laid(q), "k": d.laid(k), "v": d.laid(v)}
    ask = Question(*(arithmetic.read(x).swapaxes(1, 2) for x in (q, k, v)), **fields)
    dtypes = result_dtypes(next(iter(given.values())))
    found = answer(ask)

    def home(x):
        return x.swapaxes(1, 2)

    def all_gradients(dout, dlse):
        by_word = gradients(ask, found, home(arithmetic.read(dout)), arithmetic.read(dlse))
        by_word = {name: by_word[name].map(home) for name in ("q", "k", "v")}
        if "qkv" in form or "kv" in form:
            words = ("q", "k", "v") if "qkv" in form else ("k", "v")
            packed = Expected(*(np.stack([by_word[word][i] for word in words], axis=2) for i in range(2)))
            return {"qkv": packed} if "qkv" in form else {"q": by_word["q"], "kv": packed}
        return by_word

    def results():
        return [Result("out", found.out.map(home), dtypes[0]), Result("lse", found.lse, dtypes[1])]

    return Call(form, {**given, **arguments, "return_lse": True}, results, all_gradients)


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def varlen(d):
    """Packed sequences, empty ones too, keys end to end or in pages; rows after the last sequence."""
    (heads, heads_k, heads_v), dim, batch = d.heads(), d.few(17), d.few(4)
    dim_v = d.one(dim, dim, d.few(9))
    form = d.one("", "", "pages", "pages", "qkv", "kv")
    lengths_q = [d.length() if d.chance(0.85) else 0 for _ in range(batch)]
    lengths_k = lengths_q if form == "qkv" else [d.length() if d.chance(0.85) else 0 for _ in range(batch)]
    if form in ("qkv", "kv"):
        heads_v, dim_v = heads_k, dim
    if form == "qkv":
        heads_k = heads_v = heads
    edits = draw_edits(d, heads, dim, batch)
    arithmetic = edits.fields["arithmetic"]
    starts_q, starts_k = starts_of(lengths_q), starts_of(lengths_k)
    total_q, total_k = (int(x[-1]) + (d.upto(3) if d.chance(0.2) else 0) for x in (starts_q, starts_k))
    total_k = total_q if form == "qkv" else total_k
    q = d.floats(total_q, heads, dim)
    arguments = dict(edits.arguments)
    longest = [max(x, default=0) + d.one(0, 0, 3) for x in (lengths_q, lengths_k)]
    if form == "qkv":
        arguments |= {"cu_seqlens": d.laid(starts_q), "max_seqlen": d.number_of(max(longest))}
    else:
        arguments |= {"cu_seqlens_q": d.laid(starts_q), "cu_seqlens_k": d.laid(starts_k)}
        arguments |= dict(zip(("max_seqlen_q", "max_seqlen_k"), map(d.number_of, longest), strict=True))
    if form == "pages":
        size = d.one(1, 2, 3, 8, 16)
        table, pages = draw_table(d, lengths_k, size, shared_pages=True)
        arguments["block_table"] = d.laid(table)
        lead = (pages, size)
        places = [(table[i, np.arange(n) // size], np.arange(n) % size) for i, n in enumerate(lengths_k)]
    else:
        lead = (total_k,)
        places = [(np.arange(start, start + n),) for start, n in zip(starts_k, lengths_k, strict=False)]
    k, v = d.floats(*lead, heads_k, dim), d.floats(*lead, heads_v, dim_v)
    if d.chance(0.3):  # what belongs to no sequence
        used = np.zeros(lead, bool)
        for place in places:
            used[place] = True
        k, v = (np.where(used[..., None, None], x, np.asarray(d.one(NAN, INF), x.dtype)) for x in (k, v))
    pieces = []
    for i, place in enumerate(places):
        rows = slice(int(starts_q[i]), int(starts_q[i + 1]))
        fields = edits.fields_for(lengths_q[i], lengths_k[i], bottom_right=True, sequence=i)
        parts = (arithmetic.read(x).swapaxes(0, 1) for x in (q[rows], k[place], v[place]))
        pieces.append(Piece(Question(*parts, **fields), rows, place, i))
    given = {"q": q, "k": k, "v": v}
    if form == "qkv":
        given = {"qkv": np.stack([q, k, v], axis=1)}
    elif form == "kv":
        given = {"q": q, "kv": np.stack([k, v], axis=1)}
    given = {name: d.laid(x) for name, x in given.items()}
    function = f"flash_attn_varlen_{form}packed_func" if form in ("qkv", "kv") else "flash_attn_varlen_func"
    arguments["return_lse"] = True
    call = in_pieces(d, function, given, arguments, pieces, total_q, heads, dim_v, arithmetic)
    if form in ("qkv", "kv"):
        call.gradients = None
    return call


def draw_table(d, lengths, size, shared_pages=False, spare=0):
    """A block table for sequences of so many places, and how many pages there are; what is not used names nothing."""
    used = [-(-length // size) for length in lengths]
    pages = max(1, sum(used) + d.upto(2))
    table = np.full((len(lengths), max(used, default=0) + spare), d.one(-1, 10**6, 0), np.int32)
    order = d.rng.permutation(pages)
    for i, count in enumerate(used):
        first = sum(used[:i])
        table[i, :count] = d.rng.integers(0, pages, count) if shared_pages and d.chance(0.3) else order[first:][:count]
    return table, pages


def kvcache(d):
    """New tokens into a cache, rotated or not, and attention over what it holds then."""
    (heads, heads_k, heads_v), dim = d.heads(), d.one(2, 4, 8, 16, d.few(9))
    dim_v = d.one(dim, dim, d.few(9))
    batch, paged = d.few(3), d.chance(0.4)
    edits = draw_edits(
        d, heads, dim, batch, ("causal", "window_size", "softmax_scale", "softcap", "alibi_slopes", "sinks")
    )
    arithmetic, arguments = edits.fields["arithmetic"], dict(edits.arguments)
    appends, packed_q = d.chance(0.65), d.chance(0.3)
    lengths_q = [d.upto(5) for _ in range(batch)] if packed_q else [d.upto(5, 0 if d.chance(0.1) else 1)] * batch
    new, packed_new = [0] * batch, appends and d.chance(0.3)
    if appends:
        new = [d.upto(5) for _ in range(batch)] if packed_new else [d.upto(5)] * batch
    old = [d.length() for _ in range(batch)]
    one_length = d.chance(0.25)
    if one_length:
        old = [max(old, default=0)] * batch
    full = not appends and d.chance(0.2)
    needed = [a + b for a, b in zip(old, new, strict=True)]
    size, pages = d.one(1, 2, 3, 8, 16), 0
    if paged:
        table, pages = draw_table(d, needed, size, spare=d.upto(1))
        capacity = table.shape[1] * size
        if full and capacity:
            table, pages = draw_table(d, [capacity] * batch, size)
        full = full and batch > 0
        arguments[d.one("block_table", "page_table")] = d.laid(table)
        lead = (pages, size)
    else:
        capacity = max(needed, default=0) + d.upto(3)
        sequences = batch
        if d.chance(0.3):
            sequences = batch + d.upto(2)
            index = d.rng.permutation(sequences)[:batch].astype(np.int32)
            arguments["cache_batch_idx"] = d.laid(index)
        else:
            index = np.arange(batch, dtype=np.int32)
        lead = (sequences, capacity)
    if full:
        old = [capacity] * batch
    else:
        arguments["cache_seqlens"] = (
            d.number_of(old[0]) if one_length and batch else d.laid(np.array(old, np.int32).reshape(batch))
        )
    leftpad = [d.upto(n) if d.chance(0.7) else 0 for n in old] if d.chance(0.3) else None
    if leftpad is not None:
        arguments["cache_leftpad"] = d.laid(np.array(leftpad, np.int32).reshape(batch))
    stops = [a + b for a, b in zip(old, new, strict=True)]

    def place(i, first, stop):
        where = np.arange(first, stop)
        return (table[i, where // size], where % size) if paged else (np.full(where.size, index[i]), where)

    k_cache, v_cache = (d.floats(*lead, h, n).copy() for h, n in ((heads_k, dim), (heads_v, dim_v)))
    if d.chance(0.4):
        live = np.zeros(lead, bool)
        for i in range(batch):
            live[place(i, leftpad[i] if leftpad else 0, old[i])] = True
        k_cache[~live], v_cache[~live] = d.one(NAN, INF), d.one(NAN, -INF)
    starts_q, starts_new = starts_of(lengths_q), starts_of(new)
    rows = int(starts_q[-1]) + (d.upto(2) if packed_q else 0)
    q = d.floats(rows, heads, dim)
    tokens = [d.floats(int(starts_new[-1]), h, n) for h, n in ((heads_k, dim), (heads_v, dim_v))]
    q_read, k_new = as_float64(q), as_float64(tokens[0])
    k_error = np.zeros(k_new.shape)
    if appends and d.chance(0.5):
        half, interleaved = d.upto(dim // 2), d.chance(0.5)
        tables = [d.floats(capacity + d.upto(2), half, dtype=d.one(*DTYPES)) for _ in range(1)] * 2
        tables[1] = d.floats(*tables[0].shape, dtype=tables[0].dtype)
        arguments |= {"rotary_cos": d.laid(tables[0]), "rotary_sin": d.laid(tables[1])}
        arguments["rotary_interleaved"] = interleaved
        first = np.array(old, np.int64).reshape(batch)
        if d.chance(0.2):
            room = capacity - max([*lengths_q, *new], default=0)
            if room >= 0:
                first = d.rng.integers(0, room + 1, batch)
                arguments["rotary_seqlens"] = d.laid(first.astype(np.int32))
        each_row = edits.left is not None or edits.right is not None
        at_keys = np.repeat(first, new) + np.arange(len(k_new)) - np.repeat(starts_new[:-1], new)
        used = int(starts_q[-1])
        at_rows = np.repeat(first, lengths_q)
        if each_row:
            at_rows = at_rows + np.arange(used) - np.repeat(starts_q[:-1], lengths_q)
        if max(at_rows.max(initial=0), at_keys.max(initial=0)) >= tables[0].shape[0]:
            return kvcache(d)  # positions that the tables do not have, which would be refused
        k_new, k_error = turned(*tables, k_new, at_keys, interleaved)
        k_new = rounded(k_new, d.dtype)
        rotated_q = rounded(turned(*tables, q_read[:used], at_rows, interleaved).value, d.dtype)
        q_read = np.concatenate([rotated_q, q_read[used:]])
    del k_error
    after = [as_float64(x) for x in (k_cache, v_cache)]
    for i in range(batch):
        there = place(i, old[i], stops[i])
        part = slice(int(starts_new[i]), int(starts_new[i + 1]))
        after[0][there], after[1][there] = k_new[part], as_float64(tokens[1][part])
    pieces = []
    for i in range(batch):
        first = leftpad[i] if leftpad else 0
        part, where = slice(int(starts_q[i]), int(starts_q[i + 1])), place(i, first, stops[i])
        fields = edits.fields_for(lengths_q[i], stops[i] - first, bottom_right=True, sequence=i)
        parts = (arithmetic.read(x).swapaxes(0, 1) for x in (q_read[part], after[0][where], after[1][where]))
        pieces.append(Piece(Question(*parts, **fields), part, where, i))
    dense = None if packed_q else (batch, lengths_q[0] if batch else d.upto(3))
    if packed_q:
        arguments |= {"cu_seqlens_q": d.laid(starts_q), "max_seqlen_q": d.number_of(max(lengths_q, default=0))}
    else:
        q = q.reshape(*dense, heads, dim) if batch else d.floats(*dense, heads, dim)
    given = {"q": d.laid(q), "k_cache": d.laid(k_cache, writable=True), "v_cache": d.laid(v_cache, writable=True)}
    if appends:
        count = new[0] if batch else 0
        if packed_new:
            arguments["cu_seqlens_k_new"] = d.laid(starts_new)
        else:
            tokens = [x.reshape(batch, count, *x.shape[1:]) for x in tokens]
        given |= {"k": d.laid(tokens[0]), "v": d.laid(tokens[1])}
    arguments["return_softmax_lse"] = True
    if d.chance(0.2):
        arguments |= {"num_splits": d.upto(3), "check_indices": d.chance(0.5)}
    call = in_pieces(d, "flash_attn_with_kvcache", given, arguments, pieces, rows, heads, dim_v, arithmetic, dense)
    call.gradients = None
    call.written = {
        name: lambda x=x: Expected(x, np.zeros(x.shape)) for name, x in zip(("k_cache", "v_cache"), after, strict=True)
    }
    return call


def merging(d):
    """merge_states: what has an lse of -inf adds nothing, whatever it holds."""
    count, heads, rows, dim = d.upto(4, 1), d.few(4), d.length(), d.few(9)
    layout = d.one("bshd", "bhsd", "thd")
    lead = () if layout == "thd" else (d.few(3),) if layout == "bshd" else tuple(d.few(2) for _ in range(d.upto(2)))
    kind = np.dtype(d.one("float32", "float64"))
    lses = [d.floats(*lead, heads, rows, dtype=kind).copy() for _ in range(count)]
    for x in lses:
        if d.chance(0.4):
            x[d.rng.random(x.shape) < 0.3] = d.one(-INF, -INF, INF, 800.0)
    outs = [d.floats(*lead, heads, rows, dim).copy() for _ in range(count)]
    for out, lse in zip(outs, lses, strict=True):
        if d.chance(0.3):
            out[np.isneginf(lse)] = NAN

    def home(x):
        return x if layout == "bhsd" else x.swapaxes(-3, -2)

    arguments = {"outs": [d.laid(home(x)) for x in outs], "lses": [d.laid(x) for x in lses]}
    if layout != "bshd" or d.chance(0.5):
        arguments["layout"] = layout
    dtypes = arguments["outs"][0].dtype, kind  # lse in the machine's byte order, as everywhere

    def results():
        with np.errstate(all="ignore"):
            lse = np.stack([as_float64(x) for x in lses])
            parts = np.stack([as_float64(x) for x in outs])
            highest = lse.max(axis=0)
            gap = lse - np.where(np.isinf(highest), 0.0, highest)
            raw = np.where(np.isposinf(highest), np.isposinf(lse) * 1.0, np.exp(gap))
            total = raw.sum(axis=0)
            share = (raw / np.where(total == 0.0, 1.0, total))[..., None]
            terms = np.where(share == 0.0, 0.0, share * parts)
            size = finite(np.abs(terms)) * (16 + finite(np.abs(gap)))[..., None]
            slack = 2.3e-16 * size.sum(axis=0) + 5e-324 * (2 + finite(np.abs(parts))).sum(axis=0)
            doubtful = ((share < 1e-290) & (gap[..., None] > -800) & ~np.isfinite(parts)).any(axis=0)
            overflows = finite(np.abs(terms)).sum(axis=0) > ARITHMETIC["float64"].most
            whole = np.where(np.isinf(highest), highest, highest + np.log(total))
            out = Expected(terms.sum(axis=0), np.where(doubtful | overflows, INF, slack))
            off = Expected(whole, 2.3e-16 * (16 + finite(np.abs(whole))))
            return [Result("out", out.map(home), dtypes[0]), Result("lse", off, dtypes[1])]

    return Call("merge_states", arguments, results)


def cascade(d):
    """cascade_attention: the prefix and each sequence's own keys, end to end."""
    (heads, heads_k, heads_v), dim, batch = d.heads(), d.few(17), d.few(3)
    dim_v, prefix, keys = d.one(dim, d.few(9)), d.length(), d.length()
    causal = d.chance(0.7)
    rows = min(d.length(), keys) if causal else d.length()
    edits = draw_edits(d, heads, dim, batch, ("softmax_scale", "softcap", "sinks"))
    arithmetic, arguments = edits.fields["arithmetic"], dict(edits.arguments)
    edits.right = 0 if causal else None
    if not causal or d.chance(0.3):
        arguments["causal"] = causal
    q = d.floats(batch, rows, heads, dim)
    own = [d.floats(batch, keys, h, n) for h, n in ((heads_k, dim), (heads_v, dim_v))]
    common = [d.floats(prefix, *x.shape[2:]) for x in own]
    whole = [
        np.concatenate([np.broadcast_to(a, (batch, *a.shape)), b], axis=1) for a, b in zip(common, own, strict=True)
    ]
    fields = edits.fields_for(rows, prefix + keys, bottom_right=True)
    parts = (arithmetic.read(x).swapaxes(1, 2) for x in (q, *whole))
    found = answer(Question(*parts, **fields, in_parts=True))
    names = ("q", "k_prefix", "v_prefix", "k", "v")
    given = {name: d.laid(x) for name, x in zip(names, (q, *common, *own), strict=True)}
    dtypes = result_dtypes(given["q"])

    def results():
        # each part's states are one more rounding
        out = found.out._replace(tolerance=4 * found.out.tolerance)
        lse = found.lse._replace(tolerance=4 * found.lse.tolerance)
        return [Result("out", out.map(lambda x: x.swapaxes(1, 2)), dtypes[0]), Result("lse", lse, dtypes[1])]

    return Call("cascade_attention", {**given, **arguments, "return_lse": True}, results)


def rotary(d):
    """apply_rotary_emb, in place or not, of sequences in a batch or packed."""
    heads, dim, batch, interleaved = d.few(4), d.few(17), d.few(3), d.chance(0.5)
    half, packed = d.upto(dim // 2), d.chance(0.4)
    lengths = [d.length() for _ in range(batch)] if packed else [d.length()] * batch
    starts = starts_of(lengths)
    offsets = d.rng.integers(0, 5, batch)
    arguments = {"interleaved": interleaved}
    kind = d.upto(2)
    if kind == 0:
        offsets[:] = 0
    elif kind == 1:
        offsets[:] = d.upto(4)
        arguments["seqlen_offsets"] = d.number_of(int(offsets[0])) if batch else 0
    else:
        arguments["seqlen_offsets"] = d.laid(offsets.astype(d.one(np.int32, np.int64)))
    positions = int((np.array(lengths) + offsets).max(initial=0 if batch else 3)) + d.upto(2)
    cos, sin = (d.floats(positions, half, dtype=d.one(*DTYPES)) for _ in range(2))
    total = int(starts[-1])
    x = d.floats(total, heads, dim) if packed else d.floats(batch, lengths[0] if batch else d.upto(3), heads, dim)
    at = np.repeat(offsets, lengths) + np.arange(total) - np.repeat(starts[:-1], lengths)
    expected = turned(cos, sin, as_float64(x).reshape(total, heads, dim), at, interleaved).map(
        lambda y: y.reshape(x.shape)
    )
    if packed:
        arguments["cu_seqlens"] = d.laid(starts)
        if d.chance(0.5):
            arguments["max_seqlen"] = max(lengths, default=0) + d.upto(1)
    inplace = d.chance(0.4)
    if inplace:
        arguments["inplace"] = True
    given = {"x": d.laid(x, writable=inplace), "cos": d.laid(cos), "sin": d.laid(sin)}
    call = Call("apply_rotary_emb", {**given, **arguments}, lambda: [Result("out", expected, given["x"].dtype)])
    call.written = {"x": lambda: expected} if inplace else {}
    return call


def number_of(self, value):
    """A whole number as somebody may write it."""
    kind = self.upto(9)
    return np.int64(value) if kind == 0 else np.array(value, np.int32) if kind == 1 else int(value)


Draw.number_of = number_of


def check_dropout(d):
    """Of flash_attn_func: what its S_dmask says was kept is what its result was made of, and its gradients."""
    (heads, heads_k, _), dim, batch, rows, keys = d.heads(), d.few(9), d.few(2), d.length(), d.length()
    edits = draw_edits(d, heads, dim, batch, ("causal", "window_size", "softmax_scale", "softcap"))
    arithmetic = edits.fields["arithmetic"]
    p = d.one(0.0, 0.1, 0.5, 0.9, 1.0)
    q, k, v = (d.floats(batch, s, h, dim) for s, h in ((rows, heads), (keys, heads_k), (keys, heads_k)))
    given = {"q": d.laid(q), "k": d.laid(k), "v": d.laid(v)}
    seed = d.one(0, 2**64 - 1, d.upto(2**40))
    arguments = {**given, **edits.arguments, "dropout_p": d.number(p), "dropout_seed": seed}
    found, before = taken(d, "flash_attn_func", {**arguments, "return_attn_probs": True})
    check_untouched(given, before)
    out, lse, mask = found
    ask = Question(
        *(arithmetic.read(x).swapaxes(1, 2) for x in (q, k, v)), **edits.fields_for(rows, keys, bottom_right=True)
    )
    again, _ = taken(d, "flash_attn_func", {**arguments, **({} if p else {"dropout_p": 0.0, "dropout_seed": 5})})
    if again.tobytes() != out.tobytes():
        raise Wrong("the same seed gives another result" if p else "dropout_p=0 is not without dropout")
    if not p:
        if mask is not None:
            raise Wrong("S_dmask is given without dropout")
    else:
        ask = replace(ask, keep=~np.signbit(as_float64(mask)), dropout_p=p)
    whole = answer(ask)
    if p:
        weights = computed_again(whole)
        weights = weights._replace(tolerance=weights.tolerance + arithmetic.least)
        check(
            "|S_dmask|",
            np.abs(mask),
            weights,
            out.dtype.newbyteorder("=") if d.dtype != BFLOAT16 else d.dtype,
        )
        # A weight that is nan, where scores left the range, has a sign that says nothing.
        seen = ~whole.hidden & np.isfinite(whole.weights.value) & ~np.isnan(as_float64(mask))
        kept, count = int((ask.keep & seen).sum()), int(seen.sum())
        if abs(kept - count * (1 - p)) > 7 * (count * p * (1 - p)) ** 0.5 + 1e-9:
            raise Wrong(f"{kept} of {count} weights are kept with dropout_p={p}")
    dtypes = result_dtypes(given["q"])
    check("out", out, whole.out.map(lambda x: x.swapaxes(1, 2)), dtypes[0])
    check("lse", lse, whole.lse, dtypes[1])
    dout = d.floats(*out.shape)
    options = {"alignment": "bottom-right", **{name: x for name, x in arguments.items() if name not in given}}
    grads, _ = taken(d, "attention_backward", {"dout": d.laid(dout), **given, **options})
    wanted = gradients(ask, whole, arithmetic.read(dout).swapaxes(1, 2), np.zeros(lse.shape))
    for name in ("q", "k", "v"):
        expected = wanted[name].map(lambda x: x.swapaxes(1, 2))
        check(f"d{name}", getattr(grads, f"d{name}"), expected, given[name].dtype, lenient=True)


def in_torch(x):
    """An array as a tensor, bfloat16 too."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="K"))


def check_torch(d):
    """The same calls with tensors, and autograd's gradients."""
    d.is_large = False
    call = d.one(attention, sdpa, flash, varlen)(d)
    if torch is None or call.gradients is None:
        return run(d, call)
    arrays = {name: x for name, x in call.arguments.items() if isinstance(x, np.ndarray) and x.ndim}
    tensors = {name: in_torch(x) for name, x in arrays.items()}
    wanting = [name for name, x in tensors.items() if x.is_floating_point() and not d.chance(0.1)]
    for name in wanting:
        tensors[name].requires_grad_()
    call.arguments = {**call.arguments, **tensors}
    found, before = taken(d, call.function, call.arguments)
    check_untouched(call.arguments, before)
    for actual, result in zip(found, call.results(), strict=True):
        check(result.name, actual, result.expected, result.dtype.newbyteorder("=") if d.dtype != BFLOAT16 else d.dtype
              if result.name == "out" else result.dtype)  # fmt: skip
    if not wanting or not found[0].requires_grad:
        return None
    dout, dlse = (d.floats(*x.shape, dtype=np.dtype("float32")) for x in found)
    made = [in_torch(dout).to(found[0].dtype), in_torch(dlse).to(found[1].dtype)]
    with warnings.catch_warnings(), np.errstate(all=d.errstate):
        warnings.simplefilter("error")
        torch.autograd.backward(found, made)
    expected = call.gradients(*(as_float64(x) for x in made))
    for name in wanting:
        if name in expected:
            actual = tensors[name].grad
            if actual is None:
                raise Wrong(f"no gradient of {name}")
            dtype = arrays[name].dtype
            dtype = dtype if dtype == BFLOAT16 else dtype.newbyteorder("=")
            check(f"gradient of {name}", actual, expected[name], dtype, lenient=True)
    return None


# ---------------------------------------------------------------------------------------------------
# Wrong arguments
# ---------------------------------------------------------------------------------------------------

NOT_FINITE = (NAN, INF, -INF, "0.5", True, 1j, [0.5], np.array([0.5]), 10**400)
NOT_A_FLAG = (1, 0, None, "yes", np.array([True]))
NOT_WHOLE = (-1, 1.5, "3", True, 2**31)
WRONG = {
    "softmax_scale": NOT_FINITE,
    "scale": NOT_FINITE,
    "softcap": (*NOT_FINITE, -1.0, None),
    "dropout_p": (*NOT_FINITE, -0.1, 1.5, None),
    "dropout_seed": (-1, 2**64, 1.0, True, "7"),
    "window_size": (3, (1,), (1, 2, 3), "11", (1.5, 0), (True, 0), (-2, 0), (0, 2**31), None),
    "causal": NOT_A_FLAG,
    "is_causal": NOT_A_FLAG,
    "return_lse": NOT_A_FLAG,
    "return_softmax_lse": NOT_A_FLAG,
    "deterministic": NOT_A_FLAG,
    "enable_gqa": NOT_A_FLAG,
    "interleaved": NOT_A_FLAG,
    "rotary_interleaved": NOT_A_FLAG,
    "inplace": NOT_A_FLAG,
    "compute_dtype": ("float16", "int32", 64, np.int32, int),
    "alignment": ("middle", True, 1, b"top-left"),
    "layout": ("sbhd", None, 1, ("bshd",)),
    "max_seqlen_q": NOT_WHOLE,
    "max_seqlen_k": NOT_WHOLE,
    "num_splits": NOT_WHOLE,
    "q_descale": (1.0, np.ones((1, 1), np.float32)),
    "learnable_sink": (None, 1.0),
    "strange": (None, 1.0),
}
"""Values that no call takes, by argument; the last two are arguments that no function has."""


def wrong_array(d, function, name, x):
    """Something that is like an argument and cannot be it."""
    options = [
        lambda: x.astype(np.complex64 if x.dtype.kind != "b" else np.int8),
        lambda: x.astype(object),
        lambda: x.tolist() if x.size < 100 and x.ndim else 1.0,
        lambda: np.ma.MaskedArray(np.zeros(x.shape, np.float32)),
        lambda: "text",
        lambda: x.reshape((1,) * 7 + x.shape) if function != "scaled_dot_product_attention" else x.astype(np.int16),
    ]
    if name in ("q", "k", "query", "key", "k_cache", "k_prefix", "sinks", "alibi_slopes", "dout", "dlse"):
        options.append(lambda: np.concatenate([x, np.zeros((*x.shape[:-1], 1), x.dtype)], axis=-1))
    if name in ("q", "k", "v", "query", "key", "value", "k_cache", "v_cache", "dout", "k_prefix"):
        options += [lambda: None, lambda: x.astype(np.float32 if x.dtype.itemsize != 4 else np.float64)]
    if name.startswith(("cu_seqlens", "cache_", "block_table", "page_table")):
        options += [lambda: x.astype(np.int64), lambda: x.astype(np.float32), lambda: x[..., None, None, None]]
    if name.startswith("cu_seqlens"):
        options += [lambda: x + 1, lambda: -1 - x]
    if name == "cache_seqlens":
        options += [lambda: x * 0 - 1, lambda: x * 0 + 2**30] if x.size else []
    return d.one(*options)()


def check_bad(d):
    """One wrong argument among right ones: refused in words that begin with the function's name, nothing touched."""
    d.is_large = False
    call = d.one(attention, sdpa, flash, varlen, kvcache, merging, cascade, rotary, check_backward_arguments)(d)
    names = {parameter.name for parameter in parameters(call.function)}
    arrays = {name for name, x in call.arguments.items() if isinstance(x, np.ndarray) and x.ndim}
    allowed = [name for name in WRONG if name in names or name in ("learnable_sink", "strange")]
    arguments = dict(call.arguments)
    if arrays and d.chance(0.5):
        name = d.one(*sorted(arrays))
        arguments[name] = wrong_array(d, call.function, name, arguments[name])
    elif call.function == "merge_states" and d.chance(0.5):
        outs, lses = arguments["outs"], arguments["lses"]
        name, wrong = d.one(
            ("outs", []), ("outs", outs[0]), ("lses", lses[1:]), ("outs", [*outs, outs[0]]), ("lses", None),
            ("outs", [x[..., None] for x in outs]), ("lses", [x.astype(np.float16) for x in lses]),
            ("lses", [x[None] for x in lses]), ("outs", [1.0 for _ in outs]),
        )  # fmt: skip
        arguments[name] = wrong
    else:
        name = d.one(*allowed)
        arguments[name] = d.one(*WRONG[name])
    call.arguments = arguments
    d.shown = call.function, arguments
    found, before = asked(d, call.function, arguments)
    wrong = arguments[name]
    shown = f"{name}={wrong.dtype}{wrong.shape}" if isinstance(wrong, np.ndarray) else f"{name}={wrong!r:.60}"
    if not isinstance(found, Exception):
        raise Wrong(f"takes {shown}")
    if not isinstance(found, (TypeError, ValueError, NotImplementedError)):
        raise Wrong(f"{shown} is refused by {type(found).__name__}: {str(found)[:200]}")
    if not str(found).startswith(call.function):
        raise Wrong(f"{shown} is refused without the function's name: {type(found).__name__}: {str(found)[:200]}")
    check_untouched(arguments, before)


def check_backward_arguments(d):
    """A right call of attention_backward."""
    call = attention(d, backward=True)
    out, lse = (result.expected.value.shape for result in call.results())
    q = call.arguments["q"]
    call.arguments |= {"dout": np.zeros(out, q.dtype), "dlse": np.zeros(lse, result_dtypes(q)[1])}
    call.function = "attention_backward"
    return call


# ---------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------


def compared(make):
    """A case that makes a call and compares its results."""

    def check_call(d):
        call = make(d)
        run(d, call)

    check_call.__name__ = make.__name__
    return check_call


KINDS = (
    (20, check_attention),
    (18, check_backward),
    (8, compared(sdpa)),
    (7, compared(flash)),
    (9, compared(varlen)),
    (12, compared(kvcache)),
    (4, compared(merging)),
    (5, compared(cascade)),
    (5, compared(rotary)),
    (4, check_dropout),
    (3, check_torch),
    (10, check_bad),
)
SHARES = np.array([weight for weight, _ in KINDS]) / sum(weight for weight, _ in KINDS)


def shown(value):
    if isinstance(value, (list, tuple)) and any(isinstance(x, np.ndarray) for x in value):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, np.ndarray) and value.ndim:
        order = "" if value.flags.c_contiguous else f" strides {value.strides}"
        return f"{value.dtype.str if value.dtype != BFLOAT16 else 'bfloat16'}{value.shape}{order}"
    if torch is not None and isinstance(value, torch.Tensor):
        return f"torch.{tuple(value.shape)}"
    return f"{value!r:.60}"


def case(seed: int) -> str | None:
    """One random case: what was wrong, with shapes and options, or None."""
    d = Draw(seed)
    return told(d, KINDS[int(d.rng.choice(len(KINDS), p=SHARES))][1])


def told(d, kind) -> str | None:
    """What was wrong with a case of a kind, with shapes and options, or None."""
    d.shown = None
    try:
        with np.errstate(all="ignore"):  # our own arithmetic; the call has the case's errstate
            kind(d)
    except Wrong as wrong:
        function, arguments = d.shown or ("", {})
        given = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        return f"{kind.__name__}: {wrong}; errstate {d.errstate}; {function}({given})"
    return None


def attack(seed: int, cases: int) -> Outcome:
    """The cases of so many seeds from one on."""
    return Outcome(cases, lost_of(case, seed, cases), "" if torch is not None else "torch is not here: no autograd")


def lost_of(case, seed: int, cases: int) -> list[str]:
    """What was wrong with each of so many cases, where something was."""
    found = ((number, case(number)) for number in range(seed, seed + cases))
    return [f"seed {number}: {wrong}" for number, wrong in found if wrong is not None]
