// A job whose ranks are threads of the test, or the one rank of a test that talks to itself.
#pragma once

#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "transport/clock.h"
#include "transport/job.h"

namespace ranks {

using pipekern::Job;
using pipekern::kSecond;

inline std::string fresh_token() {
    static std::atomic<int> count{0};
    return "test-" + std::to_string(getpid()) + "-" + std::to_string(count++);
}

inline std::shared_ptr<Job> bind(int rank, int world, const std::string& token,
                                 std::int64_t timeout_ns = 60 * kSecond) {
    return std::make_shared<Job>(rank, world, token, timeout_ns, std::make_unique<pipekern::Observer>());
}

// A job of one rank: its links go from it to itself, and both ends see one mapping, so that a thread sanitizer does.
inline std::shared_ptr<Job> alone(std::int64_t timeout_ns = 60 * kSecond) {
    auto job = bind(0, 1, fresh_token(), timeout_ns);
    job->connect();
    return job;
}

inline void each(std::size_t count, const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < count; ++i) threads.emplace_back(body, static_cast<int>(i));
    for (auto& thread : threads) thread.join();
}

inline std::vector<std::shared_ptr<Job>> connected(int world, std::int64_t timeout_ns = 60 * kSecond) {
    const std::string token = fresh_token();
    std::vector<std::shared_ptr<Job>> jobs;
    for (int rank = 0; rank < world; ++rank) jobs.push_back(bind(rank, world, token, timeout_ns));
    each(jobs.size(), [&](int rank) { jobs[static_cast<std::size_t>(rank)]->connect(); });
    return jobs;
}

}  // namespace ranks
