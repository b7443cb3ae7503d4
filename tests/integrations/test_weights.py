"""The weights of attention: what "eager" gives, tile by tile."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from integrations.test_transformers import (  # noqa: E402 - skipped above where they are missing
    DECODERS,
    ENCODERS_DECODERS,
    TINY,
    Layer,
    both,
    operands,
    prompts,
    registered,  # noqa: F401 - a fixture
)

from cupyattn.integrations import weights as module  # noqa: E402 - as above
from cupyattn.integrations.transformers import attend, register  # noqa: E402 - as above

MODELS = {**DECODERS, "bert": lambda: transformers.BertConfig(**TINY), "t5": ENCODERS_DECODERS["t5"]}
SEVERAL = ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions")
SMALL = pytest.mark.parametrize("tile", [2**25, 1500], ids=["one tile", "several tiles"])


def both_say(name, padded):
    """What models say with their weights: (of eager, of ours, which queries are of a token)."""
    eager, ours = both(name, MODELS[name])
    ids, mask = prompts(padded)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    found = [model(ids, attention_mask=mask, output_attentions=True, **more) for model in (eager, ours)]
    return *found, mask.bool()


@SMALL
@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_eagers_weights(name, padded, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", tile)
    eager, ours, seen = both_say(name, padded)
    names = [each for each in SEVERAL if getattr(eager, each, None) is not None]
    assert names
    for each in names:
        for actual, expected in zip(getattr(ours, each), getattr(eager, each), strict=True):
            rows = seen if each in ("attentions", "encoder_attentions") else torch.ones_like(seen)  # others see nothing
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            actual, expected = (x.detach().transpose(1, 2)[rows] for x in (actual, expected))
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


def test_a_step_over_a_cache_gives_the_weights_of_its_token():
    eager, ours = both("qwen2", DECODERS["qwen2"])
    ids, mask = prompts(padded=False)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    expected, actual = (model.generate(ids, attention_mask=mask, **options) for model in (eager, ours))
    for mine, theirs in zip(actual.attentions, expected.attentions, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@SMALL
def test_only_the_last_queries_weights_are_given_where_that_is_asked_for(tile, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", tile)
    q, k, v = operands(7, 7)
    out, whole = attend(Layer(), q, k, v, None, output_attentions=True)
    for last in (1, 3, 7, 50):
        again, some = attend(Layer(), q, k, v, None, output_attentions=True, last_queries=last)
        assert torch.equal(again, out)
        np.testing.assert_allclose(some, whole[:, :, -last:], rtol=1e-12)
    register("few_weights", last_queries=2)
    _, model = both("llama", DECODERS["llama"])
    model.set_attn_implementation("few_weights")
    assert [tuple(x.shape) for x in model(prompts(False)[0], output_attentions=True).attentions] == 2 * [(3, 4, 2, 11)]


OPTIONS = {
    "nothing": {},
    "not causal": {"is_causal": False},
    "a window": {"sliding_window": 2},
    "a window on both sides": {"sliding_window": 2, "is_causal": False},
    "a softcap and a scale": {"softcap": 1.5, "scaling": -0.7},
    "a bias": {"position_bias": torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(1, 4, 1, 5)},
    "sinks": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 4.0], dtype=torch.float64)},
}


@SMALL
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (3, 5)], ids=str)
def test_weights_times_values_are_the_output(shape, options, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", tile)
    q, k, v = operands(*shape)
    out, weights = attend(Layer(), q, k, v, None, output_attentions=True, **options)
    values = v.repeat_interleave(2, dim=1)
    np.testing.assert_allclose((weights @ values).transpose(1, 2), out, rtol=1e-10, atol=1e-12)
    assert (weights >= 0).all()
    assert ((weights.sum(-1) < 0.99) == ("s_aux" in options and weights.sum(-1) < 0.99)).all()


@pytest.mark.parametrize("numbers", [False, True], ids=["boolean", "numbers"])
def test_a_row_that_sees_no_key_has_no_weights(numbers):
    q, k, v = operands()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, 2] = False
    given = torch.where(mask, 0.0, -torch.inf).double() if numbers else mask
    _, weights = attend(Layer(), q, k, v, given, output_attentions=True)
    assert (weights[1, :, 2] == 0).all()
    assert torch.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(-1)[mask.expand(2, 4, 5, 5).any(-1)], 1, rtol=1e-12)


def test_weights_have_eagers_gradients():
    q, k, v = (x.requires_grad_() for x in operands())
    _, weights = attend(Layer(), q, k, v, None, output_attentions=True)
    scores = q @ k.repeat_interleave(2, dim=1).mT * 8**-0.5
    expected = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    ways = torch.randn_like(expected)
    for actual, right in zip(
        *(torch.autograd.grad((x * ways).sum(), (q, k)) for x in (weights, expected)), strict=True
    ):
        np.testing.assert_allclose(actual, right, rtol=1e-9, atol=1e-12)


def test_weights_have_no_dropout():
    q, k, v = operands()
    training = Layer(training=True)
    out, weights = attend(training, q, k, v, None, dropout=0.5, output_attentions=True)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
    assert not torch.allclose((weights @ v.repeat_interleave(2, dim=1)).transpose(1, 2), out)


def test_bfloat16_weights_are_bfloat16():
    q, k, v = (x.bfloat16() for x in operands())
    _, weights = attend(Layer(), q, k, v, None, output_attentions=True)
    assert weights.dtype == torch.bfloat16
    _, exact = attend(Layer(), *(x.double() for x in (q, k, v)), None, output_attentions=True)
    np.testing.assert_allclose(weights.double(), exact, rtol=2**-8)


def test_traced_weights_are_refused():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = Layer()
    with pytest.raises(
        NotImplementedError, match="output_attentions: weights are neither for compiled or traced calls"
    ):
        make_fx(lambda q, k, v: attend(layer, q, k, v, None, output_attentions=True)[1])(*operands())
