// How a warp takes fragments from tiles in which numbers lie as they came from memory: 16 bits as they are, float8 as
// halves that are 2^-8 of them, float32 as planes of bfloat16.
//
// Where one warp alone reads a tile, that is no more work than on the way into it, and copies run beside the arithmetic.
//
// A product along columns may have them in any order that both operands share: a lane reads float8 by fours, the even two
// of which are neighbours to a product, and the odd two.  Where columns are those of sums, each pair of neighbours goes
// into two blocks of them, and `column` says which is where.
//
// Nothing here knows of attention.
#pragma once

#include "tiles/fragments.cuh"
#include "tiles/tile.cuh"

namespace cupyattn {

// How they are taken where they were made what products take on the way into a tile.
template <typename Element>
struct Ready {
    using Kept = Element;  // what products take it for
    template <int kRows, int kCols>
    using Tile = SharedTile<Element, kRows, kCols>;
    static constexpr int kTogether = 1;  // fragments of 16 columns that are taken at once
    using Fragments = uint32[kTogether][Planes<Element>::kCount][4];

    // Where a lane finds its part of the right operand: see fragments.cuh.
    template <typename Tile>
    DEVICE_METHOD static uint32 by_rows(const Tile& tile) {
        return right_operand_by_rows(tile);
    }
    template <typename Tile>
    DEVICE_METHOD static uint32 by_columns(const Tile& tile) {
        return right_operand_by_columns(tile);
    }
    // Columns [16 * kTogether * step, ...), of 16 rows.
    template <typename Tile>
    DEVICE_METHOD static void take_rows(Fragments& to, uint32 right, int step) {
#pragma unroll
        for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
            ptx::load_matrices(to[0][plane], Tile::advance(right, step) + plane * Tile::kPlane);
    }
    template <typename Tile>
    DEVICE_METHOD static void take_columns(Fragments& to, uint32 right, int step) {
#pragma unroll
        for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
            ptx::load_matrices_transposed(to[0][plane], Tile::advance(right, step) + plane * Tile::kPlane);
    }
    // Beyond first_column(), as of an accumulator.
    DEVICE_METHOD static int first_column() { return Accumulator<16>::first_column(); }
    DEVICE_METHOD static constexpr int column(int block, int i) { return Accumulator<16>::column(block, i); }
};

// And where they lie as they came.
template <typename Element>
struct Raw : Ready<Element> {};

// Of sums whose columns were taken in pairs of neighbours, for two blocks of 8.
struct PairsOfBlocks {
    DEVICE_METHOD static int first_column() { return 4 * (ptx::lane() % 4); }
    DEVICE_METHOD static constexpr int column(int block, int i) { return 16 * (block / 2) + 2 * (i % 2) + block % 2; }
};

template <>
struct Raw<Float8> : PairsOfBlocks {
    using Kept = Half;
    template <int kRows, int kCols>
    using Tile = RawTile<Float8, kRows, kCols>;
    static constexpr int kTogether = 2;
    using Fragments = uint32[kTogether][1][4];

    template <typename Tile>
    DEVICE_METHOD static uint32 by_rows(const Tile& tile) {
        return right_operand_by_rows(tile);
    }
    template <typename Tile>
    DEVICE_METHOD static uint32 by_columns(const Tile& tile) {
        return right_operand_by_columns(tile);
    }
    // Four numbers to a word, of neighbouring columns: the even ones and the odd ones go together.
    DEVICE_METHOD static uint32 even(uint32 four) { return halves_of(four << 8); }
    DEVICE_METHOD static uint32 odd(uint32 four) { return halves_of(four); }

    // Two fragments from words of rows and of the rows 8 below, of 16 columns and of the next.
    DEVICE_METHOD static void spread(uint32 (&first)[4], uint32 (&second)[4], const uint32 (&word)[4]) {
        first[0] = even(word[0]), first[1] = even(word[1]), first[2] = odd(word[0]), first[3] = odd(word[1]);
        second[0] = even(word[2]), second[1] = even(word[3]), second[2] = odd(word[2]), second[3] = odd(word[3]);
    }
    // Of the left operand, whose place is left_operand's.
    template <typename Tile>
    DEVICE_METHOD static void take_left(uint32 (&first)[1][4], uint32 (&second)[1][4], uint32 left, int step) {
        uint32 word[4];
        ptx::load_matrices(word, Tile::advance(left, step));
        spread(first[0], second[0], word);
    }
    template <typename Tile>
    DEVICE_METHOD static void take_rows(Fragments& to, uint32 right, int step) {
        uint32 word[4];
        ptx::load_matrices(word, Tile::advance(right, step));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32 above = word[i], below = word[2 + i];
            to[i][0][0] = even(above), to[i][0][1] = odd(above), to[i][0][2] = even(below), to[i][0][3] = odd(below);
        }
    }
    // Transposed a word is of two rows, and has two columns of both.
    template <typename Tile>
    DEVICE_METHOD static void take_columns(Fragments& to, uint32 right, int step) {
        uint32 word[4];
        ptx::load_matrices_transposed(word, Tile::advance(right, step));
        spread(to[0][0], to[1][0], word);
    }
};

template <>
struct Raw<float> : PairsOfBlocks {
    using Kept = float;
    template <int kRows, int kCols>
    using Tile = RawTile<float, kRows, kCols>;
    static constexpr int kTogether = 1;
    using Fragments = uint32[kTogether][3][4];

    // A lane's row, and its pair of columns.
    template <typename Tile>
    DEVICE_METHOD static uint32 by_rows(const Tile& tile) {
        const int pair = ptx::lane() % 4;
        return tile.address(ptx::lane() / 4, pair / 2) + 8 * (pair % 2);
    }
    // The first of a lane's rows, and its pair of columns.
    template <typename Tile>
    DEVICE_METHOD static uint32 by_columns(const Tile& tile) {
        const int pair = ptx::lane() / 4;
        return tile.address(2 * (ptx::lane() % 4), pair / 2) + 8 * (pair % 2);
    }
    static constexpr int kEightRows = 8 * 64, kNextRow = 64, kEightColumns = 32;  // the last two to be flipped

    template <typename Tile>
    DEVICE_METHOD static void take_rows(Fragments& to, uint32 right, int step) {
        const uint32 from = Tile::advance(right, 2 * step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32 pair[2], planes[3];
            ptx::load_shared(pair, (i % 2 ? from ^ kEightColumns : from) + i / 2 * kEightRows);
            split_pair(ptx::from_bits(pair[0]), ptx::from_bits(pair[1]), planes);
#pragma unroll
            for (int plane = 0; plane < 3; ++plane) to[0][plane][i] = planes[plane];
        }
    }
    template <typename Tile>
    DEVICE_METHOD static void take_columns(Fragments& to, uint32 right, int step) {
        const uint32 from = Tile::advance(right, 2 * step);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32 upper[2], lower[2];
            ptx::load_shared(upper, from + i * kEightRows);
            ptx::load_shared(lower, (from ^ kNextRow) + i * kEightRows);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32 planes[3];
                split_pair(ptx::from_bits(upper[j]), ptx::from_bits(lower[j]), planes);
#pragma unroll
                for (int plane = 0; plane < 3; ++plane) to[0][plane][2 * j + i] = planes[plane];
            }
        }
    }
};

// sums[m] = left[m] x 16 rows of a tile, along kCols columns: `take_left(left, step)` brings 16 of them.
template <typename Operand, int kCols, typename Tile, int kRowTiles, typename TakeLeft>
DEVICE void multiply_by_rows(Accumulator<16> (&sums)[kRowTiles], const Tile& tile, const TakeLeft& take_left) {
    using Kept = typename Operand::Kept;
    const uint32 from = Operand::by_rows(tile);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) sums[m].clear();
#pragma unroll
    for (int first = 0; first < kCols / 16; first += Operand::kTogether) {
        typename Operand::Fragments right;
        Operand::template take_rows<Tile>(right, from, first / Operand::kTogether);
#pragma unroll
        for (int i = 0; i < Operand::kTogether; ++i) {
            uint32 left[kRowTiles][Planes<Kept>::kCount][4];
            take_left(left, first + i);
#pragma unroll
            for (int plane = 0; plane < Planes<Kept>::kCount; ++plane)
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    multiply_planes<Kept>(sums[m].value[0], sums[m].value[1], left[m], right[i][plane], plane);
        }
    }
}

// sums[m] += left[m] x 16 rows of a tile, which are summed over; `change(right)` may change them in registers.
template <typename Operand, typename Tile, typename Kept, int kRowTiles, int kCols, typename Change>
DEVICE void multiply_by_columns(Accumulator<kCols> (&sums)[kRowTiles], const Fragment<Kept, 16> (&left)[kRowTiles],
                                const Tile& tile, const Change& change) {
    const uint32 from = Operand::by_columns(tile);
#pragma unroll
    for (int first = 0; first < kCols / 16; first += Operand::kTogether) {
        typename Operand::Fragments right;
        Operand::template take_columns<Tile>(right, from, first / Operand::kTogether);
#pragma unroll
        for (int i = 0; i < Operand::kTogether; ++i) {
            const int block = 2 * (first + i);
            change(right[i]);
#pragma unroll
            for (int plane = 0; plane < Planes<Kept>::kCount; ++plane)
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    multiply_planes<Kept>(sums[m].value[block], sums[m].value[block + 1], left[m].value[0],
                                          right[i][plane], plane);
        }
    }
}

}  // namespace cupyattn
