#include "transport/page.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "transport/clock.h"
#include "transport/header.h"

namespace pipekern {
namespace {

// A rank that has not said for this long that it waits, does something else. Waits say so every 50 ms.
constexpr std::int64_t kStallFresh = kSecond;

}  // namespace

std::size_t Page::size(int world) {
    return align_up(sizeof(Head) + sizeof(Record) * static_cast<std::size_t>(world), 4096);
}

Page::Page(std::shared_ptr<Memory> memory, int rank, int world)
    : memory_(std::move(memory)), rank_(rank), world_(world) {}

bool Page::abort(Fault kind, int root, const std::string& text) {
    std::uint64_t none = 0;
    const auto word = static_cast<std::uint64_t>(kind) << 32 | static_cast<std::uint32_t>(root + 1);
    if (!head().abort.compare_exchange_strong(none, word)) return false;
    // A long traceback keeps its end: there stands the error.
    const std::size_t bytes = std::min(text.size(), kTextBytes);
    std::memcpy(head().text, text.data() + text.size() - bytes, bytes);
    head().text_bytes = static_cast<std::uint32_t>(bytes);
    head().text_ready.store(1, std::memory_order_release);
    return true;
}

void Page::raise() const {
    const std::uint64_t word = head().abort.load(std::memory_order_acquire);
    const int root = static_cast<int>(word & 0xffffffff) - 1;
    // The text follows the word at once, unless its writer was killed in between.
    for (int i = 0; i < 200 && !head().text_ready.load(std::memory_order_acquire); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::string text = "rank " + std::to_string(root) + " failed and left no text";
    if (head().text_ready.load(std::memory_order_acquire)) text.assign(head().text, head().text_bytes);
    throw Failure(static_cast<Fault>(word >> 32), root, text);
}

void Page::set_state(State state) {
    beat(now_ns());
    mine().state.store(state);
}

void Page::stalled(const Awaited& what, std::int64_t now) {
    Record& own = mine();
    const bool continues = own.since_ns.load(std::memory_order_relaxed) != 0 &&
                           now - own.last_ns.load(std::memory_order_relaxed) < kStallFresh;
    std::uint64_t words[kNameWords] = {};
    std::memcpy(words, what.link->data(), std::min(what.link->size(), sizeof words - 1));
    for (std::size_t i = 0; i < kNameWords; ++i) own.name[i].store(words[i], std::memory_order_relaxed);
    own.kind.store(what.kind, std::memory_order_relaxed);
    own.peer.store(what.peer, std::memory_order_relaxed);
    own.tag.store(what.tag, std::memory_order_relaxed);
    own.last_ns.store(now, std::memory_order_relaxed);
    if (!continues) own.since_ns.store(now, std::memory_order_release);
    stalled_.store(true, std::memory_order_relaxed);
}

void Page::clear_stall() {
    stalled_.store(false, std::memory_order_relaxed);
    mine().since_ns.store(0, std::memory_order_release);
}

bool Page::waits(int rank, std::int64_t now) const {
    const Record& other = record(rank);
    return other.since_ns.load(std::memory_order_acquire) != 0 &&
           now - other.last_ns.load(std::memory_order_relaxed) < kStallFresh;
}

std::int64_t Page::all_wait_since(std::int64_t now) const {
    std::int64_t since = 0;
    for (int rank = 0; rank < world_; ++rank) {
        if (state(rank) == kClosed) continue;
        if (state(rank) != kRunning || !waits(rank, now)) return 0;
        since = std::max(since, record(rank).since_ns.load(std::memory_order_acquire));
    }
    return since;
}

std::vector<Stall> Page::stalls(std::int64_t now) const {
    std::vector<Stall> all;
    for (int rank = 0; rank < world_; ++rank)
        if (state(rank) == kRunning && waits(rank, now))
            all.push_back({rank, record(rank).since_ns.load(std::memory_order_acquire), describe_record(record(rank))});
    return all;
}

std::string Page::describe_record(const Record& other) {
    std::uint64_t words[kNameWords];
    for (std::size_t i = 0; i < kNameWords; ++i) words[i] = other.name[i].load(std::memory_order_relaxed);
    const char* text = reinterpret_cast<const char*>(words);
    const std::string name(text, strnlen(text, sizeof words));
    return describe(Awaited{static_cast<Awaited::Kind>(other.kind.load(std::memory_order_relaxed)),
                            other.peer.load(std::memory_order_relaxed), other.tag.load(std::memory_order_relaxed),
                            &name});
}

std::string describe(const Awaited& what) {
    const std::string rank = "rank " + std::to_string(what.peer);
    const std::string link = "link '" + *what.link + "'";
    if (what.kind == Awaited::kLink) return rank + " to open " + link;
    const std::string message = "the message with tag " + std::to_string(what.tag) + " on " + link;
    return what.kind == Awaited::kSlot ? "a free slot for " + message + " to " + rank : message + " from " + rank;
}

}  // namespace pipekern
