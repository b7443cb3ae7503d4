// Products of a warp, and the moves of their operands (9.7.14).
//
// Sums are made in float64 and rounded once; a GPU's differ by what the order of its additions costs.
#pragma once
#include "tensor.h"

// ---- mma.m16n8k16 (9.7.14.5.8) --------------------------------------------------------------------------------------
// Lane = 4 * row + column: it holds of A the pairs of columns 2 * column and 8 more, in rows row and row + 8; of B the
// same pairs of rows, in column `row`; of C and D pairs of columns.

struct WarpProduct {
    u32* d;
    const u32 *a, *b, *c;
};
template <Number kNumber>
static float small_value(u16 bits) {
    return kNumber == Number::f16 ? half_value(bits) : bfloat16_value(bits);
}
template <Number kNumber>
static void multiply_fragments(const Warp& warp) {
    float a[16][16];
    float b[16][8];
    for (u32 lane = 0; lane < kLanes; ++lane) {
        const WarpProduct& mine = brought<WarpProduct>(warp, lane);
        const u32 row = lane / 4;
        const u32 column = lane % 4 * 2;
        for (u32 item = 0; item < 8; ++item) {
            const u16 bits = mine.a[item / 2] >> item % 2 * 16;
            a[row + item / 2 % 2 * 8][column + item % 2 + item / 4 * 8] = small_value<kNumber>(bits);
        }
        for (u32 item = 0; item < 4; ++item) {
            const u16 bits = mine.b[item / 2] >> item % 2 * 16;
            b[column + item % 2 + item / 2 * 8][row] = small_value<kNumber>(bits);
        }
    }
    for (u32 lane = 0; lane < kLanes; ++lane) {
        const WarpProduct& mine = brought<WarpProduct>(warp, lane);
        for (u32 item = 0; item < 4; ++item) {
            const u32 row = lane / 4 + item / 2 * 8;
            const u32 column = lane % 4 * 2 + item % 2;
            double sum = float_of(mine.c[item]);
            for (u32 k = 0; k < 16; ++k) sum += (double)a[row][k] * b[k][column];
            mine.d[item] = result_of((float)sum);
        }
    }
}
void mma_m16n8k16_f16(Thread& thread, int site, u32* d, const u32* a, const u32* b, const u32* c) {
    WarpProduct mine{d, a, b, c};
    together(thread, site, "mma", &mine, [](Warp& warp) { multiply_fragments<Number::f16>(warp); });
}
void mma_m16n8k16_bf16(Thread& thread, int site, u32* d, const u32* a, const u32* b, const u32* c) {
    WarpProduct mine{d, a, b, c};
    together(thread, site, "mma", &mine, [](Warp& warp) { multiply_fragments<Number::bf16>(warp); });
}

// ---- ldmatrix, stmatrix (9.7.14.5.15, 9.7.14.5.16) ------------------------------------------------------------------
// Four matrices of 8 rows of 16 bytes. Lane 8 * matrix + row brings a row's address; lane 4 * row + pair gets, or
// gives, a pair of columns of each matrix, of its transpose if that is asked for.

struct MatrixMove {
    u32 address;
    u32* registers;
};
typedef u16 Matrix[8][8];

static u32 pair_in(const Matrix& matrix, u32 lane, bool transposes) {
    const u32 row = lane / 4;
    const u32 column = lane % 4 * 2;
    if (transposes) return pair_of(matrix[column + 1][row], matrix[column][row]);
    return pair_of(matrix[row][column + 1], matrix[row][column]);
}
static void put_pair(Matrix& matrix, u32 lane, bool transposes, u32 pair) {
    const u32 row = lane / 4;
    const u32 column = lane % 4 * 2;
    for (u32 half = 0; half < 2; ++half) {
        const u16 bits = pair >> 16 * half;
        if (transposes) {
            matrix[column + half][row] = bits;
        } else {
            matrix[row][column + half] = bits;
        }
    }
}
// A row's access is that of the lane that brought its address.
static u8* matrix_row(const Warp& warp, u32 row, u32 line, bool writes) {
    Thread& lane = *warp.lanes[row];
    lane.line = line;
    return shared_at_once(lane, brought<MatrixMove>(warp, row).address, sizeof(Matrix) / 8, writes);
}
void ldmatrix_x4(Thread& thread, int site, bool transposes, u32 address, u32* to) {
    MatrixMove mine{address, to};
    preempt(thread);
    together(thread, site, "ldmatrix", &mine, [&](Warp& warp) {
        Matrix matrices[4];
        for (u32 row = 0; row < kLanes; ++row)
            memcpy(matrices[row / 8][row % 8], matrix_row(warp, row, thread.line, false), sizeof(Matrix) / 8);
        for (u32 lane = 0; lane < kLanes; ++lane)
            for (u32 matrix = 0; matrix < 4; ++matrix)
                brought<MatrixMove>(warp, lane).registers[matrix] = pair_in(matrices[matrix], lane, transposes);
    });
}
void stmatrix_x4(Thread& thread, int site, bool transposes, u32 address, const u32* from) {
    MatrixMove mine{address, const_cast<u32*>(from)};
    preempt(thread);
    together(thread, site, "stmatrix", &mine, [&](Warp& warp) {
        Matrix matrices[4];
        for (u32 lane = 0; lane < kLanes; ++lane)
            for (u32 matrix = 0; matrix < 4; ++matrix)
                put_pair(matrices[matrix], lane, transposes, brought<MatrixMove>(warp, lane).registers[matrix]);
        for (u32 row = 0; row < kLanes; ++row)
            memcpy(matrix_row(warp, row, thread.line, true), matrices[row / 8][row % 8], sizeof(Matrix) / 8);
    });
}
