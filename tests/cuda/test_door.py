"""The whole way in and out of the GPU's door, on the CPU: torch's and CuPy's arrays in host memory, real launches
under the emulator, and nothing in between but what stands for the driver."""

import ctypes
import gc
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from driven import astray

import cupyattn
from cupyattn import cuda
from cupyattn.cuda import appending, scripting
from cupyattn.cuda.launching import maps, memory
from cupyattn.problem import NAMED_DEVICES

H100 = NAMED_DEVICES["H100"]


def expected(*arrays, **options):
    """The same call on the CPU, in float64."""
    return np.asarray(cupyattn.attention(*[x.double().numpy() for x in arrays], **options))


@pytest.mark.parametrize(
    ("seqlen_q", "device", "kernel"),
    [(1, "H100", "splitkv"), (70, "H100", "hopper"), (70, "A100", "flash")],
    ids=["splitkv", "hopper", "flash"],
)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_call_of_attention(torch, driver, monkeypatch, seqlen_q, device, kernel, layout):
    monkeypatch.setattr(cuda, "device_of", lambda function, title, array: NAMED_DEVICES[device])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 64).half() for n, h in ((seqlen_q, 4), (600, 2), (600, 2)))
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = cupyattn.attention(q, k, v, layout=layout, causal=True, alignment="bottom-right", return_lse=True)
    exact = expected(q, k, v, layout=layout, causal=True, alignment="bottom-right")
    np.testing.assert_allclose(out.numpy(), exact, atol=2e-3)
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (torch.float16, q.shape, torch.float32, (2, 4, seqlen_q))
    sources = [launch[0].source for launch in driver.launches]
    assert sources == [f"{kernel}.cu", *(["merge.cu"] if kernel == "splitkv" else [])]


def test_any_number_of_batch_axes(torch, driver):
    q, k, v = torch.randn(2, 3, 2, 20, 64).half(), torch.randn(3, 2, 30, 64).half(), torch.randn(2, 1, 2, 30, 64).half()
    mask = torch.rand(2, 1, 1, 20, 30) < 0.8
    out = cupyattn.scaled_dot_product_attention(q, k, v, mask)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    np.testing.assert_allclose(out.numpy(), exact.numpy(), atol=2e-3)


def test_no_batch_axis(torch, driver):
    q, k, v = torch.randn(20, 64).half(), torch.randn(30, 64).half(), torch.randn(30, 64).half()
    out = cupyattn.scaled_dot_product_attention(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    np.testing.assert_allclose(out.numpy(), exact.numpy(), atol=2e-3)


def test_operands_without_contiguous_rows_are_copied_and_said_to_be(torch, driver):
    q = torch.randn(1, 20, 2, 128).half()[..., ::2]
    assert "q is copied: its last axis is not contiguous" in cupyattn.explain(q, q, q).notes
    np.testing.assert_allclose(cupyattn.attention(q, q, q).numpy(), expected(q, q, q), atol=2e-3)


def test_rows_off_16_bytes_are_read_one_by_one_and_said_to_be(torch, driver):
    q = torch.randn(1, 20, 2, 65).half()[..., 1:]
    assert any("number by number" in note for note in cupyattn.explain(q, q, q).notes)
    np.testing.assert_allclose(cupyattn.attention(q, q, q).numpy(), expected(q, q, q), atol=2e-3)


MAPLESS = {
    "keys that batches share": ("k", lambda x: x[:1].expand(x.shape)),
    "keys of a batch of one": ("k", lambda x: x[:1]),
    "keys of one head repeated": ("k", lambda x: x[:, :, :1].expand(x.shape)),
    "values off 16 bytes": ("v", astray),
    "rows of values off 16 bytes": ("v", lambda x: x.repeat(1, 1, 1, 2)[..., 4:68]),
    "queries that batches share": ("q", lambda x: x[:1].expand(x.shape)),
}


@pytest.mark.usefixtures("copies_pay")
@pytest.mark.parametrize(("name", "change"), MAPLESS.values(), ids=MAPLESS)
def test_what_no_tensor_map_reads_is_copied_where_that_pays_and_said_to_be(torch, driver, name, change):
    given = {name: torch.randn(2, n, h, 64).half() for name, n, h in (("q", 40, 4), ("k", 50, 2), ("v", 50, 2))}
    given[name] = change(given[name])
    (note,) = cupyattn.explain(**given).notes
    assert note.startswith(f"{name} is copied: no tensor map, ")
    whole = [x.expand(2, *x.shape[1:]) for x in given.values()]
    np.testing.assert_allclose(cupyattn.attention(**given).numpy(), expected(*whole), atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == ["hopper.cu"]


@pytest.mark.usefixtures("copies_pay")
def test_packed_keys_that_no_tensor_map_reads_are_copied_where_that_pays(torch, driver):
    q, k, v = torch.randn(40, 4, 64).half(), astray(torch.randn(40, 2, 64).half()), torch.randn(40, 2, 64).half()
    starts = torch.tensor([0, 15, 40], dtype=torch.int32)
    out = cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, 25, 25)
    for part in (slice(0, 15), slice(15, 40)):
        exact = expected(*(x[None, part] for x in (q, k, v)))
        np.testing.assert_allclose(out[None, part].numpy(), exact, atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == ["hopper.cu"]


@pytest.mark.usefixtures("copies_pay")
@pytest.mark.parametrize("shape", [(2, 30, 64), (1, 30, 64), (30, 64), (1, 2, 30, 64), (1, 1, 2, 30, 64)], ids=str)
def test_keys_of_fewer_batch_axes_are_copied_for_each_batch(torch, driver, shape):
    q, k, v = torch.randn(2, 3, 2, 20, 64).half(), torch.randn(shape).half(), torch.randn(2, 3, 2, 30, 64).half()
    out = cupyattn.scaled_dot_product_attention(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double().expand(v.shape), v.double())
    np.testing.assert_allclose(out.numpy(), exact.numpy(), atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == ["hopper.cu"]


@pytest.mark.usefixtures("copies_pay")
def test_a_call_that_copies_for_tensor_maps_copies_each_time(torch, driver):
    q, k = torch.randn(2, 40, 2, 64).half(), torch.randn(1, 50, 2, 64).half()
    for _ in range(3):
        k.copy_(torch.randn(k.shape))
        exact = expected(q, *[k.expand(2, -1, -1, -1)] * 2)
        np.testing.assert_allclose(cupyattn.attention(q, k, k).numpy(), exact, atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == 3 * ["hopper.cu"]


@pytest.mark.usefixtures("copies_pay")
def test_float8_that_no_tensor_map_reads_is_copied_where_that_pays(torch, driver):
    q, k = (torch.randn(2, n, 2, 64).to(torch.float8_e4m3fn) for n in (70, 90))
    whole = k[:1].repeat(2, 1, 1, 1)
    assert torch.equal(cupyattn.attention(q, k[:1], k[:1]), cupyattn.attention(q, whole, whole))
    assert [launch[0].source for launch in driver.launches] == 2 * ["hopper.cu"]


@pytest.mark.usefixtures("copies_pay")
def test_a_cache_that_no_tensor_map_reads_is_not_copied(torch, driver):
    arguments = {"q": torch.randn(1, 70, 2, 64).half()}
    arguments |= {name: torch.randn(1, 90, 2, 68).half()[..., :64] for name in ("k_cache", "v_cache")}
    exact, *_ = on_the_cpu(arguments)
    np.testing.assert_allclose(cupyattn.flash_attn_with_kvcache(**arguments).numpy(), exact, atol=4e-3)
    assert [launch[0].source for launch in driver.launches] == ["flash.cu"]


def test_slopes_and_sinks_of_any_dtype(torch, driver):
    q = torch.randn(1, 20, 2, 64).half()
    slopes, sinks = torch.rand(2, dtype=torch.float64), torch.randn(2).half()
    out = cupyattn.attention(q, q, q, alibi_slopes=slopes, sinks=sinks)
    exact = expected(q, q, q, alibi_slopes=slopes.numpy(), sinks=sinks.numpy().astype(np.float64))
    np.testing.assert_allclose(out.numpy(), exact, atol=2e-3)


def test_packed_sequences_from_pages(torch, driver):
    q = torch.randn(3, 4, 64).half()
    pages = torch.randn(10, 16, 2, 64).half()
    starts = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    starts_k = torch.tensor([0, 40, 45, 77], dtype=torch.int32)
    table = torch.tensor([[3, 9, 1], [2, 0, 0], [7, 5, 0]], dtype=torch.int32)
    arguments = (q, pages, pages, starts, starts_k, 1, 40)
    out = cupyattn.flash_attn_varlen_func(*arguments, block_table=table)
    exact = cupyattn.flash_attn_varlen_func(
        *[x.double().numpy() if x.is_floating_point() else x.numpy() for x in arguments[:5]],
        1,
        40,
        block_table=table.numpy(),
    )
    np.testing.assert_allclose(out.numpy(), exact, atol=2e-3)


def test_nothing_is_launched_for_nothing(torch, driver):
    q = torch.randn(0, 20, 2, 64).half()
    assert cupyattn.attention(q, q, q).shape == q.shape
    assert driver.launches == []


def test_what_has_no_kernel_says_so(torch, driver):
    q = torch.randn(1, 20, 2, 64).half()
    with pytest.raises(NotImplementedError, match="has no CUDA kernel"):
        cupyattn.merge_states([q], [q[..., 0].float().transpose(1, 2)])


def test_every_objection_is_listed_when_no_kernel_fits(torch, driver):
    q = torch.randn(1, 20, 2, 100, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as caught:
        cupyattn.attention(q, q, q)
    assert all(word in str(caught.value) for word in ("numpy", "flash", "splitkv", "float64", "head_dim"))


def test_cupy_arrays_by_pointer_and_stride(driver):
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    kept = []

    def host_backed(array):
        kept.append(array)
        memory_of = cupy.cuda.UnownedMemory(array.ctypes.data, array.nbytes, array, device_id=0)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory_of, 0), strides=array.strides)

    q = rng.standard_normal((2, 3, 40, 64)).astype(np.float16).swapaxes(1, 2)
    seen = memory.CuPyMemory().view(host_backed(q), "float16")
    assert seen == memory.View(q.ctypes.data, (2, 40, 3, 64), (7680, 64, 2560, 1), "float16")


# ---- What has to be installed


def test_without_cupy_the_door_says_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"attention: .* CuPy cannot be imported: pip install cupyattn"):
        cuda.device_of("attention", "torch.Tensor", None)


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (12040, "CuPy here is for CUDA 13, and the driver for CUDA 12: uninstall it, and pip install"),
        (13010, "finds no NVIDIA driver or GPU"),
        (0, "finds no NVIDIA driver or GPU"),
    ],
)
def test_a_cupy_for_a_newer_cuda_than_the_drivers_is_told_from_a_missing_gpu(monkeypatch, driver, says):
    versions = SimpleNamespace(runtimeGetVersion=lambda: 13020, driverGetVersion=lambda: driver)
    found = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False, runtime=versions))
    monkeypatch.setitem(sys.modules, "cupy", found)
    with pytest.raises(RuntimeError, match=says):
        cuda.device_of("attention", "torch.Tensor", None)


# ---- flash_attn_with_kvcache


def cache_call(torch, pages=False, **changes):
    """Two new tokens for each of three sequences, rotated, over a cache of 64 keys; contiguous or pages of 16."""
    torch.manual_seed(0)
    shape = (14, 16, 2, 64) if pages else (3, 64, 2, 64)
    arguments = {
        "q": torch.randn(3, 2, 4, 64).half(),
        "k_cache": torch.randn(shape).half(),
        "v_cache": torch.randn(shape).half(),
        "k": torch.randn(3, 2, 2, 64).half(),
        "v": torch.randn(3, 2, 2, 64).half(),
        "rotary_cos": torch.randn(64, 16).half(),
        "rotary_sin": torch.randn(64, 16).half(),
        "cache_seqlens": torch.tensor([5, 0, 40], dtype=torch.int32),
        "causal": True,
    }
    if pages:
        table = [[3, 9, 1, 12], [2, 0, 13, 4], [7, 5, 6, 8]]
        arguments["block_table"] = torch.tensor(table, dtype=torch.int32)
    return {name: x for name, x in {**arguments, **changes}.items() if x is not None}


def on_the_cpu(arguments):
    """The same call of NumPy arrays, which are returned with its results."""
    copies = {name: x.clone().numpy() if hasattr(x, "numpy") else x for name, x in arguments.items()}
    return *cupyattn.flash_attn_with_kvcache(**copies, return_softmax_lse=True), copies


CACHES = {
    "contiguous": lambda torch: {},
    "pages": lambda torch: {"pages": True},
    "one length": lambda torch: {"cache_seqlens": 11},
    "all of it": lambda torch: dict.fromkeys(("cache_seqlens", "k", "v", "rotary_cos", "rotary_sin")),
    "elsewhere": lambda torch: {"cache_batch_idx": torch.tensor([2, 0, 1], dtype=torch.int32)},
    "padding": lambda torch: {"cache_leftpad": torch.tensor([3, 0, 17], dtype=torch.int32)},
    "tables of float32": lambda torch: {"rotary_cos": torch.randn(64, 16), "rotary_sin": torch.randn(64, 16)},
    "columns of steps": lambda torch: {"k": torch.randn(3, 2, 2, 128).half()[..., ::2]},
    "packed": lambda torch: {
        "q": torch.randn(6, 4, 64).half(),
        "cu_seqlens_q": torch.tensor([0, 1, 1, 5], dtype=torch.int32),
        "max_seqlen_q": 4,
        "k": torch.randn(5, 2, 64).half(),
        "v": torch.randn(5, 2, 64).half(),
        "cu_seqlens_k_new": torch.tensor([0, 1, 1, 5], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_takes_keys_in_and_is_attended(torch, driver, name):
    arguments = cache_call(torch, **CACHES[name](torch))
    exact, exact_lse, after = on_the_cpu(arguments)
    out, lse = cupyattn.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    np.testing.assert_allclose(out.numpy(), exact, atol=4e-3)
    np.testing.assert_allclose(lse.numpy(), exact_lse, atol=4e-3)
    np.testing.assert_array_equal(arguments["v_cache"].numpy(), after["v_cache"])
    np.testing.assert_allclose(arguments["k_cache"].numpy(), after["k_cache"], rtol=2e-3, atol=1e-6)
    sources = [launch[0].source for launch in driver.launches]
    assert sources == (["append.cu", "splitkv.cu"] if "k" in arguments else ["splitkv.cu"])


def test_nothing_is_written_if_attention_cannot_be_launched(torch, driver, monkeypatch):
    def kernel(specialisation, index):
        if specialisation.source != "append.cu":
            raise RuntimeError("does not compile")
        return driver.kernel(specialisation, index)

    monkeypatch.setattr(cuda, "kernel", kernel)
    arguments = cache_call(torch)
    before = arguments["k_cache"].clone()
    with pytest.raises(RuntimeError, match="does not compile"):
        cupyattn.flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"], before)


def test_q_is_not_rotated_in_place(torch, driver):
    arguments = cache_call(torch)
    before = arguments["q"].clone()
    cupyattn.flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["q"], before)


def test_a_prefill_into_a_cache_is_two_launches(torch, driver):
    arguments = cache_call(torch, q=torch.randn(3, 40, 4, 64).half(), rotary_cos=None, rotary_sin=None)
    exact, _, _ = on_the_cpu(arguments)
    np.testing.assert_allclose(cupyattn.flash_attn_with_kvcache(**arguments).numpy(), exact, atol=4e-3)
    assert [launch[0].source for launch in driver.launches] == ["append.cu", "hopper.cu"]


@pytest.mark.parametrize(("num_splits", "splits"), [(1, 1), (3, 3), (100, 8)])
def test_splits_are_as_many_as_were_asked_or_as_there_are_keys_for(torch, driver, num_splits, splits):
    arguments = cache_call(
        torch,
        k_cache=torch.randn(3, 2048, 2, 64).half(),
        v_cache=torch.randn(3, 2048, 2, 64).half(),
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=torch.tensor([2000, 3, 700], dtype=torch.int32),
    )
    exact, _, _ = on_the_cpu(arguments)
    out = cupyattn.flash_attn_with_kvcache(**arguments, num_splits=num_splits)
    np.testing.assert_allclose(out.numpy(), exact, atol=4e-3)
    (grid,) = (grid for what, grid in driver.launches if what.source == "splitkv.cu")
    assert grid == (splits * 3 * 2, 1, 1)


def test_nobody_waits_for_the_values_of_indices(torch, driver, monkeypatch):
    arguments = cache_call(torch, pages=True)
    for name in ("numpy", "tolist", "item", "cpu", "__bool__", "__array__"):

        def waiting(self, *more, name=name):
            raise AssertionError(f"{name} waits")

        monkeypatch.setattr(torch.Tensor, name, waiting)
    cupyattn.flash_attn_with_kvcache(**arguments)


WRONG = [
    ("63 new keys too many", {}, {"cache_seqlens": [5, 63, 0]}, "sequence 1 would have 65 keys"),
    ("a page of others", {"pages": True}, {"block_table": [[14] * 4] * 3}, "names page 14, and there are 14"),
    ("a place of nobody", {}, {"cache_batch_idx": [0, 1, 3]}, "cache_batch_idx has to be from 0 to 2"),
    ("a position of nothing", {}, {"rotary_seqlens": [0, 63, 0]}, "positions have to be from 0 to 63"),
]


@pytest.mark.parametrize(("how", "indices", "says"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_indices_are_refused_where_that_was_asked_for(torch, driver, how, indices, says):
    wrong = {name: torch.tensor(values, dtype=torch.int32) for name, values in indices.items()}
    arguments = {**cache_call(torch, **how), **wrong}
    before = arguments["v_cache"].clone()
    with pytest.raises(ValueError, match=says):
        cupyattn.flash_attn_with_kvcache(**arguments, check_indices=True)
    assert driver.launches == []
    assert torch.equal(arguments["v_cache"], before)
    cupyattn.flash_attn_with_kvcache(**arguments)


def test_pages_of_keys_that_are_pages_of_values_are_refused_where_that_was_asked_for(torch, driver):
    buffer = torch.randn(40, 16, 2, 64).half()
    views = {"k_cache": buffer[:-1], "v_cache": buffer[1:]}
    table = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    arguments, before = cache_call(torch, **views, block_table=table), buffer.clone()
    with pytest.raises(ValueError, match="k_cache and v_cache share memory"):
        cupyattn.flash_attn_with_kvcache(**arguments, check_indices=True)
    assert driver.launches == []
    assert torch.equal(buffer, before)
    cupyattn.flash_attn_with_kvcache(**{**arguments, "block_table": 2 * table}, check_indices=True)
    assert len(driver.launches) == 2


def test_right_indices_pass_where_they_are_looked_at(torch, driver):
    cupyattn.flash_attn_with_kvcache(**cache_call(torch, pages=True), check_indices=True)
    assert len(driver.launches) == 2


def test_a_cache_is_not_copied(torch, driver):
    arguments = cache_call(torch, k_cache=torch.randn(3, 64, 2, 128).half()[..., ::2])
    with pytest.raises(ValueError, match="k_cache has to be contiguous along its last axis"):
        cupyattn.flash_attn_with_kvcache(**arguments)
    assert driver.launches == []


def test_a_cache_that_is_a_negated_view_is_refused(torch, driver):
    negated = torch._neg_view(torch.zeros(3, 64, 2, 64).half())
    with pytest.raises(ValueError, match="k_cache was to be overwritten, and is negated or zero by a flag"):
        cupyattn.flash_attn_with_kvcache(**cache_call(torch, k_cache=negated))


def test_gradients_through_a_cache_are_refused(torch, driver):
    arguments = cache_call(torch)
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="has no gradients"):
        cupyattn.flash_attn_with_kvcache(**arguments)


def test_a_tensor_that_is_zero_without_memory_is_zeros(torch, driver):
    q, k = torch.randn(2, 70, 4, 64).half(), torch.randn(2, 90, 2, 64).half()
    zeros = torch._efficientzerotensor(q.shape, dtype=q.dtype)
    found = cupyattn.attention(zeros, k, k)
    assert len(driver.launches) == 1
    np.testing.assert_allclose(found.numpy(), expected(torch.zeros_like(q), k, k), atol=2e-3)


# ---- Float8


def in_float8(torch, arguments, batch=3):
    """The call of `cache_call` in float8, with descales that no two heads share."""
    kind = torch.float8_e4m3fn
    found = {name: x.to(kind) if name in ("q", "k_cache", "v_cache", "k", "v") else x for name, x in arguments.items()}
    return found | {f"{name}_descale": torch.rand(batch, 2) + 0.5 for name in "qkv"}


def of_float8_on_the_cpu(torch, arguments):
    """(out, lse, caches) of the same call on the CPU, all but lse as bits; caches are copied first."""
    import ml_dtypes

    def numpy(x):
        if not isinstance(x, torch.Tensor):
            return x
        eight = x.dtype == torch.float8_e4m3fn
        return x.clone().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) if eight else x.clone().numpy()

    copies = {name: numpy(x) for name, x in arguments.items()}
    out, lse = cupyattn.flash_attn_with_kvcache(**copies, return_softmax_lse=True)
    return out.astype(np.float32), lse, [copies[name].view(np.uint8) for name in ("k_cache", "v_cache")]


@pytest.mark.parametrize("rotary", [True, False], ids=["rotated", "as they come"])
def test_a_prefill_of_float8_into_a_cache(torch, driver, rotary):
    tables = {f"rotary_{name}": torch.randn(80, 16) if rotary else None for name in ("cos", "sin")}
    arguments = in_float8(torch, cache_call(torch, q=torch.randn(3, 40, 4, 64), **tables))
    exact, exact_lse, caches = of_float8_on_the_cpu(torch, arguments)
    out, lse = cupyattn.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.float().numpy(), exact, atol=0.1)
    np.testing.assert_allclose(lse.numpy(), exact_lse, atol=0.02)
    for name, after in zip(("k_cache", "v_cache"), caches, strict=True):
        off = arguments[name].view(torch.uint8).numpy() != after
        assert off.mean() <= (0.001 if rotary and name == "k_cache" else 0.0)
    assert [launch[0].source for launch in driver.launches] == ["append.cu", "hopper.cu"]


@pytest.mark.parametrize("device", ["H100", "A100"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_float8_takes_keys_in_and_is_attended(torch, driver, monkeypatch, name, device):
    monkeypatch.setattr(cuda, "device_of", lambda function, title, array: NAMED_DEVICES[device])
    arguments = in_float8(torch, cache_call(torch, **CACHES[name](torch)))
    exact, exact_lse, caches = of_float8_on_the_cpu(torch, arguments)
    out, lse = cupyattn.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.float().numpy(), exact, rtol=2.0**-6, atol=0.05)
    np.testing.assert_allclose(lse.numpy(), exact_lse, atol=0.02)
    for word, after in zip(("k_cache", "v_cache"), caches, strict=True):
        off = arguments[word].view(torch.uint8).numpy() != after
        assert off.mean() <= (0.001 if word == "k_cache" else 0.0)
    sources = [launch[0].source for launch in driver.launches]
    assert sources == (["append.cu", "splitkv.cu"] if "k" in arguments else ["splitkv.cu"])


def test_float8_without_descales_and_with_one_for_all(torch, driver):
    arguments = in_float8(torch, cache_call(torch, pages=True))
    arguments |= {"q_descale": torch.tensor(2.0), "k_descale": torch.tensor([[0.5]]), "v_descale": None}
    exact, _, _ = of_float8_on_the_cpu(torch, arguments)
    np.testing.assert_allclose(cupyattn.flash_attn_with_kvcache(**arguments).float().numpy(), exact, atol=0.05)


def test_a_decode_of_float8_from_packed_pages_without_a_cache(torch, driver):
    q, pages = (torch.randn(*shape).to(torch.float8_e4m3fn) for shape in ((3, 4, 64), (10, 16, 2, 64)))
    starts, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1, 3], [0, 40, 45, 77]))
    table = torch.tensor([[3, 9, 1], [2, 0, 0], [7, 5, 0]], dtype=torch.int32)
    factors = {name: torch.rand(3, 2) + 0.5 for name in ("q_descale", "k_descale", "v_descale")}
    out = cupyattn.flash_attn_varlen_func(q, pages, pages, starts, starts_k, 2, 40, block_table=table, **factors)
    wide = [x.float().numpy().astype(np.float64) for x in (q, pages)]
    for b, (first, last) in enumerate([(0, 1), (1, 1), (1, 3)]):
        keys = wide[1][table[b].numpy()].reshape(1, -1, 2, 64)[:, : starts_k[b + 1] - starts_k[b]]
        by_head = {name: x[b].numpy().astype(np.float64)[:, None] for name, x in factors.items()}
        asked = wide[0][None, first:last] * np.repeat(by_head["q_descale"], 2, axis=0)
        exact = cupyattn.attention(asked, keys * by_head["k_descale"], keys * by_head["v_descale"])
        np.testing.assert_allclose(out[first:last].float().numpy(), exact[0], rtol=2.0**-7, atol=1e-3)
    assert [launch[0].source for launch in driver.launches] == ["splitkv.cu"]


def test_float8_whose_steps_tensor_maps_do_not_take_are_read_by_splitkv_and_said_to_be(torch, driver):
    q, k = torch.randn(1, 70, 2, 64).to(torch.float8_e4m3fn), torch.zeros(1, 90, 2, 72, dtype=torch.float8_e4m3fn)
    k = k[..., :64].copy_(torch.randn(1, 90, 2, 64))
    reason = "splitkv runs instead: no tensor map, the steps of k are not multiples of 16 bytes"
    assert reason in cupyattn.explain(q, k, k).notes
    exact = expected(q.float(), k.float(), k.float())
    np.testing.assert_allclose(cupyattn.attention(q, k, k).float().numpy(), exact, rtol=2.0**-7, atol=1e-3)
    assert [launch[0].source for launch in driver.launches] == ["splitkv.cu"]


def test_float8_caches_of_other_libraries_than_torch_are_refused(torch, driver, monkeypatch):
    monkeypatch.setattr(cuda, "_memory", lambda title: memory.CuPyMemory())
    arguments = in_float8(torch, cache_call(torch, q=torch.randn(3, 40, 4, 64)))
    before = arguments["k_cache"].clone()
    with pytest.raises(
        NotImplementedError, match="flash_attn_with_kvcache: float8 arrays on a CUDA device are taken from"
    ):
        cupyattn.flash_attn_with_kvcache(**arguments)
    assert driver.launches == []
    assert torch.equal(arguments["k_cache"].view(torch.uint8), before.view(torch.uint8))


# ---- Splits of the Hopper kernel


def few_rows(torch):
    """Arguments of a call of 20 queries that see 1100 keys, and the result."""
    q, k, v = torch.randn(1, 20, 4, 64).half(), *torch.randn(2, 1, 1100, 2, 64).half()
    return (q, k, v), expected(q, k, v)


def test_few_rows_behind_many_keys_are_split_and_merged_in_two_launches(torch, driver):
    arguments, exact = few_rows(torch)
    np.testing.assert_allclose(cupyattn.attention(*arguments).numpy(), exact, atol=2e-3)
    (split, grid), (merge, _) = driver.launches
    assert (split.source, merge.source) == ("hopper.cu", "merge.cu")
    assert grid == (2 * cupyattn.explain(*arguments).num_splits, 1, 1) == (4, 1, 1)


def test_splits_of_tiles_are_captured_and_played_again(torch, driver):
    arguments, exact = few_rows(torch)
    with driver.capture() as replay:
        out = cupyattn.attention(*arguments)
    for _ in range(2):
        out.fill_(np.nan)
        replay()
        np.testing.assert_allclose(out.numpy(), exact, atol=2e-3)


def test_nothing_is_launched_unless_the_merge_can_be(torch, driver, monkeypatch):
    real = driver.kernel

    def kernel(specialisation, index):
        if specialisation.source == "merge.cu":
            raise RuntimeError("no compiler")
        return real(specialisation, index)

    monkeypatch.setattr(cuda, "kernel", kernel)
    with pytest.raises(RuntimeError, match="no compiler"):
        cupyattn.attention(*few_rows(torch)[0])
    assert driver.launches == []


# ---- CUDA graphs, and streams that share a number


def split_call(torch, seqlen_k=700):
    """Arguments of a call whose keys are cut into splits, and the result."""
    q, k, v = torch.randn(2, 1, 4, 64).half(), *torch.randn(2, 2, seqlen_k, 2, 64).half()
    return (q, k, v), expected(q, k, v)


def test_a_graph_is_right_whatever_was_played_before_it(torch, driver):
    arguments, exact = split_call(torch)
    with driver.capture() as first:
        one = cupyattn.attention(*arguments)
    with driver.capture() as second:
        other = cupyattn.attention(*arguments)
    for replay, out in ((second, other), (first, one), (second, other)):
        out.fill_(np.nan)
        replay()
        np.testing.assert_allclose(out.numpy(), exact, atol=2e-3)
    assert [what.source for what, _ in driver.launches] == 2 * ["splitkv.cu", "merge.cu"]


def test_a_step_with_a_cache_is_captured_and_played_again(torch, driver):
    torch.manual_seed(0)
    lengths = torch.tensor([2000, 3, 700], dtype=torch.int32)
    changes = {name: torch.randn(3, 2048, 2, 64).half() for name in ("k_cache", "v_cache")}
    arguments = cache_call(torch, **changes, rotary_cos=None, rotary_sin=None, cache_seqlens=lengths)
    with driver.capture() as replay:
        out = cupyattn.flash_attn_with_kvcache(**arguments, num_splits=3)
    for more in (0, 7):
        lengths += more
        exact, _, after = on_the_cpu(arguments)
        replay()
        np.testing.assert_allclose(out.numpy(), exact, atol=4e-3)
        np.testing.assert_array_equal(arguments["v_cache"].numpy(), after["v_cache"])
    assert [what.source for what, _ in driver.launches] == ["append.cu", "schedule.cu", "splitkv.cu", "merge.cu"]


def test_the_legacy_stream_is_not_asked_whether_it_is_captured(monkeypatch):
    """CUDA answers with an error while another stream is being captured."""
    asked = []
    runtime = SimpleNamespace(streamIsCapturing=lambda pointer: asked.append(pointer) or 1)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    found = [memory.CuPyMemory().is_capturing(memory.Stream(pointer)) for pointer in (0, 1, 2, 77)]
    assert found == [False, False, True, True]
    assert asked == [2, 77]


@pytest.fixture
def cupy(driver, monkeypatch):
    """CuPy, whose memory is the host's and which launches nothing; `driver.seen` has what was asked for, and when."""
    found = pytest.importorskip("cupy")
    driver.seen = []

    def taken(whose, num_bytes):
        array, owner = np.empty(num_bytes, np.uint8), type("Owner", (), {})()
        driver.look_at_numpy(array)
        driver.seen.append(whose)
        weakref.finalize(owner, driver.seen.append, f"{whose} again")
        return found.cuda.UnownedMemory(array.ctypes.data, num_bytes, owner, device_id=0)

    monkeypatch.setattr(memory.CuPyMemory, "contiguous", lambda self, array: found.empty(array.shape, array.dtype))
    monkeypatch.setattr(memory.CuPyMemory, "fresh", lambda self, array, shape: found.empty(shape, array.dtype))
    monkeypatch.setattr(found.cuda, "get_current_stream", lambda: "the graph's")
    monkeypatch.setattr(found.cuda, "MemoryAsync", lambda num_bytes, stream: taken(stream, num_bytes))
    for module in (cuda, appending, scripting):
        monkeypatch.setattr(module, "kernel", lambda what, index: lambda *call: driver.seen.append(what.source))
    with found.cuda.using_allocator(lambda num_bytes: found.cuda.MemoryPointer(taken("the pool's", num_bytes), 0)):
        yield found


def test_what_a_captured_launch_of_cupy_needs_for_itself_is_the_graphs_until_it_has_run(cupy, driver):
    q, k = cupy.empty((1, 1, 2, 64), "float16"), cupy.empty((1, 700, 2, 128), "float16")[..., ::2]
    driver.seen.clear()
    with driver.capture():
        out = cupyattn.attention(q, k, k)
    result, *own, launch = driver.seen[:7]
    assert (out.shape, result, launch) == (q.shape, "the pool's", "splitkv.cu")
    assert own == 5 * ["the graph's"]  # two copies, partial_out, partial_lse and told
    assert driver.seen[7:] == ["merge.cu", *5 * ["the graph's again"]]


@pytest.mark.usefixtures("copies_pay")
def test_copies_for_tensor_maps_are_the_graphs_until_it_has_run(cupy, driver, monkeypatch):
    monkeypatch.setattr(maps, "encode", lambda wanted, address: bytes(maps.SIZE))
    q, k = cupy.empty((2, 40, 2, 64), "float16"), cupy.empty((1, 50, 2, 64), "float16")
    driver.seen.clear()
    with driver.capture():
        out = cupyattn.attention(q, k, k)
    assert out.shape == q.shape
    assert driver.seen == ["the pool's", *2 * ["the graph's"], "hopper.cu", *2 * ["the graph's again"]]


def test_what_two_captured_launches_of_cupy_share_is_the_graphs_until_both_have_run(cupy, driver):
    arrays = {
        name: cupy.empty(shape, "float16")
        for name, shape in {"q": (1, 1, 2, 64), "k": (1, 1, 2, 64), "v": (1, 1, 2, 64), "k_cache": (1, 64, 2, 64),
                            "v_cache": (1, 64, 2, 64), "rotary_cos": (64, 16), "rotary_sin": (64, 16)}.items()
    }  # fmt: skip
    driver.seen.clear()
    with driver.capture():
        out = cupyattn.flash_attn_with_kvcache(**arrays, cache_seqlens=9)
    assert out.shape == (1, 1, 2, 64)
    assert driver.seen == ["the pool's", "the graph's", "append.cu", "splitkv.cu", "the graph's again"]


def test_outside_of_a_graph_cupys_pool_gives_all(cupy, driver):
    q, k = cupy.empty((1, 1, 2, 64), "float16"), cupy.empty((1, 700, 2, 64), "float16")
    driver.seen.clear()
    for pieces in (4, 2, 2):  # what is made again takes all but the result in one piece
        cupyattn.attention(q, k, k)
        taken = [*pieces * ["the pool's"], "splitkv.cu", "merge.cu", *pieces * ["the pool's again"]]
        assert driver.seen == taken
        driver.seen.clear()


def test_a_call_of_cupy_made_again_in_a_capture_takes_what_it_needs_from_the_graph(cupy, driver):
    q, k = cupy.empty((1, 1, 2, 64), "float16"), cupy.empty((1, 700, 2, 64), "float16")
    cupyattn.attention(q, k, k)
    driver.seen.clear()
    with driver.capture():
        out = cupyattn.attention(q, k, k)
    assert out.shape == q.shape
    assert driver.seen == ["the pool's", "the graph's", "splitkv.cu", "merge.cu", "the graph's again"]


# ---- JAX, whose CPU arrays say that they are on a GPU


class HostArray:
    """What CuPy makes of an array of JAX."""

    def __init__(self, array):
        self.kept, self.array = array, np.asarray(array)
        self.shape, self.strides, self.itemsize = self.array.shape, self.array.strides, self.array.itemsize
        self.dtype, self.data = self.array.dtype, SimpleNamespace(ptr=self.array.ctypes.data)

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, *, stream, **more):
        assert stream == -1
        raw = (ctypes.c_uint8 * self.array.nbytes).from_address(self.data.ptr)
        raw.kept = self
        return np.frombuffer(raw, self.dtype).reshape(self.shape).__dlpack__(**more)


class Event:
    """An event that passes when it is waited for, or when it is told to."""

    def __init__(self, disable_timing):
        self.done = self.recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded
        self.done = True


@pytest.fixture
def jax(driver, monkeypatch):
    """JAX; `driver.brought` has weak references to what CuPy made of its arrays, `driver.events` the events."""
    found = pytest.importorskip("jax")
    from cupyattn.arrays.jax import Jax

    driver.brought, driver.events, driver.waits = [], [], 0

    def from_dlpack(array):
        made = HostArray(array)
        driver.look_at_numpy(made.array)
        driver.brought.append(weakref.ref(made))
        return made

    def new_event(**options):
        driver.events.append(Event(**options))
        return driver.events[-1]

    def wait():
        driver.waits += 1

    stream = SimpleNamespace(ptr=0, synchronize=wait)
    streams = SimpleNamespace(get_current_stream=lambda: stream, Event=new_event)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=from_dlpack, cuda=streams))
    monkeypatch.setattr(Jax, "place", lambda self, array: ("cuda", "cuda:0"))
    yield found
    cuda._memory("jax.Array").settle()


def call_of_jax(jax):
    """One call with keys of its own, and whether its result is right; nothing of it is kept."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("f2") for shape in ((1, 20, 2, 64), (1, 30, 2, 64), (1, 30, 2, 64))]
    out, lse = cupyattn.attention(*map(jax.numpy.asarray, arrays), return_lse=True)
    assert (type(out), out.dtype, lse.dtype) == (type(jax.numpy.zeros(1)), "float16", "float32")
    exact = cupyattn.attention(*[x.astype("f8") for x in arrays])
    np.testing.assert_allclose(np.asarray(out), exact, atol=2e-3)


def alive(driver):
    gc.collect()
    return sum(made() is not None for made in driver.brought)


def test_arrays_of_jax_are_held_until_an_event_behind_the_kernel_has_passed(jax, driver):
    call_of_jax(jax)
    assert alive(driver) == 5
    call_of_jax(jax)
    assert alive(driver) == 10
    for event in driver.events:
        event.done = True
    call_of_jax(jax)
    assert alive(driver) == 5


def test_results_for_jax_are_memory_of_jax(jax, driver):
    call_of_jax(jax)  # CuPy's `empty`, which would be asked otherwise, is not there
    assert len(driver.brought) == 3 + 2


def test_no_more_calls_of_jax_are_held_than_xla_lets_run_ahead(jax, driver, monkeypatch):
    monkeypatch.setattr(memory, "MOST_UNDER_WAY", 2)
    for _ in range(5):
        call_of_jax(jax)
    assert [event.done for event in driver.events] == [True, True, True, False, False]
    assert alive(driver) == 2 * 5


def test_what_is_held_at_the_end_is_waited_for_and_let_go(jax, driver, monkeypatch):
    at_exit = []
    monkeypatch.setattr(memory.atexit, "register", at_exit.append)
    call_of_jax(jax)
    (settle,) = at_exit
    settle()
    assert alive(driver) == 0
    assert [event.done for event in driver.events] == [True]


def test_arrays_of_jax_are_held_if_a_launch_fails_since_copies_of_them_may_be_under_way(jax, driver, monkeypatch):
    def kernel(*wanted):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(cuda, "kernel", kernel)
    with pytest.raises(RuntimeError, match="does not compile"):
        call_of_jax(jax)
    assert alive(driver) == 5


def test_constants_of_a_function_that_jax_traces(jax, driver):
    q = jax.random.normal(jax.random.key(0), (1, 20, 2, 64), "float16")
    exact = cupyattn.attention(*3 * [np.asarray(q).astype("f8")])
    np.testing.assert_allclose(np.asarray(jax.jit(lambda: cupyattn.attention(q, q, q))()), exact, atol=2e-3)


@pytest.mark.parametrize(("stream", "passed", "waits"), [(5, 5, 0), (-1, -1, 0), (None, -1, 1)])
def test_a_consumer_that_does_not_say_its_stream_is_waited_for(jax, driver, stream, passed, waits):
    asked = []
    given = SimpleNamespace(__dlpack__=lambda **options: asked.append(options), __dlpack_device__=lambda: (2, 3))
    handed = memory._Handed(given)
    handed.__dlpack__(stream=stream, copy=False)
    assert asked == [{"stream": passed, "copy": False}]
    assert driver.waits == waits
    assert handed.__dlpack_device__() == (2, 3)


def test_the_ordinal_of_a_device_is_not_jaxs_number_of_it_among_all_processes():
    devices = SimpleNamespace(id=9, local_hardware_id=1), SimpleNamespace(id=2), SimpleNamespace(index=3), "a sharding"
    arrays = [SimpleNamespace(device=device, __dlpack_device__=lambda: (2, 4)) for device in devices]
    assert [cuda.index_of(array) for array in arrays] == [1, 2, 3, 4]


def test_only_what_is_allowed_is_launched(torch, driver):
    q, k = torch.randn(2, 70, 4, 64).half(), torch.randn(2, 600, 2, 64).half()
    exact = expected(q, k, k)
    for allowed, kernel in (("flash", "flash"), (("hopper", "splitkv"), "hopper")):
        np.testing.assert_allclose(cupyattn.attention(q, k, k, implementation=allowed).numpy(), exact, atol=2e-3)
        assert driver.launches[-1][0].source == f"{kernel}.cu"


def test_where_hopper_alone_is_allowed_nothing_reads_a_cache_in_its_place(torch, driver):
    arguments = {"q": torch.randn(1, 70, 2, 64).half()}
    arguments |= {name: torch.randn(1, 90, 2, 68).half()[..., :64] for name in ("k_cache", "v_cache")}
    with (
        cupyattn.implementations("hopper"),
        pytest.raises(NotImplementedError, match="no implementation takes arrays that lie like these") as caught,
    ):
        cupyattn.flash_attn_with_kvcache(**arguments)
    assert "hopper   has no tensor map, the steps of k are not multiples of 16 bytes" in str(caught.value)
    assert "flash    may not be taken: only hopper may" in str(caught.value)
    assert not driver.launches
    cupyattn.flash_attn_with_kvcache(**arguments)
    assert driver.launches[-1][0].source == "flash.cu"


def test_where_hopper_alone_is_allowed_it_has_copies_of_what_it_cannot_read(torch, driver):
    q, k = torch.randn(1, 70, 2, 64).half(), torch.randn(1, 90, 2, 68).half()[..., :64]
    reason = "no tensor map, the steps of k are not multiples of 16 bytes"
    assert f"flash runs instead: {reason}" in cupyattn.explain(q, k, k).notes
    exact = expected(q, k, k)
    with cupyattn.implementations("hopper"):
        assert f"k is copied: {reason}" in cupyattn.explain(q, k, k).notes
        np.testing.assert_allclose(cupyattn.attention(q, k, k).numpy(), exact, atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == ["hopper.cu"]


def test_pages_that_hopper_alone_may_read_and_can(torch, driver):
    q, pages = torch.randn(70, 4, 64).half(), torch.randn(10, 16, 2, 64).half()
    starts, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 70], [0, 45]))
    table = torch.tensor([[3, 9, 1]], dtype=torch.int32)
    with cupyattn.implementations("hopper"):
        out = cupyattn.flash_attn_varlen_func(q, pages, pages, starts, starts_k, 70, 45, block_table=table)
    keys = pages[table[0].long()].reshape(1, -1, 2, 64)[:, :45]
    np.testing.assert_allclose(out.numpy(), expected(q[None], keys, keys)[0], atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == ["hopper.cu"]


@pytest.mark.parametrize("seqlen_q", [1, 70], ids=["splitkv", "hopper"])
@pytest.mark.parametrize("lies", ["like new", "off 16 bytes", "in strides", "negated"])
def test_results_go_into_the_callers_tensors_by_the_kernel_where_it_can(torch, driver, monkeypatch, seqlen_q, lies):
    from cupyattn.arrays.torch import Torch

    q, k = torch.randn(2, seqlen_q, 4, 64).half(), torch.randn(2, 600, 2, 64).half()
    out, lse = torch.full((2, seqlen_q, 4, 64), 7.0).half(), torch.full((2, 4, seqlen_q), 7.0)
    if lies == "off 16 bytes":
        out = torch.full((out.numel() + 1,), 7.0).half()[1:].view(out.shape)
    if lies == "in strides":
        out = torch.full((2, 4, 64, seqlen_q), 7.0).half().permute(0, 3, 1, 2)
        out = out if seqlen_q > 1 else torch.full((2, 1, 4, 128), 7.0).half()[..., ::2]
    if lies == "negated":
        out = torch._neg_view(out)
    copies, write = [], Torch.write
    monkeypatch.setattr(Torch, "write", lambda self, *given: (copies.append(given[1]), write(self, *given)))
    version = out._version
    found = cupyattn.attention(q, k, k, return_lse=True, out=out, lse_out=lse)
    assert found[0] is out
    assert found[1] is lse
    assert copies == ([] if lies == "like new" else ["out"])
    assert out._version > version
    np.testing.assert_allclose(
        out.numpy() if lies != "negated" else out.resolve_neg().numpy(), expected(q, k, k), atol=2e-3
    )
    np.testing.assert_allclose(lse.numpy(), cupyattn.attention(q, k, k, return_lse=True)[1].numpy())


@pytest.mark.parametrize("from_cache", [False, True])
def test_results_are_of_the_type_that_torchs_own_functions_return(torch, driver, monkeypatch, from_cache):
    from cupyattn.arrays.torch import Torch

    kind, copies = type("Kind", (torch.Tensor,), {}), []
    monkeypatch.setattr(Torch, "write", lambda self, *given: copies.append(given))
    q, k = torch.randn(2, 5, 4, 64).half(), torch.randn(2, 600, 2, 64).half()
    call = cupyattn.flash_attn_with_kvcache if from_cache else cupyattn.attention
    options = {"return_softmax_lse" if from_cache else "return_lse": True}
    for strange in (q.as_subclass(kind), q, q.as_subclass(kind)):  # each as it came, whatever was remembered
        found = call(strange, k, k, **options)
        assert [type(x) for x in found] == [type(strange)] * 2
        np.testing.assert_allclose(found[0].numpy(), expected(q, k, k), atol=2e-3)
    out = torch.zeros(2, 5, 4, 64).half()
    found = call(q.as_subclass(kind), k, k, out=out, **options)
    assert found[0] is out
    assert type(found[1]) is kind
    assert copies == []


def test_results_of_a_cache_go_into_the_callers_tensors(torch, driver):
    cache, x = torch.randn(2, 40, 2, 64).half(), torch.randn(2, 1, 2, 64).half()
    out = torch.empty(2, 1, 2, 64).half()
    exact = cupyattn.flash_attn_with_kvcache(x, cache.clone(), cache.clone(), x, x, cache_seqlens=30)
    found = cupyattn.flash_attn_with_kvcache(x, cache.clone(), cache.clone(), x, x, cache_seqlens=30, out=out)
    assert found is out
    assert torch.equal(out, exact)


def test_tensors_that_share_memory_on_a_gpu_are_refused_by_address(torch, driver):
    buffer = torch.zeros(2, 70, 4, 4, 64).half()
    q, k, v, out = (buffer[:, :, i] for i in range(4))
    cupyattn.attention(q, k, v, out=out)
    launched = len(driver.launches)
    with pytest.raises(ValueError, match="out shares memory with v"):
        cupyattn.attention(q, k, v, out=v)
    assert len(driver.launches) == launched


def test_gradients_into_a_tensor_are_refused_on_a_gpu_too(torch, driver):
    x = torch.randn(1, 70, 2, 64).half().requires_grad_()
    with pytest.raises(ValueError, match="out cannot be differentiated through"):
        cupyattn.attention(x, x, x, out=torch.empty(1, 70, 2, 64).half())
    assert not driver.launches


@pytest.mark.parametrize(
    ("seqlen_q", "dtype", "kernel"),
    [(1, "float16", "splitkv"), (70, "float16", "hopper"), (70, "float32", "flash")],
    ids=["splitkv", "hopper", "flash"],
)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_sequences_have_lengths_of_their_own(torch, driver, seqlen_q, dtype, kernel, layout):
    torch.manual_seed(0)
    used_q, used_k = (seqlen_q, 0, seqlen_q // 2), (130, 200, 0)
    shapes = ((seqlen_q, 4), (200, 2), (200, 2))
    q, k, v = (torch.randn(3, n, h, 64).to(getattr(torch, dtype)) for n, h in shapes)
    for i in range(3):
        q[i, used_q[i] :], k[i, used_k[i] :], v[i, used_k[i] :] = torch.nan, torch.nan, torch.nan
    given = {"seqlens_q": torch.tensor(used_q, dtype=torch.int32), "seqlens_k": torch.tensor(used_k, dtype=torch.int32)}
    options = {"causal": True, "alignment": "bottom-right", "sinks": torch.randn(4)}
    options |= {"layout": layout, "return_lse": True}
    arrays = [x if layout == "bshd" else x.transpose(1, 2) for x in (q, k, v)]
    out, lse = cupyattn.attention(*arrays, **given, **options)
    own = {name: x.double().numpy() if name == "sinks" else x for name, x in options.items()}
    exact = cupyattn.attention(
        *(x.double().numpy() for x in arrays), **{name: x.numpy() for name, x in given.items()}, **own
    )
    np.testing.assert_allclose(out.numpy(), exact[0], atol=2e-3)
    np.testing.assert_allclose(lse.numpy(), exact[1], atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == [f"{kernel}.cu"]
    into = torch.empty(out.shape, dtype=out.dtype)
    assert cupyattn.attention(*arrays, **given, **options, out=into)[0] is into
    assert torch.equal(into, out)


@pytest.fixture
def unhurried(torch):
    """A context in which nothing of torch runs that waits for a GPU, or copies something there, on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Unhurried(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            indexed = str(function).startswith(("aten.index.", "aten.index_put"))
            by_mask = indexed and any(x is not None and x.dtype == torch.bool for x in args[1])
            if by_mask or function.name().partition("::")[2] in ("nonzero", "_local_scalar_dense", "lift_fresh"):
                raise AssertionError(f"{function} waits")
            return function(*args, **(kwargs or {}))

    return Unhurried


def used_pages(torch, rows=(1, 0, 2), dtype="float16"):
    """Rows of three sequences over pages of which so many keys are used; whatever else is in them is nan."""
    torch.manual_seed(0)
    used, table = torch.tensor([40, 7, 0]).int(), torch.tensor([[3, 9, 1], [2, 99, -1], [7, 5, 0]]).int()
    pages = [torch.full((10, 16, 2, 64), torch.nan).to(getattr(torch, dtype)) for _ in "kv"]
    for of_sequence, count in zip(table, used, strict=True):
        for array in pages:
            for place in range(count):
                array[of_sequence[place // 16], place % 16] = torch.randn(2, 64)
    starts = torch.tensor([0, *np.cumsum(rows)]).int()
    q = torch.randn(sum(rows), 4, 64).to(getattr(torch, dtype))
    given = {"cu_seqlens_q": starts, "max_seqlen_q": max(rows), "block_table": table}
    return {"q": q, "k": pages[0], "v": pages[1], **given, "seqused_k": used, "max_seqlen_k": 48}


def on_the_host(arguments):
    """The same call of NumPy arrays, in float64."""
    wide = {name: x.double() if getattr(x, "is_floating_point", bool)() else x for name, x in arguments.items()}
    wide = {name: x.numpy() if hasattr(x, "numpy") else x for name, x in wide.items()}
    return cupyattn.flash_attn_varlen_func(**wide, return_lse=True)


@pytest.mark.parametrize(("rows", "kernel"), [((1, 0, 2), "splitkv"), ((70, 0, 80), "hopper")])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (5, 0), "softcap": 2.0}])
def test_pages_of_which_so_many_keys_are_used(torch, driver, unhurried, rows, kernel, options):
    arguments = used_pages(torch, rows) | options
    exact = on_the_host(arguments)
    with unhurried():
        found = cupyattn.flash_attn_varlen_func(**arguments, return_softmax_lse=True)
    for mine, right in zip(found, exact, strict=True):
        np.testing.assert_allclose(mine.numpy(), right, atol=2e-3)
    assert [launch[0].source for launch in driver.launches] == [f"{kernel}.cu"]
    q, k, v, used, _ = (arguments.pop(name) for name in ("q", "k", "v", "seqused_k", "max_seqlen_k"))
    as_cache = cupyattn.flash_attn_with_kvcache(q, k, v, **arguments, cache_seqlens=used, return_softmax_lse=True)
    assert all(torch.equal(*pair) for pair in zip(found, as_cache, strict=True))


def test_pages_go_into_the_callers_out_and_the_call_is_remembered(torch, driver, monkeypatch):
    arguments = used_pages(torch)
    out = torch.empty(3, 4, 64).half()
    assert cupyattn.flash_attn_varlen_func(**arguments, out=out) is out
    right = out.clone()
    monkeypatch.setattr(cuda, "run", None)  # it is not read again
    out.zero_()
    cupyattn.flash_attn_varlen_func(**arguments, out=out)
    assert torch.equal(out, right)


def test_lengths_of_keys_in_pages_beyond_what_there_is_are_cut_on_a_gpu(torch, driver):
    arguments = used_pages(torch)
    arguments["k"], arguments["v"] = torch.randn(10, 16, 2, 64).half(), torch.randn(10, 16, 2, 64).half()
    exact = on_the_host(arguments | {"seqused_k": torch.tensor([48, 7, 0]).int()})[0]
    arguments["seqused_k"] = torch.tensor([2**31 - 1, 7, -5]).int()
    np.testing.assert_allclose(cupyattn.flash_attn_varlen_func(**arguments).numpy(), exact, atol=2e-3)


@pytest.mark.parametrize(("rows", "kernel"), [((1, 0, 2), "splitkv"), ((70, 0, 80), "hopper")])
@pytest.mark.parametrize("paged", [True, False], ids=["pages", "packed"])
def test_of_packed_sequences_less_is_used(torch, driver, unhurried, rows, kernel, paged):
    arguments = used_pages(torch, rows) | {"causal": True, "alibi_slopes": torch.rand(3, 4)}
    used_q = torch.tensor([rows[0], 0, rows[2] // 2]).int()
    arguments["q"][rows[0] + rows[2] // 2 :] = torch.nan
    if not paged:
        del arguments["block_table"]
        k, v = torch.randn(2, 90, 2, 64).half()
        bounds, used = torch.tensor([0, 45, 60, 90]).int(), arguments["seqused_k"]
        for first, count, end in zip(bounds, used, bounds[1:], strict=False):
            k[first + count : end], v[first + count : end] = torch.nan, torch.inf
        arguments |= {"k": k, "v": v, "cu_seqlens_k": bounds}
    exact = on_the_host(arguments | {"seqused_q": used_q})
    with unhurried():
        found = cupyattn.flash_attn_varlen_func(**arguments, seqused_q=used_q, return_lse=True)
    for mine, right in zip(found, exact, strict=True):
        np.testing.assert_allclose(mine.numpy(), right, atol=2e-3)
    unused = slice(rows[0] + rows[2] // 2, None)
    assert not found[0][unused].any()
    assert (found[1][:, unused] == -torch.inf).all()
    assert [launch[0].source for launch in driver.launches] == [f"{kernel}.cu"]


def test_used_lengths_beyond_packed_sequences_are_cut_on_a_gpu(torch, driver):
    q, k = torch.randn(7, 2, 64).half(), torch.randn(90, 2, 64).half()
    starts = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 50, 90]).int()
    wrong = {"seqused_q": torch.tensor([2**31 - 1, 4]).int(), "seqused_k": torch.tensor([1000, -3]).int()}
    out = cupyattn.flash_attn_varlen_func(q, k, k, *starts, 4, 50, **wrong)
    np.testing.assert_allclose(out[:3].numpy(), expected(q[None, :3], k[None, :50], k[None, :50])[0], atol=2e-3)
    assert not out[3:].any()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_nobody_waits_for_lengths(torch, driver, unhurried, layout):
    q, k, sinks = torch.randn(2, 8, 8, 64).half(), torch.randn(2, 8, 8, 64).half(), torch.randn(8)
    given = {"seqlens_q": torch.tensor([3, 8]).int(), "seqlens_k": torch.tensor([0, 5]).int(), "sinks": sinks}
    with unhurried():
        cupyattn.attention(q, k, k, layout=layout, **given)
    assert driver.launches


def test_lengths_beyond_the_arrays_are_cut_on_a_gpu(torch, driver):
    q, k = torch.randn(2, 70, 2, 64).half(), torch.randn(2, 90, 2, 64).half()
    rows, keys = (torch.tensor(wrong, dtype=torch.int32) for wrong in ([1000, -5], [1000, 3]))
    out = cupyattn.attention(q, k, k, seqlens_q=rows, seqlens_k=keys)
    np.testing.assert_allclose(out[0].numpy(), expected(q[:1], k[:1], k[:1])[0], atol=2e-3)
    assert not out[1].any()
