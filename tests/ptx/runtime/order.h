// What came before what: races, found by vector clocks (memory consistency model, chapter 8).
//
// Agents are the cluster's threads, and behind them its warpgroups' products, which read shared memory beside them.
// A thread's clock says up to which moment it knows what each agent did. It learns from barriers, from mbarriers and
// from atom.acq_rel; nothing else orders two threads, not even being lanes of one warp.
// Accesses are compared by words of four bytes, so that threads must not share a word that one of them writes.
#pragma once
#include "scheduler.h"

static void learn(Clock& mine, const Clock& other) {
    if (mine.size() < other.size()) mine.resize(other.size());
    u32* to = mine.data();
    const u32* from = other.data();
    for (size_t agent = 0; agent < other.size(); ++agent) to[agent] = to[agent] < from[agent] ? from[agent] : to[agent];
}
// What a thread does from here on is not known to those who were told so far.
static void tick(Thread& thread) {
    if (machine.checks_races) ++thread.clock[thread.index];
}
static void tell(Thread& thread, Clock& clock) {
    if (!machine.checks_races) return;
    learn(clock, thread.clock);
    tick(thread);
}
static void be_told(Thread& thread, const Clock& clock) {
    if (!machine.checks_races) return;
    learn(thread.clock, clock);
    tick(thread);
}
static Moment now(const Thread& thread) {
    return {thread.index, machine.checks_races ? thread.clock[thread.index] : 0};
}
static Clock fresh_clock() { return machine.checks_races ? Clock(machine.num_agents, 0) : Clock(); }

static bool known(const Moment& moment, const Clock& clock) {
    return moment.agent == kNobody || moment.clock <= clock[moment.agent];
}
static bool is_before(const Moment& moment, const Thread& thread) { return known(moment, thread.clock); }

// ---- Shared memory --------------------------------------------------------------------------------------------------

[[noreturn]] static void fail_of_race(Thread& thread, u32 address, const char* what, u32 agent) {
    if (agent >= machine.threads.size())
        fail(thread, "race on shared memory %u: a read by products of warpgroup %zu is not ordered before this",
             address, agent - machine.threads.size());
    const Thread& other = *machine.threads[agent];
    fail(thread, "race on shared memory %u: %s of thread %u, block (%u,%u,%u), is not ordered before this", address,
         what, other.number, other.block[0], other.block[1], other.block[2]);
}

struct Words {
    u32 first, last;
};
static Words words_of(u32 address, u32 bytes) { return {address / 4, (address + bytes - 1) / 4}; }

// Somebody reads who knows what `clock` says.
static void check_read(Thread& thread, const Clock& clock, Block& block, u32 address, u32 bytes) {
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) {
        const Moment& write = block.words[index].write;
        if (write.agent == kNobody) fail(thread, "shared memory %u is read, and nobody wrote it", index * 4);
        if (!known(write, clock)) fail_of_race(thread, index * 4, "a write", write.agent);
    }
}
// Of reads only the last need to be kept, where who knows of the last knows of those before it: not so of a product, of
// which each of its warps tells, and each knows something else (`clock` is null then).
static void note_read(const Moment& reader, const Clock* clock, Block& block, u32 address, u32 bytes) {
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) {
        Word& word = block.words[index];
        if (!word.reads) {
            const bool first = word.read.agent == kNobody || word.read.agent == reader.agent;
            if (first || (clock && known(word.read, *clock))) {
                word.read = reader;
                continue;
            }
            word.reads = std::make_unique<std::vector<Moment>>(1, word.read);
            word.read = Moment();
        }
        bool found = false;
        for (Moment& read : *word.reads) {
            if (read.agent != reader.agent) continue;
            read = reader;
            found = true;
            break;
        }
        if (!found) word.reads->push_back(reader);
    }
}
static void order_read(Thread& thread, Block& block, u32 address, u32 bytes) {
    if (!machine.checks_races) return;
    check_read(thread, thread.clock, block, address, bytes);
    note_read(now(thread), &thread.clock, block, address, bytes);
}
static void order_write(Thread& thread, Block& block, u32 address, u32 bytes) {
    if (!machine.checks_races) return;
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) {
        Word& word = block.words[index];
        if (!is_before(word.write, thread)) fail_of_race(thread, index * 4, "a write", word.write.agent);
        if (!is_before(word.read, thread)) fail_of_race(thread, index * 4, "a read", word.read.agent);
        if (word.reads) {
            for (const Moment& read : *word.reads)
                if (!is_before(read, thread)) fail_of_race(thread, index * 4, "a read", read.agent);
            word.reads.reset();
        }
        word.read = Moment();
        word.write = now(thread);
    }
}

// ---- Global memory --------------------------------------------------------------------------------------------------
// Who reads or writes a word must know its last write: by clocks in the same block, from other blocks through
// atom.acq_rel. Blocks run one after another here, so that agents of different blocks have the same numbers, and what
// one block learns of another is a clock of that other's. Kernels with clusters do not talk through global memory.

struct GlobalWrite {
    u32 block;
    Moment moment;
};
typedef std::map<u32, Clock> ClockOfBlocks;
struct Acquisition {
    Moment moment;
    ClockOfBlocks clocks;
};
struct GlobalOrder {
    std::unordered_map<u64, GlobalWrite> writes;  // by address / 4
    std::map<u64, ClockOfBlocks> released;        // by address
    std::vector<Acquisition> acquired;            // by the block that runs
};
static GlobalOrder global_order;

static bool is_acquired(const GlobalWrite& write, const Thread& thread) {
    for (const Acquisition& acquisition : global_order.acquired) {
        if (!is_before(acquisition.moment, thread)) continue;
        const auto found = acquisition.clocks.find(write.block);
        if (found != acquisition.clocks.end() && known(write.moment, found->second)) return true;
    }
    return false;
}
static void order_global(Thread& thread, u64 address, u32 bytes, bool writes) {
    const bool ordered = machine.checks_races && machine.blocks.size() == 1 && bytes >= 4;
    if (!ordered) return;
    const u32 mine = block_of(thread).number;
    for (u64 word = address / 4; word < (address + bytes) / 4; ++word) {
        const auto found = global_order.writes.find(word);
        if (found != global_order.writes.end()) {
            const GlobalWrite& write = found->second;
            const bool in_order = write.block == mine ? is_before(write.moment, thread) : is_acquired(write, thread);
            if (!in_order)
                fail(thread,
                     "race on global memory %#lx: a write of thread %u of block %u is not ordered before this %s",
                     (unsigned long)word * 4, write.moment.agent, write.block, writes ? "write" : "read");
        }
        if (writes) global_order.writes[word] = {mine, now(thread)};
    }
}
static void learn_of_block(ClockOfBlocks& clocks, u32 block, const Clock& clock) { learn(clocks[block], clock); }
// What the atomics of others at this address released is acquired, and released with all that was acquired before.
static void acquire_and_release(Thread& thread, u64 address) {
    if (!machine.checks_races || machine.blocks.size() != 1) return;
    ClockOfBlocks& here = global_order.released[address];
    global_order.acquired.push_back({now(thread), here});
    for (const Acquisition& acquisition : global_order.acquired) {
        if (!is_before(acquisition.moment, thread)) continue;
        for (const auto& clock : acquisition.clocks) learn_of_block(here, clock.first, clock.second);
    }
    learn_of_block(here, block_of(thread).number, thread.clock);
    tick(thread);
}
