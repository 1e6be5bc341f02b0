"The latents of lab 5 from pictures, by a small autoencoder of the same class."
import json
from pathlib import Path
import numpy as np, torch
from PIL import Image
from diffusers import AutoencoderKL

def test_latents_from_pictures(server, tmp_path):
    "They are the autoencoder's means of squashed pictures in [0, 1], by name, to half a step; lab 5 reads them"
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, norm_num_groups=2).eval()
    vae.save_pretrained(tmp_path/'vae')
    rng, folder, out = np.random.default_rng(0), tmp_path/'data'/'bedroom', tmp_path/'data'/'sd_latents_u8.npz'
    pixels = {name: rng.integers(0, 256, (24, 40, 3), dtype=np.uint8) for name in 'cabd'}
    for k, (name, o) in enumerate(pixels.items()):
        path = folder/'xy'[k % 2]/f'{name}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(o).save(path)
    script = Path(__file__).parents[1]/'bench'/'lsun_latents.py'
    r = server.run(script, folder, out, '--vae', tmp_path/'vae', '--size', 64, '--n', 3, '--bs', 2)
    assert r.rc == 0 and '3 latents (4, 8, 8)' in r.out, r
    d = np.load(out)
    assert d['names'].tolist() == ['a', 'b', 'c'] and d['q'].dtype == np.uint8
    sides = [Image.open(next(folder.rglob(f'{o}.jpg'))).convert('RGB').resize((64, 64), Image.Resampling.BICUBIC) for o in 'abc']
    x = torch.stack([torch.from_numpy(np.array(o)).permute(2, 0, 1)/255 for o in sides])
    with torch.no_grad(): z = vae.encode(x).latent_dist.mean.numpy()
    assert (np.abs(d['q'].astype('float32')*d['step'] + d['low'] - z) <= d['step']*.501).all()
    np.testing.assert_allclose(d['step'].ravel(), torch.from_numpy(z).std((0, 2, 3))*14/255, rtol=1e-5)
    from_file = {}
    lab = '\n\n'.join(''.join(c['source']) for c in json.loads((script.parents[1]/'nbs'/'labs'/'05_lsun_bedroom.ipynb').read_text())['cells'] if 'def from_file' in ''.join(c['source']))
    exec('import numpy as np, torch\nfrom PIL import Image\nfrom itertools import takewhile\n' + lab, from_file)
    raw, pictures = from_file['from_file'](out)
    assert raw.shape == (3, 4, 8, 8) and pictures.shape == (3, 3, 128, 128)
