"""A last look at a request before it is scheduled: what would break a batch is refused alone.

The front end has validated it by its own rules; a request that fails here is a bug of ours, and
it must not take the others with it.
"""

import math

from nanogpt.engine.logprobs import MAX_TOP_LOGPROBS
from nanogpt.request import GenerateRequest
from nanogpt.sampling_params import SamplingParams

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0  # counters of tokens / weight stay exact for years


def problem_with(request: GenerateRequest, *, vocab_size: int, context_length: int) -> str | None:
    """What is wrong with a request, or None."""
    count = len(request.prompts) * request.n
    if request.n < 1 or not request.prompts:
        return "there is no prompt or no choice"
    if len(request.owners) != count:
        return f"{len(request.owners)} owners for {count} choices"
    if request.resumed and len(request.resumed) != count:
        return f"resumed tokens of {len(request.resumed)} choices, there are {count}"
    if not MIN_WEIGHT <= request.weight <= MAX_WEIGHT:
        return f"weight is {request.weight}; it must be from {MIN_WEIGHT} to {MAX_WEIGHT}"
    for prompt in request.prompts:
        crops = request.params.crop and not request.params.prompt_logprobs
        if not prompt or (len(prompt) > context_length and not crops):
            return f"a prompt of {len(prompt)} tokens; the context has {context_length}"
    for tokens in (*request.prompts, *request.resumed):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            return f"a token id is out of range; the vocabulary has {vocab_size}"
    return _problem_with_params(request.params, vocab_size)


def _problem_with_params(params: SamplingParams, vocab_size: int) -> str | None:
    numbers = {
        "temperature": (params.temperature, 0.0, math.inf),
        "top_p": (params.top_p, 0.0, 1.0),
        "top_k": (params.top_k, 0, math.inf),
        "min_p": (params.min_p, 0.0, 1.0),
        "max_tokens": (params.max_tokens, 0, math.inf),
        "min_tokens": (params.min_tokens, 0, math.inf),
        "presence_penalty": (params.presence_penalty, -math.inf, math.inf),
        "frequency_penalty": (params.frequency_penalty, -math.inf, math.inf),
        "logprobs": (params.logprobs or 0, 0, MAX_TOP_LOGPROBS),
    }
    for name, (value, low, high) in numbers.items():
        if not (math.isfinite(value) and low <= value <= high):
            return f"{name} is {value}; it must be from {low} to {high}"
    if not (math.isfinite(params.repetition_penalty) and params.repetition_penalty > 0):
        return f"repetition_penalty is {params.repetition_penalty}; it must be positive"
    if not all(math.isfinite(bias) for bias in params.logit_bias.values()):
        return "a logit bias is not finite"
    for token_id in (*params.logit_bias, *params.stop_token_ids):
        if not 0 <= token_id < vocab_size:
            return f"token id {token_id} is out of range; the vocabulary has {vocab_size}"
    return None
