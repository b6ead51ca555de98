"""Checkpoint folders, with small made-up files: what makes them valid, what is resumed, copied and pruned."""

import contextlib
import hashlib
import json
import os

import pytest
from checkpoint_helpers import IDENTITY, make_checkpoint, names

from medqa_lib.training import checkpoints
from medqa_lib.training.checkpoints import (
    ResumeRefused,
    checkpoint_folders,
    copy_checkpoint,
    latest_valid,
    prune_checkpoints,
    verify,
    write_manifest,
)


def test_write_manifest_records_hashes_and_identity(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    # sha256sum of 1,000 bytes 0x01
    expected = "353c38352a855c80f4ecb0793a76493228541b5fab5ef7af26effac91e77ec46"
    assert manifest["files"]["adapter_model.safetensors"] == expected
    assert manifest["identity"] == IDENTITY
    assert verify(checkpoint) == ""


def test_write_manifest_drops_the_pickle_that_nothing_reads(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1, identity=None)
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    write_manifest(checkpoint, IDENTITY)
    assert not (checkpoint / "training_args.bin").exists()


def test_a_sharded_checkpoint_is_verified_and_copied_with_its_hidden_file(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "local", 1, identity=None)
    shards = checkpoint / "pytorch_model_fsdp_0"  # as torch.distributed.checkpoint writes it
    shards.mkdir()
    (shards / ".metadata").write_bytes(b"where each shard is")
    write_manifest(checkpoint, IDENTITY)
    (tmp_path / "drive").mkdir()
    copy = copy_checkpoint(checkpoint, tmp_path / "drive")
    assert (copy / shards.name / ".metadata").read_bytes() == b"where each shard is"
    (copy / shards.name / ".metadata").write_bytes(b"where each")
    assert ".metadata" in verify(copy)


def damage_truncate(checkpoint):
    os.truncate(checkpoint / "adapter_model.safetensors", 999)


def damage_flip(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def damage_remove(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


def damage_manifest_absent(checkpoint):
    (checkpoint / "manifest.json").unlink()


def damage_manifest_half(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:50])


DAMAGE = {
    damage_truncate: "adapter_model.safetensors",
    damage_flip: "adapter_model.safetensors",
    damage_remove: "trainer_state.json",
    damage_manifest_absent: "manifest.json",
    damage_manifest_half: "",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_latest_valid_skips_a_damaged_newest_and_says_why(tmp_path, damage):
    older = make_checkpoint(tmp_path, 9)
    damage(make_checkpoint(tmp_path, 10))
    found, skipped = latest_valid(tmp_path, IDENTITY)
    assert found == older
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint-10: ") and DAMAGE[damage] in skipped[0]


@pytest.mark.parametrize("name", ["absolute", "../precious", "link", "down/../../precious"])
def test_files_outside_a_checkpoint_stay_as_they_are(tmp_path, name):
    """A manifest or a link may name any file: a copy writes below its own folder, pruning truncates no link's target."""
    precious, drive = tmp_path / "here" / "precious", tmp_path / "far" / "away" / "drive"
    checkpoint = make_checkpoint(tmp_path / "here", 4)
    drive.mkdir(parents=True)
    precious.write_bytes(b"mine")
    (checkpoint / "link").symlink_to(precious)
    name = name.replace("absolute", str(precious))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(b"mine").hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with contextlib.suppress(OSError):  # the copy lacks what the manifest names
        copy_checkpoint(checkpoint, drive)
    assert [path.name for path in drive.parent.iterdir()] == ["drive"] and names(drive) == ["checkpoint-4"]
    make_checkpoint(tmp_path / "here", 6)
    prune_checkpoints(tmp_path / "here", keep=1)
    assert names(tmp_path / "here") == ["checkpoint-6"] and precious.read_bytes() == b"mine"


def test_latest_valid_sorts_by_number_and_ignores_other_names(tmp_path):
    for step in (8, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_valid(tmp_path, IDENTITY)[0].name == "checkpoint-100"
    assert latest_valid(tmp_path / "absent", IDENTITY) == (None, [])


def test_latest_valid_refuses_another_identity_and_lists_only_the_differences(tmp_path):
    make_checkpoint(tmp_path, 2)
    wanted = {"experiment": {"label_policy": "preshifted", "lora": {"r": 8}}, "data": "abd"}
    with pytest.raises(ResumeRefused) as refusal:
        latest_valid(tmp_path, wanted)
    text = str(refusal.value)
    assert "data: checkpoint 'abc', this run 'abd'" in text
    assert "experiment.label_policy: checkpoint 'aligned', this run 'preshifted'" in text
    assert "lora" not in text and str(tmp_path) in text


def test_prune_checkpoints_keeps_the_newest_valid_and_never_leans_on_a_broken_one(tmp_path):
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, step)
    damage_flip(tmp_path / "checkpoint-8")
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_prune_checkpoints_deletes_nothing_when_none_is_valid(tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step, identity=None)
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_prune_checkpoints_truncates_before_it_deletes(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4)
    sizes, rmtree = [], checkpoints.shutil.rmtree

    def note_sizes(folder):
        sizes.extend(path.stat().st_size for path in folder.iterdir())
        rmtree(folder)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", note_sizes)
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-4"] and sizes == [0, 0, 0]


def test_copy_checkpoint_of_a_broken_source_leaves_the_good_copy(tmp_path):
    good = copy_checkpoint(
        make_checkpoint(tmp_path / "local", 2), make_checkpoint(tmp_path / "drive", 1).parent
    )
    damage_manifest_absent(tmp_path / "local" / "checkpoint-2")
    with pytest.raises(FileNotFoundError):
        copy_checkpoint(tmp_path / "local" / "checkpoint-2", tmp_path / "drive")
    assert verify(good) == ""


def test_copy_checkpoint_notices_bytes_that_read_back_differently(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "local", 2)
    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(checkpoints, "hash_file", lambda path: "0" * 64)
    with pytest.raises(OSError, match="checkpoint-2"):
        copy_checkpoint(checkpoint, tmp_path / "drive")


@pytest.mark.parametrize(
    ("home", "local"),
    [("/content/drive/MyDrive/medqa", "/content/medqa_scratch/MyDrive/medqa"), ("/srv/home", "/srv/home")],
)
def test_checkpoints_are_saved_on_a_local_disk_only_where_the_home_is_on_drive(home, local):
    folders = checkpoint_folders(home, "model", "run")
    assert [str(folder) for folder in folders] == [f"{root}/checkpoints/model/run" for root in (local, home)]
