"""From a name or a folder to a classifier with the right head."""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat
from hf_oscqat.integration.models import timm_wrapper


def test_a_timm_name_makes_a_model_that_saves_and_loads(tmp_path):
    model = timm_wrapper("test_efficientnet", ["cat", "dog"], model_args={"drop_rate": 0.1})
    model.save_pretrained(tmp_path)
    loaded = timm_wrapper(str(tmp_path), ["cat", "dog"])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images).logits, loaded(images).logits)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert loaded.config.model_args == {"drop_rate": 0.1}


def test_a_head_of_another_size_is_made_anew_and_that_is_said(tmp_path, caplog):
    timm_wrapper("test_efficientnet", ["cat", "dog"]).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = timm_wrapper(str(tmp_path), ["a", "b", "c"])
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3)
    assert "2 classes and the data 3: it is initialised anew" in caplog.text


@pytest.mark.parametrize("form", ["training", "packed"])
def test_the_head_of_a_quantized_model_is_not_replaced(tmp_path, make_prepared_wrapper, form):
    model = make_prepared_wrapper()
    (pack(model) if form == "packed" else model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="5 classes and data with 2"):
        timm_wrapper(str(tmp_path), ["cat", "dog"])


def test_an_unknown_name_gets_suggestions():
    with pytest.raises(ValueError, match=r"got model 'mobilenetv2_36', expected a timm name.*mobilenetv2_035"):
        timm_wrapper("mobilenetv2_36", None)


def test_a_folder_of_timm_s_own_loads_with_its_head_or_another(tmp_path):
    torch.manual_seed(0)
    original = timm.create_model("test_efficientnet", num_classes=3).eval()
    timm.models.save_for_hf(original, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    loaded = timm_wrapper(str(tmp_path), ["a", "b", "c"]).eval()
    torch.testing.assert_close(loaded(images).logits, original(images))
    loaded.save_pretrained(tmp_path / "again")
    again = timm_wrapper(str(tmp_path / "again"), None).eval()
    torch.testing.assert_close(again(images).logits, loaded(images).logits)
    assert timm_wrapper(str(tmp_path), list("vwxyz"))(images).logits.shape == (2, 5)


def test_a_model_of_timm_s_own_is_saved_so_that_it_loads_in_both_forms(tmp_path):
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_efficientnet", num_classes=3), tmp_path / "timm")
    images = torch.randn(2, 3, 32, 32)
    model = timm_wrapper(str(tmp_path / "timm"), ["a", "b", "c"])
    calibrate(prepare_qat(model, OscQATConfig()), [images])
    for form, saved in (("qat", model), ("packed", pack(model))):
        saved.save_pretrained(tmp_path / form)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / form)
        torch.testing.assert_close(loaded(images).logits, model.eval()(images).logits)


def test_weights_of_a_file_are_loaded_and_the_file_is_forgotten(tmp_path):
    torch.manual_seed(0)
    original = timm.create_model("test_efficientnet", num_classes=2).eval()
    save_file(original.state_dict(), tmp_path / "mine.safetensors")
    arguments = {"checkpoint_path": str(tmp_path / "mine.safetensors"), "drop_rate": 0.1}
    model = timm_wrapper("test_efficientnet", ["cat", "dog"], model_args=arguments)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images).logits, original(images))
    assert model.config.model_args == {"drop_rate": 0.1}


def test_arguments_for_a_model_that_brings_its_own_are_refused(tmp_path):
    timm_wrapper("test_efficientnet", ["cat", "dog"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which is saved with its own, expected none"):
        timm_wrapper(str(tmp_path), None, model_args={"drop_rate": 0.1})


@pytest.mark.parametrize("names", [["cat", "dog", "fish"], ["cat", "dog"]])
def test_classes_of_the_data_are_named_and_not_those_of_the_file(tmp_path, names):
    timm_wrapper("test_efficientnet", ["a", "b", "c"]).save_pretrained(tmp_path / "float")
    model = timm_wrapper(str(tmp_path / "float"), names)
    calibrate(prepare_qat(model, OscQATConfig()), [torch.randn(2, 3, 32, 32)])
    for form, saved in (("qat", model), ("packed", pack(model))):
        saved.save_pretrained(tmp_path / form)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / form)
        assert loaded.config.id2label == dict(enumerate(names))
    loaded.config.id2label = {i: name.upper() for i, name in enumerate(names)}
    loaded.save_pretrained(tmp_path / "renamed")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "renamed")
    assert list(again.config.id2label.values()) == [name.upper() for name in names]


def test_the_same_classes_in_another_order_are_refused(tmp_path):
    timm_wrapper("test_efficientnet", ["cat", "dog"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the same classes in another order"):
        timm_wrapper(str(tmp_path), ["dog", "cat"])
