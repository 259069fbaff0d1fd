// What the bindings of all operators share, on PyTorch's stable interface: checks, types, streams.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "device.cuh"

namespace ipt_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where tensors have to be: "cuda", or "cpu" where the GPU is emulated.
const char* device_name();

// Sets the tensor's device for as long as it lives; `stream` is PyTorch's current one there.
class Device {
  public:
    explicit Device(const Tensor& on);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    void* stream = nullptr;

  private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// One of float32, bfloat16 or float16, as with_type() needs.
void check_float(const Tensor& x, const char* name);
// A channels-last (B, C, H, W) tensor of float32, bfloat16 or float16.
void check_image(const Tensor& x, const char* name);
// A contiguous tensor of this shape in the dtype of `like`.
void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& like);
// A small parameter: contiguous, of this shape, in float32 or the dtype of `like`, and in that of `first`, another one.
void check_small(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& like,
                 const Tensor& first);
// The last of all checks, so that all others can be tried anywhere.
void check_device(std::initializer_list<const Tensor*> tensors);

// An unwritten channels-last (B, C, H, W) tensor with the batch, size, dtype and device of `x`.
Tensor new_image(const Tensor& x, int64_t channels);
Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype);

// f(T{}) with the type of the tensor's values.
template <class F>
void with_type(const Tensor& x, F f) {
    switch (x.scalar_type()) {
        case ScalarType::BFloat16:
            return f(bf16{});
        case ScalarType::Half:
            return f(fp16{});
        default:
            return f(float{});
    }
}

template <class T>
const T* values(const Tensor& x) {
    return static_cast<const T*>(x.data_ptr());
}
inline const void* values(const OptionalTensor& x) { return x.has_value() ? x->data_ptr() : nullptr; }
template <class T>
T* values(Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

}  // namespace ipt_fast::cuda
