"""Settings: every row, both ways; what is refused and what the refusal says; nothing secret in any text."""

from __future__ import annotations

import dataclasses
import pickle
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import SettingsError
from rkmetrics.settings import GROUPS, SETTINGS, Secret, Settings

ALLOWED = ("10.0.0.0/8", "fd00::/8", "10.1.2.3/32")

# variable, text, field, value
GOOD: list[tuple[str, str, str, Any]] = [
    ("METRICS_ENABLED", "1", "metrics_enabled", True),
    ("METRICS_ENABLED", "TRUE", "metrics_enabled", True),
    ("METRICS_ENABLED", "yes", "metrics_enabled", True),
    ("METRICS_ENABLED", "on", "metrics_enabled", True),
    ("METRICS_ENABLED", "0", "metrics_enabled", False),
    ("METRICS_ENABLED", "False", "metrics_enabled", False),
    ("METRICS_ENABLED", "no", "metrics_enabled", False),
    ("METRICS_ENABLED", "off", "metrics_enabled", False),
    ("METRICS_ENABLED", "", "metrics_enabled", False),
    ("RIVETKIT_METRICS_ENABLED", "1", "metrics_enabled", True),
    ("METRICS_TOKEN", "s3cret", "metrics_token", Secret(b"s3cret")),
    ("METRICS_TOKEN", "  s3cret\n", "metrics_token", Secret(b"s3cret")),
    ("METRICS_TOKEN", " \t ", "metrics_token", None),
    ("METRICS_TOKEN", "m\u00fctze", "metrics_token", Secret("m\u00fctze".encode())),
    ("METRICS_TOKEN", "\udcff", "metrics_token", Secret(b"\xff")),
    ("RIVETKIT_METRICS_TOKEN", "s3cret", "metrics_token", Secret(b"s3cret")),
    ("METRICS_TOKEN_PREVIOUS", "old", "metrics_token_previous", Secret(b"old")),
    ("METRICS_TOKEN_FILE", "/run/secrets/token", "metrics_token_file", "/run/secrets/token"),
    ("METRICS_ACCESS", "OPEN", "metrics_access", "open"),
    ("RKMETRICS_INSPECT_TOKEN", "x", "inspect_token", Secret(b"x")),
    ("RKMETRICS_HOST", "::1", "host", "::1"),
    ("RKMETRICS_PORT", "0", "port", 0),
    ("RKMETRICS_PORT", "65535", "port", 65535),
    ("RKMETRICS_SHARED_DIR", "/run/cells", "shared_dir", "/run/cells"),
    ("RKMETRICS_MAX_ACTOR_NAMES", "1", "max_actor_names", 1),
    ("RKMETRICS_PURE_PYTHON", "1", "pure_python", True),
    ("RKMETRICS_KV_PLANE", "Off", "kv_plane", "off"),
    ("DYN_REQUEST_PLANE", "HTTP", "request_plane", "http"),
    ("DYN_REQUEST_PLANE", "  ", "request_plane", "tcp"),
    ("DYN_WIRE", "0.9", "wire", "0.9"),
    ("NATS_SERVER", "nats://10.0.0.1:4222", "nats_server", "nats://10.0.0.1:4222"),
    ("ETCD_ENDPOINTS", "http://a:2379, http://b:2379/", "etcd_endpoints", ("http://a:2379", "http://b:2379")),
    ("DYN_TCP_REQUEST_TIMEOUT", "2.5", "tcp_request_timeout_seconds", 2.5),
    ("DYN_HTTP_RPC_ROOT_PATH", "/v2/rpc/", "http_rpc_root_path", "/v2/rpc"),
    ("DYN_HTTP2_ADAPTIVE_WINDOW", "false", "http2_adaptive_window", False),
    ("RKMETRICS_ANNOUNCE_INTERVAL", "500ms", "announce_interval_seconds", 0.5),
    ("RKMETRICS_ANNOUNCE_INTERVAL", "2m", "announce_interval_seconds", 120.0),
    ("RKMETRICS_HEALTH_CHECK_TIMEOUT", "2s", "health_check_timeout_seconds", 2.0),
    ("RKMETRICS_LOAD_BALANCERS", "lb1:8080, lb2:8080", "load_balancers", ("http://lb1:8080", "http://lb2:8080")),
    ("RKMETRICS_LOAD_BALANCERS", "https://lb/,[::1]:80", "load_balancers", ("https://lb", "http://[::1]:80")),
    ("RKMETRICS_ADVERTISE_ADDRESS", "10.0.1.5", "advertise_address", "10.0.1.5"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "fd00::5", "advertise_address", "fd00::5"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "[fd00::5]:3000", "advertise_address", "[fd00::5]:3000"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "backend-1:3000", "advertise_address", "backend-1:3000"),
    ("RKMETRICS_ALLOWED_NETWORKS", "10.0.0.0/8, FD00::/8, 10.1.2.3", "allowed_networks", ALLOWED),
    ("RKMETRICS_ALLOWED_PORTS", "80,3000-3010", "allowed_ports", ("80", "3000-3010")),
    ("RKMETRICS_STATIC_BACKENDS", "10.0.1.5:3000/9090", "static_backends", ("10.0.1.5:3000/9090",)),
    ("RKMETRICS_PANIC_RATIO", ".25", "panic_ratio", 0.25),
    ("RKMETRICS_PANIC_RATIO", "1", "panic_ratio", 1.0),
]

# variable, text, a part of what is expected
BAD = [
    ("METRICS_ENABLED", "maybe", "1, true, yes or on"),
    ("METRICS_ENABLED", "2", "1, true, yes or on"),
    ("METRICS_TOKEN", "two\nlines", "one line"),
    ("METRICS_ACCESS", "opne", "token, open"),
    ("RKMETRICS_HOST", "a b", "host name"),
    ("RKMETRICS_PORT", "80a", "0 to 65535"),
    ("RKMETRICS_PORT", "-1", "0 to 65535"),
    ("RKMETRICS_PORT", "65536", "0 to 65535"),
    ("RKMETRICS_PORT", "9_090", "0 to 65535"),
    ("RKMETRICS_PORT", "\u0669", "0 to 65535"),
    ("RKMETRICS_PORT", "9" * 5000, "0 to 65535"),
    ("RKMETRICS_METRICS_PORT", "0", "1 to 65535"),
    ("RKMETRICS_MAX_ACTOR_NAMES", "0", "1 to 1000000"),
    ("DYN_REQUEST_PLANE", "bogus", "tcp, http, nats"),
    ("DYN_WIRE", "1.0", "0.7, 0.8, 0.9"),
    ("RKMETRICS_KV_PLANE", "http", "auto, nats, off"),
    ("NATS_SERVER", "localhost:4222", "nats://host:port"),
    ("NATS_SERVER", "nats://", "nats://host:port"),
    ("ETCD_ENDPOINTS", "http://a:2379,b", "separated by commas"),
    ("DYN_TCP_REQUEST_TIMEOUT", "nan", "seconds"),
    ("DYN_TCP_REQUEST_TIMEOUT", "inf", "seconds"),
    ("DYN_TCP_REQUEST_TIMEOUT", "0", "seconds"),
    ("DYN_TCP_MAX_MESSAGE_SIZE", "32MB", "whole number"),
    ("DYN_HTTP_RPC_ROOT_PATH", "v1/rpc", "begins with /"),
    ("DYN_HTTP2_MAX_FRAME_SIZE", "16383", "16384"),
    ("RKMETRICS_LOAD_BALANCERS", "lb1", "host:port, or a URL"),
    ("RKMETRICS_LOAD_BALANCERS", "lb1:8080,ftp://lb2", "host:port, or a URL"),
    ("RKMETRICS_LOAD_BALANCERS", "bob:hunter2@lb:80", "host:port, or a URL"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "0.0.0.0", "never 0.0.0.0"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "[::]:80", "never 0.0.0.0"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "10.0.1.5:0", "never 0.0.0.0"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "10.0.1.5:70000", "never 0.0.0.0"),
    ("RKMETRICS_ADVERTISE_ADDRESS", "http://a:1", "never 0.0.0.0"),
    ("RKMETRICS_ALLOWED_NETWORKS", "10.0.0.1/8", "a network such as 10.0.0.0/8"),
    ("RKMETRICS_ALLOWED_NETWORKS", "everywhere", "a network such as 10.0.0.0/8"),
    ("RKMETRICS_ALLOWED_NETWORKS", "2130706433", "a network such as 10.0.0.0/8"),
    ("RKMETRICS_ALLOWED_PORTS", "0", "a port, or two"),
    ("RKMETRICS_ALLOWED_PORTS", "90-80", "a port, or two"),
    ("RKMETRICS_ALLOWED_PORTS", "80-", "a port, or two"),
    ("RKMETRICS_STATIC_BACKENDS", "10.0.1.5:3000", "host:port/metrics_port"),
    ("RKMETRICS_STATIC_BACKENDS", "10.0.1.5/9090", "host:port/metrics_port"),
    ("RKMETRICS_PANIC_RATIO", "50%", "a number from 0 to 1"),
    ("RKMETRICS_PANIC_RATIO", "1.1", "a number from 0 to 1"),
    ("RKMETRICS_PANIC_RATIO", "nan", "a number from 0 to 1"),
    ("RKMETRICS_HEALTH_CHECK_FALL", "0", "1 to 100"),
]


@pytest.mark.parametrize(("variable", "text", "field", "value"), GOOD)
def test_a_variable_becomes_its_field(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(Settings.from_env({variable: text}), field) == value


@pytest.mark.parametrize(("variable", "text", "expected"), BAD)
def test_a_bad_value_names_the_variable_and_what_is_expected(variable: str, text: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable: text})
    assert str(caught.value).startswith(f"{variable}=")
    assert expected in str(caught.value)
    assert variable == caught.value.name


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()


def test_each_field_has_one_row_and_each_row_a_field_a_group_and_a_sentence() -> None:
    assert sorted(setting.field for setting in SETTINGS) == sorted(Settings.__dataclass_fields__)
    names = [name for setting in SETTINGS for name in (setting.variable, *setting.aliases)]
    assert len(names) == len(set(names))
    assert all(setting.help.endswith(".") for setting in SETTINGS)
    assert {setting.group for setting in SETTINGS} == set(GROUPS)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.default not in (None, ())], ids=lambda s: str(s.variable))
def test_a_default_is_a_value_that_its_own_variable_could_have(setting: Any) -> None:
    settings = Settings.from_env({setting.variable: setting.show(Settings())})
    assert getattr(settings, setting.field) == setting.default


def test_an_alias_in_an_error_is_named_as_it_was_set() -> None:
    with pytest.raises(SettingsError, match=r"^RIVETKIT_METRICS_ENABLED='x'"):
        Settings.from_env({"RIVETKIT_METRICS_ENABLED": "x"})


def test_the_name_itself_wins_over_its_alias() -> None:
    assert not Settings.from_env({"RIVETKIT_METRICS_ENABLED": "1", "METRICS_ENABLED": "0"}).metrics_enabled


def test_an_unknown_name_stops_with_a_suggestion_and_without_its_value() -> None:
    with pytest.raises(SettingsError, match="did you mean RKMETRICS_INSPECT_TOKEN") as caught:
        Settings.from_env({"RKMETRICS_INSPECT_TOKN": "hunter2"})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SettingsError, match="settings show"):
        Settings.from_env({"RKMETRICS_ZZZZZZZZZZZ": "1"})


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"RKMETRICS_PROT": "1", "RKMETRICS_PORT": "x", "METRICS_TOKEN": "hun\nter2"})
    assert str(caught.value) == "RKMETRICS_PROT: unknown setting; did you mean RKMETRICS_PORT? (environment)"
    assert [note.partition("=")[0] for note in caught.value.__notes__] == ["METRICS_TOKEN", "RKMETRICS_PORT"]
    assert "ter2" not in "".join(caught.value.__notes__)


# field, value, a part of what is expected
BAD_IN_CODE: list[tuple[str, Any, str]] = [
    ("metrics_token", "hunter2", "Secret(...)"),
    ("metrics_token", b"hunter2", "Secret(...)"),
    ("inspect_token", "hunter2", "Secret(...)"),
    ("metrics_enabled", "1", "True or False"),
    ("metrics_enabled", 1, "True or False"),
    ("metrics_enabled", None, "True or False"),
    ("metrics_access", "OPEN", "one of: token, open"),
    ("metrics_token_file", 3, "text"),
    ("host", "a b", "host name"),
    ("host", None, "host name"),
    ("port", "9090", "0 to 65535"),
    ("port", True, "0 to 65535"),
    ("port", 65_536, "0 to 65535"),
    ("max_actor_names", 0, "1 to 1000000"),
    ("max_actor_names", 1.5, "1 to 1000000"),
    ("metrics_port", 0, "1 to 65535"),
    ("wire", 0.8, "0.7, 0.8, 0.9"),
    ("nats_server", "ftp://bob:hunter2@h", "nats://host:port"),
    ("etcd_endpoints", "http://bob:hunter2@h:1", "a tuple"),
    ("etcd_endpoints", ["http://bob:hunter2@h:1"], "a tuple"),
    ("etcd_endpoints", ("ftp://bob:hunter2@h:1",), "a tuple"),
    ("tcp_request_timeout_seconds", "1s", "a number of seconds"),
    ("tcp_request_timeout_seconds", float("nan"), "a number of seconds"),
    ("http_rpc_root_path", "v1", "begins with /"),
    ("allowed_networks", ("10.0.0.1/8",), "a tuple, each of it a network"),
    ("panic_ratio", 2, "0 to 1"),
    ("panic_ratio", True, "0 to 1"),
]


@pytest.mark.parametrize(("field", "value", "expected"), BAD_IN_CODE)
def test_a_bad_value_in_code_names_the_field_and_what_is_expected(field: str, value: Any, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**{field: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{field}=")
    assert sentence.endswith(" (Settings(...))")
    assert expected in sentence
    assert "hunter2" not in sentence
    with pytest.raises(SettingsError):
        dataclasses.replace(Settings(), **{field: value})


@pytest.mark.parametrize(("variable", "text", "field", "value"), GOOD)
def test_what_a_variable_gives_can_be_given_in_code(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(Settings(**{field: value}), field) == value


def test_names_of_others_are_left_alone() -> None:
    assert Settings.from_env({"DYN_SYSTEM_PORT": "x", "METRICS_COLOUR": "red", "PATH": "/bin"}) == Settings()


def test_nats_that_is_not_named_differs_from_nats_at_its_default_address() -> None:
    assert Settings().nats_server is None
    assert Settings().nats_url == "nats://localhost:4222"
    assert Settings.from_env({"NATS_SERVER": "nats://localhost:4222"}).nats_server == "nats://localhost:4222"


SECRET_VARIABLES = ["METRICS_TOKEN", "METRICS_TOKEN_PREVIOUS", "RKMETRICS_INSPECT_TOKEN", "RIVETKIT_METRICS_TOKEN"]


@pytest.mark.parametrize("variable", SECRET_VARIABLES)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_token_is_in_no_repr_error_or_listing(variable: str, text: str) -> None:
    """R16: secrets in no log, answer or repr; the mark between the quotes makes a hit certain."""
    token = f"\u2603{text}\u2603"
    try:
        settings = Settings.from_env({variable: token})
    except SettingsError as error:
        shown = str(error) + repr(error) + "".join(traceback.format_exception(error))
    else:
        shown = repr(settings) + str(settings) + "".join(setting.show(settings) for setting in SETTINGS)
    assert "\u2603" not in shown


def test_credentials_in_a_url_are_masked() -> None:
    environ = {
        "NATS_SERVER": "nats://bob:hunter2@h:1",
        "ETCD_ENDPOINTS": "http://bob:hunter2@h:1",
        "RKMETRICS_LOAD_BALANCERS": "http://bob:hunter2@h:1",
    }
    settings = Settings.from_env(environ)
    assert settings.nats_server == environ["NATS_SERVER"]
    assert "hunter2" not in repr(settings) + "".join(setting.show(settings) for setting in SETTINGS)
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"NATS_SERVER": "ftp://bob:hunter2@h"})
    assert "hunter2" not in str(caught.value)


def test_a_secret_compares_by_value_and_shows_nothing() -> None:
    secret = Secret(b"hunter2")
    assert secret == Secret(b"hunter2")
    assert hash(secret) == hash(Secret(b"hunter2"))
    assert secret != Secret(b"hunter3")
    assert secret != b"hunter2"
    assert [repr(secret), str(secret), f"{secret}", "%s" % secret] == ["<secret>"] * 4  # noqa: UP031
    assert secret.reveal() == b"hunter2"


def test_a_secret_takes_text_as_its_utf_8_bytes_and_nothing_but_text_and_bytes() -> None:
    assert Secret("m\u00fctze") == Secret("m\u00fctze".encode())
    with pytest.raises(TypeError):
        Secret(5)  # type: ignore[arg-type]


def test_settings_do_not_change_and_can_be_replaced() -> None:
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]
    assert dataclasses.replace(settings, port=1).port == 1


def test_settings_reach_a_spawned_worker_whole() -> None:
    settings = Settings(metrics_token=Secret(b"x"), port=7)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_durations_and_sizes_have_the_unit_of_their_field() -> None:
    units = {setting.variable: setting.unit for setting in SETTINGS}
    assert units["DYN_TCP_REQUEST_TIMEOUT"] == "seconds"
    assert units["DYN_TCP_MAX_MESSAGE_SIZE"] == "bytes"
    assert units["RKMETRICS_PORT"] == ""
