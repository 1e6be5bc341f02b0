"""Malformed arguments, files and networks at the doors of the library, whatever is called first in a lesson:
one line that names what is wrong. `python tests/test_trust.py` counts the calls that answer otherwise."""
import bz2, gzip, http.server, io, itertools, json, lzma, math, os, pickle, random, re, socket, tarfile, tempfile, threading, time, warnings, zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import unquote
import numpy as np, pytest, torch
from latentdiff import autoencoder as A, conditioning as G, core as C, data as D, few_step as E, files as F, kid_eval as K, noisify as N, pipeline as P, report, rooms as R, sampling as S, training as T, unet as U
from latentdiff.core import UserError, made, save_component
from latentdiff.data import kind_of
from errors import one_line
from latentdiff import denoisers as DE, few_step, labs_data, muon, report, sampling, source, training, unet

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

def each(f, arg, /, *bad, title=None, says=None, **good):
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
BATCH = None, [1.], X.numpy(), X[0], X[None], X[:, :2], X[:0], X.long(), PX, holed(X), X*inf
PIXELS = None, PX.numpy(), PX[0], PX[:0], PX[:, :2], X*3, holed(X)
ODD = X.to_sparse(), X.to(torch.float8_e4m3fn), torch.nested.nested_tensor([*X], layout=torch.jagged)   # what can hardly be reckoned with
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
    **each(D.as_images, 'x', None, X.long(), holed(X), X*inf), **each(D.image_grid, 'images', None, [], X[:0], X[:, :2], holed(X)),
    **each(D.image_grid, 'nrow', 0, -1, 'a', images=X), **each(D.show_images, 'nrow', 0, -1, 'a', images=X),
    **each(D.show_images, 'titles', 3, 'ab', 5., images=X), **each(D.show_images, 'rows', 3, 'ab', images=X), **each(D.show_images, 'cols', 3, 'ab', images=X),
    **each(D.show_images, 'images', None, X[:0], X[:, :2]), **each(D.split_of, 'name', None, 3), **each(lambda valid_pct: D.split_of('a', valid_pct), 'valid_pct', -1, 101, nan, '9', title='split_of'),
    **each(D.pick, 'n', -1, 2.5, 'a', names=['a', 'b', 'c'], seed=0), **each(D.fit_pixels, 'size', *COUNT, x=PX, channels=3),
    **each(D.fit_pixels, 'channels', 2, 0, x=PX, size=8), **each(D.fit_pixels, 'x', None, PX[:, :2], PX[0], size=8, channels=3),
    **each(D.image_dls, 'bs', 0, -1, 'a', images=ROOMS, device='cpu'),
    **each(F.shard_names, 'spec', None, 5, 'a', says='names no shards'), **each(F.shard_names, 'seed', 'a', nan, spec='{0..3}.tar'),
    **each(F.npz_pixels, 'path', None, 5, 'nowhere.npz', says='cannot be read'), **each(F.at_hand, 'data', None, 5, '', 'a\0b', 'x'*5000, says='no folder or file'), **each(F.at_hand, 'data', 'http://\udcff/a.zip', says='could not', title='surrogate'),
    **each(F.hub_folder, 'n', 0, -1, 'a', spec='nobody/nothing'), **each(F.hub_folder, 'spec', '', n=3),
    **each(F.unpacked, 'archive', None, 'nowhere.zip', '.', says='is no archive'),
    **each(F.download, 'url', None, '', 'nowhere', 'file:///etc/hostname', path=NOWHERE, says='begin with https://'),
    **each(F.download, 'url', 'http://[1/x.zip', 'http://127.0.0.1/ä.zip', path=NOWHERE, says='could not download'),
    **each(F.load_pixels, 'size', 0, -1, 'a', file=b''), **each(F.load_pixels, 'channels', 2, 0, file=b'', size=8),
    **each(AE.encode, 'images', *BATCH), **each(AE.posterior, 'images', X[:, :1]), **each(AE.forward, 'images', None, X[:, :1], PX),
    **each(AE.decode, 'z', None, Z.numpy(), Z[:, :1], Z[:, :3], Z[0], Z.long(), holed(Z)),
    **each(A.psnr, 'x', FEATS[0], y=FEATS[0], says='x is torch.float32 (8,)'),
    **each(D.like, 'x', *ODD), **each(D.as_images, 'x', *ODD), **each(D.check_images, 'x', *ODD, says='images are'), **each(A.psnr, 'y', *ODD, x=X), **each(FLOW.add_noise, 'x0', *ODD, eps=X, t=torch.rand(6)),
    **each(K.nearest_neighbours, 'fake', FEATS[0], FEATS[0, 0], train=FEATS),
    **each(FLOW.noisify, 'x0', X[0, 0, 0, 0], *ODD), **each(N.ddpm_levels, 'table', torch.tensor(.5), t=torch.rand(2)), **each(K.subset_kids, 'ia', torch.tensor(1), torch.rand(1, 4).to_mkldnn(), ib=[[0, 1]], a=FEATS, b=FEATS), **each(T.seconds_per_step, 'z', X[0, 0, 0, 0], net=U.UNet(3, widths=(8,), attn_levels=())), **each(G.ConditionalUNet(3, widths=(8, 16), depth=1, dim=8).forward, 'x', X[0, 0, 0, 0], time=torch.rand(6), title='ConditionalUNet of'), **each(U.loss_by_level, 'z', X[0, 0, 0, 0], *ODD, net=U.UNet(3, widths=(8,), attn_levels=()), process=FLOW), **each(A.adaptive_weight, 'adv', torch.tensor(1.), rec=X.clone().requires_grad_().sum(), last=X, says='must have gradients'), **each(U.timestep_embedding, 'time', *ODD, X[:, 0, 0, 0].to(torch.complex64), dim=8), **each(FLOW.levels, 't', torch.rand(3).to_sparse(), torch.rand(3).to(torch.complex64)), **each(muon.orthogonalise, 'x', X[0].bool(), X[0].to_sparse()), **each(C.spread, 'items', X[0, 0, 0, 0], X.to_sparse(), torch.nested.nested_tensor([*X]), n=2), **each(D.image_grid, 'images', *ODD), **each(D.as_images, 'x', PX.to_sparse()), **each(DE.as_sequence, 'x', X.to_sparse()), **each(S.inpaint, 'mask', (X > 0).to_sparse(), net=lambda x, t: x, process=FLOW, z=X), **each(U.denoiser_learner, 'z_valid', X[0, 0, 0, 0], net=U.UNet(3, widths=(8,), attn_levels=()), process=FLOW, z_train=X), **each(T.DeviceLoader, 'x', X[0, 0, 0, 0]), **each(K.kid, 'a', FEATS.to_sparse(), FEATS.to(torch.float8_e4m3fn), b=FEATS, says='features are'),
    **each(A.psnr, 'y', None, X[:1], X[:, :1], PX, x=X), **each(A.psnr, 'x', PX, y=PX), **each(A.ssim, 'y', X[:1], X[:, :1], PX, x=X),
    **each(A.KLAutoencoder, 'widths', (12,), (0,), 'a', says='width'), **each(A.KLAutoencoder, 'patch', 0, -1, 1.5, 'a'),
    **each(A.KLAutoencoder, 'latent_channels', 0, -1, 1.5, 'a'), **each(A.KLAutoencoder, 'in_channels', 0, 'a'),
    **each(A.KLAutoencoder, 'latent_std', [0.]*4, [nan]*4, [1.]*3, [-1.]*4, 'a', 1., latent_mean=[0.]*4),
    **each(A.KLAutoencoder, 'latent_mean', [nan]*4, [0.]*3, 'abcd', latent_std=[1.]*4),
    **each(AE.set_scale, 'std', torch.zeros(4), torch.full((4,), nan), torch.ones(3), 1., None, mean=torch.zeros(4), says='latent_std'),
    **each(AE.set_scale, 'mean', torch.zeros(3), None, std=torch.ones(4), says='latent_mean'),
    **each(A.fit_bs, 'size', 0, -1, 'a'), **each(AE.fit_scale, 'x', None, X[:0], X*200, holed(X)),
    **each(A.quality, 'x', *PIXELS, ae=AE),  **each(D.some_pixels, 'most', -1, 0, 'a', images=ROOMS, split='train', seed=0),
    **each(A.open_autoencoder, 'spec', None, 5, '', 'a\0b', 'x'*5000, says='neither a folder nor a Hub id'), **each(A.ae_learner, 'x_train', *PIXELS, ae=AE, x_valid=PX, device='cpu'),
    **each(A.ae_learner, 'x_valid', None, X[:0], ae=AE, x_train=PX, device='cpu'),
    **each(N.Process, 'steps', 0, -1, 1.5, 'a', None, True), **each(N.Process, 'steps', 1, schedule='ddpm_linear_zero', title='Process whose last level is noise alone'), **each(N.Process, 'beta_start', 0., -1., nan, 2., 'a', schedule='ddpm_linear'), **each(N.Process, 'beta_end', 1., nan, None, schedule='ddpm_linear'),
    **each(N.Process, 'sigma_min', 0., -1., nan, 90., 'a', schedule='edm', target='v'), **each(N.Process, 'sigma_max', 0., inf, nan, schedule='edm', target='v'), **each(N.Process, 'rho', 0., -1., nan, inf, 'a', schedule='edm', target='v'),
    **each(N.Process, 'schedule', None, [], {}, 'edm2'), **each(N.Process, 'target', None, 'V'), **each(N.Process, 'times', 3),
    **each(FLOW.levels, 't', -.1, 1.5, nan, 'a', None, True), **each(FLOW.add_noise, 'eps', *LIKE, x0=Z, t=torch.full((5,), .5)), **each(FLOW.add_noise, 'x0', None, Z.long(), eps=Z, t=torch.full((5,), .5)),
    **each(FLOW.add_noise, 't', -1., 2., nan, 'a', None, torch.full((3,), .5), torch.full((5,), 999.), torch.full((5, 1), .5), x0=Z, eps=Z),
    **each(FLOW.noisify, 't', 2., torch.full((2,), .5), torch.full((5,), nan), x0=Z), **each(FLOW.noisify, 'eps', *LIKE[1:], x0=Z), **each(FLOW.noisify, 'x0', Z.long()),
    **each(FLOW.target_of, 'eps', *LIKE, x0=Z, t=torch.full((5,), .5)), **each(FLOW.x0_eps, 'pred', *LIKE, x_t=Z, t=torch.full((5,), .5)), **each(FLOW.x0_eps, 't', torch.full((3,), .5), 2., 'a', pred=Z, x_t=Z),
    **each(FLOW.sample_t, 'n', -1, 2.5, 'a', None), **each(FLOW.t_of, 'ratio', 'a', None, torch.tensor([nan]), torch.tensor(-1.)), **each(FLOW.time_input, 't', 'a', None, 2., torch.tensor([.5, nan]), torch.tensor(2)), **each(FLOW.t_of_time, 'time', 'a', None, torch.tensor([nan]), torch.tensor(inf)), **each(FLOW.levels, 't', np.array([3]), torch.tensor(2.5), torch.tensor([nan])),
    **each(N.Process.from_diffusers, 'scheduler', None, 'ddpm', 3), **each(FLOW.to_diffusers, 'cls', 'ddpm', dict), **each(N.Latents, 'folder', None, 5, says='manifest.json is missing'),
    **each(K.kid, 'a', *SET, b=FEATS), **each(K.kid, 'b', *SET, a=FEATS), **each(K.kid, 'a', FEATS[:0], FEATS[:3], b=FEATS, says='at least 4 images'), **each(K.fid, 'a', *SET, b=FEATS), **each(K.fid, 'b', FEATS[:, :5], X, a=FEATS),
    **each(K.kid_subsets, 'n', 0, -1, 'a', a=FEATS, b=FEATS, size=10), **each(K.kid_subsets, 'size', 0, -1, 'a', 2.5, a=FEATS, b=FEATS, n=2), **each(K.kid_subsets, 'b', FEATS[:, :5], X, a=FEATS, n=2, size=10),
    **each(K.kid_blocks, 'size', 0, -1, 'a', 4.5, a=FEATS, b=FEATS), **each(K.kid_blocks, 'b', FEATS[:, :5], X[:, 0], a=FEATS, size=4),
    **each(K.features, 'images', None, [], [X], X.numpy(), X[0], X[:0], X*200, holed(X), X[:, :2], PX.long(), FEATS.long(), extractor=NET),
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

Z8, WHERE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, 8, 8, dtype=torch.bool)
UNET, CATS = U.UNet(4, widths=(8, 16), depth=1).eval(), G.ClassConditioner(['cat', 'dog'], 8)
TOLD = G.Conditioned(G.ConditionalUNet(4, widths=(8, 16), depth=1, dim=8), CATS).eval()
PIPE, CATPIPE = (P.LatentDiffusionPipeline(A.KLAutoencoder(3, (8,), 4, 1, 4).eval(), o, FLOW, 32) for o in (UNET, TOLD))
DRAW, ASK = dict(process=FLOW, net=lambda x, t, cond=None: x), dict(num_images=1, num_inference_steps=2)
SAMPLE = dict(DRAW, shape=(4,), device='cpu', n=2, steps=2)
SEEDS, WHOLE = (.5, 'a', nan, None, True), (0, -3, 2.5, nan, '7', True)
but = lambda d, k: {o: v for o, v in d.items() if o != k}

CALLS |= {
    **each(S.generators, 'seed', *SEEDS, 2**63, -2**63 - 1, n=1), **each(S.generators, 'n', -1, .5, 'a', None, seed=0), **each(S.generators, 'first', -1, .5, seed=0, n=1),
    **each(S.start_noise, 'seed', *SEEDS, 2**63, process=FLOW, shape=(2, 3)), **each(S.start_noise, 'shape', None, (), (0, 3), 5, (2, -1), process=FLOW), **each(S.start_noise, 't', 2., nan, None, process=FLOW, shape=(2, 3)),
    **each(S.time_steps, 'n', *WHOLE, process=FLOW), **each(S.time_steps, 'spacing', 'x', 5, process=FLOW, n=3), **each(S.time_steps, 'start', 0., -1., 2., nan, None, process=FLOW, n=3),
    **{k: v for o, bad in dict(n=WHOLE, bs=WHOLE, steps=WHOLE, seed=(*SEEDS, 2**63), shape=(None, (0,), (-1,), 5), sampler=('x', [], 5)).items() for k, v in each(S.sample, o, *bad, **but(SAMPLE, o)).items()},
    **each(S.img2img, 'strength', -1, 2, nan, None, z=Z8, **DRAW), **each(S.img2img, 'z', None, [], Z8.numpy(), Z8.long(), **DRAW), **each(S.img2img, 'seed', *SEEDS, z=Z8, **DRAW),
    **each(S.inpaint, 'mask', None, Z8, z=Z8, **DRAW), **each(S.inpaint, 'repeats', 0, -1, .5, z=Z8, mask=WHERE, **DRAW), **each(S.inpaint, 'z', None, Z8.long(), mask=WHERE, **DRAW),
    **each(S.slerp, 'b', None, Z8[:2], Z8.long(), a=Z8, w=.5), **each(S.interpolate, 'k', *WHOLE, None, a=Z8, b=Z8), **each(S.interpolate, 'b', None, Z8[:2], a=Z8, k=2), 
    **{k: v for o, bad in dict(n=COUNT, bs=COUNT, steps=WHOLE, seed=(*SEEDS, 2**63), sampler=(5, [], 'x', {}), spacing=(5, 'x')).items() for k, v in each(PIPE.draw, o, *bad, **but(dict(n=1, steps=2, bs=1), o)).items()},
    **each(PIPE.draw, 'prompt', 'a', n=1, says='called cond'), **each(PIPE.draw, 'eta', 0, n=1, says='does not know eta'), **each(PIPE.pixels, 'n', *COUNT), **each(PIPE.decode, 'z', None, [], Z8[:0], Z8[:, :1], Z8.long(), holed(Z8), Z8.numpy()), **each(PIPE.decode, 'bs', 0, -1, 'a', z=Z8),
    **each(CATPIPE.draw, 'cond', [], 5.5, {}, object(), [None], 'cow', True, [['cat']], b'cat', n=1, steps=2), **each(CATPIPE.draw, 'guidance', nan, inf, [], True, 1e308, n=1, steps=2, cond='cat'), **each(CATPIPE.draw, 'negative', [], 5.5, 'cow', n=1, steps=2, cond='cat'),
    **each(P.path_of, 'n', *COUNT[:-1], pipe=PIPE, steps=2, seed=0), **each(P.path_of, 'seed', *SEEDS, n=1, pipe=PIPE, steps=2),
    **{k: v for o, bad in dict(num_images=WHOLE, num_inference_steps=WHOLE, callback_on_step_end=(5, 'a'), spacing=(5, 'x'), generator=([None], [5])).items() for k, v in each(PIPE.__call__, o, *bad, title='pipe', says='noise is drawn' if o == 'generator' else o, **but(ASK, o)).items()},
    **each(PIPE.save_pretrained, 'folder', '/proc/x/y', '/dev/null/x', says='cannot be written'), **each(P.LatentDiffusionPipeline.from_pretrained, 'name', None, 5, []), **each(P.LatentDiffusionPipeline.from_pretrained, 'name', 'a\0b', 'x'*5000, '/dev/null', says='There is no run folder'),
    **each(lambda device: PIPE.to(device), 'device', 'foo', title='to', says='cannot move to'), **each(lambda dtype: PIPE.to('cpu', dtype), 'dtype', 'x', torch.int8, title='to', says='cannot move to'), **each(PIPE.push_to_hub, 'repo_id', None, 5, terms='mine', title='push'), **each(P.model_card, 'terms', None, 5, repo_id='a/b', run='.'),
    **{k: v for o, bad in dict(size=(0, -32, '32', 33, 10**6, None, 32.), autoencoder=(None, 5), denoiser=(None, 5), process=(None, 5)).items() for k, v in each(P.LatentDiffusionPipeline, o, *bad, **but(dict(size=32, autoencoder=PIPE.autoencoder, denoiser=UNET, process=FLOW), o)).items()},
    **{k: v for o, bad in dict(in_channels=(0, -1, None, 1.5), widths=((), (0,), None, 8), depth=(0, -1, 1.5, None, 10**6), head_dim=(0, -1), groups=(5, -1), attn_levels=(5, (9,), (-1,))).items() for k, v in each(U.UNet, o, *bad).items()},
    **each(UNET.forward, 'x', None, Z8.numpy(), Z8[:, :1], Z8[0], Z8.long(), time=torch.ones(3), title='UNet.forward'), **each(UNET.forward, 'time', None, 500., torch.ones(2), 5, x=Z8, title='UNet.forward', says='time is'), **each(U.timestep_embedding, 'dim', 0, -2, 3, 'a', time=torch.ones(3), says=''),
    **each(U.loss_by_level, 'n_levels', 0, -1, 'a', net=UNET, process=FLOW, z=Z8), **each(U.loss_by_level, 'seed', *SEEDS, net=UNET, process=FLOW, z=Z8), **each(U.loss_by_level, 'z', None, Z8.numpy(), net=UNET, process=FLOW),
    **each(U.denoiser_learner, 'z_train', None, Z8.numpy(), Z8.long(), net=UNET, process=FLOW, z_valid=Z8, device='cpu'), **each(U.denoiser_learner, 'bs', 0, -1, .5, net=UNET, process=FLOW, z_train=Z8, z_valid=Z8, device='cpu'), **each(U.denoiser_learner, 'seed', .5, nan, True, net=UNET, process=FLOW, z_train=Z8, z_valid=Z8, device='cpu'),
    **each(G.ConditionalUNet, 'dim', 0, -1, 1.5, widths=(8,), depth=1), **each(G.ClassConditioner, 'classes', [], None, 5, torch.tensor(3), ['a', 'b', 'a']), **each(G.ClassConditioner, 'dim', 0, -1, 1.5, classes='ab'), **each(CATS.forward, 'labels', None, [], 5, torch.tensor(1), title='ClassConditioner.forward'), **each(CATS.forward, 'labels', ['cow'], [5], [-7], torch.tensor([9]), torch.tensor([1.]), title='ClassConditioner.forward', says='no class'),
    **each(G.Conditioned, 'drop', -1, 2, nan, None, net=TOLD.net), **each(G.guide, 'scale', nan, inf, None, True, net=TOLD, cond=['cat']*3), **each(G.guide, 'cond', [], 5, torch.tensor(1), net=TOLD, says='labels'), **each(G.guide, 'negative', np.array(0), net=TOLD, cond=['cat'], says='labels'), **each(G.TextConditioner, 'model', None, 5, []), **each(G.TextConditioner, 'max_tokens', 0, -1, 1.5), **each(G.TextConditioner().rows, 'captions', None, [], [5], 5, ['\ud800'], title='rows'),
    **each(G.train_reader, 'pixels', None, PX[:0], codes=torch.zeros(6, 2).long()), **each(G.train_reader, 'codes', None, torch.zeros(5, 2).long(), torch.zeros(6).long(), torch.zeros(6, 2), -torch.ones(6, 2).long(), pixels=PX), **each(G.FactorReader([2]).read, 'images', None, X[:0], X[:, :1], X.numpy(), title='FactorReader.read'),
    **each(E.autoguide, 'scale', nan, None, inf, net=UNET, weak=UNET), **each(E.unipc, 'ts', [], [1.], x=Z8, **DRAW), **each(E.unipc, 'order', 0, -1, x=Z8, ts=[1., 0.], **DRAW), **each(E.shortcut, 'ts', [], [1.], x=Z8, **DRAW), **each(E.draw_steps, 'n', -1, .5, None),
    **each(T.DeviceLoader, 'bs', 0, -1, .5, x=X, device='cpu'), **each(T.DeviceLoader, 'seed', .5, 'a', nan, x=X, device='cpu'), **each(C.stream, 'seed', *SEEDS), **each(C.preset, 'name', 5, ['x'], 'x', says='no preset'), **each(C.preset, 'size', 0, -1, 1.5, 10**6, name='tiny'),
    **each(C.settings_of, 'seed', *SEEDS, data='rooms', preset='tiny'), **each(C.settings_of, 'size', 1.5, -1, data='rooms', preset='tiny'), **each(C.settings_of, 'n', 1.5, 0, data='rooms', preset='tiny'), **each(C.positions, 'idxs', [[1], [2, 3]]), **each(C.checked, 'widths', (), None, 5, (0,), (1.5,), 'ab'),
    **each(C.find_class, 'name', None, 5, [], {}, 'Path', 'Run', 'run_cli', 'UserError', 'KLAutoencoder.encode_raw', 'a\0b', 'x'*5000, says='no class named'),
}

def answer(call, names):
    "None if the call is refused in one line that has `names` in it, else what happened"
    try: call()
    except UserError as e: message = str(e)
    except Exception as e: return f'{type(e).__name__}: {" ".join(str(e).split())[:90]}'
    else: return 'no word'
    missing = [o for o in names if o not in message]
    return f'several lines: {message!r}' if '\n' in message else f'does not name {missing}: {message}' if missing else None

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path/'home'

# --- what draws, and what a denoiser is trained with

SMALL, STEPS, ASKED = unet.UNet(4, widths=(8, 16), depth=1).eval(), [1., .5, 0.], dict(net=lambda x, t, cond=None: x, process=FLOW)
NO_BATCH = None, 'a', 3, [1.], Z.numpy(), Z[:0], Z.long(), Z[0, 0, 0, 0], holed(Z), Z*inf
NO_TIMES = None, 3, [], [1.], [.5, 1.], [2., 0.], [nan, 0.], [0., 0.], ['a', 'b'], [1., 1., 0.], [1., -.5], torch.zeros(0)
ANSWERS = [lambda x, t, v=v: v(x) for v in (lambda x: None, lambda x: x[:, :2], lambda x: x[:1], lambda x: x.long(), lambda x: x*nan, lambda x: x.numpy())]
NO_LEVEL = -1, 2, 1.001, nan, inf, 'a', None, True, [.5], torch.tensor([.5])

for draw in (*sampling.SAMPLERS.values(), few_step.unipc):
    CALLS |= {**each(draw, 'x', *NO_BATCH, ts=STEPS, says='x ', **ASKED), **each(draw, 'ts', *(NO_TIMES[:4] + NO_TIMES[5:] if draw is sampling.euler else NO_TIMES), x=Z, **ASKED), **each(draw, 'process', None, 'flow', 3, net=SMALL, x=Z, ts=STEPS),
              **each(draw, 'net', *ANSWERS, says='answer ', process=FLOW, x=Z, ts=STEPS), **each(draw, 'net', None, 'a', [SMALL], says='net is', title=f'{draw.__name__} asks', process=FLOW, x=Z, ts=STEPS)}

CALLS |= {
    **each(sampling.levels, 't', *NO_LEVEL, process=FLOW, title='sampling.levels'), **each(sampling.levels, 'process', None, 'flow', t=.5, title='sampling.levels'), **each(sampling.predict, 't', *NO_LEVEL, x=Z, **ASKED), **each(sampling.predict, 'x', *NO_BATCH, t=.5, says='x ', **ASKED),
    **each(sampling.time_steps, 'process', None, 'flow', n=3), **each(sampling.time_steps, 'spacing', ['a', 0], [1., nan, 0.], [.5, .5, 0.], [1., .5], [], (2., 0.), process=FLOW, n=2, says='times fall from at most 1 to 0'),
    **each(sampling.evaluations, 'sampler', 'x', None, 3, steps=3), **each(sampling.slerp, 'w', -5, 5, nan, inf, 'a', None, a=Z, b=Z), **each(sampling.sample, 'net', None, [], [SMALL, SMALL], 'a', 3, process=FLOW, n=2, shape=(4, 8, 8), steps=2, device='cpu', says='net is'),
    **each(sampling.sample, 'net', ANSWERS[4], process=FLOW, n=2, shape=(4, 8, 8), steps=2, device='cpu', title='sample asks', says='answer of torch.float32 (2, 4, 8, 8) holds'), **each(sampling.sample, 'spacing', ['a', 0], [1., .5], net=SMALL, process=FLOW, n=2, shape=(4, 8, 8), device='cpu', says='times fall from at most 1 to 0'),
    **each(sampling.img2img, 'z', Z[:0], steps=2, says='z is', **ASKED), **each(sampling.img2img, 'z', holed(Z), Z*inf, steps=2, says='x ', **ASKED), **each(sampling.denoise_path, 'ts', *NO_TIMES, x=Z, **ASKED), **each(sampling.denoise_path, 'sampler', 'x', None, 3, x=Z, ts=STEPS, **ASKED),
    **each(unet.denoiser_learner, 'process', None, 'flow', net=SMALL, z_train=Z, z_valid=Z, device='cpu'), **each(unet.denoiser_learner, 'z_train', holed(Z), Z*inf, net=SMALL, process=FLOW, z_valid=Z, device='cpu'),
    **each(unet.denoiser_learner, 'z_valid', holed(Z), Z*inf, net=SMALL, process=FLOW, z_train=Z, device='cpu'), **each(unet.denoiser_learner, 'z_train', (Z, torch.zeros(3).long()), net=SMALL, process=FLOW, z_valid=Z, device='cpu', says='of one length'),
    **each(few_step.unipc, 'order', 0, -1, 1.5, nan, 'a', None, True, x=Z, ts=STEPS, **ASKED), **each(unet.ActStats, 'every', 0, -1, 1.5, nan, 'a', None), **each(training.EMA, 'decay', -1, 2, nan, inf, 'a', None, True),
    **each(training.DeviceLoader, 'x', None, 'a', 3, [], X[:0], X.numpy(), device='cpu', says='x and what belongs to it are'), **each(training.DeviceLoader, 'crop', -1, 99, 16, 'a', 1.5, nan, x=X, device='cpu', shuffle=True, bs=2),
}

# --- the sizes of networks, and what they look at

SIZE, WIDTHS = (0, -1, 1.5, nan, '7', None, True, 10**12), ((), (0,), (8, 1.5), (8, None), 8, None, 'a', (10**12,))
def sized(f, fixed=(), nothing=(), **good):
    "Rows for a network, or a part of one: each of its sizes takes the values that none has; `nothing`: those that may be None"
    bad = lambda k, v: WIDTHS if isinstance(v, tuple) else tuple(o for o in SIZE if not (o is None and k in nothing))
    return {k: v for o, was in good.items() if o not in fixed for k, v in each(f, o, *bad(o, was), **but(good, o)).items()}

def looks(net, x, title, **more):
    "Rows for what a network looks at: no tensor, other channels, sides, numbers, none at all; and for what it is told of the time"
    t = torch.full((len(x),), .5)
    odd = (x[..., :-1],) if net.multiple > 1 else ()
    return {**each(net.forward, 'x', None, 'a', x.numpy(), x[:0], x[:, :1], x.long(), x.double(), x.half(), x[0, 0], time=t, title=title, says='x is'), **each(net.forward, 'x', *odd, time=t, title=f'{title} sides', says='such as'),
            **each(net.forward, 'time', None, 5, .5, t[:2], t.numpy(), t[None, None], x=x, title=title, says='time is')}

CALLS |= {
    **sized(DE.ResNetDenoiser, in_channels=4, widths=(8, 16), depth=1), **sized(DE.SegNet, in_channels=4, widths=(8, 16), depth=1), **sized(DE.CNN1d, in_channels=1, width=8, depth=1, kernel=5), **sized(DE.UNet1d, in_channels=1, widths=(8, 16), depth=1, kernel=5),
    **sized(DE.MLPDenoiser, in_channels=16, width=32, depth=1), **sized(DE.DiT, in_channels=4, patch=2, width=16, depth=1, heads=2), **sized(DE.DiTBlock, width=16, heads=2), **sized(DE.TimedNorm, nothing='temb', c=8, temb=8), **sized(DE.TimedBlock, ('temb',), cin=8, cout=8, temb=8, dims=2, kernel=3), **sized(DE.sincos_places, h=2, w=2, dim=8),
    **sized(unet.UNet, ('groups',), ('out_channels',), in_channels=4, out_channels=4, widths=(8, 16), depth=1, head_dim=8), **sized(unet.ResBlock, cin=8, cout=8, temb=8), **sized(unet.SelfAttention, c=8, heads=2), **sized(unet.Downsample, c=8), **sized(unet.Upsample, c=8), **sized(unet.TimeMLP, dim=8, temb=8), **sized(unet.timestep_embedding, ('time',), time=torch.ones(3), dim=8),
    **sized(A.KLAutoencoder, ('depth',), in_channels=3, widths=(8,), patch=2, depth=1, latent_channels=4), **sized(A.conv_encoder, ('depth',), cin=3, widths=(8,), patch=2, depth=1, cout=8), **sized(A.conv_decoder, ('depth',), cin=4, widths=(8,), patch=2, depth=1, cout=3), **each(A.KLAutoencoder, 'depth', -1, 101, None, nan, 1.5),
    **sized(A.AEBlock, c=8), **sized(A.TAEBlock, c=8), **sized(A.TAEF2, width=8, latent_channels=4), **sized(A.taef2_encoder, c=8, out=4), **sized(A.taef2_decoder, c=8, cin=4), **sized(A.PatchDiscriminator, cin=3, width=8), **sized(P.Pixels, latent_channels=3), **each(A.PretrainedKL, 'model', None, 'a', 5), **each(A.PretrainedKL, 'model', {}, says='latent_channels is None'),
    **each(DE.CNN1d, 'kernel', 4, says='kernel is 4: give an odd number, such as 5'), **each(DE.DiT, 'width', 130, says='width is 130: give multiples of 4, such as 128 or 132'), **each(DE.DiT, 'heads', 5, width=64, says='width is 64: give multiples of 20, such as 60 or 80'), **each(A.AEBlock, 'c', 12, says='c is 12: give multiples of 8, such as 8 or 16'),
    **each(A.KLAutoencoder, 'widths', (8, 13), says='widths is (8, 13): give multiples of 8, such as 8 x 8 or 8 x 16'), **each(unet.SelfAttention, 'heads', 3, c=8, says='c is 8: give multiples of 3, such as 6 or 9'), **each(unet.UNet, 'widths', (15, 30), depth=1, says='dim is 15: give multiples of 2, such as 14 or 16'), **each(AE.latent_shape, 'size', 17, 0, -4, 1.5, nan, 'a', None),
    **looks(DE.ResNetDenoiser(4, (8, 16), 1), Z, 'ResNetDenoiser'), **looks(DE.SegNet(4, (8, 16), 1), Z, 'SegNet'), **looks(DE.DiT(4, 2, 16, 1, 2), Z, 'DiT'), **looks(DE.CNN1d(4, 8, 1), Z, 'CNN1d'), **looks(DE.UNet1d(4, (8, 16), 1), Z.flatten(2), 'UNet1d'), **looks(DE.MLPDenoiser(8, 16, 1), Z[:, 0, 0], 'MLPDenoiser'),
    **each(UNET.forward, 'x', Z8.double(), Z8.half(), Z8[:0], time=torch.ones(3), title='UNet.forward of'), **each(UNET.forward, 'x', Z8[..., :7], time=torch.ones(3), title='UNet.forward sides', says='sides is (8, 7): give multiples of 2, such as 8 x 6 or 8 x 8'), **each(DE.as_sequence, 'x', None, 5, 'a', Z.numpy(), Z[0, 0, 0], says='x is'),
}

# --- devices, objects of another kind, places, and what is left: `NOT`: where one of our objects is asked for

NOT, DEVICES, GENERATORS = (None, 5, 'a', [], nan), ('x', 'cuda:99', '', 5.5, [], 'a\0b'), (5, 'a', [], [None], [torch.Generator()]*2, np.random.default_rng(0))
TRAIN = dict(net=SMALL, process=FLOW, z_train=Z, z_valid=Z, device='cpu')
DDIM, DDPM = __import__('diffusers').DDIMScheduler, __import__('diffusers').DDPMScheduler

for f, good in ((sampling.start_noise, dict(process=FLOW, shape=(2, 3))), (sampling.sample, but(SAMPLE, 'device')), (unet.denoiser_learner, but(TRAIN, 'device')), (D.image_dls, dict(images=ROOMS)), (D.as_images, dict(x=PX)), (A.PSNR, {}), (A.ae_learner, dict(ae=AE, x_train=PX, x_valid=PX)),
                (K.Extractor, dict(net=torch.nn.Identity(), name='x')), (K.ClassifierFeatures, dict(net=K.GreyClassifier(3, (8,)))), (training.DeviceLoader, dict(x=X)), (training.peak_gb, {}), (C.default_device, {})):
    CALLS |= each(f, 'device', *(o for o in DEVICES), says='device is', **good)

for f, arg, good in ((sampling.levels, 'process', dict(t=.5)), (sampling.time_steps, 'process', dict(n=3)), (few_step.shortcut, 'process', dict(net=SMALL, x=Z, ts=STEPS)), (few_step.shortcut, 'net', dict(process=FLOW, x=Z, ts=STEPS)), (few_step.train_shortcut, 'process', dict(but(TRAIN, 'process'), teacher=SMALL, steps=1)),
                     (few_step.step_input, 'process', dict(t=torch.ones(2), d=torch.ones(2))), (few_step.with_steps, 'net', {}), (unet.denoiser_learner, 'net', but(TRAIN, 'net')), (unet.loss_by_level, 'process', dict(net=SMALL, z=Z)), (unet.unet_for, 'p', dict(shape=(4, 8, 8))), (C.run_folder, 'p', {}), (N.make_latents, 'ae', dict(folder='x', images=ROOMS, p=C.preset('tiny'))),
                     (N.make_latents, 'images', dict(folder='x', ae=AE, p=C.preset('tiny'))), (N.other_noise, 'process', dict(scheduler=FLOW.to_diffusers())), (N.process_of, 'scheduler', {}), (N.other_noise, 'scheduler', dict(process=FLOW)), (P.scheduled, 'scheduler', dict(process=FLOW)), (P.path_of, 'pipe', dict(n=1, steps=2, seed=0)), (A.quality, 'ae', dict(x=PX)), (A.pca_start, 'ae', dict(x=PX)),
                     (A.ae_learner, 'ae', dict(x_train=PX, x_valid=PX, device='cpu')), (D.some_pixels, 'images', dict(split='train', seed=0)), (D.image_dls, 'images', {}), (K.make_judge, 'images', dict(folder='x')), (K.features, 'extractor', dict(images=X)), (K.evaluate, 'extractor', dict(fake=X, real=X)), (G.conditional, 'unet', dict(dim=8)), (G.guide, 'net', dict(cond=['cat'])),
                     (C.save_component, 'module', dict(folder='x')), (report.save_png, 'im', dict(path='x.png')), (report.to_pil, 'fig', {}), (report.labelled, 'im', dict(cols=['a'], rows=['a']))):
    CALLS |= each(f, arg, *NOT, title=f'{f.__name__} takes', **good)

for draw in (sampling.ddpm, sampling.dpmpp_2m_sde): CALLS |= each(draw, 'generator', *GENERATORS, x=Z, ts=STEPS, title=f'{draw.__name__} takes', says='generator is', **ASKED)

CALLS |= {
    **sized(G.CrossAttention, c=8, dim=8, heads=2), **sized(G.FactorReader, sizes=(2, 3), channels=3, widths=(8,)), **sized(G.StyleConditioner, in_channels=3, dim=8, widths=(8,), code=4), **sized(K.GreyClassifier, classes=3, widths=(8, 8)), **sized(DE.count, ('net',), net=SMALL, shape=(4, 8, 8)),
    **each(P.LatentDiffusionPipeline, 'scheduler', 5, 'a', [], DDIM, autoencoder=PIPE.autoencoder, denoiser=UNET, process=FLOW, size=32), **each(PIPE.draw, 'sampler', DDIM, n=1, steps=2, says='scheduler is'), **each(PIPE.draw, 'spacing', torch.tensor([.5, 1.]), np.array(['a', 'b']), n=1, steps=2, says='ts is'), **each(PIPE.draw, 'spacing', np.array([1., .5]), n=1, steps=2, title='draw at', says='times fall'), **each(PIPE.__call__, 'num_images', 10**12, 2**63, title='pipe', num_inference_steps=2),
    **each(lambda c: G.Conditioned(TOLD.net, c), 'c', *NOT, title='Conditioned', says='conditioner is'), **each(TOLD.net.forward, 'cond', 5, 'a', Z8.numpy(), torch.zeros(3, 8), torch.zeros(2, 1, 8), torch.zeros(3, 1, 9), x=Z8, time=torch.ones(3), title='ConditionalUNet', says='condition must be tokens (3, n, 8)'), **each(TOLD.net.forward, 'x', None, 5, Z8.numpy(), Z8.long(), time=torch.ones(3), title='ConditionalUNet', says='x is'),
    **each(lambda x: G.guide(TOLD, ['cat']*3)(x, torch.ones(3)), 'x', None, 5, Z8.numpy(), title='guided', says='x is'), **each(G.StyleConditioner(3, 8, (8,), 4).forward, 'images', None, X[:, :1], X[0], X.numpy(), X.long(), title='StyleConditioner.forward', says='style images are'), **each(G.check_condition, 'kind', [], {}, 'x', None, images=ROOMS, says='no condition'), **each(G.train_reader, 'seed', *SEEDS, pixels=PX, codes=torch.zeros(6, 2).long()),
    **each(D.image_grid, 'pad', -1, 1.5, 'a', None, nan, 10**9, images=X), **each(D.image_grid, 'scale', 0, -1, 1.5, 'a', None, 10**9, images=X), **each(D.show_images, 'scale', 0, -1, 'a', None, nan, inf, 1e308, images=X), **each(D.to_uint8, 'images', PX, X.long(), says='give floats'), **each(D.some_pixels, 'split', None, 'all', 5, [], images=ROOMS, seed=0), **each(report.path_picture, 'n', 0, -1, 'a', pipe=PIPE, steps=2, seed=0),
    **each(sampling.sample, 'n', 10**12, 2**63, title='sample of', **but(SAMPLE, 'n')), **each(sampling.generators, 'n', 10**12, seed=0), **each(sampling.ddim, 'eta', None, 'a', nan, -1, 2, 1e308, x=Z, ts=STEPS, **ASKED), **each(sampling.evaluations, 'steps', None, 'a', 0, nan, sampler='heun'), **each(sampling.interpolate, 'a', None, 5, Z.long(), b=Z, k=2, says='a is'), **each(sampling.interpolate, 'k', 10**12, a=Z, b=Z), **each(sampling.inpaint, 'repeats', 10**12, z=Z8, mask=WHERE, **DRAW), **each(sampling.inpaint, 'z', Z8[:0], holed(Z8), mask=WHERE, says='z ', title='inpaint of', **DRAW),
    **each(FLOW.noisify, 'x0', None, 5, Z.numpy(), title='noisify', says='x0 is'), **each(FLOW.sample_t, 'n', 10**12), **each(FLOW.add_noise, 't', [], torch.zeros(0), x0=Z, eps=Z, title='add_noise', says='t is'), **each(few_step.draw_steps, 'n', 10**12), **each(few_step.shortcut, 'x', *NO_BATCH[:5], net=SMALL, process=FLOW, ts=STEPS, says='x '), **each(training.fit_steps, 'rounds', 10**12, 0, None, learn=None, steps=1),
    **each(A.psnr, 'y', None, X.long(), holed(X), X*inf, x=X, title='psnr of'), **each(A.ssim, 'x', X[..., :5, :5], y=X[..., :5, :5], says='6 x 6 pixels'), **each(A.ssim_map, 'y', None, X.long(), X[:, :1], holed(X), x=X, says=''), **each(A.kl_loss, 'logvar', *LIKE, mean=Z), **each(A.kl_loss, 'mean', None, 5, Z.long(), logvar=Z, says='mean is'), **each(A.posterior_sample, 'logvar', *LIKE, mean=Z), **each(A.patch_pca, 'f', 0, 3, -1, 'a', None, 1.5, x=X, k=2, says=''), **each(A.patch_pca, 'k', 0, -1, 'a', None, x=X, f=2), **each(A.patch_pca, 'x', None, 5, X[0], X[:0], holed(X), f=2, k=2, says='x '),
    **each(A.pca_start, 'x', None, X.numpy(), X[0], X[:0], ae=AE), **each(A.pca_start, 'n', 0, -1, 'a', None, ae=AE, x=PX), **each(A.channel_stats, 'batches', [], (), says='batches are empty'), **each(A.channel_stats, 'batches', [None], ['a'], [Z.long()], says='x is'), **each(A.ae_learner, 'bs', 0, None, 'a', 1.5, ae=AE, x_train=PX, x_valid=PX, device='cpu'),
    **each(NET.__call__, 'pixels', None, 5, X, PX[:, :1], PX.numpy(), title='Extractor', says='feature nets take uint8'), **each(K.as_pixels, 'x', None, 'a', X.numpy(), PX[0], holed(X), says='x '), **each(K.halves, 'x', None, 5, says='x is'), **each(K.nearest_neighbours, 'block', 0, -1, 'a', None, 1.5, fake=FEATS, train=FEATS), **each(K.kid_subsets, 'seed', *SEEDS, a=FEATS, b=FEATS, n=2, size=10), **each(K.kid_subsets, 'n', 10**12, a=FEATS, b=FEATS, size=10), **each(K.gaussian_stats, 'x', *SET[:4]),
}

NO_PATH = None, 5, nan, [], '', 'a\0b', '\ud800'
for f, arg, good in ((PIPE.save_pretrained, 'folder', {}), (FLOW.save, 'folder', {}), (N.save_process, 'folder', dict(process=FLOW)), (N.Process.load, 'folder', {}), (C.save_component, 'folder', dict(module=UNET)), (C.load_component, 'folder', {}), (C.made, 'path', {}), (C.artefact, 'path', dict(make=lambda o: {}, parents={}, settings={})),
                     (lambda folder: C.locked(folder).__enter__(), 'folder', {}), (C.read_json, 'path', dict(hint='x')), (C.write_json, 'path', dict(d={})), (C.write_whole, 'path', dict(data='x')), (C.read_weights, 'path', {}), (report.save_png, 'path', dict(im=D.image_grid(X)))):
    CALLS |= each(f, arg, *NO_PATH, says=' is ', title=f'{f.__qualname__} at', **good)
    if 'save' in f.__name__ or 'write' in f.__name__: CALLS |= each(f, arg, '/proc/x/y', '/dev/null/x', Path(__file__)/'x'/'y', title=f'{f.__qualname__} at', says='cannot be written', **good)

CALLS |= {
    **each(lambda device: PIPE.to(device), 'device', 1.5, nan, 2**63, title='to', says='cannot move to'), **each(TOLD.net.forward, 'mask', 5, 'a', {}, torch.ones(3, 2).bool(), torch.ones(3, 1), x=Z8, time=torch.ones(3), cond=torch.zeros(3, 1, 8), title='ConditionalUNet', says='mask is'), **each(unet.denoiser_learner, 'z_train', (), says='z_train is', title='denoiser_learner of', **but(TRAIN, 'z_train')),
    **each(report.picture_rows, 'rows', {}, title='rows', says='rows is empty'), **each(report.picture_rows, 'rows', dict(cats=X*3), dict(cats=None), title='rows of', says='cats '), **each(report.figure, 'path', *NO_PATH, caption='x', title='figure', says='path is'), **each(report.class_judge, 'f', *SET[:4], labels=torch.arange(40) % 2),
}

CALLS |= {
    **each(N.weights_hash, 'ae', *NOT, says='ae is'), **each(G.attention_maps, 'net', *NOT, x=Z8, time=torch.ones(3), tokens=torch.zeros(3, 1, 8), says='net is'), **each(K.ClassifierFeatures, 'net', *NOT, says='net is'), **each(P.expectation, 'pipe', *NOT, n=1, steps=1, sampler='ddim', bs=1), **each(sampling.optimal_denoiser, 'means', *NO_BATCH, process=FLOW, says='means '), **each(sampling.optimal_denoiser, 'std', -1, None, 'a', nan, process=FLOW, means=Z),
    **each(A.make_autoencoder, 'folder', *NO_PATH, images=ROOMS, p=C.preset('tiny'), says='folder is'), **each(U.make_denoiser, 'folder', *NO_PATH, latents=None, p=C.preset('tiny'), says='folder is'), **each(E.make_shortcut, 'folder', *NO_PATH, net=None, process=FLOW, latents=None, steps=1, says='folder is'), **each(N.make_latents, 'folder', *NO_PATH, images=ROOMS, ae=AE, p=C.preset('tiny'), says='folder is'),
    **each(sampling.generators, 'seed', torch.arange(3), np.arange(2), n=1, title='generators of'), **each(R.rooms, 'n', 10**12, size=16, title='rooms of'), **each(D.RoomImages, 'size', *COUNT, None), **each(D.RoomImages, 'channels', 2, -1, '3', size=16), **each(F.load_pixels, 'file', None, 5, nan, [], '', 'a\0b', size=8, says='file is'), **each(C.spread, 'n', -1, 1.5, 'a', None, items=Z), 
}

L5, W = torch.full((5,), .5), torch.ones(3, requires_grad=True)
MEASURED = dict(n_fake=600, n_real=600, kid=1., kid_se=.1, kid_floor=0., kid_floor_se=.1, fid=1., fid_floor=1., psnr=20., ssim=.5, n_reconstructed=3, seconds=dict(a=1.), device='cpu', threads=2, extractor='x')
NO_TIME, PAIRS, TABLE = (None, 5, .5, 'a', L5.numpy(), L5.long(), L5[:0]), torch.arange(8).view(2, 4), N.log_abar_table('ddpm_linear', 1e-4, .02, 10, torch.float32, 'cpu')
TWO = dict(mu1=torch.zeros(8), l1=torch.eye(8), mu2=torch.zeros(8), l2=torch.eye(8))

CALLS |= {
    **each(C.spread, 'items', *NOT[:3], n=2), **each(C.largest_divisor, 'n', 0, 1.5, 'a', None, most=5), **each(C.largest_divisor, 'most', -1, 1.5, 'a', None, n=12), **each(C.save_component, 'folder', b'x', module=UNET, title='save_component at'), **each(C.settings_of, 'autoencoder', 5, nan, b'x', [1], data='rooms', preset='tiny', says='autoencoder is'), **each(C.settings_of, 'From', 5, nan, b'x', [1], data='rooms', preset='tiny', says='From is'),
    **each(D.fit_pixels, 'channels', torch.zeros(2, 3), x=PX, size=8, title='fit_pixels to'), **each(D.RoomImages, 'n', 0, -1, 1.5, 'a', 10**12, size=16), **each(D.Picture, 'x', holed(X[0]), X[0]*inf, title='Picture of', says='x of'), **each(D.Picture, 'x', None, 'a', 5, X[0].numpy(), PX[0], [1.], says='x is'), **each(D.pick, 'names', None, 5, nan, n=2, seed=0), **each(D.pick, 'names', None, 5, n=None, seed=0, title='pick all of'),
    **each(D.shifted, 'x', None, 'a', X.numpy(), X[0], X[:0], PX, most=2, generator=torch.Generator(), says='x is'), **each(D.shifted, 'most', -1, 1.5, 16, 'a', None, x=X, generator=torch.Generator()), **each(D.shifted, 'generator', *NOT, x=X, most=2), **each(D.cropped, 'x', None, 'a', X.numpy(), X[0], X[:0], PX, most=2, seed=0, says='x is'), **each(D.cropped, 'most', -1, 1.5, 16, 'a', None, x=X, seed=0), **each(D.cropped, 'seed', nan, 1.5, 'a', None, x=X, most=2), **each(D.cropped, 'first', -1, nan, 1.5, 'a', None, x=X, most=2, seed=0), **each(D.leeway, 'images', *NOT[:4]), **each(N.make_latents, 'seed', nan, 1.5, 'a', None, folder='x', images=ROOMS, ae=AE, p=C.preset('tiny')), **each(F.to_rgb, 'im', *NOT), **each(C.artefact, 'parents', 3, path='x', make=len, settings={}, says='parents is 3'), **each(C.artefact, 'settings', None, path='x', make=len, parents={}, says='settings is None'), **each(F.download, 'path', None, 3, '', url='http://127.0.0.1:9/a.bin'), **each(K.features, 'bs', 2**63, extractor=len, images=PX), **each(A.channel_stats, 'batches', [Z8, Z8[:, :1]], title='of other channels'), **each(K.kid, 'a', FEATS.double()*1e200, b=FEATS, says='a: '), **each(K.fid, 'b', FEATS.double()*-1e200, a=FEATS, says='b: '),
    **each(N.cosine_levels, 't', *NO_TIME, says='t is'), **each(N.ddpm_levels, 't', *NO_TIME, table=TABLE, says='t is'), **each(N.ddpm_levels, 'table', None, 5, 'a', [1.], t=L5, says='table is'), **each(N.edm_levels, 't', *NO_TIME, sigma_min=.002, sigma_max=80., rho=7., says='t is'), **each(N.edm_levels, 'rho', 0, -1, nan, 'a', None, sigma_min=.002, sigma_max=80., t=L5), **each(N.edm_levels, 'sigma_max', 0, -1, nan, 'a', None, sigma_min=.002, rho=7., t=L5),
    **each(N.log_abar_table, 'schedule', None, 5, 'x', 'flow', beta_start=1e-4, beta_end=.02, steps=10, dtype=torch.float32, device='cpu'), **each(N.log_abar_table, 'steps', 0, -1, 1.5, 'a', None, 10**12, schedule='ddpm_linear', beta_start=1e-4, beta_end=.02, dtype=torch.float32, device='cpu'), **each(N.log_abar_table, 'beta_end', 0, -1, 2, nan, 'a', None, schedule='ddpm_linear', beta_start=1e-4, steps=10, dtype=torch.float32, device='cpu'),
    **each(N.bcast, 'v', None, .5, 'a', [1.], x=Z, says='v is'), **each(N.bcast, 'x', None, 5, 'a', Z.numpy(), v=L5, says='x is'), **each(FLOW.levels, 't', ['a'], [nan], [[.5]], [None], title='levels at', says='t is'), **each(FLOW.scale_input, 'x_t', None, 5, Z.long(), Z.numpy(), t=L5, says='x_t is'), **each(FLOW.target_coefs, 'a', *NO_TIME, s=L5, says=' is'), **each(N.NoisifyCB, 'process', None, 'flow', 3),
    **{k: v for o, bad in dict(images=NOT[:4], starts=([-99], [.5], ['a'], [99], 3), bs=(0, -1, 1.5, 'a', None)).items() for k, v in each(lambda **kw: next(N.prefetch(**kw)), o, *bad, title='prefetch', **but(dict(images=ROOMS, starts=[0, 2], bs=2), o)).items()},
    **each(A.psnr, 'x', X[:0], 5, y=X[:0], title='psnr of', says='x is'), **each(A.channel_stats, 'batches', None, 5, nan, title='channel_stats of'), **each(A.adaptive_weight, 'rec', None, 5, 'a', adv=W.sum(), last=W, says='rec is'), **each(A.adaptive_weight, 'last', None, 5, 'a', rec=W.sum(), adv=W.sum(), says='last is'), **each(A.ValidMetric, 'cls', None, 5, 'a'), **each(A.sharpen_decoder, 'steps', None, 0, 1.5, 'a', ae=AE, x_train=PX, x_valid=PX), **each(A.FeatureLoss().forward, 'x', None, 5, X.numpy(), PX, X[:2], y=X, title='FeatureLoss', says=' is'),
    **each(training.zero_init, 'layer', *NOT), **each(training.mixed_precision, 'device', *DEVICES), **each(training.no_sync, 'learn', *NOT), **each(training.fit_steps, 'learn', *NOT, steps=1), **each(training.seconds_per_step, 'net', *NOT, z=Z8, says='net is'), **each(training.seconds_per_step, 'z', None, 5, Z8.numpy(), Z8.long(), net=UNET, says='z is'), **each(lambda y: training.DeviceLoader(X, y, device='cpu'), 'y', 5, 'a', None, [1]*6, np.zeros(6), torch.zeros(()), title='DeviceLoader', says='of one length'),
    **each(DE.count, 'net', *NOT, shape=(4, 8, 8), says='net is'), **each(U.loss_by_level, 'net', *NOT, process=FLOW, z=Z8, says='net is'), **each(DE.step_seconds, 'nets', *NOT, z=Z8), **each(DE.step_seconds, 'nets', dict(a=5), dict(a=None), z=Z8, title='step_seconds of', says='denoiser is'), **each(unet.timestep_embedding, 'time', None, 5, 'a', [1.], torch.ones(()), torch.ones(3, 2), dim=8, says='time is'), **each(unet.AnyUNet2D, 'unet', *NOT), **each(unet.make_denoiser, 'latents', *NOT, folder='x', p=C.preset('tiny')), **each(unet.make_denoiser, 'p', *NOT, folder='x', latents=None),
    **each(K.poly_kernel, 'x', *SET[:5], y=FEATS, says=' is'), **each(K.poly_kernel, 'y', None, 5, FEATS[0], FEATS[:, :5], x=FEATS, says='y is'), **each(K.covariance_factor, 's', *SET[:4], holed(FEATS[:8])), **each(K.covariance_factor, 's', FEATS, title='covariance_factor of', says='columns is'), **{k: v for o in TWO for k, v in each(K.frechet, o, None, 5, 'a', [1.], torch.zeros(8).numpy(), torch.zeros(3, 2), says=o[:-1], **but(TWO, o)).items()},
    **each(K.subset_kids, 'a', *SET[:5], b=FEATS, ia=PAIRS, ib=PAIRS), **each(K.subset_kids, 'ia', None, 5, nan, a=FEATS, b=FEATS, ib=PAIRS), **each(K.subset_kids, 'ib', [[99]*4], [[.5]*4], 'ab', a=FEATS, b=FEATS, ia=PAIRS, says='ib is'),
    **each(sampling.inpaint, 'mask', WHERE[:2], WHERE[:, :2], WHERE[None], WHERE[..., :3], z=Z8, title='inpaint where', **DRAW), **each(N.Process('edm', 'v').scale_input, 't', None, 5, 'a', nan, torch.ones(3), [.5]*5 + ['a'], x_t=Z, title='scale_input at', says='t is'), **each(unet.UNet.from_config, 'config', *NOT), **each(report.figure, 'path', 'nowhere.png', caption='x', title='figure at', says='nowhere.png cannot be read'),
    **each(sampling.slerp, 'w', torch.full((5,), .5), torch.full((5, 2), .5), a=Z, b=Z, title='slerp at'), **each(P.expectation, 'n', *COUNT[:-1], pipe=PIPE, steps=1, sampler='ddim', bs=1), **each(P.expectation, 'bs', *COUNT[:-1], pipe=PIPE, steps=1, sampler='ddim', n=1), **each(sampling.evaluations, 'steps', None, 'a', 0, nan, 1.5, sampler='ddim', title='evaluations of'), **each(P.model_card, 'license', 5, ['mit'], b'mit', repo_id='a/b', terms='mine', run='.'), **each(training.fit_steps, 'checkpoint', 'runs/x', Path('x'), learn=A.ae_learner(AE, PX, PX, device='cpu'), steps=1), **each(P.model_card, 'run', *NO_PATH, repo_id='a/b', terms='mine'),
    **each(few_step.teacher_of, 'net', *NOT), **each(few_step.autoguide, 'net', *NOT, weak=UNET), **each(few_step.autoguide, 'weak', *NOT, net=UNET), **each(few_step.with_steps, 'net', lambda x, t: x, title='with_steps of', says='net is'), **{k: v for f, s in ((few_step.midpoint, dict(velocity=lambda x, t: x)), (few_step.two_in_one, dict(slope=lambda x, t, d: x))) for o, bad in (([*s][0], NOT), ('x', (None, 5, 'a', Z[:0], Z.long())), ('t', NO_TIME), ('d', NO_TIME)) for k, v in each(f, o, *bad, says=f'{o} is' if o in s else ' is', **but(dict(s, x=Z, t=L5, d=L5), o)).items()},
    **each(few_step.step_input, 'd', *NO_TIME, L5[:3], process=FLOW, t=L5, says='d is'), **each(few_step.make_shortcut, 'latents', *NOT, folder='x', net=UNET, process=FLOW, steps=1), **each(few_step.make_shortcut, 'net', *NOT, folder='x', latents=None, process=FLOW, steps=1), **each(few_step.make_shortcut, 'process', *NOT, folder='x', latents=None, net=UNET, steps=1),
    **each(G.TextConditioner().words, 'caption', None, 5, [], ['a'], '\ud800', title='words', says='caption'), **each(G.TextConditioner().encode, 'captions', None, 5, [], [5], ['\ud800'], title='encode'), **each(report.table, 'd', *NOT), **each(report.headline, 'm', *NOT, {}), **each(report.headline, 'm', dict(MEASURED, kid=None), dict(MEASURED, kid='<b>'), title='headline of', says='kid is'), **each(labs_data.read_norb, 'path', *NO_PATH),
}

LOGITS = torch.zeros(2, 1, 2, 2)
CALLS |= {
    **each(A.hinge_loss, 'real', None, 'a', LOGITS[:1], LOGITS.long(), fake=LOGITS, says=' is '), **each(A.hinge_loss, 'fake', None, 5, LOGITS[:0], real=LOGITS, says='fake is'), **each(A.AELoss, 'kl_weight', None, 'a', nan, inf, -1),
    **each(A.AELoss, 'feature_weight', None, 'a', nan, inf, -1), **each(A.AELoss().__call__, 'pred', None, 5, images=X, title='AELoss', says='pred is'), **each(A.AELoss().__call__, 'pred', (X[:2], None), (None, None), images=X, title='AELoss of', says='pred is'),
    **each(A.sharpen_decoder, 'start', -3, 'a', nan, 1.5, ae=A.KLAutoencoder(3, (8,), 2, 1, 4), x_train=X, x_valid=X, steps=2), **each(few_step.Shortcut, 'net', None, 'x', 5, says='net is'),
    **each(G.make_conditional, 'conds', None, 'a', 5, folder=None, latents=None, p=None, conditioner=None, says='conds is'), **each(T.Checkpoint, 'folder', *NO_PATH, made_from='x', title='Checkpoint', says=' is '),
    **each(T.step_time, 'learn', None, 5, 'a'), **each(K.kernel_sums, 'block', 0, -3, 2.5, nan, 'a', None, x=FEATS)}

CALLS |= { # what nobody has in mind, at doors of lessons
    **each(G.guide, 'cond', ['cat'], 5, (), torch.tensor(1), torch.ones(3, 8), net=TOLD.net, title='guide without conditioners', says='cond is'), **each(G.conditions_of, 'images', *NOT),
    **each(G.check_condition, 'images', *NOT, kind='class'), **each(sampling.interpolate, 'mix', 5, 'slerp', None, a=Z, b=Z, k=2), **each(sampling.img2img, 'z', torch.tensor(0.), net=UNET, process=FLOW, says='z is'),
    **each(sampling.heun, 'straight', 0, False, net=UNET, process=FLOW, x=Z8, ts=[1., .5, 0.]), **each(few_step.draw_steps, 'generator', *GENERATORS, n=4), **each(K.halves, 'x', torch.tensor(0.), title='halves of a number'),
    **each(report.picture_rows, 'rows', *NOT[:4], title='rows in'), **each(report.caution, 'm', *NOT), **each(F.download, 'path', *NO_PATH, url='http://127.0.0.1:1/a.zip'), **each(F.files_below, 'folder', *NO_PATH),
    **each(lambda images: source.fitting('rooms64', images, None), 'images', *NOT, title='fitting'),
    **each(muon.orthogonalise, 'steps', 2.5, -1, 'a', None, nan, x=torch.ones(1, 2, 2)), **each(muon.orthogonalise, 'x', *NOT, torch.ones(2, 2)),
    **each(muon.Muon, 'lr', 'a', None, nan, -1., params=[torch.nn.Parameter(torch.ones(2))]), **each(muon.Muon, 'momentum', 'a', None, nan, params=[torch.nn.Parameter(torch.ones(2))]),
}

@pytest.mark.parametrize('name, call', [('ae', lambda: N.weights_hash(5)), ('net', lambda: K.ClassifierFeatures(5)), ('net', lambda: few_step.Shortcut(5)),
    ('net', lambda: few_step.with_steps(len)), ('net', lambda: DE.count(5, (4, 8, 8))), ('net', lambda: U.loss_by_level(5, FLOW, Z8)),
    ('net', lambda: training.seconds_per_step(5, Z8)), ('net', lambda: G.attention_maps(5, Z8, torch.ones(3), None)), ('parents', lambda: C.artefact('x', len, 3, {})),
    ('settings', lambda: C.artefact('x', len, {}, 3)), ('autoencoder', lambda: C.settings_of('rooms', 'tiny', autoencoder=5)), ('From', lambda: C.settings_of('rooms', 'tiny', From=5))])
def test_a_refusal_begins_with_the_argument(name, call):
    "As it is called from outside, where inside it has the name of what it has to be"
    with pytest.raises(C.UserError, match=f'^{name} is '): call()

@pytest.mark.parametrize('title', CALLS)
def test_malformed_call(title): assert answer(*CALLS[title]) is None

@pytest.mark.parametrize('x', [X, X[:1], D.to_uint8(X)[:, :1], X.half()*.999])
def test_what_is_sound_is_taken(x):
    "The checks refuse nothing that they should not: grey, one picture, half precision, the very ends of the range"
    assert D.check_images(x) is x and D.as_images(x).dtype == torch.float32
    assert torch.equal(AE.encode(X.clamp(-1, 1)), AE.encode(X)) and K.features(NET, x).shape == (len(x), 9)
    assert 'there are none' in one_line(C.positions, 0, idxs=[0]) and 'rows is' in one_line(G.TextConditioner(), torch.tensor([99]))
    assert C.number(1, n=np.int64(3)) == 3 and C.positions(5, idxs=[-1, 0]).tolist() == [4, 0] and C.positions(5, idxs=[]).size == 0
    assert sampling.pairs(torch.linspace(1, 0, 3)) == [(1., .5), (.5, 0.)] and sampling.levels(FLOW, torch.tensor(1)) == (0., 1.) and sampling.evaluations(sampling.heun, 3) == 5
    assert sampling.predict(**ASKED, x=Z.half(), t=np.float32(.5))[0].dtype == torch.float16 and len(training.DeviceLoader(X, crop=15, device='cpu').one_batch()[0]) == 6
    assert C.default_device('cpu') == torch.device('cpu') and [o.shape for o in (PIPE.latents(1, 2, 'ddim', bs=np.int64(1), spacing=o) for o in (np.array([1., .5, 0.]), torch.tensor([1., 0.])))] == [(1, 4, 8, 8)]*2
    assert sampling.noise_like(Z, [torch.Generator(), np.random.default_rng(0)]*2 + [torch.Generator()]).shape == sampling.noise_like(Z, torch.Generator()).shape == sampling.noise_like(Z).shape
    assert AE.encode(X.double()).dtype == AE.decode(Z.double()).dtype == torch.float32 and PIPE.pixels(1, 2, 'ddim', bs=np.int64(1)).dtype == torch.uint8
    FLOW.add_noise(Z, Z, 1), FLOW.add_noise(Z, Z, torch.tensor(0.)), FLOW.x0_eps(Z, Z, torch.full((5,), .5, dtype=torch.float64))

@pytest.mark.parametrize('net', [UNET, TOLD.net, AE, PIPE.autoencoder, CATS, DE.CNN1d(4, 8, 1), DE.DiT(4, 2, 16, 1, 2), K.GreyClassifier(3, (8,)), G.StyleConditioner(3, 8, (8,), 4)], ids=lambda o: type(o).__name__)
def test_a_config_builds_the_same_network_again(net, tmp_path):
    "Given by position, by name, or loaded: diffusers takes for a default what it was not told by name"
    for o in (net, C.load_component(save_component(net, tmp_path/'net'))): assert [*map(kind_of, type(o).from_config(o.config).state_dict().values())] == [*map(kind_of, o.state_dict().values())]

def test_a_config_keeps_the_scale_that_was_set():
    ae = A.KLAutoencoder(3, (8,), 2)
    ae.set_scale([1.]*4, [2.]*4)
    assert A.KLAutoencoder.from_config(ae.config).latent_std.tolist() == [2.]*4

@pytest.mark.parametrize('process', [N.Process(steps=500), N.Process('ddpm_linear', 'eps', steps=500), N.Process('scaled_linear', 'v', beta_end=.03), N.Process('edm', 'v', steps=500)], ids=lambda o: o.schedule)
def test_the_noise_of_a_scheduler_is_what_it_was_told_by_position(process):
    "Ours is one, too: it draws for its own network, and one of other noise is not taken"
    assert N.process_of(process.to_diffusers()).steps == process.steps and not N.other_noise(process.to_diffusers(), process)
    assert 'noise' in N.other_noise(DDPM(500, clip_sample=False), N.Process('ddpm_linear', 'eps'))
    said, network = 'the scheduler is for ddpm_linear noise and target eps, {}, the network for ddpm_linear noise and target eps, {}', N.Process('ddpm_linear', 'eps')
    assert N.other_noise(DDPM(500, clip_sample=False), network) == said.format('steps 500', 'steps 1000')   # not two equal halves
    assert N.other_noise(DDPM(beta_end=.01, clip_sample=False), network) == said.format('beta_end 0.01', 'beta_end 0.02')

# --- networks, latents and what is said about them

def stored(state, tmp_path, **config):
    "A saved autoencoder whose weights and config were changed"
    from safetensors.torch import save_file
    folder = save_component(A.KLAutoencoder(3, (8,), 2, 1, 4), tmp_path/'ae')
    d = json.loads((folder/'config.json').read_text()) | dict(latent_mean=[0.]*4, latent_std=[1.]*4) | config
    (folder/'config.json').write_text(json.dumps(d))
    if state: save_file(state(dict(A.KLAutoencoder(3, (8,), 2, 1, 4).state_dict())), folder/'autoencoder.safetensors')
    return folder

DEEP = '['*100_000 + ']'*100_000   # Python 3.15 reads half of that
NOT_JSON = ['', '[]', 'null', '3', '{', DEEP, '{"a":' + DEEP + '}', '\0', '{"_class_name": 5}', '{"_class_name": "' + 'x'*10**6 + '"}', '{"_class_name": "Path"}', '{}']

@pytest.mark.parametrize('config', [dict(latent_std=[0.]*4), dict(latent_std=[nan]*4), dict(latent_std=[1e400]*4), dict(latent_std=[-1.]*4), dict(latent_std=[1.]*3),
    dict(latent_std='abcd'), dict(latent_std=3), dict(latent_mean=[nan]*4), dict(latent_mean=[[0.]]*4), dict(widths=[12]), dict(widths=8), dict(widths=None), dict(widths=[]),
    dict(patch=0), dict(patch='2'), dict(latent_channels=-4), dict(in_channels=0), dict(in_channels=True), dict(depth='x')], ids=str)
def test_a_config_that_no_network_has_is_one_line(config, tmp_path):
    assert next(iter(config)) in one_line(A.open_autoencoder, stored(None, tmp_path, **config))

@pytest.mark.parametrize('change', [lambda s: {**s, 'line_in.bias': s['line_in.bias']*nan}, lambda s: {**s, 'line_in.bias': s['line_in.bias']/0},
    lambda s: {k: v for k, v in s.items() if k != 'line_in.bias'}, lambda s: {**s, 'more': torch.zeros(1)}, lambda s: {**s, 'line_in.bias': torch.zeros(5)}])
def test_weights_that_cannot_be_used_are_one_line(change, tmp_path): one_line(A.open_autoencoder, stored(change, tmp_path))

READ = dict(autoencoder=A.open_autoencoder, latents=N.Latents, process=N.Process.load, artefact=made)
FINE = dict(process=NOT_JSON[8:], artefact=NOT_JSON[8:], autoencoder=[], latents=[])   # objects: a process has a default for everything

@pytest.mark.parametrize('what,text', [(k, o) for k in READ for o in NOT_JSON if o not in FINE[k]], ids=lambda o: o[:40])
def test_what_is_no_config_is_one_line(what, text, tmp_path):
    "Wrong type, missing, nested 100,000 deep, huge"
    for name in ('config.json', 'manifest.json', 'made.json'): (tmp_path/name).write_text(text)
    one_line(READ[what], tmp_path)

@pytest.mark.parametrize('config', [dict(steps='1000'), dict(steps=1e3), dict(steps=10**9), dict(beta_end='x'), dict(sigma_min=None), dict(sigma_max=nan), dict(rho=[]), dict(schedule=[]),
    dict(schedule={}), dict(target='eps2'), dict(more=1), dict(times=None)], ids=str)
def test_a_process_of_another_kind_is_one_line(config, tmp_path):
    (tmp_path/'config.json').write_text(json.dumps({'_class_name': 'Process', **config}))
    one_line(N.Process.load, tmp_path)

def latents_in(folder, z, **change):
    "A folder as `make_latents` leaves it, without an autoencoder"
    folder.mkdir(exist_ok=True)
    z = np.asarray(z, np.float16)
    m = dict(shape=list(z.shape), mirrored=False, names=[f'{i}' for i in range(len(z))], classes=None, captions=None, labels=None, valid=[1]) | change
    (folder/'manifest.json').write_text(json.dumps({k: v for k, v in m.items() if v != 'gone'}))
    (folder/'made.json').write_text('{"fingerprint": "x"}')
    z.tofile(folder/'latents.f16')
    return folder

WHITE = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('change', [dict(shape=[40]), dict(shape=[-40, 4, 4, 4]), dict(shape=[40., 4, 4, 4]), dict(shape='gone'), dict(shape=None), dict(shape=[10**12, 4, 4, 4]), dict(mirrored='no'),
    dict(mirrored='gone'), dict(names=['a']), dict(names=None), dict(names=3), dict(labels=[1, 2]), dict(labels=5), dict(captions=['a']), dict(valid=[99]), dict(valid=['a']), dict(valid=None),
    dict(valid=[[1]]), dict(classes='gone'), dict(shape=[]), dict(shape=[True, 4, 4, 4])], ids=str)
def test_a_manifest_that_does_not_describe_its_latents_is_one_line(change, tmp_path):
    assert 'delete' in one_line(N.Latents, latents_in(tmp_path/'latents', WHITE, **change))

def test_latents_far_from_white_are_announced_once(tmp_path):
    "Their figures, in one warning where they are opened; those within a factor of three pass, those that are not finite do not"
    for by in (1., 2.5, .5):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert len(N.Latents(latents_in(tmp_path/'latents', WHITE*by))) == 40
    one_channel = torch.ones(4).index_fill(0, torch.tensor(2), 5.).view(1, 4, 1, 1)
    for by, figure in ((4., 'to 4'), (.2, r'0\.[12]'), (one_channel, 'to [45]')):
        with pytest.warns(UserWarning, match=figure) as seen: N.Latents(latents_in(tmp_path/'latents', WHITE*by))
        assert len(seen) == 1
    for bad in (nan, inf):
        z = WHITE.clone()
        z[39, 0, 0, 0] = bad
        assert 'not finite' in one_line(N.Latents, latents_in(tmp_path/'latents', z))

# --- arrays

class Planted:
    "What a pickle that runs a program looks like"
    def __reduce__(self): return Path.touch, (Path('planted-was-here'),)

def npz_of(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()

def npz_with_header(shape):
    "An array whose header promises more than there is"
    head, out = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr='|u1', fortran_order=False, shape=shape))
    with zipfile.ZipFile(out, 'w') as z: z.writestr('arr_0.npy', head.getvalue() + b'few')
    return out.getvalue()

def zip_of(members, kind=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', kind) as z:
        for name, data in members:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')                        # duplicates
                z.writestr(name, data)
    return out.getvalue()

PIXELS4 = np.zeros((4, 8, 8, 3), np.uint8)
NPZS = dict(empty=b'', text=b'<html>not found</html>', pickle=pickle.dumps(Planted()), npy=(lambda o: (np.save(o, PIXELS4), o.getvalue())[1])(io.BytesIO()),
    object=npz_of(arr_0=np.array([Planted(), None])), floats=npz_of(arr_0=PIXELS4/255), signed=npz_of(arr_0=PIXELS4.astype(np.int8)), ints=npz_of(arr_0=PIXELS4.astype(int)),
    bools=npz_of(arr_0=PIXELS4 > 0), text_array=npz_of(arr_0=np.array(['a'])), flat=npz_of(arr_0=PIXELS4[0]), deep=npz_of(arr_0=PIXELS4[None]), none=npz_of(arr_0=PIXELS4[:0]),
    no_pixels=npz_of(arr_0=PIXELS4[:, :0]), chw=npz_of(arr_0=PIXELS4.transpose(0, 3, 1, 2)), rgba=npz_of(arr_0=np.zeros((4, 8, 8, 4), np.uint8)), nothing=npz_of(),
    two=npz_of(a=PIXELS4, b=PIXELS4), no_array=zip_of([('arr_0.txt', 'hello')]), bad_array=zip_of([('arr_0.npy', 'hello')]), half=npz_of(arr_0=PIXELS4)[:300],
    promise=npz_with_header((10**6, 10**6, 10**3, 3)), more=npz_with_header((10, 8, 8, 3)), negative=npz_with_header((-4, 8, 8, 3)), wide=npz_with_header((2**70, 0, 64, 3)), folder=zip_of([('arr_0.npy/', '')]))

@pytest.mark.parametrize('kind', NPZS)
def test_an_npz_without_pictures_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'a.npz').write_bytes(NPZS[kind])
    assert 'a.npz' in one_line(D.open_images, tmp_path/'a.npz', 8) and not (tmp_path/'planted-was-here').exists()

def test_labels_beside_the_pictures_are_no_obstacle(tmp_path):
    "The samples that papers publish have the pictures in arr_0 and their labels in arr_1"
    (tmp_path/'a.npz').write_bytes(npz_of(arr_1=np.arange(4), arr_0=PIXELS4))
    assert len(F.npz_pixels(tmp_path/'a.npz')) == 4

# --- archives

def tar_of(members, mode='w', **kw):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **kw) as t:
        for name, data in members:
            m = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes): m.size = len(data)
            elif data is None: m.type = tarfile.DIRTYPE
            t.addfile(m, io.BytesIO(data) if isinstance(data, bytes) else None)
    return out.getvalue()

def flipped(data, at): return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:]

def sparse_tar(size):
    "A file of `size` bytes, all of them holes"
    m = tarfile.TarInfo('a.png')
    m.pax_headers = {'GNU.sparse.map': '0,0', 'GNU.sparse.size': str(size), 'GNU.sparse.realsize': str(size)}
    return tar_of([('', m)], format=tarfile.PAX_FORMAT)

def holes_without_end(pax):
    "Heads of a file whose map of holes goes on for ever: of old GNU tar, or of pax"
    m = tarfile.TarInfo('a.png')
    if pax:
        m.pax_headers, m.size = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': 'a.png', 'GNU.sparse.realsize': '9'}, 10**6
        return m.tobuf(tarfile.PAX_FORMAT) + b'999999999\n' + b'1\n'*10**6
    m.type, one = tarfile.GNUTYPE_SPARSE, b'00000000001\0'*2
    head = bytearray(m.tobuf(tarfile.GNU_FORMAT))
    head[386:410], head[482:483], head[483:495], head[148:156] = one, b'\1', b'00000000100\0', b' '*8
    head[148:156] = b'%06o\0 ' % sum(head)
    return bytes(head) + (one*21 + b'\1' + bytes(7))*4000

PNG = (lambda o: (__import__('PIL.Image').Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(o, 'png'), o.getvalue())[1])(io.BytesIO())
NOISE = np.random.RandomState(0).bytes(4000)
ONE = [('a.png', PNG), ('b.bin', NOISE)]
UTF8 = zip_of([('a\u00e9.png', PNG)])
TWO, SECOND = tar_of(ONE), 512 + -(-len(PNG)//512)*512   # where the head of the second begins
HEADLESS = {'flipped': flipped(TWO, SECOND + 3), 'zeros': TWO[:SECOND] + bytes(512) + TWO[SECOND + 512:], 'ones': TWO[:SECOND] + b'\xff'*512 + TWO[SECOND + 512:],
    'cut-between': TWO[:SECOND], 'cut-inside': TWO[:SECOND + 100]}   # all of which tarfile takes for the end
ARCHIVES = {  # name of the file: (its bytes, what the message says)
    'file-then-folder.tar': (tar_of([('a', PNG), ('a/b.png', PNG)]), 'cannot be a file here'), 'folder-then-file.tar': (tar_of([('a/b.png', PNG), ('a', PNG)]), 'cannot be a file here'),
    'file-then-folder.zip': (zip_of([('a', PNG), ('a/b.png', PNG)]), 'cannot be a file here'), 'folder-then-file.zip': (zip_of([('a/b.png', PNG), ('a', PNG)]), 'cannot be a file here'),
    'point.tar': (tar_of([('.', PNG)]), 'cannot be a file here'), 'point.zip': (zip_of([('.', PNG)]), 'cannot be a file here'),
    'long.tar': (tar_of([('x'*300 + '.png', PNG)]), 'cannot be a file here'), 'long.zip': (zip_of([('x'*300 + '.png', PNG)]), 'cannot be a file here'),
    'deep.zip': (zip_of([('x/'*3000 + 'a.png', PNG)]), 'without end'), 'deep.tar': (tar_of([('x/'*1500 + 'a.png', PNG)]), 'without end'), 'stairs.tar': (tar_of([('x/'*k + 'a.png', PNG) for k in range(1, 900, 90)]), 'without end'), 'not-utf8.zip': (UTF8.replace('\u00e9'.encode(), b'\xff\xff'), 'damaged'),
    'lzma.zip': (flipped(zip_of(ONE, zipfile.ZIP_LZMA), 700), 'damaged'), 'bz2.zip': (flipped(zip_of(ONE, zipfile.ZIP_BZIP2), 700), 'damaged'),
    'xz.tar': (flipped(lzma.compress(tar_of(ONE)), 900), 'damaged'), 'bz2.tar': (flipped(bz2.compress(tar_of(ONE)), 900), 'damaged'), 'cut-xz.tar': (lzma.compress(tar_of(ONE))[:-500], 'damaged'),
    'cut-bz2.tar': (bz2.compress(tar_of(ONE))[:-500], 'damaged'), 'xz-head.tar': (b'\xfd7zXZ\0' + NOISE, 'damaged'), 'bz2-head.tar': (b'BZh9' + NOISE, 'damaged'),
    'html.zip': (b'<!DOCTYPE html><html>sign in</html>', 'damaged'), 'html.tgz': (b'<!DOCTYPE html><html>sign in</html>'*99, 'damaged'), 'empty.tar': (b'', 'damaged'),
    'sparse.tar': (sparse_tar(2**40), 'over 4 GB'), 'bad-map.tar': (sparse_tar(2**40).replace(b'sparse.map=0,0', b'sparse.map=x,y'), 'damaged'),
    **{f'{k}.{end}': (pack(data), 'damaged') for k, data in HEADLESS.items() for end, pack in (('tar', bytes), ('tgz', gzip.compress))},
    'beyond.zip': ((lambda z: z[:-6] + (2**31).to_bytes(4, 'little') + z[-2:])(zip_of(ONE)), 'damaged'), 'gnu-holes.tar': (holes_without_end(False), 'a file with holes'), 'pax-holes.tar': (holes_without_end(True), 'a file with holes')}

@pytest.mark.parametrize('name', ARCHIVES)
def test_an_archive_that_cannot_be_unpacked_is_one_line(name, tmp_path, home):
    "Nothing stays of it, and nothing is written beside it"
    data, says = ARCHIVES[name]
    (tmp_path/name).write_bytes(data)
    message = one_line(D.open_images, tmp_path/name, 16)
    assert says in message and name in message and len(message) < 300
    assert not home.exists() or not [*home.iterdir()]

def test_duplicates_are_taken_as_tar_takes_them(tmp_path):
    for i, data in enumerate((tar_of(ONE + ONE), zip_of(ONE + ONE), tar_of([('./a.png', PNG), ('a.png', PNG)]))):
        (tmp_path/f'{i}.{"zip" if i == 1 else "tar"}').write_bytes(data)
        assert len(D.open_images(tmp_path/f'{i}.{"zip" if i == 1 else "tar"}', 16)) == 1

@pytest.mark.parametrize('name', ['bomb.zip', 'bomb.tgz', 'many.tgz'])
def test_a_bomb_is_capped_and_the_cap_named(name, tmp_path, home, monkeypatch):
    "Ten megabytes of nothing in ten kilobytes, or as much in empty files; with more room the same archive is unpacked"
    members = [('a.png', PNG), *([(f'{i}', b'') for i in range(2000)] if name == 'many.tgz' else [('b.bin', bytes(10**7))])]
    (tmp_path/name).write_bytes(zip_of(members, zipfile.ZIP_DEFLATED) if name == 'bomb.zip' else tar_of(members, 'w:gz'))
    assert (tmp_path/name).stat().st_size < 40_000
    assert len(D.open_images(tmp_path/name, 16)) == 1
    (tmp_path/'again').mkdir()
    (tmp_path/name).rename(tmp_path/'again'/name)
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'other'))
    monkeypatch.setattr(F, 'UNPACKED', 5e6)
    assert '0.005 GB' in one_line(D.open_images, tmp_path/'again'/name, 16) and not [*(tmp_path/'other').glob('*')]

@pytest.mark.parametrize('name', ['many.tgz', 'many.zip', 'many folders.tgz', 'many folders.zip', 'large.tgz'])
def test_the_files_of_an_archive_are_capped_and_the_cap_named(name, tmp_path, home, monkeypatch):
    "A thousand empty ones, or folders, take no room and much time; as many that are not empty are a data set, and unpacked"
    size, folders = 0 if name[0] == 'm' else 300, 'folders' in name
    other = [(f'{i}{"/"*folders}', None if folders and name[-1] == 'z' else random.randbytes(size)) for i in range(1000)]
    members = [('a.png', PNG), *other]
    (tmp_path/name).write_bytes(zip_of(members) if name[-1] == 'p' else tar_of(members, 'w:gz'))
    monkeypatch.setattr(F, 'FILES', 600)
    if size: assert len(D.open_images(tmp_path/name, 16)) == 1
    else: assert 'holds over 600 files and folders' in one_line(D.open_images, tmp_path/name, 16) and not [*home.glob('*')]

def test_what_lies_behind_an_archive_is_capped_too(tmp_path, home, monkeypatch):
    "Zeros behind the end of a .tgz"
    monkeypatch.setattr(F, 'UNPACKED', 5e6)
    (tmp_path/'x.tgz').write_bytes(gzip.compress(tar_of([('a.png', PNG)]) + bytes(20_000_000)))
    assert 'holds over 0.005 GB' in one_line(D.open_images, tmp_path/'x.tgz', 16) and not [*home.glob('*')]

@pytest.mark.parametrize('kind', [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE], ids=str)
def test_a_name_without_end_is_not_read(kind, tmp_path, home):
    "What tarfile reads whole before it shows the member; one of many letters is a file that cannot be"
    head = tarfile.TarInfo('x')
    head.type, head.size = kind, 1 << 40
    (tmp_path/'x.tar').write_bytes(tar_of([('a.png', PNG)])[:1024] + head.tobuf(tarfile.GNU_FORMAT) + b'a'*10_240)
    assert 'a name or note in it takes 1,099.5 GB' in one_line(D.open_images, tmp_path/'x.tar', 16) and not [*home.glob('*')]

def test_a_shard_is_read_only_as_far_as_it_can_be_a_picture(tmp_path, monkeypatch):
    "A member of another kind is passed over, a picture that is too large counted, and what is no file is not opened"
    monkeypatch.setattr(F, 'LARGEST', 5000)
    reads, read = [], tarfile.ExFileObject.read
    monkeypatch.setattr(tarfile.ExFileObject, 'read', lambda self, n=-1: reads.append(n) or read(self, n))
    (tmp_path/'0.tar').write_bytes(tar_of([('0.bin', NOISE), ('0.png', PNG), ('0.jpg', PNG), ('0.txt', b'a room'), ('1.png', NOISE*9), ('1.txt', b'a room')]))
    os.mkfifo(tmp_path/'1.tar')
    images = D.open_images(str(tmp_path/'{0..1}.tar'), 16)
    assert images.names == ['0/0'] and [why[:24] for _, why in images.skipped] == ['over 0 GB, too much for ', 'shard damaged or missing'] and 'no file' in images.skipped[1][1]
    assert max(reads) == 1 << 20 and -1 not in reads and reads.count(5001) == 2

def shards_as_they_come(tmp_path, liar, data):
    "`data` as a shard: a file, and from a server; what the images of each are"
    (tmp_path/'0.tar').write_bytes(data)
    liar.answer = 200, {'Content-Length': str(len(data))}, data
    return [D.open_images(spec, 16) for spec in (str(tmp_path/'{0..0}.tar'), f'http://127.0.0.1:{liar.server_port}/' + '{0..0}.tar')]

def test_a_shard_that_is_cut_between_two_files_is_counted(tmp_path, liar):
    "The stream just ends there, as a whole one would; but a whole one has empty blocks behind its last file"
    whole = tar_of([(f'{i}.{kind}', data) for i in range(6) for kind, data in (('png', PNG), ('txt', b'a room'))])
    sample = len(tar_of([('0.png', PNG), ('0.txt', b'a room')]).rstrip(b'\0')) // 512*512 + 512
    for k, n in ((len(whole), 6), (4*sample, 4), (sample, 1), (6*sample, 6)):
        for images in shards_as_they_come(tmp_path, liar, whole[:k]):
            assert len(images) == n and [('damaged' in why) for _, why in images.skipped] == [True]*(k < len(whole))

def test_a_shard_whose_head_is_damaged_is_counted(tmp_path, liar):
    "tarfile takes such a head for the end"
    whole = tar_of([(f'{i}.{kind}', data) for i in range(6) for kind, data in (('png', PNG), ('txt', b'a room'))])
    sample = len(tar_of([('0.png', PNG), ('0.txt', b'a room')]).rstrip(b'\0')) // 512*512 + 512
    for data, why in ((flipped(whole, 3*sample + 3), 'bad checksum'), (whole[:3*sample] + bytes(512) + whole[3*sample + 512:], 'behind its end')):
        for images in shards_as_they_come(tmp_path, liar, data): assert len(images) == 3 and [why in o for _, o in images.skipped] == [True]

def head(name, size, kind):
    t = tarfile.TarInfo(name)
    t.size, t.type = size, kind
    return t.tobuf(tarfile.USTAR_FORMAT)

def note(k, size): # of a tar in the format of POSIX: "27 key=value"
    body = b' k%d=' % k + b'1'*size + b'\n'
    n = len(body)
    for _ in range(5): n = len(str(n)) + len(body)
    return str(n).encode() + body + bytes(-n % 512), n

@pytest.mark.parametrize('kind', [b'x', b'g', b'L'])
def test_the_notes_of_members_are_no_bomb(kind, tmp_path):
    "Of one more than 16 kB is not read, nor more than a hundred for all that follow, in archives and in shards"
    for size, n in ((20_000, 1), (100, 200))[:2 if kind == b'g' else 1]:
        raw = b''.join(head('p', note(k, size)[1], kind) + note(k, size)[0] + head(f'{k}.txt', 0, b'0') for k in range(n)) + bytes(1024)
        for o in ('0.tar', 'a.tar'): (tmp_path/o).write_bytes(raw)
        assert 'a name or note in it takes' in one_line(F.unpacked, tmp_path/'a.tar') and 'a name or note in it takes' in [*F.shard_samples([str(tmp_path/'0.tar')])][-1][1]

def test_many_notes_are_no_bomb_either(tmp_path):
    "Some Pythons look at digits in a time that grows with their square: 200 of 15 kB would take a minute"
    raw = b''.join(head('p', note(k, 15_000)[1], b'x') + note(k, 15_000)[0] + head(f'{k}.txt', 0, b'0') for k in range(200)) + bytes(1024)
    for o in ('0.tar', 'a.tar'): (tmp_path/o).write_bytes(raw.replace(b'=1', b'=x').replace(b'1'*100, b'x'*100))
    assert 'there are many' in one_line(F.unpacked, tmp_path/'a.tar') and 'there are many' in [*F.shard_samples([str(tmp_path/'0.tar')])][-1][1]

def test_notes_are_forgotten(tmp_path, monkeypatch):
    "tarfile keeps all members that it has seen, with their notes"
    kept, add = [], tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, 'next', lambda t: kept.append(len(t.members)) or add(t))
    (tmp_path/'a.tar').write_bytes(tar_of([(f'{i}.txt', b'a') for i in range(50)]))
    F.unpacked(tmp_path/'a.tar')
    assert max(kept) <= 1

def test_a_server_that_sends_zeros_for_ever_behind_a_shard_is_left(liar):
    whole, sent = tar_of([('0.png', PNG), ('0.txt', b'a room')]), []
    def answer(h):
        h.send_response(200)
        h.end_headers()
        with suppress(OSError):
            h.wfile.write(whole)
            while len(sent) < 500: sent.append(h.wfile.write(bytes(1 << 20)))
    liar.answer = answer
    assert len(D.open_images(f'http://127.0.0.1:{liar.server_port}/' + '{0..0}.tar', 16)) == 1 and len(sent) < 200

def test_what_others_have_named_does_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    "Names in a note, which anyone may seal, and folders of a data set"
    def make(work): (work/'a.txt').write_text('a')
    path = C.artefact(tmp_path/'x', make, {}, dict(sampler='x\x1b]0;pw\x07'), cheap=True)
    C.artefact(path, make, {}, dict(sampler='ddim'), cheap=True)
    (tmp_path/'s'/'s\x1b[31mx').mkdir(parents=True)
    (tmp_path/'s'/'s\x1b[31mx'/'a.png').write_bytes(PNG)
    (tmp_path/'s'/'s\x1b[31mx'/'metadata.csv').write_text('file_name,about\na.png,x\n')
    D.open_images(tmp_path/'s', 16)
    (p := tmp_path/'p\x1b]0;pw').mkdir()
    N.mend_process(N.Process('flow'), p)
    with monkeypatch.context() as m, C.patience('waiting for \x1b[31m', .01):
        m.setattr(C.time, 'monotonic', lambda now=[0]: now.append(now[-1] + 3) or now[-1])
        C.Bar(9, 'decoding \x1b[31m').step()
        C.time.sleep(.2)
    print(repr(C.preset('tiny', 'x\x1b[31m')))
    out = ''.join(capsys.readouterr())
    assert 'made again' in out and 'decoding' in out and 'waiting' in out and 'data         x' in out and 'brought up to date' in out and 'no column text' in out and '\x1b' not in out and '\x07' not in out

def test_a_command_that_is_advised_is_not_cut_inside_its_quotes():
    import shlex
    for k in (200, 500):   # of which the latter is cut
        name = 'a'*182 + "'" + 'b'*30 + '$(touch${IFS}PWNED)' + 'c'*k
        _, word = shlex.split(str(UserError(shlex.join(['latentdiff-encode', name]))))   # it ends outside of quotes
        assert word.startswith(name[:400] if k == 200 else name[:300]) and ('...' in word) == (k == 500)
    assert len(str(UserError('x'*5000))) < 300

def test_two_spaces_in_a_path_are_told_as_two(tmp_path):
    "So what a refusal advises can be pasted; what breaks lines or steers a terminal is told as Python writes it"
    message = one_line(P.LatentDiffusionPipeline.from_pretrained, tmp_path/'no  such\trun\x1b\n  here')
    assert 'no  such\\trun\\x1b here' in message

# --- a server

class Liar(http.server.BaseHTTPRequestHandler):
    "Answers every request with `server.answer`: (status, headers, body), or a function of the request that answers it"
    def do_GET(self):
        if callable(self.server.answer): return self.server.answer(self)
        status, headers, body = self.server.answer
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass

@pytest.fixture
def liar():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Liar)
    s.handle_error, s.over, s.asked = lambda *a: None, threading.Event(), []   # who hangs up is no error of the server
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    yield s
    s.over.set()
    s.shutdown()
    s.server_close()

HTML = b'<!DOCTYPE html><html>sign in first</html>'
@pytest.mark.parametrize('path,answer', [*[('/a.zip', (200, {'Content-Length': o}, zip_of(ONE))) for o in ('many', '1e3', '999999', '12', '9'*400)],
    *[(path, (200, {'Content-Type': 'text/html'}, HTML)) for path in ('/a.zip', '/a.tgz', '/a.npz')], *[('/a.zip', (status, {}, b'')) for status in (204, 206, 302, 404, 416, 500)],
    ('/a.zip', (302, {'Location': 'file:///etc/hostname'}, b'')), ('/a.npz', (200, {}, pickle.dumps(Planted())))], ids=lambda o: str(o[:2] if isinstance(o, tuple) else o)[:80])
def test_a_server_that_lies_is_one_line_and_leaves_nothing(path, answer, liar, home):
    liar.answer = answer
    one_line(D.open_images, f'HTTP://127.0.0.1:{liar.server_port}{path}#f', 16)
    assert not [o for o in home.rglob('*') if o.is_file() and not o.name.endswith(('.part', '.part.tag'))]
    if answer[0] == 200 and path == '/a.zip':                          # the next call is not misled by what is left
        liar.answer = 200, {'Content-Length': str(len(zip_of(ONE)))}, zip_of(ONE)
        assert len(D.open_images(f'http://127.0.0.1:{liar.server_port}{path}', 16)) == 1

BODY = NOISE*3

def in_pieces(piece, pause=0., most=None):
    "From where it is asked for, `piece` bytes and a `pause` at a time; after `most` bytes not a word more, and the line stays open"
    def answer(h):
        start = int(h.headers.get('Range', 'bytes=0-')[6:-1])
        h.server.asked.append(start)
        h.send_response(206 if start else 200)
        for k, v in (('Content-Length', len(BODY) - start), ('ETag', '"v1"')): h.send_header(k, str(v))
        if start: h.send_header('Content-Range', f'bytes {start}-{len(BODY) - 1}/{len(BODY)}')
        h.end_headers()
        rest = BODY[start:][:most]
        for i in range(0, len(rest), piece):
            h.wfile.write(rest[i:i+piece])
            if h.server.over.wait(pause): return
        if most is not None: h.server.over.wait()
    return answer

@pytest.mark.parametrize('slow,low,high', [(in_pieces(500, most=0), 0, 0), (in_pieces(500, most=1000), 3000, 3000), (in_pieces(1, .01), 3, 99)], ids=['at once', 'in mid-file', 'drips'])
def test_a_server_that_falls_silent_is_one_line_and_what_came_is_kept(slow, low, high, liar, tmp_path, monkeypatch):
    "At once, in mid-file three times, or a few bytes at a time: within a bounded time; the same call goes on from there"
    monkeypatch.setattr(F, 'PATIENCE', .1)
    liar.answer, path, start = slow, tmp_path/'a.bin', time.monotonic()
    assert 'try later' in one_line(F.download, f'http://127.0.0.1:{liar.server_port}/a.bin', path) and time.monotonic() - start < 5
    have = (tmp_path/'a.bin.part').stat().st_size
    assert len(liar.asked) == 3 and not path.exists() and low <= have <= high
    liar.answer = in_pieces(len(BODY))
    assert F.download(f'http://127.0.0.1:{liar.server_port}/a.bin', path).read_bytes() == BODY and liar.asked[-1] == have

def without_end(first, piece):
    "A few bytes at a time for ever, so that no read waits long"
    def answer(h):
        h.server.asked.append(0)
        h.wfile.write(first)
        while not h.server.over.wait(.02): h.wfile.write(piece)
    return answer

CHUNKED = b'HTTP/1.1 200 OK\r\nETag: "v1"\r\nTransfer-Encoding: chunked\r\n\r\n3e8;'
@pytest.mark.parametrize('first,piece', [(b'', b'HTTP/1.1 100 Continue\r\n\r\n'), (b'HTTP/1.1 200 OK\r\n', b'a'), (b'HTTP/1.1 200 OK\r\nX: ', b'a\r\nX: '), (b'', b'H'), (CHUNKED, b'a')], ids=['continue', 'a header', 'headers', 'status', 'a chunk'])
def test_a_server_that_never_comes_to_the_point_is_one_line(first, piece, liar, tmp_path, monkeypatch):
    "What arrives is no byte of the file: three times `PATIENCE`, not for ever, and an answer that was cut off is no empty file"
    monkeypatch.setattr(F, 'PATIENCE', .2)
    liar.answer, start = without_end(first, piece), time.monotonic()
    assert 'nothing came for 0.2 seconds' in one_line(F.download, f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin')
    assert len(liar.asked) == 3 and time.monotonic() - start < 9 and not (tmp_path/'a.bin').exists()

def test_a_proxy_that_never_comes_to_the_point_is_one_line(liar, tmp_path, monkeypatch):
    "Its answer to CONNECT comes before the line is any server's"
    monkeypatch.setattr(F, 'PATIENCE', .2)
    monkeypatch.setattr(Liar, 'do_CONNECT', Liar.do_GET, raising=False)
    monkeypatch.setenv('https_proxy', f'http://127.0.0.1:{liar.server_port}')
    liar.answer, start = without_end(b'HTTP/1.1 200 OK\r\n', b'X: a\r\n'), time.monotonic()
    assert 'could not download' in one_line(F.download, 'https://nowhere.test/a.bin', tmp_path/'a.bin')
    assert liar.asked and time.monotonic() - start < 9

def test_a_line_that_is_opened_late_is_hung_up_too(monkeypatch):
    monkeypatch.setattr(F, 'PATIENCE', .05)
    (here, there), ended, found = socket.socketpair(), [], []
    here.settimeout(5)
    with pytest.raises(TimeoutError, match='nothing came for'), F._patiently(found):
        time.sleep(.3)
        found.append(here)
        ended.append(here.recv(1))
    assert ended == [b''] and there.recv(1) == b''

def test_a_server_that_sends_us_elsewhere_sends_us_to_http_alone(liar, tmp_path):
    liar.answer = 302, {'Location': f'ftp://127.0.0.1:{liar.server_port}/a.bin'}, b''
    assert 'unknown url type: ftp' in one_line(F.download, f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin')

def test_a_slow_line_is_no_silent_server(liar, tmp_path, monkeypatch):
    "The whole takes several times as long as any silence may"
    monkeypatch.setattr(F, 'PATIENCE', .1)
    liar.answer = in_pieces(1000, .03)
    assert F.download(f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin').read_bytes() == BODY and liar.asked == [0]

@pytest.mark.parametrize('headers', [{'ETag': '"v2"'}, {'ETag': None}, {'Content-Range': 'bytes 0-'}, {'Content-Range': 'many'}, {'Content-Range': None},
    {'Content-Range': f'bytes 4000-{len(BODY) - 1}/{len(BODY) + 1}'}], ids=str)
def test_the_rest_of_another_file_is_not_put_behind_the_beginning_of_this(headers, liar, tmp_path):
    "A server that says 206, though its file has changed, or may have, or it begins somewhere else"
    def answer(h):
        rest = BODY[4000:] if 'Range' in h.headers else BODY
        h.send_response(206 if 'Range' in h.headers else 200)
        right = {'Content-Range': f'bytes 4000-{len(BODY) - 1}/{len(BODY)}'} if 'Range' in h.headers else {}
        for k, v in {'Content-Length': len(rest), 'ETag': '"v1"', **right, **headers}.items():
            if v: h.send_header(k, str(v))
        h.end_headers()
        h.wfile.write(rest)
    liar.answer = answer
    (tmp_path/'a.bin.part').write_bytes(bytes(4000))
    (tmp_path/'a.bin.part.tag').write_text(f'"v1"\n{len(BODY)}')
    assert F.download(f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin').read_bytes() == BODY

@pytest.mark.parametrize('named', [{'ETag': '"v1"'}, {'Last-Modified': 'Sat, 28 Nov 2026 09:00:00 GMT'}], ids=str)
@pytest.mark.parametrize('total', [len(BODY), '*'])
@pytest.mark.parametrize('most', [1000, 10**6], ids=['in parts', 'at once'])
def test_the_rest_may_come_in_parts_and_without_its_date(named, most, total, liar, tmp_path):
    "RFC 9110, 15.3.7: a server that was asked for all behind a byte may send less, and need not repeat the date of the file, or its size"
    def answer(h):
        start = int(h.headers.get('Range', 'bytes=0-')[6:-1])
        end = min(start + most, len(BODY))
        h.server.asked.append(start)
        h.send_response(206 if start else 200)
        h.send_header('Content-Length', end - start if start else len(BODY))
        if start: h.send_header('Content-Range', f'bytes {start}-{end - 1}/{total}')
        for k, v in named.items():
            if not start or k == 'ETag': h.send_header(k, v)
        h.end_headers()
        h.wfile.write(BODY[start:end if start else 4000])   # the first time it hangs up
    liar.answer = answer
    assert F.download(f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin').read_bytes() == BODY and liar.asked[:2] == [0, 4000]
    assert [o.name for o in tmp_path.iterdir()] == ['a.bin']

def test_a_server_that_sends_nothing_more_is_not_asked_for_ever(liar, tmp_path):
    def answer(h):
        start = int(h.headers.get('Range', 'bytes=0-')[6:-1])
        h.server.asked.append(start)
        h.send_response(206 if start else 200)
        h.send_header('ETag', '"v1"')
        h.send_header('Content-Length', 0 if start else len(BODY))
        if start: h.send_header('Content-Range', f'bytes {start}-{start}/{len(BODY)}')
        h.end_headers()
        if not start: h.wfile.write(BODY[:4000])
    liar.answer = answer
    assert '4,000 bytes came' in one_line(F.download, f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin') and liar.asked == [0, 4000, 4000]

@pytest.mark.parametrize('tag', [b'', b'\n', b'"v1"', b'"v1"\nmany', b'"v1"\n' + b'9'*30])
def test_a_note_beside_a_download_that_says_nothing(tag, liar, tmp_path):
    "Of an earlier version, cut, or damaged: what is there is gone on from, or begun afresh"
    liar.answer = in_pieces(10**6)
    (tmp_path/'a.bin.part').write_bytes(BODY[:4000])
    (tmp_path/'a.bin.part.tag').write_bytes(tag)
    assert F.download(f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin').read_bytes() == BODY and [o.name for o in tmp_path.iterdir()] == ['a.bin']

def test_a_server_that_has_no_rest_and_never_sends_it_all_is_not_asked_for_ever(liar, tmp_path):
    def answer(h):
        h.server.asked.append(int(h.headers.get('Range', 'bytes=0-')[6:-1]))
        if h.server.asked[-1]: return h.send_error(416)
        h.send_response(200)
        h.send_header('ETag', '"v1"')
        h.send_header('Content-Length', len(BODY))
        h.end_headers()
        h.wfile.write(BODY[:4000])
    liar.answer = answer
    for _ in range(2):   # the second finds what the first has left
        assert 'could not download' in one_line(F.download, f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin')
    assert len(liar.asked) < 10

@pytest.mark.parametrize('answer', [(206, {'Content-Range': f'bytes 0-9/{len(BODY)}', 'Content-Length': '10'}, BODY[:10]), (204, {}, b'')], ids=['a part', 'nothing'])
def test_what_nobody_asked_for_is_no_file(answer, liar, tmp_path):
    liar.answer = answer
    assert f'status {answer[0]}' in one_line(F.download, f'http://127.0.0.1:{liar.server_port}/a.bin', tmp_path/'a.bin') and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('path', ['/été/küche 1.bin', '/%C3%A9t%C3%A9/k%C3%BCche%201.bin?a=b&c=d', '/寝室.bin#f'])
def test_an_address_with_letters_beyond_ascii(path, liar, tmp_path):
    paths = []
    def answer(h):
        paths.append(h.path)
        in_pieces(10**6)(h)
    liar.answer = answer
    assert F.download(f'http://127.0.0.1:{liar.server_port}{path}', tmp_path/'a.bin').read_bytes() == BODY
    assert unquote(paths[0]) == unquote(path.split('#')[0]) and paths[0].isascii()

@pytest.mark.parametrize('text', ['{"file_name": "a.png", "text": ' + DEEP + '}', '{"file_name": "a.png", "text": 5}', '{"file_name": 5, "text": "a"}', '{"file_name": "a.png", "text": ["a"]}', '{"file_name": "a.png", "text": "\\ud800"}', '[]', '\0', DEEP], ids=lambda o: o[:40])
def test_a_table_of_captions_that_is_none_is_one_line(text, tmp_path):
    (tmp_path/'s').mkdir()
    (tmp_path/'s'/'a.png').write_bytes(PNG)
    (tmp_path/'s'/'metadata.jsonl').write_text(text)
    assert 'metadata.jsonl' in one_line(D.open_images, tmp_path/'s', 16)

def test_names_are_no_formulas():
    "Two dollars in a name of a class or in a caption, shown as they are"
    import matplotlib.pyplot as plt
    name = r'$\foo$'
    report.labelled(report.image_grid(torch.zeros(2, 3, 8, 8)), [name, 'b'], [name])
    D.show_images(torch.zeros(2, 3, 8, 8), rows=[name], cols=[name, 'b'])
    for o in (np.array(['a', 'b']), torch.arange(2), map(str, (1, 2))): D.show_images(torch.zeros(2, 3, 8, 8), titles=o)
    plt.gcf().canvas.draw()
    plt.close('all')
def test_a_clock_that_is_set_back_gives_no_negative_times(monkeypatch, tmp_path):
    "By an hour at every look: nothing that was measured goes by it, neither what is written down nor what is printed"
    from test_training import small_learner, quiet
    looks = itertools.count()
    monkeypatch.setattr(time, 'time', lambda: 1e9 - 3600*next(looks))
    assert 0 <= made(C.artefact(tmp_path/'a', lambda o: {}, {}, {}))['seconds'] < 60
    assert 0 <= K.evaluate(FEATS, FEATS, NET)['seconds'] < 60
    took = P.expectation(PIPE, 2, 1, 'euler', 2)
    assert 0 <= float(re.search('about (.*) s', took)[1]) < 60, took
    class Back(T.Callback):
        def after_batch(self): next(looks)
    monkeypatch.setattr(time, 'time', lambda now=time.monotonic: 1e9 + now() - 3600*int(repr(looks)[6:-1]))
    learn = quiet(small_learner(Back()), steps=4)
    assert re.fullmatch('00:[0-5][0-9]', learn.recorder.log[-1]), learn.recorder.log
    monkeypatch.setattr(C, 'IN_NOTEBOOK', True)
    bar, shown = C.Bar(9, 'bar'), []
    monkeypatch.setattr(C, 'progress_bar', lambda *args, **kw: shown.append(1) or type('Shown', (), dict(start_t=0., update=lambda self, k: None))())
    bar.step()
    assert not shown
    bar.start -= 3
    bar.step()
    assert shown and -60 < bar.bar.start_t <= -3

def test_sets_of_other_sizes_are_not_compared():
    "By their size in pixels, whether they are tensors or opened; features have none"
    other = D.open_images('rooms', 24, n=20)
    assert "'fake': 24, 'real': 16" in one_line(K.evaluate, other, ROOMS, NET) and "'fake': 16, 'real': 24" in one_line(K.evaluate, X, other, NET)
    assert K.evaluate(K.features(NET, ROOMS), K.features(NET, other), NET)['n_fake'] == 20

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    os.environ |= dict(LATENTDIFF_DATA=tempfile.mkdtemp(), HF_HUB_OFFLINE='1')
    why = {title: answer(*o) for title, o in CALLS.items()}
    for title, o in why.items():
        if o: print(f'{title:45.90} {o}')
    raw = sum(bool(o) and not o.startswith('does not name') for o in why.values())
    print(f'of {len(why)} malformed calls {raw} give a raw exception or a silent answer, {sum(map(bool, why.values())) - raw} do not name what is wrong')
