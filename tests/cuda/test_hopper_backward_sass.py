"""What ptxas makes of Hopper's gradients: nothing serialised or spilled in the walk, and the overlap that was meant."""

import re
from typing import NamedTuple

import pytest
from resources import instructions

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import OF_KEYS, OF_QUERIES, OF_VALUES, hopper_backward_tile

TOGETHER = OF_KEYS | OF_VALUES
LOW_CAP = catalogue.SOFTCAP | catalogue.LOW_CAP
KERNELS = {
    "64, dq": (64, 64, OF_QUERIES, 0),
    "64, dk and dv": (64, 64, TOGETHER, 0),
    "96, dk and dv": (96, 96, TOGETHER, 0),
    "128, dq": (128, 128, OF_QUERIES, 0),
    "128, dk and dv": (128, 128, TOGETHER, 0),
    "192, dv": (192, 192, OF_VALUES, 0),
    "256, dq": (256, 256, OF_QUERIES, 0),
    "256, dk": (256, 256, OF_KEYS, 0),
    "64, dq, softcap": (64, 64, OF_QUERIES, LOW_CAP),
    "128, dq, softcap": (128, 128, OF_QUERIES, LOW_CAP),
    "128, dk and dv, softcap": (128, 128, TOGETHER, LOW_CAP),
    "128, dk and dv, high softcap": (128, 128, TOGETHER, catalogue.SOFTCAP),
    "192, dk, softcap": (192, 192, OF_KEYS, LOW_CAP),
    "256, dk, softcap": (256, 256, OF_KEYS, LOW_CAP),
    "128, dq, ALiBi": (128, 128, OF_QUERIES, catalogue.ALIBI),
    "128, dk and dv, ALiBi": (128, 128, TOGETHER, catalogue.ALIBI),
    "256, dk, ALiBi": (256, 256, OF_KEYS, catalogue.ALIBI),
}

pytestmark = pytest.mark.usefixtures("nvrtc")


class Kernel(NamedTuple):
    head_dim: int
    head_dim_v: int
    wanted: int
    edits: int
    tile: object
    cubin: object
    found: list
    """Its instructions."""
    walk: list
    """Those of the one innermost loop that has products in it."""


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request, tmp_path_factory):
    head_dim, head_dim_v, wanted, edits = KERNELS[request.param]
    tile = hopper_backward_tile(head_dim, head_dim_v, wanted, bool(edits & catalogue.SOFTCAP))
    what = catalogue.hopper_backward("bfloat16", head_dim, head_dim_v, tile, wanted, edits)
    cubin = compiler.compile_cubin(source.join(what.source), what.expression, "sm_90a")
    found, loops = instructions(cubin, tmp_path_factory.mktemp("sass"))
    bodies = [found[start : stop + 1] for start, stop in loops if places(found[start : stop + 1], "HGMMA")]
    return Kernel(head_dim, head_dim_v, wanted, edits, tile, cubin, found, min(bodies, key=len))


def places(body, word):
    return [index for index, text in enumerate(body) if word in text]


def test_no_product_waits_for_the_one_before(kernel):
    """Serialised, each of a tile's products would be waited for alone: half of the speed, in a line of the log."""
    assert re.findall(r"C75\d\d[^\n]*|warning[^\n]*", kernel.cubin.log) == []


def test_nothing_is_spilled_in_the_walk(kernel):
    body = kernel.walk
    assert places(body, "LDL") + places(body, "STL") == []


def test_a_tile_takes_the_products_that_it_was_designed_to(kernel):
    body = kernel.walk
    along, down = (kernel.head_dim // 16, kernel.head_dim_v // 16), kernel.tile.moves // 16
    changes = along[1] if kernel.wanted != OF_VALUES else 0
    sums = down * (2 if kernel.wanted == TOGETHER else 1)
    assert len(places(body, "HGMMA")) == along[0] + changes + sums == len(places(kernel.found, "HGMMA"))
    waits = [text.split("gsb0, ")[1] for text in body if "WARPGROUP.DEPBAR" in text]
    assert waits == (["0x1", "0x1", "0x0"] if changes else ["0x1", "0x0"])


def test_every_exponential_runs_beside_the_second_product(kernel):
    if kernel.wanted == OF_VALUES:
        return  # there is none
    body = kernel.walk
    _, scores_are_there, changes_are_there = places(body, "WARPGROUP.DEPBAR")
    exponentials = places(body, "MUFU.EX2")
    of_a_score = 2 if kernel.edits & catalogue.SOFTCAP else 1  # which is a tanh first
    assert len(exponentials) == 2 * of_a_score * kernel.tile.moves // 2, "for whole tiles, and for those of an edge"
    assert scores_are_there < exponentials[0] < exponentials[-1] < changes_are_there
    last_of_changes = max(index for index in places(body, "HGMMA") if index < scores_are_there)
    assert last_of_changes > places(body, "WARPGROUP.DEPBAR")[0], "under way when the scores have come"


def test_warpgroups_share_out_no_more_registers_than_the_launch_has(kernel):
    of_kind = {
        kind: [
            int(x, 16)
            for text in kernel.found
            for x in re.findall(rf"USETMAXREG\.{kind}\S* (?:\w+, )?(0x[0-9a-f]+)", text)
        ]
        for kind in ("DEALLOC", "TRY_ALLOC")
    }
    assert of_kind == {"DEALLOC": [40], "TRY_ALLOC": [232]}
    assert kernel.cubin.resources.registers == 168, "what ptxas gives 384 threads: 40 + 2 * 232 = 3 * 168"
