// Products of weight matrices for the translation unit's instruction set: 2 * rows * columns * depth FLOPs. The right
// matrix is first packed in panels of kMergeColumns columns; a block of rows goes through them from the second cache.
#include "gemm.h"
#include "ipt_fast/merge.h"
#include "rows.h"

namespace ipt_fast {
namespace {

constexpr int64_t kMergeDepth = 128;  // terms of one fp32 sum; a panel of them stays in the first cache

int64_t width_of(const MergeParams& p, int64_t first) {
    return padded(p.columns - first < kMergeColumns ? p.columns - first : kMergeColumns);
}

// [depth][width], padded with zeros.
void pack(const MergeParams& p, int64_t first) {
    const int64_t width = width_of(p, first), count = p.columns - first < width ? p.columns - first : width;
    float* packed = p.packed + first * p.depth;
    const float* right = p.right + first * p.right_column;
    if (p.right_column == 1) {
        load_rows(right, p.right_row, p.depth, count, packed, width);
        return;
    }
    for (int64_t j = 0; j < width; j += kLanes) {
        for (int64_t k = 0; k < p.depth; k += kLanes) {
            const int64_t rows = p.depth - k < kLanes ? p.depth - k : kLanes;
            Vec block[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                block[i] = j + i < count ? load(right + k + (j + i) * p.right_column, rows) : Vec{};
            }
            transpose(block);
            for (int64_t i = 0; i < rows; ++i) {
                store(packed + (k + i) * width + j, block[i]);
            }
        }
    }
}

template <typename T>
void multiply(const MergeParams& p, int64_t first, float* scratch) {
    const int64_t rows = p.rows - first < p.block_rows ? p.rows - first : p.block_rows;
    float* part = scratch + p.block_rows * kMergeColumns;
    float* staged = part + p.block_rows * kMergeColumns;
    const float* left = p.left + first * p.left_row;
    int64_t left_row = p.left_row, left_depth = p.left_depth;
    if (left_depth != 1) {  // columns lie in memory next to each other: those of these rows, close together
        for (int64_t k = 0; k < p.depth; ++k) {
            memcpy(staged + k * rows, left + k * left_depth, rows * sizeof(float));
        }
        left = staged;
        left_depth = rows;
    }
    for (int64_t column = 0; column < p.columns; column += kMergeColumns) {
        const int64_t width = width_of(p, column);
        const int64_t columns = p.columns - column < width ? p.columns - column : width;
        const Panels panels(width);
        for (int64_t k = 0; k < p.depth; k += kMergeDepth) {
            const int64_t depth = p.depth - k < kMergeDepth ? p.depth - k : kMergeDepth;
            const float* right = p.packed + column * p.depth + k * width;
            product_of(
                rows, width, depth, left + k * left_depth, left_row, left_depth,
                [&](int64_t panel, int64_t row) { return right + row * width + panels.first(panel) * kLanes; },
                [&](int64_t) { return width; }, k == 0 ? scratch : part, width, false);
            for (int64_t i = 0; i < rows * width && k > 0; i += kLanes) {
                store(scratch + i, load(scratch + i) + load(part + i));
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            store_rows<T>(scratch + i * width, 0, 1, columns, nullptr,
                          static_cast<T*>(p.out) + (first + i) * p.columns + column);
        }
    }
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

const MergeKernels IPT_FAST_THIS_ISA(merge) = {pack, multiply_any};

}  // namespace ipt_fast
