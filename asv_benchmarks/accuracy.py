"""What float8 costs in exactness: the kernels' algorithm, emulated in NumPy, not a GPU.

    python asv_benchmarks/accuracy.py [--save NAME]

A row draws q, k and v, and compares with float64 attention of these very numbers, so that the rounding of the
operands counts too.  Errors are root mean square and largest, both over the root mean square of the exact result.

    bfloat16         operands, weights and result rounded to bfloat16
    float8           operands divided by a descale for each head, which takes the largest to 448, and rounded to
                     float8_e4m3fn; weights times 2**8 rounded to it; result rounded to bfloat16
    float8 operands  the same operands in exact arithmetic, which is what the CPU does

Scores, sums and products are float32, over blocks of keys with a running maximum.  Hopper's tensor cores add up
products of float8 in fewer bits than float32 has, which is not emulated.  --save writes results/NAME.json as well.
"""

import argparse
import json
from itertools import product

import ml_dtypes
import numpy as np
from benchmarks import SUITE

import cupyattn

BFLOAT16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LARGEST = float(ml_dtypes.finfo(FLOAT8).max)
LIFT = 8
"""Weights are at most 1: times 2**8 they are within float8's range, and few of them below it."""
BLOCK_K = 128
HEADS = 4
SEED = 20261121


def normal(rng, shape):
    return rng.standard_normal(shape)


def with_outliers(rng, shape):
    """One number of a thousand is ten times as wide: flash-attn 3's test of its float8."""
    return rng.standard_normal(shape) + 10.0 * rng.standard_normal(shape) * (rng.random(shape) < 0.001)


DATA = {"normal": normal, "outliers": with_outliers}


def rounded_to_float8(x):
    """(x in float8, its descales), of (heads, rows, head_dim)."""
    descale = np.float32(np.abs(x).max(axis=(1, 2)) / LARGEST)
    return (x / descale[:, None, None]).astype(FLOAT8), descale


def emulated(q, k, v, score_factors, weight_dtype, lift):
    """A kernel's result in float32, before the factor of v: (heads, rows, head_dim), head by head."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    out = np.empty(q.shape, np.float32)
    for head, factor in enumerate(np.float32(score_factors * np.log2(np.e))):
        row_max = np.full(q.shape[1], -np.inf, np.float32)
        row_sum, total = np.zeros_like(row_max), np.zeros(q.shape[1:], np.float32)
        for start in range(0, k.shape[1], BLOCK_K):
            keys = slice(start, start + BLOCK_K)
            scores = factor * (q[head] @ k[head, keys].T)
            new_max = np.maximum(row_max, scores.max(axis=1))
            weights = np.exp2(scores - new_max[:, None] + np.float32(lift))
            shrink = np.exp2(row_max - new_max)
            row_sum = row_sum * shrink + weights.sum(axis=1)
            total = total * shrink[:, None] + weights.astype(weight_dtype).astype(np.float32) @ v[head, keys]
            row_max = new_max
        out[head] = total / row_sum[:, None]
    return out


def results(q, k, v):
    """Each way's result in float64, by its name."""
    scale = np.full(len(q), q.shape[-1] ** -0.5)
    halves = [x.astype(BFLOAT16) for x in (q, k, v)]
    (q8, dq), (k8, dk), (v8, dv) = map(rounded_to_float8, (q, k, v))
    float8 = dv[:, None, None] * emulated(q8, k8, v8, scale * dq * dk, FLOAT8, LIFT)
    descales = {"q_descale": dq, "k_descale": dk, "v_descale": dv}
    operands = cupyattn.attention(q8[None], k8[None], v8[None], layout="bhsd", **descales)[0]
    found = {"bfloat16": emulated(*halves, scale, BFLOAT16, 0), "float8": float8, "float8 operands": operands}
    return {name: x.astype(BFLOAT16).astype(np.float64) for name, x in found.items()}


def rows():
    for data, head_dim, seqlen in product(DATA, (64, 128), (1024, 2048, 4096)):
        rng = np.random.default_rng(SEED)
        q, k, v = (DATA[data](rng, (HEADS, seqlen, head_dim)) for _ in range(3))
        exact = cupyattn.attention(q[None], k[None], v[None], layout="bhsd")[0]
        size = np.sqrt(np.mean(exact**2))
        row = {"data": data, "head_dim": head_dim, "seqlen": seqlen}
        for name, found in results(q, k, v).items():
            error = np.abs(found - exact) / size
            row[name] = {"rms": float(np.sqrt(np.mean(error**2))), "max": float(error.max())}
        yield row


def show(row):
    errors = (f"{value['rms']:.1e}, {value['max']:.1e}" for value in row.values() if isinstance(value, dict))
    return f"| {row['data']} | {row['head_dim']} | {row['seqlen']} | {' | '.join(errors)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json as well")
    arguments = parser.parse_args()
    print("| data | head_dim | seqlen | bfloat16: rms, max | float8 | float8 operands |\n|---|---|---|---|---|---|")
    found = []
    for row in rows():
        found.append(row)
        print(show(row), flush=True)
    if arguments.save:
        whole = {"how": "emulated in NumPy, not a GPU", "heads": HEADS, "rows": found}
        (SUITE / "results" / f"{arguments.save}.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
