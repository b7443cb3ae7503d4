"""`explain` of calls as they are: functions, and `attend` of caches."""

from dataclasses import replace
from inspect import signature

import numpy as np
import pytest

import cupyattn
from cupyattn import cpu

ones = np.ones


def int32(*values):
    return np.array(values, np.int32)


X, ROWS = ones((2, 6, 4, 8), np.float32), ones((10, 4, 8), np.float32)
STARTS, TABLE = int32(0, 4, 10), int32([0, 1], [2, 3])
PAGES = ones((4, 4, 2, 8), np.float32)
CALLS = {
    "attention": ((X, X, X), {"causal": True, "bias": ones((6, 6), np.float32)}),
    "scaled_dot_product_attention": ((X, X, X), {"attn_mask": ones((4, 4), bool)}),
    "flash_attn_func": ((X, X, X), {"window_size": (2, 0), "alibi_slopes": ones(4, np.float32)}),
    "flash_attn_qkvpacked_func": ((ones((2, 6, 3, 4, 8), np.float32),), {"causal": True}),
    "flash_attn_kvpacked_func": ((X, ones((2, 7, 2, 2, 8), np.float32)), {"return_lse": True}),
    "flash_attn_varlen_func": ((ROWS, PAGES, PAGES, STARTS, STARTS, 6, 6), {"block_table": TABLE, "causal": True}),
    "flash_attn_varlen_qkvpacked_func": ((ones((10, 3, 4, 8), np.float32), STARTS, 6), {}),
    "flash_attn_varlen_kvpacked_func": ((ROWS, ones((10, 2, 4, 8), np.float32), STARTS, STARTS, 6, 6), {}),
    "flash_attn_with_kvcache": (
        (X[:, :1], PAGES, PAGES, X[:, :1, :2], X[:, :1, :2]),
        {"cache_seqlens": int32(3, 5), "page_table": TABLE, "causal": True},
    ),
    "cascade_attention": ((X[:, :1], ROWS[:, :2], ROWS[:, :2], X[:, :, :2], X[:, :, :2]), {}),
}


def shapes_of(values):
    return [x.shape if isinstance(x, np.ndarray) else x for x in values]


def run_plans(monkeypatch):
    """The plans of what the CPU is given to do, from here on."""
    done, run = [], cpu.run

    def noted(plan, *args):
        done.append(plan)
        return run(plan, *args)

    monkeypatch.setattr(cpu, "run", noted)
    return done


@pytest.mark.parametrize("name", CALLS)
def test_what_is_explained_is_what_runs(name, monkeypatch):
    args, words = CALLS[name]
    function = getattr(cupyattn, name)
    plan = cupyattn.explain(function, *args, **words)
    done = run_plans(monkeypatch)
    function(*(x.copy() if isinstance(x, np.ndarray) else x for x in args), **words)
    assert replace(plan, flops=0, bytes=0, notes=()) == replace(done[0], flops=0, bytes=0, notes=())
    assert (plan.flops, plan.bytes) == (sum(x.flops for x in done), sum(x.bytes for x in done))


@pytest.mark.parametrize("device", [None, "A100", "H100"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_shapes_is_explained_as_one_of_arrays(name, device):
    args, words = CALLS[name]
    function = getattr(cupyattn, name)
    words_of_shapes = dict(zip(words, shapes_of(words.values()), strict=True))
    of_shapes = cupyattn.explain(function, *shapes_of(args), **words_of_shapes, dtype="float32", device=device)
    of_arrays = cupyattn.explain(function, *args, **words, device=device)
    assert (of_shapes, of_shapes.memory) == (of_arrays, of_arrays.memory)
    assert of_shapes.cache_bytes == of_arrays.cache_bytes


def test_attention_is_explained_with_and_without_its_name():
    shapes, words = ((1, 300, 4, 64),) * 3, {"causal": True, "device": "H100", "backward": True}
    by_name, plain = cupyattn.explain(cupyattn.attention, *shapes, **words), cupyattn.explain(*shapes, **words)
    assert (by_name, by_name.memory) == (plain, plain.memory)
    assert plain.kernel == "hopper_backward"


def test_attention_backward_is_explained_as_gradients_of_attention():
    shapes = ((1, 300, 4, 64),) * 4
    found = cupyattn.explain(cupyattn.attention_backward, *shapes, device="H100")
    expected = cupyattn.explain(*shapes[1:], device="H100", backward=True, return_lse=True)
    assert (found, found.memory) == (expected, expected.memory)


def test_a_decode_over_pages_says_what_the_cache_takes_and_what_its_splits_do():
    pages = (1024, 64, 8, 128)
    call = cupyattn.flash_attn_with_kvcache, (8, 1, 32, 128), pages, pages
    words = {"block_table": (8, 128), "cache_seqlens": (8,), "dtype": "bfloat16", "device": "H100"}
    plan, whole = cupyattn.explain(*call, **words), cupyattn.explain(*call, **words, num_splits=1)
    assert plan.cache_bytes == whole.cache_bytes == 2 * 2 * 1024 * 64 * 8 * 128
    assert (plan.kernel, plan.num_splits > 1, whole.num_splits) == ("splitkv", True, 1)
    assert whole.memory == 2 * 8 * 32 * 128 < plan.memory
    assert {"memory", "cache"} < {line.split()[0] for line in str(plan).splitlines()}


def appended(cache, tokens=100):
    x = ones((2, tokens, 2, 16), np.float16)
    cache.append(x, x)
    return cache


CACHES = {
    "dynamic": lambda: appended(cupyattn.DynamicCache()),
    "static": lambda: appended(cupyattn.StaticCache(128)),
    "sliding": lambda: appended(cupyattn.SlidingWindowCache(64)),
    "paged": lambda: appended(cupyattn.PagedCache(16, 16)),
    "offloaded": lambda: appended(cupyattn.OffloadedCache()),
}


@pytest.mark.parametrize("name", CACHES)
def test_what_is_explained_of_a_cache_is_what_its_attend_runs(name, monkeypatch):
    cache, q = CACHES[name](), ones((2, 1, 8, 16), np.float16)
    plan = cupyattn.explain(cache.attend, q)
    done = run_plans(monkeypatch)
    cache.attend(q)
    assert [plan] == done
    assert plan.cache_bytes == cache.nbytes > 0


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_explained_for_any_gpu_and_left_as_it_was(name):
    cache = CACHES[name]()
    before = cache._state
    plan = cupyattn.explain(cache.attend, (2, 1, 8, 16), device="H100", sinks=(8,), return_lse=True)
    assert (plan.kernel, plan.device, plan.cache_bytes) == ("splitkv", "H100", cache.nbytes)
    assert cache._state is before


def test_what_is_fetched_for_attention_is_memory_that_it_takes():
    here, offloaded = CACHES["dynamic"](), CACHES["offloaded"]()
    plans = [cupyattn.explain(cache.attend, (2, 1, 8, 16), device="H100") for cache in (here, offloaded)]
    assert plans[1].memory - plans[0].memory == 2 * 2 * (100 + 64) * 2 * 2 * 16
    offloaded.prefetch()
    assert cupyattn.explain(offloaded.attend, (2, 1, 8, 16), device="H100").memory == plans[0].memory


def test_one_layer_of_many_is_explained():
    x = ones((2, 100, 2, 16), np.float16)
    cache = cupyattn.LayeredCache(2, num_pages=16, page_size=16)
    cache.update(x, x, 0)
    plan = cupyattn.explain(cache.attend, (2, 1, 8, 16), 0, sinks=(8,), device="A100")
    assert (plan.kernel, plan.cache_bytes) == ("splitkv", cache.nbytes)
    with pytest.raises(ValueError, match="nothing has been appended"):
        cupyattn.explain(cache.attend, (2, 1, 8, 16), 1)


def test_packed_queries_have_their_lengths_by_value():
    cache = CACHES["paged"]()
    assert cupyattn.explain(cache.attend, (5, 8, 16), [3, 2]).bytes > 0
    with pytest.raises(ValueError, match="sum up"):
        cupyattn.explain(cache.attend, (5, 8, 16), [3, 3])


def test_a_cascade_counts_the_keys_that_all_have_once():
    cache = cupyattn.PagedCache(64, 16)
    x = ones((1, 512, 2, 16), np.float16)
    cache.append(x, x)
    for _ in range(3):
        cache.fork(0)
    plain, shared = (
        cupyattn.explain(cache.attend, (4, 1, 8, 16), cascade=cascade, device="H100") for cascade in (False, True)
    )
    assert shared.bytes < plain.bytes
    assert any("keys that all have" in note for note in shared.notes)


def test_a_call_that_no_implementation_takes_has_a_plan_that_says_why():
    plan = cupyattn.explain(cupyattn.flash_attn_func, *((1, 30, 4, 64),) * 3, device="T4")
    assert (plan.kernel, plan.memory) == ("none", None)
    assert any("Ampere" in reason for _, reasons in plan.objections for reason in reasons)


def test_what_is_allowed_around_a_call_is_explained():
    call = cupyattn.flash_attn_func, *((1, 300, 4, 64),) * 3
    with cupyattn.implementations("flash"):
        assert cupyattn.explain(*call, device="H100").kernel == "flash"
    assert cupyattn.explain(*call, device="H100").kernel == "hopper"


@pytest.mark.parametrize("name", [name for name in CALLS if "kvcache" not in name and "varlen" not in name])
def test_every_array_of_a_signature_may_be_a_shape(name):
    """Or an annotation is new, and `rehearsing` does not know that it is of arrays."""
    from cupyattn.rehearsing import ARRAYS

    annotations = {str(x.annotation) for x in signature(getattr(cupyattn, name)).parameters.values()}
    assert {x for x in annotations if "Array" in x or x.split(" |")[0] == "A"} <= set(ARRAYS)


def test_a_cascade_of_which_nothing_is_shared_is_explained():
    cache = cupyattn.PagedCache(16, 4)
    cache.append(ROWS[:, :2], ROWS[:, :2], [4, 6])
    plans = [cupyattn.explain(cache.attend, (2, 1, 4, 8), device="H100", cascade=cascade) for cascade in (False, True)]
    assert replace(plans[1], cache_bytes=0) == replace(plans[0], cache_bytes=0)


REFUSED = {
    "another_function": (TypeError, "only attention can be explained", (cupyattn.merge_states, [X], [X]), {}),
    "another_method": (TypeError, "only attention can be explained", (CACHES["dynamic"]().append, X, X), {}),
    "strangers_function": (TypeError, "only attention can be explained", (np.add, X, X), {}),
    "unknown_device": (ValueError, "device has to be 'cpu'", (cupyattn.flash_attn_func, X, X, X), {"device": "H1"}),
    "heads": (ValueError, "flash_attn_func", (cupyattn.flash_attn_func, (1, 5, 4, 8), *((1, 5, 3, 8),) * 2), {}),
    "negative_size": (ValueError, "q", (cupyattn.flash_attn_func, (1, -5, 4, 8), X, X), {}),
    "no_gradients": (
        ValueError,
        "no gradients",
        (cupyattn.flash_attn_with_kvcache, X, PAGES, PAGES),
        {"backward": True},
    ),
    "another_word": (TypeError, "causl", (cupyattn.flash_attn_func, X, X, X), {"causl": True}),
    "empty_cache": (ValueError, "nothing has been appended", (cupyattn.DynamicCache().attend, (1, 1, 2, 8)), {}),
    "rows": (ValueError, "append theirs first", (appended(cupyattn.DynamicCache(), 3).attend, (2, 5, 8, 16)), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_is_refused_where_it_would_be_and_where_it_is_none(name):
    error, words, args, options = REFUSED[name]
    with pytest.raises(error, match=words):
        cupyattn.explain(*args, **options)
