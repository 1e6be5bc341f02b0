"The bench of peers: what it adds to their libraries"
import runpy, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from latentdiff.core import UserError
from latentdiff.data import npz_pixels

BENCH = Path(__file__).parents[1]/'bench'/'peers.py'

@pytest.fixture(scope='module')
def bench(): return SimpleNamespace(**runpy.run_path(str(BENCH)))

class Knows(nn.Module):
    "The network that knows the only picture there is"
    config, device = SimpleNamespace(in_channels=1), 'cpu'
    def __init__(self, picture, alphas):
        super().__init__()
        self.picture, self.alphas = picture, alphas
    def forward(self, x, t):
        a = self.alphas[t].view(-1, 1, 1, 1)
        return (x - a.sqrt()*self.picture/2)/(1 - a).sqrt()

@pytest.mark.parametrize('kind', ['Course', 'CosineCourse'])
def test_a_peer_draws_what_it_was_taught(kind, bench):
    "Noise, loss and sampler fit together: who knows the picture has no loss, and draws it"
    peer = getattr(bench, kind).__new__(getattr(bench, kind))
    picture, peer.added = torch.rand(1, 1, 32, 32)*2 - 1, bench.DDPMScheduler(**peer.noise)
    peer.net = Knows(picture, peer.added.alphas_cumprod)
    assert peer.loss(picture.expand(64, -1, -1, -1)) < 1e-4
    assert (peer.draw(2) - picture).abs().max() < .02

def small(bench):
    class Peer(bench.Course): widths = 8, 8, 8, 8
    return Peer

def test_a_killed_training_goes_on_to_the_same_weights(bench, tmp_path):
    "With its average, the optimizer's memory and the turn of the rate"
    x, kind = torch.randint(256, (24, 1, 32, 32), dtype=torch.uint8), small(bench)
    class Averaged(kind):
        decay = .5
        def loss(self, x):
            self.k = getattr(self, 'k', 0) + 1
            if self.k == getattr(self, 'stop', 0): raise KeyboardInterrupt
            return super().loss(x)
    def train(name, stop=0):
        peer = bench.begin(Averaged, 1, 0)
        peer.stop = stop
        bench.train(peer, x, 8, 5, 0, tmp_path/name, every=0)
        return [p.detach().clone() for p in peer.net.parameters()]
    whole = train('whole')
    with pytest.raises(KeyboardInterrupt): train('killed', stop=4)
    for a, b in zip(whole, train('killed')): assert torch.equal(a, b)

def test_a_batch_in_parts_has_the_gradient_of_the_whole(bench, monkeypatch):
    monkeypatch.setitem(bench.step.__globals__, 'PART', 3)
    net, x = nn.Linear(4, 4), torch.randn(8, 4)
    whole, = torch.autograd.grad(net(x).square().mean(), net.weight)
    seen = []
    opt = SimpleNamespace(step=lambda: seen.append(net.weight.grad.clone()), zero_grad=lambda: None)
    bench.step(SimpleNamespace(loss=lambda x: net(x).square().mean()), opt, x)
    assert torch.allclose(seen[0], whole, atol=1e-6)

def test_small_pictures_get_a_black_edge_and_are_drawn_once(bench, tmp_path):
    asked = []
    peer = SimpleNamespace(size=28, net=nn.Identity(), draw=lambda n: asked.append(n) or torch.ones(n, 1, 28, 28))
    px = bench.draw(peer, 130, 0, tmp_path)
    assert px.shape == (130, 1, 32, 32) and (px[..., 2:30, 2:30] == 255).all() and px.sum() == 130*28*28*255
    assert asked == [128, 2] and torch.equal(bench.draw(peer, 130, 0, tmp_path), px) and asked == [128, 2]

@pytest.mark.parametrize('kind', ['Small', 'SmallDiT'])
def test_smalldiffusion_is_asked_as_its_examples_ask(kind, bench):
    pytest.importorskip('smalldiffusion')
    peer = bench.begin(getattr(bench, kind), 1, 0)
    peer.loss(torch.rand(2, 1, 28, 28)*2 - 1).backward()
    assert all(p.grad is not None for p in peer.net.parameters() if p.requires_grad)

def test_without_smalldiffusion_it_says_how_to_get_it(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, 'smalldiffusion', None)
    with pytest.raises(UserError, match='pip install smalldiffusion'): bench.Small(1)

SMALLER = f"""import runpy
bench = runpy.run_path({str(BENCH)!r})
bench['Course'].widths, bench['CosineCourse'].evaluations = (8,)*4, 5
bench['main']()
"""

def test_a_peer_is_measured_trained_drawn_and_scored(finished_run, server, tmp_path):
    "By the judge of a finished run, of whatever pictures of 32 px"
    args = ['--run', finished_run.made_at, '--peers', 'course22p2-cosine', '--steps', 1, '--bs', 8, '--n', 8, '--out', tmp_path]
    r = server.code(SMALLER, *args)
    assert r.rc == 0, r.err
    rows = [[c.strip() for c in o.split('|')[1:-1]] for o in r.out.splitlines() if o.startswith('| ')]
    assert [o[0].split(',')[0] for o in rows] == ['on cpu', 'real against real', 'ours', 'course22p2-cosine']
    assert rows[3][2:4] == ['8', '1'] and float(rows[3][5]) > float(rows[1][5])
    assert 'times that of ours' in r.out.splitlines()[-1] and (tmp_path/'course22p2-cosine-8-600s.json').exists()
    assert npz_pixels(tmp_path/'course22p2-cosine-8-1-0/0.npz').shape == (8, 3, 32, 32)
