"""ONNX's operators as the package onnx has them: by its evaluator, and by the function that defines each of them."""

import itertools

import numpy as np
import pytest
from homes import DTYPES, needs
from oracle import assert_matches

import cupyattn
from cupyattn.integrations import onnx

package = needs("onnx")
if tuple(int(part) for part in package.__version__.split(".")[:2]) < (1, 23):
    pytest.skip("onnx 1.23 mended what its reference made of rows without keys", allow_module_level=True)
reference = needs("onnx.reference")

INPUTS = {
    "Attention": ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"),
    "LinearAttention": ("query", "key", "value", "past_state", "decay", "beta"),
}
OUTPUTS = {
    "Attention": ("Y", "present_key", "present_value", "qk_matmul_output"),
    "LinearAttention": ("output", "present_state"),
}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
HEADS = 4


def node_of(operator, inputs, attributes):
    """Its node, and the outputs that it has: the present is one if there is a past."""
    names = [name if name in inputs else "" for name in INPUTS[operator]]
    has_present = operator != "Attention" or "past_key" in inputs
    shown = [name if has_present or not name.startswith("present") else "" for name in OUTPUTS[operator]]
    return package.helper.make_node(operator, names, shown, **attributes), [name for name in shown if name]


def type_of(name, array):
    return package.helper.make_tensor_value_info(
        name, package.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    )


def by_evaluator(operator, inputs, attributes, opset):
    """Outputs by name, of a model that is this one node."""
    node, names = node_of(operator, inputs, attributes)
    like = package.helper.np_dtype_to_tensor_dtype(next(iter(inputs.values())).dtype)
    results = [package.helper.make_tensor_value_info(name, like, None) for name in names]
    graph = package.helper.make_graph([node], operator, [type_of(*item) for item in inputs.items()], results)
    model = package.helper.make_model(graph, opset_imports=[package.helper.make_opsetid("", opset)])
    return dict(zip(names, reference.ReferenceEvaluator(model).run(names, inputs), strict=True))


def by_definition(operator, inputs, attributes, opset):
    """The same by the function of simpler operators that the specification gives for this node."""
    node, names = node_of(operator, inputs, attributes)
    types = [type_of(name, inputs[name]).type.SerializeToString() if name else b"" for name in node.input]
    schema = package.defs.get_schema(operator, opset)
    text = schema.get_context_dependent_function_with_opset_version(opset, node.SerializeToString(), types)
    function = package.FunctionProto.FromString(text)
    defaults = {said.name: package.helper.get_attribute_value(said) for said in function.attribute_proto}
    given = {name: inputs.get(name) for name in function.input}
    run = reference.ReferenceEvaluator(function).run
    with np.errstate(invalid="ignore"):  # its softmax of a row without keys is nan until the next step makes it 0
        return dict(zip(names, run(names, given, attributes={**defaults, **attributes}), strict=True))


def check(found, expected, eps, case):
    """As close as arithmetic in a dtype of such an `eps` can be: the reference rounds after each of its steps."""
    for name, its in expected.items():
        mine = found[name]
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape), (name, case)
        try:
            assert_matches(np.asarray(mine, float), np.asarray(its, float), rtol=16 * eps, atol=8 * eps)
        except AssertionError as error:
            raise AssertionError(f"{name} of {case}: {error}") from None


# ---------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------

KINDS = ("no past", "past", "lengths")
MASKS = (None, *itertools.product(("bool", "float"), (2, 3, 4)))
"""None, or its dtype and how many axes it has."""
EDITS = tuple(itertools.product((0, 1), MASKS, (0.0, 0.75)))
"""is_causal, a mask, softcap: attributes are float32, in which 0.75 is what it says."""


def drawn(kind, dtype, mask, seed):
    """Inputs and attributes that belong to them; heads side by side or apart, and how many share keys, by the seed."""
    rng = np.random.default_rng(seed)
    batch, rows, keys, dim, dim_v, past = 2, 3, 5, 4, 6, 3 if kind == "past" else 0
    heads_kv, packed = (1, 2, 4)[seed % 3], bool(seed // 3 % 2)
    found = {
        "Q": rng.standard_normal((batch, HEADS, rows, dim)),
        "K": rng.standard_normal((batch, heads_kv, keys, dim)),
        "V": rng.standard_normal((batch, heads_kv, keys, dim_v)),
    }
    if packed:
        found = {name: x.swapaxes(1, 2).reshape(batch, x.shape[2], -1) for name, x in found.items()}
    if mask:
        said = rng.standard_normal((batch, HEADS, rows, past + keys)[-mask[1] :])
        found["attn_mask"] = said > -0.5 if mask[0] == "bool" else said
    if past:
        found["past_key"] = rng.standard_normal((batch, heads_kv, past, dim))
        found["past_value"] = rng.standard_normal((batch, heads_kv, past, dim_v))
    found = {name: x if x.dtype == bool else x.astype(DTYPES[dtype]) for name, x in found.items()}
    if kind == "lengths":
        found["nonpad_kv_seqlen"] = np.array([5, seed % 6])
    return found, {"q_num_heads": HEADS, "kv_num_heads": heads_kv} if packed else {}


def opset_of(kind):
    return 24 if kind == "lengths" else 23


def cases(kind, dtype, mode):
    for seed, (causal, mask, softcap) in enumerate(EDITS):
        inputs, attributes = drawn(kind, dtype, mask, seed + 7 * mode)
        yield inputs, {**attributes, "is_causal": causal, "softcap": softcap, "qk_matmul_output_mode": mode}


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", EPS)
def test_attention_is_the_evaluators(dtype, kind, mode):
    """But for scores "as they are", which the specification, its defining function and we show before a softcap, and
    the evaluator after it."""
    for inputs, attributes in cases(kind, dtype, mode):
        expected = by_evaluator("Attention", inputs, attributes, opset_of(kind))
        if mode == 0 and attributes["softcap"]:
            del expected["qk_matmul_output"]
        check(onnx.attention(**inputs, **attributes)._asdict(), expected, EPS[dtype], attributes)


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_its_definition(dtype, kind, mode):
    for inputs, attributes in cases(kind, dtype, mode):
        expected = by_definition("Attention", inputs, attributes, opset_of(kind))
        check(onnx.attention(**inputs, **attributes)._asdict(), expected, EPS[dtype], attributes)


@pytest.mark.parametrize("window", [(2, 0), (0, 1), (1, -1), (-1, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_in_a_window_is_the_evaluators(kind, window):
    for seed, (causal, mask, _) in enumerate(EDITS):
        inputs, attributes = drawn(kind, "float64", mask, seed)
        attributes |= {"is_causal": causal, "left_window_size": window[0], "right_window_size": window[1]}
        attributes["qk_matmul_output_mode"] = 2
        expected = by_evaluator("Attention", inputs, attributes, 25)
        check(onnx.attention(**inputs, **attributes)._asdict(), expected, EPS["float64"], attributes)


@pytest.mark.parametrize(("number", "name"), list(onnx.PRECISIONS.items()))
@pytest.mark.parametrize("dtype", EPS)
def test_attention_is_not_less_precise_than_it_was_asked_to_be(dtype, number, name):
    inputs, attributes = drawn("past", dtype, ("float", 4), 0)
    attributes |= {"softmax_precision": number, "qk_matmul_output_mode": 3}
    expected = by_evaluator("Attention", inputs, attributes, 23)
    eps = max(EPS[dtype], EPS[{"float": "float32", "double": "float64"}.get(name, name)])
    check(onnx.attention(**inputs, **attributes)._asdict(), expected, eps, attributes)


# ---------------------------------------------------------------------------------------------------
# LinearAttention
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_linear_attention_is_the_evaluators(dtype, rule):
    """Which sums up in float32, and has heads side by side, in the order (batch, seqlen, heads, features)."""
    rng = np.random.default_rng(3)
    batch, seqlen, dim, dim_v = 2, 9, 4, 6
    for heads_kv, has_past, of_features in itertools.product((1, 2, 4), (False, True), (False, True)):
        sizes = {"query": (HEADS, dim), "key": (heads_kv, dim), "value": (heads_kv, dim_v)}
        inputs = {name: rng.standard_normal((batch, seqlen, *size)) / 2 for name, size in sizes.items()}
        if has_past:
            inputs["past_state"] = rng.standard_normal((batch, heads_kv, dim, dim_v))
        if "gated" in rule:
            inputs["decay"] = -rng.random((batch, seqlen, heads_kv, dim) if of_features else (batch, seqlen, heads_kv))
        if "delta" in rule:
            inputs["beta"] = rng.random((batch, seqlen, 1 if of_features else heads_kv))
        inputs = {name: x.astype(DTYPES[dtype]) for name, x in inputs.items()}
        packed = {name: x if name == "past_state" else x.reshape(batch, seqlen, -1) for name, x in inputs.items()}
        attributes = {"q_num_heads": HEADS, "kv_num_heads": heads_kv, "update_rule": rule}
        expected = by_evaluator("LinearAttention", packed, attributes, 27)
        state = inputs.get("past_state", np.zeros((batch, heads_kv, dim, dim_v), DTYPES[dtype]))
        out, state = cupyattn.linear_attention(
            *(inputs[name] for name in sizes), decay=inputs.get("decay"), beta=inputs.get("beta"), state=state,
            rule=rule, return_state=True,
        )  # fmt: skip
        found = {"output": out.reshape(batch, seqlen, -1), "present_state": state}
        check(found, expected, EPS[dtype], (attributes, has_past, of_features))
