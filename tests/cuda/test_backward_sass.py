"""What ptxas makes of the gradients: nothing of a walk is spilled where sums of 16 rows leave room.

What it keeps in memory of a block is asked for once a head, outside of the walks.
"""

import pytest
from resources import instructions

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import backward_tile, passes_of
from cupyattn.problem import NAMED_DEVICES

DEVICES = {
    compiler.target_for(device.compute_capability): device
    for device in NAMED_DEVICES.values()
    if device.compute_capability >= (8, 0)
}
TARGETS = [target if target == "sm_80" else pytest.param(target, marks=pytest.mark.long) for target in DEVICES]

pytestmark = pytest.mark.usefixtures("nvrtc")


@pytest.mark.parametrize("wanted", passes_of(128), ids=["dq", "dk and dv"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_in_a_walk(target, head_dim, wanted, tmp_path):
    tile = backward_tile(head_dim, "bfloat16", DEVICES[target].shared_memory, wanted)
    what = catalogue.backward("bfloat16", head_dim, head_dim, tile, wanted, True, 0)
    cubin = compiler.compile_cubin(source.join(what.source), what.expression, target)
    found, loops = instructions(cubin, tmp_path)
    spans = [(start, stop) for start, stop in loops if any("HMMA" in text for text in found[start : stop + 1])]
    inner = sorted(x for x in spans if not any(x[0] <= y[0] and y[1] <= x[1] for y in spans if y != x))
    walk, *with_care = (found[start : stop + 1] for start, stop in inner)
    along, sums = head_dim // 16 * tile.moves // 8 * 2, tile.moves // 16 * head_dim // 8 * (2 if wanted != 1 else 1)
    assert sum("HMMA" in text for text in walk) == 2 * (along + sums), "of whole tiles, and of those of an edge"
    assert with_care != []
    assert [text for body in (walk, *with_care) for text in body if "LDL" in text or "STL" in text] == []
