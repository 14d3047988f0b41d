// Fuses a product and the sum that uses it, as ptxas does unless nvcc is given -fmad=false (PTX ISA: mul and add
// without a rounding mode may be contracted): within a basic block, a product that is used once.
#pragma once

#include "arithmetic.h"

namespace ptx {

template <class T>
Compute fused(bool minus_sum, bool minus_product) {
    if (minus_sum) return operation([](T a, T b, T c) { return std::fma(a, b, -c); });
    if (minus_product) return operation([](T a, T b, T c) { return std::fma(-a, b, c); });
    return operation([](T a, T b, T c) { return std::fma(a, b, c); });
}

inline void contract(Program& program) {
    std::vector<int> uses(program.widths.size());
    for (const Instruction& i : program.code) {
        for (const int reg : i.operands)
            if (reg >= 0) ++uses[std::size_t(reg)];
        if (i.operation == Operation::store)
            for (const int reg : i.results)
                if (reg >= 0) ++uses[std::size_t(reg)];
    }
    std::map<int, const Instruction*> products;  // of this basic block, by register
    for (Instruction& i : program.code) {
        if (i.has_label || i.operation == Operation::branch) products.clear();
        const bool adds = i.text.rfind("add.f", 0) == 0, subtracts = i.text.rfind("sub.f", 0) == 0;
        for (const int k : {0, 1}) {
            const auto found = adds || subtracts ? products.find(i.operands[k]) : products.end();
            if (found == products.end()) continue;
            const bool minus_sum = subtracts && k == 0, minus_product = subtracts && k == 1;
            i.operands[2] = i.operands[1 - k];
            std::copy_n(found->second->operands, 2, i.operands);
            i.compute = (i.type.bits == 32 ? fused<float> : fused<double>)(minus_sum, minus_product);
            break;
        }
        for (const int reg : i.results)  // an operand of a product, or the product, is overwritten
            for (auto p = products.begin(); p != products.end();)
                p = p->first == reg || p->second->operands[0] == reg || p->second->operands[1] == reg
                        ? products.erase(p)
                        : std::next(p);
        if (i.text.rfind("mul.f", 0) == 0 && uses[std::size_t(i.results[0])] == 1) products[i.results[0]] = &i;
    }
}

}  // namespace ptx
