// The weights of a layer as its kernels read them, in one block of bytes: packed once, used by any number of calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "epilogue.h"
#include "layer_norm_2d.h"
#include "level.h"

namespace ipt_fast::cpu {

enum class Layer : int64_t {
    leffn,
    leffn_layer,
    feed_forward_layer,
    channel_attention_layer,
    focal_attention_layer,
    grid_attention_layer,
    window_attention_layer,
};

// What a block begins with. A layer's own header derives from it and adds what a call needs to know: numbers, and where
// in the block its pieces begin, in bytes.
struct PackedHeader {
    int64_t mark, bytes;  // no other tensor of bytes begins so
    Layer layer;
    int64_t level;                   // in use when it was packed
    int64_t dtype;                   // at::ScalarType of the images and the weights
    int64_t channels;                // of the images
    int64_t norm_weight, norm_bias;  // 0: there is no norm, or each call brings its own
    int64_t bias, gate;              // of the epilogue; 0: there is none, or each call brings its own gate
    double eps;
    bool centered;
};

// The header of a layer with these weights (rows, channels of the images, ...), of so many bytes.
PackedHeader new_header(Layer layer, const at::Tensor& weight, int64_t bytes);
// A block that begins a cache line.
at::Tensor new_block(int64_t bytes);
// The parts of a call: what it brings, else what was packed.
LayerNorm norm_of(const PackedHeader& header, const at::Tensor& x, const OptionalTensor& norm_weight,
                  const OptionalTensor& norm_bias);
LayerEpilogue epilogue_of(const PackedHeader& header, const at::Tensor& x, const OptionalTensor& gate);
// Raises unless `packed` was packed for this layer, at the level in use, and for images like x.
void check_packed(const at::Tensor& packed, Layer layer, const at::Tensor& x);

// The pieces of a new block: added first, then allocated together, then filled.
template <typename Header>
class Packing {
    const KeptLevel level_;

  public:
    Header header{};
    at::Tensor block;

    Packing(Layer layer, const at::Tensor& weight) {
        static_cast<PackedHeader&>(header) = new_header(layer, weight, round_up(sizeof(Header), kLine));
    }

    // Returns the offset of a piece, which begins a cache line.
    int64_t add(int64_t bytes) {
        const int64_t offset = header.bytes;
        header.bytes += round_up(bytes, kLine);
        return offset;
    }
    int64_t add(const at::Tensor& values) { return add(static_cast<int64_t>(values.nbytes())); }
    void add(const LayerNorm& norm) {
        check_shared(norm.params.weight_stride, "norm_weight");
        check_shared(norm.params.bias_stride, "norm_bias");
        if (norm.params.weight != nullptr) {
            header.norm_weight = add(norm.weight);
            header.norm_bias = add(norm.bias);
        }
        header.eps = norm.eps;
        header.centered = norm.params.centered;
    }
    void add(const LayerEpilogue& epilogue) {
        check_shared(epilogue.params.gate_stride, "gate");
        if (epilogue.params.bias != nullptr) {
            header.bias = add(epilogue.bias);
            header.gate = add(epilogue.gate);
        }
    }

    void allocate() {
        block = new_block(header.bytes);
        memcpy(at<void>(0), &header, sizeof(Header));
    }
    template <typename T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(block.mutable_data_ptr<uint8_t>() + offset);
    }
    // `values` are contiguous.
    void fill(int64_t offset, const at::Tensor& values) const {
        memcpy(at<void>(offset), values.const_data_ptr(), values.nbytes());
    }
    void fill(const LayerNorm& norm) const {
        if (header.norm_weight != 0) {
            fill(header.norm_weight, norm.weight);
            fill(header.norm_bias, norm.bias);
        }
    }
    void fill(const LayerEpilogue& epilogue) const {
        if (header.bias != 0) {
            fill(header.bias, epilogue.bias);
            fill(header.gate, epilogue.gate);
        }
    }

  private:
    static constexpr int64_t kLine = 64;

    static void check_shared(int64_t stride, const char* name) {
        TORCH_CHECK_VALUE(stride == 0, name, " must be (C,) to be packed; that of each image is given in each call");
    }
};

// A block as a call reads it.
template <typename Header>
class Packed {
    const KeptLevel level_;

  public:
    Packed(const at::Tensor& packed, Layer layer, const at::Tensor& x) {
        check_packed(packed, layer, x);
        base_ = static_cast<const uint8_t*>(packed.const_data_ptr());
    }

    const Header& header() const { return *at<const Header>(0); }
    // Not only of const values: packing and computing kernels share their parameters.
    template <typename T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(const_cast<uint8_t*>(base_) + offset);
    }

  private:
    const uint8_t* base_;
};

}  // namespace ipt_fast::cpu
