"""cupyattn under transformers: tiny models of random weights say and generate what they do with "eager"."""

import copy
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from cupyattn.integrations import models  # noqa: E402 - skipped above where they are missing
from cupyattn.integrations import transformers as integration  # noqa: E402 - skipped above where they are missing
from cupyattn.integrations.transformers import attend, register  # noqa: E402

TOLERANCE = 1e-5
"""Of logits, in float32."""
WORDS, PAD, NEW = 97, 0, 7
TINY = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**TINY, "num_key_value_heads": 2}
WINDOW = 6
"""Shorter than the prompt: it slides in the prefill already."""
SEQ2SEQ = {"d_model": 32, "pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": None}
DECODERS = {
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, attn_logit_softcapping=1.5
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
}
ENCODERS_DECODERS = {
    "t5": lambda: transformers.T5Config(
        **SEQ2SEQ, vocab_size=WORDS, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8
    ),
    "whisper": lambda: transformers.WhisperConfig(
        **SEQ2SEQ,
        vocab_size=WORDS,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
        bos_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}
HEADS = {"t5": "AutoModelForSeq2SeqLM", "whisper": "AutoModelForSpeechSeq2Seq", "bert": "AutoModelForMaskedLM"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    transformers.utils.logging.set_verbosity_error()
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def both(name, config, **changes):
    """The same weights under "eager" and under "cupyattn"; large enough for attention to be far from uniform."""
    config = config()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(20261121)
    family = getattr(transformers, HEADS.get(name, "AutoModelForCausalLM"))
    eager = family.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("cupyattn")
    return eager, ours


def prompts(padded):
    """(ids, attention_mask) of three prompts; `padded`: two of them are shorter, and padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(2, WORDS, (3, 11))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        mask[1, :1] = 0
    return torch.where(mask.bool(), ids, PAD), mask


def assert_same_generation(eager, ours, **arguments):
    """Equal tokens, no two of them alike since that would show less, and close logits at every step."""
    options = {"max_new_tokens": NEW, "do_sample": False, "no_repeat_ngram_size": 1}
    expected, actual = (
        model.generate(**arguments, **options, return_dict_in_generate=True, output_logits=True)
        for model in (eager, ours)
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == NEW
    for mine, theirs in zip(actual.logits, expected.logits, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static cache, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
}
every_decoder = pytest.mark.parametrize("name", DECODERS)


@every_decoder
@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
def test_decoders_generate_what_eager_does(name, padded):
    eager, ours = both(name, DECODERS[name])
    ids, mask = prompts(padded)
    for way in WAYS.values():
        assert_same_generation(eager, ours, input_ids=ids, attention_mask=mask, **way)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
def test_t5_generates_what_eager_does(way, padded):
    """Its encoder is bidirectional, its decoder crosses over, and position biases are added everywhere."""
    eager, ours = both("t5", ENCODERS_DECODERS["t5"])
    ids, mask = prompts(padded)
    assert_same_generation(eager, ours, input_ids=ids, attention_mask=mask, **way)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_whisper_generates_what_eager_does(way):
    eager, ours = both("whisper", ENCODERS_DECODERS["whisper"])
    sound = torch.randn(2, 8, 24)
    assert_same_generation(eager, ours, input_features=sound, attention_mask=torch.ones(2, 24), **way)


@pytest.mark.parametrize("padded", [False, True], ids=["alike", "padded"])
def test_bert_says_what_eager_does(padded):
    eager, ours = both("bert", lambda: transformers.BertConfig(**TINY))
    ids, mask = prompts(padded)
    with torch.no_grad():
        expected, actual = (model(ids, attention_mask=mask).logits for model in (eager, ours))
    np.testing.assert_allclose(actual[mask.bool()], expected[mask.bool()], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("seqlen", [5, 30])
def test_a_window_on_both_sides_is_that_of_the_mask(seqlen):
    """ModernBERT, with rows shorter and longer than its window; the shorter ones come without a mask."""
    config = transformers.ModernBertConfig(
        **{**TINY, "num_hidden_layers": 3},
        local_attention=8,
        global_attn_every_n_layers=3,
        sep_token_id=2,
        cls_token_id=1,
    )
    eager, ours = both("bert", lambda: config)
    ids = torch.randint(2, WORDS, (2, seqlen))
    with torch.no_grad():
        expected, actual = (model(ids).logits for model in (eager, ours))
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@every_decoder
def test_logits_and_gradients_of_a_padded_batch_are_those_of_eager(name):
    eager, ours = both(name, DECODERS[name])
    ids, mask = prompts(padded=True)
    follows_a_word = mask.cumsum(-1) > 1  # what padding foretells is nobody's loss
    labels = torch.where(follows_a_word, ids, -100)
    gradients = []
    for model in (eager, ours):
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    expected, actual = gradients
    assert expected.keys() == actual.keys()
    for key in expected:
        scale = float(expected[key].abs().max())
        np.testing.assert_allclose(actual[key], expected[key], rtol=0, atol=TOLERANCE * max(scale, 1e-3), err_msg=key)


def test_sequences_packed_into_one_row_do_not_see_each_other():
    """Given position_ids that start again, transformers says so in the mask."""
    eager, ours = both("qwen2", DECODERS["qwen2"])
    ids = torch.randint(2, WORDS, (1, 11))
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    with torch.no_grad():
        expected, actual = (model(ids, position_ids=positions, use_cache=False).logits for model in (eager, ours))
        alone = ours(ids[:, 4:]).logits
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(actual[:, 4:], alone, rtol=TOLERANCE, atol=TOLERANCE)


CHUNK = 5
KINDS_OF_MASKS = {
    "full": DECODERS["llama"],
    "sliding": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
    "both": lambda: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "in chunks": lambda: transformers.Llama4TextConfig(
        **GROUPED,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=CHUNK,
        no_rope_layers=[1, 0],
        num_local_experts=2,
    ),
}


@pytest.mark.parametrize("said", ["return_flash_attn_kwargs", "return_seq_idx"])
@pytest.mark.parametrize("lengths", [(7, 8), (3, 1, 9)], ids=str)
@pytest.mark.parametrize("name", KINDS_OF_MASKS)
def test_what_a_collator_packs_gives_what_its_sequences_give_alone(name, lengths, said):
    _, ours = both(name, KINDS_OF_MASKS[name])
    several = [torch.randint(2, WORDS, (length,)) for length in lengths]
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **{said: True})
    packed = collate([{"input_ids": each.tolist()} for each in several])
    del packed["labels"]
    with torch.no_grad():
        expected = torch.cat([ours(each[None]).logits[0] for each in several])
        for more in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(packed["input_ids"])}):
            actual = ours(**packed, **more).logits[0]
            np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def test_a_callers_own_mask_of_numbers_is_added():
    eager, ours = both("llama", DECODERS["llama"])
    ids, _ = prompts(padded=False)
    seqlen = ids.shape[1]
    mask = torch.where(torch.ones(seqlen, seqlen).tril().bool(), torch.randn(seqlen, seqlen), torch.finfo().min)
    mask = mask.expand(3, 1, -1, -1)
    with torch.no_grad():
        expected, actual = (model(ids, attention_mask=mask).logits for model in (eager, ours))
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_bfloat16_models_generate():
    _, ours = both("qwen2", DECODERS["qwen2"])
    ids, mask = prompts(padded=True)
    exact = ours.generate(ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    found = ours.bfloat16().generate(
        ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    assert found.logits[0].isfinite().all()
    assert (found.logits[0].float() - exact.logits[0]).abs().max() < 0.1 * exact.logits[0].abs().max()


# ---------------------------------------------------------------------------------------------------
# Models that cannot be handed over
# ---------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES = {**VISION, "image_size": 32, "patch_size": 16, "initializer_range": 0.3}
BLOOM = {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
OWN = {
    "bloom": ("BloomForCausalLM", lambda: transformers.BloomConfig(**BLOOM)),
    "mpt": ("MptForCausalLM", lambda: transformers.MptConfig(vocab_size=WORDS, d_model=32, n_layers=2, n_heads=4)),
    "mpnet": ("MPNetModel", lambda: transformers.MPNetConfig(**TINY, initializer_range=0.3)),
    "roformer": ("RoFormerModel", lambda: transformers.RoFormerConfig(**TINY, initializer_range=0.3)),
    "blip text": ("BlipTextModel", lambda: transformers.BlipTextConfig(**TINY, initializer_range=0.3)),
    "splinter": ("SplinterModel", lambda: transformers.SplinterConfig(**TINY, initializer_range=0.3)),
}
"""Families with an attention of their own; the last has layers that do not say whether they are causal."""
BY_NAME = {
    "falcon": ("FalconForCausalLM", lambda: transformers.FalconConfig(**VISION, vocab_size=WORDS)),
    "git": ("GitModel", lambda: transformers.GitConfig(**VISION, vocab_size=WORDS, vision_config=PICTURES)),
    "data2vec vision": ("Data2VecVisionModel", lambda: transformers.Data2VecVisionConfig(**PICTURES)),
}
"""Families that look a class up by the name of the implementation."""


def from_pretrained(family, config, folder):
    family._from_config(config(), attn_implementation="eager").save_pretrained(folder)
    return family.from_pretrained(folder, attn_implementation="cupyattn")


def constructed(family, config, _):
    config = config()
    config._attn_implementation = "cupyattn"
    return family(config)


def set_later(family, config, _):
    model = family._from_config(config(), attn_implementation="eager")
    model.set_attn_implementation("cupyattn")
    return model


WAYS_TO_MAKE = {
    "_from_config": lambda family, config, _: family._from_config(config(), attn_implementation="cupyattn"),
    "from_pretrained": from_pretrained,
    "constructed": constructed,
    "set_attn_implementation": set_later,
}


def assert_same_numbers(ours, family, config):
    eager = family._from_config(config(), attn_implementation="eager").eval()
    eager.load_state_dict(ours.state_dict())
    ids, mask = prompts(padded=True)
    for padding in (torch.ones_like(mask), mask):
        with torch.no_grad():
            expected, actual = (model.eval()(ids, attention_mask=padding)[0] for model in (eager, ours))
        real = padding.bool()
        np.testing.assert_allclose(actual[real], expected[real], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS_TO_MAKE)
@pytest.mark.parametrize("name", OWN)
@pytest.mark.filterwarnings("ignore:.*keeps attn_implementation='eager'")
def test_models_with_an_attention_of_their_own_give_eagers_numbers_however_they_are_made(name, way, tmp_path):
    family, config = getattr(transformers, OWN[name][0]), OWN[name][1]
    assert_same_numbers(WAYS_TO_MAKE[way](family, config, tmp_path), family, config)


@pytest.mark.parametrize("name", [*OWN, *BY_NAME])
@pytest.mark.filterwarnings("ignore:GitVisionModel keeps")
def test_a_model_that_keeps_its_own_attention_says_so_by_name(name):
    family, config = (OWN | BY_NAME)[name]
    with pytest.warns(UserWarning, match=f"^{family} keeps attn_implementation='eager', not 'cupyattn': it "):
        model = getattr(transformers, family)._from_config(config(), attn_implementation="cupyattn")
    assert model.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:.*keeps attn_implementation='eager'")
def test_a_part_that_cannot_be_handed_over_leaves_the_others_to_cupyattn():
    family = transformers.EncoderDecoderModel
    parts = transformers.MegatronBertConfig(**TINY, initializer_range=0.3), transformers.BertConfig(**TINY)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    eager = family._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = family._from_config(copy.deepcopy(config), attn_implementation="cupyattn").eval()
    ours.load_state_dict(eager.state_dict())
    assert ours.encoder.config._attn_implementation == "eager"
    assert ours.decoder.config._attn_implementation == "cupyattn"
    ids, mask = prompts(padded=True)
    with torch.no_grad():
        expected, actual = (m(ids, attention_mask=mask, decoder_input_ids=ids[:, :4]).logits for m in (eager, ours))
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_name_that_is_changed_in_the_configuration_hides_what_it_should():
    """Nobody is asked then; the masks are eager's, which every model understands."""
    family, config = transformers.BloomForCausalLM, OWN["bloom"][1]
    ours = family._from_config(config(), attn_implementation="eager")
    ours.config._attn_implementation = "cupyattn"
    assert_same_numbers(ours, family, config)


def test_registering_again_and_other_names_change_nothing_else():
    model = transformers.PreTrainedModel
    asked = model.get_correct_attn_implementation
    register()
    register("cupyattn_again")
    assert model.get_correct_attn_implementation is asked
    with pytest.warns(UserWarning, match="not 'cupyattn_again': it has an attention of its own"):
        transformers.BloomModel._from_config(OWN["bloom"][1](), attn_implementation="cupyattn_again")
    with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
        transformers.BloomModel._from_config(OWN["bloom"][1](), attn_implementation="sdpa")
    assert transformers.FalconModel._from_config(BY_NAME["falcon"][1]()).config._attn_implementation == "sdpa"


def test_a_class_whose_source_cannot_be_read_keeps_its_own():
    family = type("Unreadable", (transformers.LlamaModel,), {"__module__": "nowhere"})
    config = DECODERS["llama"]()
    config._attn_implementation = "cupyattn"
    with pytest.warns(UserWarning, match="Unreadable keeps .*: the source of Unreadable cannot be read"):
        family(config)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
GEMMA4 = {
    **GROUPED,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64,
    "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
}


@pytest.mark.parametrize(
    ("family", "masks"),
    [
        ("LlamaModel", "NONE"),
        ("GptOssModel", "NONE"),
        ("Gemma4TextModel", "BOOLEAN"),  # compares the name with "sdpa" to know what None means
        ("Aimv2TextModel", "BOOLEAN"),  # a causal mask over layers that say they are not causal
        ("DeepseekV4Model", "NUMBERS"),  # appends numbers to them
    ],
)
def test_models_get_the_masks_they_understand(family, masks):
    manners = models.manners(getattr(transformers, family))
    assert manners == ("", models.Masks[masks])


def test_a_causal_mask_is_told_to_layers_that_a_configuration_says_see_both_ways():
    """As PaliGemma has it, whose own mask is not bidirectional where nobody says where the prefix ends."""
    config = GROUPED | {"head_dim": 8, "use_bidirectional_attention": True}
    eager, ours = both("gemma", lambda: transformers.GemmaConfig(**config))
    ids, _ = prompts(padded=False)
    with torch.no_grad():
        np.testing.assert_allclose(ours(ids).logits, eager(ids).logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_gemma4_with_shared_keys_generates_what_eager_does():
    """Its last layers have queries for the last logits only, which is more than a missing mask can say."""
    eager, ours = both("gemma4", lambda: transformers.Gemma4TextConfig(**GEMMA4))
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    with torch.no_grad():
        whole = eager(ids).logits
        for keep in (1, 3):
            found = ours(ids, logits_to_keep=keep).logits
            np.testing.assert_allclose(found, whole[:, -keep:], rtol=TOLERANCE, atol=TOLERANCE)
    expected = eager.generate(ids, **options)
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": ours}, {"cache_implementation": "static"}):
        assert torch.equal(ours.generate(ids, **options, **way), expected), way


# ---------------------------------------------------------------------------------------------------
# Autocast and traces
# ---------------------------------------------------------------------------------------------------


def mixed():
    """What a rotary model hands over under autocast: q and k in float32, v in bfloat16."""
    q, k, v = (x.float().requires_grad_() for x in operands(5, 5))
    return q, k, v.detach().bfloat16().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("all_float32", [False, True])
def test_autocast_gives_its_dtype_and_gradients_of_the_arrays_own(dtype, is_compiled, all_float32, compiled):
    arrays = [x.detach().float().requires_grad_() for x in mixed()] if all_float32 else mixed()
    numbers = torch.where(band(5, 5, 99, 0), 0.0, torch.finfo().min).expand(2, 1, 5, 5)
    layer = Layer()

    def loss(*arrays):
        out, _ = attend(layer, *arrays, numbers)
        return out, (out.float() ** 2).sum()

    with torch.autocast("cpu", dtype=dtype):
        out, number = (compiled(loss) if is_compiled else loss)(*arrays)
    found = torch.autograd.grad(number, arrays)
    exact = [x.detach().to(dtype).double().requires_grad_() for x in arrays]
    right = definition(*exact, band(5, 5, 99, 0))
    slopes = torch.autograd.grad((right**2).sum(), exact)
    assert out.dtype == dtype
    assert [x.dtype for x in found] == [x.dtype for x in arrays]
    for actual, expected in zip((out, *found), (right, *slopes), strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def test_float64_stays_float64_under_autocast():
    q, k, v = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attend(Layer(), q, k, v, None)
    assert_close(out, definition(q, k, v, band(5, 5, 99, 0)))


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_step_of_training_in_bfloat16_is_eagers(name):
    """What a Trainer with bf16=True does; see below for the Trainer itself."""
    eager, ours = both(name, DECODERS[name])
    ids, mask = prompts(padded=True)
    labels = torch.where(mask.cumsum(-1) > 1, ids, -100)
    slopes = []
    for model in (eager, ours):
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(20)).loss
        loss.backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (slopes[1] - slopes[0]).norm() < 0.05 * slopes[0].norm()


def test_the_trainer_trains_in_bfloat16(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    ids, _ = prompts(padded=False)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = {"bf16": True, "use_cpu": True, "max_steps": 2, "report_to": [], "save_strategy": "no"}
    arguments = transformers.TrainingArguments(tmp_path, **options, disable_tqdm=True)
    expected, found = (
        transformers.Trainer(model, arguments, train_dataset=rows).train().training_loss
        for model in both("qwen2", DECODERS["qwen2"])
    )
    assert found == pytest.approx(expected, rel=0.02)


class Seen(torch.nn.Module):
    """A tiny ViT whose result is a tensor, as traces want it."""

    def __init__(self):
        super().__init__()
        config = transformers.ViTConfig(**PICTURES)
        self.model = transformers.ViTModel._from_config(config, attn_implementation="cupyattn").eval()

    def forward(self, x):
        return self.model(x).last_hidden_state


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["jit.trace", "export"])
def test_a_traced_model_is_right_for_another_input(way):
    model, (first, second) = Seen(), torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        if way == "export":
            traced = torch.export.export(model, (first,)).module()
        else:
            traced = torch.jit.trace(model, (first,), check_trace=False)
        np.testing.assert_allclose(traced(second), model(second), rtol=TOLERANCE, atol=TOLERANCE)


class Logits(torch.nn.Module):
    """A model whose result is a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("name", ["qwen2", "llama", "bert"])
def test_an_exported_model_is_right_for_another_prompt(name):
    families = {**DECODERS, "bert": lambda: transformers.BertConfig(**TINY)}
    eager, ours = both(name, families[name], use_cache=False)
    (ids, mask), (others, _) = prompts(padded=True), prompts(padded=False)
    with torch.no_grad():
        program = torch.export.export(Logits(ours), (ids, mask), strict=False)
        operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert operators.count(torch.ops.cupyattn.attention.default) == TINY["num_hidden_layers"]
        actual, expected = program.module()(others, mask), Logits(eager)(others, mask)
    real = mask.bool()
    np.testing.assert_allclose(actual[real], expected[real], rtol=TOLERANCE, atol=TOLERANCE)


def test_make_fx_records_the_call():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = Layer()
    first, second = operands(), [x.flip(0) for x in operands()]
    recorded = make_fx(lambda q, k, v: attend(layer, q, k, v, None)[0])(*first)
    assert_close(recorded(*second), attend(layer, *second, None)[0])


# ---------------------------------------------------------------------------------------------------
# The contract, argument by argument
# ---------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """What `attend` asks of a module."""

    def __init__(self, is_causal=True, training=False):
        super().__init__()
        self.is_causal = is_causal
        self.train(training)


def operands(seqlen_q=5, seqlen_k=5, batch=2):
    torch.manual_seed(3)
    q = torch.randn(batch, 4, seqlen_q, 8, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, seqlen_k, 8, dtype=torch.float64)
    return q, k, v


def definition(q, k, v, visible=None, scale=8**-0.5, softcap=None, bias=0.0, sinks=None):
    """Step by step, as "eager" does it: (batch, seqlen_q, num_heads, head_dim)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def band(seqlen_q, seqlen_k, left, right, shift=0):
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - shift
    return (distance >= -left) & (distance <= right)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual.detach(), expected.detach(), rtol=1e-12, atol=1e-13)


def test_the_result_has_queries_before_heads_and_no_holes():
    out, weights = attend(Layer(), *operands(3, 7), None)
    assert out.shape == (2, 3, 4, 8)
    assert out.is_contiguous()
    assert weights is None


@pytest.mark.parametrize("seqlen_k", [5, 9])
def test_no_mask_is_causal_from_the_first_key_on(seqlen_k):
    """More keys than queries are a static cache's room for keys to come."""
    q, k, v = operands(5, seqlen_k)
    assert_close(attend(Layer(), q, k, v, None)[0], definition(q, k, v, band(5, seqlen_k, 99, 0)))


def test_a_lone_query_without_a_mask_sees_all_keys():
    q, k, v = operands(1, 9)
    assert_close(attend(Layer(), q, k, v, None)[0], definition(q, k, v))


@pytest.mark.parametrize("layer_is_causal", [False, True])
def test_is_causal_overrules_the_layer(layer_is_causal):
    q, k, v = operands()
    out, _ = attend(Layer(layer_is_causal), q, k, v, None, is_causal=not layer_is_causal)
    assert_close(out, definition(q, k, v, None if layer_is_causal else band(5, 5, 99, 0)))


def test_a_mask_is_the_whole_truth():
    q, k, v = operands(5, 9)
    visible = torch.rand(2, 1, 5, 9) < 0.5
    visible[..., 0] = True
    out, _ = attend(Layer(), q, k, v, visible, sliding_window=2)
    assert_close(out, definition(q, k, v, visible))


@pytest.mark.parametrize("seqlen_q", [1, 7])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_holds_where_there_is_no_mask(seqlen_q, is_causal):
    q, k, v = operands(seqlen_q, 7)
    visible = band(seqlen_q, 7, 2, 0 if is_causal else 2, shift=7 - seqlen_q)
    assert_close(attend(Layer(is_causal), q, k, v, None, sliding_window=3)[0], definition(q, k, v, visible))


def test_scaling_softcap_and_sinks_are_honoured():
    q, k, v = operands()
    sinks = torch.randn(4, dtype=torch.float64)
    out, _ = attend(Layer(), q, k, v, None, scaling=0.7, softcap=0.9, s_aux=sinks)
    assert_close(out, definition(q, k, v, band(5, 5, 99, 0), 0.7, 0.9, sinks=sinks))


@pytest.mark.parametrize("mask", ["none", "boolean", "numbers"])
def test_a_position_bias_joins_every_kind_of_mask(mask):
    q, k, v = operands(5, 9)
    bias, visible = torch.randn(1, 4, 5, 9, dtype=torch.float64), band(5, 9, 99, 0).expand(2, 1, 5, 9)
    given = {"none": None, "boolean": visible, "numbers": torch.where(visible, 0.0, -torch.inf)}[mask]
    assert_close(attend(Layer(), q, k, v, given, position_bias=bias)[0], definition(q, k, v, visible, bias=bias))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_queries_of_one_batch_serve_the_batches_of_the_keys(is_compiled, compiled):
    layer, (q, k, v) = Layer(False), operands()

    def flat(*arrays):
        return attend(layer, *arrays, None)[0].flatten(0, 1)  # of the shape that was promised to the compiler

    call = compiled(flat) if is_compiled else flat
    assert_close(call(q[:1], k, v), definition(q[:1], k, v).flatten(0, 1))


def test_dropout_is_the_trainings_and_torchs_seed_governs_it():
    arrays = operands()
    plain, _ = attend(Layer(), *arrays, None, dropout=0.5)
    assert_close(plain, definition(*arrays, band(5, 5, 99, 0)))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(attend(Layer(training=True), *arrays, None, dropout=0.5)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain)


def test_rows_that_see_nothing_are_zero():
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    visible[1, :, :2] = False
    out, _ = attend(Layer(), *operands(), visible)
    assert (out[1, :2] == 0).all()
    assert (out[0] != 0).all()


@pytest.mark.parametrize("name", sorted(integration.REFUSED))
def test_what_changes_the_meaning_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=rf"(?s)cupyattn in transformers: {name}.*Layer"):
        attend(Layer(), *operands(), None, **{name: torch.ones(1)})


STARTS = torch.tensor([0, 4, 9], dtype=torch.int32)
TOGETHER = STARTS.diff().repeat_interleave(STARTS.diff()) == STARTS.diff().repeat_interleave(STARTS.diff())[:, None]


@pytest.mark.parametrize("said", ["cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("mask", ["none", "boolean", "numbers"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_do_not_see_each_other_whatever_the_mask_says(said, mask, window):
    q, k, v = operands(9, 9, batch=1)
    starts = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 5, "max_length_k": 5}
    packed = {"cu_seq_lens": starts, "seq_idx": {"seq_idx": torch.tensor([[0] * 4 + [1] * 5])}}[said]
    visible = band(9, 9, 99 if window is None else window - 1, 0)
    given = {"none": None, "boolean": visible, "numbers": torch.where(visible, 0.0, -torch.inf)}[mask]
    given = None if given is None else given.expand(1, 1, 9, 9)
    out, _ = attend(Layer(), q, k, v, given, sliding_window=window, **packed)
    assert_close(out, definition(q, k, v, visible & TOGETHER))


def test_packed_queries_that_follow_their_caches_are_the_last_of_their_sequences():
    q, k, v = operands(5, 9, batch=1)
    starts = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 4, 9])}
    visible = torch.zeros(5, 9, dtype=torch.bool)
    visible[:2, :4], visible[2:, 4:] = band(2, 4, 99, 0, shift=2), band(3, 5, 99, 0, shift=2)
    assert_close(attend(Layer(), q, k, v, None, **starts)[0], definition(q, k, v, visible))


class Chunked(Layer):
    """A layer whose attention is in chunks of three."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(attention_chunk_size=3)


LOWEST = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)


def in_chunks(starts, length, size=3):
    """(length, length): causal, and the same chunk, counted from the last of these starts."""
    place = torch.cat([torch.arange(n) for n in torch.tensor([*starts, length]).diff().tolist()])
    sequence = torch.tensor([*starts, length]).diff()
    sequence = torch.arange(len(sequence)).repeat_interleave(sequence)
    chunk = sequence * length + place // size
    return (chunk == chunk[:, None]) & torch.ones(length, length).tril().bool()


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("said", ["cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("mask", ["boolean", "numbers"])
@pytest.mark.parametrize("padding", [0, 2])
def test_chunks_are_counted_in_each_packed_sequence(padding, mask, said, is_compiled, compiled):
    q, k, v = operands(9, 9, batch=1)
    starts = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}
    packed = {"cu_seq_lens": starts, "seq_idx": {"seq_idx": torch.tensor([[0] * 4 + [1] * 5])}}[said]
    token = torch.arange(9) >= padding
    by_row = in_chunks([0, padding] if padding else [0], 9) & token
    visible = in_chunks([0, padding, 4] if padding else [0, 4], 9) & token
    assert not torch.equal(by_row & TOGETHER, visible)
    given = {"boolean": by_row, "numbers": torch.where(by_row, torch.zeros_like(LOWEST), LOWEST)}[mask].expand(
        1, 1, 9, 9
    )
    layer, bias = Chunked(), torch.linspace(-1, 1, 9, dtype=torch.float64).expand(1, 4, 9, 9)

    def call(*arrays):
        return attend(layer, *arrays, given, position_bias=bias, **packed)[0]

    out = (compiled(call) if is_compiled else call)(q, k, v)
    expected = definition(q, k, v, visible, bias=bias)
    assert_close(out[:, padding:], expected[:, padding:])
    assert (out[:, :padding] == 0).all()


@pytest.mark.parametrize("mask", ["boolean", "numbers"])
def test_a_callers_own_mask_of_packed_sequences_is_not_one_of_chunks(mask):
    q, k, v = operands(9, 9, batch=1)
    visible = band(9, 9, 99, 0)
    visible[8, 5] = False
    given = {"boolean": visible, "numbers": torch.where(visible, torch.zeros_like(LOWEST), LOWEST)}[mask].expand(
        1, 1, 9, 9
    )
    out, _ = attend(Chunked(), q, k, v, given, cu_seq_lens_q=STARTS, cu_seq_lens_k=STARTS)
    assert_close(out, definition(q, k, v, visible & TOGETHER))


def test_a_row_of_each_batch_has_chunks_of_its_own():
    q, k, v = operands(9, 9, batch=2)
    given = torch.stack([in_chunks([0], 9), band(9, 9, 99, 0)])[:, None]  # the second is a caller's own
    sequences = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
    out, _ = attend(Chunked(), q, k, v, given, seq_idx=sequences)
    second = sequences[1] == sequences[1][:, None]
    assert_close(out, definition(q, k, v, torch.stack([in_chunks([0, 4], 9), given[1, 0] & second])[:, None]))


def test_chunks_over_the_room_of_a_cache_are_counted_and_over_earlier_tokens_refused():
    q, k, v = operands(4, 6, batch=1)
    starts = {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])}
    room = torch.nn.functional.pad(in_chunks([0], 4), (0, 2))
    out, _ = attend(Chunked(), q, k, v, room.expand(1, 1, 4, 6), **starts)
    assert_close(out, definition(q, k, v, torch.nn.functional.pad(in_chunks([0, 2], 4), (0, 2))))
    earlier = in_chunks([0], 6)[2:].expand(1, 1, 4, 6)
    with pytest.raises(NotImplementedError, match=r"(?s)chunks of packed sequences cannot be counted over.*Chunked"):
        attend(Chunked(), q, k, v, earlier, **starts)
    alone = {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 6])}
    assert_close(attend(Chunked(), q, k, v, earlier, **alone)[0], definition(q, k, v, earlier))
    full = Chunked()
    full.config.layer_types, full.layer_idx = ["chunked_attention", "full_attention"], 1
    attend(full, q, k, v, earlier, **starts)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        ({"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}, "packed into one row, not 2; pass an attention_mask"),
        ({"cu_seq_lens_q": STARTS}, "where packed sequences start is said by cu_seq_lens_q and cu_seq_lens_k"),
        ({"max_length_q": 5}, "where packed sequences start is said by"),
        ({"seq_idx": torch.zeros(2, 4)}, "where packed sequences start is said by"),
    ],
)
def test_packed_sequences_that_cannot_be_told_apart_are_refused(packed, words):
    with pytest.raises(ValueError, match=rf"(?s){words}.*Layer"):
        attend(Layer(), *operands(9, 9), band(9, 9, 99, 0).expand(2, 1, 9, 9), **packed)


class Warm(Layer):
    """A layer that knows an argument nobody else does."""

    def forward(self, *arrays, **others):
        return attend(self, *arrays, None, temperature=2.0, **others)


def test_an_unknown_argument_is_refused_until_it_is_ignored():
    with pytest.raises(TypeError, match=r"(?s)temperature is not known here.*Warm"):
        Warm()(*operands())
    Warm()(*operands(), ignored=frozenset({"temperature"}))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_an_argument_that_no_layer_names_changes_nothing(is_compiled, compiled):
    layer, arrays = Layer(), operands()

    def call(*arrays):
        return attend(layer, *arrays, None, temperature=2.0)[0]

    assert_close((compiled(call) if is_compiled else call)(*arrays), attend(layer, *arrays, None)[0])


def test_arguments_of_the_loss_and_columns_of_a_collator_pass():
    eager, ours = both("llama", DECODERS["llama"])
    ids, _ = prompts(padded=False)
    columns = {"special_tokens_mask": torch.zeros_like(ids), "length": torch.tensor([11, 11, 11]), "return_loss": True}
    loss = {"ignore_index": 5, "shift_labels": ids.roll(1), "label_smoothing": 0.1, "num_items_in_batch": 7}
    expected, actual = (model(ids, labels=ids, **loss, **columns).loss for model in (eager, ours))
    np.testing.assert_allclose(actual.detach(), expected.detach(), rtol=TOLERANCE)


@pytest.mark.parametrize("nothing", [None, False])
def test_an_argument_that_asks_for_nothing_is_not_refused(nothing):
    attend(Layer(), *operands(), None, output_attentions=nothing, temperature=nothing)


@pytest.mark.parametrize("mask", [torch.ones(2, 5), object(), torch.ones(5)], ids=["two axes", "object", "one axis"])
def test_a_mask_that_is_not_one_of_scores_is_refused(mask):
    with pytest.raises(ValueError, match=r"(?s)attention_mask has to be a tensor \(batch,.*Layer"):
        attend(Layer(), *operands(), mask)


def test_a_mask_of_integers_is_refused_and_told_what_to_pass():
    with pytest.raises(TypeError, match=r"(?s)attention_mask has to be boolean, .* pass mask\.bool\(\) .*Layer"):
        attend(Layer(), *operands(), torch.ones(2, 1, 5, 5, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------
# register
# ---------------------------------------------------------------------------------------------------


def test_another_name_and_compute_dtype(monkeypatch):
    register("cupyattn_fast", compute_dtype="float32", ignored=["temperature"])
    _, ours = both("llama", DECODERS["llama"])
    ours.set_attn_implementation("cupyattn_fast")
    seen = []
    monkeypatch.setattr(
        integration, "attention", lambda *arrays, **options: seen.append(options) or arrays[0].contiguous()
    )
    ours(torch.randint(2, WORDS, (1, 5)))
    assert [options["compute_dtype"] for options in seen] == ["float32", "float32"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": 3}, TypeError, "name has to be a word"),
        ({"name": ""}, TypeError, "name has to be a word"),
        ({"name": "sdpa"}, ValueError, "a name with 'sdpa' in it means to transformers torch's attention"),
        ({"name": "eager"}, ValueError, "a name with 'eager' in it means to transformers a model's own attention"),
        ({"name": "flash_cupyattn"}, ValueError, "a name with 'flash' in it means to transformers flash-attn"),
        (
            {"name": "flex_attention"},
            ValueError,
            "a name with 'flex' in it means to transformers torch's flex_attention",
        ),
        ({"name": "org/cupyattn"}, ValueError, "a name with '/' in it means to transformers a repository"),
        ({"name": "paged|cupyattn"}, ValueError, r"a name with 'paged\|' in it means to transformers continuous batch"),
        ({"last_queries": 0}, ValueError, "last_queries has to be from 1"),
        ({"last_queries": "all"}, TypeError, "last_queries has to be an integer"),
        ({"ignored": [3]}, TypeError, "ignored has to hold names"),
        ({"compute_dtype": "float16"}, ValueError, "compute_dtype has to be"),
    ],
)
def test_register_refuses_nonsense(arguments, error, words):
    with pytest.raises(error, match=f"register: {words}"):
        register(**arguments)


def test_an_old_transformers_is_refused(monkeypatch):
    present = sys.modules["transformers"]  # which is not always the one imported above: it imports itself anew
    monkeypatch.setattr(present, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.0 or newer\n +transformers +4\.57\.1"):
        register()


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        register()


# ---------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "llama", "bert", "gpt_oss", "t5"])
def test_a_compiled_model_is_one_graph(name, compiled):
    families = {**DECODERS, **ENCODERS_DECODERS, "bert": lambda: transformers.BertConfig(**TINY)}
    eager, ours = both(name, families[name])
    ids, mask = prompts(padded=True)
    arguments = {"attention_mask": mask} if name == "bert" else {"attention_mask": mask, "use_cache": False}
    if name == "t5":
        arguments["decoder_input_ids"] = ids[:, :4]
    real = slice(None) if name == "t5" else mask.bool()
    with torch.no_grad():
        expected, actual = (model(ids, **arguments).logits for model in (eager, compiled(ours)))
    np.testing.assert_allclose(actual[real], expected[real], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_compiled_model_generates_over_a_static_cache(compiled):
    eager, ours = both("qwen2", DECODERS["qwen2"])
    ours.forward = compiled(ours.forward)
    ids, mask = prompts(padded=True)
    assert_same_generation(eager, ours, input_ids=ids, attention_mask=mask, cache_implementation="static")


def test_a_compiled_call_has_the_gradients_of_a_plain_one(compiled):
    q, k, v = (x.requires_grad_() for x in operands(5, 9))
    bias = torch.randn(1, 4, 5, 9, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    layer, found = Layer(), []

    def loss(*tensors):
        out, _ = attend(layer, *tensors[:3], None, position_bias=tensors[3], s_aux=tensors[4], softcap=2.0)
        return (out * out).sum()

    for call in (loss, compiled(loss)):
        found.append(torch.autograd.grad(call(q, k, v, bias, sinks), (q, k, v, bias, sinks)))
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)


def test_compiled_dropout_is_drawn_anew_and_its_gradients_know_what_was_dropped(compiled):
    q, k, v = operands()
    v.requires_grad_()
    layer = Layer(training=True)
    call = compiled(lambda: attend(layer, q, k, v, None, dropout=0.5)[0])
    first, second = call(), call()
    assert not torch.equal(first, second)
    (slope,) = torch.autograd.grad(first.sum(), v)
    assert_close((slope * v).sum(), first.sum())  # out is linear in v
