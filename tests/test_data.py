"The data lesson's promises, on pictures, archives and servers made here: no network, no data set needed"
import gzip, hashlib, http.server, io, json, os, random, tarfile, threading, time, tracemalloc, zipfile
import numpy as np, pytest, torch, webdataset
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from PIL import Image
from scipy.io import savemat
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

# Stanford Cars

@pytest.mark.parametrize('name,body', [('Audi TTS Coupe 2012', 'Coupe'), ('Ford E-Series Wagon Van 2012', 'Van'), ('AM General Hummer SUV 2000', 'SUV'),
    ('Dodge Dakota Club Cab 2007', 'Pickup'), ('Ford F-150 Regular Cab 2012', 'Pickup'), ('Chevrolet Corvette ZR1 2012', 'Other'), ('', 'Other'),
    ('Infiniti G Coupe IPL 2012', 'Coupe'), ('Ram C/V Cargo Van Minivan 2012', 'Minivan'), ('smart fortwo Convertible 2012', 'Convertible')])
def test_body_type(name, body): assert D.body_type(name) == body

CAR_NAMES = ['Audi TTS Coupe 2012', 'Acura TL Sedan 2012', 'Dodge Dakota Club Cab 2007']

def cars_in(home, rows='fname,class_name\n' + ''.join(f'{i:05d}.jpg,{o}\n' for i, o in enumerate(CAR_NAMES))):
    folder = home/'stanford_cars'
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'cars.tgz').write_bytes(tar_of({f'cars_train/{i:05d}.jpg': png(i, 32) for i in range(3)} | {'cars_test/00001.jpg': png(9, 32)}))
    if rows is not None: (folder/'labels.csv').write_text(rows)
    return folder

def test_cars_from_archive_and_table(home):
    cars_in(home)
    cars = open_images('stanford_cars', 16)
    assert cars.names == ['00000.jpg', '00001.jpg', '00002.jpg'] and cars.captions == CAR_NAMES       # none of cars_test
    assert [cars.classes[k] for k in cars.labels] == ['Coupe', 'Sedan', 'Pickup'] and len(cars.classes) == 10
    assert torch.equal(cars[2], from_uint8(load_pixels(cars.paths[2], 16))) and cars.kind == 'stanford_cars'
    one = open_images('stanford_cars', 16, n=1, channels=1)
    assert one.captions == [CAR_NAMES[int(one.names[0][:5])]] and one[0].shape == (1, 16, 16)

def devkit(folder, classes=CAR_NAMES[::-1], of=(3, 2, 1)):
    "Stanford's two MATLAB files: classes count from 1"
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder/'cars_meta.mat', dict(class_names=np.array(classes, object)[None]))
    rows = np.zeros((1, len(of)), [(k, object) for k in ('bbox_x1', 'class', 'fname')])
    for i, k in enumerate(of): rows[0, i] = (1, k, f'{i:05d}.jpg')
    savemat(folder/'cars_train_annos.mat', dict(annotations=rows))

def test_cars_from_devkit(home):
    folder = cars_in(home, None)
    devkit(folder/'devkit')
    assert open_images('stanford_cars', 16).captions == CAR_NAMES
    (folder/'devkit'/'cars_meta.mat').write_bytes(b'MATLAB 5.0 MAT-file, cut')
    assert 'devkit' in one_line(open_images, 'stanford_cars', 16)
    devkit(folder/'devkit', CAR_NAMES[:1])
    assert 'devkit' in one_line(open_images, 'stanford_cars', 16)

def test_cars_are_downloaded(home, server, monkeypatch, tmp_path):
    devkit(tmp_path/'kit')
    kit = tar_of({f'devkit/{o}': (tmp_path/'kit'/o).read_bytes() for o in ('cars_meta.mat', 'cars_train_annos.mat')})
    cars = tar_of({f'stanford-cars/cars_train/{i:05d}.jpg': png(i, 32) for i in range(3)})
    server.files.update({'/c.tgz': cars, '/k.tgz': kit})
    for d, url, data in ((D.CARS, 'c', cars), (D.CARS_DEVKIT, 'k', kit)):
        monkeypatch.setitem(d, 'url', f'{server.url}/{url}.tgz')
        monkeypatch.setitem(d, 'md5', hashlib.md5(data).hexdigest())
    monkeypatch.setitem(D.CARS, 'size', len(cars))
    assert open_images('stanford_cars', 16).captions == CAR_NAMES
    asked = len(server.log)
    assert open_images('stanford_cars', 16).captions == CAR_NAMES and len(server.log) == asked == 2
    monkeypatch.setitem(D.CARS, 'url', server.url + '/gone.tgz')
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'other'))
    assert 'gone.tgz' in one_line(open_images, 'stanford_cars', 16)

@pytest.mark.parametrize('rows,word', [('name,car\na,b\n', 'class_name'), ('', 'class_name'), ('fname,class_name\n00000.jpg,Audi TTS Coupe 2012\n', '00001.jpg'),
    ('fname,class_name\n00000.jpg\n', '00000.jpg')])
def test_cars_with_bad_tables(home, rows, word):
    cars_in(home, rows)
    assert word in one_line(open_images, 'stanford_cars', 16)

def test_cars_table_of_another_encoding(home):
    (cars_in(home)/'labels.csv').write_bytes('fname,class_name\n00000.jpg,Citroën'.encode('latin1'))
    assert 'UTF-8' in one_line(open_images, 'stanford_cars', 16)

# smallNORB

NORB_DTYPES = ('float32', 'float64', 'int32', 'uint8', 'int16')

@pytest.mark.parametrize('suffix', ('mat', 'mat.gz'))
@pytest.mark.parametrize('shape', ((5,), (2, 3), (4, 2, 3), (3, 2, 4, 4), (1,)*8))
@pytest.mark.parametrize('dtype', NORB_DTYPES)
def test_norb_round_trip(tmp_path, dtype, shape, suffix):
    a = (np.random.RandomState(0).randn(*shape)*100).astype(dtype)
    for o in (a, a.astype(a.dtype.newbyteorder('>')), np.asfortranarray(a)):
        D.write_norb(tmp_path/f'a.{suffix}', o)
        b = D.read_norb(tmp_path/f'a.{suffix}')
        assert b.dtype == np.dtype(dtype).newbyteorder('<') and b.shape == shape and (b == a).all()

def test_norb_bytes_of_the_published_file(tmp_path):
    "Magic, dimensions, padding and byte order: the md5 of the published training categories, and of them no other byte"
    cat = np.tile(np.arange(5), 4860).astype(np.int32)
    D.write_norb(tmp_path/'cat.mat', cat)
    D.write_norb(tmp_path/'cat.mat.gz', cat)
    raw = (tmp_path/'cat.mat').read_bytes()
    assert hashlib.md5(raw).hexdigest() == 'fd5120d3f770ad57ebe620eb61a0b633'
    assert gzip.decompress((tmp_path/'cat.mat.gz').read_bytes()) == raw
    assert raw[:20] == bytes.fromhex('544c3d1e 01000000 ec5e0000 01000000 01000000')
    D.write_norb(tmp_path/'dat.mat', np.zeros((1, 2, 3, 3), np.uint8))
    assert (tmp_path/'dat.mat').read_bytes()[:24] == bytes.fromhex('554c3d1e 04000000 01000000 02000000 03000000 03000000')

@pytest.mark.parametrize('array', (np.zeros(3, np.int64), np.zeros(3, np.float16), np.zeros((1,)*9, np.uint8), np.zeros((0, 3), np.uint8), np.uint8(3), np.array(['a'])))
def test_norb_does_not_write_other_types(tmp_path, array):
    one_line(D.write_norb, tmp_path/'a.mat', array)
    assert left(tmp_path) == []

def matrix(magic=0x1E3D4C55, ndim=3, dims=(2, 3, 4), data=b'x'*24):
    return np.array([magic, ndim, *dims], '<i8').astype('<i4').tobytes() + data

BAD_NORB = dict(empty=b'', seven=matrix()[:7], magic=matrix(0x1E3D4C57), swapped=np.array([0x1E3D4C55, 3, 2, 3, 4], '>i4').tobytes() + b'x'*24,
    packed=matrix(0x1E3D4C52), png=b'\x89PNG' + b'\0'*60, no_dims=matrix(ndim=0), minus=matrix(ndim=-1), many=matrix(ndim=9), absurd=matrix(ndim=2**31 - 1),
    header=matrix()[:15], header4=matrix(ndim=4, dims=(2, 3, 4), data=b''), zero=matrix(dims=(2, 0, 4), data=b''), negative=matrix(dims=(-2, 3, -4)),
    huge=matrix(dims=(2**31 - 1,)*3), large=matrix(dims=(2**31 - 1, 16, 1)), short=matrix()[:-1], long=matrix() + b'x', double=matrix(0x1E3D4C53))

@pytest.mark.parametrize('zipped', (False, True))
@pytest.mark.parametrize('what', BAD_NORB)
def test_bad_norb_headers(tmp_path, monkeypatch, what, zipped):
    "One line each, and nothing allocated that the file cannot hold"
    sizes, empty = [], np.empty
    monkeypatch.setattr(np, 'empty', lambda shape, *a, **k: sizes.append(shape) or empty(shape, *a, **k))
    monkeypatch.setattr(np, 'memmap', lambda *a: pytest.fail('mapped a bad file'))
    path = tmp_path/('a.mat.gz' if zipped else 'a.mat')
    path.write_bytes(gzip.compress(BAD_NORB[what]) if zipped else BAD_NORB[what])
    assert 'a.mat' in one_line(D.read_norb, path)
    assert all(np.prod(o) <= 24 for o in sizes)

def test_random_norb_headers(tmp_path):
    "300 damaged files: either the array that was written, or one line"
    rng, good, path = np.random.RandomState(1), bytearray(matrix()), tmp_path/'a.mat'
    read = 0
    for _ in range(300):
        raw = bytearray(good)
        for i in rng.randint(0, 20, rng.randint(1, 4)): raw[i] = rng.choice([0, 1, 2, 3, 4, 255, rng.randint(256)])
        path.write_bytes(raw)
        try: a = D.read_norb(path)
        except UserError as e: assert '\n' not in str(e)
        else: read += 1; assert a.nbytes == 24
    assert 0 < read < 150

def test_damaged_norb_gz(tmp_path):
    path, whole = tmp_path/'a.mat.gz', gzip.compress(matrix(dims=(50, 40, 40), data=np.random.RandomState(0).bytes(80_000)))
    for raw in (whole[:5], whole[:1000], whole[:-9], whole[:-3], b'not gzip at all', whole[:500] + b'\0'*40 + whole[540:]):
        path.write_bytes(raw)
        assert 'a.mat.gz' in one_line(D.read_norb, path)
    path.write_bytes(whole)
    assert D.read_norb(path).shape == (50, 40, 40)

def test_norb_gz_bomb_is_not_unpacked(tmp_path, monkeypatch):
    "A stream of 60 MB behind a header that promises 24 bytes, and a header of 64 GB in front of nothing"
    path, read = tmp_path/'a.mat.gz', []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, 'read', lambda self, size=-1: (lambda b: read.append(len(b)) or b)(real(self, size)))
    with gzip.open(path, 'wb') as f:
        f.write(matrix())
        for _ in range(60): f.write(bytes(1 << 20))
    assert 'goes on' in one_line(D.read_norb, path)
    assert sum(read) < 1000
    path.write_bytes(gzip.compress(matrix(dims=(1 << 18, 1 << 9, 1 << 9), data=b'')))
    assert 'more than it can hold' in one_line(D.read_norb, path)

def test_norb_is_mapped_not_read(tmp_path):
    "256 MB that exist only as a hole in a file are opened at once, and a look at the last picture reads no more than its pages"
    path = tmp_path/'big.mat'
    path.write_bytes(matrix(dims=(1 << 14, 1 << 7, 1 << 7), data=b''))
    os.truncate(path, 20 + (1 << 28))
    tracemalloc.start()                                                # counts what numpy allocates, not what is mapped
    a = D.read_norb(path)
    assert isinstance(a, np.memmap) and not a.flags.writeable and a.nbytes == 1 << 28 and a[-1].sum() == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, peak
    assert 'no file' in one_line(D.read_norb, tmp_path/'none.mat')

def norb_files(folder, stem, n=12, seed=0, zipped='', cat=None):
    rng = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    dat = rng.randint(0, 256, (n, 2, 96, 96), np.uint8)
    cat = np.arange(n, dtype=np.int32) % 5 if cat is None else cat
    info = np.stack([rng.randint(0, k, n) for k in (10, 9, 18, 6)], 1).astype(np.int32)*[[1, 1, 2, 1]]
    for k, a in dict(dat=dat, cat=cat, info=info.astype(np.int32)).items(): D.write_norb(folder/f'{stem}-{k}.mat{zipped}', a)
    return dat, cat, info

@pytest.fixture
def small_norb(home):
    return {s: norb_files(home/'smallnorb', D.NORB['stems'][s], 20, k, '.gz' if k else '') for k, s in enumerate(('train', 'test'))}

def test_norb_items_are_what_the_files_say(small_norb, home):
    images = open_images('smallnorb', 96)
    assert len(images) == 80 and images.channels == 1 and images.classes == ['animal', 'human', 'plane', 'truck', 'car']
    assert (home/'smallnorb'/f"{D.NORB['stems']['test']}-dat.mat").exists()                            # unzipped once, to be mapped
    for i in (0, 1, 33, 41, 79):
        side, row, camera = images.names[i].split('-')
        dat, cat, info = small_norb[side]
        c = ['left', 'right'].index(camera)
        assert (to_uint8(images[i])[0, 0].numpy() == dat[int(row), c]).all() and images.camera[i] == c
        assert images.category[i] == images.labels[i] == cat[int(row)]
        assert [int(o[i]) for o in (images.instance, images.elevation, images.azimuth, images.lighting)] == info[int(row)].tolist()
    assert torch.equal(images.pixels([5, 2]), torch.stack([to_uint8(images[i])[0, :1] for i in (5, 2)]))
    assert open_images('smallnorb', 32, channels=3)[0].shape == (3, 32, 32)

def test_norb_words_choose(small_norb):
    planes = open_images('smallnorb/plane/left', 96)
    assert len(planes) == 8 and set(planes.labels.tolist()) == {2} and all(o.endswith('left') for o in planes.names)
    assert len(open_images('smallnorb/plane/car/test', 96)) == 16 and len(open_images('smallnorb/left/right', 96)) == 80
    assert 'plane' in one_line(open_images, 'smallnorb/planes', 96)
    assert len(open_images('smallnorb/truck', 96, n=3)) == 3
    prints = {open_images(o, 96).fingerprint for o in ('smallnorb', 'smallnorb/plane', 'smallnorb/plane/left')}
    assert len(prints) == 3

def test_norb_split_is_by_toys_or_by_pairs(small_norb, home, tmp_path):
    images = open_images('smallnorb', 96)
    assert {images.names[i].split('-')[0] for i in images.valid_idxs} == {'test'} and {images.names[i].split('-')[0] for i in images.train_idxs} == {'train'}
    norb_files(tmp_path/'own', 'cars-training', 200)
    own = D.NorbImages(96, folder=tmp_path/'own')
    sides = [{own.names[i].rsplit('-', 1)[0] for i in o} for o in (own.train_idxs, own.valid_idxs)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200 and 10 < len(sides[1]) < 40

def test_norb_fingerprint_follows_the_pictures(tmp_path):
    prints = []
    for seed in (0, 1, 0):
        norb_files(tmp_path/'own', 'x-training', 6, seed)
        prints.append(D.NorbImages(96, folder=tmp_path/'own').fingerprint)
    assert prints[0] == prints[2] != prints[1]

def test_norb_sets_that_do_not_fit(tmp_path):
    assert 'NAME-dat.mat' in one_line(D.NorbImages, 96, folder=tmp_path)
    for name, cat in dict(long=np.zeros(13, np.int32), strange=np.full(12, 7, np.int32), minus=np.full(12, -1, np.int32)).items():
        norb_files(tmp_path/name, 'a-training', cat=cat)
        assert 'do not make a set' in one_line(D.NorbImages, 96, folder=tmp_path/name)
    norb_files(tmp_path/'half', 'a-training')
    (tmp_path/'half'/'a-training-info.mat').unlink()
    assert 'a-training-info.mat' in one_line(D.NorbImages, 96, folder=tmp_path/'half')

def test_norb_is_downloaded_and_checked(small_norb, home, server, monkeypatch):
    for s, stem in D.NORB['stems'].items():
        for k in ('dat', 'cat', 'info'):
            f = home/'smallnorb'/f'{stem}-{k}.mat'
            raw = gzip.compress(f.read_bytes()) if f.exists() else f.with_name(f.name + '.gz').read_bytes()
            server.files[f'/n/{f.name}.gz'] = raw
            monkeypatch.setitem(D.NORB['md5'][s], k, hashlib.md5(raw).hexdigest())
    for f in (home/'smallnorb').iterdir(): f.unlink()
    monkeypatch.setitem(D.NORB, 'sources', [server.url + '/gone/', server.url + '/n/'])
    assert len(open_images('smallnorb', 96)) == 80
    for f in (home/'smallnorb').iterdir(): f.unlink()
    monkeypatch.setitem(D.NORB['md5']['test'], 'info', '0'*32)
    assert 'md5' in one_line(open_images, 'smallnorb', 96)

# shards

def room_samples(n, **more): return [(rooms(1, 48, start=i)[0], room_caption(room_factors(0, i)), dict(index=i, **more)) for i in range(n)]

def shard_of(files, path, mode='w'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files, mode))
    return str(path)

def files_of(n, start=0):
    files = {}
    for i in range(start, start + n):
        files |= {f'{i:09d}.png': png(i, 16), f'{i:09d}.txt': f'room {i}'.encode(), f'{i:09d}.json': json.dumps(dict(i=i)).encode()}
    return files

def test_shard_names():
    assert D.shard_names('a/{008..011}.tar') == ['a/008.tar', 'a/009.tar', 'a/010.tar', 'a/011.tar']
    assert D.shard_names('{9..11}-{x,yy}') == ['9-x', '9-yy', '10-x', '10-yy', '11-x', '11-yy']
    assert D.shard_names('plain.tar') == ['plain.tar'] and D.shard_names('a{b}.tar') == ['a{b}.tar']
    for bad in ('{5..4}.tar', '{0..9999999}.tar', '{0..999999}{0..999999}{0..999999}'): assert 'shards' in one_line(D.shard_names, bad)

def test_shards_round_trip(tmp_path):
    samples = room_samples(10)
    paths = D.write_shards(tmp_path/'s', samples, per_shard=4, suffix='png')
    assert [o.name for o in paths] == ['00000.tar', '00001.tar', '00002.tar']
    with tarfile.open(paths[1]) as t: assert t.getnames()[:3] == ['000010000.png', '000010000.txt', '000010000.json']
    shards = D.Shards(str(tmp_path/'s'/'{00000..00002}.tar'), 48)
    for _ in range(2):
        got = list(shards)
        assert len(got) == 10 and not shards.skipped
        for (x, caption, meta), (x0, caption0, meta0) in zip(got, samples):
            assert torch.equal(x, x0) and caption == caption0 and meta['index'] == meta0['index']
    assert got[5][2]['__key__'] == '00001/000010001'
    assert len(list(D.Shards(paths, 48, n=7))) == 7 and list(D.Shards(paths, 24, channels=1))[0][0].shape == (1, 24, 24)

def test_shards_equal_webdataset(tmp_path):
    "The same keys, files and bytes as the reference implementation, with names that try it"
    files = {'a.b.txt': b'one', 'a.jpg': b'two', './d/x.PNG': b'3', './d/x.txt': b'4', 'd/x.json': b'5', 'e/f.g/h.jpg': b'6', 'e/f.g/h.cls.txt': b'7', 'i.txt': b'', 'a.txt': b'8'}
    path = shard_of(files, tmp_path/'x.tar')
    D.write_shards(tmp_path/'y', room_samples(5), per_shard=5)
    for o in (path, str(tmp_path/'y'/'00000.tar')):
        theirs = []
        for s in webdataset.WebDataset(o, shardshuffle=False, empty_check=False):
            kept = {k: v for k, v in s.items() if k in (*D.SHARD_IMAGES, 'txt', 'json')}
            theirs.append((s['__key__'], kept))
        assert list(D.shard_samples(o)) == theirs and len(theirs) >= 5

def test_shards_read_what_webdataset_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path/'w.tar')) as w:
        for i, (x, caption, meta) in enumerate(room_samples(6)):
            w.write({'__key__': f'k{i}', 'png': Image.fromarray(x.permute(1, 2, 0).numpy()), 'txt': caption, 'json': meta})
    shards = D.Shards(tmp_path/'w.tar', 48)
    for (x, caption, meta), (x0, caption0, meta0) in zip(shards, room_samples(6), strict=True):
        assert torch.equal(x, x0) and caption == caption0 and meta['index'] == meta0['index']
    assert not shards.skipped

def jpg(i=0, size=64):
    out = io.BytesIO()
    Image.fromarray(rooms(1, size, start=i)[0].permute(1, 2, 0).numpy()).save(out, 'jpeg')
    return out.getvalue()

def picture(size, mode='1', kind='png'):
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()

BAD_SAMPLES = {
    'no image': {'x.txt': b'a room'}, 'no caption': {'x.jpg': jpg()}, 'broken image': {'x.jpg': jpg()[:500], 'x.txt': b'a'},
    'caption is not UTF-8': {'x.jpg': jpg(), 'x.txt': 'Mohnblüte'.encode('latin1')}, 'metadata is not JSON': {'x.jpg': jpg(), 'x.txt': b'a', 'x.json': b'{"a":'},
    'too few pixels': {'x.png': picture((7, 9)), 'x.txt': b'a'}, 'too many pixels, or too long and thin': {'x.png': picture((12_000, 12_000)), 'x.txt': b'a'}}
MORE_BAD = [('no caption', {'x.jpg': jpg(), 'x.txt': b' \n'}), ('no caption', {'x.jpg': jpg(), 'x.json': b'{"caption": null}'}), ('no caption', {'x.jpg': jpg(), 'x.json': b'{"caption": 3}'}),
    ('caption is not UTF-8', {'x.jpg': jpg(), 'x.json': b'{"caption": "\\ud800"}'}), ('metadata is not JSON', {'x.jpg': jpg(), 'x.txt': b'a', 'x.json': b'[1]'}),
    ('metadata is not JSON', {'x.jpg': jpg(), 'x.txt': b'a', 'x.json': b'[' * 100_000}), ('metadata is not JSON', {'x.jpg': jpg(), 'x.txt': b'a', 'x.json': b'\xff\xfe\xff'}),
    ('broken image', {'x.jpg': b'', 'x.txt': b'a'}), ('broken image', {'x.png': b'<svg>', 'x.txt': b'a'}), ('broken image', {'x.webp': picture((20, 20), 'L', 'bmp'), 'x.txt': b'a'}),
    ('too many pixels, or too long and thin', {'x.png': picture((30_000, 30_000)), 'x.txt': b'a'}), ('too many pixels, or too long and thin', {'x.png': picture((8, 80_000)), 'x.txt': b'a'})]

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('why,bad', [*BAD_SAMPLES.items(), *MORE_BAD])
def test_broken_samples_are_counted(tmp_path, why, bad):
    "The neighbours come through, the broken one is counted by its reason and named"
    shards = D.Shards(shard_of(files_of(2) | bad | files_of(2, 5), tmp_path/'a.tar'), 16)
    assert [c for _, c, _ in shards] == ['room 0', 'room 1', 'room 5', 'room 6']
    assert dict(shards.skipped) == {why: 1} and list(shards.log) == [('a/x', why)]

def test_caption_from_json(tmp_path):
    shard = shard_of({'x.jpg': jpg(), 'x.json': b'{"caption": "a red bed ", "url": "u"}'}, tmp_path/'a.tar')
    (x, caption, meta), = D.Shards(shard, 16)
    assert caption == 'a red bed' and meta['url'] == 'u' and x.shape == (3, 16, 16)

def with_header(name, size, kind=tarfile.REGTYPE, data=b'', **more):
    "A tar member whose header claims `size` bytes and that has `data`"
    m = tarfile.TarInfo(name)
    m.size, m.type = size, kind
    return m.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)

def test_truncated_and_damaged_shards(tmp_path):
    "At every place of the cut: what came before comes through, and the cut is counted"
    raw = tar_of(files_of(6), 'w')
    end = raw.rindex(b'\x7d') + 1                                   # the last byte of the last JSON
    for keep in [300, 512, 700, 1500, 2048, *range(3000, end, 1777), end - 1]:
        (tmp_path/'a.tar').write_bytes(raw[:keep])
        shards = D.Shards(tmp_path/'a.tar', 16)
        got = [c for _, c, _ in shards]
        assert got == [f'room {i}' for i in range(len(got))] and shards.skipped['shard damaged or cut short'] == 1
        assert sum(v for k, v in shards.skipped.items() if k != 'shard damaged or cut short') <= 1
    assert len(got) >= 5
    (tmp_path/'a.tar').write_bytes(raw)
    assert len(list(D.Shards(tmp_path/'a.tar', 16))) == 6

def test_garbage_between_members_is_not_the_end(tmp_path):
    "Python's tarfile takes it for the end and reports nothing: the very thing this reader must not do"
    raw = tar_of(files_of(2), 'w')
    cut = raw.index(b'000000001.png')
    (tmp_path/'a.tar').write_bytes(raw[:cut] + b'garbage!'*64 + raw[cut:])
    with tarfile.open(tmp_path/'a.tar') as t: assert len(t.getnames()) == 3
    shards = D.Shards(tmp_path/'a.tar', 16)
    assert [c for _, c, _ in shards] == ['room 0'] and dict(shards.skipped) == {'shard damaged or cut short': 1}
    (tmp_path/'b.tar').write_bytes(b'<html>404</html>'*100)
    assert not list(both := D.Shards([tmp_path/'b.tar'], 16)) and sum(both.skipped.values()) == 1

@pytest.mark.parametrize('member', [with_header('x.jpg', 1 << 40), with_header('x.jpg', 1 << 62), with_header('dir', 1 << 62, b'Z'), with_header('x.jpg', 1 << 62, tarfile.CONTTYPE),
    with_header('x.jpg', -5), with_header('long', 1 << 33, tarfile.GNUTYPE_LONGNAME), with_header('pax', 1 << 33, tarfile.XHDTYPE),
    with_header('pax', 1 << 33, tarfile.XGLTYPE)])
def test_huge_declared_sizes(tmp_path, member, monkeypatch):
    "A header that claims a terabyte costs nothing: not read into memory, counted, and the samples before it are there"
    raw = tar_of(files_of(2), 'w')
    (tmp_path/'a.tar').write_bytes(raw[:raw.rindex(b'\x7d') + 1].ljust(-(-(raw.rindex(b'\x7d') + 1)//512)*512, b'\0') + member + bytes(4096))
    asked, read = [], tarfile._Stream.read
    monkeypatch.setattr(tarfile._Stream, 'read', lambda self, size: asked.append(size) or read(self, size))
    shards = D.Shards(tmp_path/'a.tar', 16)
    assert [c for _, c, _ in shards] == ['room 0', 'room 1']
    assert shards.skipped['shard damaged or cut short'] == 1 and max(asked) <= 1 << 16

def test_random_damage_to_shards(tmp_path):
    "300 damaged shards: no exception, nothing invented, and what is missing has a reason"
    rng, raw = np.random.RandomState(0), tar_of(files_of(4), 'w')
    whole = [x for x, *_ in D.Shards(shard_of(files_of(4), tmp_path/'a.tar'), 16)]
    short = 0
    for _ in range(300):
        bad = bytearray(raw[:-9000])
        for i in rng.randint(0, len(bad), 3): bad[i] = rng.randint(256)
        for i in rng.choice(np.arange(0, len(bad), 512), 1) + rng.randint(0, 160, 8): bad[min(i, len(bad) - 1)] ^= 1 << rng.randint(8)
        (tmp_path/'a.tar').write_bytes(bad)
        shards = D.Shards(tmp_path/'a.tar', 16)
        got = list(shards)
        assert len(got) <= 5 and all(isinstance(c, str) and x.shape == (3, 16, 16) for x, c, _ in got)
        if len(got) < 4: short += 1; assert shards.skipped
    assert short > 100 and len(whole) == 4

def test_large_file_is_stepped_over(tmp_path, monkeypatch):
    monkeypatch.setattr(D, 'MAX_BYTES', 5000)
    bad = {'x.jpg': jpg() + bytes(5000), 'x.txt': b'a'}
    shards = D.Shards(shard_of(files_of(2) | bad | files_of(1, 7), tmp_path/'a.tar'), 16)
    assert [c for _, c, _ in shards] == ['room 0', 'room 1', 'room 7'] and dict(shards.skipped) == {'file too large': 1, 'no image': 1}

def test_links_devices_and_sparse_files_are_no_files(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as t:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            m = tarfile.TarInfo('x.jpg')
            m.type, m.linkname = kind, '/etc/passwd'
            t.addfile(m)
        pax = tarfile.TarInfo('y.jpg')
        pax.pax_headers = {'GNU.sparse.map': '0,0', 'GNU.sparse.size': str(1 << 40), 'GNU.sparse.name': 'y.jpg'}
        t.addfile(pax)
    (tmp_path/'a.tar').write_bytes(out.getvalue())
    assert list(D._shard_files(str(tmp_path/'a.tar'), pytest.fail)) == []

def test_many_files_of_one_name_do_not_pile_up(tmp_path):
    shard = shard_of({f'x.{i}': b'junk'*100 for i in range(2000)} | {'x.jpg': jpg(), 'x.txt': b'a'}, tmp_path/'a.tar')
    (key, parts), = D.shard_samples(shard)
    assert set(parts) == {'jpg', 'txt'}

def test_duplicate_suffix_first_one_counts(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as t:
        for data in (b'first', b'second'): D._add_file(t, 'x.txt', data)
        D._add_file(t, 'x.png', png())
    (tmp_path/'a.tar').write_bytes(out.getvalue())
    assert [c for _, c, _ in D.Shards(tmp_path/'a.tar', 16)] == ['first']

def test_shards_over_http(server, tmp_path, home):
    for o in D.write_shards(tmp_path/'s', room_samples(9), per_shard=3): server.files[f'/{o.name}'] = o.read_bytes()
    shards = D.Shards(server.url + '/{00000..00003}.tar', 32)
    assert [m['index'] for *_, m in shards] == list(range(9)) and dict(shards.skipped) == {'shard cannot be opened': 1}
    assert left(home) == [] and left(tmp_path) == ['s', 's/00000.tar', 's/00001.tar', 's/00002.tar']                # nothing was stored
    server.cut, server.cuts = len(server.files['/00000.tar'])//2, 1                                           # the line breaks once
    got = [m['index'] for *_, m in shards]
    assert got[-6:] == list(range(3, 9)) and len(got) < 9 and shards.skipped['shard damaged or cut short'] == 1

def test_stream_stops_when_it_has_enough(server, tmp_path):
    for o in D.write_shards(tmp_path/'s', room_samples(9), per_shard=3): server.files[f'/{o.name}'] = o.read_bytes()
    assert len(list(D.Shards(server.url + '/{00000..00002}.tar', 16, n=4))) == 4
    assert [p for p, _ in server.log] == ['/00000.tar', '/00001.tar']

def test_zipped_shards(tmp_path):
    assert len(list(D.Shards(shard_of(files_of(3), tmp_path/'a.tar.gz', 'w:gz'), 16))) == 3
    whole = (tmp_path/'a.tar.gz').read_bytes()
    (tmp_path/'a.tar.gz').write_bytes(whole[:len(whole)//2])
    shards = D.Shards(tmp_path/'a.tar.gz', 16)
    assert len(list(shards)) < 3 and shards.skipped['shard damaged or cut short'] == 1

def test_shuffle_repeats_and_loses_nothing(tmp_path):
    paths = D.write_shards(tmp_path/'s', room_samples(60), per_shard=10)
    order = lambda **k: [m['index'] for *_, m in D.Shards(paths, 16, **k)]
    a = order(shuffle=16, seed=1)
    assert sorted(a) == order() == list(range(60)) and a == order(shuffle=16, seed=1) != order(shuffle=16, seed=2)
    assert np.abs(np.diff(a)).mean() > 5

def test_buffer_is_fair():
    "With a buffer for all of them each place is equally likely; early by no more than the buffer"
    first = np.bincount([next(D._buffered(range(20), 20, random.Random(s))) for s in range(4000)], minlength=20)
    assert (abs(first - 200) < 70).all()
    out = np.array(list(D._buffered(range(5000), 50, random.Random(0))))
    assert sorted(out) == list(range(5000)) and (np.arange(5000) - out).min() >= -50
    late = (np.arange(5000) - out)[500:4500]
    assert abs(late.mean()) < 60 and late.max() > 100

def test_shards_that_cannot_be(tmp_path):
    assert 'none-{0..3}' not in one_line(D.Shards, str(tmp_path/'none-{0..3}.tar'), 16)
    for bad in ('pipe:rm -rf x', 's3://bucket/0.tar', 'gs://b/{0..2}.tar'): assert 'https' in one_line(D.Shards, bad, 16)
    shard_of({'x.txt': b'a'}, tmp_path/'a.tar')
    assert '1 no image' in one_line(D.ShardImages, tmp_path/'a.tar', 16)

def test_shard_images(tmp_path):
    D.write_shards(tmp_path/'s', room_samples(30), per_shard=10, suffix='png')
    (tmp_path/'s'/'00001.tar').unlink()
    spec = str(tmp_path/'s'/'{00000..00002}.tar')
    images = open_images(spec, 48)
    assert isinstance(images, D.ShardImages) and len(images) == 20 and images.captions[12] == room_caption(room_factors(0, 22))
    assert torch.equal(images[12], from_uint8(rooms(1, 48, start=22)[0])) and torch.equal(images.pixels([3])[0], rooms(1, 48, start=3)[0])
    assert len(images.train_idxs) + len(images.valid_idxs) == 20 and dict(images.reasons) == {'shard cannot be opened': 1} and len(images.skipped) == 1
    five = open_images(spec, 48, n=5)
    assert five.captions == images.captions[:5] and five.fingerprint != images.fingerprint == open_images(spec, 48).fingerprint
    assert open_images(spec, 48, n=5, seed=3).names != five.names and len(image_dls(images, 4, device='cpu').one_batch()) == 1

def test_stream_does_not_remember_members(tmp_path):
    "`tarfile` keeps every member it has seen; a stream of millions must not"
    shard = shard_of({f'{i:05d}.txt': b'' for i in range(3000)}, tmp_path/'a.tar')
    tracemalloc.start()
    for _ in D.shard_samples(shard): pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000, peak
