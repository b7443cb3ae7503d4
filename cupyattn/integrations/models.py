"""Which models of transformers can run on an attention that is registered by name, and which masks they are given.

Models written for transformers' attention interface hand every layer to the function registered under a name.  Others
have an attention of their own and ask for masks by that name all the same, or look a class up by it; under a name they
do not know they add booleans to their scores, or leave a mask out.  So each model is asked before it is built, and
those that cannot be handed over keep their own attention, which transformers calls "eager".
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from enum import IntEnum
from functools import cache, wraps
from typing import Any, NamedTuple

from cupyattn.reading import refusal

NAMES: set[str] = set()
"""What is registered."""

MEANT: dict[str, str] = {
    "eager": "a model's own attention, and what those that cannot use cupyattn keep",
    "sdpa": "torch's attention, for which transformers leaves masks out that other implementations need",
    "flex": "torch's flex_attention, whose masks are objects of its own",
    "flash": "flash-attn, which is handed other masks and told of packed sequences in another way",
    "paged|": "continuous batching",
    "/": "a repository that kernels are downloaded from",
}
"""What transformers reads in a name that contains one of these."""

ATTENTION_CLASS = re.compile(r"^class \w*Attention\w*\((torch\.)?nn\.Module\):", re.MULTILINE)
ASKS_BY_NAME = re.compile(r"ALL_ATTENTION_FUNCTIONS\s*(\.get_interface\(|\[)")
CLASSES_BY_NAME = re.compile(r"\b(?!ALL_)\w+\[[\w.]*attn_implementation\]")
COMPARES_WITH_SDPA = re.compile(r"attn_implementation\s*([!=]=|(not )?in)[^\n]*[\"']sdpa[\"']")
CAUSAL_MASK = re.compile(r"\bcreate_(sliding_window_)?causal_mask\(")
BIDIRECTIONAL_LAYER = re.compile(r"\bself\.is_causal = False")
"""What is looked for in the source of a model, as transformers does in `set_attn_implementation`."""

NEVER_NONE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


class Masks(IntEnum):
    """What a class of models understands."""

    NUMBERS = 0
    """Numbers that are added to the scores, which is what "eager" has, and never None."""
    BOOLEAN = 1
    """Booleans too, but never None."""
    NONE = 2
    """None too: the layer's `is_causal` says it all."""


class Manners(NamedTuple):
    """How a class of models treats an implementation whose name it does not know."""

    objection: str
    """Why it cannot use one; "" if it can."""
    masks: Masks = Masks.NUMBERS


@cache
def manners(cls: type) -> Manners:
    """Read in the flags of a class of models and in the source it and the classes above it are written in."""
    sources = []
    for each in cls.__mro__:
        if each.__module__ == "transformers.modeling_utils":
            break
        try:
            sources.append(inspect.getsource(sys.modules[each.__module__]))
        except (KeyError, OSError, TypeError):
            return Manners(f"the source of {each.__name__} cannot be read")
    if any(ATTENTION_CLASS.search(source) and not ASKS_BY_NAME.search(source) for source in sources):
        return Manners("it has an attention of its own")
    if any(CLASSES_BY_NAME.search(source) for source in sources):
        return Manners("it has a class of attention for each name it knows")
    interface = getattr(cls, "_supports_attention_backend", False)
    # Who can leave masks to torch's or flash-attn's functions has layers that say whether they are causal.
    if getattr(cls, "_supports_sdpa", False) or (interface and getattr(cls, "_supports_flash_attn", False)):
        by_name = any(COMPARES_WITH_SDPA.search(source) for source in sources)
        # Where causal masks may meet layers that say they are not causal, the masks are right.
        unclear = any(CAUSAL_MASK.search(source) and BIDIRECTIONAL_LAYER.search(source) for source in sources)
        return Manners("", Masks.BOOLEAN if by_name or unclear else Masks.NONE)
    return Manners("" if interface else "it supports none but its own attention")


_understood: dict[type, Masks] = {}
"""By the class of a configuration: what the models that have it and use cupyattn understand."""


def admit(name: str) -> None:
    """Have every model ask, from now on, whether it can use what is registered under `name`.

    All ways of making a model, and of changing its implementation, pass one method of transformers.
    """
    from transformers import PreTrainedModel

    NAMES.add(name)
    asked = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if asked is None:
        rule = "this transformers chooses implementations in a way that is not known here; 5.0 to 5.24 are"
        raise ImportError(refusal("register", rule))
    if getattr(asked, "asks_cupyattn", False):
        return

    @wraps(asked)
    def get_correct_attn_implementation(self: Any, *arguments: Any, **keywords: Any) -> Any:
        chosen = asked(self, *arguments, **keywords)
        if chosen not in NAMES:
            return chosen
        cls: type = type(self)
        found, config = manners(cls), type(self.config)
        if found.objection:
            words = f"{cls.__name__} keeps attn_implementation='eager', not {chosen!r}: {found.objection}"
            warnings.warn(words, stacklevel=2)
            return "eager"
        _understood[config] = min(found.masks, _understood.get(config, found.masks))
        return chosen

    get_correct_attn_implementation.asks_cupyattn = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


def mask(*arguments: Any, **keywords: Any) -> Any:
    """The mask of a model, made as transformers makes it for sdpa: boolean, None where the layers say enough.

    It is never None for a model that did not say what None means, and numbers to be added, as "eager" has them, for one
    that says nothing about booleans either, or that nobody asked since its configuration got the name afterwards.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    config = keywords.get("config")
    understood = _understood.get(type(config), Masks.NUMBERS)
    if getattr(config, "use_bidirectional_attention", False):  # so its layers say, under masks that may be causal
        understood = min(understood, Masks.BOOLEAN)
    make = eager_mask if understood == Masks.NUMBERS else sdpa_mask
    return make(*arguments, **{**keywords, **({} if understood == Masks.NONE else NEVER_NONE)})


def refuse_name(name: Any) -> None:
    """Names in which transformers reads something else than what is registered under them."""
    if not isinstance(name, str) or not name:
        raise TypeError(refusal("register", "name has to be a word", ("name", repr(name))))
    for word, meaning in MEANT.items():
        if word in name:
            rule = f"a name with {word!r} in it means to transformers {meaning}; choose another, 'cupyattn' for one"
            raise ValueError(refusal("register", rule, ("name", repr(name))))


_spelled: dict[type, frozenset[str]] = {}


def names(layer: type, argument: str) -> bool:
    """Whether the code of a layer, or of the eager attention beside it, names an argument of attention.

    What does not appear there came along in ``**kwargs``, for a loss or from a collator, and changes no number of
    "eager" either.
    """
    if layer not in _spelled:
        beside = [vars(sys.modules.get(each.__module__)) for each in layer.__mro__ if each.__module__ in sys.modules]
        eager = [found["eager_attention_forward"] for found in beside if "eager_attention_forward" in found]
        own = [
            found for each in layer.__mro__ for found in vars(each).values() if not each.__module__.startswith("torch.")
        ]
        _spelled[layer] = frozenset(word for function in (*own, *eager) for word in _words(function))
    return argument in _spelled[layer]


def _words(function: Any) -> frozenset[str]:
    """The names of a function's parameters and all words in its code; names of keywords are among them."""
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    if code is None:
        return frozenset()
    flat = [word for each in code.co_consts for word in (each if isinstance(each, tuple) else (each,))]
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return frozenset(word for word in (*flat, *parameters) if isinstance(word, str))
