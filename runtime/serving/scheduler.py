"""Runs the requests of all callers as rows of one batch (continuous batching).

Blocking callers need no extra thread: a caller that wants a chunk that is not there yet runs the next step for all,
while the others wait for its results. So a single caller computes in its own thread, and a stream that nobody reads
costs nothing. For callers from asyncio, who must not block, a worker thread runs the steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..bundle.manifest import Manifest
from ..caches.responses.cache import ResponseCache
from ..decoding.decoder import Decoder
from ..decoding.row import Row
from ..errors import EdgelmError, EngineClosedError, EngineError
from ..host.forks import watch_forks
from ..results import Chunk
from ..text.tokenizer import Tokenizer
from .answer import Request, replay
from .computation import Computation
from .driver import Driver
from .listener import Listener, first_ready, nobody
from .queue import Queue
from .worker import Worker


class Scheduler:
    """The requests of one engine. Safe between threads; a forked child has none of its parent's requests.

    As many requests run at once as `decoder` has rows; the others wait in a `Queue`. Nothing waits for a slow reader: a
    stream that is not read keeps its row, and the row continues whenever another caller runs a step.
    """

    def __init__(
        self,
        decoder: Decoder,
        manifest: Manifest,
        tokenizer: Tokenizer,
        responses: ResponseCache | None,
        key_of: Callable[[Request], str],
    ) -> None:
        """decoder: from now on used by this scheduler alone. key_of: gives a request's key in the response cache."""
        self._decoder = decoder
        self._manifest, self._tokenizer = manifest, tokenizer
        self._responses, self._key_of = responses, key_of
        self._running: dict[Row, Computation] = {}
        self._closed = False
        self._reset()
        watch_forks(self)

    def submit(self, request: Request, *, whole: bool = False, wake: Callable[[], None] = nobody) -> Listener:
        """Begin to answer a request: from the response cache, from an equal request's answer, or in a row of its own.

        Nothing is computed before somebody wants a chunk. whole, wake: as of `Listener`; with a `wake`, the worker
        thread computes. Raises: SettingsError, EngineClosedError.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed: load the bundle again")
        listener = Listener(request, whole=whole, wake=wake)
        shared = self._responses is not None and request.settings.cacheable
        fresh = Computation(request, self._key_of(request) if shared else None, self._manifest, self._tokenizer)
        with self._changed:
            begun = self._queue.join(listener, fresh)
            if wake is not nobody:
                self._worker.serve(listener)
            self._changed.notify_all()
        if begun:
            try:
                self._begin(fresh)
            except BaseException as error:  # others may have joined it
                with self._changed:
                    self._fail([fresh], EngineError(f"a request was broken off ({type(error).__name__}): ask again"))
                    self._changed.notify_all()
                raise
        return listener

    def _begin(self, fresh: Computation) -> None:
        """Answer a new computation from the response cache, or put it into the queue.

        It can be joined before the lookup, so that of equal requests at the same time only one is computed.
        """
        known = None
        if fresh.key is not None and self._responses is not None:
            known = self._responses.get(fresh.key)
        with self._changed:
            if self._closed:
                self._fail([fresh], EngineClosedError("the engine was closed while this request was made"))
            elif known is None:
                self._queue.append(fresh)
            else:
                self._queue.forget(fresh)
                for listener in fresh.listeners:
                    listener.progress = (len(listener.request.token_ids),) * 2
                    listener.receive(list(replay(listener.request, known)))
            self._changed.notify_all()

    def next(self, listeners: Sequence[Listener]) -> tuple[Listener, Chunk] | None:
        """The next chunk of any of these listeners. Runs steps until there is one. None if all have ended.

        Raises: the error of a listener; EngineBusyError from within a step.
        """
        while True:
            with self._changed:
                found = first_ready(listeners)
                if found is not None:
                    return found
                if all(listener.ended for listener in listeners):
                    return None
                if not self._has_work() or not self._driver.take():
                    self._changed.wait()
                    continue
            self._run_step()

    def ready(self, listener: Listener) -> Chunk | None:
        """The next chunk, or None if there is none yet or the listener has ended. Never waits. Raises: the listener's
        error."""
        with self._changed:
            found = first_ready([listener])
            self._changed.notify_all()  # the worker may continue
            return None if found is None else found[1]

    def cancel(self, listeners: Sequence[Listener]) -> None:
        """Drop the rest of these answers. Their rows are free at once, or after the step that is running. May be
        repeated."""
        with self._changed:
            for listener in listeners:
                if not listener.ended:
                    listener.cancel()
            everything = [*self._running.values(), *self._queue]
            if not any(computation.is_unwanted for computation in everything) or not self._driver.take():
                return
        self._release_rows()

    def counts(self) -> tuple[int, int]:
        """The numbers of running and of waiting requests."""
        with self._changed:
            return len(self._running), len(self._queue)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End all requests, after the step that is running. Whole answers that are being computed are finished first;
        streams and waiting requests get EngineClosedError. Calling it again does nothing.

        Raises: EngineBusyError from within a step.
        """
        with self._changed:
            self._driver.refuse_own()
            self._closed = True
            self._fail(list(self._queue), EngineClosedError("the engine was closed while this request waited"))
            while any(item.whole and not item.ended for each in self._running.values() for item in each.listeners):
                self._changed.notify_all()
                self._changed.wait()
            while not self._driver.take():
                self._changed.wait()
            rest = list(self._running.values())
        for computation in rest:
            self._decoder.drop(computation.row)
        with self._changed:
            self._fail(rest, EngineClosedError("the engine was closed while this answer was computed"))
            self._running.clear()
            self._stop_driving()
        self._worker.stop()

    def after_fork(self) -> None:
        """Start empty in a child: the threads that computed are only in the parent."""
        waiting = [*self._running.values(), *self._queue]
        for computation in self._running.values():
            self._decoder.drop(computation.row)
        self._running.clear()
        self._worker.forget()
        self._reset()
        self._fail(waiting, EngineError("the process was forked while this answer was computed: ask again"))

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._queue = Queue()
        self._driver = Driver()
        self._worker = Worker(self._changed, lambda: self._has_work() and self._driver.take(), self._run_step)

    # ---- the caller holds the lock

    def _has_work(self) -> bool:
        """Whether there is a step to run. There is none while the only request is being looked up in the response
        cache."""
        self._driver.refuse_own()
        return bool(self._running or self._queue)

    def _stop_driving(self) -> None:
        self._driver.give_up()
        self._changed.notify_all()

    def _fail(self, computations: Sequence[Computation], error: EdgelmError) -> None:
        for computation in list(computations):
            self._queue.forget(computation)
            computation.fail(error)
            self._queue.remove(computation)

    def _drop_interrupted(self) -> None:
        """Drop interrupted listeners, and requests that were interrupted before they began."""
        for computation in self._running.values():
            computation.drop_interrupted()
        self._queue.drop_interrupted()

    # ---- the caller is the driver, and does not hold the lock

    def _run_step(self) -> None:
        """Run one step for all rows, and stop being the driver."""
        try:
            self._admit()
            for row, event in self._decoder.advance():
                self._publish(row, event)
            self._release_rows()
        except BaseException as error:  # after any error the rows may be in the middle of a step
            self._break(error)
            raise

    def _release_rows(self) -> None:
        """Free rows without listeners, and stop being the driver."""
        while True:
            with self._changed:
                self._drop_interrupted()
                unwanted = [item for item in self._running.values() if not item.listeners]
                if not unwanted:
                    for computation in self._running.values():
                        if computation.row.chosen <= 1:
                            computation.publish_progress()
                    self._stop_driving()
                    return
                for computation in unwanted:
                    del self._running[computation.row]
                    self._queue.forget(computation)
            for computation in unwanted:
                self._decoder.drop(computation.row)

    def _admit(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    return
                self._drop_interrupted()
                computation = self._queue.take(self._decoder.has_place)
                if computation is None:
                    return
                self._running[computation.row] = computation
            try:
                self._decoder.admit(computation.row)
            except EdgelmError as error:
                self._publish(computation.row, error)

    def _publish(self, row: Row, event: int | EdgelmError | None) -> None:
        """Pass an event of a row on to its listeners."""
        computation = self._running[row]
        if isinstance(event, int):
            chunk = computation.add(event)
            if chunk is not None:
                with self._changed:
                    computation.publish(chunk)
                    self._changed.notify_all()
            return
        with self._changed:
            del self._running[row]
            computation.publish_progress()
            answer = None
            if event is None:
                answer = computation.finish()
            else:
                computation.fail(event)
            if answer is None:
                self._queue.forget(computation)
        # Store the answer before forgetting the computation, so that an equal request always finds one of them.
        if answer is not None and computation.key is not None and self._responses is not None:
            self._responses.put(computation.key, answer)
        with self._changed:
            self._queue.forget(computation)
            self._again(computation)
            self._changed.notify_all()

    def _again(self, computation: Computation) -> None:
        """Compute again for listeners who joined while the row was being interrupted."""
        if computation.listeners:
            fresh = Computation(computation.request, computation.key, self._manifest, self._tokenizer)
            begun = [self._queue.join(listener, fresh) for listener in computation.listeners]
            if any(begun):
                self._queue.append(fresh)

    def _break(self, error: BaseException) -> None:
        """Fail all rows after a step was broken off by an interrupt or an unexpected error."""
        self._decoder.abandon()
        broken = list(self._running.values())
        with self._changed:
            failure = EngineError(f"a step was broken off ({type(error).__name__}: {error}): ask again")
            failure.__cause__ = error
            self._fail(broken, failure)
            self._running.clear()
            self._stop_driving()
