// Pointwise and depthwise convolutions of channels-last maps and their gradients, framework-free.
#pragma once

#include "kernels.h"

namespace ipt_fast::cpu {

// Pixels of the weight's gradient are summed in runs of this many, the rows of its matrix in tiles.
constexpr int64_t kPointwiseRun = 192;
constexpr int64_t kPointwiseTile = 96;

struct PointwiseParams {
    DType dtype;  // of x, the weight, the residual and out
    Brgemm brgemm;
    Pixels x;
    int64_t pixels, channels, columns;
    int64_t image_pixels;  // of an image
    int64_t block;         // pixels are cut into blocks of this many
    Norm norm;             // of x, in front of the convolution
    const float* gate;     // padded channels, what x is multiplied by; nullptr: 1. Not with a norm
    int64_t gate_stride;   // as in Epilogue
    const void* packed;    // the weight, by `pack`
    const float* bias;     // padded columns; nullptr: there is none
    bool activated;        // whether a GELU follows
    const void* residual;  // a dense map like out, added last; nullptr: there is none
    void* out;             // (pixels, columns)

    // Floats of scratch memory: the products of a block, its pixels in fp32, and what is multiplied.
    IPT_FAST_INLINE int64_t scratch() const { return block * (2 * padded(channels) + padded(columns)); }
};

// sums[i][j] = the sum over pixels of grad[pixel][i] x[pixel][j] for a tile of rows i.
struct PointwiseWeightParams {
    DType dtype;
    Brgemm brgemm;
    const void* x;     // (pixels, channels)
    const void* grad;  // (pixels, columns)
    int64_t channels, columns;
    bool bias;  // a row of sums goes on with the sum of grad[pixel][i], the gradient of the bias

    IPT_FAST_INLINE int64_t row() const { return padded(channels) + (bias ? kChannelPad : 0); }
    IPT_FAST_INLINE int64_t scratch() const {
        return 2 * kPointwiseRun * (padded(channels) + kPointwiseTile) + kPointwiseTile * row();
    }
};

// Work is cut into rows of strips: row k is row k % height of strip k / height % strips of image k / height / strips.
struct DepthwiseParams {
    DType dtype;
    int64_t kernel;  // odd
    Pixels x;
    int64_t channels, height, width, strips;
    Norm norm;            // of x, in front of the convolution; not for the weight's gradient, as the next three
    const float* weight;  // taps, padded channels
    const float* bias;    // padded channels; nullptr: there is none
    bool activated;       // whether a GELU follows
    Pixels grad;          // only for the weight's gradient
    bool bias_gradient;   // the same
    void* out;            // not for the weight's gradient

    IPT_FAST_INLINE int64_t widest() const { return (width + strips - 1) / strips; }
    // Floats of scratch memory: the ring of rows, a row of grad, the sums of all taps, pointers to the kernel's rows.
    IPT_FAST_INLINE int64_t scratch() const { return room() + 2 * kernel; }
    IPT_FAST_INLINE float* staged(float* scratch) const {
        return scratch + padded(channels) * kernel * (widest() + kernel - 1);
    }
    IPT_FAST_INLINE float* tap_sums(float* scratch) const { return staged(scratch) + padded(channels) * widest(); }
    IPT_FAST_INLINE const float** rows(float* scratch) const {
        return reinterpret_cast<const float**>(scratch + room());
    }

  private:
    IPT_FAST_INLINE int64_t room() const {
        return padded(channels) * (kernel * (widest() + kernel - 1) + widest()) + kernel * kernel * kChannelPad;
    }
};

struct ConvolutionKernels {
    int64_t (*packed_size)(DType dtype, Brgemm brgemm, int64_t columns, int64_t depth);
    void (*pack)(DType dtype, Brgemm brgemm, const Weight& weight, void* packed);
    // Blocks begin <= k < end.
    void (*pointwise)(const PointwiseParams& p, int64_t begin, int64_t end, float* scratch);
    // Pixels begin <= k < end; the tile of `rows` rows from first_row on, whose sums are [rows][p.row()] in fp32.
    void (*pointwise_weight)(const PointwiseWeightParams& p, int64_t begin, int64_t end, int64_t first_row,
                             int64_t rows, float* scratch, float* sums);
    // From such sums, taken without the gate: adds gate[i] * sums[i] to total[i], and sets grad_gate[i] to the
    // products' gradient of the gate, the sum of weight[i][j] sums[i][j].
    void (*gate_sums)(Matrix<const float> sums, const float* weight, const float* gate, float* total, float* grad_gate);
    // Rows begin <= k < end.
    void (*depthwise)(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch);
    // sums is [taps + 1][padded channels], at last the sum of grad where it is wanted.
    void (*depthwise_weight)(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch, double* sums);

    static const ConvolutionKernels IPT_FAST_COMPILED_LEVELS;
};

}  // namespace ipt_fast::cpu
