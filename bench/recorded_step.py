"""Training steps a second of `train_denoiser`: recorded once and replayed, as it does on CUDA, against started anew by Python at each step.

    python bench/recorded_step.py                                            # widths (32,64,64,128) on latents 4x32x32, batch 32
    python bench/recorded_step.py --widths 64 128 --size 16 --bs 256

Everything of a step counts: order, noise, loss, clipping, Muon, average. On a CPU nothing is recorded, and the ratio is that of two equal trainings.
"""
import argparse, time
from unittest.mock import patch
import torch
from fastai.callback.core import Callback, CancelFitException
from latentdiff import muon, training
from latentdiff.core import default_device
from latentdiff.noisify import Process
from latentdiff.unet import UNet, train_denoiser

class Clock(Callback):
    "Steps a second after the first twenty"
    run_valid = False
    def __init__(self, seconds): self.seconds, self.k = seconds, 0
    def after_batch(self):
        self.k += 1
        if self.k % 20: return
        if torch.cuda.is_available(): torch.cuda.synchronize()
        if self.k == 20: self.start = time.monotonic()
        spent = time.monotonic() - self.start
        if spent < self.seconds: return
        self.rate = (self.k - 20)/spent
        raise CancelFitException

def rate(net, z, bs, seconds):
    "Of one training"
    clock = Clock(seconds)
    train_denoiser(net, Process(), z, z[:bs], steps=10**6, bs=bs, rounds=1, cbs=[clock])
    return clock.rate

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--widths', type=int, nargs='+', default=[32, 64, 64, 128])
    p.add_argument('--depth', type=int, default=2)
    p.add_argument('--channels', type=int, default=4)
    p.add_argument('--size', type=int, default=32)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--seconds', type=float, default=5, help='a training')
    a = p.parse_args()
    z = torch.randn(8*a.bs, a.channels, a.size, a.size)
    new = lambda: UNet(a.channels, widths=tuple(a.widths), depth=a.depth)
    recorded = rate(new(), z, a.bs, a.seconds)
    with patch.object(training.Graphed, 'before_batch', lambda self: None), patch.object(training.Muon, 'moves_for', lambda *_: muon.moves):
        plain = rate(new(), z, a.bs, a.seconds)
    print(f'{recorded:.1f} steps of {a.bs} a second, {plain:.1f} without recording: {recorded/plain:.2f} times as many, on '
          f'{torch.cuda.get_device_name() if torch.cuda.is_available() else default_device()}')

if __name__ == '__main__': main()
