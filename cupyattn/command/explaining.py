"""``cupyattn explain``: what `attention` would do, on one device or beside each other on several."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cupyattn.command import flags
from cupyattn.command.table import aligned
from cupyattn.explaining import explain
from cupyattn.plan import BackwardTiles, Plan

DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn")


def add(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="default: 1")
    sizes.add_argument("--seqlen-q", type=flags.positive, required=True, metavar="N", help="queries of a sequence")
    sizes.add_argument("--seqlen-k", type=flags.positive, metavar="N", help="keys; default: as many as queries")
    sizes.add_argument("--num-heads", type=flags.positive, default=32, metavar="N", help="default: 32")
    sizes.add_argument("--num-heads-kv", type=flags.positive, metavar="N", help="default: as many as query heads")
    sizes.add_argument("--head-dim", type=flags.positive, default=128, metavar="N", help="default: 128")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, float16 on a GPU")
    parser.add_argument(
        "--device",
        type=flags.several(flags.device),
        default=("cpu",),
        metavar="NAME,...",
        help="cpu, or GPUs by name, which need not be here: A100,H100; default: cpu",
    )
    call = parser.add_argument_group("the call")
    call.add_argument("--causal", action="store_true")
    call.add_argument("--alignment", choices=("top-left", "bottom-right"), help="of the diagonal, where lengths differ")
    call.add_argument(
        "--window-size", type=flags.window, default=(None, None), metavar="LEFT,RIGHT", help="-1: all keys"
    )
    call.add_argument("--softcap", type=flags.number, default=0.0, metavar="X")
    call.add_argument("--mask", action="store_true", help="with a boolean mask")
    call.add_argument("--bias", action="store_true", help="with a bias")
    call.add_argument("--alibi", action="store_true", help="with ALiBi slopes")
    call.add_argument("--sinks", action="store_true", help="with sinks")
    call.add_argument("--compute-dtype", choices=("float32", "float64"), help="of the arithmetic on the CPU")
    call.add_argument("--backward", action="store_true", help="the gradients instead")
    parser.add_argument("--json", action="store_true", help="as JSON, a list with an entry for each device")


def run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Print the plans; 1 if no implementation takes the call on some device."""
    heads_kv = given.num_heads_kv or given.num_heads
    if given.num_heads % heads_kv:
        rule = f"has to divide --num-heads: {given.num_heads} query heads cannot share {heads_kv}"
        parser.error(f"argument --num-heads-kv: {rule}")
    if given.alignment is None and given.seqlen_k not in (None, given.seqlen_q) and _has_diagonal(given):
        rule = "has to say top-left or bottom-right where --seqlen-q and --seqlen-k differ"
        parser.error(f"argument --alignment: {rule} under --causal, --window-size or --alibi")
    try:
        plans = [_plan(given, device) for device in given.device]
    except (TypeError, ValueError) as error:
        parser.error(str(error).removeprefix("explain: "))  # the parser names itself
    print(json.dumps([_as_json(plan) for plan in plans], indent=1) if given.json else _as_text(plans))
    return int(any(plan.kernel == "none" for plan in plans))


def _has_diagonal(given: argparse.Namespace) -> bool:
    return bool(given.causal or given.alibi or given.window_size != (None, None))


def _plan(given: argparse.Namespace, device: str) -> Plan:
    seqlen_k, heads_kv = given.seqlen_k or given.seqlen_q, given.num_heads_kv or given.num_heads
    keys = (given.batch, seqlen_k, heads_kv, given.head_dim)
    square = (given.seqlen_q, seqlen_k)
    of_heads = (given.num_heads,)
    return explain(
        (given.batch, given.seqlen_q, given.num_heads, given.head_dim), keys, keys,
        dtype=given.dtype, device=device, causal=given.causal, alignment=given.alignment,
        window_size=given.window_size, softcap=given.softcap, compute_dtype=given.compute_dtype,
        mask=square if given.mask else None, bias=square if given.bias else None,
        alibi_slopes=of_heads if given.alibi else None, sinks=of_heads if given.sinks else None,
        backward=given.backward,
    )  # fmt: skip


def _as_text(plans: list[Plan]) -> str:
    """A table with a column for each device, and then the sentences."""
    rows = [("", *(plan.device for plan in plans))]
    for name, value in (
        ("implementation", lambda plan: plan.kernel),
        ("tile", _tile),
        ("splits", lambda plan: str(plan.num_splits)),
        ("workers", lambda plan: str(plan.num_workers)),
        ("arithmetic", lambda plan: plan.compute_dtype),
        ("flop", lambda plan: f"{plan.flops:.3g}"),
        ("bytes", lambda plan: f"{plan.bytes:.3g}"),
    ):
        rows.append((name, *map(value, plans)))
    for peer in dict.fromkeys(name for plan in plans for name, _ in plan.peers):
        rows.append((f"splits of {peer}", *(str(dict(plan.peers).get(peer, "-")) for plan in plans)))
    return "\n".join([aligned(rows), *map(_sentences, plans)])


def _sentences(plan: Plan) -> str:
    lines = ["", f"{plan.device}: {plan.reason}", *(f"  {note}" for note in plan.notes)]
    lines += [f"  not {name}: {reason}" for name, reasons in plan.objections for reason in reasons]
    return "\n".join(lines)


def _tile(plan: Plan) -> str:
    """Rows and keys of it, in a few characters."""
    if plan.tile is None:
        return "-"
    if isinstance(plan.tile, BackwardTiles):
        return ", ".join(f"{tile.stays} x {tile.moves}" for _, tile in plan.tile.passes)
    return f"{plan.tile.block_q} x {plan.tile.block_k}"


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "device": plan.device,
        "implementation": plan.kernel,
        "tile": None if plan.tile is None else str(plan.tile),
        "num_splits": plan.num_splits,
        "num_workers": plan.num_workers,
        "compute_dtype": plan.compute_dtype,
        "flops": plan.flops,
        "bytes": plan.bytes,
        "reason": plan.reason,
        "peers": dict(plan.peers),
        "notes": list(plan.notes),
        "objections": {name: list(reasons) for name, reasons in plan.objections},
    }
