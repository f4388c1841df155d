"""How one request wants its tokens chosen: typed, validated upstream, frozen."""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything the engine needs to choose tokens for a choice. Neutral values are the defaults.

    The front end validates ranges and always fills `seed`; stop strings and `n` are not here,
    since text and choices are the front end's business.

    `logprobs`: None for none, else report the chosen token and this many of the likeliest.
    `prompt_logprobs`: report them for the prompt's tokens as well (echo).
    Log probabilities are those of the model itself: before bias, penalties and temperature.
    """

    seed: int
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0  # no end token and no stop token before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    crop: bool = False  # past the context, see the last context_length tokens; else end there

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_filtered(self) -> bool:
        """Some tokens are left out before one is drawn."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def is_penalised(self) -> bool:
        """Tokens that were there before weigh otherwise."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)
