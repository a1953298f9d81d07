"""A file is written beside its place and moved there when it is complete."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from chainer_deform import _files
from chainer_deform._files import replacing
from tests.programs import environment

posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has none of it')

#: Writes something to the file that is named, says so, and waits.
WRITER = """
import sys
from chainer_deform._files import replacing

with replacing(sys.argv[1]) as f:
    f.write(b'half')
    f.flush()
    print('written', flush=True)
    sys.stdin.readline()
"""


def write(path, content=b'new'):
    with replacing(path) as f:
        f.write(content)


def write_and_raise(path, error):
    with replacing(path) as f:
        f.write(b'in the buffer')
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def start_writer():
    """Starts processes that are in the middle of writing a file."""
    writers = []

    def start(path):
        writer = subprocess.Popen(
            [sys.executable, '-c', WRITER, str(path)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        writers.append(writer)
        assert writer.stdout.readline() == 'written\n'
        return writer

    yield start
    for writer in writers:
        writer.kill()
        writer.communicate()


@pytest.mark.parametrize('kind', [str, os.fsencode, lambda path: path])
def test_new_and_old_file(tmp_path, kind):
    path = tmp_path / 'file'
    for content in b'first', b'', bytes(2**20):
        write(kind(path), content)
        assert path.read_bytes() == content
        assert names(tmp_path) == ['file']


def test_relative_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('file')
    assert names(tmp_path) == ['file']


def test_the_old_file_is_there_to_the_end(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    with replacing(path) as f:
        f.write(b'new')
        f.flush()
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new'


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('old', [True, False])
def test_nothing_changes_after_an_error(tmp_path, error, old):
    path = tmp_path / 'file'
    if old:
        path.write_bytes(b'old')
    with pytest.raises(error, match='mine'):
        write_and_raise(path, error('mine'))
    assert names(tmp_path) == ['file'] * old
    assert not old or path.read_bytes() == b'old'


@posix
@pytest.mark.parametrize('step', ['fsync', 'replace', 'fchmod'])
def test_a_step_that_fails(tmp_path, monkeypatch, step):
    def fails(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / 'file'
    path.write_bytes(b'old')
    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match='Input/output') as e:
        write(path)
    assert e.value.filename == str(path)
    assert names(tmp_path) == ['file']
    assert path.read_bytes() == b'old'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no full device')
def test_full_disk(tmp_path, monkeypatch):
    """The error names the target, and an interrupt isn't hidden by a second error."""
    create = _files._create

    def on_a_full_disk(part, mode):
        create(part, mode).close()
        return open('/dev/full', 'wb')  # noqa: SIM115

    monkeypatch.setattr(_files, '_create', on_a_full_disk)
    with pytest.raises(OSError, match='No space left') as e:
        write(tmp_path / 'file')
    assert e.value.filename == str(tmp_path / 'file')
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path / 'file', KeyboardInterrupt())
    assert names(tmp_path) == []


def test_errors_name_the_target(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        write(tmp_path / 'missing' / 'file')
    assert e.value.filename == str(tmp_path / 'missing' / 'file')
    with pytest.raises(OSError, match='File name too long') as e:
        write(tmp_path / ('x' * 256))
    assert e.value.filename == str(tmp_path / ('x' * 256))
    # Other errors keep what they name.
    with pytest.raises(FileNotFoundError) as e, replacing(tmp_path / 'file'):
        open(tmp_path / 'other')  # noqa: SIM115
    assert e.value.filename == str(tmp_path / 'other')
    assert names(tmp_path) == []


@pytest.mark.parametrize('length', [255, 254])
def test_long_name(tmp_path, length):
    path = tmp_path / ('x' * length)
    for content in b'old', b'new':
        write(path, content)
    assert path.read_bytes() == b'new'
    assert names(tmp_path) == [path.name]


@posix
@pytest.mark.parametrize('mask', [0o022, 0o027, 0o077])
def test_mode_of_a_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / 'file')
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / 'file').st_mode) == 0o666 & ~mask


@posix
@pytest.mark.parametrize('mode', [0o600, 0o640, 0o666, 0o444, 0o755])
def test_mode_of_an_old_file(tmp_path, mode):
    path = tmp_path / 'file'
    path.touch()
    path.chmod(mode)
    with replacing(path) as f:
        # Until it is complete, others see nothing of what may not be for them.
        assert stat.S_IMODE(os.fstat(f.fileno()).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path).st_mode) == mode


@posix
@pytest.mark.parametrize('old', [True, False])
def test_a_link_stays_a_link(tmp_path, old):
    target = tmp_path / 'folder' / 'target'
    target.parent.mkdir()
    if old:
        target.write_bytes(b'old')
        target.chmod(0o600)
    (tmp_path / 'link').symlink_to('other')
    (tmp_path / 'other').symlink_to('folder/target')
    write(tmp_path / 'link')
    assert target.read_bytes() == b'new'
    assert os.readlink(tmp_path / 'link') == 'other'
    assert names(tmp_path) == ['folder', 'link', 'other']
    assert names(target.parent) == ['target']
    assert not old or stat.S_IMODE(target.stat().st_mode) == 0o600


def refused(path, match):
    with pytest.raises(OSError, match=match) as e:
        write(path)
    assert e.value.filename == os.fspath(path)


def test_folder_is_refused(tmp_path):
    (tmp_path / 'folder').mkdir()
    refused(tmp_path / 'folder', 'there is a folder')
    refused(f'{tmp_path}/folder/', 'there is a folder')
    refused(f'{tmp_path}/missing/', 'No such file')
    refused('', 'No such file')
    assert names(tmp_path) == ['folder']
    assert names(tmp_path / 'folder') == []


@posix
def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo('fifo')
    os.symlink('fifo', 'link')
    os.symlink('loop', 'loop')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind('socket')
    before = names(tmp_path)
    refused('fifo', 'there is a fifo, not a regular file')
    refused('link', 'there is a fifo')
    refused('loop', 'symbolic links')
    refused('socket', 'there is a socket')
    refused('/dev/null', 'there is a device')
    assert names(tmp_path) == before
    assert stat.S_ISFIFO(os.stat('fifo').st_mode)


@posix
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Even by somebody who guesses the random part of the name."""
    (tmp_path / 'victim').write_bytes(b'precious')
    with replacing(tmp_path / 'file') as f:
        name = f.name
    assert os.path.dirname(name) == str(tmp_path)
    token = name.split('.')[-2]
    assert int(token, 16).bit_length() > 32
    os.symlink('victim', name)
    monkeypatch.setattr(_files.secrets, 'token_hex', lambda count: token)
    refused(tmp_path / 'file', 'File exists')
    assert (tmp_path / 'victim').read_bytes() == b'precious'


def test_names_differ(tmp_path):
    found = set()
    for _ in range(3):
        with replacing(tmp_path / 'file') as f:
            found.add(f.name)
    assert len(found) == 3


@posix
def test_leftovers_of_killed_writers(tmp_path, start_writer):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    killed = start_writer(path)
    living = start_writer(path)
    other = start_writer(tmp_path / 'other')
    assert len(names(tmp_path)) == 4
    for writer in killed, other:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert path.read_bytes() == b'old'
    assert len(names(tmp_path)) == 4

    write(path)
    assert names(tmp_path)[-1] == 'file'
    assert (
        len(names(tmp_path)) == 3
    )  # and those of the living one and of the other file
    write(tmp_path / 'other')
    assert names(tmp_path)[-2:] == ['file', 'other']
    assert len(names(tmp_path)) == 3
    living.communicate('\n')
    assert living.returncode == 0
    assert names(tmp_path) == ['file', 'other']


@posix
def test_a_living_writer_finishes(tmp_path, start_writer):
    path = tmp_path / 'file'
    writer = start_writer(path)
    with replacing(path) as f:
        f.write(b'inner')
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b'inner'
    writer.communicate('\n')
    assert writer.returncode == 0
    assert path.read_bytes() == b'half'
    assert names(tmp_path) == ['file']


def test_two_writers_in_a_process(tmp_path):
    path = tmp_path / 'file'
    with replacing(path) as outer:
        outer.write(b'outer')
        write(path, b'inner')
        assert path.read_bytes() == b'inner'
    assert path.read_bytes() == b'outer'
    assert names(tmp_path) == ['file']


@posix
@pytest.mark.parametrize('moment', ['before the lock', 'while it is locked'])
def test_a_new_file_is_taken_for_a_leftover(tmp_path, monkeypatch, moment):
    """Another process comes between the creation of a file and its lock."""
    flock = _files.fcntl.flock
    calls = []

    def interrupted(file, how):
        calls.append(file)
        if len(calls) == 1:
            os.unlink(file.name)
            if moment == 'while it is locked':
                raise BlockingIOError(errno.EWOULDBLOCK, 'locked')
        flock(file, how)

    monkeypatch.setattr(_files.fcntl, 'flock', interrupted)
    write(tmp_path / 'file')
    assert len(calls) == 2
    assert names(tmp_path) == ['file']
    assert (tmp_path / 'file').read_bytes() == b'new'


@posix
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fails(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_files.fcntl, 'flock', fails)
    with replacing(tmp_path / 'file') as outer:
        outer.write(b'outer')
        write(tmp_path / 'file', b'inner')
    assert names(tmp_path) == ['file']
    assert (tmp_path / 'file').read_bytes() == b'outer'


@posix
def test_only_files_are_taken_for_leftovers(tmp_path):
    with replacing(tmp_path / 'file') as f:
        start = f.name.rsplit('.', 2)[0]
    os.mkfifo(f'{start}.1.part')
    os.mkdir(f'{start}.2.part')
    (tmp_path / 'victim').touch()
    os.symlink('victim', f'{start}.3.part')
    before = names(tmp_path)
    write(tmp_path / 'file')
    assert names(tmp_path) == before


@posix
def test_it_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """And its new name is on disk at the end."""
    fsync, replace, steps = os.fsync, os.replace, []

    def noted_fsync(descriptor):
        status = os.fstat(descriptor)
        steps.append('folder' if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    def noted_replace(*args):
        steps.append('replace')
        replace(*args)

    monkeypatch.setattr(os, 'fsync', noted_fsync)
    monkeypatch.setattr(os, 'replace', noted_replace)
    write(tmp_path / 'file', b'12345')
    assert steps == [5, 'replace', 'folder']


def test_as_on_windows(tmp_path, monkeypatch):
    """No locks, modes or folders to flush; an open file can't be renamed."""
    replace, open_files = os.replace, []
    create = _files._create

    def noted_create(part, mode):
        open_files.append(create(part, mode))
        return open_files[-1]

    def strict_replace(part, target):
        assert all(file.closed for file in open_files)
        replace(part, target)

    monkeypatch.setattr(_files, 'fcntl', None)
    monkeypatch.setattr(_files, '_create', noted_create)
    monkeypatch.setattr(os, 'replace', strict_replace)
    monkeypatch.delattr(os, 'fchmod', raising=False)
    monkeypatch.delattr(os, 'O_DIRECTORY', raising=False)
    for content in b'old', b'new':
        write(tmp_path / 'file', content)
        assert (tmp_path / 'file').read_bytes() == content
    with replacing(tmp_path / 'file') as f:
        start = f.name.rsplit('.', 2)[0]
    open(f'{start}.1.part', 'wb').close()
    write(tmp_path / 'file')
    assert names(tmp_path) == ['file']
