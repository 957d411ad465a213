"""The path that starts at the condition instead of noise."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel, Objective, generate
from jit_accel.model.spaces import noised

SIZES = {"img_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "bottleneck_dim": 4}
SIZES |= {"in_context_len": 2, "in_context_start": 1, "num_classes": 3}
GENERATOR = torch.Generator().manual_seed


def restored(condition):
    """The image that a condition belongs to, for a network that knows it."""
    return 1 - 2 * condition**2


def build(**settings):
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**SIZES | settings).eval()
    for p in model.parameters():  # fresh weights are the zero function
        torch.nn.init.normal_(p, std=0.3)
    return model


def make_pipe(kind="x", **settings):
    network = build(condition_channels=settings.pop("condition_channels", 3))
    pipe = JiTPipeline(network, JiTScheduler(kind, path="bridge"), ["cat", "dog", "cow"], **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["x", "v"])
@pytest.mark.parametrize(
    ("steps", "method"), [(1, "euler"), (1, "heun"), (3, "euler"), (4, "heun"), (5, "ab2"), (5, "etd2")]
)
def test_who_knows_the_image_arrives_there_in_any_number_of_steps(kind, steps, method, monkeypatch):
    pipe, pictures = make_pipe(kind), torch.rand(2, 3, 8, 8, generator=GENERATOR(1))

    def forward(z, t, class_labels, condition_image, condition_mask, return_dict):
        x = restored(condition_image)
        return ({"x": x, "v": x - condition_image}[kind],)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    made = pipe(["cat", "dog"], steps, condition_image=pictures, method=method, output_type="latent").images
    assert torch.allclose(made, restored(pictures * 2 - 1), atol=1e-4)


def test_the_start_is_the_condition_and_the_generator_changes_nothing():
    pipe, pictures, starts = make_pipe(), torch.rand(2, 3, 8, 8), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: starts.append((args[0].clone(), args[1])))
    how = {"condition_image": pictures, "output_type": "pt", "num_inference_steps": 3}
    made = [pipe(["cat", None], generator=GENERATOR(seed), **how).images for seed in (0, 1)]
    assert torch.equal(*made)
    z, t = starts[0]
    assert t == 0
    assert torch.equal(z, pictures * 2 - 1)
    other = pipe(["cat", None], **how | {"condition_image": pictures.flip(0)}).images
    assert not torch.allclose(other, made[0])
    assert torch.equal(generate(pipe, [4, 9], seed=3, conditions=pictures), generate(pipe, [4, 9], conditions=pictures))


@pytest.mark.parametrize("on", ["label", "condition", "both"])
def test_guidance_acts_and_the_start_stays(on):
    pipe, picture, starts = make_pipe(guidance_on=on), torch.rand(3, 8, 8), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: starts.append(args[0].clone()))
    how = {"condition_image": picture, "output_type": "latent", "num_inference_steps": 2, "guidance_interval": (0, 1)}
    plain = pipe("dog", guidance_scale=1.0, **how).images
    guided = pipe("dog", guidance_scale=3.0, **how).images
    assert not torch.allclose(plain, guided, atol=1e-3)
    assert len(starts[-1]) == 2
    assert all(torch.equal(row, picture * 2 - 1) for z in (starts[0], starts[3]) for row in z)


def test_a_batch_is_as_its_images_and_a_new_pipeline_of_the_parts_as_the_old_one():
    pipe, pictures = make_pipe(), torch.rand(3, 3, 8, 8, generator=GENERATOR(4))
    how = {"num_inference_steps": 2, "output_type": "pt"}
    whole = pipe(["cat", None, "cow"], condition_image=pictures, num_images_per_label=2, **how).images
    assert torch.equal(whole[::2], whole[1::2])
    for place, label in enumerate(["cat", None, "cow"]):
        assert torch.allclose(pipe(label, condition_image=pictures[place], **how).images, whole[2 * place], atol=1e-5)
    again = JiTPipeline(**pipe.components)
    assert torch.allclose(again("cat", condition_image=pictures[0], **how).images, whole[:1], atol=1e-5)
    half = pictures[:1] / 2  # a start of one's own
    start = pipe("cat", condition_image=pictures[0], latents=half, **how).images
    assert not torch.allclose(start, whole[:1], atol=1e-3)
    with pytest.raises(ValueError, match="image: this network starts at its condition"):
        pipe("cat", condition_image=pictures[0], latents=half, image=pictures[0], **how)


def test_windows_of_a_large_picture_arrive_together(monkeypatch):
    pipe, pictures = make_pipe(), torch.rand(2, 3, 16, 20, generator=GENERATOR(6))
    how = {"height": 16, "width": 20, "tile": 8, "condition_image": pictures, "output_type": "latent"}

    def forward(z, t, class_labels, condition_image, condition_mask, return_dict):
        return (restored(condition_image),)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    assert torch.allclose(pipe([0, 1], 2, **how).images, restored(pictures * 2 - 1), atol=1e-4)


def test_a_picture_of_another_size_is_fitted():
    pipe = make_pipe()
    how = {"num_inference_steps": 1, "output_type": "latent"}
    assert pipe(0, condition_image=torch.rand(3, 20, 30), **how).images.shape == (1, 3, 8, 8)
    assert pipe(0, condition_image=torch.rand(3, 20, 30), height=8, width=16, **how).images.shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"condition_image": [None]}, "condition_image: this network starts at it: give a picture for each image"),
        ({"condition_image": [None, torch.rand(3, 8, 8)]}, "and no None"),
        ({"condition_image": torch.rand(3, 8, 8), "image": torch.rand(3, 8, 8)}, "image: this network starts at its"),
        ({"image": torch.rand(3, 8, 8), "strength": 0.3}, "condition_image is not given"),
        ({}, "condition_image is not given"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        make_pipe()(0, 1, **how)


def test_a_bridge_between_other_channels_is_refused():
    with pytest.raises(ValueError, match="condition_image has 1 channels, and the images 3"):
        make_pipe(condition_channels=1)(0, 1, condition_image=torch.rand(1, 8, 8))
    with pytest.raises(ValueError, match="path 'brigde': unknown; choose from noise, bridge"):
        JiTScheduler(path="brigde")


def test_an_objective_starts_at_the_condition():
    x, c = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    objective, seen = Objective(path="bridge", noise_scale=7.0), []

    def network(z, t, labels, condition_image, condition_mask):
        seen.append((z, t))
        return type("Output", (), {"sample": x})

    conditions = objective.left_out(0, [5, 6], {"condition_image": c})
    losses, t = objective.drawn_losses(network, x, None, 0, [5, 6], conditions)
    assert torch.equal(seen[0][0], noised(x, c, t))
    assert torch.equal(t, Objective().times(0, [5, 6]))
    assert (losses == 0).all()


def test_a_folder_keeps_the_path_and_plain_diffusers_follows_it(tmp_path):
    pipe, picture = make_pipe(guidance_scale=2.0), torch.rand(3, 8, 8, generator=GENERATOR(2))
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(picture, tmp_path / "picture.pt")
    how = {"num_inference_steps": 2, "condition_image": picture, "output_type": "pt"}
    expected = pipe(1, **how).images
    again = JiTPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(1, **how).images, expected)
    again.scheduler = FlowMatchEulerDiscreteScheduler()
    one = how | {"num_inference_steps": 1}  # where its grid is ours
    assert torch.allclose(again(1, **one).images, pipe(1, method="euler", **one).images, atol=1e-5)
    again.save_pretrained(tmp_path / "flow")
    assert torch.equal(JiTPipeline.from_pretrained(tmp_path / "flow")(1, **how).images, again(1, **how).images)
    program = (
        "import sys, torch, diffusers\n"
        "sys.modules['jit_accel'] = None\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1] + '/pipe', trust_remote_code=True)\n"
        "picture = torch.load(sys.argv[1] + '/picture.pt')\n"
        "made = pipe(1, num_inference_steps=2, condition_image=picture, output_type='pt').images\n"
        "torch.save(made, sys.argv[1] + '/made.pt')\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "made.pt"), expected, atol=1e-6)


def test_a_folder_without_a_bridge_says_nothing_of_paths(tmp_path):
    JiTPipeline(build(), JiTScheduler()).save_pretrained(tmp_path)
    assert "path" not in json.loads((tmp_path / "model_index.json").read_text())["objective"]
    assert JiTScheduler.from_pretrained(tmp_path / "scheduler").config.path == "noise"
