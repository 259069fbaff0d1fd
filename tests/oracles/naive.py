"""Every operator written a second time, from its formula alone, one scalar at a time.

Nothing here reshapes, rolls, pads or calls a matrix product: each value is found by its batch, head, channel and
pixel, so a misunderstanding of an axis order in the library cannot be repeated by accident. All arguments are numpy
float64 arrays (or anything numpy.asarray takes) and so are the results. Only for small tensors.

Conventions: x is (B, C, H, W), of tokens (B, N, D); channel c belongs to head c // d with d = C / heads; qkv holds q,
k, v along the channels, in that order; p is the window size, g the grid size.
"""

from math import erf, exp, sqrt

import numpy as np

NORM_CLAMP = 1e-12


def window_of(i, j, p):
    """((window row, window column), (row, column inside the window)) of pixel (i, j)."""
    return (i // p, j // p), (i % p, j % p)


def grid_of(i, j, height, width, g):
    """((row, column) inside the cubby: the group, (a, b): the cubby, that is the token) of pixel (i, j)."""
    cubby_height, cubby_width = -(-height // g), -(-width // g)
    return (i % cubby_height, j % cubby_width), (i // cubby_height, j // cubby_width)


def softmax(values):
    top = max(values)
    powers = [exp(value - top) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def gelu(value):
    return 0.5 * value * (1.0 + erf(value / sqrt(2.0)))


def layer_norm_2d(x, weight, bias=None, *, eps=1e-5, centered=True):
    """(x - mean) / sqrt(var + eps) * w + b over the channels of each pixel; not centered: x in the numerator."""
    x = np.asarray(x, dtype=np.float64)
    batch, channels, height, width = x.shape
    out = np.zeros_like(x)
    for n in range(batch):
        for i in range(height):
            for j in range(width):
                pixel = [float(x[n, c, i, j]) for c in range(channels)]
                mean = sum(pixel) / channels
                variance = sum((value - mean) ** 2 for value in pixel) / channels
                for c in range(channels):
                    numerator = pixel[c] - mean if centered else pixel[c]
                    out[n, c, i, j] = numerator / sqrt(variance + eps) * float(weight[c])
                    if bias is not None:
                        out[n, c, i, j] += float(bias[c])
    return out


def _token_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(var + eps) * w + b over the channels of each token of (B, N, D); x where there is no weight."""
    if weight is None:
        return x
    as_map = np.moveaxis(x, 2, 1)[..., None]
    return np.moveaxis(layer_norm_2d(as_map, weight, bias, eps=eps)[..., 0], 1, 2)


def _linear(x, weight, bias=None):
    """out[n, i, o] = sum over d of weight[o, d] x[n, i, d] (+ bias[o])."""
    batch, tokens, dim = x.shape
    out = np.zeros((batch, tokens, len(weight)))
    for n, i, o in np.ndindex(*out.shape):
        out[n, i, o] = sum(float(weight[o][d]) * float(x[n, i, d]) for d in range(dim))
        if bias is not None:
            out[n, i, o] += float(bias[o])
    return out


def norm_projection(x, norm_weight, norm_bias, weight, offset=None, *, eps=1e-5):
    """A linear layer of normalised tokens; channel c of token i gets offset[i, c] as far as there are such channels."""
    out = _linear(_token_norm(np.asarray(x, dtype=np.float64), norm_weight, norm_bias, eps), weight)
    if offset is not None:
        for n in range(len(out)):
            for i in range(len(offset)):
                for c in range(len(offset[i])):
                    out[n, i, c] += float(offset[i][c])
    return out


def add_norm_projection(x, branch, norm_weight, norm_bias, weight, offset=None, *, eps=1e-5):
    """The sum of the residual stream and a branch, and the normalised and projected sum."""
    total = np.asarray(x, dtype=np.float64) + np.asarray(branch, dtype=np.float64)
    return total, norm_projection(total, norm_weight, norm_bias, weight, offset, eps=eps)


def add_norm_feed_forward(x, branch, norm_weight, norm_bias, weight1, bias1, weight2, bias2, *, eps=1e-5):
    """The sum of the residual stream and a branch, plus a network with ReLU of the normalised sum."""
    total = np.asarray(x, dtype=np.float64) + np.asarray(branch, dtype=np.float64)
    hidden = _linear(_token_norm(total, norm_weight, norm_bias, eps), weight1, bias1)
    for index in np.ndindex(*hidden.shape):
        hidden[index] = max(float(hidden[index]), 0.0)
    return total + _linear(hidden, weight2, bias2)


def _attend_channels(q, k, v, scale):
    """softmax(scale * q^ k^T) v for one window and head; q, k, v are lists [channel][pixel]; q^, k^ have unit rows."""

    def normalised(rows):
        result = []
        for row in rows:
            norm = max(sqrt(sum(value * value for value in row)), NORM_CLAMP)
            result.append([value / norm for value in row])
        return result

    q, k = normalised(q), normalised(k)
    out = []
    for q_row in q:
        attention = softmax([scale * sum(a * b for a, b in zip(q_row, k_row, strict=True)) for k_row in k])
        out.append([sum(attention[c] * v[c][u] for c in range(len(v))) for u in range(len(q_row))])
    return out


def channel_attention(q, k, v, temperature, *, num_heads, window_size=None):
    """softmax(temperature * q^ k^T) v between the channels of a head, over the whole map or in each window.

    A window at the border simply has fewer pixels, which is what zero padding amounts to.
    """
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    temperature = np.asarray(temperature, dtype=np.float64).ravel()
    batch, channels, height, width = q.shape
    d = channels // num_heads
    p = window_size or max(height, width)
    windows = {}
    for i in range(height):
        for j in range(width):
            windows.setdefault(window_of(i, j, p)[0], []).append((i, j))
    out = np.zeros_like(v)
    for n in range(batch):
        for head in range(num_heads):
            block = range(head * d, (head + 1) * d)
            for pixels in windows.values():
                rows = [[[float(t[n, c, i, j]) for i, j in pixels] for c in block] for t in (q, k, v)]
                result = _attend_channels(*rows, float(temperature[head]))
                for c, row in zip(block, result, strict=True):
                    for (i, j), value in zip(pixels, row, strict=True):
                        out[n, c, i, j] = value
    return out


def focal_channel_attention(qkv, temperature, token_weight, top_weight, bottom_weight, *, num_heads, window_size):
    """FCSA: windows of the map, windows of the map shifted by p // 2, and their weighted sum.

    The map is padded with zeros at the right and bottom to (Hp, Wp), multiples of p. Pixel (i, j) of the shifted map
    is pixel ((i + s) mod Hp, (j + s) mod Wp) of the padded one. token_weight is taken at the position inside the
    window that is being attended (shifted or not), the other two at the position in the unshifted window.
    """
    qkv = np.asarray(qkv, dtype=np.float64)
    temperature = np.asarray(temperature, dtype=np.float64).ravel()
    batch, channels3, height, width = qkv.shape
    channels = channels3 // 3
    d, p = channels // num_heads, window_size
    padded_height, padded_width = -(-height // p) * p, -(-width // p) * p

    def value_at(n, c, i, j):
        return float(qkv[n, c, i, j]) if i < height and j < width else 0.0

    def branch(shift):
        result = np.zeros((batch, channels, padded_height, padded_width))
        for n in range(batch):
            for head in range(num_heads):
                for top in range(0, padded_height, p):
                    for left in range(0, padded_width, p):
                        places = [(u, w) for u in range(p) for w in range(p)]
                        sources = [
                            ((top + u + shift) % padded_height, (left + w + shift) % padded_width) for u, w in places
                        ]
                        focus = [float(token_weight[head][u][w]) for u, w in places]
                        block = range(head * d, (head + 1) * d)
                        q = [[f * value_at(n, c, *s) for f, s in zip(focus, sources, strict=True)] for c in block]
                        k = [
                            [f * value_at(n, channels + c, *s) for f, s in zip(focus, sources, strict=True)]
                            for c in block
                        ]
                        v = [[value_at(n, 2 * channels + c, *s) for s in sources] for c in block]
                        attended = _attend_channels(q, k, v, 1.0 / float(temperature[head]))
                        for c, row in zip(block, attended, strict=True):
                            for (i, j), value in zip(sources, row, strict=True):
                                result[n, c, i, j] = value
        return result

    plain, shifted = branch(0), branch(p // 2)
    out = np.zeros((batch, channels, height, width))
    for n in range(batch):
        for c in range(channels):
            head = c // d
            for i in range(height):
                for j in range(width):
                    _, (u, w) = window_of(i, j, p)
                    out[n, c, i, j] = (
                        float(top_weight[head][u][w]) * plain[n, c, i, j]
                        + float(bottom_weight[head][u][w]) * shifted[n, c, i, j]
                    )
    return out


def grid_attention(qkv, bias_table=None, *, num_heads, grid_size):
    """GGSA: softmax(q k^T / sqrt(d) + B) v among the pixels at one position inside the g x g cubbies.

    Only pixels that exist take part: a padded token is never a key and its query is dropped.
    """
    qkv = np.asarray(qkv, dtype=np.float64)
    batch, channels3, height, width = qkv.shape
    channels, g = channels3 // 3, grid_size
    d = channels // num_heads
    groups = {}
    for i in range(height):
        for j in range(width):
            group, cubby = grid_of(i, j, height, width, g)
            groups.setdefault(group, []).append((i, j, *cubby))
    out = np.zeros((batch, channels, height, width))
    for n in range(batch):
        for head in range(num_heads):
            block = range(head * d, (head + 1) * d)
            for tokens in groups.values():
                for qi, qj, qa, qb in tokens:
                    scores = []
                    for ki, kj, ka, kb in tokens:
                        score = sum(float(qkv[n, c, qi, qj]) * float(qkv[n, channels + c, ki, kj]) for c in block)
                        score /= sqrt(d)
                        if bias_table is not None:
                            score += float(bias_table[(qa - ka + g - 1) * (2 * g - 1) + (qb - kb + g - 1)][head])
                        scores.append(score)
                    attention = softmax(scores)
                    for c in block:
                        out[n, c, qi, qj] = sum(
                            weight * float(qkv[n, 2 * channels + c, ki, kj])
                            for weight, (ki, kj, _, _) in zip(attention, tokens, strict=True)
                        )
    return out


def pointwise(x, weight):
    """1 x 1 convolution without bias; weight is (out, in, 1, 1)."""
    batch, channels, height, width = x.shape
    out = np.zeros((batch, len(weight), height, width))
    for n in range(batch):
        for o in range(len(weight)):
            for i in range(height):
                for j in range(width):
                    out[n, o, i, j] = sum(float(weight[o][c][0][0]) * float(x[n, c, i, j]) for c in range(channels))
    return out


def depthwise(x, weight):
    """Depthwise convolution (cross-correlation) with zero padding; weight is (C, 1, k, k), k odd."""
    batch, channels, height, width = x.shape
    k = len(weight[0][0])
    out = np.zeros_like(x)
    for n in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    total = 0.0
                    for a in range(k):
                        for b in range(k):
                            y, z = i + a - k // 2, j + b - k // 2
                            if 0 <= y < height and 0 <= z < width:
                                total += float(weight[c][0][a][b]) * float(x[n, c, y, z])
                    out[n, c, i, j] = total
    return out


def leffn(x, expand_weight, depthwise_weight, project_weight):
    """PW(DW(GELU(PW(x)))) with the exact GELU and no bias."""
    hidden = pointwise(np.asarray(x, dtype=np.float64), expand_weight)
    for index in np.ndindex(*hidden.shape):
        hidden[index] = gelu(float(hidden[index]))
    return pointwise(depthwise(hidden, depthwise_weight), project_weight)


def merge_pointwise(first, second):
    """The single pointwise kernel of second(first(x)): out[o, c] = sum over m of second[o, m] first[m, c]."""
    out = np.zeros((len(second), len(first[0]), 1, 1))
    for o in range(len(second)):
        for c in range(len(first[0])):
            out[o, c, 0, 0] = sum(float(second[o][m][0][0]) * float(first[m][c][0][0]) for m in range(len(first)))
    return out


def merge_depthwise(k5, k3, k1, identity=True):
    """The single depthwise kernel of DW5(x) + DW3(x) + DW1(x) (+ x): tap by tap, by its offset from the centre."""
    size = len(k5[0][0])
    half = size // 2
    out = np.zeros((len(k5), 1, size, size))
    for c in range(len(k5)):
        for dy in range(-half, half + 1):
            for dx in range(-half, half + 1):
                tap = float(k5[c][0][half + dy][half + dx])
                if abs(dy) <= 1 and abs(dx) <= 1:
                    tap += float(k3[c][0][1 + dy][1 + dx])
                if dy == 0 and dx == 0:
                    tap += float(k1[c][0][0][0]) + (1.0 if identity else 0.0)
                out[c, 0, half + dy, half + dx] = tap
    return out
