"""Source text into cubins, for every architecture, without a GPU."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from cupyattn.cuda.making import compiler
from cupyattn.cuda.making.compiler import compile_cubin, target_for
from cupyattn.cuda.making.source import join

TARGETS = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_120a"]

needs_nvrtc = pytest.mark.usefixtures("nvrtc")


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        *[((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_87"), ((8, 9), "sm_89"), ((9, 0), "sm_90a")],
        *[((10, 0), "sm_100a"), ((12, 0), "sm_120a"), ((8, 8), "sm_88"), ((10, 3), "sm_103"), ((12, 1), "sm_121")],
    ],
)
def test_each_gpu_has_its_architecture_and_only_known_ones_the_special_instructions(capability, target):
    assert target_for(capability) == target


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (3, 5)])
def test_a_gpu_older_than_ampere_is_refused(capability):
    with pytest.raises(ValueError, match=rf"8\.0 or newer \(Ampere\), not {capability[0]}\.{capability[1]}"):
        target_for(capability)


@needs_nvrtc
@pytest.mark.parametrize("target", TARGETS)
def test_a_template_compiles_for_every_architecture(sources, target):
    cubin = compile_cubin(join("scale.cu", sources), "test::scale<3>", target)
    assert cubin.name == "_ZN4test5scaleILi3EEEvPf"
    assert f"for '{target}'" in cubin.log
    assert cubin.resources.registers > 0


@needs_nvrtc
def test_the_compiler_that_made_it_is_known(sources, nvrtc):
    assert compile_cubin(join("scale.cu", sources), "test::scale<3>", "sm_80").nvrtc == nvrtc


@needs_nvrtc
def test_the_same_text_gives_the_same_bytes(sources):
    first, second = (compile_cubin(join("scale.cu", sources), "test::scale<3>", "sm_90a") for _ in range(2))
    assert first.image == second.image


@needs_nvrtc
def test_what_one_specialisation_does_not_use_is_no_warning(sources):
    (sources / "scale.cu").write_text("template <int k> __global__ void f(float* x) { int unused = k; *x = 1; }\n")
    assert "warning" not in compile_cubin(join("scale.cu", sources), "f<1>", "sm_80").log


@needs_nvrtc
@pytest.mark.parametrize(
    ("file", "line", "text"),
    [
        ("factor.cuh", 3, "#pragma once\nnamespace test {\nconstexpr float kFactor = nonsense;\n}\n"),
        ("scale.cu", 4, '// a\n#include "factor.cuh"\ntemplate <int k>\n__global__ void scale(nonsense* x) {}\n'),
        ("scale.cu", 2, '#pragma once\nint x = nonsense;\n#include "factor.cuh"\n'),
    ],
)
def test_an_error_points_at_the_file_and_line_it_is_in(sources, file, line, text):
    (sources / file).write_text(text)
    with pytest.raises(RuntimeError, match=rf'{file}\({line}\): error: identifier "nonsense" is undefined'):
        compile_cubin(join("scale.cu", sources), "test::scale<3>", "sm_80")


@needs_nvrtc
def test_an_error_says_what_was_compiled_for_what(sources):
    with pytest.raises(RuntimeError, match=r"cannot compile test::scael<3> for sm_80:\n.*scael"):
        compile_cubin(join("scale.cu", sources), "test::scael<3>", "sm_80")


@needs_nvrtc
def test_after_an_error_the_compiler_works_on(sources):
    with pytest.raises(RuntimeError, match="nonsense"):
        compile_cubin("nonsense", "k<1>", "sm_80")
    assert compile_cubin(join("scale.cu", sources), "test::scale<3>", "sm_80").image


@needs_nvrtc
@pytest.mark.parametrize("text", ["template <int k> __global__ void f(float* x) {}", "nonsense"])
def test_every_program_is_given_back(text, monkeypatch):
    from cupy.cuda import nvrtc

    alive = set()
    create, destroy = nvrtc.createProgram, nvrtc.destroyProgram

    def create_and_note(*arguments):
        program = create(*arguments)
        alive.add(program)
        return program

    def destroy_and_note(program):
        alive.remove(program)
        destroy(program)

    monkeypatch.setattr(nvrtc, "createProgram", create_and_note)
    monkeypatch.setattr(nvrtc, "destroyProgram", destroy_and_note)
    with suppress(RuntimeError):
        compile_cubin(text, "f<1>", "sm_80")
    assert alive == set()


@needs_nvrtc
def test_a_second_kernel_that_is_no_template_is_refused_by_name(sources):
    (sources / "factor.cuh").write_text(
        'namespace test { const float kFactor = 2; }\nextern "C" __global__ void b() {}'
    )
    with pytest.raises(ValueError, match=r"test::scale<3> has to give one kernel.*, not .*, b$"):
        compile_cubin(join("scale.cu", sources), "test::scale<3>", "sm_80")


@needs_nvrtc
@pytest.mark.parametrize("target", ["sm_999", "sm_30", "compute_80", "80"])
def test_an_architecture_that_nvrtc_does_not_know_is_refused_with_what_to_install(sources, target):
    with pytest.raises(
        RuntimeError,
        match=rf"NVRTC \d+\.\d+ does not know {target}; install one that does: pip install .*nvidia-cuda-nvrtc",
    ):
        compile_cubin(join("scale.cu", sources), "test::scale<3>", target)


@needs_nvrtc
def test_spills_are_counted():
    text = """
    template <int kLength>
    __global__ void __launch_bounds__(1024) spill(const float* __restrict__ x, float* out) {
        float kept[kLength];
        #pragma unroll
        for (int i = 0; i < kLength; ++i) kept[i] = x[i * 1024 + threadIdx.x];
        for (int step = 0; step < 64; ++step) {
            #pragma unroll
            for (int i = 0; i < kLength; ++i) kept[i] = kept[i] * kept[(7 * i + 1) % kLength] + x[step];
        }
        #pragma unroll
        for (int i = 0; i < kLength; ++i) out[i * 1024 + threadIdx.x] = kept[i];
    }
    """
    many, few = (compile_cubin(text, f"spill<{length}>", "sm_90a") for length in (128, 8))
    assert many.spills >= many.resources.local_memory > 0
    assert few.spills == few.resources.local_memory == 0


@pytest.fixture
def no_cupy(monkeypatch):
    """CuPy cannot be imported."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    compiler.version.cache_clear()
    yield
    compiler.version.cache_clear()


@pytest.mark.usefixtures("no_cupy")
def test_without_cupy_compiling_says_to_install_cupy_and_not_nvrtc():
    with pytest.raises(RuntimeError, match=r"^CuPy.* cannot be imported: pip install cupyattn\[cuda12\]") as caught:
        compile_cubin("", "k<1>", "sm_80")
    assert "nvrtc" not in str(caught.value).lower()


@pytest.mark.usefixtures("no_cupy")
def test_without_cupy_there_is_no_version():
    assert compiler.version() is None


@needs_nvrtc
def test_a_home_that_cannot_be_written_to_is_not_called_a_missing_nvrtc(tmp_path):
    """CuPy makes a folder there when it is imported."""
    home = tmp_path / "a file"
    home.write_text("")
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("CUPY_CACHE_DIR", None)
    code = "from cupyattn.cuda import info\nfrom cupyattn.cuda.making import compiler\n"
    code += "print(info.report())\ncompiler.load()"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stderr.splitlines()[-1].startswith("RuntimeError: CuPy cannot make its folder")
    assert "CUPY_CACHE_DIR" in ran.stderr.splitlines()[-1]
    assert "NVRTC     none: CuPy cannot make its folder" in ran.stdout


@needs_nvrtc
@pytest.mark.parametrize("function", ["getVersion", "createProgram", "getSupportedArchs"])
def test_a_library_that_lacks_a_function_is_no_nvrtc(monkeypatch, function):
    from cupy.cuda import nvrtc

    def missing(*arguments):
        raise AttributeError("undefined symbol")

    monkeypatch.setattr(nvrtc, function, missing)
    with pytest.raises(RuntimeError, match=r"^NVRTC.* cannot be loaded: pip install"):
        compile_cubin("", "k<1>", "sm_80")


@needs_nvrtc
@pytest.mark.parametrize(
    ("runtime", "package"), [(12090, "nvidia-cuda-nvrtc-cu12"), (13020, "'nvidia-cuda-nvrtc==13.*'")]
)
def test_a_missing_nvrtc_is_named_as_the_one_that_this_cupy_loads(monkeypatch, runtime, package):
    import cupy
    from cupy.cuda import nvrtc

    def missing():
        raise RuntimeError('Failure finding "libnvrtc.so.13"')

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: runtime)
    with pytest.raises(RuntimeError, match=r"^NVRTC.* cannot be loaded: pip install") as caught:
        compile_cubin("", "k<1>", "sm_80")
    assert f"--upgrade {package}, since CuPy here is for CUDA {runtime // 1000}" in str(caught.value)
    assert "libnvrtc" in str(caught.value.__cause__)
