"""``map`` over processes, with few results waiting at a time so that memory stays flat."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import TypeVar

import cv2
import torch

from esc_basicsr.common import signals as stopping
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import warn_once

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_PATIENCE = 5.0  # seconds


def parallel_map(
    function: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int
) -> Generator[_Result, None, None]:
    """Yield ``function(task)`` of each task, in the tasks' order. Close the generator to end its processes.

    Args:
        function: What a process does with a task; both can be pickled.
        tasks: Read only 2 * ``workers`` tasks ahead of what is given.
        workers: Processes. With 1 it all happens in this process.

    Raises:
        UserError: A process died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    pending: deque[Future[_Result]] = deque()
    # A forked worker would wait for threads that OpenCV or PyTorch had before.
    with ProcessPoolExecutor(workers, from_server(__name__), _start_worker) as pool:
        try:
            for task in tasks:
                # Raised while the pool starts a thread, they would keep it from ending.
                with stopping.held():
                    pending.append(pool.submit(function, task))
                if len(pending) > 2 * workers:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process died, perhaps for want of memory: use fewer than {workers} --workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _result(future: "Future[_Result]") -> _Result:
    """Wait for a result; warn of a worker that was stopped, for which there would be no end of waiting."""
    while True:
        try:
            return future.result(timeout=_PATIENCE)
        except FuturesTimeoutError:
            if future.done():  # the task's own error, or it was done just now
                return future.result()
        import psutil  # here, as data workers import this module, and need no more than they need

        for worker in multiprocessing.active_children():
            with contextlib.suppress(psutil.Error):
                if psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED:
                    warn_once(
                        f"Worker process {worker.pid} is stopped: 'kill -CONT {worker.pid}' lets it go on."
                    )


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)  # they were held while it was started
    end_with_main_process()
    torch.set_num_threads(1)  # each, as the workers fill the cores
    cv2.setNumThreads(1)


def from_server(*modules: str) -> BaseContext | None:
    """Return how workers start: from one server that has imported ``modules`` for all.

    A spawned worker has 0.3 GB of imported code for itself; workers of the server share its. Where systems
    have no such server it returns None, by which multiprocessing does as it does there.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["esc_basicsr.common.worker_server", *modules])
    return context


def end_with_main_process() -> None:
    """Let this worker end with its main process, which cannot end it when it is killed."""
    stopping.sent_with_parent(signal.SIGKILL)  # also while C code keeps the thread below from running
    main_process = multiprocessing.parent_process()
    if main_process is not None and not main_process.is_alive():  # it ended while this one was starting
        os._exit(1)

    def watch() -> None:
        if main_process is not None:
            main_process.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
