"""One running answer, for all callers who made the same request at the same time."""

from __future__ import annotations

from ..bundle.manifest import Manifest
from ..caches.responses.answers import CachedAnswer
from ..errors import EdgelmError
from ..results import Chunk
from ..text.tokenizer import Tokenizer
from .answer import Answer, Request
from .listener import Listener


class Computation:
    """A request's row, its answer, and its listeners. Equal requests share one computation (single flight).

    It continues as long as one listener wants it. Hold the scheduler's lock for every call except `add`.
    """

    def __init__(self, request: Request, key: str | None, manifest: Manifest, tokenizer: Tokenizer) -> None:
        """key: of the response cache; None if the answer is not shared. Raises: SettingsError."""
        self.request, self.key = request, key
        self.listeners: list[Listener] = []
        self.passed_over = 0
        self._answer = Answer(request, manifest, tokenizer)
        self._chunks: list[Chunk] = []
        self.row = self._answer.row(self._interrupted, self._seconds_left)

    @property
    def is_unwanted(self) -> bool:
        """Whether all listeners have ended."""
        return all(listener.ended for listener in self.listeners)

    def join(self, listener: Listener) -> None:
        """Add a listener. It gets the chunks so far and those that follow."""
        listener.shared = bool(self.listeners)
        self.listeners.append(listener)
        self.publish_progress()
        listener.receive(self._chunks)

    def add(self, token: int) -> Chunk | None:
        """Add the row's next token. Returns the chunk that it completes, or None. Sets `row.ended`."""
        chunk = self._answer.add(token)
        self.row.ended = self._answer.ended
        return chunk

    def publish(self, chunk: Chunk) -> None:
        """Give a chunk to all listeners."""
        self._chunks.append(chunk)
        for listener in self.listeners:
            listener.receive(self._chunks)

    def publish_progress(self) -> None:
        """Tell all listeners how much of the prompt is fed."""
        total = len(self.request.token_ids)
        done = total if self.row.chosen else min(self.row.fed, total)
        for listener in self.listeners:
            listener.reused, listener.progress = self.row.reused, (done, total)

    def finish(self) -> CachedAnswer | None:
        """Publish the last chunk, after the row ended. Returns: the answer for the response cache, None if it is
        incomplete.

        Listeners who joined while the row was being interrupted stay in `listeners`: they want the rest.
        """
        last = self._answer.finish(self.row.reused)
        late = last.finish_reason == "deadline"
        left = [item for item in self.listeners if late and not item.request.interrupted()]
        self.listeners = [item for item in self.listeners if item not in left]
        self.publish(last)
        self.listeners = left
        if last.finish_reason is None or last.finish_reason == "deadline":
            return None
        return CachedAnswer(tuple((chunk.text, chunk.token_ids) for chunk in self._chunks), last.finish_reason)

    def fail(self, error: EdgelmError) -> None:
        """End all listeners with an error."""
        for listener in self.listeners:
            listener.end(error)
        self.listeners = []

    def drop_interrupted(self) -> None:
        """Remove interrupted listeners. The last one stays until the row ends."""
        for listener in [item for item in self.listeners if item.request.interrupted()]:
            if listener.request.cancelled.is_set():
                self.listeners.remove(listener)
            elif len(self.listeners) > 1:
                self.listeners.remove(listener)
                listener.expire()
        if self.listeners:
            self.listeners[0].shared = False

    def _interrupted(self) -> bool:
        return all(listener.request.interrupted() for listener in self.listeners)

    def _seconds_left(self) -> float | None:
        """The longest time that any listener still waits."""
        left = [listener.request.seconds_left() for listener in self.listeners]
        if None in left:
            return None
        return max((seconds for seconds in left if seconds is not None), default=0.0)
