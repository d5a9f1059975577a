"""Python processes that are forked from a process which has imported the libraries, instead of being started.

The imports take seconds for each new interpreter. A server imports the libraries once and runs nothing, so that it has
one thread when it forks. It then forgets salun_sd, so that a child imports it under its own environment. A child does
what `python ARGS` does: exit codes, tracebacks and the effect of signals are Python's own. `subprocess` is for what
only a new interpreter shows: its imports, and another seed of hashes.
"""

import gc
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Thread

# Variables that libraries read when they are imported: each set of values has a server of its own.
AT_IMPORT = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "TQDM_", "OMP_", "MKL_", "OPENBLAS_", "PYTHON", "LD_")


class Process:
    """`python ARGS` in a forked process, with what tests use of subprocess.Popen.

    args: "-m" or "-c", a module or code, and its arguments.
    """

    def __init__(
        self, args: Sequence[str], *, stdout: int | None = None, stderr: int | None = None, cwd: Path | None = None,
        env: Mapping[str, str] | None = None, preexec_fn: Callable[[], object] | None = None,
    ):  # fmt: skip
        environment = dict(os.environ if env is None else env)
        at_import = sorted(item for item in environment.items() if item[0].startswith(AT_IMPORT))
        report, its_report = os.pipe()
        streams = []
        for number, wanted in ((1, stdout), (2, stderr)):
            streams.append(os.pipe() if wanted == subprocess.PIPE else (None, os.dup(number)))
        theirs = [its_report, *(write for _, write in streams)]
        request = pickle.dumps((list(args), os.fspath(cwd or os.getcwd()), environment, preexec_fn))
        socket.send_fds(_server(tuple(at_import)), [request], theirs)
        for fd in theirs:
            os.close(fd)
        self.args, self.returncode = list(args), None
        self.stdout, self.stderr = (None if read is None else open(read, encoding="utf-8") for read, _ in streams)
        self._report = open(report)
        self.pid = int(self._report.readline())

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended the process; None while it runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._report.readline())
            self._report.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it printed on stdout and stderr, each if it was piped, once it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        printed: dict = {self.stdout: None, self.stderr: None}
        readers = [Thread(target=_read, args=(stream, printed), daemon=True) for stream in printed if stream]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(deadline and max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(deadline and max(0, deadline - time.monotonic()))
        return printed[self.stdout], printed[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _read(stream, printed: dict) -> None:
    printed[stream] = stream.read()
    stream.close()


@cache
def _server(at_import: tuple[tuple[str, str], ...]) -> socket.socket:
    """The connection to a server whose libraries were imported under these variables."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(AT_IMPORT)}
    alone = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's BLAS would start its threads when it is imported
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        subprocess.Popen([sys.executable, __file__, str(its.fileno())], env=others | dict(at_import) | alone,
                         pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)  # fmt: skip
    return ours


def _import_all() -> None:
    """Import all modules of salun_sd, and with them the libraries; then forget those of salun_sd."""
    import pkgutil
    from importlib import import_module

    import salun_sd

    for module in pkgutil.walk_packages(salun_sd.__path__, "salun_sd."):
        if module.name != "salun_sd.__main__":
            import_module(module.name)
    import diffusers
    import torch.distributed.run  # noqa: F401

    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        getattr(diffusers, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "salun_sd"]:
        del sys.modules[name]


def _serve(control: socket.socket) -> tuple:
    """Fork a child for each request, until the client ends. Returns in each child, with its request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, which then lets go of the server
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            return _forked(request, *fds)
        for fd in fds:
            os.close(fd)


def _forked(request: bytes, report: int, *streams: int) -> tuple:
    """Fork again: the parent tells the client the child's pid and its end. Returns in the child, with the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the child takes it once it is ready to
    pid = os.fork()
    if pid:
        for fd in (*streams, 1, 2):
            os.close(fd)
        os.write(report, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(report)
    for fd, number in zip(streams, (1, 2), strict=True):
        os.dup2(fd, number)
        os.close(fd)
    # new ones, for the server's own still take their files for those it was started with
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    return pickle.loads(request)


if __name__ == "__main__":
    del sys.path[0]
    _import_all()
    gc.freeze()  # a child need not look at what is imported, nor copy it
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread"
    (_flag, _what, *_rest), _cwd, _environment, _before = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(_cwd)
    os.environ.clear()
    os.environ.update(_environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if _before:
        _before()
    sys.path.insert(0, _cwd if _flag == "-m" else "")
    sys.argv = [_flag, *_rest]
    if _flag == "-m":
        runpy.run_module(_what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(_what, "<string>", "exec"), {"__name__": "__main__"})
