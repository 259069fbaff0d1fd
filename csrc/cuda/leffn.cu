#include "leffn_kernel.h"

namespace ipt_fast {
namespace {

template <class T, int C>
void run(const LeffnParams& params, void* stream) {
    using Tile = LeffnTile<T, C>;
    static_assert(sizeof(Tile) <= kSharedMemory);
    const int64_t across = (params.width + Tile::kWide - 1) / Tile::kWide;
    const int64_t down = (params.height + Tile::kHigh - 1) / Tile::kHigh;
    launch(leffn_kernel<T, C>, params, {params.batch * down * across, Tile::kThreads, (int)sizeof(Tile), stream});
}

}  // namespace

template <class T>
void leffn(const LeffnParams& params, int channels, void* stream) {
    switch (channels) {
        case 32:
            return run<T, 32>(params, stream);
        case 48:
            return run<T, 48>(params, stream);
        case 64:
            return run<T, 64>(params, stream);
        default:
            return run<T, 96>(params, stream);
    }
}

template void leffn<float>(const LeffnParams&, int, void*);
template void leffn<bf16>(const LeffnParams&, int, void*);
template void leffn<fp16>(const LeffnParams&, int, void*);

}  // namespace ipt_fast
