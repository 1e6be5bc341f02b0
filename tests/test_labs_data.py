"Cars with names and toys before two cameras, on files and servers made here: no network, no data set needed"
import gzip, hashlib, os, tracemalloc
import numpy as np, pytest, torch
from fastai.data.external import URLs
from scipy.io import savemat

from latentdiff import labs_data as D
from latentdiff.core import UserError
from latentdiff.data import from_uint8, open_images, to_uint8
from latentdiff.files import load_pixels
from test_data import home, left, one_line, png, server, tar_of

def write_norb(path, array):
    "An array in smallNORB's format, zipped if the name says so"
    magic = next(m for m, t in D.NORB_TYPES.items() if np.dtype(t) == array.dtype.newbyteorder('<'))
    dims = [*array.shape] + [1]*(3 - array.ndim)
    raw = np.array([magic, array.ndim, *dims], '<i8').astype('<i4').tobytes() + array.astype(D.NORB_TYPES[magic]).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == '.gz' else raw)

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
    monkeypatch.setattr(URLs, 'CARS', server.url + '/c.tgz')
    monkeypatch.setattr(D, 'CARS_DEVKIT', (server.url + '/k.tgz', hashlib.md5(kit).hexdigest()))
    assert open_images('stanford_cars', 16).captions == CAR_NAMES
    asked = len(server.log)
    assert open_images('stanford_cars', 16).captions == CAR_NAMES and len(server.log) == asked == 2
    monkeypatch.setattr(URLs, 'CARS', server.url + '/gone.tgz')
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
    write_norb(tmp_path/f'a.{suffix}', a)
    b = D.read_norb(tmp_path/f'a.{suffix}')
    assert b.dtype == np.dtype(dtype).newbyteorder('<') and b.shape == shape and (b == a).all()

def test_norb_bytes_of_the_published_file(tmp_path):
    "Magic, dimensions, padding and byte order: the md5 of the published training categories, and of them no other byte"
    cat = np.tile(np.arange(5), 4860).astype(np.int32)
    write_norb(tmp_path/'cat.mat', cat)
    write_norb(tmp_path/'cat.mat.gz', cat)
    raw = (tmp_path/'cat.mat').read_bytes()
    assert hashlib.md5(raw).hexdigest() == 'fd5120d3f770ad57ebe620eb61a0b633'
    assert gzip.decompress((tmp_path/'cat.mat.gz').read_bytes()) == raw
    assert raw[:20] == bytes.fromhex('544c3d1e 01000000 ec5e0000 01000000 01000000')
    write_norb(tmp_path/'dat.mat', np.zeros((1, 2, 3, 3), np.uint8))
    assert (tmp_path/'dat.mat').read_bytes()[:24] == bytes.fromhex('554c3d1e 04000000 01000000 02000000 03000000 03000000')

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
    "300 damaged files (`make test-long`: 20,000): either the array that was written, or one line"
    rng, good, path = np.random.RandomState(1), bytearray(matrix()), tmp_path/'a.mat'
    read, n = 0, 20_000 if 'LATENTDIFF_LONG' in os.environ else 300
    for _ in range(n):
        raw = bytearray(good)
        for i in rng.randint(0, 20, rng.randint(1, 4)): raw[i] = rng.choice([0, 1, 2, 3, 4, 255, rng.randint(256)])
        path.write_bytes(raw)
        try: a = D.read_norb(path)
        except UserError as e: assert '\n' not in str(e)
        else: read += 1; assert a.nbytes == 24
    assert 0 < read < n/2

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
    for k, a in dict(dat=dat, cat=cat, info=info.astype(np.int32)).items(): write_norb(folder/f'{stem}-{k}.mat{zipped}', a)
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

def test_norb_in_a_folder_that_cannot_be_written(small_norb, home, monkeypatch):
    "What is zipped stays in memory, and is the same"
    def no(path, data): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(D, 'write_whole', no)
    images = open_images('smallnorb/test', 96)
    assert (to_uint8(images[0])[0, 0].numpy() == small_norb['test'][0][0, 0]).all() and len(images) == 40
    assert not (home/'smallnorb'/f"{D.NORB['stems']['test']}-dat.mat").exists()

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
    norb_files(tmp_path/'many', 'x-training', 200)
    first = D.NorbImages(96, folder=tmp_path/'many').fingerprint
    with next((tmp_path/'many').glob('*dat.mat')).open('r+b') as f:   # one pixel in the middle
        f.seek(24 + 100*2*96*96)
        was = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([was ^ 1]))
    assert D.NorbImages(96, folder=tmp_path/'many').fingerprint != first

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
