"""Data alone on stdout, messages on stderr; a display on terminals, plain lines elsewhere; counts and seeds exact."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from sidactl import units
from sidactl.cli import console
from sidactl.cli import display as cli_display
from sidactl.errors import SidaError


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_sec = 1000.0

    def __call__(self) -> float:
        return self.now_sec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """What was written, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def terminal_as_stderr(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Terminal:
    """No fixture: pytest puts its own stderr back between a fixture and its test."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def untimed(text: str) -> str:
    """Lines of progress without the time of day that each begins with."""
    return "".join(re.sub(r"^\d\d:\d\d:\d\d (?=[a-z ]+: )", "", line) for line in text.splitlines(keepends=True))


def run_python(code: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, timeout=60)


def test_import_loads_nothing_heavy() -> None:
    heavy = ("rich", "torch", "numpy", "scipy", "PIL")
    done = run_python(f"import sys, sidactl.cli.console; print([m for m in {heavy} if m in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_print_data_is_one_line_on_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_data("1.9234")
    assert capsys.readouterr() == ("1.9234\n", "")


HOSTILE = "a\x1b[31m\n## b\u202ec\u2066d\u200ee\x9bf\x7f\ud800-\udcff<b>"
SHOWN = r"a\x1b[31m\n## b\u202ec\u2066d\u200ee\x9bf\x7f\ud800-\xff<b>"


def test_text_from_outside_is_shown_with_visible_escapes_everywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.print_data(HOSTILE)
    assert capsys.readouterr().out == f"{SHOWN}\n"
    console.table(["licence"], [[HOSTILE]], title=HOSTILE)
    assert capsys.readouterr().out == f"{SHOWN}\nlicence\n{SHOWN}\n"
    console.print_json({HOSTILE: HOSTILE})
    assert json.loads(capsys.readouterr().out) == {HOSTILE: HOSTILE}
    # A message is one line, whatever a library wrote into it.
    in_message = SHOWN.replace(r"\n", " ")
    console.note(HOSTILE)
    console.fail(SidaError(HOSTILE))
    with cli_display.progress(HOSTILE, 1) as shown:
        shown.update(1, {"licence": HOSTILE})
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == [in_message, f"error: {in_message}"]
    assert all(in_message in line and line.endswith(f"licence {SHOWN}") for line in told[2:])
    terminal = terminal_as_stderr(monkeypatch, columns=200)
    console.table(["licence"], [[HOSTILE]], title=HOSTILE, file=terminal)
    assert [line.strip() for line in terminal.screen().splitlines() if "##" in line] == [SHOWN, SHOWN]


def test_print_json_is_one_document_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"score": 1.5, "inputs": ["b", "a"]})
    out, err = capsys.readouterr()
    assert out == '{\n  "score": 1.5,\n  "inputs": [\n    "b",\n    "a"\n  ]\n}\n'
    assert json.loads(out) == {"score": 1.5, "inputs": ["b", "a"]}
    assert err == ""


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_print_json_refuses_what_json_cannot_say(number: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SidaError) as caught:
        console.print_json({"score": number})
    assert str(caught.value) == "JSON output must hold finite numbers, got NaN or infinity. Run without --json."
    assert caught.value.exit_code == 1
    assert capsys.readouterr().out == ""


def test_messages_are_one_line_each_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("loads edm2-s\r\n  (280M parameters)")
    console.warn("odd\x1b[31m file")
    code = console.fail(SidaError("a teacher must have a sigma_data,\ngot none", "Pass another file.", exit_code=1))
    assert code == 1
    assert console.fail(SidaError("no such run")) == 2
    assert capsys.readouterr() == (
        "",
        "loads edm2-s (280M parameters)\n"
        "warning: odd\\x1b[31m file\n"
        "error: a teacher must have a sigma_data, got none. Pass another file.\n"
        "error: no such run\n",
    )


def test_a_reader_that_has_gone_away_is_no_error() -> None:
    code = """
        import os, subprocess, sys
        from sidactl.cli import console, display
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
        console.print_data("0123")
        console.print_json({"a": 1})
        console.table(["name"], [["x"]])
    """
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_table_off_a_terminal_aligns_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["name", "images", "FID"], [["a\nb", 5, 1.97123], ["longer", 50000, None]], title="Scores")
    assert capsys.readouterr() == (
        "Scores\nname    images     FID\na\\nb         5  1.9712\nlonger   50000       -\n",
        "",
    )


def test_table_on_a_terminal_is_drawn_and_takes_cells_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    console.table(["name", "FID"], [["[red]x[/red]", 1.5], [None, 10]], file=terminal)
    lines = [line.rstrip() for line in terminal.screen().splitlines()]
    assert "  [red]x[/red]   1.5" in lines
    assert "                  10" in lines
    assert any("─" in line for line in lines)


def test_progress_off_a_terminal_tells_first_last_and_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with cli_display.progress("distill", 200_000, every_sec=10, clock=clock) as p:
        for step in range(26):
            p.update(50_000 + 1000 * step, {"stage": "sida"} if step == 0 else {"FID": 3.21})
            clock.now_sec += 1
    out, err = capsys.readouterr()
    assert out == ""
    assert untimed(err) == (
        "distill: 50k / 200k images (25%), 0.0s so far, stage sida\n"
        "distill: 60k / 200k images (30%), 1,000 images/s, 2m 20s left, 10s so far, stage sida, FID 3.21\n"
        "distill: 75k / 200k images (37%), 1,000 images/s, 2m 05s left, 26s so far, stage sida, FID 3.21\n"
    )
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in err.splitlines())


def test_progress_off_a_terminal_is_told_ever_more_seldom_up_to_ten_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with cli_display.progress("distill", None, clock=clock) as p:
        for _ in range(4000):
            p.update(int(clock.now_sec))
            clock.now_sec += 1
    counts = re.findall(r"([\d,.]+k?) images,", capsys.readouterr().err)
    told = [units.parse_count(count.replace(",", ""), "") - 1000 for count in counts]
    assert told == [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030, 3630, 3999]


def test_progress_never_passes_its_total(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with cli_display.progress("distill", 5000, clock=Clock()) as p:
        p.update(5120)
    assert untimed(capsys.readouterr().err) == "distill: 5k / 5k images (100%), 0.0s so far\n"
    terminal = terminal_as_stderr(monkeypatch)
    with cli_display.progress("distill", 5000, clock=Clock()) as p:
        p.update(5120)
    assert "distill  5k / 5k images (100%)" in terminal.screen()


def test_progress_tells_no_speed_before_it_can_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    """A first update that took a millisecond says nothing about the next ones, and must not weigh like 30 seconds."""
    clock = Clock()
    with cli_display.progress("distill", 10_000, every_sec=1, clock=clock) as p:
        p.update(0)
        clock.now_sec += 0.001
        p.update(128)
        for _ in range(10):
            clock.now_sec += 1
            p.update(int(128 + 100 * (clock.now_sec - 1000.001)))
    lines = untimed(capsys.readouterr().err).splitlines()
    assert lines[1] == "distill: 228 / 10k images (2%), 1.0s so far"
    assert re.search(r", 11\d images/s, 1m 2\ds left, ", lines[-1])


def test_parts_are_shown_in_turn_and_the_whole_at_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with cli_display.display() as display:
            reference = display.part("features of digits")
            reference(0, 100)
            reference(100, 100)
            display.show("fid", 50).update(10)
            display.part("scoring")(3, 4)

    work()
    assert [re.sub(r" so far$", "", line) for line in untimed(capsys.readouterr().err).splitlines()] == [
        line.rstrip()
        for line in (
            "features of digits: 0 / 100 images (0%), 0.0s",
            "features of digits: 100 / 100 images (100%), 0.0s",
            "fid: 10 / 50 images (20%), 0.0s",
            "scoring: 3 / 4 images (75%), 0.0s",
        )
    ]
    terminal = terminal_as_stderr(monkeypatch)
    work()
    assert terminal.screen().splitlines()[-3].strip() == "fid  10 / 50 images (20%)"


def test_progress_of_a_download_tells_sizes_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with cli_display.progress("fetch", 95_607_719, "bytes", clock=clock) as p:
        p.update(0)
        clock.now_sec += 20
        p.update(40_000_000)
    with cli_display.progress("fetch", None, "bytes", clock=clock) as p:
        p.update(0)
        clock.now_sec += 10
        p.update(512)
    assert untimed(capsys.readouterr().err) == (
        "fetch: 0 B / 95.6 MB (0%), 0.0s so far\n"
        "fetch: 40 MB / 95.6 MB (41%), 2 MB/s, 27s left, 20s so far\n"
        "fetch: 0 B, 0.0s so far\n"
        "fetch: 512 B, 51 B/s, 10s so far\n"
    )


def test_progress_tells_a_state_once_and_none_if_there_was_none(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with cli_display.progress("fid", None, "features", clock=clock) as p:
        p.update(1797)
        p.note("one more\nthing")
    with cli_display.progress("empty", 10, clock=clock):
        pass
    assert untimed(capsys.readouterr().err) == "fid: 1,797 features, 0.0s so far\none more thing\n"


def test_progress_tells_the_last_state_of_work_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()

    def fails() -> None:
        with cli_display.progress("sample", 4, clock=clock) as p:
            p.update(1)
            clock.now_sec += 2
            p.update(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert untimed(capsys.readouterr().err).splitlines()[-1] == (
        "sample: 2 / 4 images (50%), 0.5 images/s, 4.0s left, 2.0s so far"
    )


def test_progress_speed_follows_a_change_within_its_window(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    done = 0
    with cli_display.progress("x", None, every_sec=1e9, clock=clock) as p:
        p.update(done)
        for images_per_sec, num_sec in ((1000, 100), (200, 30)):
            for _ in range(num_sec):
                clock.now_sec += 1
                done += images_per_sec
                p.update(done)
    # Weights fade by e in 30 s: (200 (1 - 1/e) + 1000 / e (1 - e^(-10/3))) / (1 - e^(-13/3)) = 487.6.
    assert "106k images, 488 images/s, 2m 10s so far" in capsys.readouterr().err


def test_progress_counts_updates_within_one_tick_of_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    with cli_display.progress("x", 8, clock=Clock()) as p:
        p.update(4)
        p.update(8)
    assert untimed(capsys.readouterr().err).splitlines()[-1] == "x: 8 / 8 images (100%), 0.0s so far"


def test_progress_on_a_terminal_shows_stage_images_speed_losses_score_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    clock = Clock()
    with cli_display.progress("distill tiny-digits", 200_000, clock=clock) as p:
        p.update(50_000, {"stage": "sida", "fake score": 0.1234, "generator": 0.5, "FID": 3.21})
        clock.now_sec += 10
        p.update(60_240, {"generator": 0.25})
        console.warn("a [b]non-finite[/b] gradient was skipped")
        p.note("checkpoint kept")
    assert sys.stderr is terminal
    lines = [line.rstrip() for line in terminal.screen().splitlines()]
    assert lines.index("warning: a [b]non-finite[/b] gradient was skipped") < lines.index("checkpoint kept")
    title, bar, pace, facts = lines[-4:]
    assert title == "distill tiny-digits  60,240 / 200k images (30%)"
    assert set(bar) <= set("━╸╺")
    assert pace == "1,024 images/s   2m 16s left   10s so far"
    assert facts == "stage sida   fake score 0.1234   generator 0.25   FID 3.21"
    assert capsys.readouterr().out == ""


def test_progress_honours_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)

    def colours() -> list[str]:
        with cli_display.progress("x", 10, clock=Clock()) as p:
            p.update(5)
        return re.findall(r"\x1b\[(?:[34]\d|9\d|[34]8;[\d;]+)m", terminal.getvalue())

    assert colours()
    terminal.seek(0)
    terminal.truncate()
    monkeypatch.setenv("NO_COLOR", "1")
    assert colours() == []


def test_progress_on_a_dumb_terminal_tells_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with cli_display.progress("x", 10, clock=Clock()) as p:
        p.update(5)
    assert untimed(terminal.getvalue()) == "x: 5 / 10 images (50%), 0.0s so far\n"


def test_progress_fits_narrow_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch, columns=24)
    with cli_display.progress("distill edm2-s", 200_000_000, clock=Clock()) as p:
        p.update(123_456_789, {"stage": "sida", "fake score": 0.1234})
    lines = terminal.screen().splitlines()
    assert max(map(len, lines)) <= 24
    assert "123,456,789 / 200M images (61%)" in " ".join(line.strip() for line in lines)


def test_progress_on_a_real_terminal_leaves_stdout_to_the_data() -> None:
    code = """
        from sidactl.cli import console, display
        with display.progress("sample", 64) as p:
            p.update(64, {"stage": "heun"})
            console.print_data("3fa2b1")
    """
    reading, writing = pty.openpty()
    done = run_python(code, stderr=writing)
    os.close(writing)
    seen = os.read(reading, 65536).decode()
    os.close(reading)
    assert (done.returncode, done.stdout) == (0, "3fa2b1\n")
    assert "64 / 64 images (100%)" in seen
    assert "stage heun" in seen
    assert "3fa2b1" not in seen


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0"), (999, "999"), (1000, "1k"), (1500, "1.5k"), (1797, "1,797"), (50_000, "50k"), (51_200, "51.2k")],
        *[(200_000_000, "200M"), (217_920_000, "217.92M"), (1_050_000, "1.05M"), (1_234_567, "1,234,567")],
        *[(1_234_500, "1,234.5k"), (10**9, "1,000M")],
    ],
)
def test_format_count_is_exact_and_read_back(count: int, text: str) -> None:
    assert units.format_count(count) == text
    assert units.parse_count(text.replace(",", "_"), "--num") == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *[("500", 500), ("10_000", 10_000), ("50k", 50_000), ("50K", 50_000), ("1.5M", 1_500_000), ("1G", 10**9)],
        *[("0.5k", 500), ("1.000", 1), ("1.0010k", 1001), (" 64 ", 64), ("0", 0)],
    ],
)
def test_parse_count_reads_suffixes_exactly(text: str, count: int) -> None:
    assert units.parse_count(text, "--num") == count


@pytest.mark.parametrize(
    "text", ["abc", "", "k", "-5", "+5", "1.5", "1.0005k", "1,797", "1e6", "nan", "5 k", "5T", "٣", "9" * 5000]
)
def test_parse_count_refuses_anything_else_in_one_line(text: str) -> None:
    with pytest.raises(SidaError) as caught:
        units.parse_count(text, "--duration")
    assert str(caught.value) == f"--duration must be a whole number of images such as 500, 50k or 1.5M, got {text!r}"


def test_parse_seeds_keeps_the_order_and_both_ends() -> None:
    assert units.parse_seeds("0-3,100,7-8") == [0, 1, 2, 3, 100, 7, 8]
    assert units.parse_seeds("5, 3") == [5, 3]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-49999", range(50_000)), ("7", range(7, 8)), ("0-1,2,3-5", range(6)), ("0-99999999999", range(10**11))],
)
def test_parse_seeds_that_are_consecutive_are_a_range(text: str, seeds: range) -> None:
    assert units.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "--seeds must be seeds and ranges of seeds such as 0-63,100, got 'x'"),
        ("", "--seeds must be seeds and ranges of seeds such as 0-63,100, got ''"),
        ("1,", "--seeds must be seeds and ranges of seeds such as 0-63,100, got '1,'"),
        ("-1", "--seeds must be seeds and ranges of seeds such as 0-63,100, got '-1'"),
        ("1-2-3", "--seeds must be seeds and ranges of seeds such as 0-63,100, got '1-2-3'"),
        ("0, 9-5", "--seeds must have ranges that run upwards, got '9-5'. Write 5-9."),
        ("8,0-9", "--seeds must name each seed once, got 8 twice in '8,0-9'"),
        ("3,3", "--seeds must name each seed once, got 3 twice in '3,3'"),
    ],
)
def test_parse_seeds_tells_what_is_wrong_in_one_line(text: str, message: str) -> None:
    with pytest.raises(SidaError) as caught:
        units.parse_seeds(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("format_value", "value", "text"),
    [
        (units.format_duration, 0.0, "0.0s"),
        (units.format_duration, 9.99, "9.9s"),
        (units.format_duration, 42, "42s"),
        (units.format_duration, 185, "3m 05s"),
        (units.format_duration, 3599.9, "59m 59s"),
        (units.format_duration, 8040, "2h 14m"),
        (units.format_duration, 273_600, "3d 04h"),
        (units.format_bytes, 512, "512 B"),
        (units.format_bytes, 999_499, "999 kB"),
        (units.format_bytes, 999_500, "1 MB"),
        (units.format_bytes, 95_600_000, "95.6 MB"),
        (units.format_bytes, 1_120_000_000, "1.12 GB"),
        (units.format_bytes, 10**16, "10,000 TB"),
    ],
)
def test_durations_and_sizes_read_well(format_value: Callable[[float], str], value: float, text: str) -> None:
    assert format_value(value) == text
