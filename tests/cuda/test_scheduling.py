"""Schedules that are made once and given to the calls of all layers, under the emulator."""

import numpy as np
import pytest

import cupyattn


def step(torch, pages=False, rows=1):
    """Arguments of a decode over caches of 2048 places, one new token for each of three sequences."""
    torch.manual_seed(0)
    shape = (3 * 64, 32, 2, 64) if pages else (3, 2048, 2, 64)
    arguments = {
        "q": torch.randn(3, rows, 4, 64).half(),
        "k_cache": torch.randn(shape).half(),
        "v_cache": torch.randn(shape).half(),
        "k": torch.randn(3, 1, 2, 64).half(),
        "v": torch.randn(3, 1, 2, 64).half(),
        "cache_seqlens": torch.tensor([2000, 3, 700], dtype=torch.int32),
        "causal": True,
    }
    if pages:
        arguments["block_table"] = torch.randperm(3 * 64).reshape(3, 64).int()
    return arguments


def metadata_of(arguments, **changes):
    given = {"page_size": 32 if "block_table" in arguments else None, "causal": True, "max_seqlen_k_new": 1, **changes}
    return cupyattn.get_scheduler_metadata(3, 1, 2048, 4, 2, 64, arguments["cache_seqlens"], "float16", **given)


def sources(driver):
    return [what.source for what, _ in driver.launches]


@pytest.mark.parametrize("pages", [False, True])
def test_layers_that_are_given_a_schedule_do_not_make_it(torch, driver, pages):
    arguments = step(torch, pages)
    alone = {name: x.clone() if hasattr(x, "clone") else x for name, x in arguments.items()}
    expected = cupyattn.flash_attn_with_kvcache(**alone)
    driver.launches.clear()
    made = metadata_of(arguments)
    assert made.dtype == torch.int32
    for _ in range(2):
        out = cupyattn.flash_attn_with_kvcache(**arguments, scheduler_metadata=made)
        assert torch.equal(out, expected)
    assert sources(driver) == ["schedule.cu", *2 * ["append.cu", "splitkv.cu", "merge.cu"]]


def test_a_schedule_of_the_step_before_gives_the_same_within_rounding(torch, driver):
    arguments = step(torch)
    made = metadata_of(arguments)
    arguments["cache_seqlens"][:] = torch.tensor([1, 1900, 900])
    expected = cupyattn.flash_attn_with_kvcache(**arguments)
    out = cupyattn.flash_attn_with_kvcache(**arguments, scheduler_metadata=made)
    np.testing.assert_allclose(out.float().numpy(), expected.float().numpy(), atol=2e-3)


def test_an_empty_schedule_says_nothing(torch, driver):
    arguments = step(torch)
    cupyattn.flash_attn_with_kvcache(**arguments, scheduler_metadata=torch.zeros(0, dtype=torch.int32))
    assert sources(driver) == ["append.cu", "schedule.cu", "splitkv.cu", "merge.cu"]


def test_nothing_is_made_for_a_cache_that_is_not_cut(torch, driver):
    arguments = step(torch)
    assert metadata_of(arguments, num_splits=1).shape == (0,)
    assert driver.launches == []


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda x: x[:-1].clone(), ValueError, "was made for other calls"),
        (lambda x: x[:, None], ValueError, "int32 of one axis"),
        (lambda x: x.long(), TypeError, "int32 of one axis"),
        (lambda x: x.repeat(2)[::2], ValueError, "lie as get_scheduler_metadata made it"),
    ],
)
def test_what_is_no_schedule_of_these_calls_is_refused_before_anything_is_written(torch, driver, change, kind, words):
    arguments = step(torch)
    made, before = metadata_of(arguments), arguments["k_cache"].clone()
    driver.launches.clear()
    with pytest.raises(kind, match=words):
        cupyattn.flash_attn_with_kvcache(**arguments, scheduler_metadata=change(made))
    assert driver.launches == []
    assert torch.equal(arguments["k_cache"], before)
