// What the kernel tells of a process: one that runs, one that is stopped, one that a debugger holds, one that has gone.
#include <sched.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "check.h"
#include "transport/process.h"

using namespace pipekern;

int main() {
    const pid_t pid = fork();
    if (pid == 0)
        for (volatile int i = 0;; i = i + 1) {
        }
    const std::uint64_t before = pulse(pid).cpu_ticks;
    while (pulse(pid).cpu_ticks == before) sched_yield();  // it runs, so this ends

    int status = 0;
    kill(pid, SIGSTOP);
    CHECK_EQUAL(waitpid(pid, &status, WUNTRACED), pid);
    const Pulse stopped = pulse(pid);
    CHECK(stopped.cpu_ticks > before && !stopped.debugged);
    CHECK_EQUAL(pulse(pid).cpu_ticks, stopped.cpu_ticks);

    kill(pid, SIGCONT);
    CHECK_EQUAL(waitpid(pid, &status, WCONTINUED), pid);
    CHECK_EQUAL(ptrace(PTRACE_SEIZE, pid, nullptr, nullptr), 0);
    CHECK_EQUAL(ptrace(PTRACE_INTERRUPT, pid, nullptr, nullptr), 0);
    CHECK_EQUAL(waitpid(pid, &status, 0), pid);
    CHECK(pulse(pid).debugged);

    kill(pid, SIGKILL);
    while (waitpid(pid, &status, 0) == pid && !WIFSIGNALED(status)) {
    }
    CHECK(pulse(pid).cpu_ticks == 0 && !pulse(pid).debugged);
}
