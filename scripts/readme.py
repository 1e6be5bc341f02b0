"README.md from nbs/index.ipynb; its pictures, and one a lab, go to nbs/images. `readme.py --check` writes nothing and fails if they differ."
import base64, posixpath, re, sys
from notebooks import NBS, ROOT, labs, read, shown

LINK = re.compile(r'(\]\(|src=")(?!https?:|#)([^)"\s]+)')
MARK = '<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n'

def from_root(text):
    "`text` with links that start in nbs/ turned into links that start in the root."
    return LINK.sub(lambda m: m[1] + posixpath.normpath('nbs/' + m[2]), text)

def output(out, files, alt):
    "One output as markdown; a picture, which shows `alt`, is added to `files`, {path: bytes}: a PNG, large ones as JPEG."
    data = out.get('data', {})
    if 'image/png' in data:
        kind = 'jpeg' if 'image/jpeg' in data and len(data['image/png']) > 4/3*200_000 else 'png'
        path = f'nbs/images/index-{len(files)}.{kind}'
        files[path] = base64.b64decode(data[f'image/{kind}'])
        return f'![{alt}]({path})'
    text = ''.join(out.get('text', '') or data.get('text/plain', ''))
    return '\n'.join(f'    {l}' for l in text.splitlines())

def lab_picture(path):
    "The PNG bytes that the cell labelled row-picture of the lab at `path` shows: its picture in the table of labs."
    cell = next(c for c in read(path)['cells'] if c['source'].startswith('#| label: row-picture'))
    return base64.b64decode(next(o['data']['image/png'] for o in cell['outputs'] if 'image/png' in o.get('data', {})))

def render(nb):
    "README.md and its pictures, {path: bytes}, for the notebook `nb`; with them the pictures of the labs."
    files,parts = {},[MARK]
    for c in shown(nb['cells'], leave_out=('hide', 'eval')):
        if c['source'].startswith('<!-- notebook only -->'): continue
        if c['cell_type'] == 'markdown': parts.append(from_root(c['source']))
        else: parts += code(c, files)
    files |= {f'nbs/images/{p.stem}.png': lab_picture(p) for p in labs()}
    files['README.md'] = ('\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n').encode()
    return files

def code(c, files):
    "The code cell `c` as markdown parts."
    source = [] if not c['source'].strip() else [f"``` python\n{c['source']}\n```"]
    return source + [output(o, files, c['alt']) for o in c['outputs']]

if __name__ == '__main__':
    files = render(read(NBS/'index.ipynb'))
    stale = [f for f,b in files.items() if not (ROOT/f).exists() or (ROOT/f).read_bytes() != b]
    if '--check' in sys.argv: sys.exit(f"Not up to date, run `make readme`: {', '.join(stale)}" if stale else 0)
    for f in stale:
        (ROOT/f).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/f).write_bytes(files[f])
    print(f"Wrote {', '.join(stale)}" if stale else 'README.md is up to date.')
