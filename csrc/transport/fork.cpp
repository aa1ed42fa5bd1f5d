#include "transport/fork.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "transport/error.h"

namespace pipekern {
namespace {

// pthread_atfork takes no argument and cannot be undone, hence the one list a process.
struct Registry {
    std::mutex mutex;
    std::vector<ForkGuard*> guards;
    bool installed = false;
};

Registry& registry() {
    static auto* registry = new Registry;  // never destroyed: a fork may come during exit
    return *registry;
}

void before_fork() { registry().mutex.lock(); }
void after_fork_in_parent() { registry().mutex.unlock(); }
void after_fork_in_child() {
    for (const ForkGuard* guard : registry().guards) guard->run();
    registry().mutex.unlock();
}

}  // namespace

ForkGuard::ForkGuard(std::function<void()> in_child) : in_child_(std::move(in_child)) {
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    if (!all.installed && pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0)
        throw Failure(Fault::kTransport, -1, "pthread_atfork: no memory");
    all.installed = true;
    all.guards.push_back(this);
}

ForkPause::ForkPause() : lock_(registry().mutex) {}

ForkGuard::~ForkGuard() {
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    all.guards.erase(std::remove(all.guards.begin(), all.guards.end(), this), all.guards.end());
}

}  // namespace pipekern
