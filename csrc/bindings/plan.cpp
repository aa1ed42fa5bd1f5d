#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "bindings/bind.h"
#include "plan/cut.h"
#include "plan/pool.h"

namespace py = pybind11;

namespace pipekern {
namespace {

using plan::Int;

// Integers cross as 16 bytes each, the lowest first.
Int int_of(const py::bytes& bytes) {
    Int value;
    const std::string text = bytes;
    if (text.size() != sizeof value) throw py::value_error("an integer takes 16 bytes");
    std::memcpy(&value, text.data(), sizeof value);
    return value;
}

std::vector<Int> ints_of(const py::bytes& bytes) {
    const std::string text = bytes;
    std::vector<Int> values(text.size() / sizeof(Int));
    if (text.size() % sizeof(Int) != 0) throw py::value_error("an integer takes 16 bytes");
    std::memcpy(values.data(), text.data(), text.size());
    return values;
}

py::bytes bytes_of(Int value) { return py::bytes(reinterpret_cast<const char*>(&value), sizeof value); }

using Steps = std::vector<std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>>;  // by level and node

}  // namespace

void bind_plan(py::module_& m) {
    using namespace py::literals;
    py::class_<plan::Lattice>(m, "Lattice")
        .def(py::init([](const Steps& steps, const std::vector<std::vector<py::bytes>>& left, const py::bytes& done,
                         const py::bytes& cuts, const py::bytes& factors, const std::vector<py::bytes>& held,
                         const py::bytes& caps, const py::bytes& least_cuts) {
                 auto lattice = std::make_unique<plan::Lattice>();
                 for (std::size_t k = 0; k < steps.size(); ++k) {
                     auto& level = lattice->levels.emplace_back();
                     for (std::size_t node = 0; node < steps[k].size(); ++node) {
                         auto& one = level.emplace_back();
                         one.steps = steps[k][node];
                         const auto pairs = ints_of(left[k][node]);
                         for (std::size_t i = 0; i + 1 < pairs.size(); i += 2)
                             one.left.emplace_back(pairs[i], static_cast<std::int32_t>(pairs[i + 1]));
                     }
                 }
                 lattice->done = ints_of(done);
                 lattice->cuts = ints_of(cuts);
                 lattice->factors = ints_of(factors);
                 for (const auto& row : held) lattice->held.push_back(ints_of(row));
                 lattice->caps = ints_of(caps);
                 lattice->least_cuts = ints_of(least_cuts);
                 return lattice;
             }),
             "steps"_a, "left"_a, "done"_a, "cuts"_a, "factors"_a, "held"_a, "caps"_a, "least_cuts"_a)
        .def(
            "cheapest",
            [](const plan::Lattice& lattice, const plan::Windows& windows, const py::bytes& limit,
               const py::bytes& budget) -> py::object {
                const Int most = int_of(limit), below = int_of(budget);
                std::optional<plan::Cut> cut;
                {
                    const py::gil_scoped_release release;
                    cut = plan::cheapest(lattice, windows, most, below);
                }
                if (!cut) return py::none();
                return py::make_tuple(py::cast(cut->bounds), py::cast(cut->devices), bytes_of(cut->total));
            },
            "windows"_a, "limit"_a, "budget"_a);
    py::class_<plan::Pool>(m, "Pool")
        .def(py::init([](std::int32_t parts, std::vector<std::int32_t> counts, const py::bytes& done,
                         const py::bytes& cuts, const py::bytes& factors, const std::vector<py::bytes>& held,
                         const py::bytes& caps) {
                 plan::Kinds kinds{parts, std::move(counts), ints_of(done), ints_of(cuts), ints_of(factors),
                                   {},    ints_of(caps)};
                 for (const auto& row : held) kinds.held.push_back(ints_of(row));
                 return std::make_unique<plan::Pool>(std::move(kinds));
             }),
             "parts"_a, "counts"_a, "done"_a, "cuts"_a, "factors"_a, "held"_a, "caps"_a)
        .def(
            "reaches",
            [](const plan::Pool& pool, const py::bytes& limit) {
                const Int most = int_of(limit);
                plan::Reached reached{};
                {
                    const py::gil_scoped_release release;
                    reached = pool.reaches(most);
                }
                return py::make_tuple(reached.may, bytes_of(reached.edge));
            },
            "limit"_a)
        .def(
            "least_total",
            [](const plan::Pool& pool, const py::bytes& limit, const py::bytes& budget) {
                const Int most = int_of(limit), below = int_of(budget);
                Int least = 0;
                {
                    const py::gil_scoped_release release;
                    least = pool.least_total(most, below);
                }
                return bytes_of(least);
            },
            "limit"_a, "budget"_a)
        .def(
            "cheapest",
            [](const plan::Pool& pool, const py::bytes& limit, const py::bytes& budget, std::size_t width) {
                const Int most = int_of(limit), below = int_of(budget);
                plan::Found found{};
                {
                    const py::gil_scoped_release release;
                    found = pool.cheapest(most, below, width);
                }
                py::object cut = py::none();
                if (found.cut)
                    cut = py::make_tuple(py::cast(found.cut->bounds), py::cast(found.cut->devices),
                                         bytes_of(found.cut->total));
                return py::make_tuple(cut, bytes_of(found.least));
            },
            "limit"_a, "budget"_a, "width"_a);
}

}  // namespace pipekern
