// The abs-sum (and, for clipping, the sum of squares) of what one thread sees of a gradient.
#pragma once

#include "intrinsics.h"

namespace agr::cuda {

// In float32 with what every addition rounded away kept beside the sum (Knuth's two-sum): as good as float64, on GPUs
// that have next to no float64 units too. An abs-sum must be that good where one element outweighs all others: psi of
// it is their small sum.
class CompensatedSum {
public:
    AGR_DEVICE void add(float x) {
        const float sum = sum_ + x;
        const float taken = sum - sum_;
        lost_ += (sum_ - (sum - taken)) + (x - taken);
        sum_ = sum;
    }
    // What an infinite sum lost is NaN, and nothing to it.
    AGR_DEVICE double value() const {
        return sum_ - sum_ == 0.0f ? static_cast<double>(sum_) + static_cast<double>(lost_) : static_cast<double>(sum_);
    }

private:
    float sum_ = 0, lost_ = 0;
};

class PlainSum {
public:
    AGR_DEVICE void add(double x) { sum_ += x; }
    AGR_DEVICE double value() const { return sum_; }

private:
    double sum_ = 0;
};

template <class T>
struct SumOf {
    using type = CompensatedSum;
};
template <>
struct SumOf<double> {
    using type = PlainSum;
};

// Several sums side by side, so that additions do not wait for each other. Always the same elements in the same sum.
template <class T, int lanes, bool squares>
class LaneSums {
public:
    AGR_DEVICE void add(int lane, T x) {
        magnitudes_[lane % ways].add(magnitude(x));
        // In float64: a gradient may be larger than the root of float32's largest number.
        if constexpr (squares) squares_[lane % ways] += static_cast<double>(x) * static_cast<double>(x);
    }
    AGR_DEVICE Sums value() const {
        Sums sums;
#pragma unroll
        for (int i = 0; i < ways; ++i) {
            sums.abs_sum += magnitudes_[i].value();
            if constexpr (squares) sums.squares += squares_[i];
        }
        return sums;
    }

private:
    static constexpr int ways = lanes < 4 ? lanes : 4;
    typename SumOf<T>::type magnitudes_[ways];
    double squares_[squares ? ways : 1] = {};
};

// The sum over a warp's lanes, in a tree that is always the same; for its first lane.
AGR_DEVICE Sums sum_of_warp(Sums mine, bool squares) {
#pragma unroll
    for (int distance = warp_threads / 2; distance > 0; distance /= 2) {
        mine.abs_sum += shuffle_down(mine.abs_sum, distance);
        if (squares) mine.squares += shuffle_down(mine.squares, distance);
    }
    return mine;
}

}  // namespace agr::cuda
