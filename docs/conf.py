"Sphinx's settings for the site, which `scripts/docs.py` builds: nothing is executed, nothing loaded from elsewhere."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'scripts'))
from notebooks import settings

cfg = settings()
project, author, version = cfg['lib_name'], cfg['author'], cfg['version']
project_copyright = cfg['copyright']
language = 'en'
extensions = ['myst_nb', 'sphinx-mathjax-offline']   # the second brings MathJax, so that formulas need no network
smartquotes = False                                  # `--preset` has two hyphens

nb_execution_mode = 'off'
nb_merge_streams = True
nb_code_prompt_show = 'Show set-up and imports'
nb_code_prompt_hide = 'Hide set-up and imports'
nb_ipywidgets_js = {}                                # myst-nb would ask a CDN; pages show what a widget falls back to
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3                             # so that `40_sampling.ipynb#the-tempting-shortcut` is a link

html_theme = 'furo'
html_title = project
html_static_path = ['style.css']
html_css_files = ['style.css']
html_copy_source = False
html_show_sphinx = False
add_module_names = False
add_function_parentheses = False
pygments_style = 'friendly'
pygments_dark_style = 'monokai'
