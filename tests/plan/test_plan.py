"""The decisions, as values: which implementation, why not the others, how the work is cut."""

import itertools
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import plan
from cupyattn.cuda.making.catalogue import shared_memory
from cupyattn.plan import (
    RIGHT_EDGE,
    CpuTile,
    Tile,
    base_tile,
    choose,
    cpu_tile,
    gpu_tile,
    query_stages,
    with_num_splits,
)
from cupyattn.plan.cpu import BLOCK_K, BLOCK_Q, NUMBERS_SIDE_BY_SIDE, SCORES_SIDE_BY_SIDE
from cupyattn.plan.schedule import EVEN
from cupyattn.problem import NAMED_DEVICES, Device, Layout, Mask, Problem, ScoreEdits, Sizes

CPU = Device("cpu", "cpu", 8)
H100, A100 = NAMED_DEVICES["H100"], NAMED_DEVICES["A100"]
KERNELS = {"splitkv", "hopper", "flash"}
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
    assert set(dict(chosen.objections)) == KERNELS
    assert objects(problem, "GPU", on=CPU) == KERNELS


def test_the_cpu_computes_in_float64_unless_told_otherwise():
    assert choose(PREFILL, CPU).compute_dtype == "float64"
    assert choose(replace(PREFILL, compute_dtype="float32"), CPU).compute_dtype == "float32"


def test_the_cpu_starts_threads_only_for_what_is_worth_them():
    assert choose(asked(), CPU).num_workers == 8
    assert choose(asked(seqlens=(16, 16)), CPU).num_workers == 1
    assert choose(asked(), Device("cpu", "cpu", 1)).num_workers == 1


@pytest.mark.parametrize("name", NAMED_DEVICES)
def test_a_gpu_since_ampere_takes_a_prefill_with_tiles_of_rows_and_a_decode_with_splitkv(name):
    wanted = "hopper" if name in ("H100", "H200") else "flash"
    prefill, decode = (choose(problem, NAMED_DEVICES[name]) for problem in (PREFILL, DECODE))
    assert (prefill.kernel, decode.kernel) == (("none", "none") if name in TOO_OLD else (wanted, "splitkv"))
    assert prefill.device == decode.device == name
    assert isinstance(decode.tile, Tile) == (name not in TOO_OLD)


@pytest.mark.parametrize("name", NAMED_DEVICES)
def test_numpy_objects_to_every_gpu_by_name(name):
    assert against(PREFILL, NAMED_DEVICES[name])["numpy"] == (f"works on the CPU, and the arrays are on {name}",)


@pytest.mark.parametrize("name", sorted(TOO_OLD))
def test_a_gpu_before_ampere_is_too_old_for_every_kernel(name):
    assert objects(PREFILL, "compute capability 8.0", on=NAMED_DEVICES[name]) == KERNELS


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (asked(dtype="float64"), "float64"),
        (asked(compute_dtype="float64"), "float64"),
        (asked(head_dims=(100, 128)), "head_dim to be a multiple of 8 from 8 to 256, not 100"),
        (asked(head_dims=(128, 100)), "head_dim_v to be a multiple of 8 from 8 to 256, not 100"),
        (asked(head_dims=(264, 128)), "not 264"),
        (asked(head_dims=(128, 0)), "not 0"),
        (asked(dropout_p=0.1, needs_dropout_mask=True), "return_attn_probs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_kernel_takes_what_none_can_do(problem, word):
    assert choose(problem, H100).kernel == "none"
    assert objects(problem, word) == KERNELS


@pytest.mark.parametrize(
    ("problem", "device", "kernel"),
    [
        (PREFILL, "H100", "hopper"),
        (DECODE, "H100", "splitkv"),
        (DECODE, "A100", "splitkv"),
        (PREFILL, "A100", "splitkv"),
        (replace(PREFILL, layout=Layout("bshd", cached=True)), "H100", "hopper"),
        (replace(PREFILL, layout=Layout("bshd", page_size=16, cached=True)), "H100", "hopper"),
        (replace(PREFILL, layout=Layout("bshd", page_size=20, cached=True)), "H100", "splitkv"),
        (replace(PREFILL, mask=Mask(array=(1, 1))), "H100", "splitkv"),
        (asked(head_dims=(72, 72)), "H100", "splitkv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hopper_or_else_splitkv_takes_float8(problem, device, kernel):
    eight, on = replace(problem, dtype="float8_e4m3fn"), NAMED_DEVICES[device]
    assert choose(eight, on).kernel == kernel
    assert objects(eight, "reads no float8; hopper and splitkv do", on=on) == {"flash"}
    assert objects(problem, "float8", on=on) == set()


def test_a_prefill_of_float8_that_hopper_takes_is_no_decode():
    assert objects(replace(PREFILL, dtype="float8_e4m3fn"), "is for decoding") == {"splitkv"}


def test_a_plan_prints_what_float8_becomes():
    line = "q, k and v are float8_e4m3fn, times their descales if there are any; out is bfloat16"
    for device in (CPU, H100):
        assert line in str(choose(replace(PREFILL, dtype="float8_e4m3fn"), device))
        assert "float8" not in str(choose(PREFILL, device))


def test_all_reasons_are_listed_at_once():
    reasons = against(asked(dtype="float64", head_dims=(100, 264)), NAMED_DEVICES["T4"])["flash"]
    assert [any(word in reason for reason in reasons) for word in ("8.0", "float64", "not 100", "not 264")] == [
        True
    ] * 4


@pytest.mark.parametrize(("seqlen_q", "kernel"), [(1, "splitkv"), (16, "splitkv"), (17, "flash"), (64, "flash")])
def test_up_to_64_rows_per_key_head_are_decoding(seqlen_q, kernel):
    # four query heads share a key head, so 16 queries are 64 rows
    assert choose(asked(seqlens=(seqlen_q, 8192)), A100).kernel == kernel


@pytest.mark.parametrize(("seqlen_q", "kernel"), [(1, "splitkv"), (4, "splitkv"), (5, "hopper"), (64, "hopper")])
def test_beside_hopper_who_splits_keys_too_up_to_16_rows_are(seqlen_q, kernel):
    problem = asked(seqlens=(seqlen_q, 8192))
    assert choose(problem, H100).kernel == kernel
    assert choose(replace(problem, dropout_p=0.1), H100).kernel == ("splitkv" if seqlen_q < 17 else "flash")


def test_where_hopper_may_not_be_taken_splitkv_takes_what_it_leaves_to_hopper():
    problem = asked(seqlens=(16, 8192))
    assert choose(problem, H100, allowed=("splitkv", "flash")).kernel == "splitkv"
    assert choose(problem, H100, allowed=("splitkv",)).kernel == "splitkv"
    assert choose(problem, H100, allowed=("splitkv", "hopper")).kernel == "hopper"


def test_of_rows_that_hopper_takes_splitkv_says_how_often_it_would_read_their_keys():
    assert against(asked(seqlens=(8, 8192)))["splitkv"] == (
        "would read keys again for every 16 of 32 rows; hopper splits them, too",
    )


def test_dropout_and_several_batch_axes_are_no_objection():
    for problem, kernel in ((PREFILL, "flash"), (DECODE, "splitkv")):
        assert choose(replace(problem, dropout_p=0.1), A100).kernel == kernel
        assert choose(replace(problem, sizes=replace(problem.sizes, batch_shape=(2, 3))), A100).kernel == kernel


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout_p": 0.1}, "knows no dropout"),
        ({"dtype": "float32"}, "has no float32 arithmetic"),
        ({"mask": Mask(array=(1, 1))}, "knows no boolean mask"),
        ({"edits": ScoreEdits(1.0, bias=(1, 1))}, "knows no bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flash_takes_what_hopper_does_not_know(changes, reason):
    problem = replace(PREFILL, **changes)
    assert choose(problem, H100).kernel == "flash"
    assert against(problem)["hopper"] == (reason,)


def test_hopper_needs_the_driver_to_encode_tensor_maps():
    device = replace(H100, tensor_maps=False)
    assert choose(PREFILL, device).kernel == "flash"
    assert "tensor maps" in against(PREFILL, device)["hopper"][0]


def test_where_hopper_cannot_read_the_arrays_flash_or_splitkv_runs_instead():
    chosen = choose(PREFILL, H100)
    assert chosen.instead.kernel == "flash"
    assert chosen.instead.tile == choose(PREFILL, A100).tile
    assert "hopper" not in dict(chosen.instead.objections)
    assert choose(replace(PREFILL, dtype="float8_e4m3fn"), H100).instead.kernel == "splitkv"


@pytest.mark.parametrize("mask", [Mask(), Mask(right=0), Mask(left=100, right=0)], ids=["full", "causal", "window"])
def test_hopper_runs_a_block_to_a_multiprocessor(mask):
    chosen = choose(replace(PREFILL, mask=mask), H100)
    assert chosen.tile.persistent
    assert chosen.num_workers == 132


@pytest.mark.parametrize("layout", [Layout("thd"), Layout("bshd", cached=True)], ids=["packed", "cached"])
def test_hopper_runs_a_block_to_a_tile_where_lengths_are_data(layout):
    chosen = choose(replace(PREFILL, mask=Mask(right=0), layout=layout), H100)
    assert not chosen.tile.persistent


def test_two_tiles_of_queries_wherever_there_is_room():
    found = {}
    for head_dim in (64, 96, 128, 192, 256):
        tile = base_tile(head_dim, head_dim, RIGHT_EDGE, "bfloat16")
        beside = 4 * head_dim * tile.block_k * tile.num_stages
        found[head_dim] = query_stages(2 * head_dim * tile.block_q, beside)
    assert found == {64: 2, 96: 2, 128: 2, 192: 1, 256: 1}


@pytest.mark.parametrize(
    ("problem", "page_size", "on", "kernel"),
    [
        (PREFILL, 16, H100, "hopper"),
        (PREFILL, 20, H100, "flash"),
        (PREFILL, 16, A100, "flash"),
        (DECODE, 16, H100, "splitkv"),
        (DECODE, 1, A100, "splitkv"),
    ],
)
def test_every_kernel_reads_pages_and_hopper_those_of_whole_boxes(problem, page_size, on, kernel):
    paged = replace(problem, layout=Layout("thd", page_size=page_size))
    assert choose(paged, on).kernel == kernel
    assert objects(paged, "multiple of 8 keys", on=on) == (set() if page_size == 16 else {"hopper"})


@pytest.mark.parametrize(
    ("head_dim", "page_size", "mask", "block_k"),
    [
        (128, 256, Mask(), 128),
        (128, 64, Mask(), 128),
        (128, 48, Mask(), 144),
        (128, 16, Mask(), 176),
        (128, 256, Mask(right=0), 128),
        (192, 256, Mask(), 96),
        (256, 64, Mask(), 64),
        (64, 24, Mask(), 96),
    ],
)
def test_a_block_of_hoppers_is_made_of_few_boxes_of_pages(head_dim, page_size, mask, block_k):
    paged = asked(head_dims=(head_dim, head_dim), mask=mask, layout=Layout("bshd", page_size=page_size, cached=True))
    assert choose(paged, H100).tile.block_k == block_k


def test_blocks_without_pages_are_as_large_as_can_be():
    assert choose(asked(layout=Layout("bshd")), H100).tile.block_k == 176


@pytest.mark.parametrize(("head_dim", "kernel"), [(192, "splitkv"), (200, "flash"), (256, "flash")])
def test_wide_heads_in_float32_need_more_shared_memory_than_small_gpus_have(head_dim, kernel):
    wide = replace(DECODE, dtype="float32", sizes=replace(DECODE.sizes, head_dim=head_dim))
    assert choose(wide, NAMED_DEVICES["L4"]).kernel == kernel
    assert choose(wide, NAMED_DEVICES["A100"]).kernel == "splitkv"
    assert objects(wide, "shared memory", on=NAMED_DEVICES["L4"]) == ({"splitkv"} if kernel == "flash" else set())


def test_what_runs_has_no_objections_and_what_does_not_has_some():
    for problem in (PREFILL, DECODE, asked(dtype="float64")):
        for device in (CPU, *NAMED_DEVICES.values()):
            chosen = choose(problem, device)
            assert dict(chosen.objections).keys() == plan.IMPLEMENTATIONS.keys() - {chosen.kernel}
            assert all(reasons for _, reasons in chosen.objections)


CACHED = asked(seqlens=(1, 8192), layout=Layout("bshd", cached=True))


def test_a_decode_over_a_cache_is_split_by_the_lengths_on_the_device():
    found = choose(CACHED, H100)
    assert (found.kernel, found.split_size) == ("splitkv", 0)
    assert "by the lengths on the device" in found.reason


@pytest.mark.parametrize(("num_splits", "most"), [(1, 1), (7, 7), (32, 32), (33, 32), (1000, 32)])
def test_splits_that_are_asked_for_are_the_most_and_of_256_keys_at_least(num_splits, most):
    found = with_num_splits(choose(CACHED, H100), CACHED, num_splits)
    assert (found.num_splits, found.num_workers, found.split_size) == (most, 8 * most, EVEN)


def test_the_cpu_starts_threads_only_for_live_keys_that_are_worth_them():
    problem = asked(seqlens=(1, 2**20), layout=Layout("bshd", cached=True))
    found = choose(problem, CPU)
    assert found.num_workers > 1
    assert plan.for_live_keys(found, problem, 2**20) is found
    assert plan.for_live_keys(found, problem, 100) == replace(found, num_workers=1)


@pytest.mark.parametrize(("num_splits", "most"), [(1, 1), (3, 3), (16, 16), (17, 16)])
def test_hopper_and_what_runs_instead_make_no_more_splits_than_are_asked_for(num_splits, most):
    problem = replace(CACHED, sizes=replace(CACHED.sizes, seqlen_q=8))
    chosen = choose(problem, H100)
    assert (chosen.kernel, chosen.instead.kernel) == ("hopper", "splitkv")
    found = with_num_splits(chosen, problem, num_splits)
    assert (found.num_splits, found.num_workers, found.split_size) == (most, 8 * most, 0)
    assert found.instead == with_num_splits(chosen.instead, problem, num_splits)


@pytest.mark.parametrize("device", [CPU, H100])
def test_a_plan_that_does_not_split_stays_as_it_is(device):
    problem = asked(layout=Layout("bshd", cached=True))
    assert with_num_splits(choose(problem, device), problem, 5) is choose(problem, device)


def test_no_number_of_splits_leaves_them_to_the_planner():
    assert with_num_splits(choose(CACHED, H100), CACHED, 0) is choose(CACHED, H100)


def test_equal_questions_have_one_answer():
    assert choose(asked(), H100) is choose(asked(), H100)
    assert hash(choose(asked(), H100)) == hash(choose(asked(), H100))


@pytest.mark.parametrize("problem", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_plan_is_the_same_in_another_process(problem):
    chosen = choose(problem, H100)
    hash(chosen)
    assert b"_hash" not in pickle.dumps(chosen)
    again = pickle.loads(pickle.dumps(chosen))
    assert (again, hash(again)) == (chosen, hash(chosen))
    assert replace(chosen, notes=("k is copied",)) != chosen


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
    assert "splits     32" in text
    assert "workers    256" in text
    assert "arithmetic float32, 1.34e+08 flop, 3.36e+07 bytes" in text


@pytest.mark.parametrize("device", [CPU, H100, NAMED_DEVICES["T4"]], ids=lambda device: device.name)
def test_a_plan_costs_what_its_problem_costs(device):
    chosen = choose(DECODE, device)
    assert (chosen.flops, chosen.bytes) == (DECODE.flops, DECODE.bytes)


def test_a_plan_prints_what_its_peers_would_do_and_its_notes():
    chosen = replace(choose(DECODE, H100), notes=("k is copied: its heads are not contiguous", "v is read as it is"))
    lines = str(chosen).splitlines()
    assert chosen.peers == (("flash-attn 2", 32), ("flash-attn 3", 15))
    assert [line for line in lines if line.startswith("  flash-attn")] == [
        "  flash-attn 2 would make 32 splits",
        "  flash-attn 3 would make 15 splits",
    ]
    assert [lines.index(f"  {note}") for note in chosen.notes] == [7, 8]


@pytest.mark.parametrize(("problem", "device"), [(PREFILL, H100), (DECODE, CPU), (DECODE, NAMED_DEVICES["T4"])])
def test_where_nothing_is_split_peers_are_not_asked(problem, device):
    chosen = choose(problem, device)
    assert (chosen.peers, chosen.num_splits, chosen.split_size) == ((), 1, 0)
    assert "flash-attn" not in str(chosen)


# ---------------------------------------------------------------------------------------------------
# Splits; the rules are tested in test_splits
# ---------------------------------------------------------------------------------------------------


def test_split_keys_make_more_workers():
    chosen = choose(DECODE, H100)
    assert (chosen.num_splits, chosen.split_size, chosen.num_workers) == (32, 256, 8 * 32)
    assert chosen.reason == "8 pieces on 264 slots: 32 splits of 256 keys fill 97% of one wave"
    busy = choose(asked(batch_shape=(64,), seqlens=(1, 8192)), H100)
    assert (busy.num_splits, busy.split_size, busy.num_workers) == (1, 8192, 64 * 8)
    assert busy.reason == "512 pieces, no split: the GPU is busy or the keys are few"


def test_all_batch_axes_make_workers():
    chosen = choose(asked(batch_shape=(2, 3), seqlens=(1, 8192)), H100)
    assert chosen == choose(asked(batch_shape=(6,), seqlens=(1, 8192)), H100)


# ---------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------


HEAD_DIMS = range(8, 257, 8)
every_recent_gpu = pytest.mark.parametrize("name", sorted(NAMED_DEVICES.keys() - TOO_OLD))
every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])


def gpu_tiles(kernel, name, dtype):
    """((head_dim, head_dim_v), tile) of all problems that a kernel takes on a GPU."""
    device = NAMED_DEVICES[name]
    for head_dims in itertools.product(HEAD_DIMS, HEAD_DIMS):
        for seqlen_q in (1, 8, 16):  # of four heads in a group: one packed tile of rows, and several
            problem = asked(seqlens=(seqlen_q, 8192), head_dims=head_dims, dtype=dtype)
            if not plan.IMPLEMENTATIONS[kernel](problem, device):
                yield head_dims, gpu_tile(problem, device, kernel)


@every_recent_gpu
@every_dtype
@pytest.mark.parametrize("kernel", ["flash", "splitkv"])
def test_the_tile_of_a_gpu_fits_in_its_shared_memory(kernel, name, dtype):
    found = set(gpu_tiles(kernel, name, dtype))
    too_large = {
        (head_dims, tile)
        for head_dims, tile in found
        if shared_memory(kernel, dtype, *head_dims, tile) > NAMED_DEVICES[name].shared_memory
    }
    assert not too_large
    small = kernel == "splitkv" and dtype == "float32" and NAMED_DEVICES[name].shared_memory < 100 * 1024
    widest = 192 if small else 256
    assert {head_dims for head_dims, _ in found} == set(itertools.product(range(8, widest + 1, 8), repeat=2))


@every_recent_gpu
@every_dtype
def test_tiles_are_what_the_kernels_are_made_for(name, dtype):
    for _, tile in gpu_tiles("flash", name, dtype):
        assert tile.block_q == 16 * tile.num_warps
        assert tile.block_k % 16 == 0
        assert tile.num_stages >= 1
    for _, tile in gpu_tiles("splitkv", name, dtype):
        assert tile.block_q in (16, 32)
        assert tile.block_k == 16 * tile.num_warps
        assert tile.num_stages >= 2


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "tile"),
    [
        ("H100", "float16", 64, Tile(16, 64, 4, 4)),
        ("H100", "float16", 128, Tile(16, 64, 4, 3)),
        ("H100", "float16", 256, Tile(16, 64, 4, 3)),
        ("L4", "float16", 128, Tile(16, 64, 4, 2)),
        ("L4", "float16", 256, Tile(16, 32, 2, 2)),
        ("L4", "float32", 128, Tile(16, 32, 2, 2)),
        ("L4", "float32", 192, Tile(16, 16, 1, 2)),
        ("H100", "float32", 256, Tile(16, 32, 2, 2)),
        ("H100", "float8_e4m3fn", 128, Tile(16, 64, 4, 4)),
        ("L4", "float8_e4m3fn", 256, Tile(16, 64, 4, 2)),
    ],
)
def test_a_decode_has_as_many_warps_as_find_room(name, dtype, head_dim, tile):
    problem = asked(seqlens=(1, 8192), head_dims=(head_dim, 8), dtype=dtype)
    assert gpu_tile(problem, NAMED_DEVICES[name], "splitkv") == tile


def test_a_prefill_has_one_worker_per_tile_of_rows():
    chosen = choose(asked(batch_shape=(3,), seqlens=(1000, 2048)), A100)
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
    widths = st.none() | lengths
    batch, seqlen_q, seqlen_k = draw(st.integers(0, 300)), draw(lengths), draw(lengths)
    sizes = Sizes((batch,), num_heads, *shared, seqlen_q, seqlen_k, 64, 64)
    return sizes, batch, seqlen_q, seqlen_k, draw(st.integers(1, 64)), draw(widths), draw(st.booleans())


@settings(derandomize=True, deadline=None, max_examples=500)
@given(cut_problems())
def test_the_tile_of_a_cpu_is_never_empty_and_never_larger_than_the_problem(cut):
    sizes, batch, seqlen_q, seqlen_k, *_ = cut
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
    assert math.prod(tile) <= max(BLOCK_Q * BLOCK_K, SCORES_SIDE_BY_SIDE)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(cut_problems())
def test_the_tile_of_a_cpu_holds_a_bounded_number_of_queries_and_keys_where_it_takes_several_batches(cut):
    tile = cpu_tile(*cut)
    if tile.batch > 1:
        numbers = tile.pairs * (tile.heads * tile.block_q * 64 + tile.block_k * 128)
        assert tile.batch * numbers <= NUMBERS_SIDE_BY_SIDE


@settings(derandomize=True, deadline=None, max_examples=500)
@given(cut_problems())
def test_heads_and_batches_lie_side_by_side_only_where_they_are_whole(cut):
    sizes, _, _, seqlen_k, *_ = cut
    tile = cpu_tile(*cut)
    if tile.pairs > 1 or tile.batch > 1:
        assert tile.heads == sizes.queries_per_pair
        assert tile.block_k >= seqlen_k
        assert sizes.num_heads_k == sizes.num_heads_v == sizes.num_heads // sizes.queries_per_pair
    if tile.batch > 1:
        assert tile.pairs == sizes.num_heads_k


def test_where_a_band_hides_keys_a_tile_has_few_rows_of_each_head_of_a_group():
    sizes = Sizes((2,), 8, 2, 2, 512, 512, 64, 64)
    full, banded = (cpu_tile(sizes, 2, 512, 512, 2, band_width) for band_width in (None, 512))
    assert (full.block_q, full.heads) == (512, 1)
    assert (banded.block_q, banded.heads) == (128, 4)
    alone = Sizes((2,), 8, 8, 8, 512, 512, 64, 64)
    assert cpu_tile(alone, 2, 512, 512, 2, 512).block_q == 512


@pytest.mark.parametrize(("band_width", "block_q"), [(16, 128), (256, 128), (257, 512), (4096, 512), (None, 512)])
def test_a_narrow_window_is_cut_into_short_tiles(band_width, block_q):
    sizes = Sizes((1,), 4, 4, 4, 4096, 4096, 64, 64)
    assert cpu_tile(sizes, 1, 4096, 4096, 1, band_width).block_q == block_q


@pytest.mark.parametrize(("seqlen", "gradients", "pairs"), [(256, False, 4), (256, True, 2), (400, False, 2)])
def test_a_call_that_is_soon_over_has_a_tile_for_each_worker(seqlen, gradients, pairs):
    sizes = Sizes((1,), 8, 8, 8, seqlen, seqlen, 64, 64)
    assert cpu_tile(sizes, 1, seqlen, seqlen, 2, None, gradients).pairs == pairs


def test_a_decode_has_more_tiles_than_workers():
    """Its keys are read more than they are multiplied."""
    sizes = Sizes((1,), 8, 8, 8, 1, 4096, 64, 64)
    assert cpu_tile(sizes, 1, 1, 4096, 2).pairs == 2


def test_few_rows_and_a_window_of_all_keys_are_not_cut_into_shorter_tiles():
    few, causal = (Sizes((1,), 4, 4, 4, n, n, 64, 64) for n in (160, 256))
    assert cpu_tile(few, 1, 160, 160, 1, 16).block_q == 160
    assert cpu_tile(causal, 1, 256, 256, 1, 256).block_q == 256


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
    assert replace(cupyattn.explain(**arrays), notes=()) == cupyattn.explain(**SHAPES)


def test_shapes_are_of_float32_on_the_cpu_and_of_float16_on_a_gpu():
    assert cupyattn.explain(**SHAPES) == cupyattn.explain(**SHAPES, dtype="float32", device="cpu")
    assert cupyattn.explain(**SHAPES, device="H100") == cupyattn.explain(**SHAPES, dtype="float16", device="H100")


def test_of_shapes_beside_float8_ones_float32_is_meant():
    shapes = {"bias": (5, 5), "sinks": (4,), "k_descale": (2, 2), "q_descale": ()}
    plan = cupyattn.explain((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), dtype="float8_e4m3fn", **shapes)
    assert any("float8_e4m3fn" in note for note in plan.notes)


def test_float8_arrays_are_explained_as_their_shapes_are():
    shapes = (2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)
    kind = pytest.importorskip("ml_dtypes").float8_e4m3fn
    plan = cupyattn.explain(*(np.zeros(shape, kind) for shape in shapes))
    assert plan == cupyattn.explain(*shapes, dtype=kind)
    assert plan.notes


def test_an_explanation_is_the_plan_of_the_problem():
    chosen = cupyattn.explain((1, 2048, 32, 128), (1, 2048, 8, 128), (1, 2048, 8, 128), device="H100")
    assert chosen == choose(asked(edits=ScoreEdits(128**-0.5)), H100)
    assert chosen.kernel == "hopper"


def test_options_change_what_is_explained():
    visible = [cupyattn.explain(**SHAPES, causal=causal, alignment="bottom-right").flops for causal in (False, True)]
    assert visible == [2 * 2 * 4 * 35 * 16, 2 * 2 * 4 * (3 + 4 + 5 + 6 + 7) * 16]
    assert cupyattn.explain(**SHAPES, compute_dtype="float32").compute_dtype == "float32"
    with_lse = cupyattn.explain(**SHAPES, return_lse=True)
    assert with_lse.bytes == cupyattn.explain(**SHAPES).bytes + 2 * 4 * 5 * 4
