// agr_cuda._C.CpuExecutor, and what else of the CPU backend Python sees.
#include "../cpu/executor.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

#include "rows.h"
#include "watch.h"

namespace py = pybind11;

namespace agr::python {
namespace {

class CpuExecutor {
public:
    CpuExecutor(const Plan& plan, const py::list& tensors) {
        Rows rows = rows_of(tensors, cpu_device);
        groups_ = rows.groups;
        rule_ = rows.rule;
        executor_ = std::make_unique<cpu::Executor>(plan, std::move(rows.tensors));
    }

    double reduce(const GradientTable& gradients, int threads) {
        py::gil_scoped_release unlocked;
        return executor_->reduce(gradients.addresses.data(), threads);
    }

    void update(const GradientTable& gradients, const py::list& groups, double clip, int threads,
                const py::sequence& counted) {
        if (groups.size() < groups_) throw std::invalid_argument("numbers are missing for some groups");
        std::vector<Group> numbers;
        for (py::handle item : groups) {
            const GroupNumbers group = group_of(item, rule_);
            if (group.lr != nullptr || group.steps != nullptr)
                throw std::invalid_argument("a group has numbers, not tensors, on a CPU");
            numbers.push_back(group.group);
        }
        {
            py::gil_scoped_release unlocked;
            executor_->update(gradients.addresses.data(), numbers, clip, threads);
        }
        count_steps(counted);
    }

private:
    std::unique_ptr<cpu::Executor> executor_;
    std::size_t groups_ = 0;  // that tensors refer to
    Rule rule_ = Rule::adamw;
};

}  // namespace

void bind_cpu(py::module_& m) {
    m.def("instruction_set", [] { return std::string(cpu::instruction_set().name); });

    py::class_<CpuExecutor>(m, "CpuExecutor")
        .def(py::init<const Plan&, const py::list&>())
        .def("reduce", &CpuExecutor::reduce)
        .def("update", &CpuExecutor::update);
}

}  // namespace agr::python
