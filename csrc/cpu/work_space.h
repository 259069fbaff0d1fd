// The scratch memory of one call of an operator.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace ipt_fast::cpu {

// The work space of one call: pieces are added first, then allocated together, each on its own cache lines. A thread
// keeps the memory, up to 64 MB, for its next call.
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
