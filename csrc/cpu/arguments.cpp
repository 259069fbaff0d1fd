#include "arguments.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <sys/mman.h>

namespace ipt_fast::cpu {
namespace {

constexpr uintptr_t kLargePage = 2 << 20;

// x with these strides where its values lie so, else undefined. Strides of axes of size 1 say nothing.
at::Tensor with_strides(const at::Tensor& x, at::IntArrayRef strides) {
    if (x.strides() == strides) {
        return x;
    }
    for (int64_t axis = 0; axis < x.dim(); ++axis) {
        if (x.size(axis) != 1 && x.stride(axis) != strides[axis]) {
            return {};
        }
    }
    return x.as_strided(x.sizes(), strides);
}

}  // namespace

DType dtype_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::kBFloat16:
            return DType::bf16;
        case at::kHalf:
            return DType::f16;
        default:
            return DType::f32;
    }
}

void check_dtype_and_device(const at::Tensor& t, const char* name) {
    const auto dtype = t.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                     " must be Float, BFloat16 or Half; got ", dtype);
    TORCH_CHECK_VALUE(t.is_cpu(), name, " must be on cpu; got ", t.device());
}

void check_image(const at::Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name,
                      " must be (B, C, H, W) with at least one channel, row and column; got shape ", x.sizes());
    check_dtype_and_device(x, name);
}

void check_tensor(const at::Tensor& t, const char* name, at::IntArrayRef shape, const at::Tensor& like, bool small) {
    TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, "; got ", t.sizes());
    const at::ScalarType dtype = t.scalar_type(), allowed = like.scalar_type();
    TORCH_CHECK_TYPE(dtype == allowed || (small && dtype == at::kFloat), name, " must be ", allowed,
                     small && allowed != at::kFloat ? " or Float" : "", "; got ", dtype);
    TORCH_CHECK_VALUE(t.is_cpu(), name, " must be on cpu; got ", t.device());
}

void check_of_images(const at::Tensor& t, const char* name, const at::Tensor& x) {
    const int64_t batch = x.size(0), channels = x.size(1);
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef({channels}) || t.sizes() == at::IntArrayRef({batch, channels}), name,
                      " must have shape [", channels, "], or [", batch, ", ", channels, "] of each image; got ",
                      t.sizes());
    check_tensor(t, name, t.sizes(), x, true);
}

int64_t input_channels(const at::Tensor& weight, const char* name) {
    TORCH_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0, name, " must be (N, C, 1, 1); got shape ",
                      weight.sizes());
    check_dtype_and_device(weight, name);
    return weight.size(1);
}

int64_t attention_channels(const at::Tensor& qkv) {
    TORCH_CHECK_VALUE(qkv.size(1) % 3 == 0, "qkv must have a multiple of 3 channels; got ", qkv.size(1));
    return qkv.size(1) / 3;
}

at::Tensor empty_channels_last(at::IntArrayRef shape, const at::Tensor& x) {
    const int64_t channels = shape[1], height = shape[2], width = shape[3];
    at::Tensor out =
        at::empty({shape[0], height, width, channels}, x.options().memory_format(at::MemoryFormat::Contiguous));
    const auto begin = round_up(reinterpret_cast<uintptr_t>(out.mutable_data_ptr()), kLargePage);
    const auto end = reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + out.nbytes();
    if (end >= begin + 4 * kLargePage) {  // a smaller block may be a piece of the heap that is in use already
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
    return out.permute({0, 3, 1, 2});
}

at::Tensor channels_last(const at::Tensor& x) {
    const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
    const at::Tensor same = with_strides(x, {height * width * channels, 1, width * channels, channels});
    if (same.defined()) {
        return same;
    }
    at::Tensor copy = empty_channels_last(x.sizes(), x);
    copy.copy_(x);
    return copy;
}

at::Tensor with_pixels(const at::Tensor& x) {
    const int64_t pixel = x.stride(3), row = x.size(3) * pixel;
    const at::Tensor same = pixel >= x.size(1) ? with_strides(x, {x.size(2) * row, 1, row, pixel}) : at::Tensor();
    return same.defined() ? same : channels_last(x);
}

at::Tensor padded_parameter(const OptionalTensor& parameter, int64_t size) {
    if (!parameter.has_value()) {
        return at::zeros({size}, at::kFloat);
    }
    if (parameter->scalar_type() == at::kFloat && parameter->is_contiguous() && parameter->size(-1) == size) {
        return *parameter;
    }
    at::DimVector shape(parameter->sizes());
    const int64_t last = shape.back();
    shape.back() = size;
    at::Tensor out = at::zeros(shape, at::kFloat);
    out.narrow(-1, 0, last).copy_(*parameter);
    return out;
}

}  // namespace ipt_fast::cpu
