"""The table of lesson `70_few_step`: KID of Fashion-MNIST by class against the number of network evaluations, before and after learning to take long steps.

    python bench/few_step.py                  # trains a tenth of the steps that the teacher had, goes on where it was stopped, then draws and scores
    python bench/few_step.py --pack FOLDER    # also writes the trained pipeline there, in half precision, with its card

Everything is drawn three times, from the seeds 0, 1 and 2; the training is one.
"""
import argparse, time
from pathlib import Path
import torch
from latentdiff.conditioning import guide
from latentdiff.core import preset, runs_home, write_whole
from latentdiff.data import image_grid, open_images
from latentdiff.few_step import make_shortcut, shortcut, unipc
from latentdiff.kid_eval import features, kid, make_judge
from latentdiff.noisify import make_latents
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.report import save_png
from latentdiff.sampling import dpmpp_2m, sample

GUIDANCE = 1.5

def drawn(pipe, net, n, steps, sampler, seed, bs=128):
    "Latents, each class equally often, from `net(x, time, cond)`"
    cond = torch.arange(n) % 10
    nets = (lambda x, time, c=cond[i:i+bs]: net(x, time, c) for i in range(0, n, bs))
    return sample(nets, pipe.process, n, pipe.latent_shape, steps, sampler, seed, bs)

def mean(scores):
    "Mean over the seeds and its standard error, from the spread between them"
    k = torch.tensor([o for o, _ in scores], dtype=torch.float64)
    return k.mean().item(), (k.std()/len(k)**.5).item()

def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--steps', type=int, default=460, help='of 32; the teacher had 4,600')
    a.add_argument('--n', type=int, default=1000, help='samples behind each score')
    a.add_argument('--teacher', type=int, nargs='*', default=[200, 50, 20, 10, 4, 2, 1], help='evaluations to score the teacher with')
    a.add_argument('--folder', type=Path, default=None, help='of the run')
    a.add_argument('--pack', type=Path)
    a = a.parse_args()
    pipe, folder = LatentDiffusionPipeline.from_pretrained('fashion_mnist32'), a.folder or runs_home()/'few_step'
    images = open_images('fashion_mnist', 32)
    lat, judge = make_latents(folder, images, pipe.autoencoder, preset('cpu', 'fashion_mnist')), make_judge(folder, images)
    teacher = pipe.denoiser.float()
    student = make_shortcut(folder, teacher, pipe.process, lat, a.steps, GUIDANCE)
    real = features(judge, images, idxs=images.valid_idxs)
    guided = lambda x, time, cond: guide(teacher, cond, GUIDANCE)(x, time)
    rows = [('teacher', guided, dpmpp_2m, k) for k in a.teacher] + [('UniPC', guided, unipc, k) for k in a.teacher if 2 < k <= 20]
    rows += [('student', student, shortcut, k) for k in (8, 4, 2, 1)]
    for name, net, sampler, steps in rows:
        start, scores = time.time(), []
        for seed in range(3 if steps < 200 else 1):
            px = pipe.decode(drawn(pipe, net, a.n, steps, sampler, seed), 128)
            scores.append(kid(features(judge, px), real))
            if seed == 0: save_png(image_grid(px[:40], nrow=10), folder/f'{name}-{steps}.png')
        m, se = mean(scores)
        print(f'{name:8} {steps:3} evaluations: KID {m:.4f} ± {se:.4f}; of each seed {", ".join(f"{k:.4f} ± {e:.4f}" for k, e in scores)}; {time.time() - start:.0f} s', flush=True)

if __name__ == '__main__': main()
