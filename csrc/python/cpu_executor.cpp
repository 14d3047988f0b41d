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
        tensors_ = rows.tensors.size();
        executor_ = std::make_unique<cpu::Executor>(plan, std::move(rows.tensors));
    }

    double reduce(const GradientTable& gradients, int threads) {
        py::gil_scoped_release unlocked;
        return executor_->reduce(gradients.addresses.data(), threads);
    }

    // `sums`: float64, of shape (2, tensors): where the abs-sums go, and the sums of squares.
    void sums(py::handle sums) const {
        double* const first = numbers_of(sums, 2);
        executor_->sums(first, first + tensors_);
    }

    void set_abs_sums(py::handle abs_sums) { executor_->set_abs_sums(numbers_of(abs_sums, 1)); }

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
    double* numbers_of(py::handle tensor, std::size_t rows) const {
        const TensorView view = on_device(tensor, "sums", cpu_device);
        if (view.type() != Type::float64 || static_cast<std::size_t>(view.elements()) != rows * tensors_)
            throw std::invalid_argument("sums are float64, " + std::to_string(rows) + " for each tensor");
        return static_cast<double*>(view.data());
    }

    std::unique_ptr<cpu::Executor> executor_;
    std::size_t groups_ = 0;  // that tensors refer to
    std::size_t tensors_ = 0;
    Rule rule_ = Rule::adamw;
};

}  // namespace

void bind_cpu(py::module_& m) {
    m.def("instruction_set", [] { return std::string(cpu::instruction_set().name); });

    py::class_<CpuExecutor>(m, "CpuExecutor")
        .def(py::init<const Plan&, const py::list&>())
        .def("reduce", &CpuExecutor::reduce)
        .def("sums", &CpuExecutor::sums)
        .def("set_abs_sums", &CpuExecutor::set_abs_sums)
        .def("update", &CpuExecutor::update);
}

}  // namespace agr::python
