"""What the default kernels take of a multiprocessor, and which instructions they are made of; no GPU needed.

A sample here; `python tests/resources.py` looks at all of them.
"""

import re
import subprocess

import pytest
from resources import TARGETS, committed, disassembler, kernels_of, measure, name_of, worse

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.problem import NAMED_DEVICES

FLASH_64, SPLIT_64 = 0, 1
SAMPLE = [(target, index) for target in TARGETS for index in (FLASH_64, SPLIT_64)]


@pytest.mark.parametrize("target", TARGETS)
def test_every_default_kernel_is_in_the_table(target):
    assert list(committed()["kernels"][target]) == [name_of(wanted) for wanted in kernels_of(target)]


@pytest.mark.parametrize(("target", "index"), SAMPLE)
def test_kernels_take_no_more_than_they_did(nvrtc, target, index):
    table = committed()
    if table["nvrtc"] != nvrtc:
        pytest.skip(f"the table was made by NVRTC {table['nvrtc']}, and this is {nvrtc}")
    wanted = catalogue.specialisations(target)[index]
    found, known = measure(wanted, target), table["kernels"][target][name_of(wanted)]
    assert not worse(found, known), f"{name_of(wanted)}: (registers, spills) {found}, in the table {known}"


def test_no_kernel_spills():
    spilled = {
        (target, name): spills
        for target, kernels in committed()["kernels"].items()
        for name, (_, spills) in kernels.items()
        if spills
    }
    assert spilled == {}


@pytest.mark.parametrize("device", [device for device in NAMED_DEVICES.values() if device.compute_capability >= (8, 0)])
def test_every_default_kernel_fits_into_shared_memory(device):
    target = compiler.target_for(device.compute_capability)
    too_large = [name_of(x) for x in catalogue.specialisations(target) if x.shared_memory > device.shared_memory]
    assert too_large == []


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("index", [FLASH_64, SPLIT_64])
def test_tensor_cores_matrix_loads_and_asynchronous_copies_are_used(index, tmp_path):
    tool = disassembler()
    if tool is None:
        pytest.skip("needs nvdisasm (nvidia-cuda-nvdisasm)")
    wanted = catalogue.specialisations("sm_90a")[index]
    cubin = compiler.compile_cubin(source.join(wanted.source), wanted.expression, "sm_90a")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin.image)
    text = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)", text, re.MULTILINE))
    assert {"HMMA", "LDSM", "LDGSTS"} <= found
