"""The examples of docs/python.md run, in their order."""

import re
from pathlib import Path

from helpers import CHEAP

import jit_accel as jit
from jit_accel.config.presets import PRESETS, Preset
from jit_accel.monitor.log import ReportProcess
from jit_accel.train import results

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_examples_run(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "JiT-Ti", Preset(2, 8, 2, 4, 1, in_context_len=2))  # of 7,000 parameters
    for name, cheap in CHEAP.items():
        monkeypatch.setattr(results, name, cheap)
    for name in ("build", "build_last"):
        monkeypatch.setattr(ReportProcess, name, lambda *args: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    namespace = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "img_size 30: must be a multiple of the patch size 7 (JiT-Ti/7): use 28 or 35" in printed
    assert "torch.Size([8, 3, 28, 28]) torch.uint8" in printed
    assert "fd_efficientnet_lite0" in printed
    for run in ("photos", "uniform", "discs"):
        assert (tmp_path / "runs" / run / "pipeline" / "model_index.json").exists()


def test_the_table_names_what_is_public():
    table = PAGE.read_text(encoding="utf-8").partition("| --- |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`jit\.(\w+)", table))
    assert named == set(dir(jit)) - {"__version__"}


def test_the_public_names_have_types():
    stub = (Path(jit.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    assert set(re.findall(r"(?: as |^)(\w+)(?:$| = )", stub, re.MULTILINE)) == set(dir(jit)) - {"__version__"}
