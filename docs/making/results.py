"""Tables of what was measured, from the files in asv_benchmarks/results, as Markdown; or that nothing was, yet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from making.tables import markdown

RESULTS = Path(__file__).parents[2] / "asv_benchmarks" / "results"
Found = dict[str, Any]


def newest(pattern: str, folder: Path | None = None) -> Found | None:
    """What a measurement left; the last by the date in its name, and not one that was only a look."""
    for path in sorted((folder or RESULTS).glob(pattern), key=when, reverse=True):
        found: Found = json.loads(path.read_text())
        if not found.get("quick"):
            return {**found, "file": path.name}
    return None


DATED = re.compile(r"-(\d{4})-?(\d\d)-?(\d\d)(?:-(\d{4}))?$")


def when(path: Path) -> tuple[str, str, str]:
    """The date at the end of a file's name, and the time if it has one, as `make gpu` writes it; then the name."""
    found = DATED.search(path.stem)
    year, month, day, time = found.groups("") if found else ("",) * 4
    return year + month + day, time, path.stem


def not_yet(command: str) -> str:
    """What a page says where there is no file."""
    return f"**Not measured yet.** The command is `{command}`; its result goes into `asv_benchmarks/results`."


def values(found: Found, benchmark: str) -> dict[tuple[Any, ...], float]:
    """What one benchmark measured, by its parameters in their order; what was skipped is not there."""
    return {
        tuple(row["params"].values()): row["value"]
        for row in found["rows"]
        if row["benchmark"] == benchmark and "value" in row
    }


def pivot(numbers: dict[tuple[Any, ...], float], names: list[str], digits: int = 2) -> str:
    """A table with a column for each last parameter, and a row for all before."""
    columns = list(dict.fromkeys(params[-1] for params in numbers))
    rows = list(dict.fromkeys(params[:-1] for params in numbers))
    cells = [
        [*row, *(f"{numbers[(*row, column)]:.{digits}f}" if (*row, column) in numbers else "" for column in columns)]
        for row in rows
    ]
    return markdown([*names, *map(str, columns)], cells)


# ---------------------------------------------------------------------------------------------------
# `make bench`
# ---------------------------------------------------------------------------------------------------

BENCH = 'make bench ARGS="--save cpu-DATE"'


def of_bench(make: Callable[[Found], str]) -> Callable[[], str]:
    """A table of the newest file of `make bench`."""

    def table() -> str:
        found = newest("cpu-*.json")
        return make(found) if found else not_yet(BENCH)

    return table


def against_torch(found: Found) -> str:
    numbers = values(found, "AgainstTorch.track_time")
    words = "One batch, 8 heads of 64. Time over that of torch's `scaled_dot_product_attention` in the same dtype:"
    return f"{words}\n\n{pivot(numbers, ['tokens', 'mask'])}"


def decoding(found: Found) -> str:
    numbers = {
        (context, peer): value for (peer, context), value in values(found, "DecodeAgainstTorch.track_time").items()
    }
    words = "Time over that of torch's function, told that key heads are shared, and with keys repeated before:"
    return f"{words}\n\n{pivot(numbers, ['keys'])}"


def memory(found: Found) -> str:
    numbers = values(found, "Memory.track_peak")
    return f"In MB:\n\n{pivot(numbers, [''], 0)}"


def machine(found: Found) -> str:
    """On what, and when."""
    about = found["machine"]
    date, parts = about["date"].partition("T")[0], ("python", "numpy", "torch")
    versions = ", ".join(f"{name} {about[name]}" for name in parts if name in about)
    return f"Measured on {date}: {about['cpu']}, {about['cores']} cores; {versions} ({link(found)})."


def link(found: Found) -> str:
    """To the file itself, which is copied into the site; HTML, since it is no document of Sphinx."""
    return f'<a href="results/{found["file"]}">{found["file"]}</a>'


# ---------------------------------------------------------------------------------------------------
# The tables that circulate
# ---------------------------------------------------------------------------------------------------

ARTICLES = 'make bench ARGS="--only articles --save articles-DATE"'
SAID_OF_TIME = {512: "2.2×", 1024: "3.6×", 2048: "6.2×", 4096: "11.1×"}
"""Of a GPU; what articles say flash attention gains."""


def over_naive(found: Found) -> dict[str, dict[int, float]]:
    """{picture: {tokens: how many times cupyattn's time, or memory, the naive formula takes}}."""
    times = values(found, "Standard.track_time")
    peaks = values(found, "StandardMemory.track_peak")
    return {
        "time, no mask": {seqlen: 1 / value for (seqlen, causal), value in times.items() if causal == "full"},
        "time, causal": {seqlen: 1 / value for (seqlen, causal), value in times.items() if causal == "causal"},
        "peak memory": {
            seqlen: peaks["naive", seqlen] / peaks["cupyattn", seqlen]
            for contender, seqlen in peaks
            if contender == "naive" and peaks.get(("cupyattn", seqlen), 0) > 0
        },
    }


def articles() -> str:
    """All four, beside what is said."""
    found = newest("articles-*.json")
    if found is None:
        return not_yet(ARTICLES)
    return "\n\n".join((standard(found), grouped(found), cached(found), padded(found), machine(found)))


def times(value: float) -> str:
    return f"{value:.1f}×"


def standard(found: Found) -> str:
    full, causal, peaks = over_naive(found).values()
    rows = [
        (
            seqlen,
            times(full[seqlen]),
            times(causal[seqlen]),
            SAID_OF_TIME.get(seqlen, ""),
            f"{100 * (1 - 1 / peaks[seqlen]):.0f} %" if seqlen in peaks else "",
        )
        for seqlen in sorted(full)
    ]
    head = [
        "tokens",
        "measured: as fast as naive",
        "causal",
        "said (of a GPU)",
        "measured: memory saved (said: 55 to 91 %)",
    ]
    return f"**Standard against flash attention.** 8 heads of 64, float32.\n\n{markdown(head, rows)}"


def grouped(found: Found) -> str:
    numbers = values(found, "Grouped.track_time")
    rows = [(case, repeated, times(1 / value)) for (case, repeated), value in numbers.items()]
    words = "**GQA against repeated keys.** 32 query heads on 8 key heads of 128, float32; said: 1.5 to 2×."
    return f"{words}\n\n{markdown(['', 'keys are repeated', 'measured: as fast'], rows)}"


def cached(found: Found) -> str:
    rates = values(found, "Cached.track_rate")
    ways = {prompt: (rates["with", prompt], rates["without", prompt]) for way, prompt in rates if way == "with"}
    rows = [(prompt, f"{1 / a:.0f}", f"{1 / b:.1f}", times(b / a)) for prompt, (a, b) in ways.items()]
    words = "**A cache against none.** A small decoder in NumPy, whole, 16 new tokens; said: 5 to 20×."
    head = ["tokens of the prompt", "tokens per second with a cache", "without", "as fast"]
    return f"{words}\n\n{markdown(head, rows)}"


def padded(found: Found) -> str:
    shares, spent = values(found, "Padded.track_tokens"), values(found, "Padded.track_time")
    rows = [
        (lengths, causal, f"{100 * (1 - shares[(lengths, causal)]):.0f} %", f"{100 * (1 - value):.0f} %")
        for (lengths, causal), value in spent.items()
    ]
    words = "**Packed against padded batches.** 32 sequences, 8 heads of 64, float32; said: 50 to 80 % saved."
    head = ["lengths", "mask", "measured: tokens, and so memory, saved", "measured: time saved"]
    return f"{words}\n\n{markdown(head, rows)}"


# ---------------------------------------------------------------------------------------------------
# `make gpu`
# ---------------------------------------------------------------------------------------------------

SECTIONS = ("prefill", "gradients", "decode")


def gpu() -> str:
    """The sections of the newest file that a GPU wrote, as they are."""
    found = newest("gpu-*.json")
    if found is None:
        return not_yet("make gpu")
    about = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    parts = [f"{about} ({link(found)})"]
    for section in SECTIONS:
        rows = [row for row in found["sections"].get(section, ()) if len(row) > 2]
        if rows:
            head = list(dict.fromkeys(name for row in rows for name in row))
            parts.append(
                f"**{section}**\n\n{markdown(head, ([shown(row.get(name, '')) for name in head] for row in rows))}"
            )
    return "\n\n".join(parts)


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def files() -> Iterable[Path]:
    """What tables link to."""
    return sorted(RESULTS.glob("*.json"))


TABLES: dict[str, Callable[[], str]] = {
    "against_torch": of_bench(against_torch),
    "decoding": of_bench(decoding),
    "memory": of_bench(memory),
    "machine": of_bench(machine),
    "articles": articles,
    "gpu": gpu,
}
