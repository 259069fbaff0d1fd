"""Latent IPT-V2: its figures, its start, an independent composition, forms, sizes, and what runs fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from ipt_fast import reference
from ipt_fast.models import open_checkpoint, open_model
from ipt_fast.modules._layer import Modulation
from ipt_fast.training.parallel import checkpoint_activations, transformer_layers
from tests.models.generators import conditions, randomised

TINY = {
    "width": 4,
    "depths": (2, 2, 2),
    "heads": (1, 2, 2),
    "window_size": 4,
    "grid_size": 3,
    "sample_size": 16,
    "num_classes": 5,
}


def tiny(**config):
    return randomised(ipt_fast.create_model("latent_ipt_v2_s", **TINY | config)).eval()


def assert_close(value, expected, tolerance=2e-5):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


def macs(model):
    with FlopCounterMode(display=False) as counter:
        model(*conditions(model, batch=1))
    return counter.get_total_flops() / 2


def test_macs_and_parameters():
    """Table 6: 6.24 G at 1 x 4 x 32 x 32; merged, attention included."""
    with torch.device("meta"):
        model = ipt_fast.create_model("latent_ipt_v2_s", merged=True)
        assert abs(macs(model) / 6.24e9 - 1) < 0.02
        assert round(macs(model) / 1e9, 2) == 6.36
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 41.3
        training = ipt_fast.create_model("latent_ipt_v2_s")
    assert round(sum(p.numel() for p in training.parameters()) / 1e6, 1) == 65.1
    training.reparameterize()
    assert {name: p.shape for name, p in training.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_config_of_the_preset():
    config = ipt_fast.create_model("latent_ipt_v2_s", width=12).config
    assert config.attention == "released"
    assert [config.window_on(level) for level in range(3)] == [config.grid_on(level) for level in range(3)] == [8] * 3
    widths = [(96 << level) // heads for level, heads in enumerate(config.heads)]
    assert widths == [32, 32, 32]


@pytest.mark.parametrize(
    ("size", "windows", "grids"), [(8, [8, 4, 2], [8, 4, 2]), (12, [8, 6, 4], [8, 6, 3]), (64, [8] * 3, [8] * 3)]
)
def test_windows_and_grids_fit_their_maps(size, windows, grids):
    model = tiny(sample_size=size, window_size=8, grid_size=8)
    config = model.config
    assert [config.window_on(level) for level in range(3)] == windows
    assert [config.grid_on(level) for level in range(3)] == grids
    assert model.latent[1].attention.window_size == windows[2] and model.decoder[0][0].attention.grid_size == grids[0]
    assert model(*conditions(model)).shape == (2, 8, size, size)


def test_a_new_model_returns_zeros_and_every_layer_starts_as_nothing():
    model = ipt_fast.create_model("latent_ipt_v2_s", **TINY)
    assert not model(*conditions(model)).any()
    torch.nn.init.normal_(model.final.output.weight)
    inputs = conditions(model)
    out = model(*inputs)
    for layer in (*model.encoder, model.latent, *model.decoder):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    assert torch.equal(model(*inputs), out)


def test_it_learns_and_every_parameter_gets_a_gradient():
    model = ipt_fast.create_model("latent_ipt_v2_s", **TINY)
    inputs = conditions(model, batch=4)
    target = inputs[0].repeat(1, 2, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        loss = (model(*inputs) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    # Whose map is one window: there is no second branch to merge with.
    unused = {"latent.1.attention.top_weight", "latent.1.attention.bottom_weight"}
    assert {name for name, parameter in model.named_parameters() if not parameter.grad.any()} == unused


# -- what it computes ---------------------------------------------------------------------------------------------


def layer_of(state, x, prefix, heads, size, modulation):
    """A layer in the paper's terms, from the state dict of a merged model."""

    def of(name):
        return {kind: state[f"{prefix}{name}.{kind}"] for kind in ("weight", "bias")}

    def normed(x, shift, scale):
        y = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-6).movedim(-1, 1)
        return y * (1 + scale)[..., None, None] + shift[..., None, None]

    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    qkv = F.conv2d(normed(x, shift1, scale1), **of("attention.qkv"))
    if f"{prefix}attention.bias_table" in state:
        table = state[f"{prefix}attention.bias_table"]
        attended = reference.grid_attention(qkv, table, num_heads=heads, grid_size=size)
    else:
        qkv = F.conv2d(qkv, **of("attention.depthwise"), padding=1, groups=qkv.shape[1])
        attended = released(state, qkv, prefix, heads, size)
    x = x + gate1[..., None, None] * F.conv2d(attended, **of("attention.project"))
    hidden = F.gelu(F.conv2d(normed(x, shift2, scale2), **of("ffn.expand")))
    hidden = F.conv2d(hidden, **of("ffn.depthwise"), padding=2, groups=hidden.shape[1])
    return x + gate2[..., None, None] * F.conv2d(hidden, **of("ffn.project"))


def released(state, qkv, prefix, heads, p):
    """The released reading, window by window: (m1 F1 + m2 F2) / (m1 + m2), m2 = 0 where there is no second branch."""
    temperature, token, m1, m2 = (
        state[f"{prefix}attention.{name}"] for name in ("temperature", "token_weight", "top_weight", "bottom_weight")
    )
    batch, channels, height, width = qkv.shape
    channels //= 3
    sums, weights = torch.zeros(2, batch, heads, channels // heads, height, width, dtype=qkv.dtype)
    for branch, (start, m) in enumerate(((0, m1), (p // 2, m2))):
        for top in range(start, height - p + 1, p):
            for left in range(start, width - p + 1, p):
                window = qkv[..., top : top + p, left : left + p].reshape(batch, 3, heads, -1, p * p)
                q, k, v = window.unbind(1)
                q, k = (F.normalize(t * token[branch].reshape(heads, 1, -1), dim=-1) for t in (q, k))
                scores = q @ k.transpose(-1, -2) * temperature[branch][:, None, None]
                out = (scores.softmax(-1) @ v).unflatten(-1, (p, p)) * m[:, None]
                sums[..., top : top + p, left : left + p] += out
                weights[..., top : top + p, left : left + p] += m[:, None]
    return (sums / weights).flatten(1, 2)


def test_the_skeleton():
    """The whole model by an independent composition, in float64."""
    model = tiny(merged=True).double()
    with torch.no_grad():
        for parameter in model.parameters():  # weights of merging stay away from sums of zero
            parameter.copy_(parameter.abs() + 0.1 if parameter.shape[-1] == 4 and parameter.dim() >= 3 else parameter)
    state, (latents, timestep, labels) = model.state_dict(), conditions(model)
    latents = latents.double()
    half = torch.arange(128, dtype=torch.float64)
    angles = timestep[:, None].double() * 10000 ** (-half / 128)
    features = torch.cat([angles.cos(), angles.sin()], dim=1)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(x, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    vectors, rows = [], []
    for i in range(3):
        hidden = F.silu(linear(features, f"conditions.{i}.t_embedder.mlp.0"))
        vector = linear(hidden, f"conditions.{i}.t_embedder.mlp.2")
        vector = vector + state[f"conditions.{i}.y_embedder.embedding_table.weight"][labels]
        vectors.append(F.silu(vector))
        rows.append(list(linear(vectors[-1], f"modulations.{i}.linear").split(6 * 4 << i, dim=1)))

    def stage(x, name, level, heads):
        for i in range(2):
            size = 3 if i == 0 else 4
            x = layer_of(state, x, f"{name}.{i}.", heads, size, rows[level].pop(0))
        return x

    first = stage(conv(latents, "embed"), "encoder.0", 0, 1)
    second = stage(F.pixel_unshuffle(conv(first, "down.0.0"), 2), "encoder.1", 1, 2)
    x = stage(F.pixel_unshuffle(conv(second, "down.1.0"), 2), "latent", 2, 2)
    x = conv(torch.cat([F.pixel_shuffle(conv(x, "up.1.0"), 2), second], dim=1), "reduce.1")
    x = stage(x, "decoder.1", 1, 2)
    x = conv(torch.cat([F.pixel_shuffle(conv(x, "up.0.0"), 2), first], dim=1), "reduce.0")
    x = stage(x, "decoder.0", 1, 2)
    shift, scale = linear(vectors[1], "final.modulation").chunk(2, dim=1)
    x = F.layer_norm(conv(x, "final.conv").movedim(1, -1), (8,), eps=1e-6).movedim(-1, 1)
    expected = conv(x * (1 + scale)[..., None, None] + shift[..., None, None], "final.output")
    with torch.no_grad():
        assert_close(model(latents, timestep, labels), expected, 1e-6)  # features of timesteps are float32


@pytest.mark.parametrize("attention", ["released", "paper"])
def test_fused_layers_and_modules_one_by_one(attention):
    model = tiny(attention=attention)
    inputs = conditions(model)
    assert set(ipt_fast.explain(model).values()) == {None} and len(ipt_fast.explain(model)) == 20
    with torch.no_grad():
        expected = model(*inputs)
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            assert_close(model(*inputs), expected)
        finally:
            handle.remove()
        twin = model.to_reference()
        assert_close(twin(*inputs), expected)
    assert set(ipt_fast.explain(twin).values()) == {"it is a plain twin"}


@pytest.mark.parametrize("part", ["norm1", "attention", "attention.qkv", "norm2", "ffn", "ffn.expand.first"])
def test_a_hook_changes_the_output(part):
    model = tiny()
    inputs = conditions(model)
    with torch.no_grad():
        before = model(*inputs)
        module = model.get_submodule(f"encoder.0.1.{part}")
        handle = module.register_forward_hook(lambda module, inputs, output: 1.5 * output)
        changed = model(*inputs)
        handle.remove()
        assert (changed - before).abs().max() > 1e-6
        assert torch.equal(model(*inputs), before)


def test_layers_are_computed_again_in_the_backward():
    model = tiny(depths=(2, 1, 1))
    inputs = conditions(model)
    expected = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
    assert len(transformer_layers(model)) == 7
    checkpoint_activations(model)
    found = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_other_sizes_and_pixels():
    model = tiny()
    for height, width in ((4, 8), (20, 12), (32, 32)):
        latents, timestep, labels = torch.randn(1, 4, height, width), torch.tensor([3]), torch.tensor([1])
        assert model(latents, timestep, labels).shape == (1, 8, height, width)
    pixels = tiny(in_channels=1, learn_variance=False)
    assert pixels(*conditions(pixels)).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"multiples of 4; got \(2, 4, 16, 18\)"):
        model(torch.randn(2, 4, 16, 18), *conditions(model)[1:])
    assert model(torch.zeros(0, 4, 16, 16), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0, 8, 16, 16)


# -- forms and files ----------------------------------------------------------------------------------------------


def test_merged_saved_and_opened(tmp_path):
    model = tiny()
    inputs = conditions(model)
    expected = model(*inputs).detach()
    model.save_pretrained(tmp_path / "training")
    torch.save(model.state_dict(), tmp_path / "training.pth")
    merged = copy.deepcopy(model)
    merged.reparameterize()
    merged.reparameterize()
    assert merged.config.merged and not model.config.merged
    assert_close(merged(*inputs).detach(), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(open_model(tmp_path / "training")(*inputs), model(*inputs))
    assert torch.equal(open_model(tmp_path / "merged")(*inputs), merged(*inputs))
    loaded = open_checkpoint(tmp_path / "training.pth", "latent_ipt_v2_s", **TINY, merged=True)
    assert torch.equal(loaded(*inputs), merged(*inputs))
    with pytest.raises(ValueError, match="use merged=True"):
        open_checkpoint(tmp_path / "merged", "latent_ipt_v2_s", **TINY)
    model.latent[0].ffn.reparameterize()
    with pytest.raises(ValueError, match="got one merged in part"):
        model.save_pretrained(tmp_path / "part")


@pytest.mark.parametrize("index", [0, 1])
def test_a_compiled_layer(index):
    """Grid and focal: one graph with its gradients."""
    layer, x = tiny(merged=True).encoder[0][index], torch.randn(2, 4, 8, 8)
    modulations = [Modulation(*torch.randn(3, 2, 4)) for _ in range(2)]
    inputs = [x.requires_grad_(), *layer.parameters()]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(layer(x, *modulations).square().sum(), inputs, allow_unused=True)
    found = torch.autograd.grad(compiled(x, *modulations).square().sum(), inputs, allow_unused=True)
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False])
def test_a_compiled_model(merged):
    model = tiny(merged=merged)
    inputs = conditions(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_exported_twin():
    model = tiny(depths=(2, 1, 1), merged=True)
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = {"latents": batch, "timestep": batch, "class_labels": batch}
    program = torch.export.export(model.to_reference(), conditions(model), dynamic_shapes=shapes)
    inputs = conditions(model, batch=5)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen(dtype):
    model = tiny()
    inputs = conditions(model)
    frozen = ipt_fast.freeze(model, dtype)
    model.reparameterize()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(frozen(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depths": (2, 2)}, r"depths must be three ints of at least 1; got \(2, 2\)"),
        ({"heads": (1, 2, 0)}, r"heads must be three ints of at least 1; got \(1, 2, 0\)"),
        ({"heads": (1, 3, 2)}, "heads must divide the width 8 of level 2; got 3"),
        ({"width": 5}, "width must be even, as downsampling halves it; got 5"),
        ({"sample_size": 18}, "sample_size must be a multiple of 4; got 18"),
        ({"attention": "swin"}, "attention must be one of paper, released; got 'swin'"),
        ({"window_size": 5}, "window_size must be even where attention is released; got 5"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)
