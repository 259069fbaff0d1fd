// Which level of the kernels runs: the highest one the processor has, capped by IPT_FAST_CPU_ISA.
#pragma once

#include <cstddef>
#include <vector>

#include "levels.h"

namespace ipt_fast::cpu {

// The levels that this processor can run, lowest first; they count the entries of kLevels.
std::vector<size_t> available_levels();

// The level in use. IPT_FAST_CPU_ISA is read on every call; an unknown value raises.
size_t level();

// An operator's kernels for the level in use.
template <typename Kernels>
const Kernels& kernels_in_use() {
    return *kTables<Kernels>[level()];
}

}  // namespace ipt_fast::cpu
