"""KID of 50,000 images against 50,000, 1,280 features each: ours in blocks against torchmetrics', time and error.

    python bench/kid.py                 # several minutes and 3 GB; --n 10000 --repeats 4 for a quick look

Both score the same fresh draws again and again; how much the scores of one estimator differ is its error. The features are made up, but of the
kind that networks make: positive, correlated, of very different sizes.
"""
import argparse, time
import torch
from torchmetrics.image.kid import KernelInceptionDistance
from latentdiff.kid_eval import kid_blocks
from latentdiff.training import peak_gb

def draw(n, d, seed, shift):
    "Features (n,d) of one set of images"
    mix = torch.randn(64, d, generator=torch.Generator().manual_seed(0))*torch.logspace(0, -1.5, 64)[:, None]
    z = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed)) + shift
    return (z@mix).relu_()

def by_torchmetrics(a, b):
    "100 subsets of 1,000, its defaults -> value"
    metric = KernelInceptionDistance(feature=torch.nn.Identity())
    metric.real_features, metric.fake_features = [a], [b]
    return metric.compute()[0].item()

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=50_000, help='images a set')
    p.add_argument('--d', type=int, default=1280, help='features an image')
    p.add_argument('--size', type=int, default=200, help='images in a block')
    p.add_argument('--repeats', type=int, default=6)
    a = p.parse_args()
    ways = {'torchmetrics, 100 subsets of 1,000': by_torchmetrics, f'kid_blocks of {a.size}': lambda x, y: kid_blocks(x, y, a.size)[0]}
    scores, seconds = ({k: [] for k in ways} for _ in range(2))
    for i in range(a.repeats):
        x, y = draw(a.n, a.d, 2*i, 0.), draw(a.n, a.d, 2*i + 1, .1)
        for k, f in ways.items():
            start = time.perf_counter()
            scores[k].append(f(x, y))
            seconds[k].append(time.perf_counter() - start)
    print(f'{a.n:,} against {a.n:,}, {a.d:,} features, {a.repeats} draws, {torch.get_num_threads()} threads, {peak_gb():.1f} GB at most')
    for k in ways:
        v, t = torch.tensor(scores[k]), torch.tensor(seconds[k])
        print(f'{k:36} {v.mean():.5f} ± {v.std():.5f} a draw, {t.median():6.2f} s')
    first, second = (torch.tensor(seconds[k]).median().item() for k in ways)
    print(f'blocks take 1/{first/second:.1f} of the time')

if __name__ == '__main__': main()
