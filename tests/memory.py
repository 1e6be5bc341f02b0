"""What one program has found out need not be found out again by the next: how long a step of a training takes, the latents that a pipeline of the zoo draws without being
told anything, and the features of pictures. Programs of the `Server` remember it in a folder that all workers share. Several processes, which have to do the same, always
measure and draw."""
import hashlib, json, os
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch
import torch
from fastai.basics import CancelFitException
from safetensors.torch import load, save
from latentdiff import core, kid_eval, pipeline, sampling, training

def remembered(f, find):
    "The bytes in the file `f`; if there is none, what `find()` gives, from then on in `f`"
    if not f.exists():
        new = f.with_name(f'{f.name}.{os.getpid()}')
        new.write_bytes(find())
        os.replace(new, f)
    return f.read_bytes()

def name_of(*what): return hashlib.md5(repr(what).encode()).hexdigest()

def same_step(learn):
    "A name for what the time of a step depends on"
    weights = [(tuple(p.shape), p.dtype, p.requires_grad) for p in learn.model.parameters()]
    batch = learn.dls.train.bs, [o.shape[1:] for o in getattr(learn.dls.train.dataset, 'tensors', ())]
    return name_of(learn.model, weights, batch, type(learn.loss_func), [type(o) for o in learn.cbs], learn.dls.device)

class FirstStep(training._Stopwatch):
    "One step after the warm-up is near enough"
    def after_batch(self):
        super().after_batch()
        if len(self.times) > 1: raise CancelFitException

def remember_steps(folder):
    measure = training.step_time
    def once(learn):
        with patch.object(training, '_Stopwatch', FirstStep): return json.dumps(measure(learn)).encode()
    def step_time(learn):
        if core.world() > 1: return measure(learn)
        learn.opt = None      # as after a measurement
        return json.loads(remembered(folder/same_step(learn), lambda: once(learn)))
    training.step_time = step_time

def weights_of(net):
    "A name for its weights"
    h = hashlib.md5()
    for k, v in net.state_dict().items(): h.update(k.encode() + v.cpu().numpy().tobytes())
    return type(net), h.hexdigest()

def same_latents(pipe, *how):
    "A name for what latents depend on: the weights, the noise, the sampler"
    return name_of(weights_of(pipe.denoiser), asdict(pipe.process), pipe.latent_shape, how, pipe.device)

def remember_latents(folder):
    draw, streams = pipeline.LatentDiffusionPipeline.latents, sampling.generators
    def batch(self, first, steps, sampler, seed, bs, spacing):
        "Latents `first` to `first + bs`: the first ones, drawn with the streams of noise of these"
        with patch.object(sampling, 'generators', lambda seed, n, at=0: streams(seed, n, first + at)):
            return save(dict(z=draw(self, bs, steps, sampler, seed, bs, spacing)))
    def latents(self, n, steps=None, sampler=None, seed=0, bs=16, spacing=None, **told):
        of_the_zoo = self.config.get('_name_or_path') in pipeline.zoo()
        if told or not of_the_zoo or self.own_scheduler or callable(sampler) or core.world() > 1:
            return draw(self, n, steps, sampler, seed, bs, spacing, **told)
        name = same_latents(self, sorted(self.how(steps, sampler).items()), seed, bs, spacing)
        z = [load(remembered(folder/f'{name}.{i}', lambda: batch(self, i, steps, sampler, seed, bs, spacing)))['z'] for i in range(0, n, bs)]
        return torch.cat(z)[:n]
    pipeline.LatentDiffusionPipeline.latents = latents

def remember_features(folder):
    embed = kid_eval.EfficientNetFeatures.embed
    def remembered_embed(self, pixels):
        if any(m.training for m in self.net.modules()): return embed(self, pixels)
        name = name_of(self.name, weights_of(self.net), self.device, pixels.shape, hashlib.md5(pixels.cpu().numpy().tobytes()).hexdigest())
        return load(remembered(folder/name, lambda: save(dict(f=embed(self, pixels)))))['f'].to(self.device)
    kid_eval.EfficientNetFeatures.embed = remembered_embed

def remember(folder):
    for part in (remember_steps, remember_latents, remember_features):
        (Path(folder)/part.__name__).mkdir(parents=True, exist_ok=True)
        part(Path(folder)/part.__name__)
