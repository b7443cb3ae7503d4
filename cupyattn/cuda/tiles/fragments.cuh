// What tensor cores work on: fragments in a warp's registers, and the products of what lies there and in tiles.
//
// Nothing here knows of attention.
#pragma once

#include "tiles/numbers.cuh"

namespace cupyattn {

// 16 rows x kCols of float32 sums, spread over a warp as mma.sync leaves them: element [block][i] of a lane is
// row lane / 4 + 8 * (i / 2), column 8 * block + 2 * (lane % 4) + i % 2.
template <int kCols>
struct Accumulator {
    static constexpr int kBlocks = kCols / 8;
    float value[kBlocks][4];

    DEVICE_METHOD void clear() {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[block][i] = 0.f;
    }
    DEVICE_METHOD static int row(int half) { return ptx::lane() / 4 + 8 * half; }
    DEVICE_METHOD static int first_column() { return 2 * (ptx::lane() % 4); }
    DEVICE_METHOD static constexpr int column(int block, int i) { return 8 * block + i % 2; }  // beyond first_column()

    DEVICE_METHOD void scale_rows(const float (&factor)[2]) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[block][i] *= factor[i / 2];
    }
    // As many columns as `part` has, from `first` on: their rows scaled, and `part` added to them.
    template <int kPartCols>
    DEVICE_METHOD void scale_rows_and_add(const float (&factor)[2], const Accumulator<kPartCols>& part, int first) {
#pragma unroll
        for (int block = 0; block < kPartCols / 8; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = value[first / 8 + block][i];
                x = ptx::fma(x, factor[i / 2], part.value[block][i]);
            }
    }
    // 0, or nan if any of this lane's sums, or of those of one of its two rows, is nan or inf.
    template <int kFirst = 0, int kLast = 3>
    DEVICE_METHOD float times_zero() const {
        float probe = 0.f;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = kFirst; i <= kLast; ++i) probe = ptx::fma(value[block][i], 0.f, probe);
        return probe;
    }
};

// 16 rows x kCols as the left operand of a product, in 16-bit planes.
template <typename Element, int kCols>
struct Fragment {
    uint32 value[kCols / 16][Planes<Element>::kCount][4];

    // The sums of one product are the operand of the next, as they lie: no lane has to ask another.
    DEVICE_METHOD void round_from(const Accumulator<kCols>& from) {
#pragma unroll
        for (int block = 0; block < kCols / 8; ++block) round_eight(from.value[block], block);
    }
    // Those of eight columns.
    DEVICE_METHOD void round_eight(const float (&sums)[4], int block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float low = sums[2 * half], high = sums[2 * half + 1];
            const int i = block % 2 * 2 + half;
            if constexpr (Same<Element, float>::value) {
                uint32 planes[3];
                split_pair(low, high, planes);
#pragma unroll
                for (int plane = 0; plane < 3; ++plane) value[block / 2][plane][i] = planes[plane];
            } else {
                value[block / 2][0][i] = ptx::pack<Element>(low, high);
            }
        }
    }
};

// Where a lane finds its part of the left operand: 16 rows from `first_row`.
template <typename Tile>
DEVICE uint32 left_operand(const Tile& tile, int first_row) {
    return tile.address(first_row + ptx::lane() % 16, ptx::lane() / 16);
}
// Of a tile whose rows are the columns of the product (keys): 16 of them from row 0.
template <typename Tile>
DEVICE uint32 right_operand_by_rows(const Tile& tile) {
    return tile.address(ptx::lane() % 8 + ptx::lane() / 16 * 8, ptx::lane() / 8 % 2);
}
// Of a tile whose rows are summed over (values): 16 of them from row 0.
template <typename Tile>
DEVICE uint32 right_operand_by_columns(const Tile& tile) {
    return tile.address(ptx::lane() % 16, ptx::lane() / 16);
}

// Columns [16 * step, 16 * step + 16) of the left operand, all planes.
template <typename Element, typename Tile>
DEVICE void load_fragment(uint32 (&to)[Planes<Element>::kCount][4], uint32 left, int step) {
#pragma unroll
    for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
        ptx::load_matrices(to[plane], Tile::advance(left, step) + plane * Tile::kPlane);
}

// sums += left x right, 16 x 16 x 16, over the planes whose products matter.
template <typename Element>
DEVICE void multiply_planes(float (&first)[4], float (&second)[4], const uint32 (&left)[Planes<Element>::kCount][4],
                            const uint32 (&right)[4], int right_plane) {
    using Number = typename Planes<Element>::Number;
#pragma unroll
    for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
        if (plane + right_plane < Planes<Element>::kCount) {
            ptx::multiply_add<Number>(first, left[plane], right[0], right[1]);
            ptx::multiply_add<Number>(second, left[plane], right[2], right[3]);
        }
}

// sums[m] = rows `first_row(m)` and on of the left tile, times the rows of the right one: both lie in memory by the axis
// that is summed over.
template <typename Element, typename Left, typename Right, int kRowTiles, int kCols, typename FirstRow>
DEVICE void multiply_rows(Accumulator<kCols> (&sums)[kRowTiles], const Left& left, const Right& right,
                          const FirstRow& first_row) {
    const uint32 from = right_operand_by_rows(right);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) sums[m].clear();
#pragma unroll
    for (int step = 0; step < Left::kCols / 16; ++step) {
        uint32 rows[kRowTiles][Planes<Element>::kCount][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
            load_fragment<Element, Left>(rows[m], left_operand(left, first_row(m)), step);
#pragma unroll
        for (int pair = 0; pair < kCols / 16; ++pair)
#pragma unroll
            for (int plane = 0; plane < Planes<Element>::kCount; ++plane) {
                uint32 columns[4];
                ptx::load_matrices(columns, Right::advance(from, step) + plane * Right::kPlane + Right::down(pair));
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    multiply_planes<Element>(sums[m].value[2 * pair], sums[m].value[2 * pair + 1], rows[m], columns,
                                             plane);
            }
    }
}

// out[m] += weights[m] x values, for a tile of values as it lies in memory.
template <typename Tile, typename Element, int kRowTiles, int kKeys, int kCols>
DEVICE void multiply_values(Accumulator<kCols> (&out)[kRowTiles], const Fragment<Element, kKeys> (&weights)[kRowTiles],
                            uint32 right) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
        for (int pair = 0; pair < kCols / 16; ++pair)
#pragma unroll
            for (int plane = 0; plane < Planes<Element>::kCount; ++plane) {
                uint32 values[4];
                ptx::load_matrices_transposed(values,
                                              Tile::advance(right, pair) + plane * Tile::kPlane + Tile::down(step));
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    multiply_planes<Element>(out[m].value[2 * pair], out[m].value[2 * pair + 1], weights[m].value[step],
                                             values, plane);
            }
}

}  // namespace cupyattn
