"""Definitions: what passes, what is refused where, and what the digest covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptd import errors
from ckptd.pipeline import definition, placeholders
from ckptd.pipeline.definition import Definition

WHOLE = """
pipeline: publish
watch:
  - path: /runs/*/checkpoint-*
    layout: auto
    settle: 10s
    done_file: null
device: auto
assets: null
stages:
  - tie
  - resize: {pad_to_multiple_of: 64}
  - footprint: {max: 24GB}
  - reshard: {max_shard_size: 5GB}
push:
  repo_id: "acme/{run}"
  revision: "main"
  create_pr: false
  private: true
  commit_message: "{run} at step {step}"
  tags: [ckptd]
  git_tag: "step-{step}"
"""

Stages = dict[str, Any]


def parse(text: str, stages: Stages) -> Definition:
    return definition.parse_definition(text, "p.yaml", stages=stages)


def problems(text: str, stages: Stages) -> list[str]:
    with pytest.raises(errors.DefinitionError) as caught:
        parse(text, stages)
    return [str(problem) for problem in caught.value.problems]


def with_stages(lines: str, rest: str = "") -> str:
    return f"pipeline: p\nstages:\n{lines}\n{rest}"


def with_push(lines: str) -> str:
    return f"pipeline: p\nstages: [tie]\npush:\n{lines}\n"


def test_the_default_message_names_the_step_or_the_checkpoint() -> None:
    """Without a message of one's own the commit names the step, or the folder where there is none."""
    push = definition.Push(repo_id="a/b")
    assert push.resolved(values()).commit_message == "My run! at step 20"
    assert push.resolved(values(step=None, name="final")).commit_message == "My run!/final"


def test_whole_definition(stages: Stages) -> None:
    """The definition of the design document is read with every unit and option resolved."""
    found = parse(WHOLE, stages)
    assert found.watch[0].settle == 10.0
    assert [call.name for call in found.stages] == ["tie", "resize", "footprint", "reshard"]
    assert found.stages[2].options.model_dump() == {"max": 24_000_000_000, "on_exceed": "fail"}
    assert found.push is not None
    assert found.push.repo_id == "acme/{run}"


def test_defaults_are_the_documented_ones(stages: Stages) -> None:
    """A definition that says only what it must gets the documented defaults."""
    found = parse(with_push("  repo_id: acme/m"), stages)
    assert found.push is not None
    assert (found.push.revision, found.push.private, found.push.create_pr) == ("main", None, False)
    assert found.push.commit_message is None
    assert (found.watch, found.device, found.assets) == ([], "auto", None)


def test_every_problem_at_once_with_its_place(stages: Stages) -> None:
    """All that is wrong is reported in one go, in the order of the file."""
    text = WHOLE.replace("settle: 10s", "settel: 10s").replace("pad_to_multiple_of: 64", "to: 0")
    text = text.replace("24GB", "24Gb!").replace("{step}", "{stepp}").replace("- tie", "- tye")
    assert problems(text, stages) == [
        "p.yaml:6:5: watch[0].settel: unknown key 'settel'; did you mean 'settle'?",
        "p.yaml:11:5: stages[0]: unknown stage 'tye'; did you mean 'tie'?",
        "p.yaml:12:18: stages[1].resize.to: must be greater than 0, found 0",
        (
            "p.yaml:13:22: stages[2].footprint.max: not a size: '24Gb!' "
            "(write 5GB, 24GiB or a number of bytes)"
        ),
        "p.yaml:20:19: push.commit_message: unknown placeholder 'stepp'; did you mean 'step'?",
        "p.yaml:22:12: push.git_tag: unknown placeholder 'stepp'; did you mean 'step'?",
    ]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "  - reshard\n  - tie",
            "p.yaml:3:5: stages[0]: reshard cannot work before tie: put it after",
        ),
        (
            "  - footprint: {max: 1}\n  - footprint: {max: 2}\n  - tie\n  - tie",
            "p.yaml:6:5: stages[3]: tie is there twice: give it once",
        ),
        ("  []", "p.yaml:3:3: stages: at least one is needed"),
        ("  - footprint", "p.yaml:3:5: stages[0].footprint.max: required, but absent"),
        (
            "  - {tie: {}, reshard: {}}",
            "p.yaml:3:5: stages[0]: one stage an item: begin each of tie, reshard with its own '- '",
        ),
        (
            "  - tie: 5",
            "p.yaml:3:10: stages[0].tie: options must be a mapping, such as tie: {force: ...}",
        ),
        ("  - 5", "p.yaml:3:5: stages[0]: must be the name of a stage, or a name with options"),
        (
            "  - footprint: {max: 1GB, on_exceed: explode}",
            (
                "p.yaml:3:38: stages[0].footprint.on_exceed: must be 'fail', 'warn' or 'hold_push', "
                "found 'explode'"
            ),
        ),
        (
            "  - tie: {force: yes}",
            "p.yaml:3:18: stages[0].tie.force: must be true or false, found 'yes'",
        ),
    ],
)
def test_wrong_stages(lines: str, problem: str, stages: Stages) -> None:
    """Order, repeats, emptiness and forms of the stage list are refused at their line."""
    assert problems(with_stages(lines), stages) == [problem]


def test_order_is_checked_although_options_are_wrong(stages: Stages) -> None:
    """A wrong option does not hide a wrong order."""
    found = problems(with_stages("  - reshard: {max_shard_size: x}\n  - resize: {to: 5}"), stages)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("  revision: main", "push.repo_id: required, but absent"),
        ("  repo_id: acme", "not a repo id: 'acme' (write owner/name)"),
        ("  repo_id: acme/a b", "letters, digits"),
        ("  repo_id: acme/a--b", "neither '--' nor '..'"),
        ("  repo_id: acme/-a", "either end"),
        ("  repo_id: acme/a.git", ".git"),
        (f"  repo_id: acme/{'a' * 96}", "101 characters"),
        ("  repo_id: a/b\n  revision: refs/heads/x", "write a branch name or refs/pr/N"),
        (f"  repo_id: a/b\n  revision: {'a' * 40}", "is a commit"),
        ("  repo_id: a/b\n  revision: a..b", "'..'"),
        ("  repo_id: a/b\n  revision: ''", "it is empty"),
        ("  repo_id: a/b\n  git_tag: step {step}", "a space"),
        ("  repo_id: a/b\n  git_tag: refs/tags/x", "write the name alone"),
        ("  repo_id: a/b\n  git_tag: 5", "put it in quotes"),
        ("  repo_id: a/b\n  revision: refs/pr/1\n  create_pr: true", "against main"),
        ("  repo_id: a/b\n  commit_message: '{run'", "literal braces"),
        ("  repo_id: a/b\n  commit_message: '{step:06d}'", "takes no format"),
        ("  repo_id: a/b\n  commit_message: ' '", "must not be empty"),
        ("  repo_id: a/b\n  tags: ['']", "must not be empty"),
    ],
)
def test_wrong_push(lines: str, what: str, stages: Stages) -> None:
    """What the Hub or git would refuse after hours of work is refused when the file is read."""
    found = problems(with_push(lines), stages)
    assert len(found) == 1
    assert what in found[0]


@pytest.mark.parametrize("revision", ["main", "refs/pr/7", "step-{step}", "runs/{run}", "null"])
def test_revisions_that_can_be_pushed_to(revision: str, stages: Stages) -> None:
    """Branches, pull request refs and names with placeholders pass."""
    assert parse(with_push(f"  repo_id: a/b\n  revision: {revision}"), stages).push


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("runs/*", "must be an absolute path"),
        ("~/runs/*", "must be an absolute path"),
        ("/runs/**/x", "spell every level out"),
        ("/runs/../x", "spell every level out"),
        ("/*/checkpoint-*", "must begin with a folder"),
        ("/", "must begin with a folder"),
        ("/runs/.ckptd/*", "begin with a dot"),
    ],
)
def test_wrong_watch_paths(path: str, what: str, stages: Stages) -> None:
    """A watch is an absolute glob below a folder that is spelled out."""
    found = problems(f"pipeline: p\nstages: [tie]\nwatch:\n  - path: '{path}'", stages)
    assert len(found) == 1
    assert what in found[0]


def test_repeated_watch_is_refused(stages: Stages) -> None:
    """The same place is watched once."""
    text = "pipeline: p\nstages: [tie]\nwatch:\n  - path: /r/*\n  - path: /r/*"
    assert problems(text, stages) == ["p.yaml:5:11: watch[1].path: '/r/*' is there twice"]


def test_wrong_heads(stages: Stages) -> None:
    """Name, device and assets are checked."""
    text = "pipeline: My Pipe\ndevice: tpu\nassets: here\nstages: [tie]"
    assert [problem.split(": ")[1] for problem in problems(text, stages)] == [
        "pipeline",
        "device",
        "assets",
    ]


def test_dump_round_trips_through_json(stages: Stages) -> None:
    """A definition travels to a runner process as JSON and arrives equal."""
    found = parse(WHOLE.replace("assets: null", "assets: /assets"), stages)
    sent = json.loads(json.dumps(found.dump()))
    received = Definition.model_validate(sent, context={"stages": stages})
    assert received == found
    assert received.dump() == found.dump()


def test_unreadable_file_is_a_problem_of_the_file(tmp_path: Path, stages: Stages) -> None:
    """A definition that is absent is refused like one that is wrong: by name."""
    with pytest.raises(errors.DefinitionError, match=r"absent\.yaml:1:1: cannot be read"):
        definition.load_definition(tmp_path / "absent.yaml", stages=stages)


def test_digest_covers_what_decides_the_bytes(stages: Stages) -> None:
    """Stages, their options and the assets count; watch, device and push do not."""
    base = definition.pipeline_digest(parse(WHOLE, stages))
    same = WHOLE.replace("/runs/", "/other/").replace("device: auto", "device: cpu")
    same = (
        same.replace("acme/", "umbrella/")
        .replace("5GB", "5000000000")
        .replace("- tie", "- tie: {}")
    )
    assert definition.pipeline_digest(parse(same, stages)) == base
    for old, new in (("5GB", "6GB"), ("  - tie\n", ""), ("assets: null", "assets: /a")):
        assert definition.pipeline_digest(parse(WHOLE.replace(old, new), stages)) != base
    assert len(base) == 64


def values(**changes: Any) -> placeholders.Values:
    given = {
        "source_path": Path("/runs/My run!/checkpoint-20"),
        "run": "My run!",
        "name": "checkpoint-20",
        "step": 20,
        "model_type": "llama",
        "digest": "0123456789ab",
        "date": "2026-01-31",
    }
    return placeholders.Values(**(given | changes))


def test_push_resolves_for_one_checkpoint(stages: Stages) -> None:
    """Names are made fit for the Hub, texts keep what the run is called."""
    push = parse(WHOLE, stages).push
    assert push is not None
    resolved = push.resolved(values())
    assert (resolved.repo_id, resolved.git_tag) == ("acme/My-run", "step-20")
    assert resolved.commit_message == "My run! at step 20"


def test_braces_of_a_run_name_stay(stages: Stages) -> None:
    """What a value holds is never read as a placeholder."""
    push = parse(WHOLE, stages).push
    assert push is not None
    assert push.resolved(values(run="{step}")).commit_message == "{step} at step 20"


def test_step_that_is_not_there_is_refused(stages: Stages) -> None:
    """A checkpoint without a step cannot fill {step}: refused by field, not published as None."""
    push = parse(WHOLE, stages).push
    assert push is not None
    with pytest.raises(
        errors.CheckpointUnsupported, match=r"has no step, which push\.commit_message"
    ):
        push.resolved(values(step=None))


def test_names_that_resolve_badly_are_refused(stages: Stages) -> None:
    """A run whose name leaves nothing of a repo name is refused before any work."""
    push = parse(WHOLE, stages).push
    assert push is not None
    with pytest.raises(errors.CheckpointUnsupported, match=r"push\.repo_id"):
        push.resolved(values(run="!!!"))


def test_wrong_json_raises_a_validation_error(stages: Stages) -> None:
    """A definition from elsewhere is checked as strictly as one from a file."""
    dump = parse(WHOLE, stages).dump()
    dump["stages"].append({"tie": {}})
    with pytest.raises(ValueError, match="twice"):
        Definition.model_validate(dump, context={"stages": stages})


@pytest.mark.parametrize("spelled", ["all", "newest", "{every: 500}"])
def test_take_is_read_and_travels(spelled: str, stages: Stages) -> None:
    """Each form of `take` passes and arrives equal in another process."""
    found = parse(with_stages("  - tie", f"take: {spelled}"), stages)
    sent = json.loads(json.dumps(found.dump()))
    assert Definition.model_validate(sent, context={"stages": stages}).take == found.take


@pytest.mark.parametrize(
    ("spelled", "problem"),
    [
        ("latest", "p.yaml:2:7: take: must be all, newest or {every: N}, found 'latest'"),
        ("500", "p.yaml:2:7: take: must be all, newest or {every: N}, found 500"),
        ("{every: 0}", "p.yaml:2:7: take: every: must be at least 1, found 0"),
        ("{every: yes}", "p.yaml:2:7: take: must be all, newest or {every: N}, found"),
        ("{every: 2, of: 3}", "p.yaml:2:7: take: must be all, newest or {every: N}, found"),
    ],
)
def test_wrong_take(spelled: str, problem: str, stages: Stages) -> None:
    """Another word, a bare number, an impossible one: one problem, with all the forms."""
    (found,) = problems(f"pipeline: p\ntake: {spelled}\nstages: [tie]", stages)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("  revision: step-{step}\n  forward_only: true", "does not go with revision"),
        ("  revision: '{name}'\n  forward_only: true", "does not go with revision"),
        ("  create_pr: true\n  forward_only: true", "push.create_pr: commits to no branch"),
        ("  forward_only: 5", "must be true or false"),
    ],
)
def test_forward_only_is_for_one_branch(lines: str, what: str, stages: Stages) -> None:
    """A branch for each step, or a pull request for each, has no newest step to hold."""
    (found,) = problems(with_push(f"  repo_id: a/b\n{lines}"), stages)
    assert what in found


@pytest.mark.parametrize("revision", ["latest", "'{run}'", "null", "main"])
def test_forward_only_goes_with_one_branch_of_a_run(revision: str, stages: Stages) -> None:
    """A branch that many checkpoints share may move forward only."""
    found = parse(
        with_push(f"  repo_id: a/b\n  revision: {revision}\n  forward_only: true"), stages
    )
    assert found.push is not None
    assert found.push.forward_only
