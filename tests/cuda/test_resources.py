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


SPILL = {"sm_90a": "hopper_forward<HopperTraits<Float8, 128, 128, 128, 128, 2, 1, 2"}
"""What does: two numbers of a tile, outside of its walk.  Whoever mends it takes it off the list."""


@pytest.mark.parametrize("target", TARGETS)
def test_prefill_kernels_of_sixteen_bits_or_fewer_spill_nothing_but_for_those_known(target):
    ours = ("flash_forward<Half", "flash_forward<BF", "hopper_forward")
    kernels = committed()["kernels"][target].items()
    spilling = [name for name, (_, spills) in kernels if spills and name.startswith(ours)]
    assert [name for name in spilling if not name.startswith(SPILL.get(target, "none"))] == []
    assert bool(spilling) == (target in SPILL)


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
