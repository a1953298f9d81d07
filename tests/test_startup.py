"""Processes that a patched program starts patch Chainer when they import it."""

import ast
import json
import os
import pathlib
import sys

import pytest

from chainer_deform._startup import chainer_deform_startup
from tests.programs import ROOT, environment, expect_success, run_python, write

STARTUP = pathlib.Path(chainer_deform_startup.__file__).parent

#: Prints where the layer comes from, and uses a function that needs a repair.
IMPORTS_CHAINER = """
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import sys

assert F.resize_images(np.zeros((1, 1, 2, 2), 'f'), (3, 3)).shape == (1, 1, 3, 3)
assert chainer is sys.modules['chainer']
assert chainer.__spec__.origin == chainer.__file__
print(L.DeformableConvolution2D.__module__)
"""
OURS = 'chainer_deform.links.deformable_convolution_2d\n'


def run_child(code, *options, cwd, path=(), **more):
    """Runs code in a process with the environment that a patched program gives it."""
    path = [str(STARTUP), *map(str, path), environment()['PYTHONPATH']]
    more.setdefault(chainer_deform_startup.PYTHON, chainer_deform_startup.identity())
    return run_python(
        *options, '-c', code, cwd=cwd, PYTHONPATH=os.pathsep.join(path), **more
    )


def test_environment_of_a_child(tmp_path):
    write(
        tmp_path / 'script.py',
        """
        import json
        import os
        import subprocess
        import sys

        if len(sys.argv) < 3:
            subprocess.run(
                [sys.executable, '-m', 'chainer_deform', __file__, *sys.argv[1:], 'x'],
                check=True,
            )
        print(json.dumps([os.environ[name] for name in (
            'PYTHONPATH', 'CHAINER_DEFORM_PYTHON')]), flush=True)
        """,
    )
    result = run_python('-m', 'chainer_deform', 'script.py', 'x', cwd=tmp_path)
    expect_success(result)
    path = str(STARTUP) + os.pathsep + environment()['PYTHONPATH']
    expected = [path, chainer_deform_startup.identity()]
    assert [json.loads(line) for line in result.stdout.splitlines()] == [expected] * 2


def test_children_and_their_children(tmp_path):
    """By way of a shell, and of multiprocessing, too."""
    write(tmp_path / 'module.py', IMPORTS_CHAINER)
    write(
        tmp_path / 'child.py',
        """
        import multiprocessing
        import subprocess
        import sys

        def work():
            import module

        if __name__ == '__main__':
            subprocess.run([sys.executable, 'module.py'], check=True)
            for method in multiprocessing.get_all_start_methods():
                context = multiprocessing.get_context(method)
                process = context.Process(target=work)
                process.start()
                process.join()
        """,
    )
    write(
        tmp_path / 'script.py',
        """
        import subprocess
        import sys

        subprocess.run(f'"{sys.executable}" child.py', shell=True, check=True)
        """,
    )
    result = run_python('-m', 'chainer_deform', 'script.py', cwd=tmp_path)
    expect_success(result)
    lines = result.stdout.splitlines(keepends=True)
    assert set(lines) == {OURS}
    assert len(lines) > 1


def test_workers_of_pytest(tmp_path):
    write(
        tmp_path / 'test_worker.py',
        """
        import os

        import chainer.functions as F
        import chainer.links as L
        import numpy as np
        import pytest

        @pytest.mark.parametrize('number', range(4))
        def test_worker(number):
            assert os.environ['PYTEST_XDIST_WORKER'].startswith('gw')
            assert L.DeformableConvolution2D.__module__.startswith('chainer_deform.')
            F.resize_images(np.zeros((1, 1, 2, 2), 'f'), (3, 3))
        """,
    )
    write(tmp_path / 'pytest.ini', '[pytest]')
    options = ['-n', '2', '-q', '-p', 'no:cacheprovider']
    result = run_python(
        *('-m', 'chainer_deform', '-m', 'pytest', *options),
        cwd=tmp_path,
        PYTEST_ADDOPTS='',
    )
    assert result.returncode == 0, result.stdout
    assert '4 passed' in result.stdout


@pytest.mark.parametrize(
    'first', ['import chainer_deform', 'import chainer.links', 'import onnx_chainer']
)
def test_whatever_is_imported_first(tmp_path, first):
    result = run_child(first + IMPORTS_CHAINER, cwd=tmp_path)
    expect_success(result)
    assert result.stdout == OURS


def test_main_of_the_package_in_a_child(tmp_path):
    write(tmp_path / 'script.py', IMPORTS_CHAINER)
    code = """if True:
        import runpy, sys
        sys.argv[1:] = ['script.py']
        runpy.run_module('chainer_deform', run_name='__main__')
    """
    result = run_child(code, cwd=tmp_path)
    expect_success(result)
    assert result.stdout == OURS


def test_chainer_from_the_current_folder(tmp_path):
    """As in a check-out of Chainer, whose own folder comes before PYTHONPATH."""
    write(
        tmp_path / 'chainer/__init__.py',
        """
        import sys
        assert 'chainer_deform' in sys.modules
        raise ValueError('mine')
        """,
    )
    result = run_child('import chainer', cwd=tmp_path)
    assert result.stderr.endswith('\nValueError: mine\n')


def test_without_chainer_nothing_is_different(tmp_path):
    code = 'import json, sys; print(json.dumps([sorted(sys.modules), sys.path]))'
    result = run_child(code, cwd=tmp_path)
    expect_success(result)
    modules, path = json.loads(result.stdout)
    plain = run_python('-c', code, cwd=tmp_path)
    plain_modules, plain_path = json.loads(plain.stdout)
    assert path == plain_path
    assert set(modules) - set(plain_modules) == {'chainer_deform_startup'}
    assert set(plain_modules) <= set(modules)


@pytest.mark.parametrize(
    ('code', 'stderr'),
    [
        ('print(__name__, __file__)', ''),
        ('import json, missing', 'Error in sitecustomize'),
        ('raise SystemExit("mine")', 'mine'),
    ],
    ids=['right', 'fails', 'exits'],
)
def test_sitecustomize_of_the_user(tmp_path, code, stderr):
    """It runs as without ours, and a second one doesn't."""
    write(tmp_path / 'mine/sitecustomize.py', code)
    write(tmp_path / 'other/sitecustomize.py', 'raise ValueError')
    path = [tmp_path / 'mine', tmp_path / 'other']
    code = "import sys; print(sys.modules.get('sitecustomize'), sys.path)"
    child = run_child(code, cwd=tmp_path, path=path)
    plain = run_python(
        *('-c', code),
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join([*map(str, path), environment()['PYTHONPATH']]),
    )
    assert child.stdout == plain.stdout
    assert child.returncode == plain.returncode
    assert stderr in child.stderr
    assert (child.stderr == '') == (stderr == '')


@pytest.mark.parametrize('option', ['-I', '-E', '-S'])
def test_options_that_switch_it_off(tmp_path, option):
    code = """if True:
        import sys
        assert 'chainer_deform_startup' not in sys.modules
        assert not any('startup' in str(finder) for finder in sys.meta_path)
    """
    expect_success(run_child(code, option, cwd=tmp_path))


#: What a Python sees where nothing is installed: its own library and this folder.
BARE = """
import sys
sys.path[:] = [''] + [p for p in sys.path if p.startswith(sys.base_prefix)
                      and 'site-packages' not in p]
sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]
"""


def test_other_python_without_chainer_deform(tmp_path):
    write(tmp_path / 'chainer/__init__.py', 'from chainer import sub')
    write(tmp_path / 'chainer/sub.py', 'import chainer\nprint(chainer.__name__)')
    (tmp_path / 'chainer_deform').mkdir()  # a folder, but not the package
    code = BARE + 'import chainer; print(chainer.sub, sys.meta_path)'
    result = run_child(code, cwd=tmp_path, CHAINER_DEFORM_PYTHON='3.8 /other')
    expect_success(result)
    assert result.stdout.startswith('chainer\n<module')
    assert 'startup' not in result.stdout


def test_other_python_without_chainer(tmp_path):
    for name in 'chainer', 'chainer_deform':
        result = run_child(
            BARE + f'import {name}', cwd=tmp_path, CHAINER_DEFORM_PYTHON='3.8 /other'
        )
        assert result.stderr.endswith(
            f"\nModuleNotFoundError: No module named '{name}'\n"
        )


def test_package_that_only_the_parent_finds(tmp_path):
    """A check-out that is not installed, run from its own folder."""
    code = f"""
import sys
sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]
sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]
"""
    result = run_child(code + IMPORTS_CHAINER, cwd=tmp_path)
    expect_success(result)
    assert result.stdout == OURS
    result = run_child(code + 'import chainer_deform._patch', cwd=tmp_path)
    expect_success(result)


def test_second_try_after_an_error(tmp_path):
    """As in a notebook."""
    write(tmp_path / 'damaged/numpy/__init__.py', 'raise ImportError("mine")')
    code = """
import sys
sys.path.insert(0, 'damaged')
try:
    import chainer
except ImportError as e:
    print(e)
del sys.path[0]
"""
    result = run_child(code + IMPORTS_CHAINER, cwd=tmp_path)
    expect_success(result)
    assert result.stdout == 'mine\n' + OURS


def test_old_pythons_can_read_sitecustomize():
    source = (STARTUP / 'sitecustomize.py').read_text()
    ast.parse(source, feature_version=(3, 4))
    source.encode('ascii')


def test_it_is_installed_once(monkeypatch):
    monkeypatch.setattr(sys, 'meta_path', sys.meta_path[:])
    before = sys.meta_path[:]
    chainer_deform_startup.install()  # chainer_deform is there already
    assert sys.meta_path == before
    monkeypatch.delitem(sys.modules, 'chainer_deform')
    for _ in range(2):
        chainer_deform_startup.install()
        assert len(sys.meta_path) == len(before) + 1


def test_every_file_is_part_of_the_package():
    """setuptools takes a folder for a package only where it has an __init__.py."""
    assert (STARTUP / '__init__.py').exists()
    names = {path.name for path in STARTUP.iterdir() if path.suffix}
    assert names == {'__init__.py', 'chainer_deform_startup.py', 'sitecustomize.py'}
