"""`seqlens_q` and `seqlens_k`: each sequence of a dense batch is what it would be alone, cut to its lengths."""

import numpy as np
import pytest
from conftest import SEED
from homes import needs
from oracle import assert_matches, assert_same_bits

import cupyattn

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEAD_DIM = 5, 7, 11, (4, 2, 2), 8
USED_Q, USED_K = (7, 0, 3, 5, 2), (11, 4, 0, 1, 6)
OPTIONS = {
    "plain": {},
    "causal, bottom-right": {"causal": True, "alignment": "bottom-right"},
    "causal, top-left": {"causal": True, "alignment": "top-left"},
    "window, softcap": {"window_size": (2, 1), "alignment": "bottom-right", "softcap": 3.0},
    "slopes of heads": {"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]), "alignment": "bottom-right"},
    "slopes of sequences": {
        "alibi_slopes": np.random.default_rng(SEED).random((BATCH, HEADS[0])),
        "alignment": "bottom-right",
    },
    "sinks": {"sinks": np.array([0.5, -1.0, 3.0, np.inf])},
}


def normal(*shape, dtype="float64"):
    return np.random.default_rng(SEED).standard_normal(shape).astype(dtype)


def batch(layout="bshd", dtype="float64", poison=True):
    """q, k, v and lengths; what is not used is nan."""
    q, k, v = (
        np.random.default_rng(SEED + i).standard_normal((BATCH, n, HEADS[i], HEAD_DIM)).astype(dtype)
        for i, n in enumerate((SEQLEN_Q, SEQLEN_K, SEQLEN_K))
    )
    if poison:
        for i in range(BATCH):
            q[i, USED_Q[i] :], k[i, USED_K[i] :], v[i, USED_K[i] :] = np.nan, np.nan, np.inf
    if layout == "bhsd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "seqlens_q": lengths(USED_Q), "seqlens_k": lengths(USED_K)}


def lengths(values):
    return np.array(values, np.int32)


def alone(given, options, i):
    """The arguments of sequence i without what is not used, "bshd"."""
    used_q = given["seqlens_q"][i] if "seqlens_q" in given else SEQLEN_Q
    used_k = given["seqlens_k"][i] if "seqlens_k" in given else SEQLEN_K
    cut = {
        "q": given["q"][i : i + 1, :used_q],
        "k": given["k"][i : i + 1, :used_k],
        "v": given["v"][i : i + 1, :used_k],
    }
    own = {name: x[i : i + 1] if np.ndim(x) == 2 else x for name, x in options.items() if name != "window_size"}
    return cut, own | {name: x for name, x in options.items() if name == "window_size"}


def expected(given, **options):
    """(out, lse), (batch, seqlen, heads, dim), by a call for each sequence."""
    out, lse = np.zeros((BATCH, SEQLEN_Q, HEADS[0], HEAD_DIM)), np.full((BATCH, HEADS[0], SEQLEN_Q), -np.inf)
    for i in range(BATCH):
        cut, own = alone(given, options, i)
        rows = cut["q"].shape[1]
        out[i, :rows], lse[i, :, :rows] = (x[0] for x in cupyattn.attention(**cut, **own, return_lse=True))
    return out, lse


def without(given, names):
    return {name: x for name, x in given.items() if name not in names}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_each_sequence_is_what_it_is_alone(layout, options):
    exact = expected(batch(), **options)
    out, lse = cupyattn.attention(**batch(layout), **options, layout=layout, return_lse=True)
    assert_matches(out if layout == "bshd" else out.swapaxes(1, 2), exact[0], atol=1e-13)
    assert_matches(lse, exact[1], atol=1e-13)


@pytest.mark.parametrize("given", ["seqlens_q", "seqlens_k"])
def test_lengths_of_one_side_alone(given):
    other = ({"seqlens_q", "seqlens_k"} - {given}).pop()
    arguments = without(batch(poison=False), {other})
    out, lse = cupyattn.attention(**arguments, causal=True, alignment="bottom-right", return_lse=True)
    exact = expected(arguments, causal=True, alignment="bottom-right")
    assert_matches(out, exact[0], atol=1e-13)
    assert_matches(lse, exact[1], atol=1e-13)


def test_lengths_are_of_any_byte_order():
    given = batch()
    other = {name: x.astype(">i4") if name.startswith("seqlens") else x for name, x in given.items()}
    assert_same_bits(cupyattn.attention(**other), cupyattn.attention(**given))
    gradients = [cupyattn.attention_backward(np.ones_like(x["q"]), **x) for x in (given, other)]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_same_bits(mine, theirs)


def test_full_lengths_change_nothing():
    arguments = batch(poison=False) | {
        "seqlens_q": lengths([SEQLEN_Q] * BATCH),
        "seqlens_k": lengths([SEQLEN_K] * BATCH),
    }
    plain = cupyattn.attention(**without(arguments, {"seqlens_q", "seqlens_k"}))
    assert_matches(cupyattn.attention(**arguments), plain, atol=1e-13)


@pytest.mark.parametrize("size", ["batch", "seqlen_q", "seqlen_k"])
def test_of_nothing(size):
    b, n, m = (0 if size == name else full for name, full in (("batch", 2), ("seqlen_q", 3), ("seqlen_k", 4)))
    out = cupyattn.attention(
        np.ones((b, n, 2, 8)), np.ones((b, m, 2, 8)), np.ones((b, m, 2, 8)),
        seqlens_q=lengths([n] * b), seqlens_k=lengths([m] * b),
    )  # fmt: skip
    assert out.shape == (b, n, 2, 8)
    assert not out.any() or size == "seqlen_q"


def test_results_go_into_the_callers_arrays():
    arguments = batch("bhsd")
    exact = cupyattn.attention(**arguments, layout="bhsd", return_lse=True)
    out, lse = (np.empty(x.shape) for x in exact)
    found = cupyattn.attention(**arguments, layout="bhsd", return_lse=True, out=out, lse_out=lse)
    assert found[0] is out
    assert_matches(out, exact[0])
    assert_matches(lse, exact[1])


def test_flash_attns_function_takes_them_and_aligns_bottom_right():
    found = cupyattn.flash_attn_func(**batch(), causal=True, return_lse=True)
    for got, exact in zip(found, expected(batch(), causal=True, alignment="bottom-right"), strict=True):
        assert_matches(got, exact, atol=1e-13)


def test_flash_attns_packed_functions_take_them_and_so_do_their_gradients():
    torch = needs("torch")
    qkv = torch.randn(3, 7, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    used = {"seqlens_q": torch.tensor([7, 2, 5], dtype=torch.int32), "seqlens_k": torch.tensor([6, 7, 0]).int()}
    q, k, v = qkv.unbind(2)
    right = cupyattn.flash_attn_func(q, k, v, causal=True, **used)
    for packed in (
        cupyattn.flash_attn_qkvpacked_func(qkv, causal=True, **used),
        cupyattn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True, **used),
    ):
        assert_same_bits(packed, right)
        slopes = [torch.autograd.grad(x.square().sum(), qkv, retain_graph=True)[0] for x in (packed, right)]
        assert_same_bits(*slopes)
        assert slopes[0].count_nonzero()


def test_descales_of_sequences_go_with_them():
    torch = needs("torch")
    given = {name: torch.from_numpy(x) for name, x in batch(dtype="float32", poison=False).items()}
    given |= {name: given[name].to(torch.float8_e4m3fn) for name in "qkv"}
    factors = {f"{name}_descale": torch.rand(BATCH, 2) + 0.5 for name in "qkv"}
    found = cupyattn.attention(**given, **factors)
    for i in range(BATCH):
        n, m = USED_Q[i], USED_K[i]
        own = {name: x[i : i + 1] for name, x in factors.items()}
        cut = [given["q"][i : i + 1, :n], given["k"][i : i + 1, :m], given["v"][i : i + 1, :m]]
        assert torch.equal(found[i, :n], cupyattn.attention(*cut, **own)[0])
        assert not found[i, n:].any()


# ---- Gradients -------------------------------------------------------------------------------------------


def expected_gradients(given, dout, dlse, **options):
    found = {f"d{name}": np.zeros(given[name].shape) for name in "qkv"}
    more = {name: np.zeros(np.shape(options[name])) for name in ("sinks", "alibi_slopes") if name in options}
    for i in range(BATCH):
        cut, own = alone(given, options, i)
        rows, keys = cut["q"].shape[1], cut["k"].shape[1]
        here = cupyattn.attention_backward(dout[i : i + 1, :rows], **cut, **own, dlse=dlse[i : i + 1, :, :rows])
        found["dq"][i, :rows], found["dk"][i, :keys], found["dv"][i, :keys] = here.dq[0], here.dk[0], here.dv[0]
        for name, total in more.items():
            part = getattr(here, f"d{name}")
            if part.ndim == 2:
                total[i] += part[0]
            else:
                total += part
    return found | {f"d{name}": x for name, x in more.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("known", [True, False], ids=["out and lse are known", "nothing is known"])
def test_gradients_are_those_of_each_sequence_alone(options, known):
    given, dout, dlse = batch(), normal(BATCH, SEQLEN_Q, HEADS[0], HEAD_DIM), normal(BATCH, HEADS[0], SEQLEN_Q)
    exact = expected_gradients(given, dout, dlse, **options)
    for i in range(BATCH):  # gradients of what is not there say nothing
        dout[i, USED_Q[i] :], dlse[i, :, USED_Q[i] :] = np.nan, np.nan
    results = (
        dict(zip(("out", "lse"), cupyattn.attention(**given, **options, return_lse=True), strict=True)) if known else {}
    )
    found = cupyattn.attention_backward(dout, **given, **options, **results, dlse=dlse)
    for name, gradient in exact.items():
        assert_matches(getattr(found, name), gradient, atol=1e-12)


def test_gradients_of_a_layout_with_heads_first():
    dout = normal(BATCH, HEADS[0], SEQLEN_Q, HEAD_DIM)
    found = cupyattn.attention_backward(dout, **batch("bhsd"), layout="bhsd")
    same = cupyattn.attention_backward(dout.swapaxes(1, 2), **batch())
    for name in ("dq", "dk", "dv"):
        assert_matches(getattr(found, name).swapaxes(1, 2), getattr(same, name), atol=1e-13)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_torchs_autograd_has_them(layout):
    torch = needs("torch")
    given = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch(layout).items()}
    inputs = [given[name].requires_grad_() for name in "qkv"]
    out = cupyattn.attention(**given, layout=layout, causal=True, alignment="bottom-right")
    dout = torch.randn(out.shape, dtype=torch.float64)
    found = torch.autograd.grad(out, inputs, dout)
    exact = cupyattn.attention_backward(
        dout.numpy(), **batch(layout), layout=layout, causal=True, alignment="bottom-right"
    )
    for gradient, right in zip(found, exact, strict=False):
        assert_matches(gradient, right, atol=1e-13)


def test_jax_has_them_under_jit_and_grad():
    jax = needs("jax")
    given = {name: jax.numpy.asarray(x) for name, x in batch(dtype="float32", poison=False).items()}
    arrays, rest = [given[name] for name in "qkv"], without(given, "qkv")

    def loss(q, k, v, used):
        return (cupyattn.attention(q, k, v, **used) ** 2).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays, rest)
    own = batch(dtype="float32", poison=False)
    exact = cupyattn.attention_backward(2 * cupyattn.attention(**own), **own)
    for gradient, right in zip(found, exact, strict=False):
        assert_matches(gradient, right, atol=1e-5)


# ---- Plans, and what is refused --------------------------------------------------------------------------


def test_explain_plans_packed_sequences_of_the_batch_and_counts_the_dense_work():
    shapes = {"q": (8, 512, 32, 128), "k": (8, 512, 8, 128), "v": (8, 512, 8, 128), "dtype": "float16"}
    plain = cupyattn.explain(**shapes, device="H100")
    found = cupyattn.explain(**shapes, device="H100", seqlens_k=(8,))
    assert (found.kernel, found.flops, found.bytes) == ("hopper", plain.flops, plain.bytes)
    assert any("three packed ones" in note for note in found.notes)
    backward = cupyattn.explain(**shapes, device="H100", seqlens_q=(8,), seqlens_k=(8,), backward=True)
    assert (backward.kernel, backward.flops) == ("hopper_backward", plain.flops * 5 // 2)


def test_a_diagonal_needs_its_alignment_also_between_arrays_as_long():
    q = np.ones((2, 5, 2, 8))
    cupyattn.attention(q, q, q, causal=True)
    with pytest.raises(ValueError, match="alignment has to be chosen"):
        cupyattn.attention(q, q, q, causal=True, seqlens_k=lengths([3, 4]))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"seqlens_k": lengths([3])}, ValueError, r"seqlens_k has to hold one length per sequence, \(2,\)"),
        ({"seqlens_q": lengths([[3, 4]])}, ValueError, "seqlens_q has to hold one length per sequence"),
        ({"seqlens_k": np.array([3, 4])}, TypeError, "seqlens_k has to be int32"),
        (
            {"seqlens_k": lengths([3, 6])},
            ValueError,
            r"seqlens_k have to be from 0 to 5, the length of k\n +seqlens_k  \[3, 6\]",
        ),
        ({"seqlens_q": lengths([-1, 5])}, ValueError, "seqlens_q have to be from 0 to 5, the length of q"),
        ({"seqlens_k": [3, 4]}, TypeError, "seqlens_k has to be an array"),
        (
            {"seqlens_k": lengths([3, 4]), "mask": np.ones((5, 5), bool)},
            ValueError,
            "seqlens_k and mask exclude each other",
        ),
        ({"seqlens_q": lengths([3, 4]), "bias": np.ones((5, 5))}, ValueError, "seqlens_q and bias exclude each other"),
        (
            {"seqlens_q": lengths([3, 4]), "seqlens_k": lengths([3, 4]), "dropout_p": 0.1},
            ValueError,
            "seqlens_q and seqlens_k and dropout_p exclude each other",
        ),
        ({"seqlens_k": lengths([3, 4]), "k": np.ones((1, 5, 2, 8))}, ValueError, "has to have the whole batch, 2"),
    ],
)
@pytest.mark.parametrize("function", ["attention", "attention_backward"])
def test_what_does_not_go_is_refused(changes, error, says, function):
    arguments = {name: np.ones((2, 5, 2, 8)) for name in "qkv"} | changes
    if function == "attention_backward":
        arguments |= {"dout": np.ones((2, 5, 2, 8)), "dropout_seed": 1}
    with pytest.raises(error, match=f"^{function}: .*{says}"):
        getattr(cupyattn, function)(**arguments)
