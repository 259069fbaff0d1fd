// The backward of convolved feed-forward networks, what they have in common: the sweep of one thread over its tiles and
// chunks of hidden channels.
//
// With h = expand x, the gradient g of y = project b and gb = project^T g:
//   grad_x = expand^T gh, grad_project = g b^T, grad_expand = gh x^T,
// where b and gh, the gradient of h, follow from h and gb by way of the convolution: leffn_sweep.h, gdfn_sweep.h. A
// bias of expand is added to h, and its gradient is the sum of gh. With a gate, y is multiplied by it: gb takes gate *
// g, and T = g b^T, the product that is there anyway, gives grad_project = gate * T and, as the sum of g * y, grad_gate
// = the sum over each row of project * T. What a bias of project adds to it follows from the sums of g
// (leffn_backward.cpp). Nothing of the hidden width is kept: a tile of x and g with the convolution's halo is staged as
// fp32 rows, then a chunk of hidden channels at a time sweeps down the tile. What the convolution reads lies in rings
// of rows, zero outside the image, and everything else of a few rows follows from them in the second cache.
//
// Bytes: x and g once and the halo, grad_x once.
#pragma once

#include "depthwise.h"
#include "feed_forward_backward_kernel.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// `Network` has two functions of a sweep:
//   fill_rings(sweep, row)  puts an image row and its halo into the rings, one row after the other
//   convolve(sweep, band)   b and gh of a band of rows, and the gradients of the convolution's parameters
// `fixed` is the convolution's size, or 0: any.
template <typename Network, typename T, typename Unit, int fixed>
struct Sweep {
    static constexpr int kFixed = fixed;

    Sweep(const FeedForwardBackwardParams& params, const Unit& unit, int64_t share, int64_t group, float* scratch)
        : p(params),
          unit(unit),
          layout(params),
          share(share),
          group(group),
          channels(padded(p.channels)),
          out(padded(p.out_channels)),
          reach(kernel() / 2),
          margin(p.halves * reach),
          x(scratch + layout.x),
          grad(scratch + layout.grad),
          grad_x(scratch + layout.grad_x),
          row_values(scratch + layout.row),
          rings(scratch + layout.rings),
          projected(scratch + layout.projected),
          grad_hidden(scratch + layout.grad_hidden),
          sums(scratch + layout.sums),
          part(scratch + layout.part),
          taps(scratch + layout.taps),
          rows_room(scratch + layout.rows),
          run_room(scratch + layout.run),
          gated(scratch + layout.gated),
          gate_sums(scratch + layout.gate_sums),
          around(reinterpret_cast<const float**>(scratch + layout.around)) {}

    void run() {
        const Range tiles(p.shares, share), chunks(p.groups, group);
        for (tile = tiles.begin; tile < tiles.end; ++tile) {
            const int64_t per_image = p.tile_rows.count * p.tile_columns.count;
            image = tile / per_image;
            gate = p.gate == nullptr ? nullptr : p.gate + image * p.gate_stride;
            rows = Range(p.tile_rows, tile % per_image / p.tile_columns.count);
            columns = Range(p.tile_columns, tile % p.tile_columns.count);
            near_rows = rows.wider(margin, p.height);
            near_columns = columns.wider(margin, p.width);
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

    int64_t kernel() const { return fixed ? fixed : p.kernel; }
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
    // Where, in a ring, kLanes channels from m of an image's pixel are. A ring's rows begin `margin` pixels before the
    // tile; it is [chunk / kLanes][ring rows][ring columns][kLanes]: the convolution runs through it in order.
    int64_t in_ring(int64_t row, int64_t m, int64_t column) const {
        const int64_t past = row - ring_begin, ring_row = past < layout.ring_rows ? past : past - layout.ring_rows;
        const int64_t in_row = column - columns.begin + margin;
        return ((m / kLanes * layout.ring_rows + ring_row) * layout.ring_columns + in_row) * kLanes;
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
        int64_t ready = rows.begin - margin;
        ring_begin = ready;
        for (int64_t row = rows.begin; row < rows.end; row += p.band_rows) {
            const Range band(row, row + p.band_rows < rows.end ? row + p.band_rows : rows.end);
            if (row - reach >= ring_begin + layout.ring_rows) {
                ring_begin += layout.ring_rows;
            }
            for (; ready < band.end + margin; ++ready) {
                Network::fill_rings(*this, ready);
            }
            Network::convolve(*this, band);
            multiply(band, accumulate);
        }
    }

    float* ring(int64_t index) const { return rings + index * layout.ring; }

    // Zeros beside the columns of a row of a ring that are `filled`.
    void clear_beside(float* pixels, int64_t row, const Range& filled) const {
        const int64_t begin = columns.begin - margin, end = columns.end + margin;
        const int64_t behind = filled.end > begin ? filled.end : begin;
        for (int64_t m = 0; m < width; m += kLanes) {
            float* const first = pixels + in_ring(row, m, begin);
            for (int64_t column = begin; column < filled.begin; ++column) {
                store(first + (column - begin) * kLanes, Vec{});
            }
            for (int64_t column = behind; column < end; ++column) {
                store(first + (column - begin) * kLanes, Vec{});
            }
        }
    }

    // The rows of a ring under the kernel at an image's pixel and its right neighbours, for the channels from m.
    InputRows rows_around(const float* pixels, int64_t row, int64_t column, int64_t m) const {
        for (int64_t y = 0; y < kernel(); ++y) {
            around[y] = pixels + in_ring(row - reach + y, m, column - reach);
        }
        return {around, kLanes};
    }

    // The weights of the convolution, or those in reverse order, for the channels from m of a half.
    Taps taps_of(const float* weights, int64_t half, int64_t m) const {
        return {weights + half * p.hidden + first_channel + m, p.halves * p.hidden};
    }

    // Adds what `add(taps)` sums up to the gradient of the convolution for the channels from m of a half.
    template <typename Add>
    void add_taps(int64_t half, int64_t m, const Add& add) const {
        const int64_t count = kernel() * kernel(), hidden = p.halves * p.hidden;
        memset(taps, 0, count * kLanes * sizeof(float));
        add(taps);
        float* const total = p.grad_depthwise + share * count * hidden + half * p.hidden + first_channel + m;
        for (int64_t tap = 0; tap < count; ++tap) {
            float* const sum = total + tap * hidden;
            store(sum, load(sum) + load(taps + tap * kLanes));
        }
    }

    // h without its bias, of a row of pixels: [pixel][halves * width].
    Matrix<float> expand(int64_t first, int64_t count) const {
        const Matrix<float> all{row_values, count, p.halves * width, p.halves * width};
        const auto input = unit.rows(staged_x(first).slice(0, count), rows_room);
        for (int64_t half = 0; half < p.halves; ++half) {
            unit.multiply(input, p.packed_expand + of_half(half) * p.expand_floats(),
                          {row_values + half * width, count, width, all.stride}, Accumulate::no);
        }
        return all;
    }

    // gb of a row of pixels.
    Matrix<float> upstream_of(int64_t first, int64_t count) const {
        const Matrix<float> all{row_values, count, width, width};
        unit.multiply(unit.rows(gated_grad(first, count), rows_room), p.packed_project + chunk * p.project_floats(),
                      all, Accumulate::no);
        return all;
    }

    // The packed weights of a half of the chunk.
    int64_t of_half(int64_t half) const { return chunk * p.halves + half; }

    // grad_project += g b^T, grad_expand += gh x^T and grad_x (+)= expand^T gh over a band.
    void multiply(const Range& band, bool accumulate) {
        const int64_t pixels = band.size() * columns.size(), hidden = p.halves * width;
        const Matrix b{projected, pixels, width, layout.half_pitch}, gh{grad_hidden, pixels, hidden, layout.pitch};
        // Staged rows without a halo are one run of pixels.
        const int64_t run = near_columns.size() == columns.size() ? pixels : columns.size();
        const auto add = [](int64_t i) { return i > 0 ? Accumulate::yes : Accumulate::no; };
        const auto first_staged = [&](int64_t i) { return staged(band.begin + i / columns.size(), columns.begin); };
        const Matrix of_project{sums, p.out_channels, width, width}, of_expand{sums, hidden, p.channels, channels};
        for (int64_t i = 0; i < pixels; i += run) {
            const Matrix g = staged_grad(first_staged(i)).slice(0, run);
            unit.product(unit.left_transposed(g, rows_room), unit.right(b.slice(i, run), run_room), of_project, add(i));
        }
        float* const project_sums = p.grad_project + share * p.out_channels * p.hidden + first_channel;
        if (gate == nullptr) {
            add_to({project_sums, p.out_channels, width, p.hidden}, of_project);
        } else {
            add_gated({project_sums, p.out_channels, width, p.hidden}, of_project);
        }
        for (int64_t i = 0; i < pixels; i += run) {
            const Matrix input = staged_x(first_staged(i)).slice(0, run);
            unit.product(unit.left_transposed(gh.slice(i, run), run_room), unit.right(input, rows_room), of_expand,
                         add(i));
        }
        // Each chunk's part is summed on its own: one long sum over all hidden channels would round more.
        float* const first_grad_x = grad_x + (band.begin - rows.begin) * columns.size() * channels;
        const Matrix target{accumulate ? part : first_grad_x, pixels, p.channels, channels};
        for (int64_t half = 0; half < p.halves; ++half) {
            const Matrix<float> of_channels{sums + half * width * channels, width, channels, channels};
            add_to({p.grad_expand + share_channel(half) * channels, width, channels, channels}, of_channels);
            const Matrix<float> gradients{grad_hidden + half * width, pixels, width, layout.pitch};
            if (p.grad_expand_bias != nullptr) {
                add_sums(gradients, p.grad_expand_bias + share_channel(half));
            }
            unit.multiply(unit.rows(gradients, run_room), p.packed_transposed + of_half(half) * p.transposed_floats(),
                          target, add(half));
        }
        if (accumulate) {
            add_to({first_grad_x, pixels, channels, channels}, {part, pixels, channels, channels});
        }
    }

    // The chunk's first channel of a half among the sums of all shares.
    int64_t share_channel(int64_t half) const { return (share * p.halves + half) * p.hidden + first_channel; }

    // total += the sums of the columns.
    static void add_sums(Matrix<const float> values, float* total) {
        for (int64_t m = 0; m < values.columns; m += kLanes) {
            store(total + m, load(total + m) + sum_rows({values.data + m, values.stride}, values.rows));
        }
    }

    // total += gate * products, and their share of the gradient of the gate.
    void add_gated(Matrix<float> total, Matrix<const float> products) const {
        for (int64_t i = 0; i < products.rows; ++i) {
            const float* const weight = p.project + i * p.hidden + first_channel;
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

    const FeedForwardBackwardParams& p;
    const Unit& unit;
    const FeedForwardBackwardScratch layout;
    const int64_t share, group;
    const int64_t channels, out;  // padded
    const int64_t reach, margin;  // of the convolution, and what a tile reads beside it
    float *const x, *const grad, *const grad_x, *const row_values, *const rings;
    float *const projected, *const grad_hidden;  // of a band: b, gh
    float *const sums, *const part, *const taps;
    float *const rows_room, *const run_room;  // what operands of products are made in
    float *const gated, *const gate_sums;
    const float** const around;
    int64_t tile = 0, image = 0;
    const float* gate = nullptr;                                           // of the image
    Range rows{0, 0}, columns{0, 0}, near_rows{0, 0}, near_columns{0, 0};  // of the tile, and with what it reads
    int64_t ring_begin = 0;                                                // an image row in the rings' first row
    int64_t chunk = 0, first_channel = 0, width = 0;                       // of a half: the first and how many
};

}  // namespace
}  // namespace ipt_fast::cpu
