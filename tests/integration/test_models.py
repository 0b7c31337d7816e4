"""From a name or a folder to a classifier with the right head."""

import logging

import pytest
import torch

from hf_oscqat import pack
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
