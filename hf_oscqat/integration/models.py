"""Make the transformers wrapper of a timm model, from a timm name, a folder or a Hub id."""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig
from transformers import TimmWrapperForImageClassification as TimmWrapper

logger = logging.getLogger(__name__)


def timm_wrapper(
    name_or_path: str,
    class_names: Sequence[str] | None,
    *,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load or make an image classifier with one output per class.

    Args:
        name_or_path: a timm name; or a folder or Hub id with a timm model saved by transformers or timm, float, in
            training form or packed.
        class_names: names of the classes; a head of another size is made anew, which is logged. None keeps the head.
        pretrained: for a timm name, whether to load its pretrained weights.
        model_args: for a timm name, further arguments of `timm.create_model`; with `checkpoint_path`, weights of your
            own. A folder or Hub id brings its own.

    Raises:
        ValueError: if the name is unknown, `model_args` are given for a model that brings its own, a packed model or
            one in training form has another number of classes, or a loaded model has the classes in another order.
    """
    if os.path.isdir(name_or_path) or (not timm.is_model(name_or_path) and "/" in name_or_path):
        if model_args:
            raise ValueError(
                f"got model_args {dict(model_args)} for {name_or_path}, which is saved with its own, expected none: "
                "change them in its config.json, or take a timm name"
            )
        return _load(name_or_path, class_names)
    if not timm.is_model(name_or_path):
        close = difflib.get_close_matches(name_or_path, timm.list_models(), n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"got model {name_or_path!r}, expected a timm name, an existing folder or a Hub id such as org/name{meant}"
        )
    extra = dict(model_args or {})
    kept = {} if class_names is None else {"num_classes": len(class_names)}
    timm_model = timm.create_model(name_or_path, pretrained=pretrained, **kept, **extra)
    # Whoever loads the model from its own checkpoint has no such file.
    extra.pop("checkpoint_path", None)
    original = timm.get_pretrained_cfg(name_or_path)
    if pretrained and original is not None and timm_model.num_classes != original.num_classes:
        _say_head(name_or_path, original.num_classes, timm_model.num_classes)
    config = TimmWrapperConfig(
        architecture=name_or_path.split(".")[0],
        num_labels=timm_model.num_classes,
        model_args=extra or None,
        pretrained_cfg={k: v for k, v in timm_model.pretrained_cfg.items() if k != "num_classes"},
    )
    _name_classes(config, class_names)
    with torch.device("meta"):
        model = TimmWrapper(config)
    model.timm_model = timm_model
    return model.eval()


def _load(path: str, class_names: Sequence[str] | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    # timm writes the number of classes among the arguments too, and transformers passes it twice then.
    arguments = getattr(config, "model_args", None) or {}
    if "num_classes" in arguments:
        config.model_args = {name: value for name, value in arguments.items() if name != "num_classes"}
    wanted = config.num_labels if class_names is None else len(class_names)
    if wanted == config.num_labels:
        model = AutoModelForImageClassification.from_pretrained(path, config=config)
        if class_names is not None:
            check_classes(model.config, class_names, path)
            _name_classes(model.config, class_names)
        return model
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"got {path} with {config.num_labels} classes and data with {wanted}, expected as many: "
            "the head of a quantized model cannot be replaced"
        )
    _say_head(path, config.num_labels, wanted)
    config.num_labels = wanted
    model = AutoModelForImageClassification.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
    _name_classes(model.config, class_names)
    return model


def check_classes(config: Any, class_names: Sequence[str], name: str) -> None:
    """Refuse data whose classes are not those of a model, as far as both are named.

    Args:
        config: of the model.
        class_names: of the data, in the order of their labels.
        name: of the model, for the message.

    Raises:
        ValueError: if there are more or fewer, or the same in another order.
    """
    names, labels = list(class_names), [str(config.id2label[i]) for i in range(config.num_labels)]
    if len(names) != len(labels):
        raise ValueError(
            f"got {name} with {len(labels)} classes and data with {len(names)}, expected as many: what its outputs "
            "mean would be a guess"
        )
    if names != labels and set(names) == set(labels):
        raise ValueError(
            f"got {name} and data with the same classes in another order ({', '.join(labels[:3])}, .. and "
            f"{', '.join(names[:3])}, ..), expected one order: rename the folders, or label_names in its config.json"
        )


def _name_classes(config: Any, class_names: Sequence[str] | None) -> None:
    if class_names is not None:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: i for i, name in enumerate(class_names)}
        # A config that was loaded has the names of its file here, and would write those.
        config.label_names = list(class_names)


def _say_head(name: str, had: int, gets: int) -> None:
    logger.warning("the head of %s has %d classes and the data %d: it is initialised anew", name, had, gets)
