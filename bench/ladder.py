"""The recipe, one change at a time: each rung gets the same seconds, turned once into steps by a measurement on this machine.

    python bench/ladder.py autoencoder --data rooms --seconds 50
    python bench/ladder.py denoiser --data rooms --seconds 100 --seeds 0 1 2 --rungs 'as it is' adamw

Autoencoders are compared by PSNR and by the KID of their reconstructions of the held-out pictures, denoisers (all on the latents
of one autoencoder, which a run folder keeps) by their validation loss and the KID of their samples. Nothing else should run on the
machine; two rungs at once would only measure each other.
"""
import argparse
from dataclasses import replace
from functools import partial
import torch
from latentdiff.autoencoder import KLAutoencoder, batches_for, quality, some_pixels, train_autoencoder
from latentdiff.commands import GOALS, Run, preset_of, settings_of
from latentdiff.core import run_folder
from latentdiff.data import to_uint8
from latentdiff.kid_eval import features, kid
from latentdiff.noisify import Process
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training import adamw
from latentdiff.unet import train_denoiser, unet_for

adam = partial(adamw, weight_decay=.01)

# name: what differs from the preset (fields of `Preset`), and from the trainer's defaults
AUTOENCODERS = {
    'as it is': ({}, {}),
    'adamw': ({}, dict(opt_func=adam)),
    '4 latent channels': (dict(latent_channels=4), {}),
    'a fifth of the KL term': ({}, dict(kl_weight=1e-3)),
    'feature loss': ({}, dict(feature_weight=.1)),
    'twice as wide': (dict(ae_widths=(64, 128)), {})}
DENOISERS = {
    'as it is': ({}, {}),
    'adamw': ({}, dict(opt_func=adam)),
    'batch 64': (dict(bs=64), {}),
    'rate halved': ({}, dict(rate=.5)),
    'x0 as target': ({}, dict(process=Process('flow', 'x0', 'logit_normal'))),
    'even levels': ({}, dict(process=Process('flow', 'velocity', 'uniform'))),
    'wider below': (dict(widths=(64, 128)), {})}

def autoencoder(run, p, minutes, seed, **kw):
    "Train one -> (its Learner, PSNR in dB, (KID of reconstructions, its error))"
    x, valid = (some_pixels(run.images, o, seed) for o in ('train', 'valid'))
    torch.manual_seed(seed)
    ae = KLAutoencoder(run.images.channels, p.ae_widths, p.ae_patch, 1, p.latent_channels)
    kw = dict(lr=p.ae_lr, kl_weight=p.ae_kl, seed=seed, bs=p.bs, flip=run.images.channels == 3) | kw
    learn = train_autoencoder(ae, x, valid, minutes=minutes, **kw)
    with torch.no_grad(): y = torch.cat([ae.decode(ae.encode(b)).cpu() for b in batches_for(ae, valid)])
    return learn, quality(ae, valid)['psnr'], kid(features(run.judge, to_uint8(y)), run.real_features)

def denoiser(run, p, minutes, seed, process=Process('flow', 'velocity', 'logit_normal'), rate=1., **kw):
    "Train one -> (its Learner, validation loss, (KID of samples, its error))"
    torch.manual_seed(seed)
    z, valid = (run.latents.tensor(o) for o in ('train', 'valid'))
    net = unet_for(z.shape[1:], p)
    learn = train_denoiser(net, process, z, valid, minutes=minutes, bs=p.bs, lr=p.lr*rate, seed=seed, **kw)
    pipe = LatentDiffusionPipeline(run.autoencoder, net.eval(), process, p.size)
    px = pipe.pixels(p.n_eval, **run.sampling, seed=seed, bs=p.bs)
    return learn, learn.history['rows'][-1][2], kid(features(run.judge, px), run.real_features)

def options():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('part', choices=('autoencoder', 'denoiser'))
    a.add_argument('--data', default='rooms', help='as for latentdiff-run')
    a.add_argument('--preset', default='cpu')
    a.add_argument('--seconds', type=float, default=60, help='of training for each rung')
    a.add_argument('--seeds', type=int, nargs='+', default=[0])
    a.add_argument('--rungs', nargs='+', help='some of them, by name; all if left out')
    a.add_argument('--out', help='run folder with the autoencoder and the latents; made if there is none')
    return a.parse_args()

def main():
    a = options()
    table, measure = (AUTOENCODERS, autoencoder) if a.part == 'autoencoder' else (DENOISERS, denoiser)
    settings = settings_of(a.data, a.preset)
    run = Run(a.out or run_folder(preset_of(settings)), settings)
    if a.part == 'denoiser': run.go(GOALS[:3])
    value = 'PSNR' if a.part == 'autoencoder' else 'validation loss'
    rows = [f'| {a.part}, {a.seconds:g} s on {run.device} | seed | steps | {value} | KID |', '|---|---|---|---|---|']
    for name in a.rungs or table:
        change, kw = table[name]
        for seed in a.seeds:
            learn, x, (k, se) = measure(run, replace(run.p, **change), a.seconds/60, seed, **kw)
            rows.append(f"| {name} | {seed} | {learn.history['rows'][-1][0]:,} | {x:.4g} | {k:.3f} ± {se:.3f} |")
            print(rows[-1], flush=True)
    print('\n'.join(['', *rows]))

if __name__ == '__main__': main()
