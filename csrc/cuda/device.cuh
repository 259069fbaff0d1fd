// What kernels need of a GPU, one name each: compiled by nvcc it is the GPU's, by a C++ compiler it is emulated
// (emulator.cuh), so that every kernel also runs, slowly, where there is no GPU.
//
// A kernel takes one structure of parameters by value, all its shared memory is dynamic, and it is started by
// launch(kernel, parameters, configuration). Collective functions are called by all lanes of a warp together.
#pragma once

#include <stdint.h>

namespace ipt_fast::cuda {
constexpr int kSharedMemory = 163 << 10;  // bytes that a thread block may need
}

#ifndef __CUDACC__
#include "emulator.cuh"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#define IPT_FAST_KERNEL __global__ void
#define IPT_FAST_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define IPT_FAST_DEVICE __device__ __forceinline__
#define IPT_FAST_ARGUMENTS(type) const __grid_constant__ type

namespace ipt_fast::cuda {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

IPT_FAST_DEVICE float to_float(float x) { return x; }
IPT_FAST_DEVICE float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
IPT_FAST_DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
IPT_FAST_DEVICE T from_float(float x);
template <>
IPT_FAST_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
IPT_FAST_DEVICE bf16 from_float<bf16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
IPT_FAST_DEVICE fp16 from_float<fp16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

// Two values in a word, the first in its low half.
template <class T>
IPT_FAST_DEVICE uint32_t pack(float low, float high);
template <>
IPT_FAST_DEVICE uint32_t pack<bf16>(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
IPT_FAST_DEVICE uint32_t pack<fp16>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

IPT_FAST_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
IPT_FAST_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }

// Words from or to an address aligned to all of them, in one access: nvcc would split that of a structure of our own.
template <int N>
IPT_FAST_DEVICE void load_words(uint32_t (&words)[N], const void* from) {
    static_assert(N == 2 || N == 4);
    if constexpr (N == 2) {
        const uint2 all = *static_cast<const uint2*>(from);
        words[0] = all.x, words[1] = all.y;
    } else {
        const uint4 all = *static_cast<const uint4*>(from);
        words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    }
}
template <int N>
IPT_FAST_DEVICE void store_words(void* to, const uint32_t (&words)[N]) {
    static_assert(N == 2 || N == 4);
    if constexpr (N == 2) {
        *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
        *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
// Not to shared memory. nvcc splits other stores that it knows less of.
template <int N>
IPT_FAST_DEVICE void store_global(void* to, const uint32_t (&words)[N]) {
    static_assert(N == 2 || N == 4);
    if constexpr (N == 2) {
        __stwb(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else {
        __stwb(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    }
}

IPT_FAST_DEVICE int thread_index() { return threadIdx.x; }
IPT_FAST_DEVICE int64_t block_index() { return blockIdx.x; }
IPT_FAST_DEVICE int block_threads() { return blockDim.x; }

template <class T>
IPT_FAST_DEVICE T* shared_memory() {
    extern __shared__ __align__(16) unsigned char ipt_fast_shared[];
    return reinterpret_cast<T*>(ipt_fast_shared);
}

IPT_FAST_DEVICE void sync_block() { __syncthreads(); }
IPT_FAST_DEVICE void sync_warp() { __syncwarp(); }

IPT_FAST_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
IPT_FAST_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// 16 bytes, both addresses aligned to them; zeros where `there` is false, and then `from` is not read. They arrive in
// shared memory when the group they were committed to is waited for: all but the newest Pending groups are.
IPT_FAST_DEVICE void copy_async(void* to, const void* from, bool there) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
IPT_FAST_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
IPT_FAST_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values, collective: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes and
// aligned to them, and gets of matrix j, in word j, row i / 4, columns 2 (i % 4) and the next; of its transpose, if so.
IPT_FAST_DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}
IPT_FAST_DEVICE void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), collective; warp_tiles.cuh tells which lane holds what.
IPT_FAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
IPT_FAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16, 8) += a (16, 8) b (8, 8) with operands rounded to TF32.
IPT_FAST_DEVICE void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t r[6] = {a[0], a[1], a[2], a[3], b0, b1};
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(__uint_as_float(r[i])));
    }
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(r[4]), "r"(r[5]));
}

struct Configuration {
    int64_t blocks;
    int threads;
    int shared_bytes;
    void* stream;
};

// Throws std::runtime_error with CUDA's reason.
inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // or the next to ask would get it
        throw std::runtime_error(std::string("ipt_fast: ") + what + ": " + cudaGetErrorString(error));
    }
}

// Lets a kernel's blocks have their shared memory, and a multiprocessor as many of them as it has room for, where there
// would be a cache else. Asked for once on each device, as it takes time; a kernel's blocks always need as much.
inline void allow_shared_memory(const void* kernel, int bytes) {
    static std::mutex mutex;
    using Place = std::pair<const void*, int>;
    static std::set<Place> done;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "device");
    const std::lock_guard<std::mutex> lock(mutex);
    if (done.count({kernel, device}) == 0) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared),
                   "shared memory");
        done.insert({kernel, device});
    }
}

template <class P>
void launch(void (*kernel)(P), const P& arguments, const Configuration& c) {
    if (c.blocks == 0) {
        return;
    }
    if (c.blocks > INT32_MAX) {
        throw std::runtime_error("ipt_fast: the tensors are too large for one launch");
    }
    if (c.shared_bytes > 0) {
        allow_shared_memory((const void*)kernel, c.shared_bytes);
    }
    void* pointers[] = {const_cast<P*>(&arguments)};
    check_cuda(cudaLaunchKernel((const void*)kernel, dim3((unsigned)c.blocks), dim3((unsigned)c.threads), pointers,
                                (size_t)c.shared_bytes, (cudaStream_t)c.stream),
               "launch");
}

}  // namespace ipt_fast::cuda
#endif
