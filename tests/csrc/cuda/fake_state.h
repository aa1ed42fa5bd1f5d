// What the stand-in driver keeps: devices, memory, streams, and what has not been given back. Part of fake_driver.cpp.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "fake_queue.h"

namespace cuda = pipekern::cuda;

namespace fake {
namespace {

constexpr int kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500, kUnknown = 999, kRegisteredAlready = 712,
              kPeerUnsupported = 217;

struct Block {
    int fd = -1;
    std::size_t bytes;
};
struct Device {
    int ordinal = 0, retained = 0;
};

struct State {
    std::mutex mutex;
    Device devices[8];
    std::map<cuda::Pointer, Block> allocations, imports;
    std::map<std::uintptr_t, std::size_t> registered;
    std::set<void*> streams, events, modules;
    std::shared_ptr<Queue> shared;
};
State& state() {
    static auto* state = new State;
    return *state;
}
thread_local std::vector<Device*> current;

Knobs* read_knobs() {
    auto* knobs = new Knobs;
    const std::map<std::string, std::atomic<int>*> names = {
        {"devices", &knobs->devices}, {"jitter", &knobs->jitter},   {"one_queue", &knobs->one_queue},
        {"no_ipc", &knobs->no_ipc},   {"no_peer", &knobs->no_peer}, {"no_stream_ops", &knobs->no_stream_ops},
        {"fail", &knobs->fail}};
    const char* text = std::getenv("FAKE_CUDA");
    std::istringstream words(text ? text : "");
    for (std::string word; std::getline(words, word, ',');)
        names.at(word.substr(0, word.find('=')))->store(std::atoi(word.c_str() + word.find('=') + 1));
    return knobs;
}

// Counts a call. True if it is to fail.
bool fails() { return calls().fetch_add(1) + 1 == knobs().fail.load(); }

int map(cuda::Pointer* pointer, int fd, std::size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) return cuda::kOutOfMemory;
    *pointer = reinterpret_cast<cuda::Pointer>(data);
    return 0;
}

void unmap(std::map<cuda::Pointer, Block>& blocks, cuda::Pointer pointer) {
    munmap(reinterpret_cast<void*>(pointer), blocks.at(pointer).bytes);
    if (blocks.at(pointer).fd >= 0) close(blocks.at(pointer).fd);
    blocks.erase(pointer);
}

std::shared_ptr<Queue> new_queue() {
    if (!knobs().one_queue.load()) return std::make_shared<Queue>();
    const std::lock_guard lock(state().mutex);
    if (!state().shared) state().shared = std::make_shared<Queue>();
    return state().shared;
}

// Does the operation in the stream's turn; at once in the default stream.
int enqueue(cuda::StreamHandle handle, std::function<void()> operation) {
    if (current.empty()) return kInvalidContext;
    if (!handle)
        operation();
    else
        reinterpret_cast<Stream*>(handle)->add(std::move(operation));
    return 0;
}

bool is_registered(cuda::Pointer flag) {
    const std::lock_guard lock(state().mutex);
    auto next = state().registered.upper_bound(flag);
    return next != state().registered.begin() && (--next, flag + 8 <= next->first + next->second);
}

std::atomic<std::uint64_t>& word(cuda::Pointer flag) { return *reinterpret_cast<std::atomic<std::uint64_t>*>(flag); }
void* at(cuda::Pointer pointer) { return reinterpret_cast<void*>(pointer); }

struct Handle {
    int pid, fd;
    std::size_t bytes;
};

}  // namespace

Knobs& knobs() {
    static Knobs* all = read_knobs();
    return *all;
}

std::atomic<int>& calls() {
    static std::atomic<int> count{0};
    return count;
}

int asked(const void* stream) { return static_cast<const Stream*>(stream)->asked.load(); }

std::string leaks() {
    State& all = state();
    const std::lock_guard lock(all.mutex);
    int retained = 0;
    for (const Device& device : all.devices) retained += device.retained;
    std::string text;
    const auto count = [&text](std::size_t number, const char* what) {
        if (number) text += std::to_string(number) + " " + what + ", ";
    };
    count(all.allocations.size(), "allocations");
    count(all.imports.size(), "imports");
    count(all.registered.size(), "registrations");
    count(all.streams.size(), "streams");
    count(all.events.size(), "events");
    count(all.modules.size(), "modules");
    count(static_cast<std::size_t>(retained), "contexts");
    return text;
}

long allocated_bytes() {
    const std::lock_guard lock(state().mutex);
    long bytes = 0;
    for (const auto& [pointer, block] : state().allocations) bytes += static_cast<long>(block.bytes);
    return bytes;
}

}  // namespace fake
