"""The plan: what it says is sent is sent, and what it says of balance is so."""

from types import SimpleNamespace

import emulator
import ml_dtypes
import numpy as np
import pytest
from ranks import TIMEOUT, draw

import cupyattn
from cupyattn.distributed import (
    Sharding,
    explain,
    ring_attention,
    ring_attention_backward,
    run_ranks,
    sharded_decode,
    sharded_decode_backward,
    ulysses_attention,
    ulysses_attention_backward,
)
from cupyattn.distributed import shard_sequence as shard

SHAPES = (1, 8192, 8, 64), (1, 8192, 2, 64), (1, 8192, 2, 64)
PACKED, OF_PACKED = Sharding("zigzag", 4, (5, 4)), dict.fromkeys("qkv", (9, 2, 8))
DECODE = {"by": "decode", "sharding": PACKED, **OF_PACKED, "q": (5, 2, 8), "seqlens_q": (2, 3)}


def bytes_sent(size, call):
    """By each rank to others, without what ranks agree by: a length and a text to each other one."""

    def rank(comm):
        send, sent = comm.send, []

        def counting(array, to):
            sent.append(array.nbytes)
            return send(array, to)

        comm.send = counting
        call(comm)
        return sum(sent[2 * (comm.size - 1) :])

    return run_ranks(rank, size, timeout=TIMEOUT)


CALLS = {
    "ring": (ring_attention, ring_attention_backward),
    "ulysses": (ulysses_attention, ulysses_attention_backward),
    "decode": (sharded_decode, sharded_decode_backward),
}


def arguments_of(by, layout, rank, q, k, v, dout, edits):
    """Of a rank: dout and operands of its own tokens, but for a decode, whose rows all have."""
    own = [x if by == "decode" else shard(x, layout, rank) for x in (dout, q)]
    for name in ("mask", "bias"):
        if name in edits and by != "decode" and edits[name].shape[-2] > 1:
            edits = edits | {name: shard(edits[name], layout, rank, axis=-2)}
    return (*own, shard(k, layout, rank), shard(v, layout, rank)), edits


def assert_sent_as_planned(arrays, by, size, kind, dtype, backward, edits, **options):
    """What ranks send, each of them and all, is what `explain` says."""
    layout = Sharding(kind, size, (arrays[1].shape[1],))

    def call(comm):
        (dout, *mine), own = arguments_of(by, layout, comm.rank, *arrays, edits)
        own = {**own, "comm": comm, "sharding": kind, **options}
        if backward:
            lse_dtype = np.float64 if dtype == "float64" else np.float32
            lse = np.zeros((mine[0].shape[0], mine[0].shape[2], mine[0].shape[1]), lse_dtype)
            CALLS[by][1](dout, *mine, out=np.zeros_like(dout), lse=lse, **own)
        else:
            CALLS[by][0](*mine, **own)

    shapes = {name: array.shape for name, array in edits.items()}
    whole = {"size": size, "by": by, "sharding": kind, "dtype": dtype, "backward": backward, **shapes}
    plan = explain(*(x.shape for x in arrays[:3]), **whole, **options)
    assert bytes_sent(size, call) == [sum(steps) for steps in plan.bytes_sent]


way = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@way
@pytest.mark.parametrize("by", CALLS)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_size": (9, None)}], ids=["all", "causal", "window"]
)
@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [("float32", "float32"), ("float32", None), ("bfloat16", None), ("bfloat16", "float32"), ("float64", None)],
)
def test_what_is_sent_is_what_the_plan_says(by, options, backward, dtype, compute_dtype, rng):
    kind = "zigzag" if by == "ring" else "contiguous"
    arrays = draw(rng, 50, batch=1, heads=(6, 2), dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    options = {"compute_dtype": compute_dtype, **options}
    assert_sent_as_planned(arrays, by, 3, kind, dtype, backward, {}, **options)


@way
@pytest.mark.parametrize("by", CALLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("heads", [1, 4])
def test_what_is_sent_of_masks_biases_and_slopes_is_what_the_plan_says(by, dtype, rows, heads, backward, rng):
    arrays = draw(rng, 20, heads=(4, 2), dtype=dtype)
    edits = {"mask": rng.random((2, heads, rows, 20)) < 0.7, "bias": rng.standard_normal((heads, rows, 20))}
    edits["bias"], edits["alibi_slopes"] = edits["bias"].astype(dtype), rng.random((2, 4))
    assert_sent_as_planned(arrays, by, 3, "zigzag", dtype, backward, edits)


def test_it_says_why_gradients_begin_with_the_forward_pass():
    again, once = (explain(*SHAPES, size=4, backward=True, compute_dtype=x) for x in (None, "float32"))
    said = "the forward pass again, and then gradients: out and lse were rounded to float32 and float32, "
    assert str(again).splitlines()[-1] == said + "and are wanted in float64"
    assert said not in str(once)


def test_the_forward_pass_is_the_first_half_of_such_a_plan():
    again, forward = (explain(*SHAPES, size=4, backward=x) for x in (True, False))
    assert [steps[:4] for steps in again.bytes_sent] == list(forward.bytes_sent)
    assert sum(again.flops) * 2 == sum(forward.flops) * 7


ON_GPUS = {
    "float16": ("float16", 3, "striped", {"causal": True}),
    "bfloat16": ("bfloat16", 2, "zigzag", {}),
    "float32": ("float32", 2, "contiguous", {"causal": True, "window_size": (9, None)}),
    "a rank without heads": ("float16", 5, "zigzag", {"causal": True}),
}
"""Dtype, ranks, whose tokens are where, and options.  Of 2 key heads: several ranks use one, or a rank none."""


@pytest.fixture
def idle(monkeypatch):
    """Kernels that write nothing, and need no compiler: what is sent has the same shapes and dtypes."""
    monkeypatch.setattr(emulator, "require_compiler", lambda: None)
    monkeypatch.setattr(emulator, "build", lambda source, expression: SimpleNamespace(launch=lambda *of_a_launch: None))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("by", CALLS)
@pytest.mark.parametrize("name", ON_GPUS)
def test_what_gpus_send_is_what_the_plan_says(gpu, idle, rng, name, by, backward):
    dtype, size, kind, options = ON_GPUS[name]
    shapes = (1, 20, 4, 32), (1, 20, 2, 32), (1, 20, 2, 24), (1, 20, 4, 24)
    q, k, v, dout = (gpu.from_numpy(rng.standard_normal(x)).to(getattr(gpu, dtype)) for x in shapes)
    layout, (forward, pull) = Sharding(kind, size, (20,)), CALLS[by]

    def call(comm):
        rows = [q, dout] if by == "decode" else [shard(x, layout, comm.rank) for x in (q, dout)]
        mine = [rows[0], *(shard(x, layout, comm.rank) for x in (k, v))]
        own = {"comm": comm, "sharding": kind, **options}
        if backward:
            state = {"out": gpu.zeros_like(rows[1]), "lse": gpu.zeros(1, 4, rows[0].shape[1])}
            pull(rows[1], *mine, **state, **own)
        else:
            forward(*mine, **own)

    whole = {"size": size, "by": by, "sharding": kind, "dtype": dtype, "device": "H100", "backward": backward}
    plan = explain(*shapes[:3], **whole, **options)
    assert bytes_sent(size, call) == [sum(steps) for steps in plan.bytes_sent]


@pytest.mark.parametrize("by", ["ring", "ulysses"])
def test_gpus_send_of_packed_sequences_what_the_plan_says(gpu, idle, rng, by):
    shapes = (30, 4, 32), (30, 2, 32), (30, 2, 32)
    arrays = [gpu.from_numpy(rng.standard_normal(x)).half() for x in shapes]
    layout = Sharding("zigzag", 3, (19, 11))

    def call(comm):
        mine = (shard(x, layout, comm.rank, axis=0) for x in arrays)
        CALLS[by][0](*mine, comm=comm, sharding=layout, causal=True)

    plan = explain(*shapes, size=3, by=by, sharding=layout, causal=True, dtype="float16", device="A100")
    assert bytes_sent(3, call) == [sum(steps) for steps in plan.bytes_sent]


def test_gpus_send_states_in_float32():
    plan = explain((2, 1, 8, 64), (2, 99, 2, 64), (2, 99, 2, 32), size=3, by="decode", dtype="float16", device="A100")
    assert plan.bytes_sent == ((2 * 2 * 8 * (32 + 1) * 4,),) * 3  # to two others: batch, heads, out beside lse


def test_gpus_send_heads_back_as_kernels_round_them():
    shape = (1, 16, 2, 64)
    plan = explain(shape, shape, shape, size=2, by="ulysses", dtype="bfloat16", device="H100")
    assert [steps[1] for steps in plan.bytes_sent] == [8 * (64 * 2 + 4)] * 2  # the other's 8 rows of one head


def test_none_is_the_cpu():
    plan = explain(*SHAPES, size=4)
    assert (plan, plan.device) == (explain(*SHAPES, size=4, device="cpu"), "cpu")


def test_it_prints_the_gpu():
    said = str(explain(*SHAPES, size=4, causal=True, device="H100")).splitlines()
    assert said[1] == "device: H100"
    assert [line for line in said if line != said[1]] == str(explain(*SHAPES, size=4, causal=True)).splitlines()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float64"}, "has no float64 arithmetic"),
        ({"compute_dtype": "float64"}, "accumulates in float32, not in float64"),
        ({"device": "T4"}, "needs compute capability 8.0"),
    ],
)
def test_what_no_kernel_takes_is_refused(changes, said, backward):
    with pytest.raises(NotImplementedError, match=f"(?s)explain: no implementation.*{said}"):
        explain(*SHAPES, **{"size": 4, "device": "H100", "backward": backward, **changes})


def test_kernels_that_a_caller_allows_are_those_of_the_plan():
    with cupyattn.implementations("numpy"), pytest.raises(NotImplementedError, match="only numpy may"):
        explain(*SHAPES, size=4, device="H100")


def test_causal_zigzag_is_balanced_at_8_ranks():
    assert explain(*SHAPES, size=8, causal=True).balance <= 1.05


def test_causal_striped_is_balanced_at_8_ranks():
    assert explain(*SHAPES, size=8, causal=True, sharding="striped").balance <= 1.05


@pytest.mark.parametrize("by", ["ring", "ulysses", "decode"])
def test_flops_of_all_ranks_are_those_of_one_device(by):
    plan = explain(*SHAPES, size=8, by=by, causal=True)
    assert sum(plan.flops) == 2 * 8 * 128 * (8192 * 8193 // 2)


def test_gradients_are_five_products_for_two():
    forward, backward = (explain(*SHAPES, size=4, backward=x, compute_dtype="float32") for x in (False, True))
    assert sum(backward.flops) * 2 == sum(forward.flops) * 5


def test_it_prints_a_line_for_each_rank():
    said = str(explain(*SHAPES, size=4, causal=True)).splitlines()
    assert [line.split()[0] for line in said] == ["ring", "rank", "0", "1", "2", "3", "balance:"]


def test_packed_sequences_are_explained():
    layout = Sharding("zigzag", 2, (100, 30))
    plan = explain((130, 4, 8), (130, 2, 8), (130, 2, 8), size=2, sharding=layout, causal=True)
    assert sum(plan.flops) == 2 * 4 * 16 * (100 * 101 // 2 + 30 * 31 // 2)


@way
@pytest.mark.parametrize(
    ("dtype", "compute_dtype"), [("float32", "float32"), ("float32", None), ("bfloat16", None), ("float64", None)]
)
@pytest.mark.parametrize("slopes", [None, (4,), (3, 4)])
def test_what_is_sent_of_packed_sequences_to_decode_is_what_the_plan_says(slopes, dtype, compute_dtype, backward, rng):
    seqlens_q, layout = (2, 0, 3), Sharding("striped", 3, (20, 5, 9))
    shapes = (5, 4, 8), (34, 2, 8), (34, 2, 6), (5, 4, 6)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, k, v, dout = (rng.standard_normal(x).astype(kind) for x in shapes)
    options = {"compute_dtype": compute_dtype, "causal": True, "alignment": "bottom-right", "seqlens_q": seqlens_q}

    def call(comm):
        mine = [q, *(shard(x, layout, comm.rank, axis=0) for x in (k, v))]
        own = {"comm": comm, "sharding": layout, **options}
        own |= {} if slopes is None else {"alibi_slopes": np.ones(slopes, np.float32)}
        if backward:
            lse = np.zeros((4, 5), np.float64 if dtype == "float64" else np.float32)
            sharded_decode_backward(dout, *mine, out=np.zeros_like(dout), lse=lse, **own)
        else:
            sharded_decode(*mine, **own)

    whole = {"size": 3, "by": "decode", "sharding": layout, "dtype": dtype, "backward": backward}
    plan = explain(*shapes[:3], **whole, alibi_slopes=slopes, **options)
    assert bytes_sent(3, call) == [sum(steps) for steps in plan.bytes_sent]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_gpus_send_of_packed_sequences_to_decode_what_the_plan_says(gpu, idle, rng, backward):
    shapes = (5, 4, 32), (34, 2, 32), (34, 2, 24), (5, 4, 24)
    q, k, v, dout = (gpu.from_numpy(rng.standard_normal(x)).half() for x in shapes)
    layout, seqlens_q = Sharding("zigzag", 3, (20, 5, 9)), (2, 0, 3)
    options = {"causal": True, "alignment": "top-left", "seqlens_q": seqlens_q, "sharding": layout}

    def call(comm):
        mine = [q, *(shard(x, layout, comm.rank, axis=0) for x in (k, v))]
        if backward:
            state = {"out": gpu.zeros_like(dout), "lse": gpu.zeros(4, 5)}
            sharded_decode_backward(dout, *mine, comm=comm, **state, **options)
        else:
            sharded_decode(*mine, comm=comm, **options)

    whole = {"size": 3, "by": "decode", "dtype": "float16", "device": "A100", "backward": backward}
    plan = explain(*shapes[:3], **whole, **options)
    assert bytes_sent(3, call) == [sum(steps) for steps in plan.bytes_sent]


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_flops_of_packed_sequences_to_decode_are_those_of_each(alignment):
    seqlens_q, seqlens_k = (2, 0, 3, 1), (100, 7, 2, 30)
    shapes, layout = ((6, 4, 8), (139, 2, 8), (139, 2, 8)), Sharding("striped", 4, seqlens_k)
    options = {"causal": True, "alignment": alignment}
    plan = explain(*shapes, size=4, by="decode", sharding=layout, seqlens_q=seqlens_q, **options)
    seen = {"top-left": 1 + 2 + 0 + 1 + 2 + 2 + 1, "bottom-right": 99 + 100 + 0 + 0 + 1 + 2 + 30}[alignment]
    assert sum(plan.flops) == 2 * 4 * 16 * seen
    assert "4 sequences, 139 keys" in str(plan)


def test_keys_to_decode_may_be_said_by_a_sharding():
    shapes = (1, 2, 8, 64), (1, 99, 2, 64), (1, 99, 2, 64)
    layout = Sharding("contiguous", 3, (99,), (90, 9, 0))
    plan = explain(*shapes, size=3, by="decode", sharding=layout)
    assert plan.flops == tuple(2 * 8 * 128 * 2 * count for count in (90, 9, 0))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"by": "magic"}, ValueError, "by has to be one of"),
        ({"size": 0}, ValueError, "size has to be"),
        ({"sharding": Sharding("zigzag", 4, (10,))}, ValueError, "as many tokens as there are"),
        ({"sharding": Sharding("zigzag", 3, (8192,))}, ValueError, "as many ranks as there are, 4"),
        ({"q": 3}, TypeError, "q has to be a shape"),
        ({"q": np.ones((2, 9, 4, 8))}, TypeError, r"(?s)q has to be a shape, of the whole\n    q  [^\n]*  ndarray$"),
        ({"device": "H900"}, ValueError, "device has to be 'cpu' or one of A100"),
        ({"device": 0}, ValueError, "device has to be 'cpu' or one of A100"),
        ({"backward": 1}, TypeError, "backward has to be True or False"),
        ({"bias": 3}, TypeError, "bias has to be a shape"),
        ({"mask": (3, 3)}, ValueError, "mask does not broadcast"),
        ({"layout": "bhsd", "sharding": PACKED, **OF_PACKED}, ValueError, "and layout is 'bshd'"),
        ({"bias": (9, 9), "sharding": PACKED, **OF_PACKED}, ValueError, "bias does not go with packed"),
        ({"mask": (9, 9), **DECODE}, ValueError, "mask does not go with packed"),
        ({**DECODE, "layout": "bhsd"}, ValueError, "and layout is 'bshd'"),
        ({**DECODE, "seqlens_q": None}, ValueError, "seqlens_q has to be given where 2 packed"),
        ({**DECODE, "seqlens_q": (2, 2)}, ValueError, "and to add up to the queries"),
        ({**DECODE, "seqlens_q": (5,)}, ValueError, "seqlens_q has to be one length for each of 2"),
        ({**DECODE, "seqlens_q": 5}, TypeError, "seqlens_q has to be a tuple or list"),
        ({**DECODE, "causal": True}, ValueError, "alignment has to be chosen"),
        ({**DECODE, "q": (9, 2, 8), "seqlens_q": (4, 5), "causal": True}, ValueError, "alignment has to be chosen"),
        ({**DECODE, "alibi_slopes": (3, 2)}, ValueError, r"\(sequences, num_heads\), with 2"),
        ({**DECODE, "sharding": Sharding("zigzag", 4, (5, 5))}, ValueError, "as many tokens as there are"),
        ({**DECODE, "by": "ring"}, ValueError, "seqlens_q goes with by='decode'"),
        ({"by": "decode", "seqlens_q": (8192,)}, ValueError, "seqlens_q is for packed sequences"),
        ({"sharding": PACKED}, ValueError, "a layout of others has one length"),
        ({"sharding": PACKED, **OF_PACKED, "k": (1, 9, 2, 8)}, ValueError, "k has to have 4 axes, or 3"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, error, said):
    arguments = dict(zip("qkv", SHAPES, strict=True)) | {"size": 4} | changes
    with pytest.raises(error, match=said):
        explain(**arguments)
