"""What ptxas makes of the Hopper kernel: its instructions, its registers, and whether its overlap survived."""

import re

import pytest
from resources import instructions, loops

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan.hopper import ALL_KEYS, BOTH_EDGES, RIGHT_EDGE, Switches, base_tile

BFLOAT16, FLOAT8 = "bfloat16", "float8_e4m3fn"
KERNELS = {
    "64, causal": (BFLOAT16, 64, 64, RIGHT_EDGE),
    "96, window": (BFLOAT16, 96, 96, BOTH_EDGES),
    "128": (BFLOAT16, 128, 128, ALL_KEYS),
    "128, causal": (BFLOAT16, 128, 128, RIGHT_EDGE),
    "192 and 128, causal": (BFLOAT16, 192, 128, RIGHT_EDGE),
    "128, in clusters": (BFLOAT16, 128, 128, ALL_KEYS, 2),
    "256, in clusters": (BFLOAT16, 256, 256, ALL_KEYS, 2),
    "128, float8": (FLOAT8, 128, 128, ALL_KEYS),
    "64, float8, causal": (FLOAT8, 64, 64, RIGHT_EDGE),
}

pytestmark = pytest.mark.usefixtures("nvrtc")


def compiled(dtype, head_dim, head_dim_v, reach, cluster=1, edited=0, **edits):
    tile = base_tile(head_dim, head_dim_v, reach, dtype)._replace(cluster=cluster, **edits)
    wanted = catalogue.hopper(dtype, head_dim, head_dim_v, tile, True, edited)
    return compiler.compile_cubin(source.join(wanted.source), wanted.expression, "sm_90a")


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request):
    """(dtype, cubin) of a default kernel."""
    return KERNELS[request.param][0], compiled(*KERNELS[request.param])


def walks(found, spans):
    """The bodies of the loops over blocks: two products each, whose waits come one after the other."""
    for start, stop in spans:
        body = found[start : stop + 1]
        waits = [(index, text[-1]) for index, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
        inner = any(start <= first and last < stop for first, last in spans if (first, last) != (start, stop))
        if [count for _, count in waits] == ["1", "0"] and not inner:
            yield body, *(index for index, _ in waits)


def test_hoppers_own_units_do_the_work(kernel, tmp_path):
    dtype, cubin = kernel
    found, _ = instructions(cubin, tmp_path)
    names = {re.match(r"(?:@!?U?P\w+ )?([A-Z0-9]+)", text)[1] for text in found}
    products = "QGMMA" if dtype == FLOAT8 else "HGMMA"
    assert {products, "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG", "STSM"} <= names
    assert "HMMA" not in names


def usual_walk(cubin, tmp_path):
    """(what a whole block takes if nothing has to shrink, all of that loop, how many loops are like it)."""
    found = list(loops(cubin, tmp_path))
    bodies = [body for body, *_ in walks(*instructions(cubin, tmp_path))]
    shortest = min(bodies, key=len)
    return next(loop.usual() for loop in found if loop.body == shortest), shortest, len(bodies)


@pytest.mark.parametrize(
    ("dtype", "reach", "edited", "most"),
    [
        (BFLOAT16, RIGHT_EDGE, 0, 470),
        (BFLOAT16, RIGHT_EDGE, catalogue.SOFTCAP | catalogue.LOW_CAP, 800),
        (BFLOAT16, RIGHT_EDGE, catalogue.ALIBI | catalogue.CAUSAL_ALIBI, 560),
        (BFLOAT16, RIGHT_EDGE, catalogue.ALIBI, 680),
        (FLOAT8, ALL_KEYS, 0, 480),
        (FLOAT8, RIGHT_EDGE, catalogue.ALIBI, 790),
    ],
    ids=["nothing", "softcap", "slopes under a causal mask", "slopes", "float8", "float8, slopes"],
)
def test_a_block_of_128_keys_takes_few_instructions(dtype, reach, edited, most, tmp_path):
    cubin = compiled(dtype, 128, 128, reach, edited=edited)
    usual, _, count = usual_walk(cubin, tmp_path)
    assert count == (2 if reach == RIGHT_EDGE else 1), "blocks at an edge, and whole ones"
    assert len(usual) <= most
    assert cubin.spills == 0


def test_sums_are_not_multiplied_alone(kernel, tmp_path):
    """Where nothing has to shrink they are leapt over, and those of float8 shrink as a block's are added to them."""
    dtype, cubin = kernel
    usual, body, _ = usual_walk(cubin, tmp_path)
    of_scale = 8
    assert sum("FMUL" in text for text in usual) <= of_scale
    assert (sum("FMUL" in text for text in body) > of_scale) == (dtype != FLOAT8)


def test_little_is_left_behind_the_last_wait(kernel, tmp_path):
    """Weights are rounded there, two in an instruction, and of float8 a block's sums are added up."""
    dtype, cubin = kernel
    for body, _, values_are_there in walks(*instructions(cubin, tmp_path)):
        assert len(body) - values_are_there <= (90 if dtype == FLOAT8 else 52)


def test_nothing_is_spilled_and_nothing_serialised(kernel):
    _, cubin = kernel
    assert cubin.spills == 0
    assert re.findall(r"C75\d\d|warning", cubin.log) == []


@pytest.mark.parametrize("reach", [RIGHT_EDGE, BOTH_EDGES])
def test_float8_spills_nothing_in_a_walk_where_keys_are_hidden(reach, tmp_path):
    """Its sums leave no registers for an edge's bounds beside a product under way: there is none, at an edge."""
    found, spans = instructions(compiled(FLOAT8, 128, 128, reach), tmp_path)
    spans = [x for x in spans if any("QGMMA" in text for text in found[x[0] : x[1] + 1])]
    inner = [x for x in spans if not any(x[0] <= y[0] and y[1] <= x[1] for y in spans if y != x)]
    blocks = [found[start : stop + 1] for start, stop in inner if stop - start < 1500]
    assert len(blocks) == (2 if reach == RIGHT_EDGE else 3), "blocks at each edge, and whole ones"
    assert [text for body in blocks for text in body if "LDL" in text or "STL" in text] == []


def test_warpgroups_share_out_no_more_registers_than_the_launch_has(kernel, tmp_path):
    _, cubin = kernel
    found, _ = instructions(cubin, tmp_path)
    fewer, more = (
        [
            int(count, 16)
            for text in found
            for count in re.findall(rf"USETMAXREG\.{kind}\S* (?:\w+, )?(0x[0-9a-f]+)", text)
        ]
        for kind in ("DEALLOC", "TRY_ALLOC")
    )
    assert (len(fewer), len(more)) == (1, 1)
    consumers = {168: 2, 128: 3}[cubin.resources.registers]  # what ptxas gives 384 threads, and 512
    assert fewer[0] + consumers * more[0] <= (1 + consumers) * cubin.resources.registers


def test_every_exponential_of_a_walk_runs_beside_a_product(kernel, tmp_path):
    _, cubin = kernel
    bodies = list(walks(*instructions(cubin, tmp_path)))
    assert bodies
    for body, scores_are_there, values_are_there in bodies:
        places = [index for index, text in enumerate(body) if "MUFU.EX2" in text]
        assert len(places) > 32
        assert [index for index in places if not scores_are_there < index < values_are_there] == []


def test_a_cluster_is_waited_for_as_a_whole_once_alone(tmp_path):
    """And nothing is released to the cluster, at its beginning or at a slot: that would be a fence of the whole GPU."""
    found, _ = instructions(compiled(BFLOAT16, 128, 128, ALL_KEYS, 2), tmp_path)
    assert sum("UCGABAR_WAIT" in text for text in found) == 1
    assert not any("MEMBAR.ALL.GPU" in text for text in found)
    loads = [text for text in found if "UTMALDG" in text]
    assert sum("MULTICAST" not in text for text in loads) == 2, "the two slabs of queries are this block's own"
    assert len(loads) > 2


def test_a_cluster_is_no_matter_of_the_launch():
    """CuPy launches without attributes: the kernel has to bring the size of its clusters along."""
    tile = base_tile(128, 128, ALL_KEYS, BFLOAT16)._replace(cluster=2)
    wanted = catalogue.hopper(BFLOAT16, 128, 128, tile, True, 0)
    nvrtc, _ = compiler.load()
    program = nvrtc.createProgram(source.join(wanted.source), "cupyattn.cu", (), ())
    nvrtc.addNameExpression(program, wanted.expression)
    nvrtc.compileProgram(program, ("-arch=compute_90a", *compiler.OPTIONS))
    assert re.search(rb"\.reqnctapercluster\s+2, 1, 1", nvrtc.getPTX(program))


def test_without_the_pin_the_overlap_is_lost(tmp_path):
    """Why there is a pin; if this fails, ptxas has changed, and the pin may go."""
    found = compiled(BFLOAT16, 64, 64, RIGHT_EDGE, switches=Switches(pinned=False))
    late = 0
    for body, scores_are_there, values_are_there in walks(*instructions(found, tmp_path)):
        places = [index for index, text in enumerate(body) if "MUFU.EX2" in text]
        late += sum(not scores_are_there < index < values_are_there for index in places)
    assert late > 0
