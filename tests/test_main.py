"""``python -m chainer_deform SCRIPT`` is ``python SCRIPT`` with a patched Chainer."""

import os
import py_compile
import re
import textwrap
import zipfile

import chainer
import numpy
import pytest

import chainer_deform
from tests.programs import expect_success, run_python, write

#: A program that shows all that Python tells it, also after its end, and fails then.
SHOWS = """
import atexit
import pickle
import sys

class Pickled:
    pass

def show():
    assert vars(sys.modules['__main__']) is globals()
    assert type(pickle.loads(pickle.dumps(Pickled()))) is Pickled
    print(sys.argv, sys.path[0], len(sys.path), sys.excepthook is sys.__excepthook__)

atexit.register(show)
show()
names = dict(globals())
loader, spec = names.pop('__loader__'), names.pop('__spec__')
print(isinstance(loader, type) or type(loader), spec and (spec.name, spec.origin))
print({name: names[name] for name in sorted(names) if name[:2] == '__'})

def fail():
    raise ValueError('at the end')

fail()
"""


def same_as_python(*args, cwd, options=(), stdin=''):
    """Runs a program both ways and checks that all three results are the same."""
    plain = run_python(*options, *args, cwd=cwd, stdin=stdin)
    ours = run_python(*options, '-m', 'chainer_deform', *args, cwd=cwd, stdin=stdin)
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


@pytest.mark.parametrize(
    'form',
    ['above', 'folder', 'here', 'zip', 'pyc', 'other name', 'stdin', 'isolated zip'],
)
def test_forms_of_a_program(tmp_path, form):
    write(tmp_path / 'script.py', SHOWS)
    cwd = tmp_path / 'folder'
    write(cwd / '__main__.py', SHOWS)
    with zipfile.ZipFile(cwd / 'program.zip', 'w') as f:
        f.writestr('__main__.py', SHOWS)
    py_compile.compile(tmp_path / 'script.py', cwd / 'program.pyc', doraise=True)
    (cwd / 'bytecode').write_bytes((cwd / 'program.pyc').read_bytes())
    name, options, stdin = {
        'above': ('../script.py', (), ''),
        'folder': ('../folder', (), ''),
        'here': ('.', (), ''),
        'zip': ('program.zip', (), ''),
        'pyc': ('program.pyc', (), ''),
        'other name': ('bytecode', (), ''),
        'stdin': ('-', (), SHOWS),
        'isolated zip': ('program.zip', ('-I',), ''),
    }[form]
    result = same_as_python(
        name, 'x', '-m', cwd=cwd, options=[*options, '-X', 'utf8'], stdin=stdin
    )
    assert result.returncode == 1
    assert result.stderr.endswith('\nValueError: at the end\n')
    assert result.stdout.count(str([name, 'x', '-m'])) == 2


def test_module_that_fails(tmp_path):
    write(tmp_path / 'package/__init__.py', 'import sys\nprint(sys.argv)')
    write(tmp_path / 'package/module.py', SHOWS)
    result = same_as_python('-m', 'package.module', '-m', 'x', cwd=tmp_path)
    assert result.stderr.endswith('\nValueError: at the end\n')


@pytest.mark.parametrize(
    ('args', 'status', 'message'),
    [
        (['missing.py'], 2, "can't open file '.*missing.py': .Errno 2. No such file"),
        (['damaged.pyc'], 1, 'RuntimeError: Bad magic number in .pyc file'),
        (['package'], 1, "can't find '__main__' module in "),
        (['-m', 'missing'], 1, 'No module named missing'),
        (['-m', 'package'], 1, 'package.__main__.* cannot be directly executed'),
        (['-m', 'package.missing'], 1, 'No module named package.missing'),
        (['-m', 'package.wrong'], 1, 'SyntaxError: '),
        (['-m', 'package.right.py'], 1, "Try using 'package.right' instead"),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_what_cannot_be_run(tmp_path, args, status, message):
    write(tmp_path / 'package/__init__.py', '')
    write(tmp_path / 'package/right.py', '')
    write(tmp_path / 'package/wrong.py', 'x = = 1')
    (tmp_path / 'damaged.pyc').write_bytes(bytes(100))
    result = same_as_python(*args, cwd=tmp_path)
    assert result.returncode == status
    assert re.search(message, result.stderr)


@pytest.mark.parametrize(
    'host',
    [
        ['-m', 'cProfile', '-o', 'profile', '-m'],
        ['-m', 'trace', '--count', '-C', 'counts', '--module'],
    ],
    ids=['cProfile', 'trace'],
)
def test_under_a_host(tmp_path, host):
    write(
        tmp_path / 'script.py',
        """
        import sys
        import chainer.links as L

        assert vars(sys.modules['__main__']) is globals()
        print(L.DeformableConvolution2D.__module__, sys.argv)
        """,
    )
    result = run_python(*host, 'chainer_deform', 'script.py', 'x', cwd=tmp_path)
    expect_success(result)
    assert result.stdout.startswith(
        "chainer_deform.links.deformable_convolution_2d ['script.py', 'x']\n"
    )
    assert {path.name for path in tmp_path.iterdir()} > {'script.py'}


def test_a_host_goes_on_as_before(tmp_path):
    write(tmp_path / 'folder/script.py', 'raise ValueError(__name__)')
    write(
        tmp_path / 'host.py',
        """
        import runpy
        import sys

        sys.argv[:] = ['host', 'folder/script.py']
        before = sys.modules['__main__'], sys.argv[:], sys.path[:], sys.excepthook
        try:
            runpy.run_module('chainer_deform', run_name='__main__')
        except ValueError as e:
            assert str(e) == '__main__'
            assert e.__traceback__
        assert before == (sys.modules['__main__'], sys.argv, sys.path, sys.excepthook)
        assert before[0].runpy is runpy
        try:
            runpy.run_module('chainer_deform', run_name='__main__', alter_sys=True)
        except ValueError as e:
            assert str(e) == '__main__'
        raise KeyError('of the host')
        """,
    )
    result = run_python('-W', 'ignore::RuntimeWarning', 'host.py', cwd=tmp_path)
    assert result.returncode == 1
    assert 'host.py", line 18, in <module>' in result.stderr
    assert result.stderr.endswith("KeyError: 'of the host'\n")


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
    result = run_python('-m', 'chainer_deform', '-m', 'package', cwd=tmp_path)
    expect_success(result)
    assert 'package.module' in result.stdout


def test_unmodified_script_and_its_workers(tmp_path):
    """A worker process imports the script too, and must be repaired before it does."""
    write(
        tmp_path / 'script.py',
        '''
        import multiprocessing
        import os
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
            # As in a program that sets its own: what multiprocessing sends is enough.
            os.environ['PYTHONPATH'] = os.environ['PYTHONPATH'].partition(os.pathsep)[2]
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
    result = run_python('-m', 'chainer_deform', 'script.py', cwd=tmp_path)
    expect_success(result)
    assert 'spawn' in result.stdout.split()


def test_fork_server_that_imports_the_script(tmp_path):
    """As that of the newest Pythons does, unless told otherwise."""
    write(
        tmp_path / 'script.py',
        """
        import multiprocessing
        import os
        import chainer

        if __name__ == '__main__':
            os.environ['PYTHONPATH'] = os.environ['PYTHONPATH'].partition(os.pathsep)[2]
            multiprocessing.set_start_method('forkserver')
            with multiprocessing.Pool(1) as pool:
                print(pool.apply(chainer.as_array, [chainer.Variable()]))
        """,
    )
    result = run_python(
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
    expect_success(result)


@pytest.mark.parametrize(
    ('args', 'status', 'stdout', 'stderr'),
    [
        ([], 2, '', 'usage: python -m chainer_deform SCRIPT'),
        (['-m'], 2, '', 'usage: python -m chainer_deform SCRIPT'),
        (['--help'], 0, 'usage: python -m chainer_deform SCRIPT', ''),
        (['--verbose', 'script.py'], 2, '', 'usage: python -m chainer_deform SCRIPT'),
    ],
    ids=['nothing', 'no module', 'help', 'option'],
)
def test_command_line(tmp_path, args, status, stdout, stderr):
    result = run_python('-m', 'chainer_deform', *args, cwd=tmp_path)
    assert result.returncode == status
    for expected, actual in (stdout, result.stdout), (stderr, result.stderr):
        assert expected in actual if expected else not actual


def test_version(tmp_path):
    result = run_python('-m', 'chainer_deform', '--version', cwd=tmp_path)
    expect_success(result)
    assert result.stdout == (
        f'chainer_deform {chainer_deform.__version__}, '
        f'Chainer {chainer.__version__}, NumPy {numpy.__version__}\n'
    )
