// What can go wrong, one kind for each class of pipekern.errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pipekern {

enum class Fault : std::uint32_t {
    kNone = 0,
    kAborted = 1,  // a rank failed and told so
    kDied = 2,     // a rank's process has ended
    kFrozen = 3,   // a rank's process lives and does not beat
    kTimeout = 4,  // every rank waits
    kMismatch = 5,
    kTransport = 6,  // anything else: the system refused something, or a call broke a rule
};

class Failure : public std::runtime_error {
  public:
    Failure(Fault kind, int rank, const std::string& text) : std::runtime_error(text), kind_(kind), rank_(rank) {}

    Fault kind() const { return kind_; }
    int rank() const { return rank_; }  // the rank at fault, -1 where there is none

  private:
    Fault kind_;
    int rank_;
};

// A refused system call: what was tried, errno in words, and the mend.
[[noreturn]] void throw_errno(const std::string& tried, const std::string& mend = "");

}  // namespace pipekern
