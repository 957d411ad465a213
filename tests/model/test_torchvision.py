"""A torchvision that does not fit the installed torch breaks nothing, and is named; nothing here brings one."""

import configparser
import importlib.metadata
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jit_accel import model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with a torchvision that fails as one for another torch does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torchvision.part\nraise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision" / "part.py").touch()
    (tmp_path / "torchvision-0.99.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.99.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.99.0\n")
    return tmp_path


@pytest.fixture
def not_imported(monkeypatch):
    """As in a program that has just started; afterwards the modules are as they were."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    del sys.modules["torchvision"]


def test_a_torchvision_that_works_is_left_alone(not_imported, tmp_path, monkeypatch, capsys):
    (tmp_path / "torchvision" / "transforms").mkdir(parents=True)
    (tmp_path / "torchvision" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    model.set_aside_broken_torchvision()
    assert capsys.readouterr().err == ""
    assert sys.modules["torchvision"].__file__ == str(tmp_path / "torchvision" / "__init__.py")


def test_a_folder_that_an_uninstall_left_behind_is_set_aside(not_imported, tmp_path, monkeypatch, capsys):
    (tmp_path / "torchvision" / "__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    model.set_aside_broken_torchvision()
    assert "torchvision" in capsys.readouterr().err
    assert find_spec("torchvision") is None


def test_a_broken_torchvision_is_named_once_and_set_aside(not_imported, broken, monkeypatch, capsys):
    monkeypatch.syspath_prepend(broken)
    model.set_aside_broken_torchvision()
    model.set_aside_broken_torchvision()
    said = capsys.readouterr().err
    assert said.count("torchvision 0.99.0 cannot be imported") == 1
    assert "nms does not exist" in said
    assert find_spec("torchvision") is None
    assert "torchvision.part" not in sys.modules


@pytest.mark.parametrize(
    ("torch", "remedy"),
    [
        ("2.7.1", "pip install 'torchvision==0.22.*'"),
        ("2.13.0+cpu", "pip install 'torchvision==0.28.*' --index-url https://download.pytorch.org/whl/cpu"),
        ("3.0.0+cu140", "pip install 'torchvision' --index-url https://download.pytorch.org/whl/cu140"),
    ],
)
def test_the_build_that_fits_is_named(monkeypatch, torch, remedy):
    monkeypatch.setattr(model, "_version", lambda package: torch)
    assert model._matching_torchvision() == remedy


@pytest.mark.multiprocess
def test_every_program_runs_beside_a_broken_torchvision(broken):
    programs = {
        "prepare": ["--data_path", "nowhere", "--output_dir", "out"],
        "report": ["nowhere"],
        "convert": ["--input", "nowhere.pth", "--output", "out"],
        "sample": ["--model", "nowhere"],
        "evaluate": ["--model", "nowhere", "--reference", "nowhere"],
        "train": ["--data_path", "nowhere"],
    }
    code = (
        "import importlib, diffusers\n"  # which looks for torchvision
        f"for name, flags in {programs}.items():\n"
        "    print(name, importlib.import_module(f'jit_accel.{name}').main(flags))\n"
    )
    paths = os.pathsep.join([str(broken), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=broken, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr
    assert [line.split() for line in done.stdout.splitlines()[-6:]] == [[name, "2"] for name in programs]
    assert done.stderr.count("torchvision 0.99.0 cannot be imported") == 1


def requirements_of(names: list[str]) -> set[str]:
    """The names of these requirements, and of all that the installed ones of them require."""
    found, left = set(), [Requirement(name) for name in names]
    while left:
        requirement = left.pop()
        if requirement.name.lower() in found:
            continue
        found.add(requirement.name.lower())
        try:
            needed = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        extras = requirement.extras or {""}
        needed = [Requirement(text) for text in needed]
        left += [one for one in needed if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras)]
    return found


def test_no_extra_brings_torchvision():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for names in lists:
        found = requirements_of([line for line in names.splitlines() if line])
        assert not found & {"torchvision", "torch-fidelity", "torch_fidelity"}
