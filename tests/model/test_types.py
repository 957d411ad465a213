"""The types that reach users: stubs say what the code does, and a type checker reads them."""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jit_accel

PACKAGE = Path(jit_accel.__file__).parent
STUBS = sorted((PACKAGE / "model").glob("*.pyi"))
CHECKER = shutil.which("pyright") or shutil.which("basedpyright")  # the first use may need a network

# What is shown of each expression.
REVEALED = {
    'JiTPipeline.from_pretrained("x")': "JiTPipeline",
    'JiTPipeline.from_pretrained("x", torch_dtype=torch.bfloat16).to("cuda")': "JiTPipeline",
    'jit_accel.load("x")': "JiTPipeline",
    'pipe("bag").images': "list[Image]",
    'pipe(["bag", 1, None], 20, 2.0, (0.1, 1.0), height=64, strength=0.5).images[0]': "Image",
    'pipe("bag", output_type="np").images': "ndarray",
    'pipe("bag", output_type="pt").images': "Tensor",
    'pipe("bag", output_type="latent", return_dict=False)': "tuple[Tensor]",
    'pipe("bag", return_dict=False)[0]': "list[Image]",
    "pipe.transformer": "JiTTransformer2DModel",
    "pipe.transformer(noise, 0.5).sample": "Tensor",
    "pipe.transformer(noise, 0.5, return_dict=False)": "tuple[Tensor]",
    "pipe.transformer(noise, 0.5, None, False)": "tuple[Tensor]",
    'pipe.transformer.to("cuda")': "JiTTransformer2DModel",
    "pipe.transformer.to(torch.bfloat16)": "JiTTransformer2DModel",
    "JiTTransformer2DModel.from_config(pipe.transformer.config)": "JiTTransformer2DModel",
    "JiTPipeline.from_pipe(pipe)": "JiTPipeline",
    "pipe.config.class_names": "Any",
    'pipe.transformer.enable_group_offload(torch.device("cuda"))': "None",
    "pipe.scheduler.step(noise, 0.5, noise).prev_sample": "Tensor",
    'JiTScheduler.from_pretrained("x")': "JiTScheduler",
    'JiTTransformer2DModel.from_pretrained("x")': "JiTTransformer2DModel",
    "jit_accel.generate(pipe, range(8))": "Tensor",
    'jit_accel.measure(pipe, "x")': "dict[str, float]",
    'jit_accel.fit(jit_accel.Config.of(data_path="x"))': "Path",
}


def definitions(body: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
    """Functions by name; of several the last, which takes all that any of them takes."""
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def parameters(node: ast.FunctionDef) -> list[str]:
    named = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return named + [one.arg for one in (node.args.vararg, node.args.kwarg) if one]


def defaults(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(value) for value in node.args.defaults]


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_a_stub_has_the_methods_parameters_and_defaults_of_the_code(stub):
    typed = {node.name: node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ClassDef)}
    source = ast.parse(stub.with_suffix(".py").read_text())
    module = importlib.import_module(f"jit_accel.model.{stub.stem}")
    for node in source.body:
        if not isinstance(node, ast.ClassDef) or node.name not in jit_accel.__all__:
            continue
        ours, theirs = definitions(node.body), definitions(typed[node.name].body)
        public = {name for name in ours if not name.startswith("_") or name in ("__init__", "__call__", "__len__")}
        assert public <= theirs.keys()
        for name in public:
            if name in ("scheduler",) or not parameters(ours[name]):
                continue
            assert parameters(theirs[name]) == parameters(ours[name]), name
            assert defaults(theirs[name]) == defaults(ours[name]), name
        bases = {ast.unparse(base) for base in node.bases}
        assert bases == {ast.unparse(base) for base in typed[node.name].bases}
        for name in theirs:  # nothing is typed that is not there
            assert name == "scheduler" or inspect.getattr_static(getattr(module, node.name), name, None) is not None


def test_the_public_names_are_listed():
    assert set(jit_accel.__all__) <= set(dir(jit_accel))
    assert {"JiTPipeline", "load", "fit", "__version__"} <= set(dir(jit_accel))
    assert (PACKAGE / "py.typed").is_file()


def test_a_type_checker_sees_what_calls_return(tmp_path):
    if CHECKER is None or subprocess.run([CHECKER, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs pyright")
    lines = [
        "import torch",
        "import jit_accel",
        "from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel",
        "noise = torch.zeros(1, 3, 8, 8)",
        'pipe = JiTPipeline.from_pretrained("x")',
        *(f"reveal_type({expression})" for expression in REVEALED),
    ]
    (tmp_path / "use.py").write_text("\n".join(lines))
    settings = {"include": ["use.py"], "extraPaths": [str(PACKAGE.parent)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [CHECKER, "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=300).stdout)
    notes = found["generalDiagnostics"]
    assert [note["message"] for note in notes if note["severity"] == "error"] == []
    shown = [re.search(r' is "(.*)"$', note["message"])[1].partition("[tuple")[0] for note in notes]
    assert dict(zip(REVEALED, shown)) == REVEALED
