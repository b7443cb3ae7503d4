"""Train a byte model of one layer on a text that is shared out among processes, and the same in one process.

    python examples/context_parallel.py                                             # two threads of this process
    mpirun -n 2 python examples/context_parallel.py --engine mpi                    # wants mpi4py
    torchrun --nproc-per-node 2 examples/context_parallel.py --engine torch         # wants torch, whose gloo sends

The model is NumPy alone, its gradients written out.  Each process has some tokens of one sequence, in zigzag order, so
that all have the same work; `ring_attention` lets them see all tokens before their own, and its gradients go back the
same way; those of weights are added up.  Rank 0 trains on the whole sequence by itself besides, and all of it ends with
status 1 if the weights are not the same to 1e-10, or the loss has not gone down.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cupyattn
from cupyattn.distributed import (
    MpiComm,
    Sharding,
    TorchComm,
    explain,
    ring_attention,
    ring_attention_backward,
    run_ranks,
    shard_sequence,
)

TEXT = Path(__file__).resolve().parents[1] / "README.md"
HIDDEN, HEADS, HEADS_KV, HEAD_DIM = 32, 4, 2, 8
SLOPES = 2.0 ** -np.arange(1, HEADS + 1)
Weights = dict[str, Any]
Attend = Callable[..., Any]


def weights() -> Weights:
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (256, HIDDEN),
        "q": (HIDDEN, HEADS * HEAD_DIM),
        "k": (HIDDEN, HEADS_KV * HEAD_DIM),
        "v": (HIDDEN, HEADS_KV * HEAD_DIM),
        "out": (HEADS * HEAD_DIM, HIDDEN),
    }
    return {name: rng.standard_normal(shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}


def step(w: Weights, tokens: Any, targets: Any, count: int, attend: Attend, backward: Attend) -> tuple[float, Weights]:
    """Loss and gradients of some tokens' share; `count` is how many there are in all."""
    x = w["embed"][tokens]
    q, k, v = (
        (x @ w[name]).reshape(1, len(tokens), heads, HEAD_DIM)
        for name, heads in (("q", HEADS), ("k", HEADS_KV), ("v", HEADS_KV))
    )
    attended, lse = attend(q, k, v)
    flat = attended.reshape(len(tokens), -1)
    y = x + flat @ w["out"]
    logits = y @ w["embed"].T
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    loss = -logp[np.arange(len(tokens)), targets].sum() / count

    dlogits = np.exp(logp)
    dlogits[np.arange(len(tokens)), targets] -= 1.0
    dlogits /= count
    dy = dlogits @ w["embed"]
    found = backward((dy @ w["out"].T).reshape(attended.shape), q, k, v, out=attended, lse=lse)
    dx = dy.copy()
    grads = {"embed": dlogits.T @ y, "out": flat.T @ dy}
    for name, gradient in (("q", found.dq), ("k", found.dk), ("v", found.dv)):
        gradient = gradient.reshape(len(tokens), -1)
        grads[name] = x.T @ gradient
        dx += gradient @ w[name].T
    np.add.at(grads["embed"], tokens, dx)
    return float(loss), grads


def train(tokens: Any, targets: Any, steps: int, count: int, attend: Attend, backward: Attend, sums: Callable) -> Any:
    """Losses and weights; `sums` adds up over processes."""
    w, losses = weights(), []
    for _ in range(steps):
        loss, grads = step(w, tokens, targets, count, attend, backward)
        losses.append(float(sums(np.array([loss]))[0]))
        for name, gradient in grads.items():
            w[name] = w[name] - 1.0 * sums(gradient)
    return losses, w


def rank(comm: Any, length: int, steps: int) -> bool:
    """One process.  True if it is as it should be."""
    text = np.frombuffer(TEXT.read_bytes()[: length + 1], np.uint8).astype(np.int64)
    layout = Sharding("zigzag", comm.size, (length,))
    own = {"comm": comm, "sharding": layout, "causal": True, "alibi_slopes": SLOPES}
    losses, w = train(
        shard_sequence(text[:-1], layout, comm.rank, axis=0),
        shard_sequence(text[1:], layout, comm.rank, axis=0),
        steps,
        length,
        lambda *qkv: ring_attention(*qkv, **own, return_lse=True),
        lambda *rows, **state: ring_attention_backward(*rows, **state, **own),
        comm.all_reduce,
    )
    if comm.rank != 0:
        return True
    shape = (1, length, HEADS, HEAD_DIM), *[(1, length, HEADS_KV, HEAD_DIM)] * 2
    print(explain(*shape, size=comm.size, sharding=layout, causal=True, dtype="float64"))
    alone = {"causal": True, "alibi_slopes": SLOPES}
    expected, whole = train(
        text[:-1],
        text[1:],
        steps,
        length,
        lambda *qkv: cupyattn.attention(*qkv, **alone, return_lse=True),
        lambda *rows, **state: cupyattn.attention_backward(*rows, **state, **alone),
        lambda array: array,
    )
    apart = max(float(np.abs(w[name] - whole[name]).max()) for name in w)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {comm.size} ranks, {expected[-1]:.4f} alone")
    print(f"weights are {apart:.1e} apart after {steps} steps")
    return apart < 1e-10 and losses[-1] < losses[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("threads", "mpi", "torch"), default="threads")
    parser.add_argument("--length", type=int, default=1000, help="tokens of the sequence")
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args(arguments)
    if asked.engine == "threads":
        return int(not all(run_ranks(lambda comm: rank(comm, asked.length, asked.steps), 2)))
    if asked.engine == "mpi":
        return int(not rank(MpiComm(), asked.length, asked.steps))
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    found = rank(TorchComm(), asked.length, asked.steps)
    torch.distributed.destroy_process_group()
    return int(not found)


if __name__ == "__main__":
    sys.exit(main())
