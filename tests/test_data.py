"The data lesson's promises, on pictures, archives and servers made here: no network, no data set needed"
import gzip, hashlib, http.server, io, os, tarfile, threading, time, zipfile
import numpy as np, pytest, torch
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from PIL import Image
from torch import nn

from latentdiff import data as D
from latentdiff.data import (DeviceLoader, Picture, ROOM_FACTORS, UserError, download, extract, file_md5, from_uint8,
    image_dls, image_grid, load_pixels, open_images, preset, read_idx, render_room, room_caption, room_factors, rooms,
    split_of, to_rgb, to_uint8)

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path/'home'

def one_line(f, *args, **kwargs):
    "The message of the `UserError` that this raises, which is one line"
    with pytest.raises(UserError) as e: f(*args, **kwargs)
    message = str(e.value)
    assert message and '\n' not in message
    return message

def left(folder): return sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*')) if folder.exists() else []

def save(path, im=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    (im or Image.fromarray(rooms(1, 32)[0].permute(1, 2, 0).numpy())).save(path, **kwargs)
    return path

# presets

def test_preset_choice(monkeypatch):
    monkeypatch.setenv('LATENTDIFF_PRESET', 'tiny')
    assert preset().name == 'tiny' and preset('gpu').name == 'gpu'
    monkeypatch.delenv('LATENTDIFF_PRESET')
    assert preset().name == ('gpu' if torch.cuda.is_available() else 'cpu')
    assert 'tiny, cpu, gpu' in one_line(preset, 'huge')

def test_preset_fits_data_and_size():
    assert preset('cpu', data='rooms').data == 'rooms'
    assert preset('cpu', data='fashion_mnist') == preset('cpu')
    assert preset('cpu', data='some/folder').minutes == preset('cpu', data='lsun_bedroom').minutes
    factor = lambda p: p.ae_patch*2**(len(p.ae_widths) - 1)
    assert factor(preset('tiny')) == factor(preset('cpu')) == factor(preset('gpu', 'mnist')) == 4
    assert factor(preset('tiny', size=64)) == factor(preset('cpu', 'rooms')) == factor(preset('gpu', 'rooms')) == 8
    assert 'cpu' in repr(preset('cpu')) and 'fashion_mnist' in repr(preset('cpu'))

# pixels

def test_uint8_round_trip_and_clamp():
    every = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    back = to_uint8(from_uint8(every))
    assert torch.equal(back, every.expand(1, 3, 16, 16)) and from_uint8(every).dtype == torch.float32
    assert to_uint8(torch.tensor([-3., 3.]).view(1, 1, 2))[0, 0, 0].tolist() == [0, 255]
    with pytest.raises(TypeError): to_uint8(every)

def test_grid_places():
    x = torch.stack([torch.full((3, 4, 4), v) for v in (-1., 0., 1.)])
    g = np.asarray(image_grid(x, nrow=2, pad=1))
    assert g.shape == (9, 9, 3)
    assert g[0, 0, 0] == 0 and g[0, 5, 0] == 128 and g[5, 0, 0] == 255 and g[8, 8, 0] == 255 and g[0, 4, 0] == 255

# rooms

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
    monkeypatch.setattr(D._Canvas, 'rows', lambda self, top, bottom: self)
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
    codes, jitter = D._codes(3, np.arange(20_000))
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

def test_rooms_are_fast():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    def rate():
        t0 = time.process_time()
        rooms(40, 64)
        return 40/(time.process_time() - t0)
    best = max(rate() for _ in range(3))
    torch.set_num_threads(threads)
    assert best > 150                                   # 500 to 700 where this was written; the promise is 300

# downloads

class Server(http.server.BaseHTTPRequestHandler):
    "Serves `files`; hangs up after `cut` bytes, the first `cuts` times; understands Range unless told not to"
    def do_GET(self):
        s, asked = self.server, self.headers.get('Range')
        s.log.append((self.path, asked))
        if self.path not in s.files: return self.send_error(404)
        data = s.files[self.path]
        start = int(asked[6:-1]) if asked and s.ranges else 0
        if start >= len(data): return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        if s.cuts > 0: s.cuts, data = s.cuts - 1, data[:start + s.cut]
        self.wfile.write(data[start:])
    def log_message(self, *args): pass

@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    s.files, s.log, s.cut, s.cuts, s.ranges, s.url = {}, [], 1000, 0, True, f'http://127.0.0.1:{s.server_port}'
    thread = threading.Thread(target=s.serve_forever, daemon=True)
    thread.start()
    yield s
    s.shutdown()
    s.server_close()

PAYLOAD = bytes(np.random.RandomState(0).randint(0, 256, 5000, dtype=np.uint8))
MD5 = hashlib.md5(PAYLOAD).hexdigest()

def test_interrupted_download_goes_on(server, tmp_path):
    server.files['/a.bin'], server.cuts = PAYLOAD, 2
    path = download(server.url + '/a.bin', tmp_path/'d'/'a.bin', MD5, 5000)
    assert path.read_bytes() == PAYLOAD and left(tmp_path/'d') == ['a.bin']
    assert [r for _, r in server.log] == [None, 'bytes=1000-', 'bytes=2000-']

def test_given_up_download_goes_on_in_the_next_call(server, tmp_path):
    server.files['/a.bin'], server.cuts = PAYLOAD, 3
    one_line(download, server.url + '/a.bin', tmp_path/'d'/'a.bin', MD5, 5000)
    assert left(tmp_path/'d') == ['a.bin.part'] and (tmp_path/'d'/'a.bin.part').stat().st_size == 3000
    download(server.url + '/a.bin', tmp_path/'d'/'a.bin', MD5, 5000)
    assert server.log[-1][1] == 'bytes=3000-' and (tmp_path/'d'/'a.bin').read_bytes() == PAYLOAD

def test_server_without_ranges(server, tmp_path):
    server.files['/a.bin'], server.cuts, server.ranges = PAYLOAD, 1, False
    assert download(server.url + '/a.bin', tmp_path/'a.bin', MD5).read_bytes() == PAYLOAD

def test_whole_part_file_is_only_checked(server, tmp_path):
    server.files['/a.bin'] = PAYLOAD
    (tmp_path/'a.bin.part').write_bytes(PAYLOAD)
    assert download(server.url + '/a.bin', tmp_path/'a.bin', MD5).read_bytes() == PAYLOAD

@pytest.mark.parametrize('check', (dict(md5='0'*32), dict(size=4999)))
def test_wrong_file_leaves_nothing(server, tmp_path, check):
    server.files['/a.bin'] = PAYLOAD
    one_line(download, server.url + '/a.bin', tmp_path/'d'/'a.bin', **check)
    assert left(tmp_path/'d') == []

def test_second_source(server, tmp_path):
    server.files['/b.bin'] = PAYLOAD
    assert download(server.url + '/gone', tmp_path/'a.bin', MD5, mirrors=[server.url + '/b.bin']).read_bytes() == PAYLOAD
    message = one_line(download, server.url + '/gone', tmp_path/'c.bin', mirrors=[server.url + '/gone-too'])
    assert '/gone (' in message and '/gone-too (' in message and '404' in message and 'c.bin' in message

def test_bedrooms_name_their_second_source(server, monkeypatch):
    monkeypatch.setitem(D.LSUN, 'url', server.url + '/gone.tgz')
    assert 'pcuenq/lsun-bedrooms' in one_line(open_images, 'lsun_bedroom', 32)

# archives

def tar_of(members, mode='w:gz'):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, data in members.items():
            m = tarfile.TarInfo(name)
            if isinstance(data, str): m.type, m.linkname = tarfile.SYMTYPE, data
            else: m.size = len(data)
            t.addfile(m, None if isinstance(data, str) else io.BytesIO(data))
    return out.getvalue()

def zip_of(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name, data in members.items(): z.writestr(name, data)
    return out.getvalue()

def png(i=0, size=16):
    out = io.BytesIO()
    Image.fromarray(rooms(1, size, start=i)[0].permute(1, 2, 0).numpy()).save(out, 'png')
    return out.getvalue()

@pytest.mark.parametrize('name,data', [
    ('up.tgz', tar_of({'a.png': png(), '../b.png': png()})), ('up.zip', zip_of({'a.png': png(), '../b.png': png()})),
    ('deep.tar', tar_of({'x/../../b.png': png()}, 'w')), ('root.tgz', tar_of({'/tmp/b.png': png()})),
    ('link.tgz', tar_of({'a.png': png(), 'b.png': '/etc/passwd'})), ('win.zip', zip_of({'..\\b.png': png()}))])
def test_unsafe_archives(tmp_path, home, name, data):
    (tmp_path/name).write_bytes(data)
    assert 'not unpacked' in one_line(open_images, tmp_path/name, 16)
    assert left(home) == [] and left(tmp_path) == sorted(['home', name])

@pytest.mark.parametrize('keep', (.02, .3, .6, .97))
@pytest.mark.parametrize('name', ('a.tgz', 'a.zip'))
def test_truncated_archives(tmp_path, home, name, keep):
    members = {f'{i}.png': png(i, 64) for i in range(5)}
    data = tar_of(members) if name == 'a.tgz' else zip_of(members)
    (tmp_path/name).write_bytes(data[:int(len(data)*keep)])
    assert 'damaged' in one_line(open_images, tmp_path/name, 16)
    assert left(home) == []

def test_archive_is_unpacked_once(tmp_path, home):
    (tmp_path/'set.tgz').write_bytes(tar_of({f'set/{i}.png': png(i) for i in range(4)}))
    a = open_images(tmp_path/'set.tgz', 16)
    stamp = a.paths[0].stat().st_mtime_ns
    b = open_images(str(tmp_path/'set.tgz'), 16)
    assert a.names == ['0.png', '1.png', '2.png', '3.png'] and a.kind == 'set' and b.paths[0].stat().st_mtime_ns == stamp
    assert len([o for o in home.iterdir()]) == 1 and torch.equal(a[2], from_uint8(rooms(1, 16, start=2)[0]))

def test_archive_by_url(server, home):
    server.files['/s.zip'] = zip_of({f'{i}.png': png(i) for i in range(3)})
    assert len(open_images(server.url + '/s.zip', 16)) == 3
    server.files['/bad.zip'] = tar_of({'../x.png': png()})
    one_line(open_images, server.url + '/bad.zip', 16)
    assert not any('bad' in o for o in left(home))
    assert 'no archive' in one_line(open_images, server.url + '/page.html', 16)

def test_read_only_home(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('in the way')
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'file'/'home'))
    (tmp_path/'set.tgz').write_bytes(tar_of({'0.png': png()}))
    assert 'LATENTDIFF_DATA' in one_line(open_images, tmp_path/'set.tgz', 16)

# bad input

def test_missing_empty_and_single(tmp_path, home):
    assert 'no-such' in one_line(open_images, 'no-such', 16)
    (tmp_path/'empty').mkdir()
    assert 'no pictures' in one_line(open_images, tmp_path/'empty', 16)
    assert 'folder' in one_line(open_images, save(tmp_path/'a.png'), 16)
    (tmp_path/'void.tgz').write_bytes(tar_of({}))
    assert 'no pictures' in one_line(open_images, tmp_path/'void.tgz', 16)

def test_unusable_pictures_are_listed(tmp_path):
    good = save(tmp_path/'s'/'good.png')
    save(tmp_path/'s'/'dot.png', Image.new('RGB', (1, 1)))
    save(tmp_path/'s'/'thin.jpg', Image.new('RGB', (40, 7)))
    whole = save(tmp_path/'s'/'whole.jpg').read_bytes()
    (tmp_path/'s'/'cut.jpg').write_bytes(whole[:len(whole)//2])
    (tmp_path/'s'/'cut.png').write_bytes(good.read_bytes()[:-500])
    (tmp_path/'s'/'flip.png').write_bytes(good.read_bytes()[:600] + b'xx' + good.read_bytes()[602:])
    (tmp_path/'s'/'text.gif').write_text('not a picture')
    (tmp_path/'s'/'none.bmp').write_bytes(b'')
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['good.png', 'whole.jpg']
    assert {n for n, _ in images.skipped} == {'dot.png', 'thin.jpg', 'cut.jpg', 'cut.png', 'flip.png', 'text.gif', 'none.bmp'}
    assert all(w and '\n' not in w for _, w in images.skipped) and ('dot.png', 'only 1x1 pixels') in images.skipped

def test_one_pixel_picture_alone(tmp_path):
    save(tmp_path/'s'/'dot.png', Image.new('RGB', (1, 1)))
    assert '1x1' in one_line(open_images, tmp_path/'s', 16)

def test_picture_that_fails_late(tmp_path):
    images = open_images(save(tmp_path/'s'/'a.jpg').parent, 16)
    images.paths[0].write_bytes(b'gone bad')
    assert 'a.jpg' in one_line(images.pixels)

# pictures from files

def flat(mode, colour, **info):
    im = Image.new(mode, (20, 20), colour)
    im.info.update(info)
    return im

@pytest.mark.parametrize('im,rgb', [
    (flat('L', 77), (77, 77, 77)), (flat('1', 1), (255, 255, 255)), (flat('RGB', (9, 8, 7)), (9, 8, 7)),
    (flat('LA', (50, 0)), (255, 255, 255)), (flat('RGBA', (10, 20, 30, 255)), (10, 20, 30)),
    (flat('RGBA', (0, 0, 0, 0)), (255, 255, 255)), (flat('CMYK', (0, 255, 255, 0)), (255, 0, 0)),
    (flat('I;16', 32896), (128, 128, 128)), (flat('I', 65535), (255, 255, 255)), (flat('F', .5), (128, 128, 128)),
    (flat('P', 0, transparency=0), (255, 255, 255)), (flat('L', 7, transparency=7), (255, 255, 255))])
def test_modes(im, rgb):
    assert to_rgb(im).mode == 'RGB' and to_rgb(im).getpixel((5, 5)) == rgb

def test_sixteen_bits_through_a_file(tmp_path):
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
    x = load_pixels(save(tmp_path/'deep.png', Image.fromarray(ramp)), 32)
    assert abs(x[0, 3].float() - torch.linspace(0, 255, 32)).max() <= 1

@pytest.mark.parametrize('note', range(1, 9))
def test_exif_orientation(tmp_path, note):
    "A picture stored in any of the eight ways comes out upright"
    undo = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}
    im = Image.fromarray(rooms(1, 32)[0].permute(1, 2, 0).numpy())
    stored = im.transpose(Image.Transpose[undo[note]]) if note > 1 else im
    exif = Image.Exif()
    exif[0x0112] = note
    x = load_pixels(save(tmp_path/'a.png', stored, exif=exif), 32)
    assert torch.equal(x, rooms(1, 32)[0])

@pytest.mark.parametrize('shape', ((300, 100), (100, 300)))
def test_cropped_not_squashed(tmp_path, shape):
    h, w = shape
    y, x = np.mgrid[:h, :w]
    disc = ((y + .5 - h/2)**2 + (x + .5 - w/2)**2 < 40**2)*np.uint8(255)
    out = load_pixels(save(tmp_path/'a.png', Image.fromarray(disc)), 50, channels=1)[0] > 127
    assert out.any(0).sum() == out.any(1).sum() == 40

def test_resize_averages(tmp_path):
    y, x = np.mgrid[:128, :128]
    out = load_pixels(save(tmp_path/'a.png', Image.fromarray(((x + y) % 2*255).astype(np.uint8))), 16)
    assert (out.float() - 127.5).abs().max() <= 2

def test_draft_changes_little(tmp_path):
    im = Image.fromarray(rooms(1, 256)[0].permute(1, 2, 0).numpy())
    a, b = (load_pixels(save(tmp_path/f'a.{s}', im, **k), 32).float() for s, k in (('png', {}), ('jpg', dict(quality=95, subsampling=0))))
    assert (a - b).abs().mean() < 3

# idx

def idx(a): return bytes([0, 0, 8, a.ndim]) + np.array(a.shape, '>i4').tobytes() + a.tobytes()

def test_idx_format():
    a = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert (read_idx(idx(a)) == a).all()
    assert 'cut short' in one_line(read_idx, idx(a)[:-1])
    for bad in (b'', b'\0\0\x08', b'\0\0\x0d\1\0\0\0\0', b'\x89PNG....'): one_line(read_idx, bad)

@pytest.fixture
def small_mnist(home, monkeypatch):
    rng = np.random.RandomState(0)
    arrays = [rng.randint(0, 256, (60, 28, 28), np.uint8), rng.randint(0, 10, 60).astype(np.uint8),
              rng.randint(0, 256, (20, 28, 28), np.uint8), rng.randint(0, 10, 20).astype(np.uint8)]
    (home/'mnist').mkdir(parents=True)
    for k, (file, a) in enumerate(zip(D.IDX_FILES, arrays)):
        if k % 2: (home/'mnist'/file).write_bytes(idx(a))
        else: (home/'mnist'/f'{file}.gz').write_bytes(gzip.compress(idx(a)))
    monkeypatch.setitem(D.IDX['mnist'], 'md5', [hashlib.md5(idx(a)).hexdigest() for a in arrays])
    return arrays

def test_mnist_from_home(small_mnist):
    images = open_images('mnist', 32)
    assert len(images) == 80 and images.channels == 1 and images[0].shape == (1, 32, 32)
    assert torch.equal(to_uint8(images[61])[0, 0, 2:30, 2:30], torch.from_numpy(small_mnist[2][1]))
    assert images[61][:, 0].eq(-1).all() and images.labels.tolist() == [*small_mnist[1], *small_mnist[3]]
    assert open_images('mnist', 64, channels=3)[0].shape == (3, 64, 64)

def test_wrong_mnist(small_mnist, home):
    path = home/'mnist'/f'{D.IDX_FILES[0]}.gz'
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert 'damaged' in one_line(open_images, 'mnist', 32)
    path.write_bytes(gzip.compress(b'other'))
    assert 'not the published file' in one_line(open_images, 'mnist', 32)

def test_mnist_is_downloaded(small_mnist, home, server, monkeypatch):
    for k, file in enumerate(D.IDX_FILES): server.files[f'/m/{file}.gz'] = gzip.compress(idx(small_mnist[k]))
    for f in (home/'mnist').iterdir(): f.unlink()
    monkeypatch.setitem(D.IDX['mnist'], 'sources', [server.url + '/gone/', server.url + '/m/'])
    assert len(open_images('mnist', 32)) == 80

@pytest.mark.skipif(not os.path.exists('/usr/share/datasets/fashion-mnist'), reason='needs the package dataset-fashion-mnist')
def test_fashion_mnist():
    images = open_images('fashion_mnist', 32)
    assert len(images) == 70_000 and len(images.classes) == 10 and images.pixels(range(500)).shape == (500, 1, 32, 32)
    assert torch.equal(torch.bincount(images.labels), torch.full((10,), 7000))

# the split

def test_split_for_ever():
    assert [i for i in range(30) if split_of(f'{i}.jpg') == 'valid'] == [9, 14]
    assert split_of('a/b/x.png') == split_of('x.png')
    assert 900 < sum(split_of(f'{i}') == 'valid' for i in range(10_000)) < 1100
    assert 2800 < sum(split_of(f'{i}', 30) == 'valid' for i in range(10_000)) < 3200

def test_split_is_a_partition_and_stays(tmp_path):
    a = open_images('rooms', 16, n=300)
    assert sorted([*a.train_idxs.tolist(), *a.valid_idxs.tolist()]) == list(range(300))
    b = open_images('rooms', 16, n=200)
    assert a.valid_idxs[a.valid_idxs < 200].tolist() == b.valid_idxs.tolist()

def test_a_handful_has_both_sides(tmp_path):
    for i in range(3): save(tmp_path/'s'/f'{i}'/'same.png')
    images = open_images(tmp_path/'s', 16)
    assert len(images.train_idxs) == 2 and len(images.valid_idxs) == 1

# Images

def test_labels_from_folders(tmp_path):
    for i in range(3):
        for c in ('cat', 'dog'): save(tmp_path/'s'/c/f'{i}.png')
    images = open_images(tmp_path/'s', 16)
    assert images.classes == ['cat', 'dog'] and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    save(tmp_path/'s'/'loose.png')
    assert open_images(tmp_path/'s', 16).classes is None
    assert open_images(tmp_path/'s'/'cat', 16).classes is None

def test_choice_of_n_is_nested(tmp_path):
    for i in range(20): save(tmp_path/'s'/f'{i:02d}.png')
    a, b = (open_images(tmp_path/'s', 16, n=n).names for n in (5, 10))
    assert len(a) == 5 and set(a) < set(b) and a == sorted(a)
    assert a != open_images(tmp_path/'s', 16, n=5, seed=1).names

def test_pixels_are_the_items(tmp_path):
    for i in range(7): save(tmp_path/'s'/f'{i}.png', Image.fromarray(rooms(1, 40, start=i)[0].permute(1, 2, 0).numpy()))
    for images in (open_images(tmp_path/'s', 16), open_images('rooms', 16, n=130), open_images('rooms', 16, n=9, channels=1)):
        x = images.pixels(workers=3)
        assert x.dtype == torch.uint8 and x.shape == (len(images), images.channels, 16, 16)
        for i in (0, 5, -1): assert torch.equal(images[i], from_uint8(x[i]))
        assert torch.equal(images.pixels([4, 1]), x[[4, 1]]) and images[0].abs().max() <= 1
        with pytest.raises(IndexError): images[len(images)]

def test_fingerprint(tmp_path):
    for i in range(4): save(tmp_path/'s'/f'{i}.png')
    opens = [lambda: open_images(tmp_path/'s', 16), lambda: open_images(tmp_path/'s', 24), lambda: open_images(tmp_path/'s', 16, channels=1),
             lambda: open_images('rooms', 16, n=4), lambda: open_images('rooms', 16, n=4, seed=1)]
    prints = [f().fingerprint for f in opens]
    assert len(set(prints)) == 5 and prints == [f().fingerprint for f in opens]
    save(tmp_path/'s'/'0.png', Image.new('RGB', (50, 50)))
    assert opens[0]().fingerprint != prints[0]

def test_rooms_images():
    images = open_images('rooms', 32, n=50, seed=2)
    for i in (0, 31): assert images.captions[i] == room_caption(room_factors(2, i))
    assert images.classes[images.labels[4]] == room_factors(2, 4)['bed'] and images.names[4] == 'room-2-000004'

# loaders

def test_image_dls_yield_tuples_of_pictures():
    dls = image_dls(open_images('rooms', 16, n=60), bs=8, device='cpu')
    x, y = dls.one_batch()
    assert isinstance(x, Picture) and x.shape == (8, 3, 16, 16) and x.min() >= -1 and x.min() < 0 and y.max() < 6
    assert len(dls.train_ds) + len(dls.valid_ds) == 60 and dls.vocab == list(ROOM_FACTORS['bed'])

def test_image_dls_without_labels(tmp_path):
    for i in range(30): save(tmp_path/'s'/f'{i}.png')
    dls = image_dls(open_images(tmp_path/'s', 16), bs=4, device='cpu')
    b = dls.one_batch()
    assert isinstance(b, tuple) and len(b) == 1 and b[0].shape == (4, 3, 16, 16)

def test_picture_shows_its_range():
    ax = Picture(torch.full((3, 4, 4), 0.)).show()
    assert (ax.images[0].get_array() == 128).all()
    D.plt.close('all')

def test_device_loader_batches():
    x, y = rooms(100, 16), torch.arange(100)
    valid = list(DeviceLoader(x, y, bs=32, device='cpu'))
    assert [len(b[0]) for b in valid] == [32, 32, 32, 4] and torch.cat([b[1] for b in valid]).tolist() == list(range(100))
    assert torch.equal(torch.cat([b[0] for b in valid]), from_uint8(x))
    train = DeviceLoader(x, y, bs=32, shuffle=True, seed=3, device='cpu')
    first, second = [torch.cat([b[1] for b in train]).tolist() for _ in range(2)]
    assert len(train) == 3 and len(set(first)) == 96 and first != second
    again = DeviceLoader(x, y, bs=32, shuffle=True, seed=3, device='cpu')
    torch.rand(5)
    assert torch.cat([b[1] for b in again]).tolist() == first
    for xb, yb in train: assert torch.equal(xb, from_uint8(x[yb]))
    assert len(DeviceLoader(x, bs=500, shuffle=True, device='cpu')) == 1

def test_device_loader_flip_and_floats():
    x = torch.randn(64, 4, 8, 8, dtype=torch.float16)
    (b,) = DeviceLoader(x, bs=64, flip=True, seed=0, device='cpu').one_batch()
    same = (b == x.float()).flatten(1).all(1)
    mirrored = (b == x.float().flip(-1)).flatten(1).all(1)
    assert b.dtype == torch.float32 and (same ^ mirrored).all() and 15 < same.sum() < 50
    (b,) = DeviceLoader(x, bs=8, transform=lambda o: o*0, device='cpu').one_batch()
    assert b.eq(0).all()

def test_device_loader_in_a_learner():
    x = rooms(120, 16)
    y = open_images('rooms', 16, n=120).labels
    dls = DataLoaders(DeviceLoader(x, y, bs=32, shuffle=True, seed=0, device='cpu'), DeviceLoader(x, y, bs=50, device='cpu'))
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 6)), loss_func=nn.CrossEntropyLoss(), lr=1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit(15)
    with learn.no_bar():
        preds, targs = learn.get_preds()
        _, targs_train = learn.get_preds(ds_idx=0)
    assert targs.tolist() == y.tolist() == targs_train.tolist()
    assert (preds.argmax(1) == y).float().mean() > .5
