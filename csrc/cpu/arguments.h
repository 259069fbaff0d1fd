// The tensors that operators are called with: checks of them, and the forms that kernels take them in.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels.h"

namespace ipt_fast::cpu {

using OptionalTensor = std::optional<at::Tensor>;

DType dtype_of(const at::Tensor& x);

// A (B, C, H, W) tensor that the kernels can read: on the CPU, fp32, bf16 or fp16, no empty axis but the batch.
void check_image(const at::Tensor& x, const char* name);

// A tensor of the given shape on the CPU, in the dtype of `like` or, where `small`, also in fp32.
void check_tensor(const at::Tensor& t, const char* name, at::IntArrayRef shape, const at::Tensor& like,
                  bool small = false);

// The same of a small tensor (C,), or (B, C) of each image of x (B, C, H, W).
void check_of_images(const at::Tensor& t, const char* name, const at::Tensor& x);

// Values between those of an image and of the next one in such a tensor, padded; 0: all images have the same.
inline int64_t stride_of_images(const at::Tensor& t) { return t.dim() > 1 ? t.size(1) : 0; }

// fp32, bf16 or fp16, on the CPU.
void check_dtype_and_device(const at::Tensor& t, const char* name);

// C of a pointwise convolution's weight (N, C, 1, 1) that the kernels can read.
int64_t input_channels(const at::Tensor& weight, const char* name);

// A third of the channels of a qkv map.
int64_t attention_channels(const at::Tensor& qkv);

// A dense channels-last tensor of this shape and x's dtype; large ones are backed by large pages where the system
// allows it, since the first touch of small ones takes as long as a copy.
at::Tensor empty_channels_last(at::IntArrayRef shape, const at::Tensor& x);

// x with exactly the strides of a channels-last map: its own memory where its values lie so, else a copy.
at::Tensor channels_last(const at::Tensor& x);

// x's own memory where its channels are contiguous and its pixels equally far apart, as they are in a part of a wider
// channels-last map; else a channels-last copy.
at::Tensor with_pixels(const at::Tensor& x);
inline Pixels pixels_of(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(3)}; }

// The same map in fp32.
inline at::Tensor wide(const at::Tensor& x) { return x.to(at::kFloat); }
inline OptionalTensor wide(const OptionalTensor& x) { return x.has_value() ? OptionalTensor(wide(*x)) : std::nullopt; }

// The same in the dtype that a chain of kernels keeps its maps in: fp16 has no room for what lies between the kernels
// of a backward, so they are fp32 there.
inline at::Tensor with_range(const at::Tensor& x) { return x.scalar_type() == at::kHalf ? wide(x) : x; }

// A small parameter as contiguous fp32, its last axis padded to `size` with zeros: itself where it is that already, all
// zeros if there is none.
at::Tensor padded_parameter(const OptionalTensor& parameter, int64_t size);

// The weight (columns, depth, ...) of a pointwise convolution, in any strides.
inline Weight weight_of(const at::Tensor& w) {
    return {w.const_data_ptr(), w.size(0), w.size(1), w.stride(0), w.stride(1)};
}
inline Weight transposed(const Weight& w) { return {w.data, w.depth, w.columns, w.depth_stride, w.column_stride}; }

}  // namespace ipt_fast::cpu
