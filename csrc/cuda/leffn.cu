#include "leffn_kernel.cuh"

namespace ipt_fast::cuda {
namespace {

template <class T, int C>
void run(const LeffnArguments& arguments, void* stream) {
    using Tile = LeffnTile<T, C>;
    static_assert(sizeof(Tile) <= kSharedMemory);
    const int64_t across = (arguments.width + Tile::kWide - 1) / Tile::kWide;
    const int64_t down = (arguments.height + Tile::kHigh - 1) / Tile::kHigh;
    launch(leffn_kernel<T, C>, arguments, {arguments.batch * down * across, Tile::kThreads, (int)sizeof(Tile), stream});
}

}  // namespace

template <class T>
void leffn(const LeffnArguments& arguments, int channels, void* stream) {
    switch (channels) {
        case 32:
            return run<T, 32>(arguments, stream);
        case 48:
            return run<T, 48>(arguments, stream);
        case 64:
            return run<T, 64>(arguments, stream);
        default:
            return run<T, 96>(arguments, stream);
    }
}

template void leffn<float>(const LeffnArguments&, int, void*);
template void leffn<bf16>(const LeffnArguments&, int, void*);
template void leffn<fp16>(const LeffnArguments&, int, void*);

}  // namespace ipt_fast::cuda
