"""Inside of `jax.shard_map` results and gradients are those of attention; what cannot be meant there is refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import cupyattn
from cupyattn.distributed import JaxComm, ring_attention, run_ranks, sharded_decode, ulysses_attention

SCRIPT = Path(__file__).with_name("devices.py")
LONG = (
    "ring", "ring-bias", "ring-bias-keys", "ring-alibi", "ring-alibi-bias", "ring-packed",
    "ulysses", "ulysses-mask", "ulysses-keys", "ulysses-packed", "decode", "decode-zigzag", "decode-alibi",
    "decode-packed", "decode-packed-uneven", "refuse",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        "ring-striped",
        *(pytest.param(case, marks=pytest.mark.long) for case in LONG),
    ],
)
def test_devices_of_a_mesh_agree_with_one(case):
    if find_spec("jax") is None:
        pytest.skip("needs jax")
    home = str(Path(cupyattn.__file__).parents[1])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    call = [sys.executable, str(SCRIPT), case]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=600.0, env={**os.environ, **flags})
    assert f"{case} is right" in ended.stdout, ended.stderr


def test_an_axis_that_is_no_name_is_refused():
    with pytest.raises(TypeError, match="axis_name has to be a string"):
        JaxComm(0)


def test_an_axis_that_there_is_not_is_refused_in_our_words():
    jax = pytest.importorskip("jax", reason="needs jax")
    x = jax.numpy.ones((1, 2, 2, 8))
    for call in (ring_attention, ulysses_attention, sharded_decode):
        rule = rf"^{call.__name__}: comm has to name an axis of the mesh .*\n    comm  JaxComm\('rows'\)$"
        with pytest.raises(ValueError, match=rule):
            call(x, x, x, comm=JaxComm("rows"))


def test_traced_arrays_are_refused_by_ranks_of_this_process():
    jax = pytest.importorskip("jax", reason="needs jax")

    def rank(comm):
        return jax.jit(lambda x: ring_attention(x, x, x, comm=comm))(np.ones((1, 2, 2, 8), np.float32))

    with pytest.raises(ValueError, match="they are traced; under"):
        run_ranks(rank, 2)
