"""Interrupted fits: they go on as if nothing had happened, and leave whole checkpoints."""

import csv
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from involution.cli import main
from involution.data import digits
from involution.tasks.commands import Command
from involution.tasks.task import Task

STEPS, ITEMS = 8, 70  # of an epoch, with some left over
PACE = {"images/s", "waiting"}  # depend on the machine
FIT = [
    *("fit", "--model.options.base_width", "16", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "1"),
    *("--data.size", "16", "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"),
    *("--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
]


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    """Few digits, and no picture of how they were learned: both take long, and so many fits are run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "split", lambda classes: (range(ITEMS), range(100, 110), range(200, 210)))
    monkeypatch.setattr("involution.tasks.report.draw_curves", lambda *_: None)


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action()


@contextmanager
def at(step, action):
    """Lets fits do something after a step."""
    old = Command.instantiate_trainer

    def instantiate(self, **kwargs):
        trainer = old(self, **kwargs)
        trainer.callbacks.insert(0, At(step, action))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Command, "instantiate_trainer", instantiate)
        yield


def weights(folder):
    checkpoint = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * STEPS
    return checkpoint["state_dict"]


def assert_same(folder, other):
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def logged(folder):
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = [{name: row[name] for name in row if row[name] and name not in PACE} for row in csv.DictReader(file)]
    # of the epoch in which it was interrupted a fit only knows the steps since
    return [row for row in rows if "train/loss" not in row or row["epoch"] != "1"]


def test_a_fit_goes_on_from_any_step_to_the_same_weights():
    with at(STEPS + 1, lambda: shutil.copy("whole/checkpoints/last.ckpt", "epoch.ckpt")):
        assert main([*FIT, "--folder", "whole", "--save_every", "3", "--keep", "9"]) == 0
    saved = {path.name for path in Path("whole/checkpoints").iterdir()}
    assert saved == {"best.ckpt", "last.ckpt", *(f"step-{step}.ckpt" for step in range(3, 2 * STEPS, 3))}
    for name in ("whole/checkpoints/step-3", "epoch", "whole/checkpoints/step-15"):
        folder = f"from-{Path(name).name}"
        assert main([*FIT, "--folder", folder, "--ckpt_path", f"{name}.ckpt"]) == 0
        assert_same("whole", folder)


def rates(folder):
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]


def test_a_fit_goes_on_with_the_settings_it_is_given():
    with at(STEPS + 1, lambda: shutil.copy("whole/checkpoints/last.ckpt", "epoch.ckpt")):
        assert main([*FIT, "--folder", "whole", "--model.lr", "0.004"]) == 0
    lower = ["--model.lr", "0.001", "--model.weight_decay", "0.5", "--model.optimizer_options", "{betas: [0.8, 0.9]}"]
    assert main([*FIT, "--folder", "lower", "--ckpt_path", "epoch.ckpt", *lower]) == 0
    assert rates("lower") == pytest.approx([rate / 4 for rate in rates("whole")[STEPS:]])
    groups = torch.load("lower/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [(group["weight_decay"], tuple(group["betas"])) for group in groups] == [(0, (0.8, 0.9)), (0.5, (0.8, 0.9))]


def test_a_fit_that_cannot_go_on_says_so_in_one_line(capsys):
    assert main([*FIT, "--folder", "run", "--trainer.max_epochs", "3"]) == 0
    capsys.readouterr()
    for settings, told in (
        (["--trainer.max_epochs", "1"], ", but you have set Trainer(max_epochs=1)"),
        (["--model.optimizer", "sgd", "--model.optimizer_options", "{}"], "`model.optimizer` must be adamw, as in the"),
    ):
        assert main([*FIT, "--folder", "run", "--ckpt_path", "last", *settings]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_fit_ended_by_the_user_tells_how_to_go_on(capsys):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    with at(STEPS + 3, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert main([*FIT, "--folder", "ended"]) == 130
    signal.signal(signal.SIGINT, handler)  # which Lightning lets ignore a second one
    assert "ended by SIGINT; a fit goes on by `--ckpt_path last`" in capsys.readouterr().err
    assert main([*FIT, "--folder", "ended", "--ckpt_path", "last"]) == 0
    assert len(rates("ended")) == 2 * STEPS


def test_data_that_does_not_go_on_is_noticed(monkeypatch):
    assert main([*FIT, "--folder", "whole", "--save_every", "3", "--keep", "9"]) == 0
    monkeypatch.setattr("involution.data.order.Resumable.load_state_dict", lambda self, state: None)
    assert main([*FIT, "--folder", "other", "--ckpt_path", "whole/checkpoints/step-3.ckpt"]) == 0
    with pytest.raises(AssertionError):
        assert_same("whole", "other")


def test_a_process_told_to_end_saves_and_goes_on_in_its_folder(capsys):
    assert main([*FIT, "--folder", "whole"]) == 0
    with at(11, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*FIT, "--folder", "ended", "--ckpt_path", "last"]) == 143
    assert "ended by SIGTERM; a fit goes on by `--ckpt_path last`" in capsys.readouterr().err
    assert [path.name for path in Path("ended/checkpoints").glob("step-*")] == ["step-11.ckpt"]
    assert main([*FIT, "--folder", "ended", "--ckpt_path", "last"]) == 0
    assert_same("whole", "ended")
    assert logged("whole") == logged("ended")


def test_a_checkpoint_from_the_middle_of_a_step_does_that_step_again(monkeypatch):
    """Where a queue of jobs has Lightning save at any moment."""
    assert main([*FIT, "--folder", "whole"]) == 0
    begin = Task.on_train_batch_start

    def save(task, batch, index):
        if task.trainer.global_step == 11 and not Path("middle.ckpt").exists():
            task.trainer.save_checkpoint("middle.ckpt")
        begin(task, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", save)
        assert main([*FIT, "--folder", "other"]) == 0
    assert main([*FIT, "--folder", "from-middle", "--ckpt_path", "middle.ckpt"]) == 0
    assert_same("whole", "from-middle")


def test_a_step_of_several_batches_is_not_cut_in_two():
    args = [*FIT, "--trainer.accumulate_grad_batches", "4", "--save_every", "1"]
    assert main([*args, "--folder", "whole"]) == 0
    one = torch.load("whole/checkpoints/last.ckpt")
    assert one["global_step"] == 2 * STEPS // 4
    batches = []

    def end():
        batches.append(0)
        if len(batches) == 2:  # of the second step
            os.kill(os.getpid(), signal.SIGTERM)

    with at(1, end):  # called after every batch until the second step is done
        assert main([*args, "--folder", "ended", "--ckpt_path", "last"]) == 143
    assert [path.name for path in Path("ended/checkpoints").iterdir()] == ["step-1.ckpt"]
    assert main([*args, "--folder", "ended", "--ckpt_path", "last"]) == 0
    other = torch.load("ended/checkpoints/last.ckpt")
    assert all(torch.equal(other["state_dict"][name], value) for name, value in one["state_dict"].items())


def test_a_fit_goes_on_behind_a_row_of_its_log_that_was_cut_off():
    with at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*FIT, "--folder", "run"]) == 143
    log = Path("run/metrics.csv")
    log.write_text(log.read_text().rstrip()[:-12])
    assert main([*FIT, "--folder", "run", "--ckpt_path", "last"]) == 0
    with log.open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["lr"]]
    assert steps[-1] == 2 * STEPS - 1


def test_checkpoints_are_in_the_folder_whatever_the_logger_and_all_is_measured_again():
    args = [*FIT, "--folder", "run", "--trainer.logger", "false", "--save_every", "4"]
    assert main(args) == 0
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {
        *("best.ckpt", "last.ckpt"),
        *(f"step-{step}.ckpt" for step in (4, 12)),  # not at the ends of epochs, where last.ckpt follows
    }
    assert main([*args, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert torch.load("run/checkpoints/last.ckpt")["global_step"] == 3 * STEPS


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["--data.batch_size", "71"], "`batch_size` must be at most 70, for 70 items to train on make no full"),
        (["--trainer.overfit_batches", "2"], "`trainer.overfit_batches` needs an order of its own; give"),
        (["--trainer.max_epochs", "-1"], "`trainer.max_epochs` or `trainer.max_steps` must end the fit"),
    ],
)
def test_mistakes_that_show_when_a_fit_begins_are_told(settings, told, capsys):
    assert main([*FIT, "--folder", "run", *settings]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_schedule_of_epochs_follows_steps_where_only_these_are_given():
    steps = ["--trainer.max_epochs", "null", "--trainer.max_steps", str(2 * STEPS)]
    for folder, settings in (("epochs", []), ("steps", steps)):
        args = [*FIT, "--folder", folder, "--model.schedule", "cosine_by_epoch", "--model.warmup", "1", *settings]
        assert main(args) == 0
    assert_same("epochs", "steps")


def test_only_the_newest_checkpoints_are_kept():
    assert main([*FIT, "--folder", "few", "--save_every", "2", "--keep", "2", "--trainer.max_epochs", "1"]) == 0
    assert {path.name for path in Path("few/checkpoints").glob("step-*")} == {"step-4.ckpt", "step-6.ckpt"}


def test_a_full_disk_stops_with_a_sentence_and_leaves_the_last_checkpoint_whole(capsys):
    def fill():
        Path("full/checkpoints/step-6.ckpt.part").symlink_to("/dev/full")

    with at(4, fill):
        assert main([*FIT, "--folder", "full", "--save_every", "3", "--trainer.max_epochs", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    told = "involution: full/checkpoints/step-6.ckpt cannot be written: No space left on device. What was complete is"
    assert line.startswith(told)
    assert torch.load("full/checkpoints/step-3.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_a_disk_that_really_is_full_stops_with_a_sentence_and_leaves_the_last_checkpoint_whole(capsys):
    disk = Path("disk")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs rights that are not there: {mounted.stderr.strip()}")
    try:
        assert main([*FIT, "--folder", "disk/run", "--save_every", "1", "--keep", "16"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "cannot be written: No space left on device. What was complete is untouched" in line
        saved = sorted(Path("disk/run/checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        steps = [torch.load(path, weights_only=True)["global_step"] for path in saved]
        assert steps == list(range(1, len(saved) + 1))  # all are whole
        for path in saved[:-1]:  # make room
            path.unlink()
        assert main([*FIT, "--folder", "disk/run", "--ckpt_path", "last", "--save_every", "99"]) == 0
        assert main([*FIT, "--folder", "whole"]) == 0
        assert_same("whole", "disk/run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_refused(capsys):
    Path("taken").write_text("a file")
    assert main([*FIT, "--folder", "taken/run"]) == 2
    assert "taken/run" in capsys.readouterr().err


# what tensorboard's own reader uses
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fit_also_logs_for_tensorboard_where_it_goes_on_too():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = [*FIT, "--folder", "run", "--tensorboard", "true", "--save_every", "3"]
    with at(11, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*args, "--ckpt_path", "last"]) == 143
    assert main([*args, "--ckpt_path", "last"]) == 0
    events = EventAccumulator("run/tensorboard").Reload()
    assert {"lr", "images/s", "train/loss", "validation/accuracy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lr")] == list(range(2 * STEPS))
    with Path("run/metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    assert [event.value for event in events.Scalars("lr")] == pytest.approx(rates)


@pytest.mark.parametrize("clip", [1e-6, 1e6])
def test_gradients_are_clipped_on_request(monkeypatch, clip):
    norms = []

    def look(task, optimizer):  # when the next step forgets them
        gradients = [weight.grad.flatten() for weight in task.net.parameters() if weight.grad is not None]
        norms.extend([torch.cat(gradients).norm().item()] if gradients else [])

    monkeypatch.setattr("involution.tasks.task.Task.on_before_zero_grad", look)
    assert main([*FIT, "--folder", "run", "--trainer.max_epochs", "1", "--trainer.gradient_clip_val", str(clip)]) == 0
    assert len(norms) >= STEPS - 1
    assert max(norms) <= 1.001 * clip
    assert min(norms) > min(0.9 * clip, 1e-3)


def test_a_loss_beyond_all_bounds_stops(monkeypatch, capsys):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, *_, **__: logits.sum() * 0 + 2e6)
    assert main([*FIT, "--folder", "run"]) == 2
    assert "involution: the loss is 2000000.0 at step 1, in epoch 1," in capsys.readouterr().err
