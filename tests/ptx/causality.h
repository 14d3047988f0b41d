// What threads know of each other: vector clocks over program order, barriers, and releases that were acquired, as in
// the causality order of the PTX memory model (PTX ISA, Memory Consistency Model).
//
// From it follow data races, and the values that a strong load may return. The latter need not be the newest: a store
// may become visible to other threads long after it was executed, and to one that has not acquired it later than what
// was stored after it. So a strong store stays invisible for a random time to all threads but its own and those for
// which it happened before. It never stays so for good, and atomic operations always act on the newest value.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <set>
#include <unordered_map>

#include "memory.h"

namespace ptx {

// For every thread of the launch, the time up to which what it did has happened before.
using Clock = std::vector<u32>;
using SharedClock = std::shared_ptr<const Clock>;

// What comes with the value of a strong store, for whoever observes it.
struct Published {
    SharedClock knowledge;     // what an acquire gets to know
    SharedClock dependencies;  // what the value may depend on
};

class Causality {
public:
    explicit Causality(u32 threads)
        : time_(threads, 1),
          seen_(threads, std::make_shared<Clock>(threads)),
          depends_(seen_),
          read_(threads),
          fenced_(threads) {}

    Stamp now(u32 thread) const { return {thread, time_[thread]}; }

    bool happened_before(Stamp stamp, u32 thread) const { return is_in(seen_, stamp, thread); }

    // Whether what the thread does now may depend on what was done then, through values that were passed on in any
    // order. A read that this is true of cannot return what the thread writes now: the value would depend on itself
    // (PTX ISA, axiom "No-Thin-Air").
    bool may_depend_on(Stamp stamp, u32 thread) const { return is_in(depends_, stamp, thread); }

    // After a barrier, threads know what all of them have done.
    void barrier(u32 first, u32 count) {
        for (auto* clocks : {&seen_, &depends_}) {
            std::set<const Clock*> distinct;
            for (u32 t = first; t < first + count; ++t) distinct.insert((*clocks)[t].get());
            auto joined = std::make_shared<Clock>(**distinct.begin());
            for (const Clock* clock : distinct) join(*joined, *clock);
            for (u32 t = first; t < first + count; ++t) (*joined)[t] = time_[t];
            for (u32 t = first; t < first + count; ++t) (*clocks)[t] = joined;
        }
        for (u32 t = first; t < first + count; ++t) ++time_[t];
    }

    // What goes with a store of this order: all that the thread knows if it releases, or what it knew at its last
    // fence.
    Published published(u32 thread, Order order) {
        const Published result = {releases(order) ? with_now(seen_, thread) : fenced_[thread],
                                  with_now(depends_, thread)};
        ++time_[thread];
        return result;
    }

    // A load has observed what was published; a later fence acquires what a relaxed load has observed.
    void observe(u32 thread, Order order, const Published& published) {
        SharedClock& into = acquires(order) ? seen_[thread] : read_[thread];
        into = joined(into, published.knowledge);
        depends_[thread] = joined(depends_[thread], published.dependencies);
    }

    void fence(u32 thread) {
        seen_[thread] = joined(seen_[thread], read_[thread]);
        fenced_[thread] = with_now(seen_, thread);
        ++time_[thread];
    }

    static Published joined(const Published& a, const Published& b) {
        return {joined(a.knowledge, b.knowledge), joined(a.dependencies, b.dependencies)};
    }

private:
    std::vector<u32> time_;
    std::vector<SharedClock> seen_, depends_;  // of each thread
    std::vector<SharedClock> read_, fenced_;

    static bool is_in(const std::vector<SharedClock>& clocks, Stamp stamp, u32 thread) {
        return stamp.thread == thread || stamp.time <= (*clocks[thread])[stamp.thread];
    }
    SharedClock with_now(const std::vector<SharedClock>& clocks, u32 thread) const {
        auto clock = std::make_shared<Clock>(*clocks[thread]);
        (*clock)[thread] = time_[thread];
        return clock;
    }
    static SharedClock joined(const SharedClock& a, const SharedClock& b) {
        if (a == nullptr || b == nullptr) return a == nullptr ? b : a;
        auto both = std::make_shared<Clock>(*a);
        join(*both, *b);
        return both;
    }
    static void join(Clock& into, const Clock& from) {
        for (std::size_t t = 0; t < into.size(); ++t) into[t] = std::max(into[t], from[t]);
    }
};

// Data races: two accesses to the same bytes, at least one of them a write, that are neither ordered nor both strong.
// In a region that is changed in place, a write that may depend on an earlier read is let be.
//
// After FastTrack (Flanagan and Freund, PLDI 2009): mostly, the last write and the last read are all that has to be
// kept.
class Races {
public:
    // The earlier access of a race, or none.
    struct Earlier {
        const char* what = nullptr;
        u32 thread = 0;
    };

    explicit Races(const Causality& causality) : causality_(causality) {}

    // `first` and `last` are the first and last byte, counted from the region's beginning.
    Earlier access(Region& region, u64 first, u64 last, u32 thread, bool writes, bool strong) {
        if (region.cells.empty()) return {};
        const Stamp now = causality_.now(thread);
        for (u64 k = first / region.unit; k <= last / region.unit; ++k) {
            Cell& cell = region.cells[k];
            if (unordered(cell.write, thread)) return {"write", cell.write.thread};
            if (writes && read_too_late(region, cell.read, thread)) return {"read", cell.read.thread};
            if (cell.others >= 0) {
                const Others& others = others_[std::size_t(cell.others)];
                const auto is_unordered = [&](Stamp stamp) { return unordered(stamp, thread); };
                const auto is_too_late = [&](Stamp stamp) { return read_too_late(region, stamp, thread); };
                int other = -1;
                if (!strong && (other = find(others.strong_writes, region, is_unordered)) >= 0)
                    return {"strong write", u32(other)};
                if (writes && !strong && (other = find(others.strong_reads, region, is_unordered)) >= 0)
                    return {"strong read", u32(other)};
                if (writes && (other = find(others.weak_reads, region, is_too_late)) >= 0) return {"read", u32(other)};
            }
            if (strong) {
                Others& others = others_of(cell);
                note(writes ? others.strong_writes : others.strong_reads, region, now);
            } else if (writes) {  // what was before it is ordered, also for whoever is ordered after it
                if (cell.others >= 0) others_[std::size_t(cell.others)].clear();
                cell.write = now;
                cell.read = {};
            } else if (!unordered(cell.read, thread)) {
                cell.read = now;
            } else {
                note(others_of(cell).weak_reads, region, now);
            }
        }
        return {};
    }

private:
    // The latest time of each thread that can access the region; empty where there is none.
    struct Others {
        std::vector<u32> strong_writes, strong_reads, weak_reads;
        void clear() {
            for (auto* times : {&strong_writes, &strong_reads, &weak_reads}) times->clear();
        }
    };
    const Causality& causality_;
    std::vector<Others> others_;

    bool unordered(Stamp stamp, u32 thread) const {
        return stamp.time != 0 && !causality_.happened_before(stamp, thread);
    }
    bool read_too_late(const Region& region, Stamp read, u32 thread) const {
        return unordered(read, thread) && !(region.in_place && causality_.may_depend_on(read, thread));
    }
    // A thread whose stamp is as asked for, or -1.
    template <class Is>
    static int find(const std::vector<u32>& times, const Region& region, Is is) {
        for (u32 t = 0; t < times.size(); ++t)
            if (is(Stamp{region.first_thread + t, times[t]})) return int(region.first_thread + t);
        return -1;
    }
    Others& others_of(Cell& cell) {
        if (cell.others < 0) {
            cell.others = int(others_.size());
            others_.emplace_back();
        }
        return others_[std::size_t(cell.others)];
    }
    static void note(std::vector<u32>& times, const Region& region, Stamp stamp) {
        if (times.empty()) times.resize(region.threads);
        times[stamp.thread - region.first_thread] = stamp.time;
    }
};

// The strong stores to each word of global memory that some thread may not see yet. Memory has the newest value.
class StrongStores {
public:
    StrongStores(Causality& causality, std::mt19937& random) : causality_(causality), random_(random) {}

    // Called before a strong store or atomic operation writes. A released store starts a release sequence, which atomic
    // operations continue.
    void write(u64 address, u32 size, u64 value_before, u32 thread, Order order, bool atomic, u64 clock) {
        std::vector<Store>& stores = word(address, size);
        Published published = causality_.published(thread, order);
        if (atomic && !stores.empty()) {
            causality_.observe(thread, order, stores.back().published);
            published = Causality::joined(published, stores.back().published);
        }
        // What is older than a store that all see, no one sees.
        for (std::size_t k = stores.size(); k-- > 1;)
            if (stores[k].visible_at <= clock) {
                stores.erase(stores.begin(), stores.begin() + i64(k));
                break;
            }
        stores.push_back({value_before, causality_.now(thread), clock + delay(), std::move(published)});
    }

    // The value that a strong load returns, where memory has `newest`.
    u64 read(u64 address, u32 size, u64 newest, u32 thread, Order order, u64 clock) {
        const std::vector<Store>& stores = word(address, size);
        u64 value = newest;
        for (auto store = stores.rbegin(); store != stores.rend(); ++store) {
            if (store->visible_at <= clock || causality_.happened_before(store->by, thread)) {
                causality_.observe(thread, order, store->published);
                return value;
            }
            value = store->value_before;
        }
        return value;
    }

    // A weak store is ordered after all others, or it would be a race.
    void forget(u64 address) { words_.erase(address); }

private:
    struct Store {
        u64 value_before;
        Stamp by;
        u64 visible_at;  // to all threads, in instructions
        Published published;
    };
    struct Word {
        u32 size = 0;
        std::vector<Store> stores;
    };
    Causality& causality_;
    std::mt19937& random_;
    std::unordered_map<u64, Word> words_;

    // Half of all stores are visible at once, the others after up to some thousand instructions.
    u64 delay() { return random_() % 2 == 0 ? 0 : random_() % (u64(1) << random_() % 13); }

    std::vector<Store>& word(u64 address, u32 size) {
        Word& word = words_[address];
        // Strong accesses that overlap in part are not morally strong, and therefore a race.
        const auto before = words_.find(address - 4);
        if ((word.size != 0 && word.size != size) || (before != words_.end() && before->second.size == 8) ||
            (size == 8 && words_.count(address + 4) != 0))
            fail("strong accesses of different sizes to the same bytes");
        word.size = size;
        return word.stores;
    }
};

}  // namespace ptx
