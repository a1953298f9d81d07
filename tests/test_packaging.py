"""What is published is complete, and says what is true."""

import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest

import chainer_deform

tomllib = pytest.importorskip('tomllib' if sys.version_info >= (3, 11) else 'tomli')
markers = pytest.importorskip('packaging.markers')
requirements = pytest.importorskip('packaging.requirements')

ROOT = pathlib.Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


PYPROJECT = tomllib.loads(read('pyproject.toml'))
PROJECT = PYPROJECT['project']


def long_description(monkeypatch):
    """What setup.py gives to setuptools."""
    given = {}
    setuptools = types.SimpleNamespace(setup=lambda **options: given.update(options))
    monkeypatch.setitem(sys.modules, 'setuptools', setuptools)
    runpy.run_path(str(ROOT / 'setup.py'))
    assert given.pop('long_description_content_type') == 'text/x-rst'
    text = given.pop('long_description')
    assert not given  # all else is in pyproject.toml
    return text


def test_long_description_has_no_pictures(monkeypatch):
    """An index shows none that are named by a path; what they show is said instead."""
    text = long_description(monkeypatch)
    readme = read('README.rst')
    assert '.. image::' in readme
    assert '.. image::' not in text
    assert text.count('*Picture:* ') == readme.count('.. image::')
    for line in re.findall(r':alt: (.+)', readme):
        assert line in text


def test_long_description_renders(monkeypatch):
    """With what an index allows: no warnings, no other files, no HTML."""
    core = pytest.importorskip('docutils.core')
    settings = {
        'report_level': 2,
        'halt_level': 2,
        'file_insertion_enabled': False,
        'raw_enabled': False,
        'syntax_highlight': 'none',
    }
    core.publish_string(
        long_description(monkeypatch), writer='html', settings_overrides=settings
    )


def test_authors_and_licence():
    (author,) = PROJECT['authors']
    assert f'- name: {author["name"]}\n' in read('CITATION.cff')
    assert f'license: {PROJECT["license"]}\n' in read('CITATION.cff')
    assert re.search(rf'Copyright \(c\) \d+ {author["name"]}\n', read('LICENSE'))


def test_pythons():
    """Those of the classifiers are tested."""
    (matrix,) = re.findall(r'python: (\[.*3\.9.*3\.11.*\])', read_workflow())
    start = 'Programming Language :: Python :: 3.'
    classified = [c for c in PROJECT['classifiers'] if c.startswith(start)]
    assert re.findall(r'3\.\d+', matrix) == [c.split()[-1] for c in classified]
    assert PROJECT['requires-python'] == '>=' + classified[0].split()[-1]


def read_workflow():
    path = ROOT / '.github' / 'workflows' / 'test.yml'
    return path.read_text(encoding='utf-8')


def required(lines, extra=None):
    """Requirements as text, without the marker of an extra."""
    found = set()
    for line in lines:
        requirement = requirements.Requirement(line)
        marker = str(requirement.marker or '')
        if re.findall(r'extra == "([\w-]+)"', marker) == [extra] * bool(extra):
            requirement.marker = None
            marker = re.sub(r'(?: and )?extra == "[\w-]+"', '', marker)
            found.add(f'{requirement} {marker}'.strip())
    return found


def test_installed_metadata():
    """If it differs, the package has to be installed again."""
    try:
        installed = importlib.metadata.distribution('chainer-deform')
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('the package is not installed')
    assert installed.version == chainer_deform.__version__
    assert required(installed.requires) == required(PROJECT['dependencies'])
    extras = PROJECT['optional-dependencies']
    assert set(installed.metadata.get_all('Provides-Extra')) == set(extras)
    for extra, lines in extras.items():
        assert required(installed.requires, extra) == required(lines)
    for key in 'Keywords', 'License-Expression', 'Author':
        assert installed.metadata[key]


def numba(python, system, machine, implementation='CPython'):
    """Which Numba is required there, or None."""
    environment = {
        'python_version': python,
        'sys_platform': system,
        'platform_machine': machine,
        'platform_python_implementation': implementation,
    }
    found = [
        str(requirement.specifier)
        for requirement in map(requirements.Requirement, PROJECT['dependencies'])
        if requirement.name == 'numba' and requirement.marker.evaluate(environment)
    ]
    assert len(found) < 2
    return found[0] if found else None


PYTHONS = '3.9', '3.10', '3.11', '3.12', '3.13', '3.14'


@pytest.mark.parametrize(
    ('system', 'machine'),
    [
        ('linux', 'x86_64'),
        ('linux', 'aarch64'),
        ('darwin', 'arm64'),
        ('win32', 'AMD64'),
    ],
)
def test_numba_where_it_has_wheels(system, machine):
    for python in PYTHONS:
        assert numba(python, system, machine) == '>=0.60'
    assert numba('3.15', system, machine) is None
    assert numba('3.11', system, machine, 'PyPy') is None


def test_numba_on_windows_on_arm():
    assert [numba(python, 'win32', 'ARM64') for python in PYTHONS] == [
        *3 * [None],
        *3 * ['>=0.60'],
    ]


def test_numba_on_macs_with_intel():
    """pip prefers the source of a newer one to the last wheel."""
    for python in PYTHONS[:-1]:
        assert numba(python, 'darwin', 'x86_64') == '<0.63,>=0.60'
    assert numba('3.14', 'darwin', 'x86_64') is None


@pytest.mark.parametrize(
    ('system', 'machine'),
    [
        ('linux', ''),
        ('linux', 'i686'),
        ('linux', 'armv7l'),
        ('linux', 'ppc64le'),
        ('linux', 'riscv64'),
        ('win32', 'x86'),
        ('freebsd14', 'amd64'),
        ('freebsd14', 'arm64'),
        ('emscripten', 'wasm32'),
    ],
)
def test_no_numba_where_it_would_be_built(system, machine):
    for python in PYTHONS:
        assert numba(python, system, machine) is None


def test_the_wheel_has_all_files_of_the_package():
    folder = ROOT / 'chainer_deform'
    data = PYPROJECT['tool']['setuptools']['package-data']['chainer_deform']
    modules = re.compile(r'.*\.py|__pycache__/.*|.*/__pycache__/.*')
    others = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob('*')
        if path.is_file()
    }
    assert {name for name in others if not modules.fullmatch(name)} == set(data)
    # A folder without this file is no package.
    for path in folder.rglob('*.py'):
        assert (path.parent / '__init__.py').exists()


def test_the_source_package_has_all_files():
    if not (ROOT / '.git').exists():
        pytest.skip('this is no checkout')
    tracked = subprocess.run(
        ['git', '-c', f'safe.directory={ROOT}', 'ls-files', '-z'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=100,
    ).stdout.split('\0')
    listed = {
        'MANIFEST.in',
        'README.rst',
        'chainer_deform',
        'pyproject.toml',
        'setup.py',
    }
    for line in read('MANIFEST.in').splitlines():
        command, *names = line.split()
        if command in ('include', 'graft'):
            listed.update(names)
    missing = {name.partition('/')[0] for name in tracked if name} - listed
    assert missing <= {'.ci'}
    assert all((ROOT / name).exists() for name in listed)


def test_make_help_has_every_target():
    makefile = read('Makefile').replace('\\\n', ' ')
    (targets,) = re.findall(r'^\.PHONY: (.*)', makefile, re.M)
    for target in set(targets.split()) - {'help'}:
        assert re.search(rf"^\t@echo 'make {target} ", makefile, re.M)


def test_the_file_that_the_documentation_installs():
    name = f'chainer_deform-{chainer_deform.__version__}-py3-none-any.whl'
    text = read('README.rst') + read('docs/install.rst')
    assert set(re.findall(r'[\w.-]+\.whl', text)) == {name}


def test_the_constraint_on_setuptools():
    """What the documentation says builds both Chainer and this package."""
    (limit,) = re.findall(r'^setuptools(<\d+)$', read('constraints.txt'), re.M)
    (least,) = (r for r in PYPROJECT['build-system']['requires'])
    line = f"'{least},{limit.strip()}'"
    assert line in read('docs/install.rst') + read('README.rst')
    assert line in read('Makefile')


def test_py_typed():
    assert os.path.exists(ROOT / 'chainer_deform' / 'py.typed')
