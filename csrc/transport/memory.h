// Shared memory without a name: a sealed memfd and its mapping.
#pragma once

#include <cstddef>
#include <memory>

#include "transport/fd.h"

namespace pipekern {

class Memory {
  public:
    // Zero-filled; the seals forbid every process to change its size, so that no access can fault later.
    static std::shared_ptr<Memory> create(std::size_t bytes);

    // Maps what another process created; refuses memory that is not sealed or not of `bytes`.
    static std::shared_ptr<Memory> map(Fd fd, std::size_t bytes);

    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory();

    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }
    int fd() const { return fd_.get(); }
    bool contains(const void* pointer) const { return pointer >= data_ && pointer < data_ + size_; }

    // The mapping stays. A descriptor that is passed on is not needed here any more.
    void drop_fd() { fd_.close(); }

  private:
    Memory(Fd fd, std::size_t bytes);

    Fd fd_;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace pipekern
