"""Which implementation a model can have: that which is named works, and others say why they would not."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from integrations.test_transformers import DECODERS, both, registered  # noqa: E402, F401 - as above; a fixture

from cupyattn.integrations import models  # noqa: E402 - as above
from cupyattn.integrations.choosing import implementations  # noqa: E402 - as above

ORDER = ["flash_attention_3", "flash_attention_2", "sdpa", "cupyattn", "eager"]


@pytest.fixture(autouse=True)
def one_name(monkeypatch):
    """Other tests register more."""
    monkeypatch.setattr(models, "NAMES", {"another", "cupyattn"})


@pytest.fixture
def a_gpu_with_flash(monkeypatch):
    """As if there were one: transformers says that both can be had."""
    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda self, version: True)


def made(name, **changes):
    return both(name, DECODERS[name], **changes)[0]


def test_without_a_gpu_it_is_torchs_and_flash_says_why_not():
    found = implementations(made("qwen2"))
    assert (found.best, list(found.objections)) == ("sdpa", ORDER)
    for name in ORDER[:2]:
        assert "be installed" in found.objections[name] or "CPU" in found.objections[name]
    assert str(found).startswith("best: sdpa\nflash_attention_3  ")
    assert str(found).endswith("\ncupyattn           can be used\neager              can be used")


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_named_can_be_set_and_runs(name):
    model = made(name)
    for implementation, objection in implementations(model).objections.items():
        if not objection:
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcaps_and_sinks_that_torchs_has_not_are_ours(name):
    found = implementations(made(name))
    assert found.best == "cupyattn"
    assert "does not support" in found.objections["sdpa"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_weights_are_ours(name):
    found = implementations(made(name), output_attentions=True)
    assert found.best == "cupyattn"
    assert all(found.objections[other] for other in ORDER[:3])


@pytest.mark.parametrize(
    ("dtype", "changes", "options", "words"),
    [
        (torch.bfloat16, {}, {}, ""),
        (torch.float32, {}, {}, "it takes float16 and bfloat16, and the model is float32"),
        (torch.float16, {"head_dim": 320}, {}, "its head_dim is 256 at most, and the model's 320"),
        (torch.float16, {}, {"output_attentions": True}, "it has no weights of attention"),
    ],
)
def test_flash_has_objections_where_it_is_to_be_had(dtype, changes, options, words, a_gpu_with_flash):
    found = implementations(made("llama", **changes).to(dtype), **options)
    assert found.objections["flash_attention_3"] == found.objections["flash_attention_2"] == words
    assert (found.best == "flash_attention_3") == (words == "")


def test_a_model_with_an_attention_of_its_own_keeps_it():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    found = implementations(transformers.AutoModelForCausalLM.from_config(config))
    assert found.best == "eager"
    assert found.objections["cupyattn"] == "it has an attention of its own"


def test_without_register_ours_is_not_to_be_had(monkeypatch):
    monkeypatch.setattr(models, "NAMES", set())
    found = implementations(made("gemma2"))
    assert found.best == "eager"
    assert "register() has not been called" in found.objections["cupyattn"]


def test_a_question_changes_nothing():
    model = made("llama")
    before = model.config.to_dict(), model.config._attn_implementation
    implementations(model, output_attentions=True)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: implementations("llama"), "implementations: model has to be a model of transformers\n +model +str"),
        (
            lambda: implementations(made("llama"), output_attentions=1),
            "implementations: output_attentions has to be True",
        ),
    ],
    ids=["a name", "a number"],
)
def test_what_cannot_be_meant_is_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()
