"""Programs that JAX compiles, and how they call: on the CPU for real, on a GPU with frames made by hand."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from ctypes import POINTER, c_int, c_int64, pointer, sizeof
from pathlib import Path

import numpy as np
import pytest
from homes import needs

import cupyattn
from cupyattn.arrays import xla
from cupyattn.described import Call, text_of
from cupyattn.problem import Layout, Mask, Problem, ScoreEdits, Sizes, Spec


def operands_of_jax(dtype="float32", seqlen_k=6):
    jax = needs("jax")
    rng = np.random.default_rng(0)
    sizes = (4, 4), (seqlen_k, 2), (seqlen_k, 2)
    return [jax.numpy.asarray(rng.standard_normal((2, n, h, 8)), dtype) for n, h in sizes]


def causal(*arrays, **options):
    return cupyattn.attention(*arrays, causal=True, alignment="bottom-right", **options)


def loss(*arrays):
    return (causal(*arrays).astype("float32") ** 2).sum()


def assert_equal(found, expected):
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_program_calls_without_a_callback_and_has_the_same_bits(dtype):
    jax = needs("jax")
    arrays = operands_of_jax(dtype)
    program = jax.jit(lambda *x: causal(*x, return_lse=True)).lower(*arrays)
    assert "custom_call @cupyattn" in program.as_text()
    for found, expected in zip(program.compile()(*arrays), causal(*arrays, return_lse=True), strict=True):
        assert found.dtype == expected.dtype
        assert_equal(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_in_a_program_have_the_same_bits(dtype):
    jax = needs("jax")
    arrays = operands_of_jax(dtype)
    program = jax.jit(jax.grad(loss, (0, 1, 2)))
    assert program.lower(*arrays).as_text().count("custom_call @cupyattn") == 2
    for found, expected in zip(program(*arrays), jax.grad(loss, (0, 1, 2))(*arrays), strict=True):
        assert_equal(found, expected)


def under_scan(jax, q, k, v):
    return jax.lax.scan(lambda x, _: (causal(x, k, v), x.sum()), q, None, length=3)[0]


WAYS = {
    "scan": under_scan,
    "remat": lambda jax, q, k, v: jax.checkpoint(causal)(q, k, v),
    "vmap": lambda jax, q, k, v: jax.vmap(lambda q, k, v: causal(q[None], k[None], v[None])[0])(q, k, v),
    "lengths": lambda jax, q, k, v: causal(q, k, v, seqlens_k=jax.numpy.asarray([3, 5], "int32")),
    "cond": lambda jax, q, k, v: jax.lax.cond(q.sum() < 1e9, causal, lambda q, k, v: q, q, k, v),
}


@pytest.mark.parametrize("way", WAYS)
def test_programs_within_programs_and_their_gradients(way):
    jax = needs("jax")
    arrays = operands_of_jax()

    def of_all(*arrays):
        return WAYS[way](jax, *arrays)

    assert_equal(jax.jit(of_all)(*arrays), of_all(*arrays))
    found = jax.jit(jax.grad(lambda *x: of_all(*x).sum(), (0, 1, 2)))(*arrays)
    expected = jax.grad(lambda *x: of_all(*x).sum(), (0, 1, 2))(*arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


SHARDED = """
    import jax, numpy as np, cupyattn
    from jax.sharding import PartitionSpec as Axes

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    q, k, v = jax.numpy.asarray(np.random.default_rng(0).standard_normal((3, 4, 6, 2, 8), np.float32))

    def some(q, k, v):
        return jax.lax.scan(lambda x, _: (cupyattn.attention(x, k, v), None), q, None, length=2)[0]

    def loss(q, k, v):
        return (jax.shard_map(some, mesh=mesh, in_specs=Axes("x"), out_specs=Axes("x"))(q, k, v) ** 2).sum()

    np.testing.assert_allclose(jax.jit(loss)(q, k, v), (np.asarray(some(q, k, v)) ** 2).sum(), rtol=1e-5)
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for x, y in zip(found, jax.grad(lambda *x: (some(*x) ** 2).sum(), (0, 1, 2))(q, k, v)):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert "custom_call @cupyattn" in jax.jit(loss).lower(q, k, v).as_text()

    def of_all_keys(q, k, v):
        call = jax.shard_map(cupyattn.attention, mesh=mesh, in_specs=(Axes("x"), Axes(), Axes()), out_specs=Axes("x"))
        return (call(q, k[:1], v[:1]) ** 2).sum()

    found = jax.jit(jax.grad(of_all_keys, (1, 2)))(q, k, v)  # a sum over devices
    expected = jax.grad(lambda q, k, v: (cupyattn.attention(q, k[:1], v[:1]) ** 2).sum(), (1, 2))(q, k, v)
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, atol=1e-5)
"""


def run_apart(text, *arguments, **variables):
    """In a process of its own; what it prints."""
    environment = os.environ | variables | {"PYTHONPATH": str(Path(cupyattn.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(text), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300.0)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_shard_of_a_map_over_devices_calls():
    needs("jax")
    run_apart(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")


DROPPED = """
    import sys, time
    import jax, numpy as np, cupyattn
    from cupyattn.arrays.servers import SERVERS
    from jax.sharding import PartitionSpec as Axes

    mesh = jax.make_mesh((2,), ("x",))
    known = jax.set_mesh(mesh) if "set" in sys.argv else None
    some = jax.shard_map(
        lambda q: jax.lax.psum(cupyattn.attention(q, q, q), "x"), mesh=mesh, in_specs=Axes("x"), out_specs=Axes()
    )
    q = jax.device_put(np.ones((2, 8, 2, 8), np.float32), jax.sharding.NamedSharding(mesh, Axes("x")))
    program = jax.jit(some).lower(q).compile()
    served = SERVERS["cpu"]

    def late(*arguments):
        time.sleep(1.0)
        served(*arguments)
        sys.stdout.write("answered\\n")  # at once, beside the other device's
        sys.stdout.flush()

    SERVERS["cpu"] = late
    program(q)
    print("left", flush=True)
"""


@pytest.mark.parametrize("words", [(), ("set",)], ids=" ".join)
def test_a_program_whose_result_nobody_waits_for_is_done_before_python_ends(words):
    jax = needs("jax")
    if words and not hasattr(jax, "set_mesh"):
        pytest.skip("this JAX sets no mesh")
    said = run_apart(DROPPED, *words, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert said.split() == ["left", "answered", "answered"]


EXPLICIT = """
    import sys
    import jax, numpy as np, cupyattn
    from jax.sharding import NamedSharding, PartitionSpec as Axes

    def one(q):
        return cupyattn.attention(q[None], q[None], q[None])[0]

    def layer(w, x):
        return cupyattn.attention(x @ w, x @ w, x, causal=True)

    def loss(w, x):
        return (layer(w, x) ** 2).sum()

    calls = {
        "out": layer,
        "lse": lambda w, x: cupyattn.attention(x @ w, x, x, return_lse=True)[1],
        "gradients": jax.grad(loss, (0, 1)),
        "scan": lambda w, x: jax.lax.scan(lambda c, _: (layer(w, c), None), x, None, length=2)[0],
        "vmap": lambda w, x: jax.vmap(one)(x),
        "gradients under vmap": lambda w, x: jax.vmap(jax.grad(lambda x: (one(x) ** 2).sum()))(x),
    }
    w, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((8, 8), (4, 9, 2, 8))))
    expected = {name: call(w, x) for name, call in calls.items()} if "first" in sys.argv else {}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    known = jax.set_mesh(mesh) if "set" in sys.argv else None  # until it is left
    there = jax.device_put(w, NamedSharding(mesh, Axes())), jax.device_put(x, NamedSharding(mesh, Axes("data")))
    found = {name: jax.jit(call)(*there) for name, call in calls.items()}
    assert "custom_call_target=cupyattn" in jax.jit(layer).lower(*there).compile().as_text().replace(chr(34), "")
    for name, result in found.items():
        for array in jax.tree.leaves(result):
            along = tuple(jax.typeof(array).sharding.spec)
            assert along == (("data", None, None, None)[: array.ndim] if array.ndim > 2 else (None, None)), name
    heads = jax.device_put(x, NamedSharding(mesh, Axes(None, None, "data")))
    assert tuple(jax.typeof(jax.jit(layer)(there[0], heads)).sharding.spec) == (None, None, "data", None)
    found = jax.tree.map(np.asarray, found)
    if known:
        known.__exit__(None, None, None)
    expected = expected or {name: call(w, x) for name, call in calls.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
"""


@pytest.mark.parametrize("words", [(), ("set",), ("first", "set")], ids=" ".join)
def test_results_lie_on_an_explicit_mesh_as_their_operands_do(words):
    """Whatever was called before: the first call of a process finds out whether programs can call at all."""
    jax = needs("jax")
    if not hasattr(jax.sharding, "auto_axes"):
        pytest.skip("meshes of this JAX have no explicit axes")
    run_apart(EXPLICIT, *words, XLA_FLAGS="--xla_force_host_platform_device_count=2")


EXPORTED = """
    import sys
    from pathlib import Path
    import numpy as np, cupyattn
    from jax import export
    from cupyattn.integrations import jax as _

    arrays = [np.load(Path(sys.argv[1]) / f"{name}.npy") for name in "qkv"]
    program = export.deserialize((Path(sys.argv[1]) / "program").read_bytes())
    np.testing.assert_array_equal(program.call(*arrays), np.load(Path(sys.argv[1]) / "out.npy"))
"""


def test_an_exported_program_runs_in_another_process(tmp_path):
    jax = needs("jax")
    needs("flatbuffers")
    from jax import export

    arrays = operands_of_jax()
    allowed = [export.DisabledSafetyCheck.custom_call("cupyattn")]
    (tmp_path / "program").write_bytes(export.export(jax.jit(causal), disabled_checks=allowed)(*arrays).serialize())
    for name, array in zip(("q", "k", "v", "out"), (*arrays, causal(*arrays)), strict=True):
        np.save(tmp_path / f"{name}.npy", np.asarray(array))
    run_apart(EXPORTED, str(tmp_path))


@pytest.mark.parametrize("symbols", ["b, 9, 4, 8", "2, rows, 4, 8"])
def test_a_program_of_any_size_is_refused_in_words(symbols):
    jax = needs("jax")
    from jax import export

    x = jax.ShapeDtypeStruct(export.symbolic_shape(symbols, constraints=["b<=9"] if "b" in symbols else []), "float32")
    with pytest.raises(
        TypeError, match=r"attention: q has a shape with symbols, as of jax.export; sizes have to be known"
    ):
        export.export(jax.jit(causal))(x, x, x)


def test_a_program_outlives_what_traced_it():
    jax = needs("jax")
    arrays = operands_of_jax()
    program = jax.jit(causal).lower(*arrays).compile()
    xla_text_cache_is_emptied()
    gc.collect()
    assert_equal(program(*arrays), causal(*arrays))


def xla_text_cache_is_emptied():
    from cupyattn import described, serving

    described.call_of.cache_clear()
    serving._answer.cache_clear()


def test_an_error_is_the_programs_and_keeps_its_words():
    jax = needs("jax")
    q = jax.numpy.ones((5, 2, 8))
    starts = jax.numpy.asarray([0, 3, 99], "int32")
    call = jax.jit(lambda starts: cupyattn.flash_attn_varlen_func(q, q, q, starts, starts, 5, 5))
    with pytest.raises(Exception, match="flash_attn_varlen_func: cu_seqlens_q ends after the last row"):
        jax.block_until_ready(call(starts))


def test_nothing_is_computed_of_nothing():
    jax = needs("jax")
    q = jax.numpy.ones((0, 3, 2, 8))
    assert jax.jit(cupyattn.attention)(q, q, q).shape == q.shape


def test_without_it_there_is_a_callback_and_explain_says_why(monkeypatch):
    jax = needs("jax")
    arrays = operands_of_jax()
    assert "under jax.jit it is called by the compiled program itself" in cupyattn.explain(*arrays).notes
    monkeypatch.setattr(xla, "objection_to_programs", lambda: "a test says so")
    assert "under jax.jit it is a callback to the host: a test says so" in cupyattn.explain(*arrays).notes
    program = jax.jit(lambda *x: causal(*x)).lower(*arrays)
    assert "custom_call @cupyattn" not in program.as_text()
    assert_equal(program.compile()(*arrays), causal(*arrays))


def test_a_jax_that_calls_otherwise_is_found_out(monkeypatch):
    needs("jax")
    monkeypatch.setattr(xla, "_is_known", lambda frame: False)
    monkeypatch.setattr(xla, "TARGET", "cupyattn_for_a_test")
    assert "does not call as expected" in xla._objection.__wrapped__()


def test_a_cache_says_what_to_do_under_jit():
    jax = needs("jax")
    k = jax.numpy.ones((1, 2, 3, 8))
    with pytest.raises(TypeError, match=r"which under jit, grad and vmap are not known yet; call it outside of them"):
        jax.jit(lambda k: cupyattn.DynamicCache().append(k, k))(k)


# ---- On a GPU: what XLA would hand over, by hand ---------------------------------------------------------------------


class Frame:
    """A call frame of CUDA, of arrays in host memory."""

    STREAM = 77

    def __init__(self, text, operands, results):
        self.errors, self.kept = [], [operands, results]
        self.api = xla._Api(struct_size=sizeof(xla._Api))
        stream_get = xla._Api_Function(self.stream_get)
        error_create = xla._Api_Function(self.error_create)
        self.api.stream_get = ctypes.cast(stream_get, ctypes.c_void_p)
        self.api.error_create = ctypes.cast(error_create, ctypes.c_void_p)
        encoded = text.encode()
        span = xla._Span(ctypes.cast(ctypes.c_char_p(encoded), ctypes.c_void_p), len(encoded))
        attributes = xla._Attributes(
            sizeof(xla._Attributes), None, 1, (c_int * 1)(xla._STRING), None, (POINTER(xla._Span) * 1)(pointer(span))
        )
        self.kept += [stream_get, error_create, encoded, span]
        self.frame = xla._CallFrame(
            sizeof(xla._CallFrame), None, pointer(self.api), None, xla._EXECUTE,
            self.buffers(operands), self.buffers(results), attributes,
        )  # fmt: skip

    def buffers(self, arrays):
        numbers = {name: number for number, name in xla._DTYPES.items()}
        found = [
            xla._Buffer(
                sizeof(xla._Buffer), None, numbers[str(x.dtype)], x.ctypes.data, x.ndim, (c_int64 * x.ndim)(*x.shape)
            )
            for x in arrays
        ]
        self.kept += found
        pointers = (POINTER(xla._Buffer) * len(found))(*map(pointer, found))
        return xla._Buffers(sizeof(xla._Buffers), None, len(found), (c_int * len(found))(*[1] * len(found)), pointers)

    def stream_get(self, address):
        xla._StreamGet.from_address(address).stream = self.STREAM

    def error_create(self, address):
        self.errors.append(xla._ErrorCreate.from_address(address).message.decode())
        return 1

    def call(self):
        xla._handlers["CUDA"](pointer(self.frame))
        return self.errors


@pytest.fixture
def gpu(driver, monkeypatch):
    """CuPy in host memory, and the streams that were entered."""
    cupy = needs("cupy")
    from cupyattn.cuda.launching import memory

    unowned, entered = cupy.cuda.UnownedMemory, []

    def wrapped(array):
        driver.look_at_numpy(array)
        held = unowned(array.ctypes.data, array.nbytes, array, device_id=0)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(held, 0))

    def empty(self, shape, dtype, like):
        return wrapped(np.full(shape, -7, like.dtype if dtype == "bfloat16" else dtype))

    def of_program(address, size, owner):
        there = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        driver.look_at_numpy(there)
        return unowned(address, size, owner, device_id=0)

    monkeypatch.setattr(memory.CuPyMemory, "empty", empty)
    monkeypatch.setattr(memory.CuPyMemory, "zero", lambda self, x: _host(x).fill(0))
    monkeypatch.setattr(memory.CuPyMemory, "to_host", lambda self, x: np.array(_host(x)))
    monkeypatch.setattr(
        memory.CuPyMemory, "from_host", lambda self, x, values: np.copyto(_host(x).view(values.dtype), values)
    )
    monkeypatch.setattr(cupy.cuda, "UnownedMemory", of_program)
    monkeypatch.setattr(cupy.cuda, "ExternalStream", lambda stream: entered.append(stream) or nullcontext())
    return entered


def _host(array):
    raw = (ctypes.c_uint8 * array.nbytes).from_address(array.data.ptr)
    return np.ctypeslib.as_array(raw).view(array.dtype).reshape(array.shape)


def described(arrays, dtype, known=(), results=None, needs_lse=False):
    sizes = Sizes((1,), 2, 2, 2, 5, 7, 16, 16)
    problem = Problem(sizes, Layout("bshd"), dtype, Mask(), ScoreEdits(0.25), needs_lse=needs_lse)
    operands = {name: Spec(name, array.shape, dtype) for name, array in zip("qkv", arrays, strict=True)}
    return text_of(Call("attention", problem, operands, results or problem.results, known=known))


def operands_on_gpu(dtype):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, n, 2, 16)).astype(dtype) for n in (5, 7, 7)]


def test_a_program_on_a_gpu_launches_on_its_own_stream_into_its_own_memory(gpu, driver):
    arrays = operands_on_gpu(np.float16)
    out, lse = np.zeros((1, 5, 2, 16), np.float16), np.zeros((1, 2, 5), np.float32)
    frame = Frame(described(arrays, "float16", needs_lse=True), arrays, [out, lse])
    assert frame.call() == []
    assert gpu == [Frame.STREAM]
    assert [launch[0].source for launch in driver.launches] == ["splitkv.cu"]
    exact, exact_lse = cupyattn.attention(*[x.astype(np.float64) for x in arrays], return_lse=True)
    np.testing.assert_allclose(out, exact, atol=2e-3)
    np.testing.assert_allclose(lse, exact_lse, atol=2e-3)


def test_gradients_of_a_program_on_a_gpu(gpu, driver):
    arrays = operands_on_gpu(np.float16)
    dout = np.random.default_rng(1).standard_normal((1, 5, 2, 16)).astype(np.float16)
    results = [np.zeros_like(x) for x in arrays]
    specs = {name: Spec(name, x.shape, "float16") for name, x in zip("qkv", arrays, strict=True)}
    frame = Frame(described(arrays, "float16", ("dout",), specs), [*arrays, dout], results)
    assert frame.call() == []
    exact = cupyattn.attention_backward(*[x.astype(np.float64) for x in (dout, *arrays)])
    for found, expected in zip(results, exact[:3], strict=True):
        np.testing.assert_allclose(found, expected, atol=6e-3)


def test_what_no_kernel_takes_is_computed_on_the_host(gpu, driver):
    arrays = operands_on_gpu(np.float64)
    out = np.zeros((1, 5, 2, 16))
    assert Frame(described(arrays, "float64"), arrays, [out]).call() == []
    assert driver.launches == []
    np.testing.assert_array_equal(out, cupyattn.attention(*arrays))


def test_float8_of_a_program_on_a_gpu_is_computed_on_the_host(gpu, driver):
    kind = needs("ml_dtypes").float8_e4m3fn
    arrays = operands_on_gpu(kind)
    exact = cupyattn.attention(*arrays)
    out = np.zeros(exact.shape, exact.dtype)
    assert Frame(described(arrays, "float8_e4m3fn"), arrays, [out]).call() == []
    assert driver.launches == []
    np.testing.assert_array_equal(out.astype(np.float32), exact.astype(np.float32))


def test_what_goes_wrong_on_a_gpu_is_the_programs_error(gpu, monkeypatch):
    from cupyattn import cuda

    def without_driver(*given):
        raise RuntimeError("attention: no driver")

    monkeypatch.setattr(cuda, "device_of", without_driver)
    arrays = operands_on_gpu(np.float16)
    frame = Frame(described(arrays, "float16"), arrays, [np.zeros((1, 5, 2, 16), np.float16)])
    assert frame.call() == ["RuntimeError: attention: no driver"]


def test_a_call_without_our_text_is_an_error(gpu):
    frame = Frame("{}", [], [])
    frame.frame.attributes.size = 0
    assert frame.call() == ["RuntimeError: XLA calls without the text that the call was described by"]


def test_a_text_is_json_and_carries_no_code():
    arrays = operands_on_gpu(np.float16)
    assert json.loads(described(arrays, "float16"))["function"] == "attention"
