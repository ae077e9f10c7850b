"""Quantities in words."""

import pytest

from utils.terminal import in_bytes, in_rate, in_time, significant


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (significant(0), "0.00"),
        (significant(61_204.4), "61,204"),
        (significant(0.031_24), "0.0312"),
        (significant(-2.5, 2), "-2.5"),
        (in_bytes(0), "0 bytes"),
        (in_bytes(999), "999 bytes"),
        (in_bytes(9_328_000), "9.33 MB"),
        (in_bytes(61.2e9), "61.2 GB"),
        (in_bytes(1e15), "1,000 TB"),
        (in_time(0.2), "a second"),
        (in_time(8.7), "8.7 seconds"),
        (in_time(119), "119 seconds"),
        (in_time(50 * 60), "50 minutes"),
        (in_time(5.21 * 3_600), "5.2 hours"),
        (in_time(75 * 3_600), "3.1 days"),
        (in_rate(436.2), "436 tokens/s"),
        (in_rate(0.25, "features"), "0.250 features/s"),
    ],
)
def test_a_quantity_has_a_unit_that_suits_it(written, expected):
    assert written == expected
