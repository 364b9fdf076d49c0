"""Settings: every bad one is refused with file, table and key."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from studies import config as configuration
from studies.config import ConfigError


def test_the_defaults_stand_alone() -> None:
    config = configuration.load()
    assert config.windows.validation == 30
    assert config.windows.test == 20
    assert config.search.trials == 100
    assert config.models["toto"].checkpoint == "Datadog/Toto-Open-Base-1.0"
    assert config.models["toto"].context_length == (4096,)
    assert config.promotion.min_improvement == 0.01
    assert "winsorized_mean_10" not in config.models["toto"].aggregates


def test_a_file_overrides_and_its_paths_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[data]\ndir = "bars"\nsymbols = ["BTCUSD"]\n[toto]\ncheckpoint = "./weights"\ncontext_length = [512, 1024]\n'
        "[workers]\nlease_s = 10\n"
    )
    config = configuration.load(path)
    assert config.data.dir == tmp_path / "bars"
    assert config.data.symbols == ("BTCUSD",)
    assert config.models["toto"].checkpoint == str(tmp_path / "weights")
    assert config.models["toto"].context_length == (512, 1024)
    assert config.workers.lease_s == 10.0
    assert config.hyperparams.dir == Path("hyperparams")


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\ndir = "bars"\n')
    assert configuration.load(path, {"data": {"dir": "/else"}}).data.dir == Path("/else")


def test_json_round_trip_keeps_all_but_the_url(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[storage]\nurl = "postgresql://u:hunter2@h/d"\n[toto]\ncontext_length = [512, 64]\n')
    config = configuration.load(path)
    text = json.dumps(configuration.to_json(config))
    assert "hunter2" not in text
    again = configuration.from_json(json.loads(text))
    assert again.storage.url == ""
    assert again.models["toto"] == config.models["toto"]
    assert again.windows == config.windows
    assert again.data == config.data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "all"),
        ("[promotion]\npool = 'none'", "none"),
        ("[promotion.pool]\ncrypto = '*USD'\nindices = 'SP*'", {"crypto": "*USD", "indices": "SP*"}),
    ],
)
def test_what_is_pooled_is_one_word_or_groups(tmp_path: Path, text: str, expected: object) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    config = configuration.load(path)
    assert config.promotion.pool == expected
    assert configuration.from_json(json.loads(json.dumps(configuration.to_json(config)))) == config
    assert (config.promotion.max_clipped, config.promotion.pool_days) == (0.01, 10.0)


def test_costs_are_those_of_the_asset_class(tmp_path: Path) -> None:
    days = np.datetime64("2024-01-01", "ns") + np.arange(30) * np.timedelta64(1, "D")
    hours = np.datetime64("2024-01-01", "ns") + np.arange(240) * np.timedelta64(1, "h")
    config = configuration.load()
    stock, coin = (config.backtest.asset_class(symbol, days) for symbol in ("AAPL", "BTCUSD"))
    kinds = [(one.name, one.shorts, one.bars_a_year, one.limit_fee, one.market_fee) for one in (stock, coin)]
    assert kinds == [("equity", True, 252, 0.0005, 0.0005), ("crypto", False, 365, 0.0015, 0.0025)]
    assert stock.night == 0.003 / 252
    assert coin.market == 0.0025 + 0.000435
    assert config.backtest.asset_class("BTCUSD", hours).bars_a_year == 365 * 24
    path = tmp_path / "mine.toml"
    path.write_text("[backtest]\ncrypto = ['*USD', 'DOGE*']\ncrypto_limit_fee = 0\n")
    mine = configuration.load(path)
    assert [mine.backtest.asset_class(each, days).name for each in ("DOGEEUR", "ETHUSD", "USD")] == ["crypto"] * 3
    assert mine.backtest.asset_class("EURDOGE", days).name == "equity"
    assert mine.backtest.asset_class("ETHUSD", days).limit_fee == 0
    assert configuration.from_json(json.loads(json.dumps(configuration.to_json(mine)))) == mine


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[dat]\ndir = 'x'", ["[dat]", "unknown table"]),
        ("data = 3", ["data", "[data]"]),
        ("[data]\ndri = 'x'", ["[data] dri", "unknown key", "dir"]),
        ("[windows]\nhorizon = '1'", ["[windows] horizon", "whole number"]),
        ("[windows]\nhorizon = 1.5", ["[windows] horizon", "whole number"]),
        ("[windows]\nhorizon = true", ["[windows] horizon", "whole number"]),
        ("[windows]\nhorizon = 0", ["[windows] horizon", "at least 1"]),
        ("[search]\ntrials = 0", ["[search] trials", "at least 1"]),
        ("[search]\nmodels = ['totto']", ["[search] models", "totto", "toto"]),
        ("[search]\nmodels = 'toto'", ["[search] models", "list"]),
        ("[search]\nprune_worst = 1.0", ["[search] prune_worst", "share"]),
        ("[search]\nprune_worst = nan", ["[search] prune_worst", "finite"]),
        ("[toto]\naggregates = ['meen']", ["[toto] aggregates", "meen"]),
        ("[toto]\naggregates = []", ["[toto] aggregates"]),
        ("[toto]\nnum_samples = [64, 64]", ["[toto] num_samples", "different"]),
        ("[toto]\nnum_samples = [64, 'x']", ["[toto] num_samples", "whole numbers"]),
        ("[search]\nobjective = 'best'", ["[search] objective", "sampled, exact"]),
        ("[kronos]\nclip = [3.0, 1.0]", ["[kronos] clip", "[lowest, highest]"]),
        ("[kronos]\ntop_k = [-1]", ["[kronos] top_k", "whole numbers"]),
        ("[kronos]\ntemperature = [0.0, 0.4]", ["[kronos] temperature", "between"]),
        ("[storage]\nlisten = 'db.example'", ["[storage] listen", "IP address"]),
        ("[promotion]\nmin_improvement = -0.1", ["[promotion] min_improvement", "share"]),
        ("[promotion]\nmax_clipped = 1.5", ["[promotion] max_clipped", "share"]),
        ("[promotion]\npool = 'some'", ["[promotion] pool", '"all", "none"', "*USD"]),
        ("[promotion]\npool = 3", ["[promotion] pool", "text"]),
        ("[promotion.pool]\ncrypto = 3", ["[promotion] pool", "table of text"]),
        ("[promotion.pool]", ["[promotion] pool", "at least one group"]),
        ("[promotion.pool]\ncrypto = ''", ["[promotion] pool", "pattern"]),
        ("[promotion]\npool_days = -1", ["[promotion] pool_days", "at least 0"]),
        ("[workers]\nlease_s = 1", ["[workers] lease_s", "at least 2"]),
        ("[backtest]\nequity_limit_fee = -0.001", ["[backtest] equity_limit_fee", "-0.001", "share"]),
        ("[backtest]\ncrypto_half_spread = 1", ["[backtest] crypto_half_spread", "share"]),
        ("[backtest]\nequity_borrow = -1", ["[backtest] equity_borrow", "at least 0"]),
        ("[backtest]\ncrypto = 3", ["[backtest] crypto", "text"]),
        ("[data\n", ["not valid TOML"]),
    ],
)
def test_bad_settings(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: no such file; name a TOML file with --config"):
        configuration.load(tmp_path / "none.toml")
