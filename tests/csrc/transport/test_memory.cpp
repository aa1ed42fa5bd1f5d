// Shared memory: two mappings show the same bytes, and nobody can change its size.
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "transport/memory.h"

using namespace pipekern;

int main() {
    auto first = Memory::create(8192);
    CHECK_EQUAL(first->size(), 8192u);
    CHECK(first->data()[8191] == std::byte{0});
    auto second = Memory::map(Fd(dup(first->fd())), 8192);
    CHECK(second->data() != first->data());
    first->data()[5000] = std::byte{42};
    CHECK(second->data()[5000] == std::byte{42});
    CHECK(first->contains(first->data()) && first->contains(first->data() + 8191));
    CHECK(!first->contains(first->data() + 8192) && !first->contains(second->data()));

    CHECK(ftruncate(first->fd(), 4096) != 0);
    CHECK(ftruncate(first->fd(), 16384) != 0);
    CHECK_RAISES(Fault::kTransport, -1, "announced", Memory::map(Fd(dup(first->fd())), 4096));

    const int loose = memfd_create("loose", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(ftruncate(loose, 4096) == 0);
    CHECK_RAISES(Fault::kTransport, -1, "seals", Memory::map(Fd(loose), 4096));

    // A mapping outlives its descriptor and the other mapping.
    first->drop_fd();
    CHECK_EQUAL(first->fd(), -1);
    first.reset();
    CHECK(second->data()[5000] == std::byte{42});
}
