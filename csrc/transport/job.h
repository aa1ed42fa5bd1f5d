// One rank's membership in a job: its peers, the shared page, the watcher.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transport/exchange.h"
#include "transport/fork.h"
#include "transport/mesh.h"
#include "transport/page.h"
#include "transport/watcher.h"

namespace pipekern {

// What a long wait tells its caller, every 100 ms at most: the place for Ctrl-C and for a line in the log.
struct Observer {
    virtual ~Observer() = default;
    virtual void slice() {}
    virtual void note(const std::string&) {}
};

// Whether this process is still the one that joined. Outlives the job where views of its slots do.
struct Session {
    std::atomic<bool> inherited{false};  // true in a forked child: it must not touch the shared pages
};

class Job {
  public:
    // Binds this rank's socket; the ranks may connect() once all have come here.
    Job(int rank, int world, const std::string& token, std::int64_t timeout_ns, std::unique_ptr<Observer> observer);
    // Without close() before, the others learn that this rank has died.
    ~Job();
    Job(const Job&) = delete;
    Job& operator=(const Job&) = delete;

    void connect();

    // Raises the job's failure, or says that this process has left it.
    void check() const {
        if (!usable_.load(std::memory_order_relaxed)) raise_unusable();
        page_->check();
    }
    // Makes every rank raise `text` as the fault of this one.
    void abort(const std::string& text);
    // Leaves in peace. Twice is fine.
    void close();

    Page& page() { return *page_; }
    Exchange& exchange() { return *exchange_; }
    Observer& observer() { return *observer_; }
    std::shared_ptr<const Session> session() const { return session_; }
    int rank() const { return rank_; }
    int world() const { return world_; }
    std::int64_t timeout_ns() const { return timeout_ns_; }

    // Whether `peer` has left in peace, and so will neither send nor free a slot.
    bool has_closed(int peer) const { return peer != rank_ && page_->state(peer) == Page::kClosed; }
    // Whether the process of `peer` has ended, as far as its descriptor tells.
    bool has_died(int peer) const;
    // Makes every rank raise PeerDied: this one waits for what such a peer will not do.
    void fail_closed(const Awaited& what) const;

    // Passes memory; waits while the socket is full, and takes in what comes meanwhile.
    void pass(int peer, const Frame& frame, const std::shared_ptr<Memory>& memory);

  private:
    [[noreturn]] void raise_unusable() const;
    void become_child();
    void share_page();
    std::shared_ptr<Memory> take_page();
    void close_sockets();

    const int rank_;
    const int world_;
    const std::string token_;
    const std::int64_t timeout_ns_;
    const std::unique_ptr<Observer> observer_;
    const std::shared_ptr<Session> session_ = std::make_shared<Session>();
    std::atomic<bool> usable_{false};
    Fd listener_;
    std::vector<Peer> peers_;
    std::unique_ptr<Exchange> exchange_;
    std::unique_ptr<Page> page_;
    std::unique_ptr<Watcher> watcher_;
    ForkGuard guard_;
};

}  // namespace pipekern
