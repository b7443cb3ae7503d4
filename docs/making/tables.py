"""Tables that the planner fills, as Markdown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cupyattn
from cupyattn.plan.splits import BLOCKS_PER_UNIT, flash_attn_2, flash_attn_3, live_split_blocks
from cupyattn.problem import FLOAT8, NAMED_DEVICES, Layout, Mask, Problem, ScoreEdits, Sizes


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; bars inside of cells are kept."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------------------------
# What each implementation takes
# ---------------------------------------------------------------------------------------------------

HEADS, TOKENS = 8, 1024
IMPLEMENTATIONS = ("numpy", "flash", "hopper", "splitkv")

CAPABILITIES: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "float8_e4m3fn": {"dtype": "float8_e4m3fn"},
    "head_dim 256": {"head_dim": 256},
    "head_dim 512": {"head_dim": 512},
    "head_dim 100": {"head_dim": 100},
    "head_dim_v other than head_dim": {"head_dim_v": 64},
    "2 key heads for 8 query heads": {"num_heads_kv": 2},
    "causal, either alignment": {"causal": True, "alignment": "bottom-right"},
    "window, both sides": {"window_size": (128, 16), "alignment": "bottom-right"},
    "softcap": {"softcap": 30.0},
    "ALiBi": {"alibi_slopes": (HEADS,), "alignment": "bottom-right"},
    "sinks": {"sinks": (HEADS,)},
    "boolean mask": {"mask": (1, TOKENS)},
    "additive bias": {"bias": (1, TOKENS)},
    "dropout": {"dropout_p": 0.1},
    "lse returned": {"return_lse": True},
    "lengths of each sequence": {"seqlens_k": (1,)},
}
"""By what a reader looks for: the arguments of a call that asks for it."""
FROM_TORCH = "from torch only"
"""Whose float8 arrays are taken on a GPU: a plan is of no library."""


def explained(device: str, tokens: int, call: dict[str, Any], **more: Any) -> cupyattn.Plan:
    """The plan of a call with so many queries, in bfloat16 if it does not say what."""
    sizes = {"dtype": "bfloat16", "head_dim": 128, "num_heads_kv": HEADS, **call}
    head_dim, kv = sizes.pop("head_dim"), sizes.pop("num_heads_kv")
    shapes = (1, tokens, HEADS, head_dim), (1, TOKENS, kv, head_dim), (1, TOKENS, kv, sizes.pop("head_dim_v", head_dim))
    return cupyattn.explain(*shapes, device=device, **sizes, **more)


def objection(implementation: str, call: dict[str, Any]) -> str:
    """Why an implementation does not take a call; nothing if it does."""
    device = "cpu" if implementation == "numpy" else "H200"
    plan = explained(device, 1 if implementation == "splitkv" else TOKENS, call, implementation=implementation)
    return "" if plan.kernel == implementation else "; ".join(dict(plan.objections)[implementation])


def objection_of_gradients(call: dict[str, Any]) -> str:
    """Why no kernel has the gradients of a call; nothing if one does."""
    try:
        plan = explained("H200", TOKENS, call, backward=True)
    except TypeError:  # it names the dtypes that have gradients anywhere, float64 among them, which the CPU has alone
        return f"there are no gradients of {call['dtype']}"
    reasons = dict(plan.objections).get("backward", ())
    return "" if plan.kernel != "none" else "; ".join(reasons) or "none"


def capabilities() -> str:
    """Each capability, and each implementation's word on it; footnotes say why not."""
    notes: list[str] = []

    def noted(sign: str, note: str) -> str:
        if note and note not in notes:
            notes.append(note)
        return f"{sign} <sup>{notes.index(note) + 1}</sup>" if note else sign

    def cell(why: str, remark: str = "") -> str:
        return noted("✗", why) if why else noted("✓", remark)

    def remark(implementation: str, call: dict[str, Any]) -> str:
        return FROM_TORCH if implementation != "numpy" and call.get("dtype") == FLOAT8 else ""

    rows = [
        [
            name,
            *(cell(objection(each, call), remark(each, call)) for each in IMPLEMENTATIONS),
            cell(objection_of_gradients(call)),
        ]
        for name, call in CAPABILITIES.items()
    ]
    head = ["", "`numpy`, on the CPU", *(f"`{name}`" for name in IMPLEMENTATIONS[1:]), "gradients on a GPU"]
    return "\n".join([markdown(head, rows), "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


# ---------------------------------------------------------------------------------------------------
# What a cache costs
# ---------------------------------------------------------------------------------------------------

MODELS = {
    "Llama 2 7B": (32, 32, 32, 128),
    "Llama 2 13B": (40, 40, 40, 128),
    "Llama 2 70B": (80, 64, 8, 128),
    "Llama 3 8B": (32, 32, 8, 128),
    "Llama 3 70B": (80, 64, 8, 128),
    "Mistral 7B": (32, 32, 8, 128),
    "Qwen2 7B": (28, 28, 4, 128),
    "Falcon 7B": (32, 71, 1, 64),
}
"""(layers, query heads, key heads, head_dim), from the models' own configurations."""


def bytes_of(model: str, tokens: int = 1) -> int:
    layers, _, heads, head_dim = MODELS[model]
    return cupyattn.kv_cache_bytes(layers, heads, head_dim, "bfloat16", tokens)


def kind_of(heads: int, key_heads: int) -> str:
    return "MHA" if heads == key_heads else "MQA" if key_heads == 1 else "GQA"


def caches() -> str:
    """The models' caches in bfloat16: of a token, and of 8192."""
    rows = [
        (
            model,
            kind_of(heads, kv),
            layers,
            heads,
            kv,
            dim,
            f"{bytes_of(model) / 1024:g} KiB",
            gib(bytes_of(model, 8192)),
        )
        for model, (layers, heads, kv, dim) in MODELS.items()
    ]
    return markdown(["", "", "layers", "query heads", "key heads", "head_dim", "a token", "8192 tokens"], rows)


def gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


# ---------------------------------------------------------------------------------------------------
# When decoding splits
# ---------------------------------------------------------------------------------------------------

LONG, SHORT, SHORT_ONES = 65536, 512, 31
"""One long sequence among short ones."""
BLOCK_K = 64
"""Keys of a block of the split-KV kernel for heads of 128."""


def splits_of_ragged() -> Iterator[tuple[str, int, int]]:
    """(rule, splits of the long sequence, splits of each short one) on an H100."""
    device, lengths = NAMED_DEVICES["H100"], [LONG] + [SHORT] * SHORT_ONES
    problem = Problem(
        Sizes((len(lengths),), 32, 8, 8, 1, LONG, 128, 128),
        Layout("bshd", cached=True),
        "bfloat16",
        Mask(),
        ScoreEdits(128**-0.5),
    )
    splits = flash_attn_2(problem, device)
    yield "flash-attn 2", splits, splits
    short_first = [lengths[-1], *lengths[:-1]]
    yield "flash-attn 3", flash_attn_3(problem, device, lengths), flash_attn_3(problem, device, short_first)
    blocks = [-(-length // BLOCK_K) for length in lengths]
    size = live_split_blocks(8 * sum(blocks), 8 * len(lengths), BLOCKS_PER_UNIT * device.num_units, BLOCK_K)
    yield "cupyattn", -(-blocks[0] // size), -(-blocks[-1] // size)


def ragged() -> str:
    """The same as a table."""
    head = ["", f"splits of the sequence of {LONG:,} tokens", f"of each of {SHORT:,}"]
    return markdown(head, splits_of_ragged())


TABLES: dict[str, Callable[[], str]] = {"capabilities": capabilities, "caches": caches, "ragged": ragged}
