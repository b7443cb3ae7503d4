"""Ranks that are devices of JAX, run as a script by `test_jax.py`, which gives it two: `devices.py CASE`."""

import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cupyattn import attention, attention_backward
from cupyattn.distributed import JaxComm, Sharding, ring_attention, sharded_decode, ulysses_attention

SIZE, SEQLEN, HEADS = 2, 8, 4
MESH = Mesh(np.array(jax.devices()[:SIZE]), ("ranks",))
TOKENS = P(None, "ranks")
RNG = np.random.default_rng(0)
Q, K, V, DOUT = (RNG.standard_normal((2, SEQLEN, heads, 8)) for heads in (HEADS, 2, 2, HEADS))
SINKS, SLOPES = np.array([0.0, 1.0, -1.0, 2.0]), np.array([0.1, 0.2, 0.3, 0.4])
BIAS = RNG.standard_normal((HEADS, SEQLEN, SEQLEN))
MASK = RNG.random((2, 1, SEQLEN, SEQLEN)) < 0.7
CASES = {
    "ring": (ring_attention, "zigzag", {"causal": True, "sinks": SINKS}),
    "ring-striped": (ring_attention, "striped", {"window_size": (2, 1), "softcap": 2.0}),
    "ring-bias": (ring_attention, "contiguous", {"bias": BIAS, "causal": True}),
    "ring-bias-keys": (ring_attention, "zigzag", {"bias": BIAS[:, :1], "causal": True}),
    "decode-zigzag": (
        sharded_decode,
        "zigzag",
        {"window_size": (4, 0), "alignment": "bottom-right", "bias": BIAS[:, :1]},
    ),
    "ring-alibi": (ring_attention, "striped", {"window_size": (5, 3), "alibi_slopes": np.stack([SLOPES, 2 * SLOPES])}),
    "ring-alibi-bias": (ring_attention, "zigzag", {"causal": True, "alibi_slopes": SLOPES, "bias": BIAS}),
    "ulysses-mask": (ulysses_attention, "zigzag", {"mask": MASK, "bias": BIAS}),
    "ulysses-keys": (ulysses_attention, "striped", {"mask": MASK[:, :, :1], "bias": BIAS[:, :1], "causal": True}),
    "decode-alibi": (sharded_decode, "striped", {"alignment": "bottom-right", "alibi_slopes": SLOPES}),
    "ulysses": (ulysses_attention, "zigzag", {"causal": True, "sinks": SINKS, "alibi_slopes": SLOPES}),
    "decode": (sharded_decode, "striped", {"causal": True, "alignment": "bottom-right", "sinks": SINKS}),
}


def check(case):
    """Results and gradients are those of attention, in float64."""
    function, kind, options = CASES[case]
    layout = Sharding(kind, SIZE, (SEQLEN,))
    order = np.concatenate([layout.positions(rank) for rank in range(SIZE)])
    everywhere = function is sharded_decode
    q, dout = (Q[:, -3:], DOUT[:, -3:]) if everywhere else (Q, DOUT)
    arrays = {name: options[name] for name in ("sinks", "alibi_slopes", "mask", "bias") if name in options}
    of_own_rows = [name for name in ("mask", "bias") if name in arrays and arrays[name].shape[-2] > 1]
    scalars = {name: value for name, value in options.items() if name not in arrays}
    rows = slice(None) if everywhere else order
    given = {**arrays, **{name: arrays[name][..., order, :] for name in of_own_rows}}
    specs = {name: P(*[None] * (x.ndim - 2), "ranks") if name in of_own_rows else P() for name, x in given.items()}

    def rank(q, k, v, given):
        return function(q, k, v, comm=JaxComm("ranks"), sharding=kind, return_lse=True, **given, **scalars)

    of_rows = P() if everywhere else TOKENS
    of_lse = P() if everywhere else P(None, None, "ranks")
    whole = jax.jit(
        jax.shard_map(rank, mesh=MESH, in_specs=(of_rows, TOKENS, TOKENS, specs), out_specs=(of_rows, of_lse))
    )

    def loss(*operands):
        out, lse = whole(*operands)
        return (out * dout[:, rows]).sum(), (out, lse)

    operands = q[:, rows], K[:, order], V[:, order], {name: jnp.asarray(x) for name, x in given.items()}
    (dq, dk, dv, others), (out, lse) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)(*operands)
    expected, expected_lse = attention(q, K, V, return_lse=True, **options)
    wanted = attention_backward(dout, q, K, V, **options)
    close = {"atol": 1e-12, "rtol": 1e-12}
    np.testing.assert_allclose(out, expected[:, rows], **close)
    np.testing.assert_allclose(lse, expected_lse[:, :, rows], **close)
    np.testing.assert_allclose(dq, wanted.dq[:, rows], **close)
    np.testing.assert_allclose(dk, wanted.dk[:, order], **close)
    np.testing.assert_allclose(dv, wanted.dv[:, order], **close)
    for name in others.keys() - {"mask"}:
        expected = getattr(wanted, f"d{name}")
        np.testing.assert_allclose(others[name], expected[..., order, :] if name in of_own_rows else expected, **close)


LENGTHS = (12, 4)
OF_EACH = {"alibi_slopes": np.stack([SLOPES, 2 * SLOPES])}
LAST = {"alignment": "bottom-right"}
PACKED = {
    "ring-packed": (ring_attention, Sharding("zigzag", SIZE, LENGTHS), LENGTHS, {"causal": True, **OF_EACH}),
    "ulysses-packed": (ulysses_attention, Sharding("striped", SIZE, LENGTHS), LENGTHS, {"causal": True, **OF_EACH}),
    "decode-packed": (
        sharded_decode,
        Sharding("striped", SIZE, LENGTHS),
        (2, 6),
        {"causal": True, "sinks": SINKS, **LAST, **OF_EACH},
    ),
    "decode-packed-uneven": (
        sharded_decode,
        Sharding("contiguous", SIZE, LENGTHS, ((8, 0), (4, 4))),
        (1, 1),
        {"window_size": (9, 0), "alibi_slopes": SLOPES, **LAST},
    ),
}


def check_packed(case):
    """Packed sequences are each by itself, gradients included."""
    function, layout, seqlens_q, options = PACKED[case]
    order = np.concatenate([layout.positions(rank) for rank in range(SIZE)])
    everywhere = function is sharded_decode
    q, k, v, dout = (x.reshape(-1, *x.shape[2:]) for x in (Q, K, V, DOUT))
    q, dout = q[: sum(seqlens_q)], dout[: sum(seqlens_q)]
    rows = np.arange(len(q)) if everywhere else order
    scalars = {name: value for name, value in options.items() if name not in ("alibi_slopes", "sinks")}
    edits = {name: jnp.asarray(x) for name, x in options.items() if name not in scalars}
    of_rows, of_lse = (P(), P()) if everywhere else (P("ranks"), P(None, "ranks"))
    own = {"comm": JaxComm("ranks"), "sharding": layout, "return_lse": True, **scalars}
    if everywhere and seqlens_q != (1, 1):
        own["seqlens_q"] = seqlens_q

    def rank(q, k, v, edits):
        return function(q, k, v, **own, **edits)

    specs = (of_rows, P("ranks"), P("ranks"), P())
    whole = jax.jit(jax.shard_map(rank, mesh=MESH, in_specs=specs, out_specs=(of_rows, of_lse)))

    def loss(*operands):
        out, lse = whole(*operands)
        return (out * dout[rows]).sum(), (out, lse)

    operands = *(jnp.asarray(x) for x in (q[rows], k[order], v[order])), edits
    gradients, (out, lse) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*operands)
    close, of_sinks, of_slopes = {"atol": 1e-12, "rtol": 1e-12}, 0.0, []
    for i, (mine, keys) in enumerate(zip(stretches(seqlens_q), stretches(LENGTHS), strict=True)):
        here, there = (np.argsort(x)[stretch] for x, stretch in ((rows, mine), (order, keys)))
        arrays, alone = [q[None, mine], k[None, keys], v[None, keys]], dict(options)
        if alone["alibi_slopes"].ndim == 2:
            alone["alibi_slopes"] = alone["alibi_slopes"][i]
        expected, expected_lse = attention(*arrays, return_lse=True, **alone)
        wanted = attention_backward(dout[None, mine], *arrays, **alone)
        np.testing.assert_allclose(out[here], expected[0], **close)
        np.testing.assert_allclose(lse[:, here], expected_lse[0], **close)
        for found, exact, stretch in zip(gradients[:3], wanted[:3], (here, there, there), strict=True):
            np.testing.assert_allclose(found[stretch], exact[0], **close)
        of_slopes.append(wanted.dalibi_slopes)
        of_sinks = of_sinks + wanted.dsinks if "sinks" in options else 0.0
    of_slopes = np.stack(of_slopes) if options["alibi_slopes"].ndim == 2 else sum(of_slopes)
    np.testing.assert_allclose(gradients[3]["alibi_slopes"], of_slopes, **close)
    np.testing.assert_allclose(gradients[3].get("sinks", 0.0), of_sinks, **close)


def stretches(lengths):
    return [slice(first, last) for first, last in pairwise(np.cumsum([0, *lengths]))]


WHOLE = Sharding("zigzag", SIZE, (SEQLEN,))
REFUSED = {
    "alibi_slopes have to be (4,) or (2, 4)": (ring_attention, {"alibi_slopes": SLOPES[:3]}),
    "mask has to broadcast to (batch, num_heads, own rows": (ulysses_attention, {"mask": np.ones((3, SEQLEN), bool)}),
    "sharding is a Sharding, of packed sequences": (ring_attention, {"sharding": Sharding("zigzag", 2, (4, 4))}),
    "the heads of q have to be a multiple of the ranks": (ulysses_attention, {"heads": 3}),
    "has to be a Sharding, or one of": (ring_attention, {"sharding": "spiral"}),
    "all ranks have to have as many tokens": (ring_attention, {"sharding": Sharding("zigzag", 2, (9,))}),
    "causal has to be True or False": (ring_attention, {"causal": 3}),
    "and layout is 'bshd'": (ring_attention, {"packed": True, "layout": "bhsd", "sharding": WHOLE}),
    "seqlens_q has to be given where 1 packed sequences": (sharded_decode, {"packed": True, "sharding": WHOLE}),
    "alignment has to be chosen where": (
        sharded_decode,
        {"packed": True, "sharding": Sharding("zigzag", 2, (8, 0)), "seqlens_q": (2, 2), "causal": True},
    ),
    "seqlens_q is for packed sequences": (sharded_decode, {"seqlens_q": (4,)}),
}


def refuse():
    """What cannot be meant is said where it is traced."""
    for said, (function, changes) in REFUSED.items():
        heads = changes.get("heads", HEADS)
        options = {name: value for name, value in changes.items() if name not in ("heads", "packed")}

        def rank(q, function=function, options=options, packed="packed" in changes):
            q = q[0] if packed else q
            return function(q, q, q, comm=JaxComm("ranks"), **options)

        found = "nothing"
        try:
            whole = jax.jit(jax.shard_map(rank, mesh=MESH, in_specs=TOKENS, out_specs=TOKENS))
            jax.block_until_ready(whole(np.ones((2, SEQLEN, heads, 8))))  # or Python waits for it at its end, in vain
        except (ValueError, TypeError) as error:
            found = str(error)
        assert said in found, found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == SIZE
    for name in sys.argv[1:]:
        refuse() if name == "refuse" else check_packed(name) if name in PACKED else check(name)
        print(f"{name} is right")
