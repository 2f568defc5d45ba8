"""Where the whole demo stands, in one line; imports nothing, so that it can speak while PyTorch is loaded."""

import threading
import time
from collections import deque


class Progress:
    """
    A line about the stage that runs and the time left, at each step and, where a stage has no steps, by the clock.

    Args:
        stream: the terminal (one line, overwritten) or a file (a line at least every `SILENCE` seconds).
        plan (`dict[str, float]`): the stages in order, with the seconds each took on one core of a quiet machine.
            What this machine, with what else it does, needs more than that is told from the last minute.
    """

    SILENCE = 8.0
    WINDOW = 60.0

    def __init__(self, stream, plan: dict[str, float]):
        self.stream, self.plan, self.seconds = stream, plan, {}
        self._interval = 0.5 if stream.isatty() else self.SILENCE
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._stage, self._started, self._shown, self._fraction, self._detail = None, 0.0, 0.0, None, ""
        # Of every line: when, and how many of the planned seconds were done.
        self._history = deque([(time.monotonic(), 0.0)])
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Progress":
        self._clock.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._clock.join()
        self.finish()

    def start(self, stage: str) -> None:
        with self._lock:
            self.finish()
            self._stage, self._started, self._fraction, self._detail = stage, time.monotonic(), None, ""
            self._show(self._started)

    def finish(self) -> None:
        with self._lock:
            if self._stage is not None:
                self.seconds[self._stage] = round(time.monotonic() - self._started, 1)
                self._stage = None

    def step(self, fraction: float, detail: str) -> None:
        """So much of the stage is done."""
        with self._lock:
            now = time.monotonic()
            self._fraction, self._detail = fraction, detail
            if fraction == 1 or now - self._shown >= self._interval:
                self._show(now)

    def message(self, text: str) -> None:
        with self._lock:
            self.stream.write(f"\r{text:<79}\n" if self.stream.isatty() else f"{text}\n")
            self.stream.flush()
            self._shown = time.monotonic()

    def _tick(self) -> None:
        while not self._stop.wait(0.25):
            with self._lock:
                now = time.monotonic()
                if self._stage is not None and now - self._shown >= self._interval:
                    self._show(now)

    def _done(self, now: float) -> float:
        """Planned seconds of what is done."""
        planned = self.plan[self._stage]
        fraction = self._fraction
        if fraction is None:
            # By the clock; it stops short of the end, which nobody knows.
            fraction = min((now - self._started) / (planned * self._pace()), 0.95)
        return sum(self.plan[stage] for stage in self.seconds) + planned * fraction

    def _pace(self) -> float:
        """Real seconds to a planned one in the last minute; three seconds at the planned pace damp its beginning."""
        (first, first_done), (last, last_done) = self._history[0], self._history[-1]
        return (last - first + 3) / (last_done - first_done + 3)

    def _show(self, now: float) -> None:
        self._shown = now
        done, total = self._done(now), sum(self.plan.values())
        if self._fraction is not None or now == self._started:
            self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[1][0] > self.WINDOW:
            self._history.popleft()
        left = ""
        if done > 0.03 * total:
            seconds = (total - done) * self._pace()
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        line = f"[{done / total:4.0%}] {self._stage}{self._detail}{left}"
        self.stream.write(f"\r{line:<79}" if self.stream.isatty() else f"{line}\n")
        self.stream.flush()
