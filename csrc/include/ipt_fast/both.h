// Marks functions that CUDA compiles for the CPU and for the GPU.
#pragma once

#ifdef __CUDACC__
#define IPT_FAST_BOTH __host__ __device__
#else
#define IPT_FAST_BOTH
#endif
