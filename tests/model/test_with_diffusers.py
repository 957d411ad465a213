"""The pipeline is used as diffusers' own are: offloaded, quantised, saved in parts, with other solvers."""

import copy
import itertools
import json

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import dynamic_modules_utils
from golden import load_golden
from safetensors.torch import save_file
from test_pipeline import NAMES, make_pipe, seeded
from torch import nn

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel, UserError
from jit_accel.model.loading import load_pipeline
from jit_accel.model.solvers import SOLVERS

CPU = torch.device("cpu")


@pytest.fixture
def pipe() -> JiTPipeline:
    return make_pipe()


def draw(pipe, steps: int = 2, **settings) -> torch.Tensor:
    settings = {"guidance_scale": 2.0, "generator": seeded(), "output_type": "latent"} | settings
    return pipe([0, 1], steps, **settings).images


# ---- weights that are elsewhere, or in another form


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_weights_come_by_groups_and_from_the_disk(pipe, tmp_path, kind, to_disk):
    expected = draw(pipe)
    place = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
    pipe.transformer.enable_group_offload(CPU, CPU, kind, num_blocks_per_group=1, **place)
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
    assert to_disk == any(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_folder_of_offloaded_weights_serves_one_network(pipe, tmp_path, blocks):
    """diffusers takes the files that it finds there for its own."""
    how = {"offload_type": "block_level", "num_blocks_per_group": blocks, "offload_to_disk_path": str(tmp_path / "new")}
    expected, other = draw(pipe), make_pipe()
    with torch.no_grad():
        other.transformer.final_layer.linear.weight.mul_(2)
    pipe.transformer.enable_group_offload(CPU, CPU, **how)
    with pytest.raises(ValueError, match="another network's weights"):
        other.transformer.enable_group_offload(CPU, CPU, **how)
    again = make_pipe()  # in a later process
    again.enable_group_offload(CPU, CPU, **how)
    assert torch.equal(draw(again), expected)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_weights_that_are_elsewhere_are_not_saved(pipe, tmp_path, is_on_disk):
    pipe.save_pretrained(tmp_path / "pipeline")
    before = {file: file.read_bytes() for file in (tmp_path / "pipeline").rglob("*.*")}
    if is_on_disk:
        pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path / "disk"))
    else:
        accelerate.cpu_offload(pipe.transformer, CPU)
    with pytest.raises(ValueError, match="offloaded"):
        pipe.save_pretrained(tmp_path / "pipeline")
    assert {file: file.read_bytes() for file in (tmp_path / "pipeline").rglob("*.*")} == before


def test_weights_offloaded_to_memory_are_saved(pipe, tmp_path):
    expected = draw(pipe)
    pipe.enable_group_offload(CPU, CPU, "leaf_level")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(quiet(JiTPipeline.from_pretrained(tmp_path))), expected)


def test_no_module_hands_out_a_weight(pipe):
    """Hooks of offloading take a module's weights away as soon as its call ends."""
    weights = {weight.untyped_storage().data_ptr() for weight in pipe.transformer.parameters()}
    seen = set()

    def note(module, _, out):
        seen.update(t.untyped_storage().data_ptr() for t in (out if isinstance(out, tuple) else [out]))

    for module in pipe.transformer.modules():
        module.register_forward_hook(note)
    pipe.transformer(torch.zeros(1, 3, 16, 16), 0.5, return_dict=False)
    assert seen
    assert not seen & weights


class StoredLinear(nn.Module):
    """A Linear whose weight is stored as bytes, and computed with in another dtype, as quantised ones are."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float().view(torch.uint8), requires_grad=False)
        self.bias, self.compute_dtype = linear.bias, compute_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype.is_floating_point
        weight = self.weight.view(torch.float32).to(self.compute_dtype)
        return F.linear(x.to(self.compute_dtype), weight, self.bias.to(self.compute_dtype)).to(x.dtype)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_in_does_not_follow_from_what_weights_are_stored_in(pipe, dtype, compute_dtype):
    expected = draw(pipe)
    pipe.to(dtype)
    for parent in list(pipe.transformer.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, StoredLinear(child, compute_dtype))
    found = draw(pipe)
    low = torch.bfloat16 in (dtype, compute_dtype)
    assert (found - expected).square().mean().sqrt() <= (0.05 if low else 1e-6) * expected.std()


def test_layers_are_what_their_classes_say(pipe):
    """Quantisers put layers of their own in the place of torch's, also of classes made from these."""
    expected = draw(pipe)
    for module in list(pipe.transformer.modules()):
        for plain in (nn.Linear, nn.Conv2d, nn.Embedding):
            if isinstance(module, plain):
                module.__class__ = type("Plain", (plain,), {"forward": plain.forward})
    assert torch.equal(draw(pipe), expected)


def test_layers_may_be_cast_for_each_call(pipe):
    expected = draw(pipe)
    apply_layerwise_casting(pipe.transformer, torch.bfloat16, torch.float32, skip_modules_pattern=("norm",))
    assert pipe.transformer.t_embedder.mlp[0].weight.dtype == torch.bfloat16
    assert (draw(pipe) - expected).square().mean().sqrt() <= 0.05 * expected.std()


def test_the_attention_backend_acts_or_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    expected, calls = draw(pipe), []
    math = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    noted = lambda **given: calls.append(1) or math(**given)  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, noted)
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.allclose(draw(pipe), expected, atol=1e-5)
    assert len(calls) == 3 * len(pipe.transformer.blocks)
    with pytest.raises(RuntimeError, match="flash-attn"):
        pipe.transformer.set_attention_backend("flash")
    with pytest.raises(ValueError, match="must be one of"):
        pipe.transformer.set_attention_backend("fast")
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        pipe.enable_xformers_memory_efficient_attention()


def test_processors_of_attention_are_listed_and_set(pipe):
    network, expected = pipe.transformer, draw(pipe)
    assert len(network.attn_processors) == len(network.blocks)
    (first, *_) = network.attn_processors.values()
    network.set_attn_processor(first)
    assert set(network.attn_processors.values()) == {first}
    network.fuse_qkv_projections()
    assert torch.equal(draw(pipe), expected)


# ---- what is saved


def test_a_pipeline_is_saved_in_parts_and_as_a_variant(pipe, tmp_path):
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    parts = sorted(file.name for file in (tmp_path / "transformer").glob("*.safetensors"))
    assert len(parts) > 2
    assert all(".ema" in name for name in parts)
    assert torch.equal(draw(quiet(JiTPipeline.from_pretrained(tmp_path, variant="ema"))), expected)
    with pytest.raises(OSError, match="no file named"):
        JiTPipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, variant="ema")  # whole, where parts lay
    assert torch.equal(draw(quiet(JiTPipeline.from_pretrained(tmp_path, variant="ema"))), expected)


def test_a_variant_that_was_saved_in_parts_is_saved_whole_by_position(pipe, tmp_path):
    network = pipe.transformer
    network.save_pretrained(tmp_path, True, None, True, "fp16", "20KB")
    network.save_pretrained(tmp_path, False, None, True, "fp16")  # not the main process: nothing is removed
    assert list(tmp_path.glob("*.index.fp16.json"))
    network.save_pretrained(tmp_path, True, None, True, "fp16")
    again = JiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(again.final_layer.linear.weight, network.final_layer.linear.weight)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_the_only_variant_of_a_folder_is_loaded(pipe, tmp_path, size):
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert torch.equal(draw(quiet(load_pipeline(tmp_path))), draw(pipe))
    pipe.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(UserError, match="no file named"):
        load_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path)
    load_pipeline(tmp_path)


def quiet(pipe) -> JiTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pickles_are_neither_written_nor_read(pipe, tmp_path):
    for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(ValueError, match="pickle"):
            save(tmp_path / "new", safe_serialization=False)
    with pytest.raises(ValueError, match="pickle"):
        pipe.transformer.save_pretrained(tmp_path / "new", True, None, False)
    assert not (tmp_path / "new").exists()
    pipe.save_pretrained(tmp_path / "old")
    network = tmp_path / "old" / "transformer"
    (network / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipe.transformer.state_dict(), network / "diffusion_pytorch_model.bin")
    for cls, place in ((JiTPipeline, network.parent), (JiTTransformer2DModel, network)):
        with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model\.safetensors"):
            cls.from_pretrained(place)
        with pytest.raises(ValueError, match="pickle"):
            cls.from_pretrained(place, use_safetensors=False)
    torch.save({"transformer.blocks.0.attn.qkv.lora_A.weight": torch.ones(1, 1)}, tmp_path / "lora.bin")
    for source, name in ((tmp_path, "lora.bin"), (tmp_path / "lora.bin", None)):
        with pytest.raises(ValueError, match="pickles are not read"):
            pipe.load_lora_weights(source, weight_name=name)


@pytest.mark.parametrize("place", [str, lambda path: path, lambda path: path / "pytorch_lora_weights.safetensors"])
def test_the_tensors_of_an_adapter_are_read_by_themselves(tmp_path, place):
    tensors = {f"transformer.blocks.0.attn.qkv.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert JiTPipeline.lora_state_dict(place(tmp_path)).keys() == tensors.keys()
    assert JiTPipeline.lora_state_dict(tensors) == tensors
    assert len(JiTPipeline.lora_state_dict(place(tmp_path), return_lora_metadata=True)) == 2


def test_the_network_of_a_folder_is_an_auto_model(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    for path, more in ((f"{folder}/transformer", {}), (str(folder), {"subfolder": "transformer"})):
        network = AutoModel.from_pretrained(path, trust_remote_code=True, **more)
        assert isinstance(network, JiTTransformer2DModel)
        assert "auto_map" not in network.config
        assert torch.equal(network.blocks[0].attn.qkv.weight, pipe.transformer.blocks[0].attn.qkv.weight)
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(path, **more)


def test_reading_a_folder_is_no_reason_for_warnings(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    quiet(JiTPipeline.from_pretrained(tmp_path))
    JiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert caplog.text == ""


def test_the_components_of_a_pipeline_make_its_like():
    settings = {"guidance_scale": 3.0, "guidance_interval": [0.2, 0.8], "num_inference_steps": 3, "method": "euler"}
    pipe = make_pipe(**settings)
    again = JiTPipeline(**pipe.components)
    assert {**again.config} == {**pipe.config}
    assert again.config.class_names == NAMES
    assert JiTPipeline(**pipe.components, guidance_scale=1.0).config.guidance_scale == 1
    assert set(pipe.components) == {"transformer", "scheduler"}
    pipe.scheduler = JiTScheduler(noise_scale=2.0)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(draw(quiet(JiTPipeline(**pipe.components))), draw(pipe))
    pipe.transformer = copy.deepcopy(pipe.transformer).requires_grad_(False)
    pipe.transformer.pipeline_settings = {}  # as of a network that was in no pipeline
    pipe.register_to_config(guidance_scale=4.0)
    again = JiTPipeline(**pipe.components)
    assert (again.config.class_names, again.config.guidance_scale) == (NAMES, 4.0)


# ---- a call, seen by callbacks


@pytest.mark.parametrize("scheduler", [*SOLVERS, FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()])
@pytest.mark.parametrize("image", [None, torch.full((3, 16, 16), 0.5)])
def test_callbacks_and_num_timesteps_count_steps_for_every_solver(pipe, scheduler, image):
    method, seen = scheduler, []
    if not isinstance(scheduler, str):
        pipe.scheduler, method = scheduler, None

    def note(pipe, step, t, _):
        seen.append((step, pipe.num_timesteps, t.item()))

    draw(pipe, 4, method=method, image=image, strength=None if image is None else 0.5, callback_on_step_end=note)
    steps = 4 if image is None else 2
    assert [(step, total) for step, total, _ in seen] == [(step, steps) for step in range(steps)]
    assert seen[0][2] == pytest.approx(1 - steps / 4, abs=0.17)  # diffusers' own grid ends at t = 0.999
    assert all(a[2] < b[2] for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("name", ["guidance_scale", "_guidance_scale"])
def test_guidance_that_a_callback_changes_acts_from_the_next_step(pipe, method, name):
    scales = []

    def change(pipe, step, t, _):
        scales.append(pipe.guidance_scale)
        setattr(pipe, name, 1.0)

    whole = {"method": method, "guidance_interval": (0.0, 1.0), "generator": None}
    z = torch.randn(2, 3, 16, 16, generator=seeded())
    states = []
    keep = lambda p, i, t, given: states.append(given["latents"]) or None  # noqa: E731
    changed = draw(pipe, 2, latents=z, callback_on_step_end=change, **whole)
    assert scales == [2.0, 1.0]
    draw(pipe, 2, latents=z, callback_on_step_end=keep, **whole)
    replaced = lambda p, i, t, given: {"latents": states[0]} if i == 0 else None  # noqa: E731
    assert torch.equal(draw(pipe, 2, guidance_scale=1.0, latents=z, callback_on_step_end=replaced, **whole), changed)
    assert pipe.guidance_scale == 1
    draw(pipe, guidance_scale=3.0)
    assert pipe.guidance_scale == 3
    assert make_pipe(guidance_scale=2.5).guidance_scale == 2.5


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        ("heun", 2),
        ("euler", 1),
        ("ab2", 1),
        ("etd2", 1),
        (FlowMatchEulerDiscreteScheduler(), 1),
        (FlowMatchHeunDiscreteScheduler(), 2),
        (UniPCMultistepScheduler(use_flow_sigmas=True), 1),
        (DPMSolverSinglestepScheduler(use_flow_sigmas=True), 1),
    ],
)
def test_a_callback_ends_guidance_and_the_call_between_two_steps(pipe, scheduler, calls):
    batches, method = [], scheduler
    if not isinstance(scheduler, str):
        pipe.scheduler, method = scheduler, None
    pipe.transformer.register_forward_pre_hook(lambda network, given: batches.append(len(given[0])))

    def change(pipe, step, t, given):
        pipe.guidance_scale = 2.0 if step < 1 else 1.0
        pipe._interrupt = step == 2

    draw(pipe, 6, method=method, guidance_interval=(0.0, 1.0), callback_on_step_end=change)
    assert batches == [4] * 2 * calls + [2] * calls


# ---- other schedulers


def gaussian(pipe, mean: float = 0.3, deviation: float = 0.5, noise: float = 2.0) -> torch.Tensor:
    """Make the network predict pixels of this distribution; returns the noise and what the exact ODE makes of it."""

    def prediction(z, t, labels, return_dict):
        gain = t * deviation**2 / ((t * deviation) ** 2 + ((1 - t) * noise) ** 2)
        return (mean + gain * (z - t * mean),)

    pipe.transformer.forward = prediction
    z = noise * torch.randn(2, 3, 16, 16, generator=seeded())
    return z, mean + deviation * z / noise


def flow(cls, **settings):
    return lambda config: cls(use_flow_sigmas=True, **settings)


@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (lambda config: FlowMatchEulerDiscreteScheduler(), 0.1),
        (FlowMatchEulerDiscreteScheduler.from_config, 0.1),
        (lambda config: FlowMatchEulerDiscreteScheduler(shift=3.0), 0.2),
        (lambda config: FlowMatchHeunDiscreteScheduler(), 0.1),
        (flow(UniPCMultistepScheduler), 0.1),
        (flow(UniPCMultistepScheduler, prediction_type="flow_prediction"), 0.1),
        (lambda config: UniPCMultistepScheduler.from_config(config, use_flow_sigmas=True), 0.1),
        (flow(UniPCMultistepScheduler, use_karras_sigmas=True), 0.1),
        (lambda config: FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True), 0.1),
        (lambda config: FlowMatchEulerDiscreteScheduler(shift_terminal=0.02), 0.1),
        (flow(DPMSolverMultistepScheduler), 0.1),
        (flow(DPMSolverSinglestepScheduler), 0.1),
        (flow(DEISMultistepScheduler), 0.1),
    ],
)
def test_flow_matching_schedulers_of_diffusers_come_to_the_exact_images(make, bound):
    scheduler = JiTScheduler(noise_scale=2.0, t_eps=1e-4)
    pipe = JiTPipeline(load_golden("tiny").model(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    z, images = gaussian(pipe)
    pipe.scheduler = make(scheduler.config)
    found = [draw(pipe, steps, latents=z, generator=None, guidance_scale=1.0) for steps in (10, 80)]
    few, many = ((one - images).square().mean().sqrt() for one in found)
    assert many < bound * images.std()
    assert many < few / 2


def test_stochastic_ones_draw_from_the_calls_generator(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, algorithm_type="sde-dpmsolver++")
    first, again, other = draw(pipe, 3), draw(pipe, 3), draw(pipe, 3, generator=seeded(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        EulerDiscreteScheduler(),
        UniPCMultistepScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, use_karras_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        UniPCMultistepScheduler(use_flow_sigmas=True, solver_type="bh1"),  # NaN, since its first sigma is 1
        ScoreSdeVeScheduler(),  # it has other methods
    ],
)
def test_other_schedulers_are_answered_with_those_that_work(pipe, scheduler):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=r"JiTScheduler, FlowMatchEulerDiscreteScheduler"):
        draw(pipe)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_grid_that_is_not_there_is_refused(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    with pytest.raises(ValueError, match="does not lead from noise to image"):
        draw(pipe, 1)
    assert draw(pipe, 2).isfinite().all()


def test_a_scheduler_of_diffusers_is_its_own_method(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="leave the method out"):
        draw(pipe, method="heun")


@pytest.mark.parametrize("is_old", [False, True])
def test_a_folder_takes_another_scheduler_and_keeps_it(tmp_path, is_old):
    pipe = make_pipe(noise_scale=2.0, method="heun")
    pipe.save_pretrained(tmp_path / "own")
    if is_old:
        index = tmp_path / "own" / "model_index.json"
        content = json.loads(index.read_text())
        del content["objective"], content["auto_map"]
        index.write_text(json.dumps(content))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    expected = draw(pipe)
    given = JiTPipeline.from_pretrained(tmp_path / "own", scheduler=FlowMatchEulerDiscreteScheduler())
    given.save_pretrained(tmp_path / "new")
    again = JiTPipeline.from_pretrained(tmp_path / "new")
    assert all(torch.equal(draw(quiet(one)), expected) for one in (given, again))
    again.scheduler = JiTScheduler(noise_scale=1.0)
    assert torch.equal(draw(again), draw(make_pipe(noise_scale=1.0)))


def test_what_could_not_be_loaded_again_is_not_saved(pipe, tmp_path):
    class OwnScheduler(JiTScheduler):
        pass

    class OwnNetwork(JiTTransformer2DModel):
        pass

    pipe.scheduler = OwnScheduler()
    with pytest.raises(ValueError, match=r"scheduler OwnScheduler .* could not be loaded again"):
        pipe.save_pretrained(tmp_path / "new")
    other = JiTPipeline(OwnNetwork.from_config(pipe.transformer.config), JiTScheduler())
    with pytest.raises(ValueError, match=r"transformer OwnNetwork .* could not be loaded again"):
        other.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
