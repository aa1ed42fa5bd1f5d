// What ends a link between devices: failing calls of the driver, parked streams of a failed job.
#include "cuda/staged_receiver.h"
#include "device_link.h"

using namespace device_link;

namespace {

// Every call that a whole exchange makes fails once: each time it raises, or goes another way; it neither hangs nor
// leaks.
void each_call_fails_once(bool on_host, bool staged) {
    const Knobs restore;
    fake::knobs().devices = 2;
    fake::knobs().no_peer = staged;
    int raised = 0, fine = 0;
    for (int call = 0, last = 0; call <= last; ++call) {  // first none: how many there are
        fake::calls() = 0;
        fake::knobs().fail = call;
        try {
            Link link(2, Codec::kFp8, on_host, 1);
            for (std::uint64_t tag = 1; tag <= 3; ++tag) {
                CHECK(link.send(tag, {1, 2, 3}));
                CHECK(link.receiver->wait(tag, -1));
                const auto delivery = link.receiver->take(tag, link.target.handle());
                CHECK_EQUAL(link.read(delivery).size(), 3u);
            }
            ++fine;
        } catch (const Failure& failure) {
            CHECK(failure.kind() == Fault::kTransport || failure.kind() == Fault::kAborted);
            CHECK(std::string(failure.what()).size() > 20);
            if (call == 0) check::fail(__FILE__, __LINE__, failure.what());
            ++raised;
        }
        last = std::max(last, fake::calls().load());
        fake::knobs().fail = 0;
    }
    CHECK(raised >= 40 && fine >= 1);  // a way that fails to open is replaced by another
}

// The job fails while a receiving stream waits for data that will not come: it goes on, over NaN.
void a_parked_receive_is_released(bool staged) {
    const Knobs restore;
    fake::knobs().no_peer = staged;
    Gate gate;
    {
        Link link(2, Codec::kNone, false, 1);
        gate.hold(link.source);
        Label label{1, 0, kU32, 1, 0, {3}};
        CHECK(link.sender.send(label, {}, {{link.source.memory->pointer(), 3, kU32}}, link.source.handle(), true));
        auto delivery = link.receiver->take(1, link.target.handle());
        std::uint32_t got[3] = {};
        link.target.copy(reinterpret_cast<Pointer>(got), reinterpret_cast<void*>(delivery.base + delivery.offset(0)),
                         sizeof got);
        delivery = {};
        CHECK(Driver::get().stream_query(link.target.handle()) == kNotReady);
        link.job->abort("the test fails");
        link.target.synchronize();
        for (const std::uint32_t word : got) CHECK_EQUAL(word, 0xffffffffu);
        CHECK_RAISES(Fault::kAborted, 0, "the test fails", link.receiver->take(2, link.target.handle()));
        CHECK_RAISES(Fault::kAborted, 0, "the test fails", link.sender.free(2));
        gate.open = true;
    }
}

// The job fails while a copy waits for a credit that the receiving stream cannot give.
void a_parked_send_is_released() {
    Gate gate;
    Link link(1);
    CHECK(link.send(1, {1}));
    gate.hold(link.target);
    link.receiver->take(1, link.target.handle());  // the credit is queued behind the gate
    CHECK(link.send(2, {2}));
    while (link.sender.reap() < 1) sched_yield();
    link.job->abort("the test fails");
    while (link.sender.reap() < 2) sched_yield();
    gate.open = true;
}

// Holds a stream until it is asked itself whether it is through. Outlives the stream.
struct Question {
    StreamHandle stream = nullptr;
    int before = 0;
    void hold(const Mine& mine) {
        stream = mine.handle();
        before = fake::asked(stream);
        const Current current(*mine.context);
        const auto wait = [](void* data) {
            const auto& self = *static_cast<Question*>(data);
            while (fake::asked(self.stream) == self.before) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        };
        demand(Driver::get().launch_host(stream, wait, this), "the test");
    }
};

// The event after a credit is refused: a link that closes asks the stream before it gives back what it writes the
// credit to.
void a_credit_without_an_event_is_waited_for() {
    const Knobs restore;
    Question question;
    Link link(1);
    CHECK(link.send(1, {1}));
    Delivery delivery = link.receiver->take(1, link.target.handle());
    link.target.synchronize();
    question.hold(link.target);
    fake::calls() = 0;
    fake::knobs().fail = 2;  // after the credit's write
    delivery = {};
    CHECK_RAISES(Fault::kAborted, 0, "recording an event", link.job->check());
}

// The same of a slot in host memory that the stream still reads.
void a_read_without_an_event_is_waited_for() {
    const Knobs restore;
    Question question;
    const auto job = ranks::alone();
    const Mine target;
    Sender sender(job, {0, "0>0", 1}, 0);
    const auto receiver = std::make_shared<StagedReceiver>(job, LinkName{0, "0>0", 1}, 0, target.context);
    const std::uint32_t word = 7;
    const Piece piece{&word, sizeof word};
    CHECK(sender.send({1, 0, kU32, 1, 0, {1}}, &piece, 1));
    auto arrival = receiver->take(1, target.handle());
    question.hold(target);
    target.copy(target.memory->pointer(), arrival->payload(), sizeof word);
    fake::calls() = 0;
    fake::knobs().fail = 1;
    arrival = {};
    CHECK_RAISES(Fault::kAborted, 0, "recording an event", job->check());
    receiver->close();
}

}  // namespace

int main() {
    fake::knobs().devices = 2;
    each_call_fails_once(false, false);
    each_call_fails_once(true, true);
    a_parked_receive_is_released(false);
    a_parked_receive_is_released(true);
    a_parked_send_is_released();
    a_credit_without_an_event_is_waited_for();
    a_read_without_an_event_is_waited_for();
    CHECK_EQUAL(fake::leaks(), std::string());
}
