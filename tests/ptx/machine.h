// Executes a kernel's PTX as the PTX ISA describes it, and checks what a GPU would not:
//
// - every access: alignment, bounds, writes to memory that is only read, cache policies that are none;
// - registers and shared memory that were never written, where they decide a branch, an address or a stored value;
// - barriers, shuffles and votes that some threads do not reach; launches that do not end;
// - data races, and values that become visible late (causality.h).
//
// Every thread has a program counter of its own. Lanes of a warp that are at the same instruction go on together; where
// a warp has split, one part is chosen at random, as are the warp and how long it runs: an interleaving for each seed.
#pragma once

#include <random>

#include "causality.h"
#include "warp.h"

namespace ptx {

struct Settings {
    u32 seed = 1;
    u64 limit = 50'000'000;  // instructions after which a launch counts as one that does not end
};

class Machine {
public:
    Machine(Program& program, Regions& regions, const Settings& settings, int blocks, const void* parameters)
        : program_(program),
          regions_(regions),
          settings_(settings),
          random_(settings.seed),
          parameters_(static_cast<const u8*>(parameters), static_cast<const u8*>(parameters) + program.parameter_bytes),
          blocks_(blocks),
          threads_(u32(blocks * program.threads)),
          causality_(threads_),
          races_(causality_),
          strong_(causality_, random_) {
        for (Region& region : regions_.all()) {
            region.threads = threads_;
            if (region.writable) region.cells.resize((region.end - region.begin + region.unit - 1) / region.unit);
        }
    }

    // Returns how many instructions warps have executed.
    u64 run() {
        const std::size_t most = 1 + random_() % 4;  // blocks at once: the others start when one of them has ended
        while (started_ < blocks_ || !running_.empty()) {
            while (started_ < blocks_ && running_.size() < most) running_.push_back(make_block(started_++));
            std::vector<Warp*> ready;
            bool asleep = false;
            for (auto& block : running_)
                for (Warp& warp : block->warps) {
                    if (!warp.runnable()) continue;
                    if (warp.asleep_until > executed_)
                        asleep = true;
                    else
                        ready.push_back(&warp);
                }
            if (!ready.empty())
                run_for_a_while(*ready[random_() % ready.size()]);
            else if (asleep)
                executed_ += 50;
            else
                report_deadlock();
            if (executed_ > settings_.limit) fail("a launch that does not end");
            running_.erase(
                std::remove_if(running_.begin(), running_.end(), [](auto& block) { return block->live_warps == 0; }),
                running_.end());
        }
        return executed_;
    }

private:
    Program& program_;
    Regions& regions_;
    Settings settings_;
    std::mt19937 random_;
    std::vector<u8> parameters_;
    int blocks_, started_ = 0;
    u32 threads_;
    Causality causality_;
    Races races_;
    StrongStores strong_;
    std::vector<std::unique_ptr<Block>> running_;
    u64 executed_ = 0;  // instructions, and time spent asleep

    std::unique_ptr<Block> make_block(int index) {
        auto block = std::make_unique<Block>();
        block->index = index;
        block->shared.assign(std::size_t(program_.shared_bytes), 0xa5);
        block->shared_written.assign(std::size_t(program_.shared_bytes), false);
        block->shared_region = Region::of("shared memory", nullptr, program_.shared_bytes, true, 1);
        block->shared_region.cells.resize(std::size_t(program_.shared_bytes));
        block->shared_region.first_thread = u32(index * program_.threads);
        block->shared_region.threads = u32(program_.threads);
        block->live_warps = program_.threads / lanes;
        for (int k = 0; k < block->live_warps; ++k) {
            Warp& warp = block->warps.emplace_back(program_, block.get(), k, u32(index * program_.threads + k * lanes));
            for (const auto& [reg, value] : program_.constants) {
                std::fill_n(warp.values(reg), lanes, value);
                warp.set_written(reg, all_lanes, all_lanes);
            }
            for (const auto& [reg, name] : program_.specials) {
                for (int lane = 0; lane < lanes; ++lane)
                    warp.values(reg)[lane] = name == "%tid.x"     ? u64(k * lanes + lane)
                                             : name == "%ntid.x"  ? u64(program_.threads)
                                             : name == "%ctaid.x" ? u64(index)
                                                                  : u64(blocks_);
                warp.set_written(reg, all_lanes, all_lanes);
            }
        }
        return block;
    }

    [[noreturn]] void wrong(const std::string& what, const Warp& warp, const Instruction& i, int lane = -1) const {
        std::ostringstream s;
        s << what << " at `" << i.text << "` (" << i.source << "), block " << warp.block->index << " ";
        if (lane < 0)
            s << "warp " << warp.index;
        else
            s << "thread " << warp.index * lanes + lane;
        fail(s.str());
    }

    [[noreturn]] void report_deadlock() const {
        std::ostringstream s;
        s << "nobody can go on:";
        for (const auto& block : running_)
            for (const Warp& warp : block->warps)
                for (const Group& group : warp.groups) {
                    const Instruction& i = program_.code[std::size_t(group.at)];
                    s << "\n block " << block->index << " warp " << warp.index << " lanes 0x" << std::hex << group.mask
                      << std::dec << " wait at `" << i.text << "` (" << i.source << ")";
                }
        fail(s.str());
    }

    // Runs one part of a warp: usually that which is behind, as compilers expect it of the hardware.
    void run_for_a_while(Warp& warp) {
        std::vector<Group>& groups = warp.groups;
        std::vector<std::size_t> choice;
        for (std::size_t k = 0; k < groups.size(); ++k)
            if (groups[k].waits == Group::for_nothing) choice.push_back(k);
        std::size_t chosen = choice[random_() % choice.size()];
        if (random_() % 4 != 0)
            for (const std::size_t k : choice)
                if (groups[k].at < groups[chosen].at) chosen = k;
        Group group = groups[chosen];
        groups.erase(groups.begin() + i64(chosen));
        int count = 1 + int(random_() % (random_() % 4 == 0 ? 8 : 200));
        while (count-- > 0)
            if (!execute(warp, group, count)) return;
        groups.push_back(group);
    }

    // One instruction. Returns whether the group goes on; otherwise it has been put back among the warp's, or has
    // ended.
    bool execute(Warp& warp, Group& group, int& count) {
        Instruction& i = program_.code[std::size_t(group.at)];
        if (i.has_label) meet(warp, group);
        const u32 mask = guarded(warp, group, i);
        ++executed_;
        if (mask != 0) ++i.count;
        switch (i.operation) {
            case Operation::compute:
                i.compute(warp, i, mask);
                break;
            case Operation::load:
                for_each_lane(mask, [&](int lane) { load(warp, i, lane); });
                break;
            case Operation::store:
                for_each_lane(mask, [&](int lane) { store(warp, i, lane); });
                break;
            case Operation::atomic:
                for_each_lane(mask, [&](int lane) { atomic(warp, i, lane); });
                break;
            case Operation::prefetch:
                for_each_lane(mask, [&](int lane) { prefetch(warp, i, lane); });
                break;
            case Operation::fence:
                for_each_lane(mask, [&](int lane) { causality_.fence(warp.first_thread + u32(lane)); });
                break;
            case Operation::sleep:
                warp.asleep_until = executed_ + random_() % 400;
                count = 0;
                break;
            case Operation::branch:
                if (mask == group.mask) {
                    group.at = i.target;
                    return true;
                }
                if (mask != 0) {
                    warp.groups.push_back({i.target, mask, Group::for_nothing});
                    group.mask &= ~mask;
                    if (random_() % 2 == 0) {
                        ++group.at;
                        std::swap(group, warp.groups.back());
                        return true;
                    }
                }
                break;
            case Operation::exit:
                if (mask != group.mask) wrong("a guarded exit", warp, i);
                for (const Warp& other : warp.block->warps)
                    for (const Group& waiting : other.groups)
                        if (waiting.waits == Group::for_block)
                            wrong("an exit of threads that a barrier waits for", warp, i);
                if (warp.groups.empty()) --warp.block->live_warps;
                return false;
            case Operation::block_barrier:
                if (gather(warp, group, i, Group::for_block)) {
                    warp.groups = {{group.at, all_lanes, Group::for_block}};
                    warp.at_barrier = true;
                    pass_block_barrier(*warp.block);
                }
                return false;
            case Operation::warp_barrier:
                if (!gather(warp, group, i, Group::for_warp)) return false;
                causality_.barrier(warp.first_thread, lanes);
                break;
            case Operation::shuffle:
                if (!gather(warp, group, i, Group::for_warp)) return false;
                shuffle(warp, i);
                break;
            case Operation::vote:
                if (!gather(warp, group, i, Group::for_warp)) return false;
                vote(warp, i);
                break;
        }
        ++group.at;
        return true;
    }

    u32 guarded(const Warp& warp, const Group& group, const Instruction& i) const {
        if (i.guard < 0) return group.mask;
        if (group.mask & ~warp.written[std::size_t(i.guard)]) wrong("a decision by what was never written", warp, i);
        u32 mask = 0;
        const u64* const predicate = const_cast<Warp&>(warp).values(i.guard);
        for_each_lane(group.mask, [&](int lane) { mask |= u32((predicate[lane] != 0) != i.guard_inverted) << lane; });
        return mask;
    }

    // Control flow.

    // Parts of a warp that have come to the same place go on together.
    static void meet(Warp& warp, Group& group) {
        for (std::size_t k = warp.groups.size(); k-- > 0;)
            if (warp.groups[k].at == group.at && warp.groups[k].waits == Group::for_nothing) {
                group.mask |= warp.groups[k].mask;
                warp.groups.erase(warp.groups.begin() + i64(k));
            }
    }

    // Whether all lanes of the warp have come to this instruction. Otherwise the group waits for the others.
    bool gather(Warp& warp, Group& group, const Instruction& i, Group::Waits waits) {
        if (i.guard >= 0) wrong("a guarded barrier", warp, i);
        if (i.operation != Operation::block_barrier)
            for_each_lane(group.mask, [&](int lane) {
                if (value_of<u32>(warp.values(i.operands[3])[lane]) != all_lanes)
                    wrong("a mask that leaves lanes out", warp, i, lane);
            });
        u32 here = group.mask, anywhere = group.mask;
        for (const Group& other : warp.groups) {
            anywhere |= other.mask;
            if (other.waits != Group::for_nothing && other.at == group.at) here |= other.mask;
        }
        if (here != all_lanes) {
            if (anywhere != all_lanes) wrong("a barrier after lanes have left", warp, i);
            group.waits = waits;
            warp.groups.push_back(group);
            return false;
        }
        warp.groups.clear();
        group.mask = all_lanes;
        return true;
    }

    void pass_block_barrier(Block& block) {
        for (const Warp& warp : block.warps)
            if (!warp.at_barrier) return;
        for (Warp& warp : block.warps) {
            if (warp.groups[0].at != block.warps[0].groups[0].at)
                wrong("warps at different barriers", warp, program_.code[std::size_t(warp.groups[0].at)]);
            warp.at_barrier = false;
        }
        for (Warp& warp : block.warps) warp.groups = {{warp.groups[0].at + 1, all_lanes, Group::for_nothing}};
        causality_.barrier(u32(block.index * program_.threads), u32(program_.threads));
    }

    // shfl.sync: from which lane each lane takes its value; beyond a bound it keeps its own (PTX ISA, shfl.sync).
    static void shuffle(Warp& warp, const Instruction& i) {
        u64 values[lanes];
        u32 known = 0, inside = 0;
        for (int lane = 0; lane < lanes; ++lane) {
            const int b = int(warp.values(i.operands[1])[lane] & 31), c = int(warp.values(i.operands[2])[lane]);
            const int segment = c >> 8 & 31, clamp = c & 31;
            const int first = lane & segment, last = first | (clamp & ~segment);
            const int from = i.shuffle == Shuffle::up     ? lane - b
                             : i.shuffle == Shuffle::down ? lane + b
                             : i.shuffle == Shuffle::bfly ? lane ^ b
                                                          : first | (b & ~segment);
            const bool is_inside = i.shuffle == Shuffle::up ? from >= last : from <= last;
            const int source = is_inside ? from : lane;
            inside |= u32(is_inside) << lane;
            values[lane] = warp.values(i.operands[0])[source];
            known |= u32(warp.has_written(i.operands[0], source) && warp.has_written(i.operands[1], lane)) << lane;
        }
        std::copy_n(values, lanes, warp.values(i.results[0]));
        warp.set_written(i.results[0], all_lanes, known);
        if (i.results[1] < 0) return;
        for (int lane = 0; lane < lanes; ++lane) warp.values(i.results[1])[lane] = inside >> lane & 1;
        warp.set_written(i.results[1], all_lanes, all_lanes);
    }

    void vote(Warp& warp, const Instruction& i) const {
        if (warp.written[std::size_t(i.operands[0])] != all_lanes) wrong("a vote by what was never written", warp, i);
        const u64* const votes = warp.values(i.operands[0]);
        auto is_set = [](u64 vote) { return vote != 0; };
        const u64 result = i.vote == Vote::max   ? *std::max_element(votes, votes + lanes)
                           : i.vote == Vote::any ? u64(std::any_of(votes, votes + lanes, is_set))
                                                 : u64(std::all_of(votes, votes + lanes, is_set));
        std::fill_n(warp.values(i.results[0]), lanes, result);
        warp.set_written(i.results[0], all_lanes, all_lanes);
    }

    // Memory.

    // What one lane accesses: in the region, of memory that can be written, or in the parameters.
    struct Access {
        u8* bytes = nullptr;
        u64 address = 0;
        Region* region = nullptr;
        u32 thread = 0;
    };

    u64 operand(Warp& warp, const Instruction& i, int k, int lane) const {
        if (!warp.has_written(i.operands[k], lane)) wrong("an operand that was never written", warp, i, lane);
        return warp.values(i.operands[k])[lane];
    }

    Policy policy(Warp& warp, const Instruction& i, int lane) const {
        if (i.policy < 0) return Policy::none;
        const u64 policy = warp.values(i.policy)[lane];
        if (!warp.has_written(i.policy, lane) || policy == 0 || policy >= policies)
            wrong("a cache policy that is none", warp, i, lane);
        return Policy(policy);
    }

    Region& region_at(u64 address, u64 bytes, const Warp& warp, const Instruction& i, int lane) {
        try {
            return regions_.at(address, bytes);
        } catch (const std::runtime_error& error) {
            wrong(error.what(), warp, i, lane);
        }
    }

    Access access(Warp& warp, const Instruction& i, int lane, u32 size, bool writes) {
        Access a;
        a.address = operand(warp, i, 0, lane) + u64(i.offset);
        a.thread = warp.first_thread + u32(lane);
        if (a.address % size != 0) wrong("a misaligned access", warp, i, lane);
        if (i.space == Space::param || (i.space == Space::generic && a.address >= parameter_window)) {
            const u64 first = i.space == Space::param ? a.address : a.address - parameter_window;
            if (writes || first + size > parameters_.size())
                wrong("an access outside of the parameters", warp, i, lane);
            a.bytes = parameters_.data() + first;
            return a;
        }
        if (i.space == Space::shared) {
            if (a.address + size > warp.block->shared.size())
                wrong("an access outside of shared memory", warp, i, lane);
            a.region = &warp.block->shared_region;
            a.bytes = warp.block->shared.data() + a.address;
        } else {
            a.region = &region_at(a.address, size, warp, i, lane);
            a.bytes = reinterpret_cast<u8*>(a.address);
        }
        Region& region = *a.region;
        if (writes && !region.writable) wrong("a write to " + region.name + ", which is only read", warp, i, lane);
        const u64 first = a.address - region.begin;
        const auto earlier = races_.access(region, first, first + size - 1, a.thread, writes, i.order != Order::weak);
        if (earlier.what != nullptr) {
            std::ostringstream what;
            what << "a race in " << region.name << " + " << first << ": an earlier " << earlier.what << " by block "
                 << earlier.thread / u32(program_.threads) << " thread " << earlier.thread % u32(program_.threads)
                 << " has no order with this " << (writes ? "write" : "read");
            wrong(what.str(), warp, i, lane);
        }
        return a;
    }

    void load(Warp& warp, const Instruction& i, int lane) {
        const u32 each = u32(i.type.bits / 8), size = each * u32(i.vector);
        const Access a = access(warp, i, lane, size, false);
        if (a.region != nullptr) a.region->loaded[int(policy(warp, i, lane))] += size;
        for (u32 k = 0; k < u32(i.vector); ++k) {
            u64 bits = 0;
            std::memcpy(&bits, a.bytes + k * each, each);
            if (i.order != Order::weak)
                bits = strong_.read(a.address + k * each, each, bits, a.thread, i.order, executed_);
            if (i.results[k] < 0) continue;
            const int width = program_.widths[std::size_t(i.results[k])];
            if (i.type.kind == 's') bits = u64(i64(bits << (64 - i.type.bits)) >> (64 - i.type.bits));
            warp.values(i.results[k])[lane] = width == 64 ? bits : bits & ((u64(1) << width) - 1);
            // Some bytes of a word may be padding: it counts as written if any of them is.
            bool written = i.space != Space::shared;
            for (u32 b = 0; b < each && !written; ++b) written = warp.block->shared_written[a.address + k * each + b];
            warp.set_written(i.results[k], 1u << lane, written ? all_lanes : 0);
        }
    }

    void store(Warp& warp, const Instruction& i, int lane) {
        const u32 each = u32(i.type.bits / 8), size = each * u32(i.vector);
        const Access a = access(warp, i, lane, size, true);
        a.region->stored[int(policy(warp, i, lane))] += size;
        for (u32 k = 0; k < u32(i.vector); ++k) {
            const u64 address = a.address + k * each;
            const bool written = warp.has_written(i.results[k], lane);
            if (i.space == Space::shared)
                for (u32 b = 0; b < each; ++b) warp.block->shared_written[address + b] = written;
            else if (!written)
                wrong("a store of what was never written", warp, i, lane);
            u8* const to = a.bytes + k * each;
            if (i.order != Order::weak)
                write_strongly(a, address, to, each, i.order, false);
            else if (a.region->has_strong_stores)
                strong_.forget(address);
            const u64 bits = warp.values(i.results[k])[lane];
            std::memcpy(to, &bits, each);
        }
    }

    void write_strongly(const Access& a, u64 address, const u8* to, u32 size, Order order, bool is_atomic) {
        u64 before = 0;
        std::memcpy(&before, to, size);
        a.region->has_strong_stores = true;
        strong_.write(address, size, before, a.thread, order, is_atomic, executed_);
    }

    void atomic(Warp& warp, const Instruction& i, int lane) {
        const u32 size = u32(i.type.bits / 8);
        const Access a = access(warp, i, lane, size, true);
        write_strongly(a, a.address, a.bytes, size, i.order, true);
        const u64 by = operand(warp, i, 1, lane);
        u64 before = 0;
        std::memcpy(&before, a.bytes, size);
        const u64 after = i.atomic == Atomic::add ? before + by : before >= by ? 0 : before + 1;
        std::memcpy(a.bytes, &after, size);
        if (i.results[0] < 0) return;
        warp.values(i.results[0])[lane] = before;
        warp.set_written(i.results[0], 1u << lane, all_lanes);
    }

    void prefetch(Warp& warp, const Instruction& i, int lane) {
        const u64 address = operand(warp, i, 0, lane) + u64(i.offset);
        const u64 bytes = i.operands[1] >= 0 ? operand(warp, i, 1, lane) : 1;
        if (address % u64(i.alignment) != 0 || (i.operands[1] >= 0 && bytes % u64(i.alignment) != 0))
            wrong("a misaligned prefetch", warp, i, lane);
        if (bytes == 0) return;
        region_at(address, bytes, warp, i, lane).prefetched[int(policy(warp, i, lane))] += bytes;
    }
};

}  // namespace ptx
