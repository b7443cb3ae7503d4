"""Plans that were pickled before there was the wing plan/: by cupyattn.plan and cupyattn.hopper, modules then."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import cupyattn
from cupyattn.plan import HopperTile

PICKLES = Path(__file__).parent / "pickles"
"""What `pickle.dumps` made of these plans at commit dbf0b5d; `tile.pickle` is the tile of H100's prefill alone."""
KEYS = {"cpu": (1, 64, 2, 16), "A100": (1, 2048, 8, 64), "H100": (1, 2048, 8, 64)}


def explained(device, call):
    """What explain says now."""
    batch, seqlen, *heads = KEYS[device]
    q = (batch, seqlen if call == "prefill" else 1, *heads)
    return cupyattn.explain(q, KEYS[device], KEYS[device], device=device)


@pytest.mark.parametrize("call", ["prefill", "decode"])
@pytest.mark.parametrize("device", KEYS)
def test_a_plan_that_was_pickled_when_plan_was_a_module_is_a_plan_of_today(device, call):
    found, today = pickle.loads((PICKLES / f"{device}-{call}.pickle").read_bytes()), explained(device, call)
    assert (type(found), type(found.tile)) == (type(today), type(today.tile))
    for name in ("kernel", "device", "compute_dtype", "flops", "bytes"):  # what was decided besides may be better now
        assert getattr(found, name) == getattr(today, name)
    said, says = ([line.split()[0] for line in str(plan).splitlines()] for plan in (found, today))
    assert said == [word for word in says if word != "memory"]  # of which nobody was told then


LOADED = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')))"


def test_a_tile_of_then_is_loaded_where_nothing_is_imported_yet():
    call = [sys.executable, "-c", LOADED, str(PICKLES / "tile.pickle")]
    environment = {"PYTHONPATH": str(Path(cupyattn.__file__).parents[1])}
    fresh = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    tile = explained("H100", "prefill").tile
    assert isinstance(tile, HopperTile)
    assert fresh.stdout.strip() == str(tile._replace(switches=tile.switches._replace(rescale_first=False, lazy=False)))
