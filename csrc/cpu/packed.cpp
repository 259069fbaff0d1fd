#include "packed.h"

#include <ATen/ops/empty.h>

#include <iterator>

#include "arguments.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kMark = 0x6b63617074706921;

const char* name_of(Layer layer) {
    switch (layer) {
        case Layer::leffn:
            return "leffn";
        case Layer::leffn_layer:
            return "leffn_layer";
        case Layer::feed_forward_layer:
            return "feed_forward_layer";
        case Layer::channel_attention_layer:
            return "channel_attention_layer";
        case Layer::focal_attention_layer:
            return "focal_attention_layer";
        case Layer::grid_attention_layer:
            return "grid_attention_layer";
        default:
            return "window_attention_layer";
    }
}

const float* piece(const PackedHeader& header, int64_t offset) {
    return reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(&header) + offset);
}

}  // namespace

PackedHeader new_header(Layer layer, const at::Tensor& weight, int64_t bytes) {
    PackedHeader header{};
    header.mark = kMark;
    header.bytes = bytes;
    header.layer = layer;
    header.level = static_cast<int64_t>(level());
    header.dtype = static_cast<int64_t>(weight.scalar_type());
    header.channels = weight.size(1);
    return header;
}

LayerNorm norm_of(const PackedHeader& header, const at::Tensor& x, const OptionalTensor& norm_weight,
                  const OptionalTensor& norm_bias) {
    LayerNorm norm(x, norm_weight, norm_bias, header.eps, header.centered);
    if (!norm_weight.has_value()) {
        TORCH_CHECK_VALUE(header.norm_weight != 0, "norm_weight must be given, as none was packed");
        norm.params.weight = piece(header, header.norm_weight);
        norm.params.bias = piece(header, header.norm_bias);
    }
    return norm;
}

LayerEpilogue epilogue_of(const PackedHeader& header, const at::Tensor& x, const OptionalTensor& gate) {
    LayerEpilogue epilogue(x, std::nullopt, gate);
    if (header.bias != 0) {
        epilogue.params.bias = piece(header, header.bias);
        if (!gate.has_value()) {
            epilogue.params.gate = piece(header, header.gate);
        }
    }
    return epilogue;
}

at::Tensor new_block(int64_t bytes) { return at::empty({bytes}, at::kByte); }

void check_packed(const at::Tensor& packed, Layer layer, const at::Tensor& x) {
    const auto* header = static_cast<const PackedHeader*>(packed.const_data_ptr());
    const bool whole = packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                       packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)) && header->mark == kMark &&
                       header->level < static_cast<int64_t>(std::size(kLevels)) && header->bytes == packed.numel() &&
                       reinterpret_cast<uintptr_t>(header) % 64 == 0;
    TORCH_CHECK_VALUE(whole && header->layer == layer, "packed must be what pack_", name_of(layer), " returned");
    TORCH_CHECK(header->level == static_cast<int64_t>(level()), "packed must be packed for ", kLevels[level()].name,
                ", the level of instructions in use; got weights packed for ", kLevels[header->level].name,
                ": freeze the model again, or let IPT_FAST_CPU_ISA be what it was");
    check_image(x, "x");
    const auto dtype = static_cast<at::ScalarType>(header->dtype);
    TORCH_CHECK_TYPE(x.scalar_type() == dtype, "x must be ", dtype, " as the packed weights; got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.size(1) == header->channels, "x must have ", header->channels, " channels; got ", x.size(1));
}

}  // namespace ipt_fast::cpu
