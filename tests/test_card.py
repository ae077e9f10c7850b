"""What is different on a graphics card; all other tests run as if there were none."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

NONE_RAN = 5  # pytest's exit status


def test_on_a_card():
    """The tests of on_card.py, in a process that sees the cards that the user lets it see."""
    environment = {**os.environ, "TESTED_ON_CARD": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = cards = environment.pop("CARDS_OF_USER")
    if cards == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_card.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == NONE_RAN:
        pytest.skip("needs a graphics card")
    assert done.returncode == 0, done.stdout
