"""Models of transformers made tiny: a small configuration of any family, weights by their names, something to read.

Nothing here knows what is tested.  What holds for all families is rules by the names of a configuration's fields;
where a family needs more, it is in a table.
"""

import copy
import dataclasses
import inspect
import re
import zlib

import torch
import transformers
from transformers.models.auto import modeling_auto

WIDTH, INNER, HEADS, HEAD, LAYERS, WORDS, LENGTH = 64, 96, 4, 16, 2, 128, 128
FIRST_WORD = 64
"""Ids below it are for special tokens."""


def power_below(value, most):
    """The largest power of two that is neither above `value` nor above `most`."""
    return 1 << (min(value, most).bit_length() - 1) if value > 0 else value


def at_most(most):
    return lambda value: min(value, most)


def exactly(number):
    return lambda value: number if value > 0 else value


def heads(value):
    return power_below(value, HEADS)


GENTLE = [
    (r"(\w+_)?vocab_size(_\w+)?", at_most(WORDS)),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_local_experts", at_most(4)),
    (r"(moe_)?(num_experts_per_tok|topk|top_k|k)|num_experts_per_token|moe_topk", at_most(2)),
    (r"n_group|topk_group", at_most(2)),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers|num_kv_shared_layers", at_most(1)),
    (
        r"num_hidden_layers|num_layers|n_layers?|(\w+_)?(encoder|decoder)_layers|depths?|layers|num_blocks|"
        r"(\w+_)?num_(hidden_)?layers|num_(en|de)coder_layers|num_decoder_layers|num_hidden_groups",
        at_most(LAYERS),
    ),
    (r"num_labels", at_most(3)),
]
"""Rules that leave widths alone: (what a field's name matches as a whole, what becomes of each number in it)."""
WIDTHS = [
    (r"(\w*_)?(num_key_value_heads|kv_heads|num_kv_heads|n_head_kv)", lambda value: power_below(value, HEADS // 2)),
    (r"(\w*_)?(attention_heads|num_heads|n_heads?|heads|self_attention_heads|cross_attention_heads)", heads),
    (r"(\w*_)?(head_dim|dim_head|d_kv|d_head|kv_channels|v_head_dim|qk_\w+_head_dim|head_size)", exactly(HEAD)),
    (r"rotary_dim", exactly(HEAD)),
    (r"\w*_lora_rank", at_most(16)),
    (
        r"(\w*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|feedforward_dim|dim_feedforward|d_inner|dim_ff)",
        exactly(INNER),
    ),
    (
        r"(\w*_)?(hidden_size|hidden_dim|embed_dim|embedding_size|embedding_dim|d_model|n_embd|emb_dim|projection_dim|"
        r"projection_size|proj_size|out_hidden_size|output_dim|model_dim|feat_dim|decoder_dim)|dim|embed_dims|"
        r"hidden_sizes|conv_dim|d_embed|hidden_channels|channels|decoder_channels",
        exactly(WIDTH),
    ),
    (r"num_mel_bins|n_mel_bins|feature_size", at_most(16)),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions", at_most(LENGTH)),
    (r"num_queries|num_query_tokens|num_latents", at_most(8)),
    (r"sliding_window|attention_chunk_size|local_attention", at_most(6)),
]


def numbers_of(value, change):
    """`change` of each number in a field's value, in lists of lists, too."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(numbers_of(each, change) for each in value)
    return value


class Shrinker:
    """Makes configurations small; special tokens get the same small numbers in all parts of one configuration."""

    def __init__(self, gentle=False):
        self.rules = GENTLE if gentle else GENTLE + WIDTHS
        self.gentle = gentle
        self.tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

    def token(self, name):
        return self.tokens.setdefault(name, len(self.tokens))

    def __call__(self, config, **more):
        """A small configuration of the same class; `more` of its fields as they are given."""
        fields = {}
        for field in dataclasses.fields(config):
            name, now = field.name, have(config, field.name)
            if isinstance(now, transformers.PreTrainedConfig):
                fields[name] = self(now)
                continue
            first = field.default
            if field.default_factory is not dataclasses.MISSING:
                first = field.default_factory()
            if re.fullmatch(r"\w*(token|_bos|_eos|_start|_end|im)_(id|index)|\w*_token_ids", name):
                if first not in (None, dataclasses.MISSING) and numbers_of(first, abs) == first:
                    fields[name] = numbers_of(first, lambda _, name=name: self.token(name))
            elif name == "layer_types" and now:
                fields[name] = kinds(now)
            elif name == "rope_parameters" and now and not self.gentle:
                fields[name] = sections(now)
            elif first not in (None, dataclasses.MISSING):
                for pattern, change in self.rules:
                    if re.fullmatch(pattern, name):
                        fields[name] = numbers_of(first, change)
                        break
        if not self.gentle:
            patch, image = have(config, "patch_size"), have(config, "image_size")
            if isinstance(image, int | list | tuple):
                side = 4 * patch if isinstance(patch, int) and patch >= 8 else 64
                fields["image_size"] = numbers_of(image, lambda _: side)
            for name in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
                if name in fields and have(config, name) == have(config, "num_attention_heads"):
                    fields[name] = fields.get("num_attention_heads", HEADS)
        if "layer_types" in fields and "num_hidden_layers" in fields:
            fields["num_hidden_layers"] = len(fields["layer_types"])
        known = {field.name for field in dataclasses.fields(config)}
        fields |= {name: value for name, value in more.items() if name in known}
        return type(config)(**fields | FAMILIES.get(config.model_type, {}))


def have(config, name):
    """A field's value, or None where there is none for the whole configuration."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # layers differ in it
        return vars(config).get(name)


def sections(rope):
    """Rotary parameters whose sections, one for each axis of positions, fit a small head."""
    rope = copy.deepcopy(rope)
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if isinstance(each.get("mrope_section"), list | tuple):
            share = HEAD / 2 * each.get("partial_rotary_factor", 1.0) / sum(each["mrope_section"])
            small = [int(part * share) for part in each["mrope_section"]]
            small[0] += round(sum(each["mrope_section"]) * share) - sum(small)
            each["mrope_section"] = small
    return rope


def kinds(layer_types):
    """Each kind of layer once, at least `LAYERS` layers."""
    once = list(dict.fromkeys(layer_types))
    return (once * LAYERS)[: max(LAYERS, len(once))]


MIXED = ["linear_attention", "full_attention"]
SHARED_KEYS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
FAMILIES = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "gemma3n_text": {**SHARED_KEYS, "activation_sparsity_pattern": None},
    "gemma4_text": {**SHARED_KEYS, "global_head_dim": HEAD},
    "gemma4_unified_text": {"global_head_dim": HEAD},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": HEADS},
    "qwen2_5_vl_text": {"rope_parameters": AXES},
    "qwen2_vl_text": {"rope_parameters": AXES},
    "wav2vec2-bert": {"vocab_size": WORDS, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {"vocab_size": WORDS},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}
"""Fields, by model_type, that the rules get wrong."""


def tiny_config(cls, gentle=False):
    """A small configuration for this class of models."""
    causal = cls.__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return Shrinker(gentle)(cls.config_class(), **({"is_decoder": True} if causal else {}))


def fill(model):
    """Weights large enough for attention to be far from uniform, each by a seed of its own name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                std = min(0.3, 1.7 / max(1, parameter[0].numel()) ** 0.5)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def own(config, *names):
    """The first of these fields that the configuration or one of its parts has."""
    for name in names:
        if isinstance(have(config, name), int | float | list | tuple):
            return have(config, name)
    for part in parts(config).values():
        found = own(part, *names)
        if found is not None:
            return found
    return None


def parts(config):
    """The configurations inside one, by name."""
    named = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    return {name: part for name, part in named.items() if isinstance(part, transformers.PreTrainedConfig)}


BATCH, TOKENS, ANSWERS = 2, 11, 7


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(config, length, seed=1):
    vocabulary = own(config, "vocab_size") or WORDS
    low = FIRST_WORD if vocabulary > FIRST_WORD + 8 else min(3, vocabulary - 1)
    return torch.randint(low, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def pictures(config):
    side = own(config, "image_size", "pretrain_image_size", "img_size", "resolution", "input_size") or 64
    height, width = (side, side) if isinstance(side, int) else list(side)[-2:]
    return random(BATCH, own(config, "num_channels", "in_channels", "in_chans") or 3, height, width)


def batches(model):
    """What the model may want to read: batches to try, the best first."""
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    whole = {}
    if "input_ids" in accepted:
        whole["input_ids"] = words(config, TOKENS)
        if "attention_mask" in accepted:
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "decoder_input_ids" in accepted:
        whole["decoder_input_ids"] = words(config, ANSWERS, seed=2)
    if "pixel_values" in accepted:
        whole["pixel_values"] = pictures(config)
    if "pixel_values_videos" in accepted and main == "pixel_values_videos":
        frames = own(config, "num_frames", "frames_per_clip") or 4
        whole["pixel_values_videos"] = pictures(config)[:, None].expand(-1, frames, -1, -1, -1)
    sound = [{}]
    if "input_values" in accepted:
        sound = [{"input_values": random(BATCH, 3200)}, {"input_values": random(BATCH, 1, 3200)}]
        sound += [{"input_values": random(BATCH, own(config, "max_length") or 128, own(config, "num_mel_bins") or 16)}]
    if "input_features" in accepted:
        bins = (
            own(
                config,
                "num_mel_bins",
                "feature_size",
                "input_feat_size",
                "feature_projection_input_dim",
                "input_dim",
                "feature_dim",
            )
            or 80
        )
        frames = 2 * (own(config, "max_source_positions") or 32)
        sound += [{"input_features": random(BATCH, bins, frames)}, {"input_features": random(BATCH, frames, bins)}]
    text_first = [name for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in whole]
    choices = []
    for heard in sound[::-1]:
        choices.append(whole | heard)
        choices.append(
            {"decoder_input_ids": whole["decoder_input_ids"]} | heard if "decoder_input_ids" in whole else heard
        )
        choices.append(heard | {k: v for k, v in whole.items() if k.startswith("pixel")})
    choices.append({name: whole[name] for name in text_first})
    if "pixel_values" in whole:
        video = whole["pixel_values"][:, None].expand(-1, own(config, "num_frames") or 4, -1, -1, -1)
        choices.append({"pixel_values": video})
    return [choice for choice in choices if choice]
