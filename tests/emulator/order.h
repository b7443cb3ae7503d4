// What came before what: a vector clock for each thread, shared among threads while it says the same.
//
// Agents are the threads and whatever works beside them: a barrier's boxes, a warpgroup's products, a thread's stores.
// One counter stamps everything. An agent that lets others know of what it did does so with the counter's value, which
// goes up after it; so what is known of an agent is one number, and all of its accesses with stamps up to that.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace emulator {

constexpr int kLanes = 32;
constexpr int kUnits = 4;  // of 32 agents that are no threads

// When an agent did something.
struct Moment {
    std::uint32_t stamp;  // 0: never
    std::uint16_t agent;
};

struct Knowledge {
    std::vector<std::uint32_t> last;   // by agent: everything up to this stamp is known
    std::vector<std::uint32_t> least;  // of each 32 agents

    bool covers(const Moment& moment) const { return last[moment.agent] >= moment.stamp; }
};
using Known = std::shared_ptr<const Knowledge>;

// What several agents know, put together.
class Gathering {
   public:
    void start(std::size_t agents) {
        last.assign(agents, 0);
        latest = nullptr;
    }
    void add(const Known& known) {
        if (known == latest) return;
        latest = known;
        combine<true>(known->last);
    }
    // What all know: for the first of them, and then for each other.
    void begin_common(const Known& known) {
        latest = known;
        last = known->last;
    }
    void keep_common(const Known& known) {
        if (known == latest) return;
        latest = known;
        combine<false>(known->last);
    }
    void add(int agent, std::uint32_t stamp) { last[agent] = stamp; }
    Known freeze() const {
        auto result = std::make_shared<Knowledge>();
        result->last = last;
        result->least.resize(last.size() / kLanes);
        for (std::size_t unit = 0; unit < result->least.size(); ++unit) {
            std::uint32_t least = ~0u;
            for (int lane = 0; lane < kLanes; ++lane) {
                const std::uint32_t stamp = last[unit * kLanes + lane];
                least = stamp < least ? stamp : least;
            }
            result->least[unit] = least;
        }
        return result;
    }

   private:
    using Eight = std::uint32_t __attribute__((vector_size(32), aligned(4)));

    template <bool kMore>
    void combine(const std::vector<std::uint32_t>& other) {
        for (std::size_t first = 0; first < last.size(); first += 8) {
            Eight& mine = *reinterpret_cast<Eight*>(&last[first]);
            const Eight theirs = *reinterpret_cast<const Eight*>(&other[first]);
            mine = kMore ? (theirs > mine ? theirs : mine) : (theirs < mine ? theirs : mine);
        }
    }

    std::vector<std::uint32_t> last;
    Known latest;  // added; a pointer that is shared, so that no other can come to its address
};

}  // namespace emulator
