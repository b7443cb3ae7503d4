// What a thread block of splitkv.cu has to do: one split, or one after the other of those in its share of the schedule.
#pragma once

#include "algorithm/schedule.cuh"

namespace cupyattn {

// A block's work: one split of a piece.
struct SplitItem {
    Sequence sequence;
    int tile, tiles, group;
    Span part;      // blocks of keys
    bool is_whole;  // there are no others: its sums are results
    int splits;     // of the piece
    int64 place;    // of what it leaves
    bool exists;    // otherwise there is nothing more to do
};

// What there is to do for a thread block, item by item.
template <typename Traits>
struct SplitWalk {
    const Params& params;
    // Where it is: pieces of a sequence, splits of a piece; -1: at the first one of its share.
    int sequence, piece, split;

    DEVICE_METHOD explicit SplitWalk(const Params& given) : params(given) {}
    DEVICE_METHOD void begin() {
        sequence = params.at.schedule ? Schedule(params).first_of(ptx::block_x()) : 0, piece = split = -1;
        if (ptx::thread() == 0) keep_place();
    }

    // The next item, by all threads.  Where the walk is, and what is asked of an item at its end, is kept in shared memory
    // meanwhile: arithmetic has no register to spare.
    DEVICE_METHOD bool next(SplitItem& item) {
        ptx::barrier();  // everybody is done with the item before
        sequence = ptx::load_shared(kept(0)), piece = ptx::load_shared(kept(1)), split = ptx::load_shared(kept(2));
        if (!(params.at.schedule ? next_of_share(item) : the_one(item))) return false;
        ptx::barrier();  // everybody knows where it was
        if (ptx::thread() == 0) {
            keep_place();
            ptx::store_shared(kept(3), static_cast<uint32>(item.splits << 1 | item.is_whole));
            ptx::store_shared(kept(4), static_cast<uint32>(item.place));
            ptx::store_shared(kept(5), static_cast<uint32>(item.place >> 32));
        }
        return true;
    }
    DEVICE_METHOD void keep_place() const {
        ptx::store_shared(kept(0), static_cast<uint32>(sequence));
        ptx::store_shared(kept(1), static_cast<uint32>(piece));
        ptx::store_shared(kept(2), static_cast<uint32>(split));
    }
    DEVICE_METHOD static uint32 kept(int word) { return ptx::shared_memory() + Traits::kWalk + 4 * word; }

    // Of the latest item, for those that have met since.
    DEVICE_METHOD static bool is_whole() { return ptx::load_shared(kept(3)) & 1; }
    DEVICE_METHOD static int splits() { return static_cast<int>(ptx::load_shared(kept(3)) >> 1); }
    DEVICE_METHOD static int64 place() {
        return static_cast<int64>(static_cast<uint64>(ptx::load_shared(kept(5))) << 32 | ptx::load_shared(kept(4)));
    }

    DEVICE_METHOD int groups() const { return params.num_heads / params.queries_per_pair; }
    DEVICE_METHOD int row_tiles(int seqlen_q) const {
        return row_tiles_of(seqlen_q, params.queries_per_pair, Traits::kBlockQ);
    }
    DEVICE_METHOD int most_row_tiles() const { return larger(1, row_tiles(params.seqlen_q)); }
    DEVICE_METHOD int64 place_of(const SplitItem& item) const {
        return (static_cast<int64>(item.sequence.index) * groups() + item.group) * most_row_tiles() + item.tile;
    }

    // The blocks of keys that some row of the tile sees.
    DEVICE_METHOD Span blocks_of_tile(const SplitItem& item) const {
        const int first = item.tile * Traits::kBlockQ, all = item.sequence.band.seqlen_q * params.queries_per_pair;
        if (first >= all) return {0, 0};
        const int last = smaller(first + Traits::kBlockQ, all) - 1;
        const Span touched =
            item.sequence.band.touched(first / params.queries_per_pair, last / params.queries_per_pair);
        if (touched.empty()) return {0, 0};
        return {touched.start / Traits::kBlockK, ceil_div(touched.stop, Traits::kBlockK)};
    }
    // How many splits a piece gets by its own length.
    DEVICE_METHOD Split own_split(const SplitItem& item, int its_split) const {
        const int size = params.split_size > 0 ? params.split_size / Traits::kBlockK
                                               : ceil_div(kFewestKeys, Traits::kBlockK);
        return split_at(blocks_of_tile(item), its_split, size, params);
    }
    DEVICE_METHOD void take_split(SplitItem& item, int its_split) const {
        const Split its = own_split(item, its_split);
        item.part = its.part, item.splits = its.count, item.is_whole = its.count == 1;
        item.place = place_of(item) * params.num_splits + its_split;
    }

    DEVICE_METHOD bool the_one(SplitItem& item) {
        if (piece == 0) return false;
        piece = 0;
        const int its_split = ptx::block_x() % params.num_splits, its_piece = ptx::block_x() / params.num_splits;
        const Tiling tiling = tiling_of(params.at.cu_seqlens_q, params.total_q, sequences_of_rows(params), params.seqlen_q,
                                        Traits::kBlockQ, params.queries_per_pair);
        const Place place = cupyattn::place_of(its_piece, groups(), tiling);
        item.group = place.owner, item.tile = place.tile, item.tiles = place.tiles;
        item.sequence = sequence_at(place.sequence, params);
        take_split(item, its_split);
        // Behind the last sequence all tiles share its rows.
        const bool exists = item.tile < row_tiles(item.sequence.band.seqlen_q) || item.sequence.index == params.batch;
        return exists && its_split < item.splits;
    }

    DEVICE_METHOD bool next_of_share(SplitItem& item) {
        const Schedule schedule(params);
        const Stretch64 share = schedule.share_of(ptx::block_x());
#pragma unroll 1
        for (; sequence < schedule.sequences; ++sequence, piece = -1) {
            const int64 begin = schedule.start_of(sequence);
            if (begin >= share.stop) return false;
            item.sequence = sequence_at(sequence, params);
            item.tiles = row_tiles(item.sequence.band.seqlen_q);
            const int pieces = item.tiles * groups();
            const int64 step = schedule.step_of(sequence, pieces);
            if (piece < 0) piece = begin < share.start ? capped((share.start - begin) / larger(step, int64(1))) : 0;
#pragma unroll 1
            for (; piece < pieces; ++piece) {
                const LinePiece its = schedule.piece_of(begin, step, piece);
                if (its.start >= share.stop) return false;
                item.group = piece / item.tiles, item.tile = piece % item.tiles;
                if (params.split_size == kByShares ? take_cut(item, its, share) : take_next_split(item, its, share))
                    return true;
            }
        }
        return false;
    }
    // The blocks of a piece that are this block's, of which it has them all at once.
    DEVICE_METHOD bool take_cut(SplitItem& item, const LinePiece& its, const Stretch64& share) {
        const Cut cut = cut_at(its, share);
        if (!cut.is_there) return false;
        const Span tile = blocks_of_tile(item);
        const int64 first = blocks_of(item.sequence.band, Traits::kBlockK).start;
        item.part = {static_cast<int>(larger(int64(tile.start), first + cut.part.start)),
                     static_cast<int>(smaller(int64(tile.stop), first + cut.part.stop))};
        item.is_whole = cut.is_whole, item.splits = 0;
        item.place = 2 * ptx::block_x() + cut.is_first;
        ++piece;
        return true;
    }
    // The next one of several splits.
    DEVICE_METHOD bool take_next_split(SplitItem& item, const LinePiece& its, const Stretch64& share) {
        const Split own = own_split(item, 0);
        const Span mine = splits_within(its, own.count, own.part.stop - own.part.start, share);
        split = larger(split + 1, mine.start);
        if (split >= mine.stop) {
            split = -1;
            return false;
        }
        take_split(item, split);
        return true;
    }
};

}  // namespace cupyattn
