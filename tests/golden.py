"golden.py: what the library computes for fixed weights and seeds. Run it to write tests/goldens/values.json afresh."
import hashlib, json
from pathlib import Path
import torch, torch.nn.functional as F
from latentdiff.autoencoder import AELoss, KLAutoencoder, pca_start, psnr, ssim
from latentdiff.data import from_uint8
from latentdiff.kid_eval import fid, kid
from latentdiff.noisify import Process
from latentdiff.rooms import rooms
from latentdiff.sampling import SAMPLERS, optimal_denoiser, time_steps
from latentdiff.unet import UNet

FILE = Path(__file__).parent/'goldens'/'values.json'
PROCESSES = {'flow': ('flow', 'velocity', 'logit_normal'), 'ddpm eps': ('ddpm_linear', 'eps', 'uniform'),
             'cosine v': ('cosine', 'v', 'uniform'), 'edm x0': ('edm', 'x0', 'edm')}

def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def shaken(net):
    "`net` with every weight moved a little, so that nothing it starts at zero stays there"
    with torch.no_grad():
        for i,p in enumerate(net.parameters()): p.add_(.05*normal(*p.shape, seed=i))
    return net

def small_unet():
    torch.manual_seed(0)
    return UNet(4, widths=(16, 32), depth=1)

def ten_steps(net, loss):
    "The loss before each of ten steps of AdamW"
    opt,losses = torch.optim.AdamW(net.parameters(), 1e-3),[]
    for i in range(10):
        l = loss(net, i)
        losses.append(l.item())
        l.backward()
        opt.step()
        opt.zero_grad()
    return losses

def told(process, t):
    "What the network is told about the noise level `t`"
    return process.time_input(t)

def denoising_loss(process):
    def loss(net, i):
        z = normal(8, 4, 8, 8, seed=100+i)
        x_t,t,target = process.noisify(z, generator=torch.Generator().manual_seed(i))
        return F.mse_loss(net(process.scale_input(x_t, t), told(process, t)), target)
    return loss

def autoencoder_losses():
    "Ten steps of the autoencoder on rooms, from its closed-form start"
    torch.manual_seed(0)
    ae,x = KLAutoencoder(3, (16, 32), 2, 1, 4),rooms(80, 32)
    pca_start(ae, x)
    torch.manual_seed(1)
    return ten_steps(ae, lambda net, i: AELoss()(net(from_uint8(x[8*i:8*i+8])), from_uint8(x[8*i:8*i+8])))

def drawn(process, sampler, net):
    "A few numbers of what ten steps of a sampler make of fixed noise"
    x = process.levels(torch.tensor(1.))[1]*normal(4, 4, 8, 8, seed=7)
    with torch.no_grad(): z = SAMPLERS[sampler](net, process, x, time_steps(process, 10), generator=torch.Generator().manual_seed(3))
    return [z.mean().item(), z.std().item(), *z.flatten()[:6].tolist()]

def compute():
    "Every golden value, {name: list of numbers, or a hash}"
    d = {'rooms': hashlib.md5(rooms(16, 64).numpy()).hexdigest(), 'autoencoder, losses of ten steps': autoencoder_losses()}
    for name,args in PROCESSES.items():
        process = Process(*args)
        d[f'U-Net, {name}, losses of ten steps'] = ten_steps(small_unet(), denoising_loss(process))
        nets = {'oracle': optimal_denoiser(process, normal(5, 4, 8, 8, seed=9), .3), 'U-Net': shaken(small_unet()).eval()}
        for s in SAMPLERS:
            for k,net in nets.items(): d[f'samples, {name}, {s}, {k}'] = drawn(process, s, net)
    a,b = normal(60, 32, seed=1),1.2*normal(50, 32, seed=2)
    x,y = from_uint8(rooms(8, 32)),from_uint8(rooms(8, 32, seed=1))
    return {**d, 'KID': list(kid(a, b)), 'FID': [fid(a, b)], 'PSNR and SSIM': [psnr(x, y), ssim(x, y)]}

if __name__ == '__main__':
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(compute(), indent=0)+'\n')
