"""Make `modeling_oscqat.py`, the one file that a published repository carries so that anyone can load it.

It is these modules of the package, one after the other, without the imports between them. Run as a module this writes
the file; a test compares it with what this makes, so the two cannot drift apart.
"""

import ast
import importlib.util
from pathlib import Path

MODULES = (
    "hf_oscqat.quantization.gradient_estimators",
    "hf_oscqat.quantization.kernels",
    "hf_oscqat.quantization.functional",
    "hf_oscqat.quantization.timm_layers",
    "hf_oscqat.quantization.packing",
    "hf_oscqat.quantization.packed",
    "hf_oscqat.quantization.activations",
    "hf_oscqat.quantization.norms",
    "hf_oscqat.checkpoint",
    "hf_oscqat.integration.shared_modules",
    "hf_oscqat.integration.modeling",
)
TARGET = Path(__file__).with_name("modeling_oscqat.py")
HEADER = '''"""Loads a packed low-bit timm model; made from the source of the hf_oscqat package, not to be edited.

It needs torch, timm, transformers and safetensors, and nothing else. With `import hf_oscqat` it is not used.
"""
'''


def bundle() -> str:
    """Return the source of the file.

    Raises:
        ValueError: if two modules define the same name.
    """
    imports: dict[str, set[str]] = {}
    bodies: list[str] = []
    defined: dict[str, str] = {}
    for module in MODULES:
        source = _source(module)
        lines = source.splitlines()
        tree = ast.parse(source)
        first_line = 0
        for node in tree.body:
            if isinstance(node, ast.Import):
                imports[ast.unparse(node)] = set()
            elif isinstance(node, ast.ImportFrom) and node.module:
                if not node.module.startswith("hf_oscqat"):
                    imports.setdefault(f"from {node.module} import", set()).update(map(ast.unparse, node.names))
            elif node is not tree.body[0] or not _is_docstring(node):
                for name in _names(node):
                    if defined.setdefault(name, module) != module:
                        raise ValueError(f"got {name!r} in both {defined[name]} and {module}, expected one name once")
                continue
            first_line = node.end_lineno or first_line
        title = f"# {'-' * 3} {module}\n"
        bodies.append(title + "\n".join(lines[first_line:]).strip("\n"))
    header = [f"{start} {', '.join(sorted(names))}".strip() for start, names in sorted(imports.items())]
    return HEADER + "\n# ruff: noqa\n" + "\n".join(header) + "\n\n" + "\n\n\n".join(bodies) + "\n"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.col_offset == 0


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


if __name__ == "__main__":
    TARGET.write_text(bundle(), encoding="utf-8")
