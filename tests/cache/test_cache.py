"""KV caches: attention over what was appended is attention over all of it at once."""

import copy
import inspect
import pickle
import threading

import ml_dtypes
import numpy as np
import pytest
from homes import DTYPES, Dask, Home, HostBackedCuPy, Jax, Strict, Torch, needs
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import DynamicCache, OffloadedCache, PagedCache, SlidingWindowCache, StaticCache, attention
from cupyattn.cache import contiguous, paged
from cupyattn.parts import answer_in_parts
from cupyattn.reading import DESCALES

CACHES = {
    "dynamic": DynamicCache,
    "static": lambda: StaticCache(256),
    "sliding": lambda: SlidingWindowCache(256),
    "paged": lambda: PagedCache(num_pages=160, page_size=4),
    "offloaded": OffloadedCache,
}
"""Each with room for two sequences of 256 tokens."""
every_cache = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
STEPS = (7, 1, 1, 5, 70, 1, 1)
"""Tokens appended at once: a prompt, decoding, a draft, a prompt longer than what any cache starts with."""
LENGTH = sum(STEPS)


def draw(rng, *, batch=2, seqlen=LENGTH, heads=(4, 2), head_dim=8, head_dim_v=None, dtype=np.float32):
    """q, k, v."""
    shapes = ((heads[0], head_dim), (heads[1], head_dim), (heads[1], head_dim_v or head_dim))
    return [rng.standard_normal((batch, seqlen, *shape)).astype(dtype) for shape in shapes]


def whole(q, k, v, **options):
    """Without a cache."""
    return attention(q, k, v, **{"causal": True, "alignment": "bottom-right", **options})


def replay(cache, q, k, v, steps=STEPS, **options):
    """Append step by step; (rows seen so far, what the cache says to the new rows) of each step."""
    stop = 0
    for count in steps:
        start, stop = stop, stop + count
        cache.append(k[:, start:stop], v[:, start:stop])
        yield slice(start, stop), cache.attend(q[:, start:stop], **options)


# ---------------------------------------------------------------------------------------------------
# What it computes
# ---------------------------------------------------------------------------------------------------

OPTIONS = {
    "nothing": {},
    "not causal": {"causal": False},
    "a window": {"window_size": (9, None)},
    "a window on both sides": {"window_size": (20, 3), "causal": False},
    "a scale": {"softmax_scale": 0.3},
    "a softcap": {"softcap": 2.0},
    "float32 arithmetic": {"compute_dtype": "float32"},
    "splits": {"fixed_split_size": 64},
}


@every_cache
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cache_says_bit_for_bit_what_attention_over_all_tokens_says(make, options, rng):
    q, k, v = draw(rng)
    for rows, (out, lse) in replay(make(), q, k, v, return_lse=True, **options):
        expected = whole(q[:, rows], k[:, : rows.stop], v[:, : rows.stop], return_lse=True, **options)
        if "compute_dtype" in options:  # whether a part is one sequence or a batch decides in which order it is summed
            assert_matches(out, expected[0], rtol=1e-5, atol=1e-6)
            assert_matches(lse, expected[1], rtol=1e-6)
        else:
            assert_same_bits(out, expected[0])
            assert_same_bits(lse, expected[1])


@every_cache
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_kept_and_comes_back(make, dtype, rng):
    q, k, v = draw(rng, dtype=DTYPES[dtype])
    for rows, out in replay(make(), q, k, v):
        assert out.dtype == DTYPES[dtype]
        expected = whole(q[:, rows], k[:, : rows.stop], v[:, : rows.stop])
        if dtype == "float64":  # a window, even if it reaches back to the first token, is summed in smaller blocks
            assert_matches(out, expected, rtol=1e-13, atol=1e-15)
        else:
            assert_same_bits(out, expected)


@every_cache
def test_sinks_and_slopes_are_those_of_attention(make, rng):
    q, k, v = draw(rng)
    edits = {"sinks": rng.standard_normal(4), "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0])}
    for rows, out in replay(make(), q, k, v, **edits):
        assert_same_bits(out, whole(q[:, rows], k[:, : rows.stop], v[:, : rows.stop], **edits))


FLOAT8 = "float8_e4m3fn"


@every_cache
@pytest.mark.parametrize("home", [Home(FLOAT8), Torch(FLOAT8), Jax(FLOAT8)], ids=str)
def test_tokens_of_float8_are_taken_times_the_descales_of_their_sequence(make, home, rng):
    steps = (5, 1, 2, 70)
    q, k, v = draw(rng, seqlen=sum(steps), dtype=ml_dtypes.float8_e4m3fn)
    factors = dict(zip(DESCALES, rng.uniform(0.5, 2.0, (3, 2, 2)).astype(np.float32), strict=True))
    there, asked = [home.make(x) for x in (q, k, v)], {name: home.make(x) for name, x in factors.items()}
    cache, stop = make(), 0
    for count in steps:
        start, stop = stop, stop + count
        part = (slice(None), slice(start, stop), Ellipsis)
        cache.append(there[1][part], there[2][part])
        expected = whole(q[part], k[:, :stop], v[:, :stop], **factors)
        assert_same_bits(cache.attend(there[0][part], **asked), expected)
    cache.reorder([1, 0])
    asked = {name: home.make(x[::-1]) for name, x in factors.items()}
    assert_same_bits(cache.attend(home.make(q[::-1, start:]), **asked), expected[::-1])
    cache.truncate(6)
    assert_same_bits(cache.attend(there[0][:, 5:6]), whole(q[:, 5:6], k[::-1, :6], v[::-1, :6]))


@every_cache
def test_values_may_have_another_head_dim(make, rng):
    q, k, v = draw(rng, head_dim_v=3)
    for rows, out in replay(make(), q, k, v):
        assert_same_bits(out, whole(q[:, rows], k[:, : rows.stop], v[:, : rows.stop]))


@every_cache
@pytest.mark.parametrize(
    "home",
    [
        Torch("float32"),
        Torch("bfloat16"),
        Jax("float32"),
        Strict("float32"),
        Strict("float32", "device1"),
    ],
    ids=str,
)
def test_every_library_gets_its_own_arrays_back(make, home, rng):
    steps = (5, 1, 2)
    q, k, v = draw(rng, seqlen=sum(steps), dtype=DTYPES[home.dtype])
    there = [home.make(x) for x in (q, k, v)]
    cache, stop = make(), 0
    for count in steps:
        start, stop = stop, stop + count
        part = (slice(None), slice(start, stop), Ellipsis)
        cache.append(there[1][part], there[2][part])
        out, lse = cache.attend(there[0][part], return_lse=True)
        home.check(out, there[0])
        home.check(lse, there[0])
        assert out.dtype == there[0].dtype
        assert_same_bits(out, whole(q[part], k[:, :stop], v[:, :stop]))


@every_cache
def test_a_foreign_byte_order_is_kept(make, rng):
    q, k, v = (x.astype(">f4") for x in draw(rng))
    for rows, out in replay(make(), q, k, v):
        assert out.dtype == np.dtype(">f4")
        assert_same_bits(out, whole(q[:, rows], k[:, : rows.stop], v[:, : rows.stop]))


@every_cache
def test_what_was_appended_is_a_copy(make, rng):
    q, k, v = draw(rng, seqlen=3)
    cache = make()
    given = k.copy(), v.copy()
    cache.append(*given)
    for array in given:
        array[...] = np.nan
    assert_same_bits(cache.attend(q), whole(q, k, v))


@every_cache
def test_a_step_without_tokens_changes_nothing(make, rng):
    q, k, v = draw(rng, seqlen=3)
    cache = make()
    for part in (slice(0, 0), slice(0, 3), slice(3, 3)):
        cache.append(k[:, part], v[:, part])
    assert cache.lengths == (3, 3)
    assert_same_bits(cache.attend(q), whole(q, k, v))


@every_cache
def test_everything_may_be_forgotten(make, rng):
    q, k, v = draw(rng, seqlen=3)
    cache = make()
    cache.append(k, v)
    cache.truncate(0)
    assert cache.attend(q[:, :0]).shape == (2, 0, 4, 8)
    cache.append(v, k)
    assert_same_bits(cache.attend(q), whole(q, v, k))


@every_cache
@pytest.mark.parametrize("integer", [int, np.int64, np.array, lambda n: needs("torch").tensor(n)])
def test_a_length_is_an_integer_of_any_kind(make, integer, rng):
    _, k, v = draw(rng, seqlen=3)
    cache = make()
    cache.append(k, v)
    cache.truncate(integer(2))
    cache.reorder(range(1))
    assert cache.lengths == (2,)


@every_cache
def test_what_was_forgotten_never_comes_back(make, rng):
    q, k, v = draw(rng, seqlen=6)
    cache = make()
    cache.append(k[:, :3], v[:, :3])
    cache.append(np.full_like(k, np.nan), np.full_like(v, np.inf))
    cache.truncate(3)
    cache.append(k[:, 3:], v[:, 3:])
    assert_same_bits(cache.attend(q), whole(q, k, v))


@every_cache
def test_reordered_sequences_go_on_from_what_the_others_were(make, rng):
    q, k, v = draw(rng, seqlen=6, batch=3)
    cache = make()
    cache.append(k[:2, :5], v[:2, :5])
    cache.reorder(np.array([1, 0, 1]))
    assert cache.lengths == (5, 5, 5)
    cache.append(k[:, 5:], v[:, 5:])
    source = [1, 0, 1]
    both = [np.concatenate([x[source, :5], x[:, 5:]], axis=1) for x in (k, v)]
    assert_same_bits(cache.attend(q), whole(q, *both))


WAYS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
HOMES = [Home("float32"), Torch("float32"), Torch("bfloat16"), Strict("float32", "device1")]


@every_cache
@every_way
@pytest.mark.parametrize("home", HOMES, ids=str)
def test_a_copy_goes_on_in_memory_of_its_own(make, way, home, rng):
    check_copy(make, way, home, rng)


def test_a_copy_of_what_jax_holds_goes_on_by_itself(rng):
    check_copy(CACHES["paged"], copy.copy, Jax("float32"), rng)


def check_copy(make, way, home, rng):
    q, k, v = draw(rng, seqlen=7, dtype=DTYPES[home.dtype])
    there = [home.make(x) for x in (q, k, v)]

    def part(*stretch):
        return (slice(None), slice(*stretch), Ellipsis)

    first = make()
    first.append(there[1][part(0, 3)], there[2][part(0, 3)])
    first.attend(there[0][part(0, 3)])
    second = way(first)
    assert (second.lengths, second.nbytes) == (first.lengths, first.nbytes)
    for cache, stretch in ((first, (3, 5)), (second, (5, 7)), (first, (4, 5))):
        cache.append(there[1][part(*stretch)], there[2][part(*stretch)])
    second.truncate(4)
    for cache, kept in ((first, [0, 1, 2, 3, 4, 4]), (second, [0, 1, 2, 5])):
        out = cache.attend(there[0][part(0, 4)])
        home.check(out, there[0])
        assert_same_bits(out, whole(q[:, :4], k[:, kept], v[:, kept]))
    first.reorder([1, 0])
    assert_same_bits(second.attend(there[0][part(0, 4)]), out)


@every_cache
@every_way
def test_a_copy_of_an_empty_cache_is_empty(make, way, rng):
    q, k, v = draw(rng, seqlen=3)
    first = make()
    second = way(first)
    first.append(v, k)
    assert (len(second), second.nbytes) == (0, 0)
    second.append(k.astype(np.float64), v.astype(np.float64))  # what the other is made of does not count
    assert_same_bits(first.attend(q), whole(q, v, k))


@every_cache
def test_a_copy_has_what_a_subclass_has_besides(make):
    cache = make()
    kind = type(f"My{type(cache).__name__}", (type(cache),), {})
    cache.__class__, cache.notes = kind, ["layer 3"]
    twin = copy.copy(cache)
    assert type(twin) is kind
    assert twin.notes is cache.notes


@every_cache
@every_way
def test_a_copy_made_in_inference_mode_goes_on_outside_of_it(make, way):
    torch = needs("torch")
    cache, one = make(), torch.ones((1, 1, 2, 4))
    cache.append(one, one)
    with torch.inference_mode():
        twin = way(cache)
    twin.append(one, one)
    assert (len(cache), len(twin)) == (1, 2)


@every_cache
def test_lengths_and_bytes_are_told(make, rng):
    _, k, v = draw(rng, seqlen=3)
    cache = make()
    assert (len(cache), cache.nbytes) == (0, 0)
    assert set(cache.lengths) <= {0}
    cache.append(k, v)
    assert (len(cache), cache.lengths) == (3, (3, 3))
    assert cache.nbytes >= k.nbytes + v.nbytes


# ---------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------


def refusals():
    """(name, error, message, call of a cache that holds three tokens of two sequences in float32)"""
    k = np.ones((2, 1, 2, 8), np.float32)
    q = np.ones((2, 1, 4, 8), np.float32)
    yield "no array", TypeError, "append: k has to be an array", lambda c: c.append(None, k)
    yield "an integer", TypeError, "append: k has to be one of", lambda c: c.append(k.astype(int), k)
    yield "two dtypes", TypeError, "append: k and v have to be of one dtype", lambda c: c.append(k, k.astype("f8"))
    yield (
        "another dtype",
        TypeError,
        "append: k has to be of the cache's dtype",
        lambda c: c.append(*2 * [k.astype("f8")]),
    )
    yield "three axes", ValueError, "append: k has to have 4 axes", lambda c: c.append(k[0], k[0])
    yield "other tokens", ValueError, "append: k and v have to hold the same tokens", lambda c: c.append(k, k[:, :0])
    yield "another batch", ValueError, "append: ", lambda c: c.append(k[:1], k[:1])
    yield "other heads", ValueError, "append: k has to have the cache's heads", lambda c: c.append(k[:, :, :1], k)
    yield "another head_dim", ValueError, "append: v has to have the cache's heads", lambda c: c.append(k, k[..., :4])
    yield "a negative length", ValueError, "truncate: length", lambda c: c.truncate(-1)
    yield "too long a length", ValueError, "truncate: length", lambda c: c.truncate(4)
    yield "a fractional length", TypeError, "truncate: length", lambda c: c.truncate(1.5)
    yield "no such sequence", ValueError, r"reorder: sequences\[1\]", lambda c: c.reorder([0, 2])
    yield "a float sequence", TypeError, "reorder: sequences", lambda c: c.reorder(np.zeros(2))
    listed = r"reorder: sequences has to be a list of integers, or an array of one axis\n +sequences +{}"
    yield "one sequence", TypeError, listed.format("1  int"), lambda c: c.reorder(1)
    yield "sequences as text", TypeError, listed.format("'10'  str"), lambda c: c.reorder("10")
    yield "q of another dtype", TypeError, "attend: ", lambda c: c.attend(q.astype("f8"))
    yield "q of another head_dim", ValueError, "attend: ", lambda c: c.attend(q[..., :4])
    yield "q of three axes", ValueError, "attend: q has to have 4 axes", lambda c: c.attend(q[0])
    yield "no queries", TypeError, "attend: q has to be an array", lambda c: c.attend(None)
    five, six = (np.ones((2, n, 4, 8), np.float32) for n in (5, 6))
    yield "a query too many", ValueError, "q has 5 rows of sequence 0, which has 3 tokens", lambda c: c.attend(five)
    yield (
        "queries of anything",
        ValueError,
        "attend: q has 6 rows of sequence 0, which has 3 tokens; append",
        lambda c: c.attend(six, causal=False),
    )
    yield "a negative softcap", ValueError, "attend: softcap", lambda c: c.attend(q, softcap=-1)
    yield "half a window", TypeError, "attend: window_size", lambda c: c.attend(q, window_size=3)
    yield "a scale that is none", TypeError, "attend: softmax_scale", lambda c: c.attend(q, softmax_scale="a")
    yield "splits of nothing", ValueError, "attend: fixed_split_size", lambda c: c.attend(q, fixed_split_size=0)
    yield "sinks of other heads", ValueError, "attend: sinks", lambda c: c.attend(q, sinks=np.ones(3))
    torch = needs("torch").ones((2, 1, 2, 8))
    yield "another library", TypeError, "all arrays have to be of one library", lambda c: c.append(torch, torch)
    yield "q of another library", TypeError, "all arrays have to be of one library", lambda c: c.attend(torch)


@every_cache
@pytest.mark.parametrize(("error", "message", "call"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()])
def test_what_raises_leaves_the_cache_as_it_was(make, error, message, call, rng):
    q, k, v = draw(rng, seqlen=4)
    cache = make()
    cache.append(k[:, :3], v[:, :3])
    before = cache.nbytes
    with pytest.raises(error, match=message):
        call(cache)
    assert (cache.lengths, cache.nbytes) == ((3, 3), before)
    cache.append(k[:, 3:], v[:, 3:])
    assert_same_bits(cache.attend(q), whole(q, k, v))


@every_cache
@pytest.mark.parametrize("call", [lambda c, x: c.attend(x), lambda c, x: c.truncate(1), lambda c, x: c.reorder([0])])
def test_an_empty_cache_has_nothing_to_say(make, call, rng):
    q, *_ = draw(rng, seqlen=1)
    with pytest.raises(ValueError, match=r"nothing has been appended yet|length has to be|sequences\[0\]"):
        call(make(), q)


@every_cache
def test_a_first_append_that_raises_leaves_the_cache_empty(make, rng):
    q, k, v = draw(rng, seqlen=2)
    cache = make()
    with pytest.raises(ValueError, match="same tokens"):
        cache.append(k, v[:, :1])
    assert (len(cache), cache.nbytes) == (0, 0)
    cache.append(k.astype(np.float64), v.astype(np.float64))  # the dtype of what was refused does not count
    assert cache.attend(q.astype(np.float64)).dtype == np.float64


@every_cache
def test_arrays_without_values_are_refused(make):
    lazy = Dask("float32").make(np.ones((1, 2, 2, 4), np.float32))
    with pytest.raises(TypeError, match="keeps the values of k and v, which dask has not computed yet"):
        make().append(lazy, lazy)


@every_cache
def test_traced_arrays_are_refused(make):
    jax = needs("jax")

    def step(k):
        make().append(k, k)
        return k

    with pytest.raises(TypeError, match="keeps the values of k and v, which under jit"):
        jax.jit(step)(jax.numpy.ones((1, 2, 2, 4)))


@every_cache
def test_a_gpus_arrays_need_a_gpu(make):
    array = HostBackedCuPy("float32").make(np.ones((1, 2, 2, 4), np.float32))
    cache = make()
    with pytest.raises(RuntimeError, match=r"append: the arrays are on a CUDA device .* finds no NVIDIA driver"):
        cache.append(array, array)
    assert cache.nbytes == 0


@every_cache
def test_immutable_arrays_are_refused(make):
    xp = needs("array_api_strict")
    frozen = type("Frozen", (), {})  # an array in all but its writing
    array = xp.ones((1, 2, 2, 4), dtype=xp.float32)
    for name in ("shape", "dtype", "device", "__array_namespace__", "__dlpack__", "__dlpack_device__"):
        value = getattr(array, name)
        setattr(frozen, name, staticmethod(value) if callable(value) and name.startswith("__") else value)
    with pytest.raises(TypeError, match="k cannot be kept: arrays of Frozen are immutable"):
        make().append(frozen(), frozen())


@every_cache
def test_gradients_are_not_kept_and_not_dropped_either(make):
    torch = needs("torch")
    k = torch.ones((1, 2, 2, 4), requires_grad=True)
    cache = make()
    with pytest.raises(ValueError, match=r"keeps k and v without their gradients; call it under torch\.no_grad"):
        cache.append(k, k)
    with torch.no_grad():
        cache.append(k, k)
    q = torch.ones((1, 1, 2, 4), requires_grad=True)
    cache.attend(q).sum().backward()
    assert q.grad is not None


@every_cache
def test_a_cache_begun_in_inference_mode_goes_on_outside_of_it(make):
    torch = needs("torch")
    cache = make()
    with torch.inference_mode():
        cache.append(torch.ones((1, 2, 2, 4)), torch.ones((1, 2, 2, 4)))
    cache.append(torch.ones((1, 1, 2, 4)), torch.ones((1, 1, 2, 4)))
    assert len(cache) == 3


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache, SlidingWindowCache, OffloadedCache])
def test_all_caches_attend_alike(kind):
    assert inspect.signature(kind.attend) == inspect.signature(cupyattn.Cache.attend)
    paged = dict(inspect.signature(PagedCache.attend).parameters)
    assert dict(inspect.signature(kind.attend).parameters).items() <= paged.items()


# ---------------------------------------------------------------------------------------------------
# Contiguous ones
# ---------------------------------------------------------------------------------------------------


def test_a_dynamic_cache_grows_seldom_and_wastes_at_most_a_third():
    cache, one = DynamicCache(), np.zeros((1, 1, 1, 1), np.float32)
    capacities = []
    for length in range(1, 4097):
        cache.append(one, one)
        capacities.append(cache.capacity)
        assert cache.capacity <= max(contiguous.SMALLEST, 1.5 * length)
    assert len(set(capacities)) <= 12
    assert sum(sorted(set(capacities))[:-1]) <= 3 * 4096  # tokens copied


def test_a_prompt_is_stored_without_waste():
    cache = DynamicCache()
    cache.append(*2 * [np.zeros((1, 1000, 1, 1), np.float32)])
    assert cache.capacity == 1000


def test_a_static_cache_stays_where_it_is(rng):
    torch = needs("torch")
    cache, one = StaticCache(8), torch.ones((2, 1, 1, 2))
    cache.append(one, one)
    address = cache._state.k.data_ptr()
    for _ in range(7):
        cache.append(one, one)
        cache.truncate(len(cache))
    assert cache._state.k.data_ptr() == address


def test_a_static_cache_refuses_what_it_has_no_room_for():
    cache, one = StaticCache(3), np.ones((1, 2, 1, 2), np.float32)
    cache.append(one, one)
    with pytest.raises(ValueError, match=r"StaticCache.append: no room for 2 more tokens\n +capacity +3\n +tokens +2"):
        cache.append(one, one)
    assert len(cache) == 2


@pytest.mark.parametrize("window", [1, 2, 7, 100])
def test_a_sliding_window_says_what_all_tokens_say_through_the_window(window, rng):
    steps = (5, *[1] * 150, 30, 200, 1, 1, 3)
    q, k, v = draw(rng, seqlen=sum(steps), batch=1)
    for rows, (out, lse) in replay(SlidingWindowCache(window), q, k, v, steps, return_lse=True):
        expected = whole(
            q[:, rows], k[:, : rows.stop], v[:, : rows.stop], window_size=(window - 1, None), return_lse=True
        )
        assert_correctly_rounded(out, to_numpy(expected[0]), "float32", share=0.99)
        assert_matches(lse, expected[1], rtol=1e-7)


@pytest.mark.parametrize("window", [1, 10, 1000])
def test_the_memory_of_a_sliding_window_does_not_grow(window):
    cache, one = SlidingWindowCache(window), np.zeros((1, 1, 1, 1), np.float32)
    cache.append(*2 * [np.zeros((1, 3 * window, 1, 1), np.float32)])
    largest = 0
    for _ in range(4 * window + 200):
        cache.append(one, one)
        largest = max(largest, cache.capacity)
    assert largest <= max(window + contiguous.SMALLEST, 1.25 * window)
    assert len(cache) == 7 * window + 200


def test_the_memory_of_a_long_prompt_is_given_back_even_if_it_was_cut():
    cache = SlidingWindowCache(10)
    cache.append(*2 * [np.zeros((1, 1000, 1, 1), np.float32)])
    cache.truncate(500)
    cache.append(*2 * [np.zeros((1, 1, 1, 1), np.float32)])
    assert cache.capacity == 9 + contiguous.SMALLEST


def test_a_narrower_window_may_be_asked_for_and_a_wider_one_not(rng):
    q, k, v = draw(rng, seqlen=20)
    cache = SlidingWindowCache(10)
    cache.append(k, v)
    row = slice(19, 20)
    assert_same_bits(cache.attend(q[:, row], window_size=(4, None)), whole(q[:, row], k, v, window_size=(4, None)))
    with pytest.raises(ValueError, match="attend: window_size reaches back farther than the cache, 9 tokens"):
        cache.attend(q[:, row], window_size=(10, None))


def test_queries_whose_keys_have_left_are_refused(rng):
    q, k, v = draw(rng, seqlen=200)
    cache = SlidingWindowCache(10)
    for i in range(200):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
    with pytest.raises(ValueError, match="the first of 180 queries would see tokens that have left the window"):
        cache.attend(q[:, 20:])


@pytest.mark.parametrize("rollback", [0, 5])
def test_a_window_can_be_rolled_back_as_far_as_was_said(rollback, rng):
    q, k, v = draw(rng, seqlen=320, batch=1)
    cache = SlidingWindowCache(10, rollback=rollback)
    for length in range(1, 300):
        back = length - 1 - min(rollback, length - 1)
        if length % 7 == 0:  # every place in the arrays is met
            draft = slice(length - 1, length + 8)
            cache.append(k[:, draft], v[:, draft])
            cache.truncate(length - 1)
            cache.truncate(back)
            cache.append(k[:, back : length - 1], v[:, back : length - 1])
        cache.append(k[:, length - 1 : length], v[:, length - 1 : length])
        out = cache.attend(q[:, length - 1 : length])
        expected = whole(q[:, length - 1 : length], k[:, :length], v[:, :length], window_size=(9, 0))
        assert_correctly_rounded(out, to_numpy(expected), "float32", share=0.9)


def test_rolling_back_farther_is_refused():
    cache, one = SlidingWindowCache(10), np.ones((1, 1, 1, 2), np.float32)
    for _ in range(200):
        cache.append(one, one)
    with pytest.raises(ValueError, match="truncate: some of the tokens that the next one would see have left"):
        cache.truncate(100)
    assert len(cache) == 200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StaticCache(0), "StaticCache: capacity has to be from 1"),
        (lambda: SlidingWindowCache(0), "SlidingWindowCache: window has to be from 1"),
        (lambda: SlidingWindowCache(4, rollback=-1), "SlidingWindowCache: rollback has to be from 0"),
        (lambda: PagedCache(0), "PagedCache: num_pages has to be from 1"),
        (lambda: PagedCache(4, 0), "PagedCache: page_size has to be from 1"),
        (lambda: PagedCache(2**20, 2**20), "PagedCache: no more than"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------


def packed(x, lengths):
    """The first so many tokens of each sequence, end to end."""
    return np.concatenate([x[i, :length] for i, length in enumerate(lengths)])


def test_sequences_of_different_lengths_are_packed(rng):
    q, k, v = draw(rng, batch=3, seqlen=9)
    cache = PagedCache(num_pages=10, page_size=4)
    first, second = (3, 0, 5), (1, 2, 4)
    cache.append(packed(k, first), packed(v, first), seqlens=first)
    after = [
        np.concatenate([x[i, a : a + b] for i, (a, b) in enumerate(zip(first, second, strict=True))]) for x in (k, v)
    ]
    cache.append(*after, seqlens=np.array(second))
    assert cache.lengths == (4, 2, 9)
    rows = (2, 1, 3)
    queries = np.concatenate([q[i, n - r : n] for i, (n, r) in enumerate(zip(cache.lengths, rows, strict=True))])
    out, lse = cache.attend(queries, rows, return_lse=True)
    stops = np.cumsum(rows)
    for i, (length, count, stop) in enumerate(zip(cache.lengths, rows, stops, strict=True)):
        alone = whole(
            q[i : i + 1, length - count : length], k[i : i + 1, :length], v[i : i + 1, :length], return_lse=True
        )
        assert_same_bits(out[stop - count : stop], alone[0][0])
        assert_same_bits(lse[:, stop - count : stop], alone[1][0])


def test_a_fork_shares_its_pages_until_it_writes(rng):
    _, k, v = draw(rng, batch=1, seqlen=10)
    cache = PagedCache(num_pages=8, page_size=4)
    cache.append(k, v)
    assert cache.num_free_pages == 5
    assert [cache.fork(0), cache.fork(0)] == [1, 2]
    assert (cache.num_free_pages, cache.lengths) == (5, (10, 10, 10))
    one = np.ones((3, 1, 2, 8), np.float32)
    cache.append(one, one)
    assert cache.num_free_pages == 3  # two copies of the page that was not full; its third owner keeps it
    cache.truncate(8)
    assert cache.num_free_pages == 6
    cache.reorder([2])
    assert cache.num_free_pages == 6
    cache.truncate(0)
    assert cache.num_free_pages == 8


def test_forks_do_not_see_each_others_tokens(rng):
    q, k, v = draw(rng, batch=3, seqlen=11)
    cache = PagedCache(num_pages=16, page_size=4)
    cache.append(k[:1, :6], v[:1, :6])
    cache.fork(0)
    cache.fork(1)
    for x in (k, v):
        x[:, :6] = x[:1, :6]
    cache.append(k[:, 6:], v[:, 6:])
    assert_same_bits(cache.attend(q), whole(q, k, v))


def test_when_pages_run_out_nothing_is_written(rng):
    q, k, v = draw(rng, batch=2, seqlen=9)
    cache = PagedCache(num_pages=4, page_size=4)
    cache.append(k[:, :6], v[:, :6])
    with pytest.raises(ValueError, match=r"PagedCache\.append: 2 more pages are needed and 0 are free"):
        cache.append(k[:, 6:], v[:, 6:])
    assert (cache.lengths, cache.num_free_pages) == ((6, 6), 0)
    cache.append(k[:, 6:8], v[:, 6:8])
    assert_same_bits(cache.attend(q[:, :8]), whole(q[:, :8], k[:, :8], v[:, :8]))


def test_more_tokens_than_there_can_be_are_refused_at_once():
    endless = np.broadcast_to(np.zeros((), np.float32), (1, 2**30, 1, 2))
    with pytest.raises(ValueError, match=f"append: {2**28} more pages are needed and 4 are free"):
        PagedCache(num_pages=4, page_size=4).append(endless, endless)


def test_a_fork_that_has_no_page_to_copy_to_is_refused(rng):
    q, k, v = draw(rng, batch=2, seqlen=3)
    cache = PagedCache(num_pages=1, page_size=4)
    cache.append(k[:1, :2], v[:1, :2])
    cache.fork(0)
    with pytest.raises(ValueError, match="1 more pages are needed and 0 are free"):
        cache.append(k[:, 2:], v[:, 2:])
    out = cache.attend(q[:, :2])
    assert_same_bits(out, whole(q[:, :2], np.repeat(k[:1, :2], 2, 0), np.repeat(v[:1, :2], 2, 0)))


def test_a_sequence_may_join_later_and_another_leave(rng):
    q, k, v = draw(rng, batch=2, seqlen=5)
    cache = PagedCache(num_pages=8, page_size=4)
    cache.append(k[:1], v[:1])
    assert cache.add_sequence() == 1
    assert cache.lengths == (5, 0)
    cache.append(k[1], v[1], seqlens=[0, 5])
    assert_same_bits(cache.attend(q), whole(q, k, v))
    cache.reorder([1])
    assert_same_bits(cache.attend(q[1:]), whole(q[1:], k[1:], v[1:]))
    assert cache.num_free_pages == 6


def test_a_sequence_that_leaves_frees_what_was_its_alone_and_those_after_it_move_up(rng):
    q, k, v = draw(rng, batch=3, seqlen=9)
    for x in (k, v):
        x[1, :6] = x[0, :6]
    cache = PagedCache(num_pages=12, page_size=4)
    cache.append(k[:1, :6], v[:1, :6])
    cache.fork(0)
    cache.add_sequence()
    cache.append(*(np.concatenate([x[0, 6:], x[1, 6:], x[2]]) for x in (k, v)), seqlens=[3, 3, 9])
    assert cache.num_free_pages == 4  # three, three less the one in common, three
    cache.remove(0)
    assert (cache.lengths, cache.num_free_pages) == ((9, 9), 6)
    assert_same_bits(cache.attend(q[1:]), whole(q[1:], k[1:], v[1:]))
    cache.remove(1)
    assert_same_bits(cache.attend(q[1:2]), whole(q[1:2], k[1:2], v[1:2]))
    cache.remove(0)
    assert (cache.lengths, cache.num_free_pages) == ((), 12)
    cache.append(k, v)
    assert_same_bits(cache.attend(q), whole(q, k, v))


def test_each_sequence_may_be_cut_at_its_own_length(rng):
    q, k, v = draw(rng, batch=2, seqlen=6)
    cache = PagedCache(num_pages=8, page_size=4)
    cache.append(k, v)
    cache.truncate([2, 5])
    assert cache.lengths == (2, 5)
    cache.truncate(4)
    assert cache.lengths == (2, 4)
    out = cache.attend(packed(q, (2, 4)), [2, 4])
    assert_same_bits(out[:2], whole(q[:1, :2], k[:1, :2], v[:1, :2])[0])
    assert_same_bits(out[2:], whole(q[1:, :4], k[1:, :4], v[1:, :4])[0])


def test_what_lies_in_pages_unused_is_never_seen(rng):
    q, k, v = draw(rng, batch=1, seqlen=6)
    cache = PagedCache(num_pages=4, page_size=4)
    cache.append(np.full((1, 16, 2, 8), np.nan, np.float32), np.full((1, 16, 2, 8), np.inf, np.float32))
    cache.truncate(0)
    cache.append(k, v)
    assert_same_bits(cache.attend(q), whole(q, k, v))


def paged_refusals():
    k, q = np.ones((2, 2, 8), np.float32), np.ones((2, 4, 8), np.float32)
    yield "tokens left over", r"append: seqlens have to sum up to the tokens of k, 2", lambda c: c.append(k, k, [1, 0])
    yield "too few sequences", "append: tokens have to be for 2 sequences", lambda c: c.append(k, k, [2])
    yield "fewer than none", r"append: seqlens\[0\] has to be from 0", lambda c: c.append(k, k, [-1, 3])
    yield "rows left over", r"attend: seqlens have to sum up to the tokens of q, 2", lambda c: c.attend(q, [1, 0])
    yield "rows of others", "attend: q has to be of 2 sequences", lambda c: c.attend(q, [1, 0, 1])
    yield "rows not packed", "attend: q has to have 3 axes", lambda c: c.attend(q[None], [1, 1])
    missing = (
        r"has to have 4 axes, \(batch, seqlen, .*; for packed {}, \(tokens, .*\), give seqlens, the tokens of each"
    )
    yield "rows without seqlens", "attend: q " + missing.format("q"), lambda c: c.attend(q)
    yield "tokens without seqlens", "append: k " + missing.format("k and v"), lambda c: c.append(k, k)
    superfluous = "append: k has to have 3 axes, .*, if seqlens are given, which are for packed k and v"
    yield "seqlens for nothing", superfluous, lambda c: c.append(k[None], k[None], [1, 1])
    four = np.ones((4, 4, 8), np.float32)
    many = "attend: q has 4 rows of sequence 1, which has 3 tokens"
    yield "rows of no tokens", many, lambda c: c.attend(four, [0, 4])
    yield "rows of no shared tokens", many, lambda c: c.attend(four, [0, 4], cascade=True, causal=False)
    yield "no such fork", "fork: sequence has to be from 0 to 1", lambda c: c.fork(2)
    yield "none to remove", "remove: sequence has to be from 0 to 1", lambda c: c.remove(2)
    yield "none before the first", "remove: sequence has to be from 0 to 1", lambda c: c.remove(-1)
    yield "a longer cut", r"truncate: length\[1\] has to be from 0 to 3", lambda c: c.truncate([3, 4])
    yield "cuts of others", "truncate: length has to be at most the tokens", lambda c: c.truncate([1])
    windowed = {"window_size": (1, None)}
    yield "a window and a cascade", "attend: cascade goes with", lambda c: c.attend(q, [1, 1], cascade=True, **windowed)


@pytest.mark.parametrize(("message", "call"), [r[1:] for r in paged_refusals()], ids=[r[0] for r in paged_refusals()])
def test_pages_refuse_what_cannot_be_meant(message, call, rng):
    q, k, v = draw(rng, seqlen=3)
    cache = PagedCache(num_pages=8, page_size=4)
    cache.append(packed(k, (3, 3)), packed(v, (3, 3)), seqlens=[3, 3])
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert cache.lengths == (3, 3)
    assert_same_bits(cache.attend(q), whole(q, k, v))


@pytest.mark.parametrize(
    "call", [lambda c: c.fork(0), lambda c: c.remove(0), lambda c: c.reorder([0])], ids=["fork", "remove", "reorder"]
)
def test_where_there_are_no_sequences_that_is_said(call):
    cache = PagedCache(num_pages=8, page_size=4)
    with pytest.raises(ValueError, match=r"(sequence|sequences\[0\]) has to be one of those .* and there are none"):
        call(cache)
    assert cache.lengths == ()
    cache.reorder([])
    assert cache.add_sequence() == 0


def test_a_copy_of_pages_without_tokens_has_sequences_of_its_own():
    cache = PagedCache(num_pages=8, page_size=4)
    cache.add_sequence()
    twin = copy.copy(cache)
    assert cache.add_sequence() == 1
    assert (cache.lengths, twin.lengths) == ((0, 0), (0,))


def test_a_copy_shares_no_pages_and_its_forks_do(rng):
    q, k, v = draw(rng, batch=1, seqlen=6)
    cache = PagedCache(num_pages=4, page_size=4)
    cache.append(k[:, :5], v[:, :5])
    twin = copy.copy(cache)
    assert twin.fork(0) == 1
    twin.append(k[0, 5:], v[0, 5:], [0, 1])
    cache.truncate(0)
    cache.append(np.full_like(k, np.nan), np.full_like(v, np.nan))
    assert (cache.num_free_pages, twin.num_free_pages) == (2, 1)
    assert_same_bits(twin.attend(q[0], [0, 6]), whole(q, k, v)[0])


def test_a_cascade_of_float8_is_refused_in_words(rng):
    q, k, v = draw(rng, seqlen=3, dtype=ml_dtypes.float8_e4m3fn)
    cache = PagedCache(num_pages=8, page_size=4)
    cache.append(k, v)
    with pytest.raises(ValueError, match=r"PagedCache\.attend: cascade does not go with tokens of float8_e4m3fn"):
        cache.attend(q, cascade=True)
    assert_same_bits(cache.attend(q), whole(q, k, v))


@every_cache
def test_descales_of_other_dtypes_than_float8_are_refused(make, rng):
    q, k, v = draw(rng, seqlen=3)
    cache = make()
    cache.append(k, v)
    with pytest.raises(TypeError, match=r"\.attend: k_descale is for operands of float8_e4m3fn, and q is float32"):
        cache.attend(q, k_descale=np.ones((2, 2), np.float32))
    assert_same_bits(cache.attend(q), whole(q, k, v))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "softmax_scale": 0.3}, {"causal": False}], ids=str)
@pytest.mark.parametrize("length", [0, 3, 8, 9, 40])
def test_a_cascade_over_shared_pages_says_the_same(length, options, rng):
    q, k, v = draw(rng, batch=3, seqlen=length + 7)
    for x in (k, v):
        x[:, :length] = x[:1, :length]
    cache = PagedCache(num_pages=64, page_size=4)
    cache.append(k[:1, :length], v[:1, :length])
    cache.fork(0)
    cache.fork(0)
    own = (7, 2, 5)
    cache.append(*(np.concatenate([x[i, length : length + n] for i, n in enumerate(own)]) for x in (k, v)), seqlens=own)
    rows = (2, 1, 5)
    queries = np.concatenate(
        [q[i, length + n - r : length + n] for i, (n, r) in enumerate(zip(own, rows, strict=True))]
    )
    sinks = rng.standard_normal(4)
    expected = cache.attend(queries, rows, sinks=sinks, return_lse=True, **options)
    out, lse = cache.attend(queries, rows, sinks=sinks, return_lse=True, cascade=True, **options)
    assert_correctly_rounded(out, to_numpy(expected[0]), "float32", share=0.95)
    assert_matches(lse, expected[1], rtol=2e-7)


@pytest.mark.parametrize(("rows", "shared"), [(1, 2), (4, 2), (5, 1), (8, 1), (9, 0), (12, 0)])
def test_a_cascade_reads_pages_once_that_all_queries_see_whole(rows, shared, rng, monkeypatch):
    """Twelve tokens in common, in pages of four."""
    q, k, v = draw(rng, batch=1, seqlen=12)
    cache = PagedCache(num_pages=8, page_size=4)
    cache.append(k, v)
    cache.fork(0)
    queries = np.repeat(q[:, 12 - rows :], 2, axis=0)
    seen = []

    def recorded(function, parts, needs_lse):
        seen.append([int(named["cu_seqlens_k"][1][-1]) for named, *_ in parts])
        return answer_in_parts(function, parts, needs_lse)

    monkeypatch.setattr("cupyattn.cache.paged.answer_in_parts", recorded)
    out = cache.attend(queries, cascade=True)
    assert seen == [[2 * (12 - 4 * shared)] + [4 * shared] * (shared > 0)]
    assert_correctly_rounded(out, to_numpy(cache.attend(queries)), "float32", share=0.95)


@pytest.mark.parametrize("home", [Torch("float32"), Jax("float32"), Strict("float32", "device1")], ids=str)
def test_every_library_can_cascade(home, rng):
    q, k, v = draw(rng, batch=3, seqlen=14)
    found = []
    for make in (np.asarray, home.make):
        cache = PagedCache(num_pages=16, page_size=4)
        cache.append(make(k[:1, :9]), make(v[:1, :9]))
        cache.reorder([0, 0, 0])
        cache.append(make(k[:, 9:]), make(v[:, 9:]))
        found.append(cache.attend(make(q[:, 9:]), cascade=True, return_lse=True))
    for actual, expected in zip(found[1], found[0], strict=True):
        home.check(actual, home.make(q))
        assert_same_bits(actual, expected)


# ---------------------------------------------------------------------------------------------------
# On the host
# ---------------------------------------------------------------------------------------------------


def test_offloaded_tokens_are_at_home_from_prefetch_to_attend(rng):
    q, k, v = draw(rng, seqlen=5)
    cache = OffloadedCache()
    cache.append(k[:, :4], v[:, :4])
    assert cache.nbytes_fetched == 0
    cache.prefetch()
    cache.prefetch()
    fetched = cache.nbytes_fetched
    assert fetched > 0
    cache.append(k[:, 4:], v[:, 4:])
    assert cache.nbytes_fetched == fetched
    assert_same_bits(cache.attend(q), whole(q, k, v))
    assert cache.nbytes_fetched == 0


def test_what_is_appended_after_a_prefetch_is_seen_even_if_there_was_no_room_for_it(rng):
    q, k, v = draw(rng, seqlen=150)
    cache = OffloadedCache()
    cache.append(k[:, :4], v[:, :4])
    cache.prefetch()
    cache.append(k[:, 4:], v[:, 4:])
    assert_same_bits(cache.attend(q), whole(q, k, v))


@pytest.mark.parametrize("change", [lambda c: c.truncate(2), lambda c: c.reorder([1, 0])], ids=["cut", "reordered"])
def test_a_prefetch_is_not_outlived_by_what_it_fetched(change, rng):
    q, k, v = draw(rng, seqlen=4)
    told, untold = OffloadedCache(), OffloadedCache()
    for cache in (told, untold):
        cache.append(k, v)
    told.prefetch()
    for cache in (told, untold):
        change(cache)
        cache.append(k[:, :1], v[:, :1])
    assert_same_bits(told.attend(q[:, 1:]), untold.attend(q[:, 1:]))


class RecordedLane:
    """A lane that writes down what is done in which order; copies wait until somebody calls `ready`."""

    def __init__(self):
        self.pending, self.log = [], []

    def empty(self, shape, like):
        return np.full(shape, np.nan, like.dtype)

    def save(self, host, index, values):
        assert not self.pending, "what is on its way might be overwritten"
        self.log.append("save")
        host[index] = values
        return host

    def move(self, host, index, values):
        assert self.log[-1] in ("settle", "move"), "the values might not have arrived"
        self.log.append("move")
        host[index] = values
        return host

    def load(self, targets, index, sources):
        self.log.append("load")
        for target in targets:
            target[...] = np.nan
        self.pending = [(target[index], source) for target, source in zip(targets, sources, strict=True)]
        return targets

    def ready(self):
        for target, source in self.pending:
            target[...] = source
        self.pending = []

    def settle(self):
        self.ready()
        self.log.append("settle")


class SlowLane(RecordedLane):
    """What is saved is there when `settle` was called and not before."""

    saved = ()

    def save(self, host, index, values):
        host[index] = np.nan
        self.saved = [*self.saved, (host[index], values.copy())]
        return host

    def settle(self):
        for target, values in self.saved:
            target[...] = values
        self.saved = ()
        super().settle()


@every_way
def test_a_copy_of_what_is_on_its_way_to_the_host_waits_for_it(way, rng, monkeypatch):
    q, k, v = draw(rng, seqlen=4)
    monkeypatch.setattr("cupyattn.cache.offloaded._lane", lambda function, kind: SlowLane())
    cache = OffloadedCache()
    cache.append(k[:, :3], v[:, :3])
    cache.prefetch()
    monkeypatch.setattr(RecordedLane, "move", lambda self, host, index, values: host.__setitem__(index, values) or host)
    twin = way(cache)
    assert twin._state.lane is not cache._state.lane
    assert (twin.nbytes_fetched, cache.nbytes_fetched > 0) == (0, True)
    assert_same_bits(twin.attend(q[:, :3]), whole(q[:, :3], k[:, :3], v[:, :3]))
    assert_same_bits(cache.attend(q[:, :3]), whole(q[:, :3], k[:, :3], v[:, :3]))


def test_copies_that_take_their_time_are_waited_for(rng, monkeypatch):
    """As on a GPU, where a load is done when `ready` was called and not before."""
    q, k, v = draw(rng, seqlen=120)
    lane = RecordedLane()
    monkeypatch.setattr("cupyattn.cache.offloaded._lane", lambda function, kind: lane)
    cache = OffloadedCache()
    stop = 0
    for count in (3, 1, 1, 90, 1, 1):
        if stop:
            cache.prefetch()
        cache.append(k[:, stop : stop + count], v[:, stop : stop + count])
        stop += count
        assert_same_bits(cache.attend(q[:, :stop]), whole(q[:, :stop], k[:, :stop], v[:, :stop]))
    cache.prefetch()
    cache.truncate(50)
    cache.append(k[:, 50:60], v[:, 50:60])
    cache.prefetch()
    cache.reorder([1, 0])
    assert_same_bits(cache.attend(q[:, :60]), whole(q[:, :60], k[::-1, :60], v[::-1, :60]))
    assert lane.log.count("settle") == 3  # the host itself looks at its memory when it grows or is reordered


def test_a_table_made_while_another_thread_appends_is_not_kept(rng, monkeypatch):
    k, q = rng.standard_normal((1, 4, 1, 4)), rng.standard_normal((1, 1, 2, 4))
    cache, expected = PagedCache(8, 4), DynamicCache()
    for each in (cache, expected):
        each.append(k, 2 * k)
    make, new = paged._home, k[:, :1]

    def while_another_appends(kind, values):
        if values.ndim == 2 and cache.lengths == (4,):
            thread = threading.Thread(target=cache.append, args=(new, new))
            thread.start()
            thread.join()
        return make(kind, values)

    monkeypatch.setattr(paged, "_home", while_another_appends)
    cache.attend(q)
    expected.append(new, new)
    assert_same_bits(cache.attend(q), expected.attend(q))
