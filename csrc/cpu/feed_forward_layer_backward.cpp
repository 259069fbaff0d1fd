// The backward of feed_forward_layer. Without a convolution, with nothing behind it, or with a product of its halves, a
// kernel does all of it. Otherwise it goes from map to map, of which it makes what it needs again and keeps no more
// than a few.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "convolution.h"
#include "feed_forward.h"
#include "feed_forward_maps_kernel.h"
#include "level.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kGrainValues = 1 << 14;  // fewer values than this are not worth a thread

Channels all_of(const at::Tensor& map) { return {map.mutable_data_ptr(), map.size(1)}; }

// One half of the channels of a dense map.
Channels half_of(const at::Tensor& map, int64_t half) {
    const int64_t first = half * map.size(1) / 2 * map.element_size();
    return {static_cast<char*>(map.mutable_data_ptr()) + first, map.size(1)};
}

at::Tensor new_map(const at::Tensor& like, int64_t channels) {
    return empty_channels_last({like.size(0), channels, like.size(2), like.size(3)}, like);
}

// Runs a kernel over all pixels of a map.
template <typename Params>
void for_pixels(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, const at::Tensor& map) {
    const int64_t pixels = map.numel() / map.size(1);
    at::parallel_for(0, pixels, std::max<int64_t>(kGrainValues / map.size(1), 1),
                     [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// The maps of one network's backward, for the gradient `grad` of gate * network(input).
class Maps {
  public:
    Maps(const at::Tensor& grad, const at::Tensor& input, const FeedForwardWeights& w, const OptionalTensor& gate)
        : w_(w),
          form_(w.form),
          dtype_(dtype_of(input)),
          hidden_(pointwise(input, w.expand, w.expand_bias)),
          upstream_(pointwise_input_gradient(grad, w.project, gate)) {
        activate();
        convolve();
        const ParameterGradients project = backward_of_tail(grad, gate);
        gradients.project = project.weight;
        gradients.project_bias = project.bias;
        gradients.gate = project.gate;
        backward_of_convolution();
        backward_of_activation();
        const ParameterGradients expand = pointwise_gradients(hidden_, input, w.expand, w.expand_bias);
        gradients.expand = expand.weight;
        gradients.expand_bias = expand.bias;
        gradients.x = pointwise_input_gradient(hidden_, w.expand);
    }

    FeedForwardGradients gradients;

  private:
    bool gated() const { return form_.tail == Tail::gate; }

    void activate() {
        if (!form_.activates) {
            first_ = hidden_;
            return;
        }
        const int64_t channels = gated() ? w_.hidden() : hidden_.size(1);
        first_ = new_map(hidden_, channels);
        run(kernels_.activate, {dtype_, channels, part(0), all_of(first_), {}, {}});
        if (gated()) {
            second_ = new_map(hidden_, channels);
            run(kernels_.activate, {dtype_, channels, part(1), all_of(second_), {}, {}});
        }
    }

    void convolve() {
        source_ = gated() ? layer_norm_2d(second_, *w_.inner_weight, w_.inner_bias, w_.inner_eps, true) : first_;
        convolved_ = depthwise(source_, w_.depthwise, w_.depthwise_bias);
    }

    // The gradient of the convolved map takes its place.
    ParameterGradients backward_of_tail(const at::Tensor& grad, const OptionalTensor& gate) {
        const at::Tensor projected = new_map(hidden_, w_.hidden());
        for_pixels(kernels_.tail,
                   TailParams{dtype_, form_.tail, w_.hidden(), all_of(first_), all_of(convolved_), all_of(upstream_),
                              all_of(projected)},
                   hidden_);
        return pointwise_gradients(grad, projected, w_.project, w_.project_bias, gate);
    }

    // The gradient of what was convolved, before an inner norm, takes the place of `convolved_`.
    void backward_of_convolution() {
        const ParameterGradients of_taps =
            depthwise_gradients(convolved_, source_, w_.depthwise.size(3), w_.depthwise_bias);
        gradients.depthwise = of_taps.weight;
        gradients.depthwise_bias = of_taps.bias;
        source_.reset();
        first_.reset();
        convolved_ = depthwise_input_gradient(convolved_, w_.depthwise);
        if (gated()) {
            std::tie(convolved_, gradients.inner_weight, gradients.inner_bias) =
                layer_norm_2d_backward(convolved_, second_, *w_.inner_weight, w_.inner_bias, w_.inner_eps, true);
            second_.reset();
        }
    }

    // The gradient of the expanded map takes its place, too.
    void backward_of_activation() {
        if (!form_.activates) {
            hidden_ = convolved_;
        } else if (gated()) {
            run(kernels_.slope, {dtype_, w_.hidden(), part(0), part(0), all_of(upstream_), {}});
            run(kernels_.slope, {dtype_, w_.hidden(), part(1), part(1), all_of(convolved_), {}});
        } else {
            const Channels all = all_of(hidden_), other = form_.tail == Tail::added ? all_of(upstream_) : Channels{};
            run(kernels_.slope, {dtype_, hidden_.size(1), all, all, all_of(convolved_), other});
        }
        convolved_.reset();
        upstream_.reset();
    }

    // A half of the hidden channels, or the first and only part.
    Channels part(int64_t half) const { return half_of(hidden_, half); }

    void run(void (*kernel)(const ActivationParams&, int64_t, int64_t), const ActivationParams& params) const {
        for_pixels(kernel, params, hidden_);
    }

    const FeedForwardMapsKernels& kernels_ = kernels_in_use<FeedForwardMapsKernels>();
    const FeedForwardWeights& w_;
    const Form form_;
    const DType dtype_;
    at::Tensor hidden_, upstream_;   // the expanded map, the gradient of what is projected
    at::Tensor first_, second_;      // the activated map, or its halves
    at::Tensor source_, convolved_;  // what is convolved, and the outcome
};

// The same network with whole vectors of hidden channels, of which those beside its own stay zero.
FeedForwardWeights padded_network(const FeedForwardWeights& w) {
    const auto pad = [](const OptionalTensor& values, int64_t halves) {
        return values.has_value() ? OptionalTensor(padded_halves(*values, halves)) : std::nullopt;
    };
    FeedForwardWeights out = w;
    out.expand = padded_halves(w.expand, w.form.halves());
    out.depthwise = padded_halves(w.depthwise, w.form.convolved_halves());
    out.project = padded_halves(w.project.transpose(0, 1), 1).transpose(0, 1);
    out.expand_bias = pad(w.expand_bias, w.form.halves());
    out.depthwise_bias = pad(w.depthwise_bias, w.form.convolved_halves());
    return out;
}

// The same for a gradient; nothing of one that is empty.
at::Tensor unpadded(const at::Tensor& gradient, int64_t size, int64_t halves) {
    return gradient.numel() == 0 ? gradient : unpadded_halves(gradient, size, halves);
}

FeedForwardGradients gradients_by_maps(const at::Tensor& grad, const at::Tensor& input, const FeedForwardWeights& w,
                                       const OptionalTensor& gate) {
    const int64_t hidden = w.hidden(), halves = w.form.halves(), convolved = w.form.convolved_halves();
    if (hidden == padded(hidden) || w.inner_weight.has_value()) {  // a norm counts its channels
        return Maps(grad, input, w, gate).gradients;
    }
    FeedForwardGradients g = Maps(grad, input, padded_network(w), gate).gradients;
    g.expand = unpadded(g.expand, hidden, halves);
    g.expand_bias = unpadded(g.expand_bias, hidden, halves);
    g.depthwise = unpadded(g.depthwise, hidden, convolved);
    g.depthwise_bias = unpadded(g.depthwise_bias, hidden, convolved);
    g.project = g.project.narrow(1, 0, hidden).contiguous();
    return g;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients feed_forward_layer_backward(const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& norm_weight_,
                                      const OptionalTensor& norm_bias_, const at::Tensor& expand_weight,
                                      const OptionalTensor& depthwise_weight, const at::Tensor& project_weight,
                                      std::string_view form, const OptionalTensor& expand_bias,
                                      const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                      const OptionalTensor& inner_weight, const OptionalTensor& inner_bias,
                                      const OptionalTensor& gate, double eps, bool centered, double inner_eps) {
    FeedForwardWeights w = weights_of_form(form, expand_weight, depthwise_weight, project_weight, expand_bias,
                                           depthwise_bias, project_bias, inner_weight, inner_bias, inner_eps);
    w.check(x_);
    check_tensor(grad_, "grad", x_.sizes(), x_);
    const at::Tensor grad = with_range(grad_), x = with_range(x_), norm_weight = wide(norm_weight_);
    const OptionalTensor norm_bias = wide(norm_bias_);
    w = {with_range(w.expand),
         with_range(w.depthwise),
         with_range(w.project),
         wide(expand_bias),
         wide(depthwise_bias),
         wide(project_bias),
         w.form,
         wide(inner_weight),
         wide(inner_bias),
         inner_eps};
    FeedForwardGradients g;
    if (w.form.tail == Tail::convolved || w.form.tail == Tail::activated_gate) {
        const LayerNorm norm(x, norm_weight, norm_bias, eps, centered);
        g = (w.form.convolves ? convolved_gradients : mlp_gradients)(grad, x, w, wide(gate), norm.params);
    } else {
        const at::Tensor input = layer_norm_2d(x, norm_weight, norm_bias, eps, centered);
        g = gradients_by_maps(channels_last(grad), input, w, wide(gate));
    }
    const auto [grad_x, grad_weight, grad_bias] = layer_norm_2d_backward(g.x, x, norm_weight, norm_bias, eps, centered);
    grad_x.add_(grad);
    return {grad_x,
            grad_weight,
            grad_bias,
            g.expand,
            depthwise_weight.has_value() ? g.depthwise : FeedForwardGradients::empty(),
            g.project,
            g.expand_bias,
            g.depthwise_bias,
            g.project_bias,
            g.inner_weight,
            g.inner_bias,
            g.gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) { m.impl("feed_forward_layer_backward", feed_forward_layer_backward); }

}  // namespace ipt_fast::cpu
