"""IPT from the paper's equations and the published weights' names, patch by patch and head by head."""

import torch
import torch.nn.functional as F


def _norm(state, prefix, x):
    if f"{prefix}.weight" not in state:
        return x
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[f"{prefix}.weight"] + state[f"{prefix}.bias"]


def _attention(state, prefix, query, key, value, heads):
    q_weight, k_weight, v_weight = state[f"{prefix}.in_proj_weight"].chunk(3)
    q, k, v = query @ q_weight.T, key @ k_weight.T, value @ v_weight.T
    depth, parts = q.shape[1] // heads, []
    for head in range(heads):
        own = slice(head * depth, (head + 1) * depth)
        scores = q[:, own] @ k[:, own].T / depth**0.5
        weights = (scores - scores.max(1, keepdim=True).values).exp()
        weights = weights / weights.sum(1, keepdim=True)
        parts.append(weights @ v[:, own])
    return torch.cat(parts, 1) @ state[f"{prefix}.out_proj.weight"].T


def _feed_forward(state, prefix, x):
    hidden = x @ state[f"{prefix}.linear1.weight"].T + state[f"{prefix}.linear1.bias"]
    return hidden.clamp(min=0) @ state[f"{prefix}.linear2.weight"].T + state[f"{prefix}.linear2.bias"]


def body(state, config, maps, task):
    """(C, S, S) -> patch features (N, D), of one image."""
    side, size = config.image_size // config.patch_size, config.patch_size
    patches = [
        maps[:, y * size : (y + 1) * size, x * size : (x + 1) * size].flatten()
        for y in range(side)
        for x in range(side)
    ]
    x = torch.stack(patches)
    if not config.no_mlp:
        x = x @ state["body.linear_encoding.weight"].T + state["body.linear_encoding.bias"] + x
    nothing = torch.zeros(())
    positions = nothing if config.no_pos else state["body.position_encoding.pe.weight"]
    once, every = (nothing, positions) if config.pos_every else (positions, nothing)
    embedding = state.get("body.query_embed.weight")
    embedding = nothing if embedding is None else embedding[task].view(x.shape)
    x = x + once
    for i in range(config.layers):
        layer = f"body.encoder.layers.{i}"
        y = _norm(state, f"{layer}.norm1", x)
        x = x + _attention(state, f"{layer}.self_attn", y + every, y + every, y, config.heads)
        x = x + _feed_forward(state, layer, _norm(state, f"{layer}.norm2", x))
    memory = x
    for i in range(config.layers):
        layer = f"body.decoder.layers.{i}"
        y = _norm(state, f"{layer}.norm1", x)
        x = x + _attention(state, f"{layer}.self_attn", y + embedding, y + embedding, y, config.heads)
        y = _norm(state, f"{layer}.norm2", x) + embedding
        x = x + _attention(state, f"{layer}.multihead_attn", y, memory + every, memory, config.heads)
        x = x + _feed_forward(state, layer, _norm(state, f"{layer}.norm3", x))
    if config.no_mlp:
        return x
    hidden = (x @ state["body.mlp_head.0.weight"].T + state["body.mlp_head.0.bias"]).clamp(min=0)
    return hidden @ state["body.mlp_head.3.weight"].T + state["body.mlp_head.3.bias"] + x


def forward(state, config, image, task):
    """(3, S, S) -> (3, s S, s S), of one image."""

    def convolve(prefix, x):
        weight = state[f"{prefix}.weight"]
        return F.conv2d(x[None], weight, state[f"{prefix}.bias"], padding=weight.shape[-1] // 2)[0]

    maps = convolve(f"head.{task}.0", convolve("sub_mean", image))
    for block in (1, 2):
        name = f"head.{task}.{block}.body"
        maps = maps + convolve(f"{name}.2", convolve(f"{name}.0", maps).clamp(min=0))
    features = body(state, config, maps, task)
    side, size = config.image_size // config.patch_size, config.patch_size
    result = maps.clone()
    for i, patch in enumerate(features):
        y, x = i // side * size, i % side * size
        result[:, y : y + size, x : x + size] += patch.view(-1, size, size)
    for stage in (0, 2):
        if f"tail.{task}.0.{stage}.weight" in state:
            result = convolve(f"tail.{task}.0.{stage}", result)
            factor = int((result.shape[0] // config.features) ** 0.5)
            result = F.pixel_shuffle(result, factor)
    return convolve("add_mean", convolve(f"tail.{task}.1", result))
