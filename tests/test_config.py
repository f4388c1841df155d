"""Configuration from options, variables and files; a mistake is one line that says what to do."""

import tomllib

import msgspec
import pytest

from nanogpt import config, options
from nanogpt.config import PROJECT, ServeConfig
from nanogpt.errors import ConfigError


def parse(*argv: str, **environ: str) -> ServeConfig:
    return options.parse(argv, environ)


def test_defaults_serve_the_bundled_model_on_loopback():
    assert parse() == ServeConfig()
    assert (ServeConfig().host, ServeConfig().port) == ("127.0.0.1", 8000)


def test_options_win_over_variables_and_variables_over_the_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "a"\nlog_level = "debug"\n[engine]\nblock_size = 32\n')
    got = parse("--config", str(file), "--port", "3", NANOGPT_PORT="2", NANOGPT_HOST="b")
    assert (got.port, got.host, got.log_level, got.engine.block_size) == (3, "b", "debug", 32)


def test_sections_merge_key_by_key(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("[engine]\nblock_size = 32\nmax_num_seqs = 7\n")
    got = parse("--config", str(file), NANOGPT_ENGINE_BLOCK_SIZE="64").engine
    assert (got.block_size, got.max_num_seqs) == (64, 7)


def test_models_repeat_or_are_listed():
    assert parse("--model", "a", "--model", "b=/p").models == ("a", "b=/p")
    assert parse(NANOGPT_MODEL="a, b=/p").models == ("a", "b=/p")


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--prot", "1"], {}, ["--prot", "--port"]),
        (["--port"], {}, ["--port"]),
        (["stray"], {}, ["stray"]),
        (["--port", "0"], {}, ["port", "1"]),
        (["--port", "99999"], {}, ["port", "65535"]),
        (["--ranks", "many"], {}, ["ranks"]),
        (["--device", "tpu"], {}, ["device"]),
        (["--config", "/none.toml"], {}, ["/none.toml"]),
        (["--nnodes", "2"], {}, ["rdzv"]),
        (["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "h:1"], {}, ["node_rank"]),
        ([], {"NANOGPT_PROT": "1"}, ["NANOGPT_PROT", "NANOGPT_PORT"]),
        ([], {"NANOGPT_ENGINE_BLOCK_SIZ": "1"}, ["NANOGPT_ENGINE_BLOCK_SIZE"]),
        ([], {"NANOGPT_ENGINE_BLOCK_SIZE": "4"}, ["engine.block_size"]),
    ],
)
def test_mistakes_name_the_thing(argv, environ, words):
    with pytest.raises(ConfigError) as refused:
        parse(*argv, **environ)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", ["'prot'", "'port'"]),
        ("[engine]\nblock_siz = 1", ["engine.", "'block_size'"]),
        ("port = 'x'", ["port"]),
        ("port = ", ["TOML"]),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, words):
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        parse("--config", str(file))
    for word in [*words, "my.toml"]:
        assert word in str(refused.value)


@pytest.mark.parametrize("path", sorted((PROJECT / "configs/serve").glob("*.toml")), ids=str)
def test_every_shipped_configuration_loads(path):
    assert parse("--config", str(path)).models


def test_default_file_says_the_defaults():
    file = tomllib.loads((PROJECT / "configs/serve/default.toml").read_text())
    assert config.convert(file, ServeConfig) == ServeConfig()


def test_every_setting_has_a_variable():
    def names(kind, prefix="NANOGPT"):
        for field in msgspec.structs.fields(kind):
            name = f"{prefix}_{field.name.upper()}"
            if isinstance(field.type, type) and issubclass(field.type, config.Section):
                yield from names(field.type, name)
            elif field.name not in ("models", "keys", "patterns"):  # the last two are tables
                yield name

    variables = ["NANOGPT_MODEL", *names(ServeConfig)]
    assert "NANOGPT_ADMISSION_KEY_LIMITS_REQUESTS_PER_MINUTE" in variables
    for name in variables:
        config.from_environment({name: "1"})  # unknown ones raise


def test_variables_reach_tables_in_tables_and_lists():
    got = parse(
        NANOGPT_ADMISSION_KEY_LIMITS_TOKENS_PER_MINUTE="7",
        NANOGPT_ADMISSION_CONTENT_TERMS="a b, c",
        NANOGPT_HTTP_CORS_ORIGINS="https://a,https://b",
    )
    assert got.admission.key_limits.tokens_per_minute == 7
    assert got.admission.content.terms == ("a b", "c")
    assert got.http.cors_origins == ("https://a", "https://b")


def test_secrets_are_no_settings():
    assert parse(NANOGPT_API_KEYS="x", NANOGPT_ADMIN_KEY="y") == ServeConfig()
