"""Pictures, each of panels that stand side by side where there is room, and each panel for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

import cupyattn
from making import results, tables


class Colours(NamedTuple):
    """Of a page: of its words, of lines beside each other, of a key that is hidden."""

    text: str
    lines: tuple[str, str, str]
    hidden: str

    @property
    def ours(self) -> str:
        return self.lines[0]


SCHEMES = {
    "light": Colours("#222832", ("#0a7d91", "#c2570c", "#6d4ad1"), "#eceff2"),
    "dark": Colours("#ced6dd", ("#4fc3d5", "#f2a65a", "#b39bff"), "#2a313b"),
}


class Panel(NamedTuple):
    """One axes: what it shows in words, its size in inches, and how it is drawn."""

    title: str
    size: tuple[float, float]
    draw: Callable[[Axes, Colours], None]
    room: float = 0.0
    """Inches on the right, for words beside the axes."""


# ---------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------


def weights(seqlen_q: int, seqlen_k: int, **options: Any) -> np.ndarray:
    """The weights that attention gives to equal scores: those of its values are ones and zeros."""
    q, k = np.zeros((1, seqlen_q, 1, 8)), np.zeros((1, seqlen_k, 1, 8))
    values = np.eye(seqlen_k)[None, :, None, :]
    return cupyattn.attention(q, k, values, **options)[0, :, 0, :]


def weights_of_documents(starts: list[int]) -> np.ndarray:
    """The same of sequences end to end, causal."""
    total, longest = starts[-1], int(np.diff(starts).max())
    q, bounds = np.zeros((total, 1, 8)), np.array(starts, np.int32)
    values = np.eye(total)[:, None, :]
    return cupyattn.flash_attn_varlen_func(q, q, values, bounds, bounds, longest, longest, causal=True)[:, 0, :]


def squares(title: str, found: np.ndarray) -> Panel:
    """A panel of weights, one square for each."""

    def draw(axes: Axes, colours: Colours) -> None:
        for row, key in np.ndindex(found.shape):
            seen = found[row, key] > 0
            axes.add_patch(
                Rectangle(
                    (key, row), 0.94, 0.94, linewidth=0,
                    facecolor=colours.ours if seen else colours.hidden,
                    alpha=0.3 + 0.7 * found[row, key] if seen else 1.0,
                )
            )  # fmt: skip
        axes.set(xlabel="key", ylabel="query", xticks=[], yticks=[], aspect="equal")
        axes.set(xlim=(0, found.shape[1]), ylim=(found.shape[0], 0))
        axes.spines[:].set_visible(False)

    return Panel(title, (0.9 + 0.26 * found.shape[1], 0.8 + 0.26 * found.shape[0]), draw)


def both_ways(seqlen_q: int, seqlen_k: int) -> list[Panel]:
    return [
        squares(way, weights(seqlen_q, seqlen_k, causal=True, alignment=way)) for way in ("top-left", "bottom-right")
    ]


ROWS, KEYS = np.ogrid[:8, :8]


def masks() -> dict[str, list[Panel]]:
    """The gallery."""
    streaming = (KEYS <= ROWS) & ((KEYS < 2) | (ROWS - KEYS <= 2))
    slopes = {f"slope {slope:g}": np.array([slope]) for slope in (0.25, 1.0)}
    return {
        "causal": both_ways(4, 8),
        "taller": both_ways(8, 4),
        "window": [squares(f"window_size={size}", weights(8, 8, window_size=size)) for size in ((2, 0), (2, 2))],
        "documents": [squares("three documents, causal", weights_of_documents([0, 3, 5, 8]))],
        "sinks": [
            squares("causal", weights(8, 8, causal=True)),
            squares("a learnable sink of 1", weights(8, 8, causal=True, sinks=np.ones(1))),
            squares("two first keys and a window", weights(8, 8, mask=streaming)),
        ],
        "alibi": [squares(name, weights(8, 8, causal=True, alibi_slopes=slope)) for name, slope in slopes.items()],
        "anything": [
            squares("every second key, causal", weights(8, 8, causal=True, mask=(ROWS - KEYS) % 2 == 0)),
            squares("a prefix of 3 that all see", weights(8, 8, mask=(KEYS <= ROWS) | (KEYS < 3))),
        ],
    }


# ---------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------

RULES = ("cupyattn", "flash-attn 2", "flash-attn 3")
DEVICES = ("A100", "H100", "H200")


def splits(device: str, batch: int, context: int, key_heads: int) -> tuple[int, int, int]:
    """Of one new token of 32 query heads of 128, by each of the rules."""
    key = (batch, context, key_heads, 128)
    plan = cupyattn.explain((batch, 1, 32, 128), key, key, dtype="bfloat16", device=device, implementation="splitkv")
    peers = dict(plan.peers)
    return plan.num_splits, peers["flash-attn 2"], peers["flash-attn 3"]


def curves(title: str, label: str, places: list[int], of_place: Callable[[int], tuple[int, int, int]]) -> Panel:
    """A panel with a curve for each rule."""

    def draw(axes: Axes, colours: Colours) -> None:
        found = np.array([of_place(place) for place in places])
        for rule, numbers, colour, style in zip(RULES, found.T, colours.lines, ("-", "--", ":"), strict=True):
            axes.plot(places, numbers, style, color=colour, label=rule, linewidth=1.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel=label, ylabel="splits", ylim=(0.9, 160))
        shown = FuncFormatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
        axes.xaxis.set_major_formatter(shown)
        axes.yaxis.set_major_formatter(shown)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(fontsize=8, frameon=False)

    return Panel(title, (2.95, 2.5), draw)


def all_splits() -> dict[str, list[Panel]]:
    contexts = [round(2 ** (exponent / 4)) for exponent in range(28, 69)]  # 128 to 131072
    batches = [*range(1, 33), *range(34, 65, 2)]
    heads = [1, 2, 4, 8, 16, 32]
    return {
        "splits-context": [
            curves(f"{device}, batch {batch}", "keys", contexts, lambda n, d=device, b=batch: splits(d, b, n, 8))
            for batch in (1, 8)
            for device in DEVICES
        ],
        "splits-batch": [
            curves(f"{device}, {kv} key heads", "sequences", batches, lambda n, d=device, h=kv: splits(d, n, 8192, h))
            for kv in (8, 32)
            for device in DEVICES
        ],
        "splits-heads": [
            curves(device, "key heads", heads, lambda n, d=device: splits(d, 1, 8192, n)) for device in DEVICES
        ],
    }


# ---------------------------------------------------------------------------------------------------
# Bytes, and what was measured
# ---------------------------------------------------------------------------------------------------


def bytes_of_caches() -> Panel:
    """Over the number of tokens; models that cost the same share a line."""
    by_cost: dict[int, list[str]] = {}
    for model in tables.MODELS:
        by_cost.setdefault(tables.bytes_of(model), []).append(model)

    def draw(axes: Axes, colours: Colours) -> None:
        tokens = np.array([2**exponent for exponent in range(9, 18)])
        for cost, models in sorted(by_cost.items(), reverse=True):
            axes.plot(tokens, tokens * cost / 2**30, color=colours.ours, linewidth=1.6)
            axes.annotate(", ".join(models), (tokens[-1], tokens[-1] * cost / 2**30), (6, -3), fontsize=8,
                          textcoords="offset points", color=colours.text, annotation_clip=False)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="tokens", ylabel="GiB", xlim=(tokens[0], tokens[-1]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.25, linewidth=0.5)

    return Panel("cache of one sequence, bfloat16", (6.9, 3.6), draw, 1.9)


def measured(found: results.Found) -> list[Panel]:
    """Time and memory of the naive formula over cupyattn's, where they have been measured."""

    def bars(title: str, numbers: dict[int, float]) -> Panel:
        def draw(axes: Axes, colours: Colours) -> None:
            drawn = axes.bar([f"{seqlen}" for seqlen in numbers], list(numbers.values()), color=colours.ours, width=0.6)
            axes.bar_label(drawn, fmt="%.1f×", fontsize=8, color=colours.text)
            axes.axhline(1, color=colours.text, linewidth=0.8)
            axes.set(xlabel="tokens", ylabel="naive / cupyattn")
            axes.spines[["top", "right"]].set_visible(False)

        return Panel(title, (3.6, 2.7), draw)

    return [bars(title, numbers) for title, numbers in results.over_naive(found).items() if numbers]


def all_pictures() -> Iterator[tuple[str, list[Panel]]]:
    yield from masks().items()
    yield from all_splits().items()
    yield "caches", [bytes_of_caches()]
    articles = results.newest("articles-*.json")
    yield "articles", measured(articles) if articles else []


MARGINS = {"left": 0.6, "right": 0.15, "bottom": 0.45, "top": 0.3}
"""Inches around axes, for their words."""


def paint(panel: Panel) -> str:
    """One panel for a light page, as an SVG that is the same text whenever it is made; its words are outlines."""
    colours = SCHEMES["light"]
    words = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), colours.text
    )
    stream, (width, height) = io.StringIO(), panel.size
    with matplotlib.rc_context({"svg.hashsalt": "cupyattn", "font.size": 9, "axes.titlesize": 9, **words}):
        figure = Figure(figsize=panel.size)
        axes = figure.add_subplot()
        figure.subplots_adjust(
            MARGINS["left"] / width, MARGINS["bottom"] / height,
            1 - (MARGINS["right"] + panel.room) / width, 1 - MARGINS["top"] / height,
        )  # fmt: skip
        panel.draw(axes, colours)
        axes.set_title(panel.title)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()


def for_dark_pages(svg: str) -> str:
    """The same picture, each of the light page's colours exchanged for its counterpart."""
    light, dark = SCHEMES["light"], SCHEMES["dark"]
    pairs = zip((light.text, light.hidden, *light.lines), (dark.text, dark.hidden, *dark.lines), strict=True)
    for ours, theirs in pairs:
        svg = svg.replace(ours, theirs)
    return svg


def paint_all(folder: Path) -> dict[str, list[str]]:
    """Every picture into a folder, and the titles of its panels by its name: NAME-0-light.svg is the first."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = {}
    for name, panels in all_pictures():
        titles[name] = [panel.title for panel in panels]
        for number, panel in enumerate(panels):
            svg = paint(panel)
            for scheme, text in (("light", svg), ("dark", for_dark_pages(svg))):
                (folder / f"{name}-{number}-{scheme}.svg").write_text(text)
    return titles
