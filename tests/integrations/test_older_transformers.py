"""Is everything right with an old transformers too? The short form of `make test-versions`: one release, a few cases."""

import subprocess
import sys

import version_left_out
import versions

NAME = "transformers-4.57.6"


def test_the_last_of_version_4():
    assert (versions.folder_of(NAME) / "complete").exists(), f"python tests/versions.py --install {NAME}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/version_cases.py"]
    done = subprocess.run(command, cwd=versions.ROOT, env=versions.environment(NAME), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_what_is_left_out_is_there():
    """pytest says nothing about a test to leave out that has gone."""
    for test in version_left_out.tests(NAME.partition("-")[2]):
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (versions.ROOT / file).read_text(), test


def test_the_makefile_installs_it():
    assert f"tests/versions.py --install {NAME}" in (versions.ROOT / "Makefile").read_text()
