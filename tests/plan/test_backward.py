"""The plan of gradients: who takes them, which tiles, and that these fit everywhere."""

import itertools
import math
import pickle
from dataclasses import replace

import emulator
import numpy as np
import pytest

from cupyattn.cuda.making import catalogue
from cupyattn.plan import (
    HEAD_DIMS,
    OF_BIAS,
    OF_KEYS,
    OF_QUERIES,
    OF_VALUES,
    BackwardTile,
    BackwardTiles,
    choose,
    choose_backward,
    hopper_backward_tile,
    hopper_shared_memory_of,
    shared_memory_of,
)
from cupyattn.problem import NAMED_DEVICES, Device, Layout, Mask, Problem, ScoreEdits, Sizes

CPU = Device("cpu", "cpu", 8)
A100 = NAMED_DEVICES["A100"]
TOO_OLD = {"T4", "V100"}
DTYPES = ("float16", "bfloat16", "float32")
TOGETHER = OF_KEYS | OF_VALUES
PAIRS = [(wide, other) for wide in range(8, 257, 8) for other in (8, wide, 256)]
"""Of head_dim and head_dim_v: tiles go by the larger."""


def asked(
    *, batch_shape=(1,), heads=(32, 8, 8), seqlens=(2048, 2048), head_dims=(128, 128), dtype="float16", **changes
):
    sizes = Sizes(batch_shape, *heads, *seqlens, *head_dims)
    return Problem(
        sizes, **{"layout": Layout("bshd"), "dtype": dtype, "mask": Mask(), "edits": ScoreEdits(0.1), **changes}
    )


def wanted_of(problem, device=A100):
    return [wanted for wanted, _ in choose_backward(problem, device).tile.passes]


def objections(problem, device=A100):
    chosen = choose_backward(problem, device)
    assert (chosen.kernel, chosen.tile) == ("none", None)
    return " / ".join(dict(chosen.objections)["backward"])


every_recent_gpu = pytest.mark.parametrize("name", sorted(NAMED_DEVICES.keys() - TOO_OLD))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

# ---- Who takes them ---------------------------------------------------------------------------------


def test_on_the_cpu_the_plan_is_that_of_the_forward_pass():
    problem = asked()
    found, forward = choose_backward(problem, CPU), choose(problem, CPU)
    assert (found.kernel, found.tile, found.num_workers) == (forward.kernel, forward.tile, forward.num_workers)
    assert dict(found.objections) == {"backward": ("works on an NVIDIA GPU, and the arrays are on the CPU",)}


@every_recent_gpu
@pytest.mark.parametrize("seqlens", [(2048, 2048), (1, 8192)], ids=["prefill", "decode"])
def test_a_gpu_since_ampere_takes_what_it_took_forward(name, seqlens):
    chosen = choose_backward(asked(seqlens=seqlens), NAMED_DEVICES[name])
    on_hopper = name in ("H100", "H200")
    kernel = "hopper_backward" if on_hopper else "backward"
    assert (chosen.kernel, chosen.compute_dtype, chosen.device) == (kernel, "float32", name)
    assert isinstance(chosen.tile, BackwardTiles)
    assert (chosen.instead is not None and chosen.instead.kernel == "backward") == on_hopper
    assert chosen.num_splits == 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layout": Layout("thd", page_size=16)}, "in pages or in a cache"),
        ({"layout": Layout("bshd", cached=True)}, "in pages or in a cache"),
        ({"head_dims": (264, 128)}, "head_dim to be a multiple of 8 from 8 to 256, not 264"),
        ({"head_dims": (128, 100)}, "head_dim_v to be a multiple of 8 from 8 to 256, not 100"),
        ({"dtype": "float64"}, "float64"),
        ({"dtype": "float8_e4m3fn"}, "float8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_kernel_takes_is_told_in_words(changes, word):
    assert word in objections(asked(**changes))


@pytest.mark.parametrize("name", sorted(TOO_OLD))
def test_a_gpu_before_ampere_is_too_old(name):
    assert "compute capability 8.0" in objections(asked(), NAMED_DEVICES[name])


def test_numpy_objects_and_says_where_the_arrays_are():
    assert dict(choose_backward(asked(), A100).objections) == {
        "numpy": ("works on the CPU, and the arrays are on A100",),
        "hopper_backward": ("needs compute capability 9.0 (Hopper)",),
    }


HOPPER = NAMED_DEVICES["H100"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dtype": "float32"}, "has no float32 arithmetic"),
        ({"edits": ScoreEdits(0.125, softcap=3.0, alibi_slopes=(4,))}, "knows no softcap together with ALiBi slopes"),
        ({"edits": ScoreEdits(-0.125)}, "knows no scale of zero or below"),
        ({"edits": ScoreEdits(0.125, bias=(1, 1, 1, 2048))}, "knows no bias"),
        ({"dropout_p": 0.5}, "knows no dropout"),
    ],
)
def test_what_hopper_objects_to_the_other_kernel_takes(changes, word):
    chosen = choose_backward(asked(**changes), HOPPER)
    assert chosen.kernel == "backward"
    assert word in " / ".join(dict(chosen.objections)["hopper_backward"])


@pytest.mark.parametrize("edits", [{"softcap": 3.0}, {"alibi_slopes": (4,)}], ids=str)
def test_hopper_takes_a_softcap_or_slopes(edits):
    assert choose_backward(asked(edits=ScoreEdits(0.125, **edits)), HOPPER).kernel == "hopper_backward"


def test_under_a_softcap_fewer_rows_move_where_registers_are_short():
    plain, capped = (
        dict(choose_backward(asked(edits=ScoreEdits(0.125, softcap=x)), HOPPER).tile.passes) for x in (0.0, 3.0)
    )
    assert (plain[OF_QUERIES].moves, capped[OF_QUERIES].moves) == (128, 64)
    assert (plain[TOGETHER].moves, capped[TOGETHER].moves) == (64, 48)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("wide_v", HEAD_DIMS)
@pytest.mark.parametrize("wide", HEAD_DIMS)
def test_hoppers_tiles_fit_and_have_two_stages(wide, wide_v, capped):
    passes = (OF_QUERIES, OF_KEYS | OF_VALUES) if max(wide, wide_v) <= 128 else (OF_QUERIES, OF_KEYS, OF_VALUES)
    for wanted in passes:
        tile = hopper_backward_tile(wide, wide_v, wanted, capped)
        assert hopper_shared_memory_of(wide, wide_v, tile, wanted) <= HOPPER.shared_memory
        assert tile.num_stages >= 2


# ---- What is summed where ---------------------------------------------------------------------------


def test_keys_and_values_are_summed_together_as_far_as_registers_reach():
    assert wanted_of(asked(head_dims=(128, 64))) == [OF_QUERIES, TOGETHER]
    for head_dims in ((136, 64), (64, 136), (256, 256)):
        assert wanted_of(asked(head_dims=head_dims)) == [OF_QUERIES, OF_KEYS, OF_VALUES]


@pytest.mark.parametrize(
    ("batch", "heads", "keys", "found"),
    [
        (1, (32, 1, 1), 4096, 4),  # 32 tiles of keys, eight blocks each, in three turns
        (1, (32, 8, 8), 4096, 4),  # 256 of them
        (1, (32, 8, 8), 1024, 1),
        (1, (32, 8, 8), 128, 1),
        (8, (32, 32, 32), 64, 1),
        (1, (12, 3, 3), 1024, 1),
        (64, (32, 1, 1), 4096, 32),
    ],
)
def test_few_tiles_of_keys_have_several_blocks_each(batch, heads, keys, found):
    problem = asked(batch_shape=(batch,), heads=heads, seqlens=(4096, keys))
    tiles = choose_backward(problem, A100).tile
    assert tiles.heads == (1, found)
    shared = math.lcm(heads[0] // heads[1], heads[0] // heads[2])
    told = [note for note in choose_backward(problem, A100).notes if "in parts" in note or " parts, so that" in note]
    assert len(told) == (0 if found == shared else 2)


@pytest.mark.parametrize("name", ["A100", "H100"])
def test_keys_and_values_that_heads_share_otherwise_are_summed_apart(name):
    passes = choose_backward(asked(heads=(12, 2, 3)), NAMED_DEVICES[name]).tile.passes
    assert [wanted for wanted, _ in passes] == [OF_QUERIES, OF_KEYS, OF_VALUES]


@pytest.mark.parametrize("name", ["A100", "H100"])
@pytest.mark.parametrize("heads", [(0, 0, 0), (0, 2, 2)], ids=str)
def test_no_heads_have_a_plan(name, heads):
    assert choose_backward(asked(heads=heads), NAMED_DEVICES[name]).tile.heads == (1, 1)


def test_memory_of_parts_is_told():
    text = str(choose_backward(asked(heads=(32, 1, 1), seqlens=(4096, 4096)), A100))
    assert f"dk in 8 parts, so that the GPU is full: {4 * 8 * 4096 * 128} bytes, or less" in text


def test_a_bias_has_a_pass_of_its_own():
    edits = ScoreEdits(0.1, bias=(1, 1))
    assert wanted_of(asked(edits=edits)) == [OF_QUERIES, TOGETHER, OF_BIAS]
    assert wanted_of(asked(edits=edits, head_dims=(192, 128))) == [OF_QUERIES, OF_KEYS, OF_VALUES, OF_BIAS]


# ---- Tiles ------------------------------------------------------------------------------------------


def tiles_of(device, dtype):
    """((head_dim, head_dim_v), wanted, tile) of every problem of a dtype."""
    edits = ScoreEdits(0.1, bias=(1, 1))
    for head_dims in PAIRS:
        plan = choose_backward(asked(head_dims=head_dims, dtype=dtype, edits=edits), device)
        for wanted, tile in plan.tile.passes:
            yield head_dims, wanted, tile


@every_recent_gpu
@every_dtype
def test_every_tile_fits_into_shared_memory_and_registers(name, dtype):
    device, found = NAMED_DEVICES[name], set(tiles_of(NAMED_DEVICES[name], dtype))
    assert {head_dims for head_dims, _, _ in found} == set(PAIRS)
    for head_dims, wanted, tile in found:
        what = catalogue.backward(dtype, *head_dims, tile, wanted, True, 0)
        assert what.shared_memory <= device.shared_memory, (head_dims, wanted, tile)
        assert what.threads == 32 * tile.num_warps
        assert tile.stays == 16 * tile.num_warps, "one fragment of sums to a warp"
        assert tile.moves % 16 == 0
        assert tile.num_stages in (1, 2)


PROBE = """
    #include "algorithm/traits.cuh"
    #include "instructions/ptx.cuh"
    namespace cupyattn {{
    struct Given {{ double* out; }};
    void probe(Given given) {{
        if (ptx::thread()) return;
        {writes}
    }}
    }}
"""
BITS = ((OF_QUERIES, "kOfQueries"), (OF_KEYS, "kOfKeys"), (OF_VALUES, "kOfValues"), (OF_BIAS, "kOfBias"))


def test_the_bytes_of_a_block_and_the_bits_of_a_pass_are_those_of_the_kernels():
    emulator.require_compiler()
    cases = [
        (dtype, head_dims, wanted, tile)
        for dtype, head_dims in itertools.product(("bfloat16", "float32"), ((8, 8), (24, 40), (128, 32), (40, 200)))
        for wanted in (OF_QUERIES, OF_KEYS, OF_VALUES, TOGETHER, OF_BIAS)
        for tile in (BackwardTile(64, 32, 4, 2), BackwardTile(128, 16, 4, 1))
    ]
    specialisations = [catalogue.backward(dtype, *dims, tile, wanted, True, 0) for dtype, dims, wanted, tile in cases]
    wanted = [what.expression.split("<", 1)[1].removesuffix(">") + "::kSharedBytes" for what in specialisations]
    wanted += [name for _, name in BITS]
    writes = "\n".join(f"ptx::store_global(given.out + {i}, (double)({value}));" for i, value in enumerate(wanted))
    source = PROBE.format(writes=writes)
    probe, out = emulator.build("probe.cu", "cupyattn::probe", sources={"probe.cu": source}), np.zeros(len(wanted))
    probe.launch(np.uint64(out.ctypes.data).tobytes(), (1, 1, 1), 32, 0, [(out, True)])
    expected = [what.shared_memory for what in specialisations] + [bit for bit, _ in BITS]
    np.testing.assert_array_equal(out, expected)


def test_a_block_has_room_for_its_tiles_its_facts_and_a_table_of_a_bias():
    tile = BackwardTile(64, 32, 4, 2)
    row = 2 * (64 + 32)
    assert shared_memory_of(64, 32, "float16", tile, OF_QUERIES) == (64 + 2 * 32) * row
    assert shared_memory_of(64, 32, "float16", tile, TOGETHER) == (64 + 2 * 32) * row + 2 * 32 * 8
    assert shared_memory_of(32, 32, "float16", tile._replace(moves=64), OF_BIAS) == 4 * 64 * 64 + 2 * 64 * 128


# ---- The plan as a value ----------------------------------------------------------------------------


def test_a_plan_prints_its_tiles_and_what_it_promises():
    text = str(choose_backward(asked(heads=(4, 4, 4)), A100))
    assert text.startswith("backward on A100: 64 tiles of 128 queries, then tiles of 128 keys")
    assert "dq: 128 rows stay, 48 move, 8 warps, 2 stages" in text
    assert "deterministic" in text
    assert f"{4 * 2 * 4 * 2048} bytes of memory besides the results" in text
    assert "arithmetic float32" in text


def test_memory_of_sequences_end_to_end_is_counted_by_their_rows():
    problem = asked(batch_shape=(7,), layout=Layout("thd"), heads=(4, 4, 4))
    problem = replace(problem, sizes=replace(problem.sizes, total_q=1000))
    assert f"{4 * 2 * 4 * 1000} bytes of memory" in str(choose_backward(problem, A100))


def test_five_products_are_counted_for_two():
    problem = asked()
    assert choose_backward(problem, A100).flops == problem.flops * 5 // 2


def test_a_plan_is_a_value_that_may_be_pickled():
    chosen = choose_backward(asked(), A100)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert hash(pickle.loads(pickle.dumps(chosen))) == hash(chosen)
