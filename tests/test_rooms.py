"The renderer's promises: the same room for ever, from any batch, at any size, and what is named can be seen"
import numpy as np, pytest, torch

from latentdiff import rooms as R
from errors import one_line
from latentdiff.rooms import ROOM_FACTORS, render_room, room_caption, room_codes, room_factors, rooms

@pytest.mark.parametrize('size', (32, 50, 64))
def test_rooms_do_not_depend_on_the_batch(size):
    all_ = rooms(30, size, seed=7)
    assert torch.equal(all_[11:14], rooms(3, size, seed=7, start=11))
    assert torch.equal(all_[5], render_room(room_factors(7, 5), size))
    assert not torch.equal(all_[:1], rooms(1, size, seed=8))
    assert all_.dtype == torch.uint8 and all_.shape == (30, 3, size, size)

def test_rooms_are_the_same_for_ever():
    "A changed number here means every earlier run, cache and score was made on other pictures"
    f = room_factors(0, 1)
    assert [f[k] for k in ROOM_FACTORS] == ['grey', 'walnut', 'red', 'right', 'wood', 'day', 'unlit', 'red', 'yes']
    assert abs(f['jitter']['view_x'] + 0.40247440338134766) < 1e-12

def test_rooms_agree_across_sizes():
    "Antialiased: a room at 64 averaged over 2x2 is nearly the room at 32"
    big, small = rooms(16, 64).float(), rooms(16, 32).float()
    assert (torch.nn.functional.avg_pool2d(big, 2) - small).abs().mean() < 2

def test_painting_few_rows_changes_nothing(monkeypatch):
    a = rooms(64, 48, seed=5)
    monkeypatch.setattr(R._Canvas, 'rows', lambda self, top, bottom: self)
    assert torch.equal(rooms(64, 48, seed=5), a)

def test_factors_can_be_read_back():
    "Each factor changes the picture, and where it should"
    base = dict(wall='cream', floor='oak', bed='red', side='middle', headboard='wood', window='day', lamp='unlit', rug='none', picture='no')
    plain = render_room(base, 64).float()
    for f, values in ROOM_FACTORS.items():
        for v in values:
            if v != base[f]: assert (render_room({**base, f: v}, 64).float() - plain).abs().max() > 30, (f, v)
    assert render_room({**base, 'window': 'night'}, 64).float().mean() < plain.mean()*.75
    assert render_room({**base, 'lamp': 'lit'}, 64).float().mean() > plain.mean()
    for side, where in (('left', 8), ('middle', 32), ('right', 56)):        # the front of a red bed
        r, g, b = render_room({**base, 'side': side}, 64)[:, 50, where].tolist()
        assert r > 2*g and r > 2*b, side

def test_factors_are_balanced():
    codes, jitter = room_codes(3, np.arange(20_000))
    for f, v in codes.items():
        share = np.bincount(v)/len(v)*len(ROOM_FACTORS[f])
        assert len(share) == len(ROOM_FACTORS[f]) and abs(share - 1).max() < .06
    table = np.stack([*codes.values(), *jitter.values()]).astype(float)
    assert abs(np.corrcoef(table) - np.eye(len(table))).max() < .04

def test_unknown_factors():
    assert 'red, blue' in one_line(render_room, dict(bed='pink'), 32)
    assert 'wall, floor' in one_line(render_room, dict(cat='yes'), 32)

def test_caption_names_what_is_there():
    f = dict(bed='red', side='left', window='night', lamp='lit', rug='blue', picture='yes')
    assert room_caption(f) == 'a bedroom with a red bed on the left, a window at night, a lit lamp, a blue rug and a picture'
    assert 'rug' not in room_caption({**f, 'rug': 'none'}) and 'picture' not in room_caption({**f, 'picture': 'no'})

@pytest.mark.parametrize('seed', [-1, -2**63])
def test_rooms_take_any_seed(seed): assert not torch.equal(rooms(2, 32, seed=seed), rooms(2, 32))
