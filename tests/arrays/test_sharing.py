"""Arrays of JAX on a mesh: each device calls for its part of the sequences and heads, and all come to the same."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from homes import needs

import cupyattn

COMMON = """
    import sys
    import jax, numpy as np, cupyattn
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as Axes
    from cupyattn.arrays.servers import SERVERS

    kind = getattr(AxisType, sys.argv[1])
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(kind,) * 2)
    rng = np.random.default_rng(7)
    seen = []

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype("f4"))

    def lying(x, *along):
        return jax.device_put(x, NamedSharding(mesh, Axes(*along)))

    def noted(text, operands, results):
        seen.append(operands[0].shape)
        answers(text, operands, results)

    def close(found, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)

    jax.jit(lambda x: cupyattn.attention(x, x, x))(normal(1, 2, 1, 8))
    answers = SERVERS["cpu"]
    SERVERS["cpu"] = noted
"""
CASES = """
    BSHD, BHSD = ("d", None, "e"), ("d", "e")
    heads = {"q": 8, "k": 4, "v": 4}

    def dense(axes="bshd", heads=heads, **more):
        rows = {"q": 10, "k": 12, "v": 12}
        order = (lambda n, h: (n, h)) if axes == "bshd" else (lambda n, h: (h, n))
        return {name: normal(4, *order(rows[name], heads[name]), 8) for name in heads} | more

    mask = jnp.asarray(rng.random((4, 1, 10, 12)) < 0.7)
    calls = {  # arrays, how they lie, options, the shape of q that each device has
        "sequences": (dense(), {"q": ("d",)}, {"causal": True}, (2, 10, 8, 8)),
        "sequences, of k alone": (dense(), {"k": ("d",)}, {"causal": True}, (2, 10, 8, 8)),
        "heads": (dense(), {"q": (None, None, "d")}, {"softcap": 2.0}, (4, 10, 4, 8)),
        "both": (dense(), dict.fromkeys("qkv", BSHD), {"window_size": (3, 2)}, (2, 10, 4, 8)),
        "heads first": (dense("bhsd"), dict.fromkeys("qkv", BHSD), {"layout": "bhsd"}, (2, 4, 10, 8)),
        "sequences over the mesh": (dense(), {"q": (("d", "e"),)}, {}, (1, 10, 8, 8)),
        "more heads of values": (dense(heads={"q": 12, "k": 2, "v": 6}), {"q": BSHD}, {}, (2, 10, 6, 8)),
        "one key head": (dense(heads={"q": 4, "k": 1, "v": 1}), {"q": BSHD}, {}, (2, 10, 2, 8)),
        "one key head, and values of each": (dense(heads={"q": 4, "k": 1, "v": 4}), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "heads of unequal parts": (dense(heads={"q": 6, "k": 3, "v": 3}), {"q": BSHD}, {}, (2, 10, 6, 8)),
        "rows, which are not shared": (dense(), {"q": (None, "d")}, {}, (4, 10, 8, 8)),
        "a mask of sequences": (dense(mask=mask), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "a bias of heads": (dense(bias=normal(8, 10, 12)), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "a bias of all": (dense(bias=normal(10, 12)), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "a bias of sequences and heads": (dense(bias=normal(4, 8, 1, 12)), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "slopes, sinks": (dense(alibi_slopes=abs(normal(8)), sinks=normal(8)), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "slopes of sequences": (dense(alibi_slopes=abs(normal(4, 8))), {"q": BSHD}, {}, (2, 10, 4, 8)),
        "lengths": (
            dense(seqlens_q=jnp.asarray([3, 10, 0, 7]), seqlens_k=jnp.asarray([12, 1, 5, 7])),
            {"q": BSHD}, {"causal": True}, (2, 10, 4, 8),
        ),
        "dropout, which is not shared": (dense(), {"q": BSHD}, {"dropout_p": 0.5, "dropout_seed": 3}, (4, 10, 8, 8)),
    }
    for name, (arrays, along, options, part) in calls.items():
        if options.get("causal") or "window_size" in options or "alibi_slopes" in arrays:
            options = {**options, "alignment": "bottom-right"}
        smooth = [word for word, x in arrays.items() if x.dtype == "float32"]
        weights = normal(*arrays["q"].shape), None

        def call(arrays):
            return cupyattn.attention(**arrays, **options, return_lse=True)

        def loss(some, arrays):
            out, lse = call({**arrays, **some})
            return (out * weights[0]).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        there = {word: lying(x, *along.get(word, ())) for word, x in arrays.items()}
        gradients = jax.grad(loss)
        for function, given in ((call, (arrays,)), (gradients, ({w: arrays[w] for w in smooth}, arrays))):
            lies = (there,) if function is call else ({word: there[word] for word in smooth}, there)
            expected = jax.jit(function)(*given)
            seen.clear()
            found = jax.block_until_ready(jax.jit(function)(*lies))
            assert set(seen) == {part}, (name, set(seen))
            close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))
"""
OTHERS = """
    q = normal(4, 6, 4, 8)
    there = lying(q, "d", None, "e")

    def call(x):
        return cupyattn.attention(x, x, x, causal=True)

    def pulled(x):
        return cupyattn.attention_backward(x + 1.0, x, x, x).dk

    def scanned(x):
        return jax.lax.scan(lambda x, _: (call(x), None), x, None, length=2)[0]

    def repeated(x):
        return jax.grad(lambda x: (jax.checkpoint(scanned)(x) ** 2).sum())(x)

    def mapped(x):
        return jax.vmap(lambda x: call(x[None])[0])(x)

    def mapped_gradients(x):
        return jax.vmap(jax.grad(lambda x: (call(x[None])[0] ** 2).sum()))(x)

    for function in (pulled, scanned, repeated, mapped, mapped_gradients):
        expected = np.asarray(jax.jit(function)(q))
        seen.clear()
        found = jax.block_until_ready(jax.jit(function)(there))
        assert function in (mapped, mapped_gradients) or set(seen) == {(2, 6, 2, 8)}, (function, seen)
        close(np.asarray(found), expected)

    seen.clear()
    inside = jax.shard_map(lambda x: call(x), mesh=mesh, in_specs=Axes("d"), out_specs=Axes("d"))
    close(np.asarray(jax.jit(inside)(lying(q, "d"))), np.asarray(call(q)))
    assert set(seen) == {(2, 6, 4, 8)}
"""


def run(text, kind):
    """In a process of its own, which has four devices."""
    jax = needs("jax")
    if not hasattr(jax.sharding, "auto_axes"):
        pytest.skip("meshes of this JAX have no explicit axes")
    variables = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(cupyattn.__file__).parents[1]),
    }
    command = [sys.executable, "-c", textwrap.dedent(COMMON + text), kind]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_parts_of_a_call_and_of_its_gradients_are_those_of_the_whole(kind):
    run(CASES, kind)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_transformed_calls_are_shared_or_come_to_the_same(kind):
    run(OTHERS, kind)
