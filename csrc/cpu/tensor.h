// What the ATen side of all operators shares: checks, layouts, the choice of an instruction set, work space.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"
#include "level.h"
#include "matrix_unit.h"

namespace ipt_fast::cpu {

using OptionalTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::kBFloat16:
            return DType::bf16;
        case at::kHalf:
            return DType::f16;
        default:
            return DType::f32;
    }
}

// A (B, C, H, W) tensor that the kernels can read: on the CPU, fp32, bf16 or fp16, no empty axis but the batch.
inline void check_image(const at::Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(x.dim() == 4, name, " has ", x.dim(), " dimensions, expected 4: (B, C, H, W)");
    TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name, " has shape ", x.sizes(),
                      ", expected at least one channel, row and column");
    const auto dtype = x.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name, " has dtype ", dtype,
                     ", expected Float, BFloat16 or Half");
    TORCH_CHECK_VALUE(x.is_cpu(), name, " is on ", x.device(), ", expected cpu");
}

// A tensor of the given shape on the CPU, in the dtype of `like` or, where `small`, also in fp32.
inline void check_tensor(const at::Tensor& t, const char* name, at::IntArrayRef shape, const at::Tensor& like,
                         bool small = false) {
    TORCH_CHECK_VALUE(t.sizes() == shape, name, " has shape ", t.sizes(), ", expected ", shape);
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type() || (small && t.scalar_type() == at::kFloat), name,
                     " has dtype ", t.scalar_type(), ", expected ", like.scalar_type(), small ? " or Float" : "");
    TORCH_CHECK_VALUE(t.is_cpu(), name, " is on ", t.device(), ", expected cpu");
}

// A third of the channels of a qkv map.
inline int64_t attention_channels(const at::Tensor& qkv) {
    TORCH_CHECK_VALUE(qkv.size(1) % 3 == 0, "qkv has ", qkv.size(1), " channels, expected a multiple of 3");
    return qkv.size(1) / 3;
}

// A dense channels-last tensor of this shape and x's dtype; large ones are backed by large pages where the system
// allows it, since the first touch of small ones takes as long as a copy.
at::Tensor empty_channels_last(at::IntArrayRef shape, const at::Tensor& x);

// x itself where its strides are exactly those of a channels-last map, else a copy that has them.
at::Tensor channels_last(const at::Tensor& x);

// A small parameter as contiguous fp32, its last axis padded to `size` with zeros; all zeros if there is none.
at::Tensor padded_parameter(const OptionalTensor& parameter, int64_t size);

// The weight (columns, depth, ...) of a pointwise convolution, in any strides.
inline Weight weight_of(const at::Tensor& w) {
    return {w.const_data_ptr(), w.size(0), w.size(1), w.stride(0), w.stride(1)};
}
inline Weight transposed(const Weight& w) { return {w.data, w.depth, w.columns, w.depth_stride, w.column_stride}; }

// The work space of one call: pieces are added first, then allocated together, each on its own cache lines.
class WorkSpace {
  public:
    WorkSpace() = default;
    WorkSpace(const WorkSpace&) = delete;
    ~WorkSpace();

    // Returns the offset of a piece of `bytes`.
    int64_t add(int64_t bytes);
    void allocate();
    template <typename T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(base_ + offset);
    }

  private:
    int64_t size_ = 0;
    std::vector<std::pair<int64_t, int64_t>> gaps_;  // between the pieces, for AddressSanitizer
    at::Tensor memory_;
    uint8_t* base_ = nullptr;
};

}  // namespace ipt_fast::cpu
