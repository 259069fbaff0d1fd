// The maps of feed_forward_maps_kernel.h at the level it is compiled for. Bound by memory: every map is read and
// written once.
#include "feed_forward_maps_kernel.h"

#include "gelu.h"

namespace ipt_fast::cpu {
namespace {

template <typename T>
T* at(const Channels& map, int64_t pixel, int64_t channel) {
    return static_cast<T*>(map.data) + pixel * map.stride + channel;
}

// body(pixel, first channel, count) for every vector of the pixels begin <= k < end.
template <typename Body>
inline __attribute__((always_inline)) void for_values(int64_t channels, int64_t begin, int64_t end, const Body& body) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
        for_vectors(channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) { body(pixel, c, n); });
    }
}

template <typename T>
void activate(const ActivationParams& p, int64_t begin, int64_t end) {
    for_values(p.channels, begin, end, [&](int64_t i, int64_t c, int64_t n) __attribute__((always_inline)) {
        store(at<T>(p.out, i, c), gelu(load(at<T>(p.hidden, i, c), n)), n);
    });
}

template <typename T>
void slope(const ActivationParams& p, int64_t begin, int64_t end) {
    for_values(p.channels, begin, end, [&](int64_t i, int64_t c, int64_t n) __attribute__((always_inline)) {
        Vec grad = load(at<T>(p.grad, i, c), n), value, slope;
        if (p.other.data != nullptr) {
            grad += load(at<T>(p.other, i, c), n);
        }
        gelu_with_slope(load(at<T>(p.hidden, i, c), n), value, slope);
        store(at<T>(p.out, i, c), grad * slope, n);
    });
}

template <typename T>
void tail(const TailParams& p, int64_t begin, int64_t end) {
    for_values(p.channels, begin, end, [&](int64_t i, int64_t c, int64_t n) __attribute__((always_inline)) {
        T *const first = at<T>(p.first, i, c), *const convolved = at<T>(p.convolved, i, c);
        T *const upstream = at<T>(p.upstream, i, c), *const projected = at<T>(p.projected, i, c);
        const Vec sum = load(convolved, n), grad = load(upstream, n);
        Vec value, slope;
        switch (p.tail) {
            case Tail::activated:
                gelu_with_slope(sum, value, slope);
                return store(projected, value, n), store(convolved, grad * slope, n);
            case Tail::added:
                gelu_with_slope(sum, value, slope);
                return store(projected, load(first, n) + value, n), store(convolved, grad * slope, n);
            case Tail::gate:
                value = load(first, n);
                store(projected, value * sum, n);
                return store(convolved, grad * value, n), store(upstream, grad * sum, n);
            default:  // those of feed_forward_backward_kernel.h
                __builtin_unreachable();
        }
    });
}

void activate_any(const ActivationParams& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) { activate<decltype(type)>(p, begin, end); });
}

void slope_any(const ActivationParams& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) { slope<decltype(type)>(p, begin, end); });
}

void tail_any(const TailParams& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) { tail<decltype(type)>(p, begin, end); });
}

}  // namespace

constinit const FeedForwardMapsKernels FeedForwardMapsKernels::IPT_FAST_LEVEL = {cpu::activate_any, cpu::slope_any,
                                                                                 cpu::tail_any};

}  // namespace ipt_fast::cpu
