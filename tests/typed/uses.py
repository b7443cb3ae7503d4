"""Right and wrong uses, to whoever checks types: checkers complain of an `ignore` that nothing is wrong with.

Never run.  `Tensor` is another library's array than NumPy's.
"""

from typing import Any, TypeAlias, assert_type

import numpy as np

import cupyattn
from cupyattn import Gradients, Plan, attention, attention_backward, merge_states, scaled_dot_product_attention
from cupyattn.distributed import (
    DistributedPlan,
    ThreadComm,
    explain,
    ring_attention,
    ring_attention_backward,
    sharded_decode,
    ulysses_attention,
)
from cupyattn.integrations import onnx

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Tensor:
    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def dtype(self) -> str:
        return "float32"


Results: TypeAlias = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def of_one_library(x: Tensor, y: Floats, unknown: Any, flag: bool) -> None:
    assert_type(attention(x, x, x), Tensor)
    assert_type(attention(y, y, y, causal=True, window_size=(3, None)), Floats)
    assert_type(attention(x, x, x, return_lse=False), Tensor)
    assert_type(attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(attention(x, x, x, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(attention(x, x, x, mask=y, seqlens_k=y, out=x), Tensor)
    assert_type(attention(x, x, x, return_lse=True, lse_out=x), tuple[Tensor, Tensor])
    assert_type(attention(x, x, x, implementation="flash"), Tensor)
    assert_type(attention(x, x, x, implementation=("flash", "splitkv")), Tensor)
    assert_type(attention(unknown, unknown, unknown), Any)
    assert_type(scaled_dot_product_attention(x, x, x, None, 0.0, True), Tensor)
    assert_type(scaled_dot_product_attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cupyattn.flash_attn_func(x, x, x, causal=True), Tensor)
    assert_type(cupyattn.flash_attn_func(y, y, y, 0.0, None, True, (3, None)), Floats)
    assert_type(cupyattn.flash_attn_func(x, x, x, return_lse=True, seqlens_k=y), tuple[Tensor, Tensor])
    assert_type(cupyattn.flash_attn_func(x, x, x, return_attn_probs=True), tuple[Tensor, Tensor, Tensor | None])
    assert_type(cupyattn.flash_attn_func(x, x, x, return_lse=flag), Results)
    assert_type(cupyattn.flash_attn_qkvpacked_func(x), Tensor)
    assert_type(cupyattn.flash_attn_qkvpacked_func(x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cupyattn.flash_attn_kvpacked_func(x, x, out=x), Tensor)
    assert_type(cupyattn.flash_attn_varlen_func(x, x, x, y, y, 5, 5, block_table=y), Tensor)
    probs = cupyattn.flash_attn_varlen_func(x, x, x, y, y, 5, 5, return_attn_probs=True, block_table=y)
    assert_type(probs, tuple[Tensor, Tensor, Tensor | None])
    varlen = cupyattn.flash_attn_varlen_func
    assert_type(varlen(x, x, x, y, y, 5, 5, seqused_q=y, return_softmax_lse=True), tuple[Tensor, Tensor])
    assert_type(varlen(x, x, x, y, None, 5, 5, seqused_k=y, block_table=y), Tensor)
    assert_type(varlen(x, x, x, y, max_seqlen_q=5, max_seqlen_k=5, seqused_k=y, block_table=y), Tensor)
    assert_type(cupyattn.flash_attn_varlen_qkvpacked_func(x, y, 5, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cupyattn.flash_attn_varlen_kvpacked_func(x, x, y, y, 5, 5), Tensor)
    assert_type(cupyattn.flash_attn_with_kvcache(x, x, x, x, x, cache_seqlens=3, causal=True), Tensor)
    assert_type(cupyattn.flash_attn_with_kvcache(x, x, x, return_softmax_lse=True), tuple[Tensor, Tensor])
    assert_type(cupyattn.flash_attn_with_kvcache(x, x, x, return_softmax_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(cupyattn.explain(cupyattn.flash_attn_func, x, (1, 9, 4, 8), (1, 9, 4, 8), causal=True), Plan)
    assert_type(merge_states([x, x], [x, x]), tuple[Tensor, Tensor])
    assert_type(attention_backward(x, x, x, x), Gradients[Tensor])
    assert_type(attention_backward(x, x, x, x).dq, Tensor)
    assert_type(attention_backward(x, x, x, x).dbias, Tensor | None)
    assert_type(cupyattn.explain((1, 1, 4, 8), (1, 9, 4, 8), (1, 9, 4, 8), device="H100"), Plan)
    with cupyattn.implementations("numpy", "flash"):
        pass


def of_other_wings(x: Tensor, y: Floats, comm: ThreadComm, flag: bool) -> None:
    assert_type(cupyattn.linear_attention(x, x, x, rule="gated", decay=y), Tensor)
    assert_type(cupyattn.linear_attention(x, x, x, return_state=True), tuple[Tensor, Tensor])
    assert_type(cupyattn.linear_attention(x, x, x, return_state=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(cupyattn.linear_attention_backward(x, x, x, x).dbeta, Tensor | None)
    assert_type(cupyattn.cascade_attention(x, x, x, x, x), Tensor)
    assert_type(cupyattn.cascade_attention(x, x, x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cupyattn.apply_rotary_emb(x, y, y, True), Tensor)
    assert_type(cupyattn.apply_rotary_emb((x, x), y, y), tuple[Tensor, Tensor])
    assert_type(cupyattn.unpad_input(x, y), tuple[Tensor, Any, Any, int, Any])
    assert_type(cupyattn.pad_input(x, y, 2, 9), Tensor)
    assert_type(onnx.attention(x, x, x, is_causal=1), onnx.Outputs)
    assert_type(ring_attention(x, x, x, comm=comm, causal=True), Tensor)
    assert_type(ring_attention(x, x, x, comm=comm, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ulysses_attention(x, x, x, comm=comm), Tensor)
    assert_type(sharded_decode(x, x, x, comm=comm, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(sharded_decode(x, x, x, comm=comm, seqlens_q=[1, 2], return_lse=True), tuple[Tensor, Tensor])
    assert_type(ring_attention_backward(x, x, x, x, comm=comm), Gradients[Tensor])
    assert_type(explain((1, 9, 4, 8), (1, 9, 4, 8), (1, 9, 4, 8), size=2, device="H100"), DistributedPlan)
    assert_type(cupyattn.SlidingWindowCache(9).window, int)


def names_that_are_not_there() -> None:
    print(cupyattn.atention)  # type: ignore[attr-defined]
    print(cupyattn.peers.flash_atn_func)  # type: ignore[attr-defined]


def arrays_that_do_not_go_together_have_results_of_no_library(x: Tensor, y: Floats, comm: ThreadComm) -> None:
    attention(x, y, y).reshape(3)  # type: ignore[attr-defined]
    attention(x, x, y, return_lse=True)[0].reshape(3)  # type: ignore[attr-defined]
    attention_backward(y, x, x, x).dq.reshape(3)  # type: ignore[attr-defined]
    scaled_dot_product_attention(x, y, y).reshape(3)  # type: ignore[attr-defined]
    cupyattn.flash_attn_func(x, y, y).reshape(3)  # type: ignore[attr-defined]
    cupyattn.flash_attn_with_kvcache(x, y, y).reshape(3)  # type: ignore[attr-defined]
    merge_states([x], [y])[0].reshape(3)  # type: ignore[attr-defined]
    cupyattn.linear_attention(x, x, y).reshape(3)  # type: ignore[attr-defined]
    ring_attention(x, x, y, comm=comm).reshape(3)  # type: ignore[attr-defined]
    attention(x, x, x, out=y).reshape(3)  # type: ignore[attr-defined]


def what_is_no_array(x: Tensor) -> None:
    attention(1, 2, 3)  # type: ignore[call-overload]
    attention([1.0], [1.0], [1.0])  # type: ignore[call-overload]
    merge_states(1, [x])  # type: ignore[arg-type]
    attention(x, x)  # type: ignore[call-overload]


def words_and_numbers(x: Tensor) -> None:
    explain((1, 9, 4, 8), (1, 9, 4, 8), (1, 9, 4, 8), size=2, device=0)  # type: ignore[arg-type]
    attention(x, x, x, layout="thd")  # type: ignore[call-overload]
    attention(x, x, x, alignment="left")  # type: ignore[call-overload]
    attention(x, x, x, causal="yes")  # type: ignore[call-overload]
    attention(x, x, x, is_causal=True)  # type: ignore[call-overload]
    attention(x, x, x, implementation="flesh")  # type: ignore[arg-type]
    attention(x, x, x, implementation=("flash", "flesh"))  # type: ignore[arg-type]
    cupyattn.implementations("flesh")  # type: ignore[arg-type]
    cupyattn.flash_attn_func(x, x, x, causal="yes")  # type: ignore[call-overload]
    cupyattn.flash_attn_varlen_func(x, x, x, x, x)  # type: ignore[call-overload]
    cupyattn.flash_attn_varlen_func(x, x, x, x, max_seqlen_q=5, max_seqlen_k=5)  # type: ignore[call-overload]
    cupyattn.flash_attn_with_kvcache(1, 2, 3)  # type: ignore[call-overload]
    cupyattn.linear_attention(x, x, x, rule="mamba")  # type: ignore[call-overload]
    cupyattn.linear_attention(x, x, x, layout="thd")  # type: ignore[call-overload]
    cupyattn.apply_rotary_emb((x, x, x), x, x)  # type: ignore[arg-type]
    ring_attention(x, x, x)  # type: ignore[call-overload]
    ulysses_attention(x, x, x, comm=1)  # type: ignore[call-overload]


def results(x: Tensor) -> None:
    other: Floats = attention(x, x, x)  # type: ignore[arg-type]
    first = attention(x, x, x)[0]  # type: ignore[index]
    print(other, first)
