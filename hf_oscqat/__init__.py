"""Quantization-aware training for timm models that overcomes weight oscillations.

Importing this package makes transformers' Auto classes able to load what it publishes.
"""

from hf_oscqat.checkpoint import CheckpointError
from hf_oscqat.config import OscQATConfig
from hf_oscqat.integration.export import pack
from hf_oscqat.integration.modeling import OscQATTimmConfig, OscQATTimmForImageClassification, OscQATTimmModel
from hf_oscqat.integration.register import register
from hf_oscqat.integration.trainer import OscQATTrainer, OscQATTrainingArguments
from hf_oscqat.prepare import calibrate, describe, model_parameters, prepare_qat, quantizer_parameters
from hf_oscqat.quantization.functional import fake_quantize
from hf_oscqat.remedies.batchnorm import reestimate_batchnorm
from hf_oscqat.remedies.dampening import dampening_loss
from hf_oscqat.remedies.tracker import OscillationTracker

__all__ = [
    "CheckpointError",
    "OscQATConfig",
    "OscQATTimmConfig",
    "OscQATTimmForImageClassification",
    "OscQATTimmModel",
    "OscQATTrainer",
    "OscQATTrainingArguments",
    "OscillationTracker",
    "calibrate",
    "dampening_loss",
    "describe",
    "fake_quantize",
    "model_parameters",
    "pack",
    "prepare_qat",
    "quantizer_parameters",
    "reestimate_batchnorm",
]

register()
