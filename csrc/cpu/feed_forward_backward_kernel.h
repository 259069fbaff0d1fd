// The backward of feed-forward networks that are convolved, framework-free: raw pointers and sizes.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// 0 <= i < total in `count` pieces, as even as can be.
struct Cut {
    int64_t total, count;

    IPT_FAST_INLINE static Cut at_most(int64_t total, int64_t size) { return {total, (total + size - 1) / size}; }
    IPT_FAST_INLINE int64_t first(int64_t piece) const { return piece * total / count; }
    IPT_FAST_INLINE int64_t largest() const { return (total + count - 1) / count; }
};

// Of Tail::convolved, behind a GELU, or of Tail::activated_gate. What belongs to hidden channels is [halves][padded
// hidden], but of the projection, which has one half.
struct FeedForwardBackwardParams {
    DType dtype;  // of x, grad and grad_x
    Brgemm brgemm;
    const void* x;     // channels-last, as grad and grad_x
    const void* grad;  // of the output
    void* grad_x;
    int64_t batch, height, width, channels, out_channels, kernel;
    int64_t halves, hidden;                     // of Tail::activated_gate 2, else 1; padded channels of one
    Norm norm;                                  // of x's pixels, in front of the network
    const float *expand_bias, *depthwise_bias;  // nullptr: there is none; that of Tail::convolved is left to the caller
    const float* gate;                          // padded out_channels, what the output is multiplied by; nullptr: 1
    int64_t gate_stride;                        // as in Norm
    const float *expand, *project, *depthwise;  // [hidden][padded channels], [out][hidden], [taps][hidden]
    const float* flipped;                       // the taps of `depthwise` in reverse order
    // Written by `pack`: the right operands of the products with x, with grad and with the gradient of h. Those of the
    // halves of a chunk, or of grad of a chunk, begin expand_floats() and so on apart.
    float *packed_expand, *packed_project, *packed_transposed;

    Cut tile_rows, tile_columns;  // image rows and columns -> tiles
    int64_t band_rows;            // rows of a tile that go through the convolution together
    Cut shares;                   // tiles of all images -> shares, each with its own sums of the weights' gradients
    Cut chunks;                   // hidden channels of a half in units of kChannelPad -> chunks
    Cut groups;                   // chunks -> groups, each with its own sum of grad_x
    float *grad_expand, *grad_project, *grad_depthwise;  // zeroed: [shares][shape of expand, project, depthwise]
    float* partial_grad_x;                               // [groups][batch, height, width, channels] if groups.count > 1
    float *grad_expand_bias, *grad_depthwise_bias;       // zeroed, [shares][hidden]; nullptr: not wanted
    float* grad_gate;  // if there is a gate, [groups][tiles][padded out]: without the biases behind the GELU
    float* grad_sums;  // [tiles][padded out], the sum of grad over a tile's pixels; nullptr: not wanted

    IPT_FAST_INLINE int64_t most_channels() const { return chunks.largest() * kChannelPad; }  // of a half of a chunk
    IPT_FAST_INLINE int64_t reach() const { return kernel / 2; }                              // of the convolution
    // What a tile reads beside it: its gradient comes through the convolution, and with a gate needs the convolved map.
    IPT_FAST_INLINE int64_t margin() const { return halves * reach(); }
    IPT_FAST_INLINE int64_t expand_floats() const { return packed_floats(dtype, brgemm, most_channels(), channels); }
    IPT_FAST_INLINE int64_t project_floats() const {
        return packed_floats(dtype, brgemm, most_channels(), out_channels);
    }
    IPT_FAST_INLINE int64_t transposed_floats() const {
        return packed_floats(dtype, brgemm, channels, most_channels());
    }
    IPT_FAST_INLINE int64_t tiles() const { return batch * tile_rows.count * tile_columns.count; }
};

// Internal linkage: code of two levels must never be merged.
namespace {

// begin <= i < end.
struct Range {
    int64_t begin, end;

    Range(const Cut& cut, int64_t piece) : begin(cut.first(piece)), end(cut.first(piece + 1)) {}
    Range(int64_t b, int64_t e) : begin(b), end(e) {}
    int64_t size() const { return end - begin; }
    // With `margin` on both sides, as far as it lies in 0 <= i < limit.
    Range wider(int64_t margin, int64_t limit) const {
        return {begin > margin ? begin - margin : 0, end + margin < limit ? end + margin : limit};
    }
};

// Where the pieces of one thread's scratch begin, in floats.
struct FeedForwardBackwardScratch {
    // Most channels of a half of a chunk, and floats between the pixels of a band: of a half and of all halves.
    int64_t chunk, half_pitch, pitch;
    int64_t ring_rows, ring_columns, ring;  // of a ring of a half's channels, and its floats
    int64_t x, grad, grad_x, row, rings, projected, grad_hidden, sums, part, taps, around, rows, run, gated, gate_sums,
        size = 0;

    explicit FeedForwardBackwardScratch(const FeedForwardBackwardParams& p) {
        chunk = p.most_channels();
        half_pitch = odd_lines(chunk);
        pitch = odd_lines(p.halves * chunk);
        ring_rows = p.band_rows + p.margin() + p.reach();
        ring_columns = p.tile_columns.largest() + 2 * p.margin();
        ring = ring_rows * ring_columns * chunk;
        const int64_t channels = padded(p.channels), out = padded(p.out_channels), hidden = p.halves * chunk;
        const int64_t tile = p.tile_rows.largest() * p.tile_columns.largest();
        const int64_t staged = (p.tile_rows.largest() + 2 * p.margin()) * ring_columns;
        const int64_t band = p.band_rows * p.tile_columns.largest();
        x = add(staged * channels);
        grad = add(staged * out);
        grad_x = add(tile * channels);
        row = add(ring_columns * hidden);
        rings = add((2 * p.halves + 1) * ring);
        projected = add(band * half_pitch);
        grad_hidden = add(band * pitch);
        sums = add(out * chunk > hidden * channels ? out * chunk : hidden * channels);
        part = add(band * channels);
        taps = add(p.kernel * p.kernel * kChannelPad);
        around = add(2 * p.kernel);  // a pointer for each row of the convolution
        // What operands are made in: of a row or a band of the maps, and of the hidden channels.
        const int64_t most = padded(band > ring_columns ? band : ring_columns);
        rows = add(most * (channels > out ? channels : out));
        run = add(padded(band) * hidden);
        gated = add(p.gate == nullptr ? 0 : ring_columns * out);
        gate_sums = add(p.gate == nullptr ? 0 : out * kChannelPad);  // a vector for each channel
    }

  private:
    // So many whole cache lines or one more, an odd number, so that all sets of a cache are in use.
    static int64_t odd_lines(int64_t floats) { return (floats / kChannelPad | 1) * kChannelPad; }

    int64_t add(int64_t floats) {
        const int64_t offset = size;
        size += floats;
        return offset;
    }
};

}  // namespace

struct FeedForwardBackwardKernels {
    // Packs the weights of one chunk.
    void (*pack)(const FeedForwardBackwardParams& params, int64_t chunk);
    // The tiles of a share, the chunks of a group.
    void (*run)(const FeedForwardBackwardParams& params, int64_t share, int64_t group, float* scratch);

    static const FeedForwardBackwardKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
