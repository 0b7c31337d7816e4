"""Quantization-aware training for timm models that overcomes weight oscillations.

Importing this package makes transformers' Auto classes able to load what it publishes. Its public names are imported
when they are first asked for, so that `oscqat inspect` need not wait for transformers' models and Trainer.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

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

_MODULE_OF = {
    "CheckpointError": "hf_oscqat.checkpoint",
    "OscQATConfig": "hf_oscqat.config",
    "OscQATTimmConfig": "hf_oscqat.integration.modeling",
    "OscQATTimmForImageClassification": "hf_oscqat.integration.modeling",
    "OscQATTimmModel": "hf_oscqat.integration.modeling",
    "OscQATTrainer": "hf_oscqat.integration.trainer",
    "OscQATTrainingArguments": "hf_oscqat.integration.trainer",
    "OscillationTracker": "hf_oscqat.remedies.tracker",
    "calibrate": "hf_oscqat.prepare",
    "dampening_loss": "hf_oscqat.remedies.dampening",
    "describe": "hf_oscqat.prepare",
    "fake_quantize": "hf_oscqat.quantization.functional",
    "model_parameters": "hf_oscqat.prepare",
    "pack": "hf_oscqat.integration.export",
    "prepare_qat": "hf_oscqat.prepare",
    "quantizer_parameters": "hf_oscqat.prepare",
    "reestimate_batchnorm": "hf_oscqat.remedies.batchnorm",
}


def _register() -> None:
    from hf_oscqat.integration.register import register

    register()


if TYPE_CHECKING:
    from hf_oscqat.checkpoint import CheckpointError
    from hf_oscqat.config import OscQATConfig
    from hf_oscqat.integration.export import pack
    from hf_oscqat.integration.modeling import OscQATTimmConfig, OscQATTimmForImageClassification, OscQATTimmModel
    from hf_oscqat.integration.trainer import OscQATTrainer, OscQATTrainingArguments
    from hf_oscqat.prepare import calibrate, describe, model_parameters, prepare_qat, quantizer_parameters
    from hf_oscqat.quantization.functional import fake_quantize
    from hf_oscqat.remedies.batchnorm import reestimate_batchnorm
    from hf_oscqat.remedies.dampening import dampening_loss
    from hf_oscqat.remedies.tracker import OscillationTracker
else:
    # Hidden from type checkers, which would take every misspelt name for one that is found here.
    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _register()
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command line of the package registers when a command needs it; `oscqat inspect` builds no transformers model.
# Whatever else is called by that name registers with the first public name that it asks for.
if PurePath(next(iter(getattr(sys, "argv", ())), "")).stem != "oscqat":
    _register()
