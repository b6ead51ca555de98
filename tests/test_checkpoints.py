"""Checkpoints on disk and the session around them, with small made-up checkpoint folders: no training in this file."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from medqa_lib.training import checkpoints
from medqa_lib.training import lock as run_lock
from medqa_lib.training import session as checkpoint_session
from medqa_lib.training.checkpoints import (
    CheckpointError,
    ResumeRefused,
    checkpoint_folders,
    checkpoint_train_time,
    copy_checkpoint,
    latest_valid,
    prune_checkpoints,
    verify,
    write_manifest,
)
from medqa_lib.training.lock import RunBusy, RunLock
from medqa_lib.training.session import CheckpointSession

IDENTITY = {"experiment": {"labels": "aligned", "lora": {"r": 8}}, "data": "abc"}


def make_checkpoint(folder, step, identity=IDENTITY):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(bytes([step]) * 1000)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if identity is not None:
        write_manifest(checkpoint, identity)
    return checkpoint


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def save(session, step):
    """What the Trainer does at a save: writes the files, then calls on_save."""
    make_checkpoint(session.local_dir, step, identity=None)
    session.on_save(None, SimpleNamespace(global_step=step), None)


def test_write_manifest_records_sizes_hashes_and_identity(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    # sha256sum of 1,000 bytes 0x01
    assert manifest["files"]["adapter_model.safetensors"] == {
        "bytes": 1000,
        "sha256": "353c38352a855c80f4ecb0793a76493228541b5fab5ef7af26effac91e77ec46",
    }
    assert manifest["identity"] == IDENTITY
    assert verify(checkpoint) == []


def test_write_manifest_drops_the_pickle_that_nothing_reads(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1, identity=None)
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    write_manifest(checkpoint, IDENTITY)
    assert not (checkpoint / "training_args.bin").exists()


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


def damage_manifest_identity(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace("aligned", "alighed"))


DAMAGE = {
    damage_truncate: "adapter_model.safetensors has 999 bytes, expected 1000",
    damage_flip: "adapter_model.safetensors does not match its SHA-256",
    damage_remove: "trainer_state.json is missing",
    damage_manifest_absent: "no manifest.json",
    damage_manifest_half: "cannot be read",
    damage_manifest_identity: "manifest.json was altered",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_latest_valid_skips_a_damaged_newest_and_says_why(tmp_path, damage):
    older = make_checkpoint(tmp_path, 9)
    damage(make_checkpoint(tmp_path, 10))
    found, skipped = latest_valid(tmp_path, IDENTITY)
    assert found == older
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint-10: ") and DAMAGE[damage] in skipped[0]


@pytest.mark.parametrize("name", ["absolute", "../precious", "link", "down/../../precious"])
def test_files_outside_a_checkpoint_are_refused_and_stay_as_they_are(tmp_path, name):
    precious, checkpoint = tmp_path / "precious", make_checkpoint(tmp_path, 4)
    precious.write_bytes(b"mine")
    (checkpoint / "link").symlink_to(precious)
    name = name.replace("absolute", str(precious))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    manifest["seal"] = hashlib.sha256(
        json.dumps({k: v for k, v in manifest.items() if k != "seal"}, sort_keys=True).encode()
    ).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with CheckpointSession(tmp_path, tmp_path / "drive", IDENTITY) as session:
        assert session.resume_from() is None
    assert verify(checkpoint) == [f"{name} is outside of the checkpoint"]
    make_checkpoint(tmp_path, 6)
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-6"] and precious.read_bytes() == b"mine"


def test_latest_valid_sorts_by_number_and_ignores_other_names(tmp_path):
    for step in (8, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_valid(tmp_path)[0].name == "checkpoint-100"
    assert latest_valid(tmp_path / "absent") == (None, [])


def test_latest_valid_refuses_another_identity_and_lists_only_the_differences(tmp_path):
    make_checkpoint(tmp_path, 2)
    wanted = {"experiment": {"label_policy": "preshifted", "lora": {"r": 8}}, "data": "abd"}
    with pytest.raises(ResumeRefused) as refusal:
        latest_valid(tmp_path, wanted)
    text = str(refusal.value)
    assert "data: checkpoint 'abc', this run 'abd'" in text
    assert "experiment.label_policy: checkpoint 'aligned', this run 'preshifted'" in text
    assert "lora" not in text and "Delete or rename" in text


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
    sizes = []
    unlink = checkpoints.Path.unlink
    monkeypatch.setattr(
        checkpoints.Path, "unlink", lambda path, **kw: (sizes.append(path.stat().st_size), unlink(path, **kw))
    )
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-4"] and sizes == [0, 0, 0]


def test_session_copies_to_the_lasting_folder_and_prunes_both(tmp_path):
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        for step in (2, 4, 6):
            save(session, step)
    for folder in (tmp_path / "local", tmp_path / "drive"):
        assert names(folder) == ["checkpoint-4", "checkpoint-6"]
        assert verify(folder / "checkpoint-6") == []


def test_session_writes_once_when_both_folders_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_session, "copy_checkpoint", None)  # calling it would fail
    with CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        save(session, 2)
    assert verify(tmp_path / "checkpoint-2") == []


@pytest.mark.parametrize("spelling", ["home", "home/../home", "link"])
def test_checkpoint_folders_are_one_however_scratch_spells_home(tmp_path, monkeypatch, spelling):
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDQA_SCRATCH", spelling)
    local, lasting = checkpoint_folders(tmp_path / "home", "run")
    assert local == lasting == tmp_path / "home" / "checkpoints" / "run"


def test_copy_checkpoint_onto_itself_loses_nothing(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "home", 2)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    copy_checkpoint(checkpoint, tmp_path / "link")
    assert verify(checkpoint) == []


def test_copy_checkpoint_of_a_broken_source_leaves_the_good_copy(tmp_path):
    good = copy_checkpoint(
        make_checkpoint(tmp_path / "local", 2), make_checkpoint(tmp_path / "drive", 1).parent
    )
    damage_manifest_absent(tmp_path / "local" / "checkpoint-2")
    with pytest.raises(FileNotFoundError):
        copy_checkpoint(tmp_path / "local" / "checkpoint-2", tmp_path / "drive")
    assert verify(good) == []


def test_resume_from_takes_the_newest_valid_of_both_folders(tmp_path, capsys):
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        save(session, 2)
        save(session, 4)
        damage_flip(tmp_path / "local" / "checkpoint-4")
        assert session.resume_from() == str(tmp_path / "drive" / "checkpoint-4")
    assert "Skipped" in capsys.readouterr().out


def test_train_time_goes_to_the_lasting_folder_and_cannot_be_altered(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    manifest = tmp_path / "drive" / "checkpoint-2" / "manifest.json"
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        clock.now += 100
        save(session, 2)
    assert checkpoint_train_time(manifest.parent) == 100
    clock.now = 7.0
    with CheckpointSession(tmp_path / "drive", tmp_path / "drive", IDENTITY) as session:  # on another machine
        assert session.train_time_s == 0
        session.resume_from()
        clock.now += 5
        assert session.train_time_s == 105
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "train_time_s": 1.0}))
    assert verify(manifest.parent) == ["manifest.json was altered"]


def test_resume_from_completes_a_copy_that_was_cut_short(tmp_path):
    make_checkpoint(tmp_path / "local", 4)
    half = tmp_path / "drive" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        assert session.resume_from() == str(tmp_path / "local" / "checkpoint-4")
    assert verify(half) == []


def test_session_goes_on_without_drive_and_catches_up_when_it_is_back(tmp_path, capsys):
    drive, away = tmp_path / "drive", tmp_path / "away"
    with CheckpointSession(tmp_path / "local", drive, IDENTITY) as session:
        save(session, 2)
        drive.rename(away)
        save(session, 4)
        assert not drive.exists(), "a vanished Drive must not come back as a local folder"
        assert "WARNING: checkpoint-4 is not on" in capsys.readouterr().out
        away.rename(drive)
        save(session, 6)
    assert verify(drive / "checkpoint-6") == []
    assert "NOT SAFE YET" not in capsys.readouterr().out


def test_session_tells_a_pruning_that_fails_from_a_copy_that_is_missing(tmp_path, capsys, monkeypatch):
    def prune(folder, keep):
        if folder.name == "drive":
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(checkpoint_session, "prune_checkpoints", prune)
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        save(session, 2)
    out = capsys.readouterr().out
    assert "older checkpoints" in out and "checkpoint-2 is there" in out
    assert "is not on" not in out and "NOT SAFE YET" not in out


def test_session_says_at_the_end_what_drive_lacks(tmp_path, capsys):
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        (tmp_path / "drive").rename(tmp_path / "away")
        save(session, 2)
    assert "NOT SAFE YET" in (out := capsys.readouterr().out) and "lacks checkpoint-2" in out


def test_require_lasting_refuses_a_drive_that_is_gone(tmp_path):
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        session.require_lasting()
        (tmp_path / "drive").rename(tmp_path / "away")
        with pytest.raises(CheckpointError, match="only the evaluation is left"):
            session.require_lasting()


def test_session_explains_an_error_of_a_drive_that_already_lacks_a_checkpoint(tmp_path):
    with (
        pytest.raises(CheckpointError, match="checkpoint-2 is whole in"),
        CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session,
    ):
        (tmp_path / "drive").rename(tmp_path / "away")
        save(session, 2)
        raise OSError(errno.EROFS, "Read-only file system")


def test_session_reports_a_copy_that_reads_back_differently(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "hash_file", lambda path: "0" * 64 if "drive" in str(path) else "1" * 64)
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        save(session, 2)
        assert "reads back differently" in capsys.readouterr().out
    assert not (tmp_path / "drive" / "checkpoint-2" / "manifest.json").exists()


def test_check_space_refuses_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint_session.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * 2**20)
    )
    with CheckpointSession(tmp_path, tmp_path, IDENTITY, keep=2) as session:
        session.check_space(33 * 2**20)  # three need 99 MiB
        with pytest.raises(CheckpointError, match="100 MiB free, the checkpoints still to come need 102 MiB"):
            session.check_space(34 * 2**20)


@pytest.mark.parametrize(("there", "fits_mib"), [((), 33), ((2,), 50), ((2, 4), 100), ((2, 4, 6, 8), 100)])
def test_check_space_counts_the_checkpoints_that_lie_there(tmp_path, monkeypatch, there, fits_mib):
    monkeypatch.setattr(
        checkpoint_session.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * 2**20)
    )
    for step in there:
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 9, identity=None)  # a fragment counts for nothing
    with CheckpointSession(tmp_path, tmp_path, IDENTITY, keep=2) as session:
        session.check_space(fits_mib * 2**20)
        with pytest.raises(CheckpointError, match="Too little disk"):
            session.check_space((fits_mib + 1) * 2**20)


def test_check_space_lets_a_run_pass_that_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_session.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    checkpoint = make_checkpoint(tmp_path / "drive", 8, identity=None)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 8, "max_steps": 8}))
    write_manifest(checkpoint, IDENTITY)
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        session.check_space(2**20)
        damage_flip(checkpoint)
        with pytest.raises(CheckpointError, match="Too little disk"):
            session.check_space(2**20)


def test_session_explains_a_full_disk_only_while_saving(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(CheckpointError, match="make room there and start again"),
        CheckpointSession(tmp_path, tmp_path, IDENTITY) as session,
    ):
        session.on_step_end(None, None, SimpleNamespace(should_save=True))
        raise full
    with (
        pytest.raises(OSError, match="No space left") as other,
        CheckpointSession(tmp_path, tmp_path, IDENTITY),
    ):
        raise full
    assert other.value is full


def test_session_without_a_writable_folder_says_what_to_do(tmp_path):
    (tmp_path / "drive").write_text("a file where the folder should be")
    with (
        pytest.raises(CheckpointError, match="Is Drive mounted"),
        CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY),
    ):
        pass


def _hold_lock(folder, ready):
    RunLock(folder, folder).acquire()
    ready.set()
    time.sleep(600)


def test_lock_refuses_a_second_process_and_is_free_once_the_first_is_killed(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold_lock, args=(tmp_path, ready), daemon=True)
    holder.start()
    try:
        assert ready.wait(120)
        monkeypatch.setattr(run_lock, "DYING_S", 0.3)
        with pytest.raises(RunBusy, match=f'"pid": {holder.pid}'):
            RunLock(tmp_path, tmp_path).acquire()
        monkeypatch.setattr(run_lock, "DYING_S", 120)
        threading.Timer(0.5, holder.kill).start()  # a process that is dying holds its lock for a while
        lock = RunLock(tmp_path, tmp_path)
        lock.acquire()
        lock.release()
    finally:
        holder.kill()
        holder.join()


def test_file_system_without_locks_is_not_taken_for_a_busy_run(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    with (
        pytest.raises(
            CheckpointError, match="run.lock cannot be locked .*No locks available.*Set MEDQA_SCRATCH"
        ) as refusal,
        CheckpointSession(tmp_path, tmp_path, IDENTITY),
    ):
        pass
    assert refusal.type is CheckpointError, "not RunBusy"


def test_release_leaves_no_heartbeat_of_a_beat_in_progress(tmp_path, monkeypatch):
    writing, released, beats = threading.Event(), threading.Event(), []

    def write_slowly(path, content):
        if threading.current_thread() is not threading.main_thread():
            beats.append(threading.current_thread())
            writing.set()
            released.wait(
                1
            )  # `release` is called meanwhile, and must not come back before the file is written
        checkpoints.write_json_atomically(path, content)

    monkeypatch.setattr(run_lock, "write_json_atomically", write_slowly)
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    lock = RunLock(tmp_path, tmp_path)
    lock.acquire()
    assert writing.wait(120)
    lock.release()
    released.set()
    beats[0].join(120)
    assert not (tmp_path / "run.lock.json").exists()


@pytest.mark.parametrize(("silent_s", "refused"), [(30, True), (run_lock.STALE_S + 1, False)])
def test_lock_of_another_machine_counts_until_its_heartbeat_stops(tmp_path, silent_s, refused):
    (tmp_path / "run.lock.json").write_text(
        json.dumps({"host": "another", "pid": 7, "beat": time.time() - silent_s})
    )
    lock = RunLock(tmp_path, tmp_path)
    if refused:
        with pytest.raises(RunBusy, match="Process 7 on machine another"):
            lock.acquire()
    else:
        lock.acquire()
        lock.release()
        assert not (tmp_path / "run.lock.json").exists()


def test_sigterm_while_training_saves_and_stops(tmp_path, capsys):
    control = SimpleNamespace(should_save=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        session.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        session.on_step_end(None, None, control)
        assert control.should_save
        save(session, 3)
    assert stop.value.code == 143 and verify(tmp_path / "checkpoint-3") == []
    assert "Stopped by SIGTERM" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_after_the_last_save_stops_at_the_end_of_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        session.on_train_begin(None, None, None)
        save(session, 8)
        os.kill(os.getpid(), signal.SIGTERM)
        session.on_train_end(None, None, None)
    assert stop.value.code == 143 and verify(tmp_path / "checkpoint-8") == []
    assert "only the evaluation is left" in capsys.readouterr().out


def test_session_of_another_rank_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        session.on_save(None, SimpleNamespace(global_step=2), None)
    assert list(tmp_path.iterdir()) == []
