#include "grid_attention_layer_kernel.h"

namespace ipt_fast {
namespace {

// Of the current device; few where it is emulated, so that blocks take several groups there.
int multiprocessors() {
#ifdef __CUDACC__
    int device = 0, count = 0;
    check_cuda(cudaGetDevice(&device), "device");
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
    return count;
#else
    return emulator::multiprocessors();
#endif
}

template <class T, int Channels, int Width, int Side>
void run(GridAttentionLayerParams& params, void* stream) {
    using Layer = GridLayer<T, Channels, Width, Side>;
    static_assert(sizeof(typename Layer::Shared) <= kSharedMemory);
    const int64_t items = (int64_t)(params.groups + Layer::kGroups - 1) / Layer::kGroups * Layer::kParts;
    const int64_t most = (int64_t)multiprocessors() * Layer::kBlocks;  // as many as run at the same time
    params.blocks = (int)(items < most ? items : most);
    launch(grid_attention_layer_kernel<T, Channels, Width, Side>, params,
           {params.blocks, Layer::kThreads, (int)sizeof(typename Layer::Shared), stream});
}

template <class T, int Channels, int Width>
void run_width(GridAttentionLayerParams& params, void* stream) {
    if (params.lattices.rows <= 8 && params.lattices.columns <= 8) {
        run<T, Channels, Width, 8>(params, stream);
    } else {
        run<T, Channels, Width, 16>(params, stream);
    }
}

}  // namespace

template <class T>
void grid_attention_layer(GridAttentionLayerParams params, int channels, int heads, void* stream) {
    switch (channels) {
        case 32:
            return run_width<T, 32, 32>(params, stream);
        case 48:
            return run_width<T, 48, 48>(params, stream);
        case 64:
            return run_width<T, 64, 32>(params, stream);
        default:
            return heads == 2 ? run_width<T, 96, 48>(params, stream) : run_width<T, 96, 32>(params, stream);
    }
}

template void grid_attention_layer<float>(GridAttentionLayerParams, int, int, void*);
template void grid_attention_layer<bf16>(GridAttentionLayerParams, int, int, void*);
template void grid_attention_layer<fp16>(GridAttentionLayerParams, int, int, void*);

}  // namespace ipt_fast
