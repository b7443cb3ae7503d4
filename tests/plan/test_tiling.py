"""Tiles of sequences whose lengths are not known: enough for any, few in vain, and what plans and launches say."""

from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from emulated import options_of, problem_of, ragged_options
from hypothesis import given
from hypothesis import strategies as st
from rounds import places_of_blocks

from cupyattn.cuda.launching.gradients import backward_recipe
from cupyattn.cuda.launching.launch import recipe_of
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.plan import choose, choose_backward, num_tiles, tile_of_round
from cupyattn.plan.tiling import MOST_ROUNDS, balanced_section
from cupyattn.problem import NAMED_DEVICES, Span

LENGTHS = st.lists(st.integers(0, 700), min_size=1, max_size=40)


@given(LENGTHS, st.sampled_from([1, 16, 42, 64, 128]), st.integers(0, 300))
def test_there_is_a_tile_for_every_row_of_any_lengths(lengths, size, behind):
    most = num_tiles(len(lengths), max(lengths), size, sum(lengths) + behind)
    assert sum(-(-length // size) for length in lengths) <= most <= num_tiles(len(lengths), max(lengths), size)


@given(st.integers(1, 200), st.integers(1, 60), st.booleans())
def test_every_tile_is_taken_in_one_round_by_one_block(count, blocks, forth_and_back):
    rounds = range(-(-count // blocks))
    taken = [tile_of_round(x, block, blocks, forth_and_back) for x in rounds for block in range(blocks)]
    assert sorted(taken) == [*range(len(rounds) * blocks)]


@pytest.mark.parametrize("heads", [(16, 16), (32, 8), (28, 4)], ids=str)
@pytest.mark.parametrize("seqlen", [1536, 2048, 3072, 4096, 8192, 16384])
def test_no_block_has_much_more_to_do_than_others_under_a_causal_mask(seqlen, heads):
    shapes = [(16384 // seqlen, seqlen, count, 128) for count in (heads[0], heads[1], heads[1])]
    arrays = {name: np.empty(shape, ml_dtypes.bfloat16) for name, shape in zip("qkv", shapes, strict=True)}
    plan = choose(problem_of(arrays, options_of(causal=True)), NAMED_DEVICES["H100"])
    units = 16384 // seqlen * heads[0] // plan.tile.heads_per_unit
    shares = [sum(place + 2 for place in places) for places in places_of_blocks(plan, seqlen, units)]
    assert plan.tile.persistent
    assert max(shares) <= 1.02 * sum(shares) / len(shares)


WORK = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(tuple)


@given(WORK, st.integers(1, 60), st.integers(1, 40), st.integers(1, 20))
def test_a_section_is_the_best_of_its_like_as_blocks_take_tiles(work, units, most, blocks):
    def busiest(section):
        tile = SimpleNamespace(tokens=1, units_per_section=section)
        plan = SimpleNamespace(tile=tile, num_workers=blocks)
        return max(sum(work[place] for place in its) for its in places_of_blocks(plan, len(work), units))

    found = balanced_section(work, units, most, blocks)
    if blocks < len(work) * units <= MOST_ROUNDS * blocks and most > 1:
        others = range(most // 2 + 1, min(units, most + most // 16) + 1)
        assert found in {most, *others}
        assert busiest(found) <= 1.005 * min(busiest(x) for x in {most, *others})
    else:
        assert found == most


def test_a_section_is_as_large_as_it_may_be_where_nothing_is_gained():
    assert balanced_section((3,) * 16, 128, 32, 128) == 32


@pytest.mark.parametrize("more", [{"window_size": (200, 0)}, {"seqlen_k": 3000}], ids=str)
def test_sections_go_by_what_tiles_see(more):
    seqlen_k = more.pop("seqlen_k", 1536)
    shapes = {"q": (8, 1536, 16, 128), "k": (8, seqlen_k, 16, 128), "v": (8, seqlen_k, 16, 128)}
    arrays = {name: np.empty(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    problem = problem_of(arrays, options_of(causal=True, alignment="bottom-right", **more))
    plan = choose(problem, NAMED_DEVICES["H100"])
    size = plan.tile.block_k

    def blocks(place):
        rows = Span(128 * place, 128 * place + 128)
        keys = problem.mask.touched(rows, 1536, seqlen_k)
        return -(-keys.stop // size) - keys.start // size + 1

    def busiest(plan):
        return max(sum(map(blocks, places)) for places in places_of_blocks(plan, 1536, 128))

    others = [replace(plan, tile=plan.tile._replace(units_per_section=x)) for x in (17, 20, 24, 32)]
    assert plan.tile.tokens == 128
    assert busiest(plan) <= 1.005 * min(map(busiest, others))


def skewed(rng, longest=8192, total=65536, batch=64):
    """Lengths of so many sequences, one of them much longer than the others, in any order."""
    cuts = np.sort(rng.choice(np.arange(1, total - longest), batch - 2, replace=False))
    lengths = np.diff([0, *cuts, total - longest])
    return rng.permutation([longest, *lengths])


def call(lengths, heads=32, head_dim=128, heads_kv=None):
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    counts = (heads, heads_kv or heads, heads_kv or heads)
    operands = {
        name: np.broadcast_to(np.float16(0), (starts[-1], count, head_dim))
        for name, count in zip("qkv", counts, strict=True)
    }
    arrays = operands | {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    views = {name: view_of_numpy(x, x.dtype.name)._replace(pointer=0) for name, x in arrays.items()}
    views |= {name: views[name]._replace(strides=(x.shape[1] * head_dim, head_dim, 1)) for name, x in operands.items()}
    options = ragged_options(arrays, causal=True, alignment="bottom-right")
    return problem_of(arrays, options), views


SKEWED = [("A100", "flash", 64, 34848), ("H100", "hopper", 128, 18464)]


@pytest.mark.parametrize(("device", "kernel", "rows", "blocks"), SKEWED)
def test_the_grid_of_a_skewed_batch_is_little_more_than_its_tiles(rng, device, kernel, rows, blocks):
    """64 sequences, the longest of 8192, 65536 tokens, 32 heads: as many as the longest would be 133120 of 128 rows."""
    lengths = skewed(rng)
    problem, views = call(lengths)
    plan = choose(problem, NAMED_DEVICES[device])
    real = 32 * int((-(-lengths // rows)).sum())
    assert (plan.kernel, plan.num_workers) == (kernel, blocks)
    assert recipe_of(plan, problem, views).grid == (blocks, 1, 1)
    assert real <= blocks <= 1.1 * real
    assert f"up to {blocks} tiles of {rows} rows" in plan.reason


@pytest.mark.parametrize("group", [1, 4, 7])
def test_the_grid_of_uneven_rows_over_few_keys_is_not_as_the_longest_has_it(group):
    """Of 256 sequences one has 64 rows that share keys, and 255 have a token each."""
    lengths = np.array([1] * 128 + [64 // group] + [1] * 127)
    problem, views = call(lengths, heads=8 * group, heads_kv=8)
    plan = choose(problem, NAMED_DEVICES["A100"], allowed=("splitkv",))
    real = 8 * int((-(-lengths * group // plan.tile.block_q)).sum())
    assert (plan.kernel, plan.num_splits) == ("splitkv", 1)
    assert recipe_of(plan, problem, views).grid == (plan.num_workers, 1, 1)
    assert real <= plan.num_workers <= 1.5 * real


@pytest.mark.parametrize("device", ["A100", "H100"])
def test_sequences_as_long_as_each_other_have_the_tiles_of_the_longest(device):
    problem, views = call([1024] * 64)
    plan = choose(problem, NAMED_DEVICES[device])
    rows = plan.tile.block_q
    assert plan.num_workers == 32 * 65 * 1024 // rows
    assert recipe_of(plan, problem, views).grid == (plan.num_workers, 1, 1)


@pytest.mark.parametrize("device", ["A100", "H100"])
def test_a_plan_of_sequences_side_by_side_has_no_more_tiles_than_they_have(device, rng):
    x = rng.standard_normal((3, 1000, 4, 64)).astype("f2")
    problem = problem_of({"q": x, "k": x, "v": x}, options_of(causal=True, alignment="bottom-right"))
    plan = choose(problem, NAMED_DEVICES[device])
    views = {name: view_of_numpy(x, "float16") for name in "qkv"}
    assert plan.num_workers == 12 * -(-1000 // plan.tile.block_q)
    assert recipe_of(plan, problem, views).grid == (plan.num_workers, 1, 1)
    assert "up to" not in plan.reason


def gradients_of(lengths, device):
    """(plan, [(source, whether packed, grid times heads of a block, rows of its tiles)]) of the passes.

    Of blocks that look for tiles to be made again there are other numbers: None.
    """
    problem, views = call(lengths)
    like = views["q"]
    rows = like._replace(shape=(32, like.shape[0]), strides=(like.shape[0], 1), dtype="float32")
    plan = choose_backward(problem, NAMED_DEVICES[device])
    steps = backward_recipe(plan, problem, views | {"dout": like, "out": like, "lse": rows}).steps[1:]
    found = []
    for step in steps:
        on_hopper = step.specialisation.source == "hopper_backward.cu"
        passes = plan.tile.passes if on_hopper or plan.instead is None else plan.instead.tile.passes
        number = len(found) // (1 if plan.instead is None else 2)
        expression = step.specialisation.expression
        whole = None if "_again" in expression else step.grid * step.heads_per_block
        found.append((step.specialisation.source, "_packed<" in expression, whole, passes[number][1].stays))
    return plan, found


GRADIENTS = [("A100", ["backward.cu"] * 2), ("H100", ["hopper_backward.cu", "backward.cu"] * 2)]


@pytest.mark.parametrize(("device", "kernels"), GRADIENTS)
def test_the_grids_of_gradients_of_a_skewed_batch_are_little_more_than_their_tiles(rng, device, kernels):
    """As many as the longest would be 133120 of 128 rows, for queries and for keys, too."""
    lengths = skewed(rng)
    plan, found = gradients_of(lengths, device)
    assert [source for source, *_ in found] == kernels
    for _, packed, blocks, rows in found:
        real = 32 * int((-(-lengths // rows)).sum())
        assert packed
        assert blocks is None or real <= blocks <= 1.1 * real
    assert f"up to {32 * (65536 // 128 + 64)} tiles of 128 queries" in plan.reason


@pytest.mark.parametrize("device", ["A100", "H100"])
def test_gradients_of_sequences_as_long_as_each_other_have_the_kernels_of_a_dense_batch(device):
    _, found = gradients_of([1024] * 64, device)
    for _, packed, blocks, rows in found:
        assert not packed
        assert blocks in (None, 32 * 64 * 1024 // rows)


@pytest.mark.parametrize("lengths", [[300, 1, 1, 1, 0], [128] * 5, [129, 0, 0], [1], [130] * 4 + [1]], ids=str)
def test_both_kernels_of_a_pass_find_tiles_alike(lengths):
    """Where those of Hopper have tiles by where sequences begin, so have those that look at what these flagged."""
    _, found = gradients_of(lengths, "H100")
    assert [packed for _, packed, *_ in found[::2]] == [packed for _, packed, *_ in found[1::2]]
