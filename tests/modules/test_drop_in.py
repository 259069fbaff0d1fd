"""What users do to modules works as on plain PyTorch's: hooks, adapters, pruning, parametrisations, checkpoints."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from ipt_fast.modules.normalization import LayerNorm2d
from ipt_fast.modules.transformer import EncoderLayer
from tests.models.micro import micro_model
from tests.modules.changed import (
    CASES,
    CONTAINERS,
    CONVOLUTIONS,
    LARGE,
    LINEARS,
    MODELS,
    Adapter,
    assert_close,
    build,
    ipt,
    naive,
    replace,
)


@pytest.mark.parametrize("name", MODELS)
def test_module_by_module_is_the_same(name):
    model, x = build(name)
    with torch.no_grad():
        assert_close(naive(model, x), model(x))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_module_sees_its_hooks(name, together):
    """All at once, and each alone, in the forward and in the backward."""
    model, x = build(name)
    if name == "ipt":
        for block in (model.head[0][1], model.head[0][2]):  # in place, which PyTorch refuses beside backward hooks
            block.body[1].inplace = False
    modules = {path: m for path, m in model.named_modules() if not isinstance(m, CONTAINERS)}
    seen = set()

    def watch(path):
        module, marks = modules[path], [f"{path} {kind}" for kind in ("pre", "post", "backward")]
        return [
            module.register_forward_pre_hook(lambda *_: seen.add(marks[0])),
            module.register_forward_hook(lambda *_: seen.add(marks[1])),
            module.register_full_backward_hook(lambda *_: seen.add(marks[2])),
        ]

    for group in [list(modules)] if together else [[path] for path in modules]:
        handles = [handle for path in group for handle in watch(path)]
        model(x).square().sum().backward()
        for handle in handles:
            handle.remove()
    expected = {f"{path} {kind}" for path in modules for kind in ("pre", "post", "backward")}
    # Where nothing that needs a gradient comes in or goes out.
    quiet = {"body.position_encoding", "sub_mean"}
    missing = {mark for mark in expected - seen if not (mark.endswith("backward") and mark.split()[0] in quiet)}
    assert not missing


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_hook_changes_the_output_and_goes_without_a_trace(name, path):
    model, x = build(name)
    with torch.no_grad():
        before = model(x)
        handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: 1.5 * output)
        changed = model(x)
        assert (changed - before).abs().max() > 1e-6
        assert_close(changed, naive(model, x))
        handle.remove()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_all_modules(kind):
    model, x = build("ipt_v2")
    seen = set()
    register = getattr(nn.modules.module, f"register_module_forward_{'pre_' if kind == 'pre' else ''}hook")
    handle = register(lambda module, *_: seen.add(module))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert seen >= {module for module in model.modules() if not isinstance(module, CONTAINERS)}


def test_macs_are_counted_as_of_the_fused_operators():
    """FlopCounterMode, which learns by hooks of all modules where it is, does not change what runs."""
    for name, operator in {"ipt_v2": "ipt_fast.leffn_layer", "ipt": "ipt_fast.add_norm_feed_forward"}.items():
        model, x = build(name)
        with torch.no_grad():
            expected = model(x)
            with FlopCounterMode(display=False) as counter:
                assert torch.equal(model(x), expected)
        assert operator in {str(packet) for packet in counter.get_flop_counts()["Global"]}


@pytest.mark.parametrize(("name", "path"), [c for c in CONVOLUTIONS if c[0] in ("ipt_v2", "restormer")] + LINEARS)
def test_an_adapter_has_an_effect_and_gradients(name, path):
    model, x = build(name)
    with torch.no_grad():
        before = model(x)
    adapter = Adapter(model.get_submodule(path))
    replace(model, path, adapter)
    out = model(x)
    assert (out - before).abs().max() > 1e-6
    assert_close(out.detach(), naive(model, x))
    out.square().sum().backward()
    assert adapter.up.weight.grad.abs().max() > 0 and adapter.down.weight.grad.abs().max() > 0


WEIGHTS = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("name", "path"),
    [("ipt_v2", "encoder.0.0.attention.qkv"), ("ipt_v2", "encoder.0.0.ffn.expand.second"), *LINEARS[:2]],
)
def test_weights_made_by_others_are_followed_for_several_steps(name, path, kind):
    model, x = build(name)
    WEIGHTS[kind](model.get_submodule(path))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-6)
    for _ in range(3):
        out = model(x)
        assert_close(model(x).detach(), naive(model, x))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("parameter", ["temperature", "token_weight", "bias_table", "in_proj_weight"])
def test_parametrised_attention(parameter):
    path, name = {
        "bias_table": ("encoder.0.1.attention", "ipt_v2"),
        "in_proj_weight": ("body.encoder.layers.0.self_attn", "ipt"),
    }.get(parameter, ("encoder.0.0.attention", "ipt_v2"))
    model, x = build(name)
    before = naive(model, x)

    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    nn.utils.parametrize.register_parametrization(model.get_submodule(path), parameter, Doubled())
    out = model(x)
    assert_close(out.detach(), naive(model, x))
    assert parameter == "token_weight" or (out - before).abs().max() > 1e-7  # its scale is normalised away
    out.sum().backward()


@pytest.mark.parametrize("wrap", ["module", "method", "function"])
@pytest.mark.parametrize("path", ["encoder.0.0.attention", "encoder.0.1.attention", "encoder.0.0.ffn"])
def test_checkpointed_parts_are_computed_again(path, wrap):
    model, x = build("ipt_v2")
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    module, calls = model.get_submodule(path), []
    inner = next(m for m in module.modules() if type(m) is nn.Conv2d)
    inner.register_forward_hook(lambda *_: calls.append(1))
    if wrap == "module":
        replace(model, path, checkpoint_wrapper(module))
    elif wrap == "method":
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    else:

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = module

            def forward(self, x):
                return checkpoint(self.inside, x, use_reentrant=False)

        replace(model, path, Checkpointed())
    got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert len(calls) == 2
    for value, wanted in zip(got, expected, strict=True):
        assert (value - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6


@pytest.mark.parametrize("everywhere", [False, True])
def test_wrapped_branches_leave_the_config_as_it_is(everywhere, tmp_path):
    model, _ = build("ipt_v2")
    for path, module in list(model.named_modules()):
        if path.endswith((".ffn.expand", ".ffn.depthwise", ".ffn.project")) and (everywhere or "0.0.ffn" in path):
            replace(model, path, checkpoint_wrapper(module))
    assert model.config.merged is False
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    merged = micro_model(depths=(2, 0, 0, 0), merged=True)
    merged.encoder[0][0].ffn = checkpoint_wrapper(merged.encoder[0][0].ffn)
    ipt_fast.load_checkpoint(merged, tmp_path)
    x = torch.rand(1, 3, LARGE, LARGE)
    with torch.no_grad():
        assert_close(merged(x), model(x))


@pytest.mark.parametrize(("name", "path"), [c for c in CONVOLUTIONS if c[0] in ("ipt_v2", "restormer")] + LINEARS)
def test_a_layer_of_another_bias_or_kernel_is_called(name, path):
    model, x = build(name)
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        other = nn.Linear(module.in_features, module.out_features, bias=module.bias is None)
    else:
        options = dict(groups=module.groups, padding=module.padding)
        other = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, **options, bias=True)
    replace(model, path, other)
    with torch.no_grad():
        out = model(x)
    assert_close(out, naive(model, x))


def doubled(conv, x, weight):
    return 2 * F.conv2d(x, weight, padding=1, groups=conv.groups)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "dilation", (2, 2)) or setattr(conv, "padding", (2, 2)),
        lambda conv: (
            setattr(conv, "padding_mode", "circular") or setattr(conv, "_reversed_padding_repeated_twice", [1] * 4)
        ),
        lambda conv: setattr(conv, "forward", lambda x: doubled(conv, x, conv.weight)),
        lambda conv: setattr(conv, "_conv_forward", lambda x, weight, bias: doubled(conv, x, weight)),
    ],
)
def test_changed_attributes_of_a_convolution(change):
    model, x = build("ipt_v2")
    with torch.no_grad():
        before = model(x)
        change(model.encoder[0][0].attention.depthwise)
        out = model(x)
    assert (out - before).abs().max() > 1e-6
    assert_close(out, naive(model, x))


@pytest.mark.parametrize("cls", [nn.Conv2d, LayerNorm2d, type(micro_model().encoder[0][0].attention), nn.LayerNorm])
def test_a_forward_replaced_in_a_class_runs(cls, monkeypatch):
    name = "ipt" if cls is nn.LayerNorm else "ipt_v2"
    model, x = build(name)
    with torch.no_grad():
        before, original = model(x), cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, *args: 1.5 * original(self, *args))
        assert (model(x) - before).abs().max() > 1e-6
        assert_close(model(x), naive(model, x))
        monkeypatch.undo()
        assert torch.equal(model(x), before)


class PatchedNorm(nn.Module):
    """What model patchers put in the place of nn.LayerNorm."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


def test_norms_that_replace_layer_norm_are_called(monkeypatch):
    model, x = build("ipt")
    with torch.no_grad():
        expected = model(x)
    state = model.state_dict()
    monkeypatch.setattr(nn, "LayerNorm", PatchedNorm)
    patched = ipt()
    assert isinstance(patched.body.encoder.layers[0].norm1, PatchedNorm)
    patched.load_state_dict(state)
    with torch.no_grad():
        assert_close(patched(x), expected)
        assert_close(model(x), expected)  # built before
        monkeypatch.setattr(nn, "LayerNorm", lambda dim: PatchedNorm(dim))
        assert_close(model(x), expected)
        monkeypatch.undo()
        assert_close(patched(x), expected)


class Wrapped(nn.Module):
    """Calls a module, and has none of its attributes."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args):
        return self.inside(*args)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_module_can_be_wrapped(name, autocast):
    model, x = build(name)
    paths = [path for path, m in model.named_modules() if path and not isinstance(m, CONTAINERS)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        for path in paths:
            module = model.get_submodule(path)
            replace(model, path, Wrapped(module))
            out = model(x)
            limit = 0.05 if autocast else 2e-5
            assert (out - expected).abs().max() <= limit * expected.abs().max(), path
            replace(model, path, module)


@pytest.mark.parametrize("part", ["linear1", "linear2"])
@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.LayerNorm(12)])
def test_other_layers_in_the_place_of_linear_ones(part, make):
    layer, x = EncoderLayer(12, 2, ratio=1), torch.rand(2, 9, 12)
    setattr(layer, part, make())
    branch = layer.self_attn(*[layer.norm1(x)] * 3) + x
    expected = branch + layer.linear2(F.relu(layer.linear1(layer.norm2(branch))))
    torch.testing.assert_close(layer(x), expected)


def test_a_tail_may_be_longer():
    model, x = build("ipt")
    with torch.no_grad():
        expected = model(x)
        model.tail[0].append(nn.Identity())
        assert torch.equal(model(x), expected)
        model.tail[0].append(nn.Tanh())
        assert not torch.equal(model(x), expected)


def test_a_class_whose_call_is_replaced_is_called(monkeypatch):
    model, x = build("ipt_v2")
    seen, call = [], nn.Conv2d.__call__
    monkeypatch.setattr(nn.Conv2d, "__call__", lambda self, *args: seen.append(self) or call(self, *args))
    with torch.no_grad():
        model(x)
    assert set(seen) == {module for module in model.modules() if isinstance(module, nn.Conv2d)}


OTHER_NORMS = [
    Wrapped,
    lambda norm: nn.RMSNorm(36),
    lambda norm: nn.LayerNorm(36, elementwise_affine=False),
    lambda norm: nn.LayerNorm(36, bias=False),
    lambda norm: nn.LayerNorm(36, eps=0.0),
]


@pytest.mark.parametrize("part", ["norm1", "norm2", "norm3"])
@pytest.mark.parametrize("make", OTHER_NORMS)
def test_other_norms_of_ipt_are_called(part, make):
    model, x = build("ipt")
    layer = model.body.decoder.layers[0]
    with torch.no_grad():
        before = model(x)
        new = make(getattr(layer, part))
        setattr(layer, part, new)
        out, seen = model(x), []
        assert_close(out, naive(model, x))
        if isinstance(new, Wrapped):
            assert_close(out, before)
        new.register_forward_hook(lambda *_: seen.append(1))
        model(x)
    assert seen == [1]


def test_only_identity_means_no_norm():
    layer, x = EncoderLayer(12, 2, norm=False), torch.rand(2, 9, 12)
    assert type(layer.norm1) is nn.Identity
    attended = layer.self_attn(x, x, x) + x
    expected = attended + layer.linear2(F.relu(layer.linear1(attended)))
    torch.testing.assert_close(layer(x), expected)


def test_explain_tells_why_a_part_is_not_fused():
    model, _ = build("ipt_v2")
    assert set(ipt_fast.explain(model).values()) == {None}
    assert "encoder.0.1.ffn" in ipt_fast.explain(model)
    model.encoder[0][0].attention.qkv.register_forward_hook(lambda *_: None)
    model.encoder[0][1].ffn = Adapter(nn.Conv2d(8, 8, 1))
    reasons = ipt_fast.explain(model)
    assert reasons.pop("encoder.0.0.attention") == "qkv: it has hooks"
    assert reasons.pop("encoder.0.1.ffn") == "branch: it is a Adapter"
    assert set(reasons.values()) == {None}
    layer = EncoderLayer(12, 2)
    layer.linear1.compile()
    assert ipt_fast.explain(layer) == {"self_attn": None, "linear1": "linear1: it is compiled by itself"}


@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_branches_that_are_no_plain_convolutions_are_not_merged(change):
    model, x = build("ipt_v2")
    path = "encoder.0.0.ffn.expand.first"
    conv = model.get_submodule(path)
    if change == "hook":
        conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        replace(model, path, Adapter(conv))
    with torch.no_grad():
        expected, state = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"to be merged; got: encoder\.0\.0\.ffn\.expand\.first"):
        model.reparameterize()
    assert state.keys() == model.state_dict().keys()
    restored = ipt_fast.restore(x, model, tile=None, dtype="float32")
    assert_close(restored, expected)
