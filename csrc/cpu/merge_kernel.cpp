// Products of weight matrices for the translation unit's instruction set: 2 * rows * columns * depth FLOPs, each value
// read from memory about once, since a panel of the right matrix serves a whole block of rows from the cache.
#include "gemm.h"
#include "ipt_fast/merge.h"
#include "rows.h"

namespace ipt_fast {
namespace {

template <typename T>
void multiply(const MergeParams& p, int64_t first, float* scratch) {
    const int64_t rows = p.rows - first < kMergeRows ? p.rows - first : kMergeRows, row = padded(p.columns);
    const auto panel_begin = [&](int64_t panel, int64_t k) {
        return p.right + k * p.right_row + Panels(p.columns).first(panel) * kLanes;
    };
    product_of(
        rows, p.columns, p.depth, p.left + first * p.left_row, p.left_row, p.left_depth, panel_begin,
        [&](int64_t) { return p.right_row; }, scratch, row, false);
    store_rows<T>(scratch, row, rows, p.columns, nullptr, static_cast<T*>(p.out) + first * p.columns);
}

void multiply_any(const MergeParams& p, int64_t first, float* scratch) {
    switch (p.dtype) {
        case DType::f32:
            return multiply<float>(p, first, scratch);
        case DType::bf16:
            return multiply<BFloat16>(p, first, scratch);
        case DType::f16:
            return multiply<Half>(p, first, scratch);
    }
}

}  // namespace

const MergeKernels IPT_FAST_THIS_ISA(merge) = {multiply_any};

}  // namespace ipt_fast
