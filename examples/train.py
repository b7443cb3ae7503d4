"""Train a small decoder on this repository's own prose, with cupyattn's attention and with torch's, side by side.

    python examples/train.py                    # on the CPU, or on a GPU if torch has one
    python examples/train.py --steps 500

The model has query heads that share keys, its batches are padded, weights are dropped, and all of it runs under
bfloat16 autocast.  Both begin with the same weights and see the same bytes; only what dropout drops differs.  How far
two trainings may be apart is measured, not guessed: torch's own is done twice, with other random numbers.  Prints the
losses, saves a picture of them, and ends with status 1 if cupyattn's is further from torch's than that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md")
PAD = 256
"""The token behind the end of a line of a batch; the others are bytes."""


class Sizes(NamedTuple):
    """How many of everything."""

    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_heads_kv: int = 2
    seqlen: int = 64
    batch: int = 8
    dropout_p: float = 0.1
    learning_rate: float = 2e-3


Attend = Callable[[Any, Any, Any, Any, float], Any]
"""(q, k, v) of (batch, seqlen, heads, head_dim), the tokens that are there (batch, seqlen), dropout_p: the output."""


def attend_by_cupyattn(q: Any, k: Any, v: Any, is_there: Any, dropout_p: float) -> Any:
    import cupyattn

    mask = is_there[:, None, None, :]
    return cupyattn.attention(
        q, k, v, causal=True, mask=mask, dropout_p=dropout_p, compute_dtype="float32" if q.is_cpu else None
    )


def attend_by_torch(q: Any, k: Any, v: Any, is_there: Any, dropout_p: float) -> Any:
    import torch

    seqlen = q.shape[1]
    mask = is_there[:, None, None, :] & torch.ones((seqlen, seqlen), dtype=torch.bool, device=q.device).tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, enable_gqa=True)
    return out.transpose(1, 2)


def decoder(sizes: Sizes, attend: Attend) -> Any:
    """The model, its weights drawn from torch's generator."""
    import torch
    from torch import nn

    head_dim = sizes.hidden_size // sizes.num_heads

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = sizes.hidden_size
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.into = nn.Linear(width, (sizes.num_heads + 2 * sizes.num_heads_kv) * head_dim)
            self.outof = nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Any, is_there: Any) -> Any:
            heads = self.into(self.norms[0](x)).unflatten(-1, (-1, head_dim))
            q, k, v = heads.split([sizes.num_heads, sizes.num_heads_kv, sizes.num_heads_kv], dim=2)
            x = x + self.outof(attend(q, k, v, is_there, sizes.dropout_p).flatten(2))
            return x + self.mlp(self.norms[1](x))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(PAD + 1, sizes.hidden_size)
            self.places = nn.Embedding(sizes.seqlen, sizes.hidden_size)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes.num_layers))
            self.norm = nn.LayerNorm(sizes.hidden_size)
            self.head = nn.Linear(sizes.hidden_size, PAD)

        def forward(self, tokens: Any) -> Any:
            x = self.tokens(tokens) + self.places.weight
            for block in self.blocks:
                x = block(x, tokens != PAD)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    return Decoder()


def batches(sizes: Sizes, device: str) -> Iterator[tuple[Any, Any]]:
    """(tokens, the next token of each or PAD), for ever the same ones; stretches of text of different lengths."""
    import torch

    text = torch.frombuffer(bytearray(b"".join((REPOSITORY / name).read_bytes() for name in TEXTS)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.full((sizes.batch, sizes.seqlen + 1), PAD)
        for row in tokens:
            length = int(torch.randint(sizes.seqlen // 4, sizes.seqlen + 2, (), generator=generator))
            start = int(torch.randint(len(text) - length, (), generator=generator))
            row[:length] = text[start : start + length]
        tokens = tokens.to(device)
        targets = tokens[:, 1:].where(tokens[:, 1:] != PAD, -100)  # -100 is what torch's loss leaves out
        yield tokens[:, :-1], targets


def train(sizes: Sizes, attend: Attend, steps: int, device: str, seed: int) -> list[float]:
    """The loss of each step."""
    import torch

    model = decoder(sizes, attend).to(device)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate)
    losses = []
    for _, (tokens, targets) in zip(range(steps), batches(sizes, device), strict=False):
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def smoothed(losses: list[float]) -> list[float]:
    """Means of windows of a tenth of all steps: batches differ more than trainings do."""
    window = max(1, len(losses) // 10)
    return [sum(losses[i : i + window]) / window for i in range(0, len(losses) - window + 1, window)]


def apart(a: list[float], b: list[float]) -> float:
    """The mean distance of two curves."""
    pairs = list(zip(smoothed(a), smoothed(b), strict=True))
    return sum(abs(x - y) for x, y in pairs) / len(pairs)


def draw(curves: dict[str, list[float]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        window = max(1, len(losses) // 10)
        places = [window * (i + 0.5) for i in range(len(smoothed(losses)))]
        axes.plot(losses, alpha=0.25, color=axes.plot(places, smoothed(losses), label=name)[0].get_color())
    axes.set(xlabel="step", ylabel="loss per byte (nats)", title="A small decoder, bfloat16 autocast")
    axes.legend()
    figure.savefig(output, dpi=120)


def run(steps: int, output: Path, sizes: Sizes = Sizes()) -> int:  # noqa: B008 - a value
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves = {
        "cupyattn": train(sizes, attend_by_cupyattn, steps, device, 0),
        "torch": train(sizes, attend_by_torch, steps, device, 0),
        "torch again": train(sizes, attend_by_torch, steps, device, 1),
    }
    for name, losses in curves.items():
        print(f"{name:<12}" + " ".join(f"{x:.3f}" for x in smoothed(losses)))
    noise, distance = apart(curves["torch"], curves["torch again"]), apart(curves["cupyattn"], curves["torch"])
    allowed = 3.0 * noise + 0.01
    print(f"on {device}: cupyattn is {distance:.4f} from torch, torch {noise:.4f} from itself, allowed {allowed:.4f}")
    draw(curves, output)
    print(f"picture: {output}")
    if not distance <= allowed:
        print("FAILED: the curves differ by more than noise")
        return 1
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("train.png"))
    options = parser.parse_args()
    if options.steps < 10:
        parser.error("--steps has to be at least 10")
    return options


def main() -> None:
    options = parse_options()
    try:
        sys.exit(run(options.steps, options.output))
    except ModuleNotFoundError as missing:
        raise SystemExit(f"train.py needs {missing.name}, which is not installed") from missing


if __name__ == "__main__":
    main()
