"""The code that a pipeline folder carries, so that diffusers loads it where this package is not installed.

diffusers takes the pipeline's class from `pipeline.py` in the folder, and a component's from a file in the component's
folder that `model_index.json` names. It copies each to a place of its own before it imports it, so each has to stand
alone: it is put together from the modules of this package that it needs.
"""

import ast
import importlib
import inspect
import json
import os
import sys
from functools import cache
from pathlib import Path

import diffusers

PACKAGE = "jit_accel"
INDEX_FILE = "model_index.json"

HEADER = '''"""{name} of jit_accel {version} (MIT), put together from its modules when the pipeline was saved."""

from __future__ import annotations

'''
FOOTER = """
# Where the package is installed its own class takes this one's place, so that isinstance() holds and its fixes apply.
try:
    {name} = importlib.import_module("{package}").{name}
except (ImportError, AttributeError):
    pass
"""


def carry_code(folder: Path, pipeline_class: type) -> None:
    """Put the code of a pipeline just saved beside its weights, and name it in `model_index.json`."""
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)  # where it was loaded from is nobody's business once it is shared
    for name, value in list(index.items()):
        if (folder / name).is_dir() and (component := _our_class(*value)):
            (folder / name / f"jit_{name}.py").write_text(carried_source(component), encoding="utf-8")
            index[name] = [f"jit_{name}", component.__name__]
            if (config := folder / name / "config.json").is_file():
                content = json.loads(config.read_text(encoding="utf-8"))
                content.pop("_name_or_path", None)
                # for `AutoModel`, by the folder of the network or by the pipeline's and the name of the subfolder
                index["auto_map"] = content["auto_map"] = {"AutoModel": f"jit_{name}.{component.__name__}"}
                config.write_text(json_text(content), encoding="utf-8")
    if _our_class(pipeline_class.__module__, pipeline_class.__name__):
        (folder / "pipeline.py").write_text(carried_source(pipeline_class), encoding="utf-8")
        index["_class_name"] = ["pipeline", pipeline_class.__name__]
    if isinstance(index.get("class_names"), list):
        # On the Hub diffusers takes every list that starts with a text for a component, and looks for its code.
        index["class_names"] = {str(i): name for i, name in enumerate(index["class_names"])}
    (folder / INDEX_FILE).write_text(json_text(index), encoding="utf-8")


def json_text(content: dict) -> str:
    """Return JSON as diffusers writes it, but with letters of all languages as they are."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _our_class(module: str | None, name: str) -> type | None:
    """Return a class of this package, or one that was carried by a folder; None for any other."""
    is_ours = module and module.partition(".")[0] in (PACKAGE, "diffusers_modules")
    return getattr(sys.modules.get(module), name, None) if is_ours else None


@cache  # pipelines may be saved often
def carried_source(cls: type) -> str:
    """Return the text of a file that defines this class and imports nothing of this package."""
    if cls.__module__.partition(".")[0] != PACKAGE:  # it came with a folder, and is such a file already
        return inspect.getsource(sys.modules[cls.__module__])
    imports, parts = {"import importlib": None}, {}
    _collect(cls.__module__, imports, parts)
    header = HEADER.format(name=cls.__name__, version=importlib.import_module(PACKAGE).__version__)
    footer = FOOTER.format(name=cls.__name__, package=PACKAGE)
    return header + "\n".join(sorted(imports)) + "\n" + "".join(parts.values()) + footer


def _collect(module: str, imports: dict[str, None], parts: dict[str, str]) -> None:
    """Add the code of a module, after that of what it imports from this package; the other imports go to `imports`."""
    source = inspect.getsource(importlib.import_module(module))
    lines: list[str | None] = source.splitlines()
    for i, node in enumerate(ast.parse(source).body):
        origin = node.module if isinstance(node, ast.ImportFrom) else ""
        if origin == PACKAGE:
            raise ValueError(f"{module}: `{ast.unparse(node)}` cannot be carried: import names, not a module")
        if origin.startswith(f"{PACKAGE}."):
            if origin not in parts:
                _collect(origin, imports, parts)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if origin != "__future__":
                imports[ast.unparse(node)] = None
        elif i > 0 or not isinstance(node, ast.Expr):  # else it is the module's docstring
            continue
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    code = "\n".join(line for line in lines if line is not None).strip("\n")
    parts[module] = f"\n# ---- {module}\n\n{code}\n"


class KeptCardMixin:
    """For a `DiffusionPipeline`: its model card goes along, where diffusers would write one that says nothing."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        """Take settings from `model_index.json`, where `auto_map` is for others."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as diffusers does, with the model card of this folder, else of the one that the pipeline came from.

        Raises `ValueError` for a part whose class no other program could find again.
        """
        for name, part in self.components.items():
            cls = type(getattr(part, "_orig_mod", part))  # what `torch.compile` wraps
            is_found = getattr(diffusers, cls.__name__, None) is cls or _our_class(cls.__module__, cls.__name__)
            if part is not None and not is_found:
                remedy = "put one of diffusers or of this package in its place"
                raise ValueError(f"{name} {cls.__name__} of {cls.__module__} could not be loaded again: {remedy}")
        places = [Path(str(place)) for place in (save_directory, self.config.get("_name_or_path")) if place]
        place = next((place for place in places if (place / "README.md").is_file()), None)
        files = [place / name for name in ("README.md", "samples.png")] if place else []
        self._own_card = {file.name: file.read_bytes() for file in files if file.is_file()}
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)  # diffusers splits it when it pushes
        self._put_own_card(save_directory)

    def _upload_folder(self, working_dir: str | os.PathLike, *args, **kwargs):
        self._put_own_card(working_dir)  # diffusers has just written its own there
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _put_own_card(self, folder: str | os.PathLike) -> None:
        for name, content in self._own_card.items():
            (Path(str(folder)) / name).write_bytes(content)
