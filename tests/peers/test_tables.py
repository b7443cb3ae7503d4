"""Tables of cosines and sines: by the formula, beside transformers' modules, at home in every library."""

import ml_dtypes
import numpy as np
import pytest
from homes import DTYPES, HOMES, HostBackedCuPy, needs
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits

import cupyattn
from cupyattn import apply_rotary_emb, rotary_tables

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1],
    "long_factor": [4.0, 9.0],
    "original_max_position_embeddings": 6,
    "factor": 4.0,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_cosine_and_sine_of_position_times_frequency_rounded_once(dtype):
    cos, sin = rotary_tables(33, 8, dtype=dtype)
    angles = np.arange(33)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    assert cos.dtype == sin.dtype == DTYPES[dtype]
    for found, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        if dtype == "float64":
            assert_matches(found, expected, atol=1e-14)
        else:
            assert_correctly_rounded(found, expected, dtype, share=1.0)


def test_float32_is_what_is_not_said():
    assert rotary_tables(3, 4)[0].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, "float64", np.dtype("f4")])
def test_a_dtype_is_known_by_name_and_by_object(dtype):
    assert rotary_tables(3, 4, dtype=dtype)[0].dtype == dtype


@pytest.mark.parametrize("home", HOMES, ids=str)
def test_positions_may_be_arrays_of_any_shape_and_library(home):
    places = np.array([[3, 0], [7, -2]], np.int32)
    like = home.make(places)

    def tables(positions):
        return rotary_tables(positions, 6, theta=100.0, dtype=home.dtype)

    cos, sin = home.call(tables, {"positions": like})
    angles = places[..., None] * 100.0 ** (-np.arange(3) / 3)
    for found, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert str(found.dtype).rpartition(".")[2] == home.dtype
        home.check(found, like)
        assert_matches(found, expected, atol={"float16": 1e-3, "bfloat16": 5e-3}.get(home.dtype, 1e-7))


def test_a_number_of_tokens_is_their_positions():
    for found, expected in zip(rotary_tables(5, 6), rotary_tables(np.arange(5), 6), strict=True):
        assert_same_bits(found, expected)
    assert rotary_tables(0, 6)[0].shape == (0, 3)
    assert_same_bits(rotary_tables(np.array(5), 6)[1], rotary_tables(5, 6)[1])


@pytest.mark.parametrize(("tokens", "factors"), [(6, "short_factor"), (7, "long_factor")])
def test_the_largest_position_says_how_long_the_sequence_is(tokens, factors):
    cos, _ = rotary_tables(np.array([1, tokens - 1]), 4, theta=100.0, scaling=LONG, dtype="float64")
    inverse = 1 / (np.array(LONG[factors]) * np.array([1.0, 10.0]))
    assert_matches(cos, np.cos(np.outer([1, tokens - 1], inverse)) * np.sqrt(1 + np.log(4) / np.log(6)), rtol=1e-14)


def test_a_sequence_that_is_traced_knows_its_own_length():
    jax = needs("jax")
    places = np.array([1, 6], np.int32)
    cos, _ = jax.jit(lambda positions: rotary_tables(positions, 4, scaling=LONG))(places)
    assert_same_bits(cos, rotary_tables(places, 4, scaling=LONG)[0])


def test_each_sequence_under_vmap_has_its_own_length():
    torch = needs("torch")
    places = torch.tensor([[1, 5], [1, 6]])
    cos = torch.func.vmap(lambda positions: rotary_tables(positions, 4, scaling=LONG)[0])(places)
    for row, found in zip(places, cos, strict=True):
        assert_same_bits(found, rotary_tables(row, 4, scaling=LONG)[0])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {**LONG, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("tokens", [40, 200])
def test_is_what_a_models_module_gives(scaling, tokens):
    """In float32 it is off by some units of 2**-24 for each position."""
    torch = needs("torch")
    llama = needs("transformers.models.llama.modeling_llama")
    config = needs("transformers").LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128, vocab_size=8
    )
    config.rope_parameters = {"rope_theta": 10000.0, **scaling}
    config.standardize_rope_params()
    module = llama.LlamaRotaryEmbedding(config)
    positions = torch.arange(tokens)
    cos, sin = rotary_tables(positions, 16, scaling=scaling, max_position_embeddings=128)
    for found, expected in zip((cos, sin), module(torch.zeros(1), positions[None]), strict=True):
        assert_matches(found, expected[0, :, :8], atol=tokens * 2.0**-22)


def test_an_attention_with_them_is_a_models():
    """The whole way: tables, rotation of both, and transformers' own rotation."""
    torch = needs("torch")
    llama = needs("transformers.models.llama.modeling_llama")
    rng = np.random.default_rng(3)
    q, k = (torch.from_numpy(rng.standard_normal((1, 9, heads, 16)).astype(np.float32)) for heads in (4, 2))
    cos, sin = rotary_tables(9, 16)
    doubled = (torch.from_numpy(np.concatenate([table, table], axis=-1))[None] for table in (cos, sin))
    expected = llama.apply_rotary_pos_emb(q, k, *doubled, unsqueeze_dim=2)
    for found, its in zip(apply_rotary_emb((q, k), cos, sin), expected, strict=True):
        assert_matches(found, its, atol=1e-6)


def test_a_cache_takes_them():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, 1, 2, 16)).astype(np.float32) for _ in range(3))
    caches = [np.zeros((1, 8, 2, 16), np.float32) for _ in range(2)]
    cos, sin = rotary_tables(8, 16)
    cupyattn.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, cache_seqlens=np.array([3], np.int32), rotary_interleaved=False
    )
    assert_same_bits(caches[0][:, 3:4], apply_rotary_emb(k, cos, sin, seqlen_offsets=3))


def test_nothing_is_computed_on_a_gpu():
    positions = HostBackedCuPy("int32").make(np.arange(4, dtype=np.int32))
    with pytest.raises(NotImplementedError, match="rotary_tables: has no CUDA kernel; bring the arrays to the CPU"):
        rotary_tables(positions, 8)


def test_jax_has_no_float64_unless_it_is_switched_on():
    jnp = needs("jax.numpy")
    with pytest.raises(TypeError, match=r"rotary_tables: jax.Array has no float64 until jax_enable_x64"):
        rotary_tables(jnp.arange(3), 4, dtype="float64")
