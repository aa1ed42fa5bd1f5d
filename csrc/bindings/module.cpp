#include "bindings/bind.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "pipekern's compiled parts: the transports of one host, the schedule core and the planner's tables.";
    pipekern::bind_transport(m);
    pipekern::bind_cuda(m);
    pipekern::bind_staged(m);
    pipekern::bind_schedule(m);
    pipekern::bind_search(m);
    pipekern::bind_plan(m);
}
