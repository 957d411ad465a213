"""A damaged checkpoint is named, set aside and never loaded."""

import errno
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import OLD_FOLDERS, flip_a_bit, seal_as_before
from safetensors.torch import load_file

from jit_accel.base.errors import UserError
from jit_accel.model import checkpoints
from jit_accel.model.checkpointer import Checkpointer
from jit_accel.model.checkpoints import find_checkpoint_in, load_parts, load_tensors, sound_checkpoint
from jit_accel.model.loading import load_pipeline
from jit_accel.model.manifest import damage_of
from jit_accel.model.tensor_files import CHUNK_BYTES, Piece, chunks_of, stored_tensors, sum_of, write_tensors
from jit_accel.train.output_folder import check_output_dir
from jit_accel.train.state import NamedTensors

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


class Numbers:
    """A part of JSON values."""

    def state_dict(self):
        return {"rng": [1, 2, 3], "settings": {"ema_decays": ["auto"]}}


def save(checkpointer: Checkpointer, step: int) -> Path:
    weights = {"w": torch.full((40, 3), float(step)), "b": torch.full((7,), step, dtype=torch.bfloat16)}
    moments = {"w|exp_avg": torch.ones(40, 3), "w|step": torch.tensor(float(step))}
    parts = {"model": NamedTensors(weights), "optimizer": NamedTensors(moments), "run": Numbers(), "feed": Numbers()}
    return checkpointer.save(step, parts)


@pytest.fixture
def two(tmp_path):
    """A good checkpoint and a newer one."""
    checkpointer = Checkpointer(ALONE, tmp_path, keep=9)
    return save(checkpointer, 1), save(checkpointer, 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def auto(output_dir: Path) -> Path | None:
    return sound_checkpoint(ALONE, output_dir, "auto")


def test_the_file_is_one_that_safetensors_reads_and_sums_are_those_of_the_disk(tmp_path):
    size = CHUNK_BYTES // 4 + 5  # more than a chunk
    tensors = {"a": torch.arange(size), "b": torch.rand(3, 4), "c": torch.ones(5).bfloat16(), "d": torch.tensor(3.0)}
    tensors |= {"e": torch.zeros(0, 4), "f": torch.tensor([True, False]), "g": torch.rand(4, 3).T}
    file = tmp_path / "x.safetensors"
    written = write_tensors(file, {name: Piece.whole(tensor) for name, tensor in tensors.items()})
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(value.whole(), tensors[name]) for name, value in stored_tensors([file]).items())
    assert written.size == file.stat().st_size
    assert written.sums == [sum_of(chunk) for chunk in chunks_of(file, written.size)]
    assert len(written.sums) == 3


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.9999])
def test_one_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(two, tmp_path, capsys, file, place):
    good, bad = two
    flip_a_bit(bad / file, place)
    assert auto(tmp_path) == good
    warned = capsys.readouterr().err
    assert file in warned
    assert "step_00000002 is damaged, and is now step_00000002.damaged" in warned
    assert "step_00000001 is taken" in warned
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002.damaged"]
    assert auto(tmp_path) == good
    assert capsys.readouterr().err == ""


def test_no_byte_of_a_manifest_can_change_unseen(two):
    _, bad = two
    file = bad / "manifest.json"
    data = file.read_bytes()
    content = json.loads(data)
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if damage_of(bad) is None:  # white space, say
            assert json.loads(file.read_bytes()).items() >= {key: content[key] for key in ("files", "crc32")}.items()


def test_the_share_of_each_process_is_another_and_all_is_looked_at(two):
    _, bad = two
    for file in FILES[:3]:
        flip_a_bit(bad / file)
    seen = [damage_of(bad, rank=rank, ranks=3) for rank in range(3)]
    assert [any(file in damage for damage in seen) for file in FILES[:3]] == [True] * 3


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def lose(name: str):
    return lambda folder: (folder / name).unlink()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def pipe(folder: Path) -> None:
    lose("manifest.json")(folder)
    os.mkfifo(folder / "manifest.json")


def replace(text: str):
    return lambda folder: (folder / "manifest.json").write_text(text)


DAMAGES = {
    "cut": cut,
    "no weights": lose("model.safetensors"),
    "no state": lose("state.json"),
    "no manifest": lose("manifest.json"),
    "a pipe": pipe,
    "empty": empty,
    "a list": replace("[]"),
    "a number": replace("3"),
    "no text": replace("\0\0\0"),
    "nothing": replace(""),
    "other names": replace('{"format": 2, "files": {"../x": 3}}'),
    "no sizes": replace('{"format": 2, "files": {"state.json": null}}'),
    "no files": replace('{"format": 2, "files": {}}'),
    "deep": replace("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_is_wrong_the_checkpoint_before_is_taken_and_this_one_named(two, tmp_path, capsys, damage):
    good, bad = two
    damage(bad)
    with pytest.raises(UserError, match="resume"):
        sound_checkpoint(ALONE, tmp_path, str(bad))
    assert find_checkpoint_in(tmp_path) == good
    assert auto(tmp_path) == good
    assert "step_00000002.damaged" in capsys.readouterr().err


def test_a_checkpoint_that_is_asked_for_and_damaged_is_an_error_and_nothing_is_changed(two, tmp_path):
    _, bad = two
    flip_a_bit(bad / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"resume \S+step_00000002: .*optimizer.safetensors is not what was written"):
        sound_checkpoint(ALONE, tmp_path, str(bad))
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002"]


def test_the_folder_of_another_run_is_left_as_it_is(two, tmp_path, capsys):
    good, bad = two
    flip_a_bit(bad / "state.json")
    assert sound_checkpoint(ALONE, tmp_path / "other", str(tmp_path)) == good
    assert "step_00000002 is damaged:" in capsys.readouterr().err
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002"]


def test_a_checkpoint_of_any_name_beside_one_that_was_given_up_is_taken_as_it_is(two, tmp_path, capsys):
    good, bad = two
    bad.rename(bad.with_name("step_00000002.not_finite"))
    named = good.rename(good.with_name("best"))
    assert sound_checkpoint(ALONE, tmp_path, str(named)) == named
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_passed_over_where_nothing_can_be_renamed(two, tmp_path, capsys, monkeypatch):
    good, bad = two
    flip_a_bit(bad / "state.json")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "move", refuse)
    assert auto(tmp_path) == good
    assert "step_00000002 is damaged: state.json" in capsys.readouterr().err


def test_where_no_checkpoint_is_whole_nothing_is_begun_and_nothing_changed(two, tmp_path):
    for path in two:
        (path / "manifest.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint there is whole .*manifest.json is missing"):
            auto(tmp_path)
    with pytest.raises(UserError, match="holds another run"):
        check_output_dir(tmp_path, "none", "images")
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_that_cannot_be_listed_are_no_reason_to_begin_anew(two, tmp_path, monkeypatch):
    listed = os.listdir

    def refuse(path):
        if Path(path).name == "checkpoints":
            raise OSError(errno.ESTALE, "Stale file handle")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    for find in (auto, find_checkpoint_in, lambda folder: check_output_dir(folder, "none", "images")):
        with pytest.raises(UserError, match=r"cannot be read \(Stale file handle"):
            find(tmp_path)


def test_a_link_in_a_circle_in_the_place_of_a_checkpoint_is_passed_over_and_set_aside(two, tmp_path, capsys):
    good, bad = two
    shutil.rmtree(bad)
    bad.symlink_to(bad.name)
    assert find_checkpoint_in(tmp_path) == good
    assert save(Checkpointer(ALONE, tmp_path, keep=9), 2) == bad
    assert auto(tmp_path) == bad
    assert (bad.parent / "step_00000002.damaged").is_symlink()


def test_a_folder_of_a_steps_name_is_set_aside_when_that_step_is_saved(two, tmp_path):
    _, bad = two
    checkpointer = Checkpointer(ALONE, tmp_path, keep=9)
    for _ in range(2):
        cut(bad)
        save(checkpointer, 2)
    assert names(tmp_path / "checkpoints") == [
        *("step_00000001", "step_00000002", "step_00000002.damaged", "step_00000002.damaged-2")
    ]
    assert auto(tmp_path) == bad


def test_a_file_that_cannot_be_read_is_named(two, tmp_path, capsys):
    good, bad = two
    (bad / "optimizer.safetensors").unlink()
    (bad / "optimizer.safetensors").symlink_to("optimizer.safetensors")
    assert auto(tmp_path) == good
    assert "optimizer.safetensors cannot be read (Too many levels" in capsys.readouterr().err


def test_of_a_checkpoint_without_checksums_a_file_that_may_not_be_read_is_named(two, tmp_path, capsys, monkeypatch):
    good, bad = two
    for path in two:
        seal_as_before(path)
    opened = open

    def refuse(file, *args, **kwargs):
        if Path(file) == bad / "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    assert auto(tmp_path) == good
    assert "model.safetensors cannot be read (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_of_a_checkpoint_without_checksums_a_broken_header_is_seen(two, tmp_path, capsys, part):
    good, bad = two
    for path in two:
        seal_as_before(path)
    assert auto(tmp_path) == bad
    assert capsys.readouterr().err == ""
    flip_a_bit(bad / f"{part}.safetensors", 0.0)
    assert auto(tmp_path) == good
    assert f"{part}.safetensors cannot be read" in capsys.readouterr().err


def test_tensors_of_other_names_or_shapes_are_an_error_with_a_remedy(two):
    _, path = two
    for weights in ({"v": torch.ones(3)}, {"w": torch.ones(3, 40), "b": torch.ones(7)}):
        with pytest.raises(UserError, match=r"model cannot be loaded .*not of this network.*renamed"):
            load_parts(path, {"model": NamedTensors(weights)})


def test_who_reads_a_part_looks_at_that_part_alone(two):
    _, path = two
    flip_a_bit(path / "optimizer.safetensors")
    assert load_tensors(path, "model", "model")["w"][0, 0] == 2
    with pytest.raises(UserError, match=r"model \S+: is damaged and cannot be read: optimizer"):
        load_tensors(path, "optimizer", "model")


@pytest.mark.parametrize("file", ["ema_0.5.safetensors", "state.json", "manifest.json"])
def test_programs_refuse_the_damaged_checkpoint_that_they_are_given(tmp_path, file):
    old = next((OLD_FOLDERS / "run" / "checkpoints").glob("step_*"))
    path = tmp_path / "checkpoints" / old.name
    shutil.copytree(old, path)
    load_pipeline(path)
    flip_a_bit(path / file, 0.0)
    with pytest.raises(UserError):
        load_pipeline(path)


@pytest.mark.parametrize("name", ["run", "muon", "adapter", "stream"])
def test_checkpoints_of_before_load_and_nothing_is_said(name, capsys):
    assert auto(OLD_FOLDERS / name).parent == OLD_FOLDERS / name / "checkpoints"
    assert capsys.readouterr().err == ""


def test_of_a_checkpoint_of_before_no_changed_byte_is_a_bug(tmp_path):
    """It is loaded, which without checksums cannot be prevented, or refused as the user's to put right."""
    old = next((OLD_FOLDERS / "run" / "checkpoints").glob("step_*"))
    path = tmp_path / "checkpoints" / old.name
    shutil.copytree(old, path)
    chance, refused = random.Random(0), 0
    for file in ("ema_0.5.safetensors", "model.safetensors", "state.json", "manifest.json"):
        data = (path / file).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if file.endswith("s") else len(data)
        weights = load_file(path / "model.safetensors")
        for _ in range(25):
            place = chance.randrange(header)
            (path / file).write_bytes(
                data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
            )
            try:
                load_parts(path, {"model": NamedTensors({name: torch.zeros_like(w) for name, w in weights.items()})})
                load_pipeline(path, ema="0.5")
            except UserError:
                refused += 1
        (path / file).write_bytes(data)
    assert refused > 50
