"""On a Hopper GPU: its kernel against the definition, and flash beside it; run by `make gpu`."""

from dataclasses import replace

import numpy as np
import pytest
from emulated import (
    STORED,
    assert_close_lse,
    assert_within_the_bar,
    cut_off,
    definition,
    emulation,
    operands,
    options_of,
    problem_of,
    ragged_operands,
    ragged_options,
)

import cupyattn
from cupyattn import cuda
from cupyattn.plan import choose
from cupyattn.plan.hopper import Switches

pytestmark = pytest.mark.gpu
FLOAT8 = "float8_e4m3fn"
BITS = {"bfloat16": ("i2", "bfloat16"), FLOAT8: ("u1", "float8_e4m3fn")}


@pytest.fixture(scope="module")
def torch():
    found = pytest.importorskip("torch")
    if not found.cuda.is_available() or found.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU, and a torch with CUDA")
    return found


def there(torch, arrays):
    """NumPy arrays as tensors on the GPU, those of small dtypes by their bits."""
    found = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        bits, dtype = BITS.get(array.dtype.name, (array.dtype, None))
        tensor = torch.from_numpy(array.view(bits)).cuda()
        found[name] = tensor.view(getattr(torch, dtype)) if dtype else tensor
    return found


def launched(torch, arrays, problem, **edits):
    """(out, lse, plan) of a launch by the plan, with a tile of other numbers."""
    from cupyattn.arrays import enter

    visit = enter("attention", {name: (name, x) for name, x in there(torch, arrays).items()})
    plan = choose(problem, visit.device())
    assert plan.kernel == "hopper"
    plan = replace(plan, tile=plan.tile._replace(**edits))
    found = cuda.run("attention", visit.library.title, visit.arrays, dict(visit.specs), plan, problem, 0)
    return found["out"].float().cpu().numpy(), found["lse"].cpu().numpy(), plan


def hold(torch, arrays, options, **edits):
    problem = problem_of(arrays, options)
    out, lse, plan = launched(torch, arrays, problem, **edits)
    exact_out, exact_lse = definition(arrays, problem)
    assert_close_lse(lse, exact_lse, cut_off(arrays, problem, plan.kernel, exact_lse))
    emulated = emulation(arrays, problem, plan.tile.block_k)
    largest = np.abs(np.asarray(arrays["v"]).astype(np.float64)).max(initial=0.0)
    assert_within_the_bar(out.astype(STORED[problem.out_dtype]), exact_out, emulated, problem.out_dtype, largest)


MASKS = {
    "full": {},
    "causal": {"causal": True, "alignment": "bottom-right"},
    "window": {"window_size": (200, 30), "alignment": "top-left"},
}
DIMS = [(64, 64), (72, 72), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlens", [(1000, 1300), (200, 130)], ids=str)
def test_every_head_dim(torch, rng, dtype, dims, mask, seqlens):
    hold(torch, operands(rng, dtype, "bshd", 2, (4, 2, 2), seqlens, dims), options_of(**mask))


SWITCHES = [
    *(
        Switches(ping_pong=turns, overlap=overlap, pinned=overlap)
        for turns in (True, False)
        for overlap in (True, False)
    ),
    *(Switches(lazy=True), Switches(rescale_first=True), Switches(lazy=True, rescale_first=True)),
    *(Switches(weights_in_shared=True), Switches(polynomials=8)),
]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch(torch, rng, switches, mask):
    arrays = operands(rng, "bfloat16", "bshd", 2, (4, 4, 4), (700, 900), (64, 64))
    hold(torch, arrays, options_of(**mask), switches=switches, block_k=96)


@pytest.mark.parametrize("heads", [(8, 2, 2), (7, 1, 1), (32, 2, 2)], ids=str)
def test_packed_heads(torch, rng, heads):
    arrays = operands(rng, "float16", "bshd", 2, heads, (70, 900), (128, 128))
    hold(torch, arrays, options_of(causal=True, alignment="bottom-right"), heads_per_unit=heads[0] // heads[1])


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", FLOAT8])
def test_clusters_do_not_change_a_bit(torch, rng, dtype, dims):
    if dtype == FLOAT8:
        dims = (dims[1], dims[1])
    arrays = operands(rng, dtype, "bshd", 3, (8, 4, 4), (3 * 256, 900), dims)
    problem = problem_of(arrays, options_of())
    (alone, lse, _), (together, other_lse, _) = (
        launched(torch, arrays, problem, cluster=cluster) for cluster in (1, 2)
    )
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(lse, other_lse)
    hold(torch, arrays, options_of(), cluster=2)


@pytest.mark.parametrize("options", [{}, {"softmax_scale": -0.3}], ids=len)
@pytest.mark.parametrize("dtype", ["bfloat16", FLOAT8])
def test_clusters_of_rows_before_the_keys(torch, rng, dtype, options):
    arrays = operands(rng, dtype, "bshd", 1, (2, 1, 1), (256, 5), (128, 128))
    hold(torch, arrays, options_of(alignment="bottom-right", **options), cluster=2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sums_of_many_float8_products_do_not_fall_behind(torch, rng, head_dim):
    arrays = operands(rng, FLOAT8, "bshd", 1, (2, 2, 2), (256, 32768), (head_dim, head_dim))
    arrays["v"] = rng.uniform(0.5, 1.5, arrays["v"].shape).astype(arrays["v"].dtype)
    hold(torch, arrays, options_of())


def test_many_tiles_to_a_block(torch, rng):
    hold(torch, operands(rng, "float16", "bshd", 4, (40, 40, 40), (300, 200), (64, 64)), options_of())


@pytest.mark.parametrize("behind", [(0, 0), (300, 9)], ids=["to the end", "rows behind"])
def test_sequences_end_to_end(torch, rng, behind):
    arrays = ragged_operands(rng, "bfloat16", (5, 700, 0, 77), (70, 640, 33, 12), (4, 2, 2), behind=behind)
    hold(torch, arrays, ragged_options(arrays, causal=True, alignment="bottom-right"))


@pytest.mark.parametrize("edits", ["sinks", "softcap"])
def test_edited_scores(torch, rng, edits):
    arrays = operands(rng, "float16", "bshd", 2, (4, 2, 2), (300, 500), (64, 64))
    if edits == "sinks":
        arrays["sinks"] = np.array([-1.0, 0.0, 3.0, 40.0], "f4")
    hold(torch, arrays, options_of(softcap=20.0 if edits == "softcap" else 0.0))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_float8(torch, rng, head_dim, mask):
    arrays = operands(rng, FLOAT8, "bshd", 2, (4, 2, 2), (500, 700), (head_dim, head_dim))
    for name in "qkv":
        arrays[f"{name}_descale"] = rng.uniform(0.5, 2.0, (2, 2)).astype("f4")
    hold(torch, arrays, options_of(**mask))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", FLOAT8])
def test_what_is_hidden_may_hold_nan(torch, rng, dtype):
    arrays = operands(rng, dtype, "bshd", 1, (2, 2, 2), (300, 300), (128, 128))
    options = options_of(causal=True, alignment="top-left")
    problem = problem_of(arrays, options)
    clean, _, _ = launched(torch, arrays, problem)
    for name in "kv":
        arrays[name][:, 200:] = np.nan
    found, _, _ = launched(torch, arrays, problem)
    np.testing.assert_array_equal(found[:, :200], clean[:, :200])
    assert np.isnan(found[:, 200:]).all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_flash_runs_where_there_are_no_maps(torch, rng, monkeypatch, head_dim, mask):
    real = cuda.device_of
    monkeypatch.setattr(cuda, "device_of", lambda *call: replace(real(*call), tensor_maps=False))
    arrays = operands(rng, "float16", "bshd", 2, (4, 2, 2), (300, 500), (head_dim, head_dim))
    q, k, v = there(torch, arrays).values()
    assert cupyattn.explain(q, k, v, **mask).kernel == "flash"
    out = cupyattn.attention(q, k, v, **mask)
    exact, _ = definition(arrays, problem_of(arrays, options_of(**mask)))
    np.testing.assert_allclose(out.float().cpu().numpy(), exact, atol=4e-3)


def test_arrays_without_maps_are_read_by_flash_and_said_to_be(torch):
    x = torch.randn(1, 200, 2, 68, device="cuda").half()[..., 4:]
    assert any("flash runs instead" in note for note in cupyattn.explain(x, x, x).notes)
    exact = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2).double()] * 3).transpose(1, 2)
    torch.testing.assert_close(cupyattn.attention(x, x, x).double(), exact, atol=4e-3, rtol=0)


def test_keys_that_batches_share_are_copied_for_maps_and_said_to_be(torch):
    q, k = torch.randn(3, 600, 4, 64, device="cuda").half(), torch.randn(1, 700, 2, 64, device="cuda").half()
    plan, whole = cupyattn.explain(q, k, k), k.repeat(3, 1, 1, 1)
    assert plan.kernel == "hopper"
    assert any(note.startswith("k is copied: no tensor map") for note in plan.notes)
    for _ in range(2):
        assert torch.equal(cupyattn.attention(q, k, k), cupyattn.attention(q, whole, whole))


@pytest.mark.parametrize("dtype", ["float16", FLOAT8])
@pytest.mark.parametrize("causal", [False, True])
def test_small_shapes_for_the_sanitizer(torch, rng, dtype, causal):
    arrays = operands(rng, dtype, "bshd", 1, (2, 1, 1), (150, 200), (64, 64))
    hold(torch, arrays, options_of(causal=causal, alignment="bottom-right" if causal else None))
