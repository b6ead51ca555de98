"""The long half: whole training runs that are killed, starved or robbed of their disk, and then have to end as if nothing had happened."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import fault_injection
import pandas as pd
import pytest
from fault_harness import EXPERIMENT, SAVE_EVERY, STEPS, Training, checkpoint_dir, run_to_end

from medqa_lib.training.checkpoints import list_checkpoints, verify

pytestmark = pytest.mark.faults


def metrics_of(home):
    return json.loads((home / "results" / "smoke-llama" / EXPERIMENT / "metrics.json").read_text())


def losses_of(home):
    return pd.read_csv(home / "results" / "smoke-llama" / EXPERIMENT / "loss.csv")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A run that nothing disturbs, with the seconds that a step and the evaluation take."""
    run = Training(tmp_path_factory.mktemp("uninterrupted") / "home")
    run.wait_for("STEP 1\n")
    start = time.monotonic()
    run.wait_for(f"STEP {STEPS}\n")
    run.step_s = (time.monotonic() - start) / (STEPS - 1)
    start = time.monotonic()
    assert run.wait() == 0, run.output[-3000:]
    run.evaluation_s = time.monotonic() - start
    assert run.steps == list(range(1, STEPS + 1)) and run.resumed_from == 0
    return run


def assert_same_end(run, uninterrupted):
    assert run.adapter_hash == uninterrupted.adapter_hash
    mine, theirs = metrics_of(run.home), metrics_of(uninterrupted.home)
    for name in ("validation_loss", "trained_steps", "trained_tokens"):
        assert mine[name] == theirs[name], name
    pd.testing.assert_frame_equal(losses_of(run.home), losses_of(uninterrupted.home))


def resume_and_compare(killed, uninterrupted):
    """Start again, to the end: the same adapter, and at most one save interval done twice."""
    resumed = run_to_end(killed.home, scratch=killed.scratch)
    assert_same_end(resumed, uninterrupted)
    if "is finished" not in resumed.output:
        assert max(killed.steps, default=0) - resumed.resumed_from <= SAVE_EVERY
    return resumed


@pytest.mark.parametrize("seed", range(20))
def test_sigkill_at_a_random_moment_ends_in_the_same_adapter(tmp_path, uninterrupted, seed):
    dice = random.Random(seed)
    step = dice.randint(0, STEPS)  # after which step; 0 is before the first, the last is the evaluation
    pause_s = dice.uniform(0, uninterrupted.evaluation_s if step == STEPS else 2 * uninterrupted.step_s)
    run = Training(tmp_path / "home", scratch=tmp_path / "scratch" if seed % 2 else None)
    run.wait_for(f"STEP {step}\n" if step else "Trainable:")
    time.sleep(pause_s)
    run.kill()
    assert run.wait() in (-signal.SIGKILL, 0)  # 0: it was faster than expected and had ended
    print(f"killed {pause_s:.2f} s after step {step}, step {max(run.steps, default=0)} done")
    resume_and_compare(run, uninterrupted)


@pytest.mark.parametrize("fault", fault_injection.SELF_KILLS, ids=lambda fault: fault.__name__)
def test_sigkill_at_a_chosen_moment_ends_in_the_same_adapter(tmp_path, uninterrupted, fault):
    run = Training(tmp_path / "home", scratch=tmp_path / "scratch", fault=fault)
    assert run.wait() == -signal.SIGKILL
    resume_and_compare(run, uninterrupted)


def test_sigkill_again_and_again_still_ends_in_the_same_adapter(tmp_path, uninterrupted):
    for step in (1, 3, 6, 7, 11, 15):
        run = Training(
            tmp_path / "home", fault=functools.partial(fault_injection.at_step, step, fault_injection.die)
        )
        assert run.wait() == -signal.SIGKILL and run.steps[-1] == step
    resume_and_compare(run, uninterrupted)


def damage(checkpoint, kind):
    path = max(checkpoint.glob("*.pt"), key=lambda file: file.stat().st_size)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "flipped byte":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped byte", "missing"])
def test_damaged_newest_checkpoint_is_skipped_with_the_reason(tmp_path, uninterrupted, kind):
    run = Training(
        tmp_path / "home", fault=functools.partial(fault_injection.at_step, 7, fault_injection.die)
    )
    run.wait()
    damage(checkpoint_dir(tmp_path / "home") / "checkpoint-6", kind)
    resumed = run_to_end(run.home)
    (line,) = {line for line in resumed.output.splitlines() if line.startswith("Skipped ")}
    assert "checkpoint-6" in line and "optimizer.pt" in line and resumed.resumed_from == 4
    assert_same_end(resumed, uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    """A 24 MiB file system at tmp_path/small. Root alone is not enough for it: a container may lack the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small tmpfs: {getattr(error, 'stderr', None) or error}")
    yield folder
    while subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
        pass


def test_full_disk_while_saving_is_explained_and_resumed(tmp_path, small_disk, uninterrupted):
    run = Training(
        tmp_path / "home",
        scratch=small_disk,
        fault=functools.partial(fault_injection.fill_disk_at_step_3, small_disk),
    )
    assert run.wait() == 2
    assert f"{small_disk}/checkpoints" in run.output and "Traceback" not in run.output
    whole = [path.name for path in list_checkpoints(checkpoint_dir(small_disk)) if not verify(path)]
    assert whole == ["checkpoint-2"]
    (small_disk / "filler").unlink()
    resumed = run_to_end(run.home, scratch=small_disk)
    assert resumed.resumed_from == 2
    assert_same_end(resumed, uninterrupted)


def test_file_size_limit_while_saving_is_explained_and_resumed(tmp_path, uninterrupted):
    run = Training(tmp_path / "home", fault=fault_injection.limit_file_size_at_step_3)
    assert run.wait() == 2
    assert f"{run.home}/checkpoints" in run.output and "Traceback" not in run.output
    resume_and_compare(run, uninterrupted)


def lasting_mount(tmp_path, small_disk):
    """HOME/checkpoints is on the small disk, as a Drive folder would be; the Trainer saves elsewhere."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "checkpoints").symlink_to(small_disk)
    return home


def test_full_drive_does_not_stop_training_and_is_reported_at_the_end(tmp_path, small_disk, uninterrupted):
    home = lasting_mount(tmp_path, small_disk)
    run = run_to_end(
        home,
        scratch=tmp_path / "scratch",
        fault=functools.partial(fault_injection.fill_disk_at_step_3, small_disk),
    )
    assert "WARNING: checkpoint-4 is not on" in run.output and f"lacks checkpoint-{STEPS}" in run.output
    assert_same_end(run, uninterrupted)


def test_read_only_drive_is_retried_until_it_takes_the_copy(tmp_path, small_disk, uninterrupted):
    home = lasting_mount(tmp_path, small_disk)
    commands = {
        3: ["mount", "-o", "remount,ro", str(small_disk)],
        7: ["mount", "-o", "remount,rw", str(small_disk)],
    }
    run = run_to_end(
        home, scratch=tmp_path / "scratch", fault=functools.partial(fault_injection.run_at_steps, commands)
    )
    assert "WARNING: checkpoint-4 is not on" in run.output and "WARNING: checkpoint-8" not in run.output
    assert "NOT SAFE YET" not in run.output
    assert verify(checkpoint_dir(home) / f"checkpoint-{STEPS}") == ""
    assert_same_end(run, uninterrupted)


def test_drive_that_vanishes_for_a_while_does_not_stop_training(tmp_path, uninterrupted):
    home, away = tmp_path / "home", tmp_path / "away"
    moves = {3: (home, away), 9: (away, home)}
    run = run_to_end(
        home, scratch=tmp_path / "scratch", fault=functools.partial(fault_injection.rename_at_steps, moves)
    )
    assert "WARNING: checkpoint-4 is not on" in run.output and "NOT SAFE YET" not in run.output
    assert verify(checkpoint_dir(home) / f"checkpoint-{STEPS}") == ""
    assert_same_end(run, uninterrupted)


def test_drive_that_stays_away_costs_no_training_and_no_fake_folder(tmp_path, uninterrupted):
    home, away, scratch = tmp_path / "home", tmp_path / "away", tmp_path / "scratch"
    run = Training(
        home, scratch=scratch, fault=functools.partial(fault_injection.rename_at_steps, {3: (home, away)})
    )
    assert run.wait() == 2 and run.steps[-1] == STEPS
    assert f"lacks checkpoint-{STEPS}" in run.output and "only the evaluation is left to do" in run.output
    assert not home.exists()
    away.rename(home)
    again = run_to_end(home, scratch=scratch)
    assert again.steps == []
    assert verify(checkpoint_dir(home) / f"checkpoint-{STEPS}") == ""
    assert_same_end(again, uninterrupted)


def test_sigterm_saves_stops_and_is_resumed(tmp_path, uninterrupted):
    run = Training(tmp_path / "home")
    run.wait_for("STEP 5")
    run.kill(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    resumed = resume_and_compare_sigterm(run, uninterrupted)
    assert resumed.resumed_from == run.steps[-1], "SIGTERM loses no step"


def resume_and_compare_sigterm(run, uninterrupted):
    resumed = run_to_end(run.home)
    assert resumed.adapter_hash == uninterrupted.adapter_hash
    assert metrics_of(run.home)["validation_loss"] == metrics_of(uninterrupted.home)["validation_loss"]
    return resumed


def test_second_process_on_one_machine_waits_and_reads_what_the_first_has_finished(tmp_path, uninterrupted):
    go_on = tmp_path / "go on"
    first = Training(tmp_path / "home", fault=functools.partial(fault_injection.wait_at_step, 1, go_on))
    second = None
    try:
        first.wait_for("Trainable:")
        second = Training(tmp_path / "home")
        assert second.wait_for("Another process works on exp_004")
    finally:
        go_on.touch()
    assert first.wait() == second.wait() == 0, first.output[-3000:] + second.output[-3000:]
    assert second.steps == [] and "exp_004 is finished" in second.output
    assert_same_end(first, uninterrupted)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("pause", [1, 5], ids=["before a checkpoint", "after checkpoint-4"])
@pytest.mark.parametrize("older_disk, newer_disk", [("a", "b"), (None, "b"), ("a", None)])
def test_newest_of_two_runtimes_on_one_drive_wins_at_once(
    tmp_path, uninterrupted, older_disk, newer_disk, pause
):
    """Each has a disk of its own, or saves on the Drive itself. The older one still trains when the newer one starts."""
    go_on, home = {name: tmp_path / name for name in ("older", "newer")}, tmp_path / "home"
    runs = {}
    for name, disk, step in (("older", older_disk, pause), ("newer", newer_disk, 7)):
        fault = functools.partial(fault_injection.wait_at_step, step, go_on[name])
        runs[name] = Training(home, scratch=tmp_path / disk if disk else None, fault=fault)
        assert runs[name].wait_for(f"STEP {step}\n"), runs[name].output[-3000:]
    before = contents(home)
    go_on["older"].touch()
    assert runs["older"].wait() == 2
    assert "newer start" in runs["older"].output and "Traceback" not in runs["older"].output
    assert contents(home) == before, "the older one writes nothing after the newer one's start"
    go_on["newer"].touch()
    assert runs["newer"].wait() == 0, runs["newer"].output[-3000:]
    assert runs["newer"].resumed_from == (0 if pause == 1 else 4)
    assert_same_end(runs["newer"], uninterrupted)


def test_runtime_that_lost_the_run_while_it_answered_writes_no_results(tmp_path, uninterrupted):
    """The older one has trained and saved its adapter when the newer one starts: its answers still come, its results must not."""
    go_on, home = tmp_path / "go on", tmp_path / "home"
    fault = functools.partial(fault_injection.wait_before_the_answers, tmp_path / "answering", go_on)
    older = Training(home, scratch=tmp_path / "a", fault=fault)
    while not (tmp_path / "answering").exists():
        assert older.process.is_alive(), older.output[-3000:]
        time.sleep(0.05)
    newer = run_to_end(home, scratch=tmp_path / "b")
    before = contents(home / "results") | contents(home / "adapters")
    go_on.touch()
    assert older.wait() == 2
    assert "newer start" in older.output and "Traceback" not in older.output
    assert contents(home / "results") | contents(home / "adapters") == before
    assert_same_end(newer, uninterrupted)


def test_process_that_was_killed_does_not_hold_the_lock(tmp_path, uninterrupted):
    first = Training(tmp_path / "home")
    first.wait_for("STEP 3")
    first.kill()
    second = Training(tmp_path / "home")  # at once
    assert second.wait() == 0, second.output[-3000:]
    assert_same_end(second, uninterrupted)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(tmp_path, uninterrupted):
    run = run_to_end(tmp_path / "home", fault=fault_injection.run_out_of_memory)
    assert "2 rows x 2: 4 did not fit" in run.output
    mine, theirs = metrics_of(run.home), metrics_of(uninterrupted.home)
    assert (
        mine["trained_tokens"] == theirs["trained_tokens"]
        and mine["trained_steps"] == theirs["trained_steps"]
    )
    assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=1e-4)


def launch(home, processes=2):
    """As the README gives it; the smoke profile at its own size, 4 steps. Without a GPU accelerate needs --multi_gpu to start several."""
    several = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
    ]
    command = [
        sys.executable,
        *(several if processes > 1 else []),
        "-m",
        "medqa_lib.training",
        EXPERIMENT,
    ]
    variables = {**os.environ, "MEDQA_PROFILE": "smoke", "MEDQA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


def test_two_processes_equal_one_save_once_and_resume_from_one(tmp_path):
    done = {}
    for name, processes in (("one", 1), ("two", 2)):
        done[name] = launch(tmp_path / name, processes=processes)
        assert done[name].returncode == 0, done[name].stderr[-3000:]
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert (one["loss"] - two["loss"]).abs().max() <= 1e-4
    assert list(one["tokens"]) == list(two["tokens"]) and len(one) == len(two)
    assert metrics_of(tmp_path / "two")["validation_loss"] == pytest.approx(
        metrics_of(tmp_path / "one")["validation_loss"], abs=1e-4
    )
    assert done["two"].stdout.count("Trainable:") == done["two"].stdout.count("results in") == 1
    last = checkpoint_dir(tmp_path / "two") / "checkpoint-4"
    assert verify(last) == ""
    assert (last / "rng_state_0.pth").exists() and (last / "rng_state_1.pth").exists(), (
        "two processes took part"
    )

    # Two processes go on from the checkpoint of one, at step 2.
    shutil.copytree(
        checkpoint_dir(tmp_path / "one") / "checkpoint-2", checkpoint_dir(tmp_path / "mixed") / "checkpoint-2"
    )
    mixed = launch(tmp_path / "mixed")
    assert mixed.returncode == 0, mixed.stderr[-3000:]
    assert mixed.stdout.count("Resuming from") == 1 and "checkpoint-2" in mixed.stdout
    assert (one["loss"] - losses_of(tmp_path / "mixed")["loss"]).abs().max() <= 1e-4

    # And two go on from two, after the newest checkpoint was damaged.
    shutil.rmtree(tmp_path / "two" / "results")
    damage(last, "flipped byte")
    again = launch(tmp_path / "two")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (
        again.stdout.count("Skipped") == 1
        and "Resuming from" in again.stdout
        and "checkpoint-2" in again.stdout
    )
    pd.testing.assert_frame_equal(losses_of(tmp_path / "two"), two)


CANARY = "hf_" + "canary" * 5


def files_with_the_canary(*folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


def test_token_is_in_no_file_and_no_output(tmp_path):
    environment = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY}
    run_to_end(tmp_path / "home", scratch=tmp_path / "scratch", environment=environment)
    killed = Training(
        tmp_path / "home2", environment=environment, fault=fault_injection.limit_file_size_at_step_3
    )
    assert killed.wait() == 2
    assert files_with_the_canary(tmp_path) == []


def load_from_a_dead_hub(tmp_path, model):
    """Load tokenizer and base model while nothing answers under the Hub's address."""
    code = "from medqa_lib.model import load_base_model, load_tokenizer; load_tokenizer(); load_base_model(); print('loaded')"
    variables = {
        "MEDQA_PROFILE": "gpu",
        "MEDQA_MODEL": model,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": CANARY,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_hub_that_is_gone_before_the_download_is_explained(tmp_path):
    done = load_from_a_dead_hub(tmp_path, "someone/tiny")
    assert done.returncode == 1
    assert "someone/tiny" in done.stderr.strip().splitlines()[-1] and "no connection" in done.stderr
    assert CANARY not in done.stdout + done.stderr


def cache_model(tmp_path, *, without=()):
    """Put the smoke model into the Hub's cache, as a download would, less the files that it had not come to."""
    from medqa_lib.config import PROFILES
    from medqa_lib.standin import model_path

    repository = tmp_path / "hf" / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(model_path(PROFILES["smoke"]), snapshot, ignore=shutil.ignore_patterns(*without))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_hub_that_is_gone_during_the_download_is_explained(tmp_path):
    cache_model(tmp_path, without=["*.safetensors"])
    done = load_from_a_dead_hub(tmp_path, "someone/tiny")
    assert done.returncode == 1 and "files already fetched are kept" in done.stderr


def test_hub_that_is_gone_after_the_download_does_not_matter(tmp_path):
    cache_model(tmp_path)
    done = load_from_a_dead_hub(tmp_path, "someone/tiny")
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr[-3000:]
