"""How much memory plans say that calls take: as the launcher asks for it on a GPU, as NumPy allocates it on a CPU."""

import math
import tracemalloc

import numpy as np
import pytest

import cupyattn
from cupyattn.cpu import threads
from cupyattn.cpu.scratch import Shelf
from cupyattn.cuda.launching.gradients import as_asked, backward_recipe
from cupyattn.cuda.launching.launch import recipe_of
from cupyattn.cuda.launching.views import View, contiguous_strides
from cupyattn.plan import choose, choose_backward, memory_of
from cupyattn.problem import ITEMSIZE, NAMED_DEVICES, Spec
from cupyattn.reading import Options, read

WITHIN = 1.6
"""What `explain` says of itself: so many times too much or too little, at the most."""


def floats(*shape, dtype="f4"):
    return np.random.default_rng(7).standard_normal(shape).astype(dtype)


def dense(batch, seqlen_q, heads, heads_kv, head_dim, seqlen_k=None, dtype="f4"):
    keys = floats(batch, seqlen_k or seqlen_q, heads_kv, head_dim, dtype=dtype)
    return floats(batch, seqlen_q, heads, head_dim, dtype=dtype), keys, keys


def starts(*lengths):
    return np.cumsum([0, *lengths], dtype=np.int32)


def measured(function, *args, **words):
    """Bytes at the peak of a call, whose threads begin without scratch memory."""
    function(*args, **words)  # what is remembered between calls is remembered
    threads._shelf = Shelf()
    tracemalloc.start()
    try:
        kept = function(*args, **words)
        return tracemalloc.get_traced_memory()[1], kept
    finally:
        tracemalloc.stop()


LONG = (1024, 4, 64)
PAGED = {"block_table": np.arange(32, dtype=np.int32).reshape(2, 16), "causal": True}
LENGTHS = np.array([256, 256, 256, 250], np.int32)
FORWARD = {
    "float64": ("attention", dense(1, 512, 4, 4, 64, dtype="f8"), {}),
    "float32": ("attention", dense(1, 512, 8, 2, 64), {"causal": True}),
    "float32_arithmetic": ("attention", dense(1, 512, 4, 4, 64), {"compute_dtype": "float32"}),
    "mask": ("attention", dense(1, 512, 4, 4, 64), {"mask": np.tri(512, dtype=bool)}),
    "scattered_mask": ("attention", dense(1, 512, 4, 4, 64), {"mask": floats(4, 512, 512) > 0}),
    "scattered_mask_and_window": (
        "attention",
        dense(1, 2048, 4, 4, 64),
        {"mask": floats(2048, 2048) > 0, "window_size": (10, 300)},
    ),
    "bias": ("attention", dense(1, 512, 4, 4, 64), {"bias": floats(4, 512, 512)}),
    "slopes": ("attention", dense(1, 512, 4, 4, 64), {"alibi_slopes": floats(4)}),
    "narrow_window": ("attention", dense(1, 4096, 2, 2, 64), {"window_size": (63, 0)}),
    "window_in_a_tile": ("attention", dense(1, 2048, 2, 2, 64), {"window_size": (399, 0)}),
    "window_of_a_group": ("attention", dense(1, 4096, 4, 1, 64), {"window_size": (31, 32)}),
    "dropout": ("attention", dense(1, 256, 4, 4, 64), {"dropout_p": 0.5, "dropout_seed": 3}),
    "decode": ("attention", dense(2, 1, 28, 4, 128, seqlen_k=2048), {}),
    "short": ("attention", dense(32, 16, 4, 4, 32), {}),
    "lengths": ("attention", dense(4, 256, 4, 4, 64), {"seqlens_k": LENGTHS}),
    "bhsd": ("scaled_dot_product_attention", (floats(1, 4, 512, 64),) * 3, {"is_causal": True}),
    "varlen": ("flash_attn_varlen_func", (*(floats(700, 4, 64),) * 3, *(starts(100, 500, 100),) * 2, 500, 500), {}),
    "pages": (
        "flash_attn_varlen_func",
        (floats(300, 8, 64), *(floats(32, 64, 2, 64),) * 2, starts(100, 200), starts(1000, 900), 200, 1000),
        PAGED,
    ),
    "kvcache": (
        "flash_attn_with_kvcache",
        (floats(2, 4, 8, 64), *(floats(32, 64, 2, 64),) * 2),
        {**PAGED, "cache_seqlens": np.array([1000, 1001], np.int32)},
    ),
    "cascade": (
        "cascade_attention",
        (floats(8, 1, 8, 64), *(floats(2000, 2, 64),) * 2, *dense(8, 9, 2, 2, 64)[1:]),
        {},
    ),
}
BACKWARD = {
    "float64": (dense(1, 512, 4, 4, 64, dtype="f8"), {}),
    "float32": (dense(1, 512, 8, 2, 64), {"causal": True}),
    "bias": (dense(1, 256, 4, 4, 64), {"bias": floats(256, 256)}),
    "dropout": (dense(1, 256, 4, 4, 64), {"dropout_p": 0.5, "dropout_seed": 3}),
    "batch": (dense(16, 64, 4, 4, 64), {}),
}


@pytest.fixture
def threads_worth(monkeypatch):
    """A function that sets from which cost a call has threads; small calls may end before the second one begins."""

    def set_to(cost):
        monkeypatch.setattr("cupyattn.plan.cpu.WORTH_THREADS", cost)
        choose.cache_clear()

    yield set_to
    choose.cache_clear()


@pytest.mark.parametrize("name", FORWARD)
def test_a_call_on_the_cpu_takes_about_as_much_memory_as_its_plan_says(name, threads_worth):
    threads_worth(math.inf)
    function, args, words = FORWARD[name]
    call = getattr(cupyattn, function)
    peak, _ = measured(call, *args, **words)
    said = cupyattn.explain(call, *args, **words).memory
    assert peak / WITHIN < said < peak * WITHIN


def test_each_thread_on_the_cpu_takes_its_scratch_memory(threads_worth):
    args, found = dense(1, 1024, 8, 8, 64, dtype="f8"), []
    for cost in (math.inf, 0):
        threads_worth(cost)
        found.append((measured(cupyattn.attention, *args)[0], cupyattn.explain(cupyattn.attention, *args).memory))
    (alone, said_alone), (together, said_together) = found
    assert together / WITHIN < said_together < together * WITHIN
    assert together > alone
    assert said_together > said_alone


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_on_the_cpu_take_about_as_much_memory_as_their_plan_says(name, threads_worth):
    threads_worth(math.inf)
    operands, words = BACKWARD[name]
    peak, _ = measured(cupyattn.attention_backward, np.ones_like(operands[0]), *operands, **words)
    said = cupyattn.explain(*operands, **words, backward=True).memory
    assert peak / WITHIN < said < peak * WITHIN


def views(specs):
    return {word: View(1 << 20, x.shape, contiguous_strides(x.shape), x.dtype) for word, x in specs.items()}


def asked(shapes, dtype, options):
    kinds = {"bias": "float32", "sinks": "float32", "alibi_slopes": "float32", "block_table": "int32"}
    specs = {
        word: Spec(word, shape, "int32" if "seqlens" in word else kinds.get(word, dtype))
        for word, shape in shapes.items()
    }
    return specs, read("test", tuple(specs.items()), options)


def qkv(q, kv):
    return {"q": q, "k": kv, "v": kv}


RAGGED = {"cu_seqlens_q": (6,), "cu_seqlens_k": (6,), "block_table": (5, 128)}
LAUNCHED = {
    "prefill": (qkv((2, 1000, 8, 128), (2, 1000, 8, 128)), Options(causal=True)),
    "decode": (qkv((2, 1, 32, 128), (2, 30000, 8, 128)), Options()),
    "decode_of_few": (qkv((1, 3, 20, 72), (1, 9000, 4, 72)), Options(needs_lse=True)),
    "behind_a_cache": (qkv((1, 32, 32, 128), (1, 65536, 8, 128)), Options(causal=True)),
    "pages": (
        qkv((5, 28, 96), (700, 64, 4, 96)) | RAGGED,
        Options(axes="thd", max_seqlen_q=1, max_seqlen_k=8192, needs_lse=True),
    ),
    "cached": (qkv((3, 1, 16, 64), (3, 20000, 2, 64)) | {"cache_seqlens": (3,)}, Options(causal=True, cached=True)),
}


@pytest.mark.parametrize("device", ["A100", "H100", "L4"])
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_kernels_plan_says_what_the_launcher_asks_for(name, device):
    specs, problem = asked(LAUNCHED[name][0], "bfloat16", LAUNCHED[name][1])
    plan = choose(problem, NAMED_DEVICES[device])
    workspace = recipe_of(plan, problem, views(specs)).workspace
    results = sum(spec.nbytes for spec in problem.results.values())
    assert memory_of(plan, problem, specs) == results + 4 * sum(workspace)


def test_splits_are_among_what_is_compared_with_the_launcher():
    plans = [
        choose(asked(shapes, "bfloat16", options)[1], NAMED_DEVICES["H100"]) for shapes, options in LAUNCHED.values()
    ]
    assert {plan.kernel for plan in plans if plan.num_splits > 1} == {"splitkv", "hopper"}


GRADIENTS = {
    "plain": (qkv((2, 300, 8, 64), (2, 300, 8, 64)), Options(causal=True)),
    "shared_heads": (qkv((1, 500, 32, 128), (1, 500, 4, 128)), Options()),
    "one_batch_for_all": ({"q": (3, 70, 4, 64), "k": (1, 90, 4, 64), "v": (3, 90, 2, 64)}, Options()),
    "edited": (qkv((2, 200, 4, 64), (2, 200, 4, 64)) | {"bias": (1, 4, 200, 200), "sinks": (4,)}, Options()),
    "slopes": (qkv((2, 200, 4, 64), (2, 200, 4, 64)) | {"alibi_slopes": (2, 4)}, Options()),
    "ragged": (
        qkv((900, 8, 128), (900, 2, 128)) | {"cu_seqlens_q": (4,), "cu_seqlens_k": (4,)},
        Options(axes="thd", max_seqlen_q=400, max_seqlen_k=400),
    ),
}


@pytest.mark.parametrize("device", ["A100", "H100"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_plan_of_a_kernels_gradients_says_what_its_launches_ask_for(name, device):
    specs, problem = asked(GRADIENTS[name][0], "float16", GRADIENTS[name][1])
    plan = choose_backward(problem, NAMED_DEVICES[device])
    shapes = {"dout": problem.out_shape, "out": problem.out_shape, "lse": problem.lse_shape}
    kinds = {"dout": "float16", "out": "float16", "lse": "float32"}
    known = {word: Spec(word, shape, kinds[word]) for word, shape in shapes.items()}
    whole = {
        word: x._replace(shape=(*problem.sizes.batch_shape, *x.shape[1:]))
        if word in ("k", "v") and len(x.shape) == 4
        else x
        for word, x in specs.items()
    }  # one batch for all comes as a view of many
    recipe = backward_recipe(plan, problem, views(whole | known))
    there = {word: as_asked(x, specs[word].shape, specs[word].dtype) for word, x in recipe.written.items()}
    apart = sum(ITEMSIZE[x.dtype] * math.prod(x.shape) for x in there.values() if not x.is_whole)
    results = sum(specs[word].nbytes for word in recipe.written)
    expected = results + apart + 8 * recipe.num_rows + 4 * recipe.num_flags
    assert memory_of(plan, problem, specs, gradients=True) == expected


def test_results_alone_are_what_a_kernel_without_splits_takes():
    plan = cupyattn.explain((1, 2048, 8, 64), (1, 2048, 8, 64), (1, 2048, 8, 64), device="A100")
    assert plan.memory == 2 * 2048 * 8 * 64


def test_heads_first_are_copied_where_each_sequence_has_a_length():
    shapes = (2, 8, 512, 64), (2, 2, 512, 64), (2, 2, 512, 64)
    words = {"layout": "bhsd", "device": "A100"}
    packed = cupyattn.explain(*shapes, **words, seqlens_k=(2,)).memory
    assert packed - cupyattn.explain(*shapes, **words).memory == 2 * sum(map(math.prod, shapes))
