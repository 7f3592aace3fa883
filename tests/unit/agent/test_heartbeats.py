from __future__ import annotations

import json

from agent.heartbeats import NEVER, Heartbeats


class Clock:
    time = 100.0

    def __call__(self) -> float:
        return self.time


def sent(heartbeats: Heartbeats) -> list[tuple[str, str]]:
    messages, _ = heartbeats.due()
    return [(m.routing_key, json.loads(json.loads(m.body)["oslo.message"])["_msg_id"]) for m in messages]


def test_one_at_each_interval_until_the_instruction_is_finished() -> None:
    clock, woken = Clock(), []
    heartbeats = Heartbeats(clock, wake=lambda: woken.append(1))
    assert heartbeats.due() == ([], NEVER)
    heartbeats.watch("id-1", "reply_a", "m1", 5.0)
    assert woken and sent(heartbeats) == [] and heartbeats.due()[1] == 5.0
    clock.time += 5
    assert sent(heartbeats) == [("reply_a", "m1")]
    clock.time += 4
    assert sent(heartbeats) == [] and heartbeats.due()[1] == 1.0
    clock.time += 60
    assert sent(heartbeats) == [("reply_a", "m1")], "one, not all that were missed"
    heartbeats.forget("id-1")
    clock.time += 60
    assert heartbeats.due() == ([], NEVER)


def test_each_caller_of_one_instruction_once() -> None:
    clock = Clock()
    heartbeats = Heartbeats(clock)
    for msg_id in ("m1", "m2", "m1"):
        heartbeats.watch("id-1", "reply_a", msg_id, 1.0)
    clock.time += 2
    assert sent(heartbeats) == [("reply_a", "m1"), ("reply_a", "m2")]


def test_a_caller_that_is_gone_hears_no_more() -> None:
    clock = Clock()
    heartbeats = Heartbeats(clock)
    heartbeats.watch("id-1", "reply_a", "m1", 1.0)
    heartbeats.watch("id-2", "reply_b", "m2", 1.0)
    heartbeats.gone("reply_a")
    clock.time += 2
    assert sent(heartbeats) == [("reply_b", "m2")]
