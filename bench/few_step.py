"""The table of lesson `70_few_step`: KID of Fashion-MNIST by class against the number of network evaluations, before and after learning to take long steps.

    python bench/few_step.py                  # trains a fifth of the steps that the teacher had, goes on where it was stopped, then draws and scores
    python bench/few_step.py --seeds 0 1 2    # the same training from three seeds, one after another
    python bench/few_step.py --consistency    # also tunes the teacher to consistency, for as many steps
    python bench/few_step.py --pack FOLDER    # also writes the pipeline of the first seed there, in half precision, with its card

Each row is drawn three times, from the seeds 0, 1 and 2.
"""
import argparse, time
from itertools import pairwise
from pathlib import Path
import torch
from latentdiff.conditioning import guide
from latentdiff.core import artefact, fingerprint, load_component, made, preset, runs_home, save_component, write_whole
from latentdiff.data import from_uint8, image_grid, open_images
from latentdiff.few_step import Shortcuts, make_shortcut, midpoint, shortcut, step_input, teacher_of, unipc, with_steps
from latentdiff.kid_eval import evaluate, features, kid, make_judge, nearest_neighbours
from latentdiff.noisify import NoisifyCB, bcast, make_latents, weights_hash
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.report import save_png
from latentdiff.sampling import dpmpp_2m, noise_like, sample
from latentdiff.training import Checkpoint, Graphed, fit_steps
from latentdiff.unet import denoiser_learner

GUIDANCE = 1.5

def drawn(pipe, net, n, steps, sampler, seed, bs=128):
    "Latents, each class equally often, from `net(x, time, cond)`"
    cond = torch.arange(-(-n//bs)*bs) % 10   # the last batch is full too
    nets = (lambda x, time, c=cond[i:i+bs]: net(x, time, c) for i in range(0, n, bs))
    return sample(nets, pipe.process, n, pipe.latent_shape, steps, sampler, seed, bs)

class Consistency(Shortcuts):
    """Slopes from each time to the end: those of the teacher as far as an earlier time, from there its own (consistency
    models, 2303.01469), with gaps that are halved while it trains (consistency tuning, 2406.14548)"""
    gaps = 1/2, 1/4, 1/8, 1/16   # of the time, a quarter of the training each

    def draw(self, n, g, device): # rows; a torch generator
        "(t, d), each (n,): a third starts from pure noise, and every step goes to the end"
        t = 1 - torch.rand(n, generator=g, device=device)
        t[:n//3] = 1.
        return t, t

    @torch.no_grad()
    def answers(self, x, t, d, cond):
        "Mean slopes (b, ...) over the whole way"
        each = getattr(self, 'step_by_step', None)   # not yet there while the time of a step is measured
        done = each.k/each.steps if each else 0.
        gap = t*self.gaps[min(int(done*len(self.gaps)), len(self.gaps) - 1)]
        first = midpoint(lambda x, t: self.teacher(x, self.process.time_input(t), *cond), x, t, gap)
        r = t - gap
        rest = self.average(x - bcast(gap, x)*first, step_input(self.process, r, r), *cond)
        return bcast(gap/t, x)*first + bcast(r/t, x)*rest

def tuned(net, process, teacher, z_train, z_valid, steps, lr=1e-3, bs=32, seed=0, checkpoint=None):
    "-> Learner, as `train_shortcut`; `net` from `with_steps`"
    learn = denoiser_learner(net, process, z_train, z_valid, seed=seed, bs=bs)
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, (NoisifyCB, Graphed))])
    learn.add_cb(Consistency(process, teacher, seed=seed))
    return fit_steps(learn, steps, lr=lr, seed=seed, checkpoint=checkpoint, rounds=4)

def make_tuned(folder, net, process, lat, steps, seed=0):
    "The network after consistency tuning, in eval mode: loaded, or trained now from `net`"
    parents, settings = dict(latents=lat.fingerprint, teacher=weights_hash(net)), dict(guidance=GUIDANCE, seed=seed)
    checkpoint = Checkpoint(folder/'checkpoints'/'consistency', fingerprint(**parents, **settings))
    def make(out):
        torch.manual_seed(seed)
        z = [(lat.tensor(o), lat.labels[lat.idxs(o)]) for o in ('train', 'valid')]
        z[1] = tuple(o[:256] for o in z[1])
        learn = tuned(with_steps(net), process, teacher_of(net, GUIDANCE), *z, steps, seed=seed, checkpoint=checkpoint)
        save_component(learn.model, out)
    return load_component(artefact(folder/'consistency', make, parents, dict(**settings, steps=steps)))

def jumps(net, process, x, ts, callback=None, generator=None):
    "Jump to the end, add fresh noise of the next time, jump again (2303.01469, algorithm 1)"
    for i, (t, u) in enumerate(pairwise(ts)):
        now = x.new_full((len(x),), t)
        x0 = x - t*net(x, step_input(process, now, now))
        if callback: callback(i, t, x, x0)
        x = x0 if u == 0 else (1 - u)*x0 + u*noise_like(x, generator)
    return x

CARD = """# {name}

Garments, grey, 32 px, by class, in one to eight evaluations of the network.

    from latentdiff.pipeline import LatentDiffusionPipeline
    pipe = LatentDiffusionPipeline.from_pretrained('{name}')
    images = pipe.draw(16, cond=['dress', 'bag'])

It draws with two evaluations by shortcuts and without guidance unless you say otherwise; `steps=1` is faster, `steps=4` better.

| | |
|---|---|
| data | Fashion-MNIST by Zalando SE (Xiao, Rasul and Vollgraf 2017), MIT licence; {n_train:,} pictures of 32 px for training, {n_real:,} held out |
| autoencoder | that of `fashion_mnist32` |
| denoiser | {params:.2f}M parameters, from the weights of `fashion_mnist32`: {steps:,} steps of {bs} as a shortcut model (lesson `70_few_step`), taught by it with guidance {guidance:g}, Muon at {lr:g}, seed {seed} |
| machine | AVX2 CPU, 1 thread; {hours:.1f} hours since its last start |
| KID | {kids}; real against real {kid_floor:.4f} ± {kid_floor_se:.4f} |
| FID | {fids}; real against real {fid_floor:.2f} |
| protocol | {n:,} samples, each class equally often, 1, 2 and 4 evaluations, seed {seed}, against the held-out pictures; features of {extractor} |
| training pictures | {nearest:.2f} from a sample of two evaluations to the nearest one, {nearest_real:.2f} from a held-out picture (root mean square between latents, 256 of each) |
| obedience | the classifier behind the features, right about {real_right:.1%} of the held-out pictures, finds what was asked for in {right:.1%} of the samples of two evaluations |

## What it does badly

{flaws}
"""

FLAWS = ('Cloth has a faint weave of squares. Straps of sandals break into pieces and handles of bags end in the air, a little more so with one evaluation than with two; '
         'a bag may have no shape at all (one of the first four has none), and grey specks stand on the black beside sleeves and shoes. '
         'What its teacher does badly it does too. It has no guidance to choose: that of its training is part of it.')

def nearest(pipe, train, x):
    "Mean root mean square between latents, from each picture to the nearest training picture"
    z = torch.cat([pipe.autoencoder.encode(o).flatten(1) for o in x.split(64)])
    return nearest_neighbours(z, train.flatten(1))[1].mean().item()/z.shape[1]**.5

@torch.no_grad()
def pack(pipe, student, place, folder, images, lat, judge, n=2048):
    "Save the trained pipeline in half precision; measure it as it is loaded again, and write its card"
    LatentDiffusionPipeline(pipe.autoencoder.half(), student.half(), pipe.process, 32).save_pretrained(place)
    pipe, labels, facts = LatentDiffusionPipeline.from_pretrained(place), torch.arange(n) % 10, made(folder/'shortcut')
    floor, real = images.train_idxs[-n:], features(judge, images, idxs=images.valid_idxs)
    pixels = {k: pipe.decode(drawn(pipe, pipe.denoiser, n, k, shortcut, 0), 128) for k in (1, 2, 4)}
    d = {k: evaluate(x, real, judge, features(judge, images, idxs=floor)) for k, x in pixels.items()}
    agrees = lambda x, y: torch.cat([judge.net(o).argmax(1) for o in x.split(256)]).eq(y).float().mean().item()
    held, train = from_uint8(images.pixels(images.valid_idxs)), lat.tensor('train')
    say = lambda form: ', '.join(f"{form.format(**o)} with {k} evaluation" + 's'*(k > 1) for k, o in d.items())
    told = {**d[2], **facts['settings'], **dict(name=Path(place).name, n=n, n_train=len(train), n_real=len(held), hours=facts['seconds']/3600, flaws=FLAWS,
        params=sum(o.numel() for o in student.parameters())/1e6, kids=say('{kid:.4f} ± {kid_se:.4f}'), fids=say('{fid:.2f}'),
        nearest=nearest(pipe, train, pixels[2][:256]), nearest_real=nearest(pipe, train, held[:256]),
        right=agrees(pixels[2], labels), real_right=agrees(held, images.labels[images.valid_idxs]))}
    write_whole(Path(place)/'README.md', CARD.format(**told))

def mean(scores):
    "Mean over the seeds and its standard error, from the spread between them"
    k = torch.tensor([o for o, _ in scores], dtype=torch.float64)
    return k.mean().item(), (k.std()/len(k)**.5).item()

def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--steps', type=int, default=920, help='of 32; the teacher had 4,600')
    a.add_argument('--seeds', type=int, nargs='+', default=[0], help='of the training')
    a.add_argument('--n', type=int, default=1000, help='samples behind each score')
    a.add_argument('--teacher', type=int, nargs='*', default=[200, 50, 20, 10, 4, 2, 1], help='evaluations to score the teacher with')
    a.add_argument('--unipc', type=int, nargs='*', default=[20, 10, 4], help='the same by UniPC')
    a.add_argument('--student', type=int, nargs='*', default=[8, 4, 2, 1], help='the same of the student')
    a.add_argument('--consistency', action='store_true', help='compare with consistency tuning')
    a.add_argument('--folder', type=Path, default=None, help='of the runs')
    a.add_argument('--pack', type=Path)
    a = a.parse_args()
    pipe, folder = LatentDiffusionPipeline.from_pretrained('fashion_mnist32'), a.folder or runs_home()/'few_step'
    images = open_images('fashion_mnist', 32)
    lat, judge = make_latents(folder, images, pipe.autoencoder, preset('cpu', 'fashion_mnist')), make_judge(folder, images)
    teacher, run = pipe.denoiser.float(), lambda seed: folder/f'{a.steps}-{seed}'
    students = {o: make_shortcut(run(o), teacher, pipe.process, lat, a.steps, GUIDANCE, seed=o) for o in a.seeds}
    other = make_tuned(run(a.seeds[0]), teacher, pipe.process, lat, a.steps, a.seeds[0]) if a.consistency else None
    real = features(judge, images, idxs=images.valid_idxs)
    guided = lambda x, time, cond: guide(teacher, cond, GUIDANCE)(x, time)
    rows = [('teacher', guided, dpmpp_2m, k) for k in a.teacher] + [('UniPC', guided, unipc, k) for k in a.unipc]
    rows += [(f'student {o}', net, shortcut, k) for o, net in students.items() for k in a.student]
    rows += [('consistency', other, jumps, k) for k in a.student if other]
    for name, net, sampler, steps in rows:
        start, scores = time.monotonic(), []
        for seed in range(3):
            px = pipe.decode(drawn(pipe, net, a.n, steps, sampler, seed), 128)
            scores.append(kid(features(judge, px), real))
            if seed == 0: save_png(image_grid(px[:40], nrow=10), folder/f'{name.replace(" ", "")}-{steps}.png')
        m, se = mean(scores)
        print(f'{name:11} {steps:3} evaluations: KID {m:.4f} ± {se:.4f}; of each seed {", ".join(f"{k:.4f} ± {e:.4f}" for k, e in scores)}; {time.monotonic() - start:.0f} s', flush=True)
    if a.pack: pack(pipe, students[a.seeds[0]], a.pack, run(a.seeds[0]), images, lat, judge)

if __name__ == '__main__': main()
