"""Norms of a packed model write over their input where nobody else has it, and compute the same to the bit."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.checkpoint import packed_layers
from hf_oscqat.quantization.norms import FEEDS_NORM, OverwritingNorm, let_norms_overwrite
from hf_oscqat.quantization.packed import UNSHARED

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
        layer.feeds = None
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


def test_features_of_a_backbone_are_not_written_over():
    model, images = packed_model("mobilenetv2_035", features_only=True)
    with torch.inference_mode(), counting() as taken:
        features = model(images)
    assert taken
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
        assert not taken, "anybody may be watching"
        assert any(torch.equal(tensor, values) for tensor, values in seen)
        hook.remove()
        seen.clear()
    assert unwritten() == 0


class Same(nn.Module):
    """Hands on the tensor that it gets, so that a norm behind it reads what others read as well."""

    def forward(self, x):
        return x


def test_nothing_is_written_over_that_did_not_come_from_the_layer():
    model, images = packed_model("resnet18")
    model.layer1[0].conv1 = Same()  # the norm then reads what the shortcut reads
    model.layer1[1].conv2 = nn.Sequential(model.layer1[1].conv2, Same())  # as good as before
    model.layer2[1].conv2 = nn.Conv2d(128, 128, 3, padding=1)
    model.requires_grad_(False)
    with torch.inference_mode(), counting() as taken:
        outputs = model(images)
    assert len(taken) == 15
    with torch.inference_mode():
        assert torch.equal(outputs, without_overwriting(model)(images))


def test_mark_of_another_norm_counts_for_nothing():
    norm, other = (BatchNormAct2d(3).eval().requires_grad_(False) for _ in range(2))
    norm.__class__ = type(packed_model("test_efficientnet")[0].bn1)
    assert isinstance(norm, OverwritingNorm)
    x = torch.randn(2, 3, 4, 4)
    for mark, overwrites in ((other, False), (norm, True)):
        vars(x)[UNSHARED] = mark
        before = x.clone()
        output = norm(x)
        assert torch.equal(x, before) != overwrites
        torch.testing.assert_close(output, other(before))
        assert not vars(x), "a mark is good for one norm"


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


# torch itself uses what it calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_gradients():
    model, images = packed_model("test_efficientnet")
    tangents = []
    for each in (model, without_overwriting(model)):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(each.bn1(each.conv_stem(forward_ad.make_dual(images, images)))))
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
    assert copied.conv_stem.feeds[0] is copied.bn1
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


def test_every_block_of_the_table_is_one_of_timm():
    for path, pairs in FEEDS_NORM.items():
        module, _, name = path.rpartition(".")
        block = getattr(__import__(module, fromlist=[name]), name)
        assert f"{block.__module__}.{block.__qualname__}" == path
        assert pairs
