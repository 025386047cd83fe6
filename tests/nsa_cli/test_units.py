import click
import pytest

from nsa_cli.units import format_bytes, format_seconds, parse_quantity


@pytest.mark.parametrize(
    "text, value",
    [("1", 1), ("131072", 131072), ("1_000", 1000), ("128k", 128_000), ("128Ki", 131_072), ("1.5M", 1_500_000)]
    + [("2GB", 2_000_000_000), ("1 MiB", 1 << 20), ("20G", 20_000_000_000)],
)
def test_quantities_that_people_type(text: str, value: int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1e3", "12x", "1.2.3", "٣", "inf"])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write 131072, 128k"):
        parse_quantity(text)


def test_formats_are_short() -> None:
    sizes = [0, 999, 1000, 3_200_000, 64_000_000, 123_456_789, 1_500_000_000]
    assert [format_bytes(n) for n in sizes] == ["0 bytes", "999 bytes", "1 kB", "3.2 MB", "64 MB", "123 MB", "1.5 GB"]
    assert [format_seconds(s) for s in (0.01, 12.3, 240, 5400)] == ["1 s", "12 s", "4 min", "1.5 h"]
