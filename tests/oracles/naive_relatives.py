"""The operators of IPT-V2's relatives a second time, from their formulas alone, one scalar at a time: as naive.py.

Windows of an axis begin at the shift: pixel i of it is pixel (i - shift) mod w of window number floor((i - shift) / w).
A pair is (rows, columns).
"""

from math import sqrt

import numpy as np

from tests.oracles.naive import NORM_CLAMP, _attend_channels, depthwise, gelu, layer_norm_2d, pointwise, softmax


def dense_convolution(x, weight, bias, activation):
    """3 x 3 convolution (cross-correlation) with zero padding; weight is (out, in, 3, 3), bias may be None."""
    x, weight = (np.asarray(t, dtype=np.float64) for t in (x, weight))
    batch, channels, height, width = x.shape
    out = np.zeros((batch, len(weight), height, width))
    for n, o, i, j in np.ndindex(out.shape):
        total = 0.0 if bias is None else float(bias[o])
        for c, a, b in np.ndindex(channels, 3, 3):
            y, z = i + a - 1, j + b - 1
            if 0 <= y < height and 0 <= z < width:
                total += float(weight[o, c, a, b]) * float(x[n, c, y, z])
        out[n, o, i, j] = gelu(total) if activation == "gelu" else total
    return out


def window_attention(
    q, k, v, bias=None, temperature=None, *, num_heads, window_size, key_size=None, shift=(0, 0), scale=None
):
    """softmax(scale q kᵀ + B) v, or softmax(temperature q̂ k̂ᵀ + B) v, one query at a time.

    A window of keys has the same middle as its window of queries. Where it is larger, keys and values beyond the border
    are zeros; where it is as large, there are none beyond the border.
    """
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    batch, channels, height, width = q.shape
    reduction = height // k.shape[2]
    d, (wh, ww) = channels // num_heads, window_size
    kh, kw = key_size or (wh // reduction, ww // reduction)
    margin_y, margin_x = (kh - wh // reduction) // 2, (kw - ww // reduction) // 2
    overlaps = margin_y > 0 or margin_x > 0
    out = np.zeros_like(q)

    def unit(row):
        norm = max(sqrt(sum(value * value for value in row)), NORM_CLAMP)
        return [value / norm for value in row]

    def keys_of(i, j):
        """((row, column) in the window of keys, (row, column) in the map of keys) of all keys of a query."""
        top = (i - shift[0]) // wh * wh + shift[0]
        left = (j - shift[1]) // ww * ww + shift[1]
        for c in range(kh):
            for e in range(kw):
                y, x = top // reduction - margin_y + c, left // reduction - margin_x + e
                if overlaps or (0 <= y < k.shape[2] and 0 <= x < k.shape[3]):
                    yield (c, e), (y, x)

    def row_of(t, n, head, y, x):
        inside = 0 <= y < t.shape[2] and 0 <= x < t.shape[3]
        return [float(t[n, head * d + c, y, x]) if inside else 0.0 for c in range(d)]

    for n in range(batch):
        for head in range(num_heads):
            for i in range(height):
                for j in range(width):
                    a, b = (i - shift[0]) % wh, (j - shift[1]) % ww
                    query, scores, values = row_of(q, n, head, i, j), [], []
                    for (c, e), place in keys_of(i, j):
                        key = row_of(k, n, head, *place)
                        if temperature is None:
                            factor = 1 / sqrt(d) if scale is None else scale
                            score = factor * sum(x * y for x, y in zip(query, key, strict=True))
                        else:
                            score = float(np.ravel(temperature)[head])
                            score *= sum(x * y for x, y in zip(unit(query), unit(key), strict=True))
                        if bias is not None and np.ndim(bias) == 3:
                            score += float(bias[head][a * ww + b][c * kw + e])
                        elif bias is not None:
                            row = (a - c + kh - 1) * (ww + kw - 1) + (b - e + kw - 1)
                            score += float(bias[row][head])
                        scores.append(score)
                        values.append(row_of(v, n, head, *place))
                    attention = softmax(scores)
                    for c in range(d):
                        out[n, head * d + c, i, j] = sum(w * x[c] for w, x in zip(attention, values, strict=True))
    return out


def _starts(size, window):
    """Where windows that are spread evenly over an axis begin: as few as cover it, the last one ends with it."""
    if size <= window:
        return [0]
    count = -(-size // window)
    step = -(-(size - window) // (count - 1))
    return [min(number * step, size - window) for number in range(count)]


def _groups(height, width, window_size, dilation, overlapping):
    """Lists of pixels, each of which attends for itself."""
    pixels = [(i, j) for i in range(height) for j in range(width)]
    if overlapping:
        for top in _starts(height, window_size[0]):
            for left in _starts(width, window_size[1]):
                bottom, right = top + window_size[0], left + window_size[1]
                yield [(i, j) for i, j in pixels if top <= i < bottom and left <= j < right]
        return
    found = {}
    for i, j in pixels:
        if dilation is not None:
            group = (i % dilation, j % dilation)
        else:
            group = None if window_size is None else (i // window_size[0], j // window_size[1])
        found.setdefault(group, []).append((i, j))
    yield from found.values()


def channel_attention(q, k, v, temperature, *, num_heads, window_size=None, dilation=None, overlapping=False):
    """softmax(temperature q̂ k̂ᵀ) v in groups of pixels; the mean of its results at a pixel of several groups."""
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    batch, channels, height, width = q.shape
    d = channels // num_heads
    out, count = np.zeros_like(v), np.zeros((height, width))
    for pixels in _groups(height, width, window_size, dilation, overlapping):
        for i, j in pixels:
            count[i, j] += 1
        for n in range(batch):
            for head in range(num_heads):
                block = range(head * d, (head + 1) * d)
                rows = [[[float(t[n, c, i, j]) for i, j in pixels] for c in block] for t in (q, k, v)]
                result = _attend_channels(*rows, float(np.ravel(temperature)[head]))
                for c, row in zip(block, result, strict=True):
                    for (i, j), value in zip(pixels, row, strict=True):
                        out[n, c, i, j] += value
    for n, c, i, j in np.ndindex(*out.shape):
        out[n, c, i, j] /= count[i, j]
    return out


def _plus(x, bias):
    """x + bias, one of each channel, or x without one."""
    out = np.array(x, dtype=np.float64)
    if bias is not None:
        for n, c, i, j in np.ndindex(*out.shape):
            out[n, c, i, j] += float(bias[c])
    return out


def _norm(x, weight, bias, eps, centered=True):
    """Of parameters (C,), or (B, C) of each image."""
    x = np.asarray(x, dtype=np.float64)
    images = []
    for n in range(len(x)):
        of_image = [p[n] if p is not None and np.ndim(p) == 2 else p for p in (weight, bias)]
        images.append(layer_norm_2d(x[n : n + 1], *of_image, eps=eps, centered=centered))
    return np.concatenate(images)


def _residual(x, branch, gate, residual=True):
    """x + gate * branch; the gate is (C,), or (B, C) of each image, or 1."""
    out = np.zeros_like(branch)
    for n, c, i, j in np.ndindex(*out.shape):
        factor = 1.0 if gate is None else float(gate[n][c] if np.ndim(gate) == 2 else gate[c])
        out[n, c, i, j] = factor * branch[n, c, i, j] + (float(x[n, c, i, j]) if residual else 0.0)
    return out


def _halves(x):
    """Of the channels of a map."""
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def window_attention_layer(
    x, norm_weight, norm_bias, qkv_weight, project_weight, bias=None, *, qkv_bias=None, project_bias=None, gate=None,
    eps=1e-5, centered=True, residual=True, **attention,
):  # fmt: skip
    """x + gate * PW(attention(PW(norm(x))))."""
    qkv = _plus(pointwise(_norm(x, norm_weight, norm_bias, eps, centered), qkv_weight), qkv_bias)
    c = len(project_weight)
    branch = window_attention(qkv[:, :c], qkv[:, c : 2 * c], qkv[:, 2 * c :], bias, **attention)
    return _residual(x, _plus(pointwise(branch, project_weight), project_bias), gate, residual)


def channel_attention_layer(
    x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, temperature, *, qkv_bias=None,
    depthwise_bias=None, project_bias=None, gate=None, eps=1e-5, centered=True, residual=True, **attention,
):  # fmt: skip
    """x + gate * PW(attention(DW(PW(norm(x))))), without DW where it has no weight."""
    qkv = _plus(pointwise(_norm(x, norm_weight, norm_bias, eps, centered), qkv_weight), qkv_bias)
    if depthwise_weight is not None:
        qkv = _plus(depthwise(qkv, depthwise_weight), depthwise_bias)
    c = len(project_weight)
    branch = channel_attention(qkv[:, :c], qkv[:, c : 2 * c], qkv[:, 2 * c :], temperature, **attention)
    return _residual(x, _plus(pointwise(branch, project_weight), project_bias), gate, residual)


def depthwise_layer(
    x, weight, bias=None, *, norm_weight=None, norm_bias=None, activation="gelu", eps=1e-5, centered=True
):  # fmt: skip
    """GELU(DW(norm(x))), the norm and the GELU where they are wanted."""
    y = x if norm_weight is None else _norm(x, norm_weight, norm_bias, eps, centered)
    y = _plus(depthwise(y, weight), bias)
    return _gelu(y) if activation == "gelu" else y


def pointwise_layer(
    x, weight, bias=None, residual=None, *, norm_weight=None, norm_bias=None, activation="none", eps=1e-5, centered=True
):  # fmt: skip
    """residual + GELU(PW(norm(x))), each where it is wanted."""
    y = x if norm_weight is None else _norm(x, norm_weight, norm_bias, eps, centered)
    y = _plus(pointwise(y, weight), bias)
    y = _gelu(y) if activation == "gelu" else y
    return y if residual is None else _residual(residual, y, None)


def gated_projection(x, other, channel_gate, pixel_gate, weight, bias=None, residual=None):
    """residual + PW(channel gate * x + pixel gate * other); the channel gate is (C,), or (B, C) of each image."""
    mixed = np.zeros(np.shape(x))
    for n, c, i, j in np.ndindex(*mixed.shape):
        of_channel = channel_gate[n][c] if np.ndim(channel_gate) == 2 else channel_gate[c]
        mixed[n, c, i, j] = float(of_channel) * float(x[n, c, i, j])
        mixed[n, c, i, j] += float(pixel_gate[n, 0, i, j]) * float(other[n, c, i, j])
    y = _plus(pointwise(mixed, weight), bias)
    return y if residual is None else _residual(residual, y, None)


def _gelu(x):
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        out[index] = gelu(float(x[index]))
    return out


def feed_forward_layer(
    x, norm_weight, norm_bias, expand_weight, depthwise_weight, project_weight, *, form, expand_bias=None,
    depthwise_bias=None, project_bias=None, inner_weight=None, inner_bias=None, gate=None, eps=1e-5, centered=True,
    inner_eps=1e-5,
):  # fmt: skip
    """x + gate * PW(form(PW(norm(x)))); the papers' forms."""

    def convolved(t):
        return _plus(depthwise(t, depthwise_weight), depthwise_bias)

    h = _plus(pointwise(_norm(x, norm_weight, norm_bias, eps, centered), expand_weight), expand_bias)
    if form == "mlp":  # Swin: Linear, GELU, Linear
        h = _gelu(h)
    elif form == "leffn":  # IPT-V2: PW, GELU, DW, PW
        h = convolved(_gelu(h))
    elif form == "leff":  # Uformer: Linear, GELU, DW, GELU, Linear
        h = _gelu(convolved(_gelu(h)))
    elif form == "mix":  # SegFormer: Linear, DW, GELU, Linear
        h = _gelu(convolved(h))
    elif form == "conv_ffn":  # SRFormer: Linear, GELU, x + GELU(DW(x)), Linear
        h = _gelu(h)
        h = h + _gelu(convolved(h))
    elif form == "gdfn":  # Restormer: PW, DW, halves, GELU of the first times the second, PW
        first, second = _halves(convolved(h))
        h = _gelu(first) * second
    elif form == "sgfn":  # DAT: Linear, GELU, halves, the first times DW of the norm of the second, Linear
        first, second = _halves(_gelu(h))
        h = first * convolved(_norm(second, inner_weight, inner_bias, inner_eps))
    else:
        raise ValueError(form)
    return _residual(x, _plus(pointwise(h, project_weight), project_bias), gate)
