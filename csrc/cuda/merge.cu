#include "merge_kernel.h"

namespace ipt_fast {

template <class T>
void merge(const MergeParams& params, void* stream) {
    int64_t blocks = 0;
    for (int i = 0; i < params.product_count; ++i) {
        blocks += blocks_of(params.products[i]);
    }
    for (int i = 0; i < params.sum_count; ++i) {
        blocks += blocks_of(params.sums[i]);
    }
    launch(merge_kernel<T>, params, {blocks, kMergeThreads, (int)sizeof(MergeShared<T>), stream});
}

const char* merge_error() {
#ifdef __CUDACC__
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, (const void*)merge_kernel<float>);
    cudaGetLastError();  // or the next to ask would get it
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
#else
    return "";
#endif
}

template void merge<float>(const MergeParams&, void*);
template void merge<bf16>(const MergeParams&, void*);
template void merge<fp16>(const MergeParams&, void*);

}  // namespace ipt_fast
