"""Peers in the same ten minutes: FID and KID of samples of ours, of `smalldiffusion` and of fast.ai's recipe for diffusers' pixel U-Net, by the same features.

    pip install smalldiffusion                                              # for two of the peers; the package itself does not need it
    latentdiff-run --data fashion_mnist --preset cpu --out RUN              # ours; its judge gives the features
    python bench/peers.py --run RUN                                         # ten minutes of training each, then 2,048 samples; killed, it goes on
    python bench/peers.py --run RUN0 RUN1 RUN2 --seeds 0 1 2                # ours from three seeds, scored by the judge of the first; the peers too
    python bench/peers.py --run RUN --peers course22p2 --steps 200 --bs 64  # one peer, for so many steps of another batch than its own

Each peer learns as its authors wrote it, with their network, noise, loss, rate, average and sampler, from the pictures that ours learns from. The minutes are turned into
steps once, by a measurement of its own step in float32 and in bfloat16, of which the faster is taken; do nothing else on the machine meanwhile. They are minutes of training
alone: unlike ours, the peers draw, and wait for the judge, outside of them. A batch goes through the network in parts, which gives the same gradient in less memory.
"""
import argparse, io, statistics, time
from pathlib import Path
import torch, torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR
from latentdiff.commands import Run, write_npz
from latentdiff.core import UserError, artefact, default_device, made, read_json, runs_home, spread, stream, write_json, write_whole
from latentdiff.data import from_uint8, image_grid, npz_pixels, some_pixels, to_hwc, to_uint8
from latentdiff.disk import one_line_errors
from latentdiff.kid_eval import evaluate, features
from latentdiff.report import save_png
from latentdiff.training import DeviceLoader

SIDE, PART = 32, 128   # pixels of what is scored; pictures that go through a network at once

class PixelUNet(UNet2DModel):
    "diffusers', which answers with a tensor"
    def forward(self, x, t): return super().forward(x, t, return_dict=False)[0]

class Course:
    """fast.ai's course22p2, notebooks 19 and 20: DDPM's noise as far as beta .01, pictures in [-.5,.5], convolutions that begin at zero or orthogonal, AdamW, one cycle of the
    rate, no average; drawn by DDIM with as much fresh noise as DDPM, in 200 steps (its FID there: 3.7 in 1,000, 4.2 in 333, 4.5 in 200, 8.4 in 100)"""
    size, bs, decay, noise, optimizer, lr, evaluations = SIDE, 512, 0, dict(beta_end=.01), torch.optim.AdamW, 1e-2, 200
    widths = 32, 64, 128, 256
    def __init__(self, channels):
        self.net = PixelUNet(in_channels=channels, out_channels=channels, block_out_channels=self.widths, norm_num_groups=8)
        for block in (*self.net.down_blocks, *self.net.up_blocks):
            for o in block.resnets: torch.nn.init.zeros_(o.conv2.weight)
        for block in self.net.down_blocks:
            for o in block.downsamplers or (): torch.nn.init.orthogonal_(o.conv.weight)
        torch.nn.init.zeros_(self.net.conv_out.weight)
        self.added = DDPMScheduler(**self.noise)

    def learning(self, steps):
        opt = self.optimizer(self.net.parameters(), lr=self.lr, eps=1e-5)
        return opt, OneCycleLR(opt, self.lr, total_steps=steps)

    def loss(self, x): # (b,c,32,32) in [-1,1]
        eps, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=x.device)
        return F.mse_loss(self.net(self.added.add_noise(x/2, eps, t), t), eps)

    def draw(self, n):
        "Pictures (n,c,32,32), about in [-1,1]"
        plan = DDIMScheduler(**self.noise)
        plan.set_timesteps(self.evaluations)
        x = torch.randn(n, self.net.config.in_channels, self.size, self.size, device=self.net.device)
        for t in plan.timesteps: x = plan.step(self.net(x, t), t, x, eta=1.).prev_sample
        return 2*x

class CosineCourse(Course):
    "Its notebook 22, the best that it has with this network: cosine noise, Adam at a lower rate, DDIM in 100 steps (its FID there: 3.1 and 3.3)"
    noise = dict(beta_schedule='squaredcos_cap_v2', clip_sample_range=1.5)
    optimizer, lr, evaluations = torch.optim.Adam, 4e-3, 100

class Small:
    "smalldiffusion's `examples/fashion_mnist_unet.py`: pictures of 28 px, half of them mirrored, AdamW at a constant rate, an average of the weights; its sampler in 20 steps"
    size, bs, decay, lr = 28, 1024, .999, 7e-4
    def __init__(self, channels):
        try: import smalldiffusion
        except ImportError: raise UserError('smalldiffusion is not installed: pip install smalldiffusion, or leave it out with --peers') from None
        self.theirs = smalldiffusion
        self.schedule, self.net = self.parts(smalldiffusion, channels)

    def parts(self, theirs, channels):
        net = theirs.Scaled(theirs.Unet)(self.size, channels, channels, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
        return theirs.ScheduleLogLinear(sigma_min=.01, sigma_max=20, N=800), net

    def learning(self, steps):
        opt = torch.optim.AdamW(self.net.parameters(), lr=self.lr)
        return opt, ConstantLR(opt, factor=1.)

    def loss(self, x): # (b,c,28,28) in [-1,1]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < .5, x.flip(-1), x)
        x, sigma, eps, _ = self.theirs.generate_train_sample(x, self.schedule)
        return self.net.get_loss(x, sigma, eps)

    def draw(self, n):
        "Pictures (n,c,28,28), about in [-1,1]"
        *_, x = self.theirs.samples(self.net, self.schedule.sample_sigmas(20), gam=1.6, batchsize=n)
        return x

class SmallDiT(Small):
    "smalldiffusion's `examples/fashion_mnist_dit.py`"
    decay, lr = .99, 1e-3
    def parts(self, theirs, channels):
        net = theirs.DiT(in_dim=self.size, channels=channels, patch_size=2, depth=6, head_dim=32, num_heads=6, mlp_ratio=4.)
        return theirs.ScheduleDDPM(beta_start=1e-4, beta_end=.02, N=1000), net

PEERS = {'smalldiffusion': Small, 'smalldiffusion-dit': SmallDiT, 'course22p2': Course, 'course22p2-cosine': CosineCourse}

def begin(kind, channels, seed, bfloat16=False):
    "A peer with fresh weights on the device, its network in mixed precision if so asked"
    torch.manual_seed(seed)
    peer = kind(channels)
    net, forward = peer.net.to(default_device()), peer.net.forward
    def mixed(*args, **kw):
        with torch.autocast(default_device().type, torch.bfloat16): return forward(*args, **kw).float()
    if bfloat16: net.forward = mixed
    return peer

def step(peer, opt, x):
    "One step on a batch, its parts one after another"
    for part in x.split(PART): (peer.loss(part)*len(part)/len(x)).backward()
    opt.step()
    opt.zero_grad()

def seconds_of(peer, x): # pictures of one part
    "Of a step on one part, the best of three after a warm-up"
    opt, times = peer.learning(4)[0], []
    for _ in range(4):
        start = time.perf_counter()
        step(peer, opt, x)
        if x.is_cuda: torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])

def plan(file, kind, x, bs, seconds): # where it is written down; pixels; of the training
    "Steps in so many seconds, and whether they are in bfloat16: measured once"
    if file.exists(): return read_json(file, f'delete {file}')
    part = from_uint8(x[:min(bs, PART)]).to(default_device())
    each = [seconds_of(begin(kind, x.shape[1], 0, o), part)*bs/len(part) for o in (False, True)]
    d = dict(steps=max(1, int(seconds/min(each))), bfloat16=each[1] < each[0], seconds_in_float32=each[0], seconds_in_bfloat16=each[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, d, indent=1)
    return d

def train(peer, x, bs, steps, seed, file, every=60.): # pixels; ...; where it is written down how far it is, and after how many seconds
    "Train, or go on from what was written down: the same weights, which end as their average -> seconds of training"
    opt, rate = peer.learning(steps)
    net, loader, k, spent, saved = peer.net.train(), DeviceLoader(x, bs=bs, shuffle=True, seed=seed), 0, 0., time.monotonic()
    weights, average = list(net.parameters()), [p.detach().clone() for p in net.parameters()]
    if file.exists():
        d = torch.load(file, map_location=default_device(), weights_only=True)
        for o, state in ((net, d['net']), (opt, d['opt']), (rate, d['rate'])): o.load_state_dict(state)
        average, k, spent = d['average'], d['k'], d['spent']
    while k < steps:
        start = time.monotonic()
        torch.manual_seed(stream(seed, 'step', k))
        step(peer, opt, loader.batch(k)[0])
        rate.step()
        k += 1
        torch._foreach_lerp_(average, [p.data for p in weights], 1 - min(peer.decay, (1 + k)/(10 + k)))
        spent += time.monotonic() - start
        if k < steps and time.monotonic() - saved < every: continue
        print(f'{k:,} of {steps:,} steps in {spent/60:.1f} min', flush=True)
        d = dict(net=net.state_dict(), opt=opt.state_dict(), rate=rate.state_dict(), average=average, k=k, spent=spent)
        torch.save(d, written := io.BytesIO())
        write_whole(file, written.getvalue())
        saved = time.monotonic()
    for p, o in zip(weights, average): p.data.copy_(o)
    return spent

@torch.no_grad()
def draw(peer, n, seed, folder):
    "uint8 (n,c,32,32), a part at a time, each kept in `folder`"
    peer.net.eval()
    files = [folder/f'{i}.npz' for i in range(0, n, PART)]
    for i, f in enumerate(files):
        if f.exists(): continue
        torch.manual_seed(stream(seed, 'samples', i))
        x = peer.draw(min(PART, n - i*PART))
        x = F.pad(x, [(SIDE - peer.size)//2]*4, value=-1.)
        write_npz(f, to_hwc(to_uint8(x)[:, :x.shape[1]]))
    return torch.cat([npz_pixels(f) for f in files])

def samples(folder, name, images, x, bs, steps, bfloat16, seed, n):
    "What a peer draws when it has been trained -> (uint8 (n,c,32,32), minutes of training); made once"
    def make(new):
        peer = begin(PEERS[name], images.channels, seed, bfloat16)
        spent = train(peer, x, bs, steps, seed, new/'last.pt')
        px = draw(peer, n, seed, new)
        save_png(image_grid(from_uint8(px[:40]), nrow=10), new/'grid.png')
        (new/'last.pt').unlink()
        return dict(seconds=spent)
    place = artefact(folder/f'{name}-{bs}-{steps}-{seed}', make, dict(images=images.fingerprint), dict(bfloat16=bfloat16, n=n))
    return torch.cat([npz_pixels(place/f'{i}.npz') for i in range(0, n, PART)]), made(place)['facts']['seconds']/60

def opened(folder):
    "A finished run"
    if not (Path(folder)/'metrics.json').exists(): raise UserError(f'{folder} is no finished run: latentdiff-run --data fashion_mnist --preset cpu --out {folder}')
    return Run(folder, {})

def of_ours(run, n):
    "(uint8 (n,c,32,32) of a run, batch, steps of its denoiser, minutes of its trainings and its latents)"
    notes = [made(run.folder/o) for o in ('autoencoder', 'latents', 'denoiser' if run.condition else 'unet')]
    return run.pipeline.pixels(n, **run.how, **run.told(n)), run.p.bs, notes[-1]['settings']['steps'], sum(o['seconds'] for o in notes)/60

def options():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--run', nargs='+', required=True, help='finished runs of ours; the first one has the judge')
    a.add_argument('--peers', nargs='*', choices=PEERS, default=[*PEERS], help='none named: ours alone')
    a.add_argument('--seeds', type=int, nargs='+', default=[0], help="of the peers' trainings and samples")
    a.add_argument('--seconds', type=float, default=600, help='of training for each')
    a.add_argument('--steps', type=int, help='of training for each, in place of the seconds')
    a.add_argument('--bs', type=int, help='batch size of the peers, in place of their own')
    a.add_argument('--n', type=int, default=2048, help='samples of each, as many as there are pictures on the other side')
    a.add_argument('--out', type=Path, help='folder for what is trained and drawn')
    return a.parse_args()

@one_line_errors
def main():
    a = options()
    runs, out = [opened(o) for o in a.run], a.out or runs_home()/'peers'
    images, judge = runs[0].images, runs[0].judge
    if images.size != SIDE: raise UserError(f'{a.run[0]} has pictures of {images.size} px: the peers draw {SIDE}')
    real, floor = (features(judge, images, idxs=spread(o, a.n)) for o in (images.valid_idxs, images.train_idxs))
    found = {}
    def row(name, seed, px, bs, steps, minutes):
        d = evaluate(px, real, judge, floor_from=floor)
        if not found: print(f"| real against real, {a.n:,} each by {judge.name} | | | | | {d['fid_floor']:.2f} | {d['kid_floor']:.4f} ± {d['kid_floor_se']:.4f} |", flush=True)
        found.setdefault(name, []).append(d['fid'])
        print(f"| {name} | {seed} | {bs} | {steps:,} | {minutes:.1f} | {d['fid']:.2f} | {d['kid']:.4f} ± {d['kid_se']:.4f} |", flush=True)
    print(f'| on {default_device()}, {torch.get_num_threads()} threads | seed | batch | steps | minutes | FID | KID |\n|---|---|---|---|---|---|---|', flush=True)
    for run in runs: row('ours', run.seed, *of_ours(run, a.n))
    pixels = some_pixels(images, 'train', 0)
    for name in a.peers:
        kind = PEERS[name]
        edge, bs = (SIDE - kind.size)//2, a.bs or kind.bs
        x = pixels[..., edge:SIDE - edge, edge:SIDE - edge]
        how = plan(out/f'{name}-{bs}-{a.seconds:g}s.json', kind, x, bs, a.seconds)
        for seed in a.seeds:
            steps = a.steps or how['steps']
            px, minutes = samples(out, name, images, x, bs, steps, how['bfloat16'], seed, a.n)
            row(name, seed, px, bs, steps, minutes)
    ours = statistics.mean(found['ours'])
    for name, fids in found.items():
        spread_of = f' ± {statistics.stdev(fids):.2f} over {len(fids)} seeds' if len(fids) > 1 else ''
        times = '' if name == 'ours' else f', {statistics.mean(fids)/ours:.1f} times that of ours'
        print(f'{name:18} FID {statistics.mean(fids):.2f}{spread_of}{times}')

if __name__ == '__main__': main()
