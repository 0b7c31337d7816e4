"""Make transformers' Auto classes know the published model, as `import hf_oscqat` does."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_oscqat.integration import quantizer  # noqa: F401  (enters config and quantizer in transformers' tables)
from hf_oscqat.integration.modeling import OscQATTimmConfig, OscQATTimmForImageClassification, OscQATTimmModel


def register() -> None:
    """Enter the model type; may be called again."""
    AutoConfig.register(OscQATTimmConfig.model_type, OscQATTimmConfig, exist_ok=True)
    AutoModel.register(OscQATTimmConfig, OscQATTimmModel, exist_ok=True)
    AutoModelForImageClassification.register(OscQATTimmConfig, OscQATTimmForImageClassification, exist_ok=True)
    AutoImageProcessor.register(OscQATTimmConfig, TimmWrapperImageProcessor, exist_ok=True)
