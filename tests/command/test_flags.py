"""What flags may say, and the sentence where they say something else."""

from argparse import ArgumentTypeError

import pytest

from cupyattn.command import flags


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (flags.positive, "12", 12),
        (flags.number, "0", 0.0),
        (flags.number, "2.5e1", 25.0),
        (flags.several(flags.positive), "2,1,2", (2, 1)),
        (flags.target, "sm_90a", "sm_90a"),
        (flags.device, "h100", "H100"),
        (flags.device, "CPU", "cpu"),
        (flags.window, "512,0", (512, 0)),
        (flags.window, "-1,3", (None, 3)),
    ],
)
def test_what_a_flag_says_is_read(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (flags.positive, "0", "'0' is not a positive number"),
        (flags.positive, "-3", "'-3' is not a positive number"),
        (flags.positive, "1.5", "'1.5' is not a positive number"),
        (flags.number, "nan", "'nan' is not a number that is 0 or more"),
        (flags.number, "inf", "'inf' is not a number that is 0 or more"),
        (flags.number, "-1", "'-1' is not a number that is 0 or more"),
        (flags.several(flags.positive), "1,", "'' is not a positive number"),
        (flags.target, "sm_75", "sm_75: the kernels need sm_80 or newer (Ampere)"),
        (flags.device, "GTX", "'GTX' is none of cpu, A100"),
        (flags.window, "512", "'512' is not LEFT,RIGHT, like 512,0"),
        (flags.window, "-2,0", "'-2,0' is not LEFT,RIGHT"),
    ],
)
def test_what_a_flag_cannot_say_gets_a_sentence(read, text, sentence):
    with pytest.raises(ArgumentTypeError) as caught:
        read(text)
    assert str(caught.value).startswith(sentence)
