import pytest

from benchmarks import quickstart


@pytest.mark.parametrize("method", ["misse", "miss"])
def test_a_short_run(method: str, capsys: pytest.CaptureFixture[str]):
    result = quickstart.main(
        ["--words", "150", "--epochs", "1", "--rank", "4", "--method", method, "--lr", "1e-3"]
    )
    assert set(result) == {"frozen", "adapted", "lr"}
    assert -1 <= result["adapted"] <= 1
    out = capsys.readouterr().out
    for text in ("also trainable: head", "epoch 1: test r", "held-out Pearson r"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "rank=0"),
        (["--rank", "1537"], "1 <= rank <= "),
        (["--lr", "-1"], "positive"),
        (["--lr", "nan"], "positive"),
        (["--epochs", "0"], "positive"),
        (["--method", "lora"], "invalid choice"),
        (["--words", "5"], "at least 100"),
    ],
)
def test_wrong_arguments_end_with_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--rank", "--method", "--lr", "--epochs", "--seed"))
