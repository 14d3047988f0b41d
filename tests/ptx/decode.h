// Decodes one instruction. Of what it does not know, even of a modifier, it says so: nothing is passed over in silence.
#pragma once

#include "arithmetic.h"

namespace ptx {

// Splits at a separator outside of braces and brackets, and leaves blanks out.
inline std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (const char c : text) {
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c == separator && depth == 0)
            parts.emplace_back();
        else if (c != ' ' && c != '\t')
            parts.back() += c;
    }
    return parts;
}

inline Type type_of(const std::string& s) {
    if (s == "pred") return {'p', 1};
    if (s.size() < 2 || std::string("busf").find(s[0]) == std::string::npos) return {};
    const int bits = std::atoi(s.c_str() + 1);
    return std::to_string(bits) == s.substr(1) ? Type{s[0], bits} : Type{};
}

// The names of a kernel's registers, and of its variables in shared and parameter memory.
class Names {
public:
    explicit Names(Program& program) : program_(program) {}

    void add_register(const std::string& name, int bits) { registers_.emplace(name, make_register(bits)); }
    void add_variable(const std::string& name, u64 address) { variables_[name] = address; }

    // The register of an operand. A number or an address, taken as one of `bits` bits, gets a register that has it.
    int reg(const std::string& operand, int bits) {
        if (const auto found = registers_.find(operand); found != registers_.end()) return found->second;
        if (operand == "%tid.x" || operand == "%ntid.x" || operand == "%ctaid.x" || operand == "%nctaid.x") {
            add_register(operand, 32);
            program_.specials.push_back({registers_[operand], operand});
            return registers_[operand];
        }
        const u64 value = number(operand);
        const u64 cut = bits >= 64 ? value : value & ((u64(1) << bits) - 1);
        const auto [constant, is_new] = constants_.emplace(cut, 0);
        if (is_new) {
            constant->second = make_register(64);
            program_.constants.push_back({constant->second, cut});
        }
        return constant->second;
    }

private:
    Program& program_;
    std::map<std::string, int> registers_;
    std::map<std::string, u64> variables_;
    std::map<u64, int> constants_;

    int make_register(int bits) {
        program_.widths.push_back(bits);
        return int(program_.widths.size()) - 1;
    }

    u64 number(const std::string& s) const {
        if (const auto variable = variables_.find(s); variable != variables_.end()) return variable->second;
        const bool is_float = s.rfind("0f", 0) == 0 || s.rfind("0d", 0) == 0;  // its bits follow
        std::size_t used = 0;
        u64 value = 0;
        try {
            if (is_float)
                value = std::stoull(s.substr(2), &used, 16), used += 2;
            else
                value = s[0] == '-' ? u64(std::stoll(s, &used, 0)) : std::stoull(s, &used, 0);
        } catch (const std::logic_error&) {
            fail("unknown operand " + s);
        }
        if (s.substr(used) != "" && s.substr(used) != "U") fail("unknown operand " + s);
        return value;
    }
};

class Decoder {
public:
    // `name` is the operation with its modifiers. A branch's target is given by its name.
    Decoder(Instruction& i, const std::string& name, std::vector<std::string> operands, Names& names)
        : i_(i), name_(name), parts_(split(name, '.')), operands_(std::move(operands)), names_(names) {
        i_.type = type_of(parts_.back());
        if (!control() && !synchronization() && !memory() && !arithmetic()) unknown();
    }

private:
    Instruction& i_;
    const std::string& name_;
    const std::vector<std::string> parts_;  // of the name, at its dots
    const std::vector<std::string> operands_;
    Names& names_;

    [[noreturn]] void unknown() const { fail("unknown instruction `" + i_.text + "`"); }

    const std::string& operand(std::size_t k, std::size_t count) const {
        if (operands_.size() != count) unknown();
        return operands_[k];
    }
    int reg(const std::string& operand, int bits) { return operand == "_" ? -1 : names_.reg(operand, bits); }

    // Takes the modifiers after the operation, in any order; `take` says whether it knows one.
    template <class Take>
    void modifiers(Take take) const {
        for (std::size_t k = 1; k < parts_.size(); ++k)
            if (!take(parts_[k])) unknown();
    }
    // Whether a modifier is among those that are known; if so, `into` becomes what it means.
    template <class T>
    static bool one_of(const std::map<std::string, T>& known, const std::string& modifier, T& into) {
        const auto found = known.find(modifier);
        if (found != known.end()) into = found->second;
        return found != known.end();
    }
    // What all accesses to memory may have: order, scope, space and type.
    bool of_memory(const std::string& modifier) {
        static const std::map<std::string, Order> orders = {{"relaxed", Order::relaxed},
                                                            {"acquire", Order::acquire},
                                                            {"release", Order::release},
                                                            {"acq_rel", Order::acq_rel}};
        static const std::map<std::string, Space> spaces = {
            {"global", Space::global}, {"shared", Space::shared}, {"param", Space::param}};
        return one_of(orders, modifier, i_.order) || one_of(spaces, modifier, i_.space) || modifier == "gpu" ||
               type_of(modifier).bits != 0;
    }

    void address(const std::string& operand) {  // [base] or [base+offset]
        if (operand.front() != '[' || operand.back() != ']') unknown();
        const std::string inside = operand.substr(1, operand.size() - 2);
        const auto plus = inside.find('+');
        i_.operands[0] = reg(inside.substr(0, plus), 64);
        if (plus != inside.npos) i_.offset = std::stoll(inside.substr(plus + 1));
    }

    bool control() {
        if (name_ == "bra" || name_ == "bra.uni")
            i_.operation = Operation::branch;
        else if (name_ == "ret" || name_ == "exit")
            i_.operation = Operation::exit;
        else if (name_ == "nanosleep.u32")
            i_.operation = Operation::sleep;
        else
            return false;
        return true;
    }

    bool synchronization() {
        if (name_ == "bar.sync" || name_ == "barrier.sync" || name_ == "barrier.sync.aligned") {
            if (operand(0, 1) != "0") unknown();
            i_.operation = Operation::block_barrier;
        } else if (name_ == "bar.warp.sync") {
            i_.operation = Operation::warp_barrier;
            i_.operands[3] = reg(operand(0, 1), 32);
        } else if (parts_[0] == "shfl" && parts_.size() == 4 && parts_[1] == "sync" && parts_[3] == "b32") {
            i_.operation = Operation::shuffle;
            static const std::map<std::string, Shuffle> modes = {
                {"up", Shuffle::up}, {"down", Shuffle::down}, {"bfly", Shuffle::bfly}, {"idx", Shuffle::idx}};
            if (!one_of(modes, parts_[2], i_.shuffle)) unknown();
            const auto results = split(operand(0, 5), '|');  // value|whether it came from another lane
            i_.results[0] = reg(results[0], 32);
            if (results.size() == 2) i_.results[1] = reg(results[1], 1);
            for (std::size_t k = 0; k < 4; ++k) i_.operands[k] = reg(operands_[k + 1], 32);
        } else if (name_ == "vote.sync.any.pred" || name_ == "vote.sync.all.pred") {
            i_.operation = Operation::vote;
            i_.vote = parts_[2] == "any" ? Vote::any : Vote::all;
            i_.results[0] = reg(operand(0, 3), 1);
            if (operands_[1][0] == '!') unknown();
            i_.operands[0] = reg(operands_[1], 1);
            i_.operands[3] = reg(operands_[2], 32);
        } else if (name_ == "redux.sync.max.u32") {
            i_.operation = Operation::vote;
            i_.vote = Vote::max;
            i_.results[0] = reg(operand(0, 3), 32);
            i_.operands[0] = reg(operands_[1], 32);
            i_.operands[3] = reg(operands_[2], 32);
        } else if (name_ == "fence.acq_rel.gpu") {
            i_.operation = Operation::fence;
        } else {
            return false;
        }
        return true;
    }

    bool memory() {
        const std::string& op = parts_[0];
        if (op == "ld" || op == "st") {
            i_.operation = op == "ld" ? Operation::load : Operation::store;
            bool hinted = false;
            modifiers([&](const std::string& m) {
                return of_memory(m) || one_of({{"v2", 2}, {"v4", 4}}, m, i_.vector) ||
                       one_of({{"L2::cache_hint", true}}, m, hinted) || m == "L1::no_allocate";
            });
            const std::size_t count = hinted ? 3 : 2;
            std::string values = operand(op == "ld" ? 0 : 1, count);
            if (values[0] == '{') values = values.substr(1, values.size() - 2);
            const auto each = split(values, ',');
            if (int(each.size()) != i_.vector || i_.type.bits == 0) unknown();
            for (std::size_t k = 0; k < each.size(); ++k) i_.results[k] = reg(each[k], i_.type.bits);
            address(operands_[op == "ld" ? 1 : 0]);
            if (hinted) i_.policy = reg(operands_[2], 64);
            if (i_.order != Order::weak && i_.space != Space::global) unknown();
        } else if (op == "atom" || op == "red") {
            i_.operation = Operation::atomic;
            i_.order = Order::relaxed;  // where nothing else is said
            modifiers([&](const std::string& m) {
                return of_memory(m) || one_of({{"add", Atomic::add}, {"inc", Atomic::inc}}, m, i_.atomic);
            });
            const std::size_t count = op == "atom" ? 3 : 2;
            if (i_.atomic == Atomic::none || i_.space != Space::global || i_.type.kind == 'f') unknown();
            if (op == "atom") i_.results[0] = reg(operand(0, count), i_.type.bits);
            address(operand(count - 2, count));
            i_.operands[1] = reg(operand(count - 1, count), i_.type.bits);
        } else if (name_ == "prefetch.global.L2" || name_ == "prefetch.global.L2::evict_last") {
            i_.operation = Operation::prefetch;
            address(operand(0, 1));
        } else if (name_ == "cp.async.bulk.prefetch.L2.global" ||
                   name_ == "cp.async.bulk.prefetch.L2.global.L2::cache_hint") {
            const std::size_t count = parts_.back() == "L2::cache_hint" ? 3 : 2;
            i_.operation = Operation::prefetch;
            i_.alignment = 16;
            address(operand(0, count));
            i_.operands[1] = reg(operand(1, count), 32);
            if (count == 3) i_.policy = reg(operands_[2], 64);
        } else {
            return false;
        }
        return true;
    }

    bool arithmetic() {
        static const Table table = arithmetic_table();
        std::string name = name_;
        if (parts_[0] == "mov" && operands_.size() == 2 && operands_[0][0] == '{') {
            const auto parts = split(operands_[0].substr(1, operands_[0].size() - 2), ',');
            if (parts.size() != 2) unknown();
            for (std::size_t k = 0; k < 2; ++k) i_.results[k] = reg(parts[k], i_.type.bits / 2);
            i_.operands[0] = reg(operands_[1], i_.type.bits);
            i_.compute = unpack;
            return true;
        }
        std::vector<std::string> from(operands_.begin() + 1, operands_.end());
        int bits = parts_.size() > 2 && parts_[0] == "cvt" ? 64 : i_.type.bits;
        if (parts_[0] == "mov" && from[0][0] == '{') {
            from = split(from[0].substr(1, from[0].size() - 2), ',');
            name = "pack" + name.substr(3);
            bits /= 2;
        } else if (parts_[0] == "createpolicy") {
            if (from != std::vector<std::string>{"1.0"}) unknown();
            from = {"0"};
        }
        const auto found = table.find(name);
        if (found == table.end() || from.size() > 4) return false;
        i_.compute = found->second;
        i_.gathers = gathers(name);
        i_.results[0] = reg(operands_[0], 64);
        for (std::size_t k = 0; k < from.size(); ++k) {
            const bool is_predicate = parts_[0] == "selp" && k == 2;
            i_.operands[k] = reg(from[k], is_predicate ? 1 : bits);
        }
        return true;
    }
};

}  // namespace ptx
