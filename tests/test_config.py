"""Settings: where they come from, which wins, and what a mistake says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.config import (
    ModelConfig,
    ScalingConfig,
    ServeConfig,
    TenantConfig,
    config_schema,
    load_api_keys,
    load_config,
    parse_duration,
    parse_size,
)
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "dormouse.example.yaml"
REFERENCE = ROOT / "docs" / "configuration.md"


def load(tmp_path: Path, text: str, environ: dict[str, str] | None = None, **flags: object) -> ServeConfig:
    path = tmp_path / "dormouse.yaml"
    path.write_text(text)
    return load_config(path, environ={"HOME": str(tmp_path)} | (environ or {}), flags=flags)


def complaint(tmp_path: Path, text: str, environ: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ, **flags)
    return str(caught.value).replace(str(tmp_path), "")


def test_right_one_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "").port == 8114
    assert load(tmp_path, "port: 1").port == 1
    assert load(tmp_path, "port: 1", {"DORMOUSE_PORT": "2"}).port == 2
    assert load(tmp_path, "port: 1", {"DORMOUSE_PORT": "2"}, port=3, host=None).port == 3


def test_models_of_the_command_line_join_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dormouse.yaml"
    path.write_text("models: {one: {threads: 3}}")
    config = load_config(path, environ={"HOME": "/h"}, models={"two": {"keep_alive": "5s"}})
    assert (config.models["one"].threads, config.models["two"].keep_alive) == (3, 5.0)


def test_data_dir_defaults_to_home_then_xdg_then_the_users_share() -> None:
    assert default_data_dir({"DORMOUSE_HOME": "/a", "XDG_DATA_HOME": "/b"}) == Path("/a")
    assert default_data_dir({"XDG_DATA_HOME": "/b", "HOME": "/h"}) == Path("/b/dormouse")
    assert default_data_dir({"HOME": "/h"}) == Path("/h/.local/share/dormouse")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("250ms", 0.25), ("2d", 172800), ("forever", math.inf)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert ModelConfig.model_validate({"keep_alive": text}).keep_alive == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("1024", 1024), ("2GiB", 2 << 30), ("1.5KiB", 1536), ("512MB", 512_000_000), ("3 B", 3)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert isinstance(value, float | int) and value >= 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "data_dir: ~nosuchuser/x",
            "line 1: data_dir: '~nosuchuser/x' names the home folder of ~nosuchuser",
        ),
        ("prot: 1", "dormouse.yaml, line 1: prot: no such setting. Did you mean port? Allowed here: adapter_routes"),
        ("host: a\nport: 70000", "line 2: port: Input should be less than or equal to 65535, not 70000. TCP port"),
        ("models:\n  m:\n    keep_alive: soon", "line 3: models.m.keep_alive: 'soon' is not a duration"),
        ("models:\n  m:\n    keepalive: 5", "line 3: models.m.keepalive: no such setting. Did you mean keep_alive?"),
        ("models:\n  m:\n\n    engine: vllm", "line 4: models.m.engine: Input should be 'transformers' or 'null'"),
        ("models:\n  A B: {}", "line 2: models.A B: not a model name. Use up to 64 of a-z"),
        ("models:\n  m:", "line 2: models.m: must be a mapping of settings. Write {} for"),
        ("tenants:\n  A: {}", "line 2: tenants.A: not a tenant name. Use up to 64 of a-z"),
        ("tenants:\n  acme:", "line 2: tenants.acme: must be a mapping of settings. Write {} for a tenant"),
        (
            "tenants:\n  acme:\n    cap: 0",
            "line 3: tenants.acme.cap: Input should be greater than or equal to 1, not 0",
        ),
        (
            "tenants:\n  acme:\n    priority: 11",
            "line 3: tenants.acme.priority: Input should be less than or equal to 10",
        ),
        ("tenants:\n  acme:\n    prio: 1", "line 3: tenants.acme.prio: no such setting. Did you mean priority?"),
        ("models: [m]", "line 1: models: Input should be a valid dictionary"),
        ("max_body_bytes: 4 MiX", "line 1: max_body_bytes: '4 MiX' is not a size"),
        ("ping_interval: forever", "line 1: ping_interval: 'forever' must end some day"),
        ("ping_interval: 0", "line 1: ping_interval: Input should be greater than 0, not 0"),
        ("port: 1\nport: 2", "line 2: not valid YAML: 'port' is given twice"),
        ("a: &x {}\nb: *x", "line 2: not valid YAML: aliases (*name) are not allowed"),
        ("port: [", "not valid YAML"),
        ("- port", "line 1: the file must be a mapping of settings"),
        ("? [a]\n: 1", "line 1: not valid YAML: a setting's name must be plain text"),
        ("port: !!python/object:os.system 1", "line 1: not valid YAML: could not determine a constructor"),
        ("[" * 3000, "not valid YAML"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("port: x\nhost: 3", "(and 1 more)"),
        ("\x00", "not valid YAML"),
    ],
)
def test_mistakes_name_file_line_and_what_is_allowed(tmp_path: Path, text: str, says: str) -> None:
    assert says in complaint(tmp_path, text)


def test_mistakes_elsewhere_name_their_place(tmp_path: Path) -> None:
    assert complaint(tmp_path, "", {"DORMOUSE_PORT": "x"}).startswith("environment variable DORMOUSE_PORT: port:")
    assert complaint(tmp_path, "", log_level="loud").startswith("--log-level: log_level:")


def test_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml", environ={"HOME": "/h"})
    (tmp_path / "big.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="is over"):
        load_config(tmp_path / "big.yaml", environ={"HOME": "/h"})
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bin.yaml", environ={"HOME": "/h"})


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_settings_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        assert load_config(path, environ={"HOME": "/h"}).port >= 0
    except ConfigError as error:
        assert str(error)


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\none\n\n two \n")
    config = load(tmp_path, f"api_keys_file: {keys}")
    keys.write_bytes(b"\xef\xbb\xbf" + keys.read_bytes())  # what some editors put in front
    given = {"DORMOUSE_API_KEYS": "three, four:4,"}
    assert load_api_keys(config, given) == dict.fromkeys(("three", "four:4", "one", "two"), "")
    assert load_api_keys(load(tmp_path, ""), {}) == {}
    keys.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_api_keys(config, {})
    keys.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_api_keys(config, {})


TENANTS = "tenants: {acme: {cap: 2, priority: 1}, zoo: {}}"


def keys_of(tmp_path: Path, content: bytes, environ: dict[str, str] | None = None) -> dict[str, str]:
    path = tmp_path / "keys"
    path.write_bytes(content)
    return load_api_keys(load(tmp_path, f"api_keys_file: {path}\n{TENANTS}"), environ or {})


def test_tenants_have_no_cap_and_no_priority_unless_given(tmp_path: Path) -> None:
    tenants = load(tmp_path, TENANTS, {"DORMOUSE_TENANTS": "none"}).tenants
    assert tenants == {"acme": TenantConfig(cap=2, priority=1), "zoo": TenantConfig(cap=None, priority=0)}


def test_a_tenant_stands_after_its_key(tmp_path: Path) -> None:
    content = b"# ours\r\nk:1 acme\r\n\tk,2\t zoo \r\nk#3\n  # k4 acme\nk5 acme\rk5 acme\n"
    assert keys_of(tmp_path, content) == {"k:1": "acme", "k,2": "zoo", "k#3": "", "k5": "acme"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"s3cret Acme!", "line 1: what follows the key is not a tenant's name"),
        (b"s3cret acme # ours", "line 1: 3 words follow the key"),
        (b"\n\ns3cret acmee", "line 3: the tenant that follows the key is not configured"),
        (b"x acme\ns3cret " + b"a" * 65, "line 2: what follows the key is not a tenant's name"),
        (b"s3cret acme\ns3cret zoo", "line 2: this key was given before, with another tenant"),
        (b"s3cret\ns3cret acme", "line 2: this key was given before, with another tenant or without one"),
        (b"s3cret\0 acme", "line 1: a key has characters that are not visible ASCII"),
        ("s3cré".encode(), "line 1: a key has characters"),
        (b"x acme\x0bs3cret", "line 1: 2 words follow the key"),
        (b"x\xc2\x85s3cret", "line 1: the tenant that follows the key is not configured"),
        (b"s3cret\xff", "cannot be read"),
        (b"s3cret\n" * 200_000, "is over 1048576 bytes"),
        (b"s3cret " * 100_000, "line 1: 99999 words follow the key"),
        (b"\n \n#\n", "holds no key"),
        (b"", "holds no key"),
    ],
    ids=range(15),
)
def test_a_key_file_that_is_wrong_lifts_no_cap_and_no_secret(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keys_of(tmp_path, content)
    assert says in str(caught.value) and "s3c" not in str(caught.value)


def test_a_tenant_that_is_not_configured_is_told_from_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="take one of those there: acme, zoo"):
        keys_of(tmp_path, b"key zo")
    (tmp_path / "keys").write_text("key zoo")
    with pytest.raises(ConfigError, match=r"Add it under `tenants:` in the configuration$"):
        load_api_keys(load(tmp_path, f"api_keys_file: {tmp_path / 'keys'}"), {})


def test_the_environment_cannot_take_a_key_out_of_its_tenant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: this key was given before"):
        keys_of(tmp_path, b"one acme", {"DORMOUSE_API_KEYS": "two,one"})
    with pytest.raises(ConfigError, match="environment variable DORMOUSE_API_KEYS: a key has characters"):
        keys_of(tmp_path, b"one acme", {"DORMOUSE_API_KEYS": "two acme"})


@given(st.binary(max_size=120) | st.text("ab #\t\r\n\0é", max_size=60).map(str.encode))
def test_any_bytes_are_keys_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-keys"
    path.write_bytes(content)
    config = ServeConfig(data_dir=Path("/d"), api_keys_file=path, tenants={"a": TenantConfig()})
    try:
        keys = load_api_keys(config, {})
    except ConfigError as error:
        assert str(error)
    else:
        assert keys and set(keys.values()) <= {"", "a"} and not any(set(key) & set(" \t\r\n") for key in keys)


def test_folders_are_private(tmp_path: Path) -> None:
    folders = DataDir(tmp_path / "data").create()
    assert folders.run.stat().st_mode & 0o777 == 0o700 == folders.root.stat().st_mode & 0o777
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Set data_dir"):
        DataDir(tmp_path / "file").create()


def test_example_file_is_valid_and_shows_every_setting() -> None:
    config = load_config(EXAMPLE, environ={"HOME": "/h"})
    assert config.models
    text = EXAMPLE.read_text()
    for name in (
        *ServeConfig.model_fields,
        *ModelConfig.model_fields,
        *ScalingConfig.model_fields,
        *TenantConfig.model_fields,
    ):
        assert f"{name}:" in text, name


def test_schema_describes_every_setting() -> None:
    schema = config_schema()
    assert "data_dir" not in schema.get("required", ()) and schema["additionalProperties"] is False
    own = [schema["$defs"][name]["properties"] for name in ("ModelConfig", "ScalingConfig", "TenantConfig")]
    for properties in (schema["properties"], *own):
        for name, entry in properties.items():
            assert entry.get("description"), name
    json.dumps(schema, allow_nan=False)


def test_reference_has_every_setting_in_its_own_words() -> None:
    text = REFERENCE.read_text()
    for settings in (ServeConfig, ModelConfig, ScalingConfig, TenantConfig):
        for name, field in settings.model_fields.items():
            assert f"| `{name}` |" in text and (field.description or "?") in text, name
