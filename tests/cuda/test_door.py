"""The whole way in and out of the GPU's door, on the CPU: torch's and CuPy's arrays in host memory, real launches
under the emulator, and nothing in between but what stands for the driver."""

import ctypes

import emulator
import numpy as np
import pytest
from emulated import encode

import cupyattn
from cupyattn import cuda
from cupyattn.cuda import maps, memory
from cupyattn.problem import NAMED_DEVICES

H100 = NAMED_DEVICES["H100"]


class Driver:
    """What stands for the driver: kernels run under the emulator, on all memory that was ever looked at."""

    def __init__(self):
        self.launches, self.storages = [], {}

    def kernel(self, specialisation, index):
        emulator.require_compiler()
        built = emulator.build(specialisation.source, specialisation.expression, flags=("-O1",))

        def launch(grid, block, arguments, shared_memory, stream):
            (record,) = arguments
            self.launches.append((specialisation, grid))
            built.launch(record, grid, block[0], shared_memory, self.buffers())

        return launch

    def look_at(self, storage):
        self.storages[storage.data_ptr()] = storage

    def buffers(self):
        """(bytes, writable) of each storage, as the emulator wants to know."""
        return [
            (np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(pointer)), True)
            for pointer, storage in self.storages.items()
            if storage.nbytes()
        ]


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(cuda, "kernel", found.kernel)
    monkeypatch.setattr(cuda, "device_of", lambda function, title, array: H100)
    monkeypatch.setattr(cuda, "_device", lambda index: H100)
    monkeypatch.setattr(maps, "encode", encode)
    monkeypatch.setattr(cuda, "_current", lambda index: cuda._NOTHING)
    monkeypatch.setattr(memory.CuPyMemory, "stream", lambda self, index: memory.Stream(0))
    monkeypatch.setattr(memory.TorchMemory, "stream", lambda self, index: memory.Stream(0))
    monkeypatch.setattr(cuda, "_memory", cuda._memory.__wrapped__)  # counters of its own for every test
    return found


@pytest.fixture
def torch(driver, monkeypatch):
    """torch, whose CPU tensors say that they are on a GPU."""
    found = pytest.importorskip("torch")
    from cupyattn.torch_arrays import Torch

    monkeypatch.setattr(Torch, "place", lambda self, array: ("cuda", "cuda:0"))
    for name in ("view", "pointer"):
        real = getattr(memory.TorchMemory, name)

        def looking(self, array, *more, real=real):
            driver.look_at(array.untyped_storage())
            return real(self, array, *more)

        monkeypatch.setattr(memory.TorchMemory, name, looking)
    return found


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
    (launch,) = driver.launches
    assert launch[0].source == f"{kernel}.cu"


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


def test_gradients_are_refused_and_not_lost(torch, driver):
    q = torch.randn(1, 20, 2, 64).half().requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradients on the GPU yet"):
        cupyattn.attention(q, q, q)


@pytest.mark.parametrize(
    "call",
    [
        lambda q: cupyattn.attention_backward(q, q, q, q),
        lambda q: cupyattn.merge_states([q], [q[..., 0].float().transpose(1, 2)]),
    ],
    ids=["attention_backward", "merge_states"],
)
def test_what_has_no_kernel_says_so(torch, driver, call):
    with pytest.raises(NotImplementedError, match="has no CUDA kernel"):
        call(torch.randn(1, 20, 2, 64).half())


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
    (_, grid) = driver.launches[-1]
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
    with pytest.raises(ValueError, match="k_cache was to be overwritten, and is a negated view"):
        cupyattn.flash_attn_with_kvcache(**cache_call(torch, k_cache=negated))


def test_gradients_through_a_cache_are_refused(torch, driver):
    arguments = cache_call(torch)
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="has no gradients"):
        cupyattn.flash_attn_with_kvcache(**arguments)


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
