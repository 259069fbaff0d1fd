#include "work_space.h"

#include <ATen/ops/empty.h>

#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kMostKept = 64 << 20;  // bytes

// Of this thread's last call: memory that is new to the process takes longer than many a call.
thread_local at::Tensor kept;

}  // namespace

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
    memory_ = std::exchange(kept, {});  // a call inside of this one finds nothing
    if (!memory_.defined() || memory_.numel() < size_ + kLine) {
        memory_ = at::empty({size_ + kLine}, at::kByte);
    }
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
    if (memory_.defined() && memory_.numel() <= kMostKept) {
        kept = std::move(memory_);
    }
}

}  // namespace ipt_fast::cpu
