import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny

from smallgpt.beams import beam_search
from smallgpt.generation import generate
from smallgpt.jobs import End, Event, Part, Request, Scores
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.scheduler import DrainingError, QueueFullError, Scheduler

ENDLESS = GenerationConfig(max_new_tokens=2000, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OrtGPT:
    folder = tmp_path_factory.mktemp("random")
    bundle = tiny.write_bundles(folder, tiny.random_model("llama", max_seq_len=1024), ["fp32"]) / "fp32"
    return OrtGPT(bundle, threads=1)


@pytest.fixture
def scheduler(model: OrtGPT) -> Iterator[Scheduler]:
    made = Scheduler(model.fork(), rows=3, queue=4)
    yield made
    made.close()


class Asked:
    """A request and what was delivered for it."""

    def __init__(self, scheduler: Scheduler, prompts: list[list[int]], config: GenerationConfig, **more: Any) -> None:
        self.batches: queue.Queue[list[Event]] = queue.Queue()
        self.request = Request(prompts, config, self.batches.put, **more)
        scheduler.submit(self.request)

    def next(self) -> list[Event]:
        return self.batches.get(timeout=60)

    def all(self) -> list[Event]:
        """Everything up to the end, which is left out; an error is raised."""
        events: list[Event] = []
        while not (events and isinstance(events[-1], End)):
            events += self.next()
        assert sum(isinstance(event, End) for event in events) == 1
        assert self.batches.empty()
        end = events.pop()
        assert isinstance(end, End)
        if end.error:
            raise end.error
        return events


def text(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Part) and event.choice == choice)


def test_each_choice_is_what_it_is_alone(scheduler: Scheduler, model: OrtGPT) -> None:
    asked = []
    for seed in range(4):
        config = GenerationConfig(seed=seed, temperature=1.2, max_new_tokens=10 + seed)
        asked.append((config, Asked(scheduler, [[3, 9 + seed], [3] * 20], config, n=2, live=seed % 2 == 0)))
    for config, one in asked:
        events = one.all()
        for choice in range(4):
            prompt, number = one.request.prompts[choice // 2], choice % 2
            steps = list(generate(model, [prompt], config, sequences=[number]))
            assert text(events, choice) == "".join(step[0].text for step in steps)
    assert scheduler.metrics.counts["requests_finished"] == 4
    assert scheduler.idle


def test_live_requests_get_every_step(scheduler: Scheduler) -> None:
    config = GenerationConfig(max_new_tokens=5, ignore_eos=True)
    batches = Asked(scheduler, [[3]], config, live=True).batches
    sizes = [len(batches.get(timeout=60)) for _ in range(5)]
    assert sizes == [1, 1, 1, 1, 2]  # the last with its End
    assert len(Asked(scheduler, [[3]], config).next()) == 6


def test_scores_are_those_of_the_logits(scheduler: Scheduler, model: OrtGPT) -> None:
    ids = [3, *range(10, 210)]
    events = Asked(scheduler, [ids, [3]], GenerationConfig(max_new_tokens=2), score=True, logprobs=2).all()
    scores = [event for event in events if isinstance(event, Scores)]
    assert [(event.prompt, len(event.logprobs)) for event in scores] == [(0, 200), (1, 0)]
    logits = model.logits(ids[:-1]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert [logprob for logprob, _ in scores[0].logprobs] == pytest.approx(
        [expected[i, token] for i, token in enumerate(ids[1:])], abs=1e-4
    )
    assert all(len(top) == 2 for _, top in scores[0].logprobs)
    assert len([event for event in events if isinstance(event, Part) and event.tokens]) == 4
    # Without new tokens a prompt may be one token longer than the context.
    longest = [3] * 1025
    events = Asked(scheduler, [longest], GenerationConfig(max_new_tokens=0), score=True).all()
    assert [len(event.logprobs) for event in events if isinstance(event, Scores)] == [1024]
    assert events[-1] == Part(0, finish="length")


def test_beams_of_several_prompts(scheduler: Scheduler, model: OrtGPT) -> None:
    config = GenerationConfig(num_beams=3, num_return_sequences=2, max_new_tokens=8)
    prompts = [[3, 40], [3, 50]]
    for live in (False, True):
        events = Asked(scheduler, prompts, config, n=2, live=live).all()
        for p, prompt in enumerate(prompts):
            *_, last = beam_search(model.fork(), prompt, config)
            assert [text(events, 2 * p + j) for j in range(2)] == [found.text for found in last.done]


def test_beams_of_several_prompts_share_one_time(scheduler: Scheduler) -> None:
    config = GenerationConfig(num_beams=2, max_new_tokens=1000, ignore_eos=True, early_stopping="never", max_time=0.05)
    parts = [part for part in Asked(scheduler, [[3]] * 4, config).all() if isinstance(part, Part) and part.finish]
    assert [part.finish for part in parts] == ["time"] * 4
    assert [len(part.tokens) for part in parts[1:]] == [1, 1, 1]  # the first one took it all


def test_a_long_search_and_a_long_sample_hold_nobody_up(scheduler: Scheduler) -> None:
    beams = GenerationConfig(num_beams=2, max_new_tokens=2000, ignore_eos=True)
    long = [Asked(scheduler, [[3]], beams, live=True), Asked(scheduler, [[3]], ENDLESS, live=True)]
    for one in long:
        one.next()
    Asked(scheduler, [[3, 9]], GenerationConfig(max_new_tokens=4)).all()
    Asked(scheduler, [[3, 9]], GenerationConfig(max_new_tokens=0), score=True).all()
    Asked(scheduler, [], GenerationConfig(), probe=True).all()
    # A second search waits, and samples that come later pass it.
    second = Asked(scheduler, [[3]], beams)
    Asked(scheduler, [[3, 9]], GenerationConfig(max_new_tokens=4)).all()
    assert scheduler.waiting == 1
    assert scheduler.running == 2
    for one in (*long, second):
        scheduler.cancel(one.request)
        one.all()
    assert scheduler.idle


def test_a_request_of_many_choices_shares_the_rows(scheduler: Scheduler) -> None:
    config = GenerationConfig(max_new_tokens=20, ignore_eos=True)
    many = Asked(scheduler, [[3]] * 2, config, n=30)
    for few in [Asked(scheduler, [[3]], config) for _ in range(3)]:
        few.all()
    assert many.batches.empty()
    events = many.all()
    assert [sum(event.choice == choice for event in events) for choice in range(60)] == [20] * 60  # type: ignore[union-attr]


def test_requests_of_many_choices_are_refused_when_too_many_wait(scheduler: Scheduler) -> None:
    config = GenerationConfig(max_new_tokens=500, ignore_eos=True)
    asked: list[Asked] = []

    def ask() -> None:
        for _ in range(4 + 3 + 3 + 1):  # those that wait, that have begun and that have a row
            asked.append(Asked(scheduler, [[3]], config, n=16))
            time.sleep(0.01)

    with pytest.raises(QueueFullError):
        ask()
    for one in asked:
        scheduler.cancel(one.request)


def test_scored_requests_keep_their_order(scheduler: Scheduler) -> None:
    ended: list[int] = []

    class Numbered(Asked):
        def __init__(self, number: int) -> None:
            config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
            self.batches = queue.Queue()
            deliver = lambda events: (ended.append(number), self.batches.put(events))  # noqa: E731
            self.request = Request([[3, 4]], config, deliver, score=True)  # type: ignore[arg-type]
            scheduler.submit(self.request)

    holders = [Asked(scheduler, [[3]], ENDLESS) for _ in range(3)]
    scored = []
    for number in range(4):
        scored.append(Numbered(number))
        while scheduler.waiting:
            time.sleep(0.01)
    scheduler.cancel(holders[0].request)
    for one in scored:
        one.all()
    assert ended == [0, 1, 2, 3]


def test_the_time_of_a_request_is_that_of_all_its_choices(scheduler: Scheduler) -> None:
    config = GenerationConfig(max_new_tokens=900, ignore_eos=True, max_time=0.2)
    events = Asked(scheduler, [[3]], config, n=30).all()
    last = [event for event in events if isinstance(event, Part) and event.choice == 29]
    assert [event.finish for event in last] == ["time"]


def test_cancelled_requests_leave_at_once(scheduler: Scheduler, model: OrtGPT) -> None:
    config = GenerationConfig(seed=1, max_new_tokens=300, ignore_eos=True)
    stays = Asked(scheduler, [[3]], config)
    goes = [Asked(scheduler, [[3]], ENDLESS, n=2), Asked(scheduler, [[3]], ENDLESS), Asked(scheduler, [[3]], ENDLESS)]
    for one in reversed(goes):
        scheduler.cancel(one.request)
    for one in goes:
        assert one.all() == []
    steps = generate(model, [[3]], config)
    assert text(stays.all()) == "".join(step[0].text for step in steps)
    scheduler.cancel(stays.request)  # after its end: nothing
    assert scheduler.metrics.counts["requests_cancelled"] == 3


def test_limits_of_the_queue_and_the_end(model: OrtGPT) -> None:
    scheduler = Scheduler(model.fork(), rows=1, queue=1)
    running = Asked(scheduler, [[3]], ENDLESS, live=True)
    running.next()
    waiting = Asked(scheduler, [[3]], ENDLESS)
    with pytest.raises(QueueFullError, match="1 requests are waiting already"):
        Asked(scheduler, [[3]], ENDLESS)
    Asked(scheduler, [], ENDLESS, probe=True).all()
    scheduler.drain()
    with pytest.raises(DrainingError):
        Asked(scheduler, [[3]], ENDLESS)
    assert not scheduler.idle
    before = threading.active_count()
    scheduler.close()
    assert threading.active_count() == before - 1
    for one in (running, waiting):
        with pytest.raises(DrainingError, match="has stopped"):
            one.all()
    counts = scheduler.metrics.counts
    assert (counts["requests_refused"], counts["requests_failed"]) == (1, 2)


def test_probes_take_no_place_in_the_queue(model: OrtGPT) -> None:
    scheduler = Scheduler(model.fork(), rows=1, queue=1)
    held, release = threading.Event(), threading.Event()

    def hold(events: list[Event]) -> None:
        held.set()
        release.wait(60)

    scheduler.submit(Request([[3]], GenerationConfig(max_new_tokens=1), hold))
    assert held.wait(60)
    probes = [Asked(scheduler, [], GenerationConfig(), probe=True) for _ in range(3)]
    request = Asked(scheduler, [[3]], GenerationConfig(max_new_tokens=1))
    assert (scheduler.waiting, scheduler.running) == (1, 0)
    release.set()
    for one in (*probes, request):
        one.all()
    scheduler.close()


def test_metrics_are_prometheus_text(scheduler: Scheduler) -> None:
    Asked(scheduler, [[3, 9, 9]], GenerationConfig(max_new_tokens=4, ignore_eos=True)).all()
    lines = scheduler.metrics.render(rows=3).splitlines()
    values = dict(line.split() for line in lines if not line.startswith("#"))
    assert values["smallgpt_prompt_tokens_total"] == "3"
    assert values["smallgpt_tokens_total"] == "4"
    assert values["smallgpt_rows"] == "3"
    assert values["smallgpt_first_token_seconds_count"] == "1"
    buckets = [int(value) for name, value in values.items() if name.startswith("smallgpt_step_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == int(values["smallgpt_step_seconds_count"]) == 4


def test_prompts_that_cannot_run_end_with_their_error_and_hold_nobody_up(scheduler: Scheduler, model: OrtGPT) -> None:
    with pytest.raises(ValueError, match="fit into the context"):
        Asked(scheduler, [[3] * (model.max_seq_len + 1)], GenerationConfig()).all()
    assert Asked(scheduler, [], GenerationConfig()).all() == []
    events = Asked(scheduler, [[3, 9]], GenerationConfig(max_new_tokens=3, ignore_eos=True)).all()
    assert sum(len(event.tokens) for event in events if isinstance(event, Part)) == 3
    assert scheduler.idle
