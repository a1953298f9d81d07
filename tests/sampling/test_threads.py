"""The threads of the CPU path: each item is done once, whatever happens."""

import gc
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import numpy
import pytest

from chainer_deform.sampling import threads
from chainer_deform.sampling.threads import each, thread_count

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork')


class Together:
    """Work that goes on only when so many threads do some of it."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count)
        self.idents = set()

    def __call__(self, item):
        self.barrier.wait(20)
        self.idents.add(threading.get_ident())
        return item


def fail_to_start(monkeypatch, *numbers, error=RuntimeError):
    """Lets the starts of threads fail: those with the numbers, or all."""
    # The helpers of other tests are taken away.
    monkeypatch.setattr(threads, '_helpers', [])
    start, starts = threading.Thread.start, itertools.count()

    def start_or_fail(thread):
        if not numbers or next(starts) in numbers:
            raise error("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, 'start', start_or_fail)


def run_program(code, timeout=60):
    """Runs a program that prints what it did; it must neither hang nor complain."""
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        cwd=pathlib.Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (result.returncode, result.stderr) == (0, '')
    return result.stdout


def expect_exit(child, status=0):
    """Waits for a child process."""
    for _ in range(600):
        pid, found = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(found) == status
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail('the child hangs')


def fork():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Python's, of threads and forks
        return os.fork()


class TestEach:
    @pytest.mark.parametrize('count', [1, 2, 3, 50])
    @pytest.mark.parametrize('items', [0, 1, 2, 7])
    def test_results_in_order(self, count, items):
        begun = []

        def work(item):
            begun.append(item)
            time.sleep(0.002 * (item % 2))
            return item * item

        assert each(work, range(items), count) == [i * i for i in range(items)]
        assert sorted(begun) == list(range(items))

    @pytest.mark.parametrize('count', [2, 3])
    def test_threads_at_the_same_time(self, count):
        """As many as were asked for, and the caller is one of them."""
        for _ in range(3):
            together = Together(count)
            assert each(together, range(count), count) == list(range(count))
            assert len(together.idents) == count
            assert threading.get_ident() in together.idents

    def test_never_more_threads(self):
        running, most = set(), []

        def work(item):
            running.add(item)
            most.append(len(running))
            time.sleep(0.002)
            running.remove(item)

        each(work, range(12), 4)
        each(work, range(12), 2)
        assert max(most[12:]) <= 2

    def test_one_thread_is_the_caller(self, monkeypatch):
        fail_to_start(monkeypatch, error=AssertionError)
        idents = each(lambda _: threading.get_ident(), range(3), 1)
        assert set(idents) == {threading.get_ident()}

    def test_a_fast_thread_does_more(self):
        """Items are claimed one by one, in their order."""
        slow, others = threading.Event(), []

        def work(item):
            if item == 0:
                assert slow.wait(20)
            else:
                others.append(item)
            if item == 9:
                slow.set()

        each(work, range(10), 2)
        assert others == list(range(1, 10))

    def test_numpy_is_silent_in_all_threads(self):
        together = Together(2)

        def work(item):
            together(item)
            return numpy.float32(1e38) * numpy.float32(10) - numpy.float32(numpy.inf)

        with numpy.errstate(all='raise'):
            for count in 1, 2:
                together.barrier = threading.Barrier(count)
                assert numpy.isnan(each(work, range(2), count)).all()
            with pytest.raises(FloatingPointError):
                numpy.float32(1e38) * numpy.float32(10)

    def test_no_thread_stays_behind_each_call(self):
        each(Together(3), range(3), 3)
        before = threading.active_count()
        for _ in range(50):
            each(Together(3), range(3), 3)
        assert threading.active_count() <= before

    def test_nothing_is_kept(self):
        """Neither work nor items nor results, also where a helper came late."""

        class Thing:
            pass

        gc.collect()
        gc.disable()
        try:
            for i in range(200):
                work_of = Thing()
                results = each(lambda _, kept=work_of: kept, range(2), 2)
                kept = weakref.ref(work_of)
                del work_of, results
                end = time.monotonic() + 10
                while kept() is not None and time.monotonic() < end:
                    time.sleep(0.001)
                assert kept() is None, i
        finally:
            gc.enable()


class TestThreadsThatCannotBeHad:
    @pytest.mark.parametrize('error', [RuntimeError, MemoryError])
    @pytest.mark.parametrize('numbers', [(), (0,), (1,)])
    def test_each_item_is_done_once(self, numbers, error, monkeypatch):
        done = []
        with monkeypatch.context() as patch:
            fail_to_start(patch, *numbers, error=error)
            assert each(lambda i: done.append(i) or i, range(6), 3) == list(range(6))
            assert sorted(done) == list(range(6))
        # Threads can be had again.
        each(Together(2), range(2), 2)
        time.sleep(0.05)
        assert sorted(done) == list(range(6))

    def test_they_are_asked_for_again(self, monkeypatch):
        fail_to_start(monkeypatch, 0)
        each(lambda _: None, range(2), 2)
        each(Together(2), range(2), 2)

    def test_busy_helpers_are_not_waited_for(self, monkeypatch):
        """Calls of several threads share the helpers; each goes on alone."""
        monkeypatch.setattr(threads, '_helpers', [])
        entered, leave = threading.Barrier(3), threading.Event()

        def work(_):
            entered.wait(20)
            leave.wait(20)

        other = threading.Thread(target=each, args=(work, range(2), 2))
        other.start()
        entered.wait(20)
        idents = each(lambda i: threading.get_ident(), range(5), 2)
        assert set(idents) == {threading.get_ident()}
        # Another helper comes for a call that may have more.
        each(Together(2), range(4), 3)
        each(Together(2), range(2), 2)
        leave.set()
        other.join(20)


class TestExceptions:
    @pytest.mark.parametrize('in_caller', [True, False])
    @pytest.mark.parametrize('kind', [ValueError, KeyboardInterrupt])
    def test_is_raised_when_no_thread_works(self, in_caller, kind):
        together = threading.Barrier(2)
        begun, ended = [], []

        def work(item):
            begun.append(item)
            if item < 2:
                together.wait(20)
                if in_caller == (threading.current_thread() is caller):
                    raise kind('broken')
                time.sleep(0.05)
            ended.append(item)

        caller = threading.current_thread()
        with pytest.raises(kind, match='broken'):
            each(work, range(100), 2)
        begun_then = sorted(begun)
        assert len(ended) == len(begun) - 1 < 99
        time.sleep(0.02)
        assert sorted(begun) == begun_then
        each(Together(2), range(2), 2)

    def test_of_all_threads(self):
        together = threading.Barrier(3)

        def work(item):
            together.wait(20)
            raise ValueError(item)

        with pytest.raises(ValueError, match='[012]'):
            each(work, range(9), 3)

    def test_interrupt_at_any_instruction(self):
        """No thread works after the call, and the next call is as good as any."""
        running, begun = set(), []

        def work(item):
            begun.append(item)
            running.add(item)
            time.sleep(0.0005)
            running.discard(item)
            return item

        def trace(frame, event, _):
            if frame.f_code.co_filename != threads.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == 'opcode' and next(count) == at:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        def interrupted_call():
            sys.settrace(trace)
            try:
                results.append(each(work, range(4), 2))
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            still.append(set(running))
            begun_then = len(begun)
            time.sleep(0.001)
            still.append(begun[begun_then:])

        each(Together(2), range(2), 2)
        results, still = [], []
        for at in itertools.count():
            count = itertools.count()
            running.clear()
            # Tracing leaves something behind in its thread.
            caller = threading.Thread(target=interrupted_call)
            caller.start()
            caller.join(20)
            assert not any(still), at
            if results:
                break
        assert results == [list(range(4))]
        assert at > 100
        each(Together(2), range(2), 2)

    @pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='there is no timer')
    def test_interrupt_while_helpers_work(self):
        """They are waited for, also if the user is impatient."""
        ended = []

        def interrupt(*_):
            raise KeyboardInterrupt

        def work(item):
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.3)
                ended.append(item)
            else:
                while not ended:  # until the interrupt comes
                    time.sleep(0.001)

        each(Together(2), range(2), 2)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            with pytest.raises(KeyboardInterrupt):
                each(work, range(2), 2)
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert len(ended) == 1


class TestReentrance:
    def test_inside_of_work(self):
        def work(item):
            return each(lambda i: (item, i), range(3), 3)

        expected = [[(i, j) for j in range(3)] for i in range(4)]
        for _ in range(20):
            assert each(work, range(4), 2) == expected

    def test_several_callers(self):
        results = {}

        def call(name):
            for _ in range(100):
                results[name] = each(lambda i: (name, i), range(5), 3)
                assert results[name] == [(name, i) for i in range(5)]
            results[name] = 'done'

        callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert results == {i: 'done' for i in range(4)}

    @pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='there is no timer')
    def test_in_a_signal_handler(self):
        """Wherever it interrupts the main thread."""
        assert (
            run_program("""
import itertools, signal, time
from chainer_deform.sampling.threads import each
calls = itertools.count()
def handle(*_):
    assert each(lambda i: i + 1, range(4), 2) == [1, 2, 3, 4]
    next(calls)
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    assert each(lambda i: i, range(3), 2) == [0, 1, 2]
    each(lambda i: time.sleep(0.0005), range(3), 2)
signal.setitimer(signal.ITIMER_REAL, 0)
print('done', next(calls) > 100)
""")
            == 'done True\n'
        )


@needs_fork
class TestFork:
    def test_child_has_helpers_of_its_own(self):
        each(Together(2), range(2), 2)
        child = fork()
        if not child:
            try:
                each(Together(2), range(2), 2)
            except BaseException:
                os._exit(1)
            os._exit(0)
        expect_exit(child)

    def test_while_another_thread_is_inside(self):
        leave, entered = threading.Event(), threading.Barrier(3)

        def work(_):
            entered.wait(20)
            leave.wait(20)

        other = threading.Thread(target=each, args=(work, range(2), 2))
        other.start()
        entered.wait(20)
        child = fork()
        if not child:
            result = each(lambda i: i, range(5), 2)
            os._exit(0 if result == list(range(5)) else 1)
        leave.set()
        other.join(20)
        expect_exit(child)

    def test_inside_of_work(self):
        """The child cannot end the call: a part of the work is lost to it."""
        together, children = threading.Barrier(2), []

        def work(item):
            together.wait(20)
            if threading.current_thread() is caller:
                children.append(fork())
            else:
                time.sleep(0.2)

        caller, parent = threading.current_thread(), os.getpid()
        try:
            each(work, range(2), 2)
        except RuntimeError as error:
            os._exit(0 if 'forked' in str(error) else 1)
        except BaseException:
            os._exit(2)
        if os.getpid() != parent:
            os._exit(3)
        expect_exit(*children)

    def test_child_does_what_nobody_had_begun(self):
        def work(item):
            if item == 1:
                return fork()
            return item

        parent = os.getpid()
        try:
            results = each(work, range(3), 1)
        except BaseException:
            os._exit(2)
        if os.getpid() != parent:
            os._exit(0 if results == [0, 0, 2] else 1)
        expect_exit(results[1])


class TestExit:
    """The interpreter ends at once, and what it still calls is computed."""

    @pytest.mark.parametrize('idle', [True, False])
    def test_while_the_interpreter_ends(self, idle):
        """In a thread that outlives the main thread, and in atexit."""
        before = 'assert compute()' if idle else ''
        output = run_program(f"""
import atexit, os, threading
from chainer_deform.sampling.threads import each
def compute():
    return each(lambda i: i, range(4), 3) == [0, 1, 2, 3]
def in_thread():
    threading.main_thread().join()
    assert compute()
    os.write(1, b'thread ')
@atexit.register
def in_atexit():
    assert compute()
    os.write(1, b'atexit ')
{before}
threading.Thread(target=in_thread).start()
""")
        assert output.split() == ['thread', 'atexit']

    def test_while_a_daemon_computes(self):
        output = run_program("""
import threading, time
from chainer_deform.sampling.threads import each
def forever():
    while True:
        each(lambda i: time.sleep(0.001), range(4), 3)
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
print('end')
""")
        assert output == 'end\n'


class TestThreadCount:
    @pytest.fixture(autouse=True)
    def _three_cpus(self, monkeypatch):
        monkeypatch.setenv('OMP_NUM_THREADS', '')
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 5}, raising=False)

    @pytest.mark.parametrize(
        ('asked', 'expected'),
        [
            ('1', 1), ('7', 7), (' 4', 4), ('4 ', 4), ('04', 4), ('+4', 4),
            ('2,3', 2), ('2, 3', 2), ('0', 3), ('0,2', 3), ('2,x', 3), ('2,', 3),
            ('-1', 3), ('x', 3), ('', 3), (' ', 3), ('1.5', 3), ('4 4', 3),
            ('9' * 5000, 3),
        ],
    )  # fmt: skip
    def test_asked_for(self, asked, expected, monkeypatch, tmp_path):
        monkeypatch.setenv('OMP_NUM_THREADS', asked)
        assert thread_count(str(tmp_path)) == expected

    def test_cpus(self, monkeypatch, tmp_path):
        monkeypatch.delenv('OMP_NUM_THREADS')
        assert thread_count(str(tmp_path)) == 3
        monkeypatch.delattr(os, 'sched_getaffinity')
        monkeypatch.setattr(os, 'cpu_count', lambda: 7)
        assert thread_count(str(tmp_path)) == 7
        monkeypatch.setattr(os, 'cpu_count', lambda: None)
        assert thread_count(str(tmp_path)) == 1

    @pytest.mark.parametrize(
        ('group', 'files', 'expected'),
        [
            # Version 2: in the group, in an ancestor, in the root of a container.
            ('0::/a/b', {'a/b/cpu.max': '200000 100000'}, 2),
            ('0::/a/b', {'a/b/cpu.max': '150000 100000'}, 2),
            ('0::/a/b', {'a/b/cpu.max': '1000 100000'}, 1),
            ('0::/a/b', {'a/b/cpu.max': 'max 100000', 'a/cpu.max': '9 10'}, 1),
            ('0::/a/b', {'a/b/cpu.max': '3 1', 'a/cpu.max': '2 1'}, 2),
            ('0::/a/b', {'cpu.max': '100000 100000'}, 1),
            ('0::/../a', {'a/cpu.max': '2 1'}, 2),
            ('0::/', {'cpu.max': '2 1'}, 2),
            ('0::/', {'unified/cpu.max': '2 1'}, 2),
            ('0::/', {'cpu.max': '9 1'}, 3),
            # Not this process's group.
            ('0::/a', {'b/cpu.max': '1 1'}, 3),
            # What cannot be read is left out.
            ('0::/', {'cpu.max': ''}, 3),
            ('0::/', {'cpu.max': '1 0'}, 3),
            ('0::/', {'cpu.max': 'one two'}, 3),
            ('0::/', {'cpu.max/folder': ''}, 3),
            ('0', {'cpu.max': '9 1'}, 3),
            (None, {'cpu.max': '1 1'}, 3),
            # Version 1.
            (
                '4:cpu,cpuacct:/a\n2:memory:/m',
                {'cpu,cpuacct/a/cpu.cfs_quota_us': '150000',
                 'cpu,cpuacct/a/cpu.cfs_period_us': '100000'},
                2,
            ),
            (
                '4:cpuacct,cpu:/a',
                {'cpu/cpu.cfs_quota_us': '1', 'cpu/cpu.cfs_period_us': '100000'},
                1,
            ),
            (
                '4:cpu:/a',
                {'cpu/a/cpu.cfs_quota_us': '-1', 'cpu/a/cpu.cfs_period_us': '100000'},
                3,
            ),
            (
                '4:cpuset:/a',
                {'cpuset/a/cpu.cfs_quota_us': '1', 'cpuset/a/cpu.cfs_period_us': '1'},
                3,
            ),
        ],
    )  # fmt: skip
    def test_quota(self, group, files, expected, tmp_path):
        if group is not None:
            (tmp_path / 'proc/self').mkdir(parents=True)
            (tmp_path / 'proc/self/cgroup').write_text(group + '\n')
        for name, content in files.items():
            path = tmp_path / 'sys/fs/cgroup' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + '\n')
        assert thread_count(str(tmp_path)) == expected

    def test_is_cheap(self):
        """It is called in each forward pass."""
        thread_count()
        start = time.perf_counter()
        for _ in range(100):
            thread_count()
        assert time.perf_counter() - start < 0.02
