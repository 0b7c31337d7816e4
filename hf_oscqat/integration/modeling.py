"""The published model: a timm model in packed form under a model type of its own.

With transformers' own `timm_wrapper` type, a program that never heard of this package would skip the quantization with
a warning and go on with random weights. Under a type of its own it is asked for `trust_remote_code=True` instead, and
what that runs is `modeling_oscqat.py`, made from this module and the few it needs (see `remote_code.py`).
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_oscqat.checkpoint import (
    FORMAT_VERSION,
    WEIGHT_FILE,
    CheckpointError,
    check_checkpoint,
    header_metadata,
    packed_layers,
    sort_metadata,
)
from hf_oscqat.integration.shared_modules import Place, hide_repeats, restore_repeats, state_dict_without_repeats
from hf_oscqat.quantization.activations import fold_activations
from hf_oscqat.quantization.norms import let_norms_overwrite
from hf_oscqat.quantization.packed import FormatError, LayerFormat, keep_packed, make_packed
from hf_oscqat.quantization.timm_layers import forbid_merging, separate_qkv_bias

REMOTE_CODE = "modeling_oscqat"
PACKED_METHOD = "oscqat"
ALIGNMENT = 64
"""Bytes to which torch aligns the memory it allocates."""


class OscQATTimmConfig(TimmWrapperConfig):
    """Configuration of a packed timm model; the fields are those of `TimmWrapperConfig`."""

    model_type = "oscqat_timm"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; transformers would keep the `label_names` of the file that it was loaded from."""
        return {**super().to_dict(), "label_names": [self.id2label[i] for i in range(self.num_labels)]}

    def __repr__(self) -> str:
        """Name the architecture; transformers asks for this on every load, and the grids of all layers take long."""
        return f"{type(self).__name__}(architecture={self.architecture!r})"


class _NothingToFill(TorchFunctionMode):
    """Leaves out what fills tensors of the meta device, which hold nothing.

    `from_pretrained` makes the model there, and random weights for it would take a fourth of the time of loading.
    """

    FILLS = frozenset(f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _PublishedModel:
    """What the published classes share: what they are made from, and how they are saved."""

    def __init__(self, config: OscQATTimmConfig, *args: Any, **kwargs: Any) -> None:
        """Make the model, to be filled by `from_pretrained`.

        Raises:
            CheckpointError: if the config has no `quantization_config`; transformers would load random weights.
        """
        if getattr(config, "quantization_config", None) is None:
            raise CheckpointError(
                "got a config.json of a packed model without quantization_config, expected what hf_oscqat.pack writes"
            )
        with _NothingToFill():
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def keep_packed(self, enabled: bool = True) -> Self:
        """Choose memory over speed: hold the integers only, and unpack a weight each time it is used.

        Otherwise, and by default, unpacked weights are kept from the first forward on, beside the integers; they take
        as much memory as those of the float model. This holds for the object at hand and is not saved.

        Args:
            enabled: False goes back to the default.

        Returns:
            The model, so that it can follow `from_pretrained` at once.
        """
        keep_packed(cast(PreTrainedModel, self), enabled)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save weights and config, and beside them the code that loading needs.

        Args:
            save_directory: folder, made if missing.
            **kwargs: as in transformers.
        """
        model = cast(PreTrainedModel, self)
        model.config.auto_map = {
            "AutoConfig": f"{REMOTE_CODE}.{OscQATTimmConfig.__name__}",
            "AutoModel": f"{REMOTE_CODE}.{OscQATTimmModel.__name__}",
            "AutoModelForImageClassification": f"{REMOTE_CODE}.{OscQATTimmForImageClassification.__name__}",
        }
        # AutoImageProcessor looks here, and the processor finds timm's pretrained_cfg beside it.
        model.config.image_processor_type = "TimmWrapperImageProcessor"
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(target, **kwargs)  # type: ignore[misc]
            return
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", target.name)
        # Beside its place, so that a full disk leaves the checkpoint that was there as it is.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=target) as beside:
            # Beside this file lies the remote code; where this file is the remote code, that is itself.
            source = Path(__file__).with_name(f"{REMOTE_CODE}.py").read_text(encoding="utf-8")
            Path(beside, f"{REMOTE_CODE}.py").write_text(source, encoding="utf-8")
            super().save_pretrained(beside, **kwargs)  # type: ignore[misc]
            written = {path.name: path for path in Path(beside).iterdir()}
            for path in written.values():
                if path.suffix == ".safetensors":
                    sort_metadata(path)
            for name, path in written.items():
                path.replace(target / name)
            for path in target.iterdir():
                # Weights of a variant stand beside those without one.
                if not kwargs.get("variant") and WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
                    path.unlink()
        if push:
            names = ("token", "private", "create_pr", "revision", "license", "commit_message")
            given = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(repo_id, **given)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push to the Hub in one commit: weights, config, code, card and what else lies beside the weights.

        Args:
            repo_id: `org/name`.
            **kwargs: as in `hf_oscqat.hub.push.push_folder`: token, private, create_pr, revision, license; and
                `commit_message`.

        Returns:
            The commit, and what it changed.

        Raises:
            ImportError: without hf_oscqat, which knows how to make the card.
            ValueError: see `push_folder`.
        """
        try:
            from hf_oscqat.integration.publish import push_model
        except ImportError as error:
            raise ImportError("pushing a packed model needs its package: pip install hf_oscqat") from error
        return push_model(cast(PreTrainedModel, self), repo_id, **kwargs)

    @classmethod
    def is_remote_code(cls) -> bool:
        """Whether transformers should copy the file of this class: never, `save_pretrained` above does."""
        return False


class OscQATTimmModel(_PublishedModel, TimmWrapperModel):
    """A packed timm model without head, as `AutoModel` loads it."""

    config_class = OscQATTimmConfig


class OscQATTimmForImageClassification(_PublishedModel, TimmWrapperForImageClassification):
    """A packed timm model with its classifier."""

    config_class = OscQATTimmConfig


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint where the package itself is not imported: kept as it is."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)
        self.quant_method = PACKED_METHOD


class PackedQuantizer(HfQuantizer):
    """What `from_pretrained` does for a packed checkpoint: make the layers and check the file."""

    hidden_repeats: Sequence[Place] = ()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        layers = getattr(self.quantization_config, "layers", None)
        if getattr(self.quantization_config, "checkpoint_format", None) != "packed" or not isinstance(layers, dict):
            raise CheckpointError(
                "got a config.json whose quantization_config has no checkpoint_format 'packed' and layers, "
                "expected what hf_oscqat.pack writes"
            )
        version = getattr(self.quantization_config, "format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"got format_version {version!r} in config.json, expected {FORMAT_VERSION}: "
                "a newer hf_oscqat may read it"
            )
        headless = ignore_head(model)
        separate_qkv_bias(model)
        modules = dict(model.named_modules())
        for name, data in layers.items():
            if not f"{name}.".startswith(headless):
                if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
                    raise CheckpointError(f"got layer {name!r} in config.json, which the model does not have")
                try:
                    make_packed(modules[name], LayerFormat.from_dict(name, data))
                except FormatError as error:
                    raise CheckpointError(f"layer {name!r}: {error}") from error
                # Its weight is computed; transformers must not initialise it.
                modules[name]._is_hf_initialized = True
        fold_activations(model)
        let_norms_overwrite(model)
        forbid_merging(model)
        self.hidden_repeats = hide_repeats(model)
        if checkpoint_files:
            _check_inside(checkpoint_files, str(model.config.name_or_path))
            check_checkpoint(checkpoint_files, layers, model, headless)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_all_loaded(model)
        self.restore_repeats()
        for parameter in model.parameters():
            # Mapped from the file, it may begin anywhere; torch would then sum in another order than in training.
            if parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        return model

    def restore_repeats(self) -> None:
        """Put shared modules back into all their places."""
        restore_repeats(self.hidden_repeats)
        self.hidden_repeats = ()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what goes into the file, and into its header.

        Raises:
            CheckpointError: if a layer is no longer what config.json says, and the file could not be loaded.
        """
        layers, now = getattr(self.quantization_config, "layers", None) or {}, packed_layers(model)
        headless = ignore_head(model)
        changed = [
            name
            for name, data in layers.items()
            if not f"{name}.".startswith(headless)
            and (name not in now or now[name].format != LayerFormat.from_dict(name, data))
        ]
        if changed:
            raise CheckpointError(
                f"got a packed model whose layers {', '.join(changed[:3])} are no longer those that were packed, "
                "expected the same: replace layers (as reset_classifier does) before prepare_qat"
            )
        return state_dict_without_repeats(model), header_metadata(model)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed integers cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` accepts the layers."""
        return True


def _check_inside(files: Sequence[str], folder: str) -> None:
    """Refuse files that an index names outside of the folder it stands in; for the Hub its client sees to that."""
    if not os.path.isdir(folder):
        return
    root = os.path.abspath(folder)
    for file in files:
        if os.path.commonpath([root, os.path.abspath(file)]) != root:
            raise CheckpointError(f"got {file!r} in the index of {folder}, expected files of that folder only")


def ignore_head(model: PreTrainedModel) -> tuple[str, ...]:
    """Let a model that was built without its classifier pass over the tensors of one.

    Returns:
        What the names of those tensors begin with; empty for a model with a classifier.
    """
    if not isinstance(model, TimmWrapperModel):
        return ()
    timm_model = cast(Any, model.timm_model)
    entry = (getattr(timm_model, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes = tuple(f"timm_model.{name}." for name in ([entry] if isinstance(entry, str) else entry))
    model._keys_to_ignore_on_load_unexpected = {rf"^{prefix}" for prefix in prefixes}
    return prefixes


def check_all_loaded(model: nn.Module) -> None:
    """Refuse a model of which the checkpoint has filled a part only; transformers leaves the rest uninitialised.

    Raises:
        CheckpointError: naming the tensors.
    """
    state = model.state_dict(keep_vars=True)
    empty = [name for name, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if empty:
        some = ", ".join(empty[:5])
        raise CheckpointError(f"got a checkpoint that does not fill {len(empty)} tensors of the model: {some}")


# Without these entries transformers would warn of an unknown method and skip it. The package enters its own.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(PACKED_METHOD, PackedConfig)
AUTO_QUANTIZER_MAPPING.setdefault(PACKED_METHOD, PackedQuantizer)
