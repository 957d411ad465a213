"""Rules of the house that a reader relies on, beside the floors that import-linter holds (setup.cfg)."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jit_accel"
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in sorted(ROOT.rglob("*.py"))}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Each room may have its own of these.
COMMON_FILES = {"__init__.py", "__main__.py", "settings.py", "run.py"}
ODD_BEGINNINGS = re.compile(r"(What|Whether|Where|Which|Who|How|Of)\b")


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield file, node


def functions() -> Iterator[tuple[str, ast.FunctionDef, list[ast.arg]]]:
    for file, node in nodes(*FUNCTIONS):
        arguments = node.args
        yield file, node, [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def calls(method: str) -> Iterator[tuple[str, ast.Call]]:
    for file, node in nodes(ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield file, node


def place(file: str, node: ast.AST) -> str:
    return f"{file}:{node.lineno}"


def test_nobody_but_itself_is_handed_the_trainer():
    found = [
        place(file, node)
        for file, node, arguments in functions()
        if file != "train/trainer.py" and any(argument.arg == "trainer" for argument in arguments)
    ]
    assert found == []


def test_nobody_below_the_building_of_a_run_is_handed_all_settings():
    allowed = ("config/", "train/build.py", "train/__init__.py")
    found = [
        place(file, node)
        for file, node, arguments in functions()
        if not file.startswith(allowed)
        and any(arg.annotation and re.search(r"\bConfig\b", ast.unparse(arg.annotation)) for arg in arguments)
    ]
    assert found == []


def test_settings_are_rebuilt_in_their_own_room_alone():
    assert [place(file, node) for file, node in calls("updated") if not file.startswith("config/")] == []


def test_no_text_of_an_error_is_edited():
    def is_text_of_error(value: ast.expr) -> bool:
        return bool(re.fullmatch(r"str\((error|problem|exception|caught)\)|message", ast.unparse(value)))

    assert [place(file, node) for file, node in calls("replace") if is_text_of_error(node.func.value)] == []


def test_one_module_renames_files():
    found = {
        file
        for name in ("rename", "replace", "renames", "move")
        for file, node in calls(name)
        if ast.unparse(node.func.value) in ("os", "shutil")
    }
    assert found == {"base/files.py"}


def test_the_name_of_a_metric_stands_in_one_module():
    found = {file for file, node in nodes(ast.Constant) if node.value == "train/loss"}
    assert found == {"monitor/metric_table.py"}


def test_a_docstring_says_what_a_thing_is_or_does():
    found = [
        place(file, node) if hasattr(node, "lineno") else file
        for file, node in nodes(ast.Module, ast.ClassDef, *FUNCTIONS)
        if ODD_BEGINNINGS.match(ast.get_docstring(node) or "")
    ]
    assert found == []


def test_files_and_functions_are_short():
    assert [file for file in TREES if len((ROOT / file).read_text().splitlines()) > 350] == []
    assert [place(file, node) for file, node, _ in functions() if node.end_lineno - node.lineno >= 70] == []


def test_a_name_of_a_class_or_file_means_one_thing():
    classes = Counter(node.name for _, node in nodes(ast.ClassDef))
    files = Counter(file.rpartition("/")[2] for file in TREES if "/" in file)  # others are names of version 0.1.0
    assert [name for name, count in classes.items() if count > 1] == []
    assert [name for name, count in files.items() if count > 1 and name not in COMMON_FILES] == []


@pytest.mark.parametrize("word", ["trainer", "Config"])
def test_the_rules_see_what_they_forbid(word):
    """A check of the checks: these words do stand in the files that may use them."""
    assert any(word in ast.unparse(tree) for file, tree in TREES.items() if file.startswith("train/"))
