// Which level of the kernels runs: the highest one the processor has, capped by IPT_FAST_CPU_ISA.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "levels.h"

namespace ipt_fast::cpu {

// The levels that this processor can run, lowest first; they count the entries of kLevels.
std::vector<size_t> available_levels();

// The level in use. IPT_FAST_CPU_ISA is read on every call; an unknown value raises.
size_t level();

// While it lives, level() stays what it is, for this thread: weights are packed and read at the same level, whatever
// another thread does to the environment meanwhile.
class KeptLevel {
  public:
    KeptLevel();
    KeptLevel(const KeptLevel&) = delete;
    ~KeptLevel();

  private:
    std::optional<size_t> before_;
};

// An operator's kernels for the level in use.
template <typename Kernels>
const Kernels& kernels_in_use() {
    return *kTables<Kernels>[level()];
}

}  // namespace ipt_fast::cpu
