"""diffusers' own tests of models, LoRA, schedulers and pipelines, run on this package's classes.

Their mixins are part of diffusers' repository and of no release, so these tests are not collected, and what they demand
is stated in `test_diffusers_laws.py`. With the repository at hand, and parameterized and requests_mock installed:

    PYTHONPATH=diffusers python -m pytest -o addopts= tests/model/diffusers_mixins.py

The differences that are meant (docs/generate.md) are skipped, each with its reason.
"""

import functools
import unittest

import pytest
import torch
from tests.models import testing_utils as mixins  # of diffusers
from tests.models.testing_utils import lora
from tests.pipelines.pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
)
from tests.pipelines.test_pipelines_common import PipelineTesterMixin
from tests.schedulers.test_schedulers import SchedulerCommonTest
from tests.testing_utils import torch_device

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.model.solvers import SOLVERS

SIZES = {"img_size": 16, "patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 4, "bottleneck_dim": 16}
SIZES |= {"in_context_len": 4, "in_context_start": 1, "num_classes": 10}
needs_accelerator = pytest.mark.skipif(torch_device == "cpu", reason="the test's streams and devices are a GPU's")


@pytest.fixture(autouse=True, scope="module")
def networks_that_see():
    """A new network is the zero function, whose outputs no change of its weights or its adapters changes."""
    initial = JiTTransformer2DModel.reset_parameters

    def reset_parameters(network: JiTTransformer2DModel) -> None:
        initial(network)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JiTTransformer2DModel, "reset_parameters", reset_parameters)
        yield


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch):
    """The pipeline's mixin saves pickles, which are refused here, where what it tests is another thing."""
    save = JiTPipeline.save_pretrained
    saved = lambda *args, safe_serialization=True, **given: save(*args, **given)  # noqa: E731
    monkeypatch.setattr(JiTPipeline, "save_pretrained", functools.wraps(save)(saved))


class OfTheTransformer(mixins.BaseModelTesterConfig):
    model_class = JiTTransformer2DModel
    main_input_name = "sample"
    output_shape = (3, 16, 16)
    different_shapes_for_compilation = ((16, 16), (24, 24))

    def get_init_dict(self):
        return SIZES

    def get_dummy_inputs(self, height=16, width=16):
        draws = torch.Generator().manual_seed(0)
        sample, times = torch.randn(2, 3, height, width, generator=draws), torch.rand(2, generator=draws)
        inputs = {"sample": sample, "timestep": times, "class_labels": torch.tensor([1, 3])}
        return {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class TestModel(OfTheTransformer, mixins.ModelTesterMixin):
    pass


class TestTraining(OfTheTransformer, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"JiTTransformer2DModel"})


@needs_accelerator
class TestMemory(OfTheTransformer, mixins.MemoryTesterMixin):
    pass


class TestAttention(OfTheTransformer, mixins.AttentionTesterMixin, mixins.AttentionBackendTesterMixin):
    unsupported_attn_backends = ("_native_cudnn",) if torch_device == "cpu" else ()


class TestCompile(OfTheTransformer, mixins.TorchCompileTesterMixin):
    pass


OUR_LAYERS = {"to_q": "qkv", "to_k": "attn.proj", "to_v": "w12", "to_out.0": "w3"}


@pytest.fixture(autouse=True)
def adapters_of_our_layers(monkeypatch):
    """The mixins name the layers of other networks."""
    config = lora.LoraConfig
    changed = lambda **given: config(**given | {"target_modules": [OUR_LAYERS[n] for n in given["target_modules"]]})  # noqa: E731
    monkeypatch.setattr(lora, "LoraConfig", changed)


class TestLora(OfTheTransformer, mixins.LoraTesterMixin):
    def test_correct_lora_configs_with_different_ranks(self):
        pytest.skip("it looks for a layer named to_k")


class TestHotSwap(OfTheTransformer, mixins.LoraHotSwappingForModelTesterMixin):
    def test_hotswapping_compiled_model_conv2d(self):
        pytest.skip("convolutions are not adapted: they are called with cut patches")

    test_hotswapping_compiled_model_both_linear_and_conv2d = test_hotswapping_compiled_model_conv2d


class TestScheduler(SchedulerCommonTest):
    scheduler_classes = (JiTScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)

    def get_scheduler_config(self, **given):
        return {"t_eps": 0.05} | given

    def test_settings(self):
        for solver in SOLVERS:
            self.check_over_configs(solver=solver)
        for prediction in "xev":
            self.check_over_configs(prediction_type=prediction)
        self.check_over_forward()

    def test_trained_betas(self):
        pytest.skip("flow matching has no betas")


class TestPipeline(PipelineTesterMixin, unittest.TestCase):
    pipeline_class = JiTPipeline
    params = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    required_optional_params = PipelineTesterMixin.required_optional_params - {"num_images_per_prompt"}
    test_xformers_attention = False

    def get_dummy_components(self):
        torch.manual_seed(0)
        return {"transformer": JiTTransformer2DModel(**SIZES).eval(), "scheduler": JiTScheduler()}

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        return {"class_labels": [1], "generator": generator, "num_inference_steps": 2, "output_type": "np"}


del PipelineTesterMixin, SchedulerCommonTest  # not to be collected by themselves
