"""What is known of a model without its weights: name, limits, tokenizer, fingerprint."""

from typing import Literal

import msgspec


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to build a tokenizer anywhere, without torch.

    kind "char": `characters[i]` is the text of token i, and there is no end token.
    kind "gpt2": GPT-2's byte pairs; `directory` holds vocab.json and merges.txt, or is empty for
    the files that tiktoken knows (downloaded once, or found in TIKTOKEN_CACHE_DIR).
    """

    kind: Literal["char", "gpt2"]
    characters: str = ""
    directory: str = ""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model as the front end sees it."""

    name: str
    context_length: int  # tokens of prompt and completion together
    vocab_size: int  # ids the tokenizer has; padding rows are never sampled
    eos_token_id: int | None
    start_token_id: int  # stands for an empty prompt
    tokenizer: TokenizerSpec
    dtype: str
    fingerprint: str  # of weights and dtype, hexadecimal
    created: int  # seconds since the epoch
    num_parameters: int
