"""The model card of a packed checkpoint, rendered from `model_cards/model_card.md.jinja`."""

from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

TEMPLATE = "model_card.md.jinja"


def template() -> Traversable:
    """Return the template: in an installed package inside it, in a checkout in the folder beside it."""
    installed = files("hf_oscqat") / "model_cards" / TEMPLATE
    return installed if installed.is_file() else Path(__file__).parents[2] / "model_cards" / TEMPLATE


def render_card(results: Mapping[str, Any]) -> ModelCard:
    """Render the card from what a run measured.

    Args:
        results: the content of `results.json`, as `training/run_qat.py` writes it.

    Returns:
        The card, metadata included.

    Raises:
        jinja2.UndefinedError: if the template asks for something that `results` does not have.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True
    )
    environment.filters |= {"percent": _percent, "thousands": _thousands}
    body = environment.from_string(template().read_text(encoding="utf-8")).render(results)
    card = ModelCard(f"---\n{_metadata(results).to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)
    return card


def _metadata(results: Mapping[str, Any]) -> ModelCardData:
    base_model = results["model"]["base_model"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=results["model"]["license"],
        base_model=base_model,
        datasets=results["data"]["dataset_id"],
        metrics=["accuracy"],
        tags=["timm", "oscqat", "quantization-aware-training", results["scheme"]["name"].lower()],
    )
    if base_model:
        data.base_model_relation = "quantized"
    return data


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _thousands(count: int) -> str:
    return f"{int(count):,}"
