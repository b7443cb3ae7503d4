"""`seqused_q` and `seqused_k`: each packed sequence is what it would be alone, cut to what is used of it."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import SEED
from homes import needs
from oracle import assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import corridor
from cupyattn.reading import Options

varlen = cupyattn.flash_attn_varlen_func

ROWS, USED_ROWS = (3, 0, 5, 4, 1, 20), (2, 0, 5, 4, 0, 20)
KEYS, USED_KEYS = (6, 2, 3, 5, 4, 60), (6, 1, 0, 2, 4, 33)
"""Sequences without rows, without keys, and with more rows than keys are used."""
BEHIND = 2
"""Rows that belong to no sequence."""
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 8
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "window to the left": {"window_size": (3, -1), "causal": True},
    "softcap": {"causal": True, "softcap": 1.5},
    "slopes of heads": {"causal": True, "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4])},
    "slopes of sequences": {"alibi_slopes": np.random.default_rng(SEED).random((len(ROWS), HEADS))},
    "scale": {"softmax_scale": -0.7},
}
options_of_all = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
PAGE_SIZES = [1, 3, 16]


def int32(*values):
    return np.array(values, np.int32)


def starts(lengths):
    return int32(0, *np.cumsum(lengths))


def packed(poison=True):
    """q, k, v and what says where sequences are; rows and keys that are not used are nan, values inf."""
    rng = np.random.default_rng(SEED)
    q = rng.standard_normal((sum(ROWS) + BEHIND, HEADS, HEAD_DIM))
    k, v = rng.standard_normal((2, sum(KEYS), HEADS_KV, HEAD_DIM))
    if poison:
        for array, value, lengths, used in (
            (q, np.nan, ROWS, USED_ROWS),
            (k, np.nan, KEYS, USED_KEYS),
            (v, np.inf, KEYS, USED_KEYS),
        ):
            for (first, end), count in zip(pairwise(starts(lengths)), used, strict=True):
                array[first + count : end] = value
    given = {"cu_seqlens_q": starts(ROWS), "cu_seqlens_k": starts(KEYS)}
    return {"q": q, "k": k, "v": v, **given, "max_seqlen_q": max(ROWS), "max_seqlen_k": max(KEYS)}


def in_pages(arguments, page_size, used=USED_KEYS):
    """The same with its used keys in shuffled pages, and nothing but nan beside them; tables name pages by rights."""
    rng, needed = np.random.default_rng(SEED), [-(-count // page_size) for count in used]
    order = rng.permutation(sum(needed) + 3)
    pages = {name: np.full((order.size, page_size, HEADS_KV, HEAD_DIM), np.nan) for name in ("k", "v")}
    table = np.full((len(used), max(needed) + 1), 9999, np.int32)
    for i, (count, first) in enumerate(zip(used, starts(KEYS)[:-1], strict=True)):
        own = order[sum(needed[:i]) : sum(needed[: i + 1])]
        table[i, : own.size] = own
        for name, array in pages.items():
            for place in range(count):
                array[own[place // page_size], place % page_size] = arguments[name][first + place]
    rest = {name: x for name, x in arguments.items() if name not in ("k", "v", "cu_seqlens_k")}
    return {**rest, **pages, "block_table": table}


def alone(used_q=ROWS, used_k=KEYS, **options):
    """(out, lse) by a call of attention for each sequence, in float64."""
    given = packed(poison=False)
    out, lse = np.zeros(given["q"].shape), np.full((HEADS, len(given["q"])), -np.inf)
    for i, (first, key) in enumerate(zip(starts(ROWS)[:-1], starts(KEYS)[:-1], strict=True)):
        rows, keys = slice(first, first + used_q[i]), slice(key, key + used_k[i])
        cut = [given[name][None, of] for name, of in (("q", rows), ("k", keys), ("v", keys))]
        own = {name: x[i] if np.ndim(x) == 2 else x for name, x in options.items()}
        window = tuple(None if side == -1 else side for side in own.pop("window_size", (-1, -1)))
        found = cupyattn.attention(*cut, **own, window_size=window, alignment="bottom-right", return_lse=True)
        out[rows], lse[:, rows] = found[0][0], found[1][0]
    return out, lse


def assert_alike(found, expected, atol=1e-13):
    for mine, right in zip(found, expected, strict=True):
        assert_matches(mine, right, atol=atol)


# ---- Packed keys


@options_of_all
def test_each_packed_sequence_is_what_it_is_alone(options):
    used = {"seqused_q": int32(*USED_ROWS), "seqused_k": int32(*USED_KEYS)}
    assert_alike(varlen(**packed(), **used, **options, return_lse=True), alone(USED_ROWS, USED_KEYS, **options))


@pytest.mark.parametrize("word", ["seqused_q", "seqused_k"])
def test_of_one_side_less_may_be_used(word):
    used = {"seqused_q": USED_ROWS} if word == "seqused_q" else {"seqused_k": USED_KEYS}
    found = varlen(
        **packed(poison=False), **{name: int32(*x) for name, x in used.items()}, causal=True, return_lse=True
    )
    right = {f"used_{name[-1]}": x for name, x in used.items()}
    assert_alike(found, alone(**right, causal=True))


def test_all_that_there_is_used_changes_nothing():
    given = packed(poison=False)
    used = {"seqused_q": int32(*ROWS), "seqused_k": int32(*KEYS)}
    assert_alike(varlen(**given, **used, return_lse=True), varlen(**given, return_lse=True))


def test_lengths_are_of_any_byte_order():
    used = {"seqused_q": int32(*USED_ROWS), "seqused_k": int32(*USED_KEYS)}
    given, right = packed(), varlen(**packed(), **used)
    given |= {name: x.astype(">i4") for name, x in given.items() if name.startswith("cu_")}
    assert_same_bits(varlen(**given, **{name: x.astype(">i4") for name, x in used.items()}), right)


@pytest.mark.parametrize("count", [0, 3])
def test_of_no_sequences_and_of_empty_ones(count):
    nothing = {"cu_seqlens_q": int32(*[0] * (count + 1)), "cu_seqlens_k": int32(*[0] * (count + 1))}
    used = {"seqused_q": int32(*[0] * count), "seqused_k": int32(*[0] * count)}
    out, lse = varlen(**{**packed(), **nothing}, **used, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_results_go_into_the_callers_arrays():
    used = {"seqused_q": int32(*USED_ROWS), "seqused_k": int32(*USED_KEYS)}
    right = varlen(**packed(), **used, return_lse=True)
    out, lse = (np.empty(x.shape) for x in right)
    found = varlen(**packed(), **used, return_lse=True, out=out, lse_out=lse)
    assert found[0] is out
    assert found[1] is lse
    assert_alike((out, lse), right)


def test_descales_of_sequences_go_with_them():
    torch = needs("torch")
    given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in packed(poison=False).items()}
    given |= {name: given[name].to(torch.float8_e4m3fn) for name in "qkv"}
    factors = {f"{name}_descale": torch.rand(len(ROWS), HEADS_KV) + 0.5 for name in "qkv"}
    used = {"seqused_q": torch.tensor(USED_ROWS).int(), "seqused_k": torch.tensor(USED_KEYS).int()}
    found = varlen(**given, **factors, **used)
    for i, (first, key) in enumerate(zip(starts(ROWS)[:-1], starts(KEYS)[:-1], strict=True)):
        rows, keys = slice(first, first + USED_ROWS[i]), slice(key, key + USED_KEYS[i])
        cut = [given[name][of][None] for name, of in (("q", rows), ("k", keys), ("v", keys))]
        own = {name: x[i : i + 1] for name, x in factors.items()}
        assert torch.equal(found[rows], cupyattn.attention(*cut, **own)[0])


@pytest.mark.parametrize("used_q", [USED_ROWS, ROWS], ids=["some rows", "all rows"])
def test_sinks_are_the_lse_of_rows_that_see_no_key_and_not_of_unused_ones(used_q):
    """Which no function of flash-attn's has of packed sequences; the package's own may."""
    given, sinks = packed(poison=False), np.array([0.5, -1.0, 3.0, 0.0])
    longest = {name: given.pop(name) for name in ("max_seqlen_q", "max_seqlen_k")}
    named = {**given, "seqlens_q": int32(*used_q), "seqlens_k": int32(*USED_KEYS), "sinks": sinks}
    options = Options(axes="thd", causal=True, needs_lse=True, **longest)
    found = corridor.answer("f", corridor.under_our_names(**named), options, None)
    out, lse = alone(used_q, USED_KEYS, causal=True, sinks=sinks)
    last = starts(ROWS)[-1]
    assert_alike((found["out"][:last], found["lse"][:, :last]), (out[:last], lse[:, :last]))


def test_sinks_have_gradients_of_used_rows_alone():
    torch = needs("torch")
    named = {name: torch.from_numpy(x) for name, x in packed(poison=False).items() if isinstance(x, np.ndarray)}
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    longest = {"max_seqlen_q": max(ROWS), "max_seqlen_k": max(KEYS)}

    def gradient(named, weights):
        options = Options(axes="thd", causal=True, needs_lse=True, **longest)
        found = corridor.answer("f", corridor.under_our_names(**named, sinks=sinks), options, None)
        return torch.autograd.grad([found["out"], found["lse"]], sinks, weights)[0]

    used = {"seqlens_q": torch.tensor(USED_ROWS).int(), "seqlens_k": torch.tensor(KEYS).int()}
    weights = [torch.randn(x, dtype=torch.float64) for x in (named["q"].shape, (HEADS, len(named["q"])))]
    found = gradient({**named, **used}, weights)
    right = torch.zeros(HEADS, dtype=torch.float64)
    for i, (row, key) in enumerate(zip(starts(ROWS)[:-1], starts(KEYS)[:-1], strict=True)):
        rows, keys = slice(row, row + USED_ROWS[i]), slice(key, key + KEYS[i])
        own = {"q": named["q"][rows], "k": named["k"][keys], "v": named["v"][keys]}
        bounds = {f"cu_seqlens_{x}": torch.tensor([0, len(own[x])]).int() for x in "qk"}
        right += gradient({**own, **bounds}, [weights[0][rows], weights[1][:, rows]])
    assert_matches(found, right.numpy(), atol=1e-12)


# ---- Gradients


def differentiated(call, tensors):
    torch = needs("torch")
    out, lse = call(*tensors)
    weights = [torch.from_numpy(np.random.default_rng(SEED).standard_normal(x.shape)) for x in (out, lse)]
    weights[1][torch.isinf(lse)] = 0
    return torch.autograd.grad((out, lse), tensors, weights)


def leaves(arguments):
    """q, k and v as tensors whose gradients are wanted, and the other arguments."""
    torch = needs("torch")
    made = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    return [made.pop(name).requires_grad_() for name in "qkv"], made


@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("causal", "window", "softcap")])
def test_gradients_are_those_of_each_sequence_alone_and_none_of_what_is_not_used(options):
    torch = needs("torch")
    tensors, rest = leaves(packed())
    used = {"seqused_q": torch.tensor(USED_ROWS).int(), "seqused_k": torch.tensor(USED_KEYS).int()}
    found = differentiated(lambda q, k, v: varlen(q, k, v, **rest, **used, **options, return_lse=True), tensors)
    clean, rest = leaves(packed(poison=False))

    def cut(array, lengths, used):
        return torch.cat([array[first : first + n] for first, n in zip(starts(lengths)[:-1], used, strict=True)])

    def by_hand(q, k, v):
        """Without what is not used, packed anew."""
        arrays = cut(q, ROWS, USED_ROWS), cut(k, KEYS, USED_KEYS), cut(v, KEYS, USED_KEYS)
        bounds = [torch.from_numpy(starts(x)) for x in (USED_ROWS, USED_KEYS)]
        own = varlen(*arrays, *bounds, max(ROWS), max(KEYS), **options, return_lse=True)
        out, lse = torch.zeros_like(q), torch.full((HEADS, len(q)), -torch.inf, dtype=q.dtype)
        places = cut(torch.arange(len(q)), ROWS, USED_ROWS)
        return out.index_put((places,), own[0]), lse.index_copy(1, places, own[1])

    for gradient, right in zip(found, differentiated(by_hand, clean), strict=True):
        assert_matches(gradient, right.numpy(), atol=1e-12)
        assert gradient.count_nonzero()


@pytest.mark.parametrize("used_q", [None, USED_ROWS], ids=["all rows", "some rows"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_have_gradients_on_the_cpu(page_size, used_q):
    torch = needs("torch")
    more = {} if used_q is None else {"seqused_q": torch.tensor(used_q).int()}
    given = packed(poison=used_q is not None)
    pages, rest = leaves(in_pages(given, page_size))
    used = {"seqused_k": torch.tensor(USED_KEYS).int(), **more, "causal": True, "return_lse": True}
    found = differentiated(lambda q, k, v: varlen(q, k, v, **rest, **used), pages)
    tensors, own = leaves(given)
    right = differentiated(lambda q, k, v: varlen(q, k, v, **own, **used), tensors)
    assert_matches(found[0], right[0].numpy(), atol=1e-12)
    table = rest["block_table"]
    for gradient, whole in zip(found[1:], right[1:], strict=True):
        for i, (first, count) in enumerate(zip(starts(KEYS)[:-1], USED_KEYS, strict=True)):
            there = gradient[table[i, : -(-count // page_size)].long()].reshape(-1, HEADS_KV, HEAD_DIM)
            assert_matches(there[:count], whole[first : first + count].numpy(), atol=1e-12)
            assert not there[count:].any()


# ---- Pages


@options_of_all
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_each_sequence_in_pages_is_what_it_is_alone(page_size, options):
    given = in_pages(packed(poison=False), page_size)
    found = varlen(**given, seqused_k=int32(*USED_KEYS), **options, return_lse=True)
    assert_alike(found, alone(used_k=USED_KEYS, **options))


@options_of_all
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_of_rows_over_pages_less_may_be_used(page_size, options):
    given = in_pages(packed(), page_size)
    found = varlen(**given, seqused_q=int32(*USED_ROWS), seqused_k=int32(*USED_KEYS), **options, return_lse=True)
    assert_alike(found, alone(USED_ROWS, USED_KEYS, **options))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_of_rows_over_pages_with_starts_less_may_be_used(page_size):
    given = in_pages(packed(), page_size) | {"cu_seqlens_k": starts(USED_KEYS), "causal": True}
    found = varlen(**given, seqused_q=int32(*USED_ROWS), return_lse=True)
    assert_alike(found, alone(USED_ROWS, USED_KEYS, causal=True))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pages_give_the_bits_that_they_give_as_a_cache(dtype):
    given = in_pages(packed(poison=False), 3)
    given |= {name: given[name].astype(dtype) for name in "qkv"}
    found = varlen(**given, seqused_k=int32(*USED_KEYS), causal=True, return_softmax_lse=True)
    q, k, v, _ = (given.pop(name) for name in ("q", "k", "v", "max_seqlen_k"))
    right = cupyattn.flash_attn_with_kvcache(
        q, k, v, **given, cache_seqlens=int32(*USED_KEYS), causal=True, return_softmax_lse=True
    )
    for mine, its in zip(found, right, strict=True):
        assert_same_bits(mine, its)


def test_dropout_drops_of_pages_what_it_drops_of_as_many_keys_with_starts():
    given = in_pages(packed(poison=False), 3) | {"dropout_p": 0.4, "dropout_seed": 5, "return_attn_probs": True}
    found = varlen(**given, seqused_k=int32(*USED_KEYS))
    right = varlen(**given, cu_seqlens_k=starts(USED_KEYS))
    for mine, its in zip(found, right, strict=True):
        assert_same_bits(mine, its)
    assert (found[2] < 0).any()


@pytest.mark.parametrize("home", ["torch", "jax"])
def test_the_call_of_serving_engines_leaves_out_cu_seqlens_k(home):
    xp = needs("torch") if home == "torch" else needs("jax.numpy")
    given = in_pages(packed(poison=False), 16) | {"seqused_k": int32(*USED_KEYS)}
    given |= {name: given[name].astype(np.float32) for name in "qkv"}
    arrays = {name: xp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    out = varlen(
        **arrays, softmax_scale=0.3, causal=True, alibi_slopes=None, window_size=(-1, -1), softcap=0.0, num_splits=0,
        q_descale=None, k_descale=None, v_descale=None, return_softmax_lse=False,
    )  # fmt: skip
    assert type(out) is type(arrays["q"])
    right = alone(used_k=USED_KEYS, causal=True, softmax_scale=0.3)[0]
    assert_matches(to_numpy(out).astype(np.float64), right, rtol=1e-5, atol=1e-5)


def test_the_lse_is_returned_by_either_of_its_words_and_by_both():
    given = packed(poison=False)
    right = varlen(**given, return_lse=True)
    for words in ({"return_softmax_lse": True}, {"return_softmax_lse": True, "return_lse": True}):
        for mine, its in zip(varlen(**given, **words), right, strict=True):
            assert_same_bits(mine, its)


# ---- Plans

HALF = {"dtype": "bfloat16", "device": "H100"}
PAGES = (1024, 64, 8, 128)


@pytest.mark.parametrize(("rows", "kernel"), [(1, "splitkv"), (300, "hopper")])
def test_pages_are_planned_as_those_of_a_cache_are(rows, kernel):
    call = (8 * rows, 32, 128), PAGES, PAGES
    common = {"cu_seqlens_q": (9,), "max_seqlen_q": rows, "block_table": (8, 128), "causal": True, **HALF}
    found = cupyattn.explain(varlen, *call, **common, seqused_k=(8,), max_seqlen_k=128 * 64)
    right = cupyattn.explain(cupyattn.flash_attn_with_kvcache, *call, **common, cache_seqlens=(8,))
    assert (found, found.memory, found.cache_bytes) == (right, right.memory, right.cache_bytes)
    assert found.kernel == kernel


def test_of_fewer_keys_at_most_fewer_splits_are_planned():
    call = (8, 32, 128), PAGES, PAGES, (9,), None, 1
    common = {"seqused_k": (8,), "block_table": (8, 128), **HALF}
    few, many = (cupyattn.explain(varlen, *call, longest, **common) for longest in (512, 128 * 64))
    assert few.num_splits < many.num_splits


def test_explain_plans_three_packed_sequences_where_less_is_used():
    call = (4096, 32, 128), *((4096, 8, 128),) * 2, (9,), (9,), 512, 512
    plain, found = (cupyattn.explain(varlen, *call, **more, **HALF) for more in ({}, {"seqused_k": (8,)}))
    assert (found.kernel, found.flops, found.bytes) == ("hopper", plain.flops, plain.bytes)
    assert any("three packed ones" in note for note in found.notes)
    backward = cupyattn.explain(varlen, *call, seqused_q=(8,), seqused_k=(8,), **HALF, backward=True)
    assert (backward.kernel, backward.flops) == ("hopper_backward", plain.flops * 5 // 2)


def test_what_is_explained_of_arrays_is_what_is_explained_of_shapes():
    given = in_pages(packed(poison=False), 3) | {"seqused_q": int32(*USED_ROWS), "seqused_k": int32(*USED_KEYS)}
    shapes = {name: x.shape if isinstance(x, np.ndarray) else x for name, x in given.items()}
    of_arrays, of_shapes = cupyattn.explain(varlen, **given), cupyattn.explain(varlen, **shapes, dtype="float64")
    assert replace(of_arrays, notes=()) == replace(of_shapes, notes=())
    assert of_arrays.memory == of_shapes.memory


def test_pages_are_said_to_have_no_gradients_on_a_gpu():
    call = (8, 32, 128), PAGES, PAGES, (9,), None, 1, 512
    plan = cupyattn.explain(varlen, *call, seqused_k=(8,), block_table=(8, 128), **HALF, backward=True)
    assert plan.kernel == "none"
    assert "has no gradients of keys in pages or in a cache" in str(plan)
