"""States merged step by step by `merge.cu`, under the emulator, are those that the definition merges."""

import numpy as np
import pytest

from cupyattn import cuda
from cupyattn.numpy_ref import State, merge
from cupyattn.problem import Spec

BATCH, HEADS, ROWS = 2, 3, 37


def states_of(rng, count, dim, rows=ROWS):
    found = []
    for _ in range(count):
        lse = 4.0 * rng.standard_normal((BATCH, HEADS, rows))
        lse[:, :, ::7] = -np.inf
        out = np.where(np.isneginf(lse)[..., None], 0.0, rng.standard_normal((BATCH, HEADS, rows, dim)))
        found.append(State(out.astype(np.float32), lse.astype(np.float32)))
    return found


def wide(state):
    return State(state.out.astype(float), state.lse.astype(float))


def assert_close(running, exact):
    out, lse = running.unrounded()
    np.testing.assert_allclose(out.numpy(), exact.out, atol=2e-6)
    np.testing.assert_allclose(lse.numpy(), exact.lse, atol=2e-6)


def begun(torch, dim, rows=ROWS):
    return cuda.running_state("torch.Tensor", torch.zeros(1), BATCH, HEADS, rows, dim)


def as_tensors(torch, state, dtype):
    return torch.from_numpy(state.out).to(dtype), torch.from_numpy(state.lse)


def finished(state, dim, dtype="float32", sinks=None, rows=ROWS):
    """In the layout "bshd", which is not that of the running state."""
    out, lse = state.rounded(Spec("out", (BATCH, rows, HEADS, dim), dtype), "bshd", sinks)
    return out.float().numpy().swapaxes(1, 2), lse.numpy()


@pytest.mark.parametrize("dim", [8, 72, 256])
def test_states_of_all_rows(torch, driver, rng, dim):
    found, running = states_of(rng, 3, dim), begun(torch, dim)
    for state in found:
        running.merge(slice(0, ROWS, 1), *as_tensors(torch, state, torch.float32))
    exact = merge([wide(x) for x in found])
    out, lse = finished(running, dim)
    np.testing.assert_allclose(out, exact.out, atol=1e-6)
    np.testing.assert_allclose(lse, exact.lse, atol=2e-6)
    assert_close(running, exact)


@pytest.mark.parametrize("rows", [slice(5, 29, 1), slice(3, 39, 4), slice(0, 1, 1)], ids=str)
def test_states_of_some_rows_leave_the_others_as_they_are(torch, driver, rng, rows):
    count = len(range(ROWS)[rows])
    (whole,), (part,) = states_of(rng, 1, 8), states_of(rng, 1, 8, count)
    running = begun(torch, 8)
    running.merge(slice(0, ROWS, 1), *as_tensors(torch, whole, torch.float32))
    running.merge(rows, *as_tensors(torch, part, torch.float32))
    exact = wide(whole)
    here = merge([State(exact.out[:, :, rows], exact.lse[:, :, rows]), wide(part)])
    exact.out[:, :, rows], exact.lse[:, :, rows] = here.out, here.lse
    assert_close(running, exact)


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_they_are_rounded_once(torch, driver, rng, dtype, unit):
    """Of many states the error is that of one rounding; were each step rounded, it would grow."""
    found, running = states_of(rng, 12, 8), begun(torch, 8)
    for state in found:
        running.merge(slice(0, ROWS, 1), *as_tensors(torch, state, torch.float32))
    exact = merge([wide(x) for x in found])
    out, _ = finished(running, 8, dtype)
    assert (np.abs(out - exact.out) <= unit * np.abs(exact.out) + 1e-5).all()


def test_sinks_are_added_at_the_end(torch, driver, rng):
    (state,), running = states_of(rng, 1, 8), begun(torch, 8)
    running.merge(slice(0, ROWS, 1), *as_tensors(torch, state, torch.float32))
    sinks = np.array([0.5, -np.inf, np.inf], np.float32)
    out, lse = finished(running, 8, sinks=torch.from_numpy(sinks))
    sink = State(np.zeros(state.out.shape), np.broadcast_to(sinks[:, None], state.lse.shape).astype(float))
    exact = merge([wide(state), sink])
    np.testing.assert_allclose(out, exact.out, atol=1e-6)
    np.testing.assert_allclose(lse, exact.lse, atol=2e-6)


def test_nothing_is_zero_and_minus_infinity(torch, driver):
    out, lse = finished(begun(torch, 8), 8)
    assert not out.any()
    assert np.isneginf(lse).all()
