"""Public functions in programs that torch's default compiler makes, in which the rest is C++ of its own."""

import pytest
from homes import needs
from oracle import assert_matches, assert_same_bits

import cupyattn

torch = needs("torch")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of its own imports


@pytest.fixture(scope="module", autouse=True)
def from_scratch(tmp_path_factory):
    """Nothing that another process has compiled before."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("needs a compiler of C++")
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(compile_threads=1):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        torch.compiler.reset()
        yield
        torch.compiler.reset()


def counted(function):
    """It compiled whatever the sizes are, and how many programs were made of it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gated(x, weight):
    q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).unbind(-3)
    out, lse = cupyattn.attention(q, k, v, causal=True, return_lse=True)
    return out * torch.sigmoid(q), lse


def test_one_program_of_all_sizes_gives_the_same_numbers_and_gradients():
    weight = drawn(16, 48, seed=1).requires_grad_()
    program, counter = counted(gated)
    for batch, seqlen in ((2, 6), (3, 9)):
        x = drawn(batch, seqlen, 16, seed=seqlen)
        found, expected = program(x, weight), gated(x, weight)
        slopes = [torch.autograd.grad(out.sum() + lse.sum(), weight)[0] for out, lse in (found, expected)]
        for a, b in zip((*found, slopes[0]), (*expected, slopes[1]), strict=True):
            assert_matches(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def two_layers(x, weight, k_caches, v_caches, seqlens):
    for k_cache, v_cache in zip(k_caches, v_caches, strict=True):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).unbind(-3)
        out = cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True)
        x = x + out.flatten(-2)
    return x, seqlens + 1


def test_a_program_of_a_step_writes_into_caches_that_are_views_and_goes_on_from_there():
    """Inductor makes 0 of the place of a view, if that is a symbol: what is written there has a place that is known."""
    weight, caches = drawn(16, 48, seed=1), torch.zeros(2, 2, 2, 2, 16, 2, 8)  # ours and its, keys and values, layers
    program, _ = counted(two_layers)
    lengths = [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
    for n in range(3):
        x, found = drawn(2, 1, 16, seed=n), []
        for i, function in enumerate((program, two_layers)):
            out, lengths[i] = function(x, weight, *caches[i], lengths[i])
            found.append(out)
        assert_matches(*found, rtol=1e-5, atol=1e-5)
    assert_same_bits(*lengths)
    assert_matches(*caches, rtol=1e-5, atol=1e-5)
    assert caches[0, ..., :3, :, :].count_nonzero() == caches[0].count_nonzero() > 0
