// A link between the devices of two processes: this program starts itself as rank 1. Slots are opened over IPC, or
// staged where it is refused; the sender's death releases what its peer has parked.
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <numeric>

#include "device_link.h"

extern char** environ;

using namespace device_link;

namespace {

constexpr std::uint64_t kMessages = 60, kSlots = 2;
const LinkName kThere{0, "0>1", kSlots}, kBack{1, "1>0", kSlots};

std::vector<std::uint32_t> content(std::uint64_t tag) {
    std::vector<std::uint32_t> values(1 + tag % 7 * 500);
    std::iota(values.begin(), values.end(), static_cast<std::uint32_t>(tag << 16));
    return values;
}

// One rank's ends, and memory of its own for what it sends and reads.
struct Rank {
    std::shared_ptr<Job> job;
    std::shared_ptr<Steward> steward;
    Mine mine;
    std::unique_ptr<DeviceSender> sender;
    std::shared_ptr<DeviceReceiver> receiver;

    Rank(int rank, std::shared_ptr<Job> bound) : job(std::move(bound)) {
        job->connect();
        steward = std::make_shared<Steward>(job);
        const LinkName &out = rank ? kBack : kThere, &in = rank ? kThere : kBack;
        sender = std::make_unique<DeviceSender>(job, steward, out, 1 - rank, Codec::kNone, mine.context, false);
        receiver = std::make_shared<DeviceReceiver>(job, steward, in, 1 - rank, Codec::kNone, mine.context, false);
    }
    void close() {
        sender->close();
        receiver->close();
        sender.reset();
        receiver.reset();
        steward.reset();
        job->close();
    }
    void send(std::uint64_t tag) {
        const auto values = content(tag);
        const Pointer tensor = mine.memory->pointer() + tag % 8 * 16384;
        const Mine::Through through{mine};
        mine.copy(tensor, values.data(), 4 * values.size());
        Label label{tag, 0, kU32, 1, 0, {static_cast<std::uint32_t>(values.size())}};
        while (!sender->send(label, {}, {{tensor, values.size(), kU32}}, mine.handle(), false)) sched_yield();
    }
    void receive(std::uint64_t tag) {
        CHECK(receiver->wait(tag, -1));
        const auto delivery = receiver->take(tag, mine.handle());
        std::vector<std::uint32_t> got(delivery.parcel.parts[0].elements);
        mine.copy(reinterpret_cast<Pointer>(got.data()), reinterpret_cast<void*>(delivery.base + delivery.offset(0)),
                  4 * got.size());
        mine.synchronize();
        CHECK(got == content(tag));
    }
};

pid_t start(const char* program, const std::string& token, const char* how) {
    const char* arguments[] = {program, token.c_str(), how, nullptr};
    pid_t child = -1;
    CHECK_EQUAL(posix_spawn(&child, program, nullptr, nullptr, const_cast<char**>(arguments), environ), 0);
    return child;
}

void there_and_back(const char* program, bool ipc) {
    const Knobs restore;
    fake::knobs().no_ipc = !ipc;
    fake::knobs().jitter = 100;
    setenv("FAKE_CUDA", ipc ? "jitter=100" : "jitter=100,no_ipc=1", 1);
    const std::string token = ranks::fresh_token();
    auto bound = ranks::bind(0, 2, token);
    const pid_t child = start(program, token, "echo");
    Rank rank(0, std::move(bound));
    for (std::uint64_t tag = 1; tag <= kMessages; ++tag) {
        rank.send(tag);
        rank.receive(tag);
    }
    CHECK_EQUAL(rank.sender->way().substr(0, 3), std::string(ipc ? "ipc" : "sta"));
    rank.close();
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_EQUAL(status, 0);
}

// Rank 1 announces a message behind a stream that never gets there, and dies.
void a_dead_sender(const char* program) {
    const std::string token = ranks::fresh_token();
    auto bound = ranks::bind(0, 2, token);
    const pid_t child = start(program, token, "die");
    Rank rank(0, std::move(bound));
    CHECK(rank.receiver->wait(1, -1));
    auto delivery = rank.receiver->take(1, rank.mine.handle());
    const std::int64_t start = now_ns();
    rank.mine.synchronize();  // parked until the death is known
    CHECK(now_ns() - start < 2 * kSecond);
    CHECK_RAISES(Fault::kDied, 1, "rank 1 died", rank.job->check());
    CHECK_RAISES(Fault::kDied, 1, "rank 1 died", rank.receiver->take(2, rank.mine.handle()));
    delivery = {};
    rank.close();
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status));
}

int other(const std::string& token, const std::string& how) {
    Rank rank(1, ranks::bind(1, 2, token));
    if (how == "echo") {
        for (std::uint64_t tag = 1; tag <= kMessages; ++tag) {
            rank.receive(tag);
            rank.send(tag);
        }
        rank.close();
        return 0;
    }
    {
        const Current current(*rank.mine.context);
        demand(Driver::get().launch_host(rank.mine.handle(), [](void*) { ::pause(); }, nullptr), "the test");
    }
    const Label label{1, 0, kU32, 1, 0, {1}};
    CHECK(rank.sender->send(label, {}, {{rank.mine.memory->pointer(), 1, kU32}}, rank.mine.handle(), true));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    kill(getpid(), SIGKILL);
    return 1;
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 3) {
        const int status = other(arguments[1], arguments[2]);
        CHECK_EQUAL(fake::leaks(), std::string());
        return status;
    }
    there_and_back(arguments[0], true);
    there_and_back(arguments[0], false);
    a_dead_sender(arguments[0]);
    CHECK_EQUAL(fake::leaks(), std::string());
}
