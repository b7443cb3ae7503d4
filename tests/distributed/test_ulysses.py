"""Ulysses is attention, with any number of heads for any number of ranks; and so are its gradients."""

import ml_dtypes
import numpy as np
import pytest
from oracle import assert_correctly_rounded, assert_matches
from ranks import TIMEOUT, draw, drawn_options, on_one_device, on_ranks

from cupyattn import attention
from cupyattn.distributed import Sharding, run_ranks, ulysses_attention, ulysses_attention_backward
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard

NAMES = list(drawn_options(np.random.default_rng(0)))
FEW_UNITS = {"rtol": 1e-12, "atol": 1e-13}
BOTH = {"forward": ulysses_attention, "backward": ulysses_attention_backward}


def assert_same(arrays, size, kind, options):
    found, expected = on_ranks(arrays, size, kind, options, **BOTH), on_one_device(arrays, options)
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        assert_matches(actual, wanted, **FEW_UNITS)
    for name, wanted in expected[2].items():
        assert_matches(found[2][name], wanted, **FEW_UNITS)


@pytest.mark.parametrize("name", NAMES)
def test_with_every_argument_it_is_attention_to_a_few_units_and_so_are_gradients(name, rng):
    assert_same(draw(rng), 3, "zigzag", drawn_options(rng)[name])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (4, 4)])
def test_any_number_of_heads_and_ranks(size, heads, rng):
    options = {"causal": True, "sinks": rng.standard_normal(heads[0]), "alibi_slopes": rng.random((2, heads[0]))}
    assert_same(draw(rng, 13, heads=heads), size, "striped", options)


@pytest.mark.parametrize("heads", [(8, 2), (12, 4)])
def test_heads_of_one_rank_may_use_key_heads_unequally(heads, rng):
    """On 3 ranks, heads 2, 3 and 4 of 8 use key heads 0, 0 and 1 of 2; heads 0 to 3 of 12 use 0, 0, 0 and 1 of 4."""
    assert_same(draw(rng, 7, heads=heads), 3, "contiguous", {"causal": True})


def test_a_bias_that_is_one_for_all_heads_is_added_up(rng):
    assert_same(draw(rng, 9), 3, "contiguous", {"bias": rng.standard_normal((9, 9))})


def test_one_row_on_each_rank_has_its_own_mask(rng):
    assert_same(draw(rng, 3), 3, "contiguous", {"mask": np.tri(3, dtype=bool)})


def test_a_mask_of_own_rows_on_one_rank_alone_is_refused(rng):
    q, k, v, _ = draw(rng, 6)

    def rank(comm):
        own = slice(3 * comm.rank, 3 * comm.rank + 3)
        mask = np.ones((3 if comm.rank else 1, 6), bool)
        with pytest.raises(ValueError, match="own rows on all ranks, or one for all"):
            ulysses_attention(q[:, own], k[:, own], v[:, own], mask=mask, comm=comm)
        ulysses_attention(q[:, own], k[:, own], v[:, own], comm=comm)  # nobody has given up for that
        return True

    assert run_ranks(rank, 2, timeout=TIMEOUT) == [True, True]


def test_queries_and_keys_of_different_lengths(rng):
    assert_same(draw(rng, 7, 12), 2, "zigzag", {"causal": True, "alignment": "bottom-right"})


@pytest.mark.parametrize(
    "layout", [Sharding("zigzag", 2, (5, 0, 8)), Sharding("contiguous", 2, (5, 0, 8), ((5, 0, 1), (0, 0, 7)))]
)
def test_packed_sequences(layout, rng):
    lengths, slopes = layout.seqlens, rng.random((3, 4))
    q, k, v, dout = (x[0] for x in draw(rng, sum(lengths), batch=1))

    def rank(comm):
        own = {"causal": True, "alibi_slopes": slopes, "comm": comm, "sharding": layout}
        mine = [shard(x, layout, comm.rank, axis=0) for x in (q, k, v, dout)]
        return ulysses_attention(*mine[:3], **own), ulysses_attention_backward(mine[3], *mine[:3], **own)

    outs, found = zip(*run_ranks(rank, 2, timeout=TIMEOUT), strict=True)
    out = unshard(outs, layout, axis=0)
    whole = {name: unshard([getattr(x, name) for x in found], layout, axis=0) for name in ("dq", "dk", "dv")}
    for i, rows in enumerate([slice(0, 5), slice(5, 5), slice(5, 13)]):
        mine, options = [x[None, rows] for x in (q, k, v, dout)], {"causal": True, "alibi_slopes": slopes[i]}
        expected = on_one_device(mine, options)
        assert_matches(out[rows], expected[0][0], **FEW_UNITS)
        for name, gradient in whole.items():
            assert_matches(gradient[rows], expected[2][name][0], **FEW_UNITS)
        assert_matches(sum(x.dalibi_slopes for x in found)[i], expected[2]["dalibi_slopes"], **FEW_UNITS)


def test_bfloat16_is_rounded_once(rng):
    arrays = draw(rng, dtype=ml_dtypes.bfloat16)
    out, _, gradients = on_ranks(arrays, 2, "contiguous", {}, **BOTH)
    exact = on_one_device([x.astype(np.float64) for x in arrays], {})
    assert_correctly_rounded(out, exact[0], "bfloat16")
    assert_correctly_rounded(gradients["dk"], exact[2]["dk"], "bfloat16", share=0.995)


def test_torch_has_gradients_by_its_autograd(rng):
    torch = pytest.importorskip("torch", reason="needs torch")
    x = torch.from_numpy(draw(rng, 6)[0])

    def rank(comm):
        own = x[:, 3 * comm.rank : 3 * comm.rank + 3].clone().requires_grad_()
        ulysses_attention(own, own, own, comm=comm, causal=True).square().sum().backward()
        return own.grad

    whole = x.clone().requires_grad_()
    attention(whole, whole, whole, causal=True).square().sum().backward()
    assert torch.allclose(torch.cat(run_ranks(rank, 2, timeout=TIMEOUT), dim=1), whole.grad)
