// The blocks of a map whose axes are cut as common/windows.h says, and the tiles that a block is computed in.
#pragma once

#include "common/windows.h"

namespace ipt_fast::cpu {

// Internal linkage: code of two levels must never be merged.
namespace {

// Tokens that are computed at once: a few rows of a block, so that a depthwise convolution reads its input about once.
constexpr int64_t kTileTokens = 64;
constexpr int64_t kTileRows = 4;

struct Tile {
    int64_t y, x, rows, columns;

    int64_t tokens() const { return rows * columns; }
};

// The block (block_y, block_x) of image `image`; index counts blocks in this order. It may be empty.
struct WindowBlock {
    int64_t image, block_y, block_x;
    int64_t y, x, rows, columns;

    WindowBlock(const Axis& vertical, const Axis& horizontal, int64_t index) {
        const int64_t across = horizontal.blocks(), down = vertical.blocks();
        block_y = index / across % down;
        block_x = index % across;
        image = index / across / down;
        y = vertical.begin(block_y);
        x = horizontal.begin(block_x);
        rows = vertical.end(block_y) - y;
        columns = horizontal.end(block_x) - x;
    }

    int64_t tokens() const { return rows * columns; }
    int64_t tile_rows() const { return rows < kTileRows ? rows : kTileRows; }
    // Tiles side by side; all have about the same width.
    int64_t tiles_across() const {
        const int64_t widest = kTileTokens / tile_rows();
        return (columns + widest - 1) / widest;
    }
    int64_t tiles() const { return tokens() == 0 ? 0 : (rows + tile_rows() - 1) / tile_rows() * tiles_across(); }
    Tile tile(int64_t index) const {
        const int64_t across = tiles_across(), i = index % across, top = index / across * tile_rows();
        const int64_t left = i * columns / across, right = (i + 1) * columns / across;
        return {y + top, x + left, rows - top < tile_rows() ? rows - top : tile_rows(), right - left};
    }
};

}  // namespace
}  // namespace ipt_fast::cpu
