"""Sharing on the Hub, against a stand-in on this machine."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from golden import load_golden
from helpers import train_group, train_here
from hub_server import TOKEN, HubServer, stand_in
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.base.errors import UserError
from jit_accel.convert import main as convert
from jit_accel.model import hub
from jit_accel.model.card import read_evaluations, refresh_card, without_places

REPOSITORY = "alice/flowers-28"


@pytest.fixture
def server(monkeypatch):
    """The Hub of this process is a stand-in, and somebody is logged in."""
    server = stand_in(monkeypatch)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline folder as a training leaves it, with things beside it that are nobody's business."""
    folder = tmp_path / "pipeline"
    pipeline = JiTPipeline(load_golden("tiny").model(), JiTScheduler(), class_names=[f"kind {i}" for i in range(10)])
    pipeline.save_pretrained(folder)
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    record = {
        "metrics": {"fid": 12.5, "inception_score": 3.25, "kid": None},
        "settings": {"guidance_scale": 2.0, "guidance_interval": [0.1, 1.0], "reference": "/home/me/secret/val.npz"},
    }
    (folder / "evaluation.json").write_text(json.dumps([record]))
    refresh_card(folder)
    return folder


def shared(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_the_folder_and_nothing_that_lies_about_in_it(server, folder, capsys):
    lies_about = {".env", "notes.txt", "transformer/.cache", "tmp_1", "old.pth", "tmp_1_README.md", "[x].npz"}
    lies_about |= {"notes/keys.json", "private/me.png", "sweep/sweep.json", "transformer/old/config.json"}
    for name in lies_about:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "[odd] *.png").write_text("picture")
    (folder / "evaluation.json").unlink()
    assert convert(["--input", str(folder), "--push_to_hub", "--hub_model_id", REPOSITORY]) == 0
    assert server.files[REPOSITORY] == {name: data for name, data in shared(folder).items() if name not in lies_about}
    assert server.repositories == {REPOSITORY: False}
    assert len(server.objects) == 1  # the weights
    assert server.commits == [REPOSITORY]
    printed = capsys.readouterr()
    assert f"Pushed: {server.url}/{REPOSITORY}" in printed.out
    assert TOKEN not in printed.out + printed.err


def test_a_card_on_the_hub_tells_how_to_use_it_and_how_good_it_is(server, folder):
    kept = (folder / "evaluation.json").read_bytes()
    hub.push_folder(folder, REPOSITORY)
    hub.push_folder(folder, REPOSITORY)  # again changes nothing
    assert (folder / "evaluation.json").read_bytes() == kept  # the user's own file knows its places
    card = ModelCard(server.files[REPOSITORY]["README.md"].decode())
    assert f'JiTPipeline.from_pretrained("{REPOSITORY}")' in card.text
    assert "![samples](samples.png)" in card.text
    assert card.text.count("## Results") == 1
    assert "| 2.0 | 0.1 to 1.0 | val.npz | 12.5 | 3.25 |" in card.text
    assert not [name for name, data in server.files[REPOSITORY].items() if b"/home/me" in data]
    assert card.data.library_name == "diffusers"
    (result,) = card.data.eval_results  # the Fréchet distance, and no other
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid", 12.5, "val.npz")


def test_settings_beside_the_numbers_are_shown_as_well(folder):
    record = {"guidance_scale": 3.0, "reference": "val", "model": "/home/me/run", "metrics": {"fd_lite0": 7.5}}
    (folder / "evaluation.json").write_text(json.dumps([record]))
    refresh_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert "| 3.0 | val | 7.5 |" in card.text
    assert card.data.eval_results[0].metric_type == "fd_lite0"


def test_results_that_people_added_to_a_card_stay_and_ours_are_replaced(folder):
    path = folder / "README.md"
    refresh_card(folder)
    card = ModelCard.load(path)
    card.data.model_name = "mine"
    mine = EvalResult("text-to-image", "coco", "COCO", "clip_score", 0.3, metric_name="CLIP score")
    theirs = EvalResult("unconditional-image-generation", "val", "val", "fid", 9.0, metric_name="FID by another tool")
    card.data.eval_results += [mine, theirs]
    card.save(path)
    record = {"guidance_scale": 3.0, "reference": "val", "metrics": {"fid": 7.5}}
    (folder / "evaluation.json").write_text(json.dumps([record]))
    for _ in range(2):
        refresh_card(folder)
        results = ModelCard.load(path).data.eval_results
        assert sorted((r.metric_type, r.metric_value) for r in results) == [
            ("clip_score", 0.3),
            ("fid", 7.5),
            ("fid", 9.0),
        ]


def test_what_people_wrote_into_a_card_stays(folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("tags:", "license: mit\ntags:") + "\nMy own words.\n")
    (folder / "evaluation.json").write_text(json.dumps([{"metrics": {"fid": 9.0}, "settings": {}}]))
    refresh_card(folder, REPOSITORY)
    card = ModelCard.load(path)
    assert "My own words." in card.text
    assert card.data.license == "mit"
    assert card.text.count("## Results") == 1
    assert "| 9 |" in card.text
    assert "12.5" not in card.content


def test_a_card_is_renamed_where_it_was_not_named_by_people(folder):
    path = folder / "README.md"
    theirs = 'Better: `JiTPipeline.from_pretrained("bob/base")`.'
    path.write_text(f"{path.read_text()}\n{theirs}\n")
    for repository in ("alice/first", "alice/second"):
        refresh_card(folder, repository)
        card = ModelCard.load(path)
        assert theirs in card.text
        assert card.text.count(f'"{repository}"') == card.text.count('"alice/') == 4
        assert card.data.model_name == repository[6:]
    card.data.model_name = "Flora"
    card.save(path)
    refresh_card(folder, "alice/third")
    assert ModelCard.load(path).data.model_name == "Flora"


def test_a_card_is_there_whole_or_as_it_was(folder, monkeypatch):
    before = shared(folder)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        refresh_card(folder, REPOSITORY)
    assert shared(folder) == before


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model", "runs/secret/pipeline", "pipeline"),
        ("model", "..\\secret\\pipeline\\", "pipeline"),
        ("reference", "https://me:pw@secret.org/a/val.npz?token=abcdefgh", "val.npz"),
        ("images", ["~/secret/x", "builtin:fashion_mnist"], ["x", "builtin:fashion_mnist"]),
        ("feature_weights", "secret/w?1.pt", "w?1.pt"),
        ("notes", "/home/secret/n.txt", "n.txt"),
        ("notes", "guidance 2/3", "guidance 2/3"),
        ("notes", "api_key=secret123", "api_key=***"),
        ("seed", 3, 3),
    ],
)
def test_places_are_nobodys_business(key, value, shown):
    assert without_places([{"settings": {key: value}}]) == [{"settings": {key: shown}}]


@pytest.mark.parametrize("text", ["not json", "[1, null]", '{"metrics": 3}', '[{"metrics": {"fid": NaN}}]'])
def test_odd_evaluations_are_passed_over(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    assert read_evaluations(tmp_path / "evaluation.json") == []


@pytest.mark.parametrize(
    ("part", "what", "message"),
    [
        ("/whoami-v2", 401, "refuses the token"),
        ("/repos/create", 403, "may not write to alice/flowers-28"),
        ("/repos/create", 500, "has trouble (500)"),
        ("/commit/", 500, "has trouble (500)"),
        ("/lfs/", 403, "may not write"),
        ("/commit/", "hang", "does not answer"),
    ],
)
def test_a_push_that_fails_says_why_and_what_helps(server, folder, capsys, part, what, message, monkeypatch):
    monkeypatch.setattr(hub, "SILENCE_TIMEOUT_S", 0.3)
    server.fail[part] = what
    assert convert(["--input", str(folder), "--push_to_hub", "--hub_model_id", REPOSITORY]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert TOKEN not in told
    assert server.commits == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda server, patch: patch.delenv("HF_TOKEN"), "nobody is logged in"),
        (lambda server, patch: server.whoami["auth"]["accessToken"].update(role="read"), "may only read"),
        (lambda server, patch: server.whoami.update(name="bob"), "may write to bob, garden only"),
        (lambda server, patch: patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE"),
    ],
)
def test_a_login_that_cannot_work_is_refused_at_once(server, monkeypatch, change, message, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    change(server, monkeypatch)
    with pytest.raises(UserError, match=message):
        hub.check_login(REPOSITORY)


@pytest.mark.parametrize("what", [500, "hang"])
def test_a_hub_that_is_down_now_may_be_up_later(server, capsys, what):
    server.fail["/whoami-v2"] = what
    hub.check_login(REPOSITORY)
    assert "cannot be checked now" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_told(server, folder, monkeypatch):
    server.close()
    with pytest.raises(UserError, match="cannot be reached"):
        hub.push_folder(folder, REPOSITORY)


def test_what_should_be_private_is_never_pushed_to_a_public_repository(server, folder):
    server.repositories[REPOSITORY] = False
    with pytest.raises(UserError, match="exists and is public"):
        hub.push_folder(folder, REPOSITORY, private=True)
    assert server.commits == []
    server.fail["/repos/create"] = 403  # a token for one repository cannot make any
    hub.push_folder(folder, REPOSITORY)
    server.fail.clear()
    hub.push_folder(folder, "garden/new", private=True)
    assert server.repositories["garden/new"] is True


def test_diffusers_own_ways_to_push_keep_the_card(server, folder, tmp_path):
    pipeline = JiTPipeline.from_pretrained(folder)
    pipeline.push_to_hub("alice/by-method")
    card = (folder / "README.md").read_text()
    assert server.files["alice/by-method"]["README.md"].decode() == card
    copy = tmp_path / "copy"
    pipeline.save_pretrained(copy, push_to_hub=True, repo_id="alice/by-saving")
    assert server.files["alice/by-saving"]["README.md"].decode() == card
    pipeline.save_pretrained(str(copy))
    assert (copy / "README.md").read_text() == card


def test_a_training_pushes_its_pipeline_and_survives_a_hub_that_fails(server, images, tmp_path, capsys):
    flags = ["--data_path", str(images), "--max_steps", "1", "--warmup_steps", "0", "--num_inference_steps", "1"]
    out = tmp_path / "run"
    flags += ["--output_dir", str(out), "--push_to_hub", "--hub_model_id", REPOSITORY]
    server.fail["/repos/create"] = 500
    assert train_here(*flags) == 0
    told = capsys.readouterr().err
    command = f"python -m jit_accel.convert --input {out}/pipeline --push_to_hub --hub_model_id {REPOSITORY}"
    assert command in told
    assert server.commits == []
    server.fail.clear()
    assert convert(command.split()[3:]) == 0
    assert server.files[REPOSITORY] == shared(out / "pipeline")
    card = server.files[REPOSITORY]["README.md"].decode()
    assert "Trouser" in card
    assert str(tmp_path) not in card
    assert "hub_model_id" not in card
    ModelCard(card)


def test_a_training_that_could_not_push_does_not_start(server, images, tmp_path, capsys):
    server.fail["/whoami-v2"] = 401
    out = tmp_path / "run"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--push_to_hub", "--hub_model_id", REPOSITORY]
    assert train_here(*flags) == 2
    assert "refuses the token" in capsys.readouterr().err
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.multiprocess
def test_only_one_of_several_processes_pushes(images, tmp_path):
    server = HubServer()
    environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    flags = ["--data_path", str(images), "--max_steps", "1", "--warmup_steps", "0", "--num_inference_steps", "1"]
    flags += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", REPOSITORY]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    train_group(
        tmp_path, *flags, num_processes=2, environment={**environment, "TEST_SETUP": "hub_server:use_environment"}
    )
    assert server.commits == [REPOSITORY]
    assert server.requests.count("GET /api/whoami-v2") == 1
    assert server.files[REPOSITORY] == shared(tmp_path / "run" / "pipeline")
    server.close()
