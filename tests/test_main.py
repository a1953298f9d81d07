"""``python -m chainer_deform SCRIPT`` is ``python SCRIPT`` with a patched Chainer."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

_ROOT = pathlib.Path(importlib.util.find_spec('chainer_deform').origin).parents[1]


def python(*args, cwd):
    """Runs Python in cwd, with warnings as errors."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))
    return subprocess.run(
        [sys.executable, '-W', 'error', *args],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(path, code):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))


def same_as_python(*args, cwd):
    """Runs a program both ways and checks that all three results are the same."""
    plain = python(*args, cwd=cwd)
    ours = python('-m', 'chainer_deform', *args, cwd=cwd)
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr
    assert ours.returncode == plain.returncode
    return ours


def test_script_sees_what_python_shows_it(tmp_path):
    write(tmp_path / 'folder/beside.py', 'answer = 42')
    write(
        tmp_path / 'folder/script.py',
        """
        import pickle
        import sys
        import beside  # sys.path[0] is the script's folder

        class Pickled:
            annotated: int = 0

        assert type(pickle.loads(pickle.dumps(Pickled()))) is Pickled
        assert vars(sys.modules['__main__']) is globals()
        if __name__ == '__main__':
            print(sys.argv, sys.path[0], beside.answer)
            print(__file__, __spec__, __package__, __doc__, __builtins__)
            print(type(__loader__), Pickled.__annotations__)
            print(sorted(set(globals()) - {'__annotations__'}))
        """,
    )
    os.symlink('folder/script.py', tmp_path / 'link.py')
    args = ['--help', '-m', 'x', '--', '-W', '']
    result = same_as_python('folder/script.py', *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(['folder/script.py', *args]) in result.stdout
    assert same_as_python('link.py', cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ('code', 'status'),
    [
        ('raise SystemExit(3)', 3),
        ('raise SystemExit("a message")', 1),
        ('try:\n    {}[1]\nexcept KeyError:\n    (lambda: 1 / 0)()', 1),
        ('x = = 1', 1),
        ('raise KeyboardInterrupt', -2),
    ],
    ids=['exit', 'message', 'exception', 'syntax', 'interrupt'],
)
def test_exit_status_and_traceback(tmp_path, code, status):
    (tmp_path / 'script.py').write_text(code)
    assert same_as_python('script.py', cwd=tmp_path).returncode == status


def test_module(tmp_path):
    write(tmp_path / 'package/__init__.py', 'here = "package"')
    write(tmp_path / 'package/__main__.py', 'from . import module')
    write(
        tmp_path / 'package/module.py',
        """
        import sys
        from . import here
        print(sys.argv, sys.path[0], here)
        print(__name__, __file__, __package__, __spec__.name)
        """,
    )
    args = '-m', 'package.module', '--help'
    result = same_as_python(*args, cwd=tmp_path)
    assert 'package.module' in result.stdout
    assert '--help' in result.stdout
    result = python('-m', 'chainer_deform', '-m', 'package', cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, '')
    assert 'package.module' in result.stdout


def test_unmodified_script_and_its_workers(tmp_path):
    """A worker process imports the script too, and must be repaired before it does."""
    write(
        tmp_path / 'script.py',
        '''
        import multiprocessing
        import chainer
        import chainer.functions as F
        import chainer.links as L
        import numpy as np

        assert L.DeformableConvolution2D.__module__.startswith('chainer_deform.')

        class Squares(chainer.dataset.DatasetMixin):
            def __len__(self):
                return 3

            def get_example(self, i):
                return np.array(i ** 2), L.DeformableConvolution2D.__module__

        def work(connection, model):
            """In a process of the user's own, with one that it starts in turn."""
            x = np.ones((1, 1, 2, 2), 'f')
            connection.send(F.resize_images(model(x), (3, 3)).shape)
            if multiprocessing.parent_process().name == 'MainProcess':
                child = multiprocessing.Process(target=work, args=(connection, model))
                child.start()
                child.join()

        if __name__ == '__main__':
            for method in multiprocessing.get_all_start_methods():
                multiprocessing.set_start_method(method, force=True)
                iterator = chainer.iterators.MultiprocessIterator(
                    Squares(), 3, repeat=False, shuffle=False, n_processes=1)
                (batch,) = iterator
                iterator.finalize()
                squares, modules = zip(*batch)
                assert [int(square) for square in squares] == [0, 1, 4], batch
                assert set(modules) == {L.DeformableConvolution2D.__module__}, batch

                receiver, sender = multiprocessing.Pipe(duplex=False)
                model = L.DeformableConvolution2D(1, 1, 3, pad=1)
                child = multiprocessing.Process(target=work, args=(sender, model))
                child.start()
                for _ in range(2):
                    assert receiver.poll(60)
                    assert receiver.recv() == (1, 1, 3, 3)
                child.join()
                print(method)
        ''',
    )
    result = python('-m', 'chainer_deform', 'script.py', cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, ''), result.stderr
    assert 'spawn' in result.stdout.split()


def test_fork_server_that_imports_the_script(tmp_path):
    """As that of the newest Pythons does, unless told otherwise."""
    write(
        tmp_path / 'script.py',
        """
        import multiprocessing
        import chainer

        if __name__ == '__main__':
            multiprocessing.set_start_method('forkserver')
            with multiprocessing.Pool(1) as pool:
                print(pool.apply(chainer.as_array, [chainer.Variable()]))
        """,
    )
    result = python(
        '-c',
        textwrap.dedent("""
        import multiprocessing.spawn
        import runpy
        import sys
        get_preparation_data = multiprocessing.spawn.get_preparation_data

        def newer(name):
            data = get_preparation_data(name)
            return {**data, 'main_path': data.get('init_main_from_path')}

        multiprocessing.spawn.get_preparation_data = newer
        sys.argv = ['chainer_deform', 'script.py']
        runpy.run_module('chainer_deform', run_name='__main__', alter_sys=True)
        """),
        cwd=tmp_path,
    )
    assert (result.returncode, result.stderr) == (0, ''), result.stderr


@pytest.mark.parametrize(
    ('args', 'status', 'stdout', 'stderr'),
    [
        ([], 2, '', 'usage: python -m chainer_deform SCRIPT'),
        (['--help'], 0, 'usage: python -m chainer_deform SCRIPT', ''),
        (['--verbose', 'script.py'], 2, '', 'usage: python -m chainer_deform SCRIPT'),
        (['missing.py'], 2, '', "cannot open 'missing.py': No such file or directory"),
        (['-m', 'missing'], 2, '', "no module 'missing' to run"),
    ],
    ids=['nothing', 'help', 'option', 'script', 'module'],
)
def test_command_line(tmp_path, args, status, stdout, stderr):
    result = python('-m', 'chainer_deform', *args, cwd=tmp_path)
    assert result.returncode == status
    for expected, actual in (stdout, result.stdout), (stderr, result.stderr):
        assert expected in actual if expected else not actual
    if status and not expected.startswith('usage'):
        assert result.stderr.count('\n') == 1
