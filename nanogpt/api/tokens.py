"""Tokens as text for people and programs."""

from nanogpt.api.objects import TokenizerInfo
from nanogpt.registry import ModelInfo
from nanogpt.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""The token's text, or bytes:\xe2\x80 when it is not valid UTF-8 by itself.

    So no two tokens of a vocabulary have the same name.
    """
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def tokenizer_info(info: ModelInfo, tokenizer: Tokenizer) -> TokenizerInfo:
    """In the words of Hugging Face's tokenizer_config.json, as lm-eval's remote tokenizer reads.

    GPT-2 has one special token for every purpose; a character model has none.
    """
    eos = None if info.eos_token_id is None else token_text(tokenizer, info.eos_token_id)
    kinds = {"gpt2": "GPT2Tokenizer", "char": "CharacterTokenizer"}
    return TokenizerInfo(
        tokenizer_class=kinds[info.tokenizer.kind],
        vocab_size=info.vocab_size,
        model_max_length=info.context_length,
        bos_token=eos,
        eos_token=eos,
        unk_token=eos,
        pad_token=eos,
    )
