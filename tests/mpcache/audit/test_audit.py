"""`mpcache audit`: rows, tables, the page in a browser, and one line for every mistake."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from mpcache.audit.cost_plot import BEST, frontier
from mpcache.audit.option_sweep import sweep_options
from mpcache.cost.pricing import price
from mpcache.errors import BadInput
from mpcache.model import demo_model_dir, load_shape
from mpcache.model.shapes import NAMES, config_of
from mpcache.report.plots import COUNTS, log_ticks, style_of
from mpcache.report.units import BYTES, DURATIONS, duration, in_one_unit, size
from mpcache.transport.network import PROFILES
from tests.support.audit_command import failure, result_of, run

SMALL = ["--context", "200", "--policy", "full", "--policy", "mpcache"]


# ------------------------------------------------------------------------------------------- the rows


def test_rows_hold_the_exact_cost() -> None:
    found = result_of(*SMALL, "--network", "none,lan,wan")
    assert len(found["rows"]) == 2 * 3
    exact = price(load_shape(demo_model_dir()), "mpcache", 200).total("decode")
    for row in found["rows"]:
        assert {
            "policy", "protocol", "network", "context_tokens", "kept_tokens", "attended_tokens",
            "rounds_per_token", "online_bytes_per_token", "offline_bytes_per_token",
            "modelled_ms_per_token", "total_ms_per_token", "ratio_to_full", "leakage",
        } <= set(row)  # fmt: skip
        if row["policy"] == "full":
            assert row["ratio_to_full"] == 1 and row["kept_tokens"] == row["attended_tokens"] == 200
            continue
        assert row["rounds_per_token"] == exact.rounds
        assert row["online_bytes_per_token"] == exact.online
        assert row["offline_bytes_per_token"] == exact.offline
        assert row["kept_tokens"] == 150 and row["leakage"] == "none"
        if profile := PROFILES.get(row["network"]):
            compute = row["modelled_parts_ms"]["compute"]
            model = profile.ms(exact.rounds, exact.critical, compute)
            assert row["modelled_ms_per_token"] == pytest.approx(model, abs=0.01)


@pytest.mark.parametrize("protocol", ["fast", "stock"])
def test_parts_add_up(protocol: str) -> None:
    small = ["--context", "64", "--policy", "mpcache", "--network", "lan", "--protocol", protocol]
    (by_layer,), (by_op,) = (result_of(*small, "--by", by)["rows"] for by in ("layer", "op"))
    for amount in ("rounds", "online_bytes", "offline_bytes"):
        total = by_layer[f"{amount}_per_token"]
        assert sum(part[amount] for part in by_layer["layers"]) + by_layer["outside_layers"][amount] == total
        assert sum(part[amount] for part in by_op["ops"]) == total
    assert [part["layer"] for part in by_layer["layers"]] == list(range(6))
    assert all(isinstance(part["shares_selection"], bool) for part in by_layer["layers"])
    assert {"embed", "softmax", "lm_head"} <= {part["op"] for part in by_op["ops"]}


def test_a_token_takes_as_long_as_the_dealer_s_part_of_it() -> None:
    flags = ["--shape", "llama-2-7b", "--context", "2048", "--policy", "full", "--policy", "quest:page=16"]
    full, quest = result_of(*flags, "--network", "wan")["rows"]
    for row in (full, quest):
        assert row["offline_transfer_ms"] > row["modelled_ms_per_token"]
        assert row["total_ms_per_token"] == row["offline_transfer_ms"]
    ratio = quest["total_ms_per_token"] / full["total_ms_per_token"]
    assert quest["ratio_to_full"] == pytest.approx(ratio, rel=1e-3) and ratio > 2
    table = run(*flags, "--network", "wan").stdout
    assert re.search(r"wan, \w+ +dealer, \w+ +ratio", table)
    assert all(re.search(rf"{row['policy']} .* {row['ratio_to_full']:.2f} ", table) for row in (full, quest))


@pytest.mark.parametrize(
    ("about", "says"),
    [({"model": "demo"}, None), ({"model": "gpt2"}, "gpt2"), ({}, "a model that its file does not name")],
)
def test_accuracy_of_another_model_says_so(about: dict[str, str], says: str | None, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(about | {"rows": [{"policy": "full", "accuracy": 1}]}))
    done = run("--quality", str(tmp_path / "q.json"), *SMALL, "--json")
    assert [point["accuracy_of"] for point in json.loads(done.stdout)["quality_points"]] == [says] * 2
    assert (says is None) == ("the accuracy is that of" not in done.stderr)


def test_all_policies_by_default_and_a_mean_over_an_answer() -> None:
    fixed = ["--context", "200", "--network", "lan"]
    one, mean = (result_of(*fixed, "--new-tokens", n)["rows"] for n in ("2", "6"))
    assert {"full", "mpcache"} <= {row["policy"] for row in one}
    (short,), (long,) = ([row for row in rows if row["policy"] == "full"] for rows in (one, mean))
    assert long["rounds_per_token"] == short["rounds_per_token"]
    assert long["online_bytes_per_token"] > short["online_bytes_per_token"]  # the cache grows


def test_sweeps_make_grids() -> None:
    assert sweep_options(["full", "mpcache"], ["n_keep=64,128", "fine=4,8"]) == [
        "full", *(f"mpcache:n_keep={n},fine={f}" for n in (64, 128) for f in (4, 8)),
    ]  # fmt: skip
    grid = ["--context", "200", "--policy", "mpcache", "--sweep", "n_keep=64,128", "--network", "lan"]
    assert [row["kept_tokens"] for row in result_of(*grid)["rows"]] == [64, 128]


@pytest.mark.parametrize("name", NAMES)
def test_packaged_shapes(name: str) -> None:
    shape = load_shape(config_of(name))
    found = result_of("--shape", name, "--context", "512", "--policy", "full", "--network", "lan")
    assert found["model"]["layers"] == shape.layers and found["rows"][0]["rounds_per_token"] > 0


def test_a_shape_without_weights_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config_of("qwen2-0.5b").read_bytes())
    for given in (tmp_path, tmp_path / "config.json"):
        assert result_of("--shape", str(given), *SMALL)["model"]["kv_heads"] == 2


def test_reference_shapes_are_priced_beyond_their_positions() -> None:
    done = run("--shape", "llama-2-7b", "--context", "32768", "--policy", "full", "--network", "lan")
    assert done.exit_code == 0 and "trained for 4096 tokens" in done.stderr


# ------------------------------------------------------------------------------------------ for people


def test_tables() -> None:
    done = run(*SMALL)
    assert done.exit_code == 0
    assert re.search(r"context 200 tokens, protocol fast", done.stdout)
    assert re.search(r"mpcache +150/\d+ ", done.stdout)
    for by, words in (("op", "gate"), ("layer", "each")):
        assert words in run(*SMALL, "--by", by).stdout
    assert (size(999), size(1000), size(437_250), size(1.5e12)) == ("999 B", "1 kB", "437 kB", "1.5 TB")
    assert (duration(4.314), duration(5149.2), duration(12_500)) == ("4.31 ms", "5.15 s", "12.5 s")


def test_csv(tmp_path: Path) -> None:
    assert run(*SMALL, "--csv", str(tmp_path / "a.csv")).exit_code == 0
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and rows[0]["policy"] == "full" and int(rows[0]["rounds_per_token"]) > 0
    assert run(*SMALL, "--by", "layer", "--csv", str(tmp_path / "b.csv")).exit_code == 0
    with (tmp_path / "b.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 6


def test_rows_of_a_file_say_what_they_are_of(tmp_path: Path) -> None:
    """Files of several models can be put together: each line has its model, lengths, version and date."""
    file = tmp_path / "a.csv"
    several = ["--shape", "demo", "--shape", "gpt2", "--policy", "full", "--network", "lan"]
    assert run(*several, "--context", "64..200", "--csv", str(file)).exit_code == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [(row["model"], row["context_tokens"]) for row in rows] == [
        (model, n) for model in ("demo", "gpt2") for n in ("64", "128", "200")
    ]
    assert {row["question_tokens"] for row in rows} == {"16"}
    assert all(row["version"] and row["date"] for row in rows)
    assert {(row["network"], row["round_trip_ms"], row["mbps"]) for row in rows} == {("lan", "0.5", "1000")}


def test_tables_for_papers() -> None:
    small = [*SMALL, "--network", "lan", "--format"]
    head, rule, *lines = run(*small, "markdown").stdout.strip().splitlines()[2:]
    columns = head.count("|")
    assert "online, kB" in head and rule.count("---") == columns - 1
    assert len(lines) == 2 and all(line.count("|") == columns for line in lines)
    tex = run(*small, "latex").stdout
    assert tex.count(r"\\") == 3 and r"\begin{tabular}{lrrrrrrrl}" in tex
    assert run(*small, "csv").stdout.startswith("model,question_tokens,")


def test_a_column_has_one_unit() -> None:
    assert in_one_unit([36.2, 5410.0], DURATIONS) == ("s", ["0.0362", "5.41"])
    assert in_one_unit([999_600, 1], BYTES) == ("MB", ["1", "0.000001"])
    assert in_one_unit([0.0], BYTES) == ("B", ["0"])


def test_cost_is_drawn_by_context(tmp_path: Path) -> None:
    for name, begins in (("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG")):
        file = tmp_path / name
        assert run(*SMALL[2:], "--context", "64..200", "--network", "lan", "--plot", str(file)).exit_code == 0
        assert file.read_bytes().startswith(begins)
    svg = (tmp_path / "a.svg").read_text()
    assert "rounds per token" in svg and "context, tokens" in svg and "demo, protocol fast" in svg


@pytest.mark.slow
def test_explain_names_every_opening() -> None:
    text = run("--explain", "mpcache", "--context", "100").stdout
    for words in (
        "Public, besides",
        "Leaks beyond that: none",
        "scores, masked",
        "to client: logits for the client",
        "EUROCRYPT 2021",
        "from the dealer, ahead",
    ):
        assert words in text, words
    rounds = [int(n) for n in re.findall(r": (\d+) rounds?,", text)]
    assert sum(rounds) > 0
    stock = run("--explain", "full", "--context", "40", "--protocol", "stock").stdout
    assert "Escudero" not in stock and "they have no one formula" in stock
    # K^T of two KV heads, in full: what stock opens and fast does not.
    assert "masked by CrypTen: (2 x 32 x 57) of 8 B = 29,184 B" in stock


# --------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "gpt5"], "gpt5: no such model folder or file, nor can a hub model have that name"),
        (
            ["--context", "5000"],
            "beyond the model, which takes up to 1006 tokens besides question and answer (18)",
        ),
        (["--shape", "gpt2", "--context", "1024"], "takes up to 1006"),
        (["--context", "1007"], "takes up to 1006"),
        (["--context", "1000", "--new-tokens", "10"], "takes up to 998"),
        (["--shape", "gpt2", "--context", "5000"], "beyond the model"),
        (["--context", "0"], "is not a number of tokens"),
        (["--context", "many"], "is not a number of tokens"),
        (["--context", "64,64"], "each once"),
        (["--context", "64", "--policy", "mpcahe"], "did you mean mpcache"),
        (["--context", "64", "--policy", "mpcache:n_keep=100"], "at a context of 64 tokens"),
        (["--network", "fast"], "give none, lan, wan or RTT_MS:MBPS"),
        (["--protocol", "slow"], "known, with commas: fast, fast-bits, stock, auto"),
        (["--by", "hour"], "give layer or op"),
        (["--question", "0"], "give 1 or more"),
        (["--sweep", "n_keep"], "is not key=value"),
        (["--sweep", "nkeep=1,2"], "none of these policies has it"),
        (["--sweep", "n_keep=1,2", "--sweep", "n_keep=3"], "given twice"),
        (["--policy", "mpcache:n_keep=64", "--sweep", "n_keep=32,64"], "contradicts"),
        (["--policy", "mpcache", "--sweep", "n_keep=a,b"], "n_keep='a' is not allowed"),
        (["--sweep", "n_keep=8,,16"], "--sweep n_keep: '8,,16': give values with commas"),
        (["--explain", "full", "--csv", "x.csv"], "runs nothing: leave out --csv"),
        (["--explain", "full", "--sweep", "n_keep=8"], "leave out --sweep"),
        (["--explain", "full", "--protocol", "fast,stock"], "give one --protocol and one --context"),
        (["--explain", "full", "--context", "64,128"], "give one --protocol and one --context"),
        (["--private-context", "64", "--by", "op"], "a document of the client's own: leave out --by"),
        (["--private-context", "64", "--policy", "quest"], "leave out --policy"),
        (["--private-context", "64", "--new-tokens", "4"], "leave out --new-tokens"),
        (["--private-policy", "h2o"], "give --private-context, too"),
        (["--policy", "oracle", "--context", "64"], "plaintext only"),
        (
            ["--policy", "mpcache:threshold=0.1", "--context", "64"],
            "give the counts of a run for each of the",
        ),
        (["--report", "/nowhere/at/all.html"], "cannot be written"),
        (["--csv", "/nowhere/at/all.csv"], "cannot be written"),
        (["--quality", "/nowhere.json"], "cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], words: str) -> None:
    assert words in failure(*arguments)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"rows": [{"policy": "full"}]}',
        '[{"policy": "no", "accuracy": 1}]',
        '[{"policy": "full", "accuracy": 1.5}]',
        '[{"policy": "full", "accuracy": NaN}]',
        '[{"policy": "full", "accuracy": 1, "budget_percent": 200}]',
        '[{"policy": "full", "accuracy": 1, "ci95": [0.5]}]',
    ],
)
def test_a_quality_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "q.json").write_text(content)
    failure("--quality", str(tmp_path / "q.json"), *SMALL)


def test_a_damaged_config_is_told(tmp_path: Path) -> None:
    config = json.loads(config_of("gpt2").read_text())
    for change, words in (
        ({"n_layer": -1}, "n_layer"),
        ({"n_layer": None}, "n_layer is missing"),
        ({"n_embd": "wide"}, "n_embd"),
        ({"n_head": 7}, "config.json"),
        ({"activation_function": "mish"}, "mish"),
        ({"architectures": ["BertModel"]}, "BertModel"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert words in failure("--shape", str(tmp_path))


def test_a_failed_audit_leaves_no_file(tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    failure("--report", str(report), "--context", "64", "--policy", "mpcache:n_keep=100")
    assert not report.exists()
    with pytest.raises(BadInput):
        sweep_options(["full"], ["n_keep=1"])


def test_quality_is_drawn_against_cost(tmp_path: Path) -> None:
    found, drawn = tmp_path / "quality.json", tmp_path / "plot.svg"
    row = {"task": "all", "n": 7, "question": "after", "ci95": [0.5, 0.9]}
    rows = [row | {"policy": name, "accuracy": 0.8, "budget_percent": 20} for name in ("snapkv", "streaming")]
    rows.append(row | {"policy": "full", "accuracy": 0.9, "budget_percent": 100})
    found.write_text(json.dumps({"rows": rows, "gate": "question"}))
    flags = ["--context", "200", "--network", "lan", "--policy", "snapkv", "--quality", str(found)]
    points = result_of(*flags, "--plot", str(drawn))["quality_points"]
    assert {point["policy"] for point in points} == {"snapkv", "full"}
    text = drawn.read_text()
    assert "snapkv" in text and "all, n = 7" in text and "streaming" not in text
    assert "accuracy: a model without a name; bars: 95 %" in text and "cost: demo, 200 tokens" in text
    assert BEST in text


def test_the_frontier_is_what_nothing_beats() -> None:
    found = frontier([(3, 0.5), (1, 0.2), (2, 0.7), (2, 0.6), (5, 0.9), (4, 0.7)])
    assert list(found) == [(1, 0.2), (2, 0.7), (5, 0.9)]


def test_ticks_are_round_in_the_unit_that_they_are_written_in() -> None:
    drawn = log_ticks(100, 4e7, DURATIONS)
    assert [duration(ms) for ms in drawn] == [
        "100 ms", "1 s", "10 s", "100 s", "10 min", "100 min", "10 h",
    ]  # fmt: skip
    assert [size(n) for n in log_ticks(3e5, 6e6, BYTES)] == ["500 kB", "1 MB", "2 MB", "5 MB"]
    assert log_ticks(138, 163, COUNTS) == [140, 160]
    styles = [style_of(i, "full") for i in range(30)]  # told apart without colours
    assert len({(style["marker"], style["linestyle"]) for style in styles}) == 30


def test_quality_is_priced_behind_the_table_with_an_estimate(tmp_path: Path) -> None:
    found = tmp_path / "quality.json"
    rows = [{"policy": name, "accuracy": 0.8, "budget_percent": 20} for name in ("snapkv", "oracle")]
    found.write_text(json.dumps({"rows": [*rows, {"policy": "full", "accuracy": 0.9}]}))
    done = run("--context", "100,200", "--policy", "full", "--quality", str(found))
    shown = done.output  # both streams, as they came
    table, first = shown.index("kept/used"), shown.index("prices beside quality, setting 1 of")
    assert table < first and re.search(r"setting 2 of \d+: full at 100 %, about \d.* left", shown)


# ------------------------------------------------------------------------------------------- sizing


def test_sizing_holds_for_the_model_that_was_measured() -> None:
    """Within a tenth of what three parties took, 108 tokens (docs/benchmarks.md): 1.27, 0.64, 1.59 GB."""
    (row,) = result_of("--sizing", "--shape", "smollm2-135m", "--context", "108")["sizing"]
    measured = {"server": 1.27e9, "client": 0.64e9, "dealer": 1.59e9}
    for party, found in row["memory_bytes"].items():
        assert found == pytest.approx(measured[party], rel=0.1), party
    exact = price(load_shape(config_of("smollm2-135m")), "full", 108).total("decode")
    assert row["dealer_token_bytes"] == exact.offline and row["rounds_per_token"] == exact.rounds
    table = run("--sizing", "--shape", "demo", "--shape", "gpt2", "--context", "64..200").stdout
    assert table.count("demo ") == table.count("gpt2 ") == 3
