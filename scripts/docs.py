"docs.py FOLDER: each notebook as a web page that needs nothing else, linked to one another."
import html, json, re, shutil, sys
from pathlib import Path
import nbformat
from nbconvert import HTMLExporter
from notebooks import NBS, notebooks, read, shown

def described(png, alt):
    "An HTML image with alternative text, which nbconvert gives to none."
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{"".join(png)}">'

def page(path, exporter):
    "The HTML of the notebook at `path`, links to notebooks turned into links to pages."
    nb = read(path)
    nb['cells'] = [c for c in shown(nb['cells']) if not c['source'].startswith('<!-- notebook only -->')]
    for c in nb['cells']:
        alt = c.pop('alt')
        for o in c.get('outputs', []):
            if alt and 'image/png' in o.get('data', {}): o['data'] = {'text/html': described(o['data']['image/png'], alt)}
        if c['cell_type'] == 'code' and not c['source']: c['metadata']['transient'] = dict(remove_source=True)   # no empty box
        if c['cell_type'] == 'markdown': c['source'] = re.sub(r'\]\((?!https?:)([^)\s]+)\.ipynb', r'](\1.html', c['source'])
    return exporter.from_notebook_node(nbformat.reads(json.dumps(nb), as_version=4))[0] # `reads` joins the lines of outputs

def build(folder, paths):
    "Write the pages of the notebooks `paths` into `folder`, with the pictures that prose shows."
    exporter = HTMLExporter()
    for path in paths:
        out = (folder/path.relative_to(NBS)).with_suffix('.html')
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(path, exporter), encoding='utf-8')
        print(out)
    if (NBS/'images').exists(): shutil.copytree(NBS/'images', folder/'images', dirs_exist_ok=True)

if __name__ == '__main__': build(Path(sys.argv[1]), notebooks())
