"""Do the files for GitHub and pre-commit fit the project? They run existing commands, with the project's versions."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_whole(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for job in jobs.values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert "uses" in step or "run" in step
            if made := re.match(r"make ([\w-]+)", step.get("run", "")):
                assert made[1] in targets


def test_ci_tests_the_oldest_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={versions[0]}"' in PROJECT
    readme = (ROOT / "README.md").read_text()
    assert ", ".join(versions) in readme


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_form_is_whole(path):
    form = yaml.safe_load(path.read_text())
    if path.name != "config.yml":
        assert form["name"]
        assert form["description"]
        names = [field["id"] for field in form["body"]]
        assert len(names) == len(set(names))
        assert all(field["attributes"]["label"] for field in form["body"])


def test_pre_commit_has_the_projects_ruff():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert hooks.keys() == {"ruff", "mypy"}
    (pinned,) = hooks["ruff"]["additional_dependencies"]
    assert f'"{pinned}"' in PROJECT


def test_the_citation_is_whole():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert f'license = "{cited["license"]}"' in PROJECT
