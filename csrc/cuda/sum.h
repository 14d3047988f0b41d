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
    AGR_DEVICE void add(const CompensatedSum& other) {
        add(other.sum_);
        compensation_ += other.compensation_;
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
    AGR_DEVICE void add(const PlainSum& other) { sum_ += other.sum_; }
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

// The sums over one thread's elements, which it adds `lanes` at a time. The result has the same bits every time, since
// the order of additions depends on an element's position alone.
template <class T, int lanes>
class ThreadSums {
public:
    AGR_DEVICE explicit ThreadSums(bool squares) : adds_squares_(squares) {}

    AGR_DEVICE void add(const T (&x)[lanes]) {
        // Several independent sums, so that additions do not wait for each other.
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) abs_sums_[lane % accumulators].add(magnitude(x[lane]));
        if (adds_squares_) {
            // A few squares are added plainly: the norm is not a small difference of large numbers, so that roundings
            // that average out do not matter. (In float64, each element would take a conversion and a multiplication
            // on units of which many GPUs have few.)
            T few = x[0] * x[0];
#pragma unroll
            for (int lane = 1; lane < lanes; ++lane) few = multiply_add(x[lane], x[lane], few);
            squares_.add(few);
        }
    }

    AGR_DEVICE Sums value() const {
        Sums sums;
        auto abs_sum = abs_sums_[0];
#pragma unroll
        for (int i = 1; i < accumulators; ++i) abs_sum.add(abs_sums_[i]);
        sums.abs_sum = abs_sum.value();
        if (adds_squares_) sums.squares = squares_.value();
        return sums;
    }

    // Whether a float32 sum may have overflowed, or squares have lost too much as denormal numbers. The elements must
    // then be added in float64.
    AGR_DEVICE bool out_of_range(const Sums& sums) const {
        if (sizeof(T) == sizeof(double)) return false;
        return !(sums.abs_sum < 0x1p127) ||
               (adds_squares_ && (!(sums.squares < 0x1p120) || (sums.squares < 0x1p-100 && sums.abs_sum != 0)));
    }

private:
    static constexpr int accumulators = lanes < 4 ? lanes : 4;
    bool adds_squares_;
    typename SumOf<T>::type abs_sums_[accumulators];
    typename SumOf<T>::type squares_;
};

// The sum over the first `width` lanes of a warp, a power of two, added in a fixed tree. Only the first lane gets the
// result.
template <int width = warp_threads>
AGR_DEVICE Sums warp_reduce(Sums mine, bool squares) {
    static_assert((width & (width - 1)) == 0, "halves are added to halves");
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) {
        mine.abs_sum += shuffle_down(mine.abs_sum, distance);
        if (squares) mine.squares += shuffle_down(mine.squares, distance);
    }
    return mine;
}

}  // namespace agr::cuda
