"The data lesson's promises, on pictures, archives and servers made here: no network, no data set needed"
import csv, errno, gzip, hashlib, http.server, io, itertools, json, os, resource, struct, subprocess, sys, tarfile, threading, unicodedata, zipfile, zlib
import numpy as np, pytest, torch
from PIL import Image
from fastcore.basics import AttrDict
from fastai.data.external import URLs
from torchvision.datasets import MNIST

from latentdiff import core, data as D, files as W
from errors import one_line
from latentdiff.data import Picture, as_images, from_uint8, image_dls, image_grid, open_images, split_of, to_uint8
from latentdiff.files import download, hub_folder, load_pixels, npz_pixels, to_rgb
from latentdiff.rooms import ROOM_FACTORS, room_caption, room_factors, rooms

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LATENTDIFF_DATA', str(tmp_path/'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path/'home'

def left(folder): return sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*')) if folder.exists() else []

def save(path, im=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    (im or Image.fromarray(rooms(1, 32)[0].permute(1, 2, 0).numpy())).save(path, **kwargs)
    return path
# pixels

def test_uint8_round_trip_and_clamp():
    every = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    back = to_uint8(from_uint8(every))
    assert torch.equal(back, every.expand(1, 3, 16, 16)) and from_uint8(every).dtype == torch.float32
    assert to_uint8(torch.tensor([-3., 3.]).view(1, 1, 2))[0, 0, 0].tolist() == [0, 255]
    assert "images are torch.uint8 (1, 1, 16, 16): give floats" in one_line(to_uint8, every)

def test_grid_places():
    x = torch.stack([torch.full((3, 4, 4), v) for v in (-1., 0., 1.)])
    g = np.asarray(image_grid(x, nrow=2, pad=1))
    assert g.shape == (9, 9, 3)
    assert g[0, 0, 0] == 0 and g[0, 5, 0] == 128 and g[5, 0, 0] == 255 and g[8, 8, 0] == 255 and g[0, 4, 0] == 255

# downloads

class Server(http.server.BaseHTTPRequestHandler):
    "Serves `files`; hangs up after `cut` bytes, the first `cuts` times; understands Range and If-Range unless told not to"
    def do_GET(self):
        s, asked = self.server, self.headers.get('Range')
        s.log.append((self.path, asked))
        if self.path not in s.files: return self.send_error(404)
        data = s.files[self.path]
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        start = int(asked[6:-1]) if asked and s.ranges and self.headers.get('If-Range', tag) == tag else 0
        if start >= len(data): return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(data) - start))
        if start: self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        if s.tags: self.send_header('ETag', tag)
        self.end_headers()
        if s.cuts > 0: s.cuts, data = s.cuts - 1, data[:start + s.cut]
        self.wfile.write(data[start:])
    def log_message(self, *args): pass

@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    s.files, s.log, s.cut, s.cuts, s.ranges, s.tags, s.url = {}, [], 1000, 0, True, True, f'http://127.0.0.1:{s.server_port}'
    thread = threading.Thread(target=s.serve_forever, daemon=True)
    thread.start()
    yield s
    s.shutdown()
    s.server_close()

PAYLOAD = bytes(np.random.RandomState(0).randint(0, 256, 5000, dtype=np.uint8))

def test_interrupted_download_goes_on(server, tmp_path):
    server.files['/a.bin'], server.cuts = PAYLOAD, 2
    path = download(server.url + '/a.bin', tmp_path/'d'/'a.bin')
    assert path.read_bytes() == PAYLOAD and left(tmp_path/'d') == ['a.bin']
    assert [r for _, r in server.log] == [None, 'bytes=1000-', 'bytes=2000-']

def test_given_up_download_goes_on_in_the_next_call(server, tmp_path):
    server.files['/a.bin'], server.cuts = PAYLOAD, 3
    one_line(download, server.url + '/a.bin', tmp_path/'d'/'a.bin')
    assert left(tmp_path/'d') == ['a.bin.part', 'a.bin.part.tag'] and (tmp_path/'d'/'a.bin.part').stat().st_size == 3000
    download(server.url + '/a.bin', tmp_path/'d'/'a.bin')
    assert server.log[-1][1] == 'bytes=3000-' and (tmp_path/'d'/'a.bin').read_bytes() == PAYLOAD

def test_resumed_download_of_a_changed_file_starts_afresh(server, tmp_path):
    "Half of yesterday's file before half of today's would be nobody's file"
    server.files['/a.bin'], server.cuts = PAYLOAD, 3
    one_line(download, server.url + '/a.bin', tmp_path/'a.bin')
    server.files['/a.bin'] = PAYLOAD[::-1]
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD[::-1]
    assert server.log[-1][1] == 'bytes=3000-'                         # it asked for the rest and was told that there is none

def test_server_that_names_no_versions(server, tmp_path):
    server.files['/a.bin'], server.cuts, server.tags = PAYLOAD, 1, False
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD
    assert [r for _, r in server.log] == [None, None]

def test_server_without_ranges(server, tmp_path):
    server.files['/a.bin'], server.cuts, server.ranges = PAYLOAD, 1, False
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD

@pytest.mark.parametrize('extra', (b'', b'more than there is'))
def test_whole_part_file(server, tmp_path, extra):
    server.files['/a.bin'] = PAYLOAD
    (tmp_path/'a.bin.part').write_bytes(PAYLOAD + extra)
    (tmp_path/'a.bin.part.tag').write_text(f'"{hashlib.md5(PAYLOAD).hexdigest()}"')
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD

def test_what_is_kept_beside_a_part_is_not_utf8(server, tmp_path):
    "Then it names no file, and the download begins afresh"
    server.files['/a.bin'] = PAYLOAD
    (tmp_path/'a.bin.part').write_bytes(bytes(1000))
    (tmp_path/'a.bin.part.tag').write_bytes(b'"\xff\xfe"\n' + b'%d' % len(PAYLOAD))
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD and left(tmp_path) == ['a.bin']

@pytest.mark.parametrize('code,whole', [(403, True), (431, True), (501, True), (503, False), (429, False)])
def test_a_server_that_refuses_parts_is_asked_for_the_whole(server, tmp_path, monkeypatch, code, whole):
    "What is there is kept until that comes; one that is only busy is left for later"
    server.files['/a.bin'] = PAYLOAD
    get = Server.do_GET
    monkeypatch.setattr(Server, 'do_GET', lambda h: h.send_error(code) if h.headers.get('Range') else get(h))
    (tmp_path/'a.bin.part').write_bytes(PAYLOAD[:1000])
    (tmp_path/'a.bin.part.tag').write_text(tag := f'"{hashlib.md5(PAYLOAD).hexdigest()}"')
    if whole: assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD and left(tmp_path) == ['a.bin']
    else:
        said = one_line(download, server.url + '/a.bin', tmp_path/'a.bin')
        assert f' {code}' in said and f"try later, delete {tmp_path/'a.bin.part'} to begin anew, or put it at" in said   # some are never asked for a part in vain
        assert (tmp_path/'a.bin.part').read_bytes() == PAYLOAD[:1000] and (tmp_path/'a.bin.part.tag').read_text() == tag

@pytest.mark.parametrize('name', ['metadata.csv', 'metadata.jsonl'])
def test_a_table_of_one_endless_line_is_refused(tmp_path, name):
    "Before memory is full of it; a file of holes takes nothing on the disk"
    (tmp_path/'a.png').write_bytes(png(0))
    (tmp_path/name).touch()
    os.truncate(tmp_path/name, 1 << 40)
    said = one_line(W.captions_in, tmp_path)
    assert 'is no table with file_name and text (letters_a_line is 1048576: give' in said and 'mend or remove it' in said

def test_a_table_of_many_columns_is_refused(tmp_path):
    "Its time would grow with rows times columns; two of one name say two things"
    (tmp_path/'a.png').write_bytes(png(0))
    for heads in ([f'c{i}' for i in range(5000)], ['']*5000, ['text'], ['file_name']):
        (tmp_path/'metadata.csv').write_text(','.join(['file_name', 'text', *heads]) + '\na.png,x'*5000 + '\n')
        assert 'two columns of one name, or over 1,000' in one_line(W.captions_in, tmp_path)
    (tmp_path/'metadata.csv').write_text('file_name,text,tag,tag,,\na.png,x,1,2,,\n')
    assert W.captions_in(tmp_path) == {tmp_path/'a.png': 'x'}

def test_a_weak_tag_does_not_name_a_file(server, tmp_path, monkeypatch):
    "Several files may have it (RFC 9110, 13.1.5): the download begins afresh"
    server.files['/a.bin'] = PAYLOAD
    monkeypatch.setattr(Server, 'send_header', lambda h, k, v, send=Server.send_header: send(h, k, 'W/"v1"' if k == 'ETag' else v))
    (tmp_path/'a.bin.part').write_bytes(bytes(1000))
    (tmp_path/'a.bin.part.tag').write_text('W/"v1"')
    server.cuts = 1
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD and not any(asked for _, asked in server.log[1:])

def test_file_that_is_gone(server, tmp_path):
    message = one_line(download, server.url + '/gone', tmp_path/'c.bin')
    assert '/gone (' in message and '404' in message and 'c.bin' in message and len(server.log) == 1

def test_bedrooms_name_their_second_source(server, monkeypatch):
    monkeypatch.setattr(URLs, 'LSUN_BEDROOMS', server.url + '/gone.tgz')
    assert 'pcuenq/lsun-bedrooms' in one_line(open_images, 'lsun_bedroom', 32)

def test_bedrooms_by_fastai(server, monkeypatch, home):
    monkeypatch.setattr(URLs, 'LSUN_BEDROOMS', server.url + '/bedroom.tgz')
    server.files['/bedroom.tgz'] = tar_of({f'bedroom/{i}.jpg': jpg(i) for i in range(3)})
    assert len(open_images('lsun_bedroom', 32)) == len(open_images('lsun_bedroom', 32)) == 3 and len(server.log) == 1

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

UNSAFE = {'up.tgz': tar_of({'a.png': png(), '../b.png': png()}), 'up.zip': zip_of({'a.png': png(), '../b.png': png()}),
    'deep.tar': tar_of({'x/../../b.png': png()}, 'w'), 'root.tgz': tar_of({'/tmp/b.png': png()}),
    'link.tgz': tar_of({'a.png': png(), 'b.png': '/etc/passwd'}), 'win.zip': zip_of({'..\\b.png': png()})}

@pytest.mark.parametrize('name,data', UNSAFE.items(), ids=UNSAFE)
def test_unsafe_archives(tmp_path, home, name, data):
    (tmp_path/name).write_bytes(data)
    assert 'not unpacked' in one_line(open_images, tmp_path/name, 16)
    assert left(home) == [] and left(tmp_path) == [name]   # not even the folder that was to hold it

@pytest.mark.parametrize('keep', (.02, .3, .6, .97))
@pytest.mark.parametrize('name', ('a.tgz', 'a.zip'))
def test_truncated_archives(tmp_path, home, name, keep):
    members = {f'{i}.png': png(i, 64) for i in range(5)}
    data = tar_of(members) if name == 'a.tgz' else zip_of(members)
    (tmp_path/name).write_bytes(data[:int(len(data)*keep)])
    assert 'damaged' in one_line(open_images, tmp_path/name, 16)
    assert left(home) == []

def test_archives_of_one_name_size_and_date_are_two(tmp_path):
    for k in (1, 2):
        save(tmp_path/'x.png', Image.new('L', (16, 16), k))
        (tmp_path/str(k)).mkdir()
        with tarfile.open(tmp_path/str(k)/'x.tar', 'w') as t: t.add(tmp_path/'x.png', 'x.png')
        os.utime(tmp_path/str(k)/'x.tar', (1_700_000_000,)*2)
        assert open_images(tmp_path/str(k)/'x.tar', 16).pixels().unique().tolist() == [k]
    assert len({(tmp_path/k/'x.tar').stat().st_size for k in '12'}) == 1

def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path, home):
    "The mark of a zip stands at its end, and so in the last file of an uncompressed tar"
    pictures = {f'{i}.png': png(i) for i in range(4)}
    with tarfile.open(tmp_path/'set.tar', 'w') as t:
        for k, v in (pictures | {'sheets.zip': zip_of({'other.png': png(9)})}).items():
            member = tarfile.TarInfo(k)
            member.size = len(v)
            t.addfile(member, io.BytesIO(v))
    assert [os.path.basename(o) for o in open_images(tmp_path/'set.tar', 16).names] == [*pictures]

def test_npz_in_capitals(tmp_path):
    np.savez(tmp_path/'x.npz', np.zeros((12, 16, 16, 3), np.uint8))
    (tmp_path/'x.npz').rename(tmp_path/'X.NPZ')
    assert len(open_images(tmp_path/'X.NPZ', 16)) == 12

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

def test_picture_that_goes_bad_later(tmp_path, monkeypatch):
    "Pixels that fit stay in memory, so a file that changes stops nothing; those that do not are read again, with a name if it fails"
    images = open_images(save(tmp_path/'s'/'a.jpg').parent, 16)
    x = images.pixels()
    monkeypatch.setattr(D, 'FITS', 0)
    again = open_images(tmp_path/'s', 16)
    assert torch.equal(again.pixels(), x) and again.raw is None and again.fingerprint == images.fingerprint
    images.paths[0].write_bytes(b'gone bad')
    assert torch.equal(images.pixels(), x)
    assert 'a.jpg' in one_line(again.pixels)
    save(images.paths[0], Image.new('RGB', (32, 32)))   # another picture, and a good one
    assert 'a.jpg\' has changed since' in one_line(again.pixels)
    images.paths[0].unlink()
    assert 'a.jpg\' cannot be read (No such file' in one_line(again.pixels)

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

@pytest.mark.parametrize('mode,values', [('F', (0., 1.5)), ('F', (0., 65535.)), ('F', (-1., 1.)), ('F', (0., 300.)), ('F', (0., 1.)), ('F', (0., 0., 1.)), ('I', (0, 100_000)), ('I', (-9000, 9)), ('I', (0, 200)), ('I', (0, 1023)), ('I', (0, 4095)), ('I', (5, 16383))])
def test_floats_of_no_known_range_are_skipped(tmp_path, mode, values):
    "Neither black nor white, also where it may be nearly black in the scale of its neighbours; a little over the edge, as resizing leaves it, is the edge"
    im = Image.fromarray(np.resize(np.array(values, dict(F=np.float32, I=np.int32)[mode]), (16, 16)))
    assert im.mode == mode
    save(tmp_path/'x'/'a.tif', im)
    save(tmp_path/'x'/'b.tif', Image.fromarray(np.resize(np.float32([-.01, 1.02]), (16, 16))))
    save(tmp_path/'x'/'c.tif', Image.fromarray(np.resize(np.float32([0, 254]), (16, 16))))
    images = open_images(tmp_path/'x', 16)
    assert images.pixels().flatten(1).aminmax(dim=1).max.tolist() == [255, 254] and 'values from' in images.skipped[0][1]

@pytest.mark.parametrize('channels', [3, 4])
def test_colours_of_fewer_bits_in_sixteen_are_left_out(tmp_path, channels):
    "Pillow keeps the upper eight, so that ten to fourteen bits are nearly black, with an alpha channel nearly white"
    def png48(bits):
        rows = np.random.default_rng(0).integers(1, 2**bits, (16, 16, channels)).astype('>u2')
        lines = b''.join(b'\0' + o.tobytes() for o in rows)
        chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 16, 16, 16, 2 + 4*(channels == 4), 0, 0, 0)) + chunk(b'IDAT', zlib.compress(lines)) + chunk(b'IEND', b'')
    for bits in (10, 12, 14):
        with pytest.raises(ValueError, match='use 8 bits'): load_pixels(png48(bits), 16)
    assert load_pixels(png48(16), 16).float().mean() > 99

def test_a_dark_picture_of_eight_bits_in_sixteen_is_taken():
    "Its values are multiples of 257, so that their range is known; ten bits would be nearly black, as they are in the folder of any microscope"
    assert to_rgb(flat('I;16', 9*257)).getpixel((5, 5)) == (9, 9, 9)
    with pytest.raises(ValueError, match='from 1023 to 1023, not surely'): to_rgb(flat('I;16', 1023))

def test_a_black_float_picture_is_black():
    assert to_rgb(flat('F', 0)).getpixel((5, 5)) == to_rgb(flat('I', 0)).getpixel((5, 5)) == (0, 0, 0)

def test_looking_at_a_large_folder_is_said(tmp_path, monkeypatch, capsys):
    "A local folder as a set of the Hub: every file below it is looked at before anything else is said"
    from fastcore.basics import AttrDict
    from latentdiff import disk, files
    (tmp_path/'a.txt').write_text('x')
    for come in (1, 3):
        monkeypatch.setattr(disk, 'Timer', lambda seconds, f: AttrDict(start=f if seconds < come else len, cancel=lambda: 0) if come == 3 else AttrDict(start=lambda: 0, cancel=lambda: 0))
        assert files._state(tmp_path)[0][0] == str(tmp_path/'a.txt') and files.files_below(tmp_path)[0] == [tmp_path/'a.txt']
        assert (f'looking at every file in {tmp_path}' in capsys.readouterr().err) == (come == 3)

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

@pytest.fixture
def small_mnist(home, monkeypatch):
    rng = np.random.RandomState(0)
    arrays = [rng.randint(0, 256, (60, 28, 28), np.uint8), rng.randint(0, 10, 60).astype(np.uint8),
              rng.randint(0, 256, (20, 28, 28), np.uint8), rng.randint(0, 10, 20).astype(np.uint8)]
    (home/'mnist').mkdir(parents=True)
    for k, (file, a) in enumerate(zip(D._IDX_FILES, arrays)):
        if k % 2: (home/'mnist'/file).write_bytes(idx(a))
        else: (home/'mnist'/f'{file}.gz').write_bytes(gzip.compress(idx(a)))
    monkeypatch.setitem(D._IDX['mnist'], 'md5', [hashlib.md5(idx(a)).hexdigest() for a in arrays])
    return arrays

def test_mnist_from_home(small_mnist):
    images = open_images('mnist', 32)
    assert len(images) == 80 and images.channels == 1 and images[0].shape == (1, 32, 32)
    assert torch.equal(to_uint8(images[61])[0, 0, 2:30, 2:30], torch.from_numpy(small_mnist[2][1]))
    assert images[61][:, 0].eq(-1).all() and images.labels.tolist() == [*small_mnist[1], *small_mnist[3]]
    assert open_images('mnist', 64, channels=3)[0].shape == (3, 64, 64)

def test_wrong_mnist(small_mnist, home):
    path = home/'mnist'/f'{D._IDX_FILES[0]}.gz'
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert 'damaged' in one_line(open_images, 'mnist', 32)
    path.write_bytes(gzip.compress(b'other'))
    assert 'not the published file' in one_line(open_images, 'mnist', 32)

def test_mnist_is_downloaded(small_mnist, home, server, monkeypatch):
    zipped = {f'{file}.gz': gzip.compress(idx(a)) for file, a in zip(D._IDX_FILES, small_mnist)}
    for name, data in zipped.items(): server.files[f'/m/{name}'] = data
    for f in (home/'mnist').iterdir(): f.unlink()
    monkeypatch.setattr(MNIST, 'mirrors', [server.url + '/gone/', server.url + '/m/'])
    monkeypatch.setattr(MNIST, 'resources', [(k, hashlib.md5(v).hexdigest()) for k, v in zipped.items()])
    assert len(open_images('mnist', 32)) == 80
    monkeypatch.setattr(MNIST, 'mirrors', [server.url + '/gone/'])
    monkeypatch.setenv('LATENTDIFF_DATA', str(home/'other'))
    assert '404' in one_line(open_images, 'mnist', 32)

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
    save(tmp_path/'s'/'dog'/'more'/'deep.png')
    images = open_images(tmp_path/'s', 16)
    assert images.classes == ['cat', 'dog'] and images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, -1]
    assert '1 without a class' in repr(images)
    assert open_images(tmp_path/'s'/'cat', 16).classes is None

def test_one_folder_of_folders_is_no_class_and_says_so(tmp_path):
    "Beside one stray picture; without it, the classes are the folders below"
    for o in ('train/cat', 'train/dog'): save(tmp_path/'s'/o/'x.png')
    assert open_images(tmp_path/'s', 16).classes == ['cat', 'dog'] and 'no classes' not in repr(open_images(tmp_path/'s', 16))
    save(tmp_path/'s'/'cover.png')
    images = open_images(tmp_path/'s', 16)
    assert images.classes is None and 'no classes: the only first-level folder is train;' in repr(images)

def test_choice_of_n_is_nested(tmp_path):
    for i in range(20): save(tmp_path/'s'/f'{i:02d}.png')
    a, b = (open_images(tmp_path/'s', 16, n=n).names for n in (5, 10))
    assert len(a) == 5 and set(a) < set(b) and a == sorted(a)
    assert a != open_images(tmp_path/'s', 16, n=5, seed=1).names

def test_pixels_are_the_items(tmp_path):
    for i in range(7): save(tmp_path/'s'/f'{i}.png', Image.fromarray(rooms(1, 40, start=i)[0].permute(1, 2, 0).numpy()))
    for images in (open_images(tmp_path/'s', 16), open_images('rooms', 16, n=130), open_images('rooms', 16, n=9, channels=1)):
        x = images.pixels()
        assert x.dtype == torch.uint8 and x.shape == (len(images), images.channels, 16, 16)
        for i in (0, 5, -1): assert torch.equal(images[i], from_uint8(x[i]))
        assert torch.equal(images.pixels([4, 1]), x[[4, 1]]) and images[0].abs().max() <= 1
        with pytest.raises(IndexError): images[len(images)]
        assert torch.equal(images[1:3], from_uint8(images.pixels([1, 2]))) and torch.equal(images[torch.tensor(1)], images[1])

def test_fingerprint(tmp_path):
    for i in range(4): save(tmp_path/'s'/f'{i}.png')
    opens = [lambda: open_images(tmp_path/'s', 16), lambda: open_images(tmp_path/'s', 24), lambda: open_images(tmp_path/'s', 16, channels=1),
             lambda: open_images('rooms', 16, n=4), lambda: open_images('rooms', 16, n=4, seed=1)]
    prints = [f().fingerprint for f in opens]
    assert len(set(prints)) == 5 and prints == [f().fingerprint for f in opens]
    save(tmp_path/'s'/'0.png', Image.new('RGB', (50, 50)))
    assert opens[0]().fingerprint != prints[0]

def test_many_rooms_say_what_takes_long(monkeypatch, capsys):
    "Where nobody looks: their names, their sides and their captions, one line each, when two seconds are over"
    now = itertools.count()
    monkeypatch.setattr(core, 'time', AttrDict(monotonic=lambda: next(now)))
    open_images('rooms', 16, n=50)
    assert capsys.readouterr().out == 'naming 50 rooms\ndividing 50 pictures\ndescribing 50 rooms\n'

def test_rooms_images():
    images = open_images('rooms', 32, n=50, seed=2)
    for i in (0, 31): assert images.captions[i] == room_caption(room_factors(2, i))
    assert images.classes[images.labels[4]] == room_factors(2, 4)['bed'] and images.names[4] == 'room-2-000004'

# real folders

def jpg(i=0, size=64, **kwargs):
    out = io.BytesIO()
    Image.fromarray(rooms(1, size, start=i)[0].permute(1, 2, 0).numpy()).save(out, 'jpeg', **kwargs)
    return out.getvalue()

def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

def test_hidden_folders_are_left_out(tmp_path):
    for o in ('a', 'b', 'a/.ipynb_checkpoints', '.thumbnails/a', '.git', 'b/.x/y'): save(tmp_path/'s'/o/'x.png')
    put(tmp_path/'s'/'b'/'._x.png', b'a resource fork')
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['a/x.png', 'b/x.png'] and images.classes == ['a', 'b'] and not images.skipped
    assert len(open_images(save(tmp_path/'.home'/'s'/'x.png').parent, 16)) == 1          # hidden above the folder is not hidden in it

@pytest.mark.parametrize('suffix,kind', [('jfif', 'jpeg'), ('jpe', 'jpeg'), ('JPG', 'jpeg'), ('avif', 'avif'), ('mpo', 'mpo'), ('jp2', 'jpeg2000'),
    ('tga', 'tga'), ('ico', 'ico'), ('pcx', 'pcx'), ('dib', 'dib'), ('ppm', 'ppm'), ('apng', 'png'), ('gif', 'gif'), ('webp', 'webp')])
def test_whatever_pillow_opens(tmp_path, suffix, kind):
    im = Image.fromarray(rooms(1, 32)[0].permute(1, 2, 0).numpy())
    images = open_images(save(tmp_path/'s'/f'x.{suffix}', im, format=kind).parent, 32)
    assert len(images) == 1 and (images.pixels()[0].float() - rooms(1, 32)[0]).abs().mean() < 25

def test_pictures_of_unknown_kinds_are_counted(tmp_path):
    save(tmp_path/'s'/'a.png')
    for name in ('b.heic', 'c.HEIF', 'd.jxl', 'e.svg', 'f.cr2'): put(tmp_path/'s'/name, b'\0\0\0\x18ftypheic')
    put(tmp_path/'s'/'readme.txt', b'no picture')
    images = open_images(tmp_path/'s', 16)
    assert [n for n, _ in images.skipped] == ['b.heic', 'c.HEIF', 'd.jxl', 'e.svg', 'f.cr2'] and '5 skipped' in repr(images)
    (tmp_path/'s'/'a.png').unlink()
    assert 'b.heic' in one_line(open_images, tmp_path/'s', 16)

UNREAD = 'hif heics heif exr jxr nrw pef srw wmf emf svgz dng cr3 arw ps eps'.split()

def test_no_picture_is_silently_absent(tmp_path):
    "What is not read is counted, by its suffix or its first bytes; what has no suffix, or one that nobody knows, is read; the rest is no picture"
    for o in UNREAD: put(tmp_path/'s'/f'unread.{o}', b'something')
    put(tmp_path/'s'/'photo', b'\0\0\0\x18ftypheic\0\0\0\0'), put(tmp_path/'s'/'half', b'\xff\xd8\xff\xe0\0\x10JFIF\0')
    im = Image.fromarray(rooms(1, 32)[0].permute(1, 2, 0).numpy())
    kinds = dict(png='', jpeg='.jpg_large', gif='.1', webp='.tmp', bmp='.orig', tiff='.bak', avif='.image')
    for kind, suffix in kinds.items(): save(tmp_path/'s'/f'read-{kind}{suffix}', im, format=kind)
    for o, raw in dict(**{'Thumbs.db': b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'metadata.csv': b'file_name,text', 'x.txt': b'BM is a caption', 'clip.mp4': b'\0\0\0\x18ftypisom',
                         'x.wav': b'RIFF\0\0\0\0WAVEfmt ', 'README': b'BMW and other cars of ours', 'empty': b'', 'x.part': b'RIFF'}).items(): put(tmp_path/'s'/o, raw)
    images = open_images(tmp_path/'s', 32)
    assert images.names == sorted(f'read-{kind}{suffix}' for kind, suffix in kinds.items())
    assert sorted(n for n, why in images.skipped if why) == sorted([f'unread.{o}' for o in UNREAD] + ['photo', 'half'])

def test_no_picture_starts_a_program(tmp_path):
    "Postscript under the name of a picture would be run by Ghostscript"
    put(tmp_path/'s'/'a.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n')
    assert 'a.png' in one_line(open_images, tmp_path/'s', 16)

def test_broken_middles_are_listed(tmp_path):
    "Sound beginnings and ends: a JPEG with a broken middle, a PNG with bad zlib, with too little data, with a wrong checksum"
    whole = jpg(3, 96, quality=95, progressive=True)
    chunk = lambda kind, data: len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', (32).to_bytes(4, 'big')*2 + bytes([8, 2, 0, 0, 0]))
    data = zlib.compress(bytes(97*32))
    bad = {'middle.jpg': whole[:2000] + b'\xff\xc4\x00\x04\x99\x99' + whole[2006:], 'zlib.png': head + chunk(b'IDAT', data[:10] + bytes(20)) + chunk(b'IEND', b''),
           'short.png': head + chunk(b'IDAT', data[:12]) + chunk(b'IEND', b''), 'sum.png': head + chunk(b'IDAT', data)[:-1] + b'x' + chunk(b'IEND', b'')}
    for name, o in bad.items(): put(tmp_path/'s'/name, o)
    put(tmp_path/'s'/'good.png', head + chunk(b'IDAT', data) + chunk(b'IEND', b''))
    put(tmp_path/'s'/'good.jpg', whole)
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['good.jpg', 'good.png'] and {n for n, _ in images.skipped} == set(bad)
    assert images.pixels().shape == (2, 3, 16, 16)

@pytest.mark.parametrize('kind', ('jpeg', 'png', 'gif', 'tiff', 'bmp', 'webp', 'ppm', 'tga', 'avif', 'jpeg2000', 'ico', 'pcx', 'sgi', 'dds', 'icns'))
def test_mutated_pictures_never_stop_the_run(tmp_path, kind):
    "Forty damaged files of each kind (`make test-long`: 1,000): all are pixels or a line, and what is opened can be read"
    rng, out, n = np.random.RandomState(0), io.BytesIO(), 1000 if 'LATENTDIFF_LONG' in os.environ else 40
    Image.fromarray(rooms(1, 64)[0].permute(1, 2, 0).numpy()).save(out, kind)
    raw = out.getvalue()
    suffix = next(s for s, k in Image.registered_extensions().items() if k == kind.upper())
    for i in range(n):
        bad = bytearray(raw)
        for k in rng.randint(0, min(len(raw), (60, len(raw))[i % 2]), 1 + i % 5): bad[k] = rng.randint(256)
        if i % 4 == 3: bad = bad[:rng.randint(len(bad))]
        put(tmp_path/'s'/f'{i:03d}{suffix}', bytes(bad))
    put(tmp_path/'s'/f'whole{suffix}', raw)
    images = open_images(tmp_path/'s', 16)
    assert len(images) + len(images.skipped) == n + 1 and 'whole' in images.names[-1]
    assert len(images.pixels()) == len(images) and all(why and '\n' not in why for _, why in images.skipped)

def test_float_tiff_with_nan(tmp_path):
    a = np.full((16, 16), .5, np.float32)
    save(tmp_path/'s'/'a.tif', Image.fromarray(a))
    a[3, 4] = np.nan
    save(tmp_path/'s'/'b.tif', Image.fromarray(a))
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['a.tif'] and images.skipped == [('b.tif', 'some values are not finite')] and images.pixels().eq(128).all()

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_pictures_of_no_reasonable_size_are_not_decoded(tmp_path):
    "Some kilobytes on disk, up to half a gigabyte decoded: what a fresh process needs for them stays bounded"
    sizes = [((8, 100_000), 'RGB'), ((100_000, 8), 'L'), ((13_300, 13_300), 'P')]
    for i, (size, mode) in enumerate(sizes): save(tmp_path/'s'/f'{i}.png', Image.new(mode, size))
    save(tmp_path/'s'/'good.png')
    program = ("import resource, sys, warnings; warnings.simplefilter('ignore'); from latentdiff.data import open_images; "
               "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; a = peak(); images = open_images(sys.argv[1], 64); "
               "print(len(images), len(images.skipped), peak() - a)")
    out = subprocess.run([sys.executable, '-c', program, tmp_path/'s'], capture_output=True, text=True, check=True).stdout
    good, skipped, grown = map(int, out.split()[-3:])
    assert (good, skipped) == (1, 3) and grown < 60_000                # kB

def test_large_photographs_are_used(tmp_path):
    "JPEG is decoded at an eighth of its size, so 100 million pixels are no reason to refuse"
    save(tmp_path/'s'/'large.jpg', Image.new('RGB', (9000, 9000), (0, 0, 255)))
    assert (open_images(tmp_path/'s', 64).pixels()[0, 2] > 250).all()

def test_a_folder_with_the_name_of_a_data_set_is_said(tmp_path, monkeypatch, capsys):
    "Once, and not on stdout, which may be read by a program; nothing where there is none, or where its place is given"
    from latentdiff import data
    monkeypatch.chdir(tmp_path)
    data._say_which.cache_clear()
    open_images('rooms', 32, n=10)
    assert capsys.readouterr() == ('', '')
    data._say_which.cache_clear()
    (tmp_path/'rooms').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path/'rooms'/'a.png')
    assert len(open_images('./rooms', 32)) == 1 and capsys.readouterr() == ('', '')
    for _ in range(2): assert len(open_images('rooms', 32, n=10)) == 10
    assert capsys.readouterr() == ('', 'rooms is the data set of that name: for what lies here, say ./rooms\n')
    data._say_which.cache_clear()


@pytest.mark.parametrize('mode', ('w', 'w:gz'))
def test_inner_links_are_skipped(tmp_path, home, mode):
    "The link is left out, the pictures are kept; one that leads out is refused as ever"
    files = {'s/a.png': png(0), 's/b.png': png(1), 's/latest.png': 'b.png', 's/up/c.png': '../a.png'}
    (tmp_path/'set.tar').write_bytes(tar_of(files, mode))
    assert open_images(tmp_path/'set.tar', 16).names == ['a.png', 'b.png']
    for target in ('../../a.png', '/etc/passwd', 'x/../../../y'):
        (tmp_path/'bad.tar').write_bytes(tar_of({'s/a.png': png(), 's/b.png': target}, mode))
        assert 'not unpacked' in one_line(open_images, tmp_path/'bad.tar', 16)

def test_flipped_byte_in_a_tgz(tmp_path, home):
    "Wherever it is, in a picture or behind the last one: the checksum at the very end is read"
    raw = tar_of({f'{i}.bmp': Image.new('RGB', (16, 16)).tobytes() + np.random.RandomState(i).bytes(3000) for i in range(4)} | {'x.png': png()})
    noticed = 0
    for at in [*range(30, len(raw) - 8, 997), len(raw) - 7, len(raw) - 2]:
        bad = bytearray(raw)
        bad[at] ^= 1
        (tmp_path/'a.tgz').write_bytes(bad)
        assert 'damaged' in one_line(open_images, tmp_path/'a.tgz', 16), at
        noticed += 1
    assert noticed > 10 and left(home) == []

def test_names_that_are_not_utf8(tmp_path, home):
    "On disk and in an archive; the names that people see can be printed, hashed and written as JSON"
    folder = os.fsencode(tmp_path)+b'/s/caf\xe9'
    os.makedirs(folder)
    for name in (b'a\xff.png', b'b.png'):
        with open(folder + b'/' + name, 'wb') as f: f.write(png(len(name)))
    save(tmp_path/'s'/'other'/'c.png')
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['caf\\xe9/a\\xff.png', 'caf\\xe9/b.png', 'other/c.png'] and images.classes == ['caf\\xe9', 'other']
    assert all(o.encode() for o in images.names) and len(open_images(tmp_path/'s', 16, n=2)) == 2
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.USTAR_FORMAT, encoding='latin1') as t:
        m = tarfile.TarInfo('s/é.png')
        m.size = len(png())
        t.addfile(m, io.BytesIO(png()))
    (tmp_path/'l.tar').write_bytes(out.getvalue())
    assert open_images(tmp_path/'l.tar', 16).names == ['\\xe9.png']

def test_copies_fall_on_one_side(tmp_path):
    "200 files that are 20 copies each of 10 pictures: none of them is on both sides, and their number is said"
    pictures = [png(i) for i in range(10)]
    for i in range(200): put(tmp_path/'s'/f'{i:03d}.png', pictures[i % 10])
    images = open_images(tmp_path/'s', 16)
    sides = [{bytes(o.flatten().tolist()) for o in images.pixels(idxs)} for idxs in (images.train_idxs, images.valid_idxs)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10 and sides[1] and '190 exact copies' in repr(images)
    two = tmp_path/'two'
    for i in range(30): put(two/f'{i:03d}.png', pictures[i % 2])
    images = open_images(two, 16)
    assert sorted(images.train_idxs % 2) == [images.train_idxs[0] % 2]*15 and len(images.valid_idxs) == 15

def test_a_copy_goes_where_the_first_goes(tmp_path):
    for i in range(30): put(tmp_path/'s'/f'{i}.jpg', png(i))
    before = open_images(tmp_path/'s', 16)
    assert [before.names[i] for i in before.valid_idxs] == ['14.jpg', '9.jpg']
    put(tmp_path/'s'/'z-copy.jpg', png(9))
    put(tmp_path/'s'/'zz-copy.jpg', png(8))
    after = open_images(tmp_path/'s', 16)
    assert [after.names[i] for i in after.valid_idxs] == ['14.jpg', '9.jpg', 'z-copy.jpg']

def test_two_spellings_of_a_name_fall_on_one_side():
    for i in range(200):
        name = f'Bett über Ångström é {i}.jpg'
        nfc, nfd = (unicodedata.normalize(o, name) for o in ('NFC', 'NFD'))
        assert nfc != nfd and split_of(nfc) == split_of(nfd)

def test_fingerprint_is_of_the_contents(tmp_path):
    "The same name, the same length, another picture"
    for i in range(3): save(tmp_path/'s'/f'{i}.bmp', Image.new('RGB', (16, 16), (i, 0, 0)))
    a = open_images(tmp_path/'s', 16)
    save(tmp_path/'s'/'1.bmp', Image.new('RGB', (16, 16), (1, 0, 9)))
    b = open_images(tmp_path/'s', 16)
    assert a.names == b.names and a.paths[1].stat().st_size == b.paths[1].stat().st_size and a.fingerprint != b.fingerprint

@pytest.mark.parametrize('table', ('csv', 'jsonl'))
def test_captions_of_a_folder(tmp_path, table):
    rows = [dict(file_name='x/a.png', text='a red bed'), dict(file_name='x/b.png', text='a blue bed, made')]
    for name in ('x/a.png', 'x/b.png', 'x/c.png'): put(tmp_path/'s'/name, png(len(name)))
    path = tmp_path/'s'/f'metadata.{table}'
    with path.open('w', newline='', encoding='utf-8-sig') as f:   # as Excel writes it
        if table == 'jsonl': f.writelines(json.dumps(o) + '\n\n' for o in rows)   # empty lines say nothing
        else:
            w = csv.DictWriter(f, ['file_name', 'text'])
            w.writeheader()
            w.writerows(rows)
    images = open_images(tmp_path/'s', 16)
    assert images.captions == ['a red bed', 'a blue bed, made', ''] and open_images(tmp_path/'s', 16, n=1).captions[0] in images.captions
    path.write_text('file_name,text\nc.png,a bed' if table == 'csv' else '{"file_name": "c.png", "text": "a bed"}')
    assert 'no file_name' in one_line(open_images, tmp_path/'s', 16)
    for bad in (b'name,text\nx,y\n' if table == 'csv' else b'{"name": 1}\n', ('file_name,text\nx,\xe9\n'*999).encode('latin1') if table == 'csv' else b'[1]\n'):
        path.write_bytes(bad)
        assert f'metadata.{table}' in (said := one_line(open_images, tmp_path/'s', 16)) and len(said) < 300 + len(str(path)), said

@pytest.mark.parametrize('tables,kept,said', [
    ({'metadata.csv': 'file_name,text\na.png,one\na.png,two\na.png,two\nb.png,three\nb.png,three\n'}, ['one', 'three'], '2 captions are of a picture that has another'),
    ({'metadata.csv': 'file_name,text\na.png,one\nb.png,two\n', 'metadata.jsonl': '{"file_name": "a.png", "text": "three"}\n'}, ['one', 'two'], '1 captions are of'),
    ({'metadata.csv': 'file_name,text,,\na.png,one,,\nb.png,,,\n', 'metadata.jsonl': '{"file_name": "b.png", "text": "two"}\n'}, ['one', 'two'], '')])
def test_several_captions_of_a_picture_are_said(tmp_path, capsys, tables, kept, said):
    "Five of each, as COCO has them: the first is taken, not the last without a word"
    for o in 'ab': put(tmp_path/'s'/f'{o}.png', png(ord(o)))
    for name, table in tables.items(): (tmp_path/'s'/name).write_text(table)
    assert open_images(tmp_path/'s', 16).captions == kept
    out = capsys.readouterr().out
    assert said in out if said else 'captions' not in out

def test_two_columns_of_captions_are_refused(tmp_path):
    put(tmp_path/'s'/'a.png', png()), (tmp_path/'s'/'metadata.csv').write_text('file_name,text,text\na.png,one,two\n')
    assert 'two columns of one name' in one_line(open_images, tmp_path/'s', 16)

@pytest.mark.parametrize('rows,said', [('x/a.png,a red, big bed', 'line 3: put "quotes"'), ('x/a.png,"a red bed', 'unexpected end of data'), ('x/a.png,"a red" bed', "',' expected after '\"'")])
def test_captions_whose_quotes_are_missing_are_no_captions(tmp_path, rows, said):
    for name in ('x/a.png', 'x/b.png', 'x/c.png'): put(tmp_path/'s'/name, png(len(name)))
    (tmp_path/'s'/'metadata.csv').write_text(f'file_name,text\nx/b.png,a bed of 3" steel\n{rows}\nx/c.png,a bed\n')
    assert said in one_line(open_images, tmp_path/'s', 16)

def test_a_comma_at_the_end_of_each_row_is_no_caption(tmp_path):
    put(tmp_path/'s'/'a.png', png()), (tmp_path/'s'/'metadata.csv').write_text('file_name,text\na.png,a bed,\n')
    assert open_images(tmp_path/'s', 16).captions == ['a bed']

@pytest.mark.parametrize('names,said', [('a.png b.png', None), ('a.png b.jpg c.PNG', "2 of 3 names in its metadata are of no picture in it (first 'b.jpg')"),
    ('a.png /elsewhere/b.png', "1 of 2 names in its metadata are of no picture in it (first 'b.png')")])
def test_names_of_a_table_that_are_of_no_picture_are_said(tmp_path, capsys, names, said):
    for name in ('x/a.png', 'x/b.png', 'x/c.png'): put(tmp_path/'s'/name, png(len(name)))
    (tmp_path/'s'/'metadata.csv').write_text('file_name,text\n' + ''.join(f'{o if o[0] == "/" else "x/" + o},a bed\n' for o in names.split()))
    images = open_images(tmp_path/'s', 16)
    out = capsys.readouterr().out
    assert said in out if said else 'metadata' not in out
    assert f'{sum(not o for o in images.captions)} without a caption' in repr(images)   # as when a quote swallows rows

def test_as_images():
    x = rooms(2, 16)
    assert torch.equal(as_images(x), from_uint8(x)) and torch.equal(as_images(from_uint8(x), 'cpu'), from_uint8(x))
    assert as_images(torch.zeros(1, 3, 2, 2, dtype=torch.float16)).dtype == torch.float32

# arrays

@pytest.mark.parametrize('shape,size,channels', [((3, 48, 48), 32, 3), ((3, 20, 31), 32, 3), ((1, 28, 28), 32, 1), ((1, 28, 28), 16, 3), ((3, 24, 24), 24, 1)])
def test_pictures_of_an_npz_are_resized_as_those_of_a_folder(tmp_path, shape, size, channels):
    "By one function: else a set is not what it was, and KID and FID see the difference"
    x = torch.randint(256, (9, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    np.savez(tmp_path/'x.npz', x.permute(0, 2, 3, 1).numpy())
    for i, o in enumerate(x): save(tmp_path/'x'/f'{i}.png', Image.fromarray(o.permute(1, 2, 0).squeeze().numpy()))
    a, b = (open_images(tmp_path/o, size, channels=channels) for o in ('x.npz', 'x'))
    assert torch.equal(a.pixels(), b.pixels())
    of = [hashlib.md5(o.numpy().tobytes()).hexdigest() for o in x]   # as a run of earlier knows pictures that fit
    before = core.fingerprint(pixels=f'{channels}x{size}x{size} v3', names=a.names, of=['', of])
    assert (a.fingerprint == before) is (shape[1:] == (size, size))


def test_npz(tmp_path):
    x = rooms(20, 32)
    np.savez(tmp_path/'a.npz', x.permute(0, 2, 3, 1).numpy())
    assert torch.equal(npz_pixels(tmp_path/'a.npz'), x)
    images = open_images(tmp_path/'a.npz', 32)
    assert torch.equal(images.pixels(), x) and images.kind == 'a' and len(images.train_idxs) + len(images.valid_idxs) == 20
    assert open_images(tmp_path/'a.npz', 16, n=5, channels=1).pixels().shape == (5, 1, 16, 16)
    np.savez(tmp_path/'b.npz', x.permute(0, 2, 3, 1).flip(0).numpy())
    assert open_images(tmp_path/'b.npz', 32).fingerprint != images.fingerprint
    for bad in (np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), np.array([None])):
        np.savez(tmp_path/'c.npz', bad)
        assert 'c.npz' in one_line(open_images, tmp_path/'c.npz', 32)
    (tmp_path/'c.npz').write_bytes(b'no zip')
    assert 'c.npz' in one_line(open_images, tmp_path/'c.npz', 32)

def test_folders_that_lie_too_deep_are_left_out(tmp_path):
    "A thousand levels: Python could not go down so far"
    save(tmp_path/'a'/'0.png')
    here = os.open(tmp_path/'a', os.O_RDONLY)
    for _ in range(1500):
        os.mkdir('d', dir_fd=here)
        below = os.open('d', os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        images = open_images(tmp_path/'a', 16)
        assert images.names == ['0.png'] and ['in a hundred others' in why for _, why in images.skipped] == [True]
    finally: subprocess.run(['rm', '-r', tmp_path/'a'], check=True)   # which shutil could not do

# streams

def shards_of(folder, files_of_shards, mode='w'):
    folder.mkdir(parents=True, exist_ok=True)
    for i, files in enumerate(files_of_shards): (folder/f'{i:05d}.tar').write_bytes(tar_of(files, mode))
    return str(folder/('{00000..%05d}.tar' % (len(files_of_shards) - 1)))

def files_of(n, start=0):
    files = {}
    for i in range(start, start + n): files |= {f'{i:09d}.png': png(i, 48), f'{i:09d}.txt': f'room {i}'.encode(), f'{i:09d}.json': b'{}'}
    return files

def test_a_shard_without_files_is_counted(tmp_path):
    "Zeros after a crash, or nothing but folders"
    spec = shards_of(tmp_path, [files_of(3), {}, files_of(3, 3)])
    (tmp_path/'00001.tar').write_bytes(bytes(10_240))
    images = open_images(spec, 16)
    assert len(images) == 6 and [*map(str, images.skipped[0])][1] == 'shard damaged or missing (no files in it)' and '00001.tar' in str(images.skipped[0][0])

@pytest.mark.parametrize('readme', ['---\nconfigs: [\n---\n', '---\na: !!python/object:x.y {}\n---\n'])
def test_a_data_set_whose_card_is_no_yaml_is_one_line(tmp_path, home, readme):
    spec = hub_of(tmp_path/'x', told={}, n=8)
    (tmp_path/'x'/'README.md').write_text(readme)
    assert 'cannot be had' in one_line(open_images, f'hub:{tmp_path/"x"}', 32, n=6)

def test_shard_names():
    assert W.shard_names('a/{008..011}.tar') == ['a/008.tar', 'a/009.tar', 'a/010.tar', 'a/011.tar']
    assert W.shard_names('{9..10}.tar?x=1') == ['9.tar?x=1', '10.tar?x=1']
    assert W.shard_names('a/w{1}x/{0..1}.tar') == ['a/w{1}x/0.tar', 'a/w{1}x/1.tar']
    for bad in ('{5..4}.tar', '{0..9999999}.tar', '{0..9}{0..9}.tar', '{a,b}.tar'): assert 'shards' in one_line(W.shard_names, bad)

def test_shards(tmp_path):
    spec = shards_of(tmp_path/'s', [files_of(10), files_of(10, 10), files_of(10, 20)])
    (tmp_path/'s'/'00001.tar').unlink()
    images = open_images(spec, 48)
    assert len(images) == 20 and images.captions[12] == 'room 22' and images.names[12] == '00002/000000022'
    assert torch.equal(images[12], from_uint8(rooms(1, 48, start=22)[0])) and torch.equal(images.pixels([3])[0], rooms(1, 48, start=3)[0])
    assert len(images.train_idxs) + len(images.valid_idxs) == 20 and len(images.skipped) == 1 and 'missing' in images.skipped[0][1]
    five = open_images(spec, 48, n=5)
    assert five.captions == images.captions[:5] and five.fingerprint != images.fingerprint == open_images(spec, 48).fingerprint
    assert len({tuple(open_images(spec, 48, n=5, seed=s).names) for s in range(9)}) == 2 and len(image_dls(images, 4, device='cpu').one_batch()) == 1
    assert 'none' in one_line(open_images, str(tmp_path/'none'/'{0..2}.tar'), 48)

@pytest.mark.parametrize('name', ['w{1}x', 'what?', '{a,b}'])
def test_shards_in_a_folder_with_such_a_name(tmp_path, name):
    assert len(open_images(shards_of(tmp_path/name, [files_of(2)]), 48)) == 2

def test_points_in_the_names_of_a_shard(tmp_path):
    "WebDataset's key ends at the first point: `0.05.png` is sample 0, and `05.png` is no picture. Said, and counted"
    points = {'0.05.png': png(), '0.05.txt': b'a', '1.05.png': png(1), '1.05.txt': b'b'}
    message = one_line(open_images, shards_of(tmp_path/'s', [points]), 16)
    assert '2' in message and '00000/0:' in message and '05.png' in message
    images = open_images(shards_of(tmp_path/'t', [points | files_of(2)]), 16)
    assert len(images) == 2 and [n for n, _ in images.skipped] == ['00000/0', '00000/1'] and all('05.png' in w for _, w in images.skipped)

@pytest.mark.parametrize('why,bad', [('no picture', {'x.txt': b'a room'}), ('no caption', {'x.jpg': b'?'}), ('no caption', {'x.jpg': b'?', 'x.txt': b' \n'}),
    ('caption is not UTF-8', {'x.jpg': b'?', 'x.txt': 'Mohnblüte'.encode('latin1')}), ('only 7x9 pixels', {'x.png': None, 'x.txt': b'a'}),
    ('not a picture', {'x.jpg': b'', 'x.txt': b'a'})])
def test_broken_samples_are_counted(tmp_path, why, bad):
    "The neighbours come through, the broken one is counted with its reason and name"
    small = io.BytesIO()
    Image.new('1', (7, 9)).save(small, 'png')
    bad = {k: small.getvalue() if v is None else v for k, v in bad.items()}
    images = open_images(shards_of(tmp_path/'s', [files_of(2) | bad | files_of(2, 5)]), 16)
    assert images.captions == ['room 0', 'room 1', 'room 5', 'room 6']
    assert [n for n, _ in images.skipped] == ['00000/x'] and images.skipped[0][1].startswith(why)

def test_truncated_shards(tmp_path):
    "At every place of the cut, in a file, its padding or a header: what came before comes through, and the cut is counted"
    spec, raw = shards_of(tmp_path/'s', [files_of(6), files_of(2, 10)]), tar_of(files_of(6), 'w')
    for keep in range(3000, len(raw.rstrip(b'\0')), 277):
        (tmp_path/'s'/'00000.tar').write_bytes(raw[:keep])
        images = open_images(spec, 16)
        n = len(images) - 2
        assert images.captions == [f'room {i}' for i in range(n)] + ['room 10', 'room 11'] and n <= 6
        assert images.skipped, f'a shard cut after {keep} bytes is called whole'

def test_packed_shards_are_damaged_ones(tmp_path):
    "tarfile reads them as a stream without looking at their checksums, and no further than their first part"
    spec = shards_of(tmp_path/'s', [{}, files_of(3, 3)])
    (tmp_path/'s'/'00000.tar').write_bytes(tar_of(files_of(3), 'w:gz'))
    images = open_images(spec, 16)
    assert images.captions == ['room 3', 'room 4', 'room 5'] and ['damaged' in why for _, why in images.skipped] == [True]

def test_shards_over_http(server, tmp_path, home):
    shards_of(tmp_path/'s', [files_of(3), files_of(3, 3)])
    for o in (tmp_path/'s').iterdir(): server.files[f'/{o.name}'] = o.read_bytes()
    images = open_images(server.url + '/{00000..00002}.tar', 48)
    assert images.captions == [f'room {i}' for i in range(6)] and len(images.skipped) == 1 and '00002.tar' in images.skipped[0][0]
    assert left(home) == []                                            # nothing was stored

def test_stream_stops_when_it_has_enough(tmp_path):
    spec = shards_of(tmp_path/'s', [files_of(3), files_of(3, 3)])
    (tmp_path/'s'/'00001.tar').unlink()
    assert not open_images(spec, 16, n=3).skipped

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

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_rooms_are_the_same_whatever_a_notebook_has_for_a_default(dtype):
    drawn = rooms(60, 32)
    torch.set_default_dtype(dtype)
    try: assert torch.equal(rooms(60, 32), drawn)
    finally: torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('fits', [True, False])
def test_rooms_are_drawn_once_if_they_fit(monkeypatch, fits):
    "And are the same rooms either way, whatever is asked for first"
    drawn, draw = [], D.draw_rooms
    monkeypatch.setattr(D, 'draw_rooms', lambda seed, idxs, size: drawn.extend(idxs) or draw(seed, idxs, size))
    if not fits: monkeypatch.setattr(D, 'FITS', 0)
    images = open_images('rooms', 16, n=100)
    first, again = images.pixels([3, 99, 4]), images.pixels()
    assert torch.equal(again[[3, 99, 4]], first) and torch.equal(again, rooms(100, 16)) and torch.equal(images.pixels(), again)
    assert len(drawn) == (100 if fits else 203)

@pytest.mark.parametrize('name,table,said', [('metadata.csv', 'file_name, text\na.png,a bed\n', "'file_name', ' text'"), ('metadata.jsonl', '{"file_name": "a.png", "label": 3}\n', "'file_name', 'label'"),
    ('metadata.csv', 'file_name,text\na.png,\n', ''), ('metadata.jsonl', '{"file_name": "a.png"}\n{"file_name": "a.png", "caption": "a bed"}\n', '')])
def test_a_table_without_captions_says_so(tmp_path, capsys, name, table, said):
    put(tmp_path/'x'/'a.png', png())
    put(tmp_path/'x'/name, table.encode())
    open_images(tmp_path/'x', 16)
    out = capsys.readouterr().out
    assert ('no column text or caption, only ' + said in out) if said else 'column' not in out

# --- the Hub

def hub_of(folder, n=6, path=None, rename={}, told={}, **features):
    "A folder of parquet such as the Hub keeps: `n` rooms with the columns that `features` name; what some rows hold instead"
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image as HubImage
    rows = [{rename.get(k, k): v for k, v in dict(image=dict(bytes=png(i), path=path and path.format(i)), label=i % 3 - 1,
                                                  text=f'room, number {i}', other=i).items() if k == 'image' or k in features} for i in range(n)]
    for i, row in enumerate(rows): row.update(told.get(i, {}))
    folder.mkdir(parents=True)
    kinds = {rename.get('image', 'image'): HubImage(), **{rename.get(k, k): v for k, v in features.items()}}
    pq.write_table(Dataset.from_list(rows, Features(kinds)).data.table, folder/'train-00000.parquet')   # to_parquet would fetch what the rows name
    return str(folder)

def test_the_first_n_of_the_hub(tmp_path, home, monkeypatch):
    "The bedrooms' real columns: one, called image. Files as they came, once; a split that does not move"
    spec = hub_of(tmp_path/'lsun', path='{:05d}.png')
    images = open_images(f'hub:{spec}', 32, n=4)
    assert images.names == [f'{i:06d}.png' for i in range(4)] and images.labels is None and images.captions is None
    assert torch.equal(images.pixels(), torch.stack([load_pixels(png(i), 32) for i in range(4)]))
    monkeypatch.setattr('datasets.load_dataset', None)                 # it is not asked again
    assert open_images(f'hub:{spec}', 32, n=4).fingerprint == images.fingerprint

def test_a_folder_in_the_place_of_the_hub_is_known_by_its_files(tmp_path, monkeypatch):
    "The same words from another place, and a folder whose file has changed, are other pictures; what is unchanged is read once"
    for k in 'ab':
        hub_of(tmp_path/k/'x', told={0: dict(image=dict(bytes=png(dict(a=20, b=30)[k]), path=None))})
        monkeypatch.chdir(tmp_path/k)
        assert torch.equal(open_images('hub:x', 16).pixels([0])[0], load_pixels(png(dict(a=20, b=30)[k]), 16))
    hub_of(tmp_path/'new', told={0: dict(image=dict(bytes=png(40), path=None))})
    (tmp_path/'new'/'train-00000.parquet').replace(tmp_path/'b'/'x'/'train-00000.parquet')
    assert torch.equal(open_images('hub:x', 16).pixels([0])[0], load_pixels(png(40), 16))
    for colour in (50, 60):   # as many bytes, and as old
        os.utime(save(tmp_path/'b'/'y'/'a.bmp', Image.new('RGB', (16, 16), (colour,)*3)), (10**9, 10**9))
        assert open_images('hub:y', 16).pixels().unique().tolist() == [colour]

def test_classes_and_captions_of_the_hub(tmp_path):
    from datasets import ClassLabel, Value
    spec = hub_of(tmp_path/'x', label=ClassLabel(names=['../up', 'b/c']), text=Value('string'), other=Value('int64'))
    images = open_images(f'hub:{spec}', 32, n=10)
    told = dict(zip((o.split('/')[-1] for o in images.names), zip(images.labels.tolist(), images.captions)))
    assert images.classes == ['--up', 'b-c']                           # no folder outside, none inside another
    assert {k: c for k, (c, _) in told.items()} == {f'{i:06d}.png': i % 3 - 1 for i in range(6)}
    assert all(text == f'room, number {int(k[:6])}' for k, (_, text) in told.items())

def test_columns_can_be_named(tmp_path, home):
    from datasets import Value
    spec = hub_of(tmp_path/'x', rename=dict(image='photo', text='title'), text=Value('string'))
    assert open_images(f'hub:{spec}', 32, n=3).captions is None
    assert open_images(f'hub:{spec}?caption=title&image=photo', 32, n=3).captions == [f'room, number {i}' for i in range(3)]
    for column in ('caption=names', 'image=picture'): assert 'only photo, title' in one_line(open_images, f'hub:{spec}?{column}', 32)
    assert 'cannot be had' in one_line(open_images, f'hub:{spec}?split=test', 32)
    assert not [o for o in home.rglob('*') if '.new' in o.name]

def test_odd_rows_of_the_hub(tmp_path, home):
    "A class without a name, two that would share a folder, a suffix of another kind: nothing outside the folder, nothing mixed. No picture: skipped"
    from datasets import ClassLabel, Sequence, Value
    names = '', 'a/b', 'a-b', '..', 'A-B', '.'
    told = {i: dict(label=i) for i in range(6)}
    spec = hub_of(tmp_path/'x', path='{:05d}.sh', told=told | {6: dict(image=None), 7: dict(label=-1)}, n=8, label=ClassLabel(names=[*names]))
    images = open_images(f'hub:{spec}', 32, n=8)
    assert images.classes == ['-', '- 2', '- 3', 'A-B 3', 'a-b', 'a-b 2'] and not [*tmp_path.rglob('*.sh')]
    assert sorted(o.name for o in next(home.glob('hub-*')).rglob('*.*')) == [*(f'{i:06d}.png' for i in range(6)), '000006.jpg', '000007.png', 'metadata.jsonl']
    assert [n.split('/')[-1] for n, _ in images.skipped] == ['000006.jpg'] and images.labels.tolist().count(-1) == 1
    spec = hub_of(tmp_path/'y', told={i: dict(label='cat' if i % 2 else 'a, b', text=['x'*200_000, 'no']) for i in range(6)}, label=Value('string'), text=Sequence(Value('string')))
    images = open_images(f'hub:{spec}?label=label', 32, n=6)
    assert images.classes == ['a, b', 'cat'] and {*map(len, images.captions)} == {200_000}
    spec = hub_of(tmp_path/'z', told={i: dict(label=.5) for i in range(6)}, label=Value('float32'))
    assert 'whole numbers' in one_line(open_images, f'hub:{spec}?label=label', 32, n=6)

@pytest.mark.parametrize('path', ['/etc/passwd', '/dev/zero', 'file:///etc/passwd', 'simplecache::/etc/passwd', 'http://127.0.0.1:1/x.png', 'zip://x::/etc/passwd',
                                  'hf://datasets/a/b/x.png', '{}/../secret.png', '{}/fifo.png'])
def test_a_data_set_names_no_file_of_this_machine(path, tmp_path, home):
    "What a row names, and does not hold, lies in the data set itself"
    spec = tmp_path/'x'
    (tmp_path/'secret.png').write_bytes(png(0))
    hub_of(spec, told={1: dict(image=dict(bytes=None, path=path.format(spec)))})
    os.mkfifo(spec/'fifo.png')
    assert 'is not in it' in one_line(open_images, f'hub:{spec}', 32, n=6) and not [*home.glob('hub-*')]

def test_a_data_set_names_its_own_files(tmp_path, home):
    spec = tmp_path/'x'
    hub_of(spec, told={1: dict(image=dict(bytes=None, path=str(spec/'a.png')))})
    (spec/'a.png').write_bytes(png(1))
    assert len(open_images(f'hub:{spec}', 32, n=6)) == 6

@pytest.mark.parametrize('name,body,says', [('a.json', b'{"a": "b"}', 'no column of pictures'), ('a.tar', b'none', 'cannot be had'), ('a.zip', b'none', 'cannot be had'), ('a.h5', b'none', 'cannot be had')])
def test_a_folder_that_is_no_data_set_is_one_line(name, body, says, tmp_path, home):
    put(tmp_path/'x'/name, body)
    assert says in one_line(open_images, f"hub:{tmp_path/'x'}", 32, n=6)
    assert 'owner/name' in one_line(open_images, 'hub:json', 32, n=6)

def test_bedrooms_of_the_hub(tmp_path, home, monkeypatch):
    "So many from the Hub; from the archive where there is one; without both, one line with the way out"
    monkeypatch.setattr(D, 'LSUN_HUB', hub_of(tmp_path/'lsun'))
    images = open_images('lsun_bedroom', 32, n=5)
    assert len(images) == 5 and images.kind == 'lsun_bedroom'
    save(home/'lsun_bedroom'/'mine.jpg')
    assert open_images('lsun_bedroom', 32, n=5).names == ['mine.jpg']
    (home/'lsun_bedroom'/'mine.jpg').unlink()
    monkeypatch.setattr(D, 'LSUN_HUB', str(tmp_path/'nowhere'))
    assert 'LATENTDIFF_PRESET=tiny' in one_line(open_images, 'lsun_bedroom', 32, 7)

# folders that are not what they seem

def test_what_a_run_makes_is_no_data(tmp_path):
    "A run, a pipeline, a part of a run, at any depth: the same data set as without them, and they are named. Asked for by name, they are data"
    for o in ('a/x.png', 'a/in/y.png', 'b/z.png'): save(tmp_path/'s'/o)
    put(tmp_path/'s'/'metadata.csv', b'file_name,text\na/x.png,a room\n')
    before = open_images(tmp_path/'s', 16)
    made = {'run': 'run.json', 'a/in/pipe': 'model_index.json', 'b/samples': 'made.json'}
    for folder, mark in made.items():
        put(tmp_path/'s'/folder/mark, b'{}')
        for o in ('grid.png', 'in/deep/more.png'): save(tmp_path/'s'/folder/o)
    put(tmp_path/'s'/'run'/'metadata.csv', b'no table')
    images = open_images(tmp_path/'s', 16)
    assert images.fingerprint == before.fingerprint and images.names == before.names and images.classes == ['a', 'b']
    assert images.captions == before.captions and not before.skipped and 'left out' not in repr(before)
    assert {n: why.split()[-1] for n, why in images.skipped} == {f'{k}/': v for k, v in made.items()}
    assert 'left out: a/in/pipe/' in repr(images) and 'model_index.json' in repr(images)
    assert len(open_images(tmp_path/'s'/'b'/'samples', 16)) == 2

def refuse(monkeypatch, module, name, why):
    "`module.name` of these paths fails as for somebody who may not: the tests may run as root, to whom nothing is closed"
    real = getattr(module, name)
    def shut(path, *args, **kw):
        e = why.get(os.path.basename(path)) if isinstance(path, (str, os.PathLike)) else None
        if e: raise OSError(e, os.strerror(e), str(path))
        return real(path, *args, **kw)
    monkeypatch.setattr(module, name, shut)

def test_pictures_that_cannot_be_read_are_skipped(tmp_path, monkeypatch):
    "Closed, gone since the folder was listed, on a broken disk, a link to nowhere, a pipe: each with its reason, in one that is read late, too"
    for o in ('good', 'shut', 'gone', 'broken'): save(tmp_path/'s'/f'{o}.png')
    before = open_images(tmp_path/'s', 16)
    (tmp_path/'s'/'link.png').symlink_to(tmp_path/'nowhere.png')
    os.mkfifo(tmp_path/'s'/'pipe.png')
    assert open_images(tmp_path/'s', 16).fingerprint == before.fingerprint     # those two are no pictures
    why = {'shut.png': errno.EACCES, 'gone.png': errno.ENOENT, 'broken.png': errno.EIO}
    refuse(monkeypatch, D.Path, 'read_bytes', why)
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['good.png']
    assert {k: v for k, v in images.skipped if k in why} == {k: os.strerror(v) for k, v in why.items()}
    assert dict(images.skipped)['link.png'] == os.strerror(errno.ENOENT) and 'pipe.png' in dict(images.skipped)
    refuse(monkeypatch, D.Path, 'read_bytes', {'good.png': errno.EIO})
    assert os.strerror(errno.EIO) in one_line(open_images, tmp_path/'s', 16)

def test_folders_that_cannot_be_entered_are_named(tmp_path, monkeypatch):
    "One that cannot be listed, one whose files cannot be looked at, and a link; if nothing else is there, they are the reason"
    for o in ('cat/x.png', 'dog/x.png', 'owl/x.png'): save(tmp_path/'s'/o)
    save(tmp_path/'t'/'x.png')
    (tmp_path/'s'/'pig').symlink_to(tmp_path/'t')
    refuse(monkeypatch, os, 'scandir', {'cat': errno.EACCES})
    real = os.stat
    def shut(path, *args, **kw):
        if str(path).endswith('dog/x.png'): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path, *args, **kw)
    monkeypatch.setattr(os, 'stat', shut)
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['x.png'] and images.paths[0].parent.name == 'owl'
    why = dict(images.skipped)
    assert {*why} == {'cat/', 'dog/x.png', 'pig/'} and 'Permission denied' in why['cat/'] and why['dog/x.png'] == 'Permission denied' and 'link' in why['pig/']
    assert 'left out: cat/' in repr(images) and 'Permission denied' in repr(images) and 'pig/' in repr(images)
    refuse(monkeypatch, os, 'scandir', {'s': errno.EACCES})
    assert 'Permission denied' in one_line(open_images, tmp_path/'s', 16)

def test_rooms_that_memory_cannot_hold_are_refused_from_their_number(monkeypatch):
    "Before there is a name of one"
    monkeypatch.setattr(D.Images, '__init__', lambda *args, **kw: pytest.fail('begun'))
    monkeypatch.setattr('latentdiff.disk.free_memory', lambda: 1e9)
    assert 'A set of 10,000,000 rooms needs 6.0 GB of memory, and 1.0 GB are free' in one_line(open_images, 'rooms', 16, 10**7)

def test_side_of_pictures_that_go_away(tmp_path, monkeypatch):
    save(tmp_path/'s'/'x.png')
    assert D.side_of(tmp_path/'s') == 32
    refuse(monkeypatch, D.Image, 'open', {'x.png': errno.ENOENT})
    assert 'has changed' in one_line(D.side_of, tmp_path/'s')

# downloads that meet others

def test_only_its_holder_removes_the_lock(server, tmp_path, monkeypatch):
    "Somebody downloads, a second waits and is stopped: a third still has to wait"
    class Stopped(W.FileLock):
        def acquire(self, *args, **kw): raise KeyboardInterrupt
    path, holder = tmp_path/'a.bin', W.FileLock(tmp_path/'a.bin.part.lock')
    with holder:
        monkeypatch.setattr(W, 'FileLock', Stopped)
        with pytest.raises(KeyboardInterrupt): download(server.url + '/a.bin', path)
        assert holder.is_locked and (tmp_path/'a.bin.part.lock').exists()
    monkeypatch.undo()
    server.files['/a.bin'] = PAYLOAD
    assert download(server.url + '/a.bin', path).read_bytes() == PAYLOAD and left(tmp_path) == ['a.bin']

def test_a_download_that_somebody_else_has_written_to_begins_afresh(server, tmp_path, monkeypatch):
    server.files['/a.bin'] = PAYLOAD
    (tmp_path/'a.bin.part').write_bytes(PAYLOAD[:1000])
    (tmp_path/'a.bin.part.tag').write_text(f'"{hashlib.md5(PAYLOAD).hexdigest()}"')
    once = [b'what another process has appended']
    def enough(what, part, size):
        if once: part.write_bytes(part.read_bytes() + once.pop())
    monkeypatch.setattr(W, 'enough', enough)
    assert download(server.url + '/a.bin', tmp_path/'a.bin').read_bytes() == PAYLOAD and not once

def test_a_download_whose_place_is_taken(server, tmp_path):
    "A folder is there; nothing is written through links that lie where its parts go; a name that no disk takes"
    server.files['/a.bin'] = PAYLOAD
    (tmp_path/'a.bin').mkdir()
    assert 'a.bin is a folder' in one_line(download, server.url + '/a.bin', tmp_path/'a.bin')
    for o in ('part', 'part.tag', 'part.lock'):
        (tmp_path/f'mine.{o}').write_bytes(b'mine')
        (tmp_path/f'b.bin.{o}').symlink_to(tmp_path/f'mine.{o}')
    assert download(server.url + '/a.bin', tmp_path/'b.bin').read_bytes() == PAYLOAD
    assert all((tmp_path/f'mine.{o}').read_bytes() == b'mine' for o in ('part', 'part.tag', 'part.lock'))
    assert 'too long' in one_line(open_images, f'{server.url}/{"x"*300}.zip', 16)

def test_an_archive_that_may_not_be_read(tmp_path, monkeypatch):
    "It is the archive that is named, and not the folder that it would be unpacked to"
    (tmp_path/'a.tar').write_bytes(tar_of({'a.png': png()}))
    refuse(monkeypatch, io, 'open', {'a.tar': errno.EACCES})
    for module in (zipfile, tarfile): monkeypatch.setattr(module, 'open' if module is zipfile else 'bltn_open', io.open, raising=False)
    monkeypatch.setattr(sys.modules[W.content_of.__module__], 'open', io.open, raising=False)
    assert 'a.tar cannot be read (Permission denied)' in one_line(open_images, tmp_path/'a.tar', 16)

def test_a_picture_of_many_gigabytes_is_not_read(tmp_path, monkeypatch):
    "A file with a hole: skipped with its size, before there is memory for it"
    save(tmp_path/'s'/'x.png')
    with (tmp_path/'s'/'y.png').open('wb') as f: f.truncate(200 * 10**9)
    monkeypatch.setattr(W.Path, 'read_bytes', lambda o: pytest.fail('read') if o.name == 'y.png' else open(o, 'rb').read())
    images = open_images(tmp_path/'s', 16)
    assert images.names == ['x.png'] and images.skipped == [('y.png', '200 GB, too much for a picture')]
    assert '200 GB' in W.pixels_or_why(tmp_path/'s'/'y.png', 16, 3)

def test_links_in_archives(tmp_path, home, capsys):
    "Left out, and counted; a zip's link that holds megabytes is none, and is not read; a name that is empty is the archive's fault"
    (tmp_path/'a.tar').write_bytes(tar_of({'s/a.png': png(0), 's/b.png': png(1), 's/c.png': 'b.png'}, 'w'))
    with tarfile.open(tmp_path/'a.tar', 'a') as t:
        m = tarfile.TarInfo('s/d.png')
        m.type, m.linkname = tarfile.LNKTYPE, 's/a.png'
        t.addfile(m)
    assert len(open_images(tmp_path/'a.tar', 16)) == 2 and 'a.tar: 2 links are left out' in capsys.readouterr().out
    (tmp_path/'b.tar').write_bytes(tar_of({'s/a.png': png(0)}, 'w'))
    assert len(open_images(tmp_path/'b.tar', 16)) == 1 and not capsys.readouterr().out
    with zipfile.ZipFile(tmp_path/'c.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('a.png', png(0))
        z.writestr((m := zipfile.ZipInfo('b.png')), b'x'*(1 << 20))
        m.external_attr = 0xA1FF << 16
    assert 'c.zip' in one_line(open_images, tmp_path/'c.zip', 16) and 'no link' in one_line(open_images, tmp_path/'c.zip', 16)
    (tmp_path/'d.tar').write_bytes(tar_of({'': png(0)}, 'w'))
    assert 'd.tar holds' in one_line(open_images, tmp_path/'d.tar', 16)
