"""Only what a caller allows may be taken: by the call's own word, or by that of the `with` around it."""

import asyncio
import threading

import numpy as np
import pytest
from homes import needs

import cupyattn
from cupyattn.allowed import currently_allowed, implementations

PREFILL = {"q": (1, 2048, 32, 128), "k": (1, 2048, 8, 128), "v": (1, 2048, 8, 128), "dtype": "float16"}
DECODE = PREFILL | {"q": (1, 1, 32, 128), "k": (1, 8192, 8, 128), "v": (1, 8192, 8, 128)}


def ones(**changes):
    return {name: np.ones((1, 3, 2, 8)) for name in "qkv"} | changes


@pytest.mark.parametrize(
    ("call", "allowed", "kernel"),
    [
        (PREFILL, "flash", "flash"),
        (PREFILL, ("flash", "splitkv"), "flash"),
        (DECODE, "hopper", "hopper"),
        (DECODE, ("hopper", "flash"), "hopper"),
        (DECODE, ("flash", "splitkv", "numpy"), "splitkv"),
        (PREFILL, ("splitkv",), "none"),
        (PREFILL, "numpy", "none"),
    ],
)
def test_a_plan_takes_the_first_that_is_allowed_and_has_no_objection(call, allowed, kernel):
    assert cupyattn.explain(**call, device="H100", implementation=allowed).kernel == kernel
    with implementations(*([allowed] if isinstance(allowed, str) else allowed)):
        assert cupyattn.explain(**call, device="H100").kernel == kernel


def test_a_call_that_none_of_them_takes_lists_each_ones_reasons():
    with pytest.raises(NotImplementedError, match="attention: no implementation takes") as caught:
        cupyattn.attention(**ones(), implementation=("flash", "splitkv"))
    lines = [line.split(maxsplit=1) for line in str(caught.value).splitlines()[2:]]
    assert lines == [
        ["numpy", "may not be taken: only splitkv, flash may"],
        ["splitkv", "works on an NVIDIA GPU, and the arrays are on the CPU"],
        ["hopper", "may not be taken: only splitkv, flash may"],
        ["flash", "works on an NVIDIA GPU, and the arrays are on the CPU"],
    ]


def starts():
    return np.array([0, 3], np.int32)


CALLS = {
    "attention": lambda: cupyattn.attention(**ones()),
    "attention_backward": lambda: cupyattn.attention_backward(np.ones((1, 3, 2, 8)), **ones()),
    "scaled_dot_product_attention": lambda: cupyattn.scaled_dot_product_attention(*ones().values()),
    "flash_attn_func": lambda: cupyattn.flash_attn_func(**ones()),
    "flash_attn_varlen_func": lambda: cupyattn.flash_attn_varlen_func(
        *(x[0] for x in ones().values()), starts(), starts(), 3, 3
    ),
    "flash_attn_with_kvcache": lambda: cupyattn.flash_attn_with_kvcache(*ones().values()),
    "cascade_attention": lambda: cupyattn.cascade_attention(
        np.ones((1, 3, 2, 8)), np.ones((4, 2, 8)), np.ones((4, 2, 8)), **{name: ones()[name] for name in "kv"}
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_allowed_around_a_call_holds_for_every_function(call):
    call()
    with implementations("numpy"):
        call()
    with implementations("flash"), pytest.raises(NotImplementedError, match="may not be taken: only flash may"):
        call()


def test_a_cache_is_attended_by_what_is_allowed():
    cache, x = cupyattn.DynamicCache(), np.ones((1, 3, 2, 8))
    cache.append(x, x)
    with implementations("splitkv"), pytest.raises(NotImplementedError, match="only splitkv may"):
        cache.attend(x)
    assert cache.attend(x).shape == x.shape


def test_the_calls_own_word_counts_before_the_one_around_it_and_the_inner_with_before_the_outer():
    with implementations("flash"):
        cupyattn.attention(**ones(), implementation="numpy")
        cupyattn.attention_backward(np.ones((1, 3, 2, 8)), **ones(), implementation="numpy")
        with implementations("numpy"):
            cupyattn.attention(**ones())
        assert currently_allowed() == ("flash",)
    assert currently_allowed() is None


def test_it_ends_where_the_with_ends_also_by_an_exception():
    with pytest.raises(KeyError), implementations("flash"):
        raise KeyError
    assert currently_allowed() is None


def test_it_is_a_decorator_too():
    @implementations("hopper", "numpy")
    def allowed():
        return currently_allowed()

    assert allowed() == ("numpy", "hopper")
    assert allowed() == ("numpy", "hopper")
    assert currently_allowed() is None


def test_what_is_remembered_of_a_problem_does_not_mix_up_what_was_allowed():
    kernels = [
        cupyattn.explain(**PREFILL, device="H100", implementation=allowed).kernel
        for allowed in (None, "flash", None, "splitkv", ("splitkv", "flash"), "hopper", None)
    ]
    assert kernels == ["hopper", "flash", "hopper", "none", "flash", "hopper", "hopper"]


def test_names_in_any_order_are_one_choice():
    plans = [
        cupyattn.explain(**PREFILL, device="A100", implementation=names)
        for names in (("flash", "numpy"), ["numpy", "flash", "flash"], {"flash", "numpy"})
    ]
    assert plans[0] == plans[1] == plans[2]


def test_threads_do_not_see_each_others():
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        found.append(currently_allowed())
        with implementations("numpy"):
            found.append(currently_allowed())
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with implementations("flash"):
        inside.set()
        done.wait(10)
        assert currently_allowed() == ("flash",)
    thread.join()
    assert found == [None, ("numpy",)]


def test_tasks_that_take_turns_do_not_see_each_others():
    async def one(name):
        with implementations(name):
            seen = []
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(currently_allowed())
        return seen

    async def both():
        return await asyncio.gather(one("flash"), one("numpy"))

    assert asyncio.run(both()) == [[("flash",)] * 3, [("numpy",)] * 3]


@pytest.mark.parametrize(
    ("allowed", "kernel"),
    [
        (None, "hopper_backward"),
        ("hopper", "hopper_backward"),
        ("flash", "backward"),
        ("splitkv", "backward"),
        ("numpy", "none"),
    ],
)
def test_gradients_go_by_the_kernels_of_what_is_allowed(allowed, kernel):
    plan = cupyattn.explain(**PREFILL, device="H100", backward=True, implementation=allowed)
    assert plan.kernel == kernel
    if kernel == "none":
        assert dict(plan.objections)["hopper_backward"] == ("may not be taken: only numpy may",)


def test_gradients_that_the_only_kernel_allowed_does_not_take_say_why():
    call = PREFILL | {"dtype": "float32"}
    plan = cupyattn.explain(**call, device="H100", backward=True, implementation="hopper")
    assert plan.kernel == "none"
    assert dict(plan.objections) == {
        "numpy": ("may not be taken: only hopper may",),
        "backward": ("may not be taken: only hopper may",),
        "hopper_backward": ("has no float32 arithmetic",),
    }


def test_gradients_on_the_cpu_are_numpys():
    plan = cupyattn.explain(**ones(), backward=True, implementation="flash")
    assert plan.kernel == "none"
    assert dict(plan.objections)["numpy"] == ("may not be taken: only flash may",)
    assert cupyattn.explain(**ones(), backward=True, implementation="numpy").kernel == "numpy"


def test_a_backward_pass_goes_by_what_its_forward_pass_was_allowed():
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 3, 2, 8, requires_grad=True)
    out = cupyattn.attention(x, x, x)
    with implementations("flash"):
        out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ((), ValueError, "at least one of numpy, splitkv, hopper, flash has to be named"),
        (("flesh",), ValueError, "there is no implementation 'flesh'; there are numpy, splitkv, hopper, flash"),
        (("flash", "backward"), ValueError, "there is no implementation 'backward'"),
        ((None,), TypeError, "names have to be strings"),
        ((("flash", "numpy"),), TypeError, "names have to be strings"),
    ],
)
def test_unknown_names_are_refused_before_the_with(names, error, says):
    with pytest.raises(error, match=f"^implementations: {says}"):
        implementations(*names)
    assert currently_allowed() is None


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_a_program_of_jax_is_traced_with_kernels_that_are_not_here_and_refuses_when_it_runs(differentiated):
    jax = needs("jax")
    x = jax.numpy.ones((1, 6, 2, 8), "float32")

    def program(q):
        out = cupyattn.attention(q, q, q, causal=True)
        return out.sum() if differentiated else out

    def afresh():  # or jax.jit would have traced it before
        return jax.jit(jax.grad(lambda q: program(q)) if differentiated else lambda q: program(q))

    with cupyattn.implementations("flash"):
        traced = afresh().lower(x)
        with pytest.raises(Exception, match="may not be taken: only flash may"):
            jax.block_until_ready(afresh()(x))
    assert "cupyattn" in traced.as_text() or "callback" in traced.as_text()
    with cupyattn.implementations("numpy"):
        assert jax.numpy.isfinite(afresh()(x)).all()


def test_a_program_that_no_device_could_run_is_refused_when_it_is_traced():
    jax = needs("jax")
    x = jax.numpy.ones((1, 6, 2, 7), "float32")
    with cupyattn.implementations("flash"), pytest.raises(NotImplementedError, match="multiple of 8"):
        jax.jit(lambda q: cupyattn.attention(q, q, q)).lower(x)
