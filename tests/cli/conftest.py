"""What tests of several commands share."""

import pytest

from ipt_fast.cli import main


@pytest.fixture
def run(model):
    """``ipt-fast restore`` with the saved model of the test's module."""

    def call(*arguments):
        return main(["restore", "--model", str(model), "--device", "cpu", *map(str, arguments)])

    return call
