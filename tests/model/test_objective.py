from itertools import product

import pytest
import torch
from golden import load_golden

from jit_accel.model.objective import Objective
from jit_accel.model.spaces import SPACES, convert

PAIRS = list(product(SPACES, SPACES))


@pytest.fixture
def pair():
    """A clean image, noise, times that no bound touches, and the noised image, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    e = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.06, 0.2, 0.4, 0.6, 0.8, 0.94], dtype=torch.float64).view(-1, 1, 1, 1)
    return x, e, t, t * x + (1 - t) * e


class Constant(torch.nn.Module):
    """A network that predicts this, whatever it is shown."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, z, t, labels):
        return type("Output", (), {"sample": self.output})


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_each_space_determines_the_others(pair, source, target):
    x, e, t, z = pair
    truth = {"x": x, "e": e, "v": x - e}
    torch.testing.assert_close(convert(truth[source], z, t, source, target), truth[target], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversion_is_affine_and_undone_by_its_inverse(pair, source, target):
    x, e, t, z = pair
    a, b = x * 1.3, e * 0.7
    mixed = convert(0.25 * a + 0.75 * b, z, t, source, target)
    separate = 0.25 * convert(a, z, t, source, target) + 0.75 * convert(b, z, t, source, target)
    torch.testing.assert_close(mixed, separate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        convert(convert(a, z, t, source, target), z, t, target, source), a, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(("prediction", "space"), PAIRS)
def test_loss_is_the_prediction_error_scaled_by_a_function_of_time(pair, prediction, space):
    x, e, t, _ = pair
    off = torch.full_like(x, 0.1)
    output = {"x": x, "e": e, "v": x - e}[prediction] + off
    objective = Objective(prediction=prediction, loss_space=space)
    loss = objective.losses(Constant(output), x, t.flatten(), e, None)
    # dx = (1-t) dv and de = -t dv at fixed z.
    per_velocity = {"x": 1 - t, "e": t, "v": torch.ones_like(t)}
    scale = (per_velocity[space] / per_velocity[prediction]).flatten()
    torch.testing.assert_close(loss.double(), (0.1 * scale) ** 2, rtol=1e-4, atol=0)


def test_velocity_error_is_bounded_near_the_clean_end():
    x = torch.zeros(1, 3, 2, 2)
    loss = Objective(t_eps=0.05).losses(Constant(x + 0.1), x, torch.tensor([0.999]), torch.ones_like(x), None)
    torch.testing.assert_close(loss, torch.tensor([(0.1 / 0.05) ** 2]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["tiny", "nocontext"])
def test_loss_and_gradient_of_the_reference(name):
    golden, model = load_golden(name).tensors, load_golden(name).model()
    x, t, labels = golden["forward.x"], golden["forward.t"], golden["forward.y"]
    loss = Objective().losses(model, x, t, golden["loss.noise"], labels).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(loss.detach().view(1), golden["loss.value"], rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.view(1), golden["loss.grad_norm"], rtol=1e-5, atol=0)


def test_times_are_logit_normal():
    t = Objective(P_mean=-0.8, P_std=0.6).times(0, range(100_000)).double()
    logit = torch.logit(t)
    assert abs(logit.mean() + 0.8) < 5 * 0.6 / 100_000**0.5
    assert abs(logit.std() - 0.6) < 5 * 0.6 / 200_000**0.5


def test_noise_belongs_to_the_position_not_to_the_batch():
    like, draw = torch.empty(6, 3, 8, 8), Objective().noise
    whole = draw(1, range(10, 16), like)
    parts = torch.cat([draw(1, [10], like[:1]), draw(1, range(11, 16), like[:5])])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[0], whole[1])
    scaled = Objective(noise_scale=2.0).noise(1, range(10, 16), like)
    assert torch.equal(scaled, 2 * whole)


def test_noise_is_standard_normal():
    noise = Objective().noise(0, range(64), torch.empty(64, 3, 32, 32))
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 5 / (2 * noise.numel()) ** 0.5


def test_labels_are_dropped_at_the_given_rate():
    labels = torch.arange(50_000) % 10
    dropped = Objective(label_drop_prob=0.1).dropped(0, range(50_000), labels, 10)
    gone = dropped == 10
    assert torch.equal(dropped[~gone], labels[~gone])
    assert abs(gone.double().mean() - 0.1) < 5 * (0.09 / 50_000) ** 0.5
    assert torch.equal(Objective(label_drop_prob=0.0).dropped(0, range(50_000), labels, 10), labels)


class Table(torch.nn.Module):
    """A network that predicts a number for each label, whatever it is shown."""

    def __init__(self, count):
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, z, t, labels):
        return type("Output", (), {"sample": self.values[labels].view(-1, 1, 1, 1).expand_as(z)})


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_a_network_that_learnt_guidance_predicts_what_guidance_would_make(scale):
    """Images of class 0 are 0.2, of class 1 0.8, and where the label is left out it is one of the two."""
    model, objective = Table(3), Objective(loss_space="x", model_guidance=scale, no_class=2)
    x = torch.tensor([0.2, 0.8, 0.2, 0.8]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    labels, t = torch.tensor([0, 1, 2, 2]), torch.full((4,), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        objective.losses(model, x, t, torch.zeros_like(x), labels).mean().backward()
        optimizer.step()
    expected = [0.5 + scale * (0.2 - 0.5), 0.5 + scale * (0.8 - 0.5), 0.5]
    assert model.values.tolist() == pytest.approx(expected, abs=1e-3)


def test_model_guidance_changes_no_loss_where_no_image_has_a_class_and_none_when_it_is_1():
    model, x = Table(3), torch.rand(4, 1, 2, 2)
    torch.nn.init.normal_(model.values)
    t, e = torch.full((4,), 0.5), torch.randn(4, 1, 2, 2)
    objective = Objective(model_guidance=2.0, no_class=2)
    for labels, are_equal in ((torch.tensor([2, 2, 2, 2]), True), (torch.tensor([0, 2, 2, 1]), False)):
        plain = Objective().losses(model, x, t, e, labels)
        assert torch.equal(objective.losses(model, x, t, e, labels), plain) == are_equal
        assert torch.equal(objective.unguided().losses(model, x, t, e, labels), plain)
