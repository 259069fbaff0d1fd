"""DiT: its figures, its start, errors, and the same function as diffusers' on the same weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from ipt_fast.models import open_checkpoint, open_model
from tests.models.generators import conditions, randomised
from tests.oracles.public import public_module

TINY = {"width": 24, "layers": 2, "heads": 3, "sample_size": 8, "num_classes": 5}


def tiny(**config):
    return randomised(ipt_fast.create_model("dit_s_2", **TINY | config)).eval()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_macs_and_parameters(device):
    """On both devices: the counter takes PyTorch's attention apart on the one, and counts it by our formula there."""
    with torch.device(device):
        model = ipt_fast.create_model("dit_s_2").eval()
        inputs = conditions(model, batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert abs(counter.get_total_flops() / 2 / 6.06e9 - 1) < 0.02
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 32.87


def test_a_new_model_returns_zeros_and_learns():
    model = ipt_fast.create_model("dit_s_2", **TINY)
    latents, timestep, labels = conditions(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        out = model(latents, timestep, labels)
        loss = (out - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == 1 and losses[-1] < 0.5
    assert all(parameter.grad is not None for parameter in model.parameters())


def diffusers_state(state, layers):
    """Our names to those of diffusers' DiTTransformer2DModel, in which each block holds the embeddings."""
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    found = {}
    for i in range(layers):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        found[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        renamed |= {
            f"{theirs}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{theirs}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{theirs}.norm1.linear": f"{ours}.adaLN_modulation.1",
            f"{theirs}.attn1.to_out.0": f"{ours}.attn.proj",
            f"{theirs}.ff.net.0.proj": f"{ours}.mlp.fc1",
            f"{theirs}.ff.net.2": f"{ours}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            found |= {f"{theirs}.attn1.to_{q}.{kind}": part for q, part in zip("qkv", parts, strict=True)}
    for theirs, ours in renamed.items():
        found |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return found


@pytest.mark.parametrize("learn_variance", [True, False])
def test_as_diffusers(learn_variance):
    diffusers = public_module("diffusers")
    ours = tiny(learn_variance=learn_variance)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=ours.config.out_channels,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    theirs.load_state_dict(diffusers_state(ours.state_dict(), layers=2))
    for block in theirs.transformer_blocks:
        # The paper's frequencies are 10000^(-i / 128), as published models have them; diffusers divides by 127.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    latents, timestep, labels = conditions(ours, batch=3)
    with torch.no_grad():
        expected = theirs(latents, timestep=timestep, class_labels=labels).sample
        torch.testing.assert_close(ours(latents, timestep, labels), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.double()(latents.double(), timestep, labels).float(), expected)


def test_saved_opened_and_loaded(tmp_path):
    model = tiny()
    inputs = conditions(model)
    model.save_pretrained(tmp_path / "dit")
    opened = open_model(tmp_path / "dit")
    assert opened.config == model.config and not opened.training
    assert torch.equal(opened(*inputs), model(*inputs))
    torch.save({"ema": model.state_dict()}, tmp_path / "dit.pt")
    assert torch.equal(open_checkpoint(tmp_path / "dit.pt", "dit_s_2", **TINY)(*inputs), model(*inputs))


def test_frozen_and_compiled():
    model = tiny()
    latents, timestep, labels = conditions(model)
    expected = model(latents, timestep, labels)
    frozen = ipt_fast.freeze(model)
    torch.testing.assert_close(frozen(latents, timestep=timestep, class_labels=labels), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        frozen(latents=latents, timestep=timestep, class_labels=labels), frozen(*(latents, timestep, labels))
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(latents, timestep, labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide sample_size 8; got 3"),
        ({"width": 30, "heads": 3}, "width must be a multiple of 4; got 30"),
        ({"heads": 5}, "heads must divide the width 24; got 5"),
        ({"layers": 0}, "layers must be an int of at least 1; got 0"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_wrong_size():
    model = tiny()
    with pytest.raises(ValueError, match=r"latents must be \(2, 4, 8, 8\) for this model; got \(2, 4, 8, 16\)"):
        model(torch.rand(2, 4, 8, 16), *conditions(model)[1:])
