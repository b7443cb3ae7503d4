// Matrices of a warpgroup's products in shared memory: descriptors and layouts (9.7.15.5.1).
#pragma once
#include "products.h"

constexpr u32 kMostDepth = 32;  // K
constexpr u32 kDepthBytes = 32;

struct Descriptor {
    u32 start, leading, stride;
    u32 row_bytes;  // of the swizzle's pattern; 16: none
};
constexpr u64 kDescriptorZeros = 0x3ff1c000c000c000;

static Descriptor read_descriptor(Thread& thread, u64 bits) {
    if (bits & kDescriptorZeros) fail(thread, "descriptor %#lx: bits that must be 0", (unsigned long)bits);
    if (bits >> 49 & 7) fail(thread, "descriptor %#lx: a base offset", (unsigned long)bits);
    static const u32 kRowBytes[4] = {16, 128, 64, 32};
    Descriptor descriptor;
    descriptor.start = (bits & 0x3fff) << 4;
    descriptor.leading = (bits >> 16 & 0x3fff) << 4;
    descriptor.stride = (bits >> 32 & 0x3fff) << 4;
    descriptor.row_bytes = kRowBytes[bits >> 62];
    const u32 row_in_pattern = descriptor.start >> 7 & (descriptor.row_bytes / kChunkBytes - 1);
    if (row_in_pattern) fail(thread, "descriptor %#lx begins within the swizzle's pattern", (unsigned long)bits);
    return descriptor;
}

// Where the 16 bytes are that hold element (row, k). A core matrix is 8 rows of 16 bytes, or of a swizzle's width.
// K contiguous: `stride` leads to the next 8 rows, `leading`, where nothing is swizzled, to the next 16 bytes of K.
static u32 chunk_along_k(const Descriptor& descriptor, u32 row, u32 k, u32 itemsize) {
    const u32 chunk = k * itemsize / kChunkBytes;
    const u32 row_start = descriptor.start + row % 8 * descriptor.row_bytes + row / 8 * descriptor.stride;
    if (descriptor.row_bytes == kChunkBytes) return row_start + chunk * descriptor.leading;
    return swizzled(row_start + chunk * kChunkBytes, descriptor.row_bytes);
}
// Transposed, M or N is contiguous. Where it is swizzled, `leading` leads to the next row of a pattern's width,
// `stride` to the next 8 of K; without a swizzle they change places.
static u32 chunk_along_rows(const Descriptor& descriptor, u32 row, u32 k, u32 itemsize) {
    const u32 chunk = row * itemsize / kChunkBytes;
    const u32 per_row = descriptor.row_bytes / kChunkBytes;
    const u32 k_start = descriptor.start + k % 8 * descriptor.row_bytes;
    if (per_row == 1) return k_start + chunk * descriptor.stride + k / 8 * descriptor.leading;
    const u32 address =
        k_start + chunk % per_row * kChunkBytes + chunk / per_row * descriptor.leading + k / 8 * descriptor.stride;
    return swizzled(address, descriptor.row_bytes);
}

static u32 itemsize_of(Number number) { return number == Number::e4m3 ? 1 : 2; }
static float value_at(Number number, const u8* place) {
    switch (number) {
        case Number::f16: return half_value(read<u16>(place));
        case Number::bf16: return bfloat16_value(read<u16>(place));
        case Number::e4m3: return e4m3_value(*place);
    }
    __builtin_unreachable();
}

struct SharedMatrix {
    u64 descriptor;
    bool transposes;
    Number number;
    s32 sign;
    u32 first_row, rows;
};
// `visit(row, k, address)` for each 16 bytes.
template <typename Visit>
static void each_matrix_chunk(Thread& thread, const SharedMatrix& matrix, const Visit& visit) {
    const Descriptor descriptor = read_descriptor(thread, matrix.descriptor);
    const u32 itemsize = itemsize_of(matrix.number);
    const u32 per_chunk = kChunkBytes / itemsize;
    const u32 depth = kDepthBytes / itemsize;
    const u32 row_step = matrix.transposes ? per_chunk : 1;
    const u32 k_step = matrix.transposes ? 1 : per_chunk;
    for (u32 row = matrix.first_row; row < matrix.first_row + matrix.rows; row += row_step)
        for (u32 k = 0; k < depth; k += k_step)
            visit(row, k,
                  matrix.transposes ? chunk_along_rows(descriptor, row, k, itemsize)
                                    : chunk_along_k(descriptor, row, k, itemsize));
}
// `values[k][row]`
template <u32 kRows>
static void read_matrix(Thread& thread, const SharedMatrix& matrix, float (&values)[kMostDepth][kRows]) {
    const u32 itemsize = itemsize_of(matrix.number);
    each_matrix_chunk(thread, matrix, [&](u32 row, u32 k, u32 address) {
        const u8* place = async_read(thread, address, kChunkBytes, "wgmma");
        for (u32 item = 0; item < kChunkBytes / itemsize; ++item) {
            const float value = matrix.sign * value_at(matrix.number, place + item * itemsize);
            const u32 column = row - matrix.first_row;
            if (matrix.transposes) {
                values[k][column + item] = value;
            } else {
                values[k + item][column] = value;
            }
        }
    });
}
