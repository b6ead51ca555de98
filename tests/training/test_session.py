"""A run's checkpoints while it trains, with a Trainer that is played: no training in this file."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from checkpoint_helpers import IDENTITY, make_checkpoint, names

from medqa_lib.config import PROFILES
from medqa_lib.evaluation.lock import lock_run
from medqa_lib.training import session as checkpoint_session
from medqa_lib.training.checkpoints import CheckpointError, read_manifest, verify
from medqa_lib.training.session import CheckpointSession, RunBusy, explain_save_errors


def save(session, step):
    """What the Trainer does at a save: writes the files, then calls on_save."""
    make_checkpoint(session.local_dir, step, identity=None)
    session.on_save(None, SimpleNamespace(global_step=step), None)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def test_session_copies_to_the_lasting_folder_and_prunes_both(tmp_path):
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        for step in (2, 4, 6):
            save(session, step)
    for folder in (tmp_path / "local", tmp_path / "drive"):
        assert names(folder) == ["checkpoint-4", "checkpoint-6"]
        assert verify(folder / "checkpoint-6") == ""


def test_session_writes_once_when_both_folders_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_session, "copy_checkpoint", None)  # calling it would fail
    with CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        save(session, 2)
    assert verify(tmp_path / "checkpoint-2") == ""


def test_resume_from_takes_the_newest_valid_of_both_folders(tmp_path, capsys):
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        save(session, 2)
        save(session, 4)
        flip_a_byte(tmp_path / "local" / "checkpoint-4" / "adapter_model.safetensors")
        assert session.resume_from() == str(tmp_path / "drive" / "checkpoint-4")
    assert "Skipped" in capsys.readouterr().out


def test_resume_from_completes_a_copy_that_was_cut_short(tmp_path):
    make_checkpoint(tmp_path / "local", 4)
    half = tmp_path / "drive" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        assert session.resume_from() == str(tmp_path / "local" / "checkpoint-4")
    assert verify(half) == ""


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
    assert verify(drive / "checkpoint-6") == ""
    assert "NOT SAFE YET" not in capsys.readouterr().out


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


def test_session_without_a_writable_folder_says_what_to_do(tmp_path):
    (tmp_path / "drive").write_text("a file where the folder should be")
    with (
        pytest.raises(CheckpointError, match="drive"),
        CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY),
    ):
        pass


def test_sigterm_while_training_saves_and_stops(tmp_path, capsys):
    control = SimpleNamespace(should_save=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        session.on_train_begin(SimpleNamespace(world_size=1), None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        session.on_step_end(None, None, control)
        assert control.should_save
        save(session, 3)
    assert stop.value.code == 143 and verify(tmp_path / "checkpoint-3") == ""
    assert "checkpoint-3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_after_the_last_save_stops_at_the_end_of_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        session.on_train_begin(SimpleNamespace(world_size=1), None, None)
        save(session, 8)
        os.kill(os.getpid(), signal.SIGTERM)
        session.on_train_end(None, None, None)
    assert stop.value.code == 143 and verify(tmp_path / "checkpoint-8") == ""
    assert "SIGTERM" in capsys.readouterr().out


def test_session_of_another_rank_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        session.on_save(None, SimpleNamespace(global_step=2), None)
    assert list(tmp_path.iterdir()) == []


def test_train_time_is_kept_beside_the_lasting_checkpoint(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        clock.now += 100
        save(session, 2)
    assert read_manifest(tmp_path / "drive" / "checkpoint-2")["train_time_s"] == 100
    clock.now = 7.0
    with CheckpointSession(tmp_path / "drive", tmp_path / "drive", IDENTITY) as session:  # on another machine
        assert session.train_time_s == 0
        session.resume_from()
        clock.now += 5
        assert session.train_time_s == 105


def test_copy_that_is_there_is_not_missing_when_older_ones_cannot_be_deleted(tmp_path, capsys, monkeypatch):
    def prune(folder, keep):
        if folder.name == "drive":
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(checkpoint_session, "prune_checkpoints", prune)
    with CheckpointSession(tmp_path / "local", tmp_path / "drive", IDENTITY) as session:
        save(session, 2)
        assert session.missing is None
    out = capsys.readouterr().out
    assert "WARNING" in out and "NOT SAFE YET" not in out


def test_any_error_of_a_save_is_explained(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(CheckpointError, match="No space left on device") as error,
        explain_save_errors(tmp_path),
    ):
        raise full
    assert error.value.__cause__ is full


@pytest.mark.parametrize("same_disk", [True, False])
def test_newest_start_owns_the_run_and_the_older_one_stops_at_its_next_save(tmp_path, same_disk):
    drive = tmp_path / "drive"
    first, second = (drive if same_disk else tmp_path / name for name in ("one", "two"))
    with CheckpointSession(first, drive, IDENTITY) as older:
        save(older, 2)
        older.require_owner()
        with CheckpointSession(second, drive, IDENTITY) as newer:
            assert newer.resume_from().endswith("checkpoint-2")
            newer.require_owner()
            before = {path: path.stat().st_mtime_ns for path in drive.rglob("*")}
            for check in (older.require_owner, older.require_lasting):
                with pytest.raises(RunBusy, match=str(drive)):
                    check()
            assert {path: path.stat().st_mtime_ns for path in drive.rglob("*")} == before
            save(newer, 4)


def test_owner_file_that_cannot_be_read_stops_nobody(tmp_path):
    with CheckpointSession(tmp_path, tmp_path, IDENTITY) as session:
        (tmp_path / "owner.json").unlink()
        session.require_owner()


def _hold_lock(home, ready):
    with lock_run("exp_004", PROFILES["smoke"], home):
        ready.set()
        time.sleep(600)


def test_lock_waits_for_another_process_and_is_free_once_that_is_killed(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold_lock, args=(tmp_path, ready), daemon=True)
    holder.start()
    try:
        assert ready.wait(120)
        with lock_run("exp_003", PROFILES["smoke"], tmp_path):
            assert holder.is_alive() and not capsys.readouterr().out
        killer = threading.Timer(3, holder.kill)
        killer.start()
        with lock_run("exp_004", PROFILES["smoke"], tmp_path):
            assert killer.finished.is_set() and "exp_004" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.join()
