"""The kernels that a plan chooses by default, and calls that make the launcher launch each of them.

    for kernel in kernels("sm_90a"):
        for name, call in calls_of(kernel).items():
            call(schedule=1)  # raises if the numbers are not those of the definition

A kernel is what `recipe_of` makes of the plan that `plan.choose` makes on a device, of every problem in `asked`: head
dimensions, dtypes, masks, layouts and numbers of rows, with q, k and v aligned and scores not edited.  All that is
prebuilt is among them.  A call is as small as the kernel lets it be: rows and keys for two tiles and a piece of one.
"""

import importlib.util
import itertools
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import emulated
import emulated_backward
import numpy as np
from emulated import operands, options_of, paged, ragged_operands, ragged_options

from cupyattn import plan
from cupyattn.cuda.launching.gradients import backward_recipe
from cupyattn.cuda.launching.launch import recipe_of
from cupyattn.cuda.launching.views import View, contiguous_strides
from cupyattn.cuda.making import catalogue
from cupyattn.plan import HEAD_DIMS, BackwardTile, HopperTile, Tile
from cupyattn.plan.hopper import Switches
from cupyattn.problem import FLOAT8, NAMED_DEVICES, Spec
from cupyattn.reading import Options, read

DEVICES = {"sm_80": NAMED_DEVICES["A100"], "sm_89": NAMED_DEVICES["L4"], "sm_90a": NAMED_DEVICES["H100"]}
SEED = 5
BOTTOM = {"alignment": "bottom-right"}
CAUSAL = {"causal": True, **BOTTOM}
NARROW = {"window_size": (20, 9), **BOTTOM}
TRAITS = {
    "flash.cu": ("element", "head_dim", "head_dim_v", "block_q", "block_k", "num_warps", "num_stages",
                 "queries_in_registers", "paged", "aligned", "edits"),
    "splitkv.cu": ("element", "head_dim", "head_dim_v", "block_q", "num_warps", "num_stages", "paged", "aligned",
                   "edits"),
    "hopper.cu": ("element", "head_dim", "head_dim_v", "block_q", "block_k", "num_stages", "cluster", "reach", "paged",
                  "packed", "stores_boxes", "edits", *Switches._fields, "splits"),
    "merge.cu": ("element", "chunks", "together"),
    "schedule.cu": ("threads",),
    "append.cu": ("element",),
    "backward.cu": ("element", "head_dim", "head_dim_v", *BackwardTile._fields, "wanted", "aligned", "edits"),
    "hopper_backward.cu": ("element", "head_dim", "head_dim_v", *BackwardTile._fields, "wanted", "edits"),
    "backward_rows.cu": ("element",),
}  # fmt: skip
"""What the template arguments of a kernel are called."""
DTYPES = {element: dtype for dtype, element in catalogue.ELEMENT.items()}


class Kernel(NamedTuple):
    """One specialisation, compiled for one architecture."""

    target: str
    source: str
    expression: str

    @property
    def family(self):
        return self.source.removesuffix(".cu")

    @property
    def traits(self):
        """Its template arguments by name."""
        values = re.findall(r"[\w:.]+", self.expression.replace("cupyattn::HopperSwitches", ""))
        skipped = 1 if len(TRAITS[self.source]) == 1 else 2  # the function, and the struct of its traits
        if self.source == "hopper.cu" and len(values) == len(TRAITS[self.source]) + 1:
            values.append("false")  # its default
        return dict(zip(TRAITS[self.source], map(_value, values[skipped:]), strict=True))

    @property
    def is_again(self):
        """It makes tiles once more that Hopper's kernel has flagged."""
        return "_again" in self.expression

    @property
    def dtype(self):
        return DTYPES[self.traits.get("element", catalogue.ELEMENT["float16"])]

    @property
    def dims(self):
        return self.traits["head_dim"], self.traits["head_dim_v"]

    def __str__(self):
        x = self.traits
        words = [self.target, self.family + " again" * self.is_again, self.dtype]
        sizes = ("head_dim", "head_dim_v", "block_q", "block_k", "stays", "moves")
        words += ["x".join(str(x[name]) for name in sizes if name in x)] if "head_dim" in x else []
        words += [f"of {OF[x['wanted']]}"] if "wanted" in x else []
        words += [f"reach {x['reach']}", f"cluster {x['cluster']}"] if "reach" in x else []
        words += [f"of {128 * x['chunks']} columns"] if "chunks" in x else []
        words += ["together"] if x.get("together") else []
        words += [name for name in ("paged", "packed", "stores_boxes", "splits") if x.get(name)]
        return " ".join(words)


def _value(word):
    return {"true": True, "false": False}.get(word, int(word) if word.isdecimal() else word)


# ---------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------


@cache
def kernels(target, prebuilt=False):
    """All that is prebuilt for an architecture, and what else its plans choose by default."""
    found = [Kernel(target, x.source, x.expression) for x in catalogue.specialisations(target)]
    for problem, views in () if prebuilt else asked():
        chosen = plan.choose(problem, DEVICES[target])
        if chosen.kernel == "none":
            continue
        for each in filter(None, (chosen, chosen.instead)):
            if each.kernel != "none":
                recipe = recipe_of(each, problem, views)
                launched = [x.specialisation for x in recipe.launches]
                found += [Kernel(target, wanted.source, wanted.expression) for wanted in launched]
        found += _of_gradients(target, problem, views)
    return tuple(dict.fromkeys(found))


def _of_gradients(target, problem, views):
    """The kernels for the gradients of a problem, if there are any."""
    chosen = plan.choose_backward(problem, DEVICES[target])
    if chosen.kernel == "none":
        return []
    known = {"dout": problem.out_shape, "out": problem.out_shape, "lse": problem.lse_shape}
    views = views | {name: _view(shape, problem.dtype) for name, shape in known.items()}
    steps = backward_recipe(chosen, problem, views).steps
    return [Kernel(target, x.specialisation.source, x.specialisation.expression) for x in steps]


WIDTHS = (*((x, x) for x in HEAD_DIMS), (192, 128))
MASKS = ({}, {"causal": True}, {"window": (200, 50)})
HEADS = ((8, 8, 8), (8, 2, 2))
ROWS = (1, 32, 1000, 4096)


@cache
def asked():
    """(problem, views without memory) of what is usual: dense, packed, and with a cache in pages or in one piece."""
    found = {}
    makers = (_dense, _packed, _of_a_cache)
    for make, dtype, dims, mask, heads, rows in itertools.product(makers, DTYPES.values(), WIDTHS, MASKS, HEADS, ROWS):
        for in_pages in (False, True) if make is not _dense else (False,):
            shapes, options = make(heads, rows, dims, in_pages, mask)
            views = {name: _view(shape, "int32" if name in INDICES else dtype) for name, shape in shapes.items()}
            specs = tuple((name, Spec(name, view.shape, view.dtype)) for name, view in views.items())
            found[read("attention", specs, options._replace(takes_float8=True))] = views
    return tuple(found.items())


INDICES = ("cu_seqlens_q", "cu_seqlens_k", "block_table", "cache_seqlens")


def _view(shape, dtype):
    return View(2**20, shape, contiguous_strides(shape), dtype)


def _three(lead_q, lead_k, heads, dims):
    return {"q": (*lead_q, heads[0], dims[0]), "k": (*lead_k, heads[1], dims[0]), "v": (*lead_k, heads[2], dims[1])}


def _dense(heads, rows, dims, paged, mask):
    return _three((2, rows), (2, 4096), heads, dims), Options(axes="bshd", needs_lse=True, **BOTTOM, **mask)


def _packed(heads, rows, dims, paged, mask):
    shapes = _three((2 * rows,), (64, 256) if paged else (8192,), heads, dims)
    shapes |= {"cu_seqlens_q": (3,)} | ({} if paged else {"cu_seqlens_k": (3,)})
    if paged:
        shapes |= {"cu_seqlens_k": (3,), "block_table": (2, 32)}
    options = Options(axes="thd", needs_lse=True, max_seqlen_q=rows, max_seqlen_k=4096, **BOTTOM, **mask)
    return shapes, options


def _of_a_cache(heads, rows, dims, paged, mask):
    shapes = _three((2, rows), (64, 256) if paged else (2, 4096), heads, dims) | {"cache_seqlens": (2,)}
    if paged:
        shapes["block_table"] = (2, 16)
    return shapes, Options(axes="bshd", needs_lse=True, cached=True, **BOTTOM, **mask)


# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------

GROUP = 2
"""Query heads that share keys, where a kernel packs them."""
PAGE = 16


class Held(NamedTuple):
    """How far the numbers of a call that passed are from the definition, in float64."""

    error: float
    of_bar: float
    """The largest share of what `emulated.assert_within_the_bar` lets an error be."""
    lse_error: float


def calls_of(kernel):
    """Names, and functions of (schedule, seed, sources) that raise, or return what they held to the definition."""
    if "backward" in kernel.family:
        return _of_backward(kernel)
    if kernel.source == "append.cu":
        return _of_append(kernel)
    if kernel.source == "merge.cu":
        return _of_merge(kernel)
    if kernel.source == "schedule.cu":
        return _of_schedule(kernel)
    paged, dims, element = kernel.traits.get("paged"), kernel.dims, kernel.dtype
    if kernel.source == "hopper.cu":
        return _of_hopper(kernel)
    x, heads = kernel.traits, (GROUP, 1, GROUP) if element != FLOAT8 else (GROUP, 1, 1)
    if kernel.source == "flash.cu":
        rows, keys, more = x["block_q"] + 36, 2 * x["block_k"] + 22, {}
    else:
        rows, keys, more = x["block_q"] // (8 * GROUP), 300, {"num_splits": 3}
    lengths_q, lengths_k = (rows, 1, 0), (keys, 33, 0)
    if paged:
        return {
            "pages": _call(kernel, _ragged(element, (GROUP, 1, 1), lengths_q, lengths_k, dims, PAGE)),
            "pages, causal": _call(kernel, _ragged(element, (GROUP, 1, 1), lengths_q, lengths_k, dims, PAGE, CAUSAL)),
            "pages, strays": _call(
                kernel, _ragged(element, (GROUP, 1, 1), lengths_q, lengths_k, dims, PAGE, CAUSAL, strays=True)
            ),
            "cache in pages": _cached(kernel, (GROUP, 1, 1), page_size=PAGE),
        }
    return {
        "dense": _call(kernel, _dense_arrays(element, heads, (rows, keys), dims, descaled=True), **more),
        "causal, heads first": _call(
            kernel, _dense_arrays(element, (GROUP, 1, 1), (rows, keys), dims, CAUSAL, "bhsd", 2, True)
        ),
        "window": _call(
            kernel, _dense_arrays(element, (1, 1, 1), (rows, 67), dims, {"window_size": (20, 9), **BOTTOM})
        ),
        "strays": _call(kernel, _dense_arrays(element, (GROUP, 1, 1), (rows, keys), dims, CAUSAL, strays=True)),
        "ragged": _call(kernel, _ragged(element, (GROUP, 1, 1), lengths_q, lengths_k, dims, None, CAUSAL)),
        "cache": _cached(kernel, (GROUP, 1, 1)),
    }


OF = {1: "queries", 2: "keys", 4: "values", 6: "keys and values", 8: "a bias"}
"""Which gradients a kernel sums."""


def _of_backward(kernel):
    x = kernel.traits
    dtype, dims = kernel.dtype, kernel.dims if "head_dim" in x else (64, 64)
    tile = BackwardTile(*(x[name] for name in BackwardTile._fields)) if "wanted" in x else None
    stays, moves = (tile.stays, tile.moves) if tile else (64, 16)
    rows, keys = 2 * moves + 22, stays + 37
    if x.get("wanted") == plan.OF_QUERIES:
        rows, keys = stays + 37, 2 * moves + 22

    def call_of(make):
        def call(schedule=0, seed=0, sources=None):
            arrays, options = make(np.random.default_rng(SEED))
            arrays = emulated_backward.with_dout(np.random.default_rng(SEED + 1), arrays, options, dlse=True)
            passes = ((x["wanted"], tile),) if tile else ()
            device = replace(DEVICES[kernel.target], num_units=1)  # full with a block that sums all heads
            if kernel.is_again:
                passes = ((x["wanted"], plan.hopper_backward_tile(*dims, x["wanted"])),)
            elif kernel.family != "hopper_backward":
                device = replace(device, tensor_maps=False)
            asked = emulated_backward.Call(arrays, options, device=device, sources=sources, passes=passes)
            if kernel.is_again:
                asked.flag_all()
            found = asked.run(schedule, seed)
            return Held(*emulated_backward.hold(arrays, found), 0.0)

        return call

    heads = (2 * GROUP, GROUP, GROUP if x.get("wanted") == plan.OF_KEYS | plan.OF_VALUES else 1)
    return {
        "dense": call_of(_dense_arrays(dtype, heads, (rows, keys), dims)),
        "causal, heads first": call_of(_dense_arrays(dtype, (GROUP, 1, 1), (rows, keys), dims, CAUSAL, "bhsd", 2)),
        "window": call_of(_dense_arrays(dtype, (1, 1, 1), (rows, keys), dims, {"window_size": (20, 9), **BOTTOM})),
        "strays": call_of(_dense_arrays(dtype, (GROUP, 1, 1), (rows, keys), dims, CAUSAL, strays=True)),
        "ragged": call_of(_ragged(dtype, (GROUP, 1, 1), (rows, 1, 0), (keys, 33, 5), dims, None, CAUSAL)),
    }


def schedules_of(place):
    """Of a kernel's call by its place among them: two for the first, one by turns for the others."""
    return (1, 2) if place == 0 else ((0, 2, 1)[(place - 1) % 3],)


OF_REACH = ({}, CAUSAL, {"window_size": (100, 20), **BOTTOM})


def _of_hopper(kernel, num_splits=3):
    paged, dims, dtype = kernel.traits["paged"], kernel.dims, kernel.dtype
    x = kernel.traits
    heads = (2 * GROUP, 2, 2) if x["packed"] else (GROUP, 1, 1)
    if dtype != FLOAT8:  # whose keys and values have the same heads
        heads = (2 * GROUP, 2, 1) if x["packed"] else (2, 2, 1)
    mask = OF_REACH[x["reach"]]
    rows = x["block_q"] * 2 if x["cluster"] > 1 else x["block_q"] + 37
    keys = 2 * x["block_k"] + 33
    more = {"num_splits": num_splits} if x["splits"] else {}
    if x["splits"]:
        rows, keys = 40, 640 + keys % PAGE  # of lengths that are data a split has 512 at least
    if not x["stores_boxes"]:
        page = PAGE if paged else None
        whole = _ragged(dtype, heads, (rows, 0, 17), (keys - keys % PAGE if paged else keys, 5, 48), dims, page, mask)
        # Strays, and what is unused of a page, are nan, which rows look for one by one: few rows.
        strays = _ragged(dtype, heads, (40, 0, 17), (keys, 5, 40), dims, page, mask, strays=True)
        return {"pages" if paged else "ragged": _call(kernel, whole, **more), "strays": _call(kernel, strays, **more)}
    if paged:
        return {"cache in pages": _cached(kernel, heads, rows, page_size=PAGE, splits=more, **mask)}
    made = _dense_arrays(dtype, heads, (rows, keys), dims, mask, descaled=True)
    turned = _dense_arrays(dtype, heads, (rows, keys), dims, mask, "bhsd")
    few = _dense_arrays(dtype, heads, (40 if x["cluster"] == 1 else rows, keys), dims, mask, strays=True)
    return {
        "dense": _call(kernel, made, num_workers=2, **more),
        "persistent, heads first": _call(kernel, turned, num_workers=x["cluster"], persistent=True, **more),
        "strays": _call(kernel, few, num_workers=2, **more),
    }


def _of_merge(kernel):
    """What is merged is left by a kernel that splits."""
    x = kernel.traits
    fitting = [
        each
        for each in kernels(kernel.target)
        if "head_dim_v" in each.traits and each.dtype == kernel.dtype and -(-each.dims[1] // 128) == x["chunks"]
    ]
    on_hopper = next((each for each in fitting if each.traits.get("splits")), None)
    split = next(each for each in fitting if each.source == "splitkv.cu" and not each.traits["paged"])
    several = 6 if x["together"] else 3
    arrays = _dense_arrays(
        kernel.dtype, (GROUP, 1, 1), (split.traits["block_q"] // GROUP, 900), split.dims, strays=True
    )
    found = {"splits": _call(split, arrays, num_splits=several)}
    if not x["together"]:
        found["by a schedule"] = _scheduled(split)
    return found if on_hopper is None else {**found, **_of_hopper(on_hopper, several)}


def _of_schedule(kernel):
    """A decode over a cache goes by it."""
    fitting = [
        x for x in kernels(kernel.target) if x.source == "splitkv.cu" and x.dtype == "float16" and x.dims == (64, 64)
    ]
    plain, paged = (next(x for x in fitting if x.traits["paged"] is kind) for kind in (False, True))
    return {
        "cut by shares": _scheduled(plain),
        "splits that were asked for": _cached(plain, (GROUP, 1, 1), splits={"num_splits": 3}),
        "splits of a size": _cached(plain, (GROUP, 1, 1), splits={"fixed_split_size": 128}),
        "pages": _scheduled(paged, page_size=PAGE),
        "a line beyond 32 bits": _cached(
            plain, (GROUP, 1, 1), splits={"fixed_split_size": None, "stretched": 2**33}, rows=1
        ),
    }


def _scheduled(kernel, **given):
    return _cached(kernel, (GROUP, 1, 1), splits={"fixed_split_size": None}, **given)


def _dense_arrays(dtype, heads, seqlens, dims, mask=None, layout="bshd", batch=1, descaled=False, strays=False):
    def make(rng):
        arrays = operands(rng, dtype, layout, batch, heads, seqlens, dims)
        if strays:
            _stray(arrays["v"])
        if descaled and dtype == FLOAT8:
            counts = {"q": heads[1], "k": heads[1], "v": heads[2]}
            arrays |= {f"{x}_descale": rng.uniform(0.5, 2.0, (batch, counts[x])).astype("f4") for x in "qkv"}
        if mask and "causal" in mask:
            arrays["sinks"] = rng.standard_normal(heads[0]).astype("f4")
        return arrays, options_of(layout=layout, **(mask or {}))

    return make


def _stray(values):
    """Values that are not finite, here and there."""
    by_key = values.reshape(-1, *values.shape[-2:])
    by_key[3, 0, 5], by_key[20, 0, 0], by_key[38, 0, 7] = np.inf, np.nan, -np.inf


def _ragged(dtype, heads, lengths_q, lengths_k, dims, page_size, mask=None, strays=False):
    def make(rng):
        arrays = ragged_operands(rng, dtype, lengths_q, lengths_k, heads, dims, behind=(3, 5))
        if strays:
            _stray(arrays["v"])
        if page_size is not None:
            arrays = paged(rng, arrays, page_size)
        return arrays, ragged_options(arrays, **(mask or {}))

    return make


def _call(kernel, make, persistent=False, **edits):
    """A call of arrays and options that `make` makes, of a generator of random numbers."""

    def call(schedule=0, seed=0, sources=None):
        arrays, options = make(np.random.default_rng(SEED))
        tile = tile_of(kernel)
        if persistent:
            tile = tile._replace(persistent=True)
        device = DEVICES[kernel.target]
        found = emulated.check(
            arrays, options, kernel.family, schedule, seed, device=device, sources=sources, tile=tile, **edits
        )
        return _held(arrays, found)

    return call


def tile_of(kernel):
    """The tile that makes a plan's kernel this one."""
    x = kernel.traits
    if kernel.source == "flash.cu":
        return Tile(x["block_q"], x["block_k"], x["num_warps"], x["num_stages"], x["queries_in_registers"])
    if kernel.source == "splitkv.cu":
        return Tile(x["block_q"], 16 * x["num_warps"], x["num_warps"], x["num_stages"])
    switches = Switches(*(x[name] for name in Switches._fields))
    tile = HopperTile(x["block_q"], x["block_k"], x["num_stages"], x["reach"], cluster=x["cluster"], switches=switches)
    return tile._replace(heads_per_unit=GROUP if x["packed"] else 1)


def _held(arrays, found):
    """What `emulated.check` has looked at, in numbers."""
    return _numbers(arrays, found.problem, found.out, found.lse, found.plan)


def _numbers(arrays, problem, out, lse, chosen):
    exact, exact_lse = emulated.definition(arrays, problem)
    own = emulated.emulation(arrays, problem, chosen.tile.block_k, 0, chosen.kernel)
    some = np.isfinite(exact) & np.isfinite(own)  # the others were held to the definition as they are
    out, exact, own = out[some].astype(np.float64), exact[some], own[some]
    own, error = np.abs(own - exact), np.abs(out - exact)
    lowest, bits = emulated.LOWEST[problem.out_dtype], emulated.BITS[problem.out_dtype]
    ulp = np.ldexp(1.0, np.frexp(np.maximum(np.abs(exact), 2.0**lowest))[1] - 1 - bits)
    of_bar = error / (2.0 * own.max(initial=0.0) + ulp)
    finite = np.isfinite(exact_lse)
    lse_error = np.abs(lse[finite].astype(np.float64) - exact_lse[finite])
    return Held(float(error.max(initial=0.0)), float(of_bar.max(initial=0.0)), float(lse_error.max(initial=0.0)))


# ---------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------


@cache
def _appending():
    """The module of `test_append.py`, which knows calls with caches."""
    path = Path(__file__).parents[1] / "cuda" / "test_append.py"
    spec = importlib.util.spec_from_file_location("test_append", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its named tuples look for their module
    spec.loader.exec_module(module)
    return module


def _cached(kernel, heads, rows=2, page_size=None, splits=None, **mask):
    """Attention over a cache, of three lengths, without new keys."""
    seqlens, capacity = ((5, 0, 700), 704) if splits else ((5, 0, 77), 96)

    def call(schedule=0, seed=0, sources=None):
        given = {"new": None, "rows": (rows,) * 3, "seqlens": seqlens, "capacity": capacity, "page_size": page_size}
        return _with_cache(
            kernel, kernel.family, tile_of(kernel), schedule, seed, sources, given, heads, mask, **splits or {}
        )

    return call


def _with_cache(kernel, family, tile, schedule, seed, sources, given, heads, mask, **splits):
    append = _appending()
    words = {**mask, "window_size": mask["window_size"]} if "window_size" in mask else dict(mask)
    words.pop("alignment", None)
    dims = kernel.dims if family != "append" else (64, 64)
    case = append.case_of(np.random.default_rng(SEED), **given, dtype=kernel.dtype, heads=heads, dims=dims, **words)
    device = DEVICES[kernel.target]
    found = append.check(case, family, schedule, seed=seed, sources=sources, tile=tile, device=device, **splits)
    arrays, options = append.as_ragged(case, found.q)
    problem = emulated.problem_of(arrays, options)
    lse = found.lse if found.problem.layout.ragged else found.lse.swapaxes(0, 1).reshape(problem.lse_shape)
    return _numbers(arrays, problem, found.out.reshape(problem.out_shape), lse, found.plan)


def _of_append(kernel):
    """New keys into caches, rotated; then attention over them by the kernel for decoding, as a call has it."""
    split = next(
        x for x in kernels(kernel.target) if x.source == "splitkv.cu" and x.dtype == kernel.dtype and x.dims == (64, 64)
    )
    eight = {"table_dtype": "float32"} if kernel.dtype == FLOAT8 else {}

    def call(given, schedule, seed, sources):
        return _with_cache(split, "splitkv", tile_of(split), schedule, seed, sources, eight | given, (4, 2, 2), CAUSAL)

    layouts = {
        "in one piece": {"rotary": 32},
        "in pages, rotated in halves": {"page_size": PAGE, "rotary": 64, "interleaved": False},
        "by tables in float64": {"rotary": 32, "table_dtype": "float64"},
        "packed, reordered": {"packed_new": True, "new": (3, 0, 1), "packed_q": True, "reordered": True},
    }
    return {
        name: lambda schedule=0, seed=0, sources=None, given=given: call(given, schedule, seed, sources)
        for name, given in layouts.items()
    }
