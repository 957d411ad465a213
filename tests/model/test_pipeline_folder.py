import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils
from helpers import SPAWNER
from test_pipeline import NAMES, count_calls, make_pipe, seeded

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.base.errors import UserError
from jit_accel.model.carried_code import carried_source
from jit_accel.model.loading import write_defaults


class NotInstalled:
    """Makes imports of the package fail, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jit_accel":
            raise ModuleNotFoundError(name)


def draw_without_the_package(folder: str, out: str) -> None:
    """In a process of its own: draw with plain diffusers, save the images and the pipeline into `out`."""
    log = os.open(f"{out}/log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "jit_accel"]:
        del sys.modules[name]
    sys.meta_path.insert(0, NotInstalled())
    dynamic_modules_utils.HF_MODULES_CACHE = f"{out}/modules"
    torch.set_num_threads(1)
    for index, custom in enumerate(({"custom_pipeline": folder}, {})):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **custom)
        pipe.set_progress_bar_config(disable=True)
        torch.save(draw(pipe), f"{out}/{index}.pt")
    pipe.save_pretrained(f"{out}/again")
    type(pipe).from_pretrained(f"{out}/again")
    assert not [name for name in sys.modules if name.startswith("jit_accel")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline that has defaults of its own."""
    path = tmp_path_factory.mktemp("pipeline")
    settings = {"guidance_scale": 2.5, "guidance_interval": (0.2, 0.9), "num_inference_steps": 4, "method": "euler"}
    make_pipe(**settings, noise_scale=2.0).save_pretrained(path)
    return path


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A place of this test's own for code that diffusers takes from folders."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(path, **settings) -> JiTPipeline:
    pipe = JiTPipeline.from_pretrained(path, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe) -> torch.Tensor:
    return pipe(["bag", 0], generator=seeded(), output_type="pt").images


def test_a_folder_comes_back_whole(folder):
    assert [p.name for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")] == []
    pipe = load(folder)
    assert pipe.config.class_names == NAMES
    calls = count_calls(pipe)
    images = draw(pipe)
    assert calls == [(0, 2), (0.25, 4), (0.5, 4), (0.75, 4)]  # the folder's steps, solver, scale and interval
    same = make_pipe(noise_scale=2.0)(
        ["bag", 0], 4, 2.5, (0.2, 0.9), "euler", generator=seeded(), output_type="pt"
    ).images
    assert torch.equal(images, same)
    assert len(pipe(0, 2, method="heun", output_type="pt").images) == 1
    assert len(calls) == 4 + 3
    assert JiTPipeline.from_pretrained(folder, guidance_scale=1.5).config.guidance_scale == 1.5
    assert JiTPipeline.from_pipe(pipe).config.num_inference_steps == 4


def test_plain_diffusers_loads_a_folder_where_the_package_is_not_installed(folder, tmp_path):
    process = SPAWNER.Process(target=draw_without_the_package, args=(str(folder), str(tmp_path)))
    process.start()
    process.join(240)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 0, log
    assert "jit_accel" not in log  # no advice to install anything of that name
    assert "Expected types" not in log
    expected = draw(load(folder))
    for index in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{index}.pt", weights_only=True), expected)
    # a pipeline saved there is the same folder again
    before, after = (
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (folder, tmp_path / "again")
    )
    assert before == after


@pytest.mark.parametrize("custom", ["{}", "{}/pipeline.py", "pipeline", None])
def test_plain_diffusers_gives_this_pipeline_where_the_package_is_installed(folder, own_modules, custom):
    settings = {} if custom is None else {"custom_pipeline": custom.format(folder)}
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **settings)
    assert isinstance(pipe, JiTPipeline)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(load(folder)))


def test_diffusers_executes_nothing_of_a_folder_unasked(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)


def test_the_code_of_a_folder_is_not_executed_by_this_pipeline(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "evil")
    for file in ("pipeline.py", "transformer/jit_transformer.py", "scheduler/jit_scheduler.py"):
        (tmp_path / "evil" / file).write_text("raise SystemExit('executed')")
    assert torch.equal(draw(load(tmp_path / "evil")), draw(load(folder)))


def test_each_carried_file_defines_a_name_once():
    """The modules of the package are laid one after the other into one file, where names could meet."""
    for cls in (JiTPipeline, JiTTransformer2DModel, JiTScheduler):
        names = []
        for node in ast.parse(carried_source(cls)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            names += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_folders_of_before_still_load(folder, tmp_path, own_modules):
    old = tmp_path / "old"
    shutil.copytree(folder, old, ignore=shutil.ignore_patterns("*.py"))
    index = json.loads((old / "model_index.json").read_text())
    index |= {
        "_class_name": "JiTPipeline",
        "class_names": NAMES,
        "transformer": ["jit_accel.model", "JiTTransformer2DModel"],
        "scheduler": ["jit_accel.scheduler", "JiTScheduler"],
    }
    del index["method"], index["num_inference_steps"]
    (old / "model_index.json").write_text(json.dumps(index))
    assert load(old).config.class_names == NAMES
    assert load(old).config.num_inference_steps is None
    (old / "pipeline.py").write_text("from jit_accel.model.pipeline import JiTPipeline\n")
    loaded = DiffusionPipeline.from_pretrained(old, custom_pipeline=str(old), trust_remote_code=True)
    assert isinstance(loaded, JiTPipeline)
    assert loaded.config.class_names == NAMES


def test_a_folder_tells_nothing_of_where_it_came_from(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    for file in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        assert str(folder) not in (tmp_path / file).read_text()


def test_what_is_not_ours_is_named_as_diffusers_names_it(tmp_path):
    pipe = make_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_a_pipeline_is_taken_from_the_hub(folder, tmp_path):
    """From the cache that `huggingface_hub` keeps: no network here."""
    commit, repo = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--someone--clothes"
    shutil.copytree(folder, repo / "snapshots" / commit, ignore=shutil.ignore_patterns("*.py"))
    for name in ("main", "v2"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    for which in ({}, {"revision": "v2"}, {"revision": commit}):
        pipe = load("someone/clothes", cache_dir=tmp_path, local_files_only=True, **which)
        assert pipe.config.class_names == NAMES
    assert torch.equal(draw(pipe), draw(load(folder)))
    for which in ({"revision": "v3"}, {"cache_dir": tmp_path / "empty"}):
        with pytest.raises(OSError, match=r"[Cc]annot find"):
            load("someone/clothes", **{"cache_dir": tmp_path, "local_files_only": True} | which)


def test_defaults_are_written_into_a_folder(folder, tmp_path):
    path = tmp_path / "pipeline"
    shutil.copytree(folder, path)
    write_defaults(path, guidance_scale=3, num_inference_steps=2, method="heun", guidance_interval=(0.0, 0.6))
    pipe = load(path)
    calls = count_calls(pipe)
    draw(pipe)
    assert calls == [(0, 4), (0.5, 4), (0.5, 4)]
    write_defaults(path, num_inference_steps=None, method=None)
    pipe = load(path)
    assert (pipe.config.num_inference_steps, pipe.config.method) == (None, None)
    assert (pipe.config.guidance_scale, pipe.config.guidance_interval) == (3.0, [0.0, 0.6])
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": "high"}, "must be a number"),
        ({"guidance_interval": (0.9, 0.1)}, "low <= high"),
        ({"guidance_interval": 0.5}, "low <= high"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"method": "hoin"}, "Did you mean 'heun'"),
        ({"guidance_skale": 2.0}, "Did you mean 'guidance_scale'"),
    ],
)
def test_defaults_that_make_no_sense_are_not_written(folder, settings, message):
    before = (folder / "model_index.json").read_bytes()
    with pytest.raises(UserError, match=message):
        write_defaults(folder, **{"guidance_scale": 9.0} | settings)
    assert (folder / "model_index.json").read_bytes() == before
    if "guidance_skale" not in settings:
        with pytest.raises(ValueError, match=message):
            make_pipe(**settings)


def test_defaults_need_a_pipeline_folder(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json"):
        write_defaults(tmp_path, guidance_scale=2.0)


def test_the_examples_of_the_guide_run(folder, tmp_path, own_modules, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    section = guide.partition("## Pipeline\n")[2].partition("\n## ")[0]
    examples = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert len(examples) == 8
    shutil.copytree(folder, tmp_path / "runs" / "quickstart" / "pipeline")
    monkeypatch.chdir(tmp_path)
    # Compilation has its own test, and takes longer than all others together.
    monkeypatch.setattr(JiTTransformer2DModel, "compile_repeated_blocks", lambda self: None)
    names = {}
    for example in examples:
        exec(compile(example, "docs/generate.md", "exec"), names)  # one after the other, as they are read
    assert names["images"][0].size == names["repaired"].size == (16, 16)
    assert names["image"].size == (56, 28)
    assert names["pipe"].config.num_inference_steps == 25
