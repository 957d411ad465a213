"""A network that is given numbers beside the noise, guidance on them, and calls with numbers."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.config.costs import num_params
from jit_accel.config.presets import forward_macs
from jit_accel.model.card import conversion_card
from jit_accel.model.generation import generate
from jit_accel.model.objective import Objective

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
COLUMNS = {"names": ["age", "place"], "sizes": [1, 2], "mean": [40.0, 1e9, 0.0], "std": [10.0, 1e-1, 2.0]}
# No tokens in context, fewer of them than columns, as many, and more.
KINDS = [{"in_context_len": 0}, {"in_context_len": 1}, {"in_context_len": 2}, {"in_context_len": 5}]


def build(trained: bool = True, **settings) -> JiTTransformer2DModel:
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**SIZES | settings).eval()
    if trained:  # fresh weights are the zero function
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


def make_pipe(**settings) -> JiTPipeline:
    network = build(vector_sizes=[1, 2])
    pipe = JiTPipeline(network, JiTScheduler(), ["cat", "dog", "cow"], **{"vectors": COLUMNS} | settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    z, vectors = torch.randn(3, 3, 8, 8, generator=generator), torch.randn(3, 3, generator=generator)
    return z, torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 2, 3]), vectors


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_weights_of_a_network_without_it_is_that_network(kind, inputs):
    z, t, labels, vectors = inputs
    plain, model = build(**kind), build(trained=False, vector_sizes=[1, 2], **kind)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {name.partition(".")[0] for name in missing} == {"vector_embedder"}
    expected = plain(z, t, labels).sample
    assert torch.equal(model(z, t, labels, vectors=vectors).sample, expected)
    assert torch.equal(model(z, t, labels).sample, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_counts_where_it_is_given(kind, inputs):
    z, t, labels, vectors = inputs
    model, given = build(vector_sizes=[1, 2], **kind), torch.tensor([True, False, True])
    vectors.requires_grad_()
    model(z, t, labels, vectors=vectors, vector_mask=given).sample.square().sum().backward()
    assert (vectors.grad[given] != 0).all()
    assert (vectors.grad[~given] == 0).all()
    assert all(p.grad.abs().sum() > 0 for p in model.vector_embedder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_is_left_out_whichever_way_it_is_said(kind, inputs):
    z, t, labels, vectors = inputs
    model = build(vector_sizes=[1, 2], **kind)
    masked = model(z, t, labels, vectors=vectors, vector_mask=torch.zeros(3, dtype=torch.bool)).sample
    assert torch.equal(model(z, t, labels).sample, masked)
    assert not torch.allclose(model(z, t, labels, vectors=vectors).sample, masked, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_multiply_adds_are_counted(kind, inputs):
    z, t, labels, vectors = inputs
    model = build(vector_sizes=[1, 2], **kind)
    assert num_params(model.config, 4, 3) == sum(p.numel() for p in model.parameters())
    counted = []

    def count(layer, args, out):
        counted.append(layer.weight.flatten(1).shape.numel() * out[..., 0].numel())

    for layer in model.modules():
        if hasattr(layer, "weight") and layer.weight.ndim > 1 and not isinstance(layer, torch.nn.Embedding):
            layer.register_forward_hook(count)
    model(z[:1], t[:1], labels[:1], vectors=vectors[:1])
    attention = sum(2 * (4 + (kind["in_context_len"] if i >= 1 else 0)) ** 2 * 16 for i in range(4))
    assert forward_macs(model.config, 4, 8, 8) == sum(counted) + attention


def test_other_numbers_than_the_network_takes_are_refused(inputs):
    z, t, labels, vectors = inputs
    with pytest.raises(ValueError, match=r"vectors have the shape \(3, 2\): give \(3, 3\)"):
        build(vector_sizes=[1, 2])(z, t, labels, vectors=vectors[:, :2])


def test_each_condition_is_left_out_by_a_draw_of_its_own():
    positions, objective = np.arange(4000), Objective(condition_drop_prob=0.25)
    given = {"condition_image": torch.zeros(4000, 1, 1, 1), "vectors": torch.zeros(4000, 2)}
    masks = objective.left_out(0, positions, given)
    picture, numbers = (masks[name].numpy() for name in ("condition_mask", "vector_mask"))
    label = objective.dropped(0, positions, torch.zeros(4000, dtype=torch.int64), 1).numpy() == 0
    for one, other in ((picture, numbers), (numbers, label)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert abs(numbers.mean() - 0.75) < 0.03
    alone = objective.left_out(0, positions[7:9], {"vectors": torch.zeros(2, 2)})
    assert alone["vector_mask"].tolist() == numbers[7:9].tolist()
    assert objective.left_out(0, positions, {}) == {}


@pytest.mark.parametrize("on", ["label", "condition", "both"])
def test_guidance_leaves_out_what_it_acts_on(on):
    pipe, z, t = make_pipe(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor(0.0)
    told = {"class_labels": torch.tensor([1]), "vectors": torch.tensor([[1.0, -2.0, 0.5]])}
    left = dict(told, class_labels=torch.tensor([3])) if on != "condition" else dict(told)
    if on != "label":
        left["vector_mask"] = torch.tensor([False])
    with torch.no_grad():
        with_it, without_it = (pipe.transformer(z, t, **arguments).sample for arguments in (told, left))
    x = without_it + 2.5 * (with_it - without_it)
    settings = {"num_inference_steps": 1, "guidance_scale": 2.5, "guidance_interval": (0, 1), "guidance_on": on}
    vectors = [[50.0, 1e9 - 0.2, 1.0]]  # too close to 1e9 for float32
    made = pipe("dog", latents=z, vectors=vectors, output_type="latent", **settings).images
    assert torch.allclose(made, x, atol=1e-4)


def test_one_pass_where_there_is_nothing_to_leave_out():
    pipe, rows = make_pipe(), []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    how = {"guidance_scale": 2.0, "guidance_interval": (0, 1), "guidance_on": "condition"}
    pipe(["cat", None], 1, vectors=[[1, 2, 3], None], guidance_scale=1.0)
    pipe(["cat", None], 1, vectors=[None], **how)
    pipe(["cat", None], 1, vectors=[[1, 2, 3], None], **how)
    assert rows == [2, 2, 3]


@pytest.mark.parametrize(
    "form",
    [
        [41, 3.0, -1],
        (41, 3.0, -1),
        {"place": [3.0, -1], "age": 41},
        [{"age": [41], "place": (3.0, -1)}],
        [[41, 3.0, -1]],
        [[41, [3.0, -1]]],
        np.array([41, 3.0, -1]),
        np.array([[41, 3, -1]]),
        [torch.tensor([41.0, 3, -1])],
        [np.float32(41), 3.0, np.int64(-1)],
    ],
)
def test_numbers_may_be_given_in_many_forms(form):
    pipe, noise = make_pipe(), torch.randn(2, 3, 8, 8)
    expected = pipe([0, 1], 1, latents=noise, vectors=[[41, 3.0, -1], [41, 3.0, -1]], output_type="pt").images
    assert torch.allclose(pipe([0, 1], 1, latents=noise, vectors=form, output_type="pt").images, expected, atol=1e-6)


def test_numbers_labels_and_copies_go_together():
    pipe, rows = make_pipe(), [[41, 1e9, 0], None, [0, 1e9 + 1, 5]]

    def make(labels, vectors, count, **how):
        noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7)).expand(count, -1, -1, -1)
        return pipe(labels, 2, vectors=vectors, latents=noise, output_type="pt", **how).images

    each = make("cat", rows, 3)
    assert torch.allclose(make(["cat"] * 3, rows, 3), each, atol=1e-6)
    copies = make("cat", rows, 6, num_images_per_label=2)
    assert torch.allclose(copies[::2], each, atol=1e-5)
    assert torch.allclose(copies[1::2], each, atol=1e-5)
    assert not torch.allclose(each[0], each[2], atol=1e-3)


def test_of_one_number_a_list_has_one_for_each_image():
    pipe = JiTPipeline(build(vector_sizes=[1]), JiTScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.vectors == {"names": ["0"], "sizes": [1], "mean": [0.0], "std": [1.0]}
    noise = torch.randn(2, 3, 8, 8)
    expected = pipe([0, 1], 1, latents=noise, vectors=[[0.3], None], output_type="pt").images
    assert torch.equal(pipe([0, 1], 1, latents=noise, vectors=[0.3, None], output_type="pt").images, expected)
    pipe([0, 1], 1, latents=noise, vectors=0.3)


@pytest.mark.parametrize(
    ("labels", "vectors", "message"),
    [
        (0, None, r"vectors is not given, .*: give age, 2 numbers of place for each image, or \[None\]"),
        ([0, 1], [[1, 2, 3]] * 3, "3 rows as vectors for 2 labels"),
        (0, [], "0 rows as vectors for 1 labels"),
        (0, [[1, 2]], r"vectors of 2 numbers: give 3 \(age, 2 numbers of place\)"),
        (0, [1, 2], "vectors of 2 numbers: give 3"),
        (0, [[1, 2, float("nan")]], "give finite numbers"),
        (0, [[1, 2, float("inf")]], "give finite numbers"),
        (0, [[1, 2, None]], "give finite numbers"),
        (0, ["old"], "vectors of 1 numbers"),
        (0, [[1, 2, "old"]], "give finite numbers"),
        (0, {"age": 3}, "vectors of age: give age, 2 numbers of place"),
        (0, {"age": 3, "place": 3}, "vectors have 1 numbers of place: give 2"),
        (0, {"age": 3, "place": [1, 2], "weight": 1}, "vectors of age, place, weight: give"),
    ],
)
def test_numbers_that_cannot_be_are_refused(labels, vectors, message):
    with pytest.raises(ValueError, match=message):
        make_pipe()(labels, 1, vectors=vectors)


def test_a_network_without_numbers_refuses_them():
    pipe = JiTPipeline(build(), JiTScheduler(), vectors=COLUMNS)
    assert pipe.config.vectors is None
    with pytest.raises(ValueError, match="vectors: the network was trained without numbers"):
        pipe(0, 1, vectors=[[1, 2, 3]])


@pytest.mark.parametrize("wrong", [{"sizes": [2, 1]}, {"mean": [0.0]}, {"std": [1.0, 0.0, 1.0]}, {"names": ["a"]}])
def test_columns_that_do_not_fit_the_network_are_refused(wrong):
    with pytest.raises(ValueError, match="do not fit the network, which takes columns of"):
        make_pipe(vectors=COLUMNS | wrong)


def test_images_by_number_are_the_same_in_any_batch():
    pipe, vectors = make_pipe(), [[n * 10.0, 1e9, n] for n in range(5)]
    all_at_once = generate(pipe, range(5), vectors=vectors, num_inference_steps=2)
    assert torch.equal(generate(pipe, range(5), vectors=vectors, num_inference_steps=2, batch_size=2), all_at_once)
    assert torch.equal(generate(pipe, [3], vectors=vectors[3:4], num_inference_steps=2), all_at_once[3:4])
    none = generate(pipe, range(2), num_inference_steps=2)
    assert torch.equal(generate(pipe, range(2), vectors=[None, None], num_inference_steps=2), none)


def test_a_pipeline_is_kept_with_its_columns(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    again = JiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.vectors == COLUMNS
    assert JiTPipeline(**again.components).config.vectors == COLUMNS
    how = {"num_inference_steps": 2, "vectors": {"age": 44, "place": [1e9, 1]}, "output_type": "pt"}
    made = [p(1, generator=torch.Generator().manual_seed(0), **how).images for p in (pipe, again)]
    assert torch.equal(*made)


def test_a_card_shows_a_call_with_all_that_the_network_wants():
    pipe = JiTPipeline(build(vector_sizes=[1, 2], condition_channels=3), JiTScheduler(), vectors=COLUMNS)
    card = conversion_card(pipe, "JiT", "model", {})
    (call,) = (line for line in card.splitlines() if line.startswith("image = "))
    assert 'condition_image=Image.open("condition.png"), vectors={"age": 40.0, "place": [1000000000.0, 0.0]}' in call
    assert "from PIL import Image\n" in card
    made = []
    scope = {"pipe": lambda *args, **how: made.append((args, how)), "torch": torch, "Image": PIL.Image}
    with pytest.raises((FileNotFoundError, AttributeError)):
        exec(call, scope)
    exec(call.replace('Image.open("condition.png")', "None").replace(".images[0]", ""), scope)
    assert made[0][1]["vectors"] == {"age": 40.0, "place": [1e9, 0.0]}


def test_the_code_of_a_folder_knows_numbers_and_several_labels_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    network = build(vector_sizes=[1, 2], condition_channels=3, has_several_labels=True)
    pipe = JiTPipeline(network, JiTScheduler(), ["cat", "dog", "cow"], vectors=COLUMNS, guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.py"):
        file.write_text(file.read_text().replace('import_module("jit_accel', 'import_module("gone'))
    carried = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    carried.set_progress_bar_config(disable=True)
    assert not isinstance(carried, JiTPipeline)
    picture, noise = torch.rand(3, 8, 8), torch.randn(2, 3, 8, 8)
    how = {"vectors": [{"age": 44, "place": [1e9, 1]}, None], "condition_image": [picture, None], "latents": noise}
    made = [p([["cat", "cow"], "dog"], 2, **how, output_type="pt").images for p in (pipe, carried)]
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="vectors is not given"):
        carried(0, 1, condition_image=picture)


def test_numbers_go_with_windows_of_a_large_picture():
    pipe, noise = make_pipe(), torch.randn(2, 3, 16, 12)
    rows = [[41, 1e9, -1], None]
    how = {"latents": noise, "guidance_scale": 2.0, "guidance_on": "condition", "output_type": "pt", "tile": 8}
    both = pipe([0, 1], 2, vectors=rows, **how).images
    for n in range(2):
        alone = pipe(n, 2, vectors=rows[n : n + 1], **how | {"latents": noise[n : n + 1]}).images
        assert torch.allclose(alone[0], both[n], atol=1e-5)
    other = pipe([0, 1], 2, vectors=[[0, 1e9, -1], None], **how).images
    assert not torch.allclose(other[0], both[0], atol=1e-3)
    assert torch.allclose(other[1], both[1], atol=1e-5)
