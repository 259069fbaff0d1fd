// leffn at the level it is compiled for.
//
// A thread goes down a strip of columns, `rows_per_step` rows of output at a time, and keeps the last hidden rows
// (after GELU) in a ring. In a step, for one block of hidden channels after the other: expand the new rows of x, GELU
// into the ring, then in chunks of columns the depthwise convolution into a tile that is projected and added to the
// output rows. The ring of one channel group is contiguous, [row][column][kChannelPad], so what the depthwise
// convolution reads stays in the first cache and strides do not alias; the ring as a whole stays in the second.
//
// With C channels in, M hidden, N out: 2 M (C + K^2 + N) FLOP and about 12 M for GELU, (C + N) * sizeof(T) bytes of
// memory traffic a pixel (C again for the residual, from the cache); hidden values at the edges of bands and strips are
// computed twice.
#include "leffn_kernel.h"

#include "depthwise.h"
#include "gelu.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kTilePixels = 48;   // of one product of the expansion: the tile stays in the first cache
constexpr int64_t kChunkPixels = 32;  // columns of the depthwise convolution that are done for all rows of a step
constexpr int64_t kFilteredRow = kHiddenBlock + kChannelPad;  // a power of two would use a quarter of the cache's sets

// Where the pieces of a thread's scratch memory begin; the offset behind the last one is its size.
template <typename Value>
struct LeffnScratchLayout {
    int64_t ring, rows, tile, filtered, sums, in, end;

    explicit LeffnScratchLayout(const LeffnParams& p) {
        const int64_t width = p.strip_width() + 2 * p.radius(), channels = padded(p.channels);
        const int64_t widest = channels > kHiddenBlock ? channels : kHiddenBlock,
                      pixels = p.rows_per_step * p.strip_width();
        end = 0;
        ring = add(padded(p.hidden) * p.slots() * width * sizeof(float));
        rows = add(p.rows_per_step * width * channels * sizeof(Value));
        tile = add(kTilePixels * widest * sizeof(float));
        filtered = add(p.rows_per_step * kChunkPixels * kFilteredRow * sizeof(Value));
        sums = add(pixels * padded(p.out_channels) * sizeof(float));
        in = add(p.slots() * sizeof(float*));
    }

    int64_t add(int64_t bytes) {
        const int64_t offset = end;
        end += round_up(bytes, 64);
        return offset;
    }
};

// The output pixels of one strip of a band.
template <typename T, typename Unit>
struct Share {
    using Value = typename Unit::Value;

    const LeffnParams& p;
    const Unit unit;
    int64_t image, top, bottom, left, right;
    int64_t width;        // of a hidden row: with the kernel's radius at both sides
    int64_t begin, stop;  // the part of it that is inside the image
    float *ring, *tile, *sums;
    Value *rows, *filtered;
    const float** in;  // rows of the ring

    Share(const LeffnParams& params, const Unit& unit_, int64_t index, void* scratch) : p(params), unit(unit_) {
        image = index / (p.bands * p.strips);
        const int64_t band = index / p.strips % p.bands, strip = index % p.strips;
        top = p.height * band / p.bands;
        bottom = p.height * (band + 1) / p.bands;
        left = p.first_column(strip);
        right = p.first_column(strip + 1);
        width = right - left + 2 * p.radius();
        begin = left < p.radius() ? p.radius() - left : 0;
        stop = right + p.radius() > p.width ? p.width - left + p.radius() : width;
        const LeffnScratchLayout<Value> offset(p);
        char* memory = static_cast<char*>(scratch);
        ring = reinterpret_cast<float*>(memory + offset.ring);
        rows = reinterpret_cast<Value*>(memory + offset.rows);
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
        const Norm norm = p.norm.of_image(image);
        for (int64_t y = first < 0 ? 0 : first; y < last && y < p.height; ++y) {
            const T* source = static_cast<const T*>(p.x) + pixel(y, begin - p.radius()) * p.channels;
            const Matrix pixels{source, stop - begin, p.channels, p.channels};
            const Matrix target{rows + (y - first) * width * channels, stop - begin, p.channels, channels};
            if (norm.weight == nullptr) {
                load_rows(pixels, target);
                continue;
            }
            if (channels == p.channels) {
                normalize_rows(pixels, norm, target);
                continue;
            }
            for (int64_t i = 0; i < stop - begin; i += kTilePixels) {
                const int64_t count = stop - begin - i < kTilePixels ? stop - begin - i : kTilePixels;
                const Matrix staged{tile, count, p.channels, channels};
                load_rows(pixels.slice(i, count), staged);
                normalize_rows(staged, norm, target.slice(i, count));
            }
        }
    }

    void clear(int64_t size, float* row, int64_t first, int64_t last) const {
        for (int64_t c = 0; c < size; c += kChannelPad) {
            float* group = row + c * p.slots() * width;
            memset(group + first * kChannelPad, 0, (last - first) * kChannelPad * sizeof(float));
        }
    }

    // A block of the hidden rows first <= y < last, zeros outside the image.
    void expand(int64_t block, int64_t first, int64_t last) {
        const int64_t channels = padded(p.channels), size = block_size(block);
        const auto* weight = static_cast<const float*>(p.packed_expand) + block * kHiddenBlock * channels;
        for (int64_t y = first; y < last; ++y) {
            float* row = hidden_row(block * kHiddenBlock, slot_of(y));
            if (y < 0 || y >= p.height) {
                clear(size, row, 0, width);
                continue;
            }
            clear(size, row, 0, begin);
            clear(size, row, stop, width);
            const Value* source = rows + (y - first) * width * channels;
            for (int64_t i = begin; i < stop; i += kTilePixels) {
                const int64_t count = stop - i < kTilePixels ? stop - i : kTilePixels;
                unit.multiply({source + (i - begin) * channels, count, p.channels, channels}, weight,
                              {tile, count, size, kHiddenBlock}, Accumulate::no);
                for (int64_t c = 0; c < size; c += kLanes) {
                    float* out = row + c / kChannelPad * kChannelPad * p.slots() * width + i * kChannelPad;
                    with_bias(p.expand_bias, block * kHiddenBlock + c,
                              [&](const auto& add) __attribute__((always_inline)) {
                                  for (int64_t j = 0; j < count; ++j) {
                                      const Vec value = add(load(tile + j * kHiddenBlock + c));
                                      store(out + j * kChannelPad + c % kChannelPad, gelu(value));
                                  }
                              });
                }
            }
        }
    }

    // One row of output of the depthwise convolution, kLanes channels of the rows of input from `in` on.
    void filter_row(const float* const* in, int64_t channel, int64_t count, Value* out) const {
        const float* weight = p.depthwise + channel / kChannelPad * p.kernel * p.kernel * kChannelPad;
        const Taps taps{weight + channel % kChannelPad, kChannelPad};
        const InputRows rows_of_input{in, kChannelPad};
        const auto body = [=](int64_t i, Vec sum) { store(out + i * kFilteredRow, sum); };
        switch (p.kernel) {
            case 3:
                return depthwise_row<3>(rows_of_input, count, taps, body);
            case 5:
                return depthwise_row<5>(rows_of_input, count, taps, body);
            default:
                return depthwise_row_any(p.kernel, rows_of_input, count, taps, body);
        }
    }

    // Adds a block's share of the output rows first <= y < last to the sums, which lie chunk by chunk.
    void filter_and_project(int64_t block, int64_t first, int64_t last) {
        const int64_t size = block_size(block), out = padded(p.out_channels);
        const auto* weight = static_cast<const float*>(p.packed_project) + block * kHiddenBlock * out;
        for (int64_t column = 0; column < right - left; column += kChunkPixels) {
            const int64_t count = chunk(column);
            for (int64_t c = 0; c < size; c += kLanes) {
                const int64_t channel = block * kHiddenBlock + c;
                for (int64_t i = 0, slot = slot_of(first - p.radius()); i < last - first + p.kernel - 1; ++i) {
                    in[i] = hidden_row(channel, slot) + column * kChannelPad + channel % kChannelPad;
                    slot = slot + 1 < p.slots() ? slot + 1 : 0;
                }
                for (int64_t y = 0; y < last - first; ++y) {
                    filter_row(in + y, channel, count, filtered + y * count * kFilteredRow + c);
                }
            }
            const int64_t pixels = (last - first) * count;
            unit.multiply({filtered, pixels, size, kFilteredRow}, weight,
                          {sums + column * (last - first) * out, pixels, p.out_channels, out},
                          block > 0 ? Accumulate::yes : Accumulate::no);
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
        for (int64_t y = top - p.radius(); y < top + p.radius(); y += p.rows_per_step) {
            const int64_t last = y + p.rows_per_step < top + p.radius() ? y + p.rows_per_step : top + p.radius();
            load_input(y, last);
            for (int64_t block = 0; block < p.blocks(); ++block) {
                expand(block, y, last);
            }
        }
        for (int64_t y = top; y < bottom; y += p.rows_per_step) {
            const int64_t last = y + p.rows_per_step < bottom ? y + p.rows_per_step : bottom;
            load_input(y + p.radius(), last + p.radius());
            for (int64_t block = 0; block < p.blocks(); ++block) {
                expand(block, y + p.radius(), last + p.radius());
                filter_and_project(block, y, last);
            }
            store_output(y, last);
        }
    }
};

template <typename T, typename Unit>
struct Leffn {
    static int64_t scratch_size(const LeffnParams& p, const Unit&) {
        return LeffnScratchLayout<typename Unit::Value>(p).end;
    }

    static void pack(const LeffnParams& p, const Unit& unit, int64_t begin, int64_t end) {
        auto* expand = static_cast<float*>(p.packed_expand);
        auto* project = static_cast<float*>(p.packed_project);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kHiddenBlock, rest = p.hidden - first;
            const int64_t size = rest < kHiddenBlock ? rest : kHiddenBlock;
            Weight e = p.expand, q = p.project;
            e.data = static_cast<const T*>(e.data) + first * e.column_stride;
            e.columns = size;
            q.data = static_cast<const T*>(q.data) + first * q.depth_stride;
            q.depth = size;
            unit.template pack<T>(e, expand + first * padded(p.channels));
            unit.template pack<T>(q, project + first * padded(p.out_channels));
        }
    }

    static void forward(const LeffnParams& p, const Unit& unit, int64_t begin, int64_t end, void* scratch) {
        for (int64_t index = begin; index < end; ++index) {
            Share<T, Unit>(p, unit, index, scratch).run();
        }
    }
};

// body(Leffn, unit) for the storage type and the unit in use.
template <typename Body>
auto with_type(const LeffnParams& p, const Body& body) {
    return with_types(p.dtype, p.brgemm,
                      [&]<typename T, typename Unit>(T, const Unit& unit) { return body(Leffn<T, Unit>{}, unit); });
}

int64_t scratch_size(const LeffnParams& p) {
    return with_type(p, [&](auto leffn, const auto& unit) { return leffn.scratch_size(p, unit); });
}

void pack(const LeffnParams& p, int64_t begin, int64_t end) {
    with_type(p, [&](auto leffn, const auto& unit) { leffn.pack(p, unit, begin, end); });
}

void forward(const LeffnParams& p, int64_t begin, int64_t end, void* scratch) {
    with_type(p, [&](auto leffn, const auto& unit) { leffn.forward(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const LeffnKernels LeffnKernels::IPT_FAST_LEVEL = {cpu::scratch_size, cpu::pack, cpu::forward};

}  // namespace ipt_fast::cpu
