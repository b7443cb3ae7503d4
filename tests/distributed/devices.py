"""Ranks that are devices of JAX, run as a script by `test_jax.py`, which gives it two: `devices.py CASE`."""

import sys

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
CASES = {
    "ring": (ring_attention, "zigzag", {"causal": True, "sinks": SINKS}),
    "ring-striped": (ring_attention, "striped", {"window_size": (2, 1), "softcap": 2.0}),
    "ring-bias": (ring_attention, "contiguous", {"bias": BIAS, "causal": True}),
    "ulysses": (ulysses_attention, "zigzag", {"causal": True, "sinks": SINKS, "alibi_slopes": SLOPES}),
    "decode": (sharded_decode, "striped", {"causal": True, "alignment": "bottom-right", "sinks": SINKS}),
}


def check(case):
    """Results and gradients are those of attention, in float64."""
    function, kind, options = CASES[case]
    layout = Sharding(kind, SIZE, (SEQLEN,))
    order = np.concatenate([layout.positions(rank) for rank in range(SIZE)])
    everywhere = case == "decode"
    q, dout = (Q[:, -3:], DOUT[:, -3:]) if everywhere else (Q, DOUT)
    arrays = {name: options[name] for name in ("sinks", "alibi_slopes", "bias") if name in options}
    scalars = {name: value for name, value in options.items() if name not in arrays}
    rows = slice(None) if everywhere else order
    given = {**arrays, **({"bias": arrays["bias"][:, order]} if "bias" in arrays else {})}
    specs = {name: P(None, "ranks") if name == "bias" else P() for name in given}

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
    (dq, dk, dv, others), (out, lse) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*operands)
    expected, expected_lse = attention(q, K, V, return_lse=True, **options)
    wanted = attention_backward(dout, q, K, V, **options)
    close = {"atol": 1e-12, "rtol": 1e-12}
    np.testing.assert_allclose(out, expected[:, rows], **close)
    np.testing.assert_allclose(lse, expected_lse[:, :, rows], **close)
    np.testing.assert_allclose(dq, wanted.dq[:, rows], **close)
    np.testing.assert_allclose(dk, wanted.dk[:, order], **close)
    np.testing.assert_allclose(dv, wanted.dv[:, order], **close)
    for name, gradient in others.items():
        expected = getattr(wanted, f"d{name}")
        np.testing.assert_allclose(gradient, expected[:, order] if name == "bias" else expected, **close)


REFUSED = {
    "alibi_slopes are not for shards": (ring_attention, {"alibi_slopes": SLOPES}),
    "mask is not exchanged": (ulysses_attention, {"mask": np.ones((4, SEQLEN), bool)}),
    "the heads of q have to be a multiple of the ranks": (ulysses_attention, {"heads": 3}),
    "has to be a Sharding, or one of": (ring_attention, {"sharding": "spiral"}),
    "all ranks have to have as many tokens": (ring_attention, {"sharding": Sharding("zigzag", 2, (9,))}),
    "causal has to be True or False": (ring_attention, {"causal": 3}),
}


def refuse():
    """What cannot be meant, or is not done, is said where it is traced."""
    for said, (function, changes) in REFUSED.items():
        heads = changes.get("heads", HEADS)
        options = {name: value for name, value in changes.items() if name != "heads"}

        def rank(q, function=function, options=options):
            return function(q, q, q, comm=JaxComm("ranks"), **options)

        found = "nothing"
        try:
            jax.jit(jax.shard_map(rank, mesh=MESH, in_specs=TOKENS, out_specs=TOKENS))(np.ones((2, SEQLEN, heads, 8)))
        except (ValueError, TypeError) as error:
            found = str(error)
        assert said in found, found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == SIZE
    for name in sys.argv[1:]:
        refuse() if name == "refuse" else check(name)
        print(f"{name} is right")
