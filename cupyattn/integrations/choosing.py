"""Which implementation of attention a model of transformers can have on this machine, and why not the others.

print(implementations(model))
"""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

from cupyattn.integrations import models
from cupyattn.reading import flag, refusal

FLASH = {"flash_attention_3": 3, "flash_attention_2": 2}
LARGEST_HEAD_DIM = 256
"""Of flash-attn 2 and 3."""


class Implementations(NamedTuple):
    """What `implementations` found."""

    best: str
    """For ``model.set_attn_implementation``."""
    objections: dict[str, str]
    """What each implementation has against the model or the machine, the best one first; "" if nothing."""

    def __str__(self) -> str:
        width = max(map(len, self.objections))
        lines = (f"{name:<{width}}  {objection or 'can be used'}" for name, objection in self.objections.items())
        return "\n".join([f"best: {self.best}", *lines])


def implementations(model: Any, *, output_attentions: bool = False) -> Implementations:
    """Name the best implementation of attention that a model can have where it is, and what others have against it.

    From the fastest on where all can be had: flash-attn 3, flash-attn 2, torch's ("sdpa"), cupyattn, which takes what
    these do not, the model's own ("eager").  It is a question: nothing is changed, and nothing downloaded.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Asked for its class, configuration, dtype and device.
    output_attentions : bool
        Whether its weights of attention are wanted, which only cupyattn and "eager" have.

    Returns
    -------
    Implementations

    Raises
    ------
    ImportError
        transformers or torch is not installed.
    TypeError
        `model` is not a model of transformers.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> from cupyattn.integrations.transformers import register
    >>> register()
    >>> model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> found = implementations(model, output_attentions=True)
    >>> found.best
    'cupyattn'
    >>> found.objections["sdpa"]
    'it has no weights of attention'
    """
    from transformers import PreTrainedModel

    function = "implementations"
    if not isinstance(model, PreTrainedModel):
        rule = "model has to be a model of transformers"
        raise TypeError(refusal(function, rule, ("model", type(model).__name__)))
    asked = flag(function, "output_attentions", output_attentions)
    ours = "cupyattn" if "cupyattn" in models.NAMES else min(models.NAMES, default="cupyattn")
    objections = {name: _against_flash(model, name, asked) for name in FLASH}
    objections["sdpa"] = _against_sdpa(model, asked)
    kind: Any = type(model)
    objections[ours] = models.manners(kind).objection
    if ours not in models.NAMES:
        objections[ours] = "cupyattn.integrations.transformers.register() has not been called"
    objections["eager"] = ""
    best = next(name for name, objection in objections.items() if not objection)
    return Implementations(best, objections)


def _against_flash(model: Any, name: str, output_attentions: bool) -> str:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model._flash_attn_can_dispatch(FLASH[name])
    except (ImportError, ValueError) as error:
        return _first_sentence(str(error))
    dtype, head_dim = model.dtype, _head_dim(model.config)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, and the model is {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and head_dim > LARGEST_HEAD_DIM:
        return f"its head_dim is {LARGEST_HEAD_DIM} at most, and the model's {head_dim}"
    return "it has no weights of attention" if output_attentions else ""


def _against_sdpa(model: Any, output_attentions: bool) -> str:
    try:
        model._sdpa_can_dispatch()
    except ValueError as error:
        return _first_sentence(str(error))
    return "it has no weights of attention" if output_attentions else ""


def _head_dim(config: Any) -> int | None:
    text = config.get_text_config()
    found = getattr(text, "head_dim", None)
    if found is None and getattr(text, "hidden_size", None) and getattr(text, "num_attention_heads", None):
        found = text.hidden_size // text.num_attention_heads
    return None if found is None else int(found)


def _first_sentence(words: str) -> str:
    """Of an error of transformers', without what it begins all of them with."""
    words = words.rpartition("due to the following error: ")[2]
    return re.split(r"(?<=[a-z])\. ", words)[0].removesuffix(".").strip()
