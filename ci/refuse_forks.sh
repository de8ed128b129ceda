#!/bin/sh
# A self-hosted runner's hook: end a job of a fork before its first step.
#
#   ACTIONS_RUNNER_HOOK_JOB_STARTED=/path/to/ci/refuse_forks.sh      in the runner's environment
#
# A pull request brings its own workflow files, so no condition written in them can protect a
# machine. This runs on the machine, from a copy that a pull request cannot change. Whatever it does
# not know, it refuses.
exec python3 -I -c '
import json, os, sys

def refuse(why):
    sys.exit("refuse_forks: refused: " + why)

event = os.environ.get("GITHUB_EVENT_NAME", "")
here = os.environ.get("GITHUB_REPOSITORY", "")
if not here:
    refuse("GITHUB_REPOSITORY is not set; this is a hook of a runner")
if event in ("push", "schedule", "workflow_dispatch"):
    sys.exit(0)  # of this repository: others cannot cause them
if event != "pull_request":
    refuse(f"a job of the event {event!r}: only push, schedule, workflow_dispatch and pull "
           "requests from within run here")
try:
    with open(os.environ["GITHUB_EVENT_PATH"], encoding="utf-8") as file:
        head = json.load(file)["pull_request"]["head"]["repo"]["full_name"]
except (KeyError, TypeError, OSError, ValueError):
    refuse("this pull request does not say where it comes from")
if head != here:
    refuse(f"a pull request from {head}: GPU runners take work from {here} only")
'
