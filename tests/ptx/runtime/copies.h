// cp.async (9.7.9.25.3): 16 or 4 bytes from global to shared memory, some time before a wait for their group ends.
//
// In schedule 0 they come at once, else when they are waited for. Their source is read when they come, and until then
// their destination holds nans. A wait speaks for the thread's own copies; others learn of them by a barrier behind it.
#pragma once
#include "barriers.h"

static void perform_copy(Thread& thread, const Copy& copy) {
    u8* to = shared_bytes(thread, thread.rank, copy.to, copy.width, "cp.async");
    memset(to, 0, copy.width);
    if (copy.bytes == 0) return;
    const u32 line = thread.line;
    thread.line = copy.line;
    memcpy(to, global_at_once(thread, copy.from, copy.width, false, true), copy.bytes);
    thread.line = line;
}
static void end_copy(Thread& thread, const Copy& copy) {
    if (machine.schedule == 0) return;
    end_copy_to(block_of(thread), copy.to, copy.width);
    perform_copy(thread, copy);
}

static void begin_copy(Thread& thread, u32 to, u64 from, u32 width, u32 bytes) {
    preempt(thread);
    if (bytes != 0 && bytes != width) fail(thread, "cp.async of %u bytes; only 0 and %u are known", bytes, width);
    if (to >> kRankShift) fail(thread, "cp.async to %#x, in another block", to);
    if (to % width) fail(thread, "cp.async to shared %u, which is not aligned to %u", to, width);
    if (bytes) global_at_once(thread, from, width, false, true);
    shared_bytes(thread, thread.rank, to, width, "cp.async");
    Block& block = block_of(thread);
    check_untouched(thread, block, to, width, "cp.async");
    note_generic_write(thread, block, to, width);
    order_write(thread, block, to, width);
    const Copy copy{to, from, width, bytes, thread.line};
    if (machine.schedule == 0) {
        perform_copy(thread, copy);
    } else {
        begin_copy_to(block, to, width);
    }
    thread.copies.push_back(copy);
}
void cp_async_16(Thread& thread, u32 to, u64 from, u32 bytes) { begin_copy(thread, to, from, 16, bytes); }
void cp_async_4(Thread& thread, u32 to, u64 from) { begin_copy(thread, to, from, 4, 4); }
void cp_async_commit_group(Thread& thread) {
    thread.copy_groups.push_back(std::move(thread.copies));
    thread.copies.clear();
}
void cp_async_wait_group(Thread& thread, u32 pending) {
    std::vector<Copy> ready;
    while (thread.copy_groups.size() > pending) {
        const std::vector<Copy>& group = thread.copy_groups.front();
        ready.insert(ready.end(), group.begin(), group.end());
        thread.copy_groups.pop_front();
    }
    if (machine.schedule)
        for (size_t left = ready.size(); left > 1; --left) std::swap(ready[left - 1], ready[random_number() % left]);
    for (const Copy& copy : ready) {
        end_copy(thread, copy);
        // Now it is seen by those who are told from here on.
        order_write(thread, block_of(thread), copy.to, copy.width);
    }
}
// Whoever exits does not wait for them, but they come.
static void end_all_copies(Thread& thread) {
    for (const std::vector<Copy>& group : thread.copy_groups)
        for (const Copy& copy : group) end_copy(thread, copy);
    for (const Copy& copy : thread.copies) end_copy(thread, copy);
}
