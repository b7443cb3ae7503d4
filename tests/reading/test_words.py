"""Calls with unknown, missing or too many arguments say who refuses them, what is wrong, and what came."""

import inspect
import re

import numpy as np
import pytest

import cupyattn
from cupyattn.reading import in_our_words
from cupyattn.rehearsing import FUNCTIONS

X = np.ones((1, 3, 2, 8), np.float32)
CACHES = {
    "DynamicCache": cupyattn.DynamicCache,
    "StaticCache": lambda: cupyattn.StaticCache(9),
    "SlidingWindowCache": lambda: cupyattn.SlidingWindowCache(9),
    "OffloadedCache": cupyattn.OffloadedCache,
    "PagedCache": lambda: cupyattn.PagedCache(9),
    "LayeredCache": lambda: cupyattn.LayeredCache(2),
    "PrefixCache": lambda: cupyattn.PrefixCache(2, 9),
}
RESULTS = ("Gradients", "LinearGradients", "Plan")


def everything():
    """Public functions, caches and their methods, by the names that errors have for them; and these through explain."""
    found = {name: getattr(cupyattn, name) for name in cupyattn.__all__ if name not in RESULTS}
    found = {name: x for name, x in found.items() if callable(x)}
    for name, make in CACHES.items():
        cache = make()
        methods = (word for word, x in inspect.getmembers(type(cache), inspect.isfunction) if word[0] != "_")
        found |= {f"{name}.{word}": getattr(cache, word) for word in methods}
    explained = (*FUNCTIONS, *(f"{name}.attend" for name in CACHES))
    return found | {f"explain {name}": explaining(found[name]) for name in explained}


def explaining(function):
    def call(*args, **words):
        return cupyattn.explain(function, *args, **words)

    call.__signature__ = inspect.signature(function)
    return call


CALLS = everything()


def of_each_kind(name):
    """(arguments, keywords, what is said of them), of calls that the function does not take."""
    parameters = inspect.signature(CALLS[name]).parameters.values()
    needed = [x.name for x in parameters if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD]
    kinds = {x.kind for x in parameters}
    given = dict.fromkeys(needed, X)
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        yield (), {**given, "strange": 3}, "has no argument strange; it has"
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        yield (X,) * 40, {}, "by position, and all else by name; it has"
    if needed:
        *others, last = needed
        yield (), dict.fromkeys(others, X), rf"needs {', '.join(needed)}, and {last} did not come\n *given"
        yield (X,), given, f"{needed[0]} is given by position and by name"


@pytest.mark.parametrize("name", CALLS)
def test_who_refuses_is_named_and_what_came(name):
    for args, words, says in of_each_kind(name):
        said = name.removeprefix("explain ")
        with pytest.raises(TypeError, match=rf"^{re.escape(said)}: [\w ,.]*{says}"):
            CALLS[name](*args, **words)


def test_a_word_that_a_layer_does_not_have_is_refused_by_who_was_called():
    cache = cupyattn.LayeredCache(1)
    cache.update(X, X, 0)
    for call in (cache.attend, explaining(cache.attend)):
        with pytest.raises(TypeError, match=r"^LayeredCache\.attend: has no argument strange; it has q, causal"):
            call(X, 0, strange=3)


def test_an_error_of_the_function_itself_stays_as_it_is():
    @in_our_words
    def broken(x):
        raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        broken(3)
