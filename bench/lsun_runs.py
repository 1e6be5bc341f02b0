"""The runs of lab 5, whole: 16,875 steps of 32 latents of LSUN bedrooms, by the original's recipe or by ours.

    python bench/lsun_runs.py run3 --out runs/lsun    # some hours of two CPU cores; goes on where it was stopped
    python bench/lsun_runs.py run2 run3 ours          # one after another, then a table

It reads `lsun_bedroom/sd_latents_u8.npz` in the data folder, 9,000 latents in the order of their names (`lsun_latents.py` makes them), trains on the first
8,000 and measures on the last 1,000. On the way, ever more rarely, it notes the error on the noise, under the run's own noise and under
that of the others, and how the activations stand (`looks.json`); at the end KID and a picture of samples (`scores.json`, `samples.jpg`).
"""
import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoaders
from fastai.callback.schedule import combined_cos
from latentdiff.autoencoder import channel_stats
from latentdiff.core import UserError, artefact, data_home, default_device, file_md5, fingerprint, load_component, made
from latentdiff.core import read_json, runs_home, save_component, write_json
from latentdiff.data import from_uint8, image_grid, to_uint8
from latentdiff.kid_eval import EfficientNetFeatures, features, kid
from latentdiff.noisify import NoisifyCB, Process
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.sampling import ddim, levels, sample
from latentdiff.training import Checkpoint, DeviceLoader, EMA, Learner, adamw, fit_steps, mixed_precision, muon
from latentdiff.unet import ResBlock, SelfAttention, UNet

HELD = 1000   # latents, the last by name, that nothing is trained on

@dataclass(frozen=True)
class Recipe:
    "How a run sees latents, and how it is trained"
    process: Process
    scale: float|None   # latents are multiplied by this; None: each channel has mean 0 and standard deviation 1
    lr: float = 1e-3
    ours: bool = False  # Muon, an average of the weights, a rate that stays up; or AdamW with eps 1e-5 and one cycle

RECIPES = dict(
    run2=Recipe(Process('cosine', 'eps', 'uniform'), .2),
    run3=Recipe(Process('ddpm_linear', 'eps', 'uniform', beta_end=.01), .18215),
    ours=Recipe(Process('flow', 'velocity', 'logit_normal'), None, 2e-3, True))

class Data:
    "Raw latents (9000,4,32,32), and their mean and standard deviation in each channel over those to train on"
    def __init__(self):
        file = data_home()/'lsun_bedroom'/'sd_latents_u8.npz'
        if not file.is_file(): raise UserError(f'{file} is missing: make it with bench/lsun_latents.py, or set LATENTDIFF_DATA')
        d, self.md5 = np.load(file), file_md5(file)
        self.raw = torch.from_numpy(d['q'].astype('float32')*d['step'] + d['low'])
        mean, std = channel_stats(self.raw[:-HELD].split(1000))
        self.mean, self.std = (o.float().view(4, 1, 1) for o in (mean, std))

    def view(self, scale): # of a `Recipe`
        "Shift and divisor, from raw latents to what a network sees"
        return (self.mean, self.std) if scale is None else (torch.zeros(1), torch.tensor([1/scale]))

    def seen(self, recipe):
        shift, by = self.view(recipe.scale)
        return (self.raw - shift)/by

    def spread(self, recipe):
        "Overall standard deviation of what the network sees"
        return (self.std/self.view(recipe.scale)[1]).square().mean().sqrt().item()

class OneCycle(Callback):
    "The rate and the momentum of fastai's `fit_one_cycle`, as functions of the step"
    order, run_valid = -8, False
    def __init__(self, lr):
        self.lr, self.mom = combined_cos(.25, lr/25, lr, lr/1e5), combined_cos(.25, .95, .85, .95)
    def before_batch(self):
        self.opt.set_hyper('lr', self.lr(self.pct_train))
        self.opt.set_hyper('mom', self.mom(self.pct_train))

@torch.no_grad()
def eps_error(net, recipe, data, noise, n, seed=0): # the `Recipe` whose noise it is; held-out latents
    "Mean squared error on the noise, at the middles of `n` equal slices of time; everyone meets the same noise"
    device, t = next(net.parameters()).device, (torch.arange(n) + .5)/n*.999
    ratio = noise.process.sigma(t)/noise.process.alpha(t)/data.spread(noise)   # in units of the latents' own spread
    x0, t = data.seen(recipe)[-HELD:][:n], recipe.process.t_of(ratio*data.spread(recipe))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    xt = recipe.process.add_noise(x0, eps, t)
    told = zip(recipe.process.scale_input(xt, t).split(50), recipe.process.time_input(t).split(50))
    pred = torch.cat([net(x.to(device), u.to(device)).float().cpu() for x, u in told])
    return F.mse_loss(recipe.process.x0_eps(pred, xt, t)[1], eps).item()

@torch.no_grad()
def activations(net, recipe, data, n=64):
    "{block: (mean, standard deviation, share of |activation| below .05)} on held-out latents under the run's noise"
    device, found, t = next(net.parameters()).device, {}, (torch.arange(n) + .5)/n*.999
    def look(name, m, i, o):
        a = o.float()
        found[name] = [round(v.item(), 5) for v in (a.mean(), a.std(), (a.abs() < .05).float().mean())]
    blocks = [(k, m) for k, m in net.named_modules() if isinstance(m, (ResBlock, SelfAttention)) or k in ('conv_in', 'conv_out')]
    hooks = [m.register_forward_hook(partial(look, k)) for k, m in blocks]
    x0 = data.seen(recipe)[-HELD:][:n]
    xt = recipe.process.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), t)
    net(recipe.process.scale_input(xt, t).to(device), recipe.process.time_input(t).to(device))
    for h in hooks: h.remove()
    return found

class Bfloat16(Callback):
    "Forward passes in bfloat16 on a CPU that multiplies in it: up to a fifth faster for this network"
    def before_fit(self): self.model.forward = torch.autocast('cpu', torch.bfloat16)(self.model.forward)
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_fit(self): del self.model.forward

def precision(device):
    "The callbacks for the mixed precision that pays here"
    own = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    return [Bfloat16()] if own else mixed_precision(device)

class Looks(Callback):
    "Ever more rarely, what the averaged network, or the network, has learned; kept in a file beside the checkpoints"
    order, run_valid = 95, False
    def __init__(self, file, recipe, data, steps, n):
        self.file, self.recipe, self.data, self.n = file, recipe, data, n
        self.at = sorted({round(steps*2**-k) for k in range(1, 8)} | {round(steps*k/10) for k in range(3, 11)})
        self.found = read_json(file, 'delete it') if file.is_file() else {}

    def after_step(self):
        k = self.step_by_step.k + 1
        if k not in self.at or str(k) in self.found: return
        average = getattr(self.learn, 'ema', None)
        if average: average.swap()
        net = self.model.eval()
        self.found[str(k)] = dict(eps={o: eps_error(net, self.recipe, self.data, r, self.n) for o, r in RECIPES.items() if not r.ours},
                                  acts=activations(net, self.recipe, self.data))
        if average: average.swap()
        self.model.train()
        write_json(self.file, self.found)
        print(f"step {k:,}: error on the noise {', '.join(f'{o} {v:.4f}' for o, v in self.found[str(k)]['eps'].items())}", flush=True)

def train(name, folder, data, steps, n, seed):
    "The artefact of a run's network"
    recipe, device = RECIPES[name], default_device()
    settings = dict(run=name, lr=recipe.lr, bs=32, seed=seed, steps=steps)
    checkpoint = Checkpoint(folder/name/'checkpoints', fingerprint(**settings, latents=data.md5))
    def make(out):
        torch.manual_seed(seed)
        net = UNet(4, widths=(32,64,64,128), depth=2, attn_levels=(2,3), head_dim=8)
        z = data.seen(recipe)
        dls = DataLoaders(DeviceLoader(z[:-HELD], bs=32, shuffle=True, seed=seed, device=device), DeviceLoader(z[-HELD:], bs=100, device=device), device=device)
        own = [EMA()] if recipe.ours else [OneCycle(recipe.lr)]
        learn = Learner(dls, net.to(device, memory_format=torch.channels_last), F.mse_loss, opt_func=muon if recipe.ours else partial(adamw, eps=1e-5),
                        cbs=[NoisifyCB(recipe.process, seed=seed), *precision(device), *own])
        fit_steps(learn, steps, lr=recipe.lr, seed=seed, rounds=20, checkpoint=checkpoint, cbs=[Looks(folder/name/'looks.json', recipe, data, steps, n)])
        save_component(learn.model.to(memory_format=torch.contiguous_format), out)
        return dict(rows=[o[:3] for o in learn.history['rows']])
    return artefact(folder/name/'unet', make, dict(latents=data.md5), settings)

def from_there(left, net, process, x, ts, callback=None, generator=None): # added to the noise at the start; as any sampler
    "DDIM with fresh noise, as the original drew"
    return ddim(net, process, x + left.to(x), ts, callback, generator, eta=1.)

@torch.no_grad()
def score(name, path, data, n, steps, seed): # samples; of DDIM
    """KID of samples against the held-out latents, both through the decoder of `bedrooms256`: from pure noise, and, where the last noise level still holds some
    latent, from noise and what is left of the mean latent. Writes sixteen samples, or eight of each"""
    recipe, ae, device = RECIPES[name], LatentDiffusionPipeline.from_pretrained('bedrooms256').autoencoder, default_device()
    net, judge = load_component(path).to(device), EfficientNetFeatures(device=device)
    shift, by = data.view(recipe.scale)
    def pictures(raw): # raw latents -> uint8
        z = (raw - ae.latent_mean.cpu().view(-1, 1, 1))/ae.latent_std.cpu().view(-1, 1, 1)
        return torch.cat([to_uint8(ae.decode(o.to(device))).cpu() for o in z.split(20)])
    real, floor = (features(judge, pictures(o)) for o in (data.raw[-HELD:], data.raw[:n]))
    left = levels(recipe.process, 1.)[0]*data.seen(recipe)[:-HELD].mean(0)
    starts = dict(kid=torch.zeros_like(left)) | (dict(kid_with_mean=left) if left.abs().max() > .01 else {})
    found, shown = dict(zip(('floor', 'floor_se'), kid(floor, real))), []
    for key, o in starts.items():
        raw = sample(net, recipe.process, n, data.raw.shape[1:], steps=steps, sampler=partial(from_there, o), seed=seed, bs=50, device=device).cpu()*by + shift
        px = pictures(raw)
        shown.append(px[:16//len(starts)])
        found |= dict(zip((key, f'{key}_se'), kid(features(judge, px), real)))
    image_grid(from_uint8(torch.cat(shown)), nrow=8).save(path.parent/'samples.jpg', quality=88)
    write_json(path.parent/'scores.json', found | dict(n=n, n_real=HELD, extractor=judge.name, ddim=steps, seed=seed))
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('runs', nargs='+', choices=list(RECIPES))
    p.add_argument('--out', type=Path, default=runs_home()/'lsun', help='folder of the runs')
    p.add_argument('--steps', type=int, default=16_875, help='of 32 latents')
    p.add_argument('--look', type=int, default=HELD, help='held-out latents behind an error on the way')
    p.add_argument('--samples', type=int, default=300, help='behind KID; drawn by DDIM with 100 steps and fresh noise, as the original did')
    p.add_argument('--ddim', type=int, default=100, help='its steps')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    data, rows = Data(), []
    for name in a.runs:
        path = train(name, a.out, data, a.steps, min(a.look, HELD), a.seed)
        last = read_json(path.parent/'looks.json', 'delete its folder')[str(a.steps)]['eps']
        s = score(name, path, data, a.samples, a.ddim, a.seed)
        kids = ' | '.join(f"{s[k]:.4f} ± {s[f'{k}_se']:.4f}" if k in s else '' for k in ('kid', 'kid_with_mean', 'floor'))
        rows.append(f"| {name} | {a.steps:,} | {last['run2']:.4f} | {last['run3']:.4f} | {kids} | {made(path)['seconds']/3600:.2f} |")
    heads = 'run', 'steps of 32', 'error under cosine x 0.2', 'under linear .01 x 0.18215', 'KID', 'KID from noise and the mean', 'floor', 'hours'
    print('\n'.join([f"| {' | '.join(heads)} |", '|---'*len(heads) + '|', *rows]))

if __name__ == '__main__': main()
