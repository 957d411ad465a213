"""A pipeline is found in a pipeline folder, a run, a checkpoint; averages by their decay."""

import json

import pytest
import torch
from helpers import last_checkpoint, seal_as_before, train_here
from safetensors.torch import load_file

from jit_accel.base.errors import UserError
from jit_accel.model.loading import averages_of, load_pipeline


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = ("--ema_decays", "0.5", "auto", "--guidance_scale", "1.5", "--prediction", "v", "--noise_scale", "2")
    assert train_here("--data_path", str(images), "--output_dir", str(folder), *flags) == 0
    return folder


def weights(pipe) -> dict[str, torch.Tensor]:
    return pipe.transformer.state_dict()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_run_pipeline_folder_and_checkpoint_are_one_pipeline(run):
    exported = load_pipeline(str(run / "pipeline"))
    for path in (run, run / "checkpoints" / last_checkpoint(run).name):
        pipe = load_pipeline(str(path))
        assert same(weights(pipe), weights(exported))
        for name in ("class_names", "guidance_scale", "guidance_interval"):
            assert pipe.config[name] == exported.config[name], name
        assert dict(pipe.scheduler.config).items() >= {"prediction_type": "v", "noise_scale": 2.0}.items()
        assert not pipe.transformer.training


def test_each_average_and_the_weights_themselves_can_be_had(run):
    checkpoint = last_checkpoint(run)
    assert averages_of(checkpoint) == ["0.5", "auto"]
    for ema, stem in (("0.5", "ema_0.5"), ("auto", "ema_auto"), ("model", "model")):
        for path in (run, checkpoint):
            assert same(weights(load_pipeline(str(path), ema)), load_file(checkpoint / f"{stem}.safetensors"))


def test_the_dtype_is_the_one_asked_for(run):
    for path in (run, last_checkpoint(run)):
        assert load_pipeline(str(path), torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_checkpoint_of_before_names_were_kept_is_read(run, tmp_path):
    import shutil

    old = tmp_path / last_checkpoint(run).name
    shutil.copytree(last_checkpoint(run), old)
    state = json.loads((old / "state.json").read_text())
    del state["run"]["class_names"], state["run"]["settings"]["val_images"]
    (old / "state.json").write_text(json.dumps(state, indent=1))
    seal_as_before(old)
    pipe = load_pipeline(str(old))
    assert pipe.config.class_names is None
    assert same(weights(pipe), weights(load_pipeline(str(run))))


@pytest.mark.parametrize(
    ("path", "ema", "message"),
    [
        ("run", "0.9", r"ema 0.9: .* has 0.5, auto, model"),
        ("run/pipeline", "0.5", r"ema 0.5: .* has no checkpoint to take averages from: give the output folder"),
        ("run/samples", None, r"model .*samples: holds no pipeline \(model_index.json\) and no checkpoint"),
        ("nothing/here/at-all", None, r"holds no pipeline"),
    ],
)
def test_what_holds_none_is_refused(run, path, ema, message):
    with pytest.raises(UserError, match=message):
        load_pipeline(str(run.parent / path), ema)


def test_a_hub_id_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="model nobody/nothing: is no folder here, and cannot be had from the Hub"):
        load_pipeline("nobody/nothing")


def test_a_path_may_be_a_path_and_the_argument_is_named(run, tmp_path):
    assert same(weights(load_pipeline(run)), weights(load_pipeline(str(run))))
    with pytest.raises(UserError, match=f"^model {tmp_path}: holds no pipeline"):
        load_pipeline(tmp_path)
