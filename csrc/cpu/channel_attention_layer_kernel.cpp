// Layers of channel attention at the level they are compiled for; see gram.h and window_blocks.h.
//
// Pass 1 runs down a strip of the image: norm, projection to q, k, v of a few rows into a ring in the second cache,
// depthwise convolution, Gram matrices of tiles. q and k never reach memory; v waits in the output's own memory.
// Pass 2 (after the softmax, attend of channel_attention_kernel.cpp): attention of a tile, projection, residual.
// Of whole images, attention and projection are one product. Only groups of a dilation, whose pixels are too far apart
// to meet in a tile, have q and k written, for the Gram matrices of channel_attention_kernel.cpp.
// Bytes a pixel: read x twice, write and read v, write out: 5 * C * sizeof(T), with a dilation 4 * C * sizeof(T) more,
// and the slots of channel_attention.
// FLOP a pixel: 8 * C * C + 54 * C, and for each branch 4 * C * d, or of whole images 2 * C * d.
#include "channel_attention_layer_kernel.h"

#include "gram_strip.h"
#include "rows.h"
#include "units.h"
#include "window_attend.h"

namespace ipt_fast::cpu {
namespace {

template <typename T, typename Unit>
void pack(const ChannelAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end) {
    const int64_t d = p.groups.head_channels, heads = p.groups.heads;
    for (int64_t part = begin; part < end; ++part) {
        Weight w = p.project;
        if (part < 3 * heads) {  // part % 3 of q, k, v of head part / 3
            w = p.qkv;
            w.columns = d;
            w.data = static_cast<const T*>(w.data) + (part % 3 * heads + part / 3) * d * w.column_stride;
        }
        unit.template pack<T>(w, p.packed_part(part));
    }
}

template <typename T, typename Unit>
void gram(const ChannelAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    memset(scratch, 0, p.gram_scratch() * sizeof(float));  // the padding of channels stays zero
    const int64_t down = p.vertical.blocks();
    bool begun = false;
    for (int64_t index = begin; index < end; ++index) {
        const bool continued = begun && index % down > 0;
        begun = GramStrip<T, Unit>(p, unit, index / down, scratch).block_row(index % down, continued) || continued;
    }
}

// The weights of one product with v: out = W A v for each head, so their transpose has the rows A^T W^T of each.
template <typename Unit>
void join(const ChannelAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    const Groups& g = p.groups;
    const int64_t channels = p.channels(), row = padded(channels), blocks = g.vertical.blocks() * g.horizontal.blocks();
    for (int64_t image = begin; image < end; ++image) {
        for (int64_t head = 0; head < g.heads; ++head) {
            const int64_t first = head * g.head_channels;
            VectorUnit::product(
                Matrix<const float>{g.slot(image * blocks, head), g.head_channels, g.head_channels, g.depth},
                {p.project_rows + first * row, g.head_channels, channels, row},
                {scratch + first * row, g.head_channels, channels, row}, Accumulate::no);
        }
        unit.template pack<float>({scratch, channels, channels, 1, row}, p.joint_of(image));
    }
}

// Asks for x and v of a tile, if the block has it and its pixels lie in rows.
template <typename T>
void prefetch(const ChannelAttentionLayerParams& p, const WindowBlock& block, int64_t t) {
    const Groups& g = p.groups;
    if (t >= block.tiles() || g.dilation > 1) {
        return;
    }
    const Tile tile = block.tile(t);
    for (int64_t y = 0; y < tile.rows; ++y) {
        const int64_t pixel = g.pixel(block.image, tile.y + y, tile.x);
        prefetch_values(static_cast<const T*>(p.out) + pixel * p.channels(), tile.columns * p.channels());
        prefetch_values(static_cast<const T*>(p.x) + pixel * p.channels(), tile.columns * p.channels());
    }
}

template <typename T, typename Unit>
class ApplyTiles {
  public:
    ApplyTiles(const ChannelAttentionLayerParams& p, const Unit& unit, float* scratch)
        : p_(p),
          unit_(unit),
          g_(p.groups),
          channels_(p.channels()),
          row_(p.attended_row()),
          scratch_(scratch),
          attended_(scratch + cpu::apply_scratch(p.groups)),
          result_(attended_ + kTileTokens * row_),
          left_(reinterpret_cast<Value*>(attended_)) {
        if constexpr (sizeof(Value) != sizeof(float)) {
            left_ = reinterpret_cast<Value*>(result_ + kTileTokens * row_);
        }
    }

    void run(int64_t index, const WindowBlock& block, const Tile& tile) const {
        const int64_t first = g_.pixel(block.image, tile.y, tile.x) * channels_;
        T* const out = static_cast<T*>(p_.out) + first;
        const T* const x = p_.residual ? static_cast<const T*>(p_.x) + first : nullptr;
        const Matrix projected{result_, tile.tokens(), channels_, row_};
        const Matrix<const Value> left{left_, tile.tokens(), channels_, row_};
        if (p_.joint != nullptr) {
            load_pixels(out, tile);
            unit_.multiply(left, p_.joint_of(block.image), projected, Accumulate::no);
        } else {
            attend(index, block, tile, out);
            unit_.multiply(left, p_.packed_part(3 * g_.heads), projected, Accumulate::no);
        }
        const Epilogue epilogue = p_.epilogue.of_image(block.image / (g_.dilation * g_.dilation));
        // pixels of a dilation are not next to each other
        const int64_t run = g_.dilation == 1 ? tile.columns : 1;
        for (int64_t y = 0; y < tile.rows; ++y) {
            for (int64_t column = 0; column < tile.columns; column += run) {
                const int64_t offset = (y * g_.row() + column * g_.dilation) * channels_;
                store_rows(projected.slice(y * tile.columns + column, run), x ? x + offset : nullptr, out + offset,
                           epilogue);
            }
        }
    }

  private:
    using Value = typename Unit::Value;

    // v of a tile, all heads.
    void load_pixels(const T* v, const Tile& tile) const {
        const Matrix pixels{v, tile.rows * g_.width, channels_, channels_};
        const Matrix left{left_, tile.tokens(), channels_, row_};
        for (int64_t y = 0; y < tile.rows; ++y) {
            load_rows(pixels.slice(y * g_.width, tile.columns), left.slice(y * tile.columns, tile.columns));
        }
    }

    // The attention of a tile, all heads.
    void attend(int64_t index, const WindowBlock& block, const Tile& tile, const T* v) const {
        for (int64_t head = 0; head < g_.heads; ++head) {
            // the padding of a head's columns is overwritten by the next head
            const int64_t c = head * g_.head_channels;
            const Matrix pixels{v + c, tile.rows * g_.width, g_.head_channels, channels_ * g_.dilation};
            const Matrix values{attended_ + c, tile.tokens(), g_.depth, row_};
            with_branches(g_, block, [&](auto branches) {
                apply_tile<decltype(branches)>(g_, unit_, head, tile, g_.slot(index, head), pixels, values, scratch_);
            });
        }
        if constexpr (sizeof(Value) != sizeof(float)) {
            for (int64_t i = 0; i < tile.tokens() * row_; i += kLanes) {
                store(left_ + i, load(attended_ + i));
            }
        }
    }

    const ChannelAttentionLayerParams& p_;
    const Unit& unit_;
    const Groups& g_;
    const int64_t channels_, row_;
    float *const scratch_, *const attended_, *const result_;
    Value* left_;
};

template <typename T, typename Unit>
void apply(const ChannelAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    memset(scratch, 0, p.apply_scratch() * sizeof(float));
    const ApplyTiles<T, Unit> tiles(p, unit, scratch);
    const Groups& g = p.groups;
    for (int64_t index = begin; index < end; ++index) {
        const int64_t b = index / p.block_shares, share = index % p.block_shares;
        const WindowBlock block = g.block(b);
        const int64_t last = (share + 1) * block.tiles() / p.block_shares;
        for (int64_t t = share * block.tiles() / p.block_shares; t < last; ++t) {
            if (t + 1 < block.tiles()) {
                prefetch<T>(p, block, t + 1);
            } else if (b + 1 < g.blocks()) {
                prefetch<T>(p, g.block(b + 1), 0);
            }
            tiles.run(b, block, block.tile(t));
        }
    }
}

void pack_any(const ChannelAttentionLayerParams& p, int64_t begin, int64_t end) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) { pack<decltype(type)>(p, unit, begin, end); });
}

void gram_any(const ChannelAttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { gram<decltype(type)>(p, unit, begin, end, scratch); });
}

void join_any(const ChannelAttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm, [&](auto, const auto& unit) { join(p, unit, begin, end, scratch); });
}

void apply_any(const ChannelAttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { apply<decltype(type)>(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const ChannelAttentionLayerKernels ChannelAttentionLayerKernels::IPT_FAST_LEVEL = {
    cpu::pack_any, cpu::gram_any, cpu::join_any, cpu::apply_any};

}  // namespace ipt_fast::cpu
