"""Numbers in registers: integers, floats, bits, comparisons, conversions and moves (9.7.1 to 9.7.9.4).

Integers are expressions of C++, wherein -fwrapv lets sums wrap; floats are functions of the runtime.
"""

import re

from ptx.signatures import calls

HALVES, WORDS, LONGS = ("s16", "u16"), ("s32", "u32"), ("s64", "u64")
INTEGERS = (*HALVES, *WORDS, *LONGS)


def bits_of(kind):
    """The C++ type of a register of that type, and its bits: ("u32", 32)."""
    return f"u{kind[1:]}", int(kind[1:])


def number_of(kind):
    """The C++ type of a number of that type: bits count as unsigned."""
    return kind if kind[0] == "s" else bits_of(kind)[0]


def wide(kind):
    """Twice as wide."""
    size = 2 * bits_of(kind)[1]
    return f"{kind[0]}{size}" if size <= 64 else {"s": "__int128", "u": "unsigned __int128"}[kind[0]]


# ---- Integers (9.7.1), logic (9.7.8), selection (9.7.6.3) ------------------------------------------------------------


def expression(text, kind, to=None, operands=("", "", "")):
    """What writes an expression of numbers a, b and c, of `kind` or of the types in `operands`; W is twice as wide.

    The result is of the type `to`, by default `kind`.
    """
    names = sorted(set(re.findall(r"\b[abc]\b", text)))

    def write(body, given):
        if len(given) != 1 + len(names):
            raise body.unknown(f"{len(given)} operands")
        read = {}
        for name, operand in zip(names, given[1:], strict=True):
            own = operands["abc".index(name)] or kind
            if own == "pred":
                read[name] = body.value(operand, "bool")
            else:
                read[name] = f"({number_of(own)}){body.value(operand, bits_of(own)[0])}"
        result = "bool" if (to or kind) == "pred" else bits_of(to or kind)[0]
        read["W"] = wide(kind) if "W" in text else ""
        value = re.sub(r"\b[abcW]\b", lambda met: read[met[0]], text)
        return f"{body.register(given[0], result)} = ({result})({value});"

    return write


def expressions(name, text, kinds, **more):
    return {f"{name}.{kind}": expression(text, kind, **more) for kind in kinds}


BITWISE = ("b16", "b32", "b64")
FORMS = {
    **expressions("add", "a + b", INTEGERS),  # 9.7.1.1
    **expressions("sub", "a - b", INTEGERS),  # 9.7.1.2
    **expressions("mul.lo", "a * b", INTEGERS),  # 9.7.1.3
    "mul.hi.s32": expression("(W)a * (W)b >> 32", "s32"),
    "mul.hi.u32": expression("(W)a * (W)b >> 32", "u32"),
    "mul.hi.s64": expression("(W)a * (W)b >> 64", "s64"),
    "mul.hi.u64": expression("(W)a * (W)b >> 64", "u64"),
    **{f"mul.wide.{kind}": expression("(W)a * (W)b", kind, to=wide(kind)) for kind in (*HALVES, *WORDS)},
    **expressions("mad.lo", "a * b + c", INTEGERS),  # 9.7.1.4
    **{
        f"mad.wide.{kind}": expression("(W)a * (W)b + c", kind, to=wide(kind), operands=("", "", wide(kind)))
        for kind in WORDS
    },
    **expressions("min", "a < b ? a : b", INTEGERS),  # 9.7.1.12
    **expressions("max", "a > b ? a : b", INTEGERS),  # 9.7.1.13
    **expressions("neg", "-a", ("s32", "s64")),  # 9.7.1.11
    **expressions("abs", "a < 0 ? -a : a", ("s32", "s64")),  # 9.7.1.10
    **expressions("and", "a & b", (*BITWISE, "pred")),  # 9.7.8.1
    **expressions("or", "a | b", (*BITWISE, "pred")),  # 9.7.8.2
    **expressions("xor", "a ^ b", (*BITWISE, "pred")),  # 9.7.8.3
    **expressions("not", "~a", BITWISE),  # 9.7.8.4
    "not.pred": expression("!a", "pred"),
    **expressions("selp", "c ? a : b", (*BITWISE, *INTEGERS, "f32", "f64"), operands=("", "", "pred")),  # 9.7.6.3
    # 9.7.8.8, 9.7.8.9: a shift by more than there are bits shifts all of them out, or is the sign
    "shl.b16": expression("shl_b32(a, c)", "b16", operands=("", "", "u32")),
    "shr.b16": expression("shr_u32(a, c)", "b16", operands=("", "", "u32")),
    "shr.u16": expression("shr_u32(a, c)", "u16", operands=("", "", "u32")),
    "shr.s16": expression("shr_s32(a, c)", "s16", operands=("", "", "u32")),
}
FORMS |= calls(
    {
        # 9.7.1.8, 9.7.1.9
        **{f"div.{kind}": f"u{kind[1:]} = div_{kind}(thread, u{kind[1:]}, u{kind[1:]})" for kind in (*WORDS, *LONGS)},
        **{f"rem.{kind}": f"u{kind[1:]} = rem_{kind}(thread, u{kind[1:]}, u{kind[1:]})" for kind in (*WORDS, *LONGS)},
        # 9.7.8.8, 9.7.8.9
        "shl.b32": "u32 = shl_b32(u32, u32)",
        "shl.b64": "u64 = shl_b64(u64, u32)",
        "shr.b32": "u32 = shr_u32(u32, u32)",
        "shr.u32": "u32 = shr_u32(u32, u32)",
        "shr.s32": "u32 = shr_s32(u32, u32)",
        "shr.b64": "u64 = shr_u64(u64, u32)",
        "shr.u64": "u64 = shr_u64(u64, u32)",
        "shr.s64": "u64 = shr_s64(u64, u32)",
        "clz.b32": "u32 = clz_b32(u32)",  # 9.7.1.16
        "brev.b32": "u32 = brev_b32(u32)",  # 9.7.1.18
        "bfe.u32": "u32 = bfe_u32(u32, u32, u32)",  # 9.7.1.19
        "bfi.b32": "u32 = bfi_b32(u32, u32, u32, u32)",  # 9.7.1.20
        "bfi.b64": "u64 = bfi_b64(u64, u64, u32, u32)",
        "lop3.b32": "u32 = lop3_b32(u32, u32, u32, constant)",  # 9.7.8.6
        "prmt.b32": "u32 = prmt_b32(u32, u32, u32)",  # 9.7.9.7
        # Single precision (9.7.3); add, sub, mul and fma round to nearest unless they say otherwise
        "add.f32": "u32 = add_rn_f32(u32, u32)",
        "add.rn.f32": "u32 = add_rn_f32(u32, u32)",
        "add.ftz.f32": "u32 = add_rn_ftz_f32(u32, u32)",
        "add.rn.ftz.f32": "u32 = add_rn_ftz_f32(u32, u32)",
        "add.rm.ftz.f32": "u32 = add_rm_ftz_f32(u32, u32)",
        "sub.ftz.f32": "u32 = sub_rn_ftz_f32(u32, u32)",
        "sub.rn.ftz.f32": "u32 = sub_rn_ftz_f32(u32, u32)",
        "mul.ftz.f32": "u32 = mul_rn_ftz_f32(u32, u32)",
        "mul.rn.ftz.f32": "u32 = mul_rn_ftz_f32(u32, u32)",
        "fma.rn.ftz.f32": "u32 = fma_rn_ftz_f32(u32, u32, u32)",
        "div.rn.ftz.f32": "u32 = div_rn_ftz_f32(u32, u32)",
        "div.approx.ftz.f32": "u32 = div_approx_ftz_f32(u32, u32)",
        "rcp.rn.ftz.f32": "u32 = rcp_rn_ftz_f32(u32)",
        "rcp.approx.ftz.f32": "u32 = rcp_approx_ftz_f32(u32)",
        "neg.ftz.f32": "u32 = neg_ftz_f32(u32)",
        "abs.ftz.f32": "u32 = abs_ftz_f32(u32)",
        "max.ftz.f32": "u32 = max_ftz_f32(u32, u32)",
        "min.ftz.f32": "u32 = min_ftz_f32(u32, u32)",
        "ex2.approx.ftz.f32": "u32 = ex2_approx_ftz_f32(u32)",
        "lg2.approx.ftz.f32": "u32 = lg2_approx_ftz_f32(u32)",
        "tanh.approx.f32": "u32 = tanh_approx_f32(u32)",
        # Half precision (9.7.4), pairs
        "fma.rn.f16x2": "u32 = fma_rn_f16x2(u32, u32, u32)",
        "fma.rn.bf16x2": "u32 = fma_rn_bf16x2(u32, u32, u32)",
        # Conversions that round (9.7.9.21)
        "cvt.rn.bf16x2.f32": "u32 = cvt_rn_bf16x2_f32(u32, u32)",
        "cvt.rn.f16x2.f32": "u32 = cvt_rn_f16x2_f32(u32, u32)",
        "cvt.rn.satfinite.e4m3x2.f32": "u16 = cvt_rn_satfinite_e4m3x2_f32(u32, u32)",
        "cvt.rn.f16x2.e4m3x2": "u32 = cvt_rn_f16x2_e4m3x2(u16)",
        "cvt.f32.f16": "u32 = cvt_f32_f16(u16)",
        "cvt.f64.f32": "u64 = cvt_f64_f32(u32)",
        "cvt.ftz.f64.f32": "u64 = cvt_ftz_f64_f32(u32)",
        "cvt.rn.ftz.f32.f64": "u32 = cvt_rn_ftz_f32_f64(u64)",
        "cvt.rzi.ftz.u32.f32": "u32 = cvt_rzi_ftz_u32_f32(u32)",
        "cvt.rzi.ftz.s32.f32": "u32 = cvt_rzi_ftz_s32_f32(u32)",
        "cvt.rn.f32.s32": "u32 = cvt_rn_f32_s32(u32)",
        "cvt.rn.f32.u32": "u32 = cvt_rn_f32_u32(u32)",
        "cvt.rn.f32.s64": "u32 = cvt_rn_f32_s64(u64)",
        "cvt.rn.f32.u16": "u32 = cvt_rn_f32_u16(u16)",
    }
)


# ---- Comparison (9.7.6.2) --------------------------------------------------------------------------------------------

SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OF_FLOATS = (*SIGNS, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
COMBINED = {"": "", "and.": "&", "or.": "|", "xor.": "^"}


def set_predicate(compared, combined):
    """`compared` is an expression of a and b, whose type it begins with; the predicate behind them is `combined`."""
    kind, text = compared

    def write(body, operands):
        if len(operands) != 3 + bool(combined):
            raise body.unknown(f"{len(operands)} operands")
        bits = bits_of(kind)[0]
        a, b = (body.value(operand, bits) for operand in operands[1:3])
        found = text.format(a=f"({number_of(kind)}){a}", b=f"({number_of(kind)}){b}")
        if combined:
            found = f"({found}) {combined} {body.value(operands[3], 'bool')}"
        return f"{body.register(operands[0], 'bool')} = {found};"

    return write


def comparisons():
    for word, sign in COMBINED.items():
        for name, operator in SIGNS.items():
            for kind in (*INTEGERS, *(BITWISE if name in ("eq", "ne") else ())):
                yield f"setp.{name}.{word}{kind}", set_predicate((kind, f"{{a}} {operator} {{b}}"), sign)
        for name in OF_FLOATS:
            for ftz in ("", "ftz."):
                text = f"setp_f32(Compare::{name}, {'true' if ftz else 'false'}, {{a}}, {{b}})"
                yield f"setp.{name}.{word}{ftz}f32", set_predicate(("f32", text), sign)


FORMS |= dict(comparisons())


# ---- Moves (9.7.9.3, 9.7.9.4) ----------------------------------------------------------------------------------------


def move(kind):
    """Also of an address, and of a vector into its sum or back."""
    bits = "bool" if kind == "pred" else bits_of(kind)[0]

    def write(body, operands):
        if len(operands) != 2:
            raise body.unknown(f"{len(operands)} operands")
        to, given = operands
        if to.startswith("{") and bits != "bool":
            parts = split(body, to)
            stores = (f"{body.register(x, part)} = ({part})(whole >> {at});" for x, part, at in parts)
            return f"{{ const {bits} whole = {body.value(given, bits)}; {' '.join(stores)} }}"
        if given.startswith("{") and bits != "bool":
            terms = (f"({bits}){body.value(x, part)} << {at}" for x, part, at in split(body, given))
            return f"{body.register(to, bits)} = {' | '.join(terms)};"
        return f"{body.register(to, bits)} = {body.value(given, bits)};"

    def split(body, text):
        """Each element with its type and the number of its first bit."""
        count = text.count(",") + 1
        size = bits_of(kind)[1] // count
        if count not in (2, 4) or size < 8:
            raise body.unknown("a vector of so many")
        return [(element, f"u{size}", i * size) for i, element in enumerate(body.vector(text, count))]

    return write


def convert(to, given):
    """Between integers (9.7.9.21): low bits, or the sign's or zeros before; registers may be wider than their type."""

    def write(body, operands):
        if len(operands) != 2:
            raise body.unknown(f"{len(operands)} operands")
        wide_to, bits_to = body.any_register(operands[0])
        wide_given, bits_given = body.any_register(operands[1])
        if int(bits_to[1:]) < bits_of(to)[1] or int(bits_given[1:]) < bits_of(given)[1]:
            raise body.unknown("a register narrower than its type")
        return f"{wide_to} = ({bits_to})({number_of(to)})({number_of(given)}){wide_given};"

    return write


FORMS |= {f"mov.{kind}": move(kind) for kind in (*BITWISE, *INTEGERS, "f32", "f64", "pred")}
OF_CVT = ("s8", "u8", *INTEGERS)
FORMS |= {f"cvt.{to}.{given}": convert(to, given) for to in OF_CVT for given in OF_CVT if to != given}
