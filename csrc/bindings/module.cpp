#include "bindings/bind.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "pipekern's compiled parts: the shared-memory transport and the schedule core.";
    pipekern::bind_transport(m);
    pipekern::bind_schedule(m);
    pipekern::bind_search(m);
}
