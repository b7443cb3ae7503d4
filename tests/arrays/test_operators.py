"""Public functions in graphs of torch: compiled, exported, traced, without values; eager calls are in test_arrays."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from homes import needs
from oracle import assert_same_bits

import cupyattn
from cupyattn.arrays.calling import DECLARED
from cupyattn.integrations import onnx

torch = needs("torch")

import cupyattn.integrations.torch  # noqa: E402 - skipped above where torch is missing

# One call of every operator, on operands that are looked up by name -------------------------------------


def attention(q, k, v, mask, bias, slopes, sinks):
    return cupyattn.attention(
        q, k, v, causal=True, alignment="bottom-right", window_size=(5, None), softcap=9.0, mask=mask, bias=bias,
        alibi_slopes=slopes, sinks=sinks, return_lse=True,
    )  # fmt: skip


def attention_alone(q, k, v):
    return cupyattn.attention(q, k, v)


def attention_heads_first(query, key, value):
    return cupyattn.attention(query, key, value, layout="bhsd", compute_dtype="float32", return_lse=True)


def attention_backward(dout, q, k, v, bias, sinks):
    return cupyattn.attention_backward(dout, q, k, v, causal=True, alignment="top-left", bias=bias, sinks=sinks)


def scaled_dot_product_attention(query, key, value, bias):
    return cupyattn.scaled_dot_product_attention(query, key, value, bias, scale=0.3, enable_gqa=True, return_lse=True)


def sdpa_without_heads(rows, keys, values):
    return cupyattn.scaled_dot_product_attention(rows, keys, values, is_causal=True)


def sdpa_without_heads_in_groups(rows, keys, values):
    return cupyattn.scaled_dot_product_attention(rows, keys, values, enable_gqa=True)


def flash_attn_func(q, k, v, slopes):
    return cupyattn.flash_attn_func(
        q, k, v, 0.3, causal=True, alibi_slopes=slopes, return_attn_probs=True, dropout_seed=7
    )


def flash_attn_func_without_dropout(q, k, v):
    return cupyattn.flash_attn_func(q, k, v, return_attn_probs=True)


def flash_attn_qkvpacked_func(qkv, slopes):
    return cupyattn.flash_attn_qkvpacked_func(qkv, window_size=(2, 1), alibi_slopes=slopes, return_lse=True)


def flash_attn_kvpacked_func(q, kv):
    return cupyattn.flash_attn_kvpacked_func(q, kv, softcap=5.0)


def flash_attn_varlen_func(packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k):
    return cupyattn.flash_attn_varlen_func(
        packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, 6, 9, causal=True, return_lse=True
    )


def flash_attn_varlen_func_of_pages(packed_q, pages_k, pages_v, cu_seqlens_q, cu_seqlens_k, block_table):
    return cupyattn.flash_attn_varlen_func(
        packed_q, pages_k, pages_v, cu_seqlens_q, cu_seqlens_k, 6, 9, causal=True, block_table=block_table
    )


def flash_attn_varlen_func_of_used_pages(packed_q, pages_k, pages_v, cu_seqlens_q, used_q, used_k, block_table):
    return cupyattn.flash_attn_varlen_func(
        packed_q, pages_k, pages_v, cu_seqlens_q, max_seqlen_q=6, max_seqlen_k=9, causal=True, block_table=block_table,
        seqused_q=used_q, seqused_k=used_k, return_softmax_lse=True,
    )  # fmt: skip


def flash_attn_varlen_func_of_used_keys(packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, used_k):
    return cupyattn.flash_attn_varlen_func(
        packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, 6, 9, causal=True, seqused_k=used_k, return_lse=True
    )


def flash_attn_varlen_qkvpacked_func(packed_qkv, cu_seqlens_q):
    return cupyattn.flash_attn_varlen_qkvpacked_func(
        packed_qkv, cu_seqlens_q, 6, dropout_p=0.2, return_attn_probs=True, dropout_seed=3
    )


def flash_attn_varlen_kvpacked_func(packed_q, packed_kv, cu_seqlens_q, cu_seqlens_k):
    return cupyattn.flash_attn_varlen_kvpacked_func(packed_q, packed_kv, cu_seqlens_q, cu_seqlens_k, 6, 9)


def merge_states(out_a, lse_a, out_b, lse_b):
    return cupyattn.merge_states([out_a, out_b], [lse_a, lse_b])


def apply_rotary_emb(x, cos, sin, offsets):
    return cupyattn.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)


def apply_rotary_emb_packed(packed_q, cos, sin, cu_seqlens_q):
    return cupyattn.apply_rotary_emb(packed_q, cos, sin, True, seqlen_offsets=2, cu_seqlens=cu_seqlens_q, max_seqlen=6)


def apply_rotary_emb_of_a_pair(x, q, cos, sin):
    return cupyattn.apply_rotary_emb((x, q), cos, sin)


def cascade_attention(q, k_prefix, v_prefix, k, v, sinks):
    return cupyattn.cascade_attention(q, k_prefix, v_prefix, k, v, sinks=sinks, return_lse=True)


def pad_input(packed_q, indices):
    return cupyattn.pad_input(packed_q, indices, 2, 6)


def linear_attention(q, k_new, v_new, decay, beta, state):
    return cupyattn.linear_attention(
        q, k_new, v_new, decay=decay, beta=beta, state=state, rule="gated_delta", return_state=True
    )


def linear_attention_alone(q, k_new, v_new):
    return cupyattn.linear_attention(q, k_new, v_new, chunk_size=4)


def linear_attention_backward(dout, q, k_new, v_new, decay):
    return cupyattn.linear_attention_backward(dout, q, k_new, v_new, decay=decay, rule="gated")


def onnx_attention(query, key, value, past_key, past_value, bias):
    return onnx.attention(query, key, value, bias, past_key, past_value, is_causal=1, qk_matmul_output_mode=3)


def onnx_attention_of_flat_heads(rows_q, rows_kv):
    return onnx.attention(rows_q, rows_kv, rows_kv, is_causal=True, q_num_heads=4, kv_num_heads=2)


def rotary_tables(positions):
    scaling = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    return cupyattn.rotary_tables(positions, 8, scaling=scaling, dtype=torch.bfloat16)


def flash_attn_with_kvcache(q, k_cache, v_cache, k_new, v_new, cos, sin, seqlens):
    return cupyattn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k_new, v_new, cos, sin, seqlens, causal=True, return_softmax_lse=True
    )


def flash_attn_with_kvcache_of_pages(q, pages_k, pages_v, k_new, v_new, block_table):
    return cupyattn.flash_attn_with_kvcache(q, pages_k, pages_v, k_new, v_new, cache_seqlens=1, page_table=block_table)


SMOOTH = [
    *(attention, attention_alone, attention_heads_first, scaled_dot_product_attention),
    *(sdpa_without_heads, sdpa_without_heads_in_groups, flash_attn_func, flash_attn_func_without_dropout),
    *(flash_attn_qkvpacked_func, flash_attn_kvpacked_func, flash_attn_varlen_func, flash_attn_varlen_func_of_pages),
    *(flash_attn_varlen_func_of_used_pages, flash_attn_varlen_func_of_used_keys),
    *(flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func, merge_states, apply_rotary_emb),
    *(apply_rotary_emb_packed, apply_rotary_emb_of_a_pair, cascade_attention, pad_input),
    *(linear_attention, linear_attention_alone, onnx_attention, onnx_attention_of_flat_heads),
]
APPENDING = [flash_attn_with_kvcache, flash_attn_with_kvcache_of_pages]
ROUGH = [attention_backward, linear_attention_backward, rotary_tables]
CALLS = [*SMOOTH, *ROUGH, *APPENDING]
calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
smooth_calls = pytest.mark.parametrize("call", SMOOTH, ids=lambda call: call.__name__)


def operands_of(call, dtype=torch.float32, seed=3, batch=2):
    """The tensors that a call takes, in its order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = draw(12, 3, kind=torch.float64)
    drawn = {
        "q": draw(batch, 6, 4, 8), "k": draw(batch, 7, 2, 8), "v": draw(batch, 7, 2, 8),
        "mask": draw(batch, 1, 6, 7) < 1.0, "bias": draw(4, 6, 7), "slopes": torch.tensor([0.1, 0.2, 0.4, 0.8]),
        "sinks": draw(4, kind=torch.float32), "dout": draw(batch, 6, 4, 8),
        "query": draw(batch, 4, 6, 8), "key": draw(batch, 2, 7, 8), "value": draw(batch, 2, 7, 5),
        "rows": draw(5, 8), "keys": draw(7, 8), "values": draw(7, 3),
        "qkv": draw(batch, 6, 3, 4, 8), "kv": draw(batch, 7, 2, 2, 8),
        "packed_q": draw(9, 4, 8), "packed_k": draw(13, 2, 8), "packed_v": draw(13, 2, 8),
        "packed_qkv": draw(9, 3, 4, 8), "packed_kv": draw(13, 2, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 3, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 9, 13], dtype=torch.int32),
        "used_q": torch.tensor([3, 4], dtype=torch.int32), "used_k": torch.tensor([7, 2], dtype=torch.int32),
        "pages_k": draw(6, 16, 2, 8), "pages_v": draw(6, 16, 2, 8),
        "block_table": torch.tensor([[5, 0, 2], [3, 1, 4]], dtype=torch.int32),
        "out_a": draw(batch, 6, 4, 8), "out_b": draw(batch, 6, 4, 8),
        "lse_a": draw(batch, 4, 6, kind=wide), "lse_b": draw(batch, 4, 6, kind=wide),
        "x": draw(batch, 6, 4, 8), "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype),
        "offsets": torch.tensor([2, 5, 1, 0][:batch], dtype=torch.int32),
        "k_prefix": draw(10, 2, 8), "v_prefix": draw(10, 2, 8),
        "indices": torch.tensor([0, 1, 3, 5, 6, 7, 8, 10, 11]),
        "k_cache": draw(batch, 12, 2, 8), "v_cache": draw(batch, 12, 2, 8),
        "k_new": draw(batch, 6, 2, 8), "v_new": draw(batch, 6, 2, 8),
        "seqlens": torch.tensor([3, 0, 6, 1][:batch], dtype=torch.int32),
        "decay": -draw(batch, 6, 2).abs(), "beta": draw(batch, 6, 2).sigmoid(),
        "state": draw(batch, 2, 8, 8, kind=wide),
        "past_key": draw(batch, 2, 3, 8), "past_value": draw(batch, 2, 3, 5), "positions": torch.arange(10).view(2, 5),
        "rows_q": draw(batch, 6, 32), "rows_kv": draw(batch, 7, 16),
    }  # fmt: skip
    return [drawn[name] for name in inspect.signature(call).parameters]


def copies_of(tensors, grad=False):
    return [x.clone().requires_grad_(grad and x.is_floating_point()) for x in tensors]


def results_of(found):
    """The tensors among what a function returned."""
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert [x is None for x in found] == [x is None for x in expected]
    for a, b in zip(results_of(found), results_of(expected), strict=True):
        assert_same_bits(a, b)


def slopes_of(call, tensors):
    """Gradients of everything that a call returns, and that has one."""
    outs = [x for x in results_of(call(*tensors)) if x.requires_grad]
    smooth = [x for x in tensors if x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in outs]
    return torch.autograd.grad(outs, smooth, weights)


def operator_of(call):
    """The operator of the function that a call is of: the longest name that its own begins with."""
    names = {"sdpa_without_heads": "scaled_dot_product_attention"}
    title = next((full for short, full in names.items() if call.__name__.startswith(short)), call.__name__)
    found = max((name for name in DECLARED if title.startswith(name)), key=len)
    return getattr(torch.ops.cupyattn, found).default


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def qkv(*shape, grad=False):
    return [
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad) for seed in (1, 2, 3)
    ]


# torch.compile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", [*ROUGH, *APPENDING], ids=lambda call: call.__name__)
def test_a_compiled_call_is_one_graph_and_gives_and_overwrites_the_same_bits(call, backend):
    here, there = (operands_of(call) for _ in range(2))
    assert_same(compiled(call, backend)(*here), call(*there))
    for a, b in zip(here, there, strict=True):  # caches, too
        assert_same_bits(a, b)


WITH_BACKENDS = [*((call, "aot_eager") for call in SMOOTH), *((call, "eager") for call in (attention, merge_states))]


@pytest.mark.parametrize(("call", "backend"), WITH_BACKENDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_compiled_call_is_one_graph_and_gives_the_same_bits_and_gradients(call, backend):
    there, here = (copies_of(operands_of(call), grad=True) for _ in range(2))
    graph = compiled(call, backend)
    assert_same(graph(*here), call(*there))
    for a, b in zip(slopes_of(graph, here), slopes_of(call, there), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("call", [attention, scaled_dot_product_attention], ids=lambda call: call.__name__)
def test_results_that_were_not_rounded_are_kept_for_gradients_and_give_the_same(call, monkeypatch):
    from cupyattn import cpu

    there, here = (copies_of(operands_of(call, torch.float64), grad=True) for _ in range(2))
    expected, graph = slopes_of(call, there), compiled(call)
    out = results_of(graph(*here))
    monkeypatch.setattr(cpu, "run", None)  # no forward pass is computed again
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape) for x in out]
    for a, b in zip(torch.autograd.grad(out, [x for x in here if x.requires_grad], weights), expected, strict=True):
        assert_same_bits(a, b)


def varlen(q, k, v, starts, longest):
    return cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)


def test_one_graph_serves_all_sizes():
    from torch._dynamo.testing import CompileCounterWithBackend

    counted = [CompileCounterWithBackend("aot_eager") for _ in range(2)]
    dense, packed = (compiled(f, c, dynamic=True) for f, c in zip((attention_alone, varlen), counted, strict=True))
    for batch, seqlen in ((2, 6), (3, 9), (4, 13)):
        q, k, v = qkv(batch, seqlen, 4, 8)
        assert_same_bits(dense(q, k, v), attention_alone(q, k, v))
        starts = torch.arange(batch + 1, dtype=torch.int32) * seqlen
        rows = [x.flatten(0, 1) for x in (q, k, v)]
        assert_same_bits(packed(*rows, starts, seqlen), varlen(*rows, starts, seqlen))
    assert [counter.frame_count for counter in counted] == [1, 1]


def test_a_size_that_depends_on_values_is_one():
    def kept(x, mask):
        rows = x[mask][None]
        return cupyattn.attention(rows, rows, rows)

    x, mask = qkv(9, 4, 8)[0], torch.arange(9) % 3 > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same_bits(compiled(kept)(x, mask), kept(x, mask))


UNPADDED = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])


def over_tokens_alone(x, mask):
    rows, indices, starts, longest, _ = cupyattn.unpad_input(x, mask)
    out = cupyattn.flash_attn_varlen_func(rows, rows, rows, starts, starts, longest, longest, causal=True)
    return cupyattn.pad_input(out, indices, *x.shape[:2])


def test_a_graph_without_padding_is_one_with_sizes_that_depend_on_a_mask():
    here, there = (x.requires_grad_() for x in (qkv(2, 6, 4, 8)[0], qkv(2, 6, 4, 8)[0]))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = compiled(over_tokens_alone)
        for mask in (UNPADDED, UNPADDED.flip(0), torch.ones(2, 6, dtype=torch.bool)):
            found, expected = graph(here, mask), over_tokens_alone(there, mask)
            assert_same_bits(found, expected)
            slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in ((found, here), (expected, there))]
            assert_same_bits(*slopes)


def test_compiled_unpadding_gives_what_it_always_gives():
    x, unused = qkv(2, 6, 4, 8)[0], UNPADDED.flip(1)
    expected = cupyattn.unpad_input(x, UNPADDED, unused)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = compiled(cupyattn.unpad_input)(x, UNPADDED, unused)
    assert [type(y) for y in found] == [type(y) for y in expected]
    assert found[3] == expected[3] == 6
    for i in (0, 1, 2, 4):
        assert_same_bits(found[i], expected[i])


def test_unpadding_keeps_the_rules_of_operators():
    x = qkv(2, 6, 4, 8)[0].requires_grad_()
    torch.library.opcheck(torch.ops.cupyattn.unpad_input.default, (x, UNPADDED))


def test_a_mask_without_values_is_refused_in_our_words():
    with pytest.raises(TypeError, match="unpad_input: needs the values of attention_mask"):
        cupyattn.unpad_input(qkv(2, 6, 4, 8)[0].to("meta"), UNPADDED.to("meta"))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_compiled_tables_of_a_number_of_tokens_are_numpys_and_rotate(dtype):
    kind = getattr(torch, dtype)

    def rotated(x):
        cos, sin = cupyattn.rotary_tables(6, 8, dtype=dtype)
        return cupyattn.apply_rotary_emb(x, cos, sin), cos

    x = qkv(2, 6, 4, 8)[0].to(kind)
    found, cos = compiled(rotated)(x)
    positions = torch.arange(6)
    assert_same_bits(found, cupyattn.apply_rotary_emb(x, *cupyattn.rotary_tables(positions, 8, dtype=dtype)))
    assert isinstance(cos, np.ndarray) == (dtype == "float64")


def test_a_compiled_call_knows_of_autocast_and_so_do_its_gradients():
    q, k, v = qkv(2, 6, 4, 8, grad=True)
    graph, found = compiled(attention_alone), []
    for function in (attention_alone, graph):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(q, k, v)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    assert found[0][0].dtype == torch.bfloat16
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.cupyattn.attention(q, k, v)[0].dtype == torch.bfloat16
        dout = out.detach().float()
        expected = cupyattn.attention_backward(dout, q, k, v)
        assert_same(compiled(cupyattn.attention_backward)(dout, q, k, v), expected)


def test_a_graph_is_made_without_a_look_at_all_modules_that_are_imported():
    torch.compiler.reset()
    guards = torch._dynamo.explain(attention_alone)(*qkv(2, 6, 4, 8)).out_guards
    assert guards
    assert not [guard.name for guard in guards if "sys.modules" in guard.name]


def test_a_compiled_call_of_onnx_leaves_the_past_as_it_is_under_autocast():
    tensors, graph = operands_of(onnx_attention), compiled(onnx_attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = graph(*tensors), onnx_attention(*tensors)
    assert (found.Y.dtype, found.present_key.dtype) == (torch.bfloat16, torch.float32)
    assert_same(found, expected)


@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad"])
def test_torch_funs_transforms_are_compiled(transform):
    q, k, v = qkv(3, 2, 5, 4, 8)
    slope = torch.func.grad(lambda q, k, v: cupyattn.attention(q, k, v).square().sum(), argnums=(0, 1))
    function, operands = {
        "vmap": (torch.vmap(cupyattn.attention, in_dims=(0, None, 0)), (q, k[0], v)),
        "grad": (slope, (q[0], k[0], v[0])),
        "vmap of grad": (torch.vmap(slope), (q, k, v)),
    }[transform]
    for a, b in zip(results_of(compiled(function)(*operands)), results_of(function(*operands)), strict=True):
        assert_same_bits(a, b)


def test_compiled_dropout_is_drawn_anew_as_the_seed_of_torch_says():
    def dropped(q):
        return cupyattn.flash_attn_func(q, q, q, 0.5)

    q, graph = qkv(2, 6, 4, 8)[0], compiled(dropped)
    found = []
    for function in (dropped, graph, graph):
        if len(found) < 2:
            torch.manual_seed(7)
        found.append(function(q))
    assert_same_bits(found[1], found[0])
    assert not torch.equal(found[2], found[1])


def test_a_compiled_call_writes_where_it_was_asked_to():
    def both(q, k, v, out, lse_out):
        return cupyattn.attention(q, k, v, return_lse=True, out=out, lse_out=lse_out)

    q, k, v = qkv(2, 6, 4, 8)
    out, lse_out = torch.empty(2, 6, 4, 8), torch.empty(2, 4, 6)
    assert compiled(both)(q, k, v, out, lse_out)[0] is out
    expected = cupyattn.attention(q, k, v, return_lse=True)
    assert_same((out, lse_out), expected)
    with pytest.raises(Exception, match=r"out has to have the shape \(2, 6, 4, 8\)"):
        torch.compile(both, backend="eager")(q, k, v, out[:1], lse_out)


def test_a_compiled_rotation_may_be_in_place():
    x, cos, sin, _ = operands_of(apply_rotary_emb)
    expected = cupyattn.apply_rotary_emb(x, cos, sin)
    assert compiled(lambda x: cupyattn.apply_rotary_emb(x, cos, sin, inplace=True))(x) is x
    assert_same_bits(x, expected)


@pytest.mark.parametrize("lengths", [int, lambda n: torch.full((2,), n, dtype=torch.int32)], ids=["int", "tensor"])
def test_a_compiled_step_decodes_over_a_cache(lengths):
    def step(q, k_cache, v_cache, k, v, seqlens):
        return cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True)

    graph, caches = compiled(step), torch.zeros(2, 2, 2, 16, 2, 8)  # both of a pair are views of one array
    for n in range(5):
        q, k, v = (torch.randn(2, 1, heads, 8) for heads in (4, 2, 2))
        found, expected = (f(q, *pair, k, v, lengths(n)) for f, pair in zip((graph, step), caches, strict=True))
        assert_same_bits(found, expected)
    assert_same_bits(*caches)
    assert caches.count_nonzero() > 0


CACHES = {
    "dynamic": cupyattn.DynamicCache,
    "static": lambda: cupyattn.StaticCache(16),
    "paged": lambda: cupyattn.PagedCache(8, 4),
}


def decoded(cache, step):
    generator = torch.Generator().manual_seed(5)
    return [step(cache, *(torch.randn(2, 1, heads, 8, generator=generator) for heads in (4, 2, 2))) for _ in range(3)]


def appended_and_attended(cache, q, k, v):
    cache.append(k * 2, v * 2)
    return cache.attend(q * 2) + 1


@pytest.mark.parametrize("name", CACHES)
def test_a_compiled_step_calls_a_cache_between_its_graphs(name):
    graph = torch.compile(appended_and_attended, backend="eager")
    found, expected = (decoded(CACHES[name](), step) for step in (graph, appended_and_attended))
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def test_one_graph_with_a_cache_is_refused_and_says_what_to_do():
    with pytest.raises(Exception, match="In one graph flash_attn_with_kvcache takes the same steps"):
        decoded(cupyattn.DynamicCache(), compiled(appended_and_attended, "eager"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_no_operator_takes_is_called_between_two_graphs():
    """As all calls were before there were operators: NumPy's arrays, numbers in tensors, masks that are no tensors."""
    from torch.nn.attention.bias import causal_lower_right

    q = qkv(2, 6, 4, 8)[0]
    mask, scale = np.tri(6, dtype=bool), torch.tensor(0.5)
    for function, operand in (
        (lambda q: cupyattn.attention(q, q, q, mask=mask, softmax_scale=scale), q),
        (lambda q: cupyattn.scaled_dot_product_attention(q, q, q, causal_lower_right(4, 4)), q),
        (lambda q: cupyattn.attention(q, q, q), q.numpy()),
    ):
        found, expected = torch.compile(function, backend="eager")(operand), function(operand)
        assert type(found) is type(expected)
        assert_same_bits(found, expected)


# Operators -------------------------------------------------------------------------------------------------


def test_every_public_function_of_arrays_is_an_operator():
    own = {"attention", "attention_backward", "merge_states", "scaled_dot_product_attention", "cascade_attention"}
    own |= {"linear_attention", "linear_attention_backward", "onnx_attention"}
    helpers = {"apply_rotary_emb", "pad_input", "unpad_input", "rotary_tables"}
    flash = {name for name in cupyattn.__all__ if name.startswith("flash_attn_")}
    assert DECLARED.keys() == own | helpers | flash


def arguments_of(call):
    """The operator of a call, and what it hands to it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    operator, tensors = operator_of(call), operands_of(call)
    graph = make_fx(call)(*copies_of(tensors)).graph
    (node,) = (node for node in graph.nodes if node.target is operator)
    known = dict(zip((node for node in graph.nodes if node.op == "placeholder"), tensors, strict=True))

    def found(argument):
        if argument not in known and argument.target is torch.ops.aten.select.int:
            known[argument] = found(argument.args[0]).select(*argument.args[1:])
        return known[argument].clone().requires_grad_(call in SMOOTH and known[argument].is_floating_point())

    return operator, torch.fx.node.map_arg(node.args, found), node.kwargs


ONE_EACH = {operator_of(call): call for call in CALLS}


@pytest.mark.parametrize("call", ONE_EACH.values(), ids=lambda call: call.__name__)
def test_an_operator_keeps_the_rules_of_operators(call):
    operator, args, kwargs = arguments_of(call)
    torch.library.opcheck(operator, args, kwargs)


@calls
def test_tensors_without_values_give_such_of_the_same_shapes(call):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = operands_of(call)
    expected = results_of(call(*copies_of(tensors)))
    with FakeTensorMode() as mode:
        fake = call(*map(mode.from_tensor, tensors))
    for found in (results_of(fake), results_of(call(*(x.to("meta") for x in tensors)))):
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.contiguous().stride())


def test_what_shapes_rule_out_is_refused_in_our_words_before_there_are_values():
    q, k, v = qkv(2, 6, 4, 8)
    rule = "attention: q and k have different head_dim"
    for way in (
        lambda q, k: cupyattn.attention(q.to("meta"), k.to("meta"), k.to("meta")),
        compiled(lambda q, k: cupyattn.attention(q, k, k)),
    ):
        with pytest.raises(Exception, match=rule):
            way(q, k[..., :4])
    with pytest.raises(ValueError, match="softcap has to be finite and not negative"):
        cupyattn.attention(q.to("meta"), k.to("meta"), v.to("meta"), softcap=-1.0)
    with pytest.raises(ValueError, match=r"flash_attn_qkvpacked_func: qkv has to be \(batch, seqlen, 3"):
        cupyattn.flash_attn_qkvpacked_func(q.to("meta"))


def test_gradients_that_there_are_none_of_are_refused_in_words_and_nothing_is_overwritten():
    q, caches, k = qkv(2, 1, 4, 8)[0].requires_grad_(), torch.zeros(2, 2, 16, 2, 8), torch.ones(2, 1, 2, 8)
    for call in (torch.ops.cupyattn.flash_attn_with_kvcache, compiled(cupyattn.flash_attn_with_kvcache)):
        with pytest.raises(Exception, match="flash_attn_with_kvcache: has no gradients"):
            call(q, *caches, k, k, cache_seqlens=torch.zeros(2, dtype=torch.int32))
    assert caches.count_nonzero() == 0
    (q,) = copies_of([q], grad=True)
    (slope,) = torch.autograd.grad(torch.ops.cupyattn.attention(q, q, q)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: has first derivatives only"):
        slope.sum().backward()


def test_an_eager_call_is_no_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.namespace != "cupyattn"
            return function(*args, **(kwargs or {}))

    q, k, v = qkv(2, 6, 4, 8, grad=True)
    with Seen():
        cupyattn.attention(q, k, v).sum().backward()


# Traces ----------------------------------------------------------------------------------------------------


def by_jit(call, tensors):
    return torch.jit.trace(lambda *x: tuple(results_of(call(*x))), tuple(tensors), check_trace=False)


def by_make_fx(call, tensors, **options):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(call, **options)(*tensors)


class Model(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(*tensors)


TRACES = {
    "torch.jit.trace": by_jit,
    "make_fx": by_make_fx,
    "make_fx, pre-dispatch": lambda call, tensors: by_make_fx(call, tensors, pre_dispatch=True),
    "make_fx, symbolic": lambda call, tensors: by_make_fx(call, tensors, tracing_mode="symbolic"),
    "torch.export": lambda call, tensors: torch.export.export(Model(call), tuple(tensors), strict=False).module(),
}
TRACED = [attention, sdpa_without_heads, flash_attn_varlen_qkvpacked_func, merge_states, apply_rotary_emb]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Converting a tensor")
@pytest.mark.parametrize("way", TRACES)
@pytest.mark.parametrize("call", [*TRACED, *APPENDING], ids=lambda call: call.__name__)
def test_a_traced_call_is_right_for_other_numbers(call, way):
    traced = TRACES[way](call, operands_of(call))
    here, there = (operands_of(call, seed=4) for _ in range(2))
    for a, b in zip(results_of(tuple(results_of(traced(*here)))), results_of(call(*there)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_right_for_other_sizes_where_nothing_was_recorded(strict, tmp_path):
    lengths = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    sizes = {"q": lengths, "k": lengths, "v": lengths}

    class Causal(torch.nn.Module):
        def forward(self, q, k, v):
            return cupyattn.attention(q, k, v, causal=True)

    program = torch.export.export(Causal(), tuple(qkv(2, 6, 4, 8)), dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    text = """
        import sys, torch, cupyattn.integrations.torch
        q = torch.randn(5, 17, 4, 8)
        found = torch.export.load(sys.argv[1]).module()(q, q, q)
        assert torch.equal(found, cupyattn.attention(q, q, q, causal=True))
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(text), tmp_path / "program.pt2"], check=True)


FIRST = """
import sys, torch, cupyattn
rooms = {"cupyattn.arrays.recording", "cupyattn.arrays.torch", "cupyattn.peers.torch"}
assert not rooms & sys.modules.keys()
q = torch.ones(1, 2, 3, 8)
function = lambda q: cupyattn.scaled_dot_product_attention(q, q, q, is_causal=True)
found = torch.compile(function, fullgraph=True, backend="eager")(q)
assert rooms <= sys.modules.keys() and torch.equal(found, function(q))
"""


def test_the_first_call_of_a_process_may_be_one_that_torch_compile_traces():
    subprocess.run([sys.executable, "-c", FIRST], check=True)
