"""The time that `nsa plan` expects: the arithmetic's, and then that of the last reading."""

import json
from pathlib import Path

import pytest

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.speed import FILE, SLOWER, expected, nominal, remember
from nsa_models.config import NSAConfig

MEASURED = {8192: 2027, 32768: 1999, 131072: 1501}  # tokens/s of the built-in model on 2 cores of AMD Zen 5


@pytest.fixture
def builtin(tmp_path: Path) -> Checkpoint:
    """The shape of the built-in model, without its weights."""
    shape = dict(hidden_size=576, num_hidden_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536)
    blocks = dict(compress_block=32, compress_stride=32)
    config = NSAConfig(vocab_size=49152, head_dim=64, max_position_embeddings=131072, **shape, **blocks)
    checkpoint = Checkpoint(str(tmp_path))
    vars(checkpoint).update(config=config, directory=tmp_path)
    return checkpoint


@pytest.mark.parametrize("tokens", MEASURED)
def test_the_arithmetic_is_what_was_measured(builtin, tokens):
    assert nominal(builtin, tokens) == pytest.approx(tokens / MEASURED[tokens], rel=0.05)


def test_the_last_reading_decides_also_one_that_went_on_from_what_was_stored(builtin, tmp_path):
    assert expected(tmp_path, builtin, 8192) == (nominal(builtin, 8192), SLOWER * nominal(builtin, 8192), False)
    remember(tmp_path, builtin, 0, 1000, 99.0)
    assert not (tmp_path / FILE).exists()  # too few to tell
    remember(tmp_path, builtin, 8192, 32768, 3 * (nominal(builtin, 32768) - nominal(builtin, 8192)))
    assert expected(tmp_path, builtin, 131072) == (pytest.approx(3 * nominal(builtin, 131072)),) * 2 + (True,)
    remember(tmp_path / "a" / "b", builtin, 0, 2000, 1.0)
    assert (tmp_path / "a" / "b" / FILE).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"NAME": "fast"}', '{"NAME": -1.0}'])
def test_a_damaged_file_is_none(builtin, tmp_path, content):
    (tmp_path / FILE).write_text(content.replace("NAME", builtin.name))
    assert expected(tmp_path, builtin, 8192)[2] is False
    remember(tmp_path, builtin, 0, 8192, 9.0)
    assert json.loads((tmp_path / FILE).read_text())[builtin.name] > 0 and expected(tmp_path, builtin, 10)[2]


def test_plan_says_what_ask_has_measured(nsa, tmp_path):
    (tmp_path / "long.txt").write_text("the quick brown fox\n" * 1000)
    before = nsa("plan", tmp_path / "long.txt").out
    assert nsa("ask", tmp_path / "long.txt", "who?", "--max-tokens", 1, "--cache", "read").code == 0
    assert nsa("plan", tmp_path / "long.txt").out == before and " to read\n" in before
    assert nsa("ask", tmp_path / "long.txt", "who?", "--max-tokens", 1).code == 0
    assert " to read, as fast as the last time\n" in nsa("plan", tmp_path / "long.txt").out
