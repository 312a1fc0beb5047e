"""How tools end."""

import signal

import command
import consolidate
import convert_moduleformer
import expert_report
import pytest


@pytest.fixture(autouse=True)
def ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("tool", "work", "arguments"),
    [
        (consolidate, "consolidate", ["checkpoint", "out"]),
        (convert_moduleformer, "convert", ["in", "out"]),
        (expert_report, "measure", ["--model", "model", "--data", "c=embedded:c", "--out", "out"]),
    ],
)
def test_sigterm_lets_a_tool_clean_up(tool, work, arguments, monkeypatch):
    cleaned = []

    def interrupted(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(tool, work, interrupted)
    monkeypatch.setattr("sys.argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert (ended.value.code, cleaned) == (143, [True])


@pytest.mark.parametrize(("error", "told"), [(ValueError("a\nb"), "a"), (OSError(), "OSError()")])
def test_mistakes_are_told_in_one_line(error, told, capsys):
    def action():
        raise error

    assert command.run(action) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
