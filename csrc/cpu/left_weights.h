// A product whose left operand is made of weights, packed beforehand: rows of a unit's values or, where the matrix unit
// multiplies fp32, of thirds.
#pragma once

#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

template <typename Unit>
class LeftWeights {
  public:
    LeftWeights(const Unit& unit, int64_t depth) : unit_(unit), depth_(depth) {}

    int64_t row_bytes() const {
        return splits() ? split_pairs(depth_) * static_cast<int64_t>(sizeof(Pair))
                        : padded(depth_) * static_cast<int64_t>(sizeof(Value));
    }

    // Rows that have to be there to multiply by `rows` of them: the matrix unit reads whole tiles.
    static int64_t readable(int64_t rows) { return round_up(rows, kThirdsRows); }

    template <typename T>
    void pack(const T* weights, void* row) const {
        if (splits()) {
            split_row(weights, depth_, static_cast<Pair*>(row));
        } else {
            load_rows(Matrix{weights, 1, depth_, depth_}, Matrix{static_cast<Value*>(row), 1, depth_, padded(depth_)});
        }
    }

    // c = the first c.rows of `packed` times b; `room` is memory for packed_floats() of b.
    void multiply(const void* packed, Matrix<const float> b, float* room, Matrix<float> c) const {
        if constexpr (kIsVector) {
            if (splits()) {
                const int64_t row = split_pairs(depth_);
                return multiply_split_rows(unit_.brgemm, {static_cast<const Pair*>(packed), c.rows, row, row}, b,
                                           reinterpret_cast<Pair*>(room), c);
            }
        }
        const Matrix a{static_cast<const Value*>(packed), c.rows, depth_, padded(depth_)};
        unit_.product(unit_.left(a), unit_.right(b, room), c, Accumulate::no);
    }

  private:
    using Value = typename Unit::Value;
    static constexpr bool kIsVector = sizeof(Value) == sizeof(float);

    bool splits() const {
        if constexpr (kIsVector) {
            return unit_.splits(kThirdsColumns, depth_);
        }
        return false;
    }

    const Unit& unit_;
    const int64_t depth_;
};

}  // namespace
}  // namespace ipt_fast::cpu
