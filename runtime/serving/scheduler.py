"""Who is computed now: requests of all callers as rows of one running batch (continuous batching).

No thread of its own is needed where callers block: whoever wants a chunk that is not there runs the next step for all,
while the others wait for what comes out of it. So a caller alone computes in its own thread, and a stream that nobody
reads costs nothing. For callers of asyncio, who must not block, a worker thread runs the steps.
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

    As many requests run at once as `decoder` has rows; the others wait in a `Queue`. Nothing ever waits for a reader: a
    stream that is not read on keeps its row, which goes on when another caller runs a step.
    """

    def __init__(
        self,
        decoder: Decoder,
        manifest: Manifest,
        tokenizer: Tokenizer,
        responses: ResponseCache | None,
        key_of: Callable[[Request], str],
    ) -> None:
        """decoder: this scheduler's from here on. key_of: of the response cache."""
        self._decoder = decoder
        self._manifest, self._tokenizer = manifest, tokenizer
        self._responses, self._key_of = responses, key_of
        self._running: dict[Row, Computation] = {}
        self._closed = False
        self._reset()
        watch_forks(self)

    def submit(self, request: Request, *, whole: bool = False, wake: Callable[[], None] = nobody) -> Listener:
        """Begin to answer a request: from the response cache, as another caller's share, or as a row of its own.

        Nothing is computed before somebody wants a chunk. whole, wake: as of `Listener`; where there is a `wake`, the
        worker computes. Raises: SettingsError, EngineClosedError.
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
        """Answer what nobody else computes from the response cache, or let it wait for a row.

        It can be joined before it is looked up, so that of equal requests at once only one is ever computed.
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
        """The next chunk of any of these, computing as long as there is none; None where all have ended.

        Raises: what a listener ended with, EngineBusyError from within a step.
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
        """The next chunk, if it is there; else see `listener.ended`. Raises: what it ended with."""
        with self._changed:
            found = first_ready([listener])
            self._changed.notify_all()  # the worker may compute on
            return None if found is None else found[1]

    def cancel(self, listeners: Sequence[Listener]) -> None:
        """Nobody wants the rest. Rows are free at once, or after the step that is running. May be done again."""
        with self._changed:
            for listener in listeners:
                if not listener.ended:
                    listener.cancel()
            everything = [*self._running.values(), *self._queue]
            if not any(computation.is_unwanted for computation in everything) or not self._driver.take():
                return
        self._release_rows()

    def counts(self) -> tuple[int, int]:
        """Requests that are computed now, and those that wait."""
        with self._changed:
            return len(self._running), len(self._queue)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End everything: requests that wait get EngineClosedError, streams too, after the step that is running; whole
        answers that are being computed are finished first. Calling it again does nothing.

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
        """The threads that computed are not in the child, nor is what they held."""
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

    # ---- with the lock

    def _has_work(self) -> bool:
        """Whether there is a step to run. Where there is none, a caller's request is being looked up."""
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
        """Let go of listeners that wait no longer, and of requests that nobody waits for before they began."""
        for computation in self._running.values():
            computation.drop_interrupted()
        self._queue.drop_interrupted()

    # ---- by the thread that drives, without the lock

    def _run_step(self) -> None:
        """Run one step for all, and stop driving."""
        try:
            self._admit()
            for row, event in self._decoder.advance():
                self._publish(row, event)
            self._release_rows()
        except BaseException as error:  # whatever it was, the rows may be in the middle of a step
            self._break(error)
            raise

    def _release_rows(self) -> None:
        """Free the rows that nobody wants, and stop driving."""
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
        """Give the listeners of a row what happened to it."""
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
        # Stored before it is forgotten, so that an equal request finds one or the other.
        if answer is not None and computation.key is not None and self._responses is not None:
            self._responses.put(computation.key, answer)
        with self._changed:
            self._queue.forget(computation)
            self._again(computation)
            self._changed.notify_all()

    def _again(self, computation: Computation) -> None:
        """Listeners who joined while the row was being interrupted want the rest: it is computed anew."""
        if computation.listeners:
            fresh = Computation(computation.request, computation.key, self._manifest, self._tokenizer)
            begun = [self._queue.join(listener, fresh) for listener in computation.listeners]
            if any(begun):
                self._queue.append(fresh)

    def _break(self, error: BaseException) -> None:
        """A step ended in the middle, by an interrupt or by a fault: no row can go on."""
        self._decoder.abandon()
        broken = list(self._running.values())
        with self._changed:
            failure = EngineError(f"a step was broken off ({type(error).__name__}: {error}): ask again")
            failure.__cause__ = error
            self._fail(broken, failure)
            self._running.clear()
            self._stop_driving()
