"""Flags from dataclasses, and one line with exit code 2 for a user's mistake."""

from dataclasses import dataclass

import pytest

from hbmgym.cli import fail, in_one_line, integer, option, parse_named, parse_options, user_errors, words


@dataclass(frozen=True)
class Options:
    """A field of every kind."""

    total_steps: int = option(5, "an integer")
    rate: float = option(0.5, "a number")
    name: str = option("a", "a choice", choices=("a", "b"))
    trace: tuple[str, ...] = option((), "repeatable")
    progress: bool = option(True, "on or off")

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError("--total-steps must be\nat least 1")


def parse(*arguments: str) -> Options:
    return parse_options(Options, "", arguments)


def test_without_flags_the_defaults_hold():
    assert parse() == Options()


def test_every_field_has_a_flag():
    given = parse("--total-steps", "2e5", "--rate", "2", "--name", "b", "--trace", "x", "--trace", "y", "--no-progress")
    assert given == Options(200_000, 2.0, "b", ("x", "y"), False)


def test_what_is_named_is_known_also_where_it_is_the_default():
    given, named = parse_named(Options, "", ["--total-steps", "5", "--progress", "--trace", "x"])
    assert given == Options(trace=("x",))
    assert named == {"total_steps", "progress", "trace"}
    assert parse_named(Options, "", []) == (Options(), set())


def test_words_without_a_flag_can_be_asked_for():
    @dataclass(frozen=True)
    class WithWords:
        parts: tuple[str, ...] = words("what to do", metavar="PART")
        times: int = option(1, "how often")

    assert parse_options(WithWords, "", []) == WithWords()
    assert parse_options(WithWords, "", ["a", "--times", "3"]) == WithWords(("a",), 3)
    assert parse_options(WithWords, "", ["--times", "3", "a", "b"]) == WithWords(("a", "b"), 3)


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("-3", -3), ("2e5", 200_000), ("9007199254740993", 2**53 + 1)])
def test_integers_are_exact(text, value):
    assert integer(text) == value


@pytest.mark.parametrize("text", ["1.5", "x", "", "nan", "inf", "-inf", "1e400", "1e-3"])
def test_what_is_no_integer_is_refused(text):
    with pytest.raises(ValueError):
        integer(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--total-steps", "inf"), "--total-steps"),
        (("--total-steps", "0"), "--total-steps must be at least 1"),
        (("--rate", "x"), "--rate"),
        (("--name", "c"), "'c'"),
        (("--unknown", "1"), "--unknown"),
        (("two\nlines",), "two lines"),
        (("--trace",), "--trace"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(*arguments)
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert printed.err.count("\n") == 1 and named in printed.err
    assert not printed.out


def test_a_failure_names_the_program_without_its_folder(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/eval/compare.py"])
    with pytest.raises(SystemExit):
        fail("it is\nwrong")
    assert capsys.readouterr().err == "compare.py: it is wrong\n"


def test_ctrl_c_is_a_line_as_well(capsys):
    with pytest.raises(SystemExit) as leaving, user_errors():
        raise KeyboardInterrupt
    assert leaving.value.code == 130
    with pytest.raises(SystemExit), in_one_line(kept="half is done"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\ninterrupted; half is done\n"
    with pytest.raises(ValueError), in_one_line(LookupError):
        raise ValueError("ours")


def test_only_the_named_kinds_and_value_errors_are_user_errors(capsys):
    with pytest.raises(SystemExit), user_errors(LookupError):
        raise KeyError("x")
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("y")
    with pytest.raises(RuntimeError), user_errors(LookupError):
        raise RuntimeError("ours")
