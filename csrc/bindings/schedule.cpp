#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "schedule/stream.h"

namespace py = pybind11;

namespace pipekern {

void bind_schedule(py::module_& m) {
    py::enum_<StreamRule>(m, "StreamRule")
        .value("ONE_F_ONE_B", StreamRule::kOneFOneB)
        .value("ZB_H1", StreamRule::kZbH1)
        .value("ZB_H2", StreamRule::kZbH2);

    py::class_<StreamRank>(m, "StreamRank")
        .def_readonly("first_start", &StreamRank::first_start)
        .def_readonly("last_end", &StreamRank::last_end)
        .def_readonly("busy", &StreamRank::busy)
        .def_readonly("held", &StreamRank::held)
        .def_readonly("shrunk", &StreamRank::shrunk);

    m.def(
        "stream",
        [](StreamRule rule, std::int64_t microbatches, std::vector<std::int64_t> forward,
           std::vector<std::int64_t> backward, std::vector<std::int64_t> weight, std::vector<std::int64_t> comm) {
            const StreamCosts costs{std::move(forward), std::move(backward), std::move(weight), std::move(comm)};
            py::gil_scoped_release release;
            return stream(rule, microbatches, costs);
        },
        py::arg("rule"), py::arg("microbatches"), py::arg("forward"), py::arg("backward"), py::arg("weight"),
        py::arg("comm"));
}

}  // namespace pipekern
