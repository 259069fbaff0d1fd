"""Files of other people's models as spandrel opens them: its own classes in toy sizes, with random weights."""

import safetensors.torch
import torch

from tests.oracles.public import public_module

SPANDREL, EXTRA = "spandrel.architectures", "spandrel_extra_arches.architectures"
SWIN = dict(img_size=16, window_size=8, depths=[2], embed_dim=12, num_heads=[2], mlp_ratio=2)
# {name: (module, class, arguments)}
MODELS = {
    "SwinIR": (f"{SPANDREL}.SwinIR", "SwinIR", dict(SWIN, upscale=2, upsampler="pixelshuffledirect")),
    "SwinIR gray": (f"{SPANDREL}.SwinIR", "SwinIR", dict(SWIN, in_chans=1, upscale=1, upsampler="")),
    "DAT": (
        f"{SPANDREL}.DAT",
        "DAT",
        dict(img_size=16, split_size=[4, 8], depth=[2], embed_dim=16, num_heads=[2], expansion_factor=2, upscale=2),
    ),
    "OmniSR": (f"{SPANDREL}.OmniSR", "OmniSR", dict(num_feat=16, res_num=1, block_num=1, up_scale=2)),
    "ESRGAN": (f"{SPANDREL}.ESRGAN.__arch.RRDB", "RRDBNet", dict(num_filters=8, num_blocks=1, scale=2)),
    "Compact": (f"{SPANDREL}.Compact.__arch.SRVGG", "SRVGGNetCompact", dict(num_feat=8, num_conv=2, upscale=2)),
    "Restormer": (
        f"{EXTRA}.Restormer",
        "Restormer",
        dict(dim=8, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 1, 2, 2], ffn_expansion_factor=2.66),
    ),
}


def foreign_model(name):
    """A model in eval mode that keeps images recognisable; the test is skipped where its package is not installed."""
    module, cls, arguments = MODELS[name]
    torch.manual_seed(0)
    return getattr(public_module(module), cls)(**arguments).eval()


def load_foreign(name):
    """The descriptor of that model, with the same weights."""
    library, state = spandrel(), foreign_model(name).state_dict()
    registry = library.MAIN_REGISTRY.copy()
    if MODELS[name][0].startswith(EXTRA):
        registry.add(*public_module("spandrel_extra_arches").EXTRA_REGISTRY)
    return registry.load({key: value.clone() for key, value in state.items()})


def write_foreign(path, name):
    """A file of these weights, in the form of its suffix; .pt is TorchScript."""
    model = foreign_model(name)
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    elif path.suffix == ".pt":
        torch.jit.trace(model, torch.rand(1, 3, 16, 16)).save(path)
    else:
        torch.save({"params": state}, path)
    return path


def spandrel():
    return public_module("spandrel")
