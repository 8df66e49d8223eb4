"""Training on two processes, and processes that are killed."""

import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks.py")
FIT = [
    *("fit", "--model.options.base_width", "16", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    *("--save_every", "3"),
]
STEPS = 16


def torchrun(script, ranks, *words, restarts=0, **environment):
    """Run a script in so many processes; what they print."""
    # the rendezvous of `--standalone` hangs when torch 2.14 starts processes again
    meeting = ["--rdzv-backend", "static", "--master-port", str(free_port()), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *meeting, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def fit(folder, ranks, *settings, batch=128, **how):
    """Run a fit on so many processes, with batches of so many images together."""
    words = [*FIT, "--folder", folder, "--data.batch_size", str(batch // ranks), "--trainer.devices", str(ranks)]
    torchrun(SCRIPT, ranks, *words, *settings, *(("--trainer.strategy", "ddp") if ranks > 1 else ()), **how)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def weights(folder):
    checkpoint = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint["state_dict"]


def measures(folder):
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("validation/loss")]
    return [(float(row["validation/loss"]), float(row["validation/accuracy"])) for row in rows]


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_twice_as_large():
    fit("one", 1, "--trainer.precision", "64-true")
    fit("two", 2, "--trainer.precision", "64-true")
    one, two = weights("one"), weights("two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    torch.testing.assert_close(torch.tensor(measures("two")), torch.tensor(measures("one")), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_processes_may_measure_different_numbers_of_batches():
    """There are 197 images: one process measures 98 and 1 of them, the other 98."""
    short = ["--trainer.precision", "64-true", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    for folder, ranks in (("one", 1), ("two", 2)):
        fit(folder, ranks, *short, batch=98)
    assert len(measures("two")) == 1
    torch.testing.assert_close(torch.tensor(measures("two")), torch.tensor(measures("one")), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning's FSDP strategy needs GPUs")
def test_lightnings_fsdp_trains_to_the_same_losses_on_gpus():
    ranks = torch.cuda.device_count()
    for folder, count, strategy in (("whole", 1, "auto"), ("shared", ranks, "fsdp")):
        words = [*FIT, "--folder", folder, "--data.batch_size", str(128 // count), "--trainer.devices", str(count)]
        torchrun(SCRIPT, count, *words, "--trainer.accelerator", "gpu", "--trainer.strategy", strategy)
    torch.testing.assert_close(torch.tensor(measures("shared")), torch.tensor(measures("whole")), rtol=1e-2, atol=2e-2)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_training_ends_as_if_nothing_had_happened():
    fit("whole", 2)
    fit("killed-later", 2, "--ckpt_path", "last", restarts=2, KILL="1:11")
    assert Path("killed").exists()
    whole, killed = weights("whole"), weights("killed-later")
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing():
    draw = random.Random(0)
    command = [
        sys.executable,
        str(SCRIPT),
        *FIT,
        "--data.batch_size",
        "128",
        "--ckpt_path",
        "last",
        "--save_every",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        out = subprocess.PIPE
        return subprocess.Popen([*command, "--folder", folder], env=environment, stdout=out, stderr=out, text=True)

    begin = time.monotonic()
    whole = start("whole")
    out, err = whole.communicate()
    assert whole.returncode == 0, out + err
    length = time.monotonic() - begin
    for _ in range(20):
        process = start("killed")
        try:
            process.communicate(timeout=draw.uniform(0.3, 1) * length)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        for path in Path("killed/checkpoints").glob("*.ckpt"):
            torch.load(path, weights_only=True)  # each is whole
    last = start("killed")
    out, err = last.communicate()
    assert last.returncode == 0, out + err
    one, other = weights("whole"), weights("killed")
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


@pytest.mark.slow
def test_weights_shared_out_over_two_processes_train_to_the_same_losses():
    one, two = (
        [float(line.split()[1]) for line in torchrun(SCRIPT.with_name("sharded.py"), ranks).splitlines()]
        for ranks in (1, 2)
    )
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-9)
    assert one[-1] < one[0]
