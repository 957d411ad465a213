"""A network that sees a picture beside the noise, and guidance on it."""

import pytest
import torch

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.config.costs import num_params
from jit_accel.config.presets import forward_macs
from jit_accel.model.generation import generate
from jit_accel.model.guidance import GUIDED

SIZES = {
    "img_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "depth": 4,
    "num_heads": 2,
    "bottleneck_dim": 4,
    "in_context_len": 2,
    "in_context_start": 1,
    "num_classes": 3,
}
KINDS = {
    "add": {"condition_channels": 2},
    "narrow": {"condition_channels": 2, "condition_bottleneck": 5},
    "tokens": {"condition_channels": 2, "condition_inject": "tokens"},
}


def build(seed: int = 0, trained: bool = True, **settings) -> JiTTransformer2DModel:
    torch.manual_seed(seed)
    model = JiTTransformer2DModel(**SIZES | settings).eval()
    if trained:  # fresh weights are the zero function
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


def make_pipe(**settings) -> JiTPipeline:
    pipe = JiTPipeline(build(condition_channels=3), JiTScheduler(), ["cat", "dog", "cow"], **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    z, condition = (torch.randn(3, channels, 8, 8, generator=generator) for channels in (3, 2))
    return z, torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 2, 3]), condition


@pytest.mark.parametrize("kind", ["add", "narrow"])
def test_with_the_weights_of_an_unconditional_network_it_is_that_network(kind, inputs):
    z, t, labels, condition = inputs
    plain, model = build(), build(trained=False, **KINDS[kind])
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    assert all(name.startswith("condition_embedder.") for name in missing)
    expected = plain(z, t, labels).sample
    assert torch.equal(model(z, t, labels, condition_image=condition).sample, expected)
    assert torch.equal(model(z, t, labels).sample, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_pixel_of_a_condition_counts_where_it_is_given(kind, inputs):
    z, t, labels, condition = inputs
    model, given = build(**KINDS[kind]), torch.tensor([True, False, True])
    condition.requires_grad_()
    model(z, t, labels, condition_image=condition, condition_mask=given).sample.square().sum().backward()
    assert (condition.grad[given] != 0).all()
    assert (condition.grad[~given] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_is_left_out_whichever_way_it_is_said(kind, inputs):
    z, t, labels, condition = inputs
    model = build(**KINDS[kind])
    masked = model(z, t, labels, condition_image=condition, condition_mask=torch.zeros(3, dtype=torch.bool)).sample
    assert torch.allclose(model(z, t, labels).sample, masked, atol=1e-6)
    assert not torch.allclose(model(z, t, labels, condition_image=condition).sample, masked, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_multiply_adds_are_counted(kind, inputs):
    z, t, labels, condition = inputs
    model = build(**KINDS[kind])
    assert num_params(model.config, 4, 3) == sum(p.numel() for p in model.parameters())
    counted = []

    def count(layer, args, out):
        counted.append(layer.weight.flatten(1).shape.numel() * out[..., 0].numel())

    for layer in model.modules():
        if hasattr(layer, "weight") and layer.weight.ndim > 1 and not isinstance(layer, torch.nn.Embedding):
            layer.register_forward_hook(count)
    model(z[:1], t[:1], labels[:1], condition_image=condition[:1])
    tokens = 8 if kind == "tokens" else 4
    attention = sum(2 * (tokens + (2 if i >= 1 else 0)) ** 2 * 16 for i in range(4))
    assert forward_macs(model.config, 4, 8, 8) == sum(counted) + attention


def test_a_reference_may_have_a_size_of_its_own(inputs):
    z, t, labels, _ = inputs
    model = build(**KINDS["tokens"])
    assert model(z, t, labels, condition_image=torch.zeros(3, 2, 12, 4)).sample.shape == z.shape
    with pytest.raises(ValueError, match=r"\(3, 2, 6, 4\): give .* multiples of the patch, 4"):
        model(z, t, labels, condition_image=torch.zeros(3, 2, 6, 4))
    with pytest.raises(ValueError, match=r"\(3, 2, 12, 4\): give \(3, 2, 8, 8\)"):
        build(**KINDS["add"])(z, t, labels, condition_image=torch.zeros(3, 2, 12, 4))


@pytest.mark.parametrize("on", GUIDED)
def test_guidance_leaves_out_what_it_acts_on(on):
    pipe, picture = make_pipe(), torch.rand(3, 8, 8)
    z, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor(0.0)
    image = picture[None] * 2 - 1
    told = {"class_labels": torch.tensor([1]), "condition_image": image}
    left = dict(told, class_labels=torch.tensor([3])) if on != "condition" else dict(told)
    if on != "label":
        left["condition_mask"] = torch.tensor([False])
    with torch.no_grad():
        with_it, without_it = (pipe.transformer(z, t, **arguments).sample for arguments in (told, left))
    x = without_it + 2.5 * (with_it - without_it)
    settings = {"num_inference_steps": 1, "guidance_scale": 2.5, "guidance_interval": (0, 1), "guidance_on": on}
    made = pipe("dog", latents=z, condition_image=picture, output_type="latent", **settings).images
    assert torch.allclose(made, x, atol=1e-4)


def test_one_pass_where_the_weight_is_one_or_there_is_nothing_to_leave_out():
    pipe, rows = make_pipe(), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    pictures = torch.rand(2, 3, 8, 8)
    pipe(["cat", None], 1, condition_image=pictures, guidance_scale=1.0)
    pipe([None, None], 1, condition_image=pictures, guidance_scale=2.0, guidance_on="label", guidance_interval=(0, 1))
    pipe(["cat", None], 1, condition_image=pictures, guidance_scale=2.0, guidance_on="label", guidance_interval=(0, 1))
    pipe(
        ["cat", None], 1, condition_image=[None, pictures[0]], guidance_scale=2.0, guidance_on="condition",
        guidance_interval=(0, 1),
    )  # fmt: skip
    assert rows == [2, 2, 3, 3]


def test_labels_and_conditions_go_together():
    pipe, pictures = make_pipe(), torch.rand(2, 3, 8, 8)

    def make(labels, given, **how):
        generator = [torch.Generator().manual_seed(7) for _ in range(how.pop("count"))]
        return pipe(labels, 2, condition_image=given, generator=generator, output_type="pt", **how).images

    both = make(["cat", "cow"], pictures, count=2)
    assert torch.allclose(make("cat", pictures[0], count=1), both[:1], atol=1e-5)
    assert torch.allclose(make("cat", pictures, count=2)[:1], both[:1], atol=1e-5)
    assert torch.allclose(make(["cat", "cow"], pictures[1], count=2)[1:], both[1:], atol=1e-5)
    copies = make(["cat", "cow"], pictures, count=4, num_images_per_label=2)
    assert torch.allclose(copies[::2], both, atol=1e-5)
    assert not torch.allclose(make(["cat", "cow"], [None, pictures[1]], count=2)[0], both[0], atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        (0, None, "condition_image is not given, and the network was trained with one"),
        ([0, 1], torch.rand(3, 3, 8, 8), "3 pictures as condition_image for 2 labels"),
        (0, [], "0 pictures as condition_image"),
        (0, "cat.png", "condition_image of str: give a PIL image"),
        (0, torch.rand(3, 8, 8) * 255, "condition_image has values from"),
    ],
)
def test_a_condition_that_cannot_be_is_refused(labels, given, message):
    with pytest.raises(ValueError, match=message):
        make_pipe()(labels, 1, condition_image=given)


def test_a_network_without_conditions_refuses_one():
    pipe = JiTPipeline(build(), JiTScheduler())
    with pytest.raises(ValueError, match="condition_image: the network was trained without one"):
        pipe(0, 1, condition_image=torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="guidance_on 'labels': unknown"):
        make_pipe()(0, 1, condition_image=torch.rand(3, 8, 8), guidance_on="labels")


def test_images_by_number_are_the_same_in_any_batch():
    pipe, pictures = make_pipe(), torch.rand(5, 3, 8, 8)
    all_at_once = generate(pipe, range(5), conditions=pictures, num_inference_steps=2)
    assert torch.equal(generate(pipe, range(5), conditions=pictures, num_inference_steps=2, batch_size=2), all_at_once)
    assert torch.equal(generate(pipe, [3], conditions=pictures[3:4], num_inference_steps=2), all_at_once[3:4])


def test_a_pipeline_is_kept_with_its_condition(tmp_path):
    pipe, picture = make_pipe(guidance_on="condition"), torch.rand(3, 8, 8)
    pipe.save_pretrained(tmp_path)
    again = JiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.guidance_on == "condition"
    how = {"num_inference_steps": 2, "condition_image": picture, "output_type": "pt"}
    made = [p(1, generator=torch.Generator().manual_seed(0), **how).images for p in (pipe, again)]
    assert torch.equal(*made)
