"""Latents a second: noise added on the device, in a batch that never left it, against noise added in a collate function.

    python bench/noise_on_device.py              # defaults: 8,192 small latents, 512 large ones, batch 128, 5 rounds
    python bench/noise_on_device.py --n 50000 --bs 256

Every way runs once in each round, in turns, so that a busy machine hurts all of them alike; the table has the median and
the best of the rounds. The last column adds a training step of a small convolutional net, to show how much of the gain is left
when there is a network to wait for. Same latents, same process (flow, velocity, logit-normal) and seed 0 in all of them.
"""
import argparse, platform, time
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from latentdiff.core import default_device
from latentdiff.noisify import Process
from latentdiff.training import DeviceLoader

PROCESS = Process()

def collate(rows):
    "Stack clean latents and add noise to the batch, on the CPU"
    return PROCESS.noisify(torch.stack([o[0] for o in rows]))

def on_device(z, bs, device):
    "The library's way: the batch is gathered on the device, and noise is added there"
    loader = DeviceLoader(z, bs=bs, shuffle=True, seed=0, device=device)
    gen = torch.Generator(device).manual_seed(0)
    def batches():
        for x0, in loader: yield PROCESS.noisify(x0, generator=gen)
    return batches

def in_collate(z, bs, device, workers=0):
    "The habit: samples collected one by one, noise in the collate function, noised batch and target moved to the device"
    loader = DataLoader(TensorDataset(z), bs, shuffle=True, collate_fn=collate, drop_last=True, num_workers=workers,
                        persistent_workers=workers > 0, pin_memory=device.type == 'cuda')
    def batches():
        for b in loader: yield [o.to(device, non_blocking=True) for o in b]
    return batches

def small_net(c, device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, c, 3, padding=1)).to(device)

def rate(batches, device, net=None):
    "Latents a second over one epoch, with a training step if a net is given"
    opt = net and torch.optim.SGD(net.parameters(), 1e-3)
    n, t0 = 0, time.perf_counter()
    for x_t, t, target in batches():
        n += len(x_t)
        if net:
            nn.functional.mse_loss(net(x_t), target).backward()
            opt.step(); opt.zero_grad()
    if device.type == 'cuda': torch.cuda.synchronize()
    return n/(time.perf_counter()-t0)

def measure(shape, n, bs, rounds, workers, device):
    "Rates (ways, rounds, 2): loader alone, and with a training step"
    z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    ways = {'on the device': on_device(z, bs, device), 'collate, 0 workers': in_collate(z, bs, device)}
    if workers: ways[f'collate, {workers} workers'] = in_collate(z, bs, device, workers)
    net = small_net(shape[0], device)
    for w in ways.values(): rate(w, device, net) # warm up, start workers
    out = np.array([[(rate(w, device), rate(w, device, net)) for w in ways.values()] for _ in range(rounds)])
    return list(ways), out.transpose(1, 0, 2)

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--n', type=int, default=8192, help='latents of 4x8x8; of 4x32x32 a sixteenth of it')
    ap.add_argument('--bs', type=int, default=128, help='batch size')
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--workers', type=int, default=2, help='worker processes of the third way; 0 leaves it out')
    a, device = ap.parse_args(), default_device()
    print(f'batch={a.bs} rounds={a.rounds} seed=0 device={device} threads={torch.get_num_threads()} '
          f'torch={torch.__version__} {platform.machine()}')
    for shape in ((4, 8, 8), (4, 32, 32)):
        n = max(a.n*64//shape[1]**2, 4*a.bs) # the same number of bytes at both sizes
        names, r = measure(shape, n, a.bs, a.rounds, a.workers, device)
        print(f'\n{n:,} latents {shape}: thousands a second, median (best), and how many times the slowest way of the median')
        print(f'{"":22}{"loader and noise":>26}{"with a training step":>28}')
        med, best = np.median(r, 1)/1e3, r.max(1)/1e3
        for i, name in enumerate(names):
            cols = [f'{med[i,j]:8.1f} ({best[i,j]:6.1f}) {med[i,j]/med[:,j].min():5.1f}x' for j in range(2)]
            print(f'{name:22}{cols[0]:>26}{cols[1]:>28}')

if __name__ == '__main__': main()
