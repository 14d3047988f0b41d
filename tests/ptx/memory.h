// The memory that a launch may touch: regions of the host's memory, each with a name, and what was done to them.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// A moment in a thread: everything that it has done in its times up to this one. Time 0 is before everything.
struct Stamp {
    u32 thread = 0, time = 0;
};

// The accesses to one unit of memory that a later access must be ordered after: see races.h.
struct Cell {
    Stamp write, read;  // the last weak write, and a weak read after it
    int others = -1;    // where further accesses are kept, or -1
};

struct Region {
    std::string name;
    u64 begin = 0, end = 0;
    bool writable = false;
    u32 unit = 1;  // bytes of a cell: no access is smaller
    std::vector<Cell> cells;
    u32 first_thread = 0, threads = 0;                                            // that can access it
    u64 loaded[policies] = {}, stored[policies] = {}, prefetched[policies] = {};  // bytes, by cache policy
    bool in_place = false;  // all of it is read before it is written, by dependencies alone: see causality.h
    bool has_strong_stores = false;

    static Region of(const std::string& name, const void* begin, std::int64_t bytes, bool writable, u32 unit) {
        Region region;
        region.name = name;
        region.begin = reinterpret_cast<u64>(begin);
        region.end = region.begin + u64(bytes);
        region.writable = writable;
        region.unit = unit;
        return region;
    }
};

class Regions {
public:
    // Tensors may share memory: regions that overlap become one.
    explicit Regions(std::vector<Region> regions) {
        std::stable_sort(regions.begin(), regions.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
        for (Region& region : regions) {
            if (region.begin == region.end) continue;
            if (all_.empty() || region.begin >= all_.back().end) {
                all_.push_back(std::move(region));
                continue;
            }
            Region& last = all_.back();
            last.end = std::max(last.end, region.end);
            last.writable |= region.writable;
            last.in_place |= region.in_place;
            last.unit = std::min(last.unit, region.unit);
        }
    }

    std::vector<Region>& all() { return all_; }

    // The region that has all of these bytes.
    Region& at(u64 address, u64 bytes) {
        const auto after = std::upper_bound(all_.begin(), all_.end(), address,
                                            [](u64 x, const Region& region) { return x < region.begin; });
        if (after != all_.begin() && address + bytes <= (after - 1)->end) return *(after - 1);
        std::ostringstream what;
        what << "an access outside of all memory: " << bytes << " bytes at 0x" << std::hex << address << std::dec;
        if (after != all_.begin()) what << ", " << i64(address - (after - 1)->end) << " after " << (after - 1)->name;
        fail(what.str());
    }

private:
    std::vector<Region> all_;
};

}  // namespace ptx
