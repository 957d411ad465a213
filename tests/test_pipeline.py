import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from golden import FILES, load_golden
from PIL import Image

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.pipeline import guidance_weight

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
    pipe([0, 1], 4, guidance_scale=1.0, guidance_interval=(0.0, 1.0), output_type="pt")
    assert [n for _, n in calls] == [2] * 7


def test_guidance_extrapolates_from_no_class_through_the_class(pipe):
    z, t, labels = torch.randn(2, 3, 16, 16), torch.tensor(0.4), torch.tensor([1, 2])
    conditional, unconditional = (
        pipe.transformer(z, t, y).sample.detach() for y in (labels, torch.full_like(labels, 10))
    )
    for weight in (0.0, 1.0, 2.5):
        expected = unconditional + weight * (conditional - unconditional)
        assert torch.allclose(pipe.predict(z, t, labels, weight), expected, atol=1e-5)


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


def test_names_are_found_whatever_their_case(pipe):
    assert pipe.label_ids(["bag", "ANKLE BOOT", 3, None, np.int64(2)]) == [8, 9, 3, 10, 2]
    assert pipe.label_ids("Bag") == [8]
    assert pipe.label_ids(torch.tensor([1, 2])) == [1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "bagg"}, "Did you mean 'Bag'"),
        ({"class_labels": [0, 10]}, "use 0 to 9"),
        ({"class_labels": -1}, "use 0 to 9"),
        ({"class_labels": []}, "give a class"),
        ({"class_labels": 0, "height": 18}, "multiples of the patch, 4"),
        ({"class_labels": 0, "latents": torch.zeros(2, 3, 16, 16)}, r"\(1, 3, 16, 16\)"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"class_labels": 0, "generator": 7}, r"manual_seed\(7\)"),
        ({"class_labels": 0, "output_type": "jpg"}, "pil, pt"),
        ({"class_labels": 0, "num_inference_steps": 0}, "at least 1"),
        ({"class_labels": 0, "method": "heum"}, "Did you mean 'heun'"),
    ],
)
def test_a_wrong_call_is_told_what_would_do(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


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


def test_the_callback_sees_each_step_and_may_replace_the_state(pipe):
    seen = []

    def callback(pipe, step, t, kwargs):
        seen.append((step, round(t.item(), 4)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else None

    images = pipe(0, 4, callback_on_step_end=callback, output_type="pt").images
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert (images == 0.5).all()


def test_sampling_turns_dropout_off_and_back_on(pipe):
    seen = []
    pipe.transformer.train()
    pipe.transformer.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    pipe(0, 1, output_type="pt")
    assert seen == [False]
    assert pipe.transformer.training


def test_a_folder_comes_back_whole(tmp_path):
    pipe = make_pipe(guidance_scale=2.5, guidance_interval=(0.2, 0.9), noise_scale=2.0)
    pipe.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")] == []
    loaded = JiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.class_names == NAMES
    same = [p("bag", 3, generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*same)
    calls = count_calls(loaded)
    loaded(0, 4, method="euler", output_type="pt")  # the folder's own guidance
    assert [n for _, n in calls] == [1, 2, 2, 2]


def test_plain_diffusers_loads_a_folder_that_brings_one_line(tmp_path):
    make_pipe().save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("from jit_accel.pipeline import JiTPipeline\n")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert isinstance(loaded, JiTPipeline)
    assert loaded.config.class_names == NAMES


def test_a_bf16_network_samples_in_float32(tmp_path):
    pipe = make_pipe()
    exact = pipe([0, 1], 5, generator=seeded(), output_type="latent").images
    pipe.to(torch.bfloat16)
    states = []
    low = pipe(
        [0, 1],
        5,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda p, i, t, kwargs: states.append(kwargs["latents"].dtype),
    ).images
    assert states == [torch.float32] * 5
    assert (low - exact).square().mean().sqrt() < 0.05 * exact.std()


@pytest.mark.gpu
def test_cpu_offload_gives_the_same_images():
    expected = make_pipe()(0, 3, generator=seeded(), output_type="pt").images
    pipe = make_pipe()
    pipe.enable_model_cpu_offload()
    images = pipe(0, 3, generator=seeded(), output_type="pt").images
    assert pipe.transformer.device.type == "cpu"
    assert torch.allclose(images.cpu(), expected, atol=1e-3)
