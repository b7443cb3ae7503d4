"""What ptxas makes of the gradients on Ampere: nothing of a walk is spilled where sums of 16 rows leave room."""

import pytest
from resources import instructions

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import backward_tile, passes_of
from cupyattn.problem import NAMED_DEVICES

ROOM = NAMED_DEVICES["A100"].shared_memory

pytestmark = pytest.mark.usefixtures("nvrtc")


@pytest.mark.parametrize("wanted", passes_of(128), ids=["dq", "dk and dv"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_nothing_is_spilled_in_the_walk(head_dim, wanted, tmp_path):
    tile = backward_tile(head_dim, "bfloat16", ROOM, wanted)
    what = catalogue.backward("bfloat16", head_dim, head_dim, tile, wanted, True, 0)
    cubin = compiler.compile_cubin(source.join(what.source), what.expression, "sm_80")
    found, loops = instructions(cubin, tmp_path)
    spans = [(start, stop) for start, stop in loops if any("HMMA" in text for text in found[start : stop + 1])]
    # Two loops are innermost ones: the walk, and behind it that with care, which may spill.
    inner = [x for x in spans if not any(x[0] <= y[0] and y[1] <= x[1] for y in spans if y != x)]
    start, stop = min(inner)
    body = found[start : stop + 1]
    products = sum("HMMA" in text for text in body)
    along, sums = head_dim // 16 * tile.moves // 8 * 2, tile.moves // 16 * head_dim // 8 * (2 if wanted != 1 else 1)
    assert products == 2 * (along + sums), "of whole tiles, and of those of an edge"
    assert [text for text in body if "LDL" in text or "STL" in text] == []
