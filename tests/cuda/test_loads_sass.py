"""What ptxas makes of loads that are not copied as they are: none of them is waited for alone."""

import re
import sys
from pathlib import Path

import pytest
from resources import instructions

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import flash_tile, split_tile
from cupyattn.problem import FLOAT8, ITEMSIZE, NAMED_DEVICES

SUITE = Path(__file__).parents[2] / "asv_benchmarks"

pytestmark = pytest.mark.usefixtures("nvrtc")


@pytest.fixture
def flight(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SUITE), *sys.path])
    import flight

    return flight


def text_of(what, device, tmp_path):
    target = compiler.target_for(device.compute_capability)
    return instructions(compiler.compile_cubin(source.join(what.source), what.expression, target), tmp_path)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [FLOAT8, "float32"])
def test_a_decode_copies_all_keys_and_values_beside_the_arithmetic(flight, dtype, head_dim, tmp_path):
    device = NAMED_DEVICES["A100" if head_dim == 64 else "H200"]
    tile = split_tile(head_dim, 1, dtype, device.shared_memory)
    what = catalogue.splitkv(dtype, head_dim, head_dim, tile, True, 0, False)
    body = flight.walk_of(*text_of(what, device, tmp_path))
    copies = [text for text in body if re.search(r"\bLDGSTS\S*\.128\b", text)]
    assert 16 * 32 * len(copies) == 16 * 2 * head_dim * ITEMSIZE[dtype], "of the warp's keys and values, all bytes once"
    assert not flight.has(body, "LDG")
    assert not flight.has(body, "STS")


@pytest.mark.parametrize(("head_dim", "name"), [(64, "H200"), (128, "A100")])
def test_a_prefill_of_float32_asks_for_all_that_a_thread_stores_before_it_stores(flight, head_dim, name, tmp_path):
    device = NAMED_DEVICES[name]
    tile = flash_tile(head_dim, "float32", device.shared_memory)
    text, _ = text_of(catalogue.flash("float32", head_dim, head_dim, tile, True, 0), device, tmp_path)
    waits = flight.waits([line for line in text if re.search(r"\b(LDG|STS)\S*\.128\b", line)])
    assert len(waits) >= 7, "queries, and keys and values of both walks"
    assert min(waits) >= 96, "of the 128 bytes of four chunks"


def test_a_decode_of_float8_keeps_more_bytes_under_way_than_memory_is_far(flight, capsys):
    flight.main(["--only", "128 float8"])
    head, row = capsys.readouterr().out.splitlines()
    found = dict(zip(head.replace("under way", "under_way").split(), re.split(r" {2,}", row), strict=True))
    assert (found["head_dim"], found["blocks"], found["warps"], found["stage"]) == ("128 float8", "2", "4", "4.0 KB")
    assert int(found["under_way"].removesuffix(" KB")) >= 36
