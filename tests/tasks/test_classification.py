import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from timm.optim import param_groups_weight_decay as timm_groups
from torch import nn
from torch.distributed.fsdp.wrap import enable_wrap
from torch.utils.data import DataLoader

from involution.cli import main
from involution.tasks.classification import Classification
from involution.tasks.predict import Classes
from involution.tasks.report import Row, measure, table

SMALL = {"in_chans": 1, "num_classes": 10, "base_width": 16, "stem_width": 32}


def small(**settings):
    return Classification("rednet26", SMALL, **settings)


# Lightning's own use of torch; and one batch needs neither workers nor validation.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_one_batch_is_learned_by_heart(tmp_path):
    module = small(lr=3e-3, warmup=0.2, label_smoothing=0.0)
    batch = (torch.rand(10, 1, 32, 32), torch.arange(10))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=25,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, train_dataloaders=DataLoader([batch], batch_size=None))
    assert trainer.callback_metrics["train/accuracy"] == 1
    assert trainer.callback_metrics["train/loss"] < 0.1
    assert module.lr_schedulers().get_last_lr()[0] < 1e-6


def test_predicting_gives_probabilities():
    module, images = small().eval(), torch.rand(3, 1, 32, 32)
    found = module.predict_step((images, torch.zeros(3)), 0)
    assert found.shape == (3, 10)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert torch.equal(found.argmax(1), module(images).argmax(1))


def test_probabilities_that_are_no_numbers_are_refused_and_those_before_written(tmp_path):
    writer = Classes(tmp_path, list("abc"), ["one", "two"])
    writer.write_on_batch_end(None, None, torch.tensor([[0.25, 0.5, 0.25]]))
    with pytest.raises(ValueError, match=r"`ckpt_path` must hold .* for image two the likeliest class has nan\."):
        writer.write_on_batch_end(None, None, torch.full((1, 3), torch.nan))
    writer.on_exception(None, None, ValueError())
    (entry,) = json.loads((tmp_path / "predictions.json").read_text())
    assert (entry["image"], entry["classes"][0]) == ("one", {"class": "b", "probability": 0.5})


def test_the_mirror_has_the_widths_of_its_rednet_and_no_involution():
    options = SMALL | {"group_channels": 8, "reduction": 2}
    rednet, resnet = (Classification("rednet26", options, mirror=mirror) for mirror in (False, True))
    assert (rednet.name, resnet.name) == ("rednet26", "resnet26 (mirror)")
    assert rednet.net.num_features == resnet.net.num_features == 512
    assert not any("generator" in name for name, _ in resnet.named_parameters())


@pytest.mark.parametrize("mirror", [False, True])
def test_recomputing_changes_memory_and_nothing_else(mirror):
    kept, gradients = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        module = small(mirror=mirror, recompute=recompute).train()
        images, sizes = torch.rand(4, 1, 32, 32), {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(images).square().sum()
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert kept[1] < 0.8 * kept[0]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_weights_that_are_shared_out_keep_their_decay():
    """FSDP leaves of each weight a row of numbers, and puts itself into the names."""
    module = small(weight_decay=0.1)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, max_epochs=1)
    wanted = [
        (group["weight_decay"], sum(p.numel() for p in group["params"])) for group in timm_groups(module.net, 0.1)
    ]
    for part in [part for part in module.net.modules() if not list(part.children())]:
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(weight.detach().flatten()))
    module.net.layer1 = nn.ModuleDict({"_fsdp_wrapped_module": module.net.layer1})
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [(group["weight_decay"], sum(p.numel() for p in group["params"])) for group in groups] == wanted
    assert wanted[0][0] == 0
    assert wanted[1][1] > 10 * wanted[0][1] > 0


def test_parts_of_a_network_are_shared_out_one_by_one():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    module = small()
    module.configure_model()
    assert not any(isinstance(part, Wrapper) for part in module.modules())
    with enable_wrap(wrapper_cls=Wrapper):
        module.configure_model()
    wrapped = [name for name, part in module.net.named_children() if isinstance(part, Wrapper)]
    assert wrapped == ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]


def test_a_network_that_cannot_recompute_is_refused():
    with pytest.raises(ValueError, match="`recompute` must be false for shallow, which does not offer it"):
        Classification("shallow", {"num_classes": 2}, recompute=True)


def test_any_network_of_timm_can_be_trained():
    module = Classification("resnet10t", {"num_classes": 3}).eval()
    assert module(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_only_a_rednet_has_a_mirror():
    with pytest.raises(ValueError, match="only a RedNet has a `mirror`; got `arch` 'resnet50'"):
        Classification("resnet50", mirror=True)


def test_an_unknown_network_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown network 'rednet27'; did you mean 'rednet\d+'\?"):
        Classification("rednet27")


@pytest.mark.parametrize("mirror", [False, True])
def test_an_unknown_option_is_named_with_the_nearest(mirror):
    with pytest.raises(ValueError, match=r"unknown option of rednet26 'base_widht'; did you mean 'base_width'\?"):
        Classification("rednet26", {"base_widht": 16}, mirror=mirror)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"warmup": -0.1}, "`warmup` must be at least 0; got -0.1"),
        ({"warmup_from": 2.0}, "`warmup_from` must be a share of `lr`, from 0 to 1; got 2"),
        ({"floor": -1.0}, "`floor` must be a share of `lr`, from 0 to 1; got -1"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"optimizer": "adamww"}, "`optimizer`: unknown optimizer 'adamww'; did you mean 'adamw"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(setting, told):
    with pytest.raises(ValueError, match=told):
        small(**setting)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"mirror": True}, r"\d+ of \d+ entries missing \(net\.stem\..*\); \d+ unknown \(net\.conv1\..*\)"),
        ({"options": SMALL | {"base_width": 32}}, r"\d+ of another shape \(net\..*, \.\.\.\)"),
    ],
)
def test_the_checkpoint_of_another_network_is_refused(other, told):
    theirs = Classification(**({"arch": "rednet26", "options": SMALL} | other)).state_dict()
    with pytest.raises(ValueError, match=rf"belongs to another network than rednet26 .*: {told}"):
        small().on_load_checkpoint({"state_dict": theirs})


def test_own_checkpoint_is_welcome():
    small().on_load_checkpoint({"state_dict": small().state_dict()})


def test_measured_cost_of_a_known_layer():
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    (row,) = measure({"layer": layer}, [{"accuracy": 0.5}], torch.rand(64, 2, 4, 4))
    assert (row.parameters, row.macs, row.batch, row.measures) == (54, 54 * 16, 64, {"accuracy": 0.5})
    assert 0 < row.in_batch < row.latency
    (row,) = measure({"layer": layer}, [{}], torch.rand(1, 2, 4, 4))
    assert (row.batch, row.in_batch) == (1, row.latency)


def test_the_table_has_a_row_for_each_network():
    rows = [
        Row("a", 1_500_000, 2_000_000, 3.0, 0.25, 8, {"accuracy": 0.975}),
        Row("longer", 10, 20, 30.0, 1.0, 8, {"accuracy": 1.0}),
    ]
    assert table(rows, [0.5, 12.0]).splitlines() == [
        "| model  | parameters | MACs / image |  latency | in batches of 8 |   fit | test accuracy |",
        "|--------|-----------:|-------------:|---------:|----------------:|------:|--------------:|",
        "| a      |     1.50 M |       2.00 M |  3.00 ms |         0.25 ms |  30 s |         97.5% |",
        "| longer |     0.00 M |       0.00 M | 30.00 ms |         1.00 ms | 720 s |        100.0% |",
    ]


def test_a_run_that_diverges_stops_with_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net = ["--model.options.base_width", "16", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    assert main(["fit", *small_net, "--model.lr", "1e38", "--model.warmup", "0", "--model.optimizer", "sgd"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"involution: the loss is (nan|inf) at step \d, in epoch 1, at the learning rate [\d.]+e\+3\d. As the authors "
        r"advise, clip gradients \(`--trainer.gradient_clip_val 5`\) or lower `--model.lr`.",
        line,
    )


def test_a_fit_tells_its_pace_and_draws_its_curves(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    small_net = ["--model.options.base_width", "16", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    settings = ["--data.size", "16", "--data.batch_size", "128", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *small_net, *settings, "--trainer.log_every_n_steps", "1", "--folder", "run"]) == 0
    told = capsys.readouterr().out
    assert not caplog.messages  # Lightning has nothing to remark
    assert "learning curves  run/curves.png" in told
    assert Path("run/curves.png").stat().st_size > 5000
    with Path("run/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["images/s"]]
    assert len(rows) == 1100 // 128
    assert all(1 < float(row["images/s"]) < 1e6 and 0 < float(row["waiting"]) < 1 for row in rows)
