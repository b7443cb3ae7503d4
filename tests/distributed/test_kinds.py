"""Arguments of the wrong kind, anywhere in `cupyattn.distributed`: refused in our words, not in Python's."""

import re
from importlib.util import find_spec

import numpy as np
import pytest

from cupyattn.distributed import (
    JaxComm,
    MpiComm,
    NcclComm,
    Sharding,
    ThreadComm,
    TorchComm,
    explain,
    ring_attention,
    ring_attention_backward,
    run_ranks,
    shard_sequence,
    sharded_decode,
    sharded_decode_backward,
    ulysses_attention,
    ulysses_attention_backward,
    unshard_sequence,
)

X = np.ones((1, 4, 2, 8))
LAYOUT = Sharding("zigzag", 2, (4,))
SHAPES = {"q": X.shape, "k": X.shape, "v": X.shape, "size": 2}
CALLS = {
    "run_ranks, function": lambda: run_ranks(3, 2),
    "run_ranks, size": lambda: run_ranks(print, "2"),
    "run_ranks, timeout": lambda: run_ranks(print, 2, timeout="a"),
    "Sharding, size": lambda: Sharding("zigzag", "2", (4,)),
    "Sharding, seqlens": lambda: Sharding("zigzag", 2, 4),
    "Sharding, seqlens of texts": lambda: Sharding("zigzag", 2, ("a",)),
    "Sharding, lengths of several": lambda: Sharding("contiguous", 2, (4, 4), (4, 4)),
    "Sharding, lengths": lambda: Sharding("contiguous", 2, (4,), 3),
    "Sharding.length, rank": lambda: LAYOUT.length("a"),
    "Sharding.positions, rank": lambda: LAYOUT.positions(None),
    "shard_sequence, array": lambda: shard_sequence([[1]], LAYOUT, 0),
    "shard_sequence, sharding": lambda: shard_sequence(X, "zigzag", 0),
    "shard_sequence, rank": lambda: shard_sequence(X, LAYOUT, "0"),
    "shard_sequence, axis": lambda: shard_sequence(X, LAYOUT, 0, axis="1"),
    "unshard_sequence, shards": lambda: unshard_sequence(3, LAYOUT),
    "unshard_sequence, shards of numbers": lambda: unshard_sequence([3, 3], LAYOUT),
    "unshard_sequence, sharding": lambda: unshard_sequence([X, X], "zigzag"),
    "unshard_sequence, axis": lambda: unshard_sequence([X, X], LAYOUT, axis=1.5),
    "explain, q": lambda: explain(**SHAPES | {"q": 3}),
    "explain, q of texts": lambda: explain(**SHAPES | {"q": (1, "a", 2, 8)}),
    "explain, size": lambda: explain(**SHAPES | {"size": "2"}),
    "explain, dtype": lambda: explain(**SHAPES, dtype=3),
    "explain, seqlens_q": lambda: explain(**SHAPES, by="decode", seqlens_q="4"),
    "explain, causal": lambda: explain(**SHAPES, causal=3),
    "JaxComm, axis_name": lambda: JaxComm(3),
    "NcclComm, communicator": lambda: NcclComm(3),
    "ThreadComm, world": lambda: ThreadComm(3, 0, 1.0),
}
FUNCTIONS = {
    ring_attention: {},
    ulysses_attention: {},
    sharded_decode: {},
    ring_attention_backward: {"dout": X},
    ulysses_attention_backward: {"dout": X},
    sharded_decode_backward: {"dout": X},
}
NUMBERS = ("q", "k", "v", "layout", "causal", "alignment", "window_size", "mask", "alibi_slopes", "sinks", "comm")
TEXTS = ("bias", "softmax_scale", "softcap", "compute_dtype", "implementation", "sharding")


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_kind_is_refused_by_function_and_argument(name):
    function, _, argument = name.partition(", ")
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[name]()
    said = str(caught.value)
    assert said.startswith(f"{function}: ")
    assert argument.split()[0] in said


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_each_argument_of_a_wrong_kind_is_refused_by_its_name(function):
    known = FUNCTIONS[function]
    wrong = dict.fromkeys(NUMBERS, 3) | dict.fromkeys(TEXTS, "a") | dict.fromkeys(known, 3)
    wrong |= {"seqlens_q": 3} if function.__name__.startswith("sharded_decode") else {}
    for name, value in wrong.items():
        arguments = {"q": X, "k": X, "v": X, **known, name: value}

        def rank(comm, arguments=arguments):
            return function(**{"comm": comm, **arguments})

        with pytest.raises((TypeError, ValueError)) as caught:
            run_ranks(rank, 2)
        assert re.match(rf"{function.__name__}: (.*\b{name}\b|no implementation 'a')", str(caught.value)), name


@pytest.mark.parametrize(("kind", "library", "argument"), [(MpiComm, "mpi4py", "comm"), (TorchComm, "torch", "group")])
def test_what_is_no_communicator_is_refused(kind, library, argument):
    if find_spec(library) is None:
        pytest.skip(f"needs {library}")
    with pytest.raises(TypeError, match=rf"{kind.__name__}: {argument} has to be"):
        kind(3)
