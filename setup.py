"Package metadata, all of it from settings.ini."
from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def words(k): return cfg[k].split()
def python_versions(): return [f'3.{i}' for i in range(int(cfg['min_python'].split('.')[1]), int(cfg['max_python'].split('.')[1]) + 1)]

statuses = ['', 'Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable']
here = f"{cfg['user']}/{cfg['repo']}"

def absolute(match):
    "A relative link of the README as one that also works away from the repository."
    bang, text, path = match.groups()
    kind = f'https://raw.githubusercontent.com/{here}' if bang else f'https://github.com/{here}/blob'
    return f"{bang}[{text}]({kind}/{cfg['branch']}/{path})"

readme = re.sub(r'(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)', absolute, (root/'README.md').read_text(encoding='utf-8'))

setup(
    name = cfg['lib_name'],
    version = cfg['version'],
    description = cfg['description'],
    long_description = readme,
    long_description_content_type = 'text/markdown',
    author = cfg['author'],
    author_email = cfg['author_email'],
    keywords = words('keywords'),
    license_expression = cfg['license'],
    classifiers = [
        f"Development Status :: {cfg['status']} - {statuses[int(cfg['status'])]}",
        'Intended Audience :: Developers',
        'Intended Audience :: Education',
        'Intended Audience :: Science/Research',
        'Framework :: Jupyter',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Programming Language :: Python :: 3',
    ] + [f'Programming Language :: Python :: {v}' for v in python_versions()],
    python_requires = f">={cfg['min_python']}",
    packages = [cfg['lib_path']],
    package_data = {cfg['lib_path']: ['lesson.mplstyle', 'zoo/*/*', 'zoo/*/*/*']},
    install_requires = words('requirements'),
    extras_require = {'eval': words('eval_requirements'), 'text': words('text_requirements'), 'docs': words('docs_requirements'),
                      'browser': words('browser_requirements'), 'track': words('track_requirements'), 'multi': words('multi_requirements'),
                      'dev': [o for k in ('dev', 'text', 'docs', 'track', 'multi') for o in words(f'{k}_requirements')]},
    entry_points = {'console_scripts': words('console_scripts')},
)
