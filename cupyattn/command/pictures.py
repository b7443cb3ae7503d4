"""What was measured, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_picture(path: Path, found: dict[str, Any]) -> None:
    """Time over length, a line for each contender; matplotlib has to be there.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no display, no global state

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    rows, sizes = found["rows"], found["sizes"]
    for name in rows[0]["seconds"]:
        there = [row for row in rows if name in row["seconds"]]
        lengths, times = [row["seqlen"] for row in there], [1e3 * row["seconds"][name] for row in there]
        axes.plot(lengths, times, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = [row["seqlen"] for row in rows]
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms a call")
    where = found.get("gpu") or found["processor"]
    causal = ", causal" if found["causal"] else ""
    axes.set_title(f"{sizes['num_heads']} heads of {sizes['head_dim']}{causal}, {found['dtype']}\n{where}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
