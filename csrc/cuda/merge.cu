#include "merge_kernel.cuh"

namespace ipt_fast::cuda {

template <class T>
void merge(const MergeArguments& arguments, void* stream) {
    int64_t blocks = blocks_of(arguments.sum);
    for (const Product& product : arguments.products) {
        blocks += blocks_of(product);
    }
    launch(merge_kernel<T>, arguments, {blocks, kMergeThreads, (int)sizeof(MergeShared<T>), stream});
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

template void merge<float>(const MergeArguments&, void*);
template void merge<bf16>(const MergeArguments&, void*);
template void merge<fp16>(const MergeArguments&, void*);

}  // namespace ipt_fast::cuda
