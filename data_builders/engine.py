"""Runs a pure stage over items, in order: here, in worker processes, or on a Ray cluster.

A stage is a class whose `run` turns one item into one result and depends on nothing else, so where
it runs cannot change the build. Results come back in the order of the items. On Ray (the extra
`ray`) the same stage is an actor of a Ray Data pipeline; annotation files and pictures must then be
reachable under the same paths on every node.
"""

import logging
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

from cogvlm_sft.errors import DataError, RecipeError


class WorkerDied(DataError):
    """A worker process was killed; what is finished stays, and building again goes on."""


class Stage(Protocol):
    """A unit of work that depends on its item alone."""

    def run(self, item: Any) -> Any:
        """The result of one item."""


Make = Callable[..., Stage]
Map = Callable[[Iterable[Any]], Iterator[Any]]
_stage: Stage | None = None


@contextmanager
def stage_map(
    engine: str, workers: int, make: Make, *given: Any, small: bool = False
) -> Iterator[Map]:
    """A function that maps items through a stage, in order.

    Args:
        engine: `local` or `ray`.
        workers: Processes, or Ray actors.
        make: The stage's class; called with `given` once in each worker.
        given: Arguments of `make`.
        small: Whether starting processes would cost more than they save; only for `local`.

    Raises:
        RecipeError: Ray is asked for and not installed.
        WorkerDied: A worker process died.
    """
    if engine == "ray":
        with _ray_map(workers, make, given) as over:
            yield over
    elif small or workers < 2:
        stage = make(*given)
        yield lambda items: (stage.run(item) for item in items)
    else:
        with _process_map(workers, make, given) as over:
            yield over


@contextmanager
def _process_map(workers: int, make: Make, given: tuple[Any, ...]) -> Iterator[Map]:
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(make, given)
    )

    def submit(item: Any) -> Future[Any]:
        # A task may start a worker. It inherits the blocked signal: Ctrl-C reaches every process,
        # the parent decides, and no worker dies of it, not even while it still imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(_work, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def over(items: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(submit(item))
            while len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield over
    except BrokenProcessPool:
        raise WorkerDied(
            "a worker process died, most likely for want of memory; build again to go on where it "
            "stopped, with fewer `workers`"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(make: Make, given: tuple[Any, ...]) -> None:
    global _stage
    threading.Thread(target=_follow_parent, daemon=True).start()
    _stage = make(*given)


def _follow_parent() -> None:
    """Ends this worker when its parent was killed: a pool's workers would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(item: Any) -> Any:
    assert _stage is not None
    return _stage.run(item)


class _RayActor:
    """A stage as Ray Data wants it: columns in, columns out, both of pickled values."""

    def __init__(self, make: Make, given: tuple[Any, ...]) -> None:
        self.stage = make(*given)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "place": batch["place"],
            "value": [pickle.dumps(self.stage.run(pickle.loads(v))) for v in batch["value"]],
        }


@contextmanager
def _ray_map(workers: int, make: Make, given: tuple[Any, ...]) -> Iterator[Map]:
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError:
        raise RecipeError(
            'engine ray needs the extra `ray`: pip install "cogvlm-sft[ray]"'
        ) from None
    started_here = not ray.is_initialized()
    if started_here:
        # An address in RAY_ADDRESS joins that cluster; without one Ray starts on this machine.
        alone = "RAY_ADDRESS" not in os.environ
        ray.init(
            num_cpus=workers if alone else None, include_dashboard=False if alone else None,
            log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True

    def over(items: Iterable[Any]) -> Iterator[Any]:
        rows = [{"place": n, "value": pickle.dumps(item)} for n, item in enumerate(items)]
        if not rows:
            return
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayActor, fn_constructor_args=(make, given), batch_size=1,
            compute=ActorPoolStrategy(size=workers),
        )  # fmt: skip
        for place, row in enumerate(done.iter_rows()):
            assert row["place"] == place, "Ray Data returned rows out of order"
            yield pickle.loads(row["value"])

    try:
        yield over
    finally:
        if started_here:
            ray.shutdown()
