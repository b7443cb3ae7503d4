"""The weights of attention: what "eager" gives, tile by tile."""

import copy
import functools
import importlib.util
import types
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from integrations.test_transformers import (  # noqa: E402 - skipped above where they are missing
    DECODERS,
    ENCODERS_DECODERS,
    GROUPED,
    TINY,
    WORDS,
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
since_they_are_collected = pytest.mark.skipif(
    importlib.util.find_spec("transformers.utils.output_capturing") is None,
    reason="before 5.2 nobody is told what models collect",
)
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


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 64, "eos_token_id": None}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
UNTOLD = {
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(**GPT, **NO_DROPOUT),
    "GPTBigCodeForCausalLM": lambda: transformers.GPTBigCodeConfig(**GPT, **NO_DROPOUT),
    "OPTForCausalLM": lambda: transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=WORDS, word_embed_proj_dim=32
    ),
    "PersimmonForCausalLM": lambda: transformers.PersimmonConfig(**TINY),
    "StableLmForCausalLM": lambda: transformers.StableLmConfig(**GROUPED),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**VISION),
    "VideoMAEModel": lambda: transformers.VideoMAEConfig(**VISION, num_frames=2, tubelet_size=2),
}
"""Models whose layers are not told that weights are wanted."""


def untold(name):
    """(the model under "eager", under ours, what it reads)."""
    torch.manual_seed(5)
    eager = getattr(transformers, name)._from_config(UNTOLD[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("cupyattn")
    if name == "SiglipVisionModel":
        return eager, ours, {"pixel_values": torch.randn(1, 3, 16, 16)}
    if name == "VideoMAEModel":
        return eager, ours, {"pixel_values": torch.randn(1, 2, 3, 16, 16)}
    return eager, ours, {"input_ids": prompts(padded=False)[0]}


def assert_same_weights(actual, expected):
    assert len(actual) == len(expected) == 2
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine.detach(), theirs.detach(), rtol=1e-4, atol=2e-5)


@since_they_are_collected
@pytest.mark.parametrize("name", UNTOLD)
def test_models_that_tell_no_layer_give_eagers_weights(name):
    eager, ours, batch = untold(name)
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True).attentions
        assert_same_weights(ours(**batch, output_attentions=True).attentions, expected)
        assert not getattr(ours(**batch), "attentions", None)


@since_they_are_collected
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_configuration_asks_for_weights_too(name):
    eager, batch = both("llama", DECODERS["llama"])[0], {"input_ids": prompts(padded=False)[0]}
    if name != "LlamaForCausalLM":
        eager, _, batch = untold(name)
    eager.config.output_attentions = True
    with torch.no_grad():
        expected = eager(**batch).attentions
        eager.set_attn_implementation("cupyattn")
        assert_same_weights(eager(**batch).attentions, expected)


@since_they_are_collected
def test_generating_gives_weights_of_layers_that_are_not_told():
    eager, ours, batch = untold("GPT2LMHeadModel")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    expected, actual = (model.generate(**batch, **options, pad_token_id=0).attentions for model in (eager, ours))
    assert len(actual) == 3
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same_weights(mine, theirs)


@since_they_are_collected
@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "StableLmForCausalLM"])
def test_checkpointed_layers_that_are_not_told_have_the_gradients_of_others(name, is_reentrant):
    """Nothing is collected when they are computed again."""
    _, ours, batch = untold(name)

    def gradients():
        ours.zero_grad()
        found = ours.train()(**batch, output_attentions=True, use_cache=False)
        assert len(found.attentions) == 2
        loss = found.logits.square().mean()
        if not is_reentrant:  # which gives weights without gradients, under "eager" as well
            loss = loss + sum(each.square().sum() for each in found.attentions)
        loss.backward()
        return torch.cat([each.grad.flatten() for each in ours.parameters() if each.grad is not None])

    expected = gradients()
    again = torch.utils.checkpoint.checkpoint
    for layer in ours.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(again, use_reentrant=is_reentrant)
    np.testing.assert_allclose(gradients(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", pytest.param("GPT2LMHeadModel", marks=since_they_are_collected)])
def test_a_compiled_model_that_is_asked_for_weights_gives_eagers_without_a_warning(name, capfd):
    eager, ours, batch = untold(name) if name in UNTOLD else (*both(name, DECODERS[name]), {"input_ids": prompts(0)[0]})
    torch._dynamo.reset()
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True).attentions
        found = torch.compile(ours, backend="eager")
        for _ in range(2):
            assert_same_weights(found(**batch, output_attentions=True).attentions, expected)
            assert not found(**batch).attentions
    assert "incorrect arg count" not in capfd.readouterr().err
    torch._dynamo.reset()


def test_a_layer_alone_is_one_graph_with_and_without_a_collector():
    class Nothing:
        compiling = False
        get = None  # which dynamo cannot follow

    layer, arrays = Layer(), operands()
    torch._dynamo.reset()
    call = torch.compile(
        lambda *given: attend(layer, *given, None, collector=Nothing)[0], fullgraph=True, backend="eager"
    )
    assert torch.equal(call(*arrays), attend(layer, *arrays, None)[0])
    torch._dynamo.reset()


class Held:
    def __call__(self, *_):
        return None


def test_weights_that_are_collected_are_kept_from_hooks_and_freed():
    q, k, v = (x.requires_grad_() for x in operands())
    collector = types.SimpleNamespace(compiling=False, get=lambda: {"cross_attentions": []})
    told = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: told.append(1) or x, lambda x: x):
        plain = attend(Layer(), q, k, v, None)[0]
        before = len(told)
        out, weights = attend(Layer(), q, k, v, None, collector=collector)
    assert torch.equal(out, plain)
    assert len(told) == 2 * before > 0
    expected = attend(Layer(), q, k, v, None, output_attentions=True)[1]
    (one,), (other,) = (torch.autograd.grad(x.square().sum(), q) for x in (weights, expected))
    np.testing.assert_allclose(one, other, rtol=1e-12)

    scaled, held = 2 * q, Held()
    scaled.grad_fn.register_hook(held)  # which lives as long as the graph above it
    lives = weakref.ref(held)
    found = attend(Layer(), scaled, k, v, None, collector=collector)
    del scaled, held
    assert lives()
    del found
    assert not lives()


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
