// A launcher for agr_cuda.cuda.rehearsal that executes the kernels' PTX: it finds the kernel, says what memory the
// launch may touch, element by element, and runs the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../../csrc/agr.h"
#include "../../csrc/cuda/launcher.h"
#include "machine.h"
#include "parse.h"

namespace py = pybind11;

namespace agr::cuda {
namespace {

// What is particular to each family of rules: the name of their class, and options.
template <class Visit>
auto visit_rules(Family family, const Visit& visit) {
    switch (family) {
        case Family::adamw:
            return visit("AdamWRules", AdamWOptions{});
        case Family::adan:
            return visit("AdanRules", AdanOptions{});
        case Family::regularize:
            return visit("RegularizeRules", RegularizeOptions{});
    }
    ptx::fail("a family of rules that is not known here");
}

const char* name_of(Type type) {
    switch (type) {
        case Type::float32:
            return "float";
        case Type::bfloat16:
            return "agr::bfloat16";
        case Type::float16:
            return "agr::float16";
        case Type::float64:
            return "double";
        case Type::code8:
            return "agr::cuda::code8";
    }
    return "";
}

// As it stands in the demangled name of the kernel's function.
std::string name_of(const Kernel& kernel) {
    const Types& types = kernel.types;
    return visit_rules(kernel.family, [&](const std::string& rules, const auto&) {
        auto flag = [](bool set) { return set ? ", true" : ", false"; };
        return "agr_step<agr::cuda::" + rules + ", agr::cuda::Format<" + name_of(types.parameter) + ", " +
               name_of(types.gradient) + ", " + name_of(types.state) + flag(types.master) + flag(types.stochastic) +
               ">";
    });
}

// The memory that a step may touch.
class Memory {
public:
    Memory(const Kernel& kernel, const Arguments& args) : args_(args) {
        add_tensors(kernel);
        add_table();
        visit_rules(kernel.family, [this](const char*, const auto& options) { add_groups(options); });
        writable("squares", args.squares, 8, 4);
        if (args.reduces)
            writable("sums", args.sums, args.tensors * 16, 8);
        else
            read_only("sums", args.sums, args.tensors * 16);
        read_only("clip", args.clip, 8);
        read_only("grad_scale", args.grad_scale, 4);
        read_only("found_inf", args.found_inf, 4);
    }

    std::vector<ptx::Region> regions;

private:
    const Arguments& args_;

    void writable(const char* name, const void* begin, std::int64_t bytes, int unit) {
        if (begin != nullptr) regions.push_back(ptx::Region::of(name, begin, bytes, true, unsigned(unit)));
    }
    void read_only(const char* name, const void* begin, std::int64_t bytes) {
        if (begin != nullptr) regions.push_back(ptx::Region::of(name, begin, bytes, false, 4));
    }
    const void* payload(std::int32_t offset) const { return args_.payload + offset; }

    void add_tensors(const Kernel& kernel) {
        const int bytes = bytes_of(kernel.types.parameter), state_bytes = bytes_of(kernel.types.state);
        const int gradient_bytes = bytes_of(kernel.types.gradient);
        const auto* gradients = static_cast<void* const*>(
            args_.gradients != nullptr ? static_cast<const void*>(args_.gradients) : payload(args_.gradients_offset));
        for (std::int32_t i = 0; i < args_.tensors; ++i) {
            const Row& row = args_.rows[i];
            if (kernel.family == Family::regularize) {
                // An update writes what others have read to compute the sum that it depends on.
                writable("gradient", gradients[i], row.elements * gradient_bytes, gradient_bytes);
                if (gradients[i] != nullptr) regions.back().in_place = true;
                continue;
            }
            writable("parameter", row.parameter, row.elements * bytes, bytes);
            writable("master", row.master, row.elements * 4, 4);
            for (int k = 0; k < states_of(row.rule); ++k) {
                writable("state", row.state[k], row.elements * state_bytes, state_bytes);
                writable("scales", row.scales[k], (row.elements + scale_block - 1) / scale_block * 4, 4);
            }
            read_only("gradient", gradients[i], row.elements * gradient_bytes);
            writable("step", row.step, 4, 4);
        }
    }

    void add_table() {
        std::int64_t chunks = 0, segments = 0;
        for (std::int32_t i = 0; i < args_.tensors; ++i) {
            chunks = std::max<std::int64_t>(chunks, args_.rows[i].first_chunk + args_.rows[i].chunks);
            segments = std::max<std::int64_t>(segments, args_.rows[i].first_segment + args_.rows[i].segments);
        }
        auto bytes = [](std::int64_t count, std::size_t size) { return count * std::int64_t(size); };
        const std::size_t sums = (args_.computes_norm ? 4 : 2) * sizeof(std::uint64_t);
        read_only("rows", args_.rows, bytes(args_.tensors, sizeof(Row)));
        read_only("tasks", args_.tasks, bytes(args_.end_task, sizeof(DeviceTask)));
        writable("progress", args_.progress, bytes(args_.tensors, sizeof(Progress)), 4);
        writable("chunk sums", args_.chunk_sums, bytes(chunks, sums), 4);
        writable("segment sums", args_.segment_sums, bytes(segments, sums), 4);
        writable("chunks done", args_.segment_chunks_done, bytes(segments, 4), 4);
        writable("squared norms", args_.squared_norms, bytes(args_.parameters, 2 * sizeof(std::uint64_t)), 4);
        writable("control", args_.control, sizeof(Control), 4);
        read_only("addresses of gradients", args_.gradients, bytes(args_.tensors, sizeof(void*)));
    }

    template <class Options>
    void add_groups(const Options&) {
        using Group = GroupArguments<Options>;
        read_only("groups", args_.groups, args_.group_count * std::int64_t(sizeof(Group)));
        const auto* groups =
            static_cast<const Group*>(args_.groups != nullptr ? args_.groups : payload(args_.groups_offset));
        for (std::int32_t i = 0; i < args_.group_count; ++i) {
            if (groups[i].increment_count != 0)
                writable("count", groups[i].count, 4, 4);
            else
                read_only("count", groups[i].count, 4);
            read_only("lr", groups[i].lr, bytes_of(static_cast<Type>(groups[i].lr_type)));
        }
    }
};

class PtxLauncher : public Launcher {
public:
    std::vector<ptx::Program> programs;
    ptx::Settings settings;
    Device properties{3, 1 << 20};
    int blocks_each = 1;
    std::uint64_t steps = 0, uploads = 0, instructions = 0;
    // By the name of the memory and the kind of access: bytes without a cache policy, evict first, evict last.
    std::map<std::string, std::map<std::string, std::array<std::uint64_t, ptx::policies>>> traffic;

    Device device(int) override { return properties; }
    int resident_blocks(const Kernel&, int) override { return blocks_each; }
    bool captures(void*) override { return false; }

    void step(const Kernel& kernel, const Arguments& arguments, int blocks, int, void*) override {
        ++steps;
        run(name_of(kernel), Memory(kernel, arguments).regions, blocks, &arguments, sizeof(arguments));
    }

    void upload(const Upload& upload, int, void*) override {
        ++uploads;
        run("agr_upload", {ptx::Region::of("table", upload.destination, upload.bytes, true, 8)}, 1, &upload,
            sizeof(upload));
    }

    static PtxLauncher& only() {
        static auto* launcher = new PtxLauncher;
        return *launcher;
    }

private:
    void run(const std::string& name, std::vector<ptx::Region> memory, int blocks, const void* parameters,
             std::size_t bytes) {
        const auto program = std::find_if(programs.begin(), programs.end(), [&](const ptx::Program& one) {
            return one.name.find(name) != one.name.npos;
        });
        if (program == programs.end()) ptx::fail("no PTX of " + name);
        if (program->parameter_bytes != int(bytes) || program->threads != block_threads)
            ptx::fail("the PTX of " + name + " takes other parameters, or runs with another number of threads");
        ptx::Regions regions(std::move(memory));
        ++settings.seed;
        instructions += ptx::Machine(*program, regions, settings, blocks, parameters).run();
        for (const ptx::Region& region : regions.all())
            for (int policy = 0; policy < ptx::policies; ++policy) {
                traffic[region.name]["loaded"][policy] += region.loaded[policy];
                traffic[region.name]["stored"][policy] += region.stored[policy];
                traffic[region.name]["prefetched"][policy] += region.prefetched[policy];
            }
    }
};

}  // namespace
}  // namespace agr::cuda

PYBIND11_MODULE(ptx_launcher, m) {
    using agr::cuda::PtxLauncher;
    static PtxLauncher& only = PtxLauncher::only();
    m.attr("launcher") = py::capsule(static_cast<agr::cuda::Launcher*>(&only), "agr_cuda.Launcher", [](void*) {});
    m.def("load", [](const std::vector<std::string>& texts) {
        only.programs.clear();
        for (const std::string& text : texts)
            for (ptx::Program& program : ptx::Parser::programs(text)) only.programs.push_back(std::move(program));
    });
    m.def(
        "configure",
        [](unsigned seed, int multiprocessors, int blocks_each, std::uint64_t limit, int approximation_error) {
            only.settings = {seed, limit};
            only.properties.multiprocessors = multiprocessors;
            only.blocks_each = blocks_each;
            ptx::approximation_error = approximation_error;
        },
        py::arg("seed"), py::arg("multiprocessors"), py::arg("blocks_each") = 1, py::arg("limit") = 50'000'000,
        py::arg("approximation_error") = 0);
    // Runs the first kernel of a text, whose parameters are the addresses of the buffers; `in_place`: see ptx::Region.
    m.def("run", [](const std::string& text, int blocks, unsigned seed, const std::vector<py::buffer>& buffers,
                    bool in_place) {
        ptx::Program program = ptx::Parser::programs(text).at(0);
        std::vector<ptx::Region> memory;
        std::vector<void*> addresses;
        for (const py::buffer& buffer : buffers) {
            const py::buffer_info info = buffer.request();
            memory.push_back(ptx::Region::of("buffer " + std::to_string(addresses.size()), info.ptr,
                                             info.size * info.itemsize, !info.readonly, 4));
            memory.back().in_place = in_place;
            addresses.push_back(info.ptr);
        }
        addresses.resize(std::size_t(program.parameter_bytes) / sizeof(void*));
        ptx::Regions regions(std::move(memory));
        ptx::Machine(program, regions, {seed, 1'000'000}, blocks, addresses.data()).run();
    });
    // Of every instruction: the kernel, the source line, the text, and how often a warp has executed it.
    m.def("coverage", [] {
        std::vector<std::tuple<std::string, std::string, std::string, std::uint64_t>> all;
        for (const ptx::Program& program : only.programs)
            for (const ptx::Instruction& i : program.code) all.emplace_back(program.name, i.source, i.text, i.count);
        return all;
    });
    m.def("take_traffic", [] { return std::exchange(only.traffic, {}); });
    m.def("counts", [] { return std::make_tuple(only.steps, only.uploads, only.instructions); });
}
