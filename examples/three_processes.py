"""Three plain processes on one machine train one model together; no Ray. Run: python examples/three_processes.py"""

import multiprocessing as mp

import torch

import elastic


def work(address: str, rank: int) -> None:
    torch.manual_seed(rank)  # every peer begins elsewhere: the first one's parameters become everybody's
    model = torch.nn.Linear(8, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.02)
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))

    with elastic.Peer(address, run="three", name=f"peer-{rank}") as peer:
        peer.wait_for(n=3)
        mean = peer.all_reduce(torch.tensor([float(rank)]), op="mean").tensor  # (0 + 1 + 2) / 3
        with elastic.DiLoCo(model, inner, peer, sync_every=10) as outer:
            for features, target in peer.shards(data, batch_size=32):
                loss = torch.nn.functional.mse_loss(model(features), target)
                loss.backward()
                inner.step()
                inner.zero_grad()
        error = (model.weight - 1).abs().max().item()
        state = outer.version.state_hash[:8]
        print(f"{peer.name}: mean of ranks {mean.item()}, largest weight error {error:.4f}, outer state {state}")


if __name__ == "__main__":
    with elastic.Coordinator(run="three", policy=elastic.RunPolicy(min_peers=3, rounds=12)) as coordinator:
        processes = [mp.get_context("spawn").Process(target=work, args=(coordinator.address, i)) for i in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
