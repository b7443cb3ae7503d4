"""Reading what a caller asked for into a `Problem`, and refusing what cannot be meant.

Every refusal names the function, the argument as the caller knows it, the rule, and what came, with
shapes aligned.

refusals    how that is worded
words       arguments that a function does not take, and keywords of others
scalars     numbers, flags and choices, one by one
options     all of them together
sizes       the sizes of a problem, from shapes
turned      heads and sequence exchanged: a warning, or a hint
call        the whole call: options, shapes and dtypes into a Problem
seqlens     lengths of the sequences in dense arrays
sequences   values of index arrays, where they can be seen
"""

from cupyattn.reading.call import check_results, read
from cupyattn.reading.options import Options, attention_options
from cupyattn.reading.refusals import (
    AXES,
    DESCALES,
    INDICES,
    LARGEST_RESULT,
    LARGEST_SIZE,
    expect,
    int32_rule,
    refusal,
    short,
    span,
)
from cupyattn.reading.scalars import (
    choice,
    compute_dtype,
    dropout_p,
    dropout_seed,
    dtype_name,
    flag,
    integer,
    integers,
    is_one_number,
    known,
    number,
    softcap,
    softmax_scale,
    split_size,
    window,
)
from cupyattn.reading.seqlens import check_lengths
from cupyattn.reading.sequences import check_sequences
from cupyattn.reading.words import in_our_words, wrong_call

__all__ = [
    "AXES",
    "DESCALES",
    "INDICES",
    "LARGEST_RESULT",
    "LARGEST_SIZE",
    "Options",
    "attention_options",
    "check_lengths",
    "check_results",
    "check_sequences",
    "choice",
    "compute_dtype",
    "dropout_p",
    "dropout_seed",
    "dtype_name",
    "expect",
    "flag",
    "in_our_words",
    "int32_rule",
    "integer",
    "integers",
    "is_one_number",
    "known",
    "number",
    "read",
    "refusal",
    "short",
    "softcap",
    "softmax_scale",
    "span",
    "split_size",
    "window",
    "wrong_call",
]
