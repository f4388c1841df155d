"""lm-evaluation-harness gives the same numbers through the server as through transformers.

Needs the extra `eval` (`.venv/bin/pip install -c constraints.txt -e .[eval]`), which is large; run
with `./tests/run -m large tests/test_lm_eval.py`.
"""

import pytest
from transformers import GPT2Tokenizer

from tests.hf_models import write_model
from tests.server import serving

pytestmark = [
    pytest.mark.large,
    pytest.mark.filterwarnings("default"),  # the harness's own
]

CONTEXT = 256
TEXT = "It was the best of times, it was the worst of times. "
PAIRS = [
    ("The capital of France is", " Paris"),
    ("2+2=", " 4 and more tokens here"),
    (TEXT * 12, " éàü 漢字"),
    ("", "Hello there"),
]
GENERATE = [
    ("The capital", {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}),
    ("Once upon", {"until": ["zzz"], "max_gen_toks": 16}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path, n_layer=2, n_head=4, n_embd=64, n_positions=CONTEXT)
    tokenizer = GPT2Tokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(directory):
    with serving("--dtype", "float32", "--model", f"m={directory}") as server:
        yield server


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_numbers_equal_transformers(server, directory, backend, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def ask(model, kind, arguments):
        requests = [
            Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
        ]
        return getattr(model, kind)(requests)

    ours = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="m",
        tokenizer=str(directory) if backend == "huggingface" else None,
        tokenizer_backend=backend,
        max_length=CONTEXT,
    )
    # Over HTTP the harness keeps a token of the context for generation, and one more when it
    # rolls: only with the same windows can the sums be the same.
    theirs = HFLM(
        pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, max_length=254
    )
    for got, want in zip(
        ask(ours, "loglikelihood", PAIRS), ask(theirs, "loglikelihood", PAIRS), strict=True
    ):
        assert got[0] == pytest.approx(want[0], abs=1e-3)
        assert got[1] == want[1]
    rolling = [(TEXT * 36,), ("short one",)]
    assert ask(ours, "loglikelihood_rolling", rolling) == pytest.approx(
        ask(theirs, "loglikelihood_rolling", rolling), rel=1e-5
    )
    assert ask(ours, "generate_until", GENERATE) == ask(theirs, "generate_until", GENERATE)
