#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "bindings/bind.h"
#include "schedule/search.h"

namespace py = pybind11;

namespace pipekern {

void bind_search(py::module_& m) {
    m.def(
        "search",
        [](int ranks, int microbatches, int chunks, double cap, double kept, std::array<std::vector<double>, 3> cost,
           std::vector<double> latency, bool makespan, std::pair<double, double> good_enough, std::size_t work) {
            search::Problem problem;
            problem.ranks = ranks;
            problem.microbatches = microbatches;
            problem.chunks = chunks;
            problem.cap = cap;
            problem.kept = kept;
            for (int op = 0; op < 3; ++op) problem.cost[op] = std::move(cost[op]);
            problem.latency = std::move(latency);
            const search::Goal goal{makespan, {good_enough.first, good_enough.second}, work};
            search::Found found;
            {
                py::gil_scoped_release release;
                found = search::search(problem, goal);
            }
            py::list rows;
            for (const auto& row : found.order)
                rows.append(py::bytes(reinterpret_cast<const char*>(row.data()), row.size()));
            return py::make_tuple(rows, found.score.span, found.score.makespan);
        },
        py::arg("ranks"), py::arg("microbatches"), py::arg("chunks"), py::arg("cap"), py::arg("kept"), py::arg("cost"),
        py::arg("latency"), py::arg("makespan"), py::arg("good_enough"), py::arg("work"));
}

}  // namespace pipekern
