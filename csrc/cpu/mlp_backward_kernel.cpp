// Backward of project(GELU(expand x)) at the level it is compiled for.
//
// With h = expand x + bias, a = gelu(h) and the gradient g of the output, for a run of pixels at a time:
//   ga = (gate * project)^T g, gh = ga * gelu'(h), grad_x = expand^T gh, grad_expand += gh x^T, grad_project += g a^T.
// The gate's part in grad_project is left to the caller: a share's pixels have the same gate.
//
// 10 * channels * hidden FLOPs a pixel; x and grad are read once and grad_x is written once. All values of a run lie in
// the second cache.
#include "mlp_backward_kernel.h"

#include "gelu.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// Where the pieces of one thread's scratch begin, in floats.
struct Layout {
    int64_t x, grad, grad_x, activation, slope, upstream, narrow_room, wide_room, size = 0;

    explicit Layout(const MlpBackwardParams& p) {
        const int64_t channels = padded(p.channels), out = padded(p.out_channels);
        x = add(kMlpRun * channels);
        grad = add(kMlpRun * out);
        grad_x = add(kMlpRun * channels);
        activation = add(kMlpRun * p.pitch());
        slope = add(kMlpRun * p.pitch());
        upstream = add(kMlpRun * p.pitch());
        narrow_room = add(room_of(kMlpRun, channels > out ? channels : out));
        wide_room = add(room_of(kMlpRun, p.hidden));
    }

  private:
    int64_t add(int64_t floats) {
        const int64_t offset = size;
        size += floats;
        return offset;
    }
};

// `activation` holds h and becomes gelu(h).
void activate(Matrix<float> activation, const float* bias, Matrix<float> slope) {
    for (int64_t i = 0; i < activation.rows; ++i) {
        for (int64_t c = 0; c < activation.columns; c += kLanes) {
            Vec value, of_value;
            gelu_with_slope(load(activation.row(i) + c) + load(bias + c), value, of_value);
            store(activation.row(i) + c, value);
            store(slope.row(i) + c, of_value);
        }
    }
}

void multiply_by(Matrix<float> values, Matrix<const float> factors) {
    for (int64_t i = 0; i < values.rows; ++i) {
        for (int64_t c = 0; c < values.columns; c += kLanes) {
            store(values.row(i) + c, load(values.row(i) + c) * load(factors.row(i) + c));
        }
    }
}

void add_columns(Matrix<const float> values, float* sums) {
    for (int64_t c = 0; c < values.columns; c += kLanes) {
        store(sums + c, load(sums + c) + sum_rows({values.data + c, values.stride}, values.rows));
    }
}

template <typename T, typename Unit>
void run(const MlpBackwardParams& p, const Unit& unit, int64_t image, int64_t share, float* scratch) {
    const Layout layout(p);
    const int64_t channels = padded(p.channels), hidden = padded(p.hidden), out = padded(p.out_channels);
    const int64_t index = image * p.shares + share, runs = (p.pixels + kMlpRun - 1) / kMlpRun;
    const Norm norm = p.norm.of_image(image);
    const auto* const packed_project = static_cast<const char*>(p.packed_project) + image * p.project_stride;
    const Matrix grad_expand{p.grad_expand + index * hidden * channels, p.hidden, p.channels, channels};
    const Matrix grad_project{p.grad_project + index * p.out_channels * hidden, p.out_channels, p.hidden, hidden};
    float *const narrow = scratch + layout.narrow_room, *const wide = scratch + layout.wide_room;
    const int64_t last = (share + 1) * runs / p.shares;
    for (int64_t k = share * runs / p.shares; k < last; ++k) {
        const int64_t first = k * kMlpRun, pixel = image * p.pixels + first;
        const int64_t count = p.pixels - first < kMlpRun ? p.pixels - first : kMlpRun;
        const Matrix x{scratch + layout.x, count, p.channels, channels};
        const Matrix grad{scratch + layout.grad, count, p.out_channels, out};
        const Matrix grad_x{scratch + layout.grad_x, count, p.channels, channels};
        const auto of_hidden = [&](int64_t offset) { return Matrix{scratch + offset, count, p.hidden, p.pitch()}; };
        const Matrix activation = of_hidden(layout.activation), slope = of_hidden(layout.slope);
        const Matrix upstream = of_hidden(layout.upstream);

        load_rows(Matrix{static_cast<const T*>(p.x) + pixel * p.channels, count, p.channels, p.channels}, x);
        normalize_rows(x, norm, x);
        const T* const first_grad = static_cast<const T*>(p.grad) + pixel * p.out_channels;
        load_rows(Matrix{first_grad, count, p.out_channels, p.out_channels}, grad);
        add_columns(grad, p.grad_sums + index * out);

        unit.multiply(unit.rows(x, narrow), p.packed_expand, activation, Accumulate::no);
        activate(activation, p.expand_bias, slope);
        unit.multiply(unit.rows(grad, narrow), packed_project, upstream, Accumulate::no);
        multiply_by(upstream, slope);
        add_columns(upstream, p.grad_expand_bias + index * hidden);

        unit.product(unit.left_transposed(grad, narrow), unit.right(activation, wide), grad_project, Accumulate::yes);
        unit.product(unit.left_transposed(upstream, wide), unit.right(x, narrow), grad_expand, Accumulate::yes);
        unit.multiply(unit.rows(upstream, wide), p.packed_transposed, grad_x, Accumulate::no);
        store_rows<T>(grad_x, nullptr, static_cast<T*>(p.grad_x) + pixel * p.channels);
    }
}

void run_any(const MlpBackwardParams& p, int64_t image, int64_t share, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { run<decltype(type)>(p, unit, image, share, scratch); });
}

int64_t scratch_size(const MlpBackwardParams& p) { return Layout(p).size; }

int64_t packed_size(DType dtype, Brgemm brgemm, int64_t columns, int64_t depth) {
    return with_types(dtype, brgemm, [&](auto, const auto& unit) { return unit.packed_size(columns, depth); });
}

void pack(DType dtype, Brgemm brgemm, const Weight& weight, void* packed) {
    with_types(dtype, brgemm, [&](auto, const auto& unit) { unit.template pack<float>(weight, packed); });
}

}  // namespace

constinit const MlpBackwardKernels MlpBackwardKernels::IPT_FAST_LEVEL = {cpu::packed_size, cpu::pack, cpu::scratch_size,
                                                                         cpu::run_any};

}  // namespace ipt_fast::cpu
