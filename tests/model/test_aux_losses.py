"""Losses of the predicted clean image: what they are, what they are asked for as, and the time at which they act."""

import math

import pytest
import torch

from jit_accel.base.errors import UserError
from jit_accel.evaluate.features import has_torch_fidelity
from jit_accel.model.aux_losses import ALL_LOSSES, AUX_LOSSES, AuxLoss, AuxLosses, WatchedNetwork, aux_losses_of
from jit_accel.model.objective import Objective
from jit_accel.model.spaces import SPACES, noised

PLAIN = ["l1", "charbonnier", "ssim"]


def pair(height=16, width=16, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shape = (4, channels, height, width)
    truth = torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1
    return truth + 0.3 * torch.randn(shape, generator=generator, dtype=dtype), truth


def features(images):
    return images.flatten(1)[:, ::3].sin()


class Known(torch.nn.Module):
    """A network that predicts `output` times a weight that can be learnt."""

    def __init__(self, output):
        super().__init__()
        self.output, self.weight = output, torch.nn.Parameter(torch.ones(()))

    def forward(self, z, t, labels, **conditions):
        return (self.output * self.weight,)


class Tokens:
    blocks = (None, None)


class Named(Known):
    def forward(self, *given, **conditions):
        (output,) = super().forward(*given, **conditions)

        class Output(tuple):
            sample = output

        return Output((output,))


@pytest.mark.parametrize("name", AUX_LOSSES)
def test_a_loss_is_least_at_the_truth_and_each_image_has_its_own(name):
    x, truth = pair()
    losses = AUX_LOSSES[name](x, truth, features)
    assert losses.shape == (4,)
    least = AUX_LOSSES[name](truth, truth, features)
    assert torch.allclose(least, torch.full((4,), 1e-3 if name == "charbonnier" else 0.0), atol=1e-6)
    assert (losses > least).all()
    assert torch.allclose(AUX_LOSSES[name](x[1:2], truth[1:2], features), losses[1:2], atol=1e-6)


@pytest.mark.parametrize("name", AUX_LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    x, truth = pair(7, 8, channels=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: AUX_LOSSES[name](x, truth[:1], features), x[:1].requires_grad_())


@pytest.mark.parametrize("size", [(28, 28), (6, 9), (33, 12)])
def test_ssim_is_that_of_torchmetrics(size):
    has_torch_fidelity()  # torchmetrics imports it, and fails where torchvision is not there
    functional = pytest.importorskip("torchmetrics.functional.image")
    x, truth = pair(*size)
    theirs = functional.structural_similarity_index_measure(x, truth, data_range=2.0, reduction="none")
    assert torch.allclose(1 - AUX_LOSSES["ssim"](x, truth), theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2)])
def test_images_smaller_than_its_window_have_an_ssim(size):
    x, truth = pair(*size)
    losses = AUX_LOSSES["ssim"](x.requires_grad_(), truth)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert x.grad.isfinite().all()


def test_known_values():
    x, truth = torch.full((1, 3, 12, 12), 0.5), torch.zeros(1, 3, 12, 12)
    assert AUX_LOSSES["l1"](x, truth).item() == pytest.approx(0.5)
    assert AUX_LOSSES["charbonnier"](x, truth).item() == pytest.approx(math.hypot(0.5, 1e-3))
    luminance = (0.01 * 2) ** 2  # of two flat images nothing else is left
    assert AUX_LOSSES["ssim"](x, truth).item() == pytest.approx(1 - luminance / (0.25 + luminance), abs=1e-5)
    doubled = AUX_LOSSES["features"](2 * x, x, lambda images: images.flatten(1))
    assert doubled.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("l1=0.5", AuxLoss("l1", 0.5)),
        ("l1=0.5:2000", AuxLoss("l1", 0.5, 2000)),
        ("ssim=1e-2@0.3-1.0", AuxLoss("ssim", 0.01, 0, 0.3, 1.0)),
        ("features=.05:7@.5-.75", AuxLoss("features", 0.05, 7, 0.5, 0.75)),
        ("charbonnier=3:0@0-1", AuxLoss("charbonnier", 3.0, 0, 0.0, 1.0)),
    ],
)
def test_a_loss_is_asked_for_in_one_word(text, expected):
    assert aux_losses_of([text]) == (expected,)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["l2=0.5"],
            r"aux_loss l2=0.5: unknown; choose from l1, charbonnier, ssim, features, contrastive, .*Did you mean 'l1'",
        ),
        (["sism=1"], r"Did you mean 'ssim'"),
        (["=0.5"], r"unknown; choose from"),
        (["l1"], r"aux_loss l1: must be NAME=WEIGHT.*such as l1=0.5:2000@0.3-1.0"),
        (["l1:0.5"], r"must be NAME=WEIGHT"),
        (["l1=0.5:2e3"], r"must be NAME=WEIGHT"),
        (["l1=0.5@0.3"], r"must be NAME=WEIGHT"),
        (["l1=0.5@0.3-1:9"], r"must be NAME=WEIGHT"),
        (["l1=half"], r"the weight must be a positive number"),
        (["contrastive=1"], r"it is subtracted, and at a weight of 1 or more nothing is least"),
        (["l1=0"], r"the weight must be"),
        (["l1=-1"], r"the weight must be"),
        (["l1=nan"], r"the weight must be"),
        (["l1=inf"], r"the weight must be"),
        (["l1=1@0.7-0.3"], r"the times must be two numbers from 0 to 1, the lower one first"),
        (["l1=1@0-1.5"], r"the times must be"),
        (["l1=1@1..2-1"], r"the times must be"),
        (["l1=1", "ssim=1", "l1=2:9"], r"aux_loss l1=2:9: is there already"),
    ],
)
def test_what_is_no_loss_is_refused(texts, message):
    with pytest.raises(UserError, match=message):
        aux_losses_of(texts)


@pytest.mark.parametrize("space", SPACES)
def test_the_prediction_is_compared_as_a_clean_image(space):
    x, e = pair()[1], pair()[0]
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    off = {"x": x + 0.25, "e": e, "v": x - e}[space]
    if space == "v":  # x = z + (1 - t) v
        off = off + 0.25 / (1 - t).view(-1, 1, 1, 1)
    if space == "e":  # x = (z - (1 - t) e) / t
        off = off - 0.25 * (t / (1 - t)).view(-1, 1, 1, 1)
    aux, found = AuxLosses(aux_losses_of(["l1=2"]), space), {}
    aux.watched(Known(off), 1)(noised(x, e, t), t, None)
    total = aux.added_to(torch.tensor(3.0), x, found.__setitem__)
    assert found["l1"].item() == pytest.approx(0.25, abs=1e-5)
    assert total.item() == pytest.approx(3.5, abs=1e-5)


def test_a_loss_acts_from_its_step_on_at_its_times():
    aux = AuxLosses(aux_losses_of(["l1=0.5:3@0.3-0.6", "charbonnier=1:2"]))
    x, truth = pair()
    errors = (x - truth).abs().mean(dim=(1, 2, 3))
    network, t, names = Known(x), torch.tensor([0.2, 0.3, 0.6, 0.7]), []
    for step in (1, 2, 3, 4):
        found, model = {}, aux.watched(network, step)
        model(x, t, None)
        loss = torch.ones(())
        assert (aux.added_to(loss, truth, found.__setitem__) is loss) == (step == 1)
        assert (model is network) == (step == 1)
        names.append(list(found))
    assert names == [[], ["charbonnier"], ["l1", "charbonnier"], ["l1", "charbonnier"]]
    assert found["l1"].item() == pytest.approx(errors[1:3].sum().item() / 4)


def test_the_gradient_of_the_sum_is_the_sum_of_gradients():
    x, truth = pair()
    t, e = torch.tensor([0.2, 0.4, 0.5, 0.7]), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def gradient(*texts):
        network, aux = Named(x), AuxLosses(aux_losses_of(texts), features=features)
        loss = Objective().losses(aux.watched(network, 1), truth, t, e, None).mean()
        aux.added_to(loss, truth, lambda *_: None).backward()
        return network.weight.grad

    plain = gradient()
    network = Named(x)
    Objective().losses(network, truth, t, e, None).mean().backward()
    assert torch.equal(plain, network.weight.grad)
    parts = [gradient(f"{name}=0.5") - plain for name in AUX_LOSSES]
    assert torch.allclose(gradient(*(f"{name}=0.5" for name in AUX_LOSSES)) - plain, sum(parts), atol=1e-4)
    assert all(part.abs() > 1e-6 for part in parts)


def test_nothing_waits_for_the_device():
    """What lies on no device has no values that a host could wait for."""
    aux = AuxLosses(aux_losses_of([f"{name}=0.5@0.2-0.9" for name in ALL_LOSSES]), "v", features=features)
    aux.network = Tokens()
    found, truth = {}, torch.empty(2, 3, 16, 16, device="meta")
    aux.watched(Known(truth), 1)(truth, torch.empty(2, device="meta"), None)
    aux.network.tokens_after = {block: torch.empty(2, 4, 8, device="meta") for block in aux.network.tokens_after}
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    total = aux.added_to(torch.empty((), device="meta"), truth, found.__setitem__, labels, [4, 5])
    assert {value.device.type for value in (total, *found.values())} == {"meta"}
    assert list(found) == list(ALL_LOSSES)


def test_a_watched_network_is_as_itself():
    network = Known(torch.ones(1))
    seen = WatchedNetwork(network)
    assert seen.weight is network.weight
    with pytest.raises(AttributeError):
        _ = seen.nothing_of_that_name
