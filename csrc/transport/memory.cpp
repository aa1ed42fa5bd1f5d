#include "transport/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <cerrno>
#include <string>

#include "transport/error.h"

namespace pipekern {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr unsigned kNoExec = 0x8;  // MFD_NOEXEC_SEAL, Linux 6.3
constexpr std::size_t kHugePage = std::size_t{2} << 20;

Fd new_memfd() {
    Fd fd(memfd_create("pipekern", MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExec));
    if (!fd && errno == EINVAL) fd = Fd(memfd_create("pipekern", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!fd) throw_errno("memfd_create", "the shared-memory transport needs it: use transport='dist'");
    return fd;
}

}  // namespace

std::shared_ptr<Memory> Memory::create(std::size_t bytes) {
    Fd fd = new_memfd();
    if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
        throw_errno("shared memory of " + std::to_string(bytes) + " bytes");
    if (fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) throw_errno("sealing shared memory");
    return std::shared_ptr<Memory>(new Memory(std::move(fd), bytes));
}

std::shared_ptr<Memory> Memory::map(Fd fd, std::size_t bytes) {
    const int seals = fcntl(fd.get(), F_GET_SEALS);
    struct stat info{};
    if (seals < 0 || fstat(fd.get(), &info) != 0) throw_errno("looking at a peer's shared memory");
    if ((seals & kSeals) != kSeals || static_cast<std::size_t>(info.st_size) != bytes)
        throw Failure(Fault::kTransport, -1,
                      "a peer passed shared memory of " + std::to_string(info.st_size) + " bytes with seals " +
                          std::to_string(seals) + "; " + std::to_string(bytes) + " sealed bytes were announced");
    auto memory = std::shared_ptr<Memory>(new Memory(std::move(fd), bytes));
    memory->drop_fd();
    return memory;
}

Memory::Memory(Fd fd, std::size_t bytes) : fd_(std::move(fd)), size_(bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    if (data == MAP_FAILED) throw_errno("mapping " + std::to_string(bytes) + " bytes of shared memory");
    // Where the kernel allows it, large slots lie in huge pages; a refusal changes nothing but speed.
    if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
    data_ = static_cast<std::byte*>(data);
}

Memory::~Memory() { munmap(data_, size_); }

}  // namespace pipekern
