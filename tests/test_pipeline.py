"The pipeline object, its folder, and the small pieces behind the commands."
import json
import numpy as np, pytest, torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from matplotlib.figure import Figure
from latentdiff.autoencoder import KLAutoencoder, open_autoencoder
from latentdiff.conditioning import ClassConditioner, Conditioned, ConditionalUNet, guide
from latentdiff.commands import settings_of, write_npz, write_pngs
from latentdiff.core import UserError, load_component, save_component
from latentdiff.files import npz_pixels
from latentdiff.noisify import Process
from latentdiff.pipeline import KIDCurve, LatentDiffusionPipeline, path_of, zoo
from latentdiff.report import kid_curve
from latentdiff.sampling import sample, start_noise
from latentdiff.unet import UNet, train_denoiser

def small(latent_channels=4, process=Process('flow', 'velocity', 'logit_normal'), seed=0):
    "An untrained pipeline whose denoiser is not all zeros."
    torch.manual_seed(seed)
    ae = KLAutoencoder(3, (16,), patch=4, latent_channels=latent_channels)
    net = UNet(latent_channels, widths=(16,32), depth=1, attn_levels=(1,))
    torch.nn.init.normal_(net.conv_out.weight, std=.1)
    return LatentDiffusionPipeline(ae.eval(), net.eval(), process, 32)

@pytest.mark.parametrize('process', [Process('flow', 'velocity', 'logit_normal'), Process('cosine', 'v', 'uniform'), Process('edm', 'v', 'edm')])
def test_saved_and_loaded_draws_the_same_bits(tmp_path, process):
    a = small(process=process)
    a.save_pretrained(tmp_path)
    b = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert b.process == process and b.size == 32
    assert torch.equal(a(5, 3, seed=7), b(5, 3, seed=7))

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
            torch.testing.assert_close(vae.decode(z).sample.clamp(-1, 1), p(2, 5, 'ddim', seed=3, bs=2), atol=1e-4, rtol=0)

def test_images():
    x = small()(3, 2)
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1

def test_one_image_depends_on_seed_and_index_alone():
    p = small()
    a = p(6, 3, seed=1)
    assert torch.equal(p(3, 3, seed=1), a[:3])
    torch.testing.assert_close(p(3, 3, seed=1, bs=2), a[:3], atol=1e-4, rtol=0)
    assert (p(3, 3, seed=2) - a[:3]).abs().max() > .01

def test_drawing_leaves_the_global_generator_alone():
    p = small()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    p(2, 2)
    assert torch.equal(torch.rand(2), want)

def test_parts_of_two_runs_do_not_mix():
    a, b = small(4), small(6)
    with pytest.raises(UserError, match='in_channels 6 .* 4 latent channels'): LatentDiffusionPipeline(a.autoencoder, b.denoiser, a.process, 32)

def test_path_goes_from_noise_to_image():
    p = small()
    path = path_of(p, 2, 4, seed=0)
    assert [round(t, 2) for t, *_ in path] == [1, .75, .5, .25, 0]
    assert torch.equal(path[-1][1], p.latents(2, 4, bs=2)) and path[0][1].std() > .8

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
    assert [c[0] for c in curve.curve] == [.2, .6] and not any(t for t, _ in seen)
    assert not torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))

def test_the_floor_is_drawn_where_it_is():
    "Not one standard error above it"
    ax = Figure().add_subplot()
    kid_curve(ax, [(.5, .3, .01), (1., .2, .01)], dict(kid_floor=.02, kid_floor_se=.03))
    assert [o.get_ydata()[0] for o in ax.get_lines() if o.get_linestyle() == '--'] == [.02]
    assert [o.get_position()[1] for o in ax.texts] == [.02]

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
    assert (p(2, 3, cond='cat') - p(2, 3, cond='dog')).abs().max() > .01

def test_without_guidance_the_condition_does_not_count():
    p = listening()
    torch.testing.assert_close(p.latents(2, 3, cond='cat', guidance=0.), p.latents(2, 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(p.latents(2, 3, cond='cat', negative='cat', guidance=5.), p.latents(2, 3, cond='cat', guidance=1.), atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize('cond', [torch.tensor([0, 1]), np.array([0, 1]), ['cat', 'dog'], ['0', '1'], range(2)], ids=str)
def test_conditions_of_every_kind(cond):
    p = listening()
    assert torch.equal(p.latents(4, 2, bs=4, cond=cond), p.latents(4, 2, bs=4, cond=['cat', 'dog', 'cat', 'dog']))

@pytest.mark.parametrize('told,words', [(dict(cond=[]), 'empty'), (dict(cond='cow'), 'cat, dog'), (dict(negative='cat'), 'no condition'),
                                        (dict(cond='cat', guidance=float('inf')), 'number'), (dict(cond='cat', negative='cow'), 'cat, dog')])
def test_conditions_that_cannot_be_drawn(told, words):
    with pytest.raises(UserError, match=words) as e: listening()(2, 2, **told)
    assert '\n' not in str(e.value)

def test_a_pipeline_that_listens_is_saved_and_loaded(tmp_path):
    p = listening()
    p.save_pretrained(tmp_path)
    index = json.loads((tmp_path/'model_index.json').read_text())
    assert index['denoiser'] == ['latentdiff.conditioning', 'Conditioned'] and not (tmp_path/'unet').exists()
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert torch.equal(again(3, 3, cond='dog'), p(3, 3, cond='dog'))

def test_a_condition_for_one_that_cannot_listen():
    with pytest.raises(UserError, match='trained without') as e: small()(2, 2, cond='cat')
    assert '\n' not in str(e.value)

def test_half_precision_weights_load_as_float32(tmp_path):
    p = small()
    want = p(2, 3)
    p.autoencoder.half(), p.denoiser.half()
    p.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, 'cpu')
    assert next(again.denoiser.parameters()).dtype == torch.float32
    torch.testing.assert_close(again(2, 3), want, atol=.05, rtol=0)
