// How functions of headers are marked.
#pragma once

// IPT_FAST_BOTH: CUDA compiles it for the CPU and for the GPU.
// IPT_FAST_INLINE: a member of the kernels' parameters. The kernels are compiled once for each instruction set, and the
// linker must never merge code of two: functions have internal linkage, and members, which cannot, are always inlined.
#ifdef __CUDACC__
#define IPT_FAST_BOTH __host__ __device__
#define IPT_FAST_INLINE
#else
#define IPT_FAST_BOTH
#define IPT_FAST_INLINE __attribute__((always_inline))
#endif
