#include "tensor.h"

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr uintptr_t kLargePage = 2 << 20;

}  // namespace

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
    if (x.strides() == at::IntArrayRef({height * width * channels, 1, width * channels, channels})) {
        return x;
    }
    at::Tensor copy = empty_channels_last(x.sizes(), x);
    copy.copy_(x);
    return copy;
}

at::Tensor padded_parameter(const OptionalTensor& parameter, int64_t size) {
    if (!parameter.has_value()) {
        return at::zeros({size}, at::kFloat);
    }
    at::DimVector shape(parameter->sizes());
    const int64_t last = shape.back();
    shape.back() = size;
    at::Tensor out = at::zeros(shape, at::kFloat);
    out.narrow(-1, 0, last).copy_(*parameter);
    return out;
}

int64_t WorkSpace::add(int64_t bytes) {
    const int64_t offset = size_;
    size_ += round_up(bytes, kLine);
#if defined(__SANITIZE_ADDRESS__)
    gaps_.emplace_back(offset + bytes, size_ + kLine - offset - bytes);
    size_ += kLine;
#endif
    return offset;
}

void WorkSpace::allocate() {
    memory_ = at::empty({size_ + kLine}, at::kByte);
    base_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr()), kLine));
#if defined(__SANITIZE_ADDRESS__)
    for (const auto& [offset, size] : gaps_) {
        ASAN_POISON_MEMORY_REGION(base_ + offset, size);
    }
#endif
}

WorkSpace::~WorkSpace() {
#if defined(__SANITIZE_ADDRESS__)
    if (base_ != nullptr) {
        ASAN_UNPOISON_MEMORY_REGION(base_, size_);
    }
#endif
}

}  // namespace ipt_fast::cpu
