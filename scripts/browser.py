"""browser.py [NOTEBOOK...]: run lessons, such as 40_sampling, in a real JupyterLab at `tiny`, open pages of the site.
Both are looked at in a headless Chromium, and the slider of a panel is moved. $CHROMIUM names another Chromium than
playwright's, $SCREENSHOTS a folder for pictures of the panels."""
import json, os, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from notebooks import NBS, ROOT, read

INSTALL = ".venv/bin/pip install -e '.[browser]' && .venv/bin/playwright install --with-deps chromium"
HOW = f'it needs playwright, which the extra `browser` brings, and its Chromium (or name another in $CHROMIUM): {INSTALL}'
LESSONS, PAGES = ['40_sampling'], ['index', '40_sampling', 'api/sampling']
MINUTES = 20                                                   # for one notebook
# A slider of a lesson's panel, and which of the pictures beside it show something else when it moves
SLIDERS = {'40_sampling': ('noise t', [False, True, True])}
ERROR = ':is([data-mime-type$=".stderr"], [data-mime-type$=".error"]):has-text("Traceback (most recent call last)")'

def sync_playwright():
    "Playwright, or one line on how to get it."
    try: from playwright.sync_api import sync_playwright
    except ImportError: sys.exit(f'make test-browser: {HOW}')
    return sync_playwright()

@contextmanager
def chromium():
    "A headless browser."
    with sync_playwright() as p:
        path = os.environ.get('CHROMIUM') or p.chromium.executable_path
        if not Path(path).exists(): sys.exit(f'make test-browser: {path} is not there; {HOW}')
        sandbox = [] if os.getuid() else ['--no-sandbox']       # root has no sandbox
        browser = p.chromium.launch(executable_path=path, args=sandbox)
        try: yield browser
        finally: browser.close()

# -- lessons

def copied(name, folder):
    "The notebook `name` in `folder`, without outputs; and the numbers of the code cells that should show a picture."
    nb = read(NBS/f'{name}.ipynb')
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    kinds = [{k.split('/')[0] for o in c['outputs'] for k in o.get('data', {})} for c in code]
    for c in code: c['outputs'] = []
    path = folder/f'{name.replace("/", "-")}.ipynb'
    path.write_text(json.dumps(nb), encoding='utf-8')
    return path, [i for i,o in enumerate(kinds) if 'image' in o]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def answers(url):
    try: return urllib.request.urlopen(f'{url}/api', timeout=5).status == 200
    except OSError: return False

@contextmanager
def jupyterlab(folder):
    "The address of a JupyterLab that shows `folder`, with runs, data and settings of its own in it."
    tracker = folder/'settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings'
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')             # else cells out of sight are not on the page
    homes = dict(LATENTDIFF_RUNS='runs', LATENTDIFF_DATA='data', JUPYTER_CONFIG_DIR='config',
                 JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
    env = {k: v for k,v in os.environ.items() if k != 'MPLBACKEND'} | {k: str(folder/v) for k,v in homes.items()}
    env |= dict(LATENTDIFF_PRESET='tiny', HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT))
    port = free_port()
    options = dict(ip='127.0.0.1', port=port, port_retries=0, root_dir=folder, allow_root=True, open_browser=False)
    command = [sys.executable, '-m', 'jupyterlab', '--IdentityProvider.token=']
    command += [f'--ServerApp.{k}={v}' for k,v in options.items()]
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        url = f'http://127.0.0.1:{port}'
        try:
            while not answers(url):
                if server.poll() is not None: sys.exit((folder/'log').read_text())
                time.sleep(.5)
            yield url
        finally:
            server.terminate()
            server.wait()

def ran(page):
    "Of each code cell: its number, `*` while it runs or waits, or nothing."
    return [p.strip(' []:') for p in page.locator('.jp-CodeCell .jp-InputArea-prompt').all_text_contents()]

def run_all(page, url, path):
    "Open the notebook at `path`, run its code cells, and wait until none waits; after an error the others do not."
    page.goto(f'{url}/lab/tree/{path.name}')
    page.get_by_text('| Idle').wait_for(timeout=120_000)  # asked before, JupyterLab asks back which kernel to start
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    end = time.monotonic() + 60*MINUTES
    while '*' in (now := ran(page)) or not any(now):
        if time.monotonic() > end: sys.exit(f'{path.stem} still runs after {MINUTES} minutes; its cells are {now}')
        time.sleep(1)

LOADED = 'cell => [...cell.querySelectorAll(".jp-OutputArea img")].filter(o => o.complete && o.naturalWidth > 1).length'

def look(page, drawn):
    "What is wrong with the cells on the page, of which those numbered `drawn` should show a picture."
    cells = page.locator('.jp-CodeCell')
    wrong = [f'an error: {t.strip().splitlines()[-1]}' for t in page.locator(ERROR).all_text_contents()]
    wrong += [f'code cell {i} did not run' for i,p in enumerate(ran(page)) if not p]
    return wrong or [f'code cell {i} shows no picture' for i in drawn if not cells.nth(i).evaluate(LOADED)]

DRAWN = """pictures => pictures.map(o => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [o.naturalWidth, o.naturalHeight];
    canvas.getContext("2d").drawImage(o, 0, 0);
    return canvas.toDataURL();
})"""

def drag(page, handle, pixels):
    "Move the handle of a slider to the right with the mouse."
    handle.scroll_into_view_if_needed()
    handle.hover()
    at = handle.bounding_box()
    x, y = at['x'] + at['width']/2, at['y'] + at['height']/2
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=5)
    page.mouse.up()

def play(page, name, slider, expected):
    "Move a slider of the panel on the page; what is wrong with the pictures beside it, which change as `expected`."
    panel = page.locator('.widget-hbox:has(.widget-slider):has(.widget-image)').first
    handle = panel.locator('.widget-slider', has_text=slider).get_by_role('slider')
    if not handle.count(): return [f'there is no slider {slider}']
    pictures, value = panel.locator('img.widget-image'), handle.get_attribute('aria-valuetext')
    before = pictures.evaluate_all(DRAWN)
    drag(page, handle, 30)
    if handle.get_attribute('aria-valuetext') == value: return [f'the slider {slider} stays at {value}']
    end, changed = time.monotonic() + 60, []
    while changed != expected and time.monotonic() < end:
        time.sleep(.2)
        changed = [a != b for a,b in zip(pictures.evaluate_all(DRAWN), before)]
    if folder := os.environ.get('SCREENSHOTS'): panel.screenshot(path=Path(folder)/f'{name}.png')
    return [] if changed == expected else [f'the slider {slider} changes {changed} of the pictures, not {expected}']

def lesson(browser, name):
    "Run the notebook `name` in JupyterLab; what is wrong with it."
    with tempfile.TemporaryDirectory() as tmp, jupyterlab(Path(tmp)) as url:
        began, (path, drawn) = time.monotonic(), copied(name, Path(tmp))
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        run_all(page, url, path)
        wrong, n = look(page, drawn), len(ran(page))
        if name in SLIDERS and not wrong: wrong = play(page, name, *SLIDERS[name])
        page.close()
    seconds = time.monotonic() - began
    print(f'{name}: {n} code cells, {len(drawn)} with pictures, {seconds:.0f} seconds, {len(wrong)} faults', flush=True)
    return [f'{name}: {w}' for w in wrong]

# -- the site

READY = """Promise.all([window.MathJax?.startup?.promise, ...[...document.querySelectorAll("article img")].map(o => {
    o.loading = "eager"
    return o.decode().catch(() => null)
})]).then(() => null)"""
CUT = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
BROKEN = '[...document.querySelectorAll("article img")].filter(o => !o.naturalWidth).length'
UNSET = 'document.querySelectorAll("article .math").length - document.querySelectorAll("article mjx-container").length'

def opened(page, url):
    "What is wrong with the page of the site at `url`, as it is without a network."
    fetched = []
    page.on('request', lambda r: fetched.append(r.url))
    page.goto(url)
    page.evaluate(READY)
    numbers = {'pixels are cut off on the right': CUT, 'pictures are broken': BROKEN, 'formulas are not set': UNSET}
    wrong = [f'{n} {what}' for what,js in numbers.items() if (n := page.evaluate(js))]
    return wrong + [f'asks for {u}' for u in fetched if not u.startswith('file:')]

def site(browser):
    "Open pages of the site as files, without a network, on a desk and on a phone in the dark; what is wrong with them."
    whole, wrong = [p for p in PAGES if not p.startswith('api/')], []
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, ROOT/'scripts/docs.py', f'{tmp}/site', *whole], check=True)
        for width,scheme in ((1280, 'light'), (390, 'dark')):
            page = browser.new_page(viewport=dict(width=width, height=850), color_scheme=scheme, offline=True)
            for name in PAGES:
                wrong += [f'{name} at {width} pixels: {w}' for w in opened(page, f'file://{tmp}/site/{name}.html')]
    print(f'the site without a network: {len(PAGES)} pages, on a desk and on a phone, {len(wrong)} faults', flush=True)
    return wrong

if __name__ == '__main__':
    with chromium() as browser:
        wrong = site(browser) + [w for name in sys.argv[1:] or LESSONS for w in lesson(browser, name)]
    sys.exit('\n'.join(wrong) or 0)
