"""The sweep itself: it says "same" of what is right, and "different" of an attention that is wrong on purpose."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import sweep  # noqa: E402 - skipped above where they are missing

from cupyattn.integrations import transformers as integration  # noqa: E402

# JAX, which other tests bring into the process, warns of every fork; the children do not touch it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.* keeps attn_implementation:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    transformers.utils.logging.set_verbosity_error()
    integration.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def attention(monkeypatch):
    """Puts an attention in cupyattn's place, and counts its calls."""

    def put(function):
        monkeypatch.setattr(integration, "attention", function)
        sweep.count_calls(monkeypatch.setattr)

    return put


def outcomes(name):
    return {record["outcome"] for record in sweep.examine(getattr(transformers, name))}


def test_right_attention_is_the_same_and_was_called(attention):
    attention(integration.attention)
    records = sweep.examine(transformers.LlamaForCausalLM)
    assert {record["outcome"] for record in records} == {"same"}
    assert {record["way"] for record in records} >= {"_from_config", "from_pretrained", "set"}
    assert {record["case"] for record in records} == {
        *("whole", "padded right", "padded left", "no mask"),
        *("generate", "generate padded", "generate static"),
    }
    assert all(record["calls"] >= 2 for record in records)


@pytest.mark.filterwarnings("ignore:ResNetModel keeps")
def test_a_model_without_attention_is_not_said_to_be_checked(attention):
    attention(integration.attention)
    assert outcomes("ResNetModel") <= {"same, not called", "kept its own"}


@pytest.mark.parametrize("name", ["BertModel", "ViTModel"])
def test_an_attention_a_little_wrong_is_different(attention, name):
    right = integration.attention
    attention(lambda q, k, v, **keywords: right(q, k, v, **keywords) * 1.01)
    assert "different" in outcomes(name)


@pytest.mark.parametrize(("wrong_by", "expected"), [(0.0, "same"), (1e-5, "different")])
def test_where_rounding_shows_float64_is_what_is_right(attention, monkeypatch, wrong_by, expected):
    monkeypatch.setattr(sweep, "BAR", 1e-9)  # which nobody's rounding meets
    right = integration.attention
    attention(lambda q, k, v, **keywords: right(q, k, v, **keywords) * (1.0 + wrong_by))
    whole = [record for record in sweep.examine(transformers.LlamaForCausalLM) if record["case"] == "whole"]
    assert {record["outcome"] for record in whole} == {expected}
    assert all(0.0 < record["exact"][0] < 1e-5 for record in whole)


def test_an_attention_without_its_mask_is_different_where_there_is_padding(attention):
    right = integration.attention
    attention(lambda q, k, v, **keywords: right(q, k, v, **(keywords | {"mask": None})))
    found = {record["case"]: record["outcome"] for record in sweep.examine(transformers.BertModel)}
    assert found["whole"] == "same"
    assert found["padded left"] == found["padded right"] == "different"


def test_what_stands_in_the_padding_does_not_count():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    by_token, pooled = torch.ones(2, 3, 4), torch.ones(2, 4)
    moved = by_token.clone(), pooled.clone()
    moved[0][0, 0, 1:] = moved[0][1, 2, 0] = moved[1][0, 1] = 2.0  # the first number of the padding stays, by chance
    one, other = {"tokens": by_token, "pooled": pooled}, {"tokens": moved[0], "pooled": moved[1]}
    counts = sweep.indifferent(one, other, mask)
    assert counts["tokens"].all(-1).tolist() == [[False, True, True], [True, True, False]]
    assert counts["pooled"].tolist() == [[False] * 4, [True] * 4]
    assert not counts["tokens"][0, 0].any()
    assert sweep.difference(one, other, counts) == (0.0, "")
    assert sweep.difference(one, other) == (1.0, "tokens")
    with pytest.raises(ValueError, match="everything depends"):
        sweep.indifferent({"out": pooled}, {"out": pooled + 1}, mask)


def test_places_of_the_padding_do_not_count_though_they_are_alike():
    mask = torch.tensor([[0, 1], [1, 1]])
    logits = torch.ones(2, 2)
    assert torch.equal(sweep.indifferent({"out": logits}, {"out": logits}, mask)["out"], mask.bool())


def test_numbers_that_are_not_finite_differ_from_those_that_are():
    right, wrong = torch.tensor([1.0, float("nan")]), torch.tensor([float("nan"), 1.0])
    assert sweep.difference({"out": right}, {"out": wrong})[0] == float("inf")
    assert sweep.difference({"out": right}, {"out": torch.ones(2)}) == (0.0, "")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NotImplementedError("cupyattn in transformers: heads cannot be masked"), "refused"),
        (ValueError("a shape"), "raised"),
        (KeyError("cupyattn"), "raised"),
    ],
    ids=repr,
)
def test_errors_in_words_are_refusals_and_others_are_failures(attention, error, outcome):
    def refuse(*_, **__):
        raise error

    attention(refuse)
    assert outcomes("ViTModel") == {outcome}


def test_the_worst_that_came_of_a_class_is_its_verdict():
    records = [{"outcome": word} for word in ("same", "not made", "refused", "different", "kept its own")]
    assert sweep.verdict(records) == "different"
    assert sweep.verdict(records[:3]) == "refused"
    assert sweep.verdict(records[:2]) == "same"


def test_a_process_that_dies_does_not_end_the_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "examine", lambda cls: sweep.os._exit(3))
    assert sweep.verdict(sweep.sweep(["ViTModel"], jobs=1)["ViTModel"]) == "not made"
