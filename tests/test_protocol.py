"""Requests: every field's types and ranges, refusals that say what is wrong, plans."""

import json

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt.api.decode import ECHO_CHARS, clip
from nanogpt.api.plan import find_model, make_plan, real_name
from nanogpt.api.protocol import (
    INT64_MAX,
    INT64_MIN,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    CompletionRequest,
    parse_completion,
)
from nanogpt.errors import (
    ApiError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    Unavailable,
    UnsupportedMediaType,
)
from nanogpt.registry import ModelCard
from tests.fake_cluster import EOS, INFO, ByteTokenizer

JSON = "application/json"


def parse(**fields) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", **fields}).encode(), JSON)


def refused(**fields) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        parse(**fields)
    return error.value


def plan(**fields):
    return make_plan(parse(**fields), INFO, ByteTokenizer(), clock=lambda: 1234.5)


# Fields, one at a time

ACCEPTED = [
    ("prompt", ["", "text", ["a", "b"], [1, 2], [[1], [2, 3]], [""]]),
    ("max_tokens", [0, 1, 10**6]),
    ("temperature", [0, 0.5, 2, 2.0]),
    ("top_p", [0, 0.1, 1]),
    ("n", [1, 128]),
    ("best_of", [1, 128]),
    ("stream", [True, False]),
    ("logprobs", [0, 20]),
    ("echo", [True, False]),
    ("stop", ["x", ["x"], ["a", "b", "c", "d"], [], "x" * MAX_STOP_CHARS]),
    ("presence_penalty", [-2, 0, 2]),
    ("frequency_penalty", [-2, 0.25, 2]),
    ("logit_bias", [{}, {"5": -100}, {"5": 100, "6": 0.5}]),
    ("seed", [INT64_MIN, -1, 0, INT64_MAX]),
    ("user", ["", "u" * 256]),
    ("top_k", [-1, 0, 40]),
    ("min_p", [0, 0.05, 1]),
    ("repetition_penalty", [0.5, 1, 100]),
    ("min_tokens", [0, 16]),
    ("ignore_eos", [True, False]),
    ("stop_token_ids", [[], [5, 6]]),
    ("past_context", ["stop", "crop"]),
    ("return_token_ids", [True, False]),
    ("priority", [-5, 0, 5]),
    ("background", [False, True]),
]

REFUSED = [
    ("prompt", [1, 1.5, True, {}, [], [[]], [[1], []], ["a", 1], [1, "a"], [1, [2]], [-1], [1.5]]),
    ("prompt", [[["a"]], [None], ["a", None], [True]]),
    ("max_tokens", [-1, 1.5, "16", True, []]),
    ("temperature", [-0.1, 2.1, "1", True]),
    ("top_p", [-0.1, 1.1, "1"]),
    ("n", [0, 129, 1.5, "2"]),
    ("best_of", [0, 129]),
    ("stream", [1, "true"]),
    ("stream_options", [True, {"include_usage": 1}, {"other": True}]),
    ("logprobs", [-1, 21, True, 1.5]),
    ("echo", [0, "no"]),
    ("stop", ["", [""], list("abcde"), 5, [5], "x" * (MAX_STOP_CHARS + 1)]),
    ("presence_penalty", [-2.1, 2.1, "0"]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("logit_bias", [{"5": 101}, {"5": -101}, {"5": None}, {"x": 1}, {"-1": 1}, {"1.5": 1}, [5]]),
    ("logit_bias", [{str(i): 0 for i in range(MAX_LOGIT_BIAS + 1)}]),
    ("seed", [INT64_MAX + 1, INT64_MIN - 1, 10**30, 1.5, "1"]),
    ("suffix", ["", "x"]),
    ("user", ["u" * 257, 5]),
    ("top_k", [-2, 1.5]),
    ("min_p", [-0.1, 1.1]),
    ("repetition_penalty", [0, 5e-324, -1, 101]),
    ("min_tokens", [-1, 17]),  # max_tokens is 16
    ("ignore_eos", [1]),
    ("stop_token_ids", [[-1], ["a"], 5]),
    ("past_context", ["", "slide", True]),
    ("return_token_ids", [1]),
    ("priority", [2**31, 1.5]),
    ("background", [1, "yes"]),
    ("metadata", [{}, {"a": "b"}, 5]),
    ("model", ["", 5, "m" * 513]),
]


def cases(table):
    return [(field, value) for field, values in table for value in values]


@pytest.mark.parametrize(("field", "value"), cases(ACCEPTED))
def test_accepted(field, value):
    got = getattr(parse(**{field: value}), field)
    assert msgspec.to_builtins(got, str_keys=True) == value


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_refused_naming_the_field(field, value):
    error = refused(**{field: value})
    assert (error.status, error.param, error.code) == (400, field, None)
    assert error.message.startswith(field)


@pytest.mark.parametrize("field", [f for f in CompletionRequest.__struct_fields__ if f != "model"])
def test_null_is_the_default(field):
    assert parse(**{field: None}) == parse()


def test_every_field_of_the_contract_is_covered():
    tested = {field for field, _ in (*ACCEPTED, *REFUSED)}
    assert tested == set(CompletionRequest.__struct_fields__)


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}', b'{"prompt": "x"}'])
def test_model_is_required(body):
    with pytest.raises(InvalidRequest) as error:
        parse_completion(body, JSON)
    assert error.value.param == "model"


def test_unknown_field_is_named_with_the_nearest():
    error = refused(max_token=5)
    assert error.param == "max_token"
    assert "did you mean 'max_tokens'?" in error.message


# Rules between fields


def test_best_of_below_n():
    assert refused(n=3, best_of=2).param == "best_of"
    assert parse(n=2, best_of=2).generated == 2


def test_best_of_is_not_streamed():
    assert refused(best_of=2, stream=True).param == "best_of"
    assert parse(n=2, best_of=2, stream=True).stream  # nothing is left out


def test_stream_options_only_with_stream():
    assert refused(stream_options={"include_usage": True}).param == "stream_options"
    assert parse(stream=True, stream_options={"include_usage": True}).include_usage
    assert not parse(stream=True, stream_options={"include_usage": None}).include_usage


def test_too_many_prompts_or_choices():
    assert refused(prompt=["a"] * (MAX_PROMPTS + 1)).param == "prompt"
    assert parse(prompt=["a"] * MAX_PROMPTS, n=MAX_CHOICES // MAX_PROMPTS)
    error = refused(prompt=["a"] * MAX_PROMPTS, n=MAX_CHOICES // MAX_PROMPTS + 1)
    assert error.param == "n"
    assert refused(prompt=["a"] * 1000, best_of=5).param == "best_of"


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"model"',
        b"{",
        b'{"model": "m",}',
        b'{"model": "m"} x',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "temperature": 1e999}',
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "prompt": ' + b'{"a":' * 100_000,
        b"[" * 100_000,
    ],
    ids=range(14),
)
def test_malformed_bodies(body):
    with pytest.raises(InvalidRequest) as error:
        parse_completion(body, JSON)
    assert len(error.value.message) < 1000


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "multipart/form-data", "json"])
def test_content_type_must_be_json(content_type):
    with pytest.raises(UnsupportedMediaType):
        parse_completion(b'{"model": "m"}', content_type)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_content_type_with_parameters(content_type):
    assert parse_completion(b'{"model": "m"}', content_type).model == "m"


@pytest.mark.parametrize(
    "fields",
    [
        {"X" * 5000: 1},
        {"prompt": {"Y" * 5000: 1}},
        {"stop": "Z" * 5000},
        {"model": "W" * 5000},
        {"logit_bias": {"V" * 5000: 1}},
        {"user": "é" * 5000},
    ],
)
def test_messages_repeat_little_of_the_input(fields):
    message = refused(**fields).message
    repeated = max(message.count(c) for c in "XYZWVé")
    assert repeated <= ECHO_CHARS


def test_clip():
    assert clip("a" * 200) == "a" * 200
    assert clip("a" * 201) == "a" * 199 + "…"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["5", "7"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(CompletionRequest.__struct_fields__[1:]) | st.text(max_size=5)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
@example({"max_tokens": 10**4300 - 1})  # one more has too many digits to be printed
@example({"prompt": [10**4300 - 1]})
@example({"logit_bias": {"9" * 4000: 1}})
def test_any_object_is_a_plan_or_a_client_error_that_names_its_field(fields):
    error = None
    try:
        plan(**fields)
    except ApiError as refusal:
        error = refusal
    if error is not None:
        assert error.status == 400
        assert error.param in {*fields, "min_tokens", "max_tokens", "n"}  # those have defaults


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_request_or_a_client_error(body):
    with pytest.raises(InvalidRequest):  # none of these has a model
        parse_completion(body, JSON)


# Plans


def test_prompt_forms():
    assert plan(prompt="hi").request.prompts == ((104, 105),)
    assert plan(prompt=["h", "i"]).request.prompts == ((104,), (105,))
    assert plan(prompt=[104, 105]).request.prompts == ((104, 105),)
    assert plan(prompt=[[104], [105, 106]]).request.prompts == ((104,), (105, 106))


@pytest.mark.parametrize("fields", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": [""]}])
def test_an_empty_prompt_starts_a_document(fields):
    made = plan(**fields)
    assert made.request.prompts == ((EOS,),)
    assert made.prompt_texts == ("",)
    assert made.prompt_tokens == 1


def test_prompt_texts():
    assert plan(prompt="né").prompt_texts == ("né",)
    assert plan(prompt=[110, 195, 169, 195]).prompt_texts == ("né\N{REPLACEMENT CHARACTER}",)


def test_context_length():
    assert plan(prompt="a" * 48, max_tokens=16)
    assert plan(prompt="a" * 64, max_tokens=0)
    with pytest.raises(ContextLengthExceeded) as error:
        plan(prompt="a" * 49, max_tokens=16)
    assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
    assert error.value.param == "max_tokens"
    for number in ("64", "65", "49", "16"):
        assert number in error.value.message
    with pytest.raises(ContextLengthExceeded) as error:
        plan(prompt=[1] * 65, max_tokens=0)
    assert error.value.param == "prompt"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["x" * 64] * 32, "max_tokens": 0, "echo": True},
        {"max_tokens": 62, "best_of": 128},
    ],
    ids=["echo", "generated"],
)
def test_log_probabilities_of_an_answer_are_limited(fields):
    """40 KB of request had an answer of 408 MB, and the front end grew by twice that."""
    fields = {"prompt": ["xx"] * 32, "n": 128, "logprobs": 20, **fields}
    with pytest.raises(InvalidRequest) as error:
        plan(**fields)
    assert error.value.param == "logprobs"
    assert f"at most {2**22}" in error.value.message
    assert "lower logprobs" in error.value.message
    assert plan(**{**fields, "logprobs": 14})
    assert plan(**{**fields, "logprobs": None})


def test_what_is_echoed_is_limited(monkeypatch):
    monkeypatch.setattr("nanogpt.api.plan.MAX_ECHOED_CHARS", 4096)
    fields = {"prompt": ["x" * 20, "x" * 13], "n": 128, "echo": True}
    with pytest.raises(InvalidRequest, match="4224 characters") as error:
        plan(**fields)
    assert error.value.param == "echo"
    assert plan(**{**fields, "n": 124})
    assert plan(**{**fields, "echo": False})


@pytest.mark.parametrize("half", ["\\ud800", "\\uDFFF", "\\ud83d\\ud83d\\ude00", "\\ude00\\ud83d"])
def test_half_a_character_is_told_as_such(half):
    """It was "Input data was truncated", of a body that was complete."""
    with pytest.raises(InvalidRequest, match="surrogate"):
        parse_completion(f'{{"model": "m", "prompt": "{half}"}}'.encode(), JSON)
    assert parse(prompt="\N{GRINNING FACE}").prompt == "\N{GRINNING FACE}"
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse_completion(b'{"model": "m", "prompt": "\\ud83d\\ude00"', JSON)


def test_a_prompt_that_cannot_fit_is_not_tokenised():
    tokenizer = ByteTokenizer()
    too_long = "a" * (tokenizer.max_token_bytes * INFO.context_length + 1)
    with pytest.raises(ContextLengthExceeded):
        make_plan(parse(prompt=too_long), INFO, tokenizer)
    assert tokenizer.encoded == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [ByteTokenizer.n_vocab]),
        ("prompt", [[1], [10**30]]),
        ("logit_bias", {str(ByteTokenizer.n_vocab): 1}),
        ("stop_token_ids", [ByteTokenizer.n_vocab]),
    ],
)
def test_ids_outside_the_vocabulary(field, value):
    with pytest.raises(InvalidRequest) as error:
        plan(**{field: value})
    assert error.value.param == field
    assert str(ByteTokenizer.n_vocab - 1) in error.value.message


def test_sampling_params():
    made = plan(
        prompt="x",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"7": -3},
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
        logprobs=3,
        echo=True,
        seed=-5,
        n=2,
        best_of=4,
        priority=-1,
    )
    assert (made.request.n, made.request.priority, made.created) == (4, -1, 1234)
    params = msgspec.to_builtins(made.request.params, str_keys=True)
    assert params == {
        "seed": -5,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -3.0},
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": (9,),
        "logprobs": 3,
        "prompt_logprobs": True,
    }


def test_a_seed_is_drawn_once_for_each_request():
    seeds = {plan(prompt="x").request.params.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed <= INT64_MAX for seed in seeds)


def test_log_probabilities_are_asked_for_when_best_of_needs_them():
    assert plan(prompt="x", best_of=2).request.params.logprobs == 0
    assert plan(prompt="x", n=2, best_of=2).request.params.logprobs is None
    assert not plan(prompt="x", echo=True).request.params.prompt_logprobs


def test_find_model():
    assert find_model({"a": INFO}, "a") is INFO
    with pytest.raises(ModelNotFound) as error:
        find_model({"a": INFO}, "b" * 1000)
    assert len(error.value.message) < 400


def test_real_name():
    cards = {
        "a": msgspec.convert(
            {
                "name": "a",
                "hub": "a",
                "aliases": ["b", "c"],
                "tokenizer": "gpt2",
                "context": 64,
                "shape": {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 257},
                "dtype": "float32",
                "licence": "MIT",
            },
            ModelCard,
        )
    }
    assert [real_name({"a": INFO, "c": INFO}, name, cards) for name in "abcd"] == list("aacd")
    with pytest.raises(Unavailable) as starting:
        real_name({}, "a", cards)
    assert starting.value.code == "starting"
    assert isinstance(starting.value, ApiError)
