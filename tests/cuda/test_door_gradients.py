"""Gradients on the whole way through the GPU's door: see `driven`."""

import gc
import weakref

import numpy as np
import pytest
from driven import astray
from emulated import encode

import cupyattn
from cupyattn.cuda.launching import maps

SEED = 11


def operands(torch, dtype="float32", seqlens=(40, 50), heads=(4, 2, 2), batch=2, width=32):
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(batch, seqlens[i > 0], heads[i], width) for i in range(3)]
    return [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]


def exact(dout, *arrays, **options):
    """Gradients by the CPU in float64."""
    given = {name: as_numpy(x) if hasattr(x, "detach") and x.is_floating_point() else x for name, x in options.items()}
    return cupyattn.attention_backward(as_numpy(dout), *map(as_numpy, arrays), **given)


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def assert_close(found, expected, tolerance=2e-5):
    found, expected = as_numpy(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


def differentiated(torch, call, inputs):
    """(gradients of the inputs, the gradient of the output that was sent in)."""
    for x in inputs:
        x.requires_grad_()
    out = call()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(out.dtype)
    return torch.autograd.grad(out, inputs, dout), dout


def test_torch_differentiates_a_call(torch, driver):
    q, k, v = operands(torch)
    found, dout = differentiated(torch, lambda: cupyattn.attention(q, k, v), (q, k, v))
    for gradient, expected in zip(found, exact(dout, q, k, v), strict=False):
        assert_close(gradient, expected)
    names = [what.source for what, _ in driver.launches]
    assert names[1:] == ["backward_rows.cu", "backward.cu", "backward.cu"]


def test_every_operand_has_its_gradient(torch, driver):
    q, k, v = operands(torch)
    more = {
        "bias": torch.randn(4, 1, 50),
        "sinks": torch.randn(4),
        "alibi_slopes": torch.rand(2, 4),
    }
    options = {"causal": True, "alignment": "bottom-right", "softcap": 4.0}
    inputs = (q, k, v, *more.values())
    found, dout = differentiated(torch, lambda: cupyattn.attention(q, k, v, **more, **options), inputs)
    expected = exact(dout, q, k, v, **more, **options)
    for gradient, name in zip(found, ("dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes"), strict=True):
        assert_close(gradient, getattr(expected, name))


def test_lse_is_differentiated_too(torch, driver):
    q, k, v = operands(torch)
    for x in (q, k, v):
        x.requires_grad_()
    _, lse = cupyattn.attention(q, k, v, return_lse=True)
    dlse = torch.randn(lse.shape)
    found = torch.autograd.grad(lse, (q, k, v), dlse, allow_unused=True)
    zero = np.zeros(q.shape)
    expected = cupyattn.attention_backward(zero, *map(as_numpy, (q, k, v)), dlse=as_numpy(dlse))
    for gradient, name in zip(found, ("dq", "dk", "dv"), strict=True):
        assert_close(gradient, getattr(expected, name))


def test_dropout_has_the_weights_of_the_forward(torch, driver):
    q, k, v = operands(torch)
    options = {"dropout_p": 0.3, "dropout_seed": 5}
    found, dout = differentiated(torch, lambda: cupyattn.attention(q, k, v, **options), (q, k, v))
    for gradient, expected in zip(found, exact(dout, q, k, v, **options), strict=False):
        assert_close(gradient, expected)


def test_a_shared_batch_is_summed(torch, driver):
    q, k, v = operands(torch)
    k, v = k[:1].detach(), v[1:].detach()
    found, dout = differentiated(torch, lambda: cupyattn.attention(q, k, v), (q, k, v))
    for gradient, expected in zip(found, exact(dout, q, k, v), strict=False):
        assert_close(gradient, expected)


def test_several_batch_axes(torch, driver):
    q, k, v = (x.transpose(1, 2) for x in operands(torch, batch=6, heads=(2, 2, 2)))
    q, k, v = q.reshape(2, 3, 2, 40, 32), k[None, :3].clone(), v[::3, None].clone()
    bias = torch.randn(2, 1, 1, 40, 1)
    inputs = (q, k, v, bias)
    found, dout = differentiated(torch, lambda: cupyattn.scaled_dot_product_attention(q, k, v, bias), inputs)
    whole = [x.expand(2, 3, *x.shape[2:]).reshape(6, *x.shape[2:]) for x in inputs]
    expected = exact(dout.reshape(6, 2, 40, 32), *whole[:3], bias=whole[3], layout="bhsd")
    for gradient, name in zip(found, ("dq", "dk", "dv", "dbias"), strict=True):
        its = getattr(expected, name)
        its = its.reshape(2, 3, *its.shape[1:])
        axes = tuple(i for i, size in enumerate(gradient.shape) if size == 1)
        assert_close(gradient, its.sum(axis=axes, keepdims=True))


def test_what_no_kernel_can_read_is_copied(torch, driver):
    q, k, v = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in operands(torch))
    found, _ = differentiated(torch, lambda: cupyattn.attention(q, k, v), (q, k, v))
    ones = torch.ones(()).expand(2, 40, 4, 32)
    again = torch.autograd.grad(cupyattn.attention(q, k, v), (q, k, v), ones)
    for gradient, expected in zip(again, exact(ones, q, k, v), strict=False):
        assert_close(gradient, expected)
    assert all(x.shape == y.shape for x, y in zip(found, (q, k, v), strict=True))


def test_sequences_end_to_end(torch, driver):
    q, k, v = (x[0] for x in operands(torch, seqlens=(40, 40)))
    starts = torch.tensor([0, 15, 15, 33], dtype=torch.int32)
    call = lambda: cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, 18, 18, causal=True)  # noqa: E731
    found, dout = differentiated(torch, call, (q, k, v))
    for gradient, whole in zip(found, (q, k, v), strict=True):
        assert not gradient[33:].any()
        assert gradient.shape == whole.shape
    for first, last in ((0, 15), (15, 33)):
        part = slice(first, last)
        expected = exact(dout[None, part], *(x[None, part] for x in (q, k, v)), causal=True)
        for gradient, its in zip(found, expected, strict=False):
            assert_close(gradient[None, part], its)


def test_our_own_gradients(torch, driver):
    q, k, v = operands(torch, seqlens=(40, 40))
    dout = torch.randn_like(q)
    expected = exact(dout, q, k, v, causal=True)
    out, lse = cupyattn.attention(q, k, v, causal=True, return_lse=True)
    for known in ({}, {"out": out, "lse": lse}):
        found = cupyattn.attention_backward(dout, q, k, v, causal=True, **known)
        for gradient, its in zip(found[:3], expected[:3], strict=True):
            assert_close(gradient, its)
        assert found.dbias is None


LIE = {
    "a gradient that rows share": ("dout", lambda x: x[:, :1].expand(x.shape)),
    "keys that batches share": ("k", lambda x: x[:1].expand(x.shape)),
    "values of a batch of one": ("v", lambda x: x[:1]),
    "queries astray": ("q", astray),
}


@pytest.mark.usefixtures("copies_pay")
@pytest.mark.parametrize("which", LIE)
def test_what_no_tensor_map_reads_is_copied_for_gradients_where_that_pays(torch, driver, which):
    q, k, v = operands(torch, "float16", width=64)
    out, lse = cupyattn.attention(q, k, v, return_lse=True)
    given = {"dout": torch.randn_like(q), "q": q, "k": k, "v": v}
    name, change = LIE[which]
    given[name] = change(given[name])
    if name in "kv":
        out, lse = cupyattn.attention(given["q"], given["k"], given["v"], return_lse=True)
    driver.launches.clear()
    found = cupyattn.attention_backward(**given, out=out, lse=lse)
    assert "hopper_backward.cu" in [what.source for what, _ in driver.launches]
    for gradient, expected in zip(found, exact(**given), strict=False):
        if gradient is not None:
            assert_close(gradient, expected, 4e-3)


def test_explain_says_what_is_copied_for_gradients(torch, driver):
    x = torch.zeros(1, 512, 2, 64, dtype=torch.float16)
    plan = cupyattn.explain(x.expand(2, -1, -1, -1), x, x, backward=True)
    assert any(note.startswith("k is copied: no tensor map, a step of k is 0 bytes") for note in plan.notes), plan


def test_gradients_of_nothing_are_zero(torch, driver):
    q, k, v = operands(torch, seqlens=(0, 50))
    found, _ = differentiated(torch, lambda: cupyattn.attention(q, k, v), (q, k, v))
    assert [x.abs().sum().item() for x in found] == [0.0, 0.0, 0.0]


def test_for_keys_without_memory_the_driver_is_given_the_address_of_q(torch, driver, monkeypatch):
    """Their boxes are never asked for, and it makes no tensor map of address 0."""
    told = []
    monkeypatch.setattr(maps, "encode", lambda wanted, address: told.append(address) or encode(wanted, address))
    q, dout = (torch.randn(2, 40, 2, 64).half() for _ in range(2))
    k, v = (torch.empty(2, 0, 2, 64).half() for _ in range(2))
    assert k.data_ptr() == 0
    out, lse = torch.zeros_like(q), torch.full((2, 2, 40), -torch.inf)
    found = cupyattn.attention_backward(dout, q, k, v, out=out, lse=lse)
    assert "hopper_backward.cu" in [what.source for what, _ in driver.launches]
    assert 0 not in told
    assert told.count(q.data_ptr()) > 1
    assert not found.dq.any()
    assert found.dk.shape == k.shape


def test_gradients_come_in_their_own_dtypes(torch, driver):
    q, k, v = operands(torch, "bfloat16")
    bias = torch.randn(4, 40, 50, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.bfloat16)
    inputs = (q, k, v, bias, sinks)
    found, _ = differentiated(torch, lambda: cupyattn.attention(q, k, v, bias=bias, sinks=sinks), inputs)
    assert [x.dtype for x in found] == [x.dtype for x in inputs]


def test_under_torch_func(torch, driver):
    q, k, v = operands(torch)
    dout = torch.randn_like(q)
    found = torch.func.grad(lambda q: (cupyattn.attention(q, k, v) * dout).sum())(q)
    assert_close(found, exact(dout, q, k, v).dq)


def test_a_checkpointed_call(torch, driver):
    q, k, v = operands(torch)
    from torch.utils.checkpoint import checkpoint

    call = lambda: checkpoint(cupyattn.attention, q, k, v, use_reentrant=False)  # noqa: E731
    found, dout = differentiated(torch, call, (q, k, v))
    for gradient, expected in zip(found, exact(dout, q, k, v), strict=False):
        assert_close(gradient, expected)


def test_a_second_derivative_is_refused_in_words(torch, driver):
    q, k, v = operands(torch)
    q.requires_grad_()
    (first,) = torch.autograd.grad(cupyattn.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: has first derivatives only"):
        first.sum().backward()


def test_what_has_no_gradients_says_so_at_the_door(torch, driver):
    q = torch.zeros(1, 20, 2, 64, dtype=torch.float64).requires_grad_()
    with pytest.raises(NotImplementedError, match="has no float64 arithmetic"):
        cupyattn.attention(q, q, q)
    assert driver.launches == []


def test_without_grad_nothing_is_kept(torch, driver):
    q, k, v = operands(torch)
    q.requires_grad_()
    with torch.no_grad():
        out = cupyattn.attention(q, k, v)
    assert out.grad_fn is None


def test_a_graph_keeps_operands_where_torch_can_let_them_go(torch, driver):
    """As checkpointing does: by hooks on what is saved, and nowhere else."""
    q, k, v = (x.requires_grad_() for x in operands(torch))
    inner = k * 1.0
    kept = weakref.ref(inner)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
        out = cupyattn.attention(q, inner, v)
    del inner
    gc.collect()
    assert kept() is None
    assert out.requires_grad


def test_a_backward_pass_launches_what_its_forward_pass_was_allowed(torch, driver):
    q, k, v = (x.requires_grad_() for x in operands(torch, "float16"))
    with cupyattn.implementations("flash"):
        out = cupyattn.attention(q, k, v)
    with cupyattn.implementations("numpy"):
        torch.autograd.grad(out.sum(), (q, k, v))
    names = [what.source for what, _ in driver.launches]
    assert names == ["flash.cu", "backward_rows.cu", "backward.cu", "backward.cu"]
    with cupyattn.implementations("numpy"), pytest.raises(NotImplementedError, match="only numpy may"):
        cupyattn.attention(q, k, v)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_packed_sequences_of_which_less_is_used(torch, driver, dtype):
    q, k, v = operands(torch, dtype)
    used = {"seqused_q": torch.tensor([40, 13]).int(), "seqused_k": torch.tensor([21, 50]).int()}
    with torch.no_grad():
        q[1, 13:], k[0, 21:], v[0, 21:] = torch.nan, torch.nan, torch.inf
    starts = [torch.arange(3).int() * x.shape[1] for x in (q, k)]
    q, k, v = (x.flatten(0, 1).detach().requires_grad_() for x in (q, k, v))
    longest = int(starts[0][1]), int(starts[1][1])
    slopes = torch.rand(2, 4).requires_grad_()
    call = lambda: cupyattn.flash_attn_varlen_func(q, k, v, *starts, *longest, causal=True, alibi_slopes=slopes, **used)  # noqa: E731
    found, dout = differentiated(torch, call, [q, k, v, slopes])
    dense = [x.detach().view(2, -1, *x.shape[1:]) for x in (dout, q, k, v)]
    given = {f"seqlens_{name[-1]}": x.numpy() for name, x in used.items()}
    same = exact(*dense, alibi_slopes=slopes, causal=True, alignment="bottom-right", **given)
    for gradient, name in zip(found, ("q", "k", "v", "alibi_slopes"), strict=True):
        right = getattr(same, f"d{name}")
        assert_close(gradient, right.reshape(gradient.shape), 2e-5 if dtype == "float32" else 6e-3)
    assert not found[1][21 : longest[1]].any()


@pytest.mark.parametrize("more", [{}, {"seqused_q": [3, 1]}], ids=["all rows", "some rows"])
def test_pages_have_none_and_that_is_said_before_anything_is_launched(torch, driver, more):
    q, pages = torch.randn(5, 4, 64).half().requires_grad_(), torch.randn(8, 16, 2, 64).half()
    table, more = torch.arange(8).int().view(2, 4), {name: torch.tensor(x).int() for name, x in more.items()}
    bounds, used = torch.tensor([0, 3, 5]).int(), torch.tensor([50, 7]).int()
    with pytest.raises(NotImplementedError, match="has no gradients of keys in pages or in a cache"):
        cupyattn.flash_attn_varlen_func(q, pages, pages, bounds, None, 3, 64, seqused_k=used, block_table=table, **more)
    assert driver.launches == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sequences_with_lengths_of_their_own(torch, driver, dtype):
    q, k, v = operands(torch, dtype)
    used = [torch.tensor(x, dtype=torch.int32) for x in ((40, 13), (21, 50))]
    with torch.no_grad():
        q[1, 13:], k[0, 21:], v[0, 21:] = torch.nan, torch.nan, torch.nan
    slopes, sinks = torch.rand(2, 4), torch.randn(4)
    given = {"seqlens_q": used[0], "seqlens_k": used[1], "causal": True, "alignment": "bottom-right"}
    inputs = [x.requires_grad_() for x in (q, k, v, slopes, sinks)]

    def call():
        return cupyattn.attention(q, k, v, alibi_slopes=slopes, sinks=sinks, **given)

    found, dout = differentiated(torch, call, inputs)
    on_host = given | {name: x.numpy() for name, x in given.items() if name.startswith("seqlens")}
    same = exact(dout, q, k, v, alibi_slopes=slopes, sinks=sinks, **on_host)
    for gradient, name in zip(found, ("q", "k", "v", "alibi_slopes", "sinks"), strict=True):
        assert_close(gradient, getattr(same, f"d{name}"), 2e-5 if dtype == "float32" else 6e-3)
    assert not found[0][1, 13:].any()
    assert not found[1][0, 21:].any()
