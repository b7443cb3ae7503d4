"""ONNX's Attention against its specification written out in NumPy, row by row."""

import numpy as np
import pytest
from homes import DTYPES, HOMES, needs
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

from cupyattn.integrations import onnx

SIZES = {"batch": 2, "heads": 4, "heads_kv": 2, "rows": 3, "keys": 5, "dim": 4, "dim_v": 6}


def by_specification(
    Q, K, V, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *,
    is_causal=0, kv_num_heads=None, left_window_size=-1, q_num_heads=None, qk_matmul_output_mode=0,
    right_window_size=-1, scale=None, softcap=0.0, softmax_precision=None,
):  # fmt: skip
    """The four outputs in float64, of 4 axes each."""
    q, k, v = (
        x if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
        for x, heads in ((to_numpy(Q), q_num_heads), (to_numpy(K), kv_num_heads), (to_numpy(V), kv_num_heads))
    )
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = np.concatenate([to_numpy(past_key), k], axis=2), np.concatenate([to_numpy(past_value), v], axis=2)
    (batch, heads, rows, dim), keys, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    y, shown = np.zeros((batch, heads, rows, v.shape[-1])), np.zeros((4, batch, heads, rows, keys))
    mask = None
    if attn_mask is not None:
        mask = to_numpy(attn_mask)
        if mask.dtype == bool:
            mask = np.where(mask, 0.0, -np.inf)
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])]
        mask = np.broadcast_to(np.pad(mask, missing, constant_values=-np.inf), (batch, heads, rows, keys))
    for b in range(batch):
        length = keys if nonpad_kv_seqlen is None else int(nonpad_kv_seqlen[b])
        offset = past if nonpad_kv_seqlen is None else length - rows
        for h in range(heads):
            for i in range(rows):
                scores = k[b, h // group] @ q[b, h, i] * (dim**-0.5 if scale is None else scale)
                shown[0, b, h, i] = scores
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                shown[1, b, h, i] = scores
                for j in range(keys):
                    is_hidden = j >= length or (is_causal and j > i + offset)
                    is_hidden |= left_window_size >= 0 and j < i + offset - left_window_size
                    is_hidden |= right_window_size >= 0 and j > i + offset + right_window_size
                    scores[j] = -np.inf if is_hidden else scores[j] + (0 if mask is None else mask[b, h, i, j])
                shown[2, b, h, i] = scores
                if scores.max(initial=-np.inf) > -np.inf:
                    weights = np.exp(scores - scores.max())
                    shown[3, b, h, i] = weights / weights.sum()
                    y[b, h, i] = shown[3, b, h, i] @ v[b, h // group]
    if np.ndim(Q) == 3:
        y = y.swapaxes(1, 2).reshape(batch, rows, -1)
    return y, k, v, shown[qk_matmul_output_mode]


def drawn(past=0, packed=False, mask=None, axes=4, seed=1, dtype="float64", **sizes):
    """Inputs; a mask is "bool" or "float", and has so many axes."""
    size = {**SIZES, **sizes}
    rng = np.random.default_rng(seed)
    found = {
        "Q": rng.standard_normal((size["batch"], size["heads"], size["rows"], size["dim"])),
        "K": rng.standard_normal((size["batch"], size["heads_kv"], size["keys"], size["dim"])),
        "V": rng.standard_normal((size["batch"], size["heads_kv"], size["keys"], size["dim_v"])),
    }
    if past:
        for word in "KV":
            name = {"K": "past_key", "V": "past_value"}[word]
            found[name] = rng.standard_normal((*found[word].shape[:2], past, found[word].shape[-1]))
    if mask:
        whole = (size["batch"], size["heads"], size["rows"], past + size["keys"])
        found["attn_mask"] = rng.standard_normal(whole[-axes:])
        if mask == "bool":
            found["attn_mask"] = found["attn_mask"] > -0.5
    if packed:
        for word, heads in (("Q", size["heads"]), ("K", size["heads_kv"]), ("V", size["heads_kv"])):
            x = found[word].swapaxes(1, 2)
            found[word] = x.reshape(*x.shape[:2], heads * x.shape[-1])
    return {name: x if x.dtype == bool else x.astype(DTYPES[dtype]) for name, x in found.items()}


SIDE_BY_SIDE = {"q_num_heads": 4, "kv_num_heads": 2}
CALLS = {
    "plain": (drawn(), {}),
    "three axes": (drawn(packed=True), SIDE_BY_SIDE),
    "three axes and a past": (drawn(past=2, packed=True), {**SIDE_BY_SIDE, "is_causal": 1}),
    "causal of more keys than rows": (drawn(), {"is_causal": 1}),
    "causal of more rows than keys": (drawn(rows=6, keys=2), {"is_causal": 1}),
    "causal after a past": (drawn(past=4, keys=3), {"is_causal": 1}),
    "causal after a past, more new keys than rows": (drawn(past=4, keys=5), {"is_causal": 1}),
    "scale": (drawn(), {"scale": 0.3}),
    "softcap": (drawn(), {"softcap": 0.8, "scale": 2.0}),
    "bool mask": (drawn(mask="bool"), {}),
    "bool mask and causal": (drawn(mask="bool"), {"is_causal": 1}),
    "float mask": (drawn(mask="float"), {}),
    "float mask, softcap, past": (drawn(past=3, mask="float"), {"softcap": 0.8, "is_causal": 1}),
    "mask of two axes": (drawn(mask="bool", axes=2), {}),
    "mask of three axes": (drawn(mask="float", axes=3), {}),
    "short bool mask": ({**drawn(), "attn_mask": np.ones((3, 2), bool)}, {}),
    "short float mask after a past": ({**drawn(past=2), "attn_mask": np.full((1, 4, 3, 6), 0.5)}, {}),
    "a row without keys": ({**drawn(), "attn_mask": np.arange(3)[:, None] > np.zeros(5, int)}, {}),
    "lengths": ({**drawn(), "nonpad_kv_seqlen": np.array([5, 2])}, {}),
    "lengths and causal": ({**drawn(), "nonpad_kv_seqlen": np.array([4, 1])}, {"is_causal": 1}),
    "lengths, a mask and causal": ({**drawn(mask="bool"), "nonpad_kv_seqlen": np.array([4, 3])}, {"is_causal": 1}),
    "lengths of nothing": ({**drawn(mask="float"), "nonpad_kv_seqlen": np.array([0, 5], np.int32)}, {"softcap": 1.0}),
    "window": (drawn(keys=3), {"left_window_size": 1, "right_window_size": 0}),
    "window of more keys": (drawn(), {"left_window_size": 0, "right_window_size": 1}),
    "window after a past": (drawn(past=4, keys=3), {"left_window_size": 2, "is_causal": 1}),
    "window and causal": (drawn(past=1), {"left_window_size": 1, "right_window_size": 3, "is_causal": 1}),
    "window and lengths": (
        {**drawn(), "nonpad_kv_seqlen": np.array([5, 3])},
        {"left_window_size": 1, "right_window_size": 1},
    ),
    "no keys": (drawn(keys=0), {}),
    "double": (drawn(), {"softmax_precision": 11}),
    "float": (drawn(), {"softmax_precision": 1}),
}
every_call = pytest.mark.parametrize(("inputs", "attributes"), CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_is_the_specification(inputs, attributes, mode):
    found = onnx.attention(**inputs, **attributes, qk_matmul_output_mode=mode)
    expected = by_specification(**inputs, **attributes, qk_matmul_output_mode=mode)
    for result, its in zip(found, expected, strict=True):
        assert_matches(result, its, rtol=1e-12, atol=1e-14)


def test_inputs_come_in_the_operators_order():
    inputs, attributes = CALLS["float mask, softcap, past"]
    order = ("Q", "K", "V", "attn_mask", "past_key", "past_value")
    by_place = onnx.attention(*(inputs[name] for name in order), **attributes)
    assert_same_bits(by_place.Y, onnx.attention(**inputs, **attributes).Y)
    plain, lengths = CALLS["lengths"][0], np.array([5, 2])
    by_place = onnx.attention(plain["Q"], plain["K"], plain["V"], None, None, None, lengths)
    assert_same_bits(by_place[0], onnx.attention(**plain).Y)


def test_the_fourth_output_is_there_if_it_is_asked_for():
    assert onnx.attention(**drawn()).qk_matmul_output is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_outputs_are_rounded_once(dtype):
    inputs = drawn(past=2, mask="float", dtype=dtype)
    for mode in range(4):
        found = onnx.attention(**inputs, qk_matmul_output_mode=mode)
        y, _, _, scores = by_specification(**inputs, qk_matmul_output_mode=mode)
        assert_correctly_rounded(found.Y, y, dtype)
        assert_correctly_rounded(found.qk_matmul_output, scores, dtype, share=0.99)


@pytest.mark.parametrize("home", HOMES, ids=str)
def test_outputs_are_at_home_in_every_library(home):
    inputs = drawn(past=2, packed=True, mask="bool", dtype=home.dtype)
    attributes = {**SIDE_BY_SIDE, "is_causal": 1, "qk_matmul_output_mode": 3}
    mine = {name: home.make(x) for name, x in inputs.items()}

    def call(**arrays):
        return tuple(onnx.attention(**arrays, **attributes))

    for result, its in zip(home.call(call, mine), onnx.attention(**inputs, **attributes), strict=True):
        home.check(result, mine["Q"])
        assert_matches(result, its, atol={"float16": 1e-3, "bfloat16": 8e-3}.get(home.dtype, 1e-6))


@pytest.mark.parametrize("home", HOMES, ids=str)
def test_lengths_may_be_of_every_library(home):
    inputs = {**drawn(dtype=home.dtype), "nonpad_kv_seqlen": np.array([4, 1], np.int32)}
    mine = {name: home.make(x) for name, x in inputs.items()}

    def call(**arrays):
        return onnx.attention(**arrays, is_causal=1).Y

    assert_same_bits(home.call(call, mine), onnx.attention(**inputs, is_causal=1).Y)


@pytest.mark.parametrize("mode", [None, 0, 1, 2, 3])
def test_torchs_gradients_are_the_derivatives(mode):
    torch = needs("torch")
    names = ("Q", "K", "V", "past_key", "past_value")
    inputs = drawn(past=1, rows=2, keys=2, dim=2, dim_v=2, heads=2, heads_kv=1, batch=1)
    tensors = [torch.from_numpy(inputs[name]).requires_grad_() for name in names]

    def call(*arrays):
        found = onnx.attention(
            **dict(zip(names, arrays, strict=True)), is_causal=1, softcap=1.5, qk_matmul_output_mode=mode
        )
        scores = [] if mode is None else [torch.where(found[3].isinf(), 0.0, found[3])]
        return [*found[:3], *scores]

    assert torch.autograd.gradcheck(call, tensors)


def test_autocast_leaves_the_past_and_the_present_as_they_are():
    torch = needs("torch")
    tensors = {name: torch.from_numpy(x) for name, x in drawn(past=2, dtype="float32").items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = onnx.attention(**tensors)
    assert (found.Y.dtype, found.present_key.dtype) == (torch.bfloat16, torch.float32)
    assert_matches(found.Y, onnx.attention(**tensors).Y, atol=0.05)


def test_what_is_hidden_may_hold_nan():
    inputs = {**drawn(), "nonpad_kv_seqlen": np.array([3, 3])}
    expected = onnx.attention(**inputs, qk_matmul_output_mode=3)
    inputs["K"][:, :, 3:] = np.nan
    inputs["V"][:, :, 3:] = np.nan
    found = onnx.attention(**inputs, qk_matmul_output_mode=3)
    assert_same_bits(found.Y, expected.Y)
    assert_same_bits(found.qk_matmul_output, expected.qk_matmul_output)


# ---------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------

PAST = drawn(past=2)
FLAT = drawn(packed=True)


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (TypeError, "Q has to be an array", {"Q": None}),
        (TypeError, "Q, K, V and the past have to be of one dtype", {"Q": PAST["Q"].astype(np.float32)}),
        (TypeError, "Q, K, V and the past have to be of one dtype", {"past_key": PAST["past_key"].astype(np.float32)}),
        (ValueError, "Q has to be .*seqlen", {"Q": PAST["Q"][0, 0]}),
        (ValueError, "Q of three axes has heads side by side, and q_num_heads", {"Q": FLAT["Q"]}),
        (ValueError, "q_num_heads has to divide Q", {"Q": FLAT["Q"], "q_num_heads": 3}),
        (ValueError, "kv_num_heads is not the number of heads of K", {"kv_num_heads": 4}),
        (ValueError, "q_num_heads has to be from 1", {"q_num_heads": 0}),
        (ValueError, "a multiple of kv_num_heads = 2", {"Q": PAST["Q"][:, :3]}),
        (ValueError, "one batch", {"Q": PAST["Q"][:1]}),
        (ValueError, "one head_dim", {"Q": PAST["Q"][..., :3]}),
        (ValueError, "same heads and length", {"V": PAST["V"][:, :, :4]}),
        (ValueError, "have to come together", {"past_value": None}),
        (ValueError, r"past_value has to be \(2, 2, 'past', 6\)", {"past_value": PAST["past_value"][:, :, :1]}),
        (ValueError, "past_key has to be", {"past_key": PAST["past_key"][0]}),
        (ValueError, "attn_mask has to broadcast", {"attn_mask": np.ones((4, 7), bool)}),
        (ValueError, "attn_mask has to broadcast", {"attn_mask": np.ones((3, 8), bool)}),
        (TypeError, "attn_mask has to be bool", {"attn_mask": np.ones((3, 7), int)}),
        (ValueError, "does not go together with past_key", {"nonpad_kv_seqlen": np.array([1, 1])}),
        (ValueError, "is_causal has to be from 0 to 1", {"is_causal": 2}),
        (TypeError, "is_causal has to be an integer", {"is_causal": "yes"}),
        (ValueError, "qk_matmul_output_mode has to be one of 0, 1, 2, 3", {"qk_matmul_output_mode": 4}),
        (ValueError, "softmax_precision has to be one of 1, 10, 11, 16", {"softmax_precision": 7}),
        (ValueError, "softcap has to be finite and not negative", {"softcap": -1.0}),
        (ValueError, "scale has to be finite", {"scale": np.inf}),
        (ValueError, "left_window_size has to be from -1", {"left_window_size": -2}),
        (TypeError, "right_window_size has to be an integer", {"right_window_size": None}),
        (TypeError, "has no argument window_size", {"window_size": (1, 1)}),
    ],
)
def test_what_cannot_be_meant_is_refused(error, message, wrong):
    with pytest.raises(error, match=rf"^(onnx\.)?attention: .*{message}"):
        onnx.attention(**{**PAST, **wrong})


@pytest.mark.parametrize(
    ("error", "message", "lengths"),
    [
        (ValueError, "from 0 to 5", np.array([6, 1])),
        (ValueError, "from 0 to 5", np.array([-1, 1])),
        (ValueError, r"one length per sequence, \(2,\)", np.array([1, 1, 1])),
        (TypeError, "int64 or int32", np.array([1.0, 1.0])),
        (TypeError, "has to be an array", [1, 1]),
    ],
)
def test_lengths_that_cannot_be_meant_are_refused(error, message, lengths):
    with pytest.raises(error, match=rf"^onnx\.attention: nonpad_kv_seqlen .*{message}"):
        onnx.attention(**drawn(), nonpad_kv_seqlen=lengths)
