#include "grid_attention_layer_kernel.cuh"

namespace ipt_fast::cuda {
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
void run(GridAttentionLayerArguments& arguments, void* stream) {
    using Layer = GridLayer<T, Channels, Width, Side>;
    static_assert(sizeof(typename Layer::Shared) <= kSharedMemory);
    const int64_t items = (int64_t)(arguments.groups + Layer::kGroups - 1) / Layer::kGroups * Layer::kParts;
    const int64_t most = (int64_t)multiprocessors() * Layer::kBlocks;  // as many as run at the same time
    arguments.blocks = (int)(items < most ? items : most);
    launch(grid_attention_layer_kernel<T, Channels, Width, Side>, arguments,
           {arguments.blocks, Layer::kThreads, (int)sizeof(typename Layer::Shared), stream});
}

template <class T, int Channels, int Width>
void run_width(GridAttentionLayerArguments& arguments, void* stream) {
    if (arguments.lattices.rows <= 8 && arguments.lattices.columns <= 8) {
        run<T, Channels, Width, 8>(arguments, stream);
    } else {
        run<T, Channels, Width, 16>(arguments, stream);
    }
}

}  // namespace

template <class T>
void grid_attention_layer(GridAttentionLayerArguments arguments, int channels, int heads, void* stream) {
    switch (channels) {
        case 32:
            return run_width<T, 32, 32>(arguments, stream);
        case 48:
            return run_width<T, 48, 48>(arguments, stream);
        case 64:
            return run_width<T, 64, 32>(arguments, stream);
        default:
            return heads == 2 ? run_width<T, 96, 48>(arguments, stream) : run_width<T, 96, 32>(arguments, stream);
    }
}

template void grid_attention_layer<float>(GridAttentionLayerArguments, int, int, void*);
template void grid_attention_layer<bf16>(GridAttentionLayerArguments, int, int, void*);
template void grid_attention_layer<fp16>(GridAttentionLayerArguments, int, int, void*);

}  // namespace ipt_fast::cuda
