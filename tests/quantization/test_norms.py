"""Norms of a packed model write over their input where nobody else has it, and compute the same to the bit."""

import copy
import pickle
import weakref
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.checkpoint import packed_layers
from hf_oscqat.quantization import packed
from hf_oscqat.quantization.norms import FEEDS_NORM, OverwritingNorm, _pairs, let_norms_overwrite

OVERWRITING = {
    # how many norms, of how many
    "mobilenetv2_035": (52, 52),
    "mobilenetv3_small_050": (34, 34),
    "efficientnet_lite0": (49, 49),
    "efficientnet_es": (49, 49),  # blocks of EdgeResidual
    "test_efficientnet": (13, 13),
    "resnet18": (17, 20),  # those of downsampling stand in a Sequential
    "resnet26": (25, 29),
    "regnetx_002": (44, 44),  # ConvNormAct
}


@pytest.fixture(autouse=True)
def _worth_it_for_small_ones_too(monkeypatch):
    monkeypatch.setattr(packed, "WORTH_OVERWRITING", 0)


def packed_model(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **({} if options.get("features_only") else {"num_classes": 5}), **options)
    images = torch.randn(2, 3, 64, 64)
    reestimate_batchnorm(model, [images])
    prepare_qat(model, OscQATConfig())
    calibrate(model, [images])
    return pack(model.eval()), images


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def without_overwriting(model):
    plain = copy.deepcopy(model)
    for layer in packed_layers(plain).values():
        layer.handover = None
    return plain


@contextmanager
def counting():
    """Note of each norm that does not make new memory whether it writes over its input."""
    taken = []
    original = torch.native_batch_norm

    def count(*args, **kwargs):
        taken.append(kwargs["out"][0].data_ptr() == args[0].data_ptr())
        return original(*args, **kwargs)

    torch.native_batch_norm = count
    try:
        yield taken
    finally:
        torch.native_batch_norm = original


@pytest.mark.parametrize("name", OVERWRITING)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_outputs_in_less_memory(name, memory_format):
    model, images = packed_model(name)
    model = model.to(memory_format=memory_format)
    images = images.contiguous(memory_format=memory_format)
    before = images.clone()
    expected, of = OVERWRITING[name]
    assert len(norms(model)) == of
    assert sum(isinstance(norm, OverwritingNorm) for norm in norms(model)) == expected
    with torch.inference_mode(), counting() as taken:
        outputs = model(images)
    assert taken == [True] * expected
    with torch.inference_mode(), counting() as taken:
        assert torch.equal(outputs, without_overwriting(model)(images))
    assert not taken
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_same_outputs_in_other_dtypes(dtype):
    model, images = packed_model("test_efficientnet")
    model, images = model.to(dtype), images.to(dtype)
    with torch.no_grad(), counting() as taken:
        assert torch.equal(model(images), without_overwriting(model)(images))
    assert len(taken) == 13


def test_same_outputs_under_autocast():
    model, images = packed_model("mobilenetv2_035")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), counting() as taken:
        assert torch.equal(model(images), without_overwriting(model)(images))
    assert len(taken) == 52


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
def test_features_of_a_backbone_are_not_written_over(name):
    model, images = packed_model(name, features_only=True)
    with torch.inference_mode(), counting() as taken:
        features = model(images)
    assert len(taken) == sum(isinstance(norm, OverwritingNorm) for norm in norms(model))
    assert isinstance(model.bn1, OverwritingNorm)
    with torch.inference_mode():
        for ours, expected in zip(features, without_overwriting(model)(images), strict=True):
            assert torch.equal(ours, expected)


def test_what_hooks_have_seen_stays_as_they_saw_it():
    model, images = packed_model("mobilenetv2_035")
    block = model.blocks[1][1]
    seen = []

    def keep(tensor):
        seen.append((tensor, tensor.clone()))

    def unwritten():
        with torch.inference_mode(), counting() as taken:
            model(images)
        assert all(torch.equal(tensor, values) for tensor, values in seen)
        seen.clear()
        return 52 - len(taken)

    for hook in (
        block.conv_pwl.register_forward_hook(lambda module, args, output: keep(output)),
        block.bn3.register_forward_pre_hook(lambda module, args: keep(args[0])),
        block.bn3.register_forward_hook(lambda module, args, output: keep(args[0])),
    ):
        assert unwritten() == 1
        hook.remove()
    for register, kept in (
        (register_module_forward_hook, lambda module, args, output: keep(output)),
        (register_module_forward_pre_hook, lambda module, args: keep(args[0])),
    ):
        hook = register(lambda *args, kept=kept: kept(*args) if args[0] in (block.conv_pwl, block.bn3) else None)
        with torch.inference_mode(), counting() as taken:
            model(images)
        hook.remove()
        assert not taken, "anybody may be watching"
        seen.clear()  # the activation that is folded into the next layer writes there as well
    assert unwritten() == 0


class Same(nn.Module):
    """Hands on the tensor that it gets, so that a norm behind it reads what others read as well."""

    def forward(self, x):
        return x


def test_nothing_is_written_over_that_did_not_come_from_the_layer():
    model, images = packed_model("resnet18")
    model.layer1[0].conv1 = Same()  # the norm then reads what the shortcut reads
    model.layer1[1].conv2 = nn.Sequential(model.layer1[1].conv2, Same())
    model.layer2[1].conv2 = nn.Conv2d(128, 128, 3, padding=1)
    model.requires_grad_(False)
    with torch.inference_mode(), counting() as taken:
        outputs = model(images)
    assert len(taken) == 14
    with torch.inference_mode():
        assert torch.equal(outputs, without_overwriting(model)(images))


class Probe(nn.Module):
    """Keeps what passes."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append((x, x.clone()))
        return x


def put_probe_behind_the_layer(block, seen):
    block.conv_pwl = nn.Sequential(block.conv_pwl, Probe(seen))


def put_probe_before_the_norm(block, seen):
    block.bn3 = nn.Sequential(Probe(seen), block.bn3)


def patch_the_layer(block, seen):
    probe, forward = Probe(seen), block.conv_pwl.forward
    block.conv_pwl.forward = lambda x: probe(forward(x))


def patch_the_norm(block, seen):
    probe, forward = Probe(seen), block.bn3.forward
    block.bn3.forward = lambda x: forward(probe(x))


def hook_a_wrapper_of_the_layer(block, seen):
    block.conv_pwl = nn.Sequential(block.conv_pwl)
    block.conv_pwl.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))


@pytest.mark.parametrize(
    "watch",
    [
        put_probe_behind_the_layer,
        put_probe_before_the_norm,
        patch_the_layer,
        patch_the_norm,
        hook_a_wrapper_of_the_layer,
    ],
)
def test_who_stands_between_layer_and_norm_keeps_what_he_sees(watch):
    model, images = packed_model("mobilenetv2_035")
    with torch.inference_mode():
        expected = model(images)
    seen = []
    watch(model.blocks[1][1], seen)
    with torch.inference_mode(), counting() as taken:
        assert torch.equal(model(images), expected)
    assert len(taken) == 51
    assert seen
    assert all(torch.equal(tensor, values) for tensor, values in seen)


def test_called_by_hand_they_write_nothing_over():
    model, images = packed_model("mobilenetv2_035")
    with torch.inference_mode(), counting() as taken:
        made = model.conv_stem(images)
        before = made.clone()
        first, second = model.bn1(made), model.bn1(made)
        assert torch.equal(made, before)
        assert torch.equal(first, second)
        assert torch.equal(model.bn1.forward(model.conv_stem.forward(images)), first)
    assert not taken


class OffersSomethingElse(nn.Module):
    """Leaves behind what a layer would: for another norm, or another tensor than the norm gets."""

    def __init__(self, offer):
        super().__init__()
        self.offer = offer

    def forward(self, x):
        self.made = x.repeat(1, 6, 1, 1)[:, :16]
        packed.offered.output = self.offer(self.made)
        return self.made


def test_norm_takes_only_what_its_own_layer_has_just_made():
    model, images = packed_model("mobilenetv2_035")
    norm, other = model.bn1.handover, model.blocks[0][0].bn1.handover
    assert norm != other
    kept = torch.zeros(1)
    for offer, expected in (
        (lambda x: (norm, weakref.ref(kept)), 51),
        (lambda x: (other, weakref.ref(x)), 51),
        (lambda x: None, 51),
        (lambda x: (norm, weakref.ref(x)), 52),
    ):
        model.conv_stem = OffersSomethingElse(offer)
        with torch.inference_mode(), counting() as taken:
            model(images)
        assert len(taken) == expected


def test_layer_of_a_class_that_might_keep_its_output_offers_nothing():
    class Keeps(nn.Conv2d):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    model.layer1[0].conv1.__class__ = Keeps
    images = torch.randn(2, 3, 32, 32)
    reestimate_batchnorm(model, [images])
    prepare_qat(model, OscQATConfig())
    calibrate(model, [images])
    model = pack(model.eval())
    with torch.inference_mode(), counting() as taken:
        outputs = model(images)
        kept = model.layer1[0].conv1.kept.clone()
        assert len(taken) == 16
        assert torch.equal(outputs, without_overwriting(model)(images))
    assert kept.min() < 0, "as the convolution made it, before norm and activation"


def test_interpreter_of_a_graph_keeps_every_value():
    class LeavesAlone(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return hasattr(module, "weight_packed") or super().is_leaf_module(module, name)

    model, images = packed_model("resnet18")
    assert type(model.bn1) is not nn.BatchNorm2d
    graph = torch.fx.GraphModule(model, LeavesAlone().trace(model))  # which takes the norms for layers of torch
    values = {}

    class Watches(torch.fx.Interpreter):
        def call_module(self, target, args, kwargs):
            output = super().call_module(target, args, kwargs)
            if "conv" in target:
                values[target] = output, output.clone()
            return output

    with torch.inference_mode(), counting() as taken:
        logits = Watches(graph, garbage_collect_values=False).run(images)
        assert torch.equal(logits, model(images))
    assert len(values) == 17
    assert all(torch.equal(values[name][0], values[name][1]) for name in ("conv1", "layer1.0.conv2"))
    assert len(taken) == 17, "those of the model itself"


def test_dispatch_mode_sees_operations_that_write_nothing_over():
    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model, images = packed_model("test_efficientnet")
    with torch.no_grad(), Counts(), counting() as taken:
        model(images)
    assert not taken


def test_input_that_does_not_fit_is_refused_as_ever():
    model, images = packed_model("mobilenetv2_035")
    with torch.inference_mode(), counting() as taken, pytest.raises(AssertionError, match="expected 4D input"):
        model.forward_features(images[0, :, :32, :32])  # the 16 rows then stand where there should be 16 channels
    assert not taken
    model.bn1.running_mean = torch.zeros(1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="running_mean should contain 16 elements"):
        model(images)


def test_outputs_of_layers_are_plain_tensors(tmp_path):
    model, images = packed_model("test_efficientnet")
    output = model.conv_stem(images)
    assert not vars(output)
    torch.save(output, tmp_path / "output.pt")
    assert torch.equal(torch.load(tmp_path / "output.pt"), output)


def test_norm_with_a_computed_weight_and_something_to_drop():
    class Doubles(nn.Module):
        def forward(self, x):
            return 2 * x

    model, images = packed_model("test_efficientnet")
    model.bn2.drop = Doubles()
    register_parametrization(model.bn1, "weight", Doubles())
    with torch.no_grad(), counting() as taken:
        outputs = model(images)
        assert torch.equal(outputs, without_overwriting(model)(images))
    assert len(taken) >= 12


def test_gradients_are_those_of_a_model_that_writes_nothing_over():
    model, images = packed_model("mobilenetv2_035")
    plain = without_overwriting(model)
    for each in (model, plain):
        for norm in norms(each):
            norm.requires_grad_(True)  # as who fine-tunes the norms of a packed model does
    grads = []
    for each in (model, plain):
        with counting() as taken:
            inputs = images.clone().requires_grad_()
            each(inputs).square().sum().backward()
        assert not taken
        grads.append([inputs.grad, *(p.grad for norm in norms(each) for p in norm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with counting() as taken:
        assert torch.equal(model(images), plain(images))
    assert not taken, "the norms want gradients although the images do not"
    grads = []
    for each in (model, plain):
        each.requires_grad_(False)
        inputs = images.clone().requires_grad_()
        grads.append(torch.autograd.grad(each(inputs).square().sum(), inputs)[0])
    assert torch.equal(*grads)


# torch itself uses what it calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_gradients():
    model, images = packed_model("test_efficientnet")
    tangents = []
    for each in (model, without_overwriting(model)):
        with forward_ad.dual_level():
            features = each.forward_features(forward_ad.make_dual(images, images))
            tangents.append(forward_ad.unpack_dual(features))
    assert torch.equal(tangents[0].tangent, tangents[1].tangent)


def test_statistics_that_are_being_collected():
    model, images = packed_model("test_efficientnet")
    plain = without_overwriting(model)
    for each in (model, plain):
        each.train()
    with torch.no_grad(), counting() as taken:
        assert torch.equal(model(images), plain(images))
    assert not taken
    assert all(torch.equal(a.running_mean, b.running_mean) for a, b in zip(norms(model), norms(plain), strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_write_over_their_own(again):
    model, images = packed_model("test_efficientnet")
    with torch.inference_mode():
        expected = model(images)
        copied = again(model)
        with counting() as taken:
            assert torch.equal(copied(images), expected)
    assert len(taken) == 13
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_model_is_traced_whole_and_nothing_is_written_in_the_graph():
    model, images = packed_model("test_efficientnet")
    expected = model(images)
    explanation = torch._dynamo.explain(model)(images)
    assert explanation.graph_break_count == 0
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), expected)


def test_again_changes_nothing():
    model, _ = packed_model("resnet18")
    before = [type(module) for module in model.modules()]
    let_norms_overwrite(model)
    assert [type(module) for module in model.modules()] == before


def test_every_pair_of_the_table_is_met_in_a_model():
    found = {}
    models = [packed_model(name, features_only=True)[0] for name in ("mobilenetv2_035", "mobilenetv3_small_050")]
    for name in ("mobilenetv3_small_050", "test_efficientnet", "resnet18", "resnet26", "regnetx_002"):
        models.append(packed_model(name)[0])
    for model in models:
        for block in model.modules():
            for function, layer, norm in _pairs(block):
                names = {module: name for name, module in block.named_children()}
                key = f"{type(block).__module__}.{type(block).__qualname__}.{function}"
                found.setdefault(key, set()).add((names[layer], names[norm]))
    assert found == {key: set(pairs) for key, pairs in FEEDS_NORM.items()}


def test_small_outputs_are_left_alone(monkeypatch):
    model, images = packed_model("mobilenetv2_035")
    sizes = []
    watched = copy.deepcopy(model)
    for layer in packed_layers(watched).values():
        if layer.handover is not None:
            layer.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    watched(images)
    enough = sorted(sizes)[len(sizes) // 2]
    monkeypatch.setattr(packed, "WORTH_OVERWRITING", enough)
    with torch.no_grad(), counting() as taken:
        model(images)
    assert taken == [True] * sum(size >= enough for size in sizes)
    assert 0 < len(taken) < len(sizes)
