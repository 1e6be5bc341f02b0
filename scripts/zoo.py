"""Train one of the pipelines that come with the package, score it, and pack it into latentdiff/zoo:

    python scripts/zoo.py fashion_mnist32

It goes on where it was stopped. Weights are packed in float16, and everything that the card says of them is measured with the
packed ones.
"""
import argparse, random, re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
from latentdiff.autoencoder import make_autoencoder, quality, sharpen_decoder, some_pixels
from latentdiff.conditioning import TextConditioner, class_conditioner, make_conditional, train_reader
from latentdiff.core import artefact, load_component, made, preset, read_json, runs_home, save_component, write_json, write_whole
from latentdiff.data import from_uint8, image_grid, open_images
from latentdiff.kid_eval import evaluate, features, make_judge, nearest_neighbours
from latentdiff.noisify import make_latents
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.report import save_png
from latentdiff.sampling import SAMPLER
from latentdiff.unet import make_denoiser
import zoo_cars

HERE = Path(__file__).parent.parent

@dataclass
class Recipe:
    data: str       # what `open_images` opens, unless told otherwise
    changes: dict   # of the preset `cpu` for that data
    by: str         # 'class', 'caption', 'car' (as in zoo_cars.py), or 'nothing': what the denoiser is told
    guidance: float # with which it is scored and shown
    n: int          # samples behind KID and FID
    what: str       # the first sentence of the card
    call: str       # how to draw
    terms: str      # of the data
    flaws: str      # what it does badly, seen in its samples
    held: int = 0   # how many, the last by name, are kept for the scores; 0: the split that every data set has
    sampler: str = SAMPLER # with which it is scored
    sample_steps: int = 20 # an image
    sharpen: int = 0 # steps in which the decoder learns from a discriminator, after everything else

RECIPES = dict(
    fashion_mnist32=Recipe('fashion_mnist', dict(ae_steps=3000, ae_lr=5e-3, widths=(64,96), steps=4600, lr=4e-3, bs=32), 'class', 1.5, 2048,
        'Garments, grey, 32 px, by class.', "16, cond=['dress', 'bag']",
        'Fashion-MNIST by Zalando SE (Xiao, Rasul and Vollgraf 2017), MIT licence',
        'Straps of sandals and handles of bags break into pieces; prints, checks and stripes become blotches; a sleeve may end in a smear, and now and '
        'then a bag has no shape. At guidance 4 bags are plainer, at 8 all of them are white.'),
    rooms64=Recipe('rooms', dict(n=12_000, latent_channels=8, ae_kl=2e-3, ae_steps=2500, ae_lr=5e-3, steps=3600), 'caption', 1.5, 1000,
        "Drawn bedrooms, 64 px, by caption. Needs the extra `text`: `pip install 'latentdiff[text]'`.",
        "16, cond='a bedroom with a red bed on the left, a window at night and a lit lamp'",
        '`rooms`, drawn by this package itself, Apache 2.0',
        'On walls and floors one sees the squares of 8 px that the autoencoder works in, most of all in dark rooms. A headboard may melt into the wall, and a rug into the '
        'floor. What no caption of `rooms` says, such as a yellow rug, is replaced without a word.'),
    bedrooms64=Recipe('lsun_bedroom', dict(n=None, size=64, ae_widths=(64,128), ae_patch=2, latent_channels=4, ae_kl=1e-3, ae_steps=5000, ae_lr=4e-3,
            widths=(64,128), depth=2, attn_levels=(1,), steps=8000, lr=4e-3, bs=256), 'nothing', 1, 1000,
        'Bedrooms, as in photographs, 64 px.', '16',
        'the first 9,000 bedrooms by name of the part of LSUN (Yu et al. 2015) that fast.ai keeps, for research, not for sale',
        'Beds, windows, lamps and pictures on the wall are there, and most rooms hold together; but things melt into one another, a bed may have no end, and what lies on it is a heap of colour. '
        'Edges are soft, because the decoder has learned from pixels alone.', 1000))

RECIPES['cars'] = Recipe('stanford_cars', dict(n=3000, size=96, ae_widths=(64,128), ae_patch=4, latent_channels=8,
        ae_kl=2e-3, ae_steps=4000, ae_lr=5e-3, widths=(64,128), depth=1, attn_levels=(0,1), steps=3000, lr=4e-3, bs=64),
    'car', 2, 1000,
    'Cars, as in photographs, 96 px, by name, body and colour, or a part of these. Needs the extra `text`: '
    "`pip install 'latentdiff[text]'`.\n\n" + zoo_cars.CARD,
    "16, cond='a red convertible'", zoo_cars.TERMS, zoo_cars.FLAWS, sharpen=1500)

def shortened(caption, rng):
    "The caption without some of its parts, so that 'not mentioned' comes to mean 'as you like'"
    things = [o for o in re.split(', | and ', caption.removeprefix('a bedroom with ')) if rng.random() > .3]
    start = ', '.join(things[:-1]) + ' and ' if len(things) > 1 else ''
    return 'a bedroom with ' + start + things[-1] if things else 'a bedroom'

def denoiser(recipe, folder, latents, p, seed):
    "Trained on what the recipe tells it"
    if recipe.by == 'nothing': return make_denoiser(folder, latents, p, seed)
    if recipe.by == 'car': return zoo_cars.denoiser(folder, latents, p, seed)
    if recipe.by == 'class': told = class_conditioner(latents, seed)
    else:
        rng, text = random.Random(seed), TextConditioner()
        told = text, text.rows([shortened(o, rng) for o in latents.captions])
    return make_conditional(folder, latents, p, *told, seed=seed)

def sharpened(recipe, folder, images, seed):
    "The autoencoder with a decoder that a discriminator and feature loss have taught; its latents are what they were"
    def make(out):
        ae, pixels = load_component(folder/'autoencoder'), [some_pixels(images, o, seed, 8000) for o in ('train', 'valid')]
        sharpen_decoder(ae, *pixels, recipe.sharpen, flip=True, seed=seed)
        save_component(ae, out)
        return quality(ae, pixels[1])
    of = dict(autoencoder=made(folder/'autoencoder')['fingerprint'])
    return load_component(artefact(folder/'sharpened', make, of, dict(steps=recipe.sharpen, seed=seed)))

def pack(pipe, place):
    "Save the pipeline in half precision, and load it again as a reader will"
    pipe.autoencoder.half()
    pipe.denoiser.half()
    pipe.save_pretrained(place)
    return LatentDiffusionPipeline.from_pretrained(place)

def told_at_random(recipe, images, n):
    "What the samples behind the scores are told: each class equally often, or the captions of held-out images"
    if recipe.by == 'class': return [i % len(images.classes) for i in range(n)]
    if recipe.by in ('caption', 'car'):
        return [images.captions[images.valid_idxs[i % len(images.valid_idxs)]] for i in range(n)]

def closest(pipe, images, px):
    "Mean distance of samples, and of as many held-out images, to the nearest training image, between latents, each number of variance 1"
    z = lambda x: torch.cat([pipe.autoencoder.encode(from_uint8(o).to(pipe.device)).flatten(1).cpu() for o in x.split(64)])
    train, valid = z(images.pixels(images.train_idxs)), z(images.pixels(images.valid_idxs[:len(px)]))
    return [nearest_neighbours(o, train)[1].mean().item()/train.shape[1]**.5 for o in (z(px), valid)]

def measure(pipe, recipe, folder, images, seed):
    "Everything that the card says, a dict; the samples"
    cond = told_at_random(recipe, images, recipe.n)
    px = pipe.pixels(recipe.n, recipe.sample_steps, recipe.sampler, seed=seed, bs=32, **(dict(cond=cond, guidance=recipe.guidance) if cond else {}))
    judge, floor = make_judge(folder, images, seed), images.train_idxs[-recipe.n:]
    d = evaluate(px, features(judge, images, idxs=images.valid_idxs), judge, features(judge, images, idxs=floor), seed)
    if recipe.by == 'class':
        reader = train_reader(images.pixels(images.train_idxs), images.labels[images.train_idxs, None], seed=seed + 1)
        right = lambda x, y: (reader.read(x)[:, 0] == y).float().mean().item()
        d |= dict(obeyed=right(px, torch.tensor(cond)), real_obeyed=right(images.pixels(images.valid_idxs), images.labels[images.valid_idxs]))
    if recipe.by == 'car': d |= zoo_cars.obedience(pipe, px, images, judge)
    d['nearest'], d['nearest_real'] = closest(pipe, images, px[:256])
    return d, px

CARD = """# {name}

{what}

    from latentdiff.pipeline import LatentDiffusionPipeline
    pipe = LatentDiffusionPipeline.from_pretrained('{name}')
    images = pipe.draw({call})

| | |
|---|---|
| data | {terms}; {n_train:,} pictures of {size} px for training, {n_real:,} held out |
| autoencoder | {ae_params:.2f}M parameters, latents {latent}, {ae_steps:,} steps of {ae_bs}{sharp}; PSNR {psnr:.1f} dB (pooled over {n_ae:,} held-out pictures) |
| denoiser | {net_params:.2f}M parameters, {steps:,} steps of {bs}, Muon at {lr:g}, seed {seed} |
| machine | {machine}; {hours:.1f} hours in all |
| KID | {kid:.4f} ± {kid_se:.4f}, real against real {kid_floor:.4f} ± {kid_floor_se:.4f} |
| FID | {fid:.2f}, real against real {fid_floor:.2f} |
| protocol | {n_fake:,} samples{asked}, {drawn}, seed {seed}, against the held-out pictures; features of {extractor} |
| training pictures | {nearest:.2f} from a sample to the nearest one, {nearest_real:.2f} from a held-out picture (root mean square between latents, 256 of each) |
{obeys}
## What it does badly

{flaws}
"""

OBEYS = ('| obedience | a classifier that is right about {real_obeyed:.1%} of the held-out pictures finds what was '
         'asked for in {obeyed:.1%} of the samples |\n')

def stages_of(recipe):
    "The folders of what was trained"
    return ['autoencoder', 'latents', 'unet' if recipe.by == 'nothing' else 'denoiser', *['sharpened']*bool(recipe.sharpen)]

def machine():
    "What this is, in words"
    cpu = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{cpu} CPU'
    return f'{name}, {torch.get_num_threads()} thread' + 's'*(torch.get_num_threads() > 1)

def card(name, recipe, p, folder, images, latents, pipe, seed, d):
    "README.md of the packed pipeline"
    stages = stages_of(recipe)
    ae, net = made(folder/('sharpened' if recipe.sharpen else 'autoencoder')), made(folder/stages[2])
    params = lambda o: sum(x.numel() for x in o.parameters())/1e6
    hours = sum(made(folder/o)['seconds'] for o in stages)/3600
    told = {'nothing': '', 'class': ', each class equally often'}.get(recipe.by, ', captions of held-out pictures')
    obeys = {'car': zoo_cars.OBEYS, 'class': OBEYS}.get(recipe.by, '').format(**d)
    drawn = f"{dict(dpmpp_2m='DPM-Solver++(2M)', ddpm='DDPM')[recipe.sampler]} with {recipe.sample_steps} steps"
    sharp = f', then {recipe.sharpen:,} of the decoder against a discriminator' if recipe.sharpen else ''
    facts = dict(drawn=drawn, sharp=sharp, n_train=len(images.train_idxs), n_real=len(images.valid_idxs), size=p.size,
        ae_params=params(pipe.autoencoder), net_params=params(pipe.denoiser),
        latent='x'.join(map(str, pipe.latent_shape)), psnr=ae['facts']['psnr'], n_ae=ae['facts']['n'],
        ae_steps=p.ae_steps, ae_bs=min(p.bs, 64), steps=p.steps, bs=p.bs, lr=p.lr, machine=machine(), hours=hours,
        seed=seed, asked=told and f'{told}, guidance {recipe.guidance:g}', obeys=obeys)
    return CARD.format(name=name, **{**asdict(recipe), **d, **facts})

def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('name', choices=RECIPES)
    a.add_argument('--data', help='as for latentdiff-run')
    a.add_argument('--seed', type=int, default=0)
    a = a.parse_args()
    recipe, seed = RECIPES[a.name], a.seed
    p = replace(preset('cpu', recipe.data), **recipe.changes)
    folder = runs_home()/a.name
    images = zoo_cars.Cars(p.size, p.n, seed) if recipe.by == 'car' else open_images(a.data or recipe.data, p.size, p.n, seed=seed)
    if recipe.held: images.split([i >= len(images) - recipe.held for i in range(len(images))])
    print(images, p, sep='\n', flush=True)
    ae = make_autoencoder(folder, images, p, seed)
    latents = make_latents(folder, images, ae, p, flip=False if recipe.by == 'caption' else None)
    net, process = denoiser(recipe, folder, latents, p, seed)
    if recipe.sharpen: ae = sharpened(recipe, folder, images, seed)
    pipe = pack(LatentDiffusionPipeline(ae, net, process, p.size), HERE/'latentdiff'/'zoo'/a.name)
    of = ' '.join(made(folder/o)['fingerprint'] for o in stages_of(recipe)[2:])
    if not (folder/'measured.json').exists() or read_json(folder/'measured.json', 'delete it').get('of') != of:
        d, px = measure(pipe, recipe, folder, images, seed)
        d['of'] = of
        save_png(image_grid(from_uint8(px[:40]), nrow=10), folder/'grid.png')
        write_json(folder/'measured.json', d, 1)
        if recipe.by == 'car': zoo_cars.pictures(pipe, images, px, folder, recipe.guidance, seed)
    d = read_json(folder/'measured.json', 'delete it')
    write_whole(HERE/'latentdiff'/'zoo'/a.name/'README.md', card(a.name, recipe, p, folder, images, latents, pipe, seed, d))
    print(d)

if __name__ == '__main__': main()
