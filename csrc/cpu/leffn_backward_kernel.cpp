// Backward of PW(DW(GELU(PW(x)))) at the level it is compiled for.
//
// With h = expand x, a = gelu(h), b = depthwise a, y = project b and the gradient g of y:
//   gb = project^T g, ga = depthwise^T gb, gh = ga * gelu'(h), grad_x = expand^T gh,
//   grad_project = g b^T, grad_depthwise[t] = sum of gb[p] * a[p + t], grad_expand = gh x^T.
// A bias of expand is added to h, and its gradient is the sum of gh. With a gate, y is multiplied by it: gb takes
// gate * g, and T = g b^T, the product that is there anyway, gives grad_project = gate * T and, as the sum of g * y,
// grad_gate = the sum over each row of project * T. What other biases add to it follows from the sums of g
// (leffn_backward.cpp). Nothing of the hidden width is kept: a tile of x and g with the convolution's halo is staged as
// fp32 rows, then a chunk of hidden channels at a time sweeps down the tile. a, gelu'(h) and gb of the rows in reach of
// the convolution lie in rings of rows, zero outside the image, and everything else of a few rows follows from them in
// the second cache.
//
// FLOPs of a pixel: 2 * hidden * (3 * channels + 2 * out_channels + 3 * kernel^2), and the first `channels` and
// `out_channels` again for the halo, 20 % of a tile of 32 by 64 inside an image (kernel 5). Bytes: x and g once and
// the halo, grad_x once.
#include "leffn_backward_kernel.h"

#include "depthwise.h"
#include "gelu.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// The kernel's size as a constant, or 0: any.
template <int fixed>
inline int64_t size_of(const LeffnBackwardParams& p) {
    return fixed ? fixed : p.kernel;
}

// The sweep of one thread over its tiles and chunks.
template <typename T, typename Unit, int fixed>
class Sweep {
  public:
    Sweep(const LeffnBackwardParams& params, const Unit& unit, int64_t share, int64_t group, float* scratch)
        : p(params),
          unit(unit),
          layout(params),
          share(share),
          group(group),
          channels(padded(p.channels)),
          hidden(padded(p.hidden)),
          out(padded(p.out_channels)),
          reach(size_of<fixed>(p) / 2),
          x(scratch + layout.x),
          grad(scratch + layout.grad),
          grad_x(scratch + layout.grad_x),
          row_hidden(scratch + layout.row),
          activation(scratch + layout.activation),
          slope(scratch + layout.slope),
          upstream(scratch + layout.upstream),
          convolved(scratch + layout.convolved),
          grad_hidden(scratch + layout.grad_hidden),
          sums(scratch + layout.sums),
          part(scratch + layout.part),
          taps(scratch + layout.taps),
          rows_room(scratch + layout.rows),
          run_room(scratch + layout.run),
          gated(scratch + layout.gated),
          gate_sums(scratch + layout.gate_sums),
          around_activation(reinterpret_cast<const float**>(scratch + layout.around)),
          around_upstream(around_activation + p.kernel) {}

    void run() {
        const Range tiles(p.shares, share), chunks(p.groups, group);
        for (tile = tiles.begin; tile < tiles.end; ++tile) {
            const int64_t per_image = p.tile_rows.count * p.tile_columns.count;
            image = tile / per_image;
            gate = p.gate == nullptr ? nullptr : p.gate + image * p.gate_stride;
            rows = Range(p.tile_rows, tile % per_image / p.tile_columns.count);
            columns = Range(p.tile_columns, tile % p.tile_columns.count);
            near_rows = rows.wider(reach, p.height);
            near_columns = columns.wider(reach, p.width);
            stage();
            for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
                sweep(chunk, chunk > chunks.begin);
            }
            store_grad_x();
            if (gate != nullptr) {
                store_grad_gate();
            }
        }
    }

  private:
    // Index of the first pixel of an image row in a map.
    int64_t pixel(int64_t row, int64_t column) const { return (image * p.height + row) * p.width + column; }
    // Index of a staged pixel.
    int64_t staged(int64_t row, int64_t column) const {
        return (row - near_rows.begin) * near_columns.size() + column - near_columns.begin;
    }
    // The staged pixels of x and of the gradient from this one on.
    Matrix<float> staged_x(int64_t first) const { return staged_rows(x, p.channels, first); }
    Matrix<float> staged_grad(int64_t first) const { return staged_rows(grad, p.out_channels, first); }
    Matrix<float> staged_rows(float* all, int64_t map_channels, int64_t first) const {
        return Matrix{all, near_rows.size() * near_columns.size(), map_channels, padded(map_channels)}.from(first, 0);
    }
    // Where, in a ring, kLanes channels from m of an image row begin, kernel / 2 pixels before the tile. A ring is
    // [chunk / kLanes][ring rows][ring columns][kLanes]: the convolution runs through it in order.
    int64_t in_ring(int64_t row, int64_t m) const {
        const int64_t past = row - ring_begin, ring_row = past < layout.ring_rows ? past : past - layout.ring_rows;
        return (m / kLanes * layout.ring_rows + ring_row) * layout.ring_columns * kLanes;
    }

    void stage() {
        for (int64_t row = near_rows.begin; row < near_rows.end; ++row) {
            const int64_t source = pixel(row, near_columns.begin), target = staged(row, near_columns.begin);
            const T* const first_x = static_cast<const T*>(p.x) + source * p.channels;
            const T* const first_grad = static_cast<const T*>(p.grad) + source * p.out_channels;
            load_rows(Matrix{first_x, near_columns.size(), p.channels, p.channels}, staged_x(target));
            load_rows(Matrix{first_grad, near_columns.size(), p.out_channels, p.out_channels}, staged_grad(target));
        }
        if (p.norm.weight) {
            const Matrix all = staged_x(0).slice(0, near_rows.size() * near_columns.size());
            normalize_rows(all, p.norm.of_image(image), all);
        }
        if (p.grad_sums != nullptr && group == 0) {
            sum_grad(p.grad_sums + tile * out);
        }
        if (gate != nullptr) {
            memset(gate_sums, 0, out * kLanes * sizeof(float));
        }
    }

    void sum_grad(float* sum) const {
        for (int64_t c = 0; c < out; c += kLanes) {
            Vec total{};
            for (int64_t row = rows.begin; row < rows.end; ++row) {
                total += sum_rows({staged_grad(staged(row, columns.begin)).data + c, out}, columns.size());
            }
            store(sum + c, total);
        }
    }

    void store_grad_gate() const {
        float* const target = p.grad_gate + (group * p.tiles() + tile) * out;
        for (int64_t c = 0; c < out; c += kLanes) {
            Vec sums_of_rows[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                sums_of_rows[i] = load(gate_sums + (c + i) * kLanes);
            }
            store(target + c, sum_each(sums_of_rows));
        }
    }

    // `count` staged pixels of the gradient, times the gate.
    Matrix<const float> gated_grad(int64_t first, int64_t count) const {
        const Matrix of_row = staged_grad(first).slice(0, count);
        if (gate == nullptr) {
            return of_row;
        }
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t c = 0; c < out; c += kLanes) {
                store(gated + i * out + c, load(of_row.row(i) + c) * load(gate + c));
            }
        }
        return {gated, count, p.out_channels, out};
    }

    void store_grad_x() {
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const float* first = grad_x + (row - rows.begin) * columns.size() * channels;
            const Matrix source{first, columns.size(), p.channels, channels};
            const int64_t target = pixel(row, columns.begin) * p.channels;
            if (p.groups.count == 1) {
                store_rows<T>(source, nullptr, static_cast<T*>(p.grad_x) + target);
            } else {
                const int64_t map = group * p.batch * p.height * p.width * p.channels;
                store_rows<float>(source, nullptr, p.partial_grad_x + map + target);
            }
        }
    }

    // One chunk over the whole tile.
    void sweep(int64_t index, bool accumulate) {
        const Range units(p.chunks, index);  // of kChannelPad channels
        chunk = index;
        first_channel = units.begin * kChannelPad;
        width = units.size() * kChannelPad;
        int64_t ready = rows.begin - reach;
        ring_begin = ready;
        for (int64_t row = rows.begin; row < rows.end; row += p.band_rows) {
            const Range band(row, row + p.band_rows < rows.end ? row + p.band_rows : rows.end);
            if (row - reach >= ring_begin + layout.ring_rows) {
                ring_begin += layout.ring_rows;
            }
            for (; ready < band.end + reach; ++ready) {
                fill_rings(ready);
            }
            convolve(band);
            multiply(band, accumulate);
        }
    }

    // a, gelu'(h) and gb of an image row and its halo.
    void fill_rings(int64_t row) {
        const int64_t before = near_columns.begin - columns.begin + reach, count = near_columns.size();
        const int64_t after = before + count, end = columns.size() + 2 * reach;
        const bool inside = near_rows.begin <= row && row < near_rows.end;
        float* const rings[] = {activation, upstream};
        for (int64_t m = 0; m < width; m += kLanes) {
            for (float* const ring : rings) {
                clear(ring + in_ring(row, m), 0, inside ? before : end);
                clear(ring + in_ring(row, m), inside ? after : end, end);
            }
        }
        if (!inside) {
            return;
        }
        const int64_t first = staged(row, near_columns.begin);
        const Matrix of_row{row_hidden, count, width, width};
        unit.multiply(unit.rows(staged_x(first).slice(0, count), rows_room),
                      p.packed_expand + chunk * p.expand_floats(), of_row, Accumulate::no);
        for (int64_t m = 0; m < width; m += kLanes) {
            const int64_t target = in_ring(row, m) + before * kLanes, step = width;
            const float* h = row_hidden + m;
            float *a = activation + target, *s = slope + target;
            with_bias(p.expand_bias, first_channel + m, [&](const auto& add) __attribute__((always_inline)) {
                for (int64_t i = 0; i < count; ++i, h += step, a += kLanes, s += kLanes) {
                    Vec value, slope_value;
                    gelu_with_slope(add(load(h)), value, slope_value);
                    store(a, value);
                    store(s, slope_value);
                }
            });
        }
        unit.multiply(unit.rows(gated_grad(first, count), rows_room), p.packed_project + chunk * p.project_floats(),
                      of_row, Accumulate::no);
        for (int64_t m = 0; m < width; m += kLanes) {
            const int64_t step = width;
            const float* source = row_hidden + m;
            float* target = upstream + in_ring(row, m) + before * kLanes;
            for (int64_t i = 0; i < count; ++i, source += step, target += kLanes) {
                store(target, load(source));
            }
        }
    }

    static void clear(float* pixels, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            store(pixels + i * kLanes, Vec{});
        }
    }

    // b and gh of a band; grad_depthwise.
    void convolve(const Range& band) {
        const int64_t kernel = size_of<fixed>(p);
        float* total = p.grad_depthwise + share * kernel * kernel * hidden + first_channel;
        for (int64_t m = 0; m < width; m += kLanes) {
            for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
                store(taps + tap * kLanes, Vec{});
            }
            for (int64_t row = band.begin; row < band.end; ++row) {
                for (int64_t y = 0; y < kernel; ++y) {
                    around_activation[y] = activation + in_ring(row - reach + y, m);
                    around_upstream[y] = upstream + in_ring(row - reach + y, m);
                }
                const int64_t first = (row - band.begin) * columns.size() * layout.band_pitch + m;
                const int64_t centre = in_ring(row, m) + reach * kLanes, pitch = layout.band_pitch;
                float *b = convolved + first, *gh = grad_hidden + first;
                const float* slopes = slope + centre;
                convolve_row<fixed>({around_activation, kLanes}, columns.size(), kernel,
                                    {p.depthwise + first_channel + m, hidden},
                                    [=](int64_t i, Vec sum) { store(b + i * pitch, sum); });
                add_tap_gradients<fixed>(upstream + centre, around_activation, columns.size(), kernel, taps);
                convolve_row<fixed>(
                    {around_upstream, kLanes}, columns.size(), kernel, {p.flipped + first_channel + m, hidden},
                    [=](int64_t i, Vec sum) { store(gh + i * pitch, sum * load(slopes + i * kLanes)); });
            }
            for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
                float* sum = total + tap * hidden + m;
                store(sum, load(sum) + load(taps + tap * kLanes));
            }
        }
    }

    // grad_project += g b^T, grad_expand += gh x^T and grad_x (+)= expand^T gh over a band.
    void multiply(const Range& band, bool accumulate) {
        const int64_t pixels = band.size() * columns.size(), pitch = layout.band_pitch;
        const Matrix b{convolved, pixels, width, pitch}, gh{grad_hidden, pixels, width, pitch};
        // Staged rows without a halo are one run of pixels.
        const int64_t run = near_columns.size() == columns.size() ? pixels : columns.size();
        const auto add = [](int64_t i) { return i > 0 ? Accumulate::yes : Accumulate::no; };
        const auto first_staged = [&](int64_t i) { return staged(band.begin + i / columns.size(), columns.begin); };
        const Matrix of_project{sums, p.out_channels, width, width}, of_expand{sums, width, p.channels, channels};
        for (int64_t i = 0; i < pixels; i += run) {
            const Matrix g = staged_grad(first_staged(i)).slice(0, run);
            unit.product(unit.left_transposed(g, rows_room), unit.right(b.slice(i, run), run_room), of_project, add(i));
        }
        float* const project_sums = p.grad_project + share * p.out_channels * hidden + first_channel;
        if (gate == nullptr) {
            add_to({project_sums, p.out_channels, width, hidden}, of_project);
        } else {
            add_gated({project_sums, p.out_channels, width, hidden}, of_project);
        }
        for (int64_t i = 0; i < pixels; i += run) {
            const Matrix input = staged_x(first_staged(i)).slice(0, run);
            unit.product(unit.left_transposed(gh.slice(i, run), run_room), unit.right(input, rows_room), of_expand,
                         add(i));
        }
        float* const expand_sums = p.grad_expand + (share * hidden + first_channel) * channels;
        add_to({expand_sums, width, channels, channels}, {sums, width, channels, channels});
        if (p.grad_expand_bias != nullptr) {
            float* const bias_sums = p.grad_expand_bias + share * hidden + first_channel;
            for (int64_t m = 0; m < width; m += kLanes) {
                store(bias_sums + m, load(bias_sums + m) + sum_rows({grad_hidden + m, pitch}, pixels));
            }
        }
        // Each chunk's part is summed on its own: one long sum over all hidden channels would round more.
        float* const first_grad_x = grad_x + (band.begin - rows.begin) * columns.size() * channels;
        const Matrix target{accumulate ? part : first_grad_x, pixels, p.channels, channels};
        unit.multiply(unit.rows(gh, run_room), p.packed_transposed + chunk * p.transposed_floats(), target,
                      Accumulate::no);
        if (accumulate) {
            add_to({first_grad_x, pixels, channels, channels}, {part, pixels, channels, channels});
        }
    }

    // total += gate * products, and their share of the gradient of the gate.
    void add_gated(Matrix<float> total, Matrix<const float> products) const {
        for (int64_t i = 0; i < products.rows; ++i) {
            const float* const weight = p.project + i * hidden + first_channel;
            const Vec factor = broadcast(gate[i]);
            Vec sum = load(gate_sums + i * kLanes);
            for (int64_t j = 0; j < products.columns; j += kLanes) {
                const Vec value = load(products.row(i) + j);
                sum = fma(value, load(weight + j), sum);
                float* target = total.row(i) + j;
                store(target, fma(factor, value, load(target)));
            }
            store(gate_sums + i * kLanes, sum);
        }
    }

    const LeffnBackwardParams& p;
    const Unit& unit;
    const LeffnBackwardScratch layout;
    const int64_t share, group;
    const int64_t channels, hidden, out;  // padded
    const int64_t reach;                  // of the convolution
    float *const x, *const grad, *const grad_x, *const row_hidden;
    float *const activation, *const slope, *const upstream;  // rings: a, gelu'(h), gb
    float *const convolved, *const grad_hidden;              // of a band: b, gh
    float *const sums, *const part, *const taps;
    float *const rows_room, *const run_room;  // what operands of products are made in
    float *const gated, *const gate_sums;
    const float **const around_activation, **const around_upstream;
    int64_t tile = 0, image = 0;
    const float* gate = nullptr;                                           // of the image
    Range rows{0, 0}, columns{0, 0}, near_rows{0, 0}, near_columns{0, 0};  // of the tile, and with its halo
    int64_t ring_begin = 0;                                                // an image row in the rings' first row
    int64_t chunk = 0, first_channel = 0, width = 0;                       // its channels: the first and how many
};

template <typename T, typename Unit>
void run(const LeffnBackwardParams& p, const Unit& unit, int64_t share, int64_t group, float* scratch) {
    switch (p.kernel) {
        case 3:
            return Sweep<T, Unit, 3>(p, unit, share, group, scratch).run();
        case 5:
            return Sweep<T, Unit, 5>(p, unit, share, group, scratch).run();
        default:
            return Sweep<T, Unit, 0>(p, unit, share, group, scratch).run();
    }
}

void run_any(const LeffnBackwardParams& p, int64_t share, int64_t group, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { run<decltype(type)>(p, unit, share, group, scratch); });
}

void pack(const LeffnBackwardParams& p, int64_t chunk) {
    const int64_t first = p.chunks.first(chunk) * kChannelPad, last = p.chunks.first(chunk + 1) * kChannelPad;
    const int64_t width = last - first, channels = padded(p.channels), hidden = padded(p.hidden);
    with_types(p.dtype, p.brgemm, [&](auto, const auto& unit) {
        const float* const expand = p.expand + first * channels;
        unit.template pack<float>({expand, width, p.channels, channels, 1},
                                  p.packed_expand + chunk * p.expand_floats());
        unit.template pack<float>({p.project + first, width, p.out_channels, 1, hidden},
                                  p.packed_project + chunk * p.project_floats());
        unit.template pack<float>({expand, p.channels, width, 1, channels},
                                  p.packed_transposed + chunk * p.transposed_floats());
    });
}

}  // namespace

constinit const LeffnBackwardKernels LeffnBackwardKernels::IPT_FAST_LEVEL = {cpu::pack, cpu::run_any};

}  // namespace ipt_fast::cpu
