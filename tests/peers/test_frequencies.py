"""The rules of rotary embedding against those that transformers computes, in float64 as well as in its own float32."""

import re

import pytest
from homes import needs
from oracle import assert_matches

from cupyattn.peers.frequencies import read_rule

HALF = 16
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(HALF)],
    "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
    "original_max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
RULES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn with betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn with mscale alone": {**YARN, "mscale": 0.7},
    "yarn with a factor of its own": {**YARN, "attention_factor": 1.25},
    "yarn of a short past": {**YARN, "original_max_position_embeddings": 6},
    "yarn without a ramp": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn without a factor": {**YARN, "factor": None},
    "longrope": {**LONG, "factor": 4.0},
    "longrope without a factor": LONG,
    "longrope with a factor of its own": {**LONG, "attention_factor": 1.5},
    "longrope that did not grow": {**LONG, "original_max_position_embeddings": 4096},
    "llama3": LLAMA3,
    "llama3 of high frequencies": {**LLAMA3, "original_max_position_embeddings": 100000, "factor": 32.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional with a factor": {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 8.0},
    "linear of a part": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "yarn of a part": {**YARN, "partial_rotary_factor": 0.5},
    "dynamic of a part": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
    "llama3 of a part": {**LLAMA3, "partial_rotary_factor": 0.5},
}
THETA, MOST = 50000.0, 2048
every_rule = pytest.mark.parametrize("scaling", RULES.values(), ids=RULES)
lengths = pytest.mark.parametrize("length", [1, 512, 513, 2048, 5000])


def by_transformers(scaling, length):
    """Inverse frequencies and attention factor of a tiny Llama with these rope_parameters."""
    needs("torch")
    rope = needs("transformers.modeling_rope_utils")
    config = needs("transformers").LlamaConfig(
        hidden_size=4 * 2 * HALF, num_attention_heads=4, max_position_embeddings=MOST, vocab_size=8
    )
    config.rope_parameters = {"rope_theta": THETA, **scaling}
    inverse, factor = rope.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, None, seq_len=length)
    return inverse.double().numpy(), factor


def ours(scaling, length):
    return read_rule("rotary_tables", 2 * HALF, THETA, scaling, MOST).of_length(length)


@pytest.fixture
def in_float64(monkeypatch):
    """torch's words for float32 mean float64, so that transformers computes without a rounding to float32."""
    torch = needs("torch")
    needs("transformers.modeling_utils")  # which imports what keeps a table of dtypes, for good
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@every_rule
@lengths
def test_is_transformers_own_in_float64(scaling, length, in_float64):
    for found, expected in zip(ours(scaling, length), by_transformers(scaling, length), strict=True):
        assert_matches(found, expected, rtol=1e-14, atol=1e-17)


@every_rule
@lengths
def test_is_transformers_own_in_float32(scaling, length):
    inverse, factor = ours(scaling, length)
    expected, its_factor = by_transformers(scaling, length)
    assert_matches(inverse, expected, rtol=2e-6)
    assert factor == pytest.approx(its_factor, rel=1e-14)


def test_every_rule_that_transformers_ships_is_compared():
    rope = needs("transformers.modeling_rope_utils")
    assert {scaling["rope_type"] for scaling in RULES.values()} == set(rope.ROPE_INIT_FUNCTIONS)


def test_the_default_is_that_of_models(in_float64):
    llama = needs("transformers.models.llama.modeling_llama")
    config = needs("transformers").LlamaConfig(hidden_size=4 * 2 * HALF, num_attention_heads=4, vocab_size=8)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    expected, factor = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    for scaling in (None, {"rope_type": "default"}, {}):
        found, its_factor = ours(scaling, 9)
        assert_matches(found, expected, rtol=1e-15)
        assert factor == its_factor == 1.0


def test_the_trained_length_may_be_that_of_the_model():
    """As transformers completes a configuration that does not say it."""
    silent = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    found = read_rule("rotary_tables", 32, THETA, silent, 512).of_length(9)[0]
    assert_matches(found, read_rule("rotary_tables", 32, THETA, LLAMA3, None).of_length(9)[0])


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("linear", "factor"),
        ("dynamic", "factor, max_position_embeddings (an argument)"),
        ("yarn", "factor (or max_position_embeddings), original_max_position_embeddings (or max_position_embeddings)"),
        (
            "llama3",
            "factor, original_max_position_embeddings (or max_position_embeddings), low_freq_factor, high_freq_factor",
        ),
    ],
)
def test_what_a_rule_is_not_told_is_named_with_what_else_would_say_it(name, lacks):
    with pytest.raises(ValueError, match=rf"^rotary_tables: '{name}' needs {re.escape(lacks)}\n"):
        read_rule("rotary_tables", 8, None, {"rope_type": name}, None)


def test_old_configurations_say_type():
    old = {"type": "linear", "factor": 3.0}
    assert_matches(ours(old, 9)[0], ours(RULES["linear"], 9)[0])
    assert_matches(ours({**old, "rope_type": "linear"}, 9)[0], ours(RULES["linear"], 9)[0])


def test_theta_may_come_with_the_rule():
    by_rule = read_rule("rotary_tables", 8, None, {"rope_theta": 500000.0}, None)
    assert by_rule.theta == read_rule("rotary_tables", 8, 500000, {"rope_theta": 500000.0}, None).theta == 500000.0
    assert read_rule("rotary_tables", 8, None, None, None).theta == 10000.0
