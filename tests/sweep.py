"""A sweep of transformers' model classes: tiny models of random weights under "cupyattn" and under "eager".

    make sweep ARGS='--only Bloom,Llama --jobs 2 --json found.json'

Each class that can be made tiny is made in several ways and reads several batches.  What came of it is one word:

    same              eager's numbers; or, of a model that makes much of little, numbers that are no more than twice as
                      far from eager's in float64 as eager's own are
    same, not called  eager's numbers, and cupyattn was not called
    as sdpa           other numbers than eager's, and transformers' own sdpa gives the same ones
    kept its own      the model does not use cupyattn
    refused           an error in words
    raised            any other error, where eager gives numbers
    different         other numbers than eager's
    not made          no tiny model of it, or eager does not run

and "different" and "raised" are failures.  Of a padded batch those numbers count that stay the same under eager when
other words stand in the padding.
"""

import argparse
import collections
import contextlib
import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tiny import batches, fill, parts, tiny_config, words
from transformers.models.auto import modeling_auto

from cupyattn.integrations import transformers as integration

NAME = "cupyattn"
BAR = 1e-4
"""Largest difference to eager, of the largest number in the same output."""
TWICE = 2.0
"""How far from eager in float64, by what eager in float32 is, as for kernels."""
SECONDS = 30
GIGABYTES = 8
MOST = 40_000_000
"""Parameters of a tiny model."""
OUTCOMES = (
    "same",
    "same, not called",
    "as sdpa",
    "kept its own",
    "refused",
    "raised",
    "different",
    "not made",
)
FAILURES = ("different", "raised")
SEVERITY = ("different", "raised", "refused", "as sdpa", "kept its own", "same", "same, not called", "not made")

MODALITIES = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "audio": (
        "CTC",
        "SPEECH_SEQ_2_SEQ",
        "AUDIO_CLASSIFICATION",
        "TEXT_TO_WAVEFORM",
        "TEXT_TO_SPECTROGRAM",
        "RNNT",
        "TDT",
    ),
    "vision": (
        "IMAGE",
        "BACKBONE",
        "IMAGE_CLASSIFICATION",
        "OBJECT_DETECTION",
        "SEMANTIC_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "VIDEO_CLASSIFICATION",
        "MASK_GENERATION",
        "MASKED_IMAGE_MODELING",
        "TEXT_RECOGNITION",
        "IMAGE_TO_IMAGE",
    ),
    "image and text": (
        "IMAGE_TEXT_TO_TEXT",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "VISUAL_QUESTION_ANSWERING",
        "ZERO_SHOT_OBJECT_DETECTION",
        "MULTIMODAL_LM",
        "RETRIEVAL",
    ),
    "base": ("",),
}


def classes(modality=None):
    """{name of a model class: (modality, model_type)}, each class once."""
    found = {}
    for kind, tails in MODALITIES.items():
        for tail in tails:
            name = f"MODEL_FOR_{tail}_MAPPING_NAMES" if tail else "MODEL_MAPPING_NAMES"
            for model_type, names in getattr(modeling_auto, name).items():
                for each in [names] if isinstance(names, str) else names:
                    found.setdefault(each, (kind, model_type))
    return found


calls = 0


def count_calls(put=setattr):
    """cupyattn's attention counts how often it is called."""
    original = integration.attention

    def counting(*arguments, **keywords):
        global calls
        calls += 1
        return original(*arguments, **keywords)

    put(integration, "attention", counting)


def tensors(output, path=""):
    """{where: tensor} of whatever a model returns, caches left out."""
    if isinstance(output, torch.Tensor):
        return {path: output}
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    else:
        return {}
    found = {}
    for key, value in items:
        if key not in ("past_key_values", "attentions", "mems", "loss"):
            found |= tensors(value, f"{path}.{key}" if path else str(key))
    return found


def close(right, mine):
    """Which numbers are as good as equal, and the largest difference, both by the largest number on the right."""
    odd = ~torch.isfinite(right)
    right, mine = right.masked_fill(odd, 0).double(), mine.masked_fill(odd, 0).double()
    share = ((right - mine).abs() / right.abs().amax().clamp_min(1e-30)).nan_to_num(nan=torch.inf)
    return (share <= BAR) & ~odd, float(share.max())


def difference(expected, actual, counts=None):
    """(the largest difference, as a share of the largest number of its tensor, and where it is).

    `counts`: of each tensor the places that do, by default those where `expected` has a number.
    """
    worst, where = 0.0, ""
    if expected.keys() != actual.keys():
        return float("inf"), "other outputs"
    for name, right in expected.items():
        mine = actual[name]
        if right.shape != mine.shape:
            return float("inf"), f"{name}: shape {tuple(mine.shape)} for {tuple(right.shape)}"
        if counts is not None:
            right, mine = right[counts[name]], mine[counts[name]]
        if right.numel() and (share := close(right, mine)[1]) > worst:
            worst, where = share, name
    return worst, where


def indifferent(one, other, mask):
    """The places of each output that are the same although other words stand in the padding.

    Never those of the padding itself, and never part of a vector: single numbers may be alike by chance.
    """
    if {name: each.shape for name, each in one.items()} != {name: each.shape for name, each in other.items()}:
        raise ValueError("shapes depend on what stands in the padding")
    counts = {}
    for name, each in one.items():
        same = close(each, other[name])[0] if each.numel() else torch.zeros_like(each, dtype=torch.bool)
        tokens = each.shape[:2] == mask.shape
        if tokens:
            same &= mask.bool().reshape(*mask.shape, *[1] * (each.ndim - 2))
        vector = each.ndim - 2 if tokens else min(each.ndim, 1)
        counts[name] = same.all(-1, keepdim=True).expand_as(same) if vector and same.numel() else same
    if not any(each.any() for each in counts.values()):
        raise ValueError("everything depends on what stands in the padding")
    return counts


def run(model, batch):
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**copy.deepcopy(batch)))


def generate(model, batch, **more):
    torch.manual_seed(0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        found = model.generate(
            **copy.deepcopy(batch),
            do_sample=False,
            max_new_tokens=3,
            min_new_tokens=3,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )
    return {"sequences": found.sequences} | tensors(found.logits, "logits")


def cases(model, batch):
    """{name of a case: (what a model says, the batch with other words in its padding or None)}."""
    found = {"whole": (lambda m: run(m, batch), None)}
    mask = batch.get("attention_mask")
    if mask is not None:
        for side, columns in (("right", slice(-4, None)), ("left", slice(0, 4))):
            padded, other = batch | {"attention_mask": mask.clone()}, batch["input_ids"].clone()
            padded["attention_mask"][0, columns] = 0
            other[0, columns] = words(model.config, other.shape[1], seed=3)[0, columns]
            found[f"padded {side}"] = (lambda m, b=padded: run(m, b), padded | {"input_ids": other})
        found["no mask"] = (lambda m: run(m, {k: v for k, v in batch.items() if k != "attention_mask"}), None)
    if model.can_generate():
        asked = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
        found["generate"] = (lambda m: generate(m, asked), None)
        if mask is not None:
            asked_padded = asked | {"attention_mask": padded["attention_mask"]}
            found["generate padded"] = (lambda m: generate(m, asked_padded), None)
        found["generate static"] = (lambda m: generate(m, asked, cache_implementation="static"), None)
    return found


def in_float64(eager, batch):
    """The model and its cases, with numbers that count for exact."""
    model = copy.deepcopy(eager).double()
    numbers = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in batch.items()}
    return model, cases(model, numbers)


def effective(model):
    """The implementations that the modules of a model say they use."""
    return {
        module.config._attn_implementation
        for module in model.modules()
        if isinstance(getattr(module, "config", None), transformers.PreTrainedConfig)
    }


def made(way, cls, config, weights, implementation):
    """The model, under this implementation, made in this way."""
    if way == "from_pretrained":
        with tempfile.TemporaryDirectory() as folder:
            first = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
            first.load_state_dict(weights)
            first.save_pretrained(folder)
            model = cls.from_pretrained(folder, attn_implementation=implementation)
    elif way == "set":
        model = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
        model.set_attn_implementation(implementation)
    elif way == "parts":
        chosen = {"": "eager"} | dict.fromkeys(parts(config), implementation)
        model = cls._from_config(copy.deepcopy(config), attn_implementation=chosen)
    else:
        model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation)
    model.load_state_dict(weights)
    return model.eval()


WAYS = ("_from_config", "from_pretrained", "set", "parts")


def words_of(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_refusal(error):
    kind = isinstance(error, TypeError | ValueError | NotImplementedError | ImportError)
    return kind and NAME in str(error)


def parameters(cls, config):
    """How many there are, without making them; 0 if that cannot be told."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(
            each.numel() for each in cls._from_config(copy.deepcopy(config), attn_implementation="eager").parameters()
        )
    return 0


def tiny_eager(cls):
    """(configuration, model, batch) that eager runs; raises what was wrong with the first attempt if none is found."""
    problems = []
    for gentle in (False, True):
        try:
            config = tiny_config(cls, gentle)
            if (size := parameters(cls, config)) > MOST:
                raise ValueError(f"{size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = fill(cls._from_config(copy.deepcopy(config), attn_implementation="eager")).eval()
        except Exception as error:
            problems.append(("configuration" if "config" not in locals() else "model", error))
            continue
        for batch in batches(model):
            try:
                if run(model, batch):
                    return config, model, batch
                problems.append(("outputs", ValueError("no tensors")))
            except Exception as error:
                problems.append((f"reading {', '.join(batch)}", error))
    if not problems:
        raise ValueError("nothing that it reads is known here")
    where, error = problems[0]
    raise ValueError(f"{where}: {words_of(error)}" + "".join(f" | {w}: {words_of(e)[:120]}" for w, e in problems[1:]))


def examine(cls):
    """What came of a class: a list of records, one for each way and case."""
    global calls
    try:
        config, eager, batch = tiny_eager(cls)
    except Exception as error:
        return [{"outcome": "not made", "note": words_of(error)}]
    weights = eager.state_dict()
    all_cases, right, counts, records = cases(eager, batch), {}, {}, []
    for case, (function, disturbed) in all_cases.items():
        try:
            right[case] = function(eager)
            counts[case] = None
            if disturbed:
                counts[case] = indifferent(right[case], run(eager, disturbed), disturbed["attention_mask"])
            if not any(torch.isfinite(each).any() for each in right[case].values()):
                raise ValueError("no number that is finite")
            if case == "whole" and (again := difference(right[case], function(eager)))[0] > BAR:
                raise ValueError(f"eager does not repeat itself: {again}")
        except Exception as error:
            records.append({"case": case, "outcome": "not made", "note": "eager: " + words_of(error)})
            right.pop(case, None)
            if case == "whole":
                return records
    sdpa = exact = None
    for way in WAYS:
        if way == "parts" and not parts(config):
            continue
        try:
            model = made(way, cls, config, weights, NAME)
        except Exception as error:
            record = {"way": way, "outcome": "refused" if is_refusal(error) else "raised", "note": words_of(error)}
            records.append(record)
            if record["outcome"] == "raised":
                try:
                    made(way, cls, config, weights, "eager")
                except Exception as error:
                    record |= {"outcome": "not made", "note": "eager: " + words_of(error)}
            continue
        uses = effective(model)
        for case, (function, _) in all_cases.items():
            if case not in right or (way != WAYS[0] and case != ("padded left" if "padded left" in right else "whole")):
                continue
            record = {"way": way, "case": case}
            records.append(record)
            calls = 0
            try:
                mine = function(model)
                found, where = difference(right[case], mine, counts[case])
            except Exception as error:
                record |= {"outcome": "refused" if is_refusal(error) else "raised", "note": words_of(error)}
                continue
            record |= {"calls": calls, "number": found, "note": where}
            is_same = found <= BAR
            if not is_same:
                record["outcome"] = "different"
                with contextlib.suppress(Exception):
                    exact = exact or in_float64(eager, batch)
                    truth = exact[1][case][0](exact[0])
                    record["exact"] = [difference(truth, each, counts[case])[0] for each in (right[case], mine)]
                    is_same = record["exact"][1] <= TWICE * record["exact"][0]
            if not is_same:
                with contextlib.suppress(Exception):
                    sdpa = sdpa or made("_from_config", cls, config, weights, "sdpa")
                    theirs = function(sdpa)
                    record["sdpa"] = difference(right[case], theirs, counts[case])[0]
                    if difference(theirs, mine, counts[case])[0] <= BAR:
                        record["outcome"] = "as sdpa"
            elif calls:
                record["outcome"] = "same"
            elif NAME in uses:
                record["outcome"] = "same, not called"
            else:
                record["outcome"] = "kept its own"
    return records


def prepare():
    """What all classes need, once."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    transformers.generation.GenerationMixin  # noqa: B018 - reading it imports it
    get_checkpoint_conversion_mapping("llama")
    integration.register()
    count_calls()


def child(name, pipe):
    """Examine in a process of its own, with little memory, and quietly."""
    limit = GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.alarm(10 * SECONDS)
    sink = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    os.dup2(sink.fileno(), 1)
    os.dup2(sink.fileno(), 2)
    try:
        records = examine(getattr(transformers, name))
    except BaseException as error:
        records = [{"outcome": "not made", "note": "sweep: " + words_of(error)}]
    pipe.send(records)
    pipe.close()
    os._exit(0)


def sweep(names, jobs, tell=lambda name, records: None):
    """{class: records}, each class in a process of its own."""
    fork = multiprocessing.get_context("fork")
    waiting, running, found = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(name, theirs))
            process.start()
            theirs.close()
            running[ours] = (name, process)
        for pipe in multiprocessing.connection.wait(list(running)):
            name, process = running.pop(pipe)
            try:
                found[name] = pipe.recv()
            except EOFError:
                process.join()
                what = (
                    "too slow"
                    if process.exitcode in (-signal.SIGALRM, -signal.SIGXCPU)
                    else f"process ended, {process.exitcode}"
                )
                found[name] = [{"outcome": "not made", "note": what}]
            process.join()
            pipe.close()
            tell(name, found[name])
    return found


def verdict(records):
    """One word for a class: the worst that came of it."""
    return min((record["outcome"] for record in records), key=SEVERITY.index, default="not made")


def table(found, kinds):
    """Counts of classes, by modality and outcome."""
    counts = collections.Counter((kinds[name][0], verdict(records)) for name, records in found.items())
    rows = [["", *OUTCOMES, "all"]]
    for kind in [*MODALITIES, "all"]:
        of_kind = [
            sum(n for (k, o), n in counts.items() if o == outcome and kind in (k, "all")) for outcome in OUTCOMES
        ]
        rows.append([kind, *map(str, of_kind), str(sum(of_kind))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def line(name, record):
    number = f"{record['number']:.2g}" if "number" in record else ""
    sdpa = f"(sdpa: {record['sdpa']:.2g})" if "sdpa" in record else ""
    exact = "(of float64, eager {:.2g} and cupyattn {:.2g})".format(*record["exact"]) if "exact" in record else ""
    told = (
        name,
        record["outcome"],
        record.get("way", ""),
        record.get("case", ""),
        number,
        sdpa,
        exact,
        record.get("note", ""),
    )
    return "  ".join(filter(None, told))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="classes whose names begin with one of these, parted by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--json", help="a file for everything that was found")
    parser.add_argument(
        "--list", action="store_true", help="also the classes that were not made, and those that passed"
    )
    options = parser.parse_args(arguments)

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    prepare()
    kinds = classes()
    begins = tuple(filter(None, options.only.split(",")))
    names = [name for name in kinds if not begins or name.startswith(begins)]
    since = time.monotonic()

    def tell(name, records):
        word = verdict(records)
        if word in FAILURES or options.list:
            shown = [each for each in records if each["outcome"] == word]
            print(
                f"[{time.monotonic() - since:4.0f} s]", line(name, shown[0] if shown else {"outcome": word}), flush=True
            )

    found = sweep(names, options.jobs, tell)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    print(table(found, kinds))
    for outcome in ("as sdpa", *FAILURES):
        for name, records in found.items():
            for record in records:
                if record["outcome"] == outcome:
                    print(line(name, record))
    return int(any(verdict(records) in FAILURES for records in found.values()))


if __name__ == "__main__":
    sys.exit(main())
