// The feed-forward network in one kernel. In 16 bits and of float it is scheduled differently.
#pragma once

#include <type_traits>

#include "leffn_float.cuh"
#include "leffn_small.cuh"

namespace ipt_fast::cuda {

template <class T, int C>
using LeffnTile = std::conditional_t<sizeof(T) == 2, LeffnSmallTile<T, C>, LeffnFloatTile<C>>;

template <class T, int C>
IPT_FAST_KERNEL IPT_FAST_BOUNDS((LeffnTile<T, C>::kThreads), (LeffnTile<T, C>::kBlocks))
    leffn_kernel(IPT_FAST_ARGUMENTS(LeffnArguments) p) {
    if constexpr (sizeof(T) == 2) {
        leffn_small<T, C>(p);
    } else {
        leffn_float<C>(p);
    }
}

}  // namespace ipt_fast::cuda
