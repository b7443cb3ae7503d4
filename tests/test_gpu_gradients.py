"""Gradients on a GPU: by torch's autograd and by ours, against the CPU's in float64; run by `make gpu`."""

import numpy as np
import pytest
from emulated import operands, options_of, problem_of
from emulated_backward import Result, hold, with_dout

import cupyattn

pytestmark = pytest.mark.gpu

CAUSAL = {"causal": True, "alignment": "bottom-right"}


@pytest.fixture(scope="module")
def torch():
    cupy = pytest.importorskip("cupy")
    found = pytest.importorskip("torch")
    if not (cupy.cuda.is_available() and found.cuda.is_available()):
        pytest.skip("needs an NVIDIA GPU, and CuPy and torch that find it")
    return found


def there(torch, array):
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def back(tensor):
    return tensor.detach().double().cpu().numpy()


def hold_to_the_definition(torch, arrays, **options):
    """By autograd, with its own out and lse; twice, since every run has the same bits."""
    seed = options.pop("dropout_seed", 0)
    dout = there(torch, arrays["dout"])
    inputs = {name: there(torch, x) for name, x in arrays.items() if name != "dout"}
    wanted = [name for name, x in inputs.items() if x.is_floating_point()]
    for name in wanted:
        inputs[name].requires_grad_()
    more = {"dropout_seed": seed} if options.get("dropout_p") else {}
    out, lse = cupyattn.attention(**inputs, **options, **more, return_lse=True)
    grads = torch.autograd.grad(out, [inputs[name] for name in wanted], dout, retain_graph=True)
    again = torch.autograd.grad(out, [inputs[name] for name in wanted], dout)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    given = {name: x for name, x in arrays.items() if name != "dout"}
    problem = problem_of(given, options_of(**options))
    found = {name: back(x) for name, x in zip(wanted, grads, strict=True)}
    hold(arrays, Result(found, problem, None, back(out), back(lse)), seed)


def made(rng, dtype, heads, seqlens, dims, options, more=None):
    arrays = operands(rng, dtype, "bshd", 2, heads, seqlens, dims) | (more or {})
    return with_dout(rng, arrays, options_of(**options))


@pytest.mark.parametrize("options", [{}, CAUSAL, {"window_size": (40, 9), "alignment": "bottom-right"}], ids=str)
@pytest.mark.parametrize("seqlens", [(200, 330), (330, 200), (1, 77), (128, 128)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 40), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_of_torch_tensors(torch, rng, dtype, dims, seqlens, options):
    hold_to_the_definition(torch, made(rng, dtype, (4, 2, 2), seqlens, dims, options), **options)


@pytest.mark.parametrize("heads", [(8, 1, 1), (8, 8, 8), (12, 2, 3)], ids=str)
def test_heads_that_share_keys(torch, rng, heads):
    hold_to_the_definition(torch, made(rng, "bfloat16", heads, (150, 200), (64, 64), CAUSAL), **CAUSAL)


EDITED = {
    "softcap": ({"softcap": 3.0}, lambda rng: {}),
    "negative scale": ({"softmax_scale": -0.3}, lambda rng: {}),
    "dropout": ({"dropout_p": 0.3, "dropout_seed": 7}, lambda rng: {}),
    "sinks": ({}, lambda rng: {"sinks": rng.standard_normal(4).astype("f4")}),
    "slopes": ({"alignment": "bottom-right"}, lambda rng: {"alibi_slopes": rng.random((2, 4)).astype("f4")}),
    "mask": ({}, lambda rng: {"mask": rng.random((2, 1, 90, 110)) < 0.6}),
    **{
        f"bias {shape}": ({}, lambda rng, shape=shape: {"bias": rng.standard_normal(shape).astype("f4")})
        for shape in ((2, 4, 90, 110), (4, 90, 110), (2, 1, 1, 110), (1, 4, 90, 1))
    },
}


@pytest.mark.parametrize("name", EDITED)
def test_gradients_of_edited_scores_sanitizer(torch, rng, name):
    options, more = EDITED[name]
    plain = {key: value for key, value in options.items() if key != "dropout_seed"}
    arrays = made(rng, "float16", (4, 2, 2), (90, 110), (64, 64), plain, more(rng))
    hold_to_the_definition(torch, arrays, **options)


@pytest.mark.parametrize("place", ["hidden", "padding"])
def test_nan_that_nobody_sees_reaches_no_gradient(torch, rng, place):
    q, k, v = (torch.randn((2, 100, 2, 64), device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones((2, 1, 1, 100), device="cuda", dtype=torch.bool)
    mask[:, :, :, 70:] = False
    if place == "hidden":
        k[:, 70:], v[:, 80:] = float("nan"), float("inf")
    for x in (q, k, v):
        x.requires_grad_()
    grads = torch.autograd.grad(cupyattn.attention(q, k, v, mask=mask).float().sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in grads)
    assert not grads[1][:, 70:].any()


def test_sequences_end_to_end(torch, rng):
    lengths = [70, 1, 0, 128]
    starts = torch.tensor([0, 70, 71, 71, 199], device="cuda", dtype=torch.int32)
    q, k, v = (torch.randn((204, 4, 64), device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, 128, 128, causal=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        own = [x[None, part].detach().requires_grad_() for x in (q, k, v)]
        alone = torch.autograd.grad(cupyattn.attention(*own, causal=True), own, dout[None, part])
        for whole, single in zip(grads, alone, strict=True):
            torch.testing.assert_close(whole[part], single[0], rtol=0, atol=0)
        begin += length
    assert not any(bool(x[199:].any()) for x in grads)


def test_gradients_of_cupy_arrays(torch, rng):
    import cupy

    q, k, v, dout = (rng.standard_normal((1, 90, 2, 64)) for _ in range(4))
    expected = cupyattn.attention_backward(dout, q, k, v, causal=True)
    found = cupyattn.attention_backward(*(cupy.asarray(x, "float32") for x in (dout, q, k, v)), causal=True)
    for x, y in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(x.get(), y, atol=5e-5)


def test_in_a_captured_graph(torch):
    q, k, v, dout = (torch.randn((1, 100, 2, 64), device="cuda", dtype=torch.float16) for _ in range(4))
    call = lambda: cupyattn.attention_backward(dout, q, k, v, causal=True)  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        found = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
