"Six denoisers: their blocks against torch, diffusers and closed forms; what they refuse; what reaches what."
import warnings
import pytest, torch, torch.nn.functional as F
from torch import nn
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from latentdiff.core import UserError, load_component, save_component
from latentdiff.denoisers import (CNN1d, DiT, DiTBlock, MLPDenoiser, ResNetDenoiser, SegNet, TimedBlock, TimedNorm, UNet1d,
                                  as_sequence, count, sincos_places, step_seconds)
from latentdiff.noisify import Process
from latentdiff.sampling import sample
from latentdiff.unet import ResBlock, UNet, train_denoiser

def randomise(net, seed=0):
    "Give every weight of `net` a value, so that nothing hides behind a zero."
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g)*(.1 if p.ndim > 1 else .5)
    return net

def noise(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def gap(a, b): return (a - b).abs().max().item()

SMALL = dict(
    resnet=(ResNetDenoiser, dict(in_channels=3, widths=(16,32), depth=1), (3,8,12)),
    resnet3=(ResNetDenoiser, dict(in_channels=3, widths=(16,16,32), depth=2), (3,8,8)),
    segnet=(SegNet, dict(in_channels=3, widths=(16,32), depth=2), (3,8,12)),
    cnn_flat=(CNN1d, dict(width=16, depth=2), (23,)),
    cnn_image=(CNN1d, dict(in_channels=3, width=16, depth=2), (3,5,7)),
    cnn_sequence=(CNN1d, dict(in_channels=3, width=16, depth=2), (3,35)),
    unet1d_flat=(UNet1d, dict(widths=(16,32)), (24,)),
    unet1d_deep=(UNet1d, dict(widths=(16,32,32), depth=2), (24,)),
    unet1d_image=(UNet1d, dict(in_channels=3, widths=(16,32)), (3,4,6)),
    mlp=(MLPDenoiser, dict(in_channels=23, width=32, depth=2), (23,)),
    dit=(DiT, dict(in_channels=3, width=32, depth=2), (3,8,12)),
    dit1=(DiT, dict(in_channels=3, patch=1, width=32, depth=2, heads=2), (3,3,5)))
KINDS = {k: SMALL[k] for k in ('resnet', 'segnet', 'cnn_flat', 'unet1d_flat', 'mlp', 'dit')}
UNTIMED = dict(resnet=(ResNetDenoiser, dict(in_channels=3, widths=(16,32), depth=1, timed=False), (3,8,8)),
               cnn=(CNN1d, dict(width=16, depth=2, timed=False), (23,)))

def each(d): return pytest.mark.parametrize('cls,kw,shape', d.values(), ids=d)

# --- what all of them promise ---------------------------------------------------------------------------------------

@each(SMALL | UNTIMED)
def test_output_is_shaped_like_the_input_and_starts_at_zero(cls, kw, shape):
    out = cls(**kw)(noise(2, *shape), 1000*torch.rand(2))
    assert out.shape == (2, *shape) and not out.any()

@each(SMALL)
def test_time_matters(cls, kw, shape):
    net,x = randomise(cls(**kw)), noise(1, *shape)
    assert gap(net(x, torch.tensor([200.])), net(x, torch.tensor([700.]))) > 1e-3 * net(x, torch.tensor([200.])).abs().max().item()

@each(UNTIMED)
def test_untimed_never_hears_the_time(cls, kw, shape):
    net,x = randomise(cls(**kw)), noise(2, *shape)
    assert torch.equal(net(x, torch.tensor([200., 300.])), net(x, torch.tensor([700., 1000.])))
    assert torch.equal(net(x, None), net(x, torch.tensor([700., 1000.])))
    assert not any('time' in n or 'proj' in n for n,_ in net.named_parameters())

@each(SMALL | UNTIMED)
def test_samples_do_not_mix(cls, kw, shape):
    "Each sample's answer is the one it gets alone, with its own time."
    net,x,t = randomise(cls(**kw)), noise(3, *shape), torch.tensor([100., 500., 900.])
    alone = torch.cat([net(x[i:i+1], t[i:i+1]) for i in range(3)])
    assert gap(net(x, t), alone) < 1e-4 * alone.abs().max().item()

@each(SMALL | UNTIMED)
def test_gradient_reaches_every_parameter(cls, kw, shape):
    net = randomise(cls(**kw))
    (net(noise(4, *shape), 1000*torch.rand(4)) - noise(4, *shape, seed=2)).square().mean().backward()
    assert [n for n,p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

@each(SMALL | UNTIMED)
def test_wakes_up_from_zero(cls, kw, shape):
    "A few steps after the zero start, nothing is stuck at zero."
    torch.manual_seed(0)
    net,x,t = cls(**kw), noise(8, *shape), 1000*torch.rand(8)
    before = {n: p.detach().clone() for n,p in net.named_parameters()}
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(4):
        opt.zero_grad()
        (net(x, t) - x).square().mean().backward()
        opt.step()
    assert [n for n,p in net.named_parameters() if torch.equal(p, before[n])] == []

@each(SMALL)
def test_no_host_synchronisation(cls, kw, shape):
    "A meta tensor has no values: reading one on the host would raise. (Pooling indices exist on meta too.)"
    with torch.device('meta'): assert cls(**kw)(torch.empty(2, *shape), torch.empty(2)).is_meta

@each(SMALL | UNTIMED)
def test_save_and_load(cls, kw, shape, tmp_path):
    net = randomise(cls(**kw)).eval()
    save_component(net, tmp_path/'net')
    again,x,t = load_component(tmp_path/'net'), noise(2, *shape), 1000*torch.rand(2)
    assert type(again) is cls and torch.equal(again(x, t), net(x, t))

@each(KINDS)
def test_refuses_a_condition(cls, kw, shape):
    with pytest.raises(UserError, match='cond=None'): cls(**kw)(noise(1, *shape), 1000*torch.rand(1), torch.zeros(1))

@pytest.mark.parametrize('kind,shape,words', [
    ('resnet', (3,6,8), 'multiples of 4'), ('resnet', (3,8,7), 'multiples of 4'), ('resnet', (4,8,8), 'in_channels=4'),
    ('segnet', (3,8,6), 'multiples of 4'), ('segnet', (1,8,8), 'in_channels=1'), ('dit', (3,7,8), 'multiples of 2'), ('dit', (4,8,8), 'in_channels=4'),
    ('unet1d_flat', (23,), 'multiples of 2'), ('unet1d_flat', (3,24), 'in_channels=3'), ('unet1d_image', (3,3,5), 'multiples of 2'),
    ('mlp', (3,8,8), 'flat'), ('mlp', (24,), 'in_channels=24'), ('cnn_flat', (3,8,8), 'in_channels=3'), ('cnn_image', (23,), 'in_channels=1')])
def test_refusals_are_one_line(kind, shape, words):
    cls,kw,_ = SMALL[kind]
    with pytest.raises(UserError, match=words) as e: cls(**kw)(noise(1, *shape), 1000*torch.rand(1))
    assert '\n' not in str(e.value) and isinstance(e.value, ValueError)

def test_dit_refuses_uneven_widths():
    for kw in (dict(width=130, heads=5), dict(width=100, heads=3)):
        with pytest.raises(UserError, match='width is 1.0: give multiples of (20, such as 120 or 140|12, such as 96 or 108)'): DiT(4, **kw)
    with pytest.raises(UserError, match='dim is 6: give multiples of 4, such as 4 or 8'): sincos_places(2, 2, 6)

# --- blocks ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize('shape', [(5,), (4,6)])
def test_timed_norm_is_its_equation(shape):
    norm,x,emb = randomise(TimedNorm(16, 8)), noise(3, 16, *shape), noise(3, 8, seed=2)
    g = x.reshape(3, 4, -1)
    h = ((g - g.mean(2, keepdim=True))/(g.var(2, keepdim=True, correction=0) + 1e-5).sqrt()).reshape(x.shape)
    one = (1, 16) + (1,)*len(shape)
    h = h*norm.norm.weight.view(one) + norm.norm.bias.view(one)
    scale,shift = (F.silu(emb) @ norm.proj.weight.T + norm.proj.bias).view(3, 32, *one[2:]).split(16, dim=1)
    assert gap(norm(x, emb), h*(1 + scale) + shift) < 1e-4

def test_untimed_norm_is_groupnorm():
    norm,x = randomise(TimedNorm(32)), noise(2, 32, 6)
    assert torch.equal(norm(x), F.group_norm(x, 8, norm.norm.weight, norm.norm.bias))

@pytest.mark.parametrize('cin,cout', [(32,32), (32,64)])
def test_timed_block_is_the_unets(cin, cout):
    theirs,ours = ResBlock(cin, cout, 40), TimedBlock(cin, cout, 40)
    theirs.norm2 = nn.GroupNorm(cout//4, cout) # a U-Net has one number of groups everywhere, these blocks four channels a group
    randomise(theirs)
    names = dict(norm1='norm1.norm', norm2='norm2.norm', time_emb_proj='norm2.proj', conv_shortcut='shortcut')
    ours.load_state_dict({'.'.join([names.get((k := n.split('.'))[0], k[0]), *k[1:]]): v for n,v in theirs.state_dict().items()})
    x,emb = noise(3, cin, 6, 10), noise(3, 40, seed=2)
    assert gap(ours(x, emb), theirs(x, emb)) < 1e-5

def test_block_in_1d_is_the_2d_block_on_one_row():
    "Kernel (1, 3) of a row: copy the 1-D weights into the middle row of 3x3 kernels, and feed an image of height 1."
    one,two,x,emb = randomise(TimedBlock(16, 32, 8, dims=1)), TimedBlock(16, 32, 8), noise(2, 16, 9), noise(2, 8, seed=2)
    state = one.state_dict()
    for k in ('conv1.weight', 'conv2.weight'): state[k] = F.pad(state[k][:, :, None], (0, 0, 1, 1))
    two.load_state_dict(state | {'shortcut.weight': state['shortcut.weight'][..., None]})
    assert gap(one(x, emb), two(x[:, :, None], emb)[:, :, 0]) < 1e-4

# --- ResNet and SegNet ----------------------------------------------------------------------------------------------

def test_resnet_has_one_transposed_convolution_a_halving_and_no_skips():
    net,seen = ResNetDenoiser(4), []
    net.downs[-1].register_forward_hook(lambda m,i,o: seen.append(o.shape))
    net(noise(2, 4, 8, 8), 1000*torch.rand(2))
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in net.modules()) == 3 and seen == [(2, 128, 1, 1)]
    net = randomise(ResNetDenoiser(4))
    net.downs[-1].conv.weight.data.zero_() # nothing but a constant passes the waist...
    assert gap(net(noise(2, 4, 8, 8), torch.full((2,), 500.)), net(noise(2, 4, 8, 8, seed=5), torch.full((2,), 500.))) == 0 # ...so nothing comes out

def test_segnet_skips_carry_places_only():
    "With everything cut at the waist, the input still reaches the output through the pooling indices; multiplied by 3 it says the same."
    net,t = randomise(SegNet(3, widths=(16,32), depth=1)), torch.full((1,), 500.)
    for conv in (net.conv_in, *net.enc[0].convs): conv.bias.data.zero_()
    first = []
    net.dec[-1].register_forward_pre_hook(lambda m,i: first.append(i[0]))
    x = noise(1, 3, 8, 8)
    for y in (x, 3*x, noise(1, 3, 8, 8, seed=7)): net(y, t)
    a,b,c = first
    assert gap(a, b) < 1e-2*a.abs().max().item() # the norm after the first convolution forgets the size
    assert ((a != 0) != (c != 0)).any()           # other places for another picture
    assert a.shape == (1, 16, 8, 8) and (a != 0).sum() <= 16*16 # one in four is filled

def test_unpooling_puts_the_maxima_back():
    x = noise(2, 3, 6, 8)
    top,i = F.max_pool2d(x, 2, return_indices=True)
    back = F.max_unpool2d(top, i, 2)
    full = F.interpolate(top, scale_factor=2., mode='nearest')
    assert torch.equal(back, torch.where(x == full, x, 0.))

# --- one dimension --------------------------------------------------------------------------------------------------

def test_as_sequence():
    assert as_sequence(noise(2, 5)).shape == (2, 1, 5) and as_sequence(noise(2, 3, 5)).shape == (2, 3, 5)
    x = torch.arange(24.).view(1, 2, 3, 4)
    assert as_sequence(x)[0, 1].tolist() == list(range(12, 24)) # row after row

def test_image_and_its_sequence_are_the_same():
    for cls,kw in ((CNN1d, dict(width=16, depth=2)), (UNet1d, dict(widths=(16,32)))):
        net,x,t = randomise(cls(3, **kw)), noise(2, 3, 4, 6), 1000*torch.rand(2)
        assert torch.equal(net(x, t).flatten(2), net(x.flatten(2), t))

def test_cnn1d_moves_with_the_sequence():
    "A CNN answers a shifted question with a shifted answer, away from the ends (but for the norm, which sees all)."
    t = torch.tensor([500.])
    x = torch.cat([torch.zeros(1, 30), noise(1, 20), torch.zeros(1, 30)], dim=1)
    net = randomise(CNN1d(width=16, depth=2, kernel=3))
    a,b = net(x, t), net(x.roll(3, 1), t).roll(-3, 1)
    assert gap(a[:, 15:-15], b[:, 15:-15]) < 1e-3*a.abs().max().item()

def reach(net, shape, at):
    "Which inputs the output `at` (last axes) of the first channel depends on."
    x = noise(1, *shape).requires_grad_()
    out = net(x, torch.tensor([500.]))
    return torch.autograd.grad(out[(0, 0, *at)] if len(shape) > 1 else out[0, at[0]], x)[0][0]

class Id(nn.Module):
    "In place of a norm: the whole-sequence mean would connect everything."
    def forward(self, x, emb=None): return x

def test_cnn1d_receptive_field_is_its_closed_form():
    "Kernel k in two convolutions a block and two more: 1 + (2*depth + 2)*(k-1) places."
    net = randomise(CNN1d(width=16, depth=2, kernel=5))
    for b in net.blocks: b.norm1 = b.norm2 = Id()
    net.norm_out = Id()
    seen = reach(net, (101,), (50,)).nonzero().flatten()
    assert (seen.min().item(), seen.max().item()) == (50 - 12, 50 + 12)

def test_unet1d_uses_its_skips():
    "With the deeper half silenced, the input still reaches the output."
    net,t = randomise(UNet1d(widths=(16,32))), torch.full((1,), 500.)
    net.ups[0].weight.data.zero_(); net.ups[0].bias.data.zero_()
    assert gap(net(noise(1, 24), t), net(noise(1, 24, seed=3), t)) > 1e-2

# --- DiT ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n,dim', [(4,32), (5,128)])
def test_positions_are_diffusers(n, dim):
    theirs = get_2d_sincos_pos_embed(dim, n, base_size=n, output_type='pt')
    assert gap(sincos_places(n, n, dim), theirs.float()) < 1e-5

def test_positions_tell_row_from_column():
    at = sincos_places(3, 5, 16).view(3, 5, 16)
    assert torch.equal(at[0, :, :8], at[2, :, :8]) and torch.equal(at[:, 0, 8:], at[:, 4, 8:]) # column first, then row
    assert len(at.flatten(0, 1).unique(dim=0)) == 15

class Handover(nn.Module):
    "Stands where diffusers embeds time and class: hands over our time embedding."
    def __init__(self, emb):
        super().__init__()
        self.emb = emb
    def forward(self, *args, **kw): return self.emb

def copy_dit(ours, size):
    "diffusers' DiT with the weights of ours."
    c = ours.config
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = DiTTransformer2DModel(num_attention_heads=c.heads, attention_head_dim=c.width//c.heads, in_channels=c.in_channels,
                                       num_layers=c.depth, sample_size=size, patch_size=c.patch, norm_eps=1e-6)
    for a,b in zip(ours.blocks, theirs.transformer_blocks):
        for i,lin in enumerate((b.attn1.to_q, b.attn1.to_k, b.attn1.to_v)):
            lin.weight.data,lin.bias.data = a.qkv.weight.data.chunk(3)[i], a.qkv.bias.data.chunk(3)[i]
        for mine,his in ((a.out, b.attn1.to_out[0]), (a.mlp[0], b.ff.net[0].proj), (a.mlp[2], b.ff.net[2]), (a.ada, b.norm1.linear)):
            his.load_state_dict(mine.state_dict())
    for mine,his in ((ours.patchify, theirs.pos_embed.proj), (ours.ada, theirs.proj_out_1), (ours.linear_out, theirs.proj_out_2)):
        his.load_state_dict(mine.state_dict())
    return theirs

@pytest.mark.parametrize('kw,size', [(dict(width=32, depth=1), 8), (dict(width=48, depth=3, heads=3, patch=4), 16), (dict(in_channels=1, patch=1, width=16, depth=2, heads=1), 5)])
def test_dit_is_diffusers(kw, size):
    ours = randomise(DiT(**kw))
    theirs,x,t = copy_dit(ours, size).eval(), noise(2, ours.config.in_channels, size, size), torch.tensor([100., 800.])
    emb = ours.time_embedding(t)
    for b in theirs.transformer_blocks: b.norm1.emb = Handover(emb)
    want = theirs(x, timestep=torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.long)).sample
    assert gap(ours(x, t), want) < 1e-4*want.abs().max().item()

def test_dit_block_starts_as_the_identity():
    x = noise(2, 6, 32)
    assert torch.equal(DiTBlock(32, 4)(x, noise(2, 32)), x)

def test_dit_sees_everything_and_needs_its_positions():
    net = randomise(DiT(3, width=32, depth=1))
    assert (reach(net, (3, 8, 8), (0, 0)) != 0).all()
    x,t = noise(1, 3, 8, 8), torch.tensor([500.])
    swapped = torch.cat([x[..., 4:], x[..., :4]], dim=3) # whole tokens change places
    out = net(x, t)
    assert gap(net(swapped, t), torch.cat([out[..., 4:], out[..., :4]], dim=3)) > 1e-2

# --- costs ----------------------------------------------------------------------------------------------------------

def test_count_is_its_closed_form():
    "A CNN: n times kernel times cin times cout for each convolution, and the linear layers of the time."
    w,n,k = 16, 23, 5
    net = CNN1d(width=w, depth=2, kernel=k)
    convs,time = 2*w*k + 4*w*w*k, w*4*w + 4*w*4*w + 2*4*w*2*w
    params = sum(p.numel() for p in net.parameters())
    assert count(net, (n,)) == (params, n*convs + time)
    assert count(CNN1d(width=w, depth=2, kernel=k, timed=False), (n,))[1] == n*convs

def test_count_of_a_transformer_is_its_closed_form():
    w,n,d = 32, 24, 2
    net = DiT(3, patch=2, width=w, depth=d)
    block = n*(3*w*w + w*w + 8*w*w) + 2*n*n*w + 6*w*w
    assert count(net, (3, 8, 12))[1] == d*block + n*12*w + n*w*12 + 2*w*w + 2*w*w

def test_count_of_a_transposed_convolution():
    "16 multiply-adds for each pair of channels and each place of the smaller side."
    net = ResNetDenoiser(4, widths=(16,), depth=1, timed=False)
    body = 64*9*(4*16 + 2*16*16) + 16*9*16*16
    assert count(net, (4, 8, 8))[1] == body + 16*16*16*4

def test_count_leaves_the_network_alone():
    net = randomise(UNet(4, widths=(32,64), depth=1)).train()
    x,t = noise(1, 4, 8, 8), 1000*torch.rand(1)
    a = net(x, t)
    assert count(net, (4, 8, 8))[1] > 0 and net.training and torch.equal(net(x, t), a)

def test_step_seconds_finds_the_slower():
    nets = dict(small=CNN1d(4, width=16, depth=1), large=CNN1d(4, width=128, depth=6))
    s = step_seconds(nets, noise(16, 4, 16, 16), rounds=2)
    assert list(s) == ['small', 'large'] and 0 < s['small'] < s['large']
    assert all(p.grad is None for p in nets['large'].parameters())

# --- as denoisers ---------------------------------------------------------------------------------------------------

def trained(cls, kw, shape, target, epochs):
    "A small network trained on data that are all +1 or all -1, its process, and its velocity error at t = 0.6."
    torch.manual_seed(0)
    process,z = Process('flow', target, 'uniform'), torch.ones(640, *shape)
    z[::2] = -1
    net = cls(**kw)
    train_denoiser(net, process, z, z[:64], epochs=epochs, bs=64, lr=5e-3, device='cpu')
    t,eps = torch.full((64,), .6), noise(64, *shape)
    x,_,_ = process.noisify(z[:64], t, eps)
    with torch.no_grad(): x0_hat,eps_hat = process.x0_eps(net(x, process.time_input(t)), x, t)
    return net, process, F.mse_loss(eps_hat - x0_hat, eps - z[:64]).item()

@each(KINDS)
def test_learns_two_points(cls, kw, shape):
    "Trained to answer with x0, every network finds the two points, where the best error is 0, and draws samples of both."
    net,process,error = trained(cls, kw, shape, 'x0', 10)
    assert error < .1 # one that knows nothing has 2
    means = sample(net, process, 32, shape, steps=10, device='cpu').flatten(1).mean(1)
    assert (means.abs() - 1).abs().mean() < .1 and {-1., 1.} == set(means.sign().tolist())

@pytest.mark.parametrize('kind,passes', [('resnet', False), ('segnet', False), ('cnn_flat', True), ('unet1d_flat', True)])
def test_noise_passes_skips_but_not_a_waist(kind, passes):
    "Asked for the velocity, eps - x0, a network without skips finds x0 and loses eps, whose variance is 1."
    error = trained(*SMALL[kind], 'velocity', 5)[2]
    assert error < .5 if passes else .8 < error < 1.2
