"""Secrets: never written, never shown, filled in where they are used, and free to change while a run goes on."""

from pathlib import Path
from typing import Any

import pytest

from kto_ray.config import RunConfig, load, public, require_same, to_yaml
from kto_ray.errors import UserError
from kto_ray.people.address import database_url
from kto_ray.preflight import describe
from kto_ray.relabel import saved_config
from kto_ray.secrets import fill, hide, hide_in_database
from kto_ray.storage import Storage

INLINE = "postgresql+psycopg://kto:s3cret@host/answers"
NAMED = "postgresql+psycopg://kto:$KTO_PASSWORD@host/answers"
MANY = {
    "url": "https://ann:s3cret@example.org/score?api_key=s3cret&size=9",
    "headers": {"X-Any": "s3cret", "Authorization": "Bearer s3cret"},
    "hf_token": "s3cret",
    "extra": {"password": "s3cret"},
}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a red circle: 5 @ home", "a red circle: 5 @ home"),
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("http://127.0.0.1:8000/score?size=9", "http://127.0.0.1:8000/score?size=9"),
        ("https://ann:s3cret@host/x", "https://ann:***@host/x"),
        ("https://ann:$PASSWORD@host/x?token=${TOKEN}", "https://ann:$PASSWORD@host/x?token=${TOKEN}"),
        ("https://host/x?size=9&access_token=s3cret&y=1", "https://host/x?size=9&access_token=***&y=1"),
        ({"tokenizer": "bert", "max_tokens": 200, "api_key_env": "JUDGE"},) * 2,
        ({"api_key": "s3cret", "Token": "$TOKEN"}, {"api_key": "***", "Token": "$TOKEN"}),
        ({"password": "pa$$word", "passwords": ["a"]}, {"password": "***", "passwords": ["***"]}),
        ({"headers": {"X-Any": "s3cret", "X-Key": "key $KEY"}}, {"headers": {"X-Any": "***", "X-Key": "key $KEY"}}),
        ([{"secret": ["s3cret"]}, None, 1.5], [{"secret": ["***"]}, None, 1.5]),
    ],
)
def test_secrets_are_hidden_and_nothing_else_is(value: Any, shown: Any) -> None:
    assert hide(value) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (INLINE, "postgresql+psycopg://kto:***@host/answers"),
        (NAMED, NAMED),
        ("$DATABASE", "$DATABASE"),
        ("postgresql://kto@host/answers?password=s3cret", "postgresql://kto@host/answers?password=***"),
        ("postgresql://kto:s3/cr@et@host/answers", "postgresql://kto:***@host/answers"),
        ("postgresql//kto:s3/cret@host", "postgresql//kto:***@host"),
        ("sqlite:////folder/people@home.sqlite", "sqlite:////folder/people@home.sqlite"),
        ("postgresql+psycopg://tests@/name?host=/tmp/pg-1", "postgresql+psycopg://tests@/name?host=/tmp/pg-1"),
    ],
)
def test_the_password_of_a_database_is_hidden(url: str, shown: str) -> None:
    assert hide_in_database(url) == shown


def secretive(database: str = INLINE) -> RunConfig:
    return load("shapes_human", [f"label.human.database={database}", f"label.scorers.http.args={MANY}"])


def test_a_configuration_shows_no_secret() -> None:
    config = secretive()
    shown = [to_yaml(config), repr(config), str(config), f"{config.label!r}", str(public(config))]
    assert all("s3cret" not in text for text in shown)
    assert "database: postgresql+psycopg://kto:***@host/answers" in to_yaml(config)
    assert config.label.scorers["http"].args == MANY
    assert database_url(config.label.human, Storage("runs/x")) == INLINE


def test_nor_does_a_dry_run(tmp_path: Path) -> None:
    database = "postgresql+psycopg://kto:s3cret@127.0.0.1:1/answers"  # where nobody listens
    with pytest.raises(UserError, match=r"cannot use postgresql\+psycopg://kto:\*\*\*@127") as caught:
        describe(load("shapes_human", [f"runs_folder={tmp_path}", f"label.human.database={database}"]))
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in describe(
        load("shapes_demo", [f"runs_folder={tmp_path}", f"label.human.database={database}"])
    )


@pytest.mark.parametrize(
    "override",
    [
        "runs_folder=s3://key:s3cret@bucket/runs",
        "replay.run=s3://bucket/runs/x?secret_key=s3cret",
        "tracking.mlflow_uri=https://ann:s3cret@mlflow",
    ],
)
def test_addresses_that_are_said_everywhere_hold_none(override: str) -> None:
    with pytest.raises(UserError, match=r"\*\*\*.* holds a password or key; leave it out") as caught:
        describe(load("shapes_demo", [override]))
    assert str(caught.value).startswith(f"{override.partition('=')[0]}: ")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "label.human.database={url: 'postgresql://kto:s3cret@host/x'}",
        "label.human=postgresql://kto:s3cret@host/x",
        "label.human.database='postgresql://kto:s3cret@host/x",
        "label.scorers={mine: 'http://kto:s3cret@host'}",
    ],
)
def test_nor_does_a_refused_one(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load("shapes_human", [override])
    assert "s3cret" not in str(caught.value)


def test_names_of_variables_stay_and_are_filled_in_where_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(str(tmp_path))
    run.write("config.yaml", to_yaml(secretive(NAMED)).encode())
    human = saved_config(run).label.human
    monkeypatch.delenv("KTO_PASSWORD", raising=False)
    with pytest.raises(UserError, match=r"label\.human\.database names the environment variable 'KTO_PASSWORD'"):
        database_url(human, run)
    monkeypatch.setenv("KTO_PASSWORD", "s3cret")
    assert database_url(human, run) == INLINE
    with pytest.raises(UserError, match="has a '\\$' before what is no name") as caught:
        fill("pa$ s3cret", "field")
    assert "s3cret" not in str(caught.value)


def test_a_password_that_is_not_kept_is_asked_for(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    run.write("config.yaml", to_yaml(secretive()).encode())
    with pytest.raises(UserError, match=r"the password of .*kto:\*\*\*@host.* is not kept.*\$PASSWORD"):
        database_url(saved_config(run).label.human, run)


def test_a_secret_may_change_while_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = RunConfig.model_validate(public(secretive()))
    monkeypatch.setenv("KTO_DATABASE", INLINE)
    for database in (INLINE, INLINE.replace("s3cret", "other"), INLINE.replace("kto:s3cret", "ann"), "$KTO_DATABASE"):
        assert require_same(secretive(database), saved) == []
    for database in (INLINE.replace("host", "elsewhere"), INLINE.replace("answers", "others")):
        with pytest.raises(UserError, match=r"label\.human\.database: the run has '.*kto:\*\*\*@host") as caught:
            require_same(secretive(database), saved)
        assert "s3cret" not in str(caught.value)
