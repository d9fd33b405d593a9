"""The TOML file of a study."""

from pathlib import Path

import pytest

from lorac_deploy.study.config import StudyError, read_config
from lorac_exporters.methods import METHODS

GOOD = """
checkpoint = "base"
data = "pool.npz"
test = "test.npz"
drifts = ["none", "flip", "fog:3", { name = "night", data = "pool.npz", test = "test.npz" }]
sizes = [10, 20]
seeds = [0, 1]
training = { epochs = 2, batch_size = 8 }

[[methods]]
method = "lora-c"
rank = 2
blocks = ["layer2", "fc"]
lr = 0.01
cache = "1MB"

[[methods]]
name = "all"
method = "full"
bn = "batch"
"""


def written(folder: Path, text: str) -> Path:
    for name in ("base", "pool.npz", "test.npz"):
        (folder / name).touch()
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_methods_drifts_and_defaults_are_read(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GOOD))
    lora, full = config.methods
    assert (lora.method, lora.lora.rank, lora.lora.blocks, lora.cache) == ("lora-c", 2, ("layer2", "fc"), 10**6)
    assert (lora.training.lr, lora.training.epochs, lora.training.batch_size) == (0.01, 2, 8)
    assert (full.name, full.bn, full.training.epochs, full.cache) == ("all", "batch", 2, None)
    assert [d.name for d in config.drifts] == ["none", "flip", "fog:3", "night"]
    assert config.drifts[3].data == tmp_path / "pool.npz"
    assert (config.sizes, config.seeds, config.wrong_labels) == ((10, 20), (0, 1), (0.0,))


def test_a_method_without_a_name_is_called_by_its_settings(tmp_path: Path) -> None:
    lora = read_config(written(tmp_path, GOOD)).methods[0]
    assert lora.name == "lora-c rank=2 blocks=layer2,fc lr=0.01 cache=1MB"


def test_a_curve_is_taken_unless_told_otherwise(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, GOOD)).curve is True
    assert read_config(written(tmp_path, "curve = false\n" + GOOD)).curve is False
    with pytest.raises(StudyError, match="curve: expected true or false, got 'no'"):
        read_config(written(tmp_path, 'curve = "no"\n' + GOOD))


def test_a_method_without_a_learning_rate_has_its_own(tmp_path: Path) -> None:
    head = GOOD.replace('method = "full"\nbn = "batch"', 'method = "head"')
    assert [m.training.lr for m in read_config(written(tmp_path, head)).methods] == [0.01, 0.03]


def test_a_method_that_needs_a_loss_gets_it(tmp_path: Path) -> None:
    wanting = [m for m in METHODS.values() if m.loss]
    assert wanting
    for method in wanting:
        text = GOOD.replace('method = "full"\nbn = "batch"', f'method = "{method.name}"')
        assert read_config(written(tmp_path, text)).methods[1].training.loss == method.loss


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('checkpoint = "base"', 'checkpoint = "none"', "none does not exist"),
        ('checkpoint = "base"', "", "checkpoint: missing"),
        ("sizes = [10, 20]", "sizes = []", "sizes: expected a list of numbers"),
        ("sizes = [10, 20]", "sizes = [10.5]", "sizes: expected a list of numbers"),
        ("sizes = [10, 20]", "sizes = [1]", "sizes: 1 is less than 2"),
        ("seeds = [0, 1]", "seeds = [true]", "seeds: expected a list of numbers"),
        ("seeds = [0, 1]", "wrong_labels = [1.0]", "wrong_labels: 1.0 is not below 1"),
        ("seeds = [0, 1]", "seedz = [0]", "seedz: unknown key; known are checkpoint"),
        ('"fog:3"', '"fog:6"', "drifts[2]: 'fog:6' is neither none, flip"),
        ('"fog:3"', '"smog:3"', "drifts[2]: 'smog:3' is neither none, flip"),
        ('"fog:3"', '"flip"', "drifts: 'flip' stands there twice"),
        (', test = "test.npz" }', " }", "drifts[3]: a drift of its own has name, data and test, got name, data"),
        ('method = "full"', 'method = "fool"', "methods[1]: method 'fool' is not one of lora-c"),
        ('bn = "batch"', "rank = 4", "methods[1].rank: changes nothing with method full"),
        ('bn = "batch"', "ranc = 4", "methods[1].ranc: unknown key"),
        ("rank = 2", "rank = 0", "methods[0]: rank must be at least 1, got 0"),
        ("rank = 2", 'rank = "two"', "methods[0]:"),
        ('cache = "1MB"', 'cache = "much"', "methods[0]: 'much' is not a size"),
    ],
)
def test_everything_wrong_is_told_with_its_place(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(StudyError) as caught:
        read_config(written(tmp_path, GOOD.replace(old, new)))
    assert told in str(caught.value)


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        read_config(written(tmp_path, GOOD.replace("fog:3", "fog:9").replace("rank = 2", "rank = 0")))
    assert "drifts[2]" in str(caught.value)
    assert "methods[0]" in str(caught.value)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not a TOML file"):
        read_config(written(tmp_path, "checkpoint = "))
    with pytest.raises(StudyError, match="not found"):
        read_config(tmp_path / "absent.toml")
