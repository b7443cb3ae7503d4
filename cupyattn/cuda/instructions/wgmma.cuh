// The tensor cores' instruction of a warpgroup, for every width; part of ptx90.cuh, which is what kernels include.
//
// PTX wants each of the N / 2 accumulators by name, and names are numbers here: accumulators come first, eight to a
// list, then what else the instruction takes. So each width is a line that names its last list and the numbers after.
#pragma once

#include "instructions/common.cuh"

namespace cupyattn::ptx {

template <int kBlocks>
struct Wgmma;  // of kBlocks times eight columns

// clang-format off
#define NAMES_16  "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_32  NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_48  NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_64  NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_80  NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_96  NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_112 NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_128 NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_144 NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_160 NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_176 NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_192 NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_208 NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_224 NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_240 NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_256 NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define BLOCK(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define SUMS_16  BLOCK(0), BLOCK(1)
#define SUMS_32  SUMS_16, BLOCK(2), BLOCK(3)
#define SUMS_48  SUMS_32, BLOCK(4), BLOCK(5)
#define SUMS_64  SUMS_48, BLOCK(6), BLOCK(7)
#define SUMS_80  SUMS_64, BLOCK(8), BLOCK(9)
#define SUMS_96  SUMS_80, BLOCK(10), BLOCK(11)
#define SUMS_112 SUMS_96, BLOCK(12), BLOCK(13)
#define SUMS_128 SUMS_112, BLOCK(14), BLOCK(15)
#define SUMS_144 SUMS_128, BLOCK(16), BLOCK(17)
#define SUMS_160 SUMS_144, BLOCK(18), BLOCK(19)
#define SUMS_176 SUMS_160, BLOCK(20), BLOCK(21)
#define SUMS_192 SUMS_176, BLOCK(22), BLOCK(23)
#define SUMS_208 SUMS_192, BLOCK(24), BLOCK(25)
#define SUMS_224 SUMS_208, BLOCK(26), BLOCK(27)
#define SUMS_240 SUMS_224, BLOCK(28), BLOCK(29)
#define SUMS_256 SUMS_240, BLOCK(30), BLOCK(31)

// p: whether the sums are added to; 1, 1: neither operand is negated.
#define INSTRUCTION(n, shape, left, right, accumulate, order)                            \
    "{ .reg .pred p; setp.ne.b32 p, %" #accumulate ", 0; wgmma.mma_async.sync.aligned.m64n" #n shape \
    " {" NAMES_##n "}, " left ", %" #right ", p, 1, 1" order "; }"
#define FROM_SHARED(n, shape, order, i, j, k, ...) \
    asm volatile(INSTRUCTION(n, shape, "%" #i, j, k, order) : SUMS_##n : "l"(a), "l"(b), "r"(added) __VA_ARGS__)
#define FROM_REGISTERS(n, shape, order, i, j, k, l, right, accumulate, ...)                                      \
    asm volatile(INSTRUCTION(n, shape, "{%" #i ", %" #j ", %" #k ", %" #l "}", right, accumulate, order)         \
                 : SUMS_##n : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(added) __VA_ARGS__)

#define WGMMA(n, i, j, k, l, o, p, q)                                                                            \
    template <>                                                                                                  \
    struct Wgmma<n / 8> {                                                                                        \
        template <typename Element, bool kByColumns>                                                             \
        DEVICE void multiply(float (&c)[n / 8][4], uint64 a, uint64 b, int added) {                              \
            if constexpr (Same<Element, Float8>::value)                                                          \
                FROM_SHARED(n, "k32.f32.e4m3.e4m3", "", i, j, k, );                                              \
            else if constexpr (Same<Element, BFloat16>::value)                                                   \
                FROM_SHARED(n, "k16.f32.bf16.bf16", ", 0, %" #l, i, j, k, , "n"(int(kByColumns)));               \
            else                                                                                                 \
                FROM_SHARED(n, "k16.f32.f16.f16", ", 0, %" #l, i, j, k, , "n"(int(kByColumns)));                 \
        }                                                                                                        \
        template <typename Element, bool kByColumns>                                                             \
        DEVICE void multiply(float (&c)[n / 8][4], const uint32 (&a)[4], uint64 b, int added) {                  \
            if constexpr (Same<Element, Float8>::value)                                                          \
                FROM_REGISTERS(n, "k32.f32.e4m3.e4m3", "", i, j, k, l, o, p, );                                  \
            else if constexpr (Same<Element, BFloat16>::value)                                                   \
                FROM_REGISTERS(n, "k16.f32.bf16.bf16", ", %" #q, i, j, k, l, o, p, , "n"(int(kByColumns)));      \
            else                                                                                                 \
                FROM_REGISTERS(n, "k16.f32.f16.f16", ", %" #q, i, j, k, l, o, p, , "n"(int(kByColumns)));        \
        }                                                                                                        \
    };

WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef WGMMA
#undef FROM_REGISTERS
#undef FROM_SHARED
#undef INSTRUCTION
#undef BLOCK
// clang-format on

}  // namespace cupyattn::ptx
