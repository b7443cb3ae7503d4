"""On a GPU: the kernels against the definition, in CuPy's and torch's hands; run by `make gpu`.

The same cases pass under the emulator; what is new here is the hardware, and the way in and out.
"""

import gc
import itertools
import threading

import numpy as np
import pytest
from emulated import (
    STORED,
    assert_close_lse,
    assert_within_the_bar,
    definition,
    emulation,
    operands,
    options_of,
    paged,
    problem_of,
    ragged_operands,
    ragged_options,
)

import cupyattn

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    found = pytest.importorskip("cupy")
    if not found.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return found


@pytest.fixture(scope="module")
def torch(cupy):
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("needs a torch with CUDA")
    return found


def to_torch(torch, array):
    """A NumPy array on the GPU as torch's, bfloat16 and float8 by their bits."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).cuda().view(torch.float8_e4m3fn)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def from_torch(torch, tensor):
    return tensor.float().cpu().numpy() if tensor.dtype == torch.bfloat16 else tensor.cpu().numpy()


def hold_to_the_definition(arrays, problem, out, lse, block_k, dropout_seed=0):
    exact_out, exact_lse = definition(arrays, problem, dropout_seed)
    assert_close_lse(lse, exact_lse)
    emulated = emulation(arrays, problem, block_k, dropout_seed, tensor_cores=True)
    values = np.abs(np.asarray(arrays["v"]).astype(np.float64))
    largest = values[np.isfinite(values)].max(initial=0.0)
    assert_within_the_bar(out.astype(STORED[problem.dtype]), exact_out, emulated, problem.dtype, largest, 2.0)


SHAPES = [  # batch, seqlen_q, seqlen_k, (heads of q, k, v)
    (2, 113, 203, (4, 2, 2)),
    (1, 256, 256, (2, 2, 2)),
    (1, 1, 1023, (8, 1, 1)),
    (3, 4, 339, (8, 2, 2)),
    (2, 64, 65, (6, 3, 2)),
    (1, 200, 17, (2, 1, 1)),
]
MASKS = [
    {},
    {"causal": True, "alignment": "bottom-right"},
    {"causal": True, "alignment": "top-left"},
    {"window_size": (40, 9), "alignment": "bottom-right"},
]
DIMS = [(64, 64), (128, 128), (40, 40), (96, 96), (192, 128), (256, 256)]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "-".join(map(str, mask.values())) or "full")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_tensors(torch, rng, dtype, dims, shape, mask):
    batch, seqlen_q, seqlen_k, heads = shape
    arrays = operands(rng, dtype, "bshd", batch, heads, (seqlen_q, seqlen_k), dims)
    q, k, v = (to_torch(torch, x) for x in arrays.values())
    out, lse = cupyattn.attention(q, k, v, return_lse=True, **mask)
    assert out.dtype == q.dtype
    assert out.device == q.device
    problem = problem_of(arrays, options_of(**mask))
    tile = cupyattn.explain(q, k, v, **mask).tile
    hold_to_the_definition(arrays, problem, from_torch(torch, out), lse.cpu().numpy(), tile.block_k)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(3, 1), (70, 5), (300, 17)], ids=str)
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_rows_before_the_keys_under_scales_of_any_sign(torch, rng, seqlens, causal, scale):
    arrays = operands(rng, "bfloat16", "bshd", 2, (4, 2, 2), seqlens, (64, 64))
    q, k, v = (to_torch(torch, x) for x in arrays.values())
    options = {"causal": causal, "alignment": "bottom-right", "softmax_scale": scale}
    out, lse = cupyattn.attention(q, k, v, return_lse=True, **options)
    tile = cupyattn.explain(q, k, v, **options).tile
    hold_to_the_definition(
        arrays, problem_of(arrays, options_of(**options)), from_torch(torch, out), lse.cpu().numpy(), tile.block_k
    )


@pytest.mark.parametrize("causal", [False, True])
def test_rows_before_the_keys_of_packed_sequences(torch, rng, causal):
    lengths = ((3, 90, 300), (1, 4, 70))
    arrays = ragged_operands(rng, "bfloat16", *lengths, heads=(4, 2, 2))
    there = [to_torch(torch, arrays[name]) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    longest = [max(x) for x in lengths]
    out, lse = cupyattn.flash_attn_varlen_func(*there, *longest, causal=causal, return_lse=True)
    options = ragged_options(arrays, alignment="bottom-right", window_size=(None, 0 if causal else None))
    hold_to_the_definition(arrays, problem_of(arrays, options), from_torch(torch, out), lse.cpu().numpy(), 64)


EDITS = [
    name for count in (1, 2, 4) for name in itertools.combinations(("mask", "bias", "alibi_slopes", "sinks"), count)
]


@pytest.mark.parametrize("edits", EDITS, ids="-".join)
@pytest.mark.parametrize("seqlen_q", [3, 150])
@pytest.mark.parametrize("more", [{}, {"softcap": 5.0}, {"dropout_p": 0.3}], ids=lambda more: "".join(more) or "plain")
def test_edited_scores_on_cupy(cupy, rng, edits, seqlen_q, more):
    batch, heads, seqlen_k = 2, (4, 2, 2), 170
    arrays = operands(rng, "float16", "bhsd", batch, heads, (seqlen_q, seqlen_k), (64, 64))
    choices = {
        "mask": rng.random((batch, 1, seqlen_q, seqlen_k)) < 0.7,
        "bias": rng.standard_normal((4, 1, seqlen_k)).astype(np.float32),
        "alibi_slopes": rng.random(4).astype(np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
    }
    arrays |= {name: choices[name] for name in edits}
    options = {"causal": True, "alignment": "bottom-right", **more}
    there = {name: cupy.asarray(x) for name, x in arrays.items()}
    seed = {"dropout_seed": 7} if "dropout_p" in more else {}
    out, lse = cupyattn.attention(**there, layout="bhsd", return_lse=True, **options, **seed)
    assert isinstance(out, cupy.ndarray)
    tile = cupyattn.explain(**there, layout="bhsd", **options).tile
    problem = problem_of(arrays, options_of(layout="bhsd", **options))
    hold_to_the_definition(arrays, problem, out.get(), lse.get(), tile.block_k, 7)


@pytest.mark.parametrize("page_size", [None, 1, 16, 48, 256])
@pytest.mark.parametrize("lengths", [((1, 1, 1), (700, 3, 64)), ((5, 0, 130), (5, 40, 130))], ids=["decode", "mixed"])
def test_packed_and_paged_sequences(torch, rng, lengths, page_size):
    arrays = ragged_operands(rng, "bfloat16", *lengths, heads=(4, 2, 2), dims=(64, 64), behind=(2, 3))
    problem = problem_of(arrays, ragged_options(arrays, window_size=(None, 0)))
    given = arrays if page_size is None else paged(rng, arrays, page_size)
    there = {name: to_torch(torch, x) for name, x in given.items()}
    longest = [max(x) for x in lengths]
    out, lse = cupyattn.flash_attn_varlen_func(
        *(there[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")),
        *longest,
        causal=True,
        block_table=there.get("block_table"),
        return_lse=True,
    )
    hold_to_the_definition(arrays, problem, from_torch(torch, out), lse.cpu().numpy(), 64)


def call_of_a_cache(rng, seqlen_q, page_size):
    """Three sequences of a cache and new tokens for each; what is not live is nan."""
    lengths, capacity = np.array([600, 0, 64], np.int32), 768
    caches = np.full((2, 3, capacity, 2, 64), np.nan, np.float16)
    for b, length in enumerate(lengths):
        caches[:, b, :length] = rng.standard_normal((2, length, 2, 64))
    table = rng.permutation(3 * (capacity // (page_size or capacity)) + 5).astype(np.int32)
    if page_size is not None:
        table = table[: 3 * (capacity // page_size)].reshape(3, -1)
        pages = np.full((2, table.max() + 1, page_size, 2, 64), np.nan, np.float16)
        pages[:, table] = caches.reshape(2, 3, -1, page_size, 2, 64)
        caches = pages
    angles = np.arange(capacity)[:, None] * 1000.0 ** (-np.arange(24) / 24)
    return {
        "q": rng.standard_normal((3, seqlen_q, 4, 64)).astype(np.float16),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "k": rng.standard_normal((3, seqlen_q, 2, 64)).astype(np.float16),
        "v": rng.standard_normal((3, seqlen_q, 2, 64)).astype(np.float16),
        "rotary_cos": np.cos(angles).astype(np.float16),
        "rotary_sin": np.sin(angles).astype(np.float16),
        "cache_seqlens": lengths,
        **({} if page_size is None else {"block_table": table}),
    }


@pytest.mark.parametrize("page_size", [None, 1, 16, 48, 256])
@pytest.mark.parametrize("seqlen_q", [1, 5, 130])
@pytest.mark.parametrize("interleaved", [False, True])
def test_caches_take_keys_in_and_are_attended(torch, rng, seqlen_q, page_size, interleaved):
    """On a GPU and on the CPU."""
    arrays = call_of_a_cache(rng, seqlen_q, page_size)
    there = {name: to_torch(torch, x.copy()) for name, x in arrays.items()}
    options = {"causal": True, "rotary_interleaved": interleaved, "return_softmax_lse": True}
    out, lse = cupyattn.flash_attn_with_kvcache(**there, **options)
    exact, exact_lse = cupyattn.flash_attn_with_kvcache(**arrays, **options)
    np.testing.assert_allclose(from_torch(torch, out), exact, atol=5e-3)
    np.testing.assert_allclose(lse.cpu().numpy(), exact_lse, atol=5e-3)
    np.testing.assert_array_equal(from_torch(torch, there["v_cache"]), arrays["v_cache"])
    np.testing.assert_allclose(from_torch(torch, there["k_cache"]), arrays["k_cache"], rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("page_size", [None, 1, 48])
@pytest.mark.parametrize("seqlen_q", [1, 5, 130])
def test_caches_of_float8_take_keys_in_and_are_attended(torch, rng, seqlen_q, page_size):
    """On a GPU and on the CPU; there weights are float16, or float8 in a prefill on Hopper."""
    in_float8 = ("q", "k_cache", "v_cache", "k", "v")
    arrays = {
        name: x.astype(STORED["float8_e4m3fn"]) if name in in_float8 else x
        for name, x in call_of_a_cache(rng, seqlen_q, page_size).items()
    }
    arrays |= {f"{name}_descale": rng.uniform(0.5, 2.0, (3, 2)).astype("f4") for name in "qkv"}
    there = {name: to_torch(torch, x.copy()) for name, x in arrays.items()}
    out, lse = cupyattn.flash_attn_with_kvcache(**there, causal=True, return_softmax_lse=True)
    exact, exact_lse = cupyattn.flash_attn_with_kvcache(**arrays, causal=True, return_softmax_lse=True)
    tolerance = 0.4 if seqlen_q == 130 and page_size != 1 else 0.05
    np.testing.assert_allclose(from_torch(torch, out), exact.astype("f4"), atol=tolerance)
    np.testing.assert_allclose(lse.cpu().numpy(), exact_lse, atol=0.05)
    for name, share in (("k_cache", 0.002), ("v_cache", 0.0)):
        off = there[name].view(torch.uint8).cpu().numpy() != arrays[name].view(np.uint8)
        assert off.mean() <= share


def test_a_step_with_a_cache_is_captured_in_a_graph_and_played_again(torch):
    q, k, v = (torch.randn((2, 1, heads, 128), device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    caches = [torch.randn((2, 4096, 2, 128), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    lengths = torch.tensor([3000, 17], device="cuda", dtype=torch.int32)

    def step(*caches):
        return cupyattn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)

    others = [cache.clone() for cache in caches]
    step(*(cache.clone() for cache in caches))  # compiled before anything is captured, which computes nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*caches)
    for length in (3001, 50):
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(out, step(*others))
        assert torch.equal(caches[0], others[0])


def test_what_is_hidden_may_hold_nan(cupy, rng):
    arrays = operands(rng, "float16", seqlens=(100, 100), heads=(2, 1, 1))
    arrays["k"][:, 60], arrays["v"][:, 60], arrays["v"][:, 70, :, 3] = np.nan, np.nan, np.inf
    there = [cupy.asarray(x) for x in arrays.values()]
    out, lse = cupyattn.attention(*there, causal=True, return_lse=True)
    problem = problem_of(arrays, options_of(causal=True))
    hold_to_the_definition(arrays, problem, out.get(), lse.get(), 64)
    assert np.isfinite(out.get()[:, :60]).all()


def test_large_strides_do_not_wrap(torch):
    if torch.cuda.get_device_properties(0).total_memory < 12e9:
        pytest.skip("needs 12 GB")
    whole = torch.zeros((2, 2**31 // 64 + 8, 1, 64), dtype=torch.float16, device="cuda")  # over 2**31 elements
    last = whole[1:, -8:]
    last.copy_(torch.randn_like(last))
    expected = cupyattn.attention(last.clone(), last.clone(), last.clone())
    assert torch.equal(cupyattn.attention(last, last, last), expected)


@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_the_same_bits_every_time(torch, seqlen_q):
    q = torch.randn((2, seqlen_q, 8, 128), device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn((2, 2, 3000, 2, 128), device="cuda", dtype=torch.bfloat16)
    first = cupyattn.attention(q, k, v)
    assert all(torch.equal(cupyattn.attention(q, k, v), first) for _ in range(100))


def test_fixed_splits_do_not_depend_on_the_batch(torch):
    q = torch.randn((16, 1, 8, 128), device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn((2, 16, 5000, 2, 128), device="cuda", dtype=torch.bfloat16)
    together = cupyattn.attention(q, k, v, fixed_split_size=512)
    alone = cupyattn.attention(q[5:6], k[5:6], v[5:6], fixed_split_size=512)
    assert torch.equal(together[5:6], alone)


def test_work_is_queued_on_the_current_stream_of_cupy(cupy):
    q, k, v = cupy.random.standard_normal((3, 1, 2000, 8, 64), dtype="float32").astype("float16")
    expected = cupyattn.attention(q, k, v)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        late = q * 0
        for _ in range(50):
            late = late + q / 50
        out = cupyattn.attention(late, k, v)
    stream.synchronize()
    cupy.testing.assert_allclose(out, expected, atol=2e-2)


@pytest.mark.parametrize("seqlen_q", [1, 200])
def test_nobody_waits_for_the_gpu(torch, seqlen_q):
    q = torch.randn((1, seqlen_q, 8, 64), device="cuda", dtype=torch.float16)
    k = torch.randn((1, 4000, 8, 64), device="cuda", dtype=torch.float16)
    cupyattn.attention(q, k, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cupyattn.attention(q, k, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seqlen_q", [1, 200])
def test_a_torch_graph_replays(torch, seqlen_q):
    q = torch.randn((2, seqlen_q, 8, 64), device="cuda", dtype=torch.float16)
    k = torch.randn((2, 4000, 2, 64), device="cuda", dtype=torch.float16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cupyattn.attention(q, k, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = cupyattn.attention(q, k, k)
    for _ in range(3):
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, cupyattn.attention(q, k, k))


def test_a_cupy_graph_replays(cupy):
    q, k = (cupy.random.standard_normal((1, n, 8, 64), dtype="float32").astype("float16") for n in (1, 4000))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the arrays are there, which were made on another stream
    with stream:
        cupyattn.attention(q, k, k)
        stream.begin_capture()
        out = cupyattn.attention(q, k, k)
        graph = stream.end_capture()
        for _ in range(3):
            q[...] = cupy.random.standard_normal(q.shape, dtype="float32")
            graph.launch(stream)
            cupy.testing.assert_array_equal(out, cupyattn.attention(q, k, k))
        stream.synchronize()


def captured_by_torch(torch, *call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cupyattn.attention(*call)
    return graph, out


def split_by_torch(torch):
    """The results of two calls whose keys are cut into splits, and a graph of each with its result."""

    def array(seqlen, num_heads):
        return torch.randn((4, seqlen, num_heads, 64), device="cuda", dtype=torch.float16)

    calls = [(array(1, 8), array(4000, 2), array(4000, 2)) for _ in range(2)]
    expected = [cupyattn.attention(*call) for call in calls]
    graphs = [captured_by_torch(torch, *call) for call in calls]
    torch.cuda.synchronize()
    return expected, graphs


def test_a_torch_graph_is_right_whatever_was_played_before_it(torch):
    expected, graphs = split_by_torch(torch)
    for i in (1, 0, 1):
        graph, out = graphs[i]
        out.fill_(np.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected[i])


def test_a_schedule_is_made_once_for_all_layers_of_a_step(torch):
    lengths = torch.tensor([2000, 3, 700, 4000] * 64, device="cuda", dtype=torch.int32)
    q = torch.randn((256, 1, 8, 128), device="cuda", dtype=torch.float16)
    made = cupyattn.get_scheduler_metadata(256, 1, 4096, 8, 2, 128, lengths, torch.float16)
    assert made.numel()
    for _ in range(2):
        k, v = (torch.randn((256, 4096, 2, 128), device="cuda", dtype=torch.float16) for _ in range(2))
        expected = cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
        found = cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, scheduler_metadata=made)
        assert torch.equal(found, expected)
        alone = cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=1)
        assert torch.allclose(found.float(), alone.float(), atol=2e-3)


def test_torch_graphs_are_played_side_by_side(torch):
    expected, graphs = split_by_torch(torch)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for (_, out), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                out.fill_(np.nan)
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, exact) for (_, out), exact in zip(graphs, expected, strict=True))


def test_cupy_graphs_have_memory_of_their_own(cupy):
    """k is copied on the way, so that copies and partial results are all the graph's."""
    calls, graphs, outs = [], [], []
    for _ in range(2):
        q, k = (cupy.random.standard_normal((4, n, 8, 128), dtype="float32").astype("float16") for n in (1, 4000))
        calls.append((cupy.ascontiguousarray(q[..., ::2]), k[..., ::2], k[..., ::2]))
    expected = [cupyattn.attention(*call) for call in calls]
    cupy.cuda.Device().synchronize()
    capturing, *streams = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
    with capturing:
        for call in calls:
            cupyattn.attention(*call)
            capturing.begin_capture()
            outs.append(cupyattn.attention(*call))
            graphs.append(capturing.end_capture())
        others = [cupy.full(calls[0][1].shape, np.nan, "float16") for _ in range(8)]  # what the pool has is given out
        capturing.synchronize()
    assert len(others) == 8
    for order in ((1,), (0, 1), *[(0, 1)] * 50):
        for i in order:
            with streams[i]:
                outs[i].fill(np.nan)
        for i in order:
            graphs[i].launch(streams[i])
        cupy.cuda.Device().synchronize()
        for i in order:
            cupy.testing.assert_array_equal(outs[i], expected[i])


def test_layers_that_share_a_schedule_say_what_each_says_alone(cupy):
    layers, caches = cupyattn.LayeredCache(4, num_pages=128), [cupyattn.PagedCache(128) for _ in range(4)]
    for count in (4000, 1, 1):
        found, expected = [], []
        for layer, cache in enumerate(caches):
            q, k = (cupy.random.standard_normal((1, count, h, 64), dtype="float32").astype("float16") for h in (8, 2))
            layers.update(k, k, layer)
            cache.append(k, k)
            found.append(layers.attend(q[:, -1:], layer))
            expected.append(cache.attend(q[:, -1:]))
        for ours, alone in zip(found, expected, strict=True):
            cupy.testing.assert_array_equal(ours, alone)


def test_two_launches_on_branches_of_one_graph(cupy):
    q, k = (cupy.random.standard_normal((4, n, 8, 64), dtype="float32").astype("float16") for n in (1, 4000))
    expected = cupyattn.attention(q, k, k)
    cupy.cuda.Device().synchronize()
    stem, branch = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with stem:
        stem.begin_capture()
        branch.wait_event(stem.record())
        with branch:
            outs = [cupyattn.attention(q, k, k)]
        outs.append(cupyattn.attention(q, k, k))
        stem.wait_event(branch.record())
        graph = stem.end_capture()
    for _ in range(20):
        for out in outs:
            out.fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch(stem)
        stem.synchronize()
        for out in outs:
            cupy.testing.assert_array_equal(out, expected)


def test_threads_on_their_own_default_streams(cupy):
    q, k = (cupy.random.standard_normal((4, n, 8, 64), dtype="float32").astype("float16") for n in (1, 4000))
    expected = cupyattn.attention(q, k, k)
    cupy.cuda.Device().synchronize()
    wrong = []

    def work():
        with cupy.cuda.Stream.ptds as stream:
            outs = [cupyattn.attention(q, k, k) for _ in range(50)]
            stream.synchronize()
            wrong.extend(i for i, out in enumerate(outs) if not bool((out == expected).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def jax(cupy):
    found = pytest.importorskip("jax")
    if not any(device.platform == "gpu" for device in found.devices()):
        pytest.skip("needs a JAX with CUDA")
    return found


def test_jax_arrays_may_be_let_go_before_the_kernel_has_read_them(cupy, jax, rng):
    x = rng.standard_normal((4, 1000, 8, 64)).astype(np.float16)
    there = cupy.asarray(x)
    expected = cupyattn.attention(there, there, there).get()
    busy = cupy.ones((4096, 4096), "float32")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(5):
            for _ in range(10):
                busy @ busy  # the kernel has to wait behind these
            out = cupyattn.attention(*(jax.numpy.asarray(x) + 0 for _ in range(3)))
            gc.collect()
            others = [jax.numpy.full(x.shape, np.nan, np.float16) for _ in range(8)]
            result = out + 0
            del out
            others += [jax.numpy.full(x.shape, np.nan, np.float16) for _ in range(8)]
            np.testing.assert_array_equal(np.asarray(result), expected)
            assert len(others) == 16


def test_jax_arrays_go_there_and_back(jax, rng):
    x = jax.numpy.asarray(rng.standard_normal((1, 50, 2, 64)).astype(np.float16))
    out = cupyattn.attention(x, x, x)
    assert isinstance(out, jax.Array)
    exact = cupyattn.attention(np.asarray(x), np.asarray(x), np.asarray(x))
    np.testing.assert_allclose(np.asarray(out), exact, atol=2e-3)


def test_a_copy_is_announced(torch):
    q = torch.randn((1, 64, 2, 128), device="cuda", dtype=torch.float16)[..., ::2]
    plan = cupyattn.explain(q, q, q)
    assert "q is copied" in str(plan)
    assert torch.equal(cupyattn.attention(q, q, q), cupyattn.attention(*[q.contiguous()] * 3))


@pytest.mark.parametrize("seqlen_q", [1, 70])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_small_shapes_for_the_sanitizer(cupy, rng, dtype, seqlen_q):
    arrays = operands(rng, dtype, seqlens=(seqlen_q, 700), heads=(4, 2, 2))
    there = [cupy.asarray(x) for x in arrays.values()]
    out, lse = cupyattn.attention(*there, causal=True, alignment="bottom-right", return_lse=True)
    problem = problem_of(arrays, options_of(causal=True, alignment="bottom-right"))
    hold_to_the_definition(arrays, problem, out.get(), lse.get(), 64)


# ---------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------

CACHES = {
    "dynamic": lambda: cupyattn.DynamicCache(),
    "static": lambda: cupyattn.StaticCache(512),
    "sliding": lambda: cupyattn.SlidingWindowCache(512),
    "paged": lambda: cupyattn.PagedCache(num_pages=64, page_size=16),
    "offloaded": lambda: cupyattn.OffloadedCache(),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_caches_say_what_attention_over_all_tokens_says(request, library, make):
    torch = request.getfixturevalue("torch")
    q, k, v = (torch.randn((2, 300, heads, 64), device="cuda", dtype=torch.float16) for heads in (4, 2, 2))
    there = [request.getfixturevalue("cupy").asarray(x) if library == "cupy" else x for x in (q, k, v)]
    cache, stop = make(), 0
    for count in (100, 1, 1, 150, 1, 1, 46):
        start, stop = stop, stop + count
        if start and isinstance(cache, cupyattn.OffloadedCache):
            cache.prefetch()
        cache.append(there[1][:, start:stop], there[2][:, start:stop])
        out = torch.as_tensor(cache.attend(there[0][:, start:stop]), device="cuda")
        expected = cupyattn.attention(q[:, start:stop], k[:, :stop], v[:, :stop], causal=True, alignment="bottom-right")
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


def test_an_offloaded_cache_keeps_nothing_on_the_gpu(torch):
    k = torch.randn((1, 4096, 8, 128), device="cuda", dtype=torch.float16)
    cache = cupyattn.OffloadedCache()
    before = torch.cuda.memory_allocated()
    cache.append(k, k)
    assert torch.cuda.memory_allocated() == before
    cache.attend(k[:, -1:])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_prefetch_beside_other_work_brings_what_was_saved(torch):
    """Many rounds, each with work queued before, between and after, so that a missing wait shows."""
    busy = torch.randn((2048, 2048), device="cuda")
    caches = [cupyattn.OffloadedCache() for _ in range(4)]
    tokens = [torch.randn((1, 500, 2, 64), device="cuda", dtype=torch.float16) for _ in caches]
    for start in (0, *range(400, 500)):
        stop = start + (400 if start == 0 else 1)
        for i, cache in enumerate(caches):
            if start:
                caches[(i + 1) % 4].prefetch()
            busy = torch.tanh(busy @ busy)
            cache.append(tokens[i][:, start:stop], tokens[i][:, start:stop])
            out = cache.attend(tokens[i][:, stop - 1 : stop])
            seen = tokens[i][:, :stop]
            torch.testing.assert_close(out, cupyattn.attention(seen[:, -1:], seen, seen), rtol=2e-3, atol=2e-3)


def test_a_cascade_says_what_attention_over_all_keys_says(torch):
    q, k, v = (
        torch.randn((8, rows, heads, 64), device="cuda", dtype=torch.float16)
        for rows, heads in ((2, 8), (40, 2), (40, 2))
    )
    k_prefix, v_prefix = torch.randn((2, 1000, 2, 64), device="cuda", dtype=torch.float16)
    out, lse = cupyattn.cascade_attention(q, k_prefix, v_prefix, k, v, return_lse=True)
    whole = [torch.cat([x.expand(8, *x.shape), own], 1) for x, own in ((k_prefix, k), (v_prefix, v))]
    expected = cupyattn.attention(q, *whole, causal=True, alignment="bottom-right", return_lse=True)
    torch.testing.assert_close(out, expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
