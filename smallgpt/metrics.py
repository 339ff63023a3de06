"""What the server counts and times, as Prometheus reads it."""

from collections import Counter

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
COUNTS = {
    "prompt_tokens": "Tokens of prompts that were started.",
    "tokens": "Tokens that were drawn.",
    "requests_finished": "Requests that were answered.",
    "requests_failed": "Requests that failed in work.",
    "requests_cancelled": "Requests whose client went away.",
    "requests_refused": "Requests that found the queue full.",
}


class Histogram:
    """Counts of durations up to each of BUCKETS."""

    def __init__(self) -> None:
        self.counts, self.total, self.sum = [0] * len(BUCKETS), 0, 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.total += 1
        self.sum += seconds
        self.counts = [count + (seconds <= bound) for count, bound in zip(self.counts, BUCKETS, strict=True)]


class Metrics:
    """The counts, by the names of COUNTS, and the durations."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first_token, self.step = Histogram(), Histogram()

    def render(self, **gauges: int) -> str:
        """Prometheus' text format."""
        lines: list[str] = []
        for name, text in COUNTS.items():
            full = f"smallgpt_{name}_total"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} counter", f"{full} {self.counts[name]}"]
        for name, value in gauges.items():
            lines += [f"# TYPE smallgpt_{name} gauge", f"smallgpt_{name} {value}"]
        for full, text, histogram in (
            ("smallgpt_first_token_seconds", "From the request to its first token.", self.first_token),
            ("smallgpt_step_seconds", "A step of the batch: a token for each sequence in it.", self.step),
        ):
            lines += [f"# HELP {full} {text}", f"# TYPE {full} histogram"]
            pairs = zip(BUCKETS, histogram.counts, strict=True)
            lines += [f'{full}_bucket{{le="{bound}"}} {count}' for bound, count in pairs]
            lines += [f'{full}_bucket{{le="+Inf"}} {histogram.total}']
            lines += [f"{full}_sum {histogram.sum}", f"{full}_count {histogram.total}"]
        return "\n".join(lines) + "\n"
