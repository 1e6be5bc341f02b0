"""Train `bedrooms256`, which draws in Stable Diffusion's latents, score it, and pack it into latentdiff/zoo:

    python scripts/zoo256.py --part autoencoder
    python scripts/zoo256.py --part denoiser
    python scripts/zoo256.py --part pack

The first two are independent and may run side by side. They train for longer and longer, pack each result in float16
as soon as it is better than the last, and go on where they were stopped. All three read, in the data folder,
`lsun_bedroom/sd_latents_u8.npz`, 9,000 latents in the order of their names, and the pictures of its first 3,500,
`lsun_bedroom/bedroom/**/<name>.jpg`.
"""
import argparse, random, time
import numpy as np, torch, torch.nn.functional as F
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from PIL import Image
from torch import nn
from fastai.basics import Callback, DataLoaders, Learner
from fastai.callback.training import GradientClip
from latentdiff.autoencoder import Adversary, AELoss, KLAutoencoder, ValidMetric, PSNR, channel_stats, psnr
from latentdiff.core import UserError, artefact, data_home, default_device, file_md5, fingerprint, load_component
from latentdiff.core import made, read_json, runs_home, save_component, stream, write_json, write_whole
from latentdiff.data import as_images, from_uint8, image_grid, to_uint8
from latentdiff.kid_eval import EfficientNetFeatures, evaluate, features, kid, nearest_neighbours
from latentdiff.noisify import Process, save_process
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training import Checkpoint, DeviceLoader, adamw, fit_steps, muon
from latentdiff.unet import UNet, train_denoiser
from zoo import HERE, machine

NAME, PROCESS = 'bedrooms256', Process('flow', 'velocity', 'logit_normal')

@dataclass(frozen=True)
class Settings:
    size: int = 256           # pixels a side
    held: int = 1000          # latents, the last by name, that nothing is trained on
    pairs_held: int = 200     # of the pairs of a latent and a picture, the last by name, kept for PSNR
    widths: tuple = (64,64,96) # of the autoencoder; 3.5 MB in float16
    depth: int = 2
    ae_steps: int = 5000      # of both halves on the pairs
    ae_bs: int = 32           # of them, each a part of the picture:
    places: int = 16          # positions a side, an eighth of the pixels
    ae_lr: float = 3e-3
    sharpen: tuple = (800, 8000) # of the decoder against a discriminator, from the same start: at first, at most
    sharpen_bs: int = 8       # whole pictures
    unet: tuple = (96,96,96)  # 8.1 MB in float16; much arithmetic for so few numbers
    steps: tuple = (4000, 40_000) # of the denoiser: at first, at most
    bs: int = 128
    lr: float = 2e-3
    mirror: bool = True       # also train on mirrored latents, since 8,000 are few, and each is seen hundreds of times.
                              # They are not the latents of mirrored pictures, but may stand for them: the decoder is
                              # taught to draw a mirrored picture from one. (Stable Diffusion's draws it slightly off)
    n: int = 300              # samples behind KID and FID
    n_real: int = 1000        # held-out latents that they are compared with
    sample_steps: int = 20

class Data:
    "Raw latents (n,4,32,32) in the order of their names, and the pictures, uint8, of the first of them"
    def __init__(self, s): # `Settings`
        file = data_home()/'lsun_bedroom'/'sd_latents_u8.npz'
        if not file.is_file(): raise UserError(f'{file} is missing: encode 9,000 bedrooms, or set LATENTDIFF_DATA')
        d, self.md5 = np.load(file), file_md5(file)
        self.raw = torch.from_numpy(d['q'].astype('float32')*d['step'] + d['low'])
        self.names, self.folder = d['names'].tolist(), file.parent/'bedroom'
        self.size, self.held, self.pairs_held = s.size, s.held, s.pairs_held
        mean, std = channel_stats(self.raw[:-s.held].split(1000))
        self.mean, self.std = (o.float().view(4, 1, 1) for o in (mean, std))
        self.z = (self.raw - self.mean)/self.std # within 7 standard deviations: the file's bytes reach no further

    def split(self, x): return x[:-self.held], x[-self.held:] # to train on; held out

    def pictures(self):
        "uint8 (n,3,size,size): each whole picture squashed to a square, as it was before it became a latent"
        paths = {o.stem: o for o in self.folder.rglob('*.*')}
        here = [paths[o] for o in takewhile(paths.__contains__, self.names)]
        if len(here) <= self.pairs_held: raise UserError(f'only {len(here)} of the pictures are in {self.folder}')
        with ThreadPoolExecutor(8) as pool: x = np.stack(list(pool.map(partial(squashed, size=self.size), here)))
        return torch.from_numpy(x).movedim(-1, 1)

    def pairs(self):
        "Raw latents and pictures, to train on and held out: (z, x), (z, x)"
        x = self.pictures()
        z = self.raw[:len(x)]
        return (z[:-self.pairs_held], x[:-self.pairs_held]), (z[-self.pairs_held:], x[-self.pairs_held:])

def squashed(path, size):
    "A picture as uint8 (size,size,3)"
    with Image.open(path) as im:
        return np.array(im.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))

# ---- longer and longer ----

def next_steps(steps, most, times,  # of the last training; at most; how many times as many now
               again, secs, left):  # share of the last to do again; seconds a step; seconds left
    "How long to train next, or what the time allows; None if that is not much more"
    fits = min(most, (1 - again)*steps + .9*left/secs)
    if fits < 1.3*steps: return None
    return int(times*steps if fits > 1.5*times*steps else fits)

def longer(train,          # train(steps) -> an artefact
           first, most, times, # steps: at first, at most; how many times as many the next time
           again, until,   # as in `next_steps`; the time at which it shall be over
           keep):          # called with each artefact -> is it better than the one before?
    "Train for `first` steps, then for more, each time with a rate that ends at zero, while it helps and there is time"
    steps, before = first, 0
    while steps:
        note = made(path := train(steps))
        secs = note['seconds']/(steps - (1 - again)*before)
        print(f'{path.name}: {1e3*secs:.0f} ms a step, {note["facts"]}', flush=True)
        if not keep(path): break
        before, steps = steps, next_steps(steps, most, times, again, secs, until - time.monotonic())

def packed(path, place, **more): # an artefact; a folder of the pipeline; what else the card shall know
    "Save it in half precision; what the card says of it"
    net = load_component(path).half()
    save_component(net, place)
    note, params = made(path), sum(o.numel() for o in net.parameters())/1e6
    return dict(params=params, machine=machine(), seconds=note['seconds'], **note['settings'], **note['facts'], **more)

# ---- the autoencoder ----

class Pairs(DeviceLoader):
    "Raw latents and their pictures, float; the same part of all, at another place each step; mirrored every other time"
    def __init__(self, z, x, places=None, mirror=False, **kw): # raw latents; uint8; positions a side, None: all
        self.places, self.mirror = places, mirror
        super().__init__(z, x, **kw)

    def batch(self, k):
        (z, x), rng = super().batch(k), random.Random(stream(self.seed, 'part', k))
        if self.places:
            n = self.places
            i, j = (rng.randrange(z.shape[-1] - n + 1) for _ in range(2))
            cut = lambda o, f: o[:, :, f*i:f*(i + n), f*j:f*(j + n)]
            z, x = cut(z, 1), cut(x, x.shape[-1]//z.shape[-1])
        if self.mirror and rng.random() < .5: z, x = z.flip(-1), x.flip(-1)
        return z.contiguous(), as_images(x)

def pair_loaders(train, valid, bs, seed, **kw):
    "Both `Pairs` as a fastai DataLoaders"
    dls = Pairs(*train, bs=bs, shuffle=True, seed=seed, **kw), Pairs(*valid, bs=min(bs, 16), seed=seed)
    return DataLoaders(*dls, device=default_device())

def least_squares(a, b): # (n,c,h,w), (n,d,h,w)
    "The matrix (d,c) and the bias (d,) that take the numbers at each place of `a` to those of `b`, nearly"
    a, b = (o.movedim(1, -1).flatten(0, 2) for o in (a, b))
    a = torch.cat([a, torch.ones(len(a), 1)], 1)
    w = torch.linalg.lstsq(a, b, driver='gelsd').solution # the default, gelsy, finds a random rank in older torch: pytorch issue 187411
    return w[:-1].T, w[-1]

@torch.no_grad()
def linear_start(ae, z, x): # a `KLAutoencoder`; raw latents; uint8 pictures
    "Set both straight lines to the best that there are, and how pictures are measured to that of `z`"
    f, c = ae.factor, x.shape[1]
    patches = F.pixel_unshuffle(from_uint8(x), f)
    for line, (w, b) in zip((ae.line_in, ae.line_out), (least_squares(patches, z), least_squares(z, patches))):
        line.weight.copy_((w if line is ae.line_in else w.T).view(line.weight.shape))
        line.bias.copy_(b if line is ae.line_in else b.view(c, -1).mean(1))
    return ae

class Halves(nn.Module):
    "Decoder and encoder of a `KLAutoencoder`, each told what it shall learn from"
    def __init__(self, ae):
        super().__init__()
        self.ae = ae
    def forward(self, z, x): return self.ae.decode_raw(z), self.ae.encode_raw(x)[0]

class BothWays(Callback):
    "Latents and pictures are input and target, crosswise"
    def before_batch(self):
        (z,), (x,) = self.xb, self.yb
        self.learn.xb, self.learn.yb = (z, x), (x, z)

def halves_loss(std): # of each raw channel
    "Smoothed L1 of the pixels, and of the latents in standard deviations"
    return lambda pred, x, z: F.smooth_l1_loss(pred[0], x, beta=.1) + F.smooth_l1_loss(pred[1]/std, z/std, beta=.1)

def make_halves(folder, data, s, seed):
    "The artefact of an autoencoder whose latents are those of the file: both halves learned from pairs"
    settings = dict(widths=s.widths, depth=s.depth, ae_steps=s.ae_steps, ae_bs=s.ae_bs, places=s.places, ae_lr=s.ae_lr,
                    seed=seed)
    parents, device = dict(latents=data.md5), default_device()
    checkpoint = Checkpoint(folder/'checkpoints', fingerprint(**settings, **parents))
    def make(out):
        train, valid = data.pairs()
        torch.manual_seed(stream(seed, 'autoencoder'))
        ae = linear_start(KLAutoencoder(3, s.widths, 2, s.depth, 4), *(o[:300] for o in train))
        dls = pair_loaders(train, valid, s.ae_bs, seed, places=s.places)
        net, loss = Halves(ae).to(device, memory_format=torch.channels_last), halves_loss(data.std.to(device))
        learn = Learner(dls, net, loss, opt_func=muon, metrics=ValidMetric(PSNR), cbs=[BothWays(), GradientClip(1.)])
        fit_steps(learn, s.ae_steps, lr=s.ae_lr, seed=seed, rounds=5, checkpoint=checkpoint)
        ae.to(memory_format=torch.contiguous_format).set_scale(data.mean.flatten(), data.std.flatten())
        save_component(ae, out)
        loss, ae_psnr = learn.history['rows'][-1][2:4]
        return dict(n_pairs=len(train[0]), loss=loss, ae_psnr=ae_psnr)
    return artefact(folder/'halves', make, parents, settings)

class FromLatents(nn.Module):
    "The decoding half of a `KLAutoencoder`, in the form that `AELoss` and `Adversary` know"
    def __init__(self, ae):
        super().__init__()
        self.decoder, self.line_out, self.config = ae.decoder, ae.line_out, ae.config
    def forward(self, z): return self.line_out(z) + self.decoder(z), None, None

def sharpen(folder, start, s, seed, pairs, steps): # the artefact of the halves; as `Data.pairs` gives them
    "The artefact of the autoencoder with a decoder that was taught as `sharpen_decoder` does it"
    def make(out):
        ae, device = load_component(start), default_device()
        net = FromLatents(ae).to(device, memory_format=torch.channels_last).requires_grad_(True)
        learn = Learner(pair_loaders(*pairs, s.sharpen_bs, seed, mirror=s.mirror), net, AELoss(0., .2, device),
                        opt_func=adamw, metrics=ValidMetric(PSNR),
                        cbs=[GradientClip(1.), Adversary(steps//4, .3, 2e-4, seed, 32)])
        fit_steps(learn, steps, lr=1e-3, seed=seed, rounds=2)
        save_component(ae.to(memory_format=torch.contiguous_format), out)
        loss, sharp_psnr = learn.history['rows'][-1][2:4]
        return dict(made(start)['facts'], sharp_loss=loss, sharp_psnr=sharp_psnr, halves=made(start)['seconds'])
    settings = dict(made(start)['settings'], sharpen=steps, sharpen_bs=s.sharpen_bs, mirror=s.mirror, seed=seed)
    return artefact(folder/f'sharpened-{steps}', make, dict(halves=made(start)['fingerprint']), settings)

def make_autoencoder(folder, data, s, seed, until, place, results):
    "Halves, then sharpened for as long as there is time; the best so far is packed"
    start = make_halves(folder, data, s, seed)
    def keep(path):
        write_json(results/'autoencoder.json', packed(path, place/'autoencoder'), 1)
        return True # the longer a discriminator has looked, the better
    keep(start)
    pairs, (first, most) = data.pairs(), s.sharpen
    longer(partial(sharpen, folder, start, s, seed, pairs), first, most, 10, 1., until, keep)

# ---- the denoiser ----

def make_unet(folder, data, s, seed, steps):
    "The artefact of a denoiser after so many steps; it goes on from where the rate of a shorter training began to fall"
    settings = dict(unet=s.unet, bs=s.bs, lr=s.lr, mirror=s.mirror, seed=seed)
    parents = dict(latents=data.md5)
    checkpoint = Checkpoint(folder/'checkpoints', fingerprint(**settings, **parents))
    def make(out):
        torch.manual_seed(stream(seed, 'unet'))
        net = UNet(4, widths=s.unet, depth=1, attn_levels=(1, 2))
        learn = train_denoiser(net, PROCESS, *data.split(data.z), steps=steps, lr=s.lr, seed=seed,
                               checkpoint=checkpoint, bs=s.bs, flip=s.mirror)
        save_component(net.to(memory_format=torch.contiguous_format), out)
        rows = [o[:3] for o in learn.history['rows']]
        return dict(loss=rows[-1][2], rows=rows)
    return artefact(folder/f'unet-{steps}', make, parents, dict(**settings, steps=steps))

def make_denoiser(folder, data, s, seed, until, place, results):
    "Longer and longer until the loss on held-out latents rises or time is over; the best so far is packed"
    paths = []
    def train(steps):
        paths.append(make_unet(folder, data, s, seed, steps))
        return paths[-1]
    def keep(path):
        notes = [made(o) for o in paths]
        lengths = {o['settings']['steps']: o['facts']['loss'] for o in notes}
        best = min(lengths, key=lengths.get)
        facts = dict(lengths=lengths, spent=sum(o['seconds'] for o in notes))
        path = path.with_name(f'unet-{best}')
        write_json(results/'denoiser.json', packed(path, place/'unet', **facts), 1)
        return best == max(lengths)
    save_process(PROCESS, place)
    longer(train, *s.steps, 2, .25, until, keep)

# ---- scores and card ----

def some(pipe, z):
    "uint8 pictures of standardised latents"
    return torch.cat([to_uint8(pipe.decode(o)) for o in z.split(256)])

def nearest(z, train): # standardised latents; those that were trained on
    "Mean distance to the nearest of `train`, each number of variance 1"
    return nearest_neighbours(z.flatten(1), train.flatten(1))[1].mean().item()/z[0].numel()**.5

def of_pairs(pipe, data, z, x):
    "How well the two halves do on pairs that they have not seen"
    ae, z, images = pipe.autoencoder, (z - data.mean)/data.std, from_uint8(x)
    code = torch.cat([ae.encode(o.to(pipe.device)).cpu() for o in images.split(16)])
    decoded, mirrored = psnr(pipe.decode(z), images), psnr(pipe.decode(z.flip(-1)), images.flip(-1))
    return dict(psnr=decoded, psnr_mirrored=mirrored, n_ae=len(x), rms=(code - z).square().mean().sqrt().item())

def measure(pipe, data, s, seed, results):
    "Everything that the card says of pictures, a dict; two pictures of samples and of what the decoder does"
    (train, held), k = data.split(data.z), min(s.pairs_held, 50)
    z = pipe.latents(s.n, s.sample_steps, seed=seed, bs=min(s.n, 50))
    px, x, judge = some(pipe, z), data.pictures(), EfficientNetFeatures()
    image_grid(from_uint8(px[:40]), nrow=8).save(results/'grid.jpg', quality=85)
    last = torch.cat([from_uint8(x[-8:]), pipe.decode(data.z[:len(x)][-8:])])
    image_grid(last).save(results/'pairs.jpg', quality=90)
    fake, photos = features(judge, px), features(judge, x[-s.n_real:])
    real, floor = (features(judge, some(pipe, o)) for o in (held[:s.n_real], train[-s.n:]))
    d = evaluate(fake, real, judge, floor, seed)
    d |= of_pairs(pipe, data, data.raw[:len(x)][-k:], x[-k:])
    d |= dict(kid_photos=kid(fake, photos)[0], real_photos=kid(real, photos)[0], n_photos=len(photos))
    every = torch.cat([train, train.flip(-1)]) if s.mirror else train
    d |= dict(nearest=nearest(z, every), nearest_real=nearest(held[:s.n], every))
    return d | dict(size=s.size, n_train=len(train), n_held=len(held), mirror=s.mirror, sample_steps=s.sample_steps)

FLAWS = """From afar most of them are rooms, with a bed, a window and light that falls through it. From near,
furniture melts: beds run into the floor, lamps hang in the air, windows and headboards bend, and patterns, books and
pictures on walls are smears; of the first 24, two are no room at all. The decoder washes out checks and small print,
leaves a faint grid on walls and bedding, and rarely, once in those 24, a spot of black and white specks."""

CARD = """# {name}

Bedrooms, as in photographs, 256 px, in the latents of Stable Diffusion's autoencoder, which need not be downloaded: a small decoder of ours draws them.

    from latentdiff.pipeline import LatentDiffusionPipeline
    pipe = LatentDiffusionPipeline.from_pretrained('{name}')
    images = pipe.draw(16)

| | |
|---|---|
| data | the first 9,000 bedrooms by name of the part of LSUN (Yu et al. 2015) that fast.ai keeps, for research, not for sale, squashed to {size} px, as latents of `stabilityai/sd-vae-ft-ema`; {n_train:,} for training{mirrored}, {n_held:,} held out |
| autoencoder | {ae_params:.2f}M parameters, latents {latent}, learned from {n_pairs:,} latents and their pictures (kept as WebP): {ae_steps:,} steps of {ae_bs} parts of 128 px{sharp}; PSNR of decoded latents {psnr:.1f} dB (pooled over {n_ae} held-out pictures), of mirrored ones {psnr_mirrored:.1f} dB; the encoder misses latents by {rms:.2f} standard deviations (root mean square) |
| denoiser | {net_params:.2f}M parameters, {steps:,} steps of {bs}, Muon at {lr:g}, seed {seed}; the best by loss on held-out latents: {lengths} |
| machine | {machine}, shared with other trainings; {hours:.1f} hours in all |
| KID | {kid:.4f} ± {kid_se:.4f}, real against real {kid_floor:.4f} ± {kid_floor_se:.4f} |
| FID | {fid:.2f}, real against real {fid_floor:.2f} |
| protocol | {n_fake:,} samples, DPM-Solver++(2M) with {sample_steps} steps, seed {seed}, against {n_real:,} held-out latents, decoded by the same decoder; real against real: {n_fake:,} latents trained on, decoded, against the same; features of {extractor} |
| photographs | KID against {n_photos:,} training photographs: samples {kid_photos:.4f}; held-out latents, decoded, {real_photos:.4f} |
| training pictures | {nearest:.2f} from a sample to the nearest latent trained on, {nearest_real:.2f} from a held-out one (root mean square of standardised latents, {n_fake} of each) |

The decoder's own faults are on both sides of KID and FID, so these say how good the denoiser is. The row of the photographs says what the decoder costs. Most of FID, the floor's too, is due to the small number of samples.

With Stable Diffusion's VAE at hand, let that draw. It was fed pictures in [0, 1], so it draws them in [0, 1]:

    from latentdiff.autoencoder import open_autoencoder
    z = pipe.latents(16)
    mean, std = pipe.autoencoder.scale(z)
    images = open_autoencoder('stabilityai/sd-vae-ft-ema').decode_raw(z*std + mean)

## What it does badly

{flaws}
"""

def card(ae, net, d, pipe, seed): # what the parts say of themselves; what was measured
    "README.md of the packed pipeline"
    sharp = ', then {sharpen:,} of {sharpen_bs} pictures for the decoder, with feature loss and against a discriminator'
    facts = {k: ae[k] for k in ('n_pairs', 'ae_steps', 'ae_bs')} | {k: net[k] for k in ('steps', 'bs', 'lr', 'machine')}
    facts |= dict(name=NAME, flaws=FLAWS, seed=seed, latent='x'.join(map(str, pipe.latent_shape)))
    facts |= dict(sharp=sharp.format(**ae) if 'sharpen' in ae else '', ae_params=ae['params'], net_params=net['params'])
    facts |= dict(lengths=', '.join(f'{v:.4f} after {int(k):,}' for k, v in net['lengths'].items()),
                  mirrored=' and as many mirrored' if d['mirror'] else '',
                  hours=(ae['seconds'] + ae.get('halves', 0) + net['spent'])/3600)
    return CARD.format(**{**d, **facts})

def pack(data, s, seed, place, results):
    "Put the parts together, measure what comes out unless that is done, and write the card"
    hint = 'train the parts first, see python scripts/zoo256.py --help'
    ae, net = (read_json(results/f'{o}.json', hint) for o in ('autoencoder', 'denoiser'))
    parts = [load_component(place/o) for o in ('autoencoder', 'unet')]
    LatentDiffusionPipeline(*parts, PROCESS, s.size).write_index(place)
    pipe, file = LatentDiffusionPipeline.from_pretrained(place), results/'measured.json'
    of = [file_md5(o) for o in sorted(place.glob('*/*.safetensors'))]
    if not file.exists() or read_json(file, 'delete it')['of'] != of:
        write_json(file, dict(measure(pipe, data, s, seed, results), of=of), 1)
    d = read_json(file, 'delete it')
    write_whole(place/'README.md', card(ae, net, d, pipe, seed))
    print(d, flush=True)

def main(argv=None, s=Settings()):
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--part', choices=['autoencoder', 'denoiser', 'pack'], help='default: all three')
    a.add_argument('--out', type=Path, help='for pipeline, scores and pictures; default: the zoo, and the run folder')
    a.add_argument('--minutes', type=float, default=float('inf'), help='a training that would end later is not begun')
    a.add_argument('--seed', type=int, default=0)
    a = a.parse_args(argv)
    until, folder, seed = time.monotonic() + 60*a.minutes, runs_home()/NAME, a.seed
    results = a.out or folder
    place = results/NAME if a.out else HERE/'latentdiff'/'zoo'/NAME
    place.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    data = Data(s)
    print(f'{len(data.raw):,} latents within {data.z.abs().max():.1f} standard deviations; {s}', flush=True)
    if a.part in (None, 'autoencoder'): make_autoencoder(folder/'autoencoder', data, s, seed, until, place, results)
    if a.part in (None, 'denoiser'): make_denoiser(folder/'denoiser', data, s, seed, until, place, results)
    if a.part in (None, 'pack'): pack(data, s, seed, place, results)

if __name__ == '__main__': main()
