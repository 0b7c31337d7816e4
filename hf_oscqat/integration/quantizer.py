"""What `from_pretrained` does with an `OscQATConfig`: for the training form, the packed form, and a float model."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_oscqat.checkpoint import CheckpointError
from hf_oscqat.config import QUANT_METHOD, OscQATConfig
from hf_oscqat.integration.modeling import PackedQuantizer, check_all_loaded, ignore_head
from hf_oscqat.integration.shared_modules import hide_repeats
from hf_oscqat.prepare import check_layers, insert_quantizers
from hf_oscqat.quantization.layers import quantized_layers, quantizers
from hf_oscqat.remedies.tracker import OscillationState, attach_oscillation_state

logger = logging.getLogger(__name__)


class OscQATQuantizer(PackedQuantizer):
    """The HfQuantizer of this package."""

    quantization_config: OscQATConfig

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Keep the training form in float32: in 16 bits its latent weights could not move by one learning rate."""
        if not self._is_packed and dtype not in (torch.float32, torch.float64):
            logger.warning(
                "got dtype=%s for a model in training form; it stays float32. Use bf16=True to train", dtype
            )
            return torch.float32
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self._is_packed:
            super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
        elif self.pre_quantized:
            ignored = ignore_head(model)
            insert_quantizers(model, self.quantization_config, partial_model=True)
            self.hidden_repeats = hide_repeats(model)
            _attach_what_was_saved(model, checkpoint_files or (), ignored)
        else:
            self.float_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._is_packed:
            return super()._process_model_after_weight_loading(model, **kwargs)
        if not self.pre_quantized:
            _renew_mismatched(model, self.float_shapes)
            insert_quantizers(model, self.quantization_config)
            return model
        check_all_loaded(model)
        self.restore_repeats()
        for name, quantizer in quantizers(model):
            quantizer.refresh()
            if not bool((torch.isfinite(quantizer.scale) & (quantizer.scale > 0)).all()):
                raise CheckpointError(f"got a scale that is not finite and positive in '{name}.scale'")
        for module in model.modules():
            if isinstance(module, OscillationState):
                module.refresh()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what goes into the file, and into its header.

        Raises:
            ValueError: if a layer was replaced after preparation; the file could not be loaded.
        """
        if not self._is_packed:
            check_layers(model, self.quantization_config)
        state_dict, metadata = super().get_state_dict_and_metadata(model)
        return state_dict, metadata if self._is_packed else {}

    @property
    def is_trainable(self) -> bool:
        """Whether Trainer may train the model."""
        return not self._is_packed

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer may train the quantized weights themselves."""
        return not self._is_packed

    @property
    def _is_packed(self) -> bool:
        return self.quantization_config.checkpoint_format == "packed"


def _renew_mismatched(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> None:
    """Initialise anew what came in another shape than the model has, a head with other labels for example.

    transformers 5.17 takes such tensors as they are where there is a quantizer; later versions see to it themselves.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.shape != shapes[name]:
            got, expected = [*parameter.shape], [*shapes[name]]
            logger.warning("got %s of shape %s, expected %s: it begins anew", name, got, expected)
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, own, nn.Parameter(parameter.new_empty(shapes[name])))
            module.reset_parameters()


def _attach_what_was_saved(model: PreTrainedModel, files: Sequence[str], ignored: tuple[str, ...]) -> None:
    """Make room for tracker state and frozen integers, which a checkpoint has if training has come that far.

    Raises:
        CheckpointError: if the file has quantizers that the model, as config.json describes it, has not.
    """
    shapes: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    names = shapes.keys()
    for name, layer in quantized_layers(model):
        # transformers must not initialise what it finds here: the weight is computed, and all else is in the file.
        layer._is_hf_initialized = True  # type: ignore[assignment]
        if f"{name}.oscillation.frequency" in names:
            attach_oscillation_state(layer, count_total=f"{name}.oscillation.total" in names)
        if f"{name}.weight_quantizer.frozen_int" in names and layer.weight_quantizer is not None:
            layer.weight_quantizer.allow_freezing(layer.latent_weight)
    state = model.state_dict()
    for name, tensor in state.items():
        if name in names and shapes[name] != list(tensor.shape):
            raise CheckpointError(f"got tensor {name!r} of shape {shapes[name]}, expected {list(tensor.shape)}")
    expected = state.keys()
    ours = (".weight_quantizer.", ".input_quantizer.", ".oscillation.")
    unknown = [name for name in names - expected if not name.startswith(ignored)]
    extra = sorted(name for name in unknown if any(part in name for part in ours))
    if extra:
        raise CheckpointError(
            f"got tensor {extra[0]!r}, for which config.json describes no quantizer, expected file and config to agree"
        )


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OscQATConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = OscQATQuantizer
