"""A training step of our U-Net against diffusers' `UNet2DModel`, the same network with the same weights, in turns.

    python bench/unet_step.py                       # widths (32,64,64,128) on latents 4x32x32, batch 32
    python bench/unet_step.py --widths 64 96 --size 8 --channels 6 --depth 1

Forward, loss, backward; no optimizer. Prints the best and the median of the rounds, in milliseconds, and their ratio.
"""
import argparse, time
import torch, torch.nn.functional as F
from diffusers import UNet2DModel
from latentdiff.core import default_device
from latentdiff.unet import AnyUNet2D, UNet, unet2d_args

def seconds(net, z, t):
    "One step"
    start = time.perf_counter()
    F.mse_loss(net(z, t), z).backward()
    if z.is_cuda: torch.cuda.synchronize()
    for p in net.parameters(): p.grad = None
    return time.perf_counter() - start

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--widths', type=int, nargs='+', default=[32, 64, 64, 128])
    p.add_argument('--depth', type=int, default=2)
    p.add_argument('--channels', type=int, default=4)
    p.add_argument('--size', type=int, default=32)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--rounds', type=int, default=8)
    a = p.parse_args()
    args, device = dict(in_channels=a.channels, widths=tuple(a.widths), depth=a.depth), default_device()
    theirs, ours = AnyUNet2D(UNet2DModel(**unet2d_args(**args))).to(device), UNet(**args)
    ours.load_state_dict(theirs.state_dict())
    nets = {'diffusers': theirs, 'ours': ours.to(device, memory_format=torch.channels_last)}   # as `denoiser_learner` does
    z, t = torch.randn(a.bs, a.channels, a.size, a.size, device=device), torch.randint(1000, (a.bs,), device=device).float()
    times = {k: [] for k in nets}
    for i in range(a.rounds + 2):
        for k, net in nets.items(): times[k].append(seconds(net, z, t))
    best = {k: min(v[2:]) for k, v in times.items()}
    for k, v in times.items(): print(f'{k:11} {1e3*best[k]:7.1f} ms, median {1e3*sorted(v[2:])[a.rounds//2]:7.1f}, {a.bs/best[k]:6.1f} images a second')
    print(f"ours is {best['diffusers']/best['ours']:.2f} times as fast, {torch.get_num_threads()} threads, {device}")

if __name__ == '__main__': main()
