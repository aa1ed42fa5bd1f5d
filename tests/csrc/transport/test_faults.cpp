// Ranks as processes: killed, stopped, held. Every survivor names the rank, whoever its neighbours are. That forked
// children disturb nobody is tested from Python: sanitizers do not follow a fork of a process that has threads.
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include <functional>

#include "check.h"
#include "ranks.h"
#include "transport/receiver.h"
#include "transport/sender.h"

using namespace pipekern;

namespace {

constexpr int kWorld = 3;
constexpr std::int64_t kPatience = 30 * kSecond;

// A page of flags that the test and its ranks share.
struct Stage {
    std::atomic<int> bound{0};
    std::atomic<int> ready{0};
    std::atomic<int> caused{0};
};

void until(const std::function<bool()>& done) {
    for (const std::int64_t start = now_ns(); !done(); sched_yield()) CHECK(now_ns() - start < kPatience);
}

// Runs `body(rank)` with a connected job in kWorld processes; returns their pids.
std::vector<pid_t> start(Stage& stage, std::int64_t timeout_ns,
                         const std::function<void(int, std::shared_ptr<Job>&)>& body) {
    const std::string token = ranks::fresh_token();
    std::vector<pid_t> pids;
    for (int rank = 0; rank < kWorld; ++rank) {
        const pid_t pid = fork();
        if (pid == 0) {
            auto job = ranks::bind(rank, kWorld, token, timeout_ns);
            ++stage.bound;
            until([&] { return stage.bound == kWorld; });
            job->connect();
            body(rank, job);
            job->close();
            std::_Exit(0);
        }
        pids.push_back(pid);
    }
    return pids;
}

void expect_exit(pid_t pid) {
    int status = 0;
    CHECK_EQUAL(waitpid(pid, &status, 0), pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

Stage& new_stage() {
    static std::vector<std::shared_ptr<Memory>> memories;
    memories.push_back(Memory::create(4096));
    return *new (memories.back()->data()) Stage;
}

// Rank 0 waits for rank 1, which waits for rank 2, which is killed.
void a_killed_rank_is_named_by_all() {
    Stage& stage = new_stage();
    auto pids = start(stage, 60 * kSecond, [&](int rank, std::shared_ptr<Job>& job) {
        const int next = rank + 1;
        std::unique_ptr<Receiver> receiver;
        std::unique_ptr<Sender> sender;
        if (rank > 0)
            sender = std::make_unique<Sender>(job, LinkName{static_cast<std::uint32_t>(rank), "up", 1}, rank - 1);
        if (next < kWorld)
            receiver = std::make_unique<Receiver>(job, LinkName{static_cast<std::uint32_t>(next), "up", 1}, next);
        ++stage.ready;
        if (rank == kWorld - 1) {
            pause();
            return;
        }
        CHECK_RAISES(Fault::kDied, kWorld - 1, "rank 2 died: its process", receiver->wait(0, -1));
        CHECK_RAISES(Fault::kDied, kWorld - 1, "rank 2", job->check());
    });
    until([&] { return stage.ready == kWorld; });
    const std::int64_t caused = now_ns();
    kill(pids[2], SIGKILL);
    expect_exit(pids[0]);
    expect_exit(pids[1]);
    CHECK(now_ns() - caused < 2 * kSecond);
    waitpid(pids[2], nullptr, 0);
}

void a_stopped_rank_is_frozen(std::int64_t timeout_ns, const char* sign) {
    Stage& stage = new_stage();
    auto pids = start(stage, timeout_ns, [&](int rank, std::shared_ptr<Job>& job) {
        if (rank == 1) {
            Sender sender(job, {0, "1>0", 1}, 0);
            ++stage.ready;
            until([&] { return job->page().aborted(); });
            CHECK_RAISES(Fault::kFrozen, 1, sign, job->check());
            return;
        }
        if (rank == 0) {
            Receiver receiver(job, {0, "1>0", 1}, 1);
            ++stage.ready;
            CHECK_RAISES(Fault::kFrozen, 1, sign, receiver.wait(0, -1));
            return;
        }
        ++stage.ready;
        until([&] { return job->page().aborted(); });
        CHECK_RAISES(Fault::kFrozen, 1, sign, job->check());
    });
    until([&] { return stage.ready == kWorld; });
    kill(pids[1], SIGSTOP);
    expect_exit(pids[0]);
    expect_exit(pids[2]);
    kill(pids[1], SIGCONT);
    expect_exit(pids[1]);
}

// A process that a debugger holds is still, and is waited for.
void a_debugged_rank_is_waited_for() {
    Stage& stage = new_stage();
    auto pids = start(stage, 8 * kSecond, [&](int rank, std::shared_ptr<Job>& job) {
        if (rank == 1) {
            Sender sender(job, {0, "1>0", 1}, 0);
            ++stage.ready;
            until([&] { return stage.caused != 0; });
            const std::uint8_t byte = 1;
            const Piece piece{&byte, 1};
            CHECK(sender.send(Label{0, 0, 0, 1, 0, {1}}, &piece, 1));
        } else if (rank == 0) {
            Receiver receiver(job, {0, "1>0", 1}, 1);
            ++stage.ready;
            CHECK(receiver.wait(0, -1));
        } else {
            ++stage.ready;
        }
        if (rank != 0) until([&] { return job->page().state(0) == Page::kClosed; });
    });
    until([&] { return stage.ready == kWorld; });
    int status = 0;
    CHECK_EQUAL(ptrace(PTRACE_SEIZE, pids[1], nullptr, nullptr), 0);
    CHECK_EQUAL(ptrace(PTRACE_INTERRUPT, pids[1], nullptr, nullptr), 0);
    CHECK_EQUAL(waitpid(pids[1], &status, 0), pids[1]);
    std::this_thread::sleep_for(std::chrono::seconds(2));  // what is tested: longer than a process may be still
    stage.caused = 1;
    CHECK_EQUAL(ptrace(PTRACE_DETACH, pids[1], nullptr, nullptr), 0);
    for (pid_t pid : pids) expect_exit(pid);
}

// A live rank that computes for several deadlines is waited for; so is everybody after the whole job was stopped.
void the_busy_and_the_stopped_together_are_waited_for() {
    Stage& stage = new_stage();
    auto pids = start(stage, kSecond, [&](int rank, std::shared_ptr<Job>& job) {
        if (rank == 1) {
            Sender sender(job, {0, "1>0", 1}, 0);
            ++stage.ready;
            const std::int64_t begin = now_ns();
            until([&] { return stage.caused != 0 && now_ns() - begin > 3 * kSecond; });
            const std::uint8_t byte = 1;
            const Piece piece{&byte, 1};
            Label label{0, 0, 0, 1, 0, {1}};
            CHECK(sender.send(label, &piece, 1));
            until([&] { return job->page().state(0) == Page::kClosed; });
            return;
        }
        if (rank == 0) {
            Receiver receiver(job, {0, "1>0", 1}, 1);
            ++stage.ready;
            CHECK(receiver.wait(0, -1));
            return;
        }
        ++stage.ready;
        until([&] { return job->page().state(0) == Page::kClosed; });
    });
    until([&] { return stage.ready == kWorld; });
    for (pid_t pid : pids) kill(pid, SIGSTOP);
    std::this_thread::sleep_for(std::chrono::seconds(2));  // what is tested: a stop longer than the deadline
    for (pid_t pid : pids) kill(pid, SIGCONT);
    stage.caused = 1;
    for (pid_t pid : pids) expect_exit(pid);
}

}  // namespace

int main() {
    a_killed_rank_is_named_by_all();
    a_stopped_rank_is_frozen(kSecond / 2, "rank 1 is frozen");
    a_stopped_rank_is_frozen(16 * kSecond, "has neither beaten nor used CPU time for");
    a_debugged_rank_is_waited_for();
    the_busy_and_the_stopped_together_are_waited_for();
}
