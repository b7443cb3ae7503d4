"""torch's FlopCounterMode, told of what public functions do."""

import pytest

import cupyattn

torch = pytest.importorskip("torch")
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402 - skipped above where torch is missing


def tensors(**traits):
    return tuple(torch.ones(2, n, h, 8, **traits) for n, h in ((6, 4), (9, 2), (9, 2)))


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(word): flops for word, flops in counter.get_flop_counts()["Global"].items()}


def test_an_eager_call_counts_as_explain_says():
    q, k, v = tensors()
    for words in ({}, {"causal": True, "alignment": "bottom-right"}):
        expected = cupyattn.explain(q, k, v, **words).flops
        assert counted(lambda words=words: cupyattn.attention(q, k, v, **words)) == {"cupyattn.attention": expected}


def test_gradients_count_as_explain_says():
    q, k, v = tensors(requires_grad=True)
    found = counted(lambda: cupyattn.attention(q, k, v).sum().backward())
    expected = [cupyattn.explain(q, k, v, backward=backward).flops for backward in (False, True)]
    assert found == dict(zip(("cupyattn.attention", "cupyattn.attention_backward"), expected, strict=True))


def test_calls_of_a_cache_and_of_peers_count_beside_torchs_own_products():
    q, k, v = tensors()
    cache = cupyattn.DynamicCache()
    cache.append(k, v)
    once = cupyattn.explain(q, k, v).flops

    def calls():
        cache.attend(q, causal=False)
        cupyattn.flash_attn_with_kvcache(q, k, v)
        torch.ones(2, 3) @ torch.ones(3, 4)

    assert counted(calls) == {"cupyattn.attention": 2 * once, "aten.mm": 2 * 2 * 3 * 4}


def test_each_module_has_its_own():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return cupyattn.attention(q, k, v)

    model = torch.nn.Sequential()
    model.add_module("first", Attention())
    with FlopCounterMode(display=False) as counter:
        model.first(*tensors())
    assert counter.get_flop_counts()["Attention"] == {"cupyattn.attention": cupyattn.explain(*tensors()).flops}
