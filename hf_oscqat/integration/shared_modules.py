"""Modules that a model holds in several places, as CoaT holds its position encodings: saved once, loaded into all.

safetensors stores no tensor twice, and transformers asks for a declaration of every name that is tied to another, and
can tie parameters only. A shared module needs no tying: it is enough to save and load it in the first of its places,
by which `named_modules`, config.json and the header of the file name it anyway.
"""

from collections.abc import Iterable

from torch import Tensor, nn

Place = tuple[nn.Module, str, nn.Module]
"""A module that holds another, under what name, and the other."""


def state_dict_without_repeats(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with the tensors of a shared module under the name of its first place only."""
    names = {name for name, _ in model.named_modules()}
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] in names}


def hide_repeats(model: nn.Module) -> list[Place]:
    """Take shared modules out of all their places but the first; the model cannot run until they are restored."""
    modules = dict(model.named_modules())
    places = [
        (module, child_name, child)
        for name, module in modules.items()
        for child_name, child in module._modules.items()
        if child is not None and f"{name}.{child_name}".removeprefix(".") not in modules
    ]
    for module, child_name, _ in places:
        module._modules[child_name] = None  # and not deleted: the order of the names stays
    return places


def restore_repeats(places: Iterable[Place]) -> None:
    """Put back what `hide_repeats` took out."""
    for module, child_name, child in places:
        module._modules[child_name] = child
