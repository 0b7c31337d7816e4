"""Models that hold a module in several places: saved once, loaded into all of them."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from hf_oscqat import CheckpointError, OscillationTracker, OscQATConfig, calibrate, describe, pack, prepare_qat
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.integration.shared_modules import hide_repeats, restore_repeats, state_dict_without_repeats

SMALL = {"img_size": 32, "embed_dims": [16] * 4, "serial_depths": [2] * 4, "parallel_depth": 2, "num_heads": 8}
FIRST, REPEAT = "timm_model.cpe1.proj", "timm_model.serial_blocks1.1.cpe.proj"


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def trained(x):
    """A CoaT in the middle of training, with tracker state and frozen weights in its shared layers."""
    torch.manual_seed(0)
    model = timm_wrapper("coat_tiny", list("abcde"), model_args=SMALL)
    prepare_qat(model, OscQATConfig(weight_bits=3, activation_scheme="asymmetric", range_estimator="minmax"))
    calibrate(model, [x])
    tracker = OscillationTracker(model, momentum=0.5)
    for _ in range(4):
        for layer in tracker.layers.values():
            layer.latent_weight.data[0].neg_()
        tracker.tick(0.4)
    assert (model.get_submodule(FIRST).weight_quantizer.frozen_int != torch.iinfo(torch.int8).min).any()
    return model.eval()


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


@pytest.mark.parametrize("form", ["training", "packed"])
class TestBothForms:
    @pytest.fixture
    def saved(self, form, trained, tmp_path):
        model = trained if form == "training" else pack(trained)
        model.save_pretrained(tmp_path)
        return model

    def test_loaded_it_computes_the_same_and_shares_the_same(self, saved, x, tmp_path):
        model = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(logits(model, x), logits(saved, x))
        assert model.get_submodule(REPEAT) is model.get_submodule(FIRST)
        state = saved.state_dict()
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert describe(model) == describe(saved)

    def test_file_has_each_tensor_once(self, saved, tmp_path):
        stored = load_file(tmp_path / "model.safetensors")
        assert sum(name.startswith(f"{FIRST}.") for name in stored) > 2
        assert not any(name.startswith(f"{REPEAT}.") for name in stored)

    def test_saved_again_it_is_the_same(self, saved, tmp_path):
        AutoModelForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    def test_file_may_be_sharded(self, saved, x, tmp_path):
        saved.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "shards")
        assert torch.equal(logits(model, x), logits(saved, x))

    def test_without_head_too(self, saved, x, tmp_path):
        model = AutoModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            branches = model(x, do_pooling=False).last_hidden_state
            expected = saved.timm_model.forward_features(x)
        assert len(branches) == 3
        assert all(torch.equal(*pair) for pair in zip(branches, expected, strict=True))

    def test_missing_tensor_of_a_shared_module_is_refused_by_name(self, saved, tmp_path):
        path = tmp_path / "model.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        del tensors[f"{FIRST}.bias"]
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=rf"{FIRST}\.bias"):
            AutoModelForImageClassification.from_pretrained(tmp_path)

    def test_copy_of_a_loaded_model_shares_too(self, saved, x, tmp_path):
        model = copy.deepcopy(AutoModelForImageClassification.from_pretrained(tmp_path))
        assert model.get_submodule(REPEAT) is model.get_submodule(FIRST)
        assert torch.equal(logits(model, x), logits(saved, x))


def test_config_names_the_first_place_only(trained, tmp_path):
    pack(trained).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    layers = config["quantization_config"]["layers"]
    assert FIRST in layers
    assert REPEAT not in layers


class Siblings(nn.Module):
    """Holds one module twice side by side, and once more further down."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = self.a
        self.c = nn.Sequential(nn.ReLU(), nn.Sequential(self.a), nn.Linear(2, 2))
        self.d = None
        self.register_buffer("own", torch.zeros(1))


def test_hidden_and_restored_it_is_as_before():
    model = Siblings()
    names = list(model.state_dict())
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    places = hide_repeats(model)
    assert list(model.state_dict()) == ["own", "a.weight", "a.bias", "c.2.weight", "c.2.bias"]
    restore_repeats(places)
    assert list(model.state_dict()) == names
    assert [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)] == modules


def test_state_dict_has_what_a_model_with_hidden_repeats_has():
    model = Siblings()
    without = state_dict_without_repeats(model)
    hide_repeats(model)
    assert list(without) == list(model.state_dict())


def test_model_that_shares_nothing_keeps_its_state_dict(make_net):
    model = make_net()
    assert hide_repeats(model) == []
    assert list(state_dict_without_repeats(model)) == list(model.state_dict())
