// Feed-forward networks at the level this is compiled for.
//
// A thread goes down a strip of columns, `rows_per_step` rows of output at a time, and keeps the last hidden rows in a
// ring. In a step, for one block of hidden channels after the other: expand the new rows of x, GELU where the form has
// it into the ring, then in chunks of columns the depthwise convolution and the form's tail into a tile that is
// projected and added to the output rows. The ring of one channel group is contiguous, [row][column][kChannelPad], so
// what the depthwise convolution reads stays in the first cache and strides do not alias; the ring as a whole stays in
// the second. The norm of the second half takes all of a pixel's channels: there, all blocks are expanded before the
// first one is convolved. Without a convolution, all hidden values of a few pixels go from one product to the next.
//
// With C channels in, M hidden, P projected, N out: 2 (M C + M K^2 + P N) FLOP and about 12 for a GELU, (C + N) *
// sizeof(T) bytes of memory traffic a pixel (C again for the residual, from the cache); hidden values at the edges of
// bands and strips are computed twice.
#include "feed_forward_kernel.h"

#include "depthwise.h"
#include "feed_forward_layout.h"
#include "hidden.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// The output pixels of one strip of a band.
template <typename T, typename Unit>
struct Share {
    using Value = typename Unit::Value;

    const FeedForwardParams& p;
    const Unit unit;
    int64_t image, top, bottom, left, right;
    int64_t width;        // of a hidden row: with the kernel's radius at both sides
    int64_t begin, stop;  // the part of it that is inside the image
    float *ring, *tile, *sums;
    Value *rows, *filtered;
    Pair* thirds;      // of `rows`; nullptr: they are not split
    const float** in;  // rows of the ring, of each half

    Share(const FeedForwardParams& params, const Unit& unit_, int64_t index, void* scratch) : p(params), unit(unit_) {
        image = index / (p.bands * p.strips);
        const int64_t band = index / p.strips % p.bands, strip = index % p.strips;
        top = p.height * band / p.bands;
        bottom = p.height * (band + 1) / p.bands;
        left = p.first_column(strip);
        right = p.first_column(strip + 1);
        width = right - left + 2 * p.radius();
        begin = left < p.radius() ? p.radius() - left : 0;
        stop = right + p.radius() > p.width ? p.width - left + p.radius() : width;
        const ScratchLayout<Value> offset(p);
        char* memory = static_cast<char*>(scratch);
        ring = reinterpret_cast<float*>(memory + offset.ring);
        rows = reinterpret_cast<Value*>(memory + offset.rows);
        thirds = offset.splits(p) ? reinterpret_cast<Pair*>(memory + offset.thirds) : nullptr;
        tile = reinterpret_cast<float*>(memory + offset.tile);
        filtered = reinterpret_cast<Value*>(memory + offset.filtered);
        sums = reinterpret_cast<float*>(memory + offset.sums);
        in = reinterpret_cast<const float**>(memory + offset.in);
    }

    int64_t slot_of(int64_t y) const { return (y - top + p.radius()) % p.slots(); }

    // A hidden row, of the group of channels that this one belongs to.
    float* hidden_row(int64_t channel, int64_t slot) const {
        return ring + (channel / kChannelPad * p.slots() + slot) * width * kChannelPad;
    }

    int64_t block_size(int64_t block) const {
        const int64_t rest = p.hidden - block * kHiddenBlock;
        return rest < kHiddenBlock ? rest : kHiddenBlock;
    }

    // The first pixel of this strip in a row of a map, hidden columns counted from the halo's first.
    int64_t pixel(int64_t y, int64_t column) const { return (image * p.height + y) * p.width + left + column; }

    // Loads and normalises the rows of x that the hidden rows first <= y < last need.
    void load_input(int64_t first, int64_t last) {
        const int64_t channels = padded(p.channels);
        for (int64_t y = first < 0 ? 0 : first; y < last && y < p.height; ++y) {
            const T* source = static_cast<const T*>(p.x) + pixel(y, begin - p.radius()) * p.channels;
            const Matrix target{rows + (y - first) * width * channels, stop - begin, p.channels, channels};
            load_pixels({source, stop - begin, p.channels, p.channels}, target);
            if constexpr (sizeof(Value) == sizeof(float)) {
                for (int64_t i = 0; thirds != nullptr && i < target.rows; ++i) {
                    split_row(target.row(i), p.channels, split_pixel(target.row(i)));
                }
            }
        }
    }

    void load_pixels(Matrix<const T> pixels, Matrix<Value> target) {
        const Norm norm = p.norm.of_image(image);
        if (norm.weight == nullptr) {
            return load_rows(pixels, target);
        }
        if (padded(p.channels) == p.channels) {
            return normalize_rows(pixels, norm, target);
        }
        for (int64_t i = 0; i < pixels.rows; i += kTilePixels) {
            const int64_t count = pixels.rows - i < kTilePixels ? pixels.rows - i : kTilePixels;
            const Matrix staged{tile, count, p.channels, padded(p.channels)};
            load_rows(pixels.slice(i, count), staged);
            normalize_rows(staged, norm, target.slice(i, count));
        }
    }

    void clear(int64_t size, float* row, int64_t first, int64_t last) const {
        for (int64_t c = 0; c < size; c += kChannelPad) {
            float* group = row + c * p.slots() * width;
            memset(group + first * kChannelPad, 0, (last - first) * kChannelPad * sizeof(float));
        }
    }

    // The matrix unit takes 32 rows at a time, vectors take six.
    int64_t tile_pixels() const { return sizeof(Value) < sizeof(float) || thirds != nullptr ? kTilePixels : 48; }

    // The thirds of a pixel of `rows`.
    Pair* split_pixel(const Value* pixel) const {
        return thirds + (pixel - rows) / padded(p.channels) * split_pairs(p.channels);
    }

    // c = pixels of `rows` times a packed weight.
    void multiply(Matrix<const Value> pixels, const float* weight, Matrix<float> c) const {
        if constexpr (sizeof(Value) == sizeof(float)) {
            if (thirds != nullptr && unit.splits(c.columns, pixels.columns)) {
                const int64_t pairs = split_pairs(pixels.columns);
                return multiply_split(unit.brgemm, {split_pixel(pixels.data), pixels.rows, pairs, pairs},
                                      reinterpret_cast<const Pair*>(weight), c);
            }
        }
        unit.multiply(pixels, weight, c, Accumulate::no);
    }

    // A block of a half's hidden values of a few pixels, for which the tile has room: kLanes channels from c on of
    // pixel j at row j of target(c).
    template <typename Target>
    void expand_tile(Matrix<const Value> pixels, int64_t half, int64_t block, const Target& target) {
        const int64_t size = block_size(block), first = half * padded(p.hidden) + block * kHiddenBlock;
        const float* weight =
            static_cast<const float*>(p.packed_expand) + (half * p.blocks() + block) * p.expand_floats();
        multiply(pixels, weight, {tile, pixels.rows, size, kHiddenBlock});
        const auto put = [&](const auto& activate) __attribute__((always_inline)) {
            for (int64_t c = 0; c < size; c += kLanes) {
                const auto out = target(c);
                with_bias(p.expand_bias, first + c, [&](const auto& add) __attribute__((always_inline)) {
                    for (int64_t j = 0; j < pixels.rows; ++j) {
                        store(out.row(j), activate(add(load(tile + j * kHiddenBlock + c))));
                    }
                });
            }
        };
        if (p.form.activates) {
            put([](Vec v) __attribute__((always_inline)) { return gelu(v); });
        } else {
            put([](Vec v) __attribute__((always_inline)) { return v; });
        }
    }

    // A block of a half of the hidden rows first <= y < last, zeros outside the image.
    void expand(int64_t half, int64_t block, int64_t first, int64_t last) {
        const int64_t channels = padded(p.channels), size = block_size(block);
        for (int64_t y = first; y < last; ++y) {
            float* row = hidden_row(half * padded(p.hidden) + block * kHiddenBlock, slot_of(y));
            if (y < 0 || y >= p.height) {
                clear(size, row, 0, width);
                continue;
            }
            clear(size, row, 0, begin);
            clear(size, row, stop, width);
            const Value* source = rows + (y - first) * width * channels;
            for (int64_t i = begin; i < stop; i += tile_pixels()) {
                const int64_t count = stop - i < tile_pixels() ? stop - i : tile_pixels();
                const Matrix<const Value> pixels{source + (i - begin) * channels, count, p.channels, channels};
                expand_tile(pixels, half, block, [&](int64_t c) {
                    const int64_t group = c / kChannelPad * kChannelPad * p.slots() * width;
                    return Rows<float>{row + group + i * kChannelPad + c % kChannelPad, kChannelPad};
                });
            }
        }
    }

    void expand(int64_t block, int64_t first, int64_t last) {
        for (int64_t half = 0; half < p.form.halves(); ++half) {
            expand(half, block, first, last);
        }
    }

    // All blocks of the hidden rows first <= y < last.
    void expand_all(int64_t first, int64_t last) {
        load_input(first, last);
        for (int64_t block = 0; block < p.blocks(); ++block) {
            expand(block, first, last);
        }
        for (int64_t y = first < 0 ? 0 : first; y < last && y < p.height && p.inner_norm.weight != nullptr; ++y) {
            for (int64_t i = begin; i < stop; i += kLanes) {
                const auto second_half = [&](int64_t c) {
                    float* const row = hidden_row(padded(p.hidden) + c, slot_of(y));
                    return Rows<float>{row + i * kChannelPad + c % kChannelPad, kChannelPad};
                };
                normalize_pixels(second_half, p.hidden, stop - i < kLanes ? stop - i : kLanes, p.inner_norm);
            }
        }
    }

    // One row of output of the depthwise convolution, kLanes channels of the rows of input from `in` on: pixel i at row
    // i of `out`.
    template <typename Out>
    void convolve(const float* const* in, int64_t channel, int64_t count, Rows<Out> out) const {
        const float* weight = p.depthwise + channel / kChannelPad * p.kernel * p.kernel * kChannelPad;
        const Taps taps{weight + channel % kChannelPad, kChannelPad};
        const InputRows rows_of_input{in, kChannelPad};
        const auto body = [=](int64_t i, Vec sum) { store(out.row(i), sum); };
        switch (p.kernel) {
            case 3:
                return depthwise_row<3>(rows_of_input, count, taps, body);
            case 5:
                return depthwise_row<5>(rows_of_input, count, taps, body);
            case 7:
                return depthwise_row<7>(rows_of_input, count, taps, body);
            default:
                return depthwise_row_any(p.kernel, rows_of_input, count, taps, body);
        }
    }

    // One row of what is projected, kLanes channels of a half. `in` and `second` are the rows of each half.
    void filter_row(const float* const* in, const float* const* second, int64_t channel, int64_t count,
                    Value* out) const {
        const Rows<Value> target{out, kFilteredRow<Value>};
        if (p.form.tail == Tail::convolved) {
            return convolve(in, channel, count, target);
        }
        float sums_of_row[kChunkPixels * kLanes], sums_of_gates[kChunkPixels * kLanes];
        const Rows<float> convolved{sums_of_row, kLanes}, gates{sums_of_gates, kLanes};
        convolve(p.form.tail == Tail::gate ? second : in, channel, count, convolved);
        const float* const bias = p.depthwise_bias + channel;
        Vec gate_bias{};
        if (p.form.tail == Tail::activated_gate) {
            convolve(second, channel + padded(p.hidden), count, gates);
            gate_bias = load(bias + padded(p.hidden));
        }
        const float* const centre = in[p.radius()] + p.radius() * kChannelPad;
        apply_tail(p.form.tail, count, convolved, load(bias), gates, gate_bias, Rows<const float>{centre, kChannelPad},
                   target);
    }

    // Adds a block's share of `pixels` filtered pixels to their sums.
    void project(int64_t block, int64_t pixels, float* target) {
        const int64_t out = padded(p.out_channels);
        const auto* weight = static_cast<const float*>(p.packed_project) + block * p.project_floats();
        unit.multiply({filtered, pixels, block_size(block), kFilteredRow<Value>}, weight,
                      {target, pixels, p.out_channels, out}, block > 0 ? Accumulate::yes : Accumulate::no);
    }

    // Adds a block's share of the output rows first <= y < last to the sums, which lie chunk by chunk.
    void filter_and_project(int64_t block, int64_t first, int64_t last) {
        const int64_t size = block_size(block), under = last - first + p.kernel - 1;
        for (int64_t column = 0; column < right - left; column += kChunkPixels) {
            const int64_t count = chunk(column);
            for (int64_t c = 0; c < size; c += kLanes) {
                const int64_t channel = block * kHiddenBlock + c;
                for (int64_t half = 0; half < p.form.halves(); ++half) {
                    const int64_t of_half = half * padded(p.hidden) + channel;
                    for (int64_t i = 0, slot = slot_of(first - p.radius()); i < under; ++i) {
                        in[half * under + i] = hidden_row(of_half, slot) + column * kChannelPad + channel % kChannelPad;
                        slot = slot + 1 < p.slots() ? slot + 1 : 0;
                    }
                }
                for (int64_t y = 0; y < last - first; ++y) {
                    filter_row(in + y, in + under + y, channel, count, filtered + y * count * kFilteredRow<Value> + c);
                }
            }
            project(block, (last - first) * count, sums + column * (last - first) * padded(p.out_channels));
        }
    }

    void store_output(int64_t first, int64_t last) {
        const int64_t out = padded(p.out_channels);
        const Epilogue epilogue = p.epilogue.of_image(image);
        for (int64_t column = 0; column < right - left; column += kChunkPixels) {
            const int64_t count = chunk(column);
            for (int64_t y = first; y < last; ++y) {
                const int64_t offset = pixel(y, column) * p.out_channels;
                const float* const first_sum = sums + (column * (last - first) + (y - first) * count) * out;
                store_rows({first_sum, count, p.out_channels, out},
                           p.residual ? static_cast<const T*>(p.x) + offset : nullptr, static_cast<T*>(p.out) + offset,
                           epilogue);
            }
        }
    }

    int64_t chunk(int64_t column) const {
        return right - left - column < kChunkPixels ? right - left - column : kChunkPixels;
    }

    void run() {
        if (!p.form.convolves) {
            return transform();
        }
        for (int64_t y = top - p.radius(); y < top + p.radius(); y += p.rows_per_step) {
            expand_all(y, y + p.rows_per_step < top + p.radius() ? y + p.rows_per_step : top + p.radius());
        }
        for (int64_t y = top; y < bottom; y += p.rows_per_step) {
            const int64_t last = y + p.rows_per_step < bottom ? y + p.rows_per_step : bottom;
            const bool at_once = p.inner_norm.weight == nullptr;
            if (at_once) {
                load_input(y + p.radius(), last + p.radius());
            } else {
                expand_all(y + p.radius(), last + p.radius());
            }
            for (int64_t block = 0; block < p.blocks(); ++block) {
                if (at_once) {
                    expand(block, y + p.radius(), last + p.radius());
                }
                filter_and_project(block, y, last);
            }
            store_output(y, last);
        }
    }

    // Of pixels without a convolution: all blocks are projected at once.
    void transform() {
        load_input(0, 1);
        const int64_t pixels = right - left, row = filtered_row<Value>(p);
        for (int64_t block = 0; block < p.blocks(); ++block) {
            expand_tile({rows, pixels, p.channels, padded(p.channels)}, 0, block,
                        [&](int64_t c) { return Rows<Value>{filtered + block * kHiddenBlock + c, row}; });
        }
        unit.multiply({filtered, pixels, p.hidden, row}, p.packed_project,
                      {sums, pixels, p.out_channels, padded(p.out_channels)}, Accumulate::no);
        store_output(0, 1);
    }
};

template <typename T, typename Unit>
struct FeedForward {
    static int64_t scratch_size(const FeedForwardParams& p, const Unit&) {
        return ScratchLayout<typename Unit::Value>(p).end;
    }

    static void pack(const FeedForwardParams& p, const Unit& unit, int64_t begin, int64_t end) {
        auto* expand = static_cast<float*>(p.packed_expand);
        auto* project = static_cast<float*>(p.packed_project);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kHiddenBlock, rest = p.hidden - first;
            const int64_t size = rest < kHiddenBlock ? rest : kHiddenBlock;
            for (int64_t half = 0; half < p.form.halves(); ++half) {
                Weight e = p.expand;
                e.data = static_cast<const T*>(e.data) + (half * p.hidden + first) * e.column_stride;
                e.columns = size;
                unit.template pack<T>(e, expand + (half * p.blocks() + block) * p.expand_floats());
            }
            Weight q = p.project;
            if (!p.form.convolves) {
                if (block == 0) {
                    unit.template pack<T>(q, project);
                }
                continue;
            }
            q.data = static_cast<const T*>(q.data) + first * q.depth_stride;
            q.depth = size;
            unit.template pack<T>(q, project + block * p.project_floats());
        }
    }

    static void forward(const FeedForwardParams& p, const Unit& unit, int64_t begin, int64_t end, void* scratch) {
        for (int64_t index = begin; index < end; ++index) {
            Share<T, Unit>(p, unit, index, scratch).run();
        }
    }
};

// body(FeedForward, unit) for the storage type and the unit in use.
template <typename Body>
auto with_type(const FeedForwardParams& p, const Body& body) {
    return with_types(p.dtype, p.brgemm, [&]<typename T, typename Unit>(T, const Unit& unit) {
        return body(FeedForward<T, Unit>{}, unit);
    });
}

int64_t scratch_size(const FeedForwardParams& p) {
    return with_type(p, [&](auto network, const auto& unit) { return network.scratch_size(p, unit); });
}

void pack(const FeedForwardParams& p, int64_t begin, int64_t end) {
    with_type(p, [&](auto network, const auto& unit) { network.pack(p, unit, begin, end); });
}

void forward(const FeedForwardParams& p, int64_t begin, int64_t end, void* scratch) {
    with_type(p, [&](auto network, const auto& unit) { network.forward(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const FeedForwardKernels FeedForwardKernels::IPT_FAST_LEVEL = {cpu::scratch_size, cpu::pack, cpu::forward};

}  // namespace ipt_fast::cpu
