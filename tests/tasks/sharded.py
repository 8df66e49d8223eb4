"""Run by torchrun: a few steps of a RedNet whose weights are shared out over the processes; prints their losses."""

import timm
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(norm):
    nn.BatchNorm2d = norm
    import involution.models  # noqa: F401  registers the networks

    distributed.init_process_group("gloo")
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    torch.manual_seed(0)
    net = timm.create_model("rednet26", num_classes=5, base_width=16, stem_width=32).double()
    whole = sum(p.numel() for p in net.parameters())
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (net.layer1, net.layer2, net.layer3, net.layer4, net):
            fully_shard(part, mesh=mesh)
        own = sum(p.to_local().numel() for p in net.parameters())
        assert abs(own / whole - 1 / ranks) < 0.1, (own, whole)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    images, classes = torch.randn(8, 3, 33, 47, dtype=torch.float64), torch.randint(5, (8,))
    for _ in range(4):
        loss = F.cross_entropy(net(images[rank::ranks]), classes[rank::ranks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        if rank == 0:
            print("loss", float(mean) / ranks, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    from ranks import SyncNorm

    main(SyncNorm)
