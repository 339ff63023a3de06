"""The thread that owns the model: requests join the batch, grow and leave it while others do.

Samples share the rows of one `generation.Batch`. A free row goes in turns to a request that waits and to one that has
begun and has more choices than rows. Beam searches, the scoring of prompts and the probe of /health run on forks of
the model, one of each kind at a time and one step between two steps of the batch, so that a long one holds nobody up.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator

from smallgpt.generation import Batch
from smallgpt.jobs import JOBS, End, Event, Kind, Part, Request
from smallgpt.metrics import Metrics
from smallgpt.runtime import OrtGPT

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """So many requests wait already as may."""


class DrainingError(RuntimeError):
    """No new request is taken: the server is about to stop."""


class Scheduler:
    """Works off requests on `rows` rows of a model; up to `queue` more of them wait.

    The methods may be called from any thread.
    """

    def __init__(self, model: OrtGPT, *, rows: int = 16, queue: int = 256) -> None:
        self.model, self.rows, self.queue = model, rows, queue
        self.metrics = Metrics()
        self._forks = {kind: model.fork() for kind in JOBS}
        self._condition = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._cancelled: list[Request] = []
        self._running: set[Request] = set()
        self._jobs: dict[Kind, tuple[Request, Iterator[list[Event]]]] = {}
        self._feeding: deque[Request] = deque()  # started, with choices that wait for a row
        self._turn = True  # of a request that waits; else one that has started gets the next row
        self._draining = self._closed = False
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait, probes aside."""
        with self._condition:
            return sum(not request.probe for request in self._waiting)

    @property
    def running(self) -> int:
        """Number of requests in work, probes aside."""
        return sum(not request.probe for request in tuple(self._running))

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._condition:
            return not (self._waiting or self._running)

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. Raises QueueFullError and DrainingError."""
        with self._condition:
            if self._draining or self._closed:
                raise DrainingError("the server is stopping")
            if request.probe:
                self._waiting.appendleft(request)
            elif self.waiting >= self.queue:
                self.metrics.counts["requests_refused"] += 1
                raise QueueFullError(f"{self.queue} requests are waiting already")
            else:
                self._waiting.append(request)
            self._condition.notify()

    def cancel(self, request: Request) -> None:
        """Free what a request holds; nothing more is delivered but its End. Without effect after its End."""
        with self._condition:
            self._cancelled.append(request)
            self._condition.notify()

    def drain(self) -> None:
        """Finish what is there and refuse what comes. Safe in a signal handler."""
        self._draining = True

    def close(self) -> None:
        """Break off everything and end the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _new_batch(self) -> Batch:
        return Batch(self.model, self.rows, even=self.model.pairs, tolerant=True)

    def _run(self) -> None:
        while self._take():
            for kind, (request, job) in list(self._jobs.items()):
                try:
                    events = next(job)
                except StopIteration:
                    del self._jobs[kind]
                    self._after(kind, request)
                except Exception as error:
                    del self._jobs[kind]
                    self._fail(request, error)
                else:
                    request.events += events
                    if kind == "beams":
                        self._count(request, sum(len(event.tokens) for event in events if isinstance(event, Part)))
            if self._batch.busy:
                self._step()
            for request in [request for request in self._running if request.live and request.events]:
                self._deliver(request)
        for request in [*self._running, *self._waiting]:
            self._end(request, DrainingError("the server has stopped"))

    def _take(self) -> bool:
        """Wait for work, take cancelled requests out and let waiting ones start; False when closed."""
        with self._condition:
            while not (self._closed or self._waiting or self._running or self._cancelled):
                self._condition.wait()
            cancelled, self._cancelled = self._cancelled, []
            for request in cancelled:
                self._cancel(request)
            for request in list(self._waiting):
                if request.kind != "batch" and request.kind not in self._jobs:
                    self._waiting.remove(request)
                    self._start(request)
            self._fill()
            return not self._closed

    def _start(self, request: Request) -> None:
        self._running.add(request)
        self.metrics.counts["prompt_tokens"] += sum(map(len, request.prompts))
        if request.kind == "batch":
            self._join(request)
        else:
            self._jobs[request.kind] = (request, JOBS[request.kind](self._forks[request.kind], request))

    def _join(self, request: Request) -> None:
        """Let the choices of a request wait for rows."""
        request.rest.extend(range(len(request.prompts) * request.n))
        request.open, request.joined = set(request.rest), time.perf_counter()
        if not request.open:
            self._end(request)
        elif request.score:
            self._feeding.append(request)
        else:
            self._feeding.appendleft(request)  # its first choice gets the row that it was started for

    def _fill(self) -> None:
        """Give the free rows in turns to requests that wait and to choices of those that have started."""
        while self._batch.busy < self.rows:
            waiting = next((request for request in self._waiting if request.kind == "batch"), None)
            if waiting and (self._turn or not self._feeding) and len(self._feeding) < self.rows:
                self._waiting.remove(waiting)
                self._start(waiting)
            self._turn = not self._turn
            if self._feeding:
                self._feed(self._feeding.popleft())
            elif not waiting:
                break

    def _feed(self, request: Request) -> None:
        """Give the next choice of a request to the batch."""
        choice = request.rest.popleft()
        prompt, number = request.prompts[choice // request.n], choice % request.n
        try:
            self._batch.add(
                (request, choice),
                prompt,
                request.config,
                number=number,
                logprobs=request.logprobs,
                started=request.joined,
            )
        except Exception as error:
            self._end(request, error)
        else:
            if request.rest:
                self._feeding.append(request)

    def _after(self, kind: Kind, request: Request) -> None:
        """Go on with a request whose job is done."""
        if kind != "score":
            self._end(request)
        elif not request.config.max_new_tokens:
            request.events += [Part(i, finish="length") for i in range(len(request.prompts) * request.n)]
            self._end(request)
        else:
            self._join(request)

    def _step(self) -> None:
        begin = time.perf_counter()
        try:
            pieces = self._batch.step()
        except Exception as error:  # the rows are in an unknown state: everything in them is lost
            log.exception("the batch failed")
            self._batch = self._new_batch()
            for request in [request for request in self._running if len(request.open) > len(request.rest)]:
                self._end(request, error)
            return
        self.metrics.step.add(time.perf_counter() - begin)
        for piece in pieces:
            request, choice = piece.sequence
            if request not in self._running:  # another choice of it has failed
                continue
            if piece.error:
                self._fail(request, piece.error)
                continue
            tokens = () if piece.token is None else (piece.token,)
            logprob = None if piece.logprob is None else (piece.logprob, piece.top)
            request.events.append(Part(choice, piece.text, tokens, logprob, piece.finish))
            self._count(request, len(tokens))
            if piece.finish:
                request.open.discard(choice)
                if not request.open:
                    self._end(request)

    def _count(self, request: Request, tokens: int) -> None:
        self.metrics.counts["tokens"] += tokens
        if not request.started:
            request.started = True
            self.metrics.first_token.add(time.perf_counter() - request.submitted)

    def _cancel(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        elif request not in self._running:
            return
        for kind, (owner, _) in list(self._jobs.items()):
            if owner is request:
                del self._jobs[kind]
        request.events.clear()
        self._end(request, outcome="cancelled")

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, ValueError):  # not by what the caller asked for
            log.error("a request failed", exc_info=error)
        self._end(request, error)

    def _end(self, request: Request, error: Exception | None = None, outcome: str = "finished") -> None:
        for choice in request.open:
            self._batch.cancel((request, choice))
        self._running.discard(request)
        if request in self._feeding:
            self._feeding.remove(request)
        self.metrics.counts[f"requests_{'failed' if error else outcome}"] += not request.probe
        request.events.append(End(error))
        self._deliver(request)

    def _deliver(self, request: Request) -> None:
        events, request.events = request.events, []
        with contextlib.suppress(RuntimeError):  # an event loop that is closed
            request.deliver(events)
