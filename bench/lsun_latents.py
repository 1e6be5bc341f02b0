"""The latents that lab 5 and `lsun_runs.py` read, `sd_latents_u8.npz`, made from a folder of pictures.

    python bench/lsun_latents.py path/to/bedroom ~/.cache/latentdiff/lsun_bedroom/sd_latents_u8.npz

As the original had them: whole pictures, squashed to 256x256 and fed to Stable Diffusion's autoencoder as [0, 1], although that one expects
[-1, 1]. The means of the first 9,000 by name are kept as bytes, with a step and an offset a channel: seven standard deviations each way, so that
a step is 1/18 of one, and what lies beyond is clipped. The autoencoder is downloaded from the Hub once (335 MB); so far this has been tried with
small ones of the same class only.
"""
import argparse, io
from pathlib import Path
import numpy as np, torch
from PIL import Image
from diffusers import AutoencoderKL
from latentdiff.core import UserError, default_device, progress
from latentdiff.disk import write_whole

def squashed(path, size=256):
    "A picture as float32 (3,size,size) in [0, 1], its sides squashed to a square"
    with Image.open(path) as im: pixels = np.array(im.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)/255

@torch.no_grad()
def means(vae, paths, size, bs):
    "Raw latents (n,4,size/8,size/8)"
    batches, device = [paths[i:i+bs] for i in range(0, len(paths), bs)], next(vae.parameters()).device
    encode = lambda batch: vae.encode(torch.stack([squashed(o, size) for o in batch]).to(device)).latent_dist.mean.float().cpu()
    return torch.cat([encode(o) for o in progress(batches, what='encoding')])

def as_bytes(z, reach=7): # (n,c,h,w); standard deviations each way
    "dict(q, step, low): z is q*step + low, to half a step"
    std, low = z.std((0, 2, 3), keepdim=True)[0], z.mean((0, 2, 3), keepdim=True)[0]
    low, step = low - reach*std, 2*reach*std/255
    return dict(q=((z - low)/step).round().clamp(0, 255).byte().numpy(), step=step.numpy(), low=low.numpy())

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path, help='of .jpg files, at any depth')
    p.add_argument('out', type=Path, help='the .npz')
    p.add_argument('--n', type=int, default=9000, help='pictures, the first by name')
    p.add_argument('--vae', default='stabilityai/sd-vae-ft-ema', help='a name on the Hub, or a folder')
    p.add_argument('--size', type=int, default=256, help='pixels a side')
    p.add_argument('--bs', type=int, default=16)
    a = p.parse_args()
    paths = sorted(a.folder.rglob('*.jpg'), key=lambda o: o.stem)[:a.n]
    if not paths: raise UserError(f'{a.folder} has no .jpg: name the folder of the pictures')
    found = as_bytes(means(AutoencoderKL.from_pretrained(a.vae).to(default_device()), paths, a.size, a.bs))
    np.savez_compressed(file := io.BytesIO(), names=[o.stem for o in paths], **found)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(a.out, file.getvalue())
    print(f"{len(paths):,} latents {found['q'].shape[1:]}, means {(found['low'] + 127.5*found['step']).ravel().round(2)}, in {a.out}")

if __name__ == '__main__': main()
