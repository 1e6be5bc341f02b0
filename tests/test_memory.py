"What programs of the tests remember is what they would find out: see memory.py"
import copy
import pytest, torch
import memory
from latentdiff import pipeline, training
from latentdiff.pipeline import LatentDiffusionPipeline
from test_training import quiet, same, small_learner, state

@pytest.fixture
def remembering(tmp_path, monkeypatch):
    "The folder of a memory, in which everything is put back after the test"
    monkeypatch.setattr(LatentDiffusionPipeline, 'latents', LatentDiffusionPipeline.latents)
    monkeypatch.setattr(training, 'step_time', training.step_time)
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
