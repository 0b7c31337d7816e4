"""The map of docs/design.md as a test: who may import whom, and what nobody may use."""

import ast
import sys
from pathlib import Path

import pytest

import hf_oscqat

PACKAGE = Path(hf_oscqat.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# What each part may import of the package. `register` in `__init__` is the only use of it from above.
MAY_IMPORT = {
    "quantization": {"quantization"},
    "remedies": {"quantization", "remedies"},
    "config": {"quantization", "remedies"},
    "prepare": {"quantization", "remedies", "config"},
    "diagnosis": {"quantization", "remedies"},
    "checkpoint": {"quantization"},
    "report": {"quantization", "remedies", "config", "prepare", "checkpoint", "report"},
    "hub": {"quantization", "remedies", "config", "prepare", "checkpoint", "report", "hub"},
    "integration": {
        "quantization",
        "remedies",
        "config",
        "prepare",
        "diagnosis",
        "checkpoint",
        "report",
        "hub",
        "integration",
    },
    "studies": {"quantization", "remedies", "config", "prepare", "report", "integration", "studies"},
}
EVERYTHING = {"__init__", "cli", "__main__"}
MAY_NOT_IMPORT_OUTSIDE = {
    "quantization": {"transformers", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy"},
    "remedies": {"transformers", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy"},
    "config": {"timm", "accelerate", "datasets", "huggingface_hub"},
    "prepare": {"timm", "accelerate", "datasets", "huggingface_hub"},
    "checkpoint": {"transformers", "timm", "accelerate", "datasets", "huggingface_hub"},
}


def part_of(path):
    """`quantization/layers.py` -> `quantization`, `config.py` -> `config`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path, *, at_import=False):
    """Dotted names that a module imports; with `at_import`, only those that run when it is imported."""
    names = []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child) or (at_import and isinstance(child, ast.FunctionDef | ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                names.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name} has a relative import"
                names.append(child.module)
                names.extend(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))


@every_module
def test_module_has_a_place_on_the_map(path):
    assert part_of(path) in MAY_IMPORT.keys() | EVERYTHING


@every_module
def test_module_imports_only_from_parts_that_stand_above_it(path):
    part = part_of(path)
    if part in EVERYTHING:
        assert not [n for n in imports(path) if n.startswith("hf_oscqat.cli")]
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("hf_oscqat.")}
    assert used <= MAY_IMPORT[part]
    assert "hf_oscqat" not in imports(path), "the package's front door imports everything"


@every_module
def test_module_imports_no_library_that_its_part_does_without(path):
    used = {name.split(".")[0] for name in imports(path)}
    assert not used & MAY_NOT_IMPORT_OUTSIDE.get(part_of(path), set())
    # Which of the two huggingface_hub uses depends on its version; `huggingface_hub.utils.httpx` names the right one.
    assert not used & {"httpx", "httpx2"}


def test_quantization_needs_torch_and_the_standard_library_only():
    for path in MODULES:
        if part_of(path) == "quantization":
            outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
            assert outside <= {"torch", "hf_oscqat"}, path.name


def test_modules_import_each_other_in_one_direction_only():
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: {used for used in imports(path, at_import=True) if used in names and used != name}
        for name, path in names.items()
    }
    while graph:
        leaves = {name for name, used in graph.items() if not used}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: used - leaves for name, used in graph.items() if name not in leaves}


@every_module
def test_module_does_not_print_and_loads_no_pickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"print", "torch.load", "eval", "exec", "pickle.load", "pickle.loads"}
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}


@every_module
def test_module_begins_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_public_names_are_the_same_to_type_checkers_and_to_programs():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if is_type_checking(node))
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert shown == hf_oscqat._MODULE_OF
    assert sorted(shown) == sorted(hf_oscqat.__all__)
    assert set(hf_oscqat.__all__) <= set(dir(hf_oscqat))
    with pytest.raises(AttributeError, match="has no attribute 'prepare_qta'"):
        hf_oscqat.prepare_qta  # noqa: B018


def test_public_names_exist():
    assert sorted(hf_oscqat.__all__) == sorted(set(hf_oscqat.__all__))
    for name in hf_oscqat.__all__:
        assert getattr(hf_oscqat, name).__doc__, name
    contract = """OscQATConfig prepare_qat calibrate quantizer_parameters model_parameters OscillationTracker
    dampening_loss reestimate_batchnorm OscQATTrainer OscQATTrainingArguments pack fake_quantize"""
    assert set(contract.split()) <= set(hf_oscqat.__all__)


def test_test_modules_have_names_of_their_own():
    """pytest imports them by their name alone, and would refuse the second of two."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
