"""What test_nothing_lost.py kills. `deaths.py FOLDER N SEED` does each stage once in peace, and then `N` times (what is quick, 20 times) in a process that dies at a random place: at one of
its writes, renames and removals; what is written in one go may be half written by then. Then the same again without a death. It prints, as JSON, how many deaths are possible, what differs and
what is left over."""
import hashlib, http.server, io, json, os, random, shutil, signal, sys, tarfile, threading
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from latentdiff import autoencoder, commands, core, data, files, kid_eval, noisify, pipeline, training, unet

class Judge(kid_eval.Extractor):
    "Sixteen colours a picture: quick"
    def __init__(self, **kw): super().__init__(torch.nn.Identity(), 'colours', 'cpu')
    def embed(self, pixels): return torch.nn.functional.adaptive_avg_pool2d(pixels.float()/255, 4).flatten(1)

kid_eval.EfficientNetFeatures = Judge
training.Checkpoint.__init__.__defaults__ = (0.,)        # a checkpoint at every step
noisify._encode_rest.__defaults__ = (0.,)                # and at every batch
torch.set_num_threads(1)

def writes(event, args):
    "The path that is about to be changed, if `event` changes one"
    if event == 'open':
        path, mode, flags = args
        return path if isinstance(path, str) and (flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT)) else None
    return args[0] if event in ('os.rename', 'os.remove', 'os.mkdir', 'shutil.rmtree', 'block') else None

def announced(response):
    "The blocks of a download, each a place to die at"
    for o in iter(lambda: response.read(1 << 20), b''):
        sys.audit('block', str(HERE))
        yield o
        sys.audit('block', str(HERE))

def watch(folder, at=None, half=False):
    "For each change in `folder`, whether it may be half done: a file written anew. At number `at` the process dies, if `half` with half of it written"
    places = []
    def hook(event, args):
        path = writes(event, args)
        if path is None or not os.fspath(path).startswith(str(folder)) or len(places) == at: return
        places.append(event == 'open' and (args[1] or '')[:1] == 'w')
        if len(places) != at: return
        if half and places[-1]:
            with open(path, 'wb') as f: f.write(b'ha')
        os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return places

class Files(http.server.BaseHTTPRequestHandler):
    "One file, in parts if asked"
    def do_GET(self):
        tag, at = f'"{hashlib.md5(CONTENT).hexdigest()}"', 0
        if self.headers['If-Range'] == tag: at = int(self.headers['Range'][6:-1])
        self.send_response(206 if at else 200)
        for k, v in (('ETag', tag), ('Content-Length', len(CONTENT) - at), ('Content-Range', f'bytes {at}-{len(CONTENT) - 1}/{len(CONTENT)}'))[:3 if at else 2]: self.send_header(k, v)
        self.end_headers()
        self.wfile.write(CONTENT[at:])
    def log_message(self, *args): pass

CONTENT = np.random.RandomState(0).bytes(3_500_000)
SIZES = dict(data='rooms', preset='tiny', size=16, n=120, steps=4, ae_steps=4)
core.PRESETS['tiny'] = replace(core.PRESETS['tiny'], ae_widths=(16,), widths=(16, 32), bs=16, n_eval=24, sample_steps=2)
QUICK = 'download', 'unpack'
STAGES = *QUICK, 'start', 'autoencoder', 'encoding', 'denoiser', 'samples', 'to a folder', 'evaluation'
MADE = dict(start=(), autoencoder=('autoencoder',), encoding=('latents',), denoiser=('denoiser',), samples=('samples',), evaluation=('scores', 'report'))

def run(folder, goals=commands.GOALS):
    r = commands.Run(folder, core.settings_of(**SIZES))
    r.kept['images'], r.announce = IMAGES, lambda: None
    r.go(goals)

class Stage:
    "`before(folder)`: what is there at the start; `do(folder)`: what is killed"
    def __init__(self, name, base): self.name, self.base = name, base

    def prepare(self):
        "What all repetitions have in common; the stages of a run begin with the folder that the one before has left"
        if self.name == 'download':
            self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Files)
            threading.Thread(target=self.server.serve_forever, daemon=True).start()
        elif self.name == 'unpack':
            with tarfile.open(self.base/'a.tgz', 'w:gz') as t:
                for i in range(9):
                    m = tarfile.TarInfo(f'{i % 2}/{i}.bin')
                    m.size = 5000
                    t.addfile(m, io.BytesIO(CONTENT[i:i + 5000]))

    def before(self, folder):
        "The start: an old half of another download, an empty place, or the run as it is before this stage"
        if self.name == 'download':
            folder.mkdir(parents=True)
            (folder/'a.bin.part').write_bytes(bytes(1_200_000))
            (folder/'a.bin.part.tag').write_text('"of another file"')
        elif self.name in MADE and self.name != 'start': shutil.copytree(self.base/'run', folder)
        elif self.name != 'start': folder.mkdir(parents=True)

    def do(self, folder):
        if self.name == 'download':
            global HERE
            HERE, files._arriving = folder, announced
            files.download(f'http://127.0.0.1:{self.server.server_port}/a.bin', folder/'a.bin')
        elif self.name == 'unpack':
            os.environ['LATENTDIFF_DATA'] = str(folder)
            files.unpacked(self.base/'a.tgz')
        elif self.name == 'to a folder': commands.sample_cli.__wrapped__(str(self.base/'run'), n=7, steps=2, bs=2, out=str(folder/'pngs'))
        else: run(folder, MADE[self.name])

def in_child(do):
    "Exit status of a child that does it"
    sys.stdout.flush()
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        torch.set_num_threads(1)   # makes torch's pool of threads anew after a fork; two threads at once would quarrel over that
        do()
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)

def told(folder):
    "{name: hash} of all files; of made.json and metrics.json what does not depend on the clock"
    out = {}
    for f in sorted(folder.rglob('*')):
        if not f.is_file() or f.name == '.lock' or 'checkpoints' in f.parts: continue
        raw = f.read_bytes()
        if f.name in ('made.json', 'metrics.json'):
            d = json.loads(raw)
            for o in ('seconds', 'peak_gb', 'made_from', 'seal'): d.pop(o, None), d.get('facts', {}).pop(o, None)   # `made_from` of scores that took so long
            raw = json.dumps(d, sort_keys=True).encode()
        if f.name == 'report.html': raw = b''            # shows the seconds
        out[f.relative_to(folder).as_posix()] = hashlib.md5(raw).hexdigest()
    return out

def left(folder): return [o.relative_to(folder).as_posix() for o in folder.rglob('*') if any(p in o.name for p in ('.part', '.new', '.old', '.making'))]

def counted(stage, folder):
    places = watch(folder)
    stage.do(folder)
    (stage.base/'places').write_text(json.dumps(places))

def deaths(stage, n, seed):
    "How many places there are, how many deaths are possible there, and of `n` of these [place, half written, exit status of the killed one, of the next, what differs, what is left]"
    stage.prepare()
    whole, out = stage.base/'whole', []
    stage.before(whole)
    assert in_child(lambda: counted(stage, whole)) == 0
    places, want = json.loads((stage.base/'places').read_text()), told(whole)
    possible = [(at, half) for at, written in enumerate(places, 1) for half in (False, True)[:1 + written]]
    for i, (at, half) in enumerate(sorted(random.Random(seed).sample(possible, min(n, len(possible))))):
        cut = stage.base/f'cut{i}'
        stage.before(cut)
        def killed():
            watch(cut, at, half)
            stage.do(cut)
        status = in_child(killed), in_child(lambda: stage.do(cut))
        have = told(cut)
        out.append([at, half, *status, [k for k in want.keys() | have.keys() if want.get(k) != have.get(k)], left(cut)])
        shutil.rmtree(cut)
    if stage.name in MADE:
        shutil.rmtree(stage.base/'run', ignore_errors=True)
        whole.rename(stage.base/'run')
    else: shutil.rmtree(whole)
    return dict(places=len(places), possible=len(possible), kills=out)

if __name__ == '__main__':
    base, n, seed, IMAGES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), data.open_images('rooms', 16, n=120)
    print('\n' + json.dumps({o: deaths(Stage(o, base), max(n, 20) if o in QUICK else n, seed) for o in STAGES}))
