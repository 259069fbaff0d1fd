#include "focal_apply_kernel.cuh"
#include "focal_attend_kernel.cuh"
#include "focal_gram_kernel.cuh"

namespace ipt_fast::cuda {
namespace {

template <class T, int C, int D>
void run(const FocalAttentionLayerArguments& p, void* stream) {
    const int64_t blocks = focal_blocks(p);
    using Gram = GramShared<T, C, D>;
    using Apply = ApplyShared<T, C, D>;
    static_assert(sizeof(Gram) <= kSharedMemory && sizeof(Apply) <= kSharedMemory);
    launch(focal_gram_kernel<T, C, D>, p, {blocks * p.heads, Gram::kThreads, (int)sizeof(Gram), stream});
    launch(focal_attend_kernel<T>, p, {focal_matrices(p), kAttendThreads, 0, stream});
    launch(focal_apply_kernel<T, C, D>, p, {blocks, kApplyThreads, (int)sizeof(Apply), stream});
}

}  // namespace

template <class T>
void focal_attention_layer(const FocalAttentionLayerArguments& p, void* stream) {
    if (p.channels / p.heads == 48) {
        return p.channels == 48 ? run<T, 48, 48>(p, stream) : run<T, 96, 48>(p, stream);
    }
    switch (p.channels) {
        case 32:
            return run<T, 32, 32>(p, stream);
        case 64:
            return run<T, 64, 32>(p, stream);
        default:
            return run<T, 96, 32>(p, stream);
    }
}

template void focal_attention_layer<float>(const FocalAttentionLayerArguments&, void*);
template void focal_attention_layer<bf16>(const FocalAttentionLayerArguments&, void*);
template void focal_attention_layer<fp16>(const FocalAttentionLayerArguments&, void*);

}  // namespace ipt_fast::cuda
