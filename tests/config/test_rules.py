"""Rules of `dynamic`: their text, the layers that they match, and the limit of their time."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gptq_cli.config import layer
from gptq_cli.config.layer import first_match, matches, parse_rule, unmatched_rules
from gptq_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "rule", "settings"),
    [
        ("-:lm_head", "-:lm_head", {}),
        ('+:.*down={"bits":8}', "+:.*down", {"bits": 8}),
        ("+:.*down={bits: 8, sym: false}", "+:.*down", {"bits": 8, "sym": False}),
        (r"+:(?=.*x){2}={bits: 8}", r"+:(?=.*x){2}", {"bits": 8}),
        ("+:a={b}={bits: 2}", "+:a={b}", {"bits": 2}),
        ("-:a{3}", "-:a{3}", {}),
    ],
)
def test_parse_rule_separates_the_rule_from_its_settings(
    text: str, rule: str, settings: dict[str, Any]
) -> None:
    assert parse_rule(text) == (rule, settings)


def test_first_match_prefers_negative_rules_then_order() -> None:
    rules = ["+:a.*", "-:ab", "a", "-:.*c"]
    assert {name: first_match(rules, name) for name in ("ab", "ac", "ad", "b", "bc")} == {
        "ab": "-:ab",
        "ac": "-:.*c",
        "ad": "+:a.*",
        "b": None,
        "bc": "-:.*c",
    }


def test_unmatched_rules_are_those_that_reach_no_layer() -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert unmatched_rules({"-:down_proj": {}, "+:.*up_proj": {}, "lm_head": {}}, iter(names)) == [
        "-:down_proj",
        "lm_head",
    ]


@pytest.mark.parametrize(
    ("rule", "name", "matched"),
    [  # the first rules need a timer or a process
        (r"()()()(?:q)_proj", "model.q_proj", False),
        (r"()()()(?:.*)_proj", "model.q_proj", True),
        # the module `regex` would match this name: it reads {s} as one substituted letter
        (r".*\.(?:k){s}_proj", "model.layers.1.self_attn.q_proj", False),
        (r".*\.(?:k){s}_proj", "model.k{s}_proj", True),
        (r".*(?:k_proj){e<=1}$", "model.layers.1.self_attn.q_proj", False),
        (r"(?:x|model)\.(?:mlp){i,d,s,e}.*", "model.attn", False),
        (r"(?i:MODEL)\.[0-9]{1,2}$", "model.12", True),
        (r"model\.\d+$", "model.123.x", False),
        (r"q_proj", "model.q_proj", False),
    ],
)
@pytest.mark.parametrize("threads", [0, 1])
def test_rules_match_as_in_the_re_module(rule: str, name: str, matched: bool, threads: int) -> None:
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            assert pool.submit(matches, rule, name).result() is matched
    else:
        assert matches(rule, name) is matched


@pytest.mark.parametrize("rule", ["-:(a+)+$", "+:(.|..|...)+(?!.|$)", "a?" * 60 + "a" * 60 + "$"])
@pytest.mark.parametrize("threads", [0, 1])
def test_a_rule_with_endless_backtracking_is_refused(
    rule: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "SECONDS", 0.05)
    monkeypatch.setattr(layer, "SECONDS_OF_CHILD", 1.0)
    too_slow = pytest.raises(ConfigError, match=r"takes more than .* `aaaa")
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            task = pool.submit(matches, rule, "a" * 60 + "b")
            with too_slow as caught:
                task.result()
    else:
        with too_slow as caught:
            matches(rule, "a" * 60 + "b")
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_REGEX", 2)
    assert "(a+)+" in str(caught.value.hint)


def test_usual_rules_start_no_process_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer.subprocess, "run", lambda *_, **__: pytest.fail("a child process"))
    usual = {
        r".*\.(?:q|k|v)_proj$": False,
        r"model[.]layers[.](0|[0-9]+1)[.]mlp[.].*": True,
        "lm_head": False,
        r".*(?<!up)_proj": False,
    }
    with ThreadPoolExecutor(1) as pool:
        for rule, matched in usual.items():
            task = pool.submit(matches, rule, "model.layers.11.mlp.up_proj")
            assert task.result() is matched, rule


@pytest.mark.parametrize("rule", ["(a+)+", "(a+)+$"])
def test_matching_restores_a_timer_of_other_code(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(layer, "SECONDS", 0.05)
    usual = signal.signal(signal.SIGVTALRM, handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, 500.0)
    try:
        if rule == "(a+)+":
            assert matches(rule, "aa")
        else:
            with pytest.raises(ConfigError):
                matches(rule, "a" * 60 + "b")
        assert signal.getsignal(signal.SIGVTALRM) is handler
        assert 400 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] < 501  # in ticks of the clock
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, usual)
