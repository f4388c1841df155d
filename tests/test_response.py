"""From events to text: stop strings, log probabilities, echo, best_of, streams, usage."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.api.assemble import Assembler
from nanogpt.api.plan import make_plan
from nanogpt.api.protocol import parse_completion
from nanogpt.api.response import DONE, Collected, Stream, event, ranks_header
from nanogpt.api.tokens import token_text
from nanogpt.errors import ServerError
from nanogpt.request import PromptScored, RequestFailed, TokenEvent
from tests.fake_cluster import EOS, INFO, ByteTokenizer, logprobs_of, play

TOKENIZER = ByteTokenizer()
MILE = msgspec.structs.replace(INFO, context_length=10_000)


def make(**fields):
    fields = {"model": INFO.name, "prompt": "hi", "max_tokens": 1000, **fields}
    request = parse_completion(json.dumps(fields).encode(), "application/json")
    return make_plan(request, MILE, TOKENIZER)


def whole(plan, batches):
    """(choices of the unstreamed answer, its usage, choices that were cancelled)."""
    assembler, collected, cancelled = Assembler(plan, TOKENIZER), Collected(plan), []
    for batch in batches:
        deltas, stopped = assembler.feed(batch)
        collected.add(deltas)
        cancelled += stopped
    assert assembler.done
    completion = collected.completion(assembler, assembler.best(plan.completion.n))
    built = json.loads(msgspec.json.encode(completion))
    return built["choices"], built["usage"], cancelled


def streamed(plan, batches):
    """(choices put together again as a client would, raw chunks)."""
    assembler, stream, raw = Assembler(plan, TOKENIZER), Stream(plan), b""
    for batch in batches:
        raw += stream.chunks(assembler.feed(batch)[0])
    raw += stream.end(assembler)
    *events, last, rest = raw.split(b"\n\n")
    assert (last + b"\n\n", rest) == (DONE, b"")
    chunks = [json.loads(e.removeprefix(b"data: ")) for e in events]
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            so_far = choices.setdefault(choice["index"], {"text": "", "finish_reason": None})
            assert so_far["finish_reason"] is None, "a chunk after the last"
            so_far["text"] += choice["text"]
            so_far["finish_reason"] = choice["finish_reason"]
            for key in ("token_ids", "prompt_token_ids"):
                if key in choice:
                    so_far[key] = so_far.get(key, []) + choice[key]
            for key, values in (choice["logprobs"] or {}).items():
                into = so_far.setdefault("logprobs", {})
                into[key] = into.get(key, []) + values
    return choices, chunks


def event_of(plan, ids, position=0, finish=None, index=0, **fields):
    return TokenEvent(plan.request.request_id, index, position, tuple(ids), (), finish, **fields)


def text_of(plan, *id_lists, finish="length"):
    """Text and reason of the one choice that gets these tokens, an event each."""
    position, batches = 0, []
    for i, ids in enumerate(id_lists):
        last = finish if i == len(id_lists) - 1 else None
        batches.append([event_of(plan, ids, position, last)])
        position += len(ids)
    (choice,), _, _ = whole(plan, batches)
    return choice["text"], choice["finish_reason"]


# Text


def test_a_character_in_pieces_comes_whole():
    plan = make()
    assembler = Assembler(plan, TOKENIZER)
    smile = "😀".encode()
    for i, byte in enumerate(smile[:3]):
        assert assembler.feed([event_of(plan, [byte], i)]) == ([], [])
    (delta,), _ = assembler.feed([event_of(plan, smile[3:], 3)])
    assert delta.text == "😀"


def test_what_is_no_character_becomes_the_replacement():
    assert text_of(make(), [0xE2, 0x80], [0x41, 0xC3]) == ("\ufffdA\ufffd", "length")


def test_stop_string_across_tokens_is_cut_and_cancels():
    plan = make(stop="END")
    batches = [[event_of(plan, b"sE")], [event_of(plan, b"ND more", 2)]]
    (choice,), usage, cancelled = whole(plan, batches)
    assert (choice["text"], choice["finish_reason"]) == ("s", "stop")
    assert cancelled == [0]
    assert usage["completion_tokens"] == 4  # to the token that completes the stop string


def test_stop_string_in_the_last_event_needs_no_cancel():
    plan = make(stop=["x", "END"])
    (choice,), _, cancelled = whole(plan, [[event_of(plan, b"sEND", finish="length")]])
    assert (choice["text"], choice["finish_reason"], cancelled) == ("s", "stop", [])


def test_half_a_stop_string_is_held_back_and_delivered_when_it_does_not_come():
    plan = make(stop="END")
    assembler = Assembler(plan, TOKENIZER)
    (delta,), _ = assembler.feed([event_of(plan, b"sEN")])
    assert delta.text == "s"
    assert assembler.feed([event_of(plan, b"E", 3)])[0][0].text == "EN"
    (delta,), _ = assembler.feed([event_of(plan, b"N", 4, "length")])
    assert (delta.text, delta.finish_reason) == ("EN", "length")


def test_stop_string_is_not_looked_for_in_the_prompt():
    assert text_of(make(prompt="END ", echo=True, stop="END"), b"so") == ("END so", "length")
    assert text_of(make(prompt="EN", echo=True, stop="END"), b"Dx") == ("ENDx", "length")


def test_tokens_after_a_stop_string_change_nothing():
    plan = make(stop="!", return_token_ids=True)
    batches = [[event_of(plan, b"a!b"), event_of(plan, b"cd", 3)], [event_of(plan, b"e", 5)]]
    (choice,), usage, _ = whole(plan, batches)
    assert (choice["text"], choice["token_ids"]) == ("a", list(b"a!"))
    assert usage["completion_tokens"] == 2


# Log probabilities


def test_logprobs_arrays():
    plan = make(prompt="né", logprobs=2)
    ids = [*b"a", 0xC3, 0xA9, 257, *b"b"]
    (choice,), _, _ = whole(plan, play([ids], chunk=2)(plan.request))
    got = choice["logprobs"]
    assert choice["text"] == "aétheb"
    assert got["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "the", "b"]
    assert got["text_offset"] == [2, 3, 3, 4, 7]
    for i, token_id in enumerate(ids):
        values = logprobs_of(token_id, 2)
        assert got["token_logprobs"][i] == values.logprob
        assert got["top_logprobs"][i][got["tokens"][i]] == values.logprob
        assert len(got["top_logprobs"][i]) == 3  # the two likeliest and the sampled one


def test_logprobs_zero_is_the_sampled_token_alone():
    plan = make(logprobs=0)
    (choice,), _, _ = whole(plan, play([b"ab"])(plan.request))
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [["a"], ["b"]]


def test_sampled_token_among_the_likeliest_has_one_value():
    """The greedy token is in top_logprobs already: both values are the same float."""
    plan = make(logprobs=2)
    values = logprobs_of(97, 2)
    values = msgspec.structs.replace(values, top_ids=(97, 98), top_logprobs=(values.logprob, -9.0))
    event = TokenEvent(plan.request.request_id, 0, 0, (97,), (values,), "length")
    (choice,), _, _ = whole(plan, [[event]])
    assert choice["logprobs"]["top_logprobs"] == [{"a": values.logprob, "b": -9.0}]


def test_logprobs_of_a_stop_string_are_not_shown():
    plan = make(logprobs=0, stop="END", prompt="")
    (choice,), usage, _ = whole(plan, play([[*b"ab", *b" EN", *b"D"]])(plan.request))
    assert choice["logprobs"]["tokens"] == ["a", "b", " "]
    assert usage["completion_tokens"] == 6


def test_logprobs_of_a_token_that_begins_before_the_stop_string_are_shown():
    plan = make(logprobs=0, stop="now")
    (choice,), _, _ = whole(plan, play([[TOKENIZER.encode("END now")[0], 97]])(plan.request))
    assert choice["text"] == "END "
    assert choice["logprobs"]["tokens"] == ["END now"]


def test_end_token_has_its_place_in_logprobs_but_not_in_text():
    """lm-eval drops the last entry of an echo with max_tokens 1: it must be the sampled token's."""
    plan = make(logprobs=0, echo=True, prompt="ab", return_token_ids=True)
    (choice,), usage, _ = whole(plan, play([b"c"], finish="stop")(plan.request))
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["ab", "c", "<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [0, 2, 3]
    assert choice["token_ids"] == [99]
    assert usage["completion_tokens"] == 1


def test_token_text_is_different_for_every_token():
    names = [token_text(TOKENIZER, i) for i in range(TOKENIZER.n_vocab)]
    assert len(set(names)) == TOKENIZER.n_vocab
    assert names[0xE2] == "bytes:\\xe2"


# Echo


def test_echo_with_logprobs_scores_the_prompt():
    plan = make(prompt=["né the", "b"], n=2, echo=True, logprobs=1, max_tokens=2)
    choices, _, _ = whole(plan, play([b"xy", b"zw"], prompt_chunk=1)(plan.request))
    assert [c["text"] for c in choices] == ["né thexy", "né thezw", "bxy", "bzw"]
    first = choices[0]["logprobs"]
    assert first["tokens"] == ["né", " the", "x", "y"]
    assert first["text_offset"] == [0, 2, 6, 7]
    assert first["token_logprobs"][0] is first["top_logprobs"][0] is None
    assert first["token_logprobs"][1] == logprobs_of(258, 1).logprob
    assert first["top_logprobs"][1][" the"] == first["token_logprobs"][1]
    assert choices[3]["logprobs"]["token_logprobs"][0] is None
    assert choices[3]["logprobs"]["tokens"] == ["b", "z", "w"]


def test_a_prompts_entries_are_made_once_for_all_its_choices():
    """For each of n = 128 choices they took their own time and memory."""
    plan = make(prompt="né the", n=3, echo=True, logprobs=1, max_tokens=2)
    assembler = Assembler(plan, TOKENIZER)
    deltas = [d for batch in play([b"xy"])(plan.request) for d in assembler.feed(batch)[0]]
    prompts = [delta.logprobs for delta in deltas if delta.text == "né the"]
    assert len(prompts) == 3
    assert prompts[0] is prompts[1] is prompts[2]
    choices, _, _ = whole(plan, play([b"xy"])(plan.request))
    assert [c["logprobs"]["tokens"] for c in choices] == [["né", " the", "x", "y"]] * 3


def test_pure_scoring():
    plan = make(prompt="abab", echo=True, logprobs=0, max_tokens=0)
    (choice,), usage, _ = whole(plan, play([b"never"])(plan.request))
    assert choice["text"] == "abab"
    assert choice["logprobs"]["tokens"] == ["ab", "ab"]
    assert choice["finish_reason"] == "length"
    assert usage["completion_tokens"] == 0


def test_a_choice_waits_for_its_prompt_to_be_scored():
    """Another rank scores the prompt: tokens of this choice may come first."""
    plan = make(prompt=[97, 98], n=2, echo=True, logprobs=0)
    assembler = Assembler(plan, TOKENIZER)
    request_id, score = plan.request.request_id, logprobs_of(98, 0)
    early = TokenEvent(request_id, 1, 0, (99,), (logprobs_of(99, 0),), "length")
    assert assembler.feed([early]) == ([], [])
    deltas, _ = assembler.feed([PromptScored(request_id, 0, 1, (score,))])
    assert [(d.index, d.text) for d in deltas] == [(0, "ab"), (1, "ab"), (1, "c")]
    late = TokenEvent(request_id, 0, 0, (100,), (logprobs_of(100, 0),), "length")
    deltas, _ = assembler.feed([late])
    assert [(d.index, d.text) for d in deltas] == [(0, "d")]
    assert assembler.done


def test_the_implied_start_token_is_scored_but_is_no_text():
    plan = make(prompt="", echo=True, logprobs=0)
    (choice,), usage, _ = whole(plan, play([b"a"])(plan.request))
    assert choice["text"] == "a"
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>", "a"]
    assert choice["logprobs"]["text_offset"] == [0, 0]
    assert usage["prompt_tokens"] == 1


def test_a_prompt_that_was_never_scored_is_an_error():
    plan = make(prompt="abab", echo=True, logprobs=0)
    values = (logprobs_of(99, 0),)
    only = TokenEvent(plan.request.request_id, 0, 0, (99,), values, "length")
    with pytest.raises(ServerError):
        Assembler(plan, TOKENIZER).feed([only])


# best_of, usage, failures


def test_best_of_takes_the_highest_mean():
    plan = make(n=2, best_of=4, prompt=["a", "b"])
    outputs = [b"f", b"ccc", b"b", b"cc"]  # own log probabilities fall with id % 7
    mean = {text: sum(logprobs_of(t, 0).logprob for t in text) / len(text) for text in outputs}
    ranking = sorted(outputs, key=lambda text: -mean[text])
    assert mean[b"ccc"] == mean[b"cc"]  # a tie: the lower index first
    choices, usage, _ = whole(plan, play(outputs)(plan.request))
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["text"] for c in choices] == [t.decode() for t in ranking[:2]] * 2
    assert all(c["logprobs"] is None for c in choices)
    assert usage["completion_tokens"] == 2 * sum(map(len, outputs))


def test_best_of_counts_the_end_token():
    """A choice that ends at once has a mean too: that of its end token."""
    plan = make(best_of=2)
    request_id = plan.request.request_id
    good = msgspec.structs.replace(logprobs_of(EOS, 0), logprob=-0.001)
    poor = msgspec.structs.replace(logprobs_of(97, 0), logprob=-5.0)
    poor_event = TokenEvent(request_id, 0, 0, (97,), (poor,), "length")
    good_event = TokenEvent(request_id, 1, 0, (), (good,), "stop", 0, EOS)
    (choice,), _, _ = whole(plan, [[poor_event, good_event]])
    assert choice["text"] == ""


def test_usage():
    plan = make(prompt=["abc", "né", "q"], n=2)
    _, usage, _ = whole(plan, play([b"xyz", b"w"])(plan.request))
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 6},  # two of each prompt, not of each choice
    }


def test_a_failed_request_is_a_server_error():
    plan = make()
    with pytest.raises(ServerError, match="out of memory"):
        Assembler(plan, TOKENIZER).feed([RequestFailed(plan.request.request_id, "out of memory")])


def test_ranks_header():
    assert ranks_header((0, 1, 0, 1), range(4)) == "0,1,0,1"
    assert ranks_header((0, 1, 2, 3), [2, 0]) == "2,0"
    assert ranks_header((0,) * 4096, range(4096)) is None


# Streams


def test_an_event_is_one_line():
    assert event({"text": "a\n\n\r\u2028"}).count(b"\n") == 2


def test_include_usage():
    plan = make(stream=True, stream_options={"include_usage": True}, max_tokens=3)
    _, chunks = streamed(plan, play([b"abc"])(plan.request))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    _, chunks = streamed(make(stream=True), play([b"abc"])(plan.request))
    assert all("usage" not in chunk for chunk in chunks)


def test_prompt_token_ids_come_once():
    plan = make(stream=True, return_token_ids=True, max_tokens=3)
    _, chunks = streamed(plan, play([b"abc"])(plan.request))
    assert ["prompt_token_ids" in c["choices"][0] for c in chunks] == [True, False, False]


PIECES = st.lists(st.integers(0, ByteTokenizer.n_vocab - 1), max_size=30)
STOPS = st.lists(st.sampled_from(["END", "the", "\n\n", "é", "ab", "N", "a", "\ufffd"]), max_size=3)


@st.composite
def requests(draw):
    """A request with random outputs, and its events in two random chunkings and orders."""
    fields = {
        "prompt": draw(st.sampled_from(["", "né the", ["ab", "😀"], [0xF0, 0x9F], [[97], [195]]])),
        "n": draw(st.integers(1, 3)),
        "echo": draw(st.booleans()),
        "logprobs": draw(st.sampled_from([None, 0, 2])),
        "stop": draw(STOPS),
        "return_token_ids": draw(st.booleans()),
    }
    plan = make(**fields)
    outputs = draw(st.lists(PIECES, min_size=1, max_size=4))
    finish = draw(st.sampled_from(["length", "stop"]))
    return plan, [draw(chunkings(plan, outputs, finish)) for _ in range(2)]


@st.composite
def chunkings(draw, plan, outputs, finish):
    played = play(outputs, finish, draw(st.integers(1, 7)), draw(st.integers(1, 3)))
    batches = played(plan.request)
    merged, rest = [], list(batches)
    while rest:
        size = draw(st.integers(1, 4))
        merged.append([event for batch in rest[:size] for event in batch])
        rest = rest[size:]
    return merged


@settings(max_examples=300, deadline=None)
@given(requests())
def test_any_chunking_gives_the_same_answer_streamed_or_not(case):
    plan, (one, other) = case
    choices, usage, _ = whole(plan, one)
    assert whole(plan, other)[:2] == (choices, usage)
    for batches in (one, other):
        rebuilt, _ = streamed(plan, batches)
        for choice in choices:
            expected = {k: v for k, v in choice.items() if k != "index" and v is not None}
            empty = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            got = rebuilt[choice["index"]]
            if "logprobs" in expected:
                got.setdefault("logprobs", empty)
            assert got == expected


@settings(max_examples=200, deadline=None)
@given(requests())
def test_answers_are_consistent(case):
    plan, (batches, _) = case
    choices, usage, _ = whole(plan, batches)
    counted = 0
    for choice in choices:
        prompt = plan.prompt_texts[choice["index"] // plan.request.n]
        text = choice["text"].removeprefix(prompt) if plan.completion.echo else choice["text"]
        assert not any(stop in text for stop in plan.completion.stops)
        text.encode()  # valid Unicode
        counted += len(choice.get("token_ids", []))
        logprobs = choice["logprobs"]
        if logprobs is None:
            continue
        assert len({len(values) for values in logprobs.values()}) == 1
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        end = len(choice["text"]) + (0 if plan.completion.echo else len(prompt))
        assert all(offset <= end for offset in offsets)
    if plan.completion.return_token_ids:
        assert counted == usage["completion_tokens"]
