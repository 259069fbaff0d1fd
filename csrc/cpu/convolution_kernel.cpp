// The convolutions of convolution_kernel.h at the level it is compiled for.
//
// Pointwise: a block of pixels times the packed weight, whose panels stay in the first cache; fp32 maps are read and
// written in place. A norm in front of it is taken of the block, a GELU and the residual follow while its sums are in
// the second cache. 2 * channels * columns FLOPs a pixel; x is read once and out is written once. The weight's gradient
// is x^T grad in runs of pixels, summed in registers, then added: x is read once for every tile of 96 columns.
//
// Depthwise: a strip's last rows lie in a ring of fp32 rows in the second cache, every vector of channels by itself. A
// norm in front of it is taken there, a GELU behind it of the sums in registers.
// 2 * kernel^2 FLOPs a value; bound by reading x once (the gradient: x and grad) and writing out once.
#include "convolution_kernel.h"

#include "depthwise.h"
#include "gelu.h"
#include "hidden.h"
#include "pointwise.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// ---- pointwise ------------------------------------------------------------------------------------------------------

int64_t packed_size(DType dtype, Brgemm brgemm, int64_t columns, int64_t depth) {
    return with_types(dtype, brgemm, [&](auto, const auto& unit) { return unit.packed_size(columns, depth); });
}

void pack(DType dtype, Brgemm brgemm, const Weight& weight, void* packed) {
    with_types(dtype, brgemm, [&](auto type, const auto& unit) { unit.template pack<decltype(type)>(weight, packed); });
}

void pointwise_any(const PointwiseParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { pointwise<decltype(type)>(p, unit, begin, end, scratch); });
}

// The sum of rows of vectors, in pairs of halves: few short sums round less than one long one.
Vec sum_rows(const float* first, int64_t rows, int64_t stride) {
    if (rows > 8) {
        return sum_rows(first, rows / 2, stride) + sum_rows(first + rows / 2 * stride, rows - rows / 2, stride);
    }
    Vec sum{};
    for (int64_t i = 0; i < rows; ++i) {
        sum += load(first + i * stride);
    }
    return sum;
}

// The sums of the columns of `gradients`, each at the beginning of a row of `sums` that is one vector, else 0.
void sum_columns(Matrix<const float> gradients, Matrix<float> sums) {
    for (int64_t c = 0; c < gradients.columns; c += kLanes) {
        const Vec total = sum_rows(gradients.data + c, gradients.rows, gradients.stride);
        for (int64_t i = c; i < c + kLanes && i < gradients.columns; ++i) {
            for (int64_t lane = 0; lane < kChannelPad; ++lane) {
                sums.row(i)[lane] = lane == 0 ? total[i - c] : 0.0f;
            }
        }
    }
}

template <typename T, typename Unit>
void pointwise_weight(const PointwiseWeightParams& p, const Unit& unit, int64_t begin, int64_t end, int64_t first_row,
                      int64_t rows, float* scratch, float* sums) {
    // Pixels of one sum: a few short sums of fp32 round less than one long one; 16 bits round more than either.
    constexpr int64_t kSum = sizeof(typename Unit::Value) == sizeof(float) ? 64 : kPointwiseRun;
    const int64_t width = padded(p.channels), row = p.row();
    float* const x = scratch;
    float* const grad = x + kPointwiseRun * width;
    float* const x_room = grad + kPointwiseRun * kPointwiseTile;
    float* const grad_room = x_room + kPointwiseRun * width;
    float* const of_run = grad_room + kPointwiseRun * kPointwiseTile;
    for (int64_t first = begin; first < end; first += kPointwiseRun) {
        const int64_t count = end - first < kPointwiseRun ? end - first : kPointwiseRun;
        const T* const first_x = static_cast<const T*>(p.x) + first * p.channels;
        const T* const first_grad = static_cast<const T*>(p.grad) + first * p.columns + first_row;
        const Matrix pixels{x, count, width, width}, gradients{grad, count, rows, kPointwiseTile};
        load_rows(Matrix{first_x, count, p.channels, p.channels}, pixels);
        load_rows(Matrix{first_grad, count, rows, p.columns}, gradients);
        const Matrix target{first == begin ? sums : of_run, rows, width, row};
        for (int64_t i = 0; i < count; i += kSum) {
            const int64_t n = count - i < kSum ? count - i : kSum;
            unit.product(unit.left_transposed(gradients.slice(i, n), grad_room), unit.right(pixels.slice(i, n), x_room),
                         target, i > 0 ? Accumulate::yes : Accumulate::no);
        }
        if (p.bias) {
            sum_columns(gradients, target.from(0, width));
        }
        for (int64_t i = 0; i < rows * row && first > begin; i += kLanes) {
            store(sums + i, load(sums + i) + load(of_run + i));
        }
    }
}

void pointwise_weight_any(const PointwiseWeightParams& p, int64_t begin, int64_t end, int64_t first_row, int64_t rows,
                          float* scratch, float* sums) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) {
        pointwise_weight<decltype(type)>(p, unit, begin, end, first_row, rows, scratch, sums);
    });
}

void gate_sums(Matrix<const float> sums, const float* weight, const float* gate, float* total, float* grad_gate) {
    for (int64_t i = 0; i < sums.rows; ++i) {
        const Vec of_row = broadcast(gate[i]);
        Vec products{};
        for (int64_t j = i * sums.stride; j < (i + 1) * sums.stride; j += kLanes) {
            const Vec value = load(sums.data + j);
            products = fma(load(weight + j), value, products);
            store(total + j, fma(of_row, value, load(total + j)));
        }
        grad_gate[i] = sum(products);
    }
}

// ---- depthwise ------------------------------------------------------------------------------------------------------

// One strip of an image and its last `kernel` rows in fp32: [vector of channels][row % kernel][pixel][lane], with
// kernel / 2 pixels of the neighbours, or zeros, at both ends. `fixed` is the kernel's size, or 0: any.
template <typename T, int fixed>
struct DepthwiseStrip {
    const DepthwiseParams& p;
    const int64_t kernel, half;
    int64_t image, first, count, ring_row;
    float* ring;

    DepthwiseStrip(const DepthwiseParams& params, int64_t index, float* scratch)
        : p(params), kernel(fixed ? fixed : p.kernel), half(kernel / 2), ring(scratch) {
        image = index / p.strips;
        first = index % p.strips * p.width / p.strips;
        count = (index % p.strips + 1) * p.width / p.strips - first;
        ring_row = (p.widest() + kernel - 1) * kLanes;
    }

    int64_t pixel(int64_t y, int64_t x) const { return (image * p.height + y) * p.width + x; }

    // `pixels` pixels of a map from (y, x) on, or zeros outside of it, as [vector of channels][pixel][lane] with
    // `vector_row` floats for each vector.
    void stage(const Pixels& map, int64_t y, int64_t x, int64_t pixels, float* out, int64_t vector_row) const {
        for (int64_t i = 0; i < pixels; ++i, ++x, out += kLanes) {
            const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            const T* const source = static_cast<const T*>(map.data) + (inside ? pixel(y, x) * map.stride : 0);
            float* target = out;
            for_vectors(p.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                store(target, inside ? load(source + c, n) : Vec{});
                target += vector_row;
            });
        }
    }

    // Row y of the image into the ring.
    void load_row(int64_t y) const {
        float* const row = ring + (y + kernel) % kernel * ring_row;
        stage(p.x, y, first - half, count + kernel - 1, row, kernel * ring_row);
        if (p.norm.weight != nullptr && y >= 0 && y < p.height) {
            normalize(row);
        }
    }

    // A row of the ring, but for pixels outside of the image, which stay zero.
    void normalize(float* row) const {
        const Norm norm = p.norm.of_image(image);
        const int64_t left = first < half ? half - first : 0;
        const int64_t inside = p.width - first + half, staged = count + kernel - 1;
        const int64_t end = inside < staged ? inside : staged;
        for (int64_t x = left; x < end; x += kLanes) {
            const auto values = [&](int64_t c) {
                return Rows<float>{row + c / kLanes * kernel * ring_row + x * kLanes, kLanes};
            };
            normalize_pixels(values, p.channels, end - x < kLanes ? end - x : kLanes, norm);
        }
    }

    // The rows under the kernel at row y, from pixel x of the strip on, for the vector of channel c.
    void rows(int64_t y, int64_t x, int64_t c, const float** out) const {
        for (int64_t i = 0; i < kernel; ++i) {
            out[i] = ring + (c / kLanes * kernel + (y + i - half + kernel) % kernel) * ring_row + x * kLanes;
        }
    }
};

// body(strip, y) for rows begin <= k < end, the rows under the kernel being in the strip's ring.
template <typename T, int fixed, typename Body>
inline void for_rows(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch, const Body& body) {
    while (begin < end) {
        const DepthwiseStrip<T, fixed> strip(p, begin / p.height, scratch);
        const int64_t first = begin % p.height;
        const int64_t last = first + end - begin < p.height ? first + end - begin : p.height;
        for (int64_t y = first - strip.half; y < first + strip.half; ++y) {
            strip.load_row(y);
        }
        for (int64_t y = first; y < last; ++y) {
            strip.load_row(y + strip.half);
            body(strip, y);
        }
        begin += last - first;
    }
}

template <typename T, int fixed>
void depthwise(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch) {
    const float** const rows = p.rows(scratch);
    float sums[kDepthwisePixels * kLanes];
    for_rows<T, fixed>(p, begin, end, scratch, [&](const DepthwiseStrip<T, fixed>& strip, int64_t y) {
        T* const out = static_cast<T*>(p.out) + strip.pixel(y, strip.first) * p.channels;
        // a few pixels at a time, so that memory is written in order
        for (int64_t first = 0; first < strip.count; first += kDepthwisePixels) {
            const int64_t count = strip.count - first < kDepthwisePixels ? strip.count - first : kDepthwisePixels;
            for_vectors(p.channels, [&](int64_t c, int64_t n) {
                strip.rows(y, first, c, rows);
                const Taps taps{p.weight + c, padded(p.channels)};
                // what follows is a loop of its own: behind every sum in registers it would be many copies
                convolve_row<fixed>({rows, kLanes}, count, p.kernel, taps,
                                    [&](int64_t i, Vec sum) { store(sums + i * kLanes, sum); });
                const auto put = [&](const auto& finish) __attribute__((always_inline)) {
                    for (int64_t i = 0; i < count; ++i) {
                        T* const target = out + (first + i) * p.channels + c;
                        const Vec value = finish(load(sums + i * kLanes));
                        n == kLanes ? store(target, value) : store(target, value, n);
                    }
                };
                with_bias(p.bias, c, [&](const auto& add) __attribute__((always_inline)) {
                    p.activated ? put([&](Vec sum) __attribute__((always_inline)) { return gelu_of_result(add(sum)); })
                                : put(add);
                });
            });
        }
    });
}

// sums[tap * stride] += the sums of the kernel's taps over one row of grad, and at last that of grad where it is
// wanted.
template <int fixed>
void add_row_sums(const DepthwiseParams& p, const float* grad, const float* const* rows, int64_t count, float* room,
                  double* sums) {
    const auto add = [&](int64_t tap, Vec sum) {
        for (int lane = 0; lane < kLanes; ++lane) {
            sums[tap * padded(p.channels) + lane] += sum[lane];
        }
    };
    if constexpr (fixed != 0) {
        Vec totals[fixed][fixed]{};
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 5
            for (int k = 0; k < fixed; ++k) {
                add_tap_sums<fixed, 4, 1>(rows[k] + i * kLanes, grad + i * kLanes, totals + k);
            }
        }
        for (; i < count; ++i) {
#pragma GCC unroll 5
            for (int k = 0; k < fixed; ++k) {
                add_tap_sums<fixed, 1, 1>(rows[k] + i * kLanes, grad + i * kLanes, totals + k);
            }
        }
        for (int tap = 0; tap < fixed * fixed; ++tap) {
            add(tap, totals[tap / fixed][tap % fixed]);
        }
    } else {
        const int64_t taps = p.kernel * p.kernel;
        memset(room, 0, taps * kLanes * sizeof(float));
        add_tap_gradients<0>(grad, rows, count, p.kernel, room);
        for (int64_t tap = 0; tap < taps; ++tap) {
            add(tap, load(room + tap * kLanes));
        }
    }
    Vec total{};
    for (int64_t i = 0; i < count && p.bias_gradient; ++i) {
        total += load(grad + i * kLanes);
    }
    add(p.kernel * p.kernel, total);
}

template <typename T, int fixed>
void depthwise_weight(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch, double* sums) {
    const float** const rows = p.rows(scratch);
    float *const staged = p.staged(scratch), *const room = p.tap_sums(scratch);
    for_rows<T, fixed>(p, begin, end, scratch, [&](const DepthwiseStrip<T, fixed>& strip, int64_t y) {
        const int64_t staged_row = p.widest() * kLanes;
        strip.stage(p.grad, y, strip.first, strip.count, staged, staged_row);
        for (int64_t c = 0; c < p.channels; c += kLanes) {
            strip.rows(y, 0, c, rows);
            add_row_sums<fixed>(p, staged + c / kLanes * staged_row, rows, strip.count, room, sums + c);
        }
    });
}

// body(Constant<size>) for the kernels whose size is known beforehand, with 0 for others.
template <typename Body>
void with_kernel(int64_t kernel, const Body& body) {
    kernel == 3 ? body(Constant<3>{}) : kernel == 5 ? body(Constant<5>{}) : body(Constant<0>{});
}

void depthwise_any(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch) {
    with_kernel(p.kernel, [&](auto kernel) {
        with_type(p.dtype,
                  [&](auto type) { depthwise<decltype(type), decltype(kernel)::value>(p, begin, end, scratch); });
    });
}

void depthwise_weight_any(const DepthwiseParams& p, int64_t begin, int64_t end, float* scratch, double* sums) {
    with_kernel(p.kernel, [&](auto kernel) {
        with_type(p.dtype, [&](auto type) {
            depthwise_weight<decltype(type), decltype(kernel)::value>(p, begin, end, scratch, sums);
        });
    });
}

}  // namespace

constinit const ConvolutionKernels ConvolutionKernels::IPT_FAST_LEVEL = {
    cpu::packed_size, cpu::pack,          cpu::pointwise_any,       cpu::pointwise_weight_any,
    cpu::gate_sums,   cpu::depthwise_any, cpu::depthwise_weight_any};

}  // namespace ipt_fast::cpu
