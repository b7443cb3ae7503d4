// Who runs next.
//
// Threads are fibers; they leave only where they wait, and in schedules 1 and 2 now and then at accesses to memory.
// Schedule 0 runs them in order. The others choose at random, and let one warp wait while the rest goes on, another
// one after a while: what a warp relies on without having waited for it is then not there.
#pragma once
#include "machine.h"

constexpr u32 kAccessesBetweenSwaps = 16;   // on average
constexpr u32 kPicksOfAStarvation = 4096;
constexpr u32 kPicksBetweenBoxes = 64;      // in schedule 2, on average

static void wait(Thread& thread, const char* what) {
    thread.state = State::waits;
    thread.waits_for = what;
    thread.waits_at = thread.line;
    leave_thread();
}
static void wait_among(std::vector<Thread*>& waiters, Thread& thread, const char* what) {
    waiters.push_back(&thread);
    wait(thread, what);
}
static void wake(Thread& thread) {
    if (thread.state != State::waits) return;
    thread.state = State::runs;
    machine.runnable.push_back(&thread);
}
static void wake_all(std::vector<Thread*>& waiters) {
    for (Thread* thread : waiters) wake(*thread);
    waiters.clear();
}
// To be woken does not mean that it is one's turn: others may have come first.
template <typename Condition>
static void wait_until(const Condition& condition, std::vector<Thread*>& waiters, Thread& thread, const char* what) {
    while (!condition()) wait_among(waiters, thread, what);
}

static void let_others_run(Thread& thread) {
    machine.runnable.push_back(&thread);
    leave_thread();
}
static void preempt(Thread& thread) {
    if (machine.schedule && random_number() % kAccessesBetweenSwaps == 0) let_others_run(thread);
}

static Thread& next_thread() {
    std::deque<Thread*>& runnable = machine.runnable;
    if (machine.schedule == 0) {
        Thread* first = runnable.front();
        runnable.pop_front();
        return *first;
    }
    if (++machine.picks % kPicksOfAStarvation == 0) machine.starved_warp = random_number() % machine.warps.size();
    size_t pick = random_number() % runnable.size();
    for (int again = 0; again < 8 && runnable[pick]->index / kLanes == machine.starved_warp; ++again)
        pick = random_number() % runnable.size();
    Thread* picked = runnable[pick];
    runnable[pick] = runnable.back();
    runnable.pop_back();
    return *picked;
}

static void report_deadlock() {
    std::map<std::string, int> waits;
    for (const Thread* thread : machine.threads) {
        if (thread->state == State::exited) continue;
        const std::string block = std::to_string(thread->block[0]) + "," + std::to_string(thread->block[1]) + "," +
                                  std::to_string(thread->block[2]);
        ++waits["warp " + std::to_string(thread->warp) + " of block (" + block + ") at " + thread->waits_for +
                " of PTX line " + std::to_string(thread->waits_at)];
    }
    std::string text = "deadlock:";
    for (const auto& wait : waits) text += " " + std::to_string(wait.second) + " threads of " + wait.first + ";";
    record_failure("%s", text.c_str());
}
