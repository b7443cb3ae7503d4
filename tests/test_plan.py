"""The decisions, as values: which implementation, why not the others, how the work is cut."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import plan
from cupyattn.plan import CpuTile, Tile, choose, cpu_tile, gpu_tile, splits_by_wave_efficiency
from cupyattn.problem import NAMED_DEVICES, Device, Layout, Mask, Problem, ScoreEdits, Sizes

CPU = Device("cpu", "cpu", 8)
H100 = NAMED_DEVICES["H100"]
TOO_OLD = {"T4", "V100"}
"""Named devices from before Ampere."""


def asked(
    *, batch_shape=(1,), heads=(32, 8, 8), seqlens=(2048, 2048), head_dims=(128, 128), dtype="float16", **changes
):
    """A Problem; by default a prefill that every recent GPU takes."""
    sizes = Sizes(batch_shape, *heads, *seqlens, *head_dims)
    return Problem(
        sizes, **{"layout": Layout("bshd"), "dtype": dtype, "mask": Mask(), "edits": ScoreEdits(0.1), **changes}
    )


PREFILL = asked()
DECODE = asked(seqlens=(1, 8192))


def against(problem, device=H100):
    """Every implementation's reasons against a problem, by name."""
    return dict(choose(problem, device).objections)


def objects(problem, word, *, on=H100):
    """The CUDA implementations that object to a problem in a sentence with this word."""
    return {
        name for name, reasons in against(problem, on).items() if name != "numpy" and any(word in r for r in reasons)
    }


# ---------------------------------------------------------------------------------------------------
# Which implementation
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem", [PREFILL, DECODE, asked(dtype="float64", head_dims=(100, 7))], ids=["prefill", "decode", "odd"]
)
def test_the_cpu_takes_everything_with_numpy(problem):
    chosen = choose(problem, CPU)
    assert chosen.kernel == "numpy"
    assert chosen.device == "cpu"
    assert isinstance(chosen.tile, CpuTile)
    assert set(dict(chosen.objections)) == {"splitkv", "flash"}
    assert objects(problem, "GPU", on=CPU) == {"splitkv", "flash"}


def test_the_cpu_computes_in_float64_unless_told_otherwise():
    assert choose(PREFILL, CPU).compute_dtype == "float64"
    assert choose(replace(PREFILL, compute_dtype="float32"), CPU).compute_dtype == "float32"


def test_the_cpu_starts_threads_only_for_what_is_worth_them():
    assert choose(asked(), CPU).num_workers == 8
    assert choose(asked(seqlens=(16, 16)), CPU).num_workers == 1
    assert choose(asked(), Device("cpu", "cpu", 1)).num_workers == 1


@pytest.mark.parametrize("name", NAMED_DEVICES)
def test_a_gpu_since_ampere_takes_a_prefill_with_flash_and_a_decode_with_splitkv(name):
    expected = {"none"} if name in TOO_OLD else {"flash", "splitkv"}
    prefill, decode = (choose(problem, NAMED_DEVICES[name]) for problem in (PREFILL, DECODE))
    assert {prefill.kernel, decode.kernel} == expected
    assert prefill.kernel in ("none", "flash")
    assert prefill.device == decode.device == name
    assert isinstance(prefill.tile, Tile) == (name not in TOO_OLD)


@pytest.mark.parametrize("name", NAMED_DEVICES)
def test_numpy_objects_to_every_gpu_by_name(name):
    assert against(PREFILL, NAMED_DEVICES[name])["numpy"] == (f"works on the CPU, and the arrays are on {name}",)


@pytest.mark.parametrize("name", sorted(TOO_OLD))
def test_a_gpu_before_ampere_is_too_old_for_every_kernel(name):
    assert objects(PREFILL, "compute capability 8.0", on=NAMED_DEVICES[name]) == {"splitkv", "flash"}


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (asked(dtype="float64"), "float64"),
        (asked(compute_dtype="float64"), "float64"),
        (asked(head_dims=(100, 128)), "head_dim to be a multiple of 8 from 8 to 256, not 100"),
        (asked(head_dims=(128, 100)), "head_dim_v to be a multiple of 8 from 8 to 256, not 100"),
        (asked(head_dims=(264, 128)), "not 264"),
        (asked(head_dims=(128, 0)), "not 0"),
        (asked(batch_shape=(2, 3)), "batch axis"),
        (asked(dropout_p=0.1, needs_dropout_mask=True), "return_attn_probs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_kernel_takes_what_none_can_do(problem, word):
    assert choose(problem, H100).kernel == "none"
    assert objects(problem, word) == {"splitkv", "flash"}


def test_all_reasons_are_listed_at_once():
    reasons = against(asked(dtype="float64", head_dims=(100, 264)), NAMED_DEVICES["T4"])["flash"]
    assert [any(word in reason for reason in reasons) for word in ("8.0", "float64", "not 100", "not 264")] == [
        True
    ] * 4


@pytest.mark.parametrize(("seqlen_q", "kernel"), [(1, "splitkv"), (16, "splitkv"), (17, "flash"), (64, "flash")])
def test_up_to_64_rows_per_key_head_are_decoding(seqlen_q, kernel):
    # four query heads share a key head, so 16 queries are 64 rows
    assert choose(asked(seqlens=(seqlen_q, 8192)), H100).kernel == kernel


def test_a_decode_with_dropout_is_left_to_flash():
    dropping = replace(DECODE, dropout_p=0.1)
    assert choose(dropping, H100).kernel == "flash"
    assert objects(dropping, "dropout") == {"splitkv"}


def test_a_prefill_from_pages_has_no_kernel():
    paged = replace(PREFILL, layout=Layout("thd", page_size=16))
    assert choose(paged, H100).kernel == "none"
    assert objects(paged, "block_table") == {"flash"}
    assert choose(replace(DECODE, layout=Layout("thd", page_size=16)), H100).kernel == "splitkv"


def test_what_runs_has_no_objections_and_what_does_not_has_some():
    for problem in (PREFILL, DECODE, asked(dtype="float64")):
        for device in (CPU, *NAMED_DEVICES.values()):
            chosen = choose(problem, device)
            assert dict(chosen.objections).keys() == plan.IMPLEMENTATIONS.keys() - {chosen.kernel}
            assert all(reasons for _, reasons in chosen.objections)


def test_equal_questions_have_one_answer():
    assert choose(asked(), H100) is choose(asked(), H100)
    assert hash(choose(asked(), H100)) == hash(choose(asked(), H100))


# ---------------------------------------------------------------------------------------------------
# The plan, printed
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, H100, NAMED_DEVICES["T4"]], ids=lambda device: device.name)
@pytest.mark.parametrize("problem", [PREFILL, DECODE, asked(head_dims=(100, 100))], ids=["prefill", "decode", "odd"])
def test_a_plan_prints_every_reason(problem, device):
    chosen = choose(problem, device)
    first, *lines = str(chosen).splitlines()
    assert first == f"{chosen.kernel} on {device.name}: {chosen.reason}"
    printed = [line.split(maxsplit=2) for line in lines if line.startswith("  not ")]
    assert printed == [["not", name, reason] for name, reasons in chosen.objections for reason in reasons]


def test_a_plan_prints_how_the_work_is_cut_and_what_it_costs():
    chosen = choose(DECODE, H100)
    text = str(chosen)
    assert str(chosen.tile) in text
    assert "splits     15" in text
    assert "workers    120" in text
    assert "arithmetic float32, 1.34e+08 flop, 3.36e+07 bytes" in text


@pytest.mark.parametrize("device", [CPU, H100, NAMED_DEVICES["T4"]], ids=lambda device: device.name)
def test_a_plan_costs_what_its_problem_costs(device):
    chosen = choose(DECODE, device)
    assert (chosen.flops, chosen.bytes) == (DECODE.flops, DECODE.bytes)


# ---------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------


def test_48_blocks_on_108_units_are_split_in_two():
    # two splits fill 96/108 = 0.89 of a wave; three would need two waves for 144/216 = 0.67
    assert splits_by_wave_efficiency(48, 108, key_blocks=100) == 2


@pytest.mark.parametrize(
    ("blocks", "units", "key_blocks"), [(87, 108, 100), (108, 108, 100), (1000, 108, 100), (1, 108, 4), (1, 108, 0)]
)
def test_nothing_is_split_where_the_units_are_busy_or_the_keys_are_few(blocks, units, key_blocks):
    assert splits_by_wave_efficiency(blocks, units, key_blocks) == 1


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (8, [1, 6, 11, 14, 15, 15, 15]),
        (16, [1, 6, 7, 7, 8, 8, 8]),
        (32, [1, 4, 4, 4, 4, 4, 4]),
        (64, [1, 2, 2, 2, 2, 2, 2]),
        (96, [1, 4, 4, 4, 4, 4, 4]),
        (128, [1, 1, 1, 1, 1, 1, 1]),
        (1, [1, 6, 11, 21, 40, 109, 109]),
    ],
)
def test_an_h100_splits_decoding_as_flash_attention_3_does(blocks, expected):
    # its static rule for head_dim 128 in float16, with its tile of 176 keys, run on these lengths
    lengths = (512, 1024, 2048, 4096, 8192, 32768, 131072)
    assert [splits_by_wave_efficiency(blocks, 132, math.ceil(length / 176)) for length in lengths] == expected


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 200), st.integers(1, 1000), st.integers(1, 128))
def test_the_splits_are_the_fewest_within_85_percent_of_the_best(blocks, units, key_blocks, most):
    splits = splits_by_wave_efficiency(blocks, units, key_blocks, most)
    assert 1 <= splits <= max(1, min(most, units, key_blocks))
    if splits > 1:
        filled = [
            blocks * n / units / math.ceil(blocks * n / units) for n in range(1, min(most, units, key_blocks) + 1)
        ]
        assert filled[splits - 1] >= 0.85 * max(filled) > max(filled[: splits - 1])


def test_split_keys_make_more_workers():
    chosen = choose(DECODE, H100)
    assert (chosen.num_splits, chosen.num_workers) == (15, 8 * 15)
    assert "15 splits" in chosen.reason
    busy = choose(asked(batch_shape=(64,), seqlens=(1, 8192)), H100)
    assert (busy.num_splits, busy.num_workers) == (1, 64 * 8)


# ---------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMED_DEVICES.keys() - TOO_OLD))
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 192, 256])
def test_the_tile_of_a_gpu_fits_in_its_shared_memory(name, head_dim):
    tile = gpu_tile(asked(head_dims=(head_dim, head_dim)), NAMED_DEVICES[name])
    assert (tile.block_q + 2 * tile.block_k) * head_dim * 2 <= NAMED_DEVICES[name].shared_memory
    assert tile.block_q == 16 * tile.num_warps
    assert tile.block_k % 16 == 0


def test_a_prefill_has_one_worker_per_tile_of_rows():
    chosen = choose(asked(batch_shape=(3,), seqlens=(1000, 2048)), H100)
    assert chosen.num_splits == 1
    assert chosen.num_workers == 3 * 32 * math.ceil(1000 / chosen.tile.block_q)


@st.composite
def cut_problems(draw):
    """Sizes and workers, small and large; heads in groups, alike or not for keys and values."""
    per_k, per_v = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 1, 2]))
    num_heads = per_k * per_v * draw(st.integers(0, 16))
    shared = (
        (num_heads // per_k, num_heads // per_k) if draw(st.booleans()) else (num_heads // per_k, num_heads // per_v)
    )
    lengths = st.one_of(st.integers(0, 40), st.integers(0, 10_000), st.sampled_from([2**17, 2**31 - 1]))
    batch, seqlen_q, seqlen_k = draw(st.integers(0, 300)), draw(lengths), draw(lengths)
    sizes = Sizes((batch,), num_heads, *shared, seqlen_q, seqlen_k, 64, 64)
    return sizes, batch, seqlen_q, seqlen_k, draw(st.integers(1, 64))


@settings(derandomize=True, deadline=None, max_examples=500)
@given(cut_problems())
def test_the_tile_of_a_cpu_is_never_empty_and_never_larger_than_the_problem(cut):
    sizes, batch, seqlen_q, seqlen_k, _ = cut
    tile = cpu_tile(*cut)
    assert min(tile) >= 1
    assert tile.block_q <= max(1, seqlen_q)
    assert tile.block_k <= max(1, seqlen_k)
    assert tile.heads <= sizes.queries_per_pair
    assert tile.pairs <= max(1, sizes.num_heads_k)
    assert tile.batch <= max(1, batch)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(cut_problems())
def test_the_tile_of_a_cpu_holds_a_bounded_number_of_scores(cut):
    tile = cpu_tile(*cut)
    assert math.prod(tile) <= plan.BLOCK_Q * plan.BLOCK_K


@settings(derandomize=True, deadline=None, max_examples=500)
@given(cut_problems())
def test_heads_and_batches_lie_side_by_side_only_where_they_are_whole(cut):
    sizes, _, _, seqlen_k, _ = cut
    tile = cpu_tile(*cut)
    if tile.pairs > 1 or tile.batch > 1:
        assert tile.heads == sizes.queries_per_pair
        assert tile.block_k >= seqlen_k
        assert sizes.num_heads_k == sizes.num_heads_v == sizes.num_heads // sizes.queries_per_pair
    if tile.batch > 1:
        assert tile.pairs == sizes.num_heads_k


# ---------------------------------------------------------------------------------------------------
# explain
# ---------------------------------------------------------------------------------------------------

SHAPES = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 8)}


def zeros(name, shape):
    return np.zeros(shape, bool if name == "mask" else "float16")


@pytest.mark.parametrize(
    "edits",
    [
        {},
        {"mask": (5, 7), "bias": (4, 5, 7), "sinks": (4,)},
        {"alibi_slopes": (2, 4), "alignment": "top-left"},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", [None, "cpu", "A100", "T4"])
def test_shapes_and_arrays_are_explained_alike(edits, device):
    shapes = {**SHAPES, **{name: value for name, value in edits.items() if isinstance(value, tuple)}}
    words = {name: value for name, value in edits.items() if isinstance(value, str)}
    arrays = {name: zeros(name, shape) for name, shape in shapes.items()}
    of_arrays = cupyattn.explain(**arrays, **words, device=device)
    assert cupyattn.explain(**shapes, **words, dtype="float16", device=device) == of_arrays
    assert cupyattn.explain(**{**shapes, "k": arrays["k"]}, **words, device=device) == of_arrays
    assert cupyattn.explain(**{**shapes, "q": [2, 5, 4, 8]}, **words, dtype=np.float16, device=device) == of_arrays


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "dask.array", "array_api_strict"])
def test_the_arrays_of_every_library_are_explained_as_shapes_are(library):
    xp = pytest.importorskip(library)
    arrays = {name: xp.zeros(shape, dtype=xp.float32) for name, shape in SHAPES.items()}
    assert cupyattn.explain(**arrays) == cupyattn.explain(**SHAPES)


def test_shapes_are_of_float32_on_the_cpu_and_of_float16_on_a_gpu():
    assert cupyattn.explain(**SHAPES) == cupyattn.explain(**SHAPES, dtype="float32", device="cpu")
    assert cupyattn.explain(**SHAPES, device="H100") == cupyattn.explain(**SHAPES, dtype="float16", device="H100")


def test_an_explanation_is_the_plan_of_the_problem():
    chosen = cupyattn.explain((1, 2048, 32, 128), (1, 2048, 8, 128), (1, 2048, 8, 128), device="H100")
    assert chosen == choose(asked(edits=ScoreEdits(128**-0.5)), H100)
    assert chosen.kernel == "flash"


def test_options_change_what_is_explained():
    visible = [cupyattn.explain(**SHAPES, causal=causal, alignment="bottom-right").flops for causal in (False, True)]
    assert visible == [2 * 2 * 4 * 35 * 16, 2 * 2 * 4 * (3 + 4 + 5 + 6 + 7) * 16]
    assert cupyattn.explain(**SHAPES, compute_dtype="float32").compute_dtype == "float32"
    with_lse = cupyattn.explain(**SHAPES, return_lse=True)
    assert with_lse.bytes == cupyattn.explain(**SHAPES).bytes + 2 * 4 * 5 * 4
