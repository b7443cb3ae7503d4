// Shared and global memory, and everything that can be wrong with an access.
//
// Two accesses of one cluster are in order if one thread made both, or barriers lie between them: of the cluster, of a
// block, of a warp, named ones, or mbarriers, one after another if need be. Nothing else orders them: shuffles, votes and
// matrix instructions do not. Boxes and products are agents of their own, and their accesses come before what waits for
// them.
#pragma once

#include <algorithm>

#include "machine.h"

namespace emulator {

constexpr std::uint32_t kSharedBase = 0x400;  // as on hardware, where the first KiB is the system's

enum class State : std::uint8_t {
    kPlain,
    kCopy,      // the destination of a copy that the writer has not waited for
    kBox,       // the destination of a box that is under way
    kMbarrier,  // half of an mbarrier
};

// What is known of four bytes of shared memory.
struct Word {
    Moment write;
    State state;
    bool stored;             // by a thread, not by a box
    std::uint32_t readings;  // since then, a chain; 0: none
};

// Agents that read a word: some of 32 neighbours, all with the same stamp.
struct Reading {
    std::uint32_t unit;  // the first agent is 32 times this
    std::uint32_t lanes;
    std::uint32_t stamp;
    std::uint32_t next;
};

// What is known of a byte of global memory that the kernel may write.
struct Trace {
    Moment write;
    std::uint32_t time;
    std::uint32_t block;  // 0: not written during this launch
    bool atomic;
};

struct Buffer {
    std::uint64_t address, bytes;
    std::uint64_t writable;
};

struct Memory {
    std::vector<std::uint8_t> storage;
    std::uint8_t* shared;
    std::uint32_t shared_bytes, shared_step;  // of a block, and from block to block of a cluster
    std::vector<Word> words;
    std::vector<Reading> readings;  // the first is none
    std::uint32_t free_readings;    // a chain

    const Buffer* buffers;
    int num_buffers;
    int last_buffer;
    std::vector<std::vector<Trace>> traces;    // per buffer
    std::vector<std::vector<Fence>> released;  // per block: what its atomics let others see
};
inline Memory memory;

// ---- Shared memory: bounds --------------------------------------------------------------------------

// From the start of all shared memory of the cluster: where an address of one block is.
EMULATED std::uint32_t offset_of(std::uint32_t address, int rank = now->block->rank) {
    return rank * memory.shared_step + address - kSharedBase;
}
EMULATED Word* words_at(std::uint32_t address, int rank = now->block->rank) {
    return &memory.words[offset_of(address, rank) / 4];
}

EMULATED std::uint8_t* shared_at(std::uint32_t address, std::uint32_t bytes, const char* verb, Site site) {
    if (address % bytes) fail(site, "%s: shared address 0x%x is not a multiple of %u", verb, address, bytes);
    const std::uint32_t offset = address - kSharedBase;
    if (offset > memory.shared_bytes || memory.shared_bytes - offset < bytes)
        fail(site, "%s: %u bytes at shared address 0x%x are outside the block's %u bytes from 0x%x", verb, bytes,
             address, memory.shared_bytes, kSharedBase);
    return memory.shared + offset_of(address);
}

// ---- Shared memory: order ---------------------------------------------------------------------------

[[noreturn]] EMULATED void fail_race(Site site, const char* verb, std::uint32_t address, const char* what) {
    fail(site, "%s: race on shared address 0x%x, which was %s with no barrier since", verb, address, what);
}
[[noreturn]] EMULATED void fail_written(Site site, const char* verb, std::uint32_t address, int writer) {
    char what[96];
    std::snprintf(what, sizeof what, "written by %s", AgentName(writer).text);
    fail_race(site, verb, address, what);
}
[[noreturn]] EMULATED void fail_busy(Site site, const char* verb, std::uint32_t address, const Word& word) {
    if (word.state == State::kMbarrier) fail(site, "%s: shared address 0x%x is part of an mbarrier", verb, address);
    if (word.state == State::kBox)
        fail(site, "%s: shared address 0x%x is the destination of a box that is under way", verb, address);
    fail(site, "%s: shared address 0x%x is the destination of a copy that thread %d has not waited for", verb, address,
         word.write.agent);
}

// Who accesses shared memory: some of 32 neighbouring agents, with what they all know.
struct Party {
    const Knowledge* known;
    int self;  // the thread that needs no barrier after its own stores; -1: none
    std::uint32_t unit, lanes;
    bool is_async;  // sees what threads stored only after their fence_async_proxy
};
EMULATED Party party_of(const Thread& thread) {
    return {thread.known.get(), thread.index, static_cast<std::uint32_t>(thread.warp->index), thread.bit(), false};
}
EMULATED Party this_thread() { return party_of(*now); }
// The lanes of a warp that read for each other. `known` is what they all know.
EMULATED Party this_warp(const Known& known) {
    return {known.get(), -1, static_cast<std::uint32_t>(now->warp->index), ~0u, false};
}
EMULATED Party beside(int agent, const Known& known, int self) {
    return {known.get(), self, static_cast<std::uint32_t>(agent / kLanes), 1u << agent % kLanes, true};
}

// Whether the thread that stored a word has fenced it since, before what the party knows of.
EMULATED bool is_fenced(const Word& word, const Party& party) {
    const int writer = word.write.agent;
    const std::vector<std::uint32_t>& fences = machine.threads[writer].async_fences;
    const auto fence = std::lower_bound(fences.begin(), fences.end(), word.write.stamp);
    return fence != fences.end() && (writer == party.self || party.known->last[writer] >= *fence);
}

// That the last write to a word came before what a party does with it.
EMULATED void check_written(const Word& word, const Party& party, const char* verb, std::uint32_t address, Site site) {
    if (word.state != State::kPlain) fail_busy(site, verb, address, word);
    if (word.write.agent != party.self && !party.known->covers(word.write))
        fail_written(site, verb, address, word.write.agent);
    if (party.is_async && word.stored && !is_fenced(word, party))
        fail(site, "%s: thread %d stored to shared address 0x%x, with no fence_async_proxy and barrier since", verb,
             word.write.agent, address);
}

EMULATED void add_reading(Word& word, const Party& party) {
    for (std::uint32_t index = word.readings; index; index = memory.readings[index].next) {
        Reading& reading = memory.readings[index];
        const bool is_later = (reading.lanes & ~party.lanes) == 0;  // of no other agents
        if (reading.unit != party.unit || !(is_later || reading.stamp == machine.stamp)) continue;
        reading.lanes |= party.lanes;
        reading.stamp = machine.stamp;
        return;
    }
    std::uint32_t index = memory.free_readings;
    if (index) {
        memory.free_readings = memory.readings[index].next;
    } else {
        index = memory.readings.size();
        memory.readings.emplace_back();
    }
    memory.readings[index] = {party.unit, party.lanes, machine.stamp, word.readings};
    word.readings = index;
}

EMULATED void note_read(std::uint32_t address, int bytes, const Party& party, const char* verb, Site site) {
    if (!machine.check_races) return;
    Word* word = words_at(address);
    for (; bytes > 0; bytes -= 4, address += 4, ++word) {
        if (!word->write.stamp) fail(site, "%s: nothing was ever written to shared address 0x%x", verb, address);
        check_written(*word, party, verb, address, site);
        add_reading(*word, party);
    }
}

// That a reading came before what a party writes.
EMULATED void check_read(const Reading& reading, const Party& party, const char* verb, std::uint32_t address, Site site) {
    const bool is_own = party.self >= 0 && reading.unit == static_cast<std::uint32_t>(party.self / kLanes);
    if (party.known->least[reading.unit] >= reading.stamp) return;
    for (std::uint32_t lanes = reading.lanes; lanes; lanes &= lanes - 1) {
        const int agent = reading.unit * kLanes + __builtin_ctz(lanes);
        if (agent == party.self || party.known->last[agent] >= reading.stamp) continue;
        char what[96];
        if (is_own || agent >= all_threads())
            std::snprintf(what, sizeof what, "read by %s", AgentName(agent).text);
        else
            std::snprintf(what, sizeof what, "read by warp %u", reading.unit);
        fail_race(site, verb, address, what);
    }
}

// `written` says who will have written, and when; for a thread that stores, this moment.
EMULATED void note_write(std::uint32_t address, int bytes, const Party& party, const Word& written, const char* verb,
                       Site site, int rank = now->block->rank) {
    if (!machine.check_races) return;
    Word* word = words_at(address, rank);
    for (; bytes > 0; bytes -= 4, address += 4, ++word) {
        check_written(*word, party, verb, address, site);
        if (word->readings) {
            std::uint32_t last = 0;
            for (std::uint32_t index = word->readings; index; index = memory.readings[index].next) {
                check_read(memory.readings[index], party, verb, address, site);
                last = index;
            }
            memory.readings[last].next = memory.free_readings;
            memory.free_readings = word->readings;
        }
        *word = written;
    }
}
EMULATED void note_store_of(int thread, std::uint32_t address, int bytes, const char* verb, Site site) {
    const Moment moment = {machine.stamp, static_cast<std::uint16_t>(thread)};
    note_write(address, bytes, party_of(machine.threads[thread]), {moment, State::kPlain, true, 0}, verb, site);
}
EMULATED void note_store(std::uint32_t address, int bytes, const char* verb, Site site) {
    note_store_of(now->index, address, bytes, verb, site);
}

// ---- Global memory: bounds --------------------------------------------------------------------------

enum class Access { kLoad, kLoadFresh, kStore, kAtomic };

[[noreturn]] EMULATED void fail_outside(std::uint64_t address, int bytes, const char* verb, Site site) {
    int nearest = -1;
    std::uint64_t distance = ~0ull;
    for (int index = 0; index < memory.num_buffers; ++index) {
        const Buffer& buffer = memory.buffers[index];
        const std::uint64_t end = buffer.address + buffer.bytes;
        const std::uint64_t before = address < buffer.address ? buffer.address - address : 0;
        const std::uint64_t gap = address >= end ? address - end : before;
        if (gap < distance) nearest = index, distance = gap;
    }
    if (nearest < 0)
        fail(site, "%s: %d bytes at %#llx, but the launch has no buffers", verb, bytes,
             static_cast<unsigned long long>(address));
    const Buffer& buffer = memory.buffers[nearest];
    fail(site, "%s: %d bytes at offset %lld of buffer %d, which has %llu bytes, and inside no other", verb, bytes,
         static_cast<long long>(address - buffer.address), nearest, static_cast<unsigned long long>(buffer.bytes));
}

EMULATED bool holds(const Buffer& buffer, std::uint64_t address, std::uint64_t bytes) {
    const std::uint64_t offset = address - buffer.address;
    return offset <= buffer.bytes && buffer.bytes - offset >= bytes;
}

// ---- Global memory: order ---------------------------------------------------------------------------

// Whether another block's thread let this store be seen, and the running thread has looked since.
EMULATED bool was_released(const Trace& trace) {
    const auto looked = [](const Thread& thread) { return thread.atomic.stamp && is_before_now(thread.atomic); };
    const auto covers = [&trace](const Fence& fence) {
        if (trace.write.agent == fence.moment.agent) return trace.time < fence.time;
        return fence.known->covers(trace.write);
    };
    const std::vector<Fence>& fences = memory.released[trace.block];
    const Thread* mine = machine.threads + first_thread(*now->block);
    return std::any_of(mine, mine + machine.num_threads, looked) &&
           std::any_of(fences.begin(), fences.end(), covers);
}

EMULATED void check_order(const Trace& trace, Access access, std::uint64_t offset, int buffer, const char* verb,
                        Site site) {
    const bool is_plain = access == Access::kLoad;
    if (trace.block == now->block->number && (trace.atomic ? !is_plain : is_before_now(trace.write))) return;
    char what[96];
    std::snprintf(what, sizeof what, "%s at offset %lld of buffer %d", verb, static_cast<long long>(offset), buffer);
    if (trace.atomic && is_plain) fail(site, "%s: an atomic wrote there, and the first-level cache may be stale", what);
    if (trace.block == now->block->number)
        fail(site, "%s: race: thread %d wrote there, with no barrier since", what, trace.write.agent);
    char other[64];
    const int index = trace.block - 1;
    std::snprintf(other, sizeof other, "block (%d, %d, %d)", index % machine.grid_x,
                  index / machine.grid_x % machine.grid_y, index / machine.grid_x / machine.grid_y);
    if (is_plain)
        fail(site, "%s: %s wrote there during this launch, and the first-level cache may be stale", what, other);
    if (!trace.atomic && access != Access::kAtomic && !was_released(trace))
        fail(site, "%s: thread %d of %s wrote there, and fence_gpu and atomic_add there, then atomic_add here, do not "
             "come between", what, trace.write.agent, other);
}

// The bytes at a global address, after every check of this access to them but that of alignment.
EMULATED std::uint8_t* global_range(std::uint64_t address, int bytes, Access access, const char* verb, Site site) {
    int index = memory.last_buffer;
    if (index >= memory.num_buffers || !holds(memory.buffers[index], address, bytes)) {
        for (index = 0; index < memory.num_buffers; ++index)
            if (holds(memory.buffers[index], address, bytes)) break;
        if (index == memory.num_buffers) fail_outside(address, bytes, verb, site);
        memory.last_buffer = index;
    }
    const Buffer& buffer = memory.buffers[index];
    const std::uint64_t offset = address - buffer.address;
    const bool writes = access == Access::kStore || access == Access::kAtomic;
    if (writes && !buffer.writable)
        fail(site, "%s: offset %llu of buffer %d, which is read-only", verb, static_cast<unsigned long long>(offset),
             index);
    if (machine.check_races && buffer.writable) {
        if (writes) ++machine.time;
        for (std::uint64_t byte = offset; byte < offset + bytes; ++byte) {
            Trace& trace = memory.traces[index][byte];
            if (trace.block) check_order(trace, access, offset, index, verb, site);
            if (writes) trace = {this_moment(), machine.time, now->block->number, access == Access::kAtomic};
        }
    }
    return reinterpret_cast<std::uint8_t*>(address);
}

EMULATED std::uint8_t* global_at(const void* pointer, int bytes, Access access, const char* verb, Site site) {
    const auto address = reinterpret_cast<std::uint64_t>(pointer);
    if (address % bytes)
        fail(site, "%s: global address %#llx is not a multiple of %d", verb, static_cast<unsigned long long>(address),
             bytes);
    return global_range(address, bytes, access, verb, site);
}

EMULATED void fence() { now->fence = {this_moment(), ++machine.time, now->known}; }

// An atomic lets others see what its thread fenced, and what other threads fenced before a barrier.
EMULATED void release_and_acquire() {
    if (!now->atomic.stamp) now->atomic = this_moment();
    std::vector<Fence>& released = memory.released[now->block->number];
    for (int index = 0; index < machine.num_threads; ++index) {
        Fence& fence = machine.threads[first_thread(*now->block) + index].fence;
        if (!fence.time || !is_before_now(fence.moment)) continue;
        released.push_back(fence);
        fence.time = 0;
    }
}

// ---- Copies -----------------------------------------------------------------------------------------

EMULATED void perform(const Copy& copy) {
    std::uint8_t* to = memory.shared + offset_of(copy.to);
    std::memset(to, 0, copy.width);
    if (copy.from) std::memcpy(to, copy.from, copy.size);
}

// Schedule 0 copies at once; the others when the copy is waited for, and until then there are NaNs.
EMULATED void issue(Copy copy, Site site) {
    const char* verb = copy.width == 16 ? "copy_async" : "copy_word_async";
    std::uint8_t* to = shared_at(copy.to, copy.width, verb, site);
    const auto from = reinterpret_cast<std::uint64_t>(copy.from);
    if (from % copy.width)
        fail(site, "%s: global address %#llx is not a multiple of %u", verb, static_cast<unsigned long long>(from), copy.width);
    if (copy.size < 0 || copy.size > static_cast<int>(copy.width)) fail(site, "%s: %d of %u bytes", verb, copy.size, copy.width);
    if (copy.from) global_range(from, copy.size, Access::kLoadFresh, verb, site);
    note_write(copy.to, copy.width, this_thread(), {this_moment(), State::kCopy, true, 0}, verb, site);
    if (machine.schedule)
        std::memset(to, 0xFF, copy.width);
    else
        perform(copy);
    now->copies.push_back(copy);
}

EMULATED void commit() {
    std::uint32_t committed = 0;
    for (std::uint32_t group : now->groups) committed += group;
    now->groups.push_back(static_cast<std::uint32_t>(now->copies.size()) - committed);
}

EMULATED void wait_for_copies(std::size_t pending_groups) {
    std::vector<Copy>& copies = now->copies;
    std::vector<std::uint32_t>& groups = now->groups;
    if (groups.size() <= pending_groups) return;
    const std::size_t num_groups = groups.size() - pending_groups;
    std::uint32_t count = 0;
    for (std::size_t group = 0; group < num_groups; ++group) count += groups[group];
    if (machine.schedule == 2)
        for (std::uint32_t left = count; left > 1; --left) std::swap(copies[left - 1], copies[random_number() % left]);
    for (std::uint32_t index = 0; index < count; ++index) {
        const Copy& copy = copies[index];
        if (machine.schedule) perform(copy);
        if (!machine.check_races) continue;
        Word* words = words_at(copy.to);
        for (std::uint32_t word = 0; word < copy.width / 4; ++word) {
            words[word].write = this_moment();
            words[word].state = State::kPlain;
        }
    }
    copies.erase(copies.begin(), copies.begin() + count);
    groups.erase(groups.begin(), groups.begin() + num_groups);
}

}  // namespace emulator
