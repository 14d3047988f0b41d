// The sums of |g| and, for clipping, of g^2: over the elements that one thread reads, and over a warp.
#pragma once

#include "intrinsics.h"

namespace agr::cuda {

// A compensated sum: a float32 sum, and the sum of the rounding errors of its additions (Knuth's two-sum). It is as
// accurate as a float64 sum and needs no float64 units, of which many GPUs have few. An abs-sum must be that accurate
// where one element outweighs all others: psi of that element is proportional to the small sum of the others.
class CompensatedSum {
public:
    AGR_DEVICE void add(float x) {
        const float sum = sum_ + x;
        const float added = sum - sum_;
        compensation_ += (sum_ - (sum - added)) + (x - added);
        sum_ = sum;
    }
    // The compensation of an infinite sum is NaN, and is not added.
    AGR_DEVICE double value() const {
        return sum_ - sum_ == 0.0f ? static_cast<double>(sum_) + static_cast<double>(compensation_)
                                   : static_cast<double>(sum_);
    }

private:
    float sum_ = 0, compensation_ = 0;
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

// Several independent sums, so that additions do not wait for each other. Which sum an element is added to depends on
// its lane alone, so the result has the same bits every time.
template <class T, int lanes, bool squares>
class LaneSums {
public:
    AGR_DEVICE void add(int lane, T x) {
        abs_sums_[lane % accumulators].add(magnitude(x));
        // Squares are in float64: the square of a large gradient overflows float32.
        if constexpr (squares) squares_[lane % accumulators] += static_cast<double>(x) * static_cast<double>(x);
    }
    AGR_DEVICE Sums value() const {
        Sums sums;
#pragma unroll
        for (int i = 0; i < accumulators; ++i) {
            sums.abs_sum += abs_sums_[i].value();
            if constexpr (squares) sums.squares += squares_[i];
        }
        return sums;
    }

private:
    static constexpr int accumulators = lanes < 4 ? lanes : 4;
    typename SumOf<T>::type abs_sums_[accumulators];
    double squares_[squares ? accumulators : 1] = {};
};

// The sum over the lanes of a warp, added in a fixed tree. Only the first lane gets the result.
AGR_DEVICE Sums warp_reduce(Sums mine, bool squares) {
#pragma unroll
    for (int distance = warp_threads / 2; distance > 0; distance /= 2) {
        mine.abs_sum += shuffle_down(mine.abs_sum, distance);
        if (squares) mine.squares += shuffle_down(mine.squares, distance);
    }
    return mine;
}

}  // namespace agr::cuda
