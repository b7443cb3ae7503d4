// Where keys lie that are in pages: anywhere, through the block_table.
#pragma once

#include "algorithm/mask.cuh"

namespace cupyattn {

// The page with a key of a sequence, of which it is `key` places behind the first page's start, padding among them.
// Whatever the table says, it is one that there is, or kNoPage: nothing is read then, and zeros take its place.
constexpr int kNoPage = -1;
DEVICE int page_of(int key, const Sequence& sequence, const Params& params) {
    const int* table = params.at.block_table + sequence.index * params.block_table_row;
    const int page = ptx::load_global(table + key / params.page_size);
    return page >= 0 && page < params.num_pages ? page : kNoPage;
}

// The row of that key; null if it is nowhere. `data` is the head's first number in page 0.
template <typename Element>
DEVICE const Element* row_in_pages(const Element* data, const Strides& strides, int key, const Sequence& sequence,
                                   const Params& params) {
    const int page = page_of(key, sequence, params);
    return page == kNoPage ? nullptr : data + page * strides.batch + key % params.page_size * strides.row;
}

}  // namespace cupyattn
