"""Calls that are launched again without being read: the very launches of the long way, and only where it may be."""

# ruff: noqa: F811  (fixtures)

import contextlib
import gc
import hashlib
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from driven import driver, torch  # noqa: F401

import cupyattn
from cupyattn import corridor, cuda, repeating
from cupyattn.arrays import enter
from cupyattn.cuda import appending, backward, scheduling, scripting
from cupyattn.cuda.launching import maps, memory
from cupyattn.problem import NAMED_DEVICES

HELD = 1 << 25
"""Bytes of the pool."""


def encoded(wanted, address):
    """A map that is another one for each array and address."""
    return 4 * hashlib.sha256(repr((wanted, address)).encode()).digest()


@pytest.fixture
def launches(driver, monkeypatch):
    """All launches in full, as values; nothing is done."""
    found = []

    def kernel(what, index):
        def launch(grid, block, arguments, shared_memory, stream):
            (record,) = arguments
            found.append((what, index, grid, block, bytes(record), shared_memory, stream.ptr))

        return launch

    for module in (cuda, appending, backward, scheduling, scripting):
        monkeypatch.setattr(module, "kernel", kernel)
    monkeypatch.setattr(maps, "encode", encoded)
    return found


@pytest.fixture
def gpu(launches, monkeypatch):
    """A GPU in host memory: `array` makes CuPy's, the pool begins anew with each call of `of`."""
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    device, long, used = NAMED_DEVICES["H100"], [], [0]
    pool = np.zeros(HELD, np.uint8)

    def allocate(num_bytes):
        start = used[0] + -(pool.ctypes.data + used[0]) % 512
        used[0] = start + num_bytes
        assert used[0] <= HELD
        owned = cupy.cuda.UnownedMemory(pool.ctypes.data + start, num_bytes, pool, device_id=0)
        return cupy.cuda.MemoryPointer(owned, 0)

    def array(*shape, dtype="float16", steps=None, shift=0, device_id=0):
        """Of `shape`, in steps of two along the axes named in `steps`, `shift` numbers behind an aligned address."""
        spread = [2 * size if axis in (steps or ()) else size for axis, size in enumerate(shape)]
        item = np.dtype(dtype).itemsize
        held = np.zeros((int(np.prod(spread)) + shift) * item + 512, np.uint8)
        first = -held.ctypes.data % 512 + shift * item
        owned = cupy.cuda.UnownedMemory(held.ctypes.data, held.nbytes, held, device_id=device_id)
        whole = cupy.ndarray(spread, dtype, cupy.cuda.MemoryPointer(owned, first))
        return whole[tuple(slice(None, None, 2 if axis in (steps or ()) else 1) for axis in range(len(shape)))]

    for name in ("run", "run_from_cache"):
        real = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *asked, real=real: long.append(real) or real(*asked))
    for name, dtype in (("contiguous", None), ("as_float32", "float32")):  # CuPy would launch a kernel of its own
        fresh = lambda self, x, dtype=dtype: cupy.empty(x.shape, dtype or x.dtype)  # noqa: E731
        monkeypatch.setattr(memory.CuPyMemory, name, fresh)
    monkeypatch.setattr(memory.CuPyMemory, "fresh", lambda self, x, shape: cupy.empty(shape, x.dtype))
    found = SimpleNamespace(array=array, device=device, cupy=cupy)
    monkeypatch.setattr(cuda, "device_of", lambda function, title, like: found.device)

    def of(call):
        """(the launches of a call, or its error, and whether it went the long way)."""
        launches.clear()
        long.clear()
        used[0] = 0
        try:
            result = call()
        except Exception as error:
            return (type(error), str(error)), True
        shapes = [None if x is None else (x.shape, x.dtype, x.strides, x.data.ptr) for x in _each(result)]
        return (list(launches), shapes), bool(long)

    def long_way(call):
        with monkeypatch.context() as patch:
            patch.setattr(repeating.Memory, "look", lambda *asked: None)  # nothing is learned, either
            return of(call)[0]

    found.of, found.long_way = of, long_way
    with cupy.cuda.using_allocator(allocate):
        yield found


def _each(result):
    return result if isinstance(result, tuple) else (result,)


# ---- The same launches


def drawn(rng, gpu):
    """A function, its scalars, and a recipe for its arrays: {name: arguments of `gpu.array`}, drawn at random."""
    choose = lambda *of: of[rng.integers(len(of))]  # noqa: E731
    function = choose("attention", "attention", "flash_attn_func", "scaled_dot_product_attention", "varlen", "kvcache")
    batch, heads_kv, group, dim = choose(1, 2, 3), choose(1, 2), choose(1, 2, 4), choose(64, 64, 128, 96, 72)
    seqlen_q, seqlen_k = choose(1, 1, 3, 70, 200), choose(1, 64, 300, 2000)
    dtype, heads = choose("float16", "float16", "float32"), heads_kv * group
    like = {"dtype": dtype, "steps": choose(None, None, (0,), (1,), (2,), (3,)), "shift": choose(0, 0, 0, 1, 8)}
    options, arrays = {}, {}
    if choose(True, False):
        options["softmax_scale"] = choose(0.1, 1, 0.0, -0.0)
    if choose(True, False):
        options["causal"] = choose(True, True, False, 1)
    if choose(True, False, False) and function != "scaled_dot_product_attention":
        options["window_size"] = choose((-1, -1), (4, 0), (None, 7), (100, 100), (-5, 2))
        options["softcap"] = choose(0.0, 30.0)
    wants_lse = choose(True, False)
    shape_q, shape_k = (batch, seqlen_q, heads, dim), (batch, seqlen_k, heads_kv, dim)
    names = ("q", "k", "v")
    if function == "attention":
        layout = choose("bshd", "bhsd")
        options |= {"layout": layout, "alignment": choose("top-left", "bottom-right", None), "return_lse": wants_lse}
        options |= choose({}, {}, {"implementation": choose("flash", "splitkv", "hopper", ("flash", "splitkv"))})
        if layout == "bhsd":
            shape_q, shape_k = (batch, heads, seqlen_q, dim), (batch, heads_kv, seqlen_k, dim)
        extra = choose(None, None, "mask", "bias", "alibi_slopes", "sinks", "out", "seqlens_k", "dropout")
        if extra == "mask":
            arrays["mask"] = ((seqlen_q, seqlen_k), {"dtype": "bool"})
        elif extra == "bias":
            arrays["bias"] = ((heads, seqlen_q, seqlen_k), {"dtype": choose("float32", "float16")})
        elif extra in ("alibi_slopes", "sinks"):
            arrays[extra] = ((heads,), {"dtype": choose("float32", "float32", "float16")})
        elif extra == "out":
            arrays["out"] = (shape_q, {"dtype": dtype, "shift": choose(0, 0, 1), "steps": choose(None, None, (1,))})
            if wants_lse:
                arrays["lse_out"] = ((batch, heads, seqlen_q), {"dtype": "float32"})
        elif extra == "seqlens_k":
            arrays["seqlens_k"] = ((batch,), {"dtype": "int32"})
        elif extra == "dropout":
            options |= {"dropout_p": 0.5, "dropout_seed": 7}
    elif function == "flash_attn_func":
        options |= {"return_lse": wants_lse, "return_attn_probs": choose(True, False, False)}
    elif function == "scaled_dot_product_attention":
        shape_q, shape_k, names = (batch, heads, seqlen_q, dim), (batch, heads_kv, seqlen_k, dim), SDPA
        options = {
            "is_causal": bool(options.get("causal", False)), "enable_gqa": choose(True, True, False),
            "return_lse": wants_lse, "scale": options.get("softmax_scale"),
        }  # fmt: skip
        if choose(True, False, False):
            arrays["attn_mask"] = ((seqlen_q, seqlen_k), {"dtype": choose("bool", dtype)})
    elif function == "varlen":
        shape_q, shape_k = (batch * seqlen_q, heads, dim), (batch * seqlen_k, heads_kv, dim)
        options |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k, "return_lse": wants_lse}
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            arrays[name] = ((batch + 1,), {"dtype": "int32"})
        used = choose(None, None, "pages", "pages", "seqused_q", "seqused_k")
        if used == "pages":
            del arrays["cu_seqlens_k"]
            shape_k = (40, 16, heads_kv, dim)
            arrays["block_table"] = ((batch, 9), {"dtype": "int32"})
        if used is not None:
            arrays[used if used != "pages" else "seqused_k"] = ((batch,), {"dtype": "int32"})
    else:
        return drawn_from_cache(choose, options, arrays, dtype, (batch, seqlen_q, heads, dim), seqlen_k, heads_kv)
    shapes = zip(names, (shape_q, shape_k, shape_k), strict=True)
    like_q = {**like, "steps": like["steps"] if choose(True, False) else None}
    arrays = {name: (shape, like if name != names[0] else like_q) for name, shape in shapes} | arrays
    return {"varlen": "flash_attn_varlen_func"}.get(function, function), options, arrays


SDPA = ("query", "key", "value")


def drawn_from_cache(choose, options, arrays, dtype, shape_q, capacity, heads_kv):
    batch, seqlen_q, _, dim = shape_q
    options |= {"return_softmax_lse": choose(True, False), "num_splits": choose(0, 0, 1, 3)}
    options |= choose({}, {}, {}, {"check_indices": False})
    shape_k, kind = (batch, max(capacity, 64), heads_kv, dim), {"dtype": dtype}
    if choose(True, False, False):
        shape_k = (40, 16, heads_kv, dim)
        arrays["block_table"] = ((batch, 9), {"dtype": "int32"})
    caches = {**kind, "steps": choose(None, (0,), (1,), (2,))}
    arrays |= {"q": (shape_q, kind), "k_cache": (shape_k, caches), "v_cache": (shape_k, caches)}
    if choose(True, False):
        new = {**kind, "steps": choose(None, (1,), (3,))}
        arrays |= dict.fromkeys(("k", "v"), ((batch, seqlen_q, heads_kv, dim), new))
        if choose(True, False):
            tables = {"dtype": choose(dtype, "float32")}
            arrays |= dict.fromkeys(("rotary_cos", "rotary_sin"), ((4000, 16), tables))
            options |= {"rotary_interleaved": choose(True, False)}
    lengths = choose(None, "array", "array", "number")
    if lengths == "array":
        arrays["cache_seqlens"] = ((batch,), {"dtype": "int32"})
    elif lengths == "number":
        options["cache_seqlens"] = choose(5, 0, 60)
    if choose(True, False, False):
        arrays["cache_leftpad"] = ((batch,), {"dtype": "int32"})
    return "flash_attn_with_kvcache", options, arrays


def made(gpu, asked):
    """The call of fresh arrays, whose addresses are others each time."""
    function, options, arrays = asked
    given = {name: gpu.array(*shape, **like) for name, (shape, like) in arrays.items()}
    return lambda: getattr(cupyattn, function)(**given, **options)


@pytest.mark.parametrize("device", ["H100", "A100"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:.*look exchanged")
def test_a_call_made_again_launches_what_the_long_way_does_to_the_last_byte(gpu, seed, device):
    gpu.device = NAMED_DEVICES[device]
    rng, short = np.random.default_rng([seed, len(device)]), 0
    for _ in range(60):
        asked = drawn(rng, gpu)
        repeating.forget()
        gpu.of(made(gpu, asked))
        call = made(gpu, asked)
        found, was_long = gpu.of(call)
        assert found == gpu.long_way(call), asked
        short += not was_long
    assert short >= 20


def test_a_call_of_pages_of_which_so_many_keys_are_used_is_remembered(gpu):
    def step():
        q, k, v = gpu.array(6, 4, 64), gpu.array(40, 16, 2, 64), gpu.array(40, 16, 2, 64)
        starts, used, table = (gpu.array(*shape, dtype="int32") for shape in ((4,), (3,), (3, 9)))
        given = {"max_seqlen_q": 2, "max_seqlen_k": 144, "seqused_k": used, "block_table": table}
        return lambda: cupyattn.flash_attn_varlen_func(q, k, v, starts, **given)

    gpu.of(step())
    again = step()
    found, was_long = gpu.of(again)
    assert not was_long
    assert found == gpu.long_way(again)


def test_a_number_of_tokens_that_grows_is_no_other_call(gpu):
    q, k_cache, v_cache, new = (gpu.array(2, n, 2, 64) for n in (1, 128, 128, 1))

    def step(taken):
        return lambda: cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=taken)

    gpu.of(step(3))
    for taken in (4, 0, 77):
        found, was_long = gpu.of(step(taken))
        assert not was_long
        assert found == gpu.long_way(step(taken))
        gpu.of(step(3))


def test_the_number_of_tokens_may_come_by_position(gpu):
    arrays = [gpu.array(2, n, 2, 64) for n in (1, 128, 128, 1, 1)]

    def step(taken):
        return lambda: cupyattn.flash_attn_with_kvcache(*arrays, None, None, taken)

    gpu.of(step(3))
    found, was_long = gpu.of(step(9))
    assert not was_long
    assert found == gpu.long_way(step(9))


def test_for_keys_without_memory_the_driver_is_given_the_address_of_q_each_time(gpu, monkeypatch):
    """Their boxes are never asked for, and it makes no tensor map of address 0."""
    told, cupy = [], gpu.cupy
    monkeypatch.setattr(maps, "encode", lambda wanted, address: told.append(address) or encoded(wanted, address))
    nowhere = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(0, 0, None, device_id=0), 0)
    k, v = (cupy.ndarray((2, 0, 2, 64), "float16", nowhere, strides=(256, 256, 128, 2)) for _ in range(2))
    for was_long in (True, False):
        q = gpu.array(2, 300, 2, 64)
        told.clear()
        (launched, _), went = gpu.of(lambda q=q: cupyattn.attention(q, k, v, implementation="hopper"))
        assert (len(launched), went) == (1, was_long)
        *operands, out = told
        assert operands == [q.data.ptr] * 3
        assert out not in (0, q.data.ptr)


@pytest.mark.parametrize("number", [-1, 2**40, True, "3"])
def test_a_number_of_tokens_that_is_none_is_refused_as_ever(gpu, number):
    q, k_cache, v_cache, new = (gpu.array(2, n, 2, 64) for n in (1, 128, 128, 1))

    def step(taken):
        return lambda: cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=taken)

    gpu.of(step(1))
    assert gpu.of(step(number)) == (gpu.long_way(step(number)), True)


# ---- What makes another call of it

SHAPE_Q, SHAPE_K = (2, 40, 4, 64), (2, 90, 2, 64)
SHAPES = {"q": SHAPE_Q, "k": SHAPE_K, "v": SHAPE_K}
CHANGES = {
    "rows": {"q": ((2, 41, 4, 64), {})},
    "keys": {"k": ((2, 91, 2, 64), {}), "v": ((2, 91, 2, 64), {})},
    "batch": {"q": ((3, 40, 4, 64), {}), "k": ((3, 90, 2, 64), {}), "v": ((3, 90, 2, 64), {})},
    "strides of q": {"q": (SHAPE_Q, {"steps": (1,)})},
    "strides of k": {"k": (SHAPE_K, {"steps": (1,)})},
    "strides of v": {"v": (SHAPE_K, {"steps": (2,)})},
    "columns of q": {"q": (SHAPE_Q, {"steps": (3,)})},
    "start of q": {"q": (SHAPE_Q, {"shift": 1})},
    "start of v": {"v": (SHAPE_K, {"shift": 1})},
    "dtype": {name: (shape, {"dtype": "float32"}) for name, shape in SHAPES.items()},
    "dtype of the same size": {name: (shape, {"dtype": "int16"}) for name, shape in SHAPES.items()},
    "dtype of k": {"k": (SHAPE_K, {"dtype": "float32"})},
    "head_dim": {name: ((*shape[:3], 72), {}) for name, shape in SHAPES.items()},
    "device of q": {"q": (SHAPE_Q, {"device_id": 1})},
    "not causal": {"causal": False},
    "causal, in a way": {"causal": 1},
    "alignment": {"alignment": "top-left"},
    "window": {"window_size": (3, 0)},
    "window of reals": {"window_size": (-1.0, -1.0)},
    "scale": {"softmax_scale": 0.25},
    "another zero": {"softmax_scale": -0.0},
    "softcap": {"softcap": 2.0},
    "lse": {"return_lse": True},
    "layout": {"layout": "bhsd"},
    "implementation": {"implementation": "flash"},
    "unknown implementation": {"implementation": "flush"},
    "split size": {"fixed_split_size": 64},
    "dropout": {"dropout_p": 0.5, "dropout_seed": 1},
    "mask": {"mask": ((40, 90), {"dtype": "bool"})},
    "bias": {"bias": ((40, 90), {"dtype": "float32"})},
    "slopes": {"alibi_slopes": ((4,), {"dtype": "float32"})},
    "sinks": {"sinks": ((4,), {"dtype": "float32"})},
    "seqlens": {"seqlens_k": ((2,), {"dtype": "int32"})},
    "a place for out": {"out": (SHAPE_Q, {})},
    "a place for out, not for a kernel": {"out": (SHAPE_Q, {"steps": (1,)})},
    "a place for out of other numbers": {"out": (SHAPE_Q, {"dtype": "float32"})},
    "a word nobody knows": {"causl": True},
}


def asked_of(gpu, changes):
    values = {"q": (SHAPE_Q, {}), "k": (SHAPE_K, {}), "v": (SHAPE_K, {}), "causal": True, "alignment": "bottom-right"}
    values |= {"softmax_scale": 0.0, "window_size": (-1, -1), **changes}
    is_array = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], dict)  # noqa: E731
    given = {name: gpu.array(*x[0], **x[1]) if is_array(x) else x for name, x in values.items()}
    return lambda: cupyattn.attention(**given)


@pytest.mark.parametrize("device", ["H100", "A100"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.filterwarnings("ignore:.*look exchanged")
def test_one_change_is_noticed(gpu, device, changes):
    gpu.device = NAMED_DEVICES[device]
    first, other = asked_of(gpu, {}), asked_of(gpu, changes)
    gpu.of(first)
    assert not gpu.of(first)[1]
    found, was_long = gpu.of(other)
    assert was_long
    assert found == gpu.long_way(other)


def test_the_kernels_that_are_allowed_around_a_call_are_part_of_it(gpu):
    call = asked_of(gpu, {})
    free = gpu.of(call)[0]
    with cupyattn.implementations("flash"):
        found, was_long = gpu.of(call)
        assert was_long
        assert found != free
        assert not gpu.of(call)[1]
        assert found == gpu.of(call)[0]
    assert gpu.of(call) == (free, False)


def test_a_call_that_copies_for_tensor_maps_goes_the_long_way_each_time(gpu, launches):
    call = asked_of(gpu, {"k": (SHAPE_K, {"shift": 1}), "implementation": "hopper"})
    found = [gpu.of(call) for _ in range(3)]
    assert [was_long for _, was_long in found] == 3 * [True]
    assert [launch[0].source for launch in launches] == ["hopper.cu"]


def test_the_same_number_by_another_name_is_another_call(gpu):
    values = {name: gpu.array(*shape) for name, shape in SHAPES.items()}
    by_name = {
        name: lambda name=name: cupyattn.attention(**values, **{name: 2.0}) for name in ("softcap", "softmax_scale")
    }
    gpu.of(by_name["softcap"])
    assert gpu.of(by_name["softmax_scale"]) == (gpu.long_way(by_name["softmax_scale"]), True)


def test_refusals_are_the_same_each_time(gpu):
    call = asked_of(gpu, {"softcap": -1.0})
    assert gpu.of(call) == gpu.of(call) == (gpu.long_way(call), True)


def test_only_who_is_allowed_is_asked_again(gpu):
    call = asked_of(gpu, {})
    gpu.of(call)
    with cupyattn.implementations("numpy"):
        (kind, message), _ = gpu.of(call)
    assert kind.__name__ == "NoImplementation"
    assert "no implementation takes this problem" in message


def test_the_stream_is_that_of_the_moment(gpu, driver, launches):
    call = asked_of(gpu, {})
    for pointer in (5, 6, 7):
        driver.stream = pointer
        gpu.of(call)
        assert [launch[-1] for launch in launches] == [pointer]


def test_the_arrays_device_is_made_the_current_one(gpu, monkeypatch):
    currents = []

    @contextlib.contextmanager
    def current(index):
        currents.append(index)
        yield

    monkeypatch.setattr(cuda, "_current", current)
    call = asked_of(gpu, {name: (shape, {"device_id": 1}) for name, shape in SHAPES.items()})
    for _ in range(2):
        gpu.of(call)
    assert currents == [1, 1]


# ---- The caller's memory


def test_results_go_into_the_callers_arrays(gpu):
    for _ in range(3):
        q, k, out, lse = (
            gpu.array(*SHAPE_Q),
            gpu.array(*SHAPE_K),
            gpu.array(*SHAPE_Q),
            gpu.array(2, 4, 40, dtype="float32"),
        )
        found = cupyattn.attention(q, k, k, return_lse=True, out=out, lse_out=lse)
        assert found[0] is out
        assert found[1] is lse


@pytest.mark.parametrize("of", ["q", "k", "lse_out"])
def test_results_that_lie_on_other_arrays_are_refused_as_ever(gpu, of):
    arrays = {"q": gpu.array(*SHAPE_Q, dtype="float32"), "k": gpu.array(*SHAPE_K, dtype="float32")}
    arrays |= {"lse_out": gpu.array(2, 4, 40, dtype="float32")}
    arrays["v"] = gpu.array(*SHAPE_K, dtype="float32")
    options = {"return_lse": True}
    out = gpu.array(*SHAPE_Q, dtype="float32")
    gpu.of(lambda: cupyattn.attention(**arrays, out=out, **options))
    assert not gpu.of(lambda: cupyattn.attention(**arrays, out=out, **options))[1]
    there = gpu.cupy.cuda.MemoryPointer(arrays[of].data.mem, arrays[of].data.ptr - arrays[of].data.mem.ptr)
    over = gpu.cupy.ndarray(SHAPE_Q, "float32", there)
    call = lambda: cupyattn.attention(**arrays, out=over, **options)  # noqa: E731
    (kind, message), _ = found = gpu.of(call)
    assert found == (gpu.long_way(call), True)
    assert kind is ValueError
    assert "shares memory" in message


def test_no_array_is_kept(gpu):
    call_of = lambda: [gpu.array(*SHAPE_Q), gpu.array(*SHAPE_K), gpu.array(*SHAPE_K)]  # noqa: E731
    watched = []
    for _ in range(2):
        arrays = call_of()
        out = cupyattn.attention(*arrays)
        watched += [weakref.ref(x) for x in (*arrays, out)]
        del arrays, out
    gc.collect()
    assert [x() for x in watched] == [None] * 8


def test_one_array_in_two_places_is_no_promise(gpu):
    k = gpu.array(*SHAPE_K)
    gpu.of(lambda: cupyattn.attention(k, k, k))
    q, k, v = (gpu.array(*SHAPE_K) for _ in range(3))
    call = lambda: cupyattn.attention(q, k, v)  # noqa: E731
    found, was_long = gpu.of(call)
    assert not was_long
    assert found == gpu.long_way(call)


def test_calls_that_wait_for_values_wait_each_time(gpu, monkeypatch):
    from cupyattn.arrays.cupy import CuPy

    looked = []
    monkeypatch.setattr(CuPy, "values", lambda self, array: looked.append(array) or np.zeros(array.shape, np.int32))
    q, cache, lengths = gpu.array(2, 1, 2, 64), gpu.array(2, 64, 2, 64), gpu.array(2, dtype="int32")
    for times in (1, 2, 3):
        gpu.of(lambda: cupyattn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, check_indices=True))
        assert len(looked) == times


def test_seeds_are_drawn_each_time(gpu, launches):
    call, seen = asked_of(gpu, {"dropout_p": 0.5}), []
    for _ in range(3):
        gpu.of(call)
        seen.append(launches[0][4])
    assert len(set(seen)) == 3


# ---- What is remembered


def test_so_many_calls_are_remembered_and_the_oldest_go(gpu, monkeypatch):
    monkeypatch.setattr(repeating, "MOST_CALLS", 3)
    calls = [asked_of(gpu, {"softmax_scale": 0.5 + i}) for i in range(4)]
    for call in calls:
        gpu.of(call)
    assert [gpu.of(call)[1] for call in reversed(calls)] == [False, False, False, True]


def test_threads_do_not_mix_their_addresses(gpu, launches):
    """Each launches of its own arrays only, whoever learns and whoever repeats."""
    failures, barrier = [], threading.Barrier(4)

    def work():
        own = [gpu.array(*SHAPE_Q), gpu.array(*SHAPE_K), gpu.array(*SHAPE_K), gpu.array(*SHAPE_Q)]
        barrier.wait()
        for _ in range(200):
            cupyattn.attention(*own[:3], out=own[3], implementation="flash")
        wanted = np.array([x.data.ptr for x in own], np.uint64).tobytes()
        mine = [record for *_, record, _, _ in list(launches) if record[:32] == wanted]
        failures.extend([] if len(mine) == 200 else [len(mine)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []
    assert len(launches) == 800


def test_what_a_call_inside_of_another_came_to_is_not_the_others(gpu, monkeypatch):
    """The allocator may be anybody's, and call us."""
    inner, outer = asked_of(gpu, {"softcap": 3.0}), asked_of(gpu, {})
    real, inside = memory.CuPyMemory.result, []

    def result(self, spec, like):
        if not inside:
            inside.append(True)
            inner()
        return real(self, spec, like)

    monkeypatch.setattr(memory.CuPyMemory, "result", result)
    gpu.of(outer)
    for call in (outer, inner):
        found, was_long = gpu.of(call)
        assert not was_long
        assert found == gpu.long_way(call)
        for each in (outer, inner):
            gpu.of(each)


# ---- torch


@pytest.fixture
def tensors(torch, launches, monkeypatch):
    """q, k and v; `long` has what went the long way."""
    long = []
    for name in ("run", "run_from_cache"):
        real = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *asked, real=real: long.append(real) or real(*asked))
    found = SimpleNamespace(torch=torch, long=long, launches=launches)
    found.three = [torch.randn(shape).half() for shape in (SHAPE_Q, SHAPE_K, SHAPE_K)]

    def went_long(call):
        long.clear()
        call()
        return bool(long)

    def read(call):
        """Whether somebody looked at the arrays of a call, which may be refused."""
        seen = []
        with monkeypatch.context() as patch, contextlib.suppress(NotImplementedError):
            patch.setattr(corridor, "enter", lambda *asked: seen.append(asked) or enter(*asked))
            call()
        return bool(seen)

    found.went_long, found.read = went_long, read
    return found


def test_a_call_of_tensors_is_made_again(tensors):
    call = lambda: cupyattn.attention(*tensors.three, causal=True, alignment="top-left")  # noqa: E731
    assert [tensors.went_long(call) for _ in range(3)] == [True, False, False]
    one, other = (bytearray(launch[4]) for launch in tensors.launches[:2])
    for record in (one, other):  # but where out lies, its map and its address
        record[3 * maps.SIZE : 4 * maps.SIZE + 32] = b""
    assert one == other


@contextlib.contextmanager
def under_autocast(torch):
    """torch.autocast switches itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


AROUND = {
    "autocast": under_autocast,
    "inference mode": lambda torch: torch.inference_mode(),
    "forward mode": lambda torch: torch.autograd.forward_ad.dual_level(),
    "a function mode": lambda torch: torch.device("cpu"),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_what_torch_is_in_the_middle_of_is_noticed(tensors, around):
    call = lambda: cupyattn.attention(*tensors.three)  # noqa: E731
    tensors.went_long(call)
    assert not tensors.went_long(call)
    with around(tensors.torch):
        assert tensors.read(call)
    assert not tensors.went_long(call)


def test_tensors_that_want_gradients_are_noticed(tensors):
    torch, (q, k, v) = tensors.torch, tensors.three
    cupyattn.attention(q, k, v)
    wanting = q.clone().requires_grad_()
    out = cupyattn.attention(wanting, k, v)
    assert out.requires_grad
    with torch.no_grad():
        assert not tensors.went_long(lambda: cupyattn.attention(wanting, k, v))
    assert cupyattn.attention(wanting, k, v).requires_grad


def test_tensors_under_vmap_are_noticed(tensors):
    q, k, v = tensors.three
    call = lambda q: cupyattn.attention(q, k, v)  # noqa: E731
    call(q)
    batched = tensors.torch.func.vmap(call)(q[None].expand(3, *q.shape).contiguous())
    assert batched.shape == (3, *q.shape)


def test_negated_tensors_are_noticed(tensors):
    torch, (q, k, v) = tensors.torch, tensors.three
    negated = torch._neg_view(q)
    cupyattn.attention(q, k, v)
    assert tensors.went_long(lambda: cupyattn.attention(negated, k, v))
    assert tensors.went_long(lambda: cupyattn.attention(negated, k, v))


def test_tensors_whose_memory_is_gone_are_refused_as_ever(tensors):
    q, k, v = tensors.three
    cupyattn.attention(q, k, v)
    q.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="has no memory of its own any more"):
        cupyattn.attention(q, k, v)


def test_overwritten_tensors_say_so(tensors):
    torch, (q, k, v) = tensors.torch, tensors.three
    out = torch.empty_like(q)
    versions = []
    for _ in range(4):
        cupyattn.attention(q, k, v, out=out)
        versions.append(out._version)
    assert np.diff(versions).tolist() == [1, 1, 1]
    assert not tensors.went_long(lambda: cupyattn.attention(q, k, v, out=out))


def test_caches_that_took_tokens_in_say_so(tensors):
    torch = tensors.torch
    q, new, cache = (
        torch.randn(2, 1, 4, 64).half(),
        torch.randn(2, 1, 2, 64).half(),
        torch.zeros(2, 2, 64, 2, 64).half(),
    )
    k_cache, v_cache = cache[0].clone(), cache[1].clone()
    call = lambda: cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=4)  # noqa: E731
    versions = []
    for _ in range(3):
        call()
        versions.append((k_cache._version, v_cache._version))
    assert np.diff(versions, axis=0).tolist() == [[1, 1], [1, 1]]
    assert not tensors.went_long(call)
