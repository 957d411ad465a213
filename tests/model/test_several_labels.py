"""Images with several labels at once, in the network and in calls of the pipeline."""

import numpy as np
import pytest
import torch

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
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
    "num_classes": 4,
}
NAMES = ["cat", "dog", "old", "wet"]


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**SIZES, has_several_labels=True).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    found = JiTPipeline(model, JiTScheduler(), NAMES)
    found.set_progress_bar_config(disable=True)
    return found


def test_several_labels_are_the_sum_of_their_rows(pipe):
    embed, table = pipe.transformer.y_embedder, pipe.transformer.y_embedder.embedding_table.weight
    labels = torch.tensor([[0, 3, -1], [2, 4, 4], [-1, -1, -1], [4, 4, 4], [-1, 1, -1], [3, 2, 1]])
    rows = [table[0] + table[3], table[2], table[4], table[4], table[1], table[1] + table[2] + table[3]]
    assert torch.allclose(embed(labels), torch.stack(rows), atol=1e-6)
    assert torch.equal(embed(labels[[1, 4], :1].clamp(min=1)), embed(torch.tensor([2, 1])))


def test_their_order_and_how_they_are_filled_up_change_nothing(pipe):
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])
    one = pipe.transformer(z, t, torch.tensor([[0, 2], [1, 4]])).sample
    other = pipe.transformer(z, t, torch.tensor([[-1, 2, 0], [-1, -1, 1]])).sample
    assert torch.allclose(one, other, atol=1e-5)
    single = pipe.transformer(z, t, torch.tensor([0, 1])).sample
    assert torch.allclose(single[1], one[1], atol=1e-5)
    assert not torch.allclose(single[0], one[0], atol=1e-3)


def test_all_of_an_image_are_dropped_together():
    labels, positions = torch.tensor([[0, 3], [1, -1]]).repeat(500, 1), np.arange(1000)
    dropped = Objective(label_drop_prob=0.3).dropped(0, positions, labels, 4)
    changed = (dropped != labels).any(1)
    assert (dropped[changed] == 4).all()
    assert 200 < changed.sum() < 400
    alone = Objective(label_drop_prob=0.3).dropped(0, positions, labels[:, 0].clone(), 4)
    assert torch.equal(alone != labels[:, 0], changed)


def test_a_call_names_several(pipe):
    noise = torch.randn(3, 3, 8, 8)

    def make(labels, **how):
        return pipe(labels, 2, latents=noise[: len(labels)], output_type="pt", **how).images

    expected = make([["cat", "wet"], "dog", None], guidance_scale=2.0)
    for same in ([["wet", "cat", "wet"], ["dog"], []], [[0, 3], 1, None], [(3, "cat"), "DOG", None]):
        assert torch.allclose(make(same, guidance_scale=2.0), expected, atol=1e-5)
    assert torch.allclose(make([["cat", "wet"]], guidance_scale=2.0), expected[:1], atol=1e-5)
    assert torch.allclose(make(torch.tensor([[0, 3], [1, 2]])), make([["cat", "wet"], ["dog", "old"]]), atol=1e-6)
    assert not torch.allclose(make(["cat"]), make([["cat", "wet"]]), atol=1e-3)
    assert len(pipe(["cat", "wet"], 1).images) == 2
    assert len(pipe([["cat", "wet"]], 1, num_images_per_label=3).images) == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["cat", "wte"]], "class 'wte': is not among cat, dog, old, wet"),
        ([[0, 4]], "class 4: the network knows 4 classes"),
        ([[0, 1.5]], "class 1.5: is no label"),
        ([[[0, 1]]], "is no label"),
    ],
)
def test_labels_that_cannot_be_are_refused(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels, 1)


def test_a_network_that_saw_one_label_an_image_takes_one(pipe):
    plain = JiTPipeline(JiTTransformer2DModel(**SIZES), JiTScheduler(), NAMES)
    with pytest.raises(ValueError, match=r"class \['cat', 'wet'\]: is no label"):
        plain([["cat", "wet"]], 1)
    assert plain.label_ids([["cat"], "wet"]) == [0, 3]


def test_a_pipeline_is_kept_with_them(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = JiTPipeline.from_pretrained(tmp_path)
    assert again.label_ids([["cat", "wet"], None]) == [[0, 3], 4]
