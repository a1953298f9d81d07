"""Every example of the documentation runs, and what it names is there."""

import dataclasses
import doctest
import functools
import importlib
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import chainer
import numpy
import pytest

import chainer_deform
from tests.programs import WARNINGS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.rst', *sorted(DOCS.glob('*.rst'))]
READMES = sorted(ROOT.glob('examples/*/README.rst'))
NOTEBOOKS = sorted(DOCS.glob('*.ipynb'))
MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(chainer_deform.__path__, 'chainer_deform.')
    if not module.name.endswith(('__main__', 'cpu_numba'))  # the latter may be missing
]
EXAMPLES = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(
        module,
        extraglobs={'np': numpy, 'chainer': chainer, 'chainer_deform': chainer_deform},
    )
    if test.examples
}


@pytest.mark.parametrize('name', EXAMPLES)
def test_docstring(name):
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(EXAMPLES[name])
    assert result.attempted
    assert not result.failed


def public_names():
    """What __all__ lists anywhere; the reference has to have it, says docs/conf.py."""
    for module in (chainer_deform, *MODULES):
        for name in getattr(module, '__all__', ()):
            yield f'{module.__name__}.{name}'


@pytest.mark.parametrize('name', dict.fromkeys(public_names()))
def test_every_public_name_has_an_example(name):
    module, _, name = name.rpartition('.')
    item = getattr(importlib.import_module(module), name)
    # Nobody but the package makes records.
    if callable(item) and not dataclasses.is_dataclass(item):
        assert f'{item.__module__}.{item.__name__}' in EXAMPLES


def blocks(page, kind):
    """The blocks of a page that begin with ``.. kind``: argument, options, text."""
    lines = [*page.read_text(encoding='utf-8').splitlines(), 'end']
    result, argument, block = [], None, None
    for line in lines:
        if block is not None and line and not line.startswith(' '):
            options = {}
            while block and (option := re.match(r' +:([\w-]+): ?(.*)', block[0])):
                options[option[1]] = option[2]
                del block[0]
            text = '\n'.join(re.sub('^    ', '', line) for line in block)
            result.append((argument, options, text))
            block = None
        if start := re.fullmatch(rf'\.\. {kind}::(?: (\S+))?', line):
            argument, block = start[1], []
        elif block is not None:
            block.append(line)
    return result


def python_blocks(page):
    """The Python blocks of a page: file name (or None), text, what it prints.

    A block of the class ``continues-the-first`` goes on from the page's first one, and
    is run with it. What a block prints is in the block of the class ``output`` below
    it, if there is one.
    """
    result = []
    for language, options, text in blocks(page, 'code-block'):
        kind = options.get('class')
        if language == 'python':
            before, printed = '', ''
            if kind == 'continues-the-first':
                _, before, printed = result.pop(0)
            result.append((options.get('name'), before + text, printed))
        elif kind == 'output':
            name, code, printed = result[-1]
            result[-1] = name, code, printed + text.strip() + '\n'
    return result


def pictures(page):
    """The programs that draw the pictures of a page; blocks in a context are one."""
    context = []
    for file, options, text in blocks(page, 'plot'):
        if file:
            text = (DOCS / file).read_text(encoding='utf-8')
        if 'nofigs' not in options:
            text += "\nassert plt.gcf().axes\nplt.close('all')\n"
        if 'context' in options:
            context.append(text)
        else:
            yield text
    if context:
        yield '\n'.join(context)


def notebook(path):
    """The code of a notebook."""
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '\n'.join(
        ''.join(cell['source']) + '\n' for cell in cells if cell['cell_type'] == 'code'
    )


def run_python(tmp_path, name, text, *args):
    """What a program prints."""
    script = tmp_path / name
    script.write_text(text, encoding='utf-8')
    return subprocess.run(
        [sys.executable, *WARNINGS, *args, script],
        cwd=tmp_path,
        env={'OMP_NUM_THREADS': '1', **os.environ, 'MPLBACKEND': 'agg'},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
    ).stdout


@pytest.mark.parametrize(
    ('name', 'text', 'printed'),
    [
        pytest.param(*block, id=f'{page.relative_to(ROOT)}-{i}')
        for page in (*PAGES, *READMES)
        for i, block in enumerate(python_blocks(page))
    ],
)
def test_page(name, text, printed, tmp_path):
    """A block with a file name is an unmodified Chainer script, run by the package."""
    if 'import onnxruntime' in text:
        pytest.importorskip('onnxruntime', '1.25')  # the first to have DeformConv
    args = ('-m', 'chainer_deform') if name else ()
    output = run_python(tmp_path, name or 'example.py', text, *args)
    assert output == printed or not printed


def test_drop_in_shows_the_difference(tmp_path):
    """README's script prints what README says, with Chainer's own layer, too."""
    readme = ROOT / 'README.rst'
    ((_, text, ours),) = (block for block in python_blocks(readme) if block[0])
    (theirs,) = (
        text.strip() + '\n'
        for _, options, text in blocks(readme, 'code-block')
        if options.get('class') == 'output-of-chainers-own'
    )
    assert run_python(tmp_path, 'own.py', 'import chainer_deform\n' + text) == theirs
    assert ours != theirs


@pytest.mark.parametrize(
    'text',
    [
        pytest.param(text, id=f'{page.stem}-{i}')
        for page in PAGES
        for i, text in enumerate(pictures(page))
    ],
)
def test_picture(text, tmp_path):
    """Under -W error, and that it draws something."""
    run_python(tmp_path, 'picture.py', text)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    """It is kept without results: ``make docs`` runs it, and fails where it fails."""
    compile(notebook(path), path.name, 'exec')
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert not any(cell.get('outputs') for cell in cells)


def test_sorted_imports_keep_the_package_before_chainer(tmp_path):
    """Whoever copies an example may have it sorted by ruff or isort."""
    pytest.importorskip('ruff')
    texts = {path.name: notebook(path) for path in NOTEBOOKS}
    for page in (*PAGES, *READMES):
        codes = [text for name, text, _ in python_blocks(page) if not name]
        for i, text in enumerate([*codes, *pictures(page)]):
            texts[f'{page.relative_to(ROOT)}-{i}'] = text
    files = {name: tmp_path / f'{i}.py' for i, name in enumerate(texts)}
    for name, path in files.items():
        path.write_text(texts[name], encoding='utf-8')
    command = 'check', '--isolated', '--select', 'I', '--fix', '--quiet', tmp_path
    subprocess.run([sys.executable, '-m', 'ruff', *command], check=True, timeout=100)
    late = []
    for name, path in files.items():
        imports = re.findall(
            r'^(?:import|from) (chainer\w*)', path.read_text(encoding='utf-8'), re.M
        )
        if 'chainer' in imports and imports[0] != 'chainer_deform':
            late.append(name)
    assert not late


def test_reference_has_every_public_name():
    """So the page of its own that docs/conf.py sees to is there."""
    module, listed = None, set()
    for line in (DOCS / 'reference.rst').read_text(encoding='utf-8').splitlines():
        if start := re.fullmatch(r'\.\. (?:automodule|currentmodule):: (\S+)', line):
            module = start[1]
        elif name := re.fullmatch(r'   (\w+)', line):
            listed.add(f'{module}.{name[1]}')
    missing = []
    for name in public_names():
        module, _, item = name.rpartition('.')
        if '._' not in module and module.count('.') < 2 and name not in listed:
            item = getattr(importlib.import_module(module), item)
            missing += [name] if callable(item) else []
    assert not missing


def test_readme_table_has_every_function():
    text = (ROOT / 'README.rst').read_text(encoding='utf-8')
    table = text.partition('What works where:')[2].partition('.. end-intro')[0]
    functions = chainer_deform.functions.__all__
    assert not [name for name in functions if f'``{name}``' not in table]


def test_every_example_has_a_page():
    for readme in READMES:
        page = DOCS / 'examples' / f'{readme.parent.name}.rst'
        path = f'.. include:: ../../{readme.relative_to(ROOT).as_posix()}\n'
        assert path in page.read_text(encoding='utf-8')


@pytest.mark.parametrize(
    'page',
    [ROOT / 'README.rst', *READMES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_images_of_a_readme_are_there(page):
    for path in re.findall(r'\.\. image:: (\S+)', page.read_text(encoding='utf-8')):
        assert (page.parent / path).exists()


def test_readme_has_examples():
    names = [name for name, _, _ in python_blocks(ROOT / 'README.rst')]
    assert any(names)
    assert None in names


def found(pattern):
    """All that a pattern finds in the pages, lines joined at a backslash; for ids."""
    matches = {}
    for page in (*PAGES, *READMES):
        text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
        for match in re.finditer(pattern, text, re.M):
            matches[match[0].strip(' `')] = match.groups()
    assert matches, pattern
    return [pytest.param(*groups, id=id_) for id_, groups in matches.items()]


@pytest.mark.parametrize('target', found(r'(?:^ +|``|=\S+ )make ([\w-]+)'))
def test_make_target(target):
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    assert re.search(rf'^{target}:', makefile, re.M)


@pytest.mark.parametrize(
    'path',
    found(
        r'``((?:\.ci|benchmarks|chainer_deform|docs|examples|tests)/(?!_build)[^` ]+)``'
    ),
)
def test_path(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize('name', found(r'``([Tt]est_?[A-Z_a-z]+)``'))
def test_named_test(name):
    tests = (ROOT / 'tests').rglob('test_*.py')
    assert any(
        re.search(rf'(def|class) {name}\b', path.read_text(encoding='utf-8'))
        for path in tests
    )


@pytest.mark.parametrize('extras', found(r"'(?:\.|chainer-deform)\[([\w,-]+)\]'"))
def test_extras(extras):
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    for extra in extras.split(','):
        assert re.search(rf'^{extra} = \[', project, re.M)


@functools.cache
def help_of(script):
    if script.endswith('_mn.py'):
        pytest.importorskip('mpi4py')
    return subprocess.run(
        [sys.executable, ROOT / script, '--help'],
        capture_output=True,
        check=True,
        text=True,
        timeout=100,
    ).stdout


@pytest.mark.parametrize(
    ('script', 'options'), found(r'python ((?:examples|benchmarks)/\S+\.py)([^`\n]*)')
)
def test_options_of_a_script(script, options):
    for option in re.findall(r'--[\w-]+', options):
        assert re.search(rf'{option}\b', help_of(script))
