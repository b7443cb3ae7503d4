"""Registers and spills of the default kernels on every architecture, held to the table in cuda/resources.json.

python tests/resources.py             # compile everything, minutes, and say what got worse
python tests/resources.py --update    # and write the table anew
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "cuda" / "resources.json"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


def name_of(specialisation):
    """ "flash_forward<Half, 64, ...>": the expression without what all of them share."""
    expression = specialisation.expression.replace("cupyattn::", "")
    return re.sub(r"\b(Flash|Split|Merge|Backward|HopperBackward)Traits<", "", expression)[:-1]


def kernels_of(target):
    """All that is prebuilt, and of gradients those of one dtype."""
    from cupyattn.cuda.making import catalogue

    of_gradients = [x for x in catalogue.of_gradients(target) if "BFloat16" in x.expression]
    return [*catalogue.specialisations(target), *of_gradients]


def committed():
    return json.loads(TABLE.read_text())


def measure(specialisation, target):
    """(registers, bytes of spills) of a kernel, and of what it calls."""
    from cupyattn.cuda.making import compiler, source

    cubin = compiler.compile_cubin(source.join(specialisation.source), specialisation.expression, target)
    return [cubin.resources.registers, cubin.spills]


def worse(found, known):
    """Whether a kernel takes more registers than it did, or spills more."""
    return found[0] > known[0] or found[1] > known[1]


def disassembler():
    """nvdisasm, on the path or as the package nvidia-cuda-nvdisasm; None if neither is there."""
    found = shutil.which("nvdisasm")
    package = importlib.util.find_spec("nvidia")
    places = package.submodule_search_locations if package and package.submodule_search_locations else []
    others = [path for place in places for path in Path(place).glob("*/bin/nvdisasm")]
    return found or (str(others[0]) if others else None)


def instructions(cubin, tmp_path):
    """(the instructions of a kernel, the spans of its loops)."""
    found, jumps = listing(cubin, tmp_path)
    return found, [(to, index) for index, to in jumps.items() if to <= index]


def listing(cubin, tmp_path):
    """(the instructions of a kernel, which of them jump to which)."""
    import pytest

    tool = disassembler()
    if tool is None:
        pytest.skip("needs nvdisasm (nvidia-cuda-nvdisasm)")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin.image)
    text = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    found, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1].strip())
    jumps = ((index, re.search(r"BRA.*`\((\.L_x_\d+)\)", text)) for index, text in enumerate(found))
    return found, {index: labels[jump[1]] for index, jump in jumps if jump}


class Loop(NamedTuple):
    body: list
    leaps: dict
    """Which of its instructions may jump ahead within it, and where to."""

    def usual(self):
        """The instructions of one time through, if it leaps wherever it may."""
        found, place = [], 0
        while place < len(self.body):
            found.append(self.body[place])
            place = self.leaps.get(place, place + 1)
        return found


def loops(cubin, tmp_path):
    """Those of a kernel."""
    found, jumps = listing(cubin, tmp_path)
    for stop, start in jumps.items():
        if start <= stop:
            leaps = {index - start: to - start for index, to in jumps.items() if start <= index < to <= stop}
            yield Loop(found[start : stop + 1], leaps)


def main(update):
    from cupyattn.cuda.making import compiler
    from cupyattn.cuda.making.prebuild import num_workers

    jobs = [(target, wanted) for target in TARGETS for wanted in kernels_of(target)]
    with ThreadPoolExecutor(num_workers()) as pool:
        found = list(pool.map(lambda job: measure(job[1], job[0]), jobs))
    table = {target: {} for target in TARGETS}
    for (target, wanted), numbers in zip(jobs, found, strict=True):
        table[target][name_of(wanted)] = numbers
    if update:
        TABLE.write_text(dumps({"nvrtc": compiler.version(), "kernels": table}))
        return 0
    known = committed()["kernels"]
    changed = [
        f"{target} {name}: {numbers}, in the table {known.get(target, {}).get(name)}"
        for target, kernels in table.items()
        for name, numbers in kernels.items()
        if worse(numbers, known.get(target, {}).get(name, [0, 0]))
    ]
    print("\n".join([*changed, f"{len(jobs)} kernels, {len(changed)} worse than the table"]))
    return bool(changed)


def dumps(table):
    """JSON with a kernel to a line."""
    lines = [f'{{"nvrtc": {json.dumps(table["nvrtc"])}, "kernels": {{']
    for index, (target, kernels) in enumerate(table["kernels"].items()):
        rows = ",\n".join(f"  {json.dumps(name)}: {numbers}" for name, numbers in kernels.items())
        lines.append(f"{',' if index else ''}{json.dumps(target)}: {{\n{rows}}}")
    return "\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main("--update" in sys.argv[1:]))
