// Names that NVRTC does not bring: no standard header is included anywhere, so that none has to be found.
#pragma once

namespace cupyattn {

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define DEVICE_APART static __device__ __noinline__  // registers and machine code of its own

// Numbers of 16 and 8 bits travel as bits; these name what the bits mean.
struct Half {
    uint16 bits;
};
struct BFloat16 {
    uint16 bits;
};
struct Float8 {  // e4m3: no infinities, 448 is the largest
    uint8 bits;
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kLargest = 0x7fffffff;
constexpr float kLowest = -3.4028234664e38f;        // of the finite ones
constexpr float kLeastNormal = 1.1754943508e-38f;  // above zero

DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

template <typename A, typename B>
struct Same {
    static constexpr bool value = false;
};
template <typename A>
struct Same<A, A> {
    static constexpr bool value = true;
};

template <bool kFirst, typename First, typename Second>
struct Choice {
    using Type = First;
};
template <typename First, typename Second>
struct Choice<false, First, Second> {
    using Type = Second;
};

}  // namespace cupyattn
