"""Generate tokens with a small Qwen2-shaped decoder whose attention is cupyattn's.

    python examples/generate.py                    # NumPy
    python examples/generate.py --library cupy

Compares full, grouped and single key heads, checks the tokens against transformers' Qwen2 with the same
random weights (exit status 1 if they differ), and draws how long a step takes as its context grows.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

REPOSITORY = Path(__file__).resolve().parents[1]
PIP_NAMES = {"array_api_compat": "array-api-compat", "cupy": "cupy-cuda13x", "cupyattn": str(REPOSITORY)}
"""What to ask pip for, where it is not the name of the module."""


def stop_for(missing: ModuleNotFoundError) -> SystemExit:
    """One sentence that says what to install."""
    name = (missing.name or "").partition(".")[0]
    return SystemExit(
        f"generate.py needs {name}, which is not installed: python -m pip install {PIP_NAMES.get(name, name)}"
    )


try:
    import matplotlib  # noqa: F401 - asked for now, so that it cannot be found missing at the very end
    import numpy as np
    from array_api_compat import array_namespace, to_device
    from decoder import Decoder, Sizes, draw_weights, generate, paged_cache

    import cupyattn
except ModuleNotFoundError as missing:
    raise stop_for(missing) from None

Array: TypeAlias = Any

NUM_HEADS = 16
KINDS = {"MHA": NUM_HEADS, "GQA": 4, "MQA": 1}
"""Key heads of multi-head, grouped-query and multi-query attention."""
HEAD_DIM = 64
"""In the picture; the model's are half as large."""
SHORTEST = 256
"""Context in the picture."""
PROMPT = 64
PATIENCE = 0.25
"""Seconds for which a step is tried again, in the hope that no other program disturbs it."""


class Library:
    """An array library, by name, and the way into it and out of it."""

    def __init__(self, name: str) -> None:
        module = importlib.import_module(name)
        if name == "cupy" and not module.cuda.is_available():
            raise SystemExit("generate.py --library cupy needs a CUDA GPU, and CuPy finds none.")
        self.name = name
        self.namespace = array_namespace(module.zeros(1))

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.namespace.asarray(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        """A copy on the host, made when the GPU has finished."""
        return np.asarray(to_device(array, "cpu"))


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def sizes_with(num_heads_kv: int) -> Sizes:
    """Of the model."""
    return Sizes(num_heads_kv, NUM_HEADS)


def draw_prompt(sizes: Sizes) -> np.ndarray:
    return np.random.default_rng(1).integers(0, sizes.vocab_size, (1, PROMPT))


def print_kinds(library: Library, num_tokens: int, compute_dtype: str | None) -> dict[str, np.ndarray]:
    """Generate with each number of key heads; print speed and memory, and return the tokens."""
    print(f"{'':<4}{'key heads':>10}{'cache':>10}{'a token':>10}{'speed':>14}")
    found = {}
    for kind, num_heads_kv in KINDS.items():
        sizes = sizes_with(num_heads_kv)
        weights = {name: library.from_numpy(weight) for name, weight in draw_weights(sizes).items()}
        decoder = Decoder(weights, sizes, compute_dtype)
        prompt = library.from_numpy(draw_prompt(sizes))
        generate(decoder, prompt, 2)  # the first call compiles kernels, or wakes the BLAS
        start = time.perf_counter()
        tokens, caches = generate(decoder, prompt, num_tokens)
        found[kind] = library.to_numpy(tokens)
        speed = num_tokens / (time.perf_counter() - start)
        size = sum(cache.nbytes for cache in caches)
        print(
            f"{kind:<4}{num_heads_kv:>10}{size / 1e6:>7.2f} MB{size / len(caches[0]) / 1e3:>7.1f} kB"
            f"{speed:>9.0f} tok/s",
            flush=True,
        )
    return found


def generate_with_transformers(sizes: Sizes, num_tokens: int, implementation: str) -> tuple[np.ndarray, float]:
    """The tokens of transformers' Qwen2 with the same weights, and its tokens per second."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads_kv,
        rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in draw_weights(sizes).items()})
    prompt = torch.from_numpy(draw_prompt(sizes))
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    model.generate(prompt, max_new_tokens=2, **options)
    start = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=num_tokens, **options)
    return tokens[:, PROMPT:].numpy(), num_tokens / (time.perf_counter() - start)


def check_with_transformers(found: dict[str, np.ndarray], compute_dtype: str | None) -> bool:
    """Print whether transformers says the same; True, with a word, where it is not installed."""
    try:
        import torch  # noqa: F401 - transformers does without, as long as nobody wants a model
        import transformers

        from cupyattn.integrations.transformers import register
    except ModuleNotFoundError as missing:
        print(f"skipped: {missing.name} is not installed (python -m pip install torch 'transformers>=5')")
        return True
    transformers.utils.logging.set_verbosity_error()
    register(compute_dtype=compute_dtype)
    passed = True
    for kind, tokens in found.items():
        for implementation in ("eager", "cupyattn"):
            theirs, speed = generate_with_transformers(sizes_with(KINDS[kind]), tokens.shape[1], implementation)
            same = bool((theirs == tokens).all())
            passed = passed and same
            verdict = f"the same {tokens.shape[1]} tokens" if same else "FAILED: other tokens"
            print(f"{kind}  attn_implementation={implementation!r:<12}{verdict}{speed:>9.0f} tok/s", flush=True)
    return passed


def time_step(library: Library, num_heads_kv: int, context: int, compute_dtype: str | None) -> float:
    """Seconds of one layer's attention of one query over a context, the best of a quarter of a second."""
    xp = library.namespace
    generator = np.random.default_rng(context)
    shapes = (1, NUM_HEADS), (context, num_heads_kv), (context, num_heads_kv)
    q, k, v = (
        library.from_numpy(generator.standard_normal((1, *shape, HEAD_DIM), dtype=np.float32)) for shape in shapes
    )
    cache = paged_cache(context)
    cache.append(k, v)
    best, over = float("inf"), time.perf_counter() + PATIENCE
    while time.perf_counter() < over:
        start = time.perf_counter()
        library.to_numpy(xp.sum(cache.attend(q, compute_dtype=compute_dtype)))
        best = min(best, time.perf_counter() - start)
    return best


def splits_on(device: str, num_heads_kv: int, context: int) -> int:
    """Into how many pieces the keys of such a step would be cut on a GPU, in bfloat16."""
    keys = (1, context, num_heads_kv, HEAD_DIM)
    plan = cupyattn.explain((1, 1, NUM_HEADS, HEAD_DIM), keys, keys, dtype="bfloat16", device=device)
    if plan.kernel == "none":
        raise ValueError(str(plan))
    return plan.num_splits


def save_picture(path: Path, contexts: list[int], seconds: dict[str, list[float]], device: str, where: str) -> None:
    """Time of a step over its context, and beneath it how a GPU would split the keys."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display, no global state

    figure = Figure(figsize=(8, 7))
    times, splits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for size, (kind, measured) in zip((11, 8, 5), seconds.items(), strict=False):  # where lines meet, all can be seen
        label = f"{kind}, {KINDS[kind]} key head{'s' if KINDS[kind] > 1 else ''}"
        counts = [splits_on(device, KINDS[kind], context) for context in contexts]
        times.plot(contexts, [1e3 * second for second in measured], marker="o", label=label)
        splits.plot(contexts, counts, marker="s", markersize=size, linewidth=size / 3, label=label)
    times.set_yscale("log")
    splits.set_xscale("log", base=2)
    splits.set_yscale("log", base=2)
    splits.yaxis.set_major_formatter("{x:.0f}")
    times.set_ylabel(f"ms a step, {where}")
    times.set_title(f"Attention of one query, {NUM_HEADS} heads of {HEAD_DIM}")
    splits.set_ylabel(f"splits of the keys,\nplanned for one {device}")
    splits.set_xlabel("context, tokens")
    splits.set_xticks(contexts, [str(context) for context in contexts])
    splits.minorticks_off()
    for axes in (times, splits):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def run(options: argparse.Namespace) -> int:
    """Run the whole example; the exit status, 1 if the check failed."""
    library = Library(options.library)
    splits_on(options.device, num_heads_kv=1, context=1)  # a GPU that nobody knows is better found out now
    heading(f"Generating {options.tokens} tokens on {options.library}, by the number of key heads")
    found = print_kinds(library, options.tokens, options.compute_dtype)

    heading("The same weights through transformers")
    passed = check_with_transformers(found, options.compute_dtype)

    heading(f"Attention of one query on {options.library}, and its splits on one {options.device}")
    contexts = [2**power for power in range(SHORTEST.bit_length() - 1, options.longest.bit_length())]
    step = partial(time_step, library, compute_dtype=options.compute_dtype)
    seconds = {kind: [step(heads, context) for context in contexts] for kind, heads in KINDS.items()}
    print(f"{'context':>8}" + "".join(f"{kind:>12}{'splits':>8}" for kind in KINDS))
    for index, context in enumerate(contexts):
        row = (
            f"{1e3 * seconds[kind][index]:>9.2f} ms{splits_on(options.device, heads, context):>8}"
            for kind, heads in KINDS.items()
        )
        print(f"{context:>8}{''.join(row)}")
    save_picture(options.output, contexts, seconds, options.device, f"float32 on {options.library}, measured here")
    print(f"saved {options.output}")
    return 0 if passed else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate tokens with a decoder whose attention is cupyattn's.")
    parser.add_argument("--library", choices=("numpy", "cupy"), default="numpy", help="default: numpy")
    parser.add_argument("--tokens", type=int, default=64, help="to generate; default: 64")
    parser.add_argument("--longest", type=int, default=16384, help="context in the picture; default: 16384")
    parser.add_argument("--device", default="H100", help="the GPU whose splits are planned; default: H100")
    parser.add_argument(
        "--compute-dtype",
        choices=("float64", "float32"),
        default="float32",
        help="of the arithmetic inside attention; default: float32",
    )
    parser.add_argument("--output", type=Path, default=Path("decode.png"), help="the picture; default: decode.png")
    options = parser.parse_args()
    if options.tokens < 1 or options.longest < SHORTEST:
        parser.error(f"--tokens has to be at least 1, and --longest at least {SHORTEST}")
    return options


def main() -> int:
    options = parse_options()
    try:
        return run(options)
    except ModuleNotFoundError as missing:
        raise stop_for(missing) from None
    except (OSError, ValueError, NotImplementedError) as error:  # a folder not to be written to, an unknown GPU
        raise SystemExit(f"generate.py stopped: {error}") from None
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
