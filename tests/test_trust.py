"""Malformed arguments, files and networks at the doors of `data`, `files`, `rooms`, `autoencoder`, `noisify` and `kid_eval`:
one line that names what is wrong. `python tests/test_trust.py` counts the calls that answer otherwise."""
import bz2, http.server, io, json, lzma, math, pickle, tarfile, threading, warnings, zipfile
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from latentdiff import autoencoder as A, data as D, files as F, kid_eval as K, noisify as N, rooms as R
from latentdiff.core import UserError, save_component
from errors import one_line

nan, inf = math.nan, math.inf
X = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2 - 1    # images
PX, Z = D.to_uint8(X), torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
FEATS = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
ROOMS = D.open_images('rooms', 16, n=20)
AE, FLOW = A.KLAutoencoder(3, (8,), 2, 1, 4).eval(), N.Process()
NOWHERE = Path(__file__)/'x.zip'   # no folder can be made there
NET = K.Extractor(torch.nn.Identity(), 'mean', 'cpu')
NET.embed = lambda pixels: pixels.float().mean((2, 3)).repeat(1, 3)

def holed(x):
    x = x.clone()
    x.view(-1)[3] = nan
    return x

def each(f, arg, *bad, title=None, says=None, **good):
    """{title: (call, what the message has to name)} of one function, one argument and its bad values; `good`: the other arguments.
    Numbers are named with their argument, texts by themselves"""
    rows = {}
    for i, v in enumerate(bad):
        value = repr(v)[:60] if isinstance(v, (int, float, str)) else ''
        names = (says,) if says is not None else (value,) if isinstance(v, str) and v else (arg, value)
        rows[f'{title or f.__name__}({arg}={value or f"{i}: {type(v).__name__}"})'] = partial(f, **good, **{arg: v}), names
    return rows

COUNT = 0, -3, 2.5, nan, '7', True, 10**12     # where a whole number above 0 is asked for
NUMBER = 'a', nan, 1.5, None                   # where any whole number will do
BATCH = None, [1.], X.numpy(), X[0], X[None], X[:, :2], X[:0], X.long(), PX, X*200, holed(X), X*inf
PIXELS = None, PX.numpy(), PX[0], PX[:0], PX[:, :2], X*3, holed(X)
LIKE = None, Z[:2], Z[:, :1], Z.long(), Z[..., :1]     # where something like Z is asked for
SET = None, FEATS.numpy(), FEATS[0], FEATS[None], FEATS[:, :5], holed(FEATS), FEATS*inf

CALLS = {
    **each(R.rooms, 'n', *COUNT[:-1], size=16), **each(R.rooms, 'size', *COUNT, None, n=2), **each(R.rooms, 'seed', *NUMBER, n=2, size=16),
    **each(R.rooms, 'start', -1, 1.5, 'a', nan, n=2, size=16), **each(R.room_factors, 'index', -1, 1.5, 'a', None, seed=0),
    **each(R.room_codes, 'index', [-1], [.5], ['a'], None, seed=0), **each(R.draw_rooms, 'size', *COUNT, seed=0, idxs=np.arange(2)),
    **each(R.draw_rooms, 'idxs', [-1], [.5], seed=0, size=16), **each(R.render_room, 'size', *COUNT, factors={}),
    **each(R.render_room, 'factors', None, ['red'], size=16), **each(R.render_room, 'factors', dict(jitter=dict(turn=nan)), size=16, says='turn is nan'),
    **each(R.room_caption, 'factors', None, {}), **each(R.room_caption, 'factors', dict(R.room_factors(0, 0), bed='pink'), says="bed is 'pink'"),
    **each(D.open_images, 'size', *COUNT, None, data='rooms'), **each(D.open_images, 'n', *COUNT, data='rooms', size=16),
    **each(D.open_images, 'channels', 0, 2, -1, '3', data='rooms', size=16), **each(D.open_images, 'seed', *NUMBER, data='rooms', size=16),
    **each(D.open_images, 'data', None, '', 5, b'rooms', size=16, says='no folder or file'), **each(D.open_images, 'data', 'a\0b', 'x'*5000, '~nobody-of-that-name/x', size=16),
    **each(ROOMS.pixels, 'idxs', [1000], [-21], [.5], ['a'], 3, torch.ones(20, dtype=torch.bool), title='Images.pixels'),
    **each(D.to_uint8, 'images', None, X.numpy(), X[0, 0], X[:, :2], X[None], holed(X)), **each(D.from_uint8, 'pixels', None, X, PX.long(), PX.numpy()),
    **each(D.as_images, 'x', None, X.long()), **each(D.image_grid, 'images', None, [], X[:0], X[:, :2], holed(X)),
    **each(D.image_grid, 'nrow', 0, -1, 'a', images=X), **each(D.show_images, 'nrow', 0, -1, 'a', images=X),
    **each(D.show_images, 'images', None, X[:0], X[:, :2]), **each(D.split_of, 'name', None, 3), **each(lambda valid_pct: D.split_of('a', valid_pct), 'valid_pct', -1, 101, nan, '9', title='split_of'),
    **each(D.pick, 'n', -1, 2.5, 'a', names=['a', 'b', 'c'], seed=0), **each(D.fit_pixels, 'size', *COUNT, x=PX, channels=3),
    **each(D.fit_pixels, 'channels', 2, 0, x=PX, size=8), **each(D.fit_pixels, 'x', None, PX[:, :2], PX[0], size=8, channels=3),
    **each(D.image_dls, 'bs', 0, -1, 'a', images=ROOMS, device='cpu'),
    **each(F.shard_names, 'spec', None, 5, 'a', says='names no shards'), **each(F.shard_names, 'seed', 'a', nan, spec='{0..3}.tar'),
    **each(F.npz_pixels, 'path', None, 5, 'nowhere.npz', says='cannot be read'), **each(F.at_hand, 'data', None, 5, '', 'a\0b', 'x'*5000, says='no folder or file'),
    **each(F.hub_folder, 'n', 0, -1, 'a', spec='nobody/nothing'), **each(F.hub_folder, 'spec', '', n=3, says='spec is empty'),
    **each(F.unpacked, 'archive', None, 'nowhere.zip', '.', says='is no archive'),
    **each(F.download, 'url', None, '', 'nowhere', 'file:///etc/hostname', path=NOWHERE, says='begin with https://'),
    **each(F.download, 'url', 'http://[1/x.zip', 'http://127.0.0.1/ä.zip', path=NOWHERE, says='could not download'),
    **each(F.load_pixels, 'size', 0, -1, 'a', file=b''), **each(F.load_pixels, 'channels', 2, 0, file=b'', size=8),
    **each(AE.encode, 'images', *BATCH), **each(AE.posterior, 'images', X[:, :1], X*200), **each(AE.forward, 'images', None, X[:, :1], PX),
    **each(AE.decode, 'z', None, Z.numpy(), Z[:, :1], Z[:, :3], Z[0], Z.long(), holed(Z)),
    **each(A.psnr, 'y', None, X[:1], X[:, :1], PX, x=X), **each(A.psnr, 'x', PX, y=PX), **each(A.ssim, 'y', X[:1], X[:, :1], PX, x=X),
    **each(A.KLAutoencoder, 'widths', (12,), (0,), 'a', says='width'), **each(A.KLAutoencoder, 'patch', 0, -1, 1.5, 'a'),
    **each(A.KLAutoencoder, 'latent_channels', 0, -1, 1.5, 'a'), **each(A.KLAutoencoder, 'in_channels', 0, 'a'),
    **each(A.KLAutoencoder, 'latent_std', [0.]*4, [nan]*4, [1.]*3, [-1.]*4, 'a', 1., latent_mean=[0.]*4),
    **each(A.KLAutoencoder, 'latent_mean', [nan]*4, [0.]*3, 'abcd', latent_std=[1.]*4),
    **each(AE.set_scale, 'std', torch.zeros(4), torch.full((4,), nan), torch.ones(3), 1., None, mean=torch.zeros(4), says='latent_std'),
    **each(AE.set_scale, 'mean', torch.zeros(3), None, std=torch.ones(4), says='latent_mean'),
    **each(A.fit_bs, 'size', 0, -1, 'a'), **each(AE.fit_scale, 'x', None, X[:0], X*200, holed(X)),
    **each(A.quality, 'x', *PIXELS, ae=AE),  **each(A.some_pixels, 'most', -1, 0, 'a', images=ROOMS, split='train', seed=0),
    **each(A.open_autoencoder, 'spec', None, 5, '', 'a\0b', 'x'*5000, says='neither a folder nor a Hub id'), **each(A.ae_learner, 'x_train', *PIXELS, ae=AE, x_valid=PX, device='cpu'),
    **each(A.ae_learner, 'x_valid', None, X[:0], ae=AE, x_train=PX, device='cpu'),
    **each(N.Process, 'steps', 0, -1, 1.5, 'a', None, True), **each(N.Process, 'beta_start', 0., -1., nan, 2., 'a', schedule='ddpm_linear'), **each(N.Process, 'beta_end', 1., nan, None, schedule='ddpm_linear'),
    **each(N.Process, 'sigma_min', 0., -1., nan, 90., 'a', schedule='edm', target='v'), **each(N.Process, 'sigma_max', 0., inf, nan, schedule='edm', target='v'), **each(N.Process, 'rho', 0., -1., nan, inf, 'a', schedule='edm', target='v'),
    **each(N.Process, 'schedule', None, [], {}, 'edm2'), **each(N.Process, 'target', None, 'V'), **each(N.Process, 'times', 3),
    **each(FLOW.levels, 't', -.1, 1.5, nan, 'a', None, True), **each(FLOW.add_noise, 'eps', *LIKE, x0=Z, t=torch.full((5,), .5)), **each(FLOW.add_noise, 'x0', None, Z.long(), eps=Z, t=torch.full((5,), .5)),
    **each(FLOW.add_noise, 't', -1., 2., nan, 'a', None, torch.full((3,), .5), torch.full((5,), 999.), torch.full((5, 1), .5), x0=Z, eps=Z),
    **each(FLOW.noisify, 't', 2., torch.full((2,), .5), torch.full((5,), nan), x0=Z), **each(FLOW.noisify, 'eps', *LIKE[1:], x0=Z), **each(FLOW.noisify, 'x0', Z.long()),
    **each(FLOW.target_of, 'eps', *LIKE, x0=Z, t=torch.full((5,), .5)), **each(FLOW.x0_eps, 'pred', *LIKE, x_t=Z, t=torch.full((5,), .5)), **each(FLOW.x0_eps, 't', torch.full((3,), .5), 2., 'a', pred=Z, x_t=Z),
    **each(FLOW.sample_t, 'n', -1, 2.5, 'a', None), **each(FLOW.t_of, 'ratio', 'a', None), **each(FLOW.time_input, 't', 'a', None, 2.), **each(FLOW.t_of_time, 'time', 'a', None),
    **each(N.Process.from_diffusers, 'scheduler', None, 'ddpm', 3), **each(FLOW.to_diffusers, 'cls', 'ddpm', dict), **each(N.Latents, 'folder', None, 5, says='manifest.json is missing'),
    **each(K.kid, 'a', *SET, b=FEATS), **each(K.kid, 'b', *SET, a=FEATS), **each(K.kid, 'a', FEATS[:0], FEATS[:3], b=FEATS, says='at least 4 images'), **each(K.fid, 'a', *SET, b=FEATS), **each(K.fid, 'b', FEATS[:, :5], X, a=FEATS),
    **each(K.kid_subsets, 'n', 0, -1, 'a', a=FEATS, b=FEATS, size=10), **each(K.kid_subsets, 'size', 0, -1, 'a', 2.5, a=FEATS, b=FEATS, n=2), **each(K.kid_subsets, 'b', FEATS[:, :5], X, a=FEATS, n=2, size=10),
    **each(K.kid_blocks, 'size', 0, -1, 'a', 4.5, a=FEATS, b=FEATS), **each(K.kid_blocks, 'b', FEATS[:, :5], X[:, 0], a=FEATS, size=4),
    **each(K.features, 'images', None, [], [X], X.numpy(), X[0], X[:0], X*200, holed(X), X[..., :8], X[:, :2], PX.long(), FEATS.long(), extractor=NET),
    **each(K.features, 'bs', 0, -1, 'a', images=X, extractor=NET), **each(K.features, 'idxs', [99], [.5], [-99], images=X, extractor=NET), **each(K.features, 'idxs', [99], images=ROOMS, extractor=NET),
    **each(K.evaluate, 'fake', X*200, holed(X), X[..., :8], X[..., :8, :8], X[:0], None, real=X, extractor=NET), **each(K.evaluate, 'real', X*200, X[..., :8, :8], ROOMS.names, fake=X, extractor=NET),
    **each(K.evaluate, 'floor_from', X*200, X[..., :8, :8], fake=X, real=X, extractor=NET), **each(K.evaluate, 'real', FEATS, fake=X, extractor=NET, says='from one extractor'),
    **each(K.evaluate, 'seed', 'a', nan, fake=FEATS, real=FEATS, extractor=NET), **each(K.halves, 'x', FEATS[:1], FEATS[:0]),
    **each(K.nearest_neighbours, 'k', 0, -1, 41, 'a', 1.5, fake=FEATS, train=FEATS), **each(K.nearest_neighbours, 'train', None, FEATS[:, :5], FEATS[:0], holed(FEATS), X, PX, fake=FEATS),
    **each(K.nearest_neighbours, 'fake', None, FEATS[:0], holed(FEATS), train=FEATS), **each(K.nearest_neighbours, 'train', PX, fake=X),
    **each(lambda x, real: K.KID().update(x, real), 'real', 'fake', 'real', None, 2, x=FEATS, title='KID.update'), **each(lambda x: K.FID().update(x, True), 'x', None, X, FEATS.numpy(), holed(FEATS), title='FID.update'),
    **each(K.EfficientNetFeatures, 'size', 0, -1, 'a', device='cpu'), **each(K.EfficientNetFeatures, 'blur', -1., nan, 'a', device='cpu'),
    **each(K.train_classifier, 'labels', torch.full((6,), -1), torch.zeros(5).long(), torch.zeros(6), None, pixels=PX[:, :1], valid=(PX[:, :1], torch.zeros(6).long())),
    **each(K.train_classifier, 'pixels', None, PX, labels=torch.zeros(6).long(), valid=(PX[:, :1], torch.zeros(6).long())),
    **each(K.train_classifier, 'epochs', -1, 'a', 1.5, pixels=PX[:, :1], labels=torch.zeros(6).long(), valid=(PX[:, :1], torch.zeros(6).long())),
    **each(K.inception_weights, 'url', 'nowhere', '', says='no weights from'),
}

def answer(call, names):
    "None if the call is refused in one line that has `names` in it, else what happened"
    try: call()
    except UserError as e: message = str(e)
    except Exception as e: return f'{type(e).__name__}: {" ".join(str(e).split())[:90]}'
    else: return 'no word'
    missing = [o for o in names if o not in message]
    return f'several lines: {message!r}' if '\n' in message else f'does not name {missing}: {message}' if missing else None

if __name__ == '__main__':
    import os, sys, tempfile, time
    os.environ |= dict(LATENTDIFF_DATA=tempfile.mkdtemp(), HF_HUB_OFFLINE='1', MPLBACKEND='Agg')
    warnings.simplefilter('ignore')
    start, bad = time.time(), {}
    for name, (call, names) in CALLS.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name: continue
        t = time.time()
        if why := answer(call, names): bad[name] = why
        if time.time() - t > 1: print(f'{time.time() - t:.1f} s', name, flush=True)
    for name, why in bad.items(): print(f'{name:45.90} {why}')
    print(f'{len(bad)} of {len(CALLS)} malformed calls are not refused in one line that names the argument; {time.time() - start:.1f} s')
