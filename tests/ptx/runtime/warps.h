// What the lanes of a warp do together. All 32 have to come to the same instruction: our kernels know no other masks,
// and .aligned (9.7.13.1) demands it. The last lane to come performs it for all.
#pragma once
#include "memory.h"

// `perform(Warp&)` finds what each lane brought in `operands`.
template <typename Operands, typename Perform>
static void together(Thread& thread, s64 site, const char* what, Operands* operands, const Perform& perform) {
    Warp& warp = warp_of(thread);
    if (warp.arrived == 0) warp.site = site;
    if (warp.site != site)
        fail(thread, "%s: lanes of warp %u are at different instructions (%ld and %ld)", what, thread.warp,
             (long)warp.site, (long)site);
    warp.operands[thread.lane] = (void*)operands;
    if (++warp.arrived < kLanes) {
        const u64 generation = warp.generation;
        while (warp.generation == generation) wait(thread, what);
        return;
    }
    warp.arrived = 0;
    perform(warp);
    ++warp.generation;
    for (Thread* lane : warp.lanes)
        if (lane != &thread) wake(*lane);
}
template <typename Operands>
static Operands& brought(const Warp& warp, u32 lane) {
    return *(Operands*)warp.operands[lane];
}

static void require_all_lanes(Thread& thread, u32 members, const char* what) {
    if (members != ~0u) fail(thread, "%s of lanes %#x; only all of them are known", what, members);
}

// ---- shfl.sync (9.7.9.6) --------------------------------------------------------------------------------------------

struct Shuffling {
    u32 value, lane, clamp;
    u32 result;
    bool in_range;
};

static void shuffle_lane(const Warp& warp, Shuffle how, u32 lane) {
    Shuffling& mine = brought<Shuffling>(warp, lane);
    const u32 segment = mine.clamp >> 8 & 31;  // bits of the lane's number that stay as they are
    const u32 clamp = mine.clamp & 31;
    const u32 distance = mine.lane & 31;
    const s32 highest = (lane & segment) | (clamp & ~segment);
    const s32 lowest = lane & segment;
    s32 source = lane;
    bool in_range = true;
    switch (how) {
        case Shuffle::up:
            source = (s32)lane - (s32)distance;
            in_range = source >= highest;
            break;
        case Shuffle::down:
            source = (s32)(lane + distance);
            in_range = source <= highest;
            break;
        case Shuffle::bfly:
            source = (s32)(lane ^ distance);
            in_range = source <= highest;
            break;
        case Shuffle::idx:
            source = lowest | (s32)(distance & ~segment);
            in_range = source <= highest;
            break;
    }
    mine.in_range = in_range;
    mine.result = brought<Shuffling>(warp, in_range ? source : lane).value;
}

void shfl_sync(Thread& thread, int site, Shuffle how, u32 value, u32 lane, u32 clamp, u32 members, u32* to,
               bool* in_range) {
    require_all_lanes(thread, members, "shfl.sync");
    Shuffling mine{value, lane, clamp, 0, false};
    together(thread, site, "shfl.sync", &mine, [&](Warp& warp) {
        for (u32 each = 0; each < kLanes; ++each) shuffle_lane(warp, how, each);
    });
    *to = mine.result;
    *in_range = mine.in_range;
}

// ---- vote.sync (9.7.13.9) -------------------------------------------------------------------------------------------

struct Vote {
    bool predicate;
    u32 ballot;
};
u32 vote_ballot(Thread& thread, int site, bool predicate, u32 members) {
    require_all_lanes(thread, members, "vote.sync");
    Vote mine{predicate, 0};
    together(thread, site, "vote.sync", &mine, [](Warp& warp) {
        u32 ballot = 0;
        for (u32 lane = 0; lane < kLanes; ++lane) ballot |= (u32)brought<Vote>(warp, lane).predicate << lane;
        for (u32 lane = 0; lane < kLanes; ++lane) brought<Vote>(warp, lane).ballot = ballot;
    });
    return mine.ballot;
}
bool vote_any(Thread& thread, int site, bool predicate, u32 members) {
    return vote_ballot(thread, site, predicate, members) != 0;
}
bool vote_all(Thread& thread, int site, bool predicate, u32 members) {
    return vote_ballot(thread, site, predicate, members) == ~0u;
}

// ---- bar.warp.sync (9.7.13.2): orders the memory accesses of lanes, which shuffles and votes do not -----------------

void bar_warp_sync(Thread& thread, int site, u32 members) {
    require_all_lanes(thread, members, "bar.warp.sync");
    together<void>(thread, site, "bar.warp.sync", nullptr, [](Warp& warp) {
        if (!machine.checks_races) return;
        Clock all = fresh_clock();
        for (Thread* lane : warp.lanes) learn(all, lane->clock);
        for (Thread* lane : warp.lanes) {
            lane->clock = all;
            tick(*lane);
        }
    });
}
