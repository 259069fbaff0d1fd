// Calls an operator's kernels as its host code does, on one thread: kernels LEVEL OPERATOR <arguments >results.
// Arguments are numbers, then arrays; results are arrays, one behind the other (test_arm.py).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/channel_attention_kernel.h"
#include "cpu/feed_forward_kernel.h"
#include "cpu/group_attention_kernel.h"
#include "cpu/layer_norm_2d_kernel.h"
#include "cpu/leffn_backward_kernel.h"

using namespace ipt_fast;
using namespace ipt_fast::cpu;

namespace {

size_t level = 0;

template <typename Kernels>
const Kernels& kernels() {
    return *kTables<Kernels>[level];
}

// Memory of the call, on cache lines; it is kept until the end.
template <typename T>
T* memory(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64);
    return static_cast<T*>(memset(aligned_alloc(64, bytes), 0, bytes));
}

void read(void* target, int64_t bytes) {
    if (fread(target, 1, bytes, stdin) != static_cast<size_t>(bytes)) {
        fprintf(stderr, "an argument is missing\n");
        exit(1);
    }
}

int64_t number() {
    int64_t value;
    read(&value, sizeof(value));
    return value;
}

template <typename T = void>
T* array() {
    const int64_t bytes = number();
    char* data = memory<char>(bytes);
    read(data, bytes);
    return reinterpret_cast<T*>(data);
}

template <typename T>
void write(const T* data, int64_t count) {
    fwrite(data, sizeof(T), count, stdout);
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void write_map(const void* data, DType dtype, int64_t count) {
    write(static_cast<const char*>(data), count * size_of(dtype));
}

void* new_map(DType dtype, int64_t count) { return memory<char>(count * size_of(dtype)); }

void layer_norm_2d() {
    LayerNorm2dParams p{};
    p.dtype = static_cast<DType>(number());
    const int64_t batch = number();
    p.channels = number();
    p.padded_channels = padded(p.channels);
    p.pixels = number();
    const bool centered = number();
    p.x = {array(), true};
    const float *weight = array<float>(), *bias = array<float>();
    p.norm = {weight, bias, 1e-5f, centered, 0, 0};
    p.grad = {array(), true};
    const int64_t values = batch * p.pixels * p.channels,
                  blocks = batch * ((p.pixels + kBlockPixels - 1) / kBlockPixels);
    p.out = new_map(p.dtype, values);
    float* scratch = memory<float>(backward_scratch(p.padded_channels));
    kernels<LayerNorm2dKernels>().forward(p, 0, blocks, scratch);
    write_map(p.out, p.dtype, values);
    double *grad_weight = memory<double>(p.padded_channels), *grad_bias = memory<double>(p.padded_channels);
    kernels<LayerNorm2dKernels>().backward(p, 0, blocks, scratch, grad_weight, grad_bias);
    write_map(p.out, p.dtype, values);
    write(grad_weight, p.padded_channels);
    write(grad_bias, p.padded_channels);
}

// The forward of leffn, and of leffn_layer where a norm is given.
void leffn() {
    FeedForwardParams p{};
    p.form = kLeffn;
    p.dtype = static_cast<DType>(number());
    const int64_t batch = number();
    p.height = number();
    p.width = number();
    p.channels = number();
    p.hidden = number();
    p.out_channels = number();
    p.kernel = number();
    p.residual = number();
    p.x = array();
    p.norm = {array<float>(), array<float>(), 1e-5f, true, 0, 0};
    p.norm.weight = p.residual ? p.norm.weight : nullptr;
    p.expand = {array(), p.hidden, p.channels, p.channels, 1};
    p.project = {array(), p.out_channels, p.hidden, p.hidden, 1};
    p.depthwise = array<float>();
    p.bands = p.strips = 2;
    p.rows_per_step = 4;
    const int64_t values = batch * p.height * p.width * p.out_channels;
    p.out = new_map(p.dtype, values);
    p.packed_expand = memory<float>(packed_floats(p, p.channels));
    p.packed_project = memory<float>(packed_floats(p, p.out_channels));
    const FeedForwardKernels& kernel = kernels<FeedForwardKernels>();
    kernel.pack(p, 0, p.blocks());
    kernel.forward(p, 0, batch * p.bands * p.strips, memory<char>(kernel.scratch_size(p)));
    write_map(p.out, p.dtype, values);
}

void leffn_backward() {
    LeffnBackwardParams p{};
    p.dtype = static_cast<DType>(number());
    p.batch = number();
    p.height = number();
    p.width = number();
    p.channels = number();
    p.hidden = number();
    p.out_channels = number();
    p.kernel = number();
    p.x = array();
    p.grad = array();
    p.expand = array<float>();
    p.project = array<float>();
    p.depthwise = array<float>();
    p.flipped = array<float>();
    const int64_t hidden = padded(p.hidden), channels = padded(p.channels);
    p.tile_rows = Cut::at_most(p.height, 5);
    p.tile_columns = Cut::at_most(p.width, 16);
    p.band_rows = 2;
    p.chunks = Cut::at_most(hidden / kChannelPad, 2);
    p.shares = {p.batch * p.tile_rows.count * p.tile_columns.count, 1};
    p.groups = {p.chunks.count, 1};
    p.packed_expand = memory<float>(hidden * channels);
    p.packed_project = memory<float>(hidden * padded(p.out_channels));
    p.packed_transposed = memory<float>(hidden * channels);
    p.grad_expand = memory<float>(hidden * channels);
    p.grad_project = memory<float>(p.out_channels * hidden);
    p.grad_depthwise = memory<float>(p.kernel * p.kernel * hidden);
    const int64_t values = p.batch * p.height * p.width * p.channels;
    p.grad_x = new_map(p.dtype, values);
    for (int64_t chunk = 0; chunk < p.chunks.count; ++chunk) {
        kernels<LeffnBackwardKernels>().pack(p, chunk);
    }
    kernels<LeffnBackwardKernels>().run(p, 0, 0, memory<float>(LeffnBackwardScratch(p).size));
    write_map(p.grad_x, p.dtype, values);
    write(p.grad_expand, hidden * channels);
    write(p.grad_depthwise, p.kernel * p.kernel * hidden);
    write(p.grad_project, p.out_channels * hidden);
}

// focal_channel_attention and the gradient of qkv, or with one branch channel_attention in windows.
void channel_attention() {
    const auto dtype = static_cast<DType>(number());
    Groups g{};
    g.branches = static_cast<int>(number());
    g.images = number();
    const int64_t height = number(), width = number();
    g.heads = number();
    g.head_channels = number();
    g.depth = padded(g.head_channels);
    const int64_t window = number();
    g.vertical = Axis::windows_of(height, window, g.branches);
    g.horizontal = Axis::windows_of(width, window, g.branches);
    g.dilation = 1;
    g.height = height;
    g.width = width;
    const int64_t channels = g.heads * g.head_channels, values = g.images * height * width * channels;
    char *qkv = array<char>(), *grad = array<char>();
    g.scale[0] = g.scale[1] = array<float>();
    g.token_squares[0] = g.token_squares[1] = array<float>();
    g.merge[0] = array<float>();
    g.merge[1] = array<float>();
    const auto part = [&](char* map, int64_t index) { return map + index * channels * size_of(dtype); };
    const Pixels q{part(qkv, 0), 3 * channels}, k{part(qkv, 1), 3 * channels}, v{part(qkv, 2), 3 * channels};
    const int64_t blocks = g.blocks() * g.heads, windows = g.windows() * g.heads * g.branches;

    ChannelAttentionParams p{dtype, nullptr, g, q, k, v, new_map(dtype, values)};
    p.groups.slots = memory<float>(g.slots_bytes() / 4);
    float* scratch = memory<float>(gram_scratch(g) + attend_scratch(g) + apply_scratch(g) + kTileTokens * g.depth);
    const ChannelAttentionKernels& forward = kernels<ChannelAttentionKernels>();
    forward.gram(p, 0, blocks, scratch);
    forward.attend(p.groups, 0, windows, scratch);
    forward.apply(p, 0, blocks, scratch);
    write_map(p.out, dtype, values);

    char* grad_qkv = static_cast<char*>(new_map(dtype, 3 * values));
    ChannelAttentionBackwardParams b{};
    b.dtype = dtype;
    b.groups = g;
    b.q = q;
    b.k = k;
    b.v = v;
    b.grad = {grad, channels};
    b.grad_q = part(grad_qkv, 0);
    b.grad_k = part(grad_qkv, 1);
    b.grad_v = part(grad_qkv, 2);
    b.grad_pixel = 3 * channels;
    b.slots = memory<float>(blocks * b.slot_size());
    b.matrices = memory<float>(windows * b.matrices_size());
    b.grad_scale = memory<double>(windows);
    b.token_sums = memory<float>(4 * g.heads * g.images * height * width);
    scratch = memory<float>(b.scratch());
    const ChannelAttentionBackwardKernels& backward = kernels<ChannelAttentionBackwardKernels>();
    backward.gram(b, 0, blocks, scratch);
    backward.attend(b, 0, windows, scratch);
    backward.apply(b, 0, blocks, scratch);
    write_map(grad_qkv, dtype, 3 * values);
}

void grid_attention() {
    GroupAttention p{};
    p.dtype = static_cast<DType>(number());
    p.batch = number();
    const int64_t height = number(), width = number();
    p.heads = number();
    p.depth = number();
    const int64_t grid = number(), last = grid - 1, row = 2 * grid - 1 + kChannelPad;
    p.queries = p.keys = {TokenAxis::lattices(height, grid), TokenAxis::lattices(width, grid), false};
    p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.depth)));
    char *qkv = array<char>(), *grad = array<char>();
    p.bias = {array<float>(), round_up((2 * grid - 1) * row, kChannelPad), last * row + last, row, -row, -1};
    const int64_t channels = channels_of(p), values = p.batch * height * width * channels;
    const int64_t groups = p.batch * p.queries.count();
    const auto part = [&](char* map, int64_t index) { return map + index * channels * size_of(p.dtype); };
    const Pixels q{part(qkv, 0), 3 * channels}, k{part(qkv, 1), 3 * channels}, v{part(qkv, 2), 3 * channels};
    const GroupAttentionParams forward{p, q, k, v, new_map(p.dtype, values)};
    kernels<GroupAttentionKernels>().forward(forward, 0, groups * p.heads, memory<float>(scratch_size(forward)));
    write_map(forward.out, p.dtype, values);
    char* grads = static_cast<char*>(new_map(p.dtype, 3 * values));
    const GroupAttentionGradients backward{
        p, q, k, v, {grad, channels}, false, part(grads, 0), part(grads, 1), part(grads, 2), 3 * channels};
    double* bias = memory<double>(p.heads * p.bias.size);
    for (int64_t head = 0; head < p.heads; ++head) {
        kernels<GroupAttentionBackwardKernels>().backward(
            backward, head, 0, groups, memory<float>(scratch_size(backward)), {bias + head * p.bias.size, nullptr});
    }
    write_map(grads, p.dtype, 3 * values);
    write(bias, p.heads * p.bias.size);
}

struct Operator {
    const char* name;
    void (*call)();
};
constexpr Operator kOperators[] = {
    {"layer_norm_2d", layer_norm_2d},   {"leffn", leffn},
    {"leffn_backward", leffn_backward}, {"channel_attention", channel_attention},
    {"grid_attention", grid_attention},
};

}  // namespace

int main(int count, char** words) {
    for (; count == 3 && level < sizeof(kLevels) / sizeof(Level); ++level) {
        for (const Operator& each : kOperators) {
            if (strcmp(words[1], kLevels[level].name) == 0 && strcmp(words[2], each.name) == 0) {
                return each.call(), 0;
            }
        }
    }
    fprintf(stderr, "kernels LEVEL OPERATOR <arguments >results\n");
    return 1;
}
