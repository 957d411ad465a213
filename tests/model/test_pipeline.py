import accelerate
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from golden import FILES, load_golden
from PIL import Image

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.model.call_arguments import guidance_weight, label_ids
from jit_accel.model.functional import position_table, rope_table
from jit_accel.model.guidance import guided_prediction

NAMES = [f"kind {i}" for i in range(8)] + ["Bag", "Ankle boot"]


def make_pipe(**settings) -> JiTPipeline:
    scheduler = JiTScheduler(noise_scale=settings.pop("noise_scale", 1.0))
    pipe = JiTPipeline(load_golden("tiny").model(), scheduler, class_names=NAMES, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> JiTPipeline:
    return make_pipe()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def count_calls(pipe) -> list[tuple[float, int]]:
    """(t, batch) of each call of the network, as they come."""
    calls = []

    def note(_, args):
        calls.append((round(args[1].item(), 4), len(args[0])))

    pipe.transformer.register_forward_pre_hook(note)
    return calls


@pytest.mark.parametrize("file", FILES)
def test_samples_equal_the_references(file):
    golden = load_golden(file)
    model, rows = golden.model(), list(golden.sampling_rows())
    assert len(rows) == 4
    for row, method, steps, scale, low, high, noise in rows:
        pipe = JiTPipeline(model, JiTScheduler(noise_scale=noise))
        pipe.set_progress_bar_config(disable=True)
        out = pipe(
            golden.tensors[f"{row}.labels"],
            num_inference_steps=steps,
            guidance_scale=scale,
            guidance_interval=(low, high),
            method=method,
            latents=golden.tensors[f"{row}.z0"],
            output_type="latent",
        ).images
        expected = golden.tensors[f"{row}.out"]
        assert (out - expected).abs().max() <= 1e-5 * expected.std(), row


def test_guidance_costs_double_only_where_it_acts(pipe):
    calls = count_calls(pipe)
    pipe([0, 1], 4, guidance_scale=2.0, guidance_interval=(0.2, 0.6), output_type="pt")
    assert calls == [(0, 2), (0.25, 4), (0.25, 4), (0.5, 4), (0.5, 4), (0.75, 2), (0.75, 2)]
    calls.clear()
    pipe([0, 1], 4, guidance_scale=2.0, guidance_interval=(0.25, 1.0), method="euler", output_type="pt")
    assert calls == [(0, 2), (0.25, 2), (0.5, 4), (0.75, 4)]


@pytest.mark.parametrize("method", ["ab2", "etd2"])
def test_a_history_ends_where_guidance_begins_and_ends(pipe, method):
    z = start = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    interval = (0.3, 0.7)
    found = pipe([0, 1], 8, 3.0, interval, method, latents=start, output_type="latent").images
    scheduler, before = JiTScheduler.from_config(pipe.scheduler.config), None
    scheduler.set_timesteps(8, method=method)
    for t in scheduler.timesteps:
        weight = 3.0 if interval[0] < t < interval[1] else 1.0
        if before not in (None, weight):
            scheduler.forget_history()
        before = weight
        with torch.no_grad():
            output = guided_prediction(pipe.transformer, z, t, {"class_labels": torch.tensor([0, 1])}, weight)
            z = scheduler.step(output, t, z).prev_sample
    assert torch.equal(found, z)


@pytest.mark.parametrize(
    ("labels", "scale", "batch"),
    [
        ([0, 1], 1.0, 2),
        ([0, 1], 0.0, 2),  # no class at all
        ([0, 1], -0.5, 4),
        ([None, None], 2.0, 2),  # with and without class is the same
        (None, 2.0, 1),
        ([None, 3, None], 2.0, 4),  # one of them has a class
    ],
)
def test_no_row_is_computed_that_is_not_needed(pipe, labels, scale, batch):
    calls = count_calls(pipe)
    pipe(labels, 2, guidance_scale=scale, guidance_interval=(0.0, 1.0), output_type="pt")
    assert [n for _, n in calls] == [batch] * 3


def test_images_with_and_without_class_share_a_batch(pipe):
    def make(labels, seeds):
        generators = [seeded(seed) for seed in seeds]
        return pipe(labels, 3, guidance_scale=2.5, generator=generators, output_type="pt").images

    mixed = make([None, "bag", None, 2], [0, 1, 2, 3])
    assert torch.allclose(mixed[[1, 3]], make(["bag", 2], [1, 3]), atol=1e-5)
    assert torch.allclose(mixed[[0, 2]], make([None, None], [0, 2]), atol=1e-5)
    unguided = pipe(None, 3, guidance_scale=1.0, generator=seeded(), output_type="pt").images
    assert torch.allclose(mixed[:1], unguided, atol=1e-5)
    no_weight = pipe(
        "bag", 3, guidance_scale=0.0, guidance_interval=(0, 1), generator=seeded(), output_type="pt"
    ).images
    assert torch.allclose(no_weight, unguided, atol=1e-5)


def test_guidance_extrapolates_from_no_class_through_the_class(pipe):
    z, t, labels = torch.randn(2, 3, 16, 16), torch.tensor(0.4), torch.tensor([1, 2])
    conditional, unconditional = (
        pipe.transformer(z, t, y).sample.detach() for y in (labels, torch.full_like(labels, 10))
    )
    for weight in (0.0, 1.0, 2.5):
        expected = unconditional + weight * (conditional - unconditional)
        found = guided_prediction(pipe.transformer, z, t, {"class_labels": labels}, weight)
        assert torch.allclose(found.detach(), expected, atol=1e-5)


def test_a_guide_takes_the_place_of_no_class(pipe):
    def make(scale):
        how = {"guidance_interval": (0, 1), "generator": seeded(), "output_type": "latent"}
        return pipe([0, 1], 4, scale, **how).images

    unguided, guided = make(1.0), make(2.5)
    pipe.guide = pipe
    assert torch.allclose(make(2.5), unguided, atol=1e-5)  # away from itself is nowhere
    worse = JiTTransformer2DModel.from_config(pipe.transformer.config)
    worse.load_state_dict(pipe.transformer.state_dict())
    table = worse.y_embedder.embedding_table.weight
    table.data[:] = table.data[-1]  # whatever the class, it sees none
    pipe.guide = worse
    assert torch.allclose(make(2.5), guided, atol=1e-5)
    assert torch.equal(make(1.0), unguided)
    pipe.guide = None
    assert torch.equal(make(2.5), guided)


def test_a_guide_of_other_data_or_prediction_is_refused(pipe):
    other = JiTTransformer2DModel.from_config({**pipe.transformer.config, "num_classes": 3})
    with pytest.raises(ValueError, match="guide: it has num_classes 3, not 10: take a model of the same data"):
        pipe.guide = other
    with pytest.raises(ValueError, match="give a network or a pipeline"):
        pipe.guide = "folder"
    with pytest.raises(ValueError, match=r"noise_scale 2.0, not 1.0"):
        pipe.guide = JiTPipeline(pipe.transformer, JiTScheduler(noise_scale=2.0))
    with pytest.raises(ValueError, match="prediction_type v, not x"):
        pipe.guide = JiTPipeline(pipe.transformer, JiTScheduler("v"))
    assert pipe.guide is None


def test_a_checkpoint_of_the_run_is_a_guide_for_its_pipeline(pipe, tmp_path):
    """Where files have [] a checkpoint's network has ()."""
    pipe.save_pretrained(tmp_path)
    loaded, fresh = JiTPipeline.from_pretrained(tmp_path), JiTTransformer2DModel.from_config(pipe.transformer.config)
    for one, other in ((loaded, fresh), (pipe, loaded)):
        one.guide = other
    assert loaded.guide is fresh


def test_the_interval_is_open_but_for_a_zero_start():
    acts = {t: guidance_weight(t, 3.0, (0.25, 0.75)) for t in (0.0, 0.25, 0.26, 0.74, 0.75)}
    assert acts == {0.0: 1, 0.25: 1, 0.26: 3, 0.74: 3, 0.75: 1}
    assert guidance_weight(0.0, 3.0, (0.0, 0.75)) == 3
    # on the sampler's float32 grid as well: 0.1 of ten steps is not above 0.1
    assert guidance_weight(torch.linspace(0, 1, 11)[1].item(), 3.0, (0.1, 1.0)) == 1
    with pytest.raises(ValueError, match="low <= high"):
        guidance_weight(0.5, 3.0, (0.75, 0.25))


def test_the_same_seed_gives_the_same_image_at_any_batch_size(pipe):
    def make(labels, generator):
        return pipe(labels, 3, guidance_scale=2.0, generator=generator, output_type="pt").images

    four = make([0, 1, 2, 3], seeded())
    generator = seeded()
    two_by_two = torch.cat([make([0, 1], generator), make([2, 3], generator)])
    assert torch.allclose(four, two_by_two, atol=1e-5)
    assert torch.allclose(four[:1], make(0, seeded()), atol=1e-5)
    listed = make([3, 0], [seeded(5), seeded()])
    assert torch.allclose(listed[1:], four[:1], atol=1e-5)
    assert not torch.allclose(make(0, seeded(1)), four[:1], atol=1e-2)


def test_images_of_one_label_stand_side_by_side(pipe):
    twice = pipe([0, 8], 2, num_images_per_label=2, generator=seeded(), output_type="pt").images
    assert torch.equal(twice, pipe([0, 0, 8, 8], 2, generator=seeded(), output_type="pt").images)


def test_names_are_found_whatever_their_case(pipe):
    assert pipe.label_ids(["bag", "ANKLE BOOT", 3, None, np.int64(2)]) == [8, 9, 3, 10, 2]
    assert pipe.label_ids("Bag") == [8]
    for numbers in (torch.tensor([1, 2]), np.array([1, 2]), range(1, 3), ("kind 1", np.str_("KIND 2"))):
        assert pipe.label_ids(numbers) == [1, 2]
    assert pipe.label_ids(torch.tensor(3)) == pipe.label_ids(np.int32(3)) == [3]


def test_a_name_in_its_own_case_comes_first():
    assert label_ids(["cat", "Cat", "CAT"], 2, ["Cat", "cat"]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "bagg"}, "Did you mean 'Bag'"),
        ({"class_labels": [0, 10]}, "use 0 to 9"),
        ({"class_labels": -1}, "use 0 to 9"),
        ({"class_labels": []}, "give a class"),
        ({"class_labels": 1.0}, "whole numbers from 0 to 9"),
        ({"class_labels": [True]}, "whole numbers from 0 to 9"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "whole numbers from 0 to 9"),
        ({"class_labels": np.zeros((2, 2), int)}, "whole numbers from 0 to 9"),
        ({"class_labels": 0, "height": 18}, "multiples of the patch, 4"),
        ({"class_labels": 0, "width": 0}, "width 0 must be a whole number and at least 1"),
        ({"class_labels": 0, "height": 16.0}, "height 16.0 must be a whole number"),
        ({"class_labels": 0, "latents": [[0.0]]}, r"latents of list: give a tensor \(B, 3, H, W\)"),
        ({"class_labels": 0, "latents": torch.zeros(16)}, r"latents of shape \(16,\)"),
        ({"class_labels": 0, "latents": torch.zeros(2, 3, 16, 16)}, r"\(1, 3, 16, 16\)"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"class_labels": 0, "generator": "a"}, "give a torch.Generator"),
        ({"class_labels": 0, "generator": 7}, r"manual_seed\(7\)"),
        ({"class_labels": 0, "output_type": "jpg"}, "pil, pt"),
        ({"class_labels": 0, "num_inference_steps": 0}, "at least 1"),
        ({"class_labels": 0, "num_inference_steps": 2.5}, "a whole number"),
        ({"class_labels": 0, "method": "heum"}, "Did you mean 'heun'"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "must be a number"),
        ({"class_labels": 0, "guidance_interval": (10, 100)}, "low <= high <= 1"),
        ({"class_labels": 0, "guidance_interval": "01"}, "low <= high <= 1"),
        ({"class_labels": 0, "num_images_per_label": 0}, "num_images_per_label 0"),
        ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["noise"]}, "only 'latents'"),
    ],
)
def test_a_wrong_call_is_told_what_would_do(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_the_state_stays_float32_whatever_a_callback_gives(pipe):
    made = pipe(
        0,
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=lambda *a: {"latents": a[3]["latents"].half()},
    )
    assert made.images.dtype == torch.float32


def test_labels_left_out_mean_the_only_class_where_there_is_one():
    assert (label_ids(None, 1, None), label_ids([None], 1, None)) == ([0], [1])
    assert (label_ids(None, 3, None), label_ids([None, 2], 3, None)) == ([3], [3, 2])
    assert label_ids(None, 0, None) == label_ids([None], 0, []) == [0]


def test_labels_may_be_tensors_and_arrays():
    for labels in (torch.tensor([1, 2]), np.array([1, 2]), [torch.tensor(1), np.array(2)], [np.int64(1), 2]):
        assert label_ids(labels, 3, None) == [1, 2]
    assert label_ids(torch.tensor(1), 3, None) == [1]


def test_a_pipeline_without_names_asks_for_numbers():
    golden = load_golden("tiny")
    with pytest.raises(ValueError, match="use 0 to 9"):
        JiTPipeline(golden.model(), JiTScheduler()).label_ids("bag")
    with pytest.raises(ValueError, match="2 names, but the network has 10"):
        JiTPipeline(golden.model(), JiTScheduler(), class_names=["a", "b"])


def test_output_types_are_views_of_one_result(pipe):
    z, pt, np_, pil = (
        pipe([0, 8], 2, generator=seeded(), output_type=kind).images for kind in ("latent", "pt", "np", "pil")
    )
    assert z.abs().max() > 1  # so that the clamp is seen
    assert torch.equal(pt, (z / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(np_, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in pil)
    assert np.array_equal(np.asarray(pil[1]), (np_[1] * 255).round().astype(np.uint8))
    assert torch.equal(pipe([0, 8], 2, generator=seeded(), output_type="pt", return_dict=False)[0], pt)


def test_noise_starts_at_the_schedulers_scale():
    unit, double = (make_pipe(noise_scale=s).prepare_latents(2, seeded(), None, None, None) for s in (1.0, 2.0))
    assert torch.equal(2 * unit, double)


def test_other_image_sizes(pipe):
    assert pipe(0, 2, height=8, width=24, output_type="pt").images.shape == (1, 3, 8, 24)
    double = pipe(0, 2, height=32, width=32, generator=seeded(), output_type="latent").images
    assert double.isfinite().all()
    own = [pipe(0, 2, generator=seeded(), output_type="pt", **size).images for size in ({}, {"height": 16})]
    assert torch.equal(*own)


def test_positions_of_other_sizes_are_those_of_the_training_size_spread_evenly():
    cpu = torch.device("cpu")
    trained, double = (position_table(32, (n, n), 4, cpu).reshape(n, n, 32) for n in (4, 8))
    assert torch.equal(double[::2, ::2], trained)
    halfway = position_table(32, (1, 4), 1, cpu)[0]  # columns 0, 0.25, 0.5, 0.75
    assert torch.equal(halfway[2], position_table(32, (1, 2), 1, cpu)[0, 1])
    prefix = 3
    for of_trained, of_double in zip(rope_table(16, (4, 4), 4, prefix, cpu), rope_table(16, (8, 8), 4, prefix, cpu)):
        assert torch.equal(of_double[:prefix], of_trained[:prefix])
        assert torch.equal(of_double[prefix:].reshape(8, 8, -1)[::2, ::2].flatten(0, 1), of_trained[prefix:, 0])
    wide = position_table(32, (4, 8), 4, cpu).reshape(4, 8, 32)
    assert torch.equal(wide[:, ::2], trained)


def test_the_callback_sees_each_step_and_may_replace_the_state(pipe):
    seen = []

    def callback(pipe, step, t, kwargs):
        seen.append((step, round(t.item(), 4)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else None

    images = pipe(0, 4, callback_on_step_end=callback, output_type="pt").images
    assert seen == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert (images == 0.5).all()


def test_a_callback_may_stop_the_call(pipe):
    states = []

    def stop_after_two(pipe, step, t, kwargs):
        states.append(kwargs["latents"])
        pipe._interrupt = step == 1

    calls = count_calls(pipe)
    z = pipe(0, 4, callback_on_step_end=stop_after_two, output_type="latent").images
    assert pipe.interrupt
    assert len(states) == 2
    assert torch.equal(z, states[1])
    assert [t for t, _ in calls] == [0, 0.25, 0.25, 0.5]
    assert pipe.num_timesteps == 4
    pipe(0, 2, callback_on_step_end=lambda *_: states.clear(), output_type="latent")  # the next call runs to its end
    assert not pipe.interrupt
    assert states == []


def test_callback_objects_of_diffusers_name_what_they_want(pipe):
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipe, step, t, kwargs):
            return {"latents": kwargs["latents"] / 2}

    halved = pipe(0, 1, generator=seeded(), callback_on_step_end=Halve(), output_type="latent").images
    assert torch.equal(halved, pipe(0, 1, generator=seeded(), output_type="latent").images / 2)
    seen = []
    note = lambda p, i, t, kwargs: seen.append(kwargs)  # noqa: E731
    pipe(0, 1, callback_on_step_end=note, callback_on_step_end_tensor_inputs=[], output_type="latent")
    assert seen == [{}]


def test_the_progress_bar_counts_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    pipe(0, 3, output_type="pt")
    assert "drawing: 100%" in (bar := capsys.readouterr().err)
    assert "3/3" in bar
    pipe.set_progress_bar_config(disable=True)
    pipe(0, 3, output_type="pt")
    assert capsys.readouterr().err == ""


def test_sampling_turns_dropout_off_and_back_on(pipe):
    seen = []
    pipe.transformer.train()
    pipe.transformer.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    pipe(0, 1, output_type="pt")
    assert seen == [False]
    assert all(module.training for module in pipe.transformer.modules())
    pipe.transformer.blocks[0].eval()  # as a trainer freezes a part
    before = [module.training for module in pipe.transformer.modules()]
    pipe(0, 1, output_type="pt")
    assert [module.training for module in pipe.transformer.modules()] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_network_samples_in_float32(dtype):
    pipe = make_pipe()
    exact = pipe([0, 1], 3, generator=seeded(), output_type="latent").images
    pipe.to(dtype)
    states, outputs = [], []
    pipe.transformer.register_forward_hook(lambda *args: outputs.append(args[-1][0].dtype))
    pipe.transformer.register_forward_pre_hook(lambda _, args: states.append(args[0].dtype))  # mid-step ones, too
    low = pipe(
        [0, 1],
        3,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda p, i, t, kwargs: states.append(kwargs["latents"].dtype),
    ).images
    assert set(outputs) == {dtype}
    assert states == [torch.float32] * 8
    assert (low - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_weights_may_be_brought_for_each_module_alone(pipe):
    """What `enable_sequential_cpu_offload` does; from the CPU to the CPU, where diffusers itself refuses."""
    expected = pipe([0, 1], 2, guidance_scale=2.0, generator=seeded(), output_type="pt").images
    accelerate.cpu_offload(pipe.transformer, "cpu", offload_buffers=True)
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"meta"}
    assert torch.equal(pipe([0, 1], 2, guidance_scale=2.0, generator=seeded(), output_type="pt").images, expected)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.transformer.set_attention_backend("native"),
    ],
    ids=["model offload", "group offload", "slicing", "backend"],
)
def test_what_diffusers_users_do_to_a_pipeline_changes_no_image(pipe, prepare):
    expected = pipe([0, 1], 2, guidance_scale=2.0, generator=seeded(), output_type="pt").images
    prepare(pipe)
    for _ in range(2):
        images = pipe([0, 1], 2, guidance_scale=2.0, generator=seeded(), output_type="pt").images
        assert torch.allclose(images, expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "prepare",
    [
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: pipe.enable_sequential_cpu_offload(),
        lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level"),
    ],
    ids=["model", "sequential", "group"],
)
def test_offloading_gives_the_same_images(prepare):
    expected = make_pipe()(0, 3, generator=seeded(), output_type="pt").images
    pipe = make_pipe()
    prepare(pipe)
    for _ in range(2):
        images = pipe(0, 3, generator=seeded(), output_type="pt").images
        assert {weight.device.type for weight in pipe.transformer.parameters()} <= {"cpu", "meta"}
        assert torch.allclose(images.cpu(), expected, atol=1e-3)


def test_names_of_classes_are_found_in_every_form_of_unicode():
    names = ["cafe\u0301", "tea", "Stra\u00dfe", "\u00c9t\u00e9", "\u00e9t\u00e9"]
    assert label_ids(["caf\u00e9", "cafe\u0301", "CAF\u00c9", "tea"], 5, names) == [0, 0, 0, 1]
    assert label_ids(["E\u0301te\u0301", "e\u0301te\u0301"], 5, names) == [3, 4]
    with pytest.raises(ValueError, match="Did you mean 'cafe\u0301'"):
        label_ids("caf\u00e8", 5, names)
