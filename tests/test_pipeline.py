"The pipeline object, its folder, and the small pieces behind the commands."
import base64, io, itertools, json, math, os, shutil, subprocess, sys, tempfile
from collections import namedtuple
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote
import numpy as np, pytest, safetensors.torch, torch
from PIL import Image
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, HeunDiscreteScheduler, LDMPipeline, PNDMScheduler
from diffusers import UniPCMultistepScheduler, UNet2DModel, UnCLIPScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from errors import one_line
from fastcore.basics import AttrDict
from huggingface_hub import ModelCard
from matplotlib import style
from matplotlib.figure import Figure
from latentdiff import disk
from latentdiff.autoencoder import KLAutoencoder, PretrainedKL, open_autoencoder
from latentdiff.conditioning import ClassConditioner, Conditioned, ConditionalUNet, guide
from latentdiff.commands import settings_of, write_npz, write_pngs
from latentdiff.core import UserError, artefact, load_component, made, save_component
from latentdiff.few_step import shortcut, unipc, with_steps
from latentdiff.files import npz_pixels
from latentdiff.noisify import Process
from latentdiff.pipeline import KIDCurve, LatentDiffusionPipeline, expectation, load_part, loop_of, model_card, path_of, zoo
from latentdiff.report import guidance_curves, kid_curve, training_curves
from latentdiff.sampling import SAMPLER, SAMPLERS, sample, start_noise, time_steps
from latentdiff.unet import AnyUNet2D, UNet, train_denoiser
from processes import ROOT

def small(latent_channels=4, process=Process('flow', 'velocity', 'logit_normal'), seed=0):
    "An untrained pipeline whose denoiser is not all zeros."
    torch.manual_seed(seed)
    ae = KLAutoencoder(3, (16,), patch=4, latent_channels=latent_channels)
    net = UNet(latent_channels, widths=(16,32), depth=1, attn_levels=(1,))
    torch.nn.init.normal_(net.conv_out.weight, std=.1)
    return LatentDiffusionPipeline(ae.eval(), net.eval(), process, 32)

def test_an_empty_name_and_a_guidance_that_is_none_are_refused():
    "`$RUN` that nobody has set is not the current folder; and a scale is a number, also where nothing is told"
    assert 'name is' in one_line(LatentDiffusionPipeline.from_pretrained, '')
    pipe = small()
    for scale in ('a', float('nan'), float('inf'), [2]): assert 'guidance' in one_line(pipe.draw, 2, 1, guidance=scale)
    assert torch.equal(pipe.draw(2, 1, guidance=3), pipe.draw(2, 1))

@pytest.mark.parametrize('process', [Process('flow', 'velocity', 'logit_normal'), Process('cosine', 'v', 'uniform'), Process('edm', 'v', 'edm')])
def test_saved_and_loaded_draws_the_same_bits(tmp_path, process):
    a = small(process=process)
    a.save_pretrained(tmp_path)
    b = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert b.process == process and b.size == 32
    assert torch.equal(a.draw(5, 3, seed=7), b.draw(5, 3, seed=7))

def test_index_is_as_diffusers_writes_it(tmp_path):
    small().save_pretrained(tmp_path)
    d = json.loads((tmp_path/'model_index.json').read_text())
    assert d['_class_name'] == 'LatentDiffusionPipeline' and '_diffusers_version' in d
    assert d['unet'] == ['diffusers', 'UNet2DModel'] and d['autoencoder'] == ['latentdiff.autoencoder', 'KLAutoencoder']
    assert d['scheduler'] == ['diffusers', 'FlowMatchEulerDiscreteScheduler']

def test_diffusers_reads_what_it_can_and_stops_at_the_rest(tmp_path):
    p = small()
    p.save_pretrained(tmp_path)
    x, time = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3., 700.])
    theirs = UNet2DModel.from_pretrained(tmp_path, subfolder='unet')
    with torch.no_grad(): torch.testing.assert_close(theirs(x, time).sample, p.denoiser(x, time), atol=1e-5, rtol=1e-5)
    with pytest.raises(OSError): AutoencoderKL.from_pretrained(tmp_path, subfolder='autoencoder')

def test_a_diffusers_script_draws_the_same_latents(tmp_path):
    "Their network, scheduler and loop on our folder: flow matching by Euler"
    p = small()
    p.save_pretrained(tmp_path)
    net, scheduler = UNet2DModel.from_pretrained(tmp_path, subfolder='unet'), FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder='scheduler')
    scheduler.set_timesteps(sigmas=np.linspace(1, 1/5, 5))
    z = start_noise(p.process, (2, *p.latent_shape), seed=3)
    with torch.no_grad():
        for t in scheduler.timesteps: z = scheduler.step(net(z, t).sample, t, z).prev_sample
    torch.testing.assert_close(z, p.latents(2, 5, 'euler', seed=3, bs=2), atol=1e-4, rtol=0)

def test_a_pipeline_of_diffusers_parts_draws_what_diffusers_draws(tmp_path):
    "Their autoencoder, network and scheduler, with DDIM; saved from here, they load there again"
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, block_out_channels=(16, 16, 16), norm_num_groups=8)
    net, scheduler = small().denoiser, DDPMScheduler(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', clip_sample=False, timestep_spacing='trailing')
    save_component(net, tmp_path/'unet')
    for name, part in dict(vae=vae, unet=UNet2DModel.from_pretrained(tmp_path/'unet'), scheduler=scheduler).items(): part.save_pretrained(tmp_path/'theirs'/name)
    theirs = tmp_path/'theirs'
    p = LatentDiffusionPipeline(open_autoencoder(theirs/'vae'), load_component(theirs/'unet'), Process.from_diffusers(scheduler), 32)
    p.save_pretrained(tmp_path/'ours')
    assert sorted(o.name for o in (tmp_path/'ours').iterdir()) == ['model_index.json', 'process', 'scheduler', 'unet', 'vae']
    for folder in (theirs, tmp_path/'ours'):
        net, vae, ddim = (c.from_pretrained(folder, subfolder=k) for c, k in ((UNet2DModel, 'unet'), (AutoencoderKL, 'vae'), (DDIMScheduler, 'scheduler')))
        ddim.set_timesteps(5)
        z = start_noise(p.process, (2, *p.latent_shape), seed=3)
        with torch.no_grad():
            for t in ddim.timesteps: z = ddim.step(net(z, t).sample, t, z).prev_sample
            torch.testing.assert_close(vae.decode(z).sample.clamp(-1, 1), p.draw(2, 5, 'ddim', seed=3, bs=2), atol=1e-4, rtol=0)

def test_images():
    x = small().draw(3, 2)
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1

def test_one_image_depends_on_seed_and_index_alone():
    p = small()
    a = p.draw(6, 3, seed=1)
    assert torch.equal(p.draw(3, 3, seed=1), a[:3])
    torch.testing.assert_close(p.draw(3, 3, seed=1, bs=2), a[:3], atol=1e-4, rtol=0)
    assert (p.draw(3, 3, seed=2) - a[:3]).abs().max() > .01

ELSEWHERE = """
import sys, torch
from latentdiff.pipeline import LatentDiffusionPipeline
pipe, drawn = LatentDiffusionPipeline.from_pretrained(sys.argv[1], 'cpu'), []
for threads in (1, 2):
    torch.set_num_threads(threads)
    drawn.append(pipe.draw(3, 3, seed=1))
torch.save((torch.backends.cpu.get_cpu_capability(), drawn), sys.argv[2])
"""

def test_where_the_same_bits_end_the_pictures_are_near(tmp_path):
    "Another size of a batch; one thread and two, without the processor's wide instructions: within 1e-4 of a range of 2"
    p, program = small(), tmp_path/'draw.py'
    p.save_pretrained(tmp_path/'pipe')
    program.write_text(ELSEWHERE)
    env = os.environ | dict(PYTHONPATH=str(ROOT), ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41')
    subprocess.run([sys.executable, '-W', 'ignore', program, tmp_path/'pipe', tmp_path/'drawn.pt'], env=env, check=True)
    narrow, drawn = torch.load(tmp_path/'drawn.pt')
    here = p.draw(3, 3, seed=1)
    assert narrow == 'DEFAULT' and here.std() > .1
    for o in (*drawn, p.draw(3, 3, seed=1, bs=2)): torch.testing.assert_close(o, here, atol=1e-4, rtol=0)

def test_drawing_leaves_the_global_generator_alone():
    p = small()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    p.draw(2, 2)
    assert torch.equal(torch.rand(2), want)

def test_parts_of_two_runs_do_not_mix():
    a, b = small(4), small(6)
    with pytest.raises(UserError, match='in_channels 6 .* 4 latent channels'): LatentDiffusionPipeline(a.autoencoder, b.denoiser, a.process, 32)

def test_path_goes_from_noise_to_image():
    p = small()
    path = path_of(p, 2, 4, seed=0)
    assert [round(t, 2) for t, *_ in path] == [1, .75, .5, .25, 0]
    assert torch.equal(path[-1][1], p.latents(2, 4, bs=2)) and path[0][1].std() > .8

@pytest.mark.parametrize('how', [dict(sampler='dpmpp_2m_sde', spacing='logsnr'), dict(sampler='ddpm'), dict(sampler='heun', spacing='karras')], ids=str)
def test_the_way_shown_is_the_way_drawn(how):
    "By the pipeline's own sampler and times, from the noise of the first of them"
    p = LatentDiffusionPipeline(**small().components, drawn_with=dict(steps=4, **how))
    path = path_of(p, 2, None, seed=3)
    torch.testing.assert_close(path[-1][1], p.latents(2, seed=3, bs=2))
    assert len(path) == 5 and path[0][1].std() > .8

def test_a_call_begins_at_the_strength_of_its_first_time():
    "As `latents` does; a start in the middle of the way is no pure noise"
    p, seen = small(), []
    forward = p.denoiser.forward
    p.denoiser.forward = lambda x, t, cond=None: (seen.append(x.std().item()), forward(x, t))[1]
    p(8, spacing=[.5, .2, 0.], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type='latent')
    p.latents(8, 2, spacing=[.5, .2, 0.], bs=8)
    assert [round(seen[0], 1), round(seen[2], 1)] == [.5, .5], seen

def test_path_of_a_known_score():
    "With a denoiser that always answers 'the clean latent is c', the guess is c from the first step and the end is c."
    p = small(process=Process('flow', 'x0', 'uniform'))
    c = torch.full(p.latent_shape, .3)
    p.denoiser.forward = lambda x, t, cond=None: c.expand_as(x)
    path = path_of(p, 2, 4, seed=0)
    for _, _, x0 in path: torch.testing.assert_close(x0, c.expand_as(x0))

# Settings

def test_settings_name_data_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'pics').mkdir()
    assert settings_of('pics', 'tiny')['data'] == str((tmp_path/'pics').resolve())
    assert settings_of('rooms', 'tiny')['data'] == 'rooms'

# Small pieces

def test_pngs_appear_all_or_none(tmp_path):
    with pytest.raises(TypeError): write_pngs(tmp_path/'a', np.zeros((2, 4, 4, 5), np.uint8))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('c', [1, 3])
def test_npz_round_trip(tmp_path, c):
    a = np.random.default_rng(0).integers(0, 256, (5, 8, 8, c), dtype=np.uint8)
    write_npz(tmp_path/'a.npz', a)
    assert torch.equal(npz_pixels(tmp_path/'a.npz').permute(0, 2, 3, 1), torch.from_numpy(a))

def test_kid_curve_scores_the_average_and_changes_nothing():
    "At each point the model holds the averaged weights in eval mode; the training ends with the very bits it would have had."
    z, seen = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    def train(cbs):
        torch.manual_seed(0)
        net = UNet(4, widths=(16,32), depth=1, attn_levels=())
        return train_denoiser(net, Process('flow', 'velocity', 'logit_normal'), z, z[:8], epochs=8, bs=16, cbs=cbs, device='cpu')
    def score(m, process):
        seen.append((m.training, m.conv_out.weight.detach().clone()))
        return 1., .1
    curve = KIDCurve(score, at=(.2, .6))
    a, b = train([curve]).model, train([]).model
    assert [c[0] for c in curve.curve] == [6, 19] and not any(t for t, _ in seen)
    assert not torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))

def test_the_floor_is_drawn_where_it_is():
    "Not one standard error above it"
    ax = Figure().add_subplot()
    kid_curve(ax, [(20, .3, .01), (40, .2, .01)], dict(kid_floor=.02, kid_floor_se=.03))
    assert ax.containers[0].lines[0].get_xdata().tolist() == [.5, 1]   # of the steps that there were in the end
    assert [o.get_ydata()[0] for o in ax.get_lines() if o.get_linestyle() == '--'] == [.02]
    assert [o.get_position()[1] for o in ax.texts] == [.02]

def test_a_report_is_in_the_style_of_the_lessons():
    "Whoever draws it: a lesson, or a command, which sets no style"
    history = dict(rows=[(1, .5, .6), (2, .4, .5)], step=[1, 2], loss=[.5, .4], kid=[(.5, .3, .01), (1., .2, .01)])
    told = dict(of='class', n=9, right=.9, luck=.1, rows=[(1., .2, .1, .5), (2., .3, .1, .8)])
    def drawn(name):
        with style.context(name): return [o.tobytes() for o in (training_curves(history, history, dict(kid_floor=0.)), guidance_curves(told))]
    assert drawn('default') == drawn(['default', 'latentdiff.lesson'])

# --- with conditions ------------------------------------------------------------------------------------------------

def listening(seed=0):
    "An untrained pipeline that can be told a class, and in which it matters."
    p = small(seed=seed)
    p.denoiser = Conditioned(ConditionalUNet(4, widths=(16,32), depth=1, attn_levels=(1,), dim=8), ClassConditioner(['cat', 'dog'], 8))
    for o in p.denoiser.parameters(): torch.nn.init.normal_(o, std=.2 if o.ndim > 1 else 1.)
    p.denoiser.eval()
    return p

def test_a_condition_is_guidance_batch_by_batch():
    p = listening()
    want = sample(guide(p.denoiser, ['cat', 'dog', 'cat', 'dog'], 3.), p.process, 4, (4, 8, 8), 3, bs=4, device='cpu')
    torch.testing.assert_close(p.latents(4, 3, bs=4, cond=['cat', 'dog'], guidance=3.), want)
    torch.testing.assert_close(p.latents(3, 3, bs=2, cond=['cat', 'dog'], guidance=3.), want[:3], atol=1e-4, rtol=1e-4)
    assert torch.equal(p.latents(2, 3, bs=2, cond='dog'), p.latents(2, 3, bs=2, cond=[1]))
    assert (p.draw(2, 3, cond='cat') - p.draw(2, 3, cond='dog')).abs().max() > .01

def test_without_guidance_the_condition_does_not_count():
    p = listening()
    torch.testing.assert_close(p.latents(2, 3, cond='cat', guidance=0.), p.latents(2, 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(p.latents(2, 3, cond='cat', negative='cat', guidance=5.), p.latents(2, 3, cond='cat', guidance=1.), atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize('make', [listening, lambda: quick(told=True)])
def test_without_guidance_half_the_rows_are_asked(make):
    "At scale 1 as many rows reach the network as without a condition, which is what a few-step pipeline does by itself"
    p, rows = make(), []
    p.denoiser.net.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for told in (dict(), dict(cond='cat', guidance=1.), dict(cond='cat', negative='dog', guidance=1.), dict(cond='cat', guidance=1.5)): p.latents(3, 2, bs=2, **told)
    assert rows == [2]*4*3 + [4]*4 if make is listening else rows == [2]*4*3 + [4]*4
    if make is not listening:
        rows.clear()
        p.draw(2, bs=2, cond='cat')
        assert rows == [2, 2]

@pytest.mark.parametrize('cond', [torch.tensor([0, 1]), np.array([0, 1]), ['cat', 'dog'], ['0', '1'], range(2)], ids=str)
def test_conditions_of_every_kind(cond):
    p = listening()
    assert torch.equal(p.latents(4, 2, bs=4, cond=cond), p.latents(4, 2, bs=4, cond=['cat', 'dog', 'cat', 'dog']))

@pytest.mark.parametrize('told,words', [(dict(cond=[]), 'empty'), (dict(cond='cow'), 'cat, dog'), (dict(negative='cat'), 'no condition'),
                                        (dict(cond='cat', guidance=float('inf')), 'number'), (dict(cond='cat', negative='cow'), 'cat, dog')])
def test_conditions_that_cannot_be_drawn(told, words):
    with pytest.raises(UserError, match=words) as e: listening().draw(2, 2, **told)
    assert '\n' not in str(e.value)

def test_a_pipeline_that_listens_is_saved_and_loaded(tmp_path):
    p = listening()
    p.save_pretrained(tmp_path)
    index = json.loads((tmp_path/'model_index.json').read_text())
    assert index['denoiser'] == ['latentdiff.conditioning', 'Conditioned'] and not (tmp_path/'unet').exists()
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert torch.equal(again.draw(3, 3, cond='dog'), p.draw(3, 3, cond='dog'))

def test_a_condition_for_one_that_cannot_listen():
    with pytest.raises(UserError, match='trained without') as e: small().draw(2, 2, cond='cat')
    assert '\n' not in str(e.value)

def test_half_precision_weights_load_as_float32(tmp_path):
    p = small()
    want = p.draw(2, 3)
    p.autoencoder.half(), p.denoiser.half()
    p.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert next(again.denoiser.parameters()).dtype == torch.float32
    torch.testing.assert_close(again.draw(2, 3), want, atol=.05, rtol=0)

def test_one_network_in_half_precision_and_another_default_draw_as_ever():
    "Each works in its own; what torch makes unless told is not asked"
    p = small()
    want = p.draw(2, 3)
    torch.set_default_dtype(torch.float64)
    try: assert torch.equal(p.draw(2, 3), want)
    finally: torch.set_default_dtype(torch.float32)
    p.autoencoder.half()
    torch.testing.assert_close(p.draw(2, 3), want, atol=.05, rtol=0)

class Fourier(torch.nn.Module, ConfigMixin):
    "A network of one's own that looks at numbers as it is made"
    config_name = 'config.json'
    @register_to_config
    def __init__(self, in_channels=4):
        super().__init__()
        self.freqs, self.conv = torch.logspace(0, 2, 4).tolist(), torch.nn.Conv2d(in_channels, in_channels, 1)
    def forward(self, x, time): return self.conv(x)

def test_a_network_of_ones_own_is_saved_and_loaded(tmp_path, monkeypatch):
    "Also where there is no place to try it first"
    p = small()
    for name, home in (('a', tempfile.gettempdir()), ('b', str(tmp_path/'nowhere'))):
        monkeypatch.setattr(tempfile, 'tempdir', home)
        LatentDiffusionPipeline(p.autoencoder, Fourier(), p.process, 32).save_pretrained(tmp_path/name)
        assert load_component(tmp_path/name/'denoiser').freqs[-1] == 100

def test_a_pipeline_that_has_no_room_leaves_the_one_that_is_there(tmp_path, monkeypatch):
    p = small()
    p.save_pretrained(tmp_path/'a')
    before = {o: o.read_bytes() for o in (tmp_path/'a').rglob('*.*') if o.is_file()}
    monkeypatch.setattr(disk.shutil, 'disk_usage', lambda path: namedtuple('Usage', 'total used free')(10, 5, 60_000))
    assert 'Saving this pipeline needs' in one_line(small(seed=1).save_pretrained, tmp_path/'a')
    assert before == {o: o.read_bytes() for o in (tmp_path/'a').rglob('*.*') if o.is_file()}

class Own:
    "A scheduler of one's own, which has no config that would say for which noise it is"
    timesteps = torch.zeros(0)
    def set_timesteps(self, n, device=None): pass
    def step(self, pred, time, x): pass

def test_a_scheduler_of_ones_own_is_one_line():
    assert 'Own cannot draw' in one_line(small().draw, 1, 3, sampler=Own())

def test_an_interrupted_look_puts_the_raw_weights_back():
    "Else a training that goes on would go on from the average"
    swaps, look = [], KIDCurve(lambda *_: 1/0)
    look.learn = AttrDict(ema=AttrDict(swap=lambda: swaps.append(1)), model=torch.nn.Linear(1, 1), noisify_cb=AttrDict(process=None))
    with pytest.raises(ZeroDivisionError): look.look(.5)
    assert len(swaps) == 2 and look.learn.model.training

def test_a_drawing_within_a_drawing_disturbs_neither():
    "A preview in a callback, by a scheduler of diffusers, which keeps a state"
    net, process, x = lambda x, t, c=None: .1*x, Process(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loop, ts = loop_of(UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True)), torch.linspace(1, 0, 9)
    alone, within = loop(net, process, x, ts), []
    y = loop(net, process, x, ts, lambda i, *_: within.append(loop(net, process, x, ts)) if i == 3 else None)
    assert torch.equal(alone, y) and torch.equal(alone, *within)

def test_the_model_of_diffusers_in_place_of_its_config():
    assert 'the config of one of diffusers' in one_line(PretrainedKL, AutoencoderKL())

# --- as diffusers' own pipelines -------------------------------------------------------------------------------------

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe

def test_called_as_diffusers_calls_it():
    "The start noise is torch's from the generator; PIL, arrays and tensors are the same pictures, in [0, 1]"
    p = quiet(small())
    x = SAMPLERS[SAMPLER](p.denoiser, p.process, torch.randn(3, *p.latent_shape, generator=seeded()), time_steps(p.process, 4))
    got = p(3, num_inference_steps=4, generator=seeded(), output_type='pt').images
    torch.testing.assert_close(got, p.decode(x)/2 + .5)
    assert isinstance(p, DiffusionPipeline) and got.min() >= 0 and got.max() <= 1
    again, = p(3, num_inference_steps=4, generator=seeded(), output_type='np', return_dict=False)
    pictures = p(3, num_inference_steps=4, generator=seeded()).images
    assert np.array_equal(again, got.permute(0, 2, 3, 1)) and [o.size for o in pictures] == [(32, 32)]*3
    assert np.array_equal(np.stack(pictures), (again*255).round().astype('uint8'))
    one_each = p(2, num_inference_steps=4, generator=[seeded(5), seeded(6)], output_type='pt').images
    torch.testing.assert_close(one_each[1:], p(1, num_inference_steps=4, generator=seeded(6), output_type='pt').images, atol=1e-4, rtol=0)
    assert p(1, num_inference_steps=2, output_type='pt').images.ne(p(1, num_inference_steps=2, output_type='pt').images).any()

def test_told_what_to_draw_as_diffusers_tells_it():
    p = quiet(listening())
    want = p.decode(SAMPLERS[SAMPLER](guide(p.denoiser, ['cat', 'dog'], 3.), p.process, torch.randn(2, 4, 8, 8, generator=seeded()), time_steps(p.process, 3)))
    got = p(2, num_inference_steps=3, generator=seeded(), guidance_scale=3., cond=['cat', 'dog'], output_type='pt').images
    torch.testing.assert_close(got, want/2 + .5, atol=1e-4, rtol=0)

def test_a_callback_sees_every_step_end(capsys):
    "After step i the latents are what the first i+1 steps make; the last are those that are decoded"
    p, seen = small(), []
    def tell(pipe, i, t, d): seen.append((pipe is p, i, t.item(), d['latents'].clone()))
    x = p(2, num_inference_steps=4, generator=seeded(), sampler='euler', output_type='pt', callback_on_step_end=tell).images
    ts, start = time_steps(p.process, 4), torch.randn(2, 4, 8, 8, generator=seeded())
    assert '4/4' in capsys.readouterr().err
    assert [o[:3] for o in seen] == [(True, i, t*1000) for i, t in enumerate(ts[:-1])]
    with torch.no_grad():
        for i, *_, z in [(o[1], o[3]) for o in seen]: torch.testing.assert_close(z, SAMPLERS['euler'](p.denoiser, p.process, start, ts[:i+2]))
    torch.testing.assert_close(p.decode(seen[-1][3])/2 + .5, x)
    quiet(p)(1, num_inference_steps=2)
    assert not capsys.readouterr().err

@pytest.mark.parametrize('kw,words', [(dict(num_images=0), 'num_images is 0'), (dict(output_type='gif'), 'pil, pt or np'), (dict(sampler='magic'), 'heun'), (dict(generator=[seeded(), seeded()]), 'one for each'),
    (dict(callback_on_step_end=lambda pipe, i, t, d: dict(latents=d['latents']*2)), 'not replace'), (dict(cond='cat'), 'trained without'),
    (dict(sampler=DDIMScheduler()), 'is for ddpm_linear noise and target eps, the network for flow noise and target velocity')])
def test_calls_that_cannot_be(kw, words):
    with pytest.raises(UserError, match=words) as e: quiet(small())(**{'num_images': 1, 'num_inference_steps': 2, **kw})
    assert '\n' not in str(e.value)

def test_latents_are_an_output_too():
    "And what they say when they are decoded is what `pt` says"
    p = quiet(small())
    z, x = (p(2, num_inference_steps=3, generator=seeded(), output_type=o).images for o in ('latent', 'pt'))
    assert z.shape == (2, 4, 8, 8) and torch.equal(p.decode(z)/2 + .5, x)

@pytest.mark.parametrize('kw,words', [(dict(prompt='a cat'), 'prompt is called cond'), (dict(negative_prompt='a cat'), 'called negative'), (dict(batch_size=4), 'called num_images'),
    (dict(eta=0.), 'eta'), (dict(num_images='a cat'), "'a cat': give a whole number"), (dict(num_inference_steps=0), 'num_inference_steps is 0'), (dict(num_inference_steps=2.5), '2.5'),
    (dict(generator=3), 'torch.Generator')])
def test_what_users_of_diffusers_try_first_is_answered(kw, words):
    assert words in one_line(quiet(small()), **{'num_images': 1, 'num_inference_steps': 2, **kw})

def test_their_names_elsewhere(tmp_path):
    "Attributes, saving, loading, offloading: it works, or one line says by what name it does"
    p = quiet(small())
    for theirs, ours in dict(unet='denoiser', vae='autoencoder').items():
        with pytest.raises(AttributeError, match=f'{theirs} is called {ours}'): getattr(p, theirs)
    for f in (p.enable_model_cpu_offload, p.enable_sequential_cpu_offload): assert ".to('cuda')" in one_line(f)
    p.enable_attention_slicing()
    assert 'push_to_hub' in one_line(p.save_pretrained, tmp_path/'a', push_to_hub=True) and not (tmp_path/'a').exists()
    artefact(tmp_path/'run'/'unet', lambda o: dict(kid=1.), {}, {})   # the note of a training is not written over
    assert 'is a run' in one_line(p.save_pretrained, tmp_path/'run') and made(tmp_path/'run'/'unet')['facts'] == dict(kid=1.)
    (tmp_path/'begun').mkdir(), (tmp_path/'begun'/'run.json').write_text('{}')   # nor is one written into that has none yet
    assert 'is a run' in one_line(p.save_pretrained, tmp_path/'begun') and [o.name for o in (tmp_path/'begun').iterdir()] == ['run.json']
    p.save_pretrained(tmp_path/'a', safe_serialization=True)
    ill = quiet(small())                                                           # nor is a good one lost to one that is refused
    next(ill.denoiser.parameters()).data[0] = float('nan')
    before = {o: o.read_bytes() for o in (tmp_path/'a').rglob('*.*') if o.is_file()}
    assert 'not finite' in one_line(ill.save_pretrained, tmp_path/'a') and before == {o: o.read_bytes() for o in (tmp_path/'a').rglob('*.*') if o.is_file()}
    for k, v in dict(scheduler=DDPMScheduler(), size=30, own_scheduler=3, process=Process('cosine', 'v')).items():
        ill = quiet(small())
        if k == 'process': ill.scheduler = ill.process.to_diffusers()              # which the new one does not fit
        setattr(ill, k, v)
        assert one_line(ill.save_pretrained, tmp_path/'a') and before == {o: o.read_bytes() for o in (tmp_path/'a').rglob('*.*') if o.is_file()}, k
    spoilt = dict(zero=lambda o: o.autoencoder.register_to_config(latent_std=[1., 1., 0., 1.]), nan=lambda o: o.autoencoder.latent_std.fill_(float('nan')),
                  key=lambda o: o.denoiser.register_to_config(nosuch=3), meta=lambda o: o.to('meta'), other=lambda o: setattr(o.denoiser, 'conv_in', torch.nn.Conv2d(4, 16, 1)),
                  theirs=lambda o: setattr(o, 'denoiser', small_unet(4)))
    for k, words in dict(zero='latent_std is', nan='latent_std is', key="'nosuch'", meta='meta device', other='first in conv_in.weight', theirs='give AnyUNet2D').items():
        spoilt[k](ill := quiet(small()))
        assert words in one_line(ill.save_pretrained, tmp_path/'a') and before == {o: o.read_bytes() for o in (tmp_path/'a').rglob('*.*') if o.is_file()}, k
    assert 'variant' in one_line(LatentDiffusionPipeline.from_pretrained, tmp_path/'a', variant='fp16')
    assert LatentDiffusionPipeline.from_pretrained(tmp_path/'a', 'cpu', torch_dtype=torch.float16).dtype == torch.float16
    assert 'terms' in one_line(p.push_to_hub, 'us/rooms')

def test_another_scheduler_from_the_config_of_its_own():
    "The first thing that users of diffusers do; the parts of one pipeline make another"
    p = quiet(small())
    want, heun = p.draw(2, 4, bs=2), FlowMatchHeunDiscreteScheduler()
    for same in (LatentDiffusionPipeline(**p.components), LatentDiffusionPipeline.from_pipe(p)):
        assert same.denoiser is p.denoiser and torch.equal(same.draw(2, 4, bs=2), want)
    p.scheduler = FlowMatchHeunDiscreteScheduler.from_config(p.scheduler.config)
    assert torch.equal(p.draw(2, 4, bs=2), p.draw(2, 4, heun, bs=2)) and not torch.equal(p.draw(2, 4, bs=2), want)
    assert torch.equal(LatentDiffusionPipeline(**p.components).draw(2, 4, bs=2), p.draw(2, 4, bs=2))
    p.scheduler = DDIMScheduler.from_config(p.scheduler.config)
    assert 'use process.to_diffusers' in one_line(p.draw, 1, 2)

def test_what_to_stay_away_from_is_repeated_and_cut_by_batch_as_what_to_draw_is():
    p, kw = listening(), dict(cond=['cat', 'dog', 'cat'], guidance=3.)
    each = lambda *negative, n=6, bs=2: p.draw(n, 3, bs=bs, negative=list(negative), **kw)
    assert torch.equal(each('dog', 'cat'), each(*['dog', 'cat']*3)) and torch.equal(each('dog'), p.draw(6, 3, bs=2, negative='dog', **kw))
    assert (each('dog', 'cat', bs=16) - each('dog', 'cat')).abs().max() < 1e-4 < (each('dog', 'cat') - each('cat', 'dog')).abs().max()
    torch.testing.assert_close(each('dog', 'cat', 'cat', 'dog', n=4, bs=16), each('dog', 'cat', 'cat', 'dog', n=4, bs=4), atol=1e-4, rtol=0)

@pytest.mark.parametrize('draw', [lambda p, **kw: p.draw(2, 2, **kw), lambda p, **kw: p.pixels(2, 2, **kw), lambda p, **kw: p(2, 2, **kw), lambda p, **kw: path_of(p, 2, 2, 0, **kw)])
@pytest.mark.parametrize('kw,k', [(dict(cond=['cat', 'dog', 'cat']), 'cond'), (dict(cond='cat', negative=['cat', 'dog', 'cat']), 'negative')])
def test_more_conditions_than_pictures_are_refused(draw, kw, k):
    assert f'{k} is a list of 3 for 2 images: draw as many, or name fewer' in one_line(draw, quiet(listening()), **kw)
    assert expectation(listening(), 40, 1, None, 2, cond=['cat', 'dog', 'cat'], negative='dog')   # which draws two, to see how long it takes

# --- denoisers that say how they want to be drawn with ----------------------------------------------------------------

def quick(told=False):
    "An untrained pipeline whose denoiser takes long steps, and says so"
    p = listening() if told else small()
    p.denoiser = with_steps(p.denoiser).eval()
    net = p.denoiser.net if told else p.denoiser
    torch.nn.init.normal_(net.net.time_embedding.step.linear_2.weight)
    net.drawn_with = dict(sampler='shortcut', steps=2, guidance=1.)
    return quiet(p)

def test_what_is_left_open_is_as_the_denoiser_says():
    "Steps, sampler and guidance, in all three ways to draw; compiled, too"
    p = quick()
    want = p.draw(2, 2, shortcut, bs=2)
    assert torch.equal(p.draw(2, bs=2), want) and torch.equal(p.draw(2, 2, 'shortcut', bs=2), want)
    assert torch.equal(p.pixels(2, bs=2), p.pixels(2, 2, 'shortcut', bs=2))
    calls, kw = [], dict(generator=seeded(), output_type='pt')
    got = p(2, callback_on_step_end=lambda pipe, i, *_: calls.append(i), **kw).images
    assert calls == [0, 1] and torch.equal(got, p(2, num_inference_steps=2, sampler=shortcut, **{**kw, 'generator': seeded()}).images)
    assert expectation(p, 2, None, None, 2).startswith('shortcut, 2 steps')

def test_a_large_batch_is_measured_on_a_small_one(monkeypatch):
    "Time and memory of a whole batch, though one image is asked for: what does not fit is said before it is tried"
    from latentdiff import pipeline as P
    p, drawn, peak = small(), [], [1.]
    def draw(n, steps, sampler, bs, **told):
        drawn.append((n, bs))
        peak[0] = 1.5
    p.draw = draw
    monkeypatch.setattr(P, 'peak_gb', lambda device: peak[0])
    monkeypatch.setattr('latentdiff.disk.free_memory', lambda: 100e9)
    monkeypatch.setattr(P.time, 'monotonic', lambda ticks=itertools.count(): .25*next(ticks))
    assert expectation(p, 1, 10, 'euler', 320) == 'euler, 10 steps on cpu, at most about 50 s and 11.0 GB' and drawn == [(16, 16)]*2
    peak[0] = 1.
    monkeypatch.setattr('latentdiff.disk.free_memory', lambda: 1e9)
    assert 'Drawing 4,096 at a time needs 127.5 GB of memory' in one_line(expectation, p, 1, 10, 'euler', 4096)
    told = quick(told=True)
    assert torch.equal(told.draw(2, bs=2, cond='cat'), told.draw(2, 2, 'shortcut', bs=2, cond='cat', guidance=1.))
    told.denoiser = torch.compile(told.denoiser, backend='eager')
    assert told.how() == dict(steps=2, sampler='shortcut', guidance=1.)

def test_what_is_said_wins():
    "A sampler that is not the denoiser's own takes the usual number of steps"
    p = quick(told=True)
    assert torch.equal(p.draw(2, 3, bs=2), p.draw(2, 3, shortcut, bs=2)) and not torch.equal(p.draw(2, 3, bs=2), p.draw(2, bs=2))
    assert p.how(sampler='heun') == dict(steps=20, sampler='heun', guidance=1.) and p.how(5, 'heun', 3.) == dict(steps=5, sampler='heun', guidance=3.)
    assert not torch.equal(p.draw(2, bs=2, cond='cat', guidance=3.), p.draw(2, bs=2, cond='cat'))
    p.scheduler = FlowMatchEulerDiscreteScheduler()
    assert p.how()['sampler'] is p.own_scheduler and p.how()['steps'] == 20 and p.how(sampler='shortcut')['steps'] == 2

def test_names_that_others_say_nothing_of():
    p = small()
    assert p.how() == dict(steps=20, sampler=SAMPLER, guidance=2.) and torch.equal(p.draw(2, bs=2), p.draw(2, 20, SAMPLER, bs=2))
    assert torch.equal(p.draw(2, 4, 'unipc', bs=2), p.draw(2, 4, unipc, bs=2)) and 'long steps' in one_line(p.draw, 1, 2, 'shortcut')

def test_a_pipeline_draws_as_it_says_where_its_caller_says_nothing(tmp_path):
    "Steps, sampler, times and guidance; kept by a save, a copy and its index; what is said, or the denoiser says, is stronger"
    p, how = quiet(listening()), dict(sampler='ddpm', steps=3, spacing='logsnr', guidance=3.)
    mine, one = LatentDiffusionPipeline(**p.components, drawn_with=how), dict(bs=2, cond='cat')
    want = p.draw(2, 3, 'ddpm', spacing='logsnr', guidance=3., **one)
    mine.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    for same in (mine, again, LatentDiffusionPipeline(**mine.components), LatentDiffusionPipeline.from_pipe(mine)): assert torch.equal(same.draw(2, **one), want)
    kw = dict(output_type='latent', cond=['cat', 'cat'])
    ours, theirs = mine(2, generator=seeded(), **kw).images, p(2, 3, seeded(), 3., sampler='ddpm', spacing='logsnr', **kw).images
    assert torch.equal(ours, theirs) and expectation(mine, 2, None, None, 2, cond='cat').startswith('ddpm, 3 steps')
    assert torch.equal(mine.draw(2, 20, 'dpmpp_2m', guidance=2., **one), p.draw(2, **one))   # times are those of another sampler
    assert torch.equal(mine.draw(2, spacing='uniform', **one), p.draw(2, 3, 'ddpm', spacing='uniform', guidance=3., **one))
    mine.scheduler = mine.process.to_diffusers()
    assert mine.how() == dict(steps=20, sampler=mine.own_scheduler, guidance=3.) and 'drawn_with' not in p.components | p.config
    few = quick()
    assert LatentDiffusionPipeline(**few.components, drawn_with=how).how() == few.how()

@pytest.mark.parametrize('how,words', [(5, 'drawn_with is 5: give a dict'), (['steps'], 'drawn_with is'), (dict(step=5), "model_index.json is 'step': choose one of steps, guidance, sampler"), (dict(sampler='none'), 'choose one of ddpm'),
    (dict(steps='x'), "steps in drawn_with in "), (dict(steps=10**9), 'is 1000000000'), (dict(sampler=['ddim']), "is ['ddim']: choose"), (dict(spacing={}), 'choose one of uniform'), (dict(spacing=5), 'is 5'), (dict(guidance='x'), "is 'x'"), (dict(steps=None), 'is None')])
def test_an_index_that_says_how_to_draw_is_asked(tmp_path, how, words):
    small().save_pretrained(tmp_path)
    index(tmp_path, drawn_with=how)
    said = one_line(lambda: LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu'))
    assert words in said and (isinstance(how, dict) <= ('model_index.json' in said)), said

@pytest.mark.parametrize('how', [dict(steps=0), dict(sampler=unipc), dict(spacing=[1., 0.]), dict(guidance=math.inf), {1: 2}, dict(steps=torch.tensor(3.))])
def test_how_a_pipeline_is_drawn_with_is_asked_before_anything_is_saved(how):
    assert 'drawn_with' in one_line(lambda: LatentDiffusionPipeline(**small().components, drawn_with=how))

def test_how_a_pipeline_is_drawn_with_is_kept_in_plain_values(tmp_path):
    "numpy's numbers too, which JSON does not hold: a save that fails in its middle would lose the pipeline of before"
    p = LatentDiffusionPipeline(**small().components, drawn_with=dict(steps=np.int64(4), guidance=np.float32(2)))
    for _ in range(2): p.save_pretrained(tmp_path)
    assert LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu').drawn_with == dict(steps=4, guidance=2.)

@pytest.mark.parametrize('make,dtype,far', [(small, torch.float16, .005), (listening, torch.bfloat16, .05)])
def test_half_precision_draws_nearly_the_same(make, dtype, far):
    p, kw = make(), dict(bs=4, **(dict(cond='dog') if make is listening else {}))
    want = p.draw(4, 5, **kw)
    assert p.to(dtype) is p and p.dtype == dtype and {o.dtype for m in (p.autoencoder, p.denoiser) for o in m.parameters()} == {dtype}
    z, x = p.latents(4, 5, **kw), p.draw(4, 5, **kw)
    assert z.dtype == x.dtype == torch.float32 and z.isfinite().all() and (z != z.to(dtype).float()).any()
    assert 0 < (x - want).abs().max() < far
    with pytest.raises(UserError, match='float64'): p.to(torch.float64).draw(1, 1)

def test_a_type_is_given_when_it_is_loaded(tmp_path):
    small().save_pretrained(tmp_path)
    p = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu', torch.bfloat16)
    assert p.dtype == torch.bfloat16 and p.device.type == 'cpu' and p.name_or_path == str(tmp_path)
    assert set(p.components) == {'autoencoder', 'denoiser', 'process', 'size', 'scheduler'} and 'KLAutoencoder' in repr(p)

MACHINE_CODE = pytest.mark.skipif('LATENTDIFF_LONG' not in os.environ or not shutil.which(os.environ.get('CXX', 'g++')),
                                  reason='machine code takes a minute (make test-long) and a C++ compiler, g++ or $CXX')

@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=MACHINE_CODE)])
def test_a_compiled_denoiser(backend, tmp_path, monkeypatch):
    "Traced whole by dynamo, and as machine code: it draws the same pictures. Saved, it is what it was."
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path/'compiled'))
    torch.manual_seed(0)
    net = UNet(4, widths=(16,), depth=1, attn_levels=())
    torch.nn.init.normal_(net.conv_out.weight, std=.1)
    p = quiet(LatentDiffusionPipeline(small().autoencoder, net.eval(), Process(), 32))
    want, how = p.draw(2, 3, bs=2), dict(num_inference_steps=3, output_type='pt')
    wanted = p(2, generator=seeded(), **how).images
    p.denoiser = torch.compile(net, backend=backend, fullgraph=True)
    torch.testing.assert_close(p.draw(2, 3, bs=2), want)
    torch.testing.assert_close(p(2, generator=seeded(), **how).images, wanted)
    assert bool([*tmp_path.rglob('*.so')]) is (backend == 'inductor') and want.std() > .05
    p.save_pretrained(tmp_path/'run')
    assert torch.equal(LatentDiffusionPipeline.from_pretrained(tmp_path/'run', 'cpu').draw(2, 3, bs=2), want)

def small_vae():
    torch.manual_seed(1)
    return AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, block_out_channels=(16, 16, 16), norm_num_groups=8)

def test_the_script_of_the_lesson_draws_the_same_pictures(tmp_path):
    "Ten lines that know diffusers alone, on a run with an `AutoencoderKL` whose scale of latents is not 1"
    cell, = (''.join(o['source']) for o in json.loads((ROOT/'nbs/80_pipeline.ipynb').read_text())['cells'] if o['id'] == 'L109')
    script = cell.split("'''")[1].strip()
    assert 'latentdiff' not in script and len(script.splitlines()) <= 10 and script in (ROOT/'README.md').read_text()
    save_component(PretrainedKL(dict(small_vae().config)), tmp_path/'vae')
    p = small()
    p.autoencoder = open_autoencoder(tmp_path/'vae')
    p.autoencoder.set_scale([.5, -1., 0., 2.], [2., .5, 1., 3.])
    p.save_pretrained(tmp_path/'run')
    theirs = dict(run=tmp_path/'run', side=8)
    exec(script, theirs)
    ours = quiet(p)(4, sampler='euler', generator=seeded(), output_type='pt').images
    torch.testing.assert_close(theirs['images'], ours, atol=1e-4, rtol=0)
    assert theirs['images'].std() > .05

# --- pipelines of diffusers ------------------------------------------------------------------------------------------

def small_unet(c=3, **kw):
    "Not one of ours: other norms, no scale and shift"
    torch.manual_seed(c)
    return UNet2DModel(**dict(in_channels=c, out_channels=c, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, sample_size=8,
                              down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D')) | kw).eval()

LINEAR = dict(beta_schedule='scaled_linear', beta_start=.0015, beta_end=.0195)

@pytest.mark.parametrize('theirs', [lambda: DDPMPipeline(small_unet(1), DDPMScheduler()),
    lambda: DDIMPipeline(small_unet(), DDIMScheduler(prediction_type='v_prediction')), lambda: LDMPipeline(small_vae(), small_unet(4), DDIMScheduler(**LINEAR, clip_sample=False))])
def test_a_pipeline_of_diffusers_draws_the_same_here(tmp_path, theirs):
    "Pixels with clipping, grey ones, and latents; loaded here, saved here, and loaded again"
    theirs = quiet(theirs())
    theirs.save_pretrained(tmp_path/'theirs')
    how = dict(num_inference_steps=5, output_type='np')
    want = theirs(3, generator=seeded(), **how).images
    p = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path/'theirs', 'cpu'))
    np.testing.assert_allclose(p(3, generator=seeded(), **how).images, want, atol=1e-4)
    p.save_pretrained(tmp_path/'ours')
    again = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path/'ours', 'cpu'))
    assert np.array_equal(again(3, generator=seeded(), **how).images, p(3, generator=seeded(), **how).images) and want.std() > .05
    assert torch.equal(again.draw(2, 4), p.draw(2, 4)) and (p.draw(2, 4, sampler='ddim') - p.draw(2, 4)).abs().max() > 1e-3

@pytest.mark.parametrize('scheduler', [EulerDiscreteScheduler(use_karras_sigmas=True, **LINEAR), DPMSolverMultistepScheduler(prediction_type='v_prediction'),
    HeunDiscreteScheduler(), PNDMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.), EulerAncestralDiscreteScheduler(timestep_spacing='leading'),
    UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.), FlowMatchLCMScheduler(),
    EulerDiscreteScheduler(prediction_type='v_prediction', use_karras_sigmas=True, timestep_type='continuous', sigma_min=.002, sigma_max=80.),
    DDIMScheduler(prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing', beta_schedule='scaled_linear', clip_sample=False)], ids=lambda o: type(o).__name__)
def test_any_scheduler_is_a_sampler(tmp_path, scheduler):
    "eps, v and velocity: with the network and the noise given, a folder draws what the loop of its scheduler draws"
    net = small_unet()
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path/'scheduler')
    p, g = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')), seeded()
    got = p(2, num_inference_steps=4, generator=seeded(), output_type='pt').images
    scheduler.set_timesteps(4)
    x, scale = torch.randn(2, 3, 8, 8, generator=g)*getattr(scheduler, 'init_noise_sigma', 1.), getattr(scheduler, 'scale_model_input', lambda x, t: x)
    kw = {} if type(scheduler) in (HeunDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler) else dict(generator=g)
    with torch.no_grad():
        for t in scheduler.timesteps: x = scheduler.step(net(scale(x, t), t).sample, t, x, **kw).prev_sample
    torch.testing.assert_close(got, x.clamp(-1, 1)/2 + .5, atol=5e-4, rtol=0)
    assert expectation(p, 2, 8, None, 2).startswith(f'{type(scheduler).__name__}, 8 steps')   # one step is timed, which PNDM cannot take
    if isinstance(scheduler, PNDMScheduler):
        with pytest.raises(UserError, match='PNDMScheduler cannot draw in 3 steps .*: take more'): p(2, num_inference_steps=3)
    edm = scheduler.config.get('timestep_type') == 'continuous'
    assert p.process.schedule == ('edm' if edm else 'flow' if 'Flow' in type(scheduler).__name__ or scheduler.config.prediction_type == 'flow_prediction' else 'scaled_linear' if scheduler.config.beta_schedule != 'linear' else 'ddpm_linear') + '_zero'*scheduler.config.get('rescale_betas_zero_snr', False)

def test_a_scheduler_for_our_own_network(tmp_path):
    "It draws by name or as the pipeline's own; other noise than the network's is refused; a seed is a seed"
    p = small(process=Process('cosine', 'v', 'uniform'))
    ddim = p.process.to_diffusers(DDIMScheduler)
    want = p.draw(3, 4, 'ddim', seed=5, bs=3)
    torch.testing.assert_close(p.draw(3, 4, ddim, seed=5, bs=3), want, atol=1e-4, rtol=0)
    p.scheduler = ddim
    torch.testing.assert_close(p.draw(3, 4, seed=5, bs=3), want, atol=1e-4, rtol=0)
    p.save_pretrained(tmp_path)
    assert torch.equal(LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu').draw(3, 4, seed=5, bs=3), p.draw(3, 4, seed=5, bs=3))
    p.scheduler = p.process.to_diffusers(DDPMScheduler)
    assert torch.equal(p.draw(3, 4, seed=5, bs=3)[:2], p.draw(2, 4, seed=5, bs=3)) and (p.draw(3, 4, seed=5, bs=3) - want).abs().max() > .01

def test_a_scheduler_that_fails_in_the_middle_of_a_drawing_is_refused_as_it_is_given():
    "And a trial changes nothing: neither the scheduler nor what torch draws next"
    p, bad = small(process=Process('cosine', 'v', 'uniform')), dict(clip_sample=True, clip_sample_range='no')
    wrong, right = (DDPMScheduler.from_config({**p.process.to_diffusers(DDPMScheduler).config, **kw}) for kw in (bad, {}))
    torch.manual_seed(0)
    for give in (setattr, lambda p, k, v: LatentDiffusionPipeline(**p.components | {k: v}), lambda p, k, v: p.draw(1, 2, v)): assert 'DDPMScheduler cannot draw' in one_line(give, p, 'scheduler', wrong)
    assert p.own_scheduler is None
    p.scheduler = right
    assert p.own_scheduler is right and right.num_inference_steps is None and torch.initial_seed() == 0 and torch.equal(torch.rand(3), torch.rand(3, generator=seeded()))

def test_a_scheduler_whose_noise_follows_no_seed_is_refused():
    "As in diffusers 0.34 `FlowMatchEulerDiscreteScheduler` where it is stochastic: one seed would draw other pictures each time"
    class Unseeded(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, generator=None, **kw):
            out = super().step(model_output, timestep, sample, **kw)
            return type(out)(prev_sample=out.prev_sample + .1*torch.randn_like(sample))
    p = small(process=Process())
    assert 'Unseeded cannot draw as its config says (its noise follows no seed)' in one_line(setattr, p, 'scheduler', Unseeded())
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    try: p.scheduler = stochastic
    except UserError as e: assert 'follows no seed' in str(e)
    else: assert torch.equal(p.draw(3, 4, seed=5, bs=3)[:2], p.draw(2, 4, seed=5, bs=3))

@pytest.mark.parametrize('cls', [DDPMScheduler, DDIMScheduler, PNDMScheduler])
def test_a_scheduler_that_fails_at_another_number_of_steps_than_its_trial_says_so(cls):
    "Its first time lies beyond its table in a step for each time, not in eight; what the network raises is left alone"
    p, scheduler = quiet(small(process=Process('ddpm_linear', 'eps', 'uniform', steps=20))), cls(20, steps_offset=5)
    assert p.draw(1, 8, scheduler, bs=1).isfinite().all()
    for draw in (lambda: p.draw(1, 20, scheduler, bs=1), lambda: p(1, 20, sampler=scheduler)): assert f'{cls.__name__} cannot draw in 20 steps (' in one_line(draw)
    p.denoiser.forward = lambda *args: {}['mine']
    with pytest.raises(KeyError, match='mine'): p.draw(1, 8, scheduler, bs=1)

def index(f, **kw): (f/'model_index.json').write_text(json.dumps({**json.loads((f/'model_index.json').read_text()), **kw}))
def other_vae(f): index(f, vqvae=['diffusers', 'VQModel'])
def text_too(f): index(f, text_encoder=['transformers', 'CLIPTextModel'])
def no_size(f): small_unet(sample_size=None).save_pretrained(f/'unet')
def odd_size(f): small_unet(sample_size=7).save_pretrained(f/'unet')
def no_safe_weights(f): (f/'unet/diffusion_pytorch_model.safetensors').rename(f/'unet/diffusion_pytorch_model.bin')
def with_classes(f): small_unet(num_class_embeds=3).save_pretrained(f/'unet')
def no_scheduler(f): (f/'scheduler/scheduler_config.json').write_text('{"_class_name": "DiffusionPipeline"}')
def use(**kw): return lambda f: DDIMScheduler(**kw).save_pretrained(f/'scheduler')
def dynamic(f): FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(f/'scheduler')
def unclip(f): UnCLIPScheduler().save_pretrained(f/'scheduler')
def learned(f): DDPMScheduler(variance_type='learned').save_pretrained(f/'scheduler')
def another(Class, **kw):   # what its constructor does not look at
    def spoil(folder):
        Class().save_pretrained(folder/'scheduler')
        f = folder/'scheduler/scheduler_config.json'
        f.write_text(json.dumps(json.loads(f.read_text()) | kw))
    return spoil
def told_sigma(f): EulerDiscreteScheduler(timestep_type='continuous', prediction_type='v_prediction').save_pretrained(f/'scheduler')

@pytest.mark.parametrize('spoil,words', [(other_vae, 'vqvae VQModel'), (text_too, 'CLIPTextModel'), (no_size, 'sample_size'), (odd_size, 'unet cannot be asked'), (no_safe_weights, 'safetensors'), (told_sigma, 'continuous'),
    (with_classes, 'classes'), (no_scheduler, 'newest'), (use(rescale_betas_zero_snr=True), 'rescale_betas_zero_snr'), (use(trained_betas=[.1]*9), 'betas'), (dynamic, 'dynamic'), (unclip, 'UnCLIPScheduler'), (learned, 'variance_type'),
    *((another(c, **kw), f'{c.__name__} cannot draw .*: ') for c, kw in [(DDPMScheduler, dict(steps_offset=5000)), (DDPMScheduler, dict(timestep_spacing='no')), (UniPCMultistepScheduler, dict(solver_order=0)),
        (DDPMScheduler, dict(clip_sample_range='no')), (DDPMScheduler, dict(thresholding=True, dynamic_thresholding_ratio=2.))])])
def test_what_cannot_be_the_same_here_is_refused(tmp_path, spoil, words):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words) as e: LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert '\n' not in str(e.value)

def test_a_flipped_bit_of_a_unet_of_diffusers_is_noticed(tmp_path):
    "Where our own save left a note beside it; a folder of theirs has none"
    f = save_component(AnyUNet2D(small_unet()), tmp_path)/'diffusion_pytorch_model.safetensors'
    load_part(tmp_path, 'UNet2DModel')
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 4
    f.write_bytes(b)
    assert f'{f} has changed since it was saved' in one_line(load_part, tmp_path, 'UNet2DModel')
    (tmp_path/'contents.json').unlink()
    load_part(tmp_path, 'UNet2DModel')

@pytest.mark.parametrize('k', ['use_quant_conv', 'use_post_quant_conv', 'mid_block_add_attention'])
def test_a_vae_whose_config_leaves_out_what_it_has_learned_is_refused(tmp_path, k):
    vae = small_vae()
    vae.save_pretrained(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps({**json.loads((tmp_path/'config.json').read_text()), k: False}))
    with pytest.raises(UserError, match='is not whole in .*: get it again'): PretrainedKL.from_pretrained(tmp_path)

ODD = dict(nan=lambda o: o*float('nan'), vast=lambda o: o.double() + 1e300, **{o: lambda x, to=getattr(torch, o): x.to(to) for o in ('int8', 'int64', 'bool', 'float8_e5m2')})

@pytest.mark.parametrize('odd', ODD)
@pytest.mark.parametrize('small,load', [(small_vae, open_autoencoder), (small_unet, AnyUNet2D.from_pretrained)], ids=['vae', 'unet'])
def test_weights_that_diffusers_would_make_floats_of_are_refused(tmp_path, small, load, odd):
    "It casts whatever stands in the file; what is not finite is found in every tensor"
    small().save_pretrained(tmp_path)
    load(tmp_path)
    f = tmp_path/'diffusion_pytorch_model.safetensors'
    state = safetensors.torch.load_file(f)
    k = [k for k in sorted(state) if 'attentions' in k or k.startswith('decoder')][-1]
    safetensors.torch.save_file(state | {k: ODD[odd](state[k])}, f)
    assert k in one_line(load, tmp_path)

def test_a_vae_of_the_hub_is_looked_at_where_it_was_downloaded_to(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    (tmp_path/'hub'/'models--owner--vae'/'refs').mkdir(parents=True)
    (tmp_path/'hub'/'models--owner--vae'/'refs'/'main').write_text('0'*40)
    small_vae().save_pretrained(folder := tmp_path/'hub'/'models--owner--vae'/'snapshots'/('0'*40))
    (folder/'other.safetensors').write_bytes(b'nobody reads this')
    assert open_autoencoder('owner/vae').latent_channels == 4
    f = folder/'diffusion_pytorch_model.safetensors'
    safetensors.torch.save_file({k: v.to(torch.float8_e5m2) for k, v in safetensors.torch.load_file(f).items()}, f)
    assert f'{f} holds' in (said := one_line(open_autoencoder, 'owner/vae')) and 'in float8' in said

@pytest.mark.parametrize('k,v,words', [('latents_std', [1, 1, 1, 0], r'vae \(latent_std is \[1, 1, 1, 0\]: give 4 finite numbers above 0\)'), ('latents_mean', [0, 0], r'latent_mean is \[0, 0\]: give 4 finite numbers\)')])
def test_a_vae_whose_scale_is_none_names_what_is_wrong(tmp_path, k, v, words):
    vae = small_vae()
    vae.register_to_config(latents_mean=None, latents_std=[1.]*4 if k == 'latents_mean' else None)
    vae.register_to_config(**{k: v})
    vae.save_pretrained(tmp_path/'vae')
    with pytest.raises(UserError, match=words): open_autoencoder(tmp_path/'vae')

def target(f): (f/'process/config.json').write_text((f/'process/config.json').read_text().replace('velocity', 'eps'))
def noise(f): DDPMScheduler().save_pretrained(f/'scheduler')
def long_name(f): index(f, unet=['diffusers', 'X'*5000])
def long_library(f): index(f, unet=['os'*5000, 'UNet2DModel'])
def long_scheduler(f): (f/'scheduler/scheduler_config.json').write_text(json.dumps(dict(_class_name='X'*5000)))
def long_class(f): (f/'autoencoder/config.json').write_text(json.dumps(dict(_class_name='X'*5000)))

@pytest.mark.parametrize('spoil,words', [(target, 'target velocity, the network for flow noise and target eps: take both from one run'), (noise, 'ddpm_linear noise and target eps'),
    (long_name, 'unet XXX'), (long_library, 'not ours'), (long_scheduler, 'newest'), (long_class, 'holds a XXX')])
def test_parts_that_contradict_each_other_are_a_short_line(tmp_path, spoil, words):
    small().save_pretrained(tmp_path)
    spoil(tmp_path)
    said = one_line(LatentDiffusionPipeline.from_pretrained, tmp_path, 'cpu')
    assert words in said and len(said) < 400

def test_a_class_of_thousands_of_letters_is_a_short_line(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(_class_name='X'*5000)))
    assert len(one_line(load_component, tmp_path)) < 300

# --- the Hub ---------------------------------------------------------------------------------------------------------

class StandIn(BaseHTTPRequestHandler):
    "As much of the Hub's HTTP as pushing and loading ask for: one commit, files kept whole in `files`; who writes must show a token"
    files, asked, log_message = {}, [], lambda *a: None

    def answer(self, body=b'{}', status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {'Content-Length': len(body), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        if 'validate-yaml' in self.path: return self.answer()
        if self.headers.get('Authorization') != 'Bearer hf_us': return self.answer(dict(error='Invalid credentials'), 401)
        if self.path.endswith('/repos/create'): return self.answer(dict(url=f'http://{self.headers["Host"]}/us/rooms'))
        if '/preupload/' in self.path:
            return self.answer(dict(files=[dict(path=o['path'], uploadMode='regular', shouldIgnore=False) for o in json.loads(body)['files']]))
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file': self.files[line['value']['path']] = base64.b64decode(line['value']['content'])
        self.answer(dict(commitUrl=f'http://{self.headers["Host"]}/us/rooms/commit/{"a"*40}', commitOid='a'*40))

    def do_GET(self):
        path = unquote(self.path.split('?')[0])
        if not path.startswith(('/us/rooms/', '/api/models/us/rooms')): return self.answer(dict(error='Repository not found'), 404, X_Error_Code='RepoNotFound')
        if '/tree/' in path: return self.answer([dict(type='file', path=k, size=len(v), oid=sha1(v).hexdigest()) for k, v in self.files.items()])
        if path.startswith('/api/'): return self.answer(dict(id='us/rooms', sha='a'*40, siblings=[dict(rfilename=k) for k in self.files]))
        name = path.split('a'*40 + '/')[1]
        self.asked.append(name)
        self.answer(self.files[name], ETag=f'"{sha1(self.files[name]).hexdigest()}"', X_Repo_Commit='a'*40)
    do_HEAD = do_GET

PUSH = '''
import importlib, os, sys, torch
import huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub.hf_api
for o in (huggingface_hub.constants, huggingface_hub.file_download): importlib.reload(o)   # this process was forked from one without the Hub
huggingface_hub.hf_api.api.endpoint = os.environ['HF_ENDPOINT']
from latentdiff.pipeline import LatentDiffusionPipeline, UserError
p = LatentDiffusionPipeline.from_pretrained(sys.argv[1], 'cpu')
print(p.push_to_hub('us/rooms', 'drawn by a program, free for all', token='hf_us'))
again = LatentDiffusionPipeline.from_pretrained('us/rooms', 'cpu')
print(torch.equal(again.draw(2, 2), p.draw(2, 2)))
for f in (lambda: p.push_to_hub('us/rooms', 'free', token=False), lambda: LatentDiffusionPipeline.from_pretrained('us/nothing')):
    try: f()
    except UserError as e: print(str(e).replace(chr(10), '<newline>'))
'''

MEASURED = dict(kid=.5, kid_se=.1, kid_floor=.02, kid_floor_se=.03, n_fake=640, n_real=1234, sampler='heun', steps=9, seed=7, psnr=30.2, n_reconstructed=99, extractor='eyes')

def test_pushed_to_the_hub_and_loaded_from_it(tmp_path, server):
    "The card says what the run has measured; a pickle and a program that lie beside the weights are not even asked for"
    small().save_pretrained(tmp_path/'run')
    (tmp_path/'run/metrics.json').write_text(json.dumps(MEASURED))
    settings = dict(data='/home/me/rooms', preset='tiny', size=32, seed=7, n=5000, ae_steps=1200, steps=3400)
    (tmp_path/'run/run.json').write_text(json.dumps(dict(settings=settings)))
    StandIn.files.update({'evil.py': b'1', 'unet/pytorch_model.bin': b'1'})
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), StandIn)
    Thread(target=httpd.serve_forever, daemon=True).start()
    at = f'http://127.0.0.1:{httpd.server_port}'
    p = server.code(PUSH, tmp_path/'run', HF_ENDPOINT=at, HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path/'home'), HF_HUB_DISABLE_PROGRESS_BARS='1')
    httpd.shutdown()
    assert p.rc == 0, p.err
    where, same, refused, missing = [l for l in p.out.strip().splitlines() if not l.startswith('drawing')][-4:]   # a busy machine says that
    assert where == f'{at}/us/rooms' and same == 'True'
    assert 'us/rooms' in refused and 'hf auth login' in refused and 'us/nothing' in missing and '<newline>' not in refused + missing
    names = {'README.md', 'grid.png', 'model_index.json', 'process/config.json', 'scheduler/scheduler_config.json', 'unet/config.json',
             'unet/diffusion_pytorch_model.safetensors', 'autoencoder/config.json', 'autoencoder/autoencoder.safetensors', 'unet/contents.json', 'autoencoder/contents.json'}
    assert set(StandIn.files) == names | {'evil.py', 'unet/pytorch_model.bin'} and set(StandIn.asked) == names - {'README.md', 'grid.png'}
    assert Image.open(io.BytesIO(StandIn.files['grid.png'])).size == (8*33 - 1, 2*33 - 1)
    card = StandIn.files['README.md'].decode()
    d = ModelCard(card).data
    assert (d.library_name, d.pipeline_tag, d.license, d.base_model) == ('latentdiff', 'unconditional-image-generation', None, None)
    for o in ('library_name: latentdiff', 'drawn by a program, free for all', "from_pretrained('us/rooms')", '5,000', '32 px', 'preset tiny', 'seed 7', '3,400', '1,200',
              '0.5000 ± 0.1000', '0.0200 ± 0.0300', '640 samples', 'heun with 9 steps', '1,234', 'features of eyes', '30.2 dB', '(grid.png)'): assert o in card, o
    assert '/home' not in card

@pytest.mark.parametrize('name,call', [('create_repo', lambda p: p.push_to_hub('us/rooms', 'ours', 'runs/rooms')), ('snapshot_download', lambda p: LatentDiffusionPipeline.from_pretrained('us/rooms'))])
def test_what_the_hubs_carrier_of_large_files_raises_is_one_line(monkeypatch, name, call):
    "hf_xet knows no errors but RuntimeError"
    def gone(*a, **kw): raise RuntimeError('Data processing error: CAS service error')
    monkeypatch.setattr(f'latentdiff.pipeline.{name}', gone)
    assert 'CAS service error' in one_line(call, quiet(small()))

def test_a_name_that_is_nowhere_is_one_line():
    "Without the network, too"
    with pytest.raises(UserError, match='run folder nobody/nothing, and none on the Hub') as e: LatentDiffusionPipeline.from_pretrained('nobody/nothing')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('begun,base', [('us/bedrooms', 'us/bedrooms'), ('/home/me/runs/mine', None), ('bedrooms64', None), ('none', None)])
def test_the_head_of_a_card(tmp_path, begun, base):
    "YAML that the Hub's own reader reads: where it comes from, what it is for, the licence that was given"
    small().save_pretrained(tmp_path)
    settings = dict(data='hub:them/rooms?split=train', preset='tiny', size=32, seed=7, n=500, steps=34, autoencoder=None, **{'from': begun})
    settings |= dict(ae_steps=12) if begun == 'none' else dict(start=dict(fingerprint='0'))
    (tmp_path/'run.json').write_text(json.dumps(dict(settings=settings)))
    (tmp_path/'metrics.json').write_text(json.dumps(MEASURED | dict(sampler='![x](https://evil/x.png)')))
    card = ModelCard(model_card('us/rooms', 'yours: free | for all\nto see', tmp_path, 'cc-by-4.0'))
    d = card.data
    assert d.base_model == base and d.datasets == ['them/rooms'] and d.license == 'cc-by-4.0' and d.library_name == 'latentdiff'
    assert d.pipeline_tag == 'unconditional-image-generation' and {'diffusers', 'latentdiff'} <= {*d.tags}
    assert '| data and its terms | yours: free &#124; for all to see |' in card.text and '!&#91;x](https' in card.text and '/home' not in card.text
    assert (f'34 steps, going on from {base or begun.split("/")[-1]} |' in card.text) is (begun != 'none')

def test_the_task_on_a_card_is_that_of_the_network(tmp_path):
    "Whatever folder the notes lie in"
    tasks = dict(bedrooms64='unconditional-image-generation', fashion_mnist32=None, rooms64='text-to-image')
    for name, task in tasks.items(): assert ModelCard(model_card(f'us/{name}', 'free', tmp_path, saved=zoo()[name])).data.pipeline_tag == task
