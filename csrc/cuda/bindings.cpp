#include "bindings.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#ifndef IPT_FAST_EMULATED
#include <dlfcn.h>
#endif

namespace ipt_fast::cuda {
namespace {

std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) {
        text += (i ? ", " : "") + std::to_string(shape[i]);
    }
    return text + ")";
}

const char* dtype_text(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Double:
            return "float64";
        default:
            return "another dtype";
    }
}

// Kernels read 16 bytes at a time.
void check_aligned(const Tensor& x, const char* name) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16;
    STD_TORCH_CHECK(past == 0, name, " must begin at a multiple of 16 bytes; got ", past, " bytes past one");
}

void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
    const torch::headeronly::IntHeaderOnlyArrayRef expected(shape.begin(), shape.size());
    STD_TORCH_CHECK(t.sizes() == expected, name, " must have shape ", shape_text(expected), "; got ",
                    shape_text(t.sizes()));
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; got strides ", shape_text(t.strides()));
    check_aligned(t, name);
}

#ifndef IPT_FAST_EMULATED
// Not linked: the CPU build of PyTorch has no such function, and this library loads there, too.
void* current_stream(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const Function function = [] {
        void* torch = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
        return reinterpret_cast<Function>(torch ? dlsym(torch, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    STD_TORCH_CHECK(function != nullptr, "ipt_fast: this build of PyTorch has no CUDA streams");
    void* stream = nullptr;
    STD_TORCH_CHECK(function(device, &stream) == AOTI_TORCH_SUCCESS, "ipt_fast: no current CUDA stream");
    return stream;
}
#endif

}  // namespace

#ifdef IPT_FAST_EMULATED
const char* device_name() { return "cpu"; }
Device::Device(const Tensor&) {}
#else
const char* device_name() { return "cuda"; }
Device::Device(const Tensor& on) {
    guard_.emplace(on.get_device_index());
    stream = current_stream(on.get_device_index());
}
#endif
Device::~Device() = default;

void check_float(const Tensor& x, const char* name) {
    const auto type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                    " must be float32, bfloat16 or float16; got ", dtype_text(type));
}

void check_image(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4, name, " must be (B, C, H, W); got ", x.dim(), " dimensions");
    check_float(x, name);
    const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
    STD_TORCH_CHECK(c > 0 && h > 0 && w > 0, name, " must have at least one channel, row and column; got shape ",
                    shape_text(x.sizes()));
    STD_TORCH_CHECK(x.stride(0) == c * h * w && x.stride(1) == 1 && x.stride(2) == c * w && x.stride(3) == c, name,
                    " must be channels-last; got strides ", shape_text(x.strides()));
    check_aligned(x, name);
}

void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& like) {
    check_shape(t, name, shape);
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first tensor, ",
                    dtype_text(like.scalar_type()), "; got ", dtype_text(t.scalar_type()));
}

void check_small(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& like,
                 const Tensor& first) {
    check_shape(t, name, shape);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == like.scalar_type(), name,
                    " must be float32 or have the dtype of the first tensor, ", dtype_text(like.scalar_type()),
                    "; got ", dtype_text(t.scalar_type()));
    STD_TORCH_CHECK(t.scalar_type() == first.scalar_type(), name,
                    " must have the dtype of the other small parameters, ", dtype_text(first.scalar_type()), "; got ",
                    dtype_text(t.scalar_type()));
}

void check_device(std::initializer_list<const Tensor*> tensors) {
    const Tensor& first = **tensors.begin();
    for (const Tensor* t : tensors) {
#ifdef IPT_FAST_EMULATED
        const bool there = t->is_cpu();
#else
        const bool there = t->is_cuda();
#endif
        STD_TORCH_CHECK(there && t->get_device_index() == first.get_device_index(), "all tensors must be on one ",
                        device_name(), " device; got one elsewhere");
    }
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

Tensor new_image(const Tensor& x, int64_t channels) {
    // Laid out as it is in memory; the caller sees it transposed.
    Tensor y = new_tensor(x, {x.size(0), x.size(2), x.size(3), channels}, x.scalar_type());
    return torch::stable::transpose(torch::stable::transpose(y, 2, 3), 1, 2);
}

}  // namespace ipt_fast::cuda
