"""What diffusers demands of its own models, adapters, schedulers and pipelines, in our words.

Its mixins of tests are part of its repository and of no release; `diffusers_mixins.py` runs them where that is at hand.
"""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.model.solvers import SOLVERS

SIZES = {"img_size": 16, "patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 4, "bottleneck_dim": 16}
SIZES |= {"in_context_len": 4, "in_context_start": 1, "num_classes": 10}


def new_network() -> JiTTransformer2DModel:
    """A network that is not the zero function, as a new one is."""
    torch.manual_seed(0)
    network = JiTTransformer2DModel(**SIZES).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture(scope="module")
def network() -> JiTTransformer2DModel:
    return new_network()


INPUTS = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.9]))
LABELS = torch.tensor([1, 3])


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    sample, times = INPUTS
    return network(sample, times, LABELS, return_dict=False)[0]


def images(pipe: JiTPipeline, **settings) -> torch.Tensor:
    settings = {"class_labels": [1, 3], "num_inference_steps": 2, "output_type": "pt"} | settings
    return pipe(**settings, generator=torch.Generator().manual_seed(0)).images


# ---- the model


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"max_shard_size": "60KB"}])
def test_a_network_comes_back_from_every_form_it_is_saved_in(network, tmp_path, how):
    network.save_pretrained(tmp_path, **how)
    shards = list(tmp_path.glob("*-of-*"))
    assert len(shards) > 1 if "max_shard_size" in how else not shards
    variant = {"variant": how["variant"]} if "variant" in how else {}
    again = JiTTransformer2DModel.from_pretrained(tmp_path, **variant)
    assert torch.equal(output(again), output(network))
    assert again.config.depth == 2
    if variant:
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            JiTTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_network_is_loaded_in_the_dtype_asked_for(network, tmp_path, dtype, low_cpu_mem_usage):
    network.save_pretrained(tmp_path)
    again = JiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert again.dtype == dtype
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_a_call_is_the_same_twice_and_as_a_tuple(network):
    sample, times = INPUTS
    with torch.no_grad():
        assert torch.equal(network(sample, times, LABELS).sample, output(network))
    assert torch.equal(output(network), output(network))


def test_attributes_are_those_of_the_network_and_settings_are_in_its_config(network):
    with pytest.raises(AttributeError, match="has no attribute 'does_not_exist'"):
        _ = network.does_not_exist
    with pytest.warns(FutureWarning, match="config"):
        assert network.patch_size == 4


# ---- memory


def test_weights_may_be_kept_in_few_bits_and_computed_with_in_float32(network):
    smaller = copy.deepcopy(network)
    before = smaller.get_memory_footprint()
    smaller.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert smaller.get_memory_footprint() < 0.6 * before
    difference = output(smaller) - output(network)
    assert 0 < difference.norm() < 0.2 * output(network).norm()
    smaller.train()
    smaller(INPUTS[0], INPUTS[1], LABELS).sample.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in smaller.parameters() if parameter.grad is not None)


# ---- training


def test_diffusers_average_follows_the_weights():
    network = new_network()
    average = EMAModel(network.parameters(), decay=0.5)
    before = [parameter.clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    average.step(network.parameters())
    average.copy_to(network.parameters())
    assert all((now - old).min() > 0.4 for now, old in zip(network.parameters(), before))


def test_gradient_checkpointing_is_switched_on_and_off_as_everywhere():
    network = new_network()
    holders = [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]
    assert holders == [network]
    for switch, state in (
        (network.enable_gradient_checkpointing, True),
        (network.disable_gradient_checkpointing, False),
    ):
        switch()
        assert network.is_gradient_checkpointing is state


# ---- adapters of the network


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")

    def adapt(**settings) -> JiTTransformer2DModel:
        network = new_network()
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "attn.proj"]} | settings
        network.add_adapter(peft.LoraConfig(init_lora_weights=False, **settings))
        return network

    return adapt


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"blocks.0.attn.qkv": 2}}]
)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_an_adapter_saved_alone_does_the_same_on_another_copy(adapted, network, tmp_path, settings, low_cpu_mem_usage):
    first = adapted(**settings)
    assert not torch.allclose(output(first), output(network), atol=1e-3)
    first.save_lora_adapter(tmp_path)
    second = new_network()
    how = {"prefix": None, "use_safetensors": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    second.load_lora_adapter(tmp_path, **how)
    assert torch.allclose(output(second), output(first), atol=1e-5)
    second.unload_lora()
    assert torch.equal(output(second), output(network))


def test_an_adapter_that_is_not_there_or_not_finite_is_refused(adapted, tmp_path):
    network = adapted()
    with pytest.raises(ValueError, match="other"):
        network.save_lora_adapter(tmp_path, adapter_name="other")
    with torch.no_grad():
        network.blocks[0].attn.qkv.lora_A["default"].weight += float("inf")
    with pytest.raises(ValueError, match=r"(?i)nan"):
        network.fuse_lora(safe_fusing=True)


def test_an_adapter_takes_the_place_of_another_without_new_layers(adapted, tmp_path):
    first, second = adapted(), adapted()
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "lora_" in name:
                parameter.mul_(-2)
    for number, network in enumerate((first, second)):
        network.save_lora_adapter(tmp_path / str(number))
    network = new_network()
    for number in range(2):
        how = {"prefix": None, "use_safetensors": True, "hotswap": number == 1}
        network.load_lora_adapter(tmp_path / str(number), adapter_name="one", **how)
    assert list(network.peft_config) == ["one"]
    assert torch.allclose(output(network), output(second), atol=1e-5)


# ---- the scheduler


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_scheduler_comes_back_and_steps_the_same(tmp_path, solver):
    scheduler = JiTScheduler(solver=solver, noise_scale=2.0)
    scheduler.save_pretrained(tmp_path)
    sample, output = INPUTS[0], 0.1 * INPUTS[0]
    moved = []
    for one in (scheduler, JiTScheduler.from_pretrained(tmp_path), JiTScheduler.from_config(scheduler.config)):
        one.set_timesteps(4)
        moved.append(one.step(output, one.timesteps[0], sample).prev_sample)
        one.set_timesteps(4)
        assert torch.equal(one.step(output, one.timesteps[0], sample, return_dict=False)[0], moved[-1])
    assert moved[0].shape == sample.shape
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])


def test_a_scheduler_is_compatible_with_itself_and_takes_what_it_knows_of_others_settings():
    assert JiTScheduler in JiTScheduler().compatibles
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    assert JiTScheduler.from_config(theirs).config.solver == "heun"


# ---- the pipeline


@pytest.fixture(scope="module")
def pipe() -> JiTPipeline:
    pipe = JiTPipeline(new_network(), JiTScheduler(), [f"class {i}" for i in range(10)], guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_made_of_the_parts_of_another_draws_its_images(pipe):
    parts = pipe.components
    assert set(parts) == {"transformer", "scheduler"}
    for other in (JiTPipeline(**parts), JiTPipeline.from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(images(other, guidance_scale=1.5), images(pipe, guidance_scale=1.5))


def test_labels_may_be_a_column(pipe):
    assert torch.equal(images(pipe, class_labels=[[1], [3]]), images(pipe))
    assert torch.equal(images(pipe, class_labels=torch.tensor([[1], [3]])), images(pipe))


def test_a_call_takes_what_diffusers_calls_take():
    known = set(inspect.signature(JiTPipeline.__call__).parameters)
    assert {"num_inference_steps", "generator", "latents", "output_type", "return_dict", "guidance_scale"} <= known
    assert {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "height", "width"} <= known


def test_a_pipeline_is_loaded_in_the_dtypes_asked_for(pipe, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, {"transformer": torch.bfloat16, "default": torch.float32}):
        again = JiTPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
        assert again.transformer.dtype == torch.bfloat16
    assert torch.equal(images(JiTPipeline.from_pretrained(tmp_path)), images(pipe))
